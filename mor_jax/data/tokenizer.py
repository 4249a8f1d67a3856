"""Tokenizers by name or file: `bytes`, `bpe` (trained on the corpus), or any tokenizer.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

import tokenizers

from mor_jax.config import DataConfig
from mor_jax.data.bpe import BpeTokenizer, train_bpe
from mor_jax.data.chat import CHATML_TOKENS
from mor_jax.data.documents import Document
from mor_jax.data.vocabulary import (
    BYTES_FORMAT,
    FILE,
    ByteTokenizer,
    Framing,
    StreamDecoder,
    Tokenizer,
)
from mor_jax.errors import DataError
from mor_jax.paths import as_path, reason

__all__ = [
    "BpeTokenizer",
    "ByteTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "build_tokenizer",
    "load_tokenizer",
    "train_bpe",
]


def build_tokenizer(cfg: DataConfig, documents: Iterable[Document] = ()) -> Tokenizer:
    """The tokenizer that `cfg.tokenizer` asks for. Only `bpe` reads `documents`.

    Raises DataError where a tokenizer.json is missing or broken."""
    if cfg.tokenizer == "bytes":
        return ByteTokenizer()
    if cfg.tokenizer == "bpe":
        specials = CHATML_TOKENS if cfg.conversations and cfg.chat_template == "chatml" else ()
        return train_bpe((document.text for document in documents), cfg.bpe_vocab, specials)
    if not as_path(cfg.tokenizer).exists():
        raise DataError(
            f"config.data.tokenizer = {cfg.tokenizer!r} is neither bytes, bpe nor an existing tokenizer.json."
        )
    return load_tokenizer(cfg.tokenizer)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in `path`, a tokenizer.json or a directory with one.

    Which tokens open and close texts is read from "framing" (`vocabulary.Framing`); without it,
    begin and end of a document are found by their usual names (`bpe.BOS_NAMES`, `bpe.EOS_NAMES`).
    Raises DataError naming the file when it is missing, broken, or has no such tokens."""
    path = as_path(path)
    if path.is_dir():
        path = path / FILE
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(text)
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({reason(e)}).") from e
    except ValueError as e:  # JSONDecodeError and UnicodeDecodeError both are
        raise DataError(f"{path}: not a tokenizer.json ({e}). Fetch or write it again.") from e
    if isinstance(config, dict) and config.get("format") == BYTES_FORMAT:
        return ByteTokenizer()
    framing = None
    if isinstance(config, dict) and "framing" in config:
        framing = _framing(config.pop("framing"), str(path))
        text = json.dumps(config, ensure_ascii=False)
    try:
        hf = tokenizers.Tokenizer.from_str(text)
    except Exception as e:  # the library raises bare Exception
        raise DataError(
            f"{path}: not a tokenizer.json that the tokenizers library can load ({e})."
        ) from e
    return BpeTokenizer(hf, str(path), framing)


def _framing(given: Any, where: str) -> Framing:
    """Raises DataError."""
    try:
        bos, eos, ends, add_bos = (given[name] for name in Framing._fields)
        return Framing(int(bos), int(eos), tuple(map(int, ends)), bool(add_bos))
    except (TypeError, KeyError, ValueError) as e:
        raise DataError(
            f'{where}: "framing" must hold {", ".join(Framing._fields)}, got {given!r}.'
        ) from e
