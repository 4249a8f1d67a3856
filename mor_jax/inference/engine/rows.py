"""What a lane's draw reads, as arrays: one row a lane, put there when a request starts. No value
compiles anything."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.errors import UserError
from mor_jax.inference.engine.request import Drawing, Grammar

BIASES = 300  # tokens a request may bias, as OpenAI's API has it
STOPS = 16  # tokens a request may end with
COLDEST = 1e-4  # a lower temperature is greedy: logits divided by less would leave float32
NO_GRAMMAR = -1


class DrawConfig(NamedTuple):
    """What is fixed for all lanes. Static under jit.

    vocab_size: ids from here on are padding of the model's table and are never drawn.
    candidates: top-k and top-p look among so many most likely tokens first. Where that is too few,
      a slower search over all tokens takes over, so it changes the speed and not what is drawn.
    max_logprobs: K, tokens whose log-probabilities are handed out beside the drawn one's.
    """

    vocab_size: int
    candidates: int = 128
    max_logprobs: int = 20


class DrawRows(NamedTuple):
    """N lanes. V: `vocab_size`; W: ceil(V / 32) words of 32 tokens each; unused ids are V."""

    temperature_N: jax.Array  # float32; 0: greedy
    top_k_N: jax.Array  # int32; 0: off
    top_p_N: jax.Array
    min_p_N: jax.Array
    presence_N: jax.Array
    frequency_N: jax.Array
    repetition_N: jax.Array
    key_Nx2: jax.Array  # uint32, key data of the seed
    bias_ids_NxB: jax.Array
    bias_NxB: jax.Array
    stop_ids_NxS: jax.Array
    free_from_N: jax.Array  # stop tokens are not drawn before this position
    counts_NxV: jax.Array  # int32, generated tokens; kept for lanes with penalties only
    prompt_NxW: jax.Array  # uint32, tokens of the prompt
    grammar_NxW: jax.Array  # uint32, tokens that may come at position `grammar_at`
    grammar_at_N: jax.Array  # NO_GRAMMAR: anything may come
    logprobs_N: jax.Array  # -1: none wanted; n: the drawn token's and the n most likely ones'


def words(vocab_size: int) -> int:
    """Words of a bit mask over the vocabulary."""
    return -(-vocab_size // 32)


def bit_mask(tokens: Collection[int], vocab_size: int) -> np.ndarray:
    """uint32 [W], the bit of each of `tokens` set."""
    mask = np.zeros(words(vocab_size) * 32, np.uint8)
    mask[np.fromiter(tokens, np.int64, len(tokens))] = 1
    return np.packbits(mask, bitorder="little").view("<u4").astype(np.uint32)


def bits(mask_NxW: jax.Array, vocab_size: int) -> jax.Array:
    """bool [N, V] of a bit mask."""
    spread = (mask_NxW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return spread.reshape(mask_NxW.shape[0], -1)[:, :vocab_size].astype(bool)


def seed_words(seed: int) -> np.ndarray:
    """Key data uint32 [2] of any integer; for 0 <= seed < 2**32 that of `jax.random.key(seed)`."""
    return np.array([(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


def _check(
    d: Drawing, vocab_size: int, stop_tokens: Collection[int], logprobs: int | None, most: int
) -> None:
    def number(x: object) -> bool:
        return isinstance(x, (int, float)) and math.isfinite(x)

    limits = (
        ("temperature", "0 (greedy) or more", d.temperature, lambda x: x >= 0),
        ("top_k", "0 (off) or more", d.top_k, lambda x: x >= 0 and x == int(x)),
        ("top_p", "in (0, 1]", d.top_p, lambda x: 0 < x <= 1),
        ("min_p", "in [0, 1]", d.min_p, lambda x: 0 <= x <= 1),
        ("presence_penalty", "from -2 to 2", d.presence_penalty, lambda x: -2 <= x <= 2),
        ("frequency_penalty", "from -2 to 2", d.frequency_penalty, lambda x: -2 <= x <= 2),
        ("repetition_penalty", "above 0", d.repetition_penalty, lambda x: x > 0),
    )
    for name, want, value, holds in limits:
        if not number(value) or not holds(value):
            raise UserError(f"{name} must be {want}, got {value}.")
    if len(d.logit_bias) > BIASES:
        raise UserError(f"logit_bias may name {BIASES} tokens, got {len(d.logit_bias)}.")
    for token, value in d.logit_bias:
        if not 0 <= token < vocab_size or not number(value):
            raise UserError(
                f"logit_bias: {token}: {value} must be a token id below {vocab_size} with a finite number."
            )
    if len(stop_tokens) > STOPS:
        raise UserError(
            f"a request may end with one of at most {STOPS} stop tokens, got {len(stop_tokens)}."
        )
    if logprobs is not None and not 0 <= logprobs <= most:
        raise UserError(f"logprobs must be from 0 to {most}, got {logprobs}.")


def _padded(values: Sequence[float], room: int, fill: float, dtype: type) -> np.ndarray:
    out: np.ndarray = np.full(room, fill, dtype)
    out[: len(values)] = values
    return out


def host_row(
    drawing: Drawing,
    config: DrawConfig,
    *,
    prompt: Sequence[int],
    generated: Sequence[int] = (),
    stop_tokens: Collection[int] = frozenset(),
    min_tokens: int = 0,
    logprobs: int | None = None,
    grammar: Grammar | None = None,
) -> DrawRows:
    """One lane's row, numpy leaves without the leading N.

    Args:
      prompt, generated: tokens before the next draw; `generated` is not empty when a request goes
        on after it had to give its lane up. Ids must be below `vocab_size` to be counted; others
        (of another tokenizer) never come again.
      min_tokens: stop tokens are not drawn before so many. A grammar overrules it: it says itself
        where a text may end.
      grammar: its mask for the next draw is put into the row.
    Raises:
      UserError: a value outside its range, more biases than `BIASES`, more stop tokens than
        `STOPS`.
    """
    V = config.vocab_size
    _check(drawing, V, stop_tokens, logprobs, config.max_logprobs)
    d, f32, i32 = drawing, np.float32, np.int32

    def known(tokens: Collection[int]) -> list[int]:
        return [t for t in tokens if 0 <= t < V]

    position = len(prompt) + len(generated)
    leaves: dict[str, Any] = dict(
        temperature_N=f32(d.temperature if d.temperature >= COLDEST else 0),
        top_k_N=i32(min(d.top_k, V)),
        top_p_N=f32(d.top_p),
        min_p_N=f32(d.min_p),
        presence_N=f32(d.presence_penalty),
        frequency_N=f32(d.frequency_penalty),
        repetition_N=f32(d.repetition_penalty),
        key_Nx2=seed_words(d.seed),
        bias_ids_NxB=_padded([t for t, _ in d.logit_bias], BIASES, V, i32),
        bias_NxB=_padded([b for _, b in d.logit_bias], BIASES, 0, f32),
        stop_ids_NxS=_padded(sorted(known(stop_tokens)), STOPS, V, i32),
        free_from_N=i32(0 if grammar is not None else len(prompt) + min_tokens),
        counts_NxV=np.bincount(known(generated), minlength=V).astype(i32),
        prompt_NxW=bit_mask(set(known(prompt)), V),
        grammar_NxW=np.zeros(words(V), np.uint32)
        if grammar is None
        else np.asarray(grammar.allowed(), np.uint32),
        grammar_at_N=i32(NO_GRAMMAR if grammar is None else position),
        logprobs_N=i32(-1 if logprobs is None else logprobs),
    )
    return DrawRows(**leaves)


def empty_rows(lanes: int, config: DrawConfig) -> DrawRows:
    """Rows of lanes that nothing was put into: greedy, nothing wanted."""
    row = host_row(Drawing(temperature=0.0), config, prompt=())
    return jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.asarray(leaf), (lanes, *leaf.shape)), row)


def put_row(rows: DrawRows, lane: jax.Array | int, row: DrawRows) -> DrawRows:
    """`rows` with `row` (of `host_row`) in this lane."""
    return jax.tree.map(lambda all_, one: all_.at[lane].set(one), rows, row)


def put_mask(
    rows: DrawRows, lane: jax.Array | int, mask_W: jax.Array, position: jax.Array | int
) -> DrawRows:
    """`rows` with the grammar mask of this lane's draw at `position`."""
    return rows._replace(
        grammar_NxW=rows.grammar_NxW.at[lane].set(mask_W),
        grammar_at_N=rows.grammar_at_N.at[lane].set(position),
    )


def waiting(rows: DrawRows, position_N: jax.Array) -> jax.Array:
    """bool [N]: lanes that cannot draw at `position_N` yet, because their grammar's mask for it has
    not come."""
    return (rows.grammar_at_N != NO_GRAMMAR) & (rows.grammar_at_N != position_N)


__all__ = [
    "BIASES",
    "STOPS",
    "DrawConfig",
    "DrawRows",
    "bit_mask",
    "bits",
    "empty_rows",
    "host_row",
    "put_mask",
    "put_row",
    "waiting",
]
