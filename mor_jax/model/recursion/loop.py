"""One step over the shared core, put together from the chosen knobs:

    s_0 = state(e),   u = conditioning(injection(s_t, e), t),   s_{t+1} = norm(core(u))

where e [B, T, D] is what the prelude returned. Their parameters are the subtree "recursion" of the
model's; a knob without any has no entry, and a model without any has no such subtree.
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
            knob: self._part(knob).init(key, m.width, m.recursions)
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
        return self._part("state").apply(params.get("state"), e_BxTxD, pos_BxT, salt_B, self.config)

    def around(self, core: Core, params: Tree, e_BxTxD: jax.Array, steps: jax.Array | int) -> Core:
        """A core as the executors call it, `core(s, ..., recursion=t) -> (y, extra)`, that reads
        and leaves states as configured. `steps`: of each row [B], or of all."""

        def run(
            s: jax.Array, *rest: Any, recursion: jax.Array | int, **how: Any
        ) -> tuple[jax.Array, Any]:
            u = self._part("injection").apply(params.get("injection"), s, e_BxTxD)
            beyond = self.config.beyond
            u = self._part("conditioning").apply(
                params.get("conditioning"), u, recursion, steps, beyond
            )
            y, extra = core(u, *rest, recursion=recursion, **how)
            return rms_norm(
                y, params["norm"]["scale"], self.model.norm_eps
            ) if "norm" in params else y, extra

        return run

    def gate(self, params: Tree, h: jax.Array) -> jax.Array:
        """Logits [...] of the learned gate on states [..., D]."""
        return gate_logits(params["gate"], h)
