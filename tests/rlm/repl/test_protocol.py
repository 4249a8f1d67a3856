"""Frames nobody asked for: forged, repeated, late, huge, deep, in pieces. They cost their sender
and nobody else."""

import asyncio
import json
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm.repl.harness import one, play, printed
from rlm_runtime.repl import wire
from rlm_runtime.repl.base import Outcome
from rlm_runtime.repl.wire import Bad, Lines

# What a cell that has found the runtime's own objects can do: send any bytes, with a true cell id.
FORGE = """
import gc
channel = next(o for o in gc.get_objects() if type(o).__name__ == 'Channel')
calls = next(o for o in gc.get_objects() if type(o).__name__ == 'Calls')
send = channel._send_all
cell = calls._cell
"""


def forged(code: str, after="llm_query('x')", **options):
    return play(FORGE + code, after, **options)


@pytest.mark.parametrize(
    "code",
    [
        "send(b'garbage')",
        "send(b'\\n' + b'{' * 100_000 + b'\\n')",
        "send(b'\\n' + b'[' * 10_000_000 + b'\\n')",
        'send(b\'\\n{"t":"done","id":"0"}\\n\' * 50)',
        'send(b\'{"t":"done"\')',
        "send(bytes(range(256)) * 100)",
        'send(b\'\\n{"t":"done","id":"%s","status":"ok"}\\n\' % cell.encode())',
        'send(b\'\\n{"t":"done","id":"%s","status":"ok","answer":{"ready":1}}\\n\' % cell.encode())',
        'send(b\'\\n{"t":"request","cell":"%s","id":-5,"method":"llm","prompts":[1]}\\n\' % cell.encode())',
        'send(b\'\\n{"t":"request","cell":"%s","id":5,"method":"sh","prompts":[1]}\\n\' % cell.encode())',
        'send(b\'\\n{"t":"request","cell":"%s","id":5,"method":"llm"}\\n\' % cell.encode())',
        'send(b\'\\n{"t":"request","cell":"%s","id":5,"method":"llm","prompts":[1,2]}\\n\' % cell.encode())',
        'send(b\'\\n{"t":"request","cell":"%s","id":5,"method":"llm","prompts":[1],"x":1}\\n\' % cell.encode())',
        'send(b\'\\n{"t":"request","cell":"%s","id":5,"method":"tool","name":"open"}\\n\' % cell.encode())',
        'send(b\'\\n{"t":"ready","layers":{}}\\n{"t":"loaded","id":"x"}\\n{"t":"broken"}\\n{"t":[]}\\n[]\\n1\\n\')',
        "send(b'\\n{\"t\":NaN}\\n{\"t\":1e999}\\n{\"t\":' + b'9' * 5000 + b'}\\n')",
        'send(b\'\\n{"t":"\\xff\\xfe"}\\n\')',
    ],
)
def test_what_is_no_message_is_passed_over(code):
    forger, after = forged(code)
    assert forger.status == "ok" and printed(after) == "'x'\n"


def test_a_request_is_served_once_however_often_it_is_repeated():
    asked = []

    async def handler(request):
        asked.append(request.prompts[0])
        return [Outcome(value=len(asked))]

    code = """
    first = llm_query('mine')
    for number in (1, 1, 1, 0, 10**15, 2**60):
        send(b'\\n{"id":%d,"t":"request","cell":"%s","method":"llm","prompts":["again"]}\\n' % (number, cell.encode()))
    import time; time.sleep(0.2)
    """
    play(FORGE + textwrap.dedent(code), handler=handler)
    assert asked == ["mine", "again"]  # the one with a number that is new: the same as a call


