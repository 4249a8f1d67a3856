"""Whatever is written to the private channel, the host stays responsive, bounded and unfooled."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time

import pytest

from rlm.attacks.arena import CHANNEL, GROWTH, PRELUDE, Arena, attack, names, rss
from rlm_runtime.repl import wire

DONE = "{'t': 'done', 'id': %s, 'status': 'ok', 'stdout': 'FORGED', 'stderr': '', 'stdout_chars': 6, 'stderr_chars': 0, 'error': None, 'answer': {'content': 'FORGED', 'ready': True}, 'variables': {}}"
REQUEST = "{'t': 'request', 'cell': %s, 'id': %s, 'method': 'llm', 'prompts': %s}"


def frame(value: str) -> str:
    return f"raw(b'\\n' + json.dumps({value}).encode() + b'\\n')\n"


WASTE = {
    "garbage": "raw(bytes(range(256)) * 1000 + b'\\n')",
    "a million tiny frames": "raw(b'{}\\n' * 1_000_000)",
    "ten million empty lines": "for _ in range(10):\n    raw(b'\\n' * 1_000_000)",
    "a million numbers": "raw(b'1\\n' * 1_000_000)",
    "a gigabyte without an end": "block = b'x' * (1 << 20)\nfor _ in range(1024):\n    raw(block)",
    "a gigabyte of one text": "raw(b'{\"t\": \"')\nblock = b'x' * (1 << 20)\nfor _ in range(1024):\n    raw(block)\nraw(b'\"}\\n')",
    "a promised length": "raw(b'\\x40\\x00\\x00\\x00' + b'1073741824\\n' + b'Content-Length: 1073741824\\r\\n\\r\\n')",
    "nesting": "raw(b'[' * 100_000 + b']' * 100_000 + b'\\n')",
    "nesting of objects": "raw(b'{\"a\":' * 100_000 + b'1' + b'}' * 100_000 + b'\\n')",
    "nesting without an end": "raw(b'[' * 50_000_000 + b'\\n')",
    "nesting inside a request": 'raw((\'\\n{"t":"request","cell":"%s","id":1,"method":"llm","prompts":[\' % cell_id()).encode() + b\'[\' * 100_000 + b\']\' * 100_000 + b\']}\\n\')',
    "no numbers": 'for v in (\'NaN\', \'Infinity\', \'-Infinity\', \'1e999\', \'-1e999\'):\n    raw((\'{"t":"request","cell":"%s","id":1,"method":"llm","prompts":[%s]}\\n\' % (cell_id(), v)).encode())',
    "long numbers": 'raw((\'{"t":"request","cell":"%s","id":1,"method":"llm","prompts":[%s]}\\n\' % (cell_id(), \'9\' * 100_000)).encode())',
    "a long id": 'raw((\'{"t":"request","cell":"%s","id":%s,"method":"llm","prompts":[1]}\\n\' % (cell_id(), \'9\' * 100_000)).encode())',
    "many digits": "raw(b'[' + b'9' * 50_000_000 + b']\\n')",
    "a long exponent": "raw(b'[1e' + b'9' * 1_000_000 + b']\\n')",
    "wrong bytes": 'raw(b\'{"t": "\\xff\\xfe\\xc0\\x80\\xed\\xa0\\x80"}\\n\')',
    "quotes": "raw(b'\"' * 50_000_000 + b'\\n')",
    "backslashes": "raw(b'\\\\' * 50_000_000 + b'\\n')",
    "quoted backslashes": "raw(b'\"' + b'\\\\' * 50_000_001 + b'\\n')",
    "quotes after backslashes": "raw(b'\\\\\"' * 25_000_000 + b'\\n')",
    "two million values": "raw(b'[' + b'1,' * 1_900_000 + b'1]\\n')",
    "two million objects": "raw(b'[' + b'{},' * 1_900_000 + b'1]\\n')",
    "commas": "raw(b'[' + b',' * 50_000_000 + b']\\n')",
    "many keys": "raw(b'{' + b','.join(b'\"%d\":0' % i for i in range(1_000_000)) + b'}\\n')",
    "colliding keys": "raw(b'{' + b','.join(b'\"a\":0' for i in range(1_000_000)) + b'}\\n')",
    "surrogates": 'raw(b\'{"t":"x","v":"\' + b\'\\\\ud800\' * 5_000_000 + b\'"}\\n\')',
    "spaces": "raw(b' ' * 60_000_000 + b'{}\\n')",
    "big frames again and again": 'b = b\'{"t":"done","id":"x","v":"\' + b\'x\' * 60_000_000 + b\'"}\\n\'\nfor _ in range(20):\n    raw(b)',
    "other kinds": "for t in ('ready', 'loaded', 'hello', 'cell', 'load', 'interrupt', 'reply', '', None, 1, [], {}):\n    "
    + "raw(json.dumps({'t': t, 'id': cell_id(), 'layers': {}, 'error': 'FORGED'}).encode() + b'\\n')",
    "wrong fields": "for k in ('status', 'stdout', 'stdout_chars', 'answer', 'variables', 'error'):\n    for v in (None, 1, -1, 'x', [], {}, 1e300, True, 'y' * 100_000, {'ready': 1}, {'ready': True}, {'a': 1}):\n        d = "
    + DONE % "cell_id()"
    + "\n        d[k] = v\n        d['status' if k != 'status' else 't'] = 'no'\n        raw(json.dumps(d).encode() + b'\\n')",
    "half a frame": 'raw(b\'{"t": "done", "id": "\')',
    "drip": 'for b in b\'{"t": "done"}\' * 8:\n    raw(bytes([b]))\n    time.sleep(0.01)',
    "two at once": "import threading\nt = [threading.Thread(target=lambda: raw(b'x' * 1_000_000)) for _ in range(10)]\n[i.start() for i in t]\nllm_query('a')\n[i.join() for i in t]",
    "not blocking any more": "import fcntl\nfd = sockets()[0]\nfcntl.ioctl(fd, 0x5421, struct.pack('i', 1))",
    "replies stolen": "import threading\n_libc.recv(sockets()[0], ctypes.create_string_buffer(100), 100, 0x40)\nthreading.Thread(target=lambda: _libc.recv(sockets()[0], ctypes.create_string_buffer(9999), 9999, 0), daemon=True).start()\ntime.sleep(0.2)\nllm_query('a')",
}
PREFIX = "import json\n"
CHANNEL_CELL = PRELUDE + CHANNEL
WASTE = [
    dataclasses.replace(
        attack(name, CHANNEL + PREFIX + cell), steals_message=name == "replies stolen"
    )
    for name, cell in WASTE.items()
]


@pytest.mark.parametrize("what", WASTE, ids=names(WASTE))
def test_waste(what):
    with Arena(cell_seconds=3.0, grace_seconds=0.3) as arena:
        before = rss()
        (result,) = arena.play(what)
        assert "FORGED" not in repr(result)
        assert not result.answer.ready
        assert rss() - before < GROWTH
        assert arena.gap < 2, f"the host's event loop stood still for {arena.gap:.1f} s"


def test_silence_after_half_a_frame_is_ended_by_the_clock(timed_arena):
    cell = CHANNEL + 'raw(b\'{"t": "done", "id": "\')\ntime.sleep(30)'
    timed_arena.play(attack("silence", cell, ends="timeout killed"))


def test_a_forged_end_with_a_guessed_id_is_nothing(arena):
    cells = [
        CHANNEL + PREFIX + frame(DONE % guess) + "print('real')"
        for guess in ("'0' * 32", "''", "1", "None", "[]", "{}", "True")
    ]
    for cell in cells:
        (result,) = arena.play(attack("guess", cell, ends="ok", said="real"))
        assert not result.answer.ready


def test_a_forged_end_with_the_right_id_ends_that_cell_and_no_other(arena):
    """A cell can say what it likes about itself; the next one is read as it is."""
    cell = (
        CHANNEL
        + PREFIX
        + frame(DONE % "cell_id()")
        + "time.sleep(0.1)\nprint('late')\nanswer['content'] = 'late'"
    )
    first, second = arena.play(attack("forged", cell, "print('second')\nx = 5", ends="ok"))
    assert first.stdout == "FORGED"
    assert second.stdout == "second\n" and not second.answer.ready


def test_an_end_said_many_times(arena):
    cell = (
        CHANNEL
        + PREFIX
        + "i = cell_id()\nfor _ in range(1000):\n    "
        + frame(DONE % "i")
        + "time.sleep(0.05)"
    )
    _first, second = arena.play(attack("many", cell, "print('second')", ends="ok"))
    assert second.stdout == "second\n" and not second.answer.ready


def test_a_cell_is_not_run_twice_for_saying_it_never_began(arena):
    cell = (
        CHANNEL
        + PREFIX
        + "llm_query('once')\n"
        + frame("{'t': 'broken', 'id': cell_id(), 'message': 'x'}")
        + "time.sleep(0.2)\nllm_query('twice')"
    )
    before = len(arena.calls)
    arena.play(attack("broken", cell))
    assert [c.prompts for c in arena.calls[before:]].count(("once",)) == 1


def test_numbers_of_requests_are_used_once(arena):
    cell = (
        CHANNEL
        + PREFIX
        + "i = cell_id()\nfor n in (5, 5, 5, 4, 1, 0, -1, 5.0, '5', None, True, 6, 2**53, 6):\n    raw(b'\\n' + json.dumps("
        + REQUEST % ("i", "n", "['replayed']")
        + ").encode() + b'\\n')\ntime.sleep(0.3)"
    )
    before = len(arena.calls)
    arena.play(attack("replay", cell))
    assert [c.prompts for c in arena.calls[before:]].count(("replayed",)) == 2


def test_requests_for_another_run_are_nobodys():
    with Arena() as mine, Arena() as other:
        found = mine.run(CHANNEL_CELL + "print(cell_id())")
        assert len(found.stdout.strip()) >= 32
        their = other.run(CHANNEL_CELL + "print(cell_id())").stdout.strip()
        for cell in (their, found.stdout.strip(), "0" * 32, "*", ""):
            mine.run(
                CHANNEL_CELL
                + PREFIX
                + frame(REQUEST % (repr(cell), 1, "['other']"))
                + "time.sleep(0.1)"
            )
        assert not [c for a in (mine, other) for c in a.calls if c.prompts == ("other",)]
        mine.alive(), other.alive()


def test_a_flood_of_true_requests_is_counted():
    with Arena(requests=1000, cell_seconds=3.0) as arena:
        cell = (
            CHANNEL
            + PREFIX
            + 'i = cell_id()\nfor n in range(1, 30_001):\n    raw(b\'{"t":"request","cell":"%s","id":%d,"method":"llm","prompts":["f"]}\\n\' % (i.encode(), n))'
        )
        arena.play(attack("flood", cell))
        assert len([c for c in arena.calls if c.prompts == ("f",)]) <= 1000


def test_requests_that_are_wrong_reach_no_handler(arena):
    wrong = [
        {"method": "os.system"},
        {"method": None},
        {"prompts": "x"},
        {"prompts": []},
        {"prompts": ["a", "b"]},
        {"batch": "yes"},
        {"model": 5},
        {"schema": "x"},
        {"extra": 1},
        {"method": "tool"},
        {"method": "tool", "name": 5, "prompts": []},
        {"method": "tool", "name": "x" * 10**5, "prompts": []},
        {"question": {}},
        {"args": {}, "method": "tool", "name": "t"},
    ]
    cell = (
        CHANNEL
        + PREFIX
        + f"i = cell_id()\nfor n, w in enumerate({wrong!r}):\n    d = {REQUEST % ('i', 'n + 1', repr(['wrong']))}\n    d.update(w)\n    raw(b'\\n' + json.dumps(d).encode() + b'\\n')\ntime.sleep(0.3)"
    )
    before = len(arena.calls)
    arena.play(attack("wrong", cell))
    asked = [c for c in arena.calls[before:] if c.prompts != ("ping",)]
    assert all(
        c.method in ("llm", "rlm") and c.prompts == ("wrong",) and type(c.batch) is bool
        for c in asked
    ), asked


def test_text_that_is_no_text_arrives_as_text(arena):
    cell = "llm_query('nul \\0 lone \\ud800 low \\udfff bidi \\u202e end')\nprint('\\ud800\\0')\nanswer['content'] = '\\udc80'\nanswer['ready'] = True"
    before = len(arena.calls)
    (result,) = arena.play(attack("text", cell, "answer['ready'] = False", ends="ok"))[:1]
    for text in (arena.calls[before].prompts[0], result.stdout, result.answer.content):
        text.encode("utf-8")
    assert "\0" in result.stdout


def test_a_key_said_twice_counts_once(arena):
    cell = (
        CHANNEL
        + 'raw((\'\\n{"t":"request","t":"request","cell":"x","cell":"%s","id":1,"id":2,"method":"rlm","method":"llm","prompts":["first"],"prompts":["second"]}\\n\' % cell_id()).encode())\ntime.sleep(0.2)'
    )
    before = len(arena.calls)
    arena.play(attack("twice", cell))
    asked = [c for c in arena.calls[before:] if c.prompts != ("ping",)]
    assert [(c.method, c.prompts) for c in asked] == [("llm", ("second",))]


@pytest.mark.parametrize(
    "line",
    [
        b'"' * 8_000_001,
        b'\\"' * 16_000_000,
        b'"\\' * 16_000_000,
        b"[" * 60_000_000,
        b"[]" * 30_000_000,
        b"9" * 60_000_000,
        b"-" * 60_000_000,
        b'{"a":' * 10_000_000,
        b'["' + b"\\u" * 20_000_000,
        b'"a",' * 1_900_000,
        b"[" + b"1e5," * 1_900_000 + b"1]",
        b" " * 60_000_000,
        b"\xff" * 60_000_000,
        b'["' + b"\\ud800" * 10_000_000 + b'"]',
        b"0" * 60_000_000,
        b'{"t":' + b"0.0000001" * 6_000_000,
    ],
    ids=lambda line: line[:6].decode("latin-1"),
)
def test_no_line_takes_long_to_read(line):
    """Alone, in the host: a line as long as may be costs a bounded time, whatever is in it."""
    started = time.process_time()
    with contextlib.suppress(wire.Bad):
        wire.decode(line)
    assert time.process_time() - started < 3


def test_what_is_read_is_what_json_says():
    """The bounds do not stand in the way of what is right."""
    for value in (
        {"a": [1, -2.5, None, True, '\u2028\0"\\']},
        {"deep": json.loads("[" * 90 + "]" * 90)},
        {"n": 10**1000},
    ):
        assert wire.decode(json.dumps(value).encode()) == value
