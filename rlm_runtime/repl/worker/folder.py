"""A folder (or a named set of files) as the `context` of a cell: a mapping of relative path to
text, read when asked.

Standard library only: this file runs inside the confined worker.
"""

from __future__ import annotations

import fnmatch
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping


class Folder(Mapping):
    """`folder[path]` is a str (a Text where the file is very large); iterating gives the relative
    paths, sorted.

    `skipped`: files that are no text as they stand, and why; they are no keys. `bytes(path)` and
    `text(path, encoding)` read those too. Links that lead out of the folder are not followed.
    """

    def __init__(
        self,
        root: str | None,
        files: dict[str, str],  # relative name -> path, of texts and of what was left out
        open_text: Callable[[str, str, str], object],  # path, encoding, errors
        skipped: dict[str, str] | None = None,
        encodings: dict[str, str] | None = None,
    ):
        self._root = os.path.realpath(root) if root is not None else None
        self._open, self._encodings, self.skipped = open_text, encodings or {}, dict(skipped or {})
        self._files = files
        self._texts = dict(
            sorted((name, path) for name, path in files.items() if name not in self.skipped)
        )
        self._sizes: dict[str, int] = {}

    def _path(self, name) -> str:
        paths, key = self._files, self._key(name)
        if key not in paths:
            import difflib

            near = difflib.get_close_matches(str(name), list(paths)[:20_000], 3, 0.5)
            ends = [p for p in paths if p.endswith("/" + str(name))][:3]
            raise KeyError(
                f"no file {name!r} in the folder"
                + (f"; is it {(ends or near)}?" if ends or near else "")
            )
        path = paths[key]
        root = self._root
        if (
            root is not None
            and path.startswith(root.rstrip(os.sep) + os.sep)
            and not inside(path, root)
        ):
            raise KeyError(f"{name!r} is a link that leads out of the folder")
        return path

    def _key(self, name):
        key = os.fspath(name) if isinstance(name, os.PathLike) else name
        if isinstance(key, str) and key not in self._files:
            key = key.removeprefix("./").removeprefix("/")
        return key

    def __getitem__(self, name):
        key = self._key(name)
        if key in self.skipped:
            raise ValueError(
                f"{key!r} is not among the texts: it {self.skipped[key]}. context.bytes(path) gives its bytes, "
                "context.text(path, encoding='latin-1') decodes them in an encoding you know."
            )
        return self.text(key, self._encodings.get(key, "utf-8"))

    def text(self, name: str, encoding: str = "utf-8", errors: str = "strict"):
        """The text of a file, also of one that was left out, in an encoding you name."""
        try:
            return self._open(self._path(name), encoding, errors)
        except UnicodeError as error:
            raise ValueError(
                f"{name!r} is not {encoding}: {error}. context.bytes(path) gives its bytes, "
                "context.text(path, encoding=..., errors='replace') decodes them all the same."
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def __contains__(self, name) -> bool:
        return name in self._texts

    def bytes(self, name: str, limit: int | None = None) -> bytes:
        """The raw bytes of a file, the first `limit` of them."""
        with open(self._path(name), "rb") as file:
            return file.read() if limit is None else file.read(limit)

    def size(self, name: str | None = None) -> int:
        """Bytes of a file; of all files without a name."""
        if name is None:
            return sum(self.size(n) for n in self)
        if name not in self._sizes:
            self._sizes[name] = os.stat(self._path(name)).st_size
        return self._sizes[name]

    def glob(self, pattern: str) -> list[str]:
        """Paths that match: `*` stays within a folder, `**` does not; a pattern without `/` is held
        to the file name."""
        if "/" not in pattern:
            return [n for n in self if fnmatch.fnmatchcase(n.rsplit("/", 1)[-1], pattern)]
        regex = re.compile(_glob_regex(pattern))
        return [n for n in self if regex.fullmatch(n)]

    def grep(
        self, pattern: str, glob: str = "*", flags: int = 0, limit: int = 1000
    ) -> list[tuple[str, int, str]]:
        """(path, line number from 1, line) of the first `limit` lines the pattern is found in."""
        regex, hits = re.compile(pattern, flags), []
        for name in self.glob(glob):
            try:
                text = self[name]
            except ValueError as error:
                warnings.warn(f"grep left out {error}", stacklevel=2)
                continue
            lines = text.splitlines() if isinstance(text, str) else text.lines()
            for number, line in enumerate(lines, 1):
                if regex.search(line):
                    hits.append((name, number, line))
                    if len(hits) >= limit:
                        return hits
        return hits

    def walk(self) -> Iterator[tuple[str, list[str], list[str]]]:
        """(folder, its folders, its files), from the top, as `os.walk` gives them; "" is the
        top."""
        tree: dict[str, tuple[set, list]] = {"": (set(), [])}
        for name in self:
            *folders, file = name.split("/")
            here = ""
            for part in folders:
                below = f"{here}/{part}" if here else part
                tree[here][0].add(part)
                tree.setdefault(below, (set(), []))
                here = below
            tree[here][1].append(file)
        for here in sorted(tree):
            yield here, sorted(tree[here][0]), tree[here][1]

    def __repr__(self) -> str:
        names = list(self)
        shown = ", ".join(f"{n!r} ({self.size(n):,} bytes)" for n in names[:8])
        more = f", ... {len(names) - 8:,} more" if len(names) > 8 else ""
        left = (
            f"; {len(self.skipped):,} files that are no text are in .skipped"
            if self.skipped
            else ""
        )
        return f"Folder({len(names):,} files, {self.size():,} bytes: {shown}{more}{left})"

    __hash__ = object.__hash__

    def __eq__(self, other) -> bool:
        return self is other


def inside(path: str, root: str) -> bool:
    try:
        real = os.path.realpath(path, strict=True)
    # no link can be read in the sandbox, and nothing outside of the folder opened
    except PermissionError:
        return _opens(path)
    except OSError:
        return False
    return real == root or real.startswith(root.rstrip(os.sep) + os.sep)


def _opens(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def _glob_regex(pattern: str) -> str:
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**/", i):
            out, i = out + "(?:.*/)?", i + 3
        elif pattern.startswith("**", i):
            out, i = out + ".*", i + 2
        elif pattern[i] == "*":
            out, i = out + "[^/]*", i + 1
        elif pattern[i] == "?":
            out, i = out + "[^/]", i + 1
        elif pattern[i] == "[" and "]" in pattern[i + 2 :]:
            end = pattern.index("]", i + 2)
            body = pattern[i + 1 : end].replace("\\", r"\\")
            out, i = out + "[" + ("^" + body[1:] if body[0] == "!" else body) + "]", end + 1
        else:
            out, i = out + re.escape(pattern[i]), i + 1
    return "(?s:" + out + ")"
