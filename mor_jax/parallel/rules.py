"""Logical axes to mesh axes: one table, used for parameters, activations and batches alike.

Parameters are annotated with logical names (`nn/`), activations with `Rules.constrain`. A rule maps
a name to mesh axes, several joined by "+", or to "" (replicated).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mor_jax.errors import ConfigError
from mor_jax.parallel.mesh import AXES

DEFAULT_RULES: tuple[tuple[str, str], ...] = (
    ("batch", "data+fsdp"),  # rows of the batch
    ("time", "sequence"),  # of the states and of the tokens
    ("embed", "fsdp"),  # D of a weight matrix
    ("kv_heads", "tensor"),  # K: each kv head travels with its query heads
    ("head_out", ""),
    ("mlp", "tensor"),  # F
    ("vocab", "tensor"),
    ("table_embed", "fsdp"),  # the table is gathered before it is looked up in
    ("norm", ""),
    ("recursion", ""),
)


@dataclass(frozen=True)
class Rules:
    """The rule table of a run; hashable, so it can be a static argument."""

    table: tuple[tuple[str, str], ...] = DEFAULT_RULES

    @classmethod
    def create(cls, overrides: tuple[tuple[str, str], ...] = ()) -> Rules:
        """Default rules with some replaced. Raises ConfigError for unknown logical names or mesh
        axes."""
        table = dict(DEFAULT_RULES)
        for name, axes in overrides:
            if name not in table:
                near = difflib.get_close_matches(name, table, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(
                    f"config.mesh.rules: no logical axis {name!r}.{hint} Valid: {', '.join(table)}."
                )
            for axis in filter(None, axes.split("+")):
                if axis not in AXES:
                    raise ConfigError(
                        f"config.mesh.rules: {name!r} -> {axes!r}: no mesh axis {axis!r}. Valid: {AXES}."
                    )
            table[name] = axes
        return cls(tuple(table.items()))

    def axes(self, name: str | None) -> tuple[str, ...]:
        """Mesh axes of a logical name."""
        return tuple(filter(None, dict(self.table)[name].split("+"))) if name else ()

    def spec(self, names: tuple[str | None, ...], *, drop: tuple[str, ...] = ()) -> PartitionSpec:
        """PartitionSpec of an array whose dimensions carry these logical names; mesh axes in `drop`
        are left out."""

        def entry(name: str | None) -> str | tuple[str, ...] | None:
            mesh_axes = tuple(a for a in self.axes(name) if a not in drop)
            return mesh_axes[0] if len(mesh_axes) == 1 else (mesh_axes or None)

        return PartitionSpec(*(entry(name) for name in names))

    def constrain(self, x: jax.Array, *names: str | None, drop: tuple[str, ...] = ()) -> jax.Array:
        """`with_sharding_constraint` under the mesh in scope (`jax.set_mesh`); the identity when
        there is none. Axes that are manual there (`parallel/rows.py`) are left out."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return x
        return jax.lax.with_sharding_constraint(
            x, self.spec(names, drop=(*drop, *mesh.manual_axes))
        )

    def shardings(self, mesh: Mesh | AbstractMesh, logical_axes: Any) -> Any:
        """NamedShardings for a tree whose leaves are tuples of logical names."""

        def is_names(leaf: object) -> bool:
            return isinstance(leaf, tuple)

        return jax.tree.map(
            lambda names: NamedSharding(mesh, self.spec(names)), logical_axes, is_leaf=is_names
        )