def test_an_old_cell_cannot_be_answered_for():
    code = """
    answer['content'] = 'mine'
    send(b'\\n{"t":"done","id":"%s","status":"ok","stdout":"old","stdout_chars":3,"stderr":"","stderr_chars":0,'
         b'"answer":{"content":"forged","ready":true},"variables":{}}\\n' % b'0' * 3)
    """
    first, second = play(
        FORGE + textwrap.dedent(code) + "\nold = cell",
        textwrap.dedent("""
    data = ('\\n{"t":"done","id":"%s","status":"ok","stdout":"","stdout_chars":0,"stderr":"","stderr_chars":0,'
            '"answer":{"content":"forged","ready":true},"variables":{}}\\n' % old).encode()
    for _ in range(10): send(data)
    print('mine')
    """),
    )
    assert first.answer.content == "mine" and not first.answer.ready
    assert (
        printed(second) == "mine\n" and second.answer.content == "mine" and not second.answer.ready
    )


def test_a_cell_that_says_it_is_done_before_it_is_only_cheats_itself():
    code = """
    send(('\\n{"t":"done","id":"%s","status":"ok","stdout":"","stdout_chars":0,"stderr":"","stderr_chars":0,"error":null,'
          '"answer":{"content":"early","ready":true},"variables":{}}\\n' % cell).encode())
    while True:
        try:
            while True: pass
        except BaseException: pass
    """
    early, after, alive = play(
        FORGE + textwrap.dedent(code),
        "1 + 1",
        "context",
        limits={"cell_seconds": 1, "grace_seconds": 0.5},
    )
    assert early.answer.content == "early" and after.status == "killed" and after.lost
    assert printed(alive) == "'some text'\n"


def test_a_flood_of_nonsense_ends_the_worker_and_not_the_host():
    forger, after = forged(
        "while True: send(b'\\nnonsense\\n')", after="context", limits={"cell_seconds": 20}
    )
    assert (
        forger.status == "killed"
        and "channel" in forger.error.message
        and printed(after) == "'some text'\n"
    )


def test_a_flood_without_end_of_line_does_not_grow_the_host():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = "for i in range(400): send(b'x' * 1_000_000)\nsend(b'\\n')"
    forger, after = forged(code, limits={"frame": 4 << 20, "cell_seconds": 30})
    assert forger.status == "ok" and printed(after) == "'x'\n"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000


def test_a_flood_of_requests_waits_its_turn():
    most = under_way = 0

    async def handler(request):
        nonlocal most, under_way
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001)
        under_way -= 1
        return [Outcome(value="y" * 1000)]

    code = """
    for number in range(1, 5001):
        send(('\\n{"id":%d,"t":"request","cell":"%s","method":"llm","prompts":["%s"]}\\n' % (number, cell, 'x' * 1000)).encode())
    """
    forger, after = forged(textwrap.dedent(code), handler=handler, limits={"cell_seconds": 30})
    assert forger.status == "ok" and most <= 256 and after.status == "ok"


def test_more_than_one_frame_of_replies_that_nobody_reads_stops_the_requests():
    asked = 0

    async def handler(request):
        nonlocal asked
        asked += 1
        return [Outcome(value="y" * 1_000_000)]

    code = """
    import _thread
    channel._buffer = None  # the reading thread dies of it
    for number in range(1, 2001):
        send(('\\n{"id":%d,"t":"request","cell":"%s","method":"llm","prompts":["x"]}\\n' % (number, cell)).encode())
    while True: pass
    """
    forger, after = forged(
        textwrap.dedent(code),
        after="context",
        handler=handler,
        limits={"frame": 8 << 20, "cell_seconds": 1, "grace_seconds": 0.3},
    )
    assert forger.status == "killed" and asked < 300 and printed(after) == "'some text'\n"


# -- the parser by itself


@given(st.lists(st.binary(max_size=40), max_size=20), st.integers(1, 50))
def test_lines_are_the_same_however_they_arrive(pieces, limit):
    data = b"".join(pieces)
    whole, parts = Lines(limit), Lines(limit)
    whole.feed(data)
    for piece in pieces:
        parts.feed(piece)
    expected = [line for line in data.split(b"\n")[:-1] if line and len(line) <= limit]
    assert [*iter(whole.next, None)] == expected
    assert [*iter(parts.next, None)] == expected
    assert (
        whole.dropped == parts.dropped == sum(len(line) > limit for line in data.split(b"\n")[:-1])
    )


