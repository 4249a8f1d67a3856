"""When a token stops at inference, from its own states alone: no rule looks at another token, so a
decoded token stops where the whole row would stop it.

Most are zero-shot rules of Huginn (arXiv 2502.05171): stop once a step changes little. They compare
two steps, so that the second is the first that can stop a token. All stop below the threshold,
strictly: at 0 nothing stops early.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mor_jax.config import RecursionConfig
from mor_jax.model.depth import Fixed

FAR = 1e30  # from anything: the memory before the first step
HALTING = 0x4A17  # seed of what "draw" draws
MULTIPLIER = 0x9E3779B1  # of the hash of a document so far; odd, near 2^32 over the golden ratio


class Reader(NamedTuple):
    """What a rule may read off states [B, T, D]."""

    logits: Callable[[jax.Array], jax.Array]  # of the head, [B, T, V]
    gate: Callable[[jax.Array], jax.Array]  # logits of the learned gate, [B, T]
    hash_BxT: jax.Array | None = None  # uint32, of each token's document up to it (`hashed`)


class Rule(NamedTuple):
    """remember(reader, h) -> what is kept of each token, before the first step; judge(memory,
    before, after, reader, threshold) -> (whether to stop [B, T], memory), of the states before and
    after a step."""

    judge: Callable[..., tuple[jax.Array, Any]]
    remember: Callable[[Reader, jax.Array], Any] = lambda reader, h: jnp.zeros(
        h.shape[:2], jnp.int32
    )
    reads: str = ""  # the part of the model it runs after each step: head | gate


def _norm(h: jax.Array) -> jax.Array:
    return jnp.linalg.norm(h.astype(jnp.float32), axis=-1)


def _step_size(before: jax.Array, after: jax.Array) -> jax.Array:
    return _norm(after - before) / jnp.maximum(_norm(after), 1e-12)


def _far(reader: Reader, h: jax.Array) -> jax.Array:
    return jnp.full(h.shape[:2], FAR)


def _second(seen: jax.Array, stop: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Not at the first step."""
    return stop & (seen > 0), seen + 1


def _latent(
    seen: jax.Array, before: jax.Array, after: jax.Array, reader: Reader, threshold: float
) -> tuple[jax.Array, jax.Array]:
    """Relative change of the state (Huginn: 0.03)."""
    return _second(seen, _step_size(before, after) < threshold)


def _cosine(
    seen: jax.Array, before: jax.Array, after: jax.Array, reader: Reader, threshold: float
) -> tuple[jax.Array, jax.Array]:
    """1 - cosine of the two states (Huginn: 1e-3)."""
    dot = jnp.sum(before.astype(jnp.float32) * after.astype(jnp.float32), axis=-1)
    return _second(seen, 1 - dot / jnp.maximum(_norm(before) * _norm(after), 1e-12) < threshold)


def _acceleration(
    size: jax.Array, before: jax.Array, after: jax.Array, reader: Reader, threshold: float
) -> tuple[jax.Array, jax.Array]:
    """Change of the step size (arXiv 2509.23314)."""
    new = _step_size(before, after)
    return jnp.abs(new - size) < threshold, new


def _kl(
    log_p: jax.Array, before: jax.Array, after: jax.Array, reader: Reader, threshold: float
) -> tuple[jax.Array, jax.Array]:
    """Divergence of the head's distribution from that of the step before (Huginn: 1e-3 in the
    code)."""
    new = jax.nn.log_softmax(reader.logits(after))
    return jnp.sum(jnp.exp(new) * (new - log_p), axis=-1) < threshold, new


def _entropy(
    last: jax.Array, before: jax.Array, after: jax.Array, reader: Reader, threshold: float
) -> tuple[jax.Array, jax.Array]:
    """Change of the entropy of the head's distribution (Huginn: 1e-3)."""
    log_p = jax.nn.log_softmax(reader.logits(after))
    new = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return jnp.abs(new - last) < threshold, new


