"""Files as people have them: other encodings, binaries among texts, patterns, documents, tables,
and long texts."""

import asyncio
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm.loop_helpers import cell
from rlm_runtime import RLM, Context, ContextError, UsageError
from rlm_runtime.context import extract, files
from rlm_runtime.lms.scripted import ScriptedLM
from rlm_runtime.repl import make
from rlm_runtime.repl.worker import text as worker_text

FRENCH = "Où était-elle ? Ça a coûté très cher à la mémoire de l'été.\n" * 5
JAPANESE = "これは日本語の文章です。今日は良い天気ですね。\n" * 8


def loaded(context, folder):
    payload = context.payload(folder)
    return worker_text.load(payload.mode, str(payload.path) if payload.path else None, payload.args)


def made(root: Path, contents: dict[str, str | bytes]) -> Path:
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


# ---- encodings


@pytest.fixture
def mixed(tmp_path):
    return made(
        tmp_path / "mixed",
        {
            "plain.txt": "plain",
            "utf8.txt": "naïve",
            "latin.txt": FRENCH.encode("latin-1"),
            "jp.txt": JAPANESE.encode("cp932"),
            "wide.txt": "wide".encode("utf-16"),
            "picture.png": b"\x89PNG\r\n\x1a\n\0\0",
            "data.bin": bytes(range(256)),
            "packed.gz": b"\x1f\x8b\x08\0\0\0\0\0",
            "empty.txt": b"",
        },
    )


def test_what_is_no_utf8_is_found_counted_named_and_never_decoded(mixed, tmp_path):
    context = Context.folder(mixed)
    folder = loaded(context, tmp_path)
    assert dict(folder) == {"plain.txt": "plain", "utf8.txt": "naïve", "empty.txt": ""}
    assert set(folder.skipped) == {
        "latin.txt",
        "jp.txt",
        "wide.txt",
        "picture.png",
        "data.bin",
        "packed.gz",
    }
    (note,) = context.notes
    assert (
        "6 of 9 files were left out" in note and "3 not UTF-8" in note and "1 a PNG image" in note
    )
    assert "cp932" in folder.skipped["jp.txt"] and "utf-16" in folder.skipped["wide.txt"]
    for name in folder.skipped:
        with pytest.raises(ValueError, match=r"context\.bytes"):
            folder[name]
    assert folder.text("latin.txt", "latin-1") == FRENCH
    with pytest.raises(ValueError, match="is not utf-8"):
        folder.text("latin.txt")
    assert note in context.describe() and ".skipped" in context.describe()


def test_an_encoding_is_for_the_files_that_are_not_utf8(mixed, tmp_path):
    context = Context.of(mixed, encoding="latin-1")
    folder = loaded(context, tmp_path)
    assert folder["latin.txt"] == FRENCH and folder["utf8.txt"] == "naïve"
    assert "picture.png" in folder.skipped and "data.bin" in folder.skipped
    assert any("2 as iso8859-1" in note for note in context.notes)
    wide = loaded(Context.of(mixed, encoding="utf-16"), tmp_path)
    assert wide["wide.txt"] == "wide"
    with pytest.raises(ContextError, match="unknown encoding"):
        Context.of(mixed, encoding="klingon")


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=400) | st.text(min_size=1).map(lambda t: t.encode("utf-16")))
def test_a_file_of_a_folder_is_its_own_utf8_or_an_error(tmp_path_factory, data):
    """Whatever the bytes: a text that encodes back to them, or no key of the mapping."""
    root = made(tmp_path_factory.mktemp("any"), {"x": data, "good.txt": "good"})
    context = Context.folder(root)
    folder = loaded(context, root)
    if "x" in folder:
        assert folder["x"].encode() == data.removeprefix(b"\xef\xbb\xbf") and b"\0" not in data
    else:
        assert (
            "x" in folder.skipped
            and folder.bytes("x") == data
            and "1 of 2 files" in context.notes[0]
        )


def test_a_byte_that_the_samples_miss_is_an_error_where_it_is_read(tmp_path):
    data = bytearray(b"words \n" * 600_000)
    data[3_000_001] = 0xE9
    root = made(tmp_path / "root", {"big.txt": bytes(data), "good.txt": "good"})
    folder = loaded(Context.folder(root), tmp_path)
    with pytest.raises(ValueError, match=r"'big.txt' is not utf-8.*errors='replace'"):
        folder["big.txt"]
    assert "\ufffd" in folder.text("big.txt", errors="replace")
    with pytest.warns(UserWarning, match="grep left out 'big.txt'"):
        assert folder.grep("good") == [("good.txt", 1, "good")]


