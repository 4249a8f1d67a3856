"""A folder of texts for a REPL that is running: its view of the file system is fixed, so the files
come to it."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from rlm_runtime.context import Payload
from rlm_runtime.errors import ContextError

FOLDER_COPY = 256 << 20  # bytes that may be copied where files cannot be linked


def linked_into(payload: Payload, place: Path) -> Payload:
    """A folder payload with its files linked, or copied, to where a running worker may read. Raises
    ContextError."""
    place.mkdir(mode=0o700)
    copied, files = 0, []
    for i, (name, path) in enumerate(payload.args["files"]):
        target = place / str(i)
        try:
            os.link(path, target, follow_symlinks=False)
        except OSError:
            copied += os.stat(path).st_size
            if copied > FOLDER_COPY:
                raise ContextError(
                    f"A folder of more than {FOLDER_COPY >> 20} MiB on another file system cannot be given to a REPL that "
                    "is running; start a new session with it."
                ) from None
            shutil.copyfile(path, target)
        files.append([name, str(target)])
    return dataclasses.replace(
        payload, path=None, paths=(place,), args={**payload.args, "files": files}
    )
