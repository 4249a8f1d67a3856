"""Which documents are held out for evaluation.

A document's id is hashed to a number in [0, 1); it is held out when that is below the share. So the
split does not depend on order, on other documents, or on the machine. Every corpus gets at least
one document on each side; a corpus of one document gives its tail.

Texts that occur more than once are found by a hash of their content. By default (`data.dedup =
"holdout"`) a text that is held out is left out of the training split, wherever its copies stand;
"all" keeps one copy of every text.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from mor_jax.data.documents import Document, TextSource, valid_text
from mor_jax.errors import DataError

SALT = b"mor_jax holdout 1"


def place(document_id: str) -> float:
    """A number in [0, 1) that only depends on the id."""
    digest = hashlib.blake2b(
        document_id.encode("utf-8", "surrogateescape"), digest_size=8, key=SALT
    ).digest()
    return int.from_bytes(digest, "big") / 2**64


def content_hash(text: str) -> int:
    """64 bits of blake2b over the UTF-8 text. Among 10^8 different texts a collision has a chance
    of 3 in 10^4."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def nonempty(source: TextSource) -> Iterator[Document]:
    """The documents of a source that have any text, made valid UTF-8."""
    for document in source.documents():
        if document.text:
            yield Document(document.id, valid_text(document.text))


@dataclass(frozen=True)
class HoldoutPlan:
    """The split of one corpus.

    Attributes:
      share: of documents held out.
      dedup: none | holdout | all, see `DataConfig.dedup`.
      documents, bytes: of the corpus, UTF-8; documents without text not counted.
      lowest, highest: ids with the extreme places; they settle the split when one side would be
        empty.
      lowest_place, highest_place: theirs.
      duplicates: documents whose text occurred before.
      crossing: training documents whose text is also held out.
      dropped: documents that `dedup` leaves out.
      repeated: for each text that occurs more than once, its content hash in hex, and whether a
        copy is held out.
    """

    share: float
    dedup: str = "holdout"
    documents: int = 0
    bytes: int = 0
    lowest: str = ""
    highest: str = ""
    lowest_place: float = 1.0
    highest_place: float = -1.0
    duplicates: int = 0
    crossing: int = 0
    dropped: int = 0
    repeated: dict[str, bool] = field(default_factory=dict)

    def held_out(self, document_id: str) -> bool:
        if self.lowest_place >= self.share:
            return document_id == self.lowest
        if self.highest_place < self.share:
            return document_id != self.highest
        return place(document_id) < self.share

    @property
    def note(self) -> str:
        """What is unusual about the split, for the person who reads the statistics."""
        notes = []
        if self.documents == 1:
            notes.append(f"one document: its last {self.share:.3g} (by characters) is held out")
        elif self.lowest_place >= self.share:
            notes.append(f"few documents: exactly one is held out ({self.lowest})")
        elif self.highest_place < self.share:
            notes.append(f"few documents: exactly one is trained on ({self.highest})")
        if self.duplicates:
            notes.append(
                f"{self.duplicates} of {self.documents} documents repeat an earlier text; {self.crossing} training "
                f"documents equal a held-out one; {self.dropped} left out (config.data.dedup = {self.dedup!r})"
            )
        return "; ".join(notes)

    def split(self, documents: Iterable[Document]) -> Iterator[tuple[Document, bool]]:
        """(document, held out) for each that is kept; one document becomes two."""
        if self.documents == 1:
            for document in documents:
                cut = min(
                    max(1, round(len(document.text) * (1 - self.share))), len(document.text) - 1
                )
                yield Document(f"{document.id}#head", document.text[:cut]), False
                yield Document(f"{document.id}#tail", document.text[cut:]), True
            return
        seen: set[str] = set()
        for document in documents:
            held_out = self.held_out(document.id)
            if self.dedup == "none" or not self.repeated:
                yield document, held_out
                continue
            key = _key(content_hash(document.text))
            if key in self.repeated:
                if self.repeated[key] and not held_out:
                    continue
                if self.dedup == "all":
                    if key in seen:
                        continue
                    seen.add(key)
            yield document, held_out


def _key(content: int) -> str:
    return f"{content:016x}"


class HoldoutSurvey:
    """Makes a Plan in one pass; call with each document. Keeps 16 bytes a document."""

    def __init__(self, share: float, dedup: str = "holdout"):
        self._plan = HoldoutPlan(share, dedup)
        self._longest = 0
        self._contents, self._places = array.array("Q"), array.array("d")

    def __call__(self, document: Document) -> None:
        p, at = self._plan, place(document.id)
        if at < p.lowest_place:
            p = dataclasses.replace(p, lowest=document.id, lowest_place=at)
        if at > p.highest_place:
            p = dataclasses.replace(p, highest=document.id, highest_place=at)
        size = p.bytes + len(document.text.encode())
        self._plan = dataclasses.replace(p, documents=p.documents + 1, bytes=size)
        self._longest = max(self._longest, len(document.text))
        self._contents.append(content_hash(document.text))
        self._places.append(at)

    def plan(self, label: str) -> HoldoutPlan:
        """Raises DataError when there is nothing to split; `label` names the source."""
        p = self._plan
        if not p.documents:
            raise DataError(
                f"{label}: the corpus is empty (no document has any text). Check config.data."
            )
        if p.documents == 1 and self._longest < 2:
            raise DataError(
                f"{label}: the corpus is a single character; there is nothing to hold out."
            )
        contents_N, places_N = np.array(self._contents, np.uint64), np.array(self._places)
        unique_U, index_N, copies_U = np.unique(contents_N, return_inverse=True, return_counts=True)
        held_N = places_N < p.share
        if p.lowest_place >= p.share:
            held_N = places_N == p.lowest_place
        elif p.highest_place < p.share:
            held_N = places_N != p.highest_place
        held_U = np.bincount(index_N, weights=held_N, minlength=len(unique_U)).astype(np.int64)
        train_U = copies_U - held_U
        crossing = int(train_U[held_U > 0].sum())
        if p.dedup != "none" and p.documents > 1 and crossing == train_U.sum():
            raise DataError(
                f"{label}: every training document is a copy of a held-out one ({len(unique_U)} different texts in "
                f"{p.documents} documents). Add other documents, or set config.data.dedup = 'none'."
            )
        many = np.flatnonzero(copies_U > 1)
        repeats = int((copies_U - 1).sum())
        # Under "all" one copy of each text stays, in the held-out split where it is held out.
        dropped = {"none": 0, "holdout": crossing, "all": repeats}[p.dedup]
        return dataclasses.replace(
            p,
            duplicates=repeats,
            crossing=crossing,
            dropped=dropped,
            repeated={_key(int(unique_U[i])): bool(held_U[i]) for i in many},
        )