def test_a_folder_without_a_text_says_what_it_holds(tmp_path):
    made(tmp_path / "pictures", {"a.png": b"\x89PNG\0", "b.jpg": b"\xff\xd8\xff\0"})
    with pytest.raises(ContextError, match=r"holds no text.*1 a PNG image"):
        Context.of(tmp_path / "pictures")


def test_the_notes_reach_the_result_and_the_root(mixed):
    lm = ScriptedLM(
        [
            cell(
                "print(sorted(context.skipped))\nanswer['content'] = len(context)\nanswer['ready'] = True"
            )
        ]
    )
    result = RLM(lm).completion(mixed, "How many?")
    assert result.answer == 3 and "6 of 9 files" in result.notes[0]
    assert "6 of 9 files" in str(lm.messages[0])


# ---- patterns


@pytest.fixture
def tree(tmp_path):
    return made(
        tmp_path / "repo" / "tree",
        {
            ".gitignore": "*.log\nbuild/\n!keep.log\n",
            "a.py": "a",
            "b.md": "b",
            "x.log": "x",
            "keep.log": "k",
            "build/out.py": "o",
            "docs/one.md": "1",
            "docs/.gitignore": "private*\n",
            "docs/private.md": "p",
            "src/c.py": "c",
        },
    )


def names(context):
    return [name for name, _, _ in context.listing]


def test_gitignore_files_hold_each_in_its_folder(tree):
    context = Context.of(tree)
    assert names(context) == [
        ".gitignore",
        "a.py",
        "b.md",
        "docs/.gitignore",
        "docs/one.md",
        "keep.log",
        "src/c.py",
    ]
    assert "3 by .gitignore" in context.notes[0]
    assert set(names(Context.of(tree, gitignore=False))) - set(names(context)) == {
        "x.log",
        "build/out.py",
        "docs/private.md",
    }


def test_a_gitignore_above_holds_inside_one_repository_only(tree):
    (tree.parent / ".gitignore").write_text("/tree/src/\n*.md\n")
    assert "src/c.py" in names(Context.of(tree))
    (tree.parent / ".git").mkdir()
    assert names(Context.of(tree)) == [".gitignore", "a.py", "docs/.gitignore", "keep.log"]


def test_include_and_exclude(tree, tmp_path):
    assert names(Context.of(tree, include=["*.py"])) == ["a.py", "src/c.py"]
    assert names(Context.of(tree, include=["*.md"], exclude=["docs/"])) == ["b.md"]
    assert names(Context.folder(tree, include="docs/*.md")) == ["docs/one.md"]
    several = Context.of([tree, tree / "a.py"], include=["*.md"])
    assert (
        names(several) == ["a.py", "tree/b.md", "tree/docs/one.md"]
        and "patterns to include" in several.notes[0]
    )
    with pytest.raises(ContextError, match=r"no text.*by the patterns to include"):
        Context.of(tree, include=["*.nothing"])
    with pytest.raises(UsageError, match="include"):
        Context.of(tree, include=["!"])


def test_options_that_would_do_nothing_are_refused(tree):
    for options in ({"include": ["*.py"]}, {"exclude": ["*.py"]}):
        with pytest.raises(UsageError, match="no folder was given"):
            Context.of(tree / "a.py", **options)
    for options in ({"encoding": "latin-1"}, {"gitignore": False}, {"include": "*"}):
        with pytest.raises(UsageError, match="of a Path"):
            Context.of("a text", **options)


def test_named_files_are_in_utf8_or_in_the_encoding_that_is_given(mixed, tmp_path):
    paths = [mixed / "utf8.txt", mixed / "latin.txt"]
    with pytest.raises(ContextError, match=r"latin.txt is not UTF-8"):
        Context.of(paths)
    assert dict(loaded(Context.of(paths, encoding="latin-1"), tmp_path)) == {
        "utf8.txt": "naïve",
        "latin.txt": FRENCH,
    }
    assert (
        loaded(Context.of([mixed / "utf8.txt", mixed / "wide.txt"], encoding="utf-16"), tmp_path)[
            "wide.txt"
        ]
        == "wide"
    )


def test_patterns_agree_with_git(tree):
    git = subprocess.run(["git", "--version"], capture_output=True, check=False)
    if git.returncode:
        pytest.skip("git is not installed")
    subprocess.run(["git", "init", "-q", str(tree)], check=True)
    listed = ["git", "-C", str(tree), "ls-files", "--others", "--exclude-standard"]
    expected = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
    assert names(Context.of(tree)) == sorted(expected)


# ---- long texts


