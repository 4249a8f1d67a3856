"""A model to ship in two small files: weights.npz, and model.json with all that a checkpoint says
of itself.

Weights are rounded to bfloat16. Training cannot be resumed from it; `load.load_model` reads it like
a run directory.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.tree_util import DictKey

from mor_jax.errors import CheckpointError
from mor_jax.paths import as_path

WEIGHTS, MODEL = "weights.npz", "model.json"
FORMAT = 1


def is_bundle(path: str | os.PathLike[str]) -> bool:
    return (as_path(path) / MODEL).is_file()


def write_bundle(
    path: str | os.PathLike[str],
    params: Any,
    meta: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> int:
    """Write the two files; returns their bytes.

    Args:
      params: as `LM.init` returns them.
      meta: what a checkpoint says of itself: config, tokenizer, data, step, chat_template.
      provenance: how the weights were made, in JSON.
    """
    folder = as_path(path)
    folder.mkdir(parents=True, exist_ok=True)
    flat = jax.tree_util.tree_leaves_with_path(params)
    arrays = {
        "/".join(key.key for key in where): np.asarray(jnp.asarray(leaf, jnp.bfloat16)).view(
            np.uint16
        )
        for where, leaf in flat
    }
    with (folder / WEIGHTS).open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # but for one flag, arrays
    whole = {"format": FORMAT, "provenance": dict(provenance), **meta}
    (folder / MODEL).write_text(json.dumps(whole, ensure_ascii=False, indent=1) + "\n")
    return sum((folder / name).stat().length for name in (WEIGHTS, MODEL))


def read_bundle(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(model.json, weights by their path in the tree, as uint16). Raises CheckpointError: damaged,
    or too new."""
    folder = as_path(path)
    try:
        meta = json.loads((folder / MODEL).read_text(encoding="utf-8"))
        if meta["format"] > FORMAT:
            raise CheckpointError(
                f"{folder}: this bundle was written by a newer version; update mor_jax."
            )
        with (folder / WEIGHTS).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return meta, dict(arrays)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as e:
        raise CheckpointError(
            f"{folder}: not a bundle of {WEIGHTS} and {MODEL} that can be read ({e})."
        ) from e


def restore(arrays: Mapping[str, np.ndarray], abstract: Any, path: epath.PathLike) -> Any:
    """Parameters of these shapes, dtypes and places. Raises CheckpointError: one is missing or of
    another shape."""

    def leaf(where: tuple[DictKey, ...], like: jax.ShapeDtypeStruct) -> jax.Array:
        name = "/".join(key.key for key in where)
        found = arrays.get(name)
        if found is None or found.shape != like.shape:
            raise CheckpointError(
                f"{path}: {name} should have the shape {like.shape}; the bundle does not fit its config."
            )
        return jax.device_put(found.view(jnp.bfloat16).astype(like.dtype), like.sharding)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


__all__ = ["MODEL", "WEIGHTS", "is_bundle", "read_bundle", "restore", "write_bundle"]
