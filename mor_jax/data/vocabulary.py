"""What every tokenizer can do, and the simplest one: UTF-8 bytes."""

from __future__ import annotations

import abc
import codecs
import functools
import json
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from mor_jax.data.documents import digest_of, valid_text
from mor_jax.paths import as_path, write_text

FILE = "tokenizer.json"
BYTES_FORMAT = "mor_jax.bytes"  # how a saved ByteTokenizer names itself


class Framing(NamedTuple):
    """Which tokens open and close texts. A tokenizer.json of this project may state it, under
    "framing"."""

    bos: int
    eos: int  # closes a document
    ends: tuple[int, ...]  # all that end what a model writes: of documents, of turns
    add_bos: bool  # whether prompts and documents begin with bos


class Tokenizer(abc.ABC):
    """Text <-> token ids in [0, vocab_size). A subclass gives the bytes that each id stands for.

    Ids at or above `vocab_size` (a model's vocabulary is padded to a round size) decode to nothing.

    Attributes:
      vocab_size: number of ids.
      bos, eos: ids of the tokens that open and close a document; they may be equal.
      add_bos: whether prompts and documents begin with bos.
      pieces: bytes of each id; b"" for special tokens.
      strip_space: whether text starts with a space that the tokenizer itself put there.
    """

    vocab_size: int
    bos: int
    eos: int
    pieces: Sequence[bytes]
    add_bos: bool = True
    strip_space: bool = False

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos. The spelling of a special token is encoded as ordinary
        text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode_batch`, each an int32 array; what preparing a corpus uses."""
        return [np.asarray(ids, np.int32) for ids in self.encode_batch(texts)]

    @property
    def ends(self) -> frozenset[int]:
        """Tokens at which a model's text is over."""
        return frozenset({self.eos})

    @property
    def start(self) -> list[int]:
        """What comes before a document: [bos], or nothing."""
        return [self.bos] if self.add_bos else []

    def prompt(self, text: str) -> list[int]:
        """Ids of a text for the model to go on from, at least one."""
        return [*self.start, *self.encode(text)] or [self.bos]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Special tokens are dropped, bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self) -> StreamDecoder:
        return StreamDecoder(self)

    def piece(self, token: int) -> bytes:
        return self.pieces[token] if 0 <= token < self.vocab_size else b""

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int32[vocab_size]: UTF-8 bytes that each token stands for; 0 for special tokens."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @functools.cached_property
    def specials(self) -> dict[str, int]:
        """Spelling -> id of the tokens that stand for no text."""
        names = {i: self.token_text(i) for i, piece in enumerate(self.pieces) if not piece}
        return {name: i for i, name in names.items() if name}

    def token_text(self, token: int) -> str:
        """One token for a person to look at; incomplete UTF-8 shows as U+FFFD, special tokens by
        name."""
        return self.piece(token).decode("utf-8", "replace")

    @abc.abstractmethod
    def to_json(self) -> str:
        """All of it; equal strings mean equal tokenizers."""

    def fingerprint(self) -> str:
        """Hex digest of `to_json`."""
        return digest_of(self.to_json())

    def save(self, directory: str | os.PathLike[str]) -> epath.Path:
        """Write `directory`/tokenizer.json, which `load_tokenizer` reads; returns its path."""
        path = as_path(directory) / FILE
        write_text(path, self.to_json())
        return path


class StreamDecoder:
    """Token by token decoding. A character appears when its last byte has arrived.

    The concatenation of all `push` results and `flush` equals `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._piece = tokenizer.piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.strip_space

    def push(self, token: int) -> str:
        return self._show(self._utf8.decode(self._piece(int(token))))

    def flush(self) -> str:
        """The rest: U+FFFD for a character that never became complete."""
        return self._show(self._utf8.decode(b"", final=True))

    def _show(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class ByteTokenizer(Tokenizer):
    """256 bytes, bos 256, eos 257."""

    vocab_size = 258
    bos = 256
    eos = 257
    pieces = (*(bytes([b]) for b in range(256)), b"", b"")

    def encode(self, text: str) -> list[int]:
        return list(valid_text(text).encode())

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [
            np.frombuffer(valid_text(text).encode(), np.uint8).astype(np.int32) for text in texts
        ]

    def token_text(self, token: int) -> str:
        return {self.bos: "<|bos|>", self.eos: "<|eos|>"}.get(token) or super().token_text(token)

    def to_json(self) -> str:
        return json.dumps({"format": BYTES_FORMAT, "version": 1, "bos": self.bos, "eos": self.eos})