def _argmax(
    memory: tuple[jax.Array, jax.Array],
    before: jax.Array,
    after: jax.Array,
    reader: Reader,
    threshold: float,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The likeliest token has been the same for as many steps as the threshold says, after the one
    it first came at."""
    last, count = memory
    new = jnp.argmax(reader.logits(after), axis=-1)
    count = jnp.where(new == last, count + 1, 0)
    return (threshold > 0) & (count >= threshold), (new, count)


def _cdf(
    stay: jax.Array, before: jax.Array, after: jax.Array, reader: Reader, threshold: float
) -> tuple[jax.Array, jax.Array]:
    """The gate has stopped with a chance of at least the threshold by now (Ouro, arXiv
    2510.25741)."""
    stay = stay * jax.nn.sigmoid(-reader.gate(after))
    return stay <= 1 - threshold, stay


def _draw(
    memory: tuple[jax.Array, jax.Array],
    before: jax.Array,
    after: jax.Array,
    reader: Reader,
    threshold: float,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Halting drawn from the gate (PonderNet, arXiv 2107.05407), by a number for each token: the
    first step by which the chance to have stopped reaches it has the gate's distribution. At a
    threshold of 1; below, what is drawn is scaled by it, so that nothing stops later than "cdf"."""
    stay, number = memory
    stay = stay * jax.nn.sigmoid(-reader.gate(after))
    return stay <= 1 - threshold * number, (stay, number)


def _numbers(reader: Reader, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In (0, 1], a function of the document up to the token: rows draw on their own, and a token
    stops at the same step whether its row is computed whole or from a cache."""
    key = jax.random.key(HALTING)
    number = jax.vmap(jax.vmap(lambda seen: jax.random.uniform(jax.random.fold_in(key, seen))))
    return jnp.ones(h.shape[:2]), 1 - number(reader.hash_BxT)


def hashed(ids_BxT: jax.Array, pos_BxT: jax.Array, before_B: jax.Array | None = None) -> jax.Array:
    """uint32 [B, T], of each token's document up to it: hash = MULTIPLIER * hash + id + 1, from 0
    at its start. `before_B`: the hash before the first token of the row; default 0."""
    grows = jnp.where(pos_BxT > 0, jnp.uint32(MULTIPLIER), jnp.uint32(0))
    adds = ids_BxT.astype(jnp.uint32) + jnp.uint32(1)
    if before_B is not None:
        adds = adds.at[:, 0].add(grows[:, 0] * before_B)

    def join(
        a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return a[0] * b[0], a[1] * b[0] + b[1]

    return jax.lax.associative_scan(join, (grows, adds), axis=1)[1]


CHOICES: dict[str, Rule | None] = {
    "fixed": None,
    "latent": Rule(_latent),
    "cosine": Rule(_cosine),
    "acceleration": Rule(_acceleration, _far),
    "kl": Rule(
        _kl, lambda reader, h: jnp.full(jax.eval_shape(reader.logits, h).shape, -FAR), "head"
    ),
    "entropy": Rule(_entropy, _far, "head"),
    "argmax": Rule(
        _argmax,
        lambda reader, h: tuple(jnp.full(h.shape[:2], n, jnp.int32) for n in (-1, 0)),
        "head",
    ),
    "cdf": Rule(_cdf, lambda reader, h: jnp.ones(h.shape[:2]), "gate"),
    "draw": Rule(_draw, _numbers, "gate"),
}


def reads(name: str) -> str:
    """The part of the model that the rule of this name runs after each step: head, gate or ""."""
    rule = CHOICES[name]
    return rule.reads if rule else ""


@dataclass(frozen=True, eq=False)
class Exiting(Fixed):
    """The fixed policy, each token until the rule stops it. Not hashable: it lives within one
    trace."""

    config: RecursionConfig = field(default_factory=RecursionConfig)
    reader: Reader | None = None

    def _chosen(self) -> tuple[Rule, Reader]:
        rule = CHOICES[self.config.exit]
        assert rule is not None and self.reader is not None, "made where tokens exit"
        return rule, self.reader

    def remember(self, h_BxTxD: jax.Array) -> Any:
        rule, reader = self._chosen()
        return rule.remember(reader, h_BxTxD)

    def judge(
        self, step: jax.Array, memory: Any, before: jax.Array, after: jax.Array
    ) -> tuple[jax.Array, Any]:
        (rule, reader), threshold = self._chosen(), self.config.exit_threshold
        stop, memory = rule.judge(memory, before, after, reader, threshold)
        return ~(stop & (step + 1 >= self.config.exit_least)), memory
