"""The text of PDF, Word, Excel and Parquet files, extracted by well-known libraries in a child
process with limits.

The libraries are the optional extra `documents`. A document is hostile until proven otherwise: the
child has no variable of this process, no network is needed, and its memory, time and output are
bounded.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rlm_runtime.errors import ContextError

SECONDS = 120.0  # for one document
MEMORY = 4 << 30  # address space of the child
TEXT_BYTES = 256 << 20  # of what is extracted
CHILD = Path(__file__).with_name("extract_child.py")


@dataclass(frozen=True)
class Kind:
    what: str
    module: str  # what has to be installed
    package: str
    form: str  # how the text is laid out, for the root


KINDS = {
    "pdf": Kind("a PDF document", "pypdf", "pypdf", "pages end with a form feed, '\\f'"),
    "docx": Kind(
        "a Word document",
        "docx",
        "python-docx",
        "a paragraph a line, cells of tables divided by tabs",
    ),
    "xlsx": Kind(
        "an Excel workbook",
        "openpyxl",
        "openpyxl",
        "sheets begin with '# sheet NAME', cells divided by tabs",
    ),
    "parquet": Kind(
        "a Parquet file", "pyarrow", "pyarrow", "JSON lines: a row is one JSON object on one line"
    ),
}


def kind_of(name: str, head: bytes) -> str | None:
    """The kind of document that a file with this name and beginning is."""
    if head.startswith(b"%PDF"):
        return "pdf"
    if head.startswith(b"PAR1"):
        return "parquet"
    ending = name.lower().rpartition(".")[2]
    return ending if ending in ("docx", "xlsx") and head.startswith(b"PK\3\4") else None


def text_of(path: Path, kind: str, seconds: float = SECONDS) -> str:
    """Raises ContextError where the library is missing, or the document cannot be read within the
    limits."""
    of = KINDS[kind]
    if importlib.util.find_spec(of.module) is None:
        raise ContextError(
            f"context: {path} is {of.what}, not text. Its text can be extracted with the package {of.package}: "
            f"pip install {of.package} (all of them: the extra documents)."
        )
    search = os.pathsep.join(filter(None, (os.path.abspath(p) for p in sys.path if p)))
    environment = {
        "PATH": os.environ.get("PATH", ""),
        "PYTHONPATH": search,
        "OPENBLAS_NUM_THREADS": "1",
    }
    bounds = [str(MEMORY), str(int(seconds) + 1), str(TEXT_BYTES)]
    with (
        open(path, "rb") as source,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        command = [sys.executable, "-P", "-s", "-B", str(CHILD), kind, *bounds]
        try:
            done = subprocess.run(
                command,
                stdin=source,
                stdout=out,
                stderr=err,
                env=environment,
                cwd="/",
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _failed(path, of, f"it took more than {seconds:.0f} s") from None
        if done.returncode != 0:
            err.seek(max(0, err.tell() - 2000))
            said = err.read(2000).decode("utf-8", "replace").strip().splitlines()
            raise _failed(
                path,
                of,
                repr(said[-1][:200]) if said else f"the reader ended with {done.returncode}",
            )
        out.seek(0)
        text = out.read(TEXT_BYTES).decode("utf-8", "replace")
    if not text.strip():
        hint = " Scanned pages have to be recognized (OCR) first." if kind == "pdf" else ""
        raise _failed(path, of, f"there is no text in it.{hint}")
    return text


def _failed(path: Path, of: Kind, why: str) -> ContextError:
    return ContextError(
        f"context: {path} is {of.what}, not text, and its text could not be extracted: {why}"
    )
