"""The lazy text of the worker is the string it stands for, whatever the block size, character
widths and borders."""

import itertools
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_runtime.context import Context
from rlm_runtime.repl.worker import text as text_module
from rlm_runtime.repl.worker import textsearch
from rlm_runtime.repl.worker.folder import Folder
from rlm_runtime.repl.worker.text import Text, hint, load, open_text

ALPHABET = "aab \n\r\tx<>=,.1é€\u2028\u0085𝄞🎈ſK_"
strings = st.text(alphabet=ALPHABET, max_size=80) | st.text(
    alphabet=st.characters(exclude_categories=["Cs"]), max_size=60
)
offsets = st.none() | st.integers(-90, 90)
blocks = st.integers(4, 9)
quick = settings(max_examples=150, deadline=None)


@pytest.fixture(autouse=True)
def re_as_it_was():
    """Loading a lazy text teaches `re` about it; here that ends with the test."""
    kept = {
        name: getattr(re, name)
        for name in [*textsearch.OVER_TEXT, "split", "sub", "subn", "compile"]
    }
    yield
    for name, function in kept.items():
        setattr(re, name, function)
    textsearch._text_type = None


def lazy(content: str, block: int = 5) -> Text:
    """A Text over an unnamed file with this content."""
    with tempfile.TemporaryFile() as file:
        file.write(content.encode())
        file.flush()
        return Text(text_module.Blocks(os.dup(file.fileno()), block=block, owned=True))


def test_bounds_beyond_an_empty_text():
    for start, end in ((1, -1), (-1, 1), (5, None), (None, -5), (0, 0), (3, 9)):
        for name in ("find", "rfind", "count", "startswith", "endswith"):
            for content in ("", "ab"):
                assert getattr(lazy(content), name)("", start, end) == getattr(content, name)(
                    "", start, end
                ), (
                    name,
                    start,
                )


def piece_of(draw, content: str) -> str:
    if content and draw(st.booleans()):
        start = draw(st.integers(0, len(content) - 1))
        return content[start : start + draw(st.integers(0, 12))]
    return draw(st.text(alphabet=ALPHABET, max_size=4))


@quick
@given(strings.filter(lambda s: not s.startswith("\ufeff")), blocks, st.data())
def test_a_text_is_its_string(content, block, data):
    text = lazy(content, block)
    start, end = data.draw(offsets), data.draw(offsets)
    step = data.draw(st.none() | st.integers(-7, 7).filter(bool))
    sub = piece_of(data.draw, content)
    other = piece_of(data.draw, content)
    assert text[start:end] == content[start:end]
    assert text[start:end:step] == content[start:end:step]
    assert len(text) == len(content)
    for name in ("find", "rfind", "count"):
        assert getattr(text, name)(sub, start, end) == getattr(content, name)(sub, start, end), name
    for name in ("startswith", "endswith"):
        assert getattr(text, name)(sub, start, end) == getattr(content, name)(sub, start, end), name
        assert getattr(text, name)((sub, other)) == getattr(content, name)((sub, other)), name
    assert (sub in text) == (sub in content)
    assert "".join(text) == content
    assert list(text.lines()) == content.splitlines() == text.splitlines()
    assert list(text.lines(keepends=True)) == content.splitlines(True)
    assert (
        text == content and content == text and (text != content) is False and text != content + "x"
    )
    assert hash(text) == hash(content) and str(text) == content and f"{text}" == content
    assert bool(text) == bool(content) and text.isascii() == content.isascii()
    assert text.encode() == content.encode()
    if content:
        i = data.draw(st.integers(-len(content), len(content) - 1))
        assert text[i] == content[i]
    with pytest.raises(IndexError):
        text[len(content)]


@quick
@given(strings.filter(lambda s: not s.startswith("\ufeff")), blocks, st.data())
def test_the_rest_of_str(content, block, data):
    text = lazy(content, block)
    sub = piece_of(data.draw, content) or "a"
    assert text.split() == content.split()
    assert text.split(sub, 2) == content.split(sub, 2)
    assert text.partition(sub) == content.partition(sub) and text.rpartition(
        sub
    ) == content.rpartition(sub)
    assert text.replace(sub, "-") == content.replace(sub, "-")
    assert (text.lower(), text.strip(), text.title()) == (
        content.lower(),
        content.strip(),
        content.title(),
    )
    assert text + sub == content + sub and sub + text == sub + content and text * 2 == content * 2
    assert (text < sub) == (content < sub) and (text >= sub) == (content >= sub)
    for name in ("index", "rindex"):
        if sub in content:
            assert getattr(text, name)(sub) == getattr(content, name)(sub)
        else:
            with pytest.raises(ValueError, match="substring not found"):
                getattr(text, name)(sub)


