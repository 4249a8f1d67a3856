"""What every reader of foreign weights offers to `importing`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Protocol

import numpy as np
import tokenizers

from mor_jax.config import DepthConfig, ModelConfig
from mor_jax.data.bpe import BOS_NAMES, EOS_NAMES
from mor_jax.data.chat import TURN_ENDS
from mor_jax.data.vocabulary import Framing, Tokenizer
from mor_jax.errors import CheckpointError, UserError
from mor_jax.paths import as_path
from mor_jax.weights.families import Place


class WeightSource(Protocol):
    """Weights on disk, in Hugging Face's names.

    Attributes:
      where: for messages.
      model: the shape.
      depth: who recurses how often.
      chat_template: Jinja, None where there is none.
    """

    where: str
    model: ModelConfig
    depth: DepthConfig
    chat_template: str | None

    def places(self) -> dict[str, Place]:
        """Every tensor that there must be, by name."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor there is."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32. Raises CheckpointError: damaged, or of a type that is not
        supported."""

    def tokenizer(self, path: str | os.PathLike[str] = "") -> Tokenizer:
        """Its own, or the tokenizer.json in `path` with what the weights say of beginnings and
        ends.

        Raises UserError: there is none that can be read."""


def needed(module: str, what: str) -> ModuleType:
    """A package of the extra `weights`. Raises UserError: not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f'{what} needs the package {module}: pip install ".[weights]".') from None


def check_tensors(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Place], where: str
) -> None:
    """Raise CheckpointError unless the tensors are exactly those wanted, of their shapes."""
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    if missing:
        raise CheckpointError(
            f"{where}: the tensor {missing[0]}{_more(missing)} is missing; is the download complete?"
        )
    if unknown:
        raise CheckpointError(
            f"{where}: the tensor {unknown[0]}{_more(unknown)} is not part of this architecture as it is known here, so "
            "the model would not be computed as it was trained."
        )
    for name, place in wanted.items():
        if tuple(found[name]) != place.shape:
            raise CheckpointError(
                f"{where}: the tensor {name} has shape {list(found[name])}, its configuration needs {list(place.shape)}."
            )


def library_tokenizer(path: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """Raises CheckpointError."""
    try:
        return tokenizers.Tokenizer.from_str(as_path(path).read_text(encoding="utf-8"))
    except Exception as e:  # the library raises bare Exception
        raise CheckpointError(
            f"{path}: not a tokenizer.json that the tokenizers library can load ({e})."
        ) from e


def framing_of(
    hf: tokenizers.Tokenizer, bos: int | None, ends: Iterable[int], add_bos: bool, where: str
) -> Framing:
    """What the files say of the ids that open and close texts, and the usual names of special
    tokens beside it.

    Args:
      ends: stated ids of ends of sequence; the first closes documents.
    """
    specials = {t.content: i for i, t in hf.get_added_tokens_decoder().items() if t.special}
    named = [specials[name] for name in (*EOS_NAMES, *TURN_ENDS) if name in specials]
    named = [i for i in named if i != bos]  # "<|endoftext|>" opens texts too in some vocabularies
    all_ends = list(dict.fromkeys([*ends, *named]))
    if not all_ends:
        raise CheckpointError(f"{where}: nothing says which token ends a text (eos_token_id).")
    if bos is None:
        bos = next((specials[name] for name in BOS_NAMES if name in specials), all_ends[0])
    return Framing(bos, all_ends[0], tuple(all_ends), add_bos)


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
