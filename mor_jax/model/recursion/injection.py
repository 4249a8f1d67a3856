"""How the prelude's output e enters each step beside the state s, both [B, T, D]."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mor_jax.model.recursion.part import Part
from mor_jax.nn.dense import dense
from mor_jax.nn.parameters import Tree


def _none(params: Tree, s: jax.Array, e: jax.Array) -> jax.Array:
    return s


def _add(params: Tree, s: jax.Array, e: jax.Array) -> jax.Array:
    """s + e (TRM, arXiv 2510.04871; HRM, URM)."""
    return s + e


def _channel(params: Tree, s: jax.Array, e: jax.Array) -> jax.Array:
    """s + g * e with a learned factor on each dimension, at first 1."""
    return s + params["scale"].astype(s.dtype) * e


def _concat(params: Tree, s: jax.Array, e: jax.Array) -> jax.Array:
    """[s; e] through one matrix (Huginn's adapter, arXiv 2502.05171)."""
    return dense(jnp.concatenate([s, e], axis=-1), params["matrix"])


def carry(params: Tree) -> jax.Array:
    """[D]: what is left of each dimension of the state from one step to the next, in (0, 1)
    whatever the parameters."""
    rate = jnp.exp(params["rate"]["bias"]) * jax.nn.softplus(params["delta"]["bias"])
    return jnp.exp(-rate)


def _diagonal(params: Tree, s: jax.Array, e: jax.Array) -> jax.Array:
    """carry * s + delta * (B e): a discretised diagonal linear system (Parcae, arXiv
    2604.12946)."""
    drive = jax.nn.softplus(params["delta"]["bias"]).astype(s.dtype) * dense(e, params["matrix"])
    return carry(params).astype(s.dtype) * s + drive


def _init_concat(key: jax.Array, width: int, _: int) -> Tree:
    return {"matrix": math.sqrt(2 / (5 * width)) * jax.random.normal(key, (width, 2 * width))}


def _init_diagonal(key: jax.Array, width: int, _: int) -> Tree:
    """At first carry is 1/e, delta 1 and B the identity."""
    one = math.log(math.e - 1)  # softplus of it is 1
    return {
        "rate": {"bias": jnp.zeros((width,))},
        "delta": {"bias": jnp.full((width,), one)},
        "matrix": jnp.eye(width),
    }


# apply(params, s, e)
CHOICES = {
    "none": Part(_none),
    "add": Part(_add),
    "channel": Part(_channel, lambda key, width, _: {"scale": jnp.ones((width,))}),
    "concat": Part(_concat, _init_concat),
    "diagonal": Part(_diagonal, _init_diagonal),
}
