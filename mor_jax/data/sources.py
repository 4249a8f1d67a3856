"""Where text comes from: one source a file, found by the name in `config.data.source`."""

from __future__ import annotations

from collections.abc import Callable

from mor_jax.config import DataConfig
from mor_jax.data.documents import Digest, Document, Source
from mor_jax.data.files import Files
from mor_jax.data.hashing import hash_file
from mor_jax.data.pystdlib import PyStdlib
from mor_jax.data.tfds_text import TfdsText
from mor_jax.errors import DataError

__all__ = ["REGISTRY", "Document", "Source", "open_source"]

REGISTRY: dict[str, Callable[[DataConfig, Digest], Source]] = {
    "pystdlib": PyStdlib,
    "files": Files,
    "tfds": TfdsText,
}


def open_source(cfg: DataConfig, digest: Digest = hash_file) -> Source:
    """The source that `cfg.source` names. `digest` hashes a file; pass a HashMemo to remember large
    ones.

    Raises DataError where the source cannot be opened (see the class of each)."""
    if cfg.source not in REGISTRY:
        raise DataError(f"config.data.source = {cfg.source!r} is not one of {', '.join(REGISTRY)}.")
    return REGISTRY[cfg.source](cfg, digest)
