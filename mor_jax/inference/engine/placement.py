"""Where the arrays of an engine lie on a mesh.

Weights are cut over `tensor` by the rules of training (`parallel/rules.py`): heads with their kv
head, the width of the feed-forward, the vocabulary. Keys and values are cut over their kv heads.
All else, the states of the tokens and what is drawn from, is whole on every device. A block then
sends two sums of the lanes' states, and a boundary the logits.

On a mesh whose `tensor` is 1 everything is whole on each device, and programs are those of one
device.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mor_jax.inference.engine import layers
from mor_jax.inference.engine.layers import Int8, WeightFormat, Weights, contracted
from mor_jax.inference.engine.logs import Log
from mor_jax.inference.engine.rows import DrawConfig
from mor_jax.inference.engine.state import Shape, State, empty_state
from mor_jax.model.lm import LM
from mor_jax.nn.parameters import Tree
from mor_jax.parallel.rules import Rules


@dataclass(frozen=True)
class Placement:
    """Shardings for the arrays of one model's engine; without a mesh there are none."""

    mesh: Mesh | AbstractMesh | None  # abstract: to plan for devices that need not exist
    rules: Rules

    @property
    def cut(self) -> bool:
        """Whether a device has a part of the weights only."""
        return self.mesh is not None and self.mesh.shape.get("tensor", 1) > 1

    @property
    def whole(self) -> NamedSharding | None:
        """On each device."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """To trace and call programs in: what is cut is computed in its parts."""
        if self.cut and isinstance(self.mesh, Mesh):
            return jax.set_mesh(self.mesh)
        return contextlib.nullcontext()

    def parameters(self, lm: LM) -> Any:
        """Of the parameters, as `LM.init` returns them."""
        if not self.cut:
            return self.whole
        assert self.mesh is not None
        return self.rules.shardings(self.mesh, lm.logical_axes())

    def weights(self, lm: LM, prepared: Tree) -> Any:
        """Of what `layers.prepare` makes of them."""
        if not self.cut:
            return self.whole

        def leaf(path: Any, w: Any, names: tuple[str | None, ...]) -> Any:
            if not isinstance(w, Int8):
                return self._named(*names)
            out = len(names) - contracted(path)
            parts: list[Any] = [self._named(*names), self._named(*names[:out])]
            return Int8(*parts)

        return jax.tree_util.tree_map_with_path(
            leaf, prepared, lm.logical_axes(), is_leaf=lambda x: isinstance(x, Int8)
        )

    def outputs(self, made: Any) -> Any:
        """Of what a program returns: logs are cut."""
        if not self.cut:
            return self.whole

        def one(x: Any) -> Any:
            if isinstance(x, Log):
                return jax.tree.map(lambda _: self._named(None, "kv_heads"), x)
            return self.whole

        return jax.tree.map(one, made, is_leaf=lambda x: isinstance(x, Log))

    def rows(self, saved: Any) -> Any:
        """Of saved rows: keys and values [rows, K, H] are cut, ids and tags [rows] are not."""
        if not self.cut:
            return self.whole
        return jax.tree.map(
            lambda x: self._named(None, "kv_heads") if x.ndim == 3 else self.whole, saved
        )

    def shown(self, tree: Any, shardings: Any) -> Any:
        """Shapes of a tree with these places, to compile for."""
        if not self.cut:
            return tree
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
        )

    def prepare(self, lm: LM, params: Tree, weights: WeightFormat = "compute") -> Weights:
        """Parameters as the programs read them, in their places."""
        prepare = functools.partial(layers.prepare, lm, weights=weights, flat=not self.cut)
        if self.mesh is not None:
            params = jax.device_put(params, self.parameters(lm))
        where = self.weights(lm, jax.eval_shape(prepare, params))
        return jax.jit(prepare, out_shardings=where)(params)

    def empty_state(self, lm: LM, shape: Shape, draw: DrawConfig, routers: Any) -> State:
        """A state in which every lane is free, made in its places. Compiled, so that no two leaves
        share a buffer: each is donated."""
        make = functools.partial(empty_state, lm, shape, draw)
        with self.scope():
            where = self.outputs(jax.eval_shape(make, routers))
            return jax.jit(make, out_shardings=where)(routers)

    def _named(self, *names: str | None) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, self.rules.spec(names))


__all__ = ["Placement"]
