"""Logical axes to mesh axes: one table, used for parameters, activations and batches alike.

Parameters are annotated with logical names (`nn/`), activations with `Rules.constrain`. A rule maps a name to
mesh axes, several joined by "+", or to "" (replicated).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mor_jax.errors import ConfigError
from mor_jax.parallel.mesh import AXES

DEFAULT_RULES: tuple[tuple[str, str], ...] = (
    ("batch", "data+fsdp"),  # rows of the batch
    ("time", ""),
    ("embed", "fsdp"),  # D of a weight matrix
    ("kv_heads", "tensor"),  # K: each kv head travels with its query heads
    ("head_out", ""),
    ("mlp", "tensor"),  # F
    # The table is sharded over rows only: an embedding sharded on both axes makes the lookup's gradient
    # rematerialise in full.
    ("vocab", "tensor"),
    ("table_embed", ""),
    ("norm", ""),
    ("recursion", ""),
)


@dataclass(frozen=True)
class Rules:
    """The rule table of a run; hashable, so it can be a static argument."""

    table: tuple[tuple[str, str], ...] = DEFAULT_RULES

    @classmethod
    def create(cls, overrides: tuple[tuple[str, str], ...] = ()) -> Rules:
        """Default rules with some replaced. Raises ConfigError for unknown logical names or mesh axes."""
        table = dict(DEFAULT_RULES)
        for name, axes in overrides:
            if name not in table:
                near = difflib.get_close_matches(name, table, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"config.mesh.rules: no logical axis {name!r}.{hint} Valid: {', '.join(table)}.")
            for axis in filter(None, axes.split("+")):
                if axis not in AXES:
                    raise ConfigError(f"config.mesh.rules: {name!r} -> {axes!r}: no mesh axis {axis!r}. Valid: {AXES}.")
            table[name] = axes
        return cls(tuple(table.items()))

    def spec(self, names: tuple[str | None, ...], *, drop: tuple[str, ...] = ()) -> PartitionSpec:
        """PartitionSpec of an array whose dimensions carry these logical names; mesh axes in `drop` are left out."""
        table = dict(self.table)

        def axes(name):
            mesh_axes = tuple(a for a in table[name].split("+") if a and a not in drop) if name else ()
            return mesh_axes[0] if len(mesh_axes) == 1 else (mesh_axes or None)

        return PartitionSpec(*(axes(name) for name in names))

    def constrain(self, x: jax.Array, *names: str | None, drop: tuple[str, ...] = ()) -> jax.Array:
        """`with_sharding_constraint` under the mesh in scope (`jax.set_mesh`); the identity when there is none."""
        if jax.sharding.get_abstract_mesh().empty:
            return x
        return jax.lax.with_sharding_constraint(x, self.spec(names, drop=drop))

    def shardings(self, mesh: Mesh, logical_axes: Any) -> Any:
        """NamedShardings for a tree whose leaves are tuples of logical names."""
        is_names = lambda leaf: isinstance(leaf, tuple)
        return jax.tree.map(lambda names: NamedSharding(mesh, self.spec(names)), logical_axes, is_leaf=is_names)
