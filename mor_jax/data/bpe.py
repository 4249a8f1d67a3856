"""Subword tokenizers: byte-level BPE trained here, and anything else that comes as a
tokenizer.json."""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from mor_jax.data.documents import valid_text
from mor_jax.data.vocabulary import Framing, Tokenizer
from mor_jax.errors import DataError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@functools.cache
def byte_level_alphabet() -> Mapping[str, int]:
    """{character: byte} of byte-level BPE: printable Latin-1 stands for itself, the rest for 256,
    257, ..."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


class Spelling:
    """How the tokenizer with this `tokenizer.json` (parsed) spells its tokens: byte-level (GPT-2:
    each byte shown as one printable character), SentencePiece ("▁" for a space, "<0x0A>" for a
    byte), WordPiece ("##" glues to the left), or plainly.

    Attributes:
      byte_level: tokens are made of bytes; lengths are exact for any text.
      cuttable: encoding the two halves of "word word", cut before the space, gives the tokens of
        the whole.
      gpt2_words: text is cut into words by GPT-2's pattern and nothing else happens to it before.
      strip_space: decoding drops one space at the start, which encoding has added.
    """

    def __init__(self, config: Mapping[str, Any]):
        kinds = {
            key: [n.get("type") for n in _nodes(config.get(key))]
            for key in ("pre_tokenizer", "decoder")
        }
        nodes = [*_nodes(config.get("pre_tokenizer")), *_nodes(config.get("decoder"))]
        model = config.get("model") or {}
        self.byte_level = "ByteLevel" in kinds["pre_tokenizer"] + kinds["decoder"]
        self._wordpiece = model.get("type") == "WordPiece"
        self._prefix = model.get("continuing_subword_prefix") or "##"
        self._metaspace = not self.byte_level and any(
            n.get("type") == "Metaspace"
            or (n.get("type") == "Replace" and "▁" in str(n.get("pattern")))
            for n in [*nodes, *_nodes(config.get("normalizer"))]
        )
        self.strip_space = not self.byte_level and (
            self._wordpiece
            or any(
                n.get("type") == "Strip" and n.get("start") and n.get("content") == " "
                for n in nodes
            )
            or any(
                n.get("type") == "Metaspace" and _prepends(n) for n in _nodes(config.get("decoder"))
            )
        )
        before = list(_nodes(config.get("pre_tokenizer")))
        self.cuttable = (
            self.byte_level
            and any(
                n["type"] == "Split" or (n["type"] == "ByteLevel" and n.get("use_regex", True))
                for n in before
            )
            and not any(n.get("add_prefix_space") for n in before)
        )
        self.gpt2_words = (
            self.cuttable
            and [n["type"] for n in before] == ["ByteLevel"]
            and not config.get("normalizer")
            and not model.get("dropout")
            and all(token.get("special") for token in config.get("added_tokens") or [])
        )

    def bytes_of(self, token: str) -> bytes:
        """Bytes of an ordinary token (not an added one)."""
        if self.byte_level:
            alphabet = byte_level_alphabet()
            if all(c in alphabet for c in token):
                return bytes(alphabet[c] for c in token)
        if self._wordpiece:
            return (
                token[len(self._prefix) :] if token.startswith(self._prefix) else f" {token}"
            ).encode()
        if not self.byte_level and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return (token.replace("▁", " ") if self._metaspace else token).encode()


def _nodes(node: Any) -> Iterator[Mapping[str, Any]]:
    """All dicts with a "type" within a component, itself included."""
    if isinstance(node, Mapping):
        if "type" in node:
            yield node
        for value in node.values():
            yield from _nodes(value)
    elif isinstance(node, list):
        for value in node:
            yield from _nodes(value)


def _prepends(node: Mapping[str, Any]) -> bool:
    return (
        node.get("prepend_scheme", "always" if node.get("add_prefix_space", True) else "never")
        != "never"
    )


# GPT-2's pattern on ASCII text. re.A matters: Python's own \s includes \x1c-\x1f, Unicode's
# White_Space does not.
WORD = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.A
)
LIMIT = 1 << 18  # words remembered, about 50 MB; then it starts anew


class WordEncoder:
    """Encodes word by word, with a memory of the words seen.

    Text repeats its words: the 2.6 million of the Python standard library are 48,000 different
    ones, and looking them up is several times faster than the tokenizers library is (12 MB in 3 s
    against 11 s, one core). The words must be exactly those that the library would cut the text
    into, so this is for GPT-2's pattern and ASCII text only; all else goes to the library, which is
    also the oracle in the tests.

    `encode`: what the library does to texts, each of which may be a single word.
    """

    def __init__(self, encode: Callable[[Sequence[str]], Sequence[Sequence[int]]]):
        self._encode = encode
        self._known: dict[str, Sequence[int]] = {}

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each of `texts`, which must be ASCII. Safe to call from several threads."""
        words = [WORD.findall(text) for text in texts]
        if len(self._known) > LIMIT:
            self._known = {}
        known = self._known  # another thread may start anew meanwhile
        new = list(set(itertools.chain.from_iterable(words)) - known.keys())
        known.update(zip(new, self._encode(new), strict=True))
        ids = (itertools.chain.from_iterable(map(known.__getitem__, text)) for text in words)
        return [np.fromiter(text, np.int32) for text in ids]


