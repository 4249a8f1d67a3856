"""Memory, disk, threads, descriptors and output are bounded, whoever asks for how much."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import pytest

from rlm.attacks.arena import SMALL, X86, Arena, attack, names

MEMORY = {
    "bytes": "x = b'x' * 10**10",
    "bytearray": "x = bytearray(10**10)",
    "text": "x = 'x' * 10**11",
    "doubling": "x = 'ab'\nwhile True:\n    x += x",
    "list of lists": "x = []\nwhile True:\n    x.append([0] * 100_000)",
    "dict": "x = {}\ni = 0\nwhile True:\n    x[i] = str(i) * 50\n    i += 1",
    "nothing in a list": "x = [None] * 10**12",
    "huge integer": "x = 1 << (8 * 10**10)",
    "power": "x = 7 ** (10**7)\nwhile True:\n    x = x * x",
    "anonymous map": "import mmap\nx = mmap.mmap(-1, 8 << 30)",
    "many maps": "import mmap\nx = []\nwhile True:\n    x.append(mmap.mmap(-1, 1 << 20))\n    x[-1].write(b'x' * (1 << 20))",
    "map without reserve": "_libc.mmap.restype = ctypes.c_void_p\nif _libc.mmap(None, ctypes.c_size_t(64 << 30), 3, 0x4022, -1, 0) == ctypes.c_void_p(-1).value:\n    raise MemoryError",
    "malloc": "_libc.malloc.restype = ctypes.c_void_p\nn = 0\nwhile _libc.malloc(1 << 20):\n    n += 1\nassert n < 400, f'BREACH {n}'\nraise MemoryError",
    "malloc to the last": "for size in (1 << 20, 1 << 16, 1 << 12):\n    while _libc.malloc(size):\n        pass\nraise MemoryError",
    "break": "_libc.sbrk.restype = ctypes.c_void_p\nif _libc.sbrk(ctypes.c_long(1 << 32)) == ctypes.c_void_p(-1).value:\n    raise MemoryError",
    "recursion": "def f():\n    f()\nf()",
    "recursion without a limit": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n    return [f([x]), x]\nf([])",
    "unpacked bomb": "import zlib\nd = zlib.compressobj(9)\nb = b''.join(d.compress(bytes(1 << 20)) for _ in range(600)) + d.flush()\nx = zlib.decompress(b)",
    "repeated format": "x = '{:>10000000000}'.format(1)",
    "replace": "x = ('a' * 10**6).replace('a', 'b' * 10**6)",
    "swallowed": "x = []\nwhile True:\n    try:\n        x.append(bytearray(1 << 20))\n    except MemoryError:\n        if len(x) < 10:\n            continue\n        break\nraise MemoryError",
    "swallowed for ever": "x = []\nwhile True:\n    try:\n        x.append(bytearray(1 << 16))\n    except BaseException:\n        pass",
    "answer": "answer['content'] = ['x' * 10**6] * 10**5\nanswer['ready'] = True",
    "printed": "x = 'x' * (10**8)\nwhile True:\n    print(x)",
    "a call": "llm_query('x' * (220 << 20))",
    "threads' stacks": "import threading\nthreading.stack_size(1 << 30)\nt = [threading.Thread(target=time.sleep, args=(9,)) for _ in range(99)]\n[i.start() for i in t]",
    "memory file": "os.memfd_create('x')",
}
MEMORY = [attack(name, cell, ends="error timeout killed crashed") for name, cell in MEMORY.items()]


@pytest.mark.parametrize("what", MEMORY, ids=names(MEMORY))
def test_memory(small_arena, what):
    small_arena.play(what)


DISK = {
    "one big file": "with open('big', 'wb') as f:\n    while True:\n        f.write(bytes(1 << 20))",
    "many files": "for i in range(100):\n    open(f'f{i}', 'wb').write(bytes(1 << 20))\ntime.sleep(3)\nraise OSError('BREACH: not stopped')",
    "many small files": "for i in range(10**6):\n    open(f's{i}', 'wb').close()",
    "many folders": "for i in range(10**6):\n    os.mkdir(f'd{i}')",
    "deep folders": "while True:\n    os.mkdir('d')\n    os.chdir('d')",
    "deep folders that cannot be read": "for i in range(200):\n    os.mkdir('u', 0o700)\n    os.chdir('u')\nos.umask(0)\nos.mkdir('z', 0o000)\ntime.sleep(3)",
    "sparse file": "open('sparse', 'wb').truncate(1 << 40)",
    "file without a name": "n = 0\nkept = []\nfor i in range(40):\n    f = open('u', 'w+b')\n    os.unlink('u')\n    f.write(bytes(1 << 20))\n    f.flush()\n    kept.append(f)\ntime.sleep(3)\nraise OSError('BREACH: not stopped')",
    "file without a name or descriptor": "for i in range(40):\n    f = open('m', 'w+b')\n    f.write(bytes(1 << 20))\n    f.flush()\n    _libc.mmap(None, ctypes.c_size_t(4096), 3, 1, f.fileno(), ctypes.c_long(0))\n    os.unlink('m')\n    f.close()\n    if i % 4 == 0:\n        time.sleep(0.05)\ntime.sleep(2)\nraise OSError('BREACH: 40 MiB on disk out of 8, not stopped')",
    "reserved": "fd = os.open('r', os.O_RDWR | os.O_CREAT)\nfor i in range(10**6):\n    os.posix_fallocate(fd, 0, 7 << 20)\n    fd = os.open(f'r{i}', os.O_RDWR | os.O_CREAT)",
    "reserved by number": "for i in range(30):\n    fd = os.open(f'k{i}', os.O_RDWR | os.O_CREAT)\n    sc(285, fd, 0, 0, 7 << 20)\nraise OSError('BREACH: 210 MiB in no time')",
    "beyond the end": "fd = os.open('e', os.O_RDWR | os.O_CREAT)\nos.pwrite(fd, b'x', 1 << 40)",
    "appended by threads": "import threading\ndef go(n):\n    while True:\n        with open(f'a{n}', 'ab') as f:\n            f.write(bytes(1 << 18))\nt = [threading.Thread(target=go, args=(i,)) for i in range(8)]\n[i.start() for i in t]\nt[0].join()",
    "copied": "open('c', 'wb').write(bytes(4 << 20))\nimport shutil\nfor i in range(10**6):\n    shutil.copyfile('c', f'c{i}')",
    "named and without a name": "kept = [open('x', 'w+b')]\nos.unlink('x')\nkept[0].write(bytes(6 << 20))\nkept[0].flush()\nopen('y', 'wb').write(bytes(6 << 20))\ntime.sleep(3)\nraise OSError('BREACH: 12 MiB out of 8, not stopped')",
    "a file with a long name": "for i in range(10**6):\n    open(f'{i:0250}', 'w').close()",
}
DISK = [attack(name, cell, ends="ok error timeout killed crashed") for name, cell in DISK.items()]


@pytest.mark.parametrize("what", DISK, ids=names(DISK))
def test_disk(what):
    """The bound holds, with what fits between two looks on top; and what was made is gone when the
    REPL is."""
    # they take long to remove
    limits = SMALL | ({"scratch": 2 << 20} if what.name == "many folders" else {})
    with Arena(**limits) as arena:
        peak, stop = [0], threading.Event()
        scratch = arena.environment._resources.folder.scratch

        def look():
            while not stop.wait(0.02):
                peak[0] = max(peak[0], on_disk(scratch))

        thread = threading.Thread(target=look)
        thread.start()
        try:
            arena.play(what)
        finally:
            stop.set()
            thread.join()
        assert peak[0] < 1500 << 20, f"{peak[0] >> 20} MiB at some time"


def on_disk(folder) -> int:
    total = 0
    for name in os.listdir(folder)[:1000]:
        with contextlib.suppress(OSError):
            total += os.lstat(folder / name).st_blocks * 512
    return total


THREADS = {
    "ten thousand": "import threading\nt = [threading.Thread(target=time.sleep, args=(30,), daemon=True) for _ in range(10_000)]\nthreading.stack_size(65536)\n[i.start() for i in t]",
    "raw ones": "import _thread\n_thread.stack_size(32768)\nwhile True:\n    try:\n        _thread.start_new_thread(time.sleep, (30,))\n    except RuntimeError:\n        pass",
    "bomb": "import threading\nthreading.stack_size(65536)\ndef go():\n    while True:\n        threading.Thread(target=go).start()\ngo()",
    "fork bomb": "while True:\n    try:\n        os.fork()\n    except OSError:\n        break\nraise PermissionError",
}
THREADS = [
    attack(name, cell, ends="error timeout killed crashed") for name, cell in THREADS.items()
]


@pytest.mark.parametrize("what", THREADS, ids=names(THREADS))
def test_threads(small_arena, what):
    small_arena.play(what)


DESCRIPTORS = {
    "files": "kept = []\nwhile True:\n    kept.append(open('f', 'w'))",
    "pipes": "while True:\n    os.pipe()",
    "copies": "while True:\n    os.dup(1)",
    "polls": "import select\nkept = []\nwhile True:\n    kept.append(select.epoll())",
}
DESCRIPTORS = [attack(name, cell, ends="error") for name, cell in DESCRIPTORS.items()]


@pytest.mark.parametrize("what", DESCRIPTORS, ids=names(DESCRIPTORS))
def test_descriptors(what):
    """The next cell has none left either, and still answers."""
    with Arena() as arena:
        arena.play(what)
        arena.alive()


OUTPUT = {
    "100 MB at once": "print('x' * 100_000_000)",
    "100 MB in pieces": "for _ in range(100):\n    print('x' * 1_000_000)",
    "a million lines": "for i in range(1_000_000):\n    print(i)",
    "a million pieces": "for i in range(1_000_000):\n    sys.stdout.write('x')",
    "errors": "print('x' * 50_000_000, file=sys.stderr)\nfor i in range(100_000):\n    sys.stderr.write('line\\n')",
    "past the streams": "for _ in range(1000):\n    os.write(1, b'x' * 65536)\n    os.write(2, b'y' * 65536)",
    "by libc": "for _ in range(1000):\n    _libc.puts(b'x' * 60_000)\n_libc.fflush(None)",
    "from threads": "import threading\ndef go():\n    for i in range(20_000):\n        print('x' * 100)\nt = [threading.Thread(target=go) for _ in range(10)]\n[i.start() for i in t]\n[i.join() for i in t]",
    "wide": "print('\\U0001f600' * 20_000_000)",
    "original streams": "for _ in range(200):\n    (sys.__stdout__ or sys.stdout).write('x' * 100_000)\n    sys.__stderr__.write('y' * 100_000)",
    "a long value": "'x' * 50_000_000",
    "one long error": "raise ValueError('x' * 100_000_000)",
    "many notes": "e = ValueError('x')\nfor i in range(1000):\n    e.add_note('n' * 100_000)\nraise e",
    "a group of errors": "raise ExceptionGroup('g' * 10**7, [ValueError('v' * 10**6) for _ in range(100)])",
    "a long chain": "def go(n):\n    try:\n        if n:\n            go(n - 1)\n        raise ValueError('x' * 1000)\n    except ValueError as e:\n        raise KeyError('y' * 1000) from e\ngo(200)",
    "a long line": "exec('raise ValueError(1)' + ' ' * 10**7 + '#')",
    "names": "globals().update({f'name{i}' * 100: i for i in range(100_000)})",
}
OUTPUT = [attack(name, cell, ends="ok error timeout") for name, cell in OUTPUT.items()]


@pytest.mark.parametrize("what", OUTPUT, ids=names(OUTPUT))
def test_output(what):
    with Arena() as arena:
        started = time.monotonic()
        arena.play(what)
        assert time.monotonic() - started < 30
        assert arena.gap < 2, f"the host's event loop stood still for {arena.gap:.1f} s"


@pytest.mark.skipif(not X86, reason="a syscall number of x86-64")
def test_the_processor_time_of_a_cell_is_bounded_over_threads(timed_arena):
    cell = "import threading, hashlib\ndef go():\n    while True:\n        hashlib.sha256(bytes(10**7))\nt = [threading.Thread(target=go) for _ in range(8)]\n[i.start() for i in t]\n[i.join() for i in t]"
    (result,) = timed_arena.play(attack("threads", cell, ends="timeout killed"))
    assert result.cpu_seconds < 20
