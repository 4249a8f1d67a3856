"""The `pystdlib` source: the Python standard library that runs this process. About 12 MB, on every
machine."""

from __future__ import annotations

import os
import sysconfig
import tokenize
from collections.abc import Iterator

from mor_jax.config import DataConfig
from mor_jax.data.documents import Digest, Document
from mor_jax.data.hashing import digest_of, hash_file
from mor_jax.errors import DataError

# Generated files would make the held-out share measure table lookup: 1.6 MB of character tables in
# `encodings`, the paths of this machine's build in `_sysconfigdata*`.
GENERATED = "_sysconfigdata"
EXCLUDED = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "encodings",
        "__pycache__",
    }
)


class PyStdlib:
    """One document a .py file, in order of relative path, which is also its id.

    Files are decoded by their coding cookie. The few whose bytes do not fit it are left out;
    `skipped` counts them during the latest run through `documents`.
    """

    label = "pystdlib"

    def __init__(self, cfg: DataConfig, digest: Digest = hash_file):
        self._root = sysconfig.get_paths()["stdlib"]
        self._digest = digest
        self.skipped = 0

    def documents(self) -> Iterator[Document]:
        self.skipped = 0
        for name in self._names():
            path = os.path.join(self._root, name)
            try:
                with tokenize.open(path) as f:
                    text = f.read()
            except (SyntaxError, UnicodeDecodeError):
                self.skipped += 1
                continue
            except OSError as e:
                raise DataError(
                    f"{path}: cannot be read ({e.strerror or e}). Is the Python installation damaged?"
                ) from e
            yield Document(name, text)

    def fingerprint(self) -> str:
        parts = (
            part for n in self._names() for part in (n, self._digest(os.path.join(self._root, n)))
        )
        return digest_of("pystdlib", *parts)

    def _names(self) -> list[str]:
        names = []
        for directory, subdirectories, files in os.walk(self._root):
            subdirectories[:] = [d for d in subdirectories if d not in EXCLUDED]
            names += [
                os.path.relpath(os.path.join(directory, f), self._root)
                for f in files
                if f.endswith(".py") and not f.startswith(GENERATED)
            ]
        return sorted(name.replace(os.sep, "/") for name in names)
