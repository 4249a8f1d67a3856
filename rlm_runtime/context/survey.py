"""Which files of a folder are its texts: what the patterns leave in, in which encoding, and what is
no text and why."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlm_runtime.context import extract, files
from rlm_runtime.errors import ContextError, UsageError

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

WHOLE = 1 << 20  # bytes: smaller files are decoded whole, of larger ones ten samples are
GUESSES = 20  # files whose encoding is guessed at; a guess takes tens of milliseconds
UNREADABLE = "unreadable"
NAMED = 8  # files that a sentence names
DOCUMENT_SECONDS = 300.0  # for the documents of one folder together
DOCUMENT_BYTES = 256 << 20  # of their text together


@dataclass(frozen=True)
class Reading:
    """How files are read. In a folder `encoding` is for the files that are not UTF-8; without it
    they are left out.

    `include` and `exclude` are patterns as in a `.gitignore`; they, and the folder's own
    `.gitignore` files, hold for what is found in folders.
    """

    encoding: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    gitignore: bool = True

    def record(self) -> dict[str, object]:
        """What differs from the default, as JSON."""
        fields = {
            "encoding": self.encoding,
            "include": list(self.include),
            "exclude": list(self.exclude),
        }
        return {k: v for k, v in fields.items() if v} | (
            {} if self.gitignore else {"gitignore": False}
        )

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Reading:
        lists = {k: tuple(fields.get(k, ())) for k in ("include", "exclude")}
        return cls(
            encoding=fields.get("encoding"), gitignore=fields.get("gitignore", True), **lists
        )


@dataclass(frozen=True)
class FolderEntry:
    """One text of a folder. `text` is set where it was extracted from a document; `bytes` is then
    the text's."""

    name: str
    path: Path
    bytes: int
    encoding: str = "utf-8"
    text: str | None = None


@dataclass(frozen=True)
class Skipped:
    """A file that is no text as it stands. `what` groups it: "not UTF-8", "binary", "a PDF
    document", ..."""

    name: str
    path: Path
    what: str
    why: str


@dataclass
class Survey:
    entries: list[FolderEntry] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    # ".gitignore" | "--exclude" | "--include" -> files, folders
    ignored: Counter[str] = field(default_factory=Counter)
    truncated: bool = False  # there are more than MAX_FILES
    extracted: int = 0
    converted: Counter[str] = field(default_factory=Counter)  # encoding -> files

    def left_out(self) -> list[str]:
        """Sentences for the user and the root on what `context` does not hold, or holds
        converted."""
        said = []
        if self.skipped:
            kinds = Counter(s.what for s in self.skipped)
            counted = ", ".join(f"{n:,} {what}" for what, n in kinds.most_common(NAMED))
            named = "; ".join(f"{s.name[-120:]!r}: {s.why}" for s in self.skipped[:NAMED])
            more = f"; ... {len(self.skipped) - NAMED:,} more" if len(self.skipped) > NAMED else ""
            total = len(self.skipped) + len(self.entries)
            said.append(
                f"{len(self.skipped):,} of {total:,} files were left out ({counted}): {named}{more}."
            )
        if self.ignored:
            counted = ", ".join(f"{n:,} by {by}" for by, n in self.ignored.most_common())
            said.append(f"Patterns left out files and folders: {counted}.")
        if self.truncated:
            said.append(f"Only the first {files.MAX_FILES:,} files were taken.")
        if self.converted:
            counted = ", ".join(f"{n:,} as {name}" for name, n in self.converted.most_common())
            said.append(f"Files that are not UTF-8 were read: {counted}.")
        if self.extracted:
            said.append(
                f"Of {self.extracted:,} documents the text was extracted; layout and pictures are lost."
            )
        return said


def survey(
    named: Iterable[tuple[str, Path]], reading: Reading, found: Survey | None = None
) -> Survey:
    """Look at every file once. Nothing is decoded by a guess: a guess is only named."""
    found = found or Survey()
    documents: list[tuple[str, Path, str]] = []
    guesses = GUESSES
    for name, path in named:
        try:
            size = path.stat().st_size
            pieces = files.samples(path, size, whole=WHOLE)
            kind = extract.kind_of(name, pieces[0].data)
            if kind is not None:
                documents.append((name, path, kind))
                continue
            encoding, skipped = _look(name, path, pieces, reading, guess=guesses > 0)
        except OSError as error:
            found.skipped.append(
                Skipped(name, path, UNREADABLE, f"cannot be read ({error.strerror})")
            )
            continue
        if skipped is not None:
            guesses -= skipped.what == "not UTF-8"
            found.skipped.append(skipped)
            continue
        if encoding != "utf-8":
            found.converted[encoding] += 1
        found.entries.append(FolderEntry(name, path, size, encoding))
    _extract(documents, found)
    found.entries.sort(key=lambda e: e.name)
    return found


def _look(
    name: str, path: Path, pieces: list[files.FilePiece], reading: Reading, guess: bool
) -> tuple[str, Skipped | None]:
    head = pieces[0].data
    trouble = files.not_text(pieces, "utf-8")
    if trouble is None:
        return "utf-8", None
    if packed := files.packed(head):
        return "", Skipped(
            name, path, "compressed", f"is compressed with {packed}; give it as a file of its own"
        )
    known = files.known(head)
    if known is None and reading.encoding and files.not_text(pieces, reading.encoding) is None:
        return reading.encoding, None
    if known is not None:
        return "", Skipped(name, path, known, f"is {known}")
    if b"\0" in head and not head.startswith(files.MARKS):
        return "", Skipped(name, path, "binary", f"is binary ({trouble})")
    hint = files.looks_like(head) if guess else None
    return "", Skipped(
        name, path, "not UTF-8", f"is not UTF-8 ({trouble})" + (f", may be {hint}" if hint else "")
    )


