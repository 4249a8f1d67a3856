"""Which shapes of the network exist."""

from __future__ import annotations

import math
from dataclasses import fields

from mor_jax.config.fields import (
    ATTENTION,
    DTYPES,
    NORM_PLACEMENTS,
    NORMS,
    REMAT,
    ROPE_SCALINGS,
    SCAN_LAYERS,
    SHARING,
    ModelConfig,
)
from mor_jax.config.refusals import one_of, positive
from mor_jax.errors import ConfigError

# The ends of the range in which a scaling goes from everything to nothing, and the fields that each
# scaling reads.
LINE = {
    "llama3": ("rope_low_freq_factor", "rope_high_freq_factor"),
    "yarn": ("rope_beta_slow", "rope_beta_fast"),
}
ROPE_FIELDS = {
    "none": (),
    "linear": ("rope_factor",),
    "llama3": ("rope_factor", "rope_original_context", *LINE["llama3"]),
    "yarn": ("rope_factor", "rope_original_context", *LINE["yarn"], "rope_attention_factor"),
}


def check_model(m: ModelConfig) -> None:
    where = "config.model"
    one_of(f"{where}.sharing", m.sharing, SHARING)
    one_of(f"{where}.dtype", m.dtype, DTYPES)
    one_of(f"{where}.remat", m.remat, REMAT)
    one_of(f"{where}.attention", m.attention, ATTENTION)
    one_of(f"{where}.scan_layers", m.scan_layers, SCAN_LAYERS)
    if m.scan_layers == "on" and m.recursion_encoding:
        raise ConfigError(
            f"{where}.scan_layers = 'on' makes a loop of the core's blocks, but under "
            f"{where}.recursion_encoding the first has a factor that the others have not. Use "
            "'auto' or 'off', which leave them unrolled."
        )
    positive(
        where,
        layers=m.layers,
        recursions=m.recursions,
        width=m.width,
        heads=m.heads,
        kv_heads=m.kv_heads,
        mlp_width=m.mlp_width,
        context=m.context,
        rope_theta=m.rope_theta,
        norm_eps=m.norm_eps,
        init_std=m.init_std,
    )
    if not 0 <= m.smear < m.context:
        raise ConfigError(
            f"{where}.smear counts previous tokens, 0 to context - 1 = {m.context - 1}; got {m.smear}."
        )
    if m.vocab_size < 0 or m.loss_chunk < 0 or m.head_dim < 0:
        raise ConfigError(f"{where}: vocab_size, loss_chunk and head_dim must not be negative.")
    one_of(f"{where}.norm_placement", m.norm_placement, NORM_PLACEMENTS)
    if not 0 <= m.layer_scale < math.inf:
        raise ConfigError(
            f"{where}.layer_scale must be positive, or 0 for none, got {m.layer_scale}."
        )
    if not 0 <= m.logit_cap < math.inf:
        raise ConfigError(
            f"{where}.logit_cap must be positive, or 0 for no cap, got {m.logit_cap}."
        )
    if m.heads % m.kv_heads:
        fits = [k for k in range(1, m.heads + 1) if m.heads % k == 0]
        raise ConfigError(
            f"{where}.kv_heads = {m.kv_heads} does not divide heads = {m.heads}; grouped-query attention needs "
            f"equal groups. kv_heads that fit: {', '.join(map(str, fits))}."
        )
    if not m.head_dim and m.width % m.heads:
        raise ConfigError(
            f"{where}.width = {m.width} is not divisible by heads = {m.heads}; set {where}.head_dim or change one of them."
        )
    if m.dims[2] % 2:
        raise ConfigError(
            f"{where}: the head dimension is {m.dims[2]}; rotary embedding needs an even one."
        )
    if m.attention == "cudnn" and m.dtype != "bfloat16":
        raise ConfigError(
            f"{where}.attention = 'cudnn' runs in half precision only, but {where}.dtype = {m.dtype!r}. Use dtype = "
            "'bfloat16', or attention = 'blocked'."
        )
    if m.prelude < -1 or m.coda < -1:
        raise ConfigError(
            f"{where}.prelude and .coda count blocks; -1 leaves them to the sharing scheme."
        )
    if m.sharing == "none" and max(m.prelude, m.coda) > 0:
        raise ConfigError(
            f"{where}.sharing = 'none' shares nothing, so {where}.prelude and .coda mean nothing; remove them, or "
            "choose sharing = 'cycle'."
        )
    if m.sharing == "none" and m.recursions != 1:
        raise ConfigError(
            f"{where}.sharing = 'none' has nothing to recurse over, but recursions = {m.recursions}. "
            "Use sharing = 'middle_cycle' (or 'cycle'), or recursions = 1."
        )
    if m.networks < 1 or (m.networks > 1 and m.sharing not in ("cycle", "middle_cycle")):
        raise ConfigError(
            f"{where}.networks = {m.networks} counts the cores that recursions apply in turn: at least 1, and more than "
            f"1 with sharing = 'cycle' or 'middle_cycle' only, not {m.sharing!r}."
        )
    if m.networks > m.recursions:
        raise ConfigError(
            f"{where}.networks = {m.networks} is more than recursions = {m.recursions}: the last would never run."
        )
    if m.networks > 1 and m.relaxed:
        raise ConfigError(
            f"{where}.networks = {m.networks} gives recursions weights of their own, and lora_rank, norms = 'own' and "
            "recursion_encoding give them something of their own over shared weights. Use one of the two."
        )
    if m.bidirectional and m.attention != "xla":
        raise ConfigError(
            f"{where}.bidirectional = True needs {where}.attention = 'xla': {m.attention!r} computes only the part of the "
            "scores that looks back."
        )
    _check_rope(m)
    _check_relaxation(m)
    ends = sum(unshared_ends(m))
    inner = m.layers - ends
    if inner < m.recursions or inner % m.recursions:
        per = max(1, inner // m.recursions)
        fits = sorted({ends + m.recursions * k for k in (per - 1, per, per + 1) if k >= 1})
        raise ConfigError(
            f"{where}.layers = {m.layers} cannot be {m.sharing} with recursions = {m.recursions}: "
            f"layers - {ends} unshared must be a multiple of {m.recursions}. Layer counts near it that fit: "
            f"{', '.join(map(str, fits))}."
        )


def _check_rope(m: ModelConfig) -> None:
    where = "config.model"
    one_of(f"{where}.rope_scaling", m.rope_scaling, ROPE_SCALINGS)
    default = ModelConfig()
    changed = [
        f.name
        for f in fields(m)
        if f.name.startswith("rope_")
        and f.name not in ("rope_theta", "rope_scaling") + ROPE_FIELDS[m.rope_scaling]
        and getattr(m, f.name) != getattr(default, f.name)
    ]
    if changed:
        raise ConfigError(
            f"{where}.{changed[0]} = {getattr(m, changed[0])!r} means nothing under {where}.rope_scaling = "
            f"{m.rope_scaling!r}; remove it, or choose another scaling."
        )
    if not 1 <= m.rope_factor < math.inf:
        raise ConfigError(f"{where}.rope_factor must be 1 or more, got {m.rope_factor}.")
    if m.rope_scaling in ("llama3", "yarn"):
        positive(where, rope_original_context=m.rope_original_context)
        low, high = LINE[m.rope_scaling]
        positive(where, **{name: getattr(m, name) for name in (low, high)})
        if not getattr(m, low) < getattr(m, high):
            raise ConfigError(
                f"{where}.{low} = {getattr(m, low)} must be below {where}.{high} = {getattr(m, high)}."
            )
    if not 0 <= m.rope_attention_factor < math.inf:
        raise ConfigError(
            f"{where}.rope_attention_factor must be positive, or 0, got {m.rope_attention_factor}."
        )


def _check_relaxation(m: ModelConfig) -> None:
    where = "config.model"
    one_of(f"{where}.norms", m.norms, NORMS)
    if m.lora_rank < 0:
        raise ConfigError(
            f"{where}.lora_rank must not be negative, got {m.lora_rank}; 0 means none."
        )
    in_place = m.sharing.endswith("sequence")
    if not m.relaxed or (m.recursions > 1 and not in_place):
        return
    given = {
        "norms": m.norms == "own",
        "lora_rank": m.lora_rank > 0,
        "recursion_encoding": m.recursion_encoding,
    }
    name = next(name for name, on in given.items() if on)
    why = (
        f"sharing = {m.sharing!r} repeats each block in place"
        if in_place
        else "recursions = 1 shares nothing"
    )
    raise ConfigError(
        f"{where}.{name} = {getattr(m, name)!r} gives each recursion over a shared core something of its own, but {why}. "
        "Remove it, or use sharing = 'middle_cycle' (or 'cycle') with recursions of 2 or more."
    )


def unshared_ends(m: ModelConfig) -> tuple[int, int]:
    """Blocks before and after the recursion: the first and the last in the middle schemes (paper,
    table 1), or as many as `prelude` and `coda` say."""
    scheme = 1 if m.sharing.startswith("middle_") else 0
    return (scheme if m.prelude < 0 else m.prelude), (scheme if m.coda < 0 else m.coda)
