"""The training state, and its initialisation with each leaf sharded from the start."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mor_jax.nn.parameters import Tree
from mor_jax.parallel.rules import Rules


class TrainState(NamedTuple):
    """Step counter (optimiser steps done), parameters, optimiser state, and the running mean of the
    parameters (`config.optim.ema`), if one is kept."""

    step: jax.Array
    params: Any
    opt_state: Any
    average: Any = None

    def starting_from(self, params: Any) -> TrainState:
        """With these parameters, which are then the mean, too."""
        average = None if self.average is None else jax.tree.map(jnp.copy, params)
        return self._replace(params=params, average=average)


class Trained(Protocol):
    """What the parameters of a state belong to: a model, or adapters of one."""

    @property
    def rules(self) -> Rules: ...

    def init(self, key: jax.Array) -> Tree: ...

    def logical_axes(self) -> Tree: ...


def _create(
    lm: Trained, tx: optax.GradientTransformation, average: bool, key: jax.Array
) -> TrainState:
    params = lm.init(key)
    mean = jax.tree.map(jnp.copy, params) if average else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), mean)


def state_shardings(
    lm: Trained, tx: optax.GradientTransformation, mesh: Mesh, average: bool = False
) -> TrainState:
    """Shardings of every leaf; the optimiser's moments lie as their parameters do."""
    params = lm.rules.shardings(mesh, lm.logical_axes())
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = jax.eval_shape(lambda: _create(lm, tx, average, jax.random.key(0)))

    # Under a partition (`schedule.optimizer`) each optimiser has a hole where the parameters are
    # another's.
    def hole(leaf: object) -> bool:
        return isinstance(leaf, optax.MaskedNode)

    opt_state = optax.tree_map_params(
        tx,
        lambda leaf, sharding: leaf if hole(leaf) else sharding,
        abstract.opt_state,
        params,
        transform_non_params=lambda _: replicated,
        is_leaf=hole,
    )
    return TrainState._make((replicated, params, opt_state, params if average else None))


def abstract_state(
    lm: Trained, tx: optax.GradientTransformation, mesh: Mesh, average: bool = False
) -> TrainState:
    """Shapes, dtypes and shardings, nothing allocated: the template a checkpoint is restored
    into."""
    shapes = jax.eval_shape(lambda: _create(lm, tx, average, jax.random.key(0)))

    def make(s: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)

    return jax.tree.map(make, shapes, state_shardings(lm, tx, mesh, average))


def abstract_params(lm: Trained, mesh: Mesh) -> Any:
    """Of the parameters alone, as `abstract_state`."""
    shapes = jax.eval_shape(lm.init, jax.random.key(0))

    def make(s: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)

    return jax.tree.map(make, shapes, lm.rules.shardings(mesh, lm.logical_axes()))


def create_state(
    lm: Trained, tx: optax.GradientTransformation, mesh: Mesh, seed: int, average: bool = False
) -> TrainState:
    """Fresh state, each device computing its own shards. `average`: with a running mean of the
    parameters."""
    # Same numbers on every mesh: the partitionable generator draws each element independently of
    # the layout.
    init = jax.jit(
        lambda key: _create(lm, tx, average, key),
        out_shardings=state_shardings(lm, tx, mesh, average),
    )
    return init(jax.random.key(seed))
