"""Flax Linen leaves. The only room that imports Flax: parameters leave it as a plain nested
dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from mor_jax.nn.attention import attention
from mor_jax.nn.parameters import VECTORS, Block, Lora, Scale, Table, Tree
from mor_jax.nn.router import Router, router_size

__all__ = [
    "VECTORS",
    "Block",
    "Lora",
    "Router",
    "Scale",
    "Table",
    "Tree",
    "apply",
    "attention",
    "init",
    "router_size",
]


def init(module: nn.Module, key: jax.Array, *args: Any) -> Tree:
    """Parameters of one leaf module, as a plain dict."""
    return nn.meta.unbox(module.init(key, *args)["params"])


def logical_axes(module: nn.Module, *args: Any) -> Tree:
    """Tree of tuples of logical axis names, one for every parameter of `init`; nothing is
    computed."""
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))["params"]

    def is_box(leaf: object) -> bool:
        return isinstance(leaf, nn.meta.AxisMetadata)

    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=is_box)


def apply(module: nn.Module, params: Mapping[str, Any], *args: Any) -> Any:
    """Pure application of a leaf module."""
    return module.apply({"params": params}, *args)
