"""Cells that do not want to end, do."""

from __future__ import annotations

import time

import pytest

from rlm.attacks.arena import attack, names

LOOPS = {
    "pass": "while True:\n    pass",
    "everything caught": "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
    "caught in turns": "def f():\n    try:\n        while True:\n            pass\n    finally:\n        f()\nf()",
    "interrupt ignored": "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True:\n    pass",
    "interrupt replaced": "import signal\nsignal.signal(signal.SIGINT, lambda *a: None)\nwhile True:\n    time.sleep(0.01)",
    "signals blocked": "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True:\n    pass",
    "signals blocked by libc": "m = (ctypes.c_ulong * 16)(*[2**64 - 1] * 16)\n_libc.sigprocmask(0, m, None)\nwhile True:\n    pass",
    "power of powers": "9 ** 9 ** 9",
    "sum": "sum(range(10**12))",
    "a pattern": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "an endless iterator": "import collections, itertools\ncollections.deque(itertools.count(), maxlen=0)",
    "search in an endless iterator": "import itertools\n-1 in itertools.count()",
    "key derivation": "import hashlib\nhashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)",
    "sleep": "time.sleep(10**6)",
    "a lock": "import threading\nthreading.Lock().acquire()\nl = threading.Lock()\nl.acquire()\nl.acquire()",
    "an empty pipe": "os.read(os.pipe()[0], 1)",
    "nothing to select": "import select\nselect.select([], [], [])",
    "libc pause": "while True:\n    _libc.pause()",
    "libc sleep with the lock held": "ctypes.PyDLL(None).sleep(1000)",
    "digits": "import sys\nsys.set_int_max_str_digits(0)\nx = int('9' * 3_000_000)\nwhile True:\n    str(x)",
    "sorting": "class K:\n    def __lt__(self, other):\n        while True:\n            pass\nsorted([K(), K()])",
    "endings": "class D:\n    def __del__(self):\n        D()\nD()\nwhile True:\n    pass",
    "an ending that does not end": "class D:\n    def __del__(self):\n        while True:\n            try:\n                while True:\n                    pass\n            except BaseException:\n                pass\nD()",
    "collection": "import gc\ndef cb(*a):\n    while True:\n        pass\ngc.callbacks.append(cb)\ngc.collect()",
    "tracing": "import sys\ndef t(*a):\n    while True:\n        try:\n            time.sleep(1)\n        except BaseException:\n            pass\nsys.settrace(t)\n(lambda: 1)()",
    "threads that spin": "import threading\ndef go():\n    while True:\n        pass\nt = [threading.Thread(target=go) for _ in range(20)]\n[i.start() for i in t]\nt[0].join()",
    "switching forbidden": "import sys, threading\nsys.setswitchinterval(10**6)\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\ntime.sleep(100)",
    "asyncio": "import asyncio\nasync def f():\n    while True:\n        try:\n            await asyncio.sleep(1)\n        except BaseException:\n            pass\nasyncio.run(f())",
    "generator": "def g():\n    while True:\n        try:\n            yield\n        finally:\n            continue\nfor _ in g():\n    pass",
    "an endless error": "class E(Exception):\n    def __str__(self):\n        while True:\n            try:\n                while True:\n                    pass\n            except BaseException:\n                pass\nraise E",
    "an endless value": "class V:\n    def __repr__(self):\n        while True:\n            pass\nV()",
    "an endless answer": "class A(dict):\n    def items(self):\n        while True:\n            pass\nanswer['content'] = A(a=1)\nanswer['ready'] = True",
    "an endless truth": "class T:\n    def __bool__(self):\n        while True:\n            try:\n                while True:\n                    pass\n            except BaseException:\n                pass\nanswer['ready'] = T()",
    "endless variables": "class M(type):\n    def __getattribute__(c, name):\n        while True:\n            pass\nclass X(metaclass=M):\n    pass\nx = X()",
    "the main thread ends": "_libc.syscall(60, 0)",
    "pthread_exit": "_libc.pthread_exit(0)",
    "stopped": "os.kill(os.getpid(), 19)",
    "compiling": "compile('(' * 90 + '0' + ')' * 90 + '+' + '+'.join(['1'] * 200_000), 'x', 'eval')\nwhile True:\n    pass",
    "stdin": "input()\nwhile True:\n    pass",
    "comprehension": "[0 for a in range(10**9) for b in range(10**9) if 0]",
}
LOOPS = [attack(name, cell, ends="ok timeout killed crashed error") for name, cell in LOOPS.items()]


@pytest.mark.parametrize("what", LOOPS, ids=names(LOOPS))
def test_ends(timed_arena, what):
    """Within the cell's time and the grace, and a bound for a busy machine."""
    started = time.monotonic()
    (result,) = timed_arena.play(what)
    assert time.monotonic() - started < 20
    assert result.wall_seconds < 15
    assert timed_arena.gap < 2


ENDLESS = {
    "pass",
    "interrupt ignored",
    "signals blocked",
    "power of powers",
    "sum",
    "a pattern",
    "key derivation",
    "sleep",
    "a lock",
    "libc sleep with the lock held",
    "everything caught",
    "search in an endless iterator",
}


@pytest.mark.parametrize("what", [a for a in LOOPS if a.name in ENDLESS], ids=lambda a: a.name)
def test_would_not_end_by_itself(arena, what):
    """With ten seconds it is still running after one: the bound ended it above, and nothing
    else."""
    import asyncio

    async def go():
        task = asyncio.ensure_future(arena.environment.run(what.cells[0], arena.handler))
        done, _ = await asyncio.wait({task}, timeout=1.0)
        task.cancel()
        await asyncio.wait({task})
        return done

    assert not arena.runner.run(go())
    arena.alive()