def _extract(documents: list[tuple[str, Path, str]], found: Survey) -> None:
    """The text of PDF and office files, a few at a time, each in a process of its own."""
    if not documents:
        return
    deadline, room = time.monotonic() + DOCUMENT_SECONDS, DOCUMENT_BYTES

    def one(document: tuple[str, Path, str]) -> str | Skipped:
        name, path, kind = document
        left = deadline - time.monotonic()
        if left <= 0:
            return Skipped(
                name, path, extract.KINDS[kind].what, "its text was not extracted: no time was left"
            )
        try:
            return extract.text_of(path, kind, seconds=min(left, extract.SECONDS))
        except ContextError as error:
            return Skipped(
                name, path, extract.KINDS[kind].what, str(error).removeprefix("context: ")
            )

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for (name, path, kind), got in zip(documents, pool.map(one, documents), strict=True):
            if isinstance(got, str):
                size = len(got.encode("utf-8", "replace"))
                room -= size
                if room >= 0:
                    found.entries.append(FolderEntry(name, path, size, text=got))
                    found.extracted += 1
                    continue
                why = f"the texts of the documents take more than {DOCUMENT_BYTES >> 20} MiB"
                got = Skipped(name, path, extract.KINDS[kind].what, why)
            found.skipped.append(got)


# -- what the patterns leave in


def find(root: Path, reading: Reading, found: Survey) -> Iterator[tuple[str, Path]]:
    """(name, path) of the regular files below `root`, sorted by folder, at most MAX_FILES. Links
    are followed only to files that stay inside; folders behind links and version control's own
    folders are not entered.

    Raises UsageError for a pattern that is none.
    """
    include, exclude = _patterns(reading.include, "include"), _patterns(reading.exclude, "exclude")
    ignore = _Ignored(root) if reading.gitignore else None
    count = 0
    for here, folders, names in os.walk(root):
        inside = os.path.relpath(here, root).replace(os.sep, "/")
        prefix = "" if inside == "." else inside + "/"
        if ignore is not None and ".gitignore" in names:
            ignore.add(prefix, Path(here, ".gitignore"))

        def left_out(name: str, folder: bool, prefix: str = prefix) -> str | None:
            whole = prefix + name + ("/" if folder else "")
            if ignore is not None and ignore(whole):
                return ".gitignore"
            if exclude is not None and exclude.match_file(whole):
                return "the patterns to exclude"
            if include is not None and not folder and not include.match_file(whole):
                return "the patterns to include"
            return None

        kept = []
        for name in sorted(folders):
            if name in files.HIDDEN or os.path.islink(os.path.join(here, name)):
                continue
            by = left_out(name, True)
            if by is None:
                kept.append(name)
            else:
                found.ignored[by] += 1
        folders[:] = kept
        for name in sorted(names):
            path = Path(here, name)
            if not path.is_file() or (
                path.is_symlink() and not path.resolve().is_relative_to(root)
            ):
                continue
            by = left_out(name, False)
            if by is not None:
                found.ignored[by] += 1
                continue
            if count >= files.MAX_FILES:
                found.truncated = True
                return
            count += 1
            yield prefix + name, path


def _patterns(lines: Iterable[str], what: str) -> GitIgnoreSpec | None:
    lines = tuple(lines)
    if not lines:
        return None
    try:
        spec: GitIgnoreSpec = _pathspec().GitIgnoreSpec.from_lines(lines)
        return spec
    except ValueError as error:
        raise UsageError(
            f"{what}: {error}. Patterns are those of a .gitignore, such as '*.py' or 'docs/**'."
        ) from None


class _Ignored:
    """The `.gitignore` files of a folder, of the folders in it, and of those above it in the same
    repository."""

    def __init__(self, root: Path):
        # (folder it lies in, what to put before names, spec)
        self._specs: list[tuple[str, str, GitIgnoreSpec]] = []
        above = [root, *root.parents]
        top = next((i for i, folder in enumerate(above) if (folder / ".git").exists()), 0)
        for folder in reversed(above[1 : top + 1]):
            if (folder / ".gitignore").is_file():
                self.add(
                    "", folder / ".gitignore", before=root.relative_to(folder).as_posix() + "/"
                )

    def add(self, inside: str, path: Path, before: str = "") -> None:
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return
        good = []
        for line in lines:
            try:
                _pathspec().GitIgnoreSpec.from_lines([line])
                good.append(line)
            except ValueError:  # git, too, goes on after a line it cannot read
                continue
        self._specs.append((inside, before, _pathspec().GitIgnoreSpec.from_lines(good)))

    def __call__(self, name: str) -> bool:
        """The deepest file that says anything of this name decides; a folder's name ends with a
        slash."""
        for inside, before, spec in reversed(self._specs):
            if name.startswith(inside):
                said: bool | None = spec.check_file(before + name[len(inside) :]).include
                if said is not None:
                    return said
        return False


def _pathspec() -> Any:
    import pathspec

    return pathspec
