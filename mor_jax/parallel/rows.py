"""Rows of the batch over the devices, each working on its own: one island of `shard_map` around a
pass over rows.

Left to itself, the partitioner reduces a weight's gradient wherever a product makes one: R times
for a core used R times, once a chunk of the loss. Inside `over_rows` the axes that rows are cut
along ("batch" and "time" of the rules) are manual: nothing travels along them unless it is written.
What is written:

* `gather_weight`: a weight cut over `fsdp` is made whole where it is used; its gradient is
  scattered back, once.
* `join_rows`, `own_part`: a row cut along time (the mesh axis `sequence`) is put together, and cut
  again.

Weights that are not cut are summed over devices on the way back, once, by `shard_map` itself. The
axis `tensor` stays the partitioner's. Outside of the island, and on a mesh whose axes are all 1,
these functions do nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mor_jax.parallel.mesh import backend
from mor_jax.parallel.rules import Rules

VIEWS = ("reshape", "transpose", "squeeze", "slice", "broadcast_in_dim", "convert_element_type")
SEQUENCE = "sequence"
ONE_PART = 8  # devices that one scatter spans: a machine of TPUs


def forget_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """A policy of `jax.checkpoint`: everything is kept for the backward pass but gathered weights.
    Nor are views of anything, which cost nothing to make again: a transposed weight is the whole
    weight, too."""
    return primitive.name not in VIEWS and not _gathers_weight(primitive, parameters)


def _gathers_weight(primitive: Any, parameters: dict[str, Any]) -> bool:
    """Whether an operation, or one inside of it, is a gather over other axes than that of keys and
    values."""
    if primitive.name == "all_gather":
        return SEQUENCE not in parameters["axis_name"]
    inner = parameters.get("call_jaxpr") or parameters.get("jaxpr")
    return inner is not None and any(_gathers_weight(e.primitive, e.params) for e in inner.eqns)


def manual_axes() -> frozenset[str]:
    """Mesh axes that are manual where this is called."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def over_rows(
    rules: Rules, run: Callable[..., tuple[Any, Any]], in_axes: tuple[Any, ...], out_axes: Any
) -> Callable[..., tuple[Any, Any]]:
    """`run(*args) -> (rows, sums)` on each device's own rows; sums are added up over the devices.

    Args:
      in_axes: for each argument a tree of tuples of logical axis names; weights are handed over as
        they lie, cut.
      out_axes: the same for `rows`. `sums` may be any tree of numbers.
    """

    def wrapped(*args: Any) -> tuple[Any, Any]:
        mesh = jax.sharding.get_abstract_mesh()
        cut = rules.axes("batch") + rules.axes("time")
        manual = tuple(axis for axis in cut if not mesh.empty and mesh.shape.get(axis, 1) > 1)
        if not manual or set(manual) & set(mesh.manual_axes):
            return run(*args)

        def specs(tree: Any) -> Any:
            return jax.tree.map(lambda n: _only(rules.spec(n), manual), tree, is_leaf=_is_names)

        def island(*args: Any) -> tuple[Any, Any]:
            rows, sums = run(*args)
            return rows, jax.tree.map(lambda x: x[None], sums)

        rows, sums = jax.shard_map(
            island,
            in_specs=tuple(specs(axes) for axes in in_axes),
            out_specs=(specs(out_axes), PartitionSpec(manual)),
            axis_names=set(manual),
            check_vma=False,
        )(*args)
        return rows, jax.tree.map(lambda x: x.sum(axis=0), sums)

    return wrapped


def gather_weight(
    rules: Rules, w: jax.Array, names: tuple[str | None, ...], dtype: jnp.dtype | str | None = None
) -> jax.Array:
    """A weight whole along the axes of the rows; along the others as it was. Outside the island, a
    constraint that says the same.

    `dtype`: what it is cast to before it travels (default: its own). Its gradient is summed over
    the devices in float32 and reaches the weight as that sum, never rounded to `dtype` again.
    """
    dtype = jnp.dtype(dtype or w.dtype)
    manual = manual_axes()
    if not manual:
        return rules.constrain(
            w.astype(dtype), *names, drop=rules.axes("batch") + rules.axes("time")
        )
    rest = rules.spec(names, drop=tuple(manual))
    for dim, name in enumerate(names):
        axes = tuple(a for a in rules.axes(name) if a in manual)
        if axes:
            w = _all_gather(w, axes, dim, rest, dtype)
    return w.astype(dtype)


def parts() -> int:
    """The number of pieces that each row is cut into, along the mesh axis `sequence`."""
    return jax.lax.axis_size(SEQUENCE) if SEQUENCE in manual_axes() else 1


