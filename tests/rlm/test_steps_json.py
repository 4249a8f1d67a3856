"""Frames and JSON, long or deep: read and written in pieces and off the event loop's thread.

Counted in steps and calls, never in seconds.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import textwrap
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm.fake_server import FakeServer, Say
from rlm.loop_helpers import ScriptedLM, rlm
from rlm.steps import calls_made
from rlm_runtime import parsing
from rlm_runtime.errors import LMError
from rlm_runtime.lms import http
from rlm_runtime.lms.base import Message
from rlm_runtime.lms.openai import OpenAILM
from rlm_runtime.repl import process, wire
from rlm_runtime.replies import pieces, reader
from rlm_runtime.rlm import schemas
from rlm_runtime.rlm.tree import in_order
from rlm_runtime.structured import Shape
from rlm_runtime.trajectory import writer

# -- frames of a worker ----------------------------------------------------------------------------
DONE = {
    "t": "done",
    "id": "x",
    "status": "ok",
    "error": None,
    "variables": {},
    "stdout": "",
    "stdout_chars": 0,
    "stderr": "",
    "stderr_chars": 0,
}
CONTENTS = {
    "objects": lambda n: [{}] * n,
    "lists": lambda n: [[]] * n,
    "numbers": lambda n: list(range(n)),
    "texts": lambda n: ["a, [b]"] * n,
    "keys": lambda n: {str(i): i for i in range(n)},
    "one text": lambda n: "a" * n,
    "escapes": lambda n: "\n" * n,
    "quotes": lambda n: '"' * n,
    "backslashes": lambda n: "\\" * n,
    "emoji": lambda n: "\U0001f600" * n,
    "surrogates": lambda n: ["\ud800"] * n,
    "nested": lambda n: eval("[" * 90 + "]" * 90),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_frame_costs_what_its_length_does(name):
    made = []
    for n in (2_000, 4_000):
        line = json.dumps(
            {**DONE, "answer": {"content": CONTENTS[name](n), "ready": True}}
        ).encode()
        count, message = calls_made(wire.decode, line)
        made.append(count + calls_made(wire.done_of, message, 20_000)[0])
        assert len(message["answer"]["content"]) == len(CONTENTS[name](n))
    assert made[1] <= 2.2 * made[0] + 2_000 and made[1] < 40 * 4_000


@pytest.mark.parametrize(
    "content",
    [
        [{}] * 2_000_000,
        [[]] * 150_000,
        {str(i): i for i in range(150_000)},
        list(range(250_000)),
        [10**1000] * 10_000,
    ],
)
def test_a_frame_of_too_much_never_meets_the_decoder(content, monkeypatch):
    line = json.dumps({**DONE, "answer": {"content": content, "ready": True}}).encode()
    monkeypatch.setattr(wire.pieces, "loads", lambda *a, **k: pytest.fail("decoded"))
    monkeypatch.setattr(wire, "_decoder", None)
    with pytest.raises(wire.Bad, match="more than"):
        wire.decode(line)


STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    max_leaves=10,
)


@contextlib.contextmanager
def pieces_of(chars):
    old, pieces.PIECE = pieces.PIECE, chars
    try:
        yield
    finally:
        pieces.PIECE = old


@given(JSON, st.integers(0, 300), st.integers(1, 30))
def test_strings_are_passed_over_as_by_a_pattern(value, cut, size):
    """The plain way to take strings out of JSON, cut off anywhere; however long the pieces are."""
    line = json.dumps(value).encode()[: cut or None]
    with pieces_of(size):
        assert b"".join(wire.outside_strings(line)) == STRINGS.sub(b"", line)


@given(JSON, st.integers(1, 30))
def test_json_is_written_in_pieces_as_in_one(value, size):
    with pieces_of(size):
        assert pieces.dumps(value) == json.dumps(value, separators=(",", ":")).encode()
        assert pieces.dumps(value, pieces.WIDE) == json.dumps(value, ensure_ascii=False).encode(
            "utf-8", "replace"
        )


ODD_JSON = st.text(alphabet='{}[]",:\\/u d89cef0123tr.eE-+xl\n\x01', max_size=60) | st.lists(
    st.sampled_from(
        [
            '"',
            "\\ud83d",
            "\\ude00",
            "\\u00e9",
            "\\\\",
            '\\"',
            "\\n",
            "a",
            "é",
            ",",
            "[",
            "]",
            "\\",
            "\\ud8",
        ]
    ),
    max_size=12,
).map("".join)


@settings(max_examples=400)
@given(JSON.map(json.dumps) | ODD_JSON | ODD_JSON.map('["{}"]'.format), st.integers(1, 30))
def test_json_is_read_in_pieces_as_in_one(text, size):
    try:
        plain = wire.clean(json.loads(text))
    except (ValueError, RecursionError):
        plain = ValueError
    with pieces_of(size):
        try:
            found = pieces.loads(text)
        except (ValueError, RecursionError):
            found = ValueError
    assert found == plain or (found != found and plain != plain) or "NaN" in text


@pytest.mark.parametrize(
    "unit", ["a", "\\n", "\\\\", "\\ud800", "\\u00e9", "\\ud83d\\ude00", '","', "1,", "{},"]
)
def test_no_step_of_a_long_text_handles_more_than_a_piece(unit, monkeypatch):
    """What the decoder, the encoder and the patterns are given at once, whatever a text is made
    of."""
    longest = 0

    def noting(work, length):
        def noted(*args, **kwargs):
            nonlocal longest
            longest = max(longest, length(*args))
            return work(*args, **kwargs)

        return noted

    class Noting:
        def __init__(self, pattern):
            self.match = noting(
                pattern.match,
                lambda text, at=0, end=None: min(end or 0, len(text)) - at if end else 0,
            )

    text = (
        "["
        + (
            '"' + unit * 20_000 + '"'
            if unit[-1] not in ',"'
            else ('"' if unit[0] == '"' else "") + unit * 20_000 + ('"' if unit[0] == '"' else "1")
        )
        + "]"
    )
    monkeypatch.setattr(pieces, "PIECE", 1_000)
    monkeypatch.setattr(pieces, "ITEMS", 10)
    monkeypatch.setattr(
        pieces, "scanstring", noting(pieces.scanstring, lambda text, at: len(text) - at)
    )
    monkeypatch.setattr(pieces, "_STRING", Noting(pieces._STRING))
    value = pieces.loads(text)
    monkeypatch.setattr(
        pieces.json, "dumps", noting(json.dumps, lambda value: reader.size_of(value, 10**9))
    )
    pieces.dumps(value)
    assert value == wire.clean(json.loads(text)) and 0 <= longest <= 1_100


def test_lines_are_found_in_linear_work():
    for size, frames in ((1, 4_000), (200_000, 2)):
        made = []
        for k in (1, 2):
            lines = wire.Lines(1 << 20)
            data = b"x" * size + b"\n"

            def feed(lines=lines, data=data, k=k, frames=frames):
                for _ in range(k * frames):
                    for at in range(0, len(data), 50_000):
                        lines.feed(data[at : at + 50_000])
                        while lines.next() is not None:
                            pass

            made.append(calls_made(feed)[0])
        assert made[1] <= 2.2 * made[0]


# -- long texts are read beside the loop -----------------------------------------------------------
def test_long_replies_answers_and_schemas_are_read_on_another_thread(monkeypatch):
    threads = {}

    def noting(name, work):
        def noted(*args, **kwargs):
            threads.setdefault(name, set()).add(threading.get_ident() == loop_thread)
            return work(*args, **kwargs)

        return noted

    monkeypatch.setattr(parsing, "parse", noting("parse", parsing.parse))
    monkeypatch.setattr(Shape, "check", noting("check", Shape.check))
    monkeypatch.setattr(schemas, "shape_of", noting("schema", schemas.shape_of))
    long = "x" * (reader.INLINE + 1)
    schema = {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(300)}}
    code = f"s = {schema!r}\nr = llm_query('q', schema=s)\nanswer.update(content=['{long}'], ready=True)"
    root = ScriptedLM([f"```repl\n{code}\n```"], name="root")
    sub = ScriptedLM([json.dumps({"k0": long})], name="sub")
    loop_thread = None

    async def main():
        nonlocal loop_thread
        loop_thread = threading.get_ident()
        return await rlm(root, sub).acompletion("text", output=list[str])

    result = asyncio.run(main())
    assert result.answer == [long]
    assert threads == {"parse": {False}, "check": {False}, "schema": {False}}


@pytest.mark.parametrize("seed", range(3))
def test_the_size_of_a_value_is_its_length_or_enough(seed):
    draw = random.Random(seed)
    value = [{f"k{i}": "x" * draw.randrange(9)} for i in range(draw.randrange(60))]
    size = reader.size_of(value)
    assert size >= sum(len(v) for d in value for v in d.values()) or size > reader.INLINE
    made, size = calls_made(reader.size_of, [["x"] * 1000] * 1000)
    assert size > reader.INLINE and made < 40_000


# -- the loop's own thread -------------------------------------------------------------------------
def test_nothing_long_is_decoded_or_encoded_on_the_loops_thread(monkeypatch, tmp_path):
    """A prompt, a reply, a tool's arguments and an answer of megabytes each: frames, requests,
    replies and the record."""
    on_loop, elsewhere = [], []

    def noting(module, name):
        work = getattr(module, name)

        def noted(value, *args, **kwargs):
            size = len(value) if isinstance(value, str | bytes) else reader.size_of(value, 1 << 20)
            (on_loop if threading.get_ident() == loop_thread else elsewhere).append((name, size))
            return work(value, *args, **kwargs)

        monkeypatch.setattr(module, name, noted)

    for module, name in (
        (json, "loads"),
        (json, "dumps"),
        (pieces, "loads"),
        (pieces, "dumps"),
        (process, "_decoded"),
        (writer, "encode"),
    ):
        noting(module, name)
    long = "answer\n" * 300_000
    code = """
    reply = llm_query(context * 2)
    listed = llm_query({'a': context})
    again = echo(text=context)
    answer.update(content=[reply, again, len(listed)], ready=True)
    """
    root = ScriptedLM([f"```repl\n{textwrap.dedent(code)}```"], name="root")
    loop_thread = None

    async def main():
        nonlocal loop_thread
        loop_thread = threading.get_ident()
        with FakeServer(long) as server:
            sub = OpenAILM("fake", base_url=server.url, api_key="k")
            options = {
                "tools": {"echo": lambda text: text},
                "log_dir": tmp_path,
                "environment": "local",
            }
            return await rlm(root, sub, **options).acompletion("é\n" * 1_000_000)

    result = asyncio.run(main())
    assert result.answer == [long, "é\n" * 1_000_000, len(long)]
    kinds = [event.type for event in result.events]
    assert (
        kinds[-1] == "run_end"
        and result.events[-1].answer == result.answer
        and kinds.index("cell_end") < len(kinds)
    )
    assert max(size for _, size in on_loop) <= 1 << 18, sorted(on_loop, key=lambda x: x[1])[-5:]
    assert sum(size > 1 << 18 for _, size in elsewhere) > 6


class Clock:
    """Each look at it is a millisecond later than the last."""

    now = 0.0

    def monotonic(self):
        self.now += 0.001
        return self.now


def test_a_flood_of_frames_leaves_the_loop_to_others(monkeypatch):
    monkeypatch.setattr(process, "time", Clock())

    async def main():
        worker = process.Process(SimpleNamespace(pid=1, returncode=0), 1 << 20, 1_000, False)
        worker._in, other = os.pipe()
        handled, most, rounds = 0, 0, 0

        def on_frame(message, size):
            nonlocal handled
            handled += 1

        worker.on_frame = on_frame
        worker.lines.feed(b"{}\n" * 5_000)
        worker._dispatch()
        before = 0
        while handled < 5_000:
            most, before, rounds = max(most, handled - before), handled, rounds + 1
            await asyncio.sleep(0)
        worker.release()
        os.close(other)
        assert most <= 1_000 * process.SLICE + 1 and rounds > 400

    asyncio.run(main())


def test_calls_that_never_wait_leave_the_loop_to_others(monkeypatch):
    monkeypatch.setattr(reader, "time", Clock())
    handled = 0

    async def refused(i):
        nonlocal handled
        handled += 1
        return i

    async def main():
        width, most, before = 32, 0, 0
        task = asyncio.create_task(
            in_order(refused, [(i,) for i in range(5_000)], width, reader.Pace())
        )
        while not task.done():
            most, before = max(most, handled - before), handled
            await asyncio.sleep(0)
        assert await task == list(range(5_000))
        assert most <= 1_000 * reader.SLICE_SECONDS + width + 1

    asyncio.run(main())


def test_a_frame_that_takes_long_to_read_is_not_overtaken():
    """Neither by a later frame nor by the end of its worker."""

    async def main():
        worker = process.Process(
            SimpleNamespace(pid=1, returncode=0, wait=lambda: 0), 1 << 24, 1_000, False
        )
        worker._in, other = os.pipe()
        said = []
        worker.on_frame = lambda message, size: said.append(message and message["n"])
        worker.on_end = lambda: said.append("end")
        worker._pidfd = os.dup(worker._in)
        os.set_blocking(worker._in, False)
        frames = [
            {"n": 1},
            {"n": 2, "long": "\n" * (1 << 20)},
            {"n": 3},
            {"n": 4, "long": [1] * 50_000},
            {"n": 5},
        ]
        worker.lines.feed(b"".join(json.dumps(f).encode() + b"\n" for f in frames) + b"no frame\n")
        worker._dispatch()
        os.close(other)
        worker._exited()
        assert said == [1]
        await worker.ended
        worker.release()
        assert said == [1, 2, 3, 4, 5, None, "end"]

    asyncio.run(main())


# -- what an endpoint may send ---------------------------------------------------------------------
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("limit", "said"), [("LARGEST_TEXT", "Mi characters"), ("LARGEST_BODY", "MiB")]
)
def test_a_reply_beyond_all_bounds_is_an_error_that_says_so(stream, limit, said, monkeypatch):
    monkeypatch.setattr(http, limit, 10_000)
    with FakeServer(Say("a b " * 5_000, pieces=1)) as server:
        lm = OpenAILM("fake", base_url=server.url, api_key="k", stream=stream)
        with pytest.raises(LMError, match=said) as raised:
            asyncio.run(lm.complete([Message(role="user", content="x")]))
    assert raised.value.kind == "protocol"
