"""What a cell can import: the standard library and the packages the host allows; anything else says
so."""

from __future__ import annotations

import sys


class Packages:
    """At the end of `sys.meta_path`: the allowed top-level names from the installed packages, an
    error for the rest."""

    def __init__(self, sites: list[str], tops: list[str]):
        self._sites, self._tops = sites, frozenset(tops)
        self._find = _path_finder().find_spec

    def find_spec(self, name, path=None, target=None):
        if path is not None:
            return None  # a part of a package somebody else found
        if name in self._tops:
            return self._find(name, self._sites, target)
        caller = sys._getframe(2).f_code.co_name if _depth() > 2 else ""
        if caller != "_find_and_load_unlocked" or name in sys.stdlib_module_names:
            return None  # a question (importlib.util.find_spec) and not an import
        allowed = ", ".join(sorted(n for n in self._tops if not n.startswith("_"))[:40])
        raise ModuleNotFoundError(
            f"No module named {name!r}. This REPL can import the standard library"
            + (
                f" and {allowed}."
                if allowed
                else " only; no other package was allowed when it was started."
            ),
            name=name,
        )


def _path_finder():
    return next(
        finder for finder in sys.meta_path if getattr(finder, "__name__", "") == "PathFinder"
    )


def _depth() -> int:
    try:
        sys._getframe(4)
    except ValueError:
        return 0
    return 4


class Asyncio:
    """At the front of `sys.meta_path`: asyncio's event loop wakes itself through a socket pair, and
    there are no sockets in here. It gets a pipe instead, so that `asyncio.run` works in a cell."""

    def find_spec(self, name, path=None, target=None):
        if name != "asyncio.selector_events":
            return None
        spec = _path_finder().find_spec(name, path, target)
        if spec is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                module.BaseSelectorEventLoop._make_self_pipe = _make_self_pipe

            spec.loader.exec_module = exec_module
        return spec


def _make_self_pipe(loop) -> None:
    import os

    read, write = os.pipe()
    loop._ssock, loop._csock = _End(read), _End(write)
    loop._internal_fds += 1
    loop._add_reader(read, loop._read_from_self)


class _End:
    """One end of a pipe, with the methods of a socket that the event loop calls on it."""

    def __init__(self, fd: int):
        import os

        self._fd, self._os = fd, os
        os.set_blocking(fd, False)

    def fileno(self) -> int:
        return self._fd

    def recv(self, size: int) -> bytes:
        return self._os.read(self._fd, size)

    def send(self, data: bytes) -> int:
        return self._os.write(self._fd, data)

    def close(self) -> None:
        if self._fd >= 0:
            self._os.close(self._fd)
            self._fd = -1