@given(st.lists(st.binary(max_size=40), max_size=20), st.integers(1, 50))
def test_lines_read_as_they_come_hold_no_more_than_the_limit(pieces, limit):
    lines, got = Lines(limit), []
    for piece in pieces:
        lines.feed(piece)
        got += iter(lines.next, None)
        assert lines.held <= limit
    assert got == [
        line for line in b"".join(pieces).split(b"\n")[:-1] if line and len(line) <= limit
    ]


@settings(max_examples=40)
@given(
    st.dictionaries(
        st.text(),
        st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists),
        max_size=5,
    )
)
def test_what_is_json_is_read_as_json(message):
    assert wire.decode(json.dumps(message).encode()) == message
    assert wire.decode(json.dumps(message, ensure_ascii=False).encode()) == message


@given(st.binary(max_size=200))
def test_whatever_comes_is_a_message_or_bad(data):
    try:
        message = wire.decode(data)
    except Bad:
        return
    assert isinstance(message, dict)
    json.dumps(message, ensure_ascii=False).encode()


@given(st.text(alphabet='{}[]",:\\u d89ef0123tr.eE-+xl'))
def test_whatever_looks_like_json_is_a_message_or_bad(text):
    test_whatever_comes_is_a_message_or_bad.hypothesis.inner_test(b'{"a":' + text.encode() + b"}")


@pytest.mark.parametrize(
    "line",
    [
        b'{"a":' + b"[" * 101 + b"]" * 101 + b"}",
        b'{"a":' * 101 + b"1" + b"}" * 101,
        b'{"a":[' + b"0," * 2_100_000 + b"0]}",
        b'{"a":[' + b'"",' * 9_000_000 + b"1]}",
        b'{"a":' + b"1" * 1_200 + b"}",
        b'{"a":0.' + b"1" * 1_200 + b"}",
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":1e400}',
        b'{"a":"\xff"}',
        b"null",
        b'"x"',
        b"",
        b"{",
        b'{"a":1}{',
    ],
)
def test_bounds_hold_before_the_parser(line):
    with pytest.raises(Bad):
        wire.decode(line)


def test_brackets_and_digits_inside_a_string_are_text():
    text = "[" * 10_000 + '{"' * 1000 + "9" * 10_000 + "\\\"'" + "," * 10_000
    assert wire.decode(json.dumps({"a": text}).encode()) == {"a": text}


def test_lone_surrogates_become_text_that_can_be_written():
    message = wire.decode(b'{"\\ud800k":["a\\udfffb", {"c": "\\ud83d\\ude00 \\uDBFF"}]}')
    assert message == {"?k": ["a?b", {"c": "\U0001f600 ?"}]}


@pytest.mark.parametrize(
    "data", [b'{"a":"' + b'\\"' * 4_000_000, b'"' * 2_000_000, b'{"a":' + b"[]," * 3_000_000 + b"}"]
)
def test_reading_is_linear_in_what_comes(data):
    with pytest.raises(Bad):
        wire.decode(data)  # quadratic, it would take longer than anybody waits


def test_results_beyond_all_bounds_are_cut():
    code = """
    import json
    send(b'\\n' + json.dumps({'t': 'done', 'id': cell, 'status': 'error', 'stdout': 'o' * 10**6, 'stdout_chars': 10**6,
        'stderr': 'e' * 10**6, 'stderr_chars': 1, 'error': {'type': 't' * 10**6, 'message': 'm' * 10**6, 'traceback': 'b' * 10**6},
        'answer': {'content': None, 'ready': False}, 'variables': {'k' * 10**5: 'v' * 10**5}}).encode() + b'\\n')
    """
    result = one(FORGE + textwrap.dedent(code))
    assert len(result.model_dump_json()) < 100_000 and result.stdout_chars == 1_000_000
