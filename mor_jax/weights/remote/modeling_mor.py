"""A recursive-depth language model (Mixture-of-Recursions, arXiv 2507.10524) in PyTorch.

Written beside its weights by mor_jax, and read by transformers with `trust_remote_code=True`:

    AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

The blocks of `prelude` run once, those of `core` once for each recursion step, those of `coda`
once. A router decides token by token who runs a step, by the rule of causal inference: from a
token's own state, never from later tokens. Every token is computed at every step, and those that
stopped keep their state, so a smaller depth saves no time here; mor_jax's engine leaves them out.
Training goes through the same rule and has no loss for the router.

Positions follow from `attention_mask`. Letters: B batch, T time, S keys, D width, N query heads,
K kv heads, H head dim, R recursions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_mor import MorConfig

HIDDEN = {"linear": 0, "mlp": 2, "wide_mlp": 4}  # hidden units of a router, in widths
SURVEY = 256  # columns of the survey of a router's scores, which mor_jax reads


# What the library calls the cache; newer versions of it have the second name.
CACHE = next(
    f.name for f in fields(CausalLMOutputWithPast) if f.name in ("past_key_values", "cache")
)


@dataclass
class MorOutput(CausalLMOutputWithPast):
    """`depth` [B, T]: recursion steps that each token ran."""

    depth: Tensor | None = None


class MorCache(DynamicCache):
    """Keys and values of every block at every recursion step it makes any, one layer each; behind
    them who ran each step, and the last embeddings, so that they are sorted and cropped along."""

    def __init__(self) -> None:
        super().__init__()


def norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """RMSNorm, computed in float32."""
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * scale.float()).to(x.dtype)


def frequencies(m: dict[str, Any]) -> tuple[Tensor, float]:
    """(angular frequencies [H / 2], factor on cosine and sine) of the rotary embedding."""
    size = m["head_dim"]
    plain = m["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    kind = m["rope_scaling"]
    if kind == "none":
        return plain, 1.0
    long = plain / m["rope_factor"]
    if kind == "linear":
        return long, 1.0
    original = m["rope_original_context"]
    if kind == "llama3":
        low, high = m["rope_low_freq_factor"], m["rope_high_freq_factor"]
        kept = (original * plain / (2 * math.pi) - low) / (high - low)
        factor = 1.0
    else:

        def turning(turns: float) -> float:
            return (
                size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(m["rope_theta"]))
            )

        first = max(math.floor(turning(m["rope_beta_fast"])), 0)
        last = min(math.ceil(turning(m["rope_beta_slow"])), size - 1)
        kept = 1 - (torch.arange(size // 2, dtype=torch.float32) - first) / ((last - first) or 1e-3)
        factor = m["rope_attention_factor"] or 0.1 * math.log(m["rope_factor"]) + 1.0
    kept = kept.clamp(0, 1)
    return long * (1 - kept) + plain * kept, factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, T, H] by tables [B, 1, T, H / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Scale(nn.Module):
    """The factor of an RMSNorm or of a branch, [D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Attention(nn.Module):
    """Grouped-query attention. `seen(q, k, v)` attends, and keeps what it must."""

    def __init__(self, m: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = m["heads"], m["kv_heads"], m["head_dim"]
        self.eps, bias = m["norm_eps"], m["qkv_bias"]
        self.q_proj = nn.Linear(m["width"], self.heads * self.size, bias=bias)
        self.k_proj = nn.Linear(m["width"], self.kv_heads * self.size, bias=bias)
        self.v_proj = nn.Linear(m["width"], self.kv_heads * self.size, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.size, m["width"], bias=False)
        self.normed = m["qk_norm"]
        if self.normed:
            self.q_norm, self.k_norm = Scale(self.size), Scale(self.size)

    def forward(self, x: Tensor, rope: Any, seen: Any, more: Any, queries_only: bool) -> Tensor:
        """`more`: (what a recursion adds to queries, to values), or None."""

        def heads(y: Tensor, scale: Scale | None = None) -> Tensor:
            y = y.view(*y.shape[:2], -1, self.size).transpose(1, 2)
            return y if scale is None else norm(y, scale.weight, self.eps)

        q, k, v = self.q_proj(x), None, None
        q = q if more is None else q + more[0]
        q = rotate(heads(q, self.q_norm if self.normed else None), *rope)
        if not queries_only:
            k = rotate(heads(self.k_proj(x), self.k_norm if self.normed else None), *rope)
            v = self.v_proj(x)
            v = heads(v if more is None else v + more[1])
        return self.o_proj(seen(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, m: dict[str, Any]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(m["width"], m["mlp_width"], bias=False)
        self.up_proj = nn.Linear(m["width"], m["mlp_width"], bias=False)
        self.down_proj = nn.Linear(m["mlp_width"], m["width"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A Transformer block. `own`: what each recursion has of its own, leaves [R, ...]."""

    def __init__(self, m: dict[str, Any], place: str = "", number: int = 0) -> None:
        super().__init__()
        self.eps, self.where = m["norm_eps"], m["norm_placement"]
        self.self_attn, self.mlp = Attention(m), Mlp(m)
        self.own = nn.ParameterDict()
        steps, d, core = m["recursions"], m["width"], place == "core"
        own_norms = core and m["norms"] == "own"
        for name in ("input_layernorm", "post_attention_layernorm"):
            if own_norms:
                self.own[name] = nn.Parameter(torch.ones(steps, d))
            else:
                setattr(self, name, Scale(d))
        if core and m["recursion_encoding"] and number == 0:
            self.own["encoding"] = nn.Parameter(torch.ones(steps, d))
        if core and m["lora_rank"]:
            a = m["lora_rank"]
            for name, out in (("query", m["heads"]), ("value", m["kv_heads"])):
                self.own[f"{name}_down"] = nn.Parameter(torch.zeros(steps, a, d))
                self.own[f"{name}_up"] = nn.Parameter(torch.zeros(steps, out * m["head_dim"], a))
        for n in (1, 2):
            if self.where.startswith("sandwich"):
                setattr(self, f"after_{n}", Scale(d))
            if m["layer_scale"]:
                setattr(self, f"branch_{n}", Scale(d))

    def forward(
        self, x: Tensor, rope: Any, seen: Any, step: int = 0, queries_only: bool = False
    ) -> Tensor:
        if "encoding" in self.own:
            x = x * self.own["encoding"][step].to(x.dtype)
        n = self._normed(x, "input_layernorm", step)
        more = None
        if "query_down" in self.own:
            more = tuple(
                F.linear(F.linear(n, self.own[f"{name}_down"][step]), self.own[f"{name}_up"][step])
                for name in ("query", "value")
            )
        x = self._joined(x, self.self_attn(n, rope, seen, more, queries_only), 1, step)
        return self._joined(x, self.mlp(self._normed(x, "post_attention_layernorm", step)), 2, step)

    def _scale(self, name: str, step: int) -> Tensor:
        return self.own[name][step] if name in self.own else getattr(self, name).weight

    def _normed(self, x: Tensor, name: str, step: int) -> Tensor:
        return x if self.where == "post" else norm(x, self._scale(name, step), self.eps)

    def _joined(self, x: Tensor, y: Tensor, n: int, step: int) -> Tensor:
        if hasattr(self, f"branch_{n}"):
            y = y * getattr(self, f"branch_{n}").weight.to(y.dtype)
        if self.where == "pre":
            return x + y
        if self.where == "sandwich_in":
            return x + norm(y, getattr(self, f"after_{n}").weight, self.eps)
        if self.where == "sandwich_out":
            return norm(x + y, getattr(self, f"after_{n}").weight, self.eps)
        name = ("input_layernorm", "post_attention_layernorm")[n - 1]
        return norm(x + y, self._scale(name, step), self.eps)


class Scorer(nn.Module):
    """A router's network on raw states, in float32. `lead`: axes before those of a matrix."""

    def __init__(self, kind: str, lead: tuple[int, ...], outputs: int, width: int) -> None:
        super().__init__()
        self.lead, hidden = lead, HIDDEN[kind] * width
        if hidden:
            self.hidden = nn.Parameter(torch.zeros(*lead, hidden, width))
        self.kernel = nn.Parameter(torch.zeros(*lead, outputs, hidden or width))

    def forward(self, h: Tensor, step: int = 0) -> Tensor:
        def of(w: Tensor) -> Tensor:
            return (w[step] if self.lead else w).float()

        h = h.float()
        if hasattr(self, "hidden"):
            h = F.gelu(F.linear(h, of(self.hidden)))
        return F.linear(h, of(self.kernel))


class Fixed(nn.Module):
    """Every token runs every step. Also what the others are made of."""

    def __init__(self, m: dict[str, Any], depth: dict[str, Any]) -> None:
        super().__init__()
        self.recursions, self.d = m["recursions"], depth

    def begin(self, h: Tensor, pos: Tensor) -> Any:
        """What every step is told, from the states before the first."""

    def step(self, r: int, h: Tensor, pos: Tensor, told: Any) -> tuple[Tensor, Any]:
        """(who would run step r = 0.., [B, T] bool; what `combine` is told)."""
        return torch.ones_like(pos, dtype=torch.bool), None

    def combine(self, r: int, h: Tensor, y: Tensor, z: Any, told: Any) -> Tensor:
        """States of tokens that ran a step, from those before it and what the core made of them."""
        return y


class EveryKth(Fixed):
    """The depth of a token is set by its position."""

    def step(self, r: int, h: Tensor, pos: Tensor, told: Any) -> tuple[Tensor, Any]:
        deep = (pos + 1) % self.d["every"] == 0
        return deep | (r < self.d["shallow"]), None


class ExpertChoice(Fixed):
    """A score at each step: a token goes on while it is above the threshold."""

    def __init__(self, m: dict[str, Any], depth: dict[str, Any]) -> None:
        super().__init__(m, depth)
        lead = (m["recursions"],)
        self.scorer = Scorer(depth["router"], lead, 1, m["width"])
        if depth["inference"] == "auxiliary":
            self.auxiliary = Scorer(depth["router"], lead, 1, m["width"])
        if depth["inference"] == "calibrated":
            self.register_buffer("thresholds", torch.full(lead, torch.nan))
        self.register_buffer("survey", torch.zeros(*lead, SURVEY))

    def step(self, r: int, h: Tensor, pos: Tensor, told: Any) -> tuple[Tensor, Any]:
        x = h / self.d["temperature"]
        z = self.scorer(x, r)[..., 0]
        decides = self.auxiliary(x, r)[..., 0] if hasattr(self, "auxiliary") else z
        on = torch.sigmoid(decides) >= self.d["threshold"]
        if hasattr(self, "thresholds") and not torch.isnan(self.thresholds[r]):
            on = z >= self.thresholds[r]
        return on, z

    def combine(self, r: int, h: Tensor, y: Tensor, z: Any, told: Any) -> Tensor:
        if self.d["gate"] == "additive":
            return h + y
        score = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "none": lambda z: z}
        return h + (self.d["alpha"] * score[self.d["score"]](z))[..., None].to(h.dtype) * y


class TokenChoice(Fixed):
    """A depth for each token, chosen once before the first step."""

    def __init__(self, m: dict[str, Any], depth: dict[str, Any]) -> None:
        super().__init__(m, depth)
        self.scorer = Scorer(depth["router"], (), m["recursions"], m["width"])
        if depth["bias_rate"]:
            self.register_buffer("bias", torch.zeros(m["recursions"]))
        self.register_buffer("survey", torch.zeros(m["recursions"], SURVEY))

    def begin(self, h: Tensor, pos: Tensor) -> Any:
        z = self.scorer(h / self.d["temperature"])
        score = self.d["alpha"] * (z.softmax(-1) if self.d["score"] == "softmax" else z.sigmoid())
        chosen = score + self.bias.float() if hasattr(self, "bias") else score
        last = chosen.argmax(-1, keepdim=True)
        return last[..., 0], score.gather(-1, last).to(h.dtype), h

    def step(self, r: int, h: Tensor, pos: Tensor, told: Any) -> tuple[Tensor, Any]:
        return told[0] >= r, None

    def combine(self, r: int, h: Tensor, y: Tensor, z: Any, told: Any) -> Tensor:
        last, gate, entered = told
        ends = (last == r)[..., None]
        if self.d["gate"] == "every":
            return gate * y + torch.where(ends, entered, torch.zeros_like(entered))
        return torch.where(ends, entered + gate * y, y)


POLICIES = {
    "fixed": Fixed,
    "every_kth": EveryKth,
    "expert_choice": ExpertChoice,
    "token_choice": TokenChoice,
}


class Seen:
    """Attention of one pass: which keys its tokens see, and where keys are kept.

    visible [B, T, S]: keys of the row that are real and not later."""

    def __init__(self, cache: MorCache | None, visible: Tensor, scale: float) -> None:
        self.cache, self.visible, self.scale = cache, visible, scale

    def keep(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, these behind those of earlier passes."""
        return (k, v) if self.cache is None else self.cache.update(k, v, layer)

    def ran(self, layer: int, active: Tensor) -> Tensor:
        """[B, 1, S]: who of the row ran a step, these tokens behind those of earlier passes."""
        mark = active[:, None, :, None].to(torch.float32)
        return self.keep(layer, mark, mark)[0][:, :, :, 0] > 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ran: Tensor | None) -> Tensor:
        seen = self.visible if ran is None else self.visible & ran
        mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
        mask = mask.masked_fill(~seen, torch.finfo(q.dtype).min)[:, None]
        groups = q.shape[1] // k.shape[1]
        k, v = (x.to(q.dtype).repeat_interleave(groups, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)


class MorPreTrainedModel(PreTrainedModel):
    """What transformers is told of the model."""

    config_class = MorConfig
    base_model_prefix = "model"
    _no_split_modules = ("Block",)
    _keep_in_fp32_modules = ("router",)
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, self.config.model["init_std"])
            if getattr(module, "bias", None) is not None:
                module.bias.data.zero_()


class MorModel(MorPreTrainedModel):
    """Token ids to final states."""

    def __init__(self, config: MorConfig) -> None:
        super().__init__(config)
        m = self.m = config.model
        self.kv = config.depth["kv"]
        in_place = m["sharing"].endswith("sequence")
        core = (m["layers"] - m["prelude"] - m["coda"]) // m["recursions"]
        self.steps, self.repeat = (1, m["recursions"]) if in_place else (m["recursions"], 1)
        m = {**m, "recursions": self.steps}
        self.embed_tokens = nn.Embedding(m["vocab_size"], m["width"])
        if m["smear"]:
            self.smear = nn.Parameter(torch.full((m["smear"], m["width"]), 0.5))
        self.prelude = nn.ModuleList(Block(m) for _ in range(m["prelude"]))
        self.core = nn.ModuleList(Block(m, "core", i) for i in range(core))
        self.coda = nn.ModuleList(Block(m) for _ in range(m["coda"]))
        self.router = POLICIES[config.depth["policy"]](m, config.depth)
        self.norm = Scale(m["width"])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: DynamicCache | None = None,
        **_: Any,
    ) -> MorOutput:
        """`past_key_values` or `cache`: what an earlier pass returned."""
        given = past_key_values if cache is None else cache
        e = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = given if isinstance(given, MorCache) else None
        if cache is None and given is not None and given.get_seq_length():
            raise ValueError("the cache must be what this model returned")
        if cache is None and (use_cache or given is not None):
            cache = MorCache()
        past, now = 0 if cache is None else cache.get_seq_length(), e.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones(e.shape[0], past + now, device=e.device)
        if attention_mask.dim() != 2 or attention_mask.shape[1] != past + now:
            raise ValueError(f"attention_mask must be [B, {past + now}]")
        real_all = attention_mask > 0
        pos_all = (real_all.long().cumsum(-1) - 1).clamp(min=0)
        real, pos = real_all[:, past:], pos_all[:, past:]
        visible = real_all[:, None] & (pos_all[:, None] <= pos[:, :, None])
        seen = Seen(cache, visible, self.m["head_dim"] ** -0.5)

        # Layers of the cache: prelude, coda, core step by step, who ran each step, embeddings.
        n = len(self.core) * self.repeat
        first_core = len(self.prelude) + len(self.coda)
        marks = first_core + n * self.steps
        frequency, factor = frequencies(self.m)
        angle = pos[..., None].float() * frequency.to(e.device)
        rope = (angle.cos()[:, None] * factor, angle.sin()[:, None] * factor)

        def once(blocks: nn.ModuleList, x: Tensor, first: int) -> Tensor:
            for i, block in enumerate(blocks):

                def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = first + i) -> Tensor:
                    return seen.attend(q, *seen.keep(layer, k, v), None)

                x = block(x, rope, attend)
            return x

        x = once(self.prelude, self._smeared(e, pos, seen, marks + self.steps), 0)
        x, depth = self._recurse(x, rope, real, pos, seen, first_core, marks)
        x = once(self.coda, x, len(self.prelude))
        x = norm(x, self.norm.weight, self.m["norm_eps"])
        return MorOutput(hidden_states=x, depth=depth, **{CACHE: cache})

    def _smeared(self, e: Tensor, pos: Tensor, seen: Seen, layer: int) -> Tensor:
        """Embeddings, each with its share of those before it."""
        count = self.m["smear"]
        if not count:
            return e
        row = seen.keep(layer, e[:, None], e[:, None, :, :1])[0][:, 0]
        near = F.pad(row, (0, 0, count, 0))[:, -(e.shape[1] + count) :]
        x = e
        for i in range(1, count + 1):
            shifted = near[:, count - i : count - i + e.shape[1]] * self.smear[i - 1].to(e.dtype)
            x = x + torch.where((pos >= i)[..., None], shifted, torch.zeros_like(shifted))
        return x

    def _recurse(
        self, h: Tensor, rope: Any, real: Tensor, pos: Tensor, seen: Seen, first: int, marks: int
    ) -> tuple[Tensor, Tensor]:
        """(states after the last step, steps that each token ran)."""
        told, candidates, depth = self.router.begin(h, pos), real, torch.zeros_like(pos)
        n = len(self.core) * self.repeat
        kept: list[Any] = [None] * n
        for r in range(self.steps):
            wants, z = self.router.step(r, h, pos, told)
            active, queries_only, ran = candidates & wants, self.kv == "shared" and r > 0, None
            if self.kv == "recursion_wise":
                ran = seen.ran(marks + r, active)
            y = h
            for j in range(n):
                attend = self._attend(seen, first, r, j, kept, active, ran)
                y = self.core[j // self.repeat](y, rope, attend, r, queries_only)
            h = torch.where(active[..., None], self.router.combine(r, h, y, z, told), h)
            candidates, depth = active, depth + active
        return h, depth

    def _attend(
        self,
        seen: Seen,
        first: int,
        r: int,
        j: int,
        kept: list[Any],
        active: Tensor,
        ran: Tensor | None,
    ) -> Any:
        """Attention of the core's j-th block at step r. `kept`: of each block, keys and values that
        a later step looks back on, of the tokens of this pass."""
        looks_back = self.kv in ("shared", "hybrid", "hybrid_first")

        def attend(q: Tensor, k: Any, v: Any) -> Tensor:
            if k is None:
                return seen.attend(q, *self._stored(seen, first + j, kept[j]), None)
            if looks_back and r > 0:
                renewed, old = active[:, None, :, None], kept[j]
                k, v = torch.where(renewed, k, old[0]), torch.where(renewed, v, old[1])
            if looks_back and (r == 0 or self.kv == "hybrid"):
                kept[j] = (k, v)
            layer = first + r * len(kept) + j
            return seen.attend(q, *seen.keep(layer, k, v), ran)

        return attend

    @staticmethod
    def _stored(seen: Seen, layer: int, made: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole row that a layer of the cache holds."""
        if seen.cache is None:
            return made
        found = seen.cache.layers[layer]
        return found.keys, found.values


class MorForCausalLM(MorPreTrainedModel, GenerationMixin):
    """Token ids to logits."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MorConfig) -> None:
        super().__init__(config)
        self.model = MorModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        cache: DynamicCache | None = None,
        **_: Any,
    ) -> MorOutput:
        """`labels` [B, T]: ids to predict, -100 for none; `logits_to_keep`: of the last tokens, 0:
        of all."""
        past = past_key_values if cache is None else cache
        out = self.model(input_ids, attention_mask, past, inputs_embeds, use_cache)
        logits = self.lm_head(out.hidden_states[:, -logits_to_keep:]).float()
        cap = self.config.model["logit_cap"]
        logits = cap * torch.tanh(logits / cap) if cap else logits
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
            )
        states = {"hidden_states": out.hidden_states, "depth": out.depth, CACHE: out.get(CACHE)}
        return MorOutput(loss=loss, logits=logits, **states)
