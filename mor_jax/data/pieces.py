"""Which bytes each token of a Hugging Face tokenizer stands for.

A tokenizer spells its tokens in one of a few ways: byte-level (GPT-2: each byte shown as one
printable
character), SentencePiece ("▁" for a space, "<0x0A>" for a byte), WordPiece ("##" glues to the
left), or plainly.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@functools.cache
def byte_level_alphabet() -> Mapping[str, int]:
    """{character: byte} of byte-level BPE: printable Latin-1 stands for itself, the rest for 256,
    257, ..."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


class Spelling:
    """How the tokenizer with this `tokenizer.json` (parsed) spells its tokens.

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