def test_forty_megabytes_are_a_real_str_in_a_cell(tmp_path):
    path = tmp_path / "rows.json"
    row = {"id": 123456, "text": "words and more words é"}
    rows = 600_000
    line = json.dumps(row, ensure_ascii=False)
    path.write_text("[" + ",".join([line] * rows) + "]", encoding="utf-8")
    assert path.stat().st_size > 30_000_000

    async def run():
        environment = make("local")
        try:
            await environment.start(Context.of(path))
            code = (
                "import io, json\nassert isinstance(context, str) and type(context) is str\n"
                "print(len(json.loads(context)), io.StringIO(context).read(9), len(''.join([context, '!'])), len(context))"
            )
            return await environment.run(code, None)
        finally:
            await environment.aclose()

    result = asyncio.run(run())
    chars = 2 + rows * len(line) + rows - 1
    assert result.stdout.split("\n")[0] == f'{rows} [{{"id": 1 {chars + 1} {chars}', result
    assert Context.of(path).chars == chars


def test_the_host_measures_a_text_as_the_worker_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 7)
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "latin-1"):
        text = "zwölf Boxkämpfer\r\njagen\n" * 3
        (tmp_path / "t").write_bytes(text.encode(encoding))
        context = Context.file(tmp_path / "t", encoding=encoding)
        assert (context.chars, context.measure.lines) == (len(text), text.count("\n") + 1)
        assert loaded(context, tmp_path) == text


def test_every_bad_byte_of_a_text_is_found_at_its_offset(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 7)
    good = "zwölf Boxkämpfer ".encode()
    for at in range(len(good) + 1):
        (tmp_path / "t").write_bytes(good[:at] + b"\xff" + good[at:])
        with pytest.raises(ContextError, match=r"is not utf-8") as error:
            Context.of(tmp_path / "t")
        assert f"at offset {at:,} " in str(error.value) or f"at offset {at - 1:,} " in str(
            error.value
        )


# ---- documents and tables