BOS, EOS = "<|bos|>", "<|eos|>"
# Most telling name first; chat turn markers last, since a base model never saw them close a
# document.
BOS_NAMES = (
    BOS,
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<｜begin▁of▁sentence｜>",
    "<s>",
    "<bos>",
    "[BOS]",
    "[CLS]",
)
EOS_NAMES = (
    EOS,
    "<|end_of_text|>",
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "[EOS]",
    "[SEP]",
    "<|im_end|>",
)

PIECE = 1 << 10  # characters; texts are cut to about this, which sets apart what is not ASCII
# characters; the same for other patterns than GPT-2's, only to bound the library's memory
LONG = 1 << 18
LONGEST_WORD = 256  # bytes; longer words are cut where a BPE is trained
# characters handed to the library at once; it holds about 100 bytes a token meanwhile
GROUP = 1 << 22
# Between two words in Latin letters every byte-level pre-tokenizer starts anew, so a cut there
# changes nothing.
_CUT = re.compile(r"(?<=[A-Za-z])(?=[ \n][A-Za-z])")


class BpeTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`, byte-level BPE or not.

    Args:
      framing: which tokens open and close texts; default: by their usual names, and bos is always
        put first.
    Raises:
      DataError: there is no framing, and none of the usual names of an end-of-document token is in
        the vocabulary; or the framing names ids that do not exist.
    """

    def __init__(
        self, hf: tokenizers.Tokenizer, where: str = "tokenizer", framing: Framing | None = None
    ):
        hf.no_truncation()
        hf.no_padding()
        hf.encode_special_tokens = True  # "<|eos|>" in a text is text
        self._hf = hf
        self._framing = framing
        if framing is None:
            self.bos, self.eos = _document_ends(hf, where)
        else:
            self.bos, self.eos, self.add_bos = framing.bos, framing.eos, framing.add_bos
        ids = hf.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        if self.vocab_size >= 2**31:
            raise DataError(f"{where}: token id {self.vocab_size - 1} does not fit int32.")
        self._names = {i: name for name, i in ids.items()}
        for i in {self.bos, *self.ends} - self._names.keys():
            raise DataError(
                f"{where}: token {i} is to open or close texts, but the vocabulary does not have it."
            )
        spelling = Spelling(json.loads(hf.to_str()))
        self._words = WordEncoder(self._encode_whole) if spelling.gpt2_words else None
        self._piece = PIECE if spelling.gpt2_words else LONG if spelling.cuttable else sys.maxsize
        self.strip_space = spelling.strip_space
        pieces = [b""] * self.vocab_size
        for i, name in self._names.items():
            pieces[i] = spelling.bytes_of(name)
        for i, token in hf.get_added_tokens_decoder().items():
            pieces[i] = b"" if token.special else token.content.encode()
        for i in {self.bos, *self.ends}:
            pieces[i] = b""
        self.pieces = pieces

    @property
    def ends(self) -> frozenset[int]:
        return frozenset({self.eos, *(self._framing.ends if self._framing else ())})

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces: list[str] = []
        counts = []
        for text in texts:
            cut = list(cut_text(valid_text(text), self._piece))
            counts.append(len(cut))
            pieces += cut
        encoded = [ids for group in _groups(pieces) for ids in self._encode_group(group)]
        ends = np.cumsum(counts, dtype=int)
        return [np.concatenate(encoded[end - n : end]) for end, n in zip(ends, counts, strict=True)]

    def _encode_group(self, pieces: list[str]) -> list[np.ndarray]:
        if self._words is None:
            return [np.array(ids, np.int32) for ids in self._encode_whole(pieces)]
        easy = [piece.isascii() for piece in pieces]
        fast = iter(self._words([p for p, e in zip(pieces, easy, strict=True) if e]))
        slow = iter(self._encode_whole([p for p, e in zip(pieces, easy, strict=True) if not e]))
        return [next(fast) if e else np.array(next(slow), np.int32) for e in easy]

    def _encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """The library's own encoding."""
        # The fast one computes no offsets; tokenizers before 0.20.1 lack it.
        encode = getattr(self._hf, "encode_batch_fast", self._hf.encode_batch)
        return [e.ids for e in encode(list(texts), add_special_tokens=False)]

    def token_text(self, token: int) -> str:
        return super().token_text(token) or self._names.get(token, "")

    def to_json(self) -> str:
        text = self._hf.to_str()
        if self._framing is None:
            return text
        return json.dumps(
            {**json.loads(text), "framing": self._framing._asdict()}, ensure_ascii=False
        )

    def library_json(self) -> str:
        """The tokenizer.json that the library reads, without what this project adds."""
        return self._hf.to_str()


def train_bpe(texts: Iterable[str], vocab_size: int, specials: Sequence[str] = ()) -> BpeTokenizer:
    """Byte-level BPE with GPT-2's word pattern and the special tokens <|bos|> = 0, <|eos|> = 1,
    then `specials`.

    Deterministic. `vocab_size` counts the specials and the 256 bytes; a small corpus may yield
    fewer tokens. Words longer than `LONGEST_WORD` bytes (base64, DNA, minified JSON) are learned
    from in pieces, since the library's trainer takes time quadratic in the length of a word;
    encoding is not affected.
    """
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut_words = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(f".{{1,{LONGEST_WORD}}}"), "isolated"
    )
    hf.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, cut_words])
    hf.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, *specials],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    hf.train_from_iterator(
        (piece for text in texts for piece in cut_text(valid_text(text), PIECE)), trainer
    )
    hf.pre_tokenizer = words
    return BpeTokenizer(hf)


def cut_text(text: str, size: int) -> Iterator[str]:
    """`text` in pieces of at least `size` characters, cut only where byte-level tokens end anyway
    (else not at all)."""
    start = 0
    while len(text) - start > size and (cut := _CUT.search(text, start + size)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _groups(pieces: list[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for piece in pieces:
        if group and size + len(piece) > GROUP:
            yield group
            group, size = [], 0
        group.append(piece)
        size += len(piece)
    if group:
        yield group


def _document_ends(hf: tokenizers.Tokenizer, where: str) -> tuple[int, int]:
    """(bos, eos); one stands in for the other where only one exists."""
    found = [
        next((i for name in names if (i := hf.token_to_id(name)) is not None), None)
        for names in (BOS_NAMES, EOS_NAMES)
    ]
    bos, eos = found
    either = eos if bos is None else bos
    if either is None:
        raise DataError(
            f"{where}: no token that marks the end of a document. Looked for {', '.join(EOS_NAMES)}; "
            "add one of them to the tokenizer's special tokens."
        )
    return either, either if eos is None else eos
