"""What a corpus is made of, and what a source of one has to offer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

Digest = Callable[[str], str]  # path of a local file -> hex digest of its content


class Document(NamedTuple):
    """One text. `id` is stable under moving the corpus to another directory; the held-out split
    hangs on it."""

    id: str
    text: str


class Source(Protocol):
    """A corpus that can be read from the start any number of times, in the same order each time."""

    label: str  # for messages: "files corpus/*.jsonl"

    def documents(self) -> Iterator[Document]:
        """All documents, streamed. Raises DataError naming the file and place of the first one that
        cannot be read."""

    def fingerprint(self) -> str:
        """Hex digest that changes when any document or id does."""


def valid_text(text: str) -> str:
    """`text` with lone surrogates (JSON can spell them, UTF-8 cannot) replaced by U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