def pdf(*pages: str) -> bytes:
    """A PDF of one line a page, written by hand."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, page in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({page}) Tj ET"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * i} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>",
            f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        ]
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    trailer = f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
    return out + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{trailer}".encode()


@pytest.fixture
def documents(tmp_path):
    docx = pytest.importorskip("docx")
    openpyxl = pytest.importorskip("openpyxl")
    pytest.importorskip("pypdf")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    root = made(
        tmp_path / "documents",
        {"report.pdf": pdf("First page", "Second page"), "note.txt": "a note"},
    )
    document = docx.Document()
    document.add_paragraph("Before the table")
    table = document.add_table(rows=1, cols=2)
    table.cell(0, 0).text, table.cell(0, 1).text = "left", "right"
    document.add_paragraph("After it")
    document.save(root / "letter.docx")
    book = openpyxl.Workbook()
    book.active.title = "Prices"
    book.active.append(["tea", 3.5, None])
    book.create_sheet("Empty")
    book.save(root / "prices.xlsx")
    parquet.write_table(pyarrow.table({"n": [1, 2], "s": ["é", None]}), root / "rows.parquet")
    return root


EXPECTED = {
    "report.pdf": "First page\n\fSecond page\n\f",
    "letter.docx": "Before the table\nleft\tright\nAfter it\n",
    "prices.xlsx": "# sheet Prices\ntea\t3.5\n# sheet Empty\n",
    "rows.parquet": '{"n": 1, "s": "é"}\n{"n": 2, "s": null}\n',
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_document_is_its_text(documents, tmp_path, name):
    context = Context.of(documents / name)
    assert loaded(context, tmp_path) == EXPECTED[name] == context.value
    assert (
        name in context.describe()
        and extract.KINDS[name.rpartition(".")[2]].form in context.describe()
    )
    record = context.record(tmp_path / "blobs")
    (documents / name).unlink()
    again = Context.from_record(record, tmp_path / "blobs")
    assert again.value == EXPECTED[name]


def test_documents_in_a_folder_and_among_files(documents, tmp_path):
    context = Context.folder(documents)
    assert dict(loaded(context, tmp_path)) == {**EXPECTED, "note.txt": "a note"}
    assert "4 documents" in context.notes[0]
    several = Context.of([documents / "report.pdf", documents / "note.txt"])
    assert dict(loaded(several, tmp_path))["report.pdf"] == EXPECTED["report.pdf"]


def test_documents_of_a_folder_reach_a_cell(documents):
    lm = ScriptedLM([cell("answer['content'] = sorted(context.values())\nanswer['ready'] = True")])
    assert RLM(lm).completion(documents, "What?").answer == sorted([*EXPECTED.values(), "a note"])


def test_a_broken_document_is_an_error_alone_and_left_out_in_a_folder(tmp_path):
    pytest.importorskip("pypdf")
    root = made(
        tmp_path / "root",
        {"broken.pdf": b"%PDF-1.4\nnothing", "empty.pdf": pdf(" "), "good.txt": "good"},
    )
    with pytest.raises(
        ContextError, match=r"broken.pdf is a PDF document, not text.*could not be extracted"
    ):
        Context.of(root / "broken.pdf")
    with pytest.raises(ContextError, match="OCR"):
        Context.of(root / "empty.pdf")
    with pytest.raises(ContextError, match=r"broken.pdf is a PDF document, not text"):
        Context.of([root / "broken.pdf", root / "good.txt"])
    folder = loaded(Context.folder(root), tmp_path)
    assert list(folder) == ["good.txt"] and "could not be extracted" in folder.skipped["broken.pdf"]


def test_extraction_is_bounded(tmp_path, monkeypatch):
    """A child that runs on, eats memory or writes without end is ended, and says so; it sees no
    variable of the host."""
    path = made(tmp_path, {"x.pdf": pdf("page")}) / "x.pdf"
    monkeypatch.setitem(
        extract.KINDS, "pdf", extract.Kind("a PDF document", "json", "json", "text")
    )
    monkeypatch.setattr(extract, "CHILD", tmp_path / "child.py")
    limits = "import resource, sys\nfor w, v in zip((9, 0, 1), sys.argv[2:]):\n    resource.setrlimit(w, (int(v), int(v)))\n"

    def child(code, **options):
        extract.CHILD.write_text(limits + code)
        return extract.text_of(path, "pdf", **options)

    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert "OPENAI" not in child("import os\nprint(sorted(os.environ))")
    with pytest.raises(ContextError, match="more than 1 s"):
        child("import time\ntime.sleep(60)", seconds=1)
    monkeypatch.setattr(extract, "MEMORY", 1 << 30)
    with pytest.raises(ContextError, match="MemoryError"):
        child("x = bytes(2 << 30)")
    monkeypatch.setattr(extract, "TEXT_BYTES", 1 << 16)
    with pytest.raises(ContextError, match="could not be extracted"):
        child("while True:\n    sys.stdout.write('x' * 1000)")


def test_the_real_child_keeps_its_limits():
    """A sheet that unpacks to far more than the limit on memory."""
    pytest.importorskip("openpyxl")
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", " " * (300 << 20))
    command = [sys.executable, "-P", str(extract.CHILD), "xlsx", str(256 << 20), "20", str(1 << 20)]
    done = subprocess.run(
        command, input=data.getvalue(), capture_output=True, check=False, timeout=60
    )
    assert done.returncode != 0 and b"Error" in done.stderr and not done.stdout


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(extract.importlib.util, "find_spec", lambda name: None)
    path = made(tmp_path, {"x.pdf": pdf("page")}) / "x.pdf"
    with pytest.raises(
        ContextError, match=r"pip install pypdf \(all of them: the extra documents\)"
    ):
        Context.of(path)


def test_a_table_is_json_lines(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    context = Context.of(pyarrow.table({"city": ["Paris", "Lyon"], "n": [1, None]}))
    assert [json.loads(line) for line in context.value.splitlines()] == [
        {"city": "Paris", "n": 1},
        {"city": "Lyon", "n": None},
    ]
    assert "a table of 2 rows" in context.describe() and "'city': string" in context.describe()
    with pytest.raises(ContextError, match="empty table"):
        Context.of(pyarrow.table({"a": []}))


def test_a_data_frame_is_json_lines():
    pandas = pytest.importorskip(
        "pandas", reason="pandas is not installed; pyarrow's tables are tested above"
    )
    frame = pandas.DataFrame({"when": pandas.to_datetime(["2024-01-02"]), "x": [1.5]}, index=[7])
    (line,) = Context.of(frame).value.splitlines()
    assert json.loads(line)["x"] == 1.5 and json.loads(line)["when"].startswith("2024-01-02")


# ---- the record of them


@pytest.mark.parametrize(
    "options", [{}, {"encoding": "latin-1"}, {"include": ["*.txt"], "gitignore": False}]
)
def test_a_recorded_folder_is_read_again_in_the_same_way(mixed, options):
    context = Context.of(mixed, **options)
    again = Context.from_record(json.loads(json.dumps(context.record(None))), None)
    assert again.listing == context.listing and again.reading == context.reading


def test_several_files_are_found_again(mixed):
    context = Context.of([mixed / "plain.txt", mixed / "utf8.txt"])
    assert Context.from_record(context.record(None), None).listing == context.listing
    os.unlink(mixed / "plain.txt")
    assert len(Context.from_record(context.record(None), None).listing) == 1