@quick
@given(strings, blocks, st.integers(1, 30), st.data())
def test_chunks_cover_the_text(content, block, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    pieces = list(lazy(content, block).chunks(size, overlap))
    whole = content[1:] if content.startswith("\ufeff") else content
    assert "".join([p if i == 0 else p[overlap:] for i, p in enumerate(pieces)]) == whole
    assert all(len(p) == size for p in pieces[:-1])
    assert all(a[len(a) - overlap :] == b[:overlap] for a, b in itertools.pairwise(pieces))


@quick
@given(strings.filter(lambda s: not s.startswith("\ufeff")), blocks, st.data())
def test_a_long_slice_is_a_view_with_the_same_answers(content, block, data):
    text = lazy(content, block)
    a, b = sorted(
        [data.draw(st.integers(0, len(content))), data.draw(st.integers(0, len(content)))]
    )
    view, part = Text(text._blocks, a, b), content[a:b]
    sub = piece_of(data.draw, part)
    assert len(view) == len(part) and str(view) == part and view == part
    assert (
        view.find(sub) == part.find(sub)
        and view.count(sub) == part.count(sub)
        and view.rfind(sub) == part.rfind(sub)
    )
    assert spans(view.finditer(r"\w+")) == spans(re.finditer(r"\w+", part))
    assert spans(view.finditer(r"^.|.$")) == spans(re.finditer(r"^.|.$", part))


def spans(matches):
    return [(m.span(), m.group(), m.groups(), m.lastindex, m.regs) for m in matches]


# -- regular expressions

atoms = st.sampled_from(
    [
        "a",
        "b",
        "x",
        "é",
        "🎈",
        ".",
        r"\w",
        r"\s",
        r"\d",
        r"\W",
        r"\S",
        "[^,]",
        "[ab]",
        "[^<>]",
        r"[\s\S]",
        r"\n",
        "=",
        "<",
    ]
)
ends = st.sampled_from(
    [
        "",
        "",
        "",
        r"\b",
        "^",
        "$",
        r"\Z",
        r"\A",
        r"\B",
        "(?=b)",
        "(?!a)",
        "(?<=a)",
        "(?<!x)",
        r"(?=.*b)",
    ]
)
repeats = st.sampled_from(
    ["", "", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{0,3}", "{1,40}?", "*+", "++"]
)


@st.composite
def patterns(draw, depth=2):
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.integers(0, 9)) if depth else 0
        if kind < 6:
            atom = draw(atoms)
        elif kind == 6:
            atom = "(" + draw(patterns(depth - 1)) + ")"
        elif kind == 7:
            atom = "(?:" + draw(patterns(depth - 1)) + "|" + draw(patterns(depth - 1)) + ")"
        elif kind == 8:
            atom = "(?>" + draw(patterns(depth - 1)) + ")"
        else:
            atom = "(?i:" + draw(patterns(depth - 1)) + ")"
        parts.append(draw(ends) + atom + draw(repeats) + draw(ends))
    return "".join(parts)


def valid(pattern: str, flags: int) -> bool:
    try:
        re.compile(pattern, flags)
    except (re.error, RecursionError):
        return False
    return True


short_strings = st.text(alphabet=ALPHABET, max_size=24)


@settings(max_examples=400, deadline=None)
@given(
    short_strings,
    st.integers(4, 6),
    patterns(),
    st.sampled_from([0, re.S, re.M, re.I, re.S | re.M, re.A]),
    st.data(),
)
def test_patterns_match_as_on_the_string(content, block, pattern, flags, data):
    if not valid(pattern, flags):
        return
    text = lazy(content, block)
    text._step = lambda: 2  # windows of two characters: every border is met
    pos = data.draw(st.integers(0, len(content) + 2))
    real = re.compile(pattern, flags)
    assert spans(text.finditer(pattern, pos, flags=flags)) == spans(real.finditer(content, pos))
    for name in ("search", "match", "fullmatch"):
        mine, true = getattr(text, name)(real, pos), getattr(real, name)(content, pos)
        assert spans([mine] if mine else []) == spans([true] if true else []), name
    assert text.findall(real, pos) == real.findall(content, pos)


@settings(max_examples=400, deadline=None)
@given(short_strings, patterns(), st.sampled_from([0, re.S, re.M, re.I | re.S]), st.integers(1, 6))
def test_a_pattern_too_long_for_the_memory_is_right_or_refused(content, pattern, flags, limit):
    """With a limit smaller than the text: the same matches, or a ValueError in place of the first
    that is unsure."""
    if not valid(pattern, flags):
        return
    text = lazy(content, 4)
    text._step = lambda: 1
    want = spans(re.finditer(pattern, content, flags))
    got = []
    saved, textsearch.WHOLE_LIMIT = textsearch.WHOLE_LIMIT, limit
    try:
        for match in text.finditer(pattern, flags=flags):
            got += spans([match])
    except ValueError as error:
        assert "Bound its repeats" in str(error)
        assert got == want[: len(got)]
    else:
        assert got == want
    finally:
        textsearch.WHOLE_LIMIT = saved


lazy_patterns = st.sampled_from(
    [
        "<.*?>",
        "<a[^>]*>(.*?)</a>",
        "<(a|ab)>(.*?)(?:b|>)",
        "a{1,3}(.*?)b",
        "(?:ab|a)(.*?)b",
        "x.+?=.*?a",
        r"=(.{2,}?)\d+",
        "a(?=b.)(.*?)a",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="aab<>/x=1 ", max_size=60), lazy_patterns, st.integers(4, 30))
def test_lazy_patterns_over_a_text_longer_than_the_limit(content, pattern, limit):
    content = content + "<a>b</a>=11"
    text = lazy(content, 4)
    text._step = lambda: 2
    want = spans(re.finditer(pattern, content, re.S))
    saved, textsearch.WHOLE_LIMIT = textsearch.WHOLE_LIMIT, limit
    got = []
    try:
        for match in text.finditer(pattern, flags=re.S):
            got += spans([match])
    except ValueError:
        assert got == want[: len(got)]
    else:
        assert got == want
    finally:
        textsearch.WHOLE_LIMIT = saved


def test_a_lazy_pattern_is_answered_and_not_only_refused(monkeypatch):
    content = "".join(f"<doc id='{i}'>{'line ' * 5}\n</doc>\n" for i in range(200))
    text = lazy(content, 16)
    text._step = lambda: 16
    monkeypatch.setattr(textsearch, "WHOLE_LIMIT", 200)
    pattern = r"<doc id='(\d+)'>(.*?)</doc>"
    assert spans(text.finditer(pattern, flags=re.S)) == spans(re.finditer(pattern, content, re.S))
    with pytest.raises(ValueError, match="Bound its repeats"):
        text.search(r"<doc.*</doc>", flags=re.S)


def test_functions_of_re_take_a_text_and_leave_strings_alone(tmp_path):
    path = tmp_path / "big.txt"
    path.write_text("naïve — the magic number is 1234567.\n" * 50, encoding="utf-8")
    code = """
import re, sys
sys.path.insert(0, sys.argv[1])
from text import load
plain = re.search
context = load("mmap", sys.argv[2])
assert re.search is not plain
content = open(sys.argv[2], encoding="utf-8", newline="").read()
for c in (context, content):
    assert re.search(r"is (\\d+)", c).span(1) == (28, 35), re.search(r"is (\\d+)", c).span(1)
    assert len(re.findall(r"\\d{7}", c)) == 50 and len(list(re.finditer("—", c))) == 50
    assert re.match("naïve", c) and not re.fullmatch("naïve", c)
    assert re.sub(r"\\d", "", string=c) == re.sub(r"\\d", "", content)
    assert re.subn(r"\\d", "", c)[1] == 350 and re.split(r"\\n", c) == content.split("\\n")
    p = re.compile(r"NUMBER is (?P<n>\\d+)", re.I)
    assert isinstance(p, re.Pattern) and re.compile(p) == p
    assert p.search(c)["n"] == "1234567" and len(p.findall(c)) == 50 and re.search(p, c).group("n") == "1234567"
    assert p.sub("", c) == re.sub(p, "", content) and p.split(c) == p.split(content)
    assert p.search(c, 100).start() == p.search(content, 100).start() and p.search(c, 0, 20) is None
import json.decoder, csv, html.parser, tokenize
assert json.loads("[1]") == [1]
print("fine")
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(Path(text_module.__file__).parent), str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "fine\n", done.stderr


# -- files


def test_invalid_bytes_read_the_same_everywhere(tmp_path):
    path = tmp_path / "bad.txt"
    rng = random.Random(3)
    data = bytes(rng.choice(b"ab\n\x80\xbf\xc3\xe2\xf0\x9f\xff") for _ in range(400))
    path.write_bytes(data)
    for block in (4, 5, 7):
        text = Text.open(path, block=block)
        whole = "".join(text)
        assert len(text) == len(whole) and text[:] == whole
        assert [text[i] for i in range(0, len(text), 17)] == [
            whole[i] for i in range(0, len(whole), 17)
        ]
        assert text.find("\ufffd") == whole.find("\ufffd") >= 0


def test_the_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "bom.txt"
    path.write_bytes("\ufeffhello".encode())
    assert (
        Text.open(path)[:] == "hello"
        and load("text", str(path)) == "hello"
        and open_text(str(path)) == "hello"
    )


def test_a_file_that_shrinks_is_an_error(tmp_path):
    path = tmp_path / "shrinks.txt"
    path.write_text("a" * 1000)
    text = Text.open(path, block=100)
    assert text[:10] == "a" * 10
    os.truncate(path, 500)
    with pytest.raises(OSError, match="shorter"):
        len(text)


def test_a_gigabyte_is_opened_and_searched_without_holding_it(tmp_path):
    """A sparse file: a gigabyte of NUL characters with words at its two ends."""
    path = tmp_path / "huge.txt"
    with open(path, "wb") as file:
        file.write(b"first")
        file.seek(1 << 30)
        file.write("última".encode())
    code = """
import re, sys, time
sys.path.insert(0, sys.argv[1])
began = time.perf_counter()
import text
context = text.load("mmap", sys.argv[2])
opened = time.perf_counter() - began
assert context[:5] == "first" and context.find("última") == 1 << 30 == context.rfind("ú")
assert context[-6:] == "última" and len(context) == (1 << 30) + 6
rss = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024  # peak of this program alone
print(opened, rss)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(Path(text_module.__file__).parent), str(path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    opened, rss = map(float, done.stdout.split())
    assert opened < 1 and rss < 100


def test_one_long_string_is_refused_with_advice(monkeypatch):
    monkeypatch.setattr(text_module, "STR_LIMIT", 100)
    text = lazy("word " * 40)
    for use in (str, lambda t: t.upper(), lambda t: t + "x", lambda t: f"{t}", lambda t: t.split()):
        with pytest.raises(ValueError, match=r"text\[a:b\]"):
            use(text)
    assert text[:5] == "word " and text.count("word") == 40 and hash(text) == hash(text)
    assert "word" in repr(text) and len(repr(text)) < 200


def test_a_long_slice_is_a_view(monkeypatch):
    monkeypatch.setattr(text_module, "SLICE_LIMIT", 50)
    text = lazy("abc€" * 40)
    assert isinstance(text[10:], Text) and text[10:] == ("abc€" * 40)[10:]
    assert isinstance(text[10:30], str)


def test_hint_for_a_function_that_wants_a_true_str():
    with pytest.raises(TypeError) as caught:
        re.compile("a").search(lazy("abc"))
    assert "finditer" in hint(caught.value)
    assert hint(TypeError("something else")) is None and hint(ValueError("Text")) is None


def test_every_mode_of_load(tmp_path):
    path = tmp_path / "file"
    path.write_bytes('{"a": [1, "é\\ud800"]}'.encode())
    assert load("json", str(path)) == {"a": [1, "é\ud800"]}
    assert load("bytes", str(path)) == path.read_bytes()
    assert load("text", str(path)) == path.read_text(encoding="utf-8")
    with open(path, "rb") as file:
        file.seek(5)  # an inherited descriptor may stand anywhere
        assert load("text", file.fileno()) == path.read_text(encoding="utf-8")
    path.write_bytes("lone \ud800".encode("utf-8", "surrogatepass"))
    assert load("text", str(path), {"errors": "surrogatepass"}) == "lone \ud800"
    with pytest.raises(ValueError, match="unknown context mode"):
        load("pickle", str(path))


# -- folders


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "root"
    (root / "src" / "deep").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "HEAD").write_text("ref")
    (root / "readme.md").write_text("# Title\nneedle here\n")
    (root / "src" / "a.py").write_text("def needle():\n    pass\n")
    (root / "src" / "deep" / "b.py").write_text("x = 1\n")
    (root / "src" / "blob.bin").write_bytes(b"needle\0\xff")
    (tmp_path / "secret.txt").write_text("outside")
    (root / "leak.txt").symlink_to(tmp_path / "secret.txt")
    (root / "parent").symlink_to(tmp_path)
    (root / "within.md").symlink_to(root / "readme.md")
    os.mkfifo(root / "pipe")
    payload = Context.folder(root).payload(tmp_path)
    return load("folder", str(payload.path), payload.args)


def test_a_folder_is_a_mapping_of_its_own_files(folder):
    assert list(folder) == ["readme.md", "src/a.py", "src/deep/b.py", "within.md"]
    assert (
        folder["src/a.py"].startswith("def needle") and folder["./readme.md"] == folder["within.md"]
    )
    assert {name: len(text) for name, text in folder.items()}["src/deep/b.py"] == 6
    assert folder.size("src/deep/b.py") == 6 and folder.size() == sum(
        folder.size(n) for n in folder
    )
    assert folder.bytes("src/blob.bin") == b"needle\0\xff"
    with pytest.raises(KeyError, match=r"src/a\.py"):
        folder["a.py"]
    with pytest.raises(KeyError):
        folder["leak.txt"]
    with pytest.raises(KeyError):
        folder["../secret.txt"]
    assert "leak" not in repr(folder) and "4 files" in repr(folder)


def test_what_is_no_text_is_no_key_and_says_so(folder):
    assert list(folder.skipped) == ["src/blob.bin"] and "src/blob.bin" not in folder
    with pytest.raises(ValueError, match=r"NUL byte.*context\.bytes"):
        folder["src/blob.bin"]
    assert folder.text("src/blob.bin", "latin-1") == "needle\0\xff"
    with pytest.raises(ValueError, match="is not utf-8"):
        folder.text("src/blob.bin")
    assert ".skipped" in repr(folder)


def test_a_link_swapped_in_later_is_not_followed(folder, tmp_path):
    assert "readme.md" in folder
    (tmp_path / "root" / "readme.md").unlink()
    (tmp_path / "root" / "readme.md").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(KeyError, match="leads out"):
        folder["readme.md"]


def test_glob_grep_and_walk(folder):
    assert (
        folder.glob("*.py")
        == folder.glob("**/*.py")
        == [n for n in folder.glob("src/**") if n.endswith("py")]
    )
    assert folder.glob("src/*.py") == ["src/a.py"] and folder.glob("src/[!a].py") == []
    assert folder.grep("needle") == [
        ("readme.md", 2, "needle here"),
        ("src/a.py", 1, "def needle():"),
        ("within.md", 2, "needle here"),
    ]
    assert folder.grep("NEEDLE", "*.py", re.I) == [("src/a.py", 1, "def needle():")]
    assert len(folder.grep("needle", limit=2)) == 2
    assert list(folder.walk()) == [
        ("", ["src"], ["readme.md", "within.md"]),
        ("src", ["deep"], ["a.py"]),
        ("src/deep", [], ["b.py"]),
    ]


def test_named_files_are_a_folder_without_a_root(tmp_path):
    (tmp_path / "one").write_text("1")
    (tmp_path / "two").write_text("2" * 100)
    files = load(
        "folder",
        None,
        {
            "files": [["x/one.txt", str(tmp_path / "one")], ["two", str(tmp_path / "two")]],
            "lazy_bytes": 50,
        },
    )
    assert isinstance(files, Folder) and files["x/one.txt"] == "1"
    assert isinstance(files["two"], Text) and files["two"] == "2" * 100
