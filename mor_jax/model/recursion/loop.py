"""One step over the shared core, put together from the chosen knobs:

    s_0 = state(e),   u = conditioning(injection(s_t, e), t),   s_{t+1} = norm(core(u))

where e [B, T, D] is what the prelude returned.

With `recursion.inner` = n there are two states (HRM, arXiv 2506.21734; TRM, arXiv 2510.04871): n
steps that update z, then one that updates y, and again:

    z <- core(injection(z + y, e))  n times,   y <- core(y + z)

y is what the rest of the model reads. Both travel as one array [B, T, 2 D], y first.

Their parameters are the subtree "recursion" of the model's; a knob without any has no entry, and a
model without any has no such subtree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig, RecursionConfig
from mor_jax.model.recurse import Core
from mor_jax.model.recursion import conditioning, injection, state
from mor_jax.model.recursion.loss import gate_logits, init_gate
from mor_jax.model.recursion.part import Part
from mor_jax.nn.norm import rms_norm
from mor_jax.nn.parameters import Tree

FILES = {"state": state, "injection": injection, "conditioning": conditioning}


@dataclass(frozen=True)
class Loop:
    """Functions of the subtree "recursion" and of states [B, T, D]."""

    config: RecursionConfig
    model: ModelConfig

    def _part(self, knob: str) -> Part:
        return FILES[knob].CHOICES[getattr(self.config, knob)]

    def init(self, key: jax.Array) -> Tree:
        """Float32 parameters; {} when there are none."""
        m, keys = self.model, jax.random.split(key, len(FILES) + 1)
        found = {
            knob: self._part(knob).init(
                key, m.width * (self.states if knob == "state" else 1), m.recursions
            )
            for knob, key in zip(FILES, keys, strict=False)
        }
        if self.config.loop_norm:
            found["norm"] = {"scale": jnp.ones((m.width,))}
        if self.config.loss == "gate":
            found["gate"] = init_gate(keys[-1], m.width, m.init_std)
        return jax.tree.map(
            lambda x: x.astype(jnp.float32), {name: tree for name, tree in found.items() if tree}
        )

    def logical_axes(self) -> Tree:
        """All whole on every device: they are small beside the blocks."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return jax.tree.map(lambda leaf: (None,) * len(leaf.shape), shapes)

    def begin(
        self, params: Tree, e_BxTxD: jax.Array, pos_BxT: jax.Array, salt_B: jax.Array | None = None
    ) -> jax.Array:
        """The state before the first step. `salt_B`: of each row's draws in training."""
        wide = jnp.concatenate([e_BxTxD] * self.states, axis=-1)
        return self._part("state").apply(params.get("state"), wide, pos_BxT, salt_B, self.config)

    @property
    def states(self) -> int:
        """How many travel: y alone, or y and z."""
        return 2 if self.config.inner else 1

    def read(self, s: jax.Array) -> jax.Array:
        """y [..., D], what the rest of the model reads, of what travels."""
        return s[..., : self.model.width]

    def updates_y(self, t: jax.Array | int) -> jax.Array | bool:
        """Whether step t updates y, the state that is read."""
        return t % (self.config.inner + 1) == self.config.inner

    def around(self, core: Core, params: Tree, e_BxTxD: jax.Array, steps: jax.Array | int) -> Core:
        """A core as the executors call it, `core(s, ..., recursion=t) -> (y, extra)`, that reads
        and leaves states as configured. `steps`: of each row [B], or of all."""

        def run(
            s: jax.Array, *rest: Any, recursion: jax.Array | int, **how: Any
        ) -> tuple[jax.Array, Any]:
            inject, beyond = self._part("injection").apply, self.config.beyond
            both, of_y = jnp.split(s, self.states, axis=-1), self.updates_y(recursion)
            if self.states == 1:
                u = inject(params.get("injection"), s, e_BxTxD)
            else:
                seen = both[0] + both[1]
                u = jnp.where(of_y, seen, inject(params.get("injection"), seen, e_BxTxD))
            u = self._part("conditioning").apply(
                params.get("conditioning"), u, recursion, steps, beyond
            )
            new, extra = core(u, *rest, recursion=recursion, **how)
            if "norm" in params:
                new = rms_norm(new, params["norm"]["scale"], self.model.norm_eps)
            if self.states == 2:
                y, z = jnp.where(of_y, new, both[0]), jnp.where(of_y, both[1], new)
                new = jnp.concatenate([y, z], axis=-1)
            return new, extra

        return run

    def gate(self, params: Tree, h: jax.Array) -> jax.Array:
        """Logits [...] of the learned gate on states [..., D]."""
        return gate_logits(params["gate"], h)