def join_rows(x: jax.Array, axis: int = 1, heads: int | None = None) -> jax.Array:
    """[B, T / parts, ...] -> [B, T, ...], on every device that holds a part of the row. `heads`:
    the dimension of attention heads, which lies over `tensor`."""
    if parts() == 1:
        return x
    spec = PartitionSpec(*("tensor" if dim == heads else None for dim in range(x.ndim)))
    if not jnp.issubdtype(x.dtype, jnp.inexact):  # positions, segments, masks: no gradient
        return jax.lax.all_gather(x, SEQUENCE, axis=axis, tiled=True)
    return _all_gather(x, SEQUENCE, axis, spec)


def own_part(x: jax.Array, axis: int = 1) -> jax.Array:
    """[B, T, ...] -> [B, T / parts, ...]: this device's part. T must be a multiple of `parts()`."""
    if parts() == 1:
        return x
    length = x.shape[axis] // parts()
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(SEQUENCE) * length, length, axis=axis)


def _all_gather(
    x: jax.Array, axes: Any, dim: int, rest: PartitionSpec, dtype: jnp.dtype | None = None
) -> jax.Array:
    """Gather along manual axes, as `dtype`, an array that lies like `rest` over the others. Those
    are made manual for it: the partitioner would make the array whole along them, too, before a
    collective it has not made itself."""
    gather = functools.partial(_gather, axes, dim, jnp.dtype(dtype or x.dtype), x.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    others = {a for entry in rest for a in ((entry,) if isinstance(entry, str) else entry or ())}
    others = {a for a in others if mesh.shape.get(a, 1) > 1}
    if not others:
        return gather(x)
    spec = _only(rest, tuple(others))
    return jax.shard_map(gather, in_specs=spec, out_specs=spec, axis_names=others, check_vma=False)(
        x
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _gather(axes: Any, dim: int, dtype: jnp.dtype, cut_dtype: jnp.dtype, x: jax.Array) -> jax.Array:
    """A gather of an array of `cut_dtype`, sent as `dtype`. Its gradient is summed in float32,
    whatever the dtypes: bfloat16 would lose the digits of a sum over hundreds of devices (and XLA
    for CPUs fails on such a sum)."""
    return jax.lax.all_gather(x.astype(dtype), axes, axis=dim, tiled=True)


def _gather_bwd(
    axes: Any, dim: int, dtype: jnp.dtype, cut_dtype: jnp.dtype, _: None, g: jax.Array
) -> tuple[jax.Array]:
    total = _scatter(g.astype(jnp.float32), axes, dim)
    # Where micro-batches are added up in a loop, XLA for TPUs takes such a sum out of the loop:
    # what is added up is then the gradient of the whole weight, on every device. (And if the sum is
    # cast before it is added, it fails: docs/pods.md.) Behind the barrier each micro-batch scatters
    # its own, and a device adds up its part alone.
    return (jax.lax.optimization_barrier(total).astype(cut_dtype),)


def _scatter(x: jax.Array, axes: Any, dim: int) -> jax.Array:
    """`psum_scatter` along `dim`; over many TPUs in two parts, among those at the same place of
    each run of neighbours and then within each run. As many bytes are sent, and XLA for TPUs, which
    makes an all-reduce of one scatter over more than one dimension of a slice (docs/pods.md),
    scatters. (Nodes of GPUs have no dimensions: the first part would send everything between
    them.)"""
    devices = jax.lax.axis_size(axes)
    sizes = scatter_parts(devices) if backend() == "tpu" else (devices,)
    scatter = functools.partial(
        jax.lax.psum_scatter, axis_name=axes, scatter_dimension=dim, tiled=True
    )
    if len(sizes) == 1:
        return scatter(x)
    places = np.arange(math.prod(sizes)).reshape(sizes)
    x = scatter(x, axis_index_groups=places.T.tolist())
    return scatter(x, axis_index_groups=places.tolist())


def scatter_parts(devices: int) -> tuple[int, ...]:
    """Numbers of TPUs that take part in each part of a scatter: all of up to 8; of more the two
    factors that are nearest to each other, the larger first."""
    if devices <= ONE_PART:
        return (devices,)
    inner = max(n for n in range(1, math.isqrt(devices) + 1) if devices % n == 0)
    return (devices,) if inner == 1 else (devices // inner, inner)


_gather.defvjp(
    lambda axes, dim, dtype, cut_dtype, x: (_gather(axes, dim, dtype, cut_dtype, x), None),
    _gather_bwd,
)


def _is_names(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and all(n is None or isinstance(n, str) for n in leaf)


def _only(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """The spec with these mesh axes only."""

    def keep(entry: Any) -> tuple[str, ...] | None:
        return (
            tuple(a for a in ((entry,) if isinstance(entry, str) else entry or ()) if a in axes)
            or None
        )

    return PartitionSpec(*(keep(entry) for entry in spec))
