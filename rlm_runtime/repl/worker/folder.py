"""A folder (or a named set of files) as the `context` of a cell: a mapping of relative path to text, read when asked.

Standard library only: this file runs inside the confined worker.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Mapping

HIDDEN = {".git", ".hg", ".svn"}  # a version control's own files are not what anybody asks about
MAX_FILES = 200_000


class Folder(Mapping):
    """`folder[path]` is a str (a Text where the file is large); iterating gives the relative paths, sorted.

    Links that lead out of the folder are left out, folders behind links are not entered.
    """

    def __init__(self, root: str | None, files: dict[str, str] | None, open_text: Callable[[str], object]):
        self._root = os.path.realpath(root) if root is not None else None
        self._open = open_text
        self._files = files  # relative name -> path
        self.truncated = False  # more files than MAX_FILES
        self._sizes: dict[str, int] = {}

    def _paths(self) -> dict[str, str]:
        if self._files is None:
            self._files = {}
            for path in files_under(self._root):
                if len(self._files) >= MAX_FILES:
                    self.truncated = True
                    break
                self._files[os.path.relpath(path, self._root).replace(os.sep, "/")] = path
            self._files = dict(sorted(self._files.items()))
        return self._files

    def _path(self, name) -> str:
        paths = self._paths()
        key = os.fspath(name) if isinstance(name, os.PathLike) else name
        if isinstance(key, str) and key not in paths:
            key = key.removeprefix("./").removeprefix("/")
        if key not in paths:
            import difflib

            near = difflib.get_close_matches(str(name), list(paths)[:20_000], 3, 0.5)
            ends = [p for p in paths if p.endswith("/" + str(name))][:3]
            raise KeyError(f"no file {name!r} in the folder" + (f"; is it {(ends or near)}?" if ends or near else ""))
        path = paths[key]
        if self._root is not None and not inside(path, self._root):
            raise KeyError(f"{name!r} is a link that leads out of the folder")
        return path

    def __getitem__(self, name):
        return self._open(self._path(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths())

    def __len__(self) -> int:
        return len(self._paths())

    def __contains__(self, name) -> bool:
        return name in self._paths()

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
        """Paths that match: `*` stays within a folder, `**` does not; a pattern without `/` is held to the file name."""
        if "/" not in pattern:
            return [n for n in self if fnmatch.fnmatchcase(n.rsplit("/", 1)[-1], pattern)]
        regex = re.compile(_glob_regex(pattern))
        return [n for n in self if regex.fullmatch(n)]

    def grep(self, pattern: str, glob: str = "*", flags: int = 0, limit: int = 1000) -> list[tuple[str, int, str]]:
        """(path, line number from 1, line) of the first `limit` lines the pattern is found in; binary files left out."""
        regex, hits = re.compile(pattern, flags), []
        for name in self.glob(glob):
            if b"\0" in self.bytes(name, 8192):
                continue
            text = self[name]
            lines = text.splitlines() if isinstance(text, str) else text.lines()
            for number, line in enumerate(lines, 1):
                if regex.search(line):
                    hits.append((name, number, line))
                    if len(hits) >= limit:
                        return hits
        return hits

    def walk(self) -> Iterator[tuple[str, list[str], list[str]]]:
        """(folder, its folders, its files), from the top, as `os.walk` gives them; "" is the top."""
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
        return f"Folder({len(names):,} files, {self.size():,} bytes: {shown}{more})"

    __hash__ = object.__hash__

    def __eq__(self, other) -> bool:
        return self is other


def inside(path: str, root: str) -> bool:
    try:
        real = os.path.realpath(path, strict=True)
    except PermissionError:  # no link can be read in the sandbox, and nothing outside of the folder opened
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


def files_under(root: str) -> Iterator[str]:
    """Regular files below `root`; links only where they stay inside, version-control folders left out."""
    root = os.path.realpath(root)
    for here, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in HIDDEN and not os.path.islink(os.path.join(here, f)))
        for file in sorted(files):
            path = os.path.join(here, file)
            if os.path.islink(path) and not inside(path, root):
                continue
            if os.path.isfile(path):
                yield path


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
