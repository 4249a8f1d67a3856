"""Which documents are held out for evaluation.

A document's id is hashed to a number in [0, 1); it is held out when that is below the share. So the split does not
depend on order, on other documents, or on the machine. Every corpus gets at least one document on each side; a
corpus of one document gives its tail.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mor_jax.data.documents import Document, Source, valid_text
from mor_jax.errors import DataError

SALT = b"mor_jax holdout 1"


def place(document_id: str) -> float:
    """A number in [0, 1) that only depends on the id."""
    digest = hashlib.blake2b(document_id.encode("utf-8", "surrogateescape"), digest_size=8, key=SALT).digest()
    return int.from_bytes(digest, "big") / 2**64


def nonempty(source: Source) -> Iterator[Document]:
    """The documents of a source that have any text, made valid UTF-8."""
    for document in source.documents():
        if document.text:
            yield Document(document.id, valid_text(document.text))


@dataclass(frozen=True)
class Plan:
    """The split of one corpus.

    Attributes:
      share: of documents held out.
      documents, bytes: of the corpus, UTF-8; documents without text not counted.
      lowest, highest: ids with the extreme places; they settle the split when one side would be empty.
      lowest_place, highest_place: theirs.
    """

    share: float
    documents: int = 0
    bytes: int = 0
    lowest: str = ""
    highest: str = ""
    lowest_place: float = 1.0
    highest_place: float = -1.0

    def held_out(self, document_id: str) -> bool:
        if self.lowest_place >= self.share:
            return document_id == self.lowest
        if self.highest_place < self.share:
            return document_id != self.highest
        return place(document_id) < self.share

    @property
    def note(self) -> str:
        """What is unusual about the split, for the person who reads the statistics."""
        if self.documents == 1:
            return f"one document: its last {self.share:.3g} (by characters) is held out"
        if self.lowest_place >= self.share:
            return f"few documents: exactly one is held out ({self.lowest})"
        if self.highest_place < self.share:
            return f"few documents: exactly one is trained on ({self.highest})"
        return ""

    def split(self, documents: Iterable[Document]) -> Iterator[tuple[Document, bool]]:
        """(document, held out) for each; one document becomes two."""
        if self.documents != 1:
            yield from ((document, self.held_out(document.id)) for document in documents)
            return
        for document in documents:
            cut = min(max(1, round(len(document.text) * (1 - self.share))), len(document.text) - 1)
            yield Document(f"{document.id}#head", document.text[:cut]), False
            yield Document(f"{document.id}#tail", document.text[cut:]), True


class Survey:
    """Makes a Plan in one pass; call with each document."""

    def __init__(self, share: float):
        self._plan = Plan(share)
        self._longest = 0

    def __call__(self, document: Document) -> None:
        p, at = self._plan, place(document.id)
        low = {"lowest": document.id, "lowest_place": at} if at < p.lowest_place else {}
        high = {"highest": document.id, "highest_place": at} if at > p.highest_place else {}
        size = len(document.text.encode())
        self._plan = dataclasses.replace(p, documents=p.documents + 1, bytes=p.bytes + size, **low, **high)
        self._longest = max(self._longest, len(document.text))

    def plan(self, label: str) -> Plan:
        """Raises DataError when there is nothing to split; `label` names the source."""
        if not self._plan.documents:
            raise DataError(f"{label}: the corpus is empty (no document has any text). Check config.data.")
        if self._plan.documents == 1 and self._longest < 2:
            raise DataError(f"{label}: the corpus is a single character; there is nothing to hold out.")
        return self._plan
