"""Run by path: a document on standard input, its text on standard output. Arguments: kind, memory,
seconds, bytes."""

import io
import json
import resource
import sys
from collections.abc import Iterator


def pdf(data: io.BytesIO) -> Iterator[str]:
    import pypdf

    for page in pypdf.PdfReader(data).pages:
        yield (page.extract_text() or "") + "\n\f"


def docx(data: io.BytesIO) -> Iterator[str]:
    import docx as library
    from docx.table import Table

    for part in library.Document(data).iter_inner_content():
        if isinstance(part, Table):
            for row in part.rows:
                yield "\t".join(cell.text.replace("\n", " ") for cell in row.cells) + "\n"
        else:
            yield part.text + "\n"


def xlsx(data: io.BytesIO) -> Iterator[str]:
    import openpyxl

    book = openpyxl.load_workbook(data, read_only=True, data_only=True)
    for sheet in book.worksheets:
        yield f"# sheet {sheet.title}\n"
        for row in sheet.iter_rows(values_only=True):
            cells = ["" if v is None else str(v).replace("\t", " ").replace("\n", " ") for v in row]
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                yield "\t".join(cells) + "\n"


def parquet(data: io.BytesIO) -> Iterator[str]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(data).iter_batches(batch_size=1000):
        for row in batch.to_pylist():
            yield json.dumps(row, ensure_ascii=False, default=str) + "\n"


def main() -> None:
    kind, memory, seconds, size = sys.argv[1], *map(int, sys.argv[2:])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    data = io.BytesIO(sys.stdin.buffer.read())
    readers = {"pdf": pdf, "docx": docx, "xlsx": xlsx, "parquet": parquet}
    try:
        for piece in readers[kind](data):
            sys.stdout.buffer.write(piece.encode("utf-8", "replace"))
        sys.stdout.buffer.flush()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
