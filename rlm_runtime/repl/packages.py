"""The allow-list of installed packages: what a worker may import besides the standard library, and
no file more."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlm_runtime.errors import UsageError

if TYPE_CHECKING:
    from importlib import metadata


@dataclass(frozen=True)
class Allowed:
    """`sites`: folders packages lie in; `tops`: names that can be imported; `paths`: what may be
    read."""

    sites: tuple[str, ...] = ()
    tops: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()

    def message(self) -> dict[str, list[str]]:
        return {"sites": list(self.sites), "tops": list(self.tops), "paths": list(self.paths)}


def resolve(names: Iterable[str]) -> Allowed:
    """The named distributions and those they need, as far as they are installed. Raises UsageError
    for one that is not."""
    from importlib import metadata  # takes a while, and most runs name no package

    todo = [(name, True) for name in names]
    seen: set[str] = set()
    sites: dict[str, None] = {}
    tops: dict[str, None] = {}
    paths: dict[str, None] = {}
    while todo:
        name, asked = todo.pop(0)
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in seen:
            continue
        seen.add(key)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if asked:
                raise UsageError(
                    f"packages: {name!r} is not installed in this Python, so the REPL cannot be given it. "
                    f"Install it (pip install {name}) or leave it out. Names are those of pip, such as 'numpy'."
                ) from None
            continue
        todo += [(needed, False) for needed in _needs(found)]
        for site, top, path in _files(found):
            sites[site] = tops[top] = paths[path] = None
    return Allowed(tuple(sites), tuple(filter(None, tops)), tuple(paths))


def _needs(found: metadata.Distribution) -> list[str]:
    """Names of what it needs, without extras; an environment marker is not judged: what is not
    installed is skipped."""
    names = []
    for line in found.requires or ():
        if "extra" not in line.partition(";")[2]:
            names += re.findall(r"\A[A-Za-z0-9._-]+", line)
    return names


def _files(found: metadata.Distribution) -> Iterator[tuple[str, str, str]]:
    """(site folder, top-level name, path to allow) of everything it installed there."""
    site = Path(str(found.locate_file("")))
    for file in found.files or ():
        first = file.parts[0]
        if first in ("..", "/", "__pycache__") or first.endswith(".pth"):
            continue
        top = first.split(".")[0] if len(file.parts) == 1 else first
        if top.isidentifier():
            yield str(site), top, str(site / first)
        else:  # data and libraries beside the package
            yield str(site), "", str(site / first)
