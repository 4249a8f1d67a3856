"""Evaluate a loaded model on its own held-out documents, or on other text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from mor_jax.config import DataConfig
from mor_jax.data.loader import Batch, eval_batches
from mor_jax.data.packing import Row
from mor_jax.data.prepare import cache_root, prepare
from mor_jax.errors import ConfigError, DataError
from mor_jax.train.evaluate import evaluate, padded_token_bytes
from mor_jax.train.load import Loaded


class _Joined(Sequence[Row]):
    """Two row sources as one."""

    def __init__(self, first: Sequence[Row], second: Sequence[Row]):
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def __getitem__(self, i: int) -> Row:  # type: ignore[override]  # no slices
        return self._first[i] if i < len(self._first) else self._second[i - len(self._first)]


def score(
    loaded: Loaded,
    paths: tuple[str, ...] = (),
    *,
    text_key: str = "text",
    rows: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """The record of `train.evaluate.evaluate`.

    Args:
      paths: globs of files whose whole text is scored; (): the held-out documents of the run's
        corpus.
      rows: at most so many; 0: all; None: as in training for its own documents, all of other files.
      batch_size: rows at a time, divisible by the number of devices.
    Raises:
      DataError: the corpus cannot be read, or is no longer the one the model was trained on.
    """
    with jax.set_mesh(loaded.mesh):
        batches, token_bytes = held_out(
            loaded, paths, text_key=text_key, rows=rows, batch_size=batch_size, progress=progress
        )
        return evaluate(loaded.lm, loaded.params, batches, token_bytes)


def held_out(
    loaded: Loaded,
    paths: tuple[str, ...] = (),
    *,
    text_key: str = "text",
    rows: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> tuple[list[Batch], jax.Array]:
    """(batches, bytes of each token) to evaluate on; arguments and errors as in `score`."""
    if batch_size < 1 or batch_size % loaded.mesh.size:
        raise ConfigError(
            f"batch_size = {batch_size} must be a positive multiple of the {loaded.mesh.size} devices."
        )
    cfg, context = loaded.config, loaded.lm.model.context
    if paths:
        data = prepare(_other_text(loaded, paths, text_key), context, progress=progress)
        source, limit = _Joined(data.validation, data.train), rows or 0
    else:
        data = prepare(cfg.data, context, progress=progress)
        if data.fingerprint != loaded.data:
            raise DataError(
                "the corpus is not the one this model was trained on (its content or the tokenizer has changed), so its "
                "held-out documents may have been trained on. Evaluate on other text with --paths."
            )
        source, limit = data.validation, cfg.train.eval_rows if rows is None else rows
    sharding = NamedSharding(loaded.mesh, loaded.lm.rules.spec(("batch", "time")))
    batches = list(eval_batches(source, batch_size, limit=limit, sharding=sharding))
    return batches, padded_token_bytes(loaded.tokenizer.token_bytes, loaded.lm.model.vocab_size)


def _other_text(loaded: Loaded, paths: tuple[str, ...], text_key: str) -> DataConfig:
    """A data configuration that reads `paths` with the model's own tokenizer."""
    directory = (
        cache_root(loaded.config.data).parent / "tokenizers" / loaded.tokenizer.fingerprint()
    )
    path = loaded.tokenizer.save(directory)
    return dataclasses.replace(
        loaded.config.data,
        source="files",
        paths=paths,
        text_key=text_key,
        tokenizer=str(path),
        holdout=0.5,
        dedup="none",
    )
