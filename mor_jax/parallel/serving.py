"""The mesh that a server computes on, from what a person types: "tensor=8"."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from mor_jax.config import MeshConfig, ModelConfig
from mor_jax.errors import ConfigError
from mor_jax.parallel.mesh import AXES, make_mesh

# What is cut over `tensor`: fields of the model's configuration, and their names. Query heads go
# with their kv head.
CUT = {"kv_heads": "kv heads", "mlp_width": "mlp width", "vocab_size": "vocabulary"}


def tensor_axis(text: str) -> int:
    """N of "tensor=N". Raises ConfigError: another axis, or no such number."""
    size = 1
    seen: set[str] = set()
    for part in text.split(","):
        name, _, number = (x.strip() for x in part.partition("="))
        if name in ("data", "fsdp", "sequence"):
            why = (
                "it would copy the engine: run a server for each replica (launch.gke --serve --replicas)"
                if name == "data"
                else "it is an axis of training"
            )
            raise ConfigError(
                f"--mesh {text}: a server is cut over tensor alone, not over {name}; {why}. Write --mesh tensor=N."
            )
        if name != "tensor":
            near = difflib.get_close_matches(name, AXES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"--mesh {text}: there is no axis {name!r}.{hint} Write --mesh tensor=N, e.g. tensor=8."
            )
        if name in seen or not re.fullmatch(r"[1-9]\d{0,5}", number):
            raise ConfigError(
                f"--mesh {text}: expected one tensor=N with a number of devices, e.g. tensor=8."
            )
        seen.add(name)
        size = int(number)
    return size


def sizes_that_divide(model: ModelConfig, most: int) -> list[int]:
    """Sizes of `tensor` up to `most` that cut this model in equal parts."""
    return [n for n in range(1, most + 1) if all(getattr(model, name) % n == 0 for name in CUT)]


def check_tensor(text: str, tensor: int, model: ModelConfig, devices: int) -> None:
    """Raise ConfigError, with the sizes that would do, unless `devices` devices hold a mesh of
    this size and it cuts the model in equal parts."""
    able = ", ".join(f"tensor={n}" for n in reversed(sizes_that_divide(model, devices)))
    if tensor > devices:
        raise ConfigError(
            f"--mesh {text} needs {tensor} devices and there {'is' if devices == 1 else 'are'} {devices}. "
            f"This model could be cut by: {able}."
        )
    bad = [
        f"{words} ({getattr(model, name)})"
        for name, words in CUT.items()
        if getattr(model, name) % tensor
    ]
    if bad:
        raise ConfigError(
            f"--mesh {text}: {tensor} does not divide the model's {', '.join(bad)}. "
            f"On {devices} device{'s' * (devices > 1)} this model could be cut by: {able}."
        )


def serving_mesh(text: str, model: ModelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh of the first N devices (default: of all that JAX finds) for "tensor=N".

    Raises ConfigError: another axis, more devices than there are, or parts of the model that N does
    not divide.
    """
    devices = jax.devices() if devices is None else devices
    tensor = tensor_axis(text)
    check_tensor(text, tensor, model, len(devices))
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=tensor), list(devices)[:tensor])


__all__ = ["check_tensor", "serving_mesh", "sizes_that_divide", "tensor_axis"]
