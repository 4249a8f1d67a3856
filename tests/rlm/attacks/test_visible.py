"""What a cell sees of the machine is what the documentation says, and no more; file locks are not
held by anybody."""

from __future__ import annotations

import fcntl
import os
import re
import struct

import pytest

from rlm.attacks.arena import REPOSITORY, X86, Arena, attack, names, probe
from rlm_runtime.context import Context
from rlm_runtime.repl.worker import filter as seccomp

DOCS = (REPOSITORY / "docs" / "rlm.md").read_text(encoding="utf-8")
MODULES = "import fcntl, os, shutil, socket, sys, time\n"
FILE = "file = open('mine', 'w')\n"


def table(header: str) -> list[tuple[str, str]]:
    """(words, Python expressions) of the rows of a table in the documentation."""
    rows = DOCS.split(header, 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [re.fullmatch(r"\| (.+?) \| `(.+)` \|", row).groups() for row in rows]


def calls(expressions: str) -> list[str]:
    """The parts of "a(1), b(2)"."""
    return [part + ")" for part in re.split(r"\), (?=\w+\.|open\()", expressions.removesuffix(")"))]


SEEN, HIDDEN = table("| a cell sees |"), table("| hidden |")
VISIBLE = [
    attack(f"sees {what}", f"{MODULES}print('SEEN', repr(({code})))", ends="ok", said="SEEN")
    for what, code in SEEN
]
REFUSED = [
    probe(
        f"{what}: {code}",
        f"{MODULES}{FILE}return repr({code})",
        bites=code != "open('/proc/1/cmdline')",
    )
    for what, listed in HIDDEN
    for code in calls(listed)
]
# Beyond the documentation's examples: the same by other calls, for x86-64.
NUMBERS = {
    "name of the machine": "sc(63, ctypes.create_string_buffer(400))",
    "link": "sc(89, b'/proc/self/exe', ctypes.create_string_buffer(99), 99)",
    "link by folder": "sc(267, -100, b'/proc/self/exe', ctypes.create_string_buffer(99), 99)",
    "room of a disk": "sc(137, b'/', ctypes.create_string_buffer(200))",
    "state of the machine": "sc(99, ctypes.create_string_buffer(200))",
    "thread list of a process": "sc(274, 1, ctypes.create_string_buffer(8), ctypes.create_string_buffer(8))",
    "scheduling of a process": "sc(145, 1)",
    "scheduling parameters of a process": "sc(143, 1, ctypes.create_string_buffer(8))",
    "resolution of a process's clock": "sc(229, ~1 * 8 + 2, ctypes.create_string_buffer(16))",
    "pages in memory": "sc(27, 0, 0, ctypes.create_string_buffer(8))",
    "lock of an open file": "sc(72, os.open('o', 66), 37, struct.pack('hhqqi', 1, 0, 0, 0, 0))",
}
BY_NUMBER = (
    [probe(f"{name} by number", f"return {code}", bites=False) for name, code in NUMBERS.items()]
    if X86
    else []
)
LOCKS = """
import fcntl
with open('locked', 'w+b') as file:
    file.truncate(1 << 20)
    for i in range(300_000):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 2 * i)
    print(struct.unpack('hhqqi', fcntl.fcntl(file, 5, struct.pack('hhqqi', 1, 0, 0, 0, 0)))[0] == 2)
"""
DATABASE = """
import sqlite3
with sqlite3.connect('a.db') as base:
    base.execute('create table t (a)'), base.execute('insert into t values (7)')
print(sqlite3.connect('a.db').execute('select a from t').fetchone()[0])
"""
WORKS = [
    attack("half a million locks", LOCKS, ends="ok", said="True"),
    attack("a database", DATABASE, ends="ok", said="7"),
    attack(
        "real paths",
        "import pathlib\nprint(os.path.realpath('a/../b') == str(pathlib.Path('b').resolve()))",
        ends="ok",
        said="True",
    ),
    attack(
        "real path of a link",
        "print(os.path.realpath('/proc/self/exe'))",
        ends="ok",
        said="/proc/self/exe",
    ),
    attack(
        "name of the system",
        "import platform\nprint(platform.system(), platform.node())",
        ends="ok",
        said="Linux rlm",
    ),
]
ALL = VISIBLE + REFUSED + BY_NUMBER + WORKS


@pytest.mark.parametrize("what", VISIBLE, ids=names(VISIBLE))
def test_what_is_said_to_be_seen_is_seen(arena, what):
    arena.play(what)


@pytest.mark.parametrize("what", REFUSED + BY_NUMBER, ids=names(REFUSED + BY_NUMBER))
def test_what_is_said_to_be_hidden_is_refused(arena, what):
    arena.play(what)


@pytest.mark.parametrize("what", REFUSED, ids=names(REFUSED))
def test_it_would_be_seen_without_a_sandbox(open_arena, what):
    if what.bites:
        assert "BREACH" in open_arena.run(what.cells[0]).stdout


@pytest.mark.parametrize("what", WORKS, ids=names(WORKS))
def test_what_programs_need_of_it_still_works(arena, what):
    arena.play(what)


def test_the_tables_are_read_whole():
    assert len(SEEN) >= 8 and len(HIDDEN) >= 9 and len(REFUSED) > len(HIDDEN)


def test_the_count_of_open_calls_is_the_programs(arena):
    counted = seccomp.open_calls("x86_64", seccomp.rules(1, (5,), True, True))
    (said,) = re.findall(r"\((\d+) calls stay open on x86-64", DOCS)
    assert int(said) == len(counted) == len(set(counted))
    if X86:
        assert f"{said} calls allowed" in arena.report.layers["seccomp"]


@pytest.mark.parametrize(
    "lock",
    [
        "fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        "fcntl.lockf(f, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        "fcntl.fcntl(f, 37, struct.pack('hhqqi', 0, 0, 0, 0, 0))",
    ],
)
def test_a_lock_on_the_users_file_is_held_by_nobody(lock, tmp_path):
    """Neither of a file, nor of one in a folder: the host locks it as it likes."""
    file = tmp_path / "data.txt"
    file.write_text("text")
    with Arena(context=tmp_path) as arena:
        cell = f"import fcntl, struct\nf = open({str(file)!r})\ntry:\n    {lock}\nexcept OSError as e:\n    print(e.strerror)"
        assert arena.run(cell).status == "ok"
        with open(file, "r+") as mine:
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.lockf(mine, fcntl.LOCK_UN)
            fcntl.fcntl(mine, 37, struct.pack("hhqqi", 1, 0, 0, 0, 0))


def test_a_folder_with_links_shows_those_that_stay_inside(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "stays").symlink_to("a.txt")
    (tmp_path / "in" / "leaves").symlink_to("/etc/passwd")
    (tmp_path / "in" / "nothing").symlink_to("gone")
    with Arena(context=tmp_path / "in") as arena:
        assert (
            arena.run("print(sorted(context), context['stays'])").stdout == "['a.txt', 'stays'] a\n"
        )
        assert sorted(name for name, *_ in Context.of(tmp_path / "in").listing) == [
            "a.txt",
            "stays",
        ]


def test_waiting_signals_are_bounded(arena):
    cell = "import resource\nprint(resource.getrlimit(resource.RLIMIT_SIGPENDING)[0] <= 256)"
    assert arena.run(cell).stdout == "True\n" and os.name == "posix"
