"""A cell that ends or wrecks its process costs its own variables and nothing else."""

from __future__ import annotations

import pytest

from rlm.attacks.arena import Arena, attack, names

CRASHES = {
    "null": "ctypes.string_at(0)",
    "write to null": "ctypes.memset(0, 1, 1)",
    "abort": "os.abort()",
    "exit 0": "os._exit(0)",
    "exit 1": "os._exit(1)",
    "libc exit": "_libc.exit(0)",
    "libc quick exit": "_libc.quick_exit(0)",
    "fault": "import faulthandler\nfaulthandler._sigsegv()",
    "fatal": "import faulthandler\nfaulthandler._fatal_error_c_thread()\ntime.sleep(5)",
    "fatal error": "ctypes.pythonapi.Py_FatalError(b'made up')",
    "stack": "import faulthandler\nfaulthandler._stack_overflow()",
    "free": "_libc.free(ctypes.c_void_p(12345))",
    "kill": "os.kill(os.getpid(), 9)",
    "raise": "import signal\nsignal.raise_signal(signal.SIGKILL)",
    "terminate": "os.kill(os.getpid(), 15)",
    "code": "import types\ndef f(): pass\nf.__code__ = f.__code__.replace(co_code=bytes([100, 255] * 50), co_consts=())\nf()",
    "reference": "ctypes.pythonapi.Py_DecRef.argtypes = [ctypes.py_object]\nfor _ in range(10**6):\n    ctypes.pythonapi.Py_DecRef(None)\n    ctypes.pythonapi.Py_DecRef(True)",
    "interpreter state": "ctypes.pythonapi.Py_FinalizeEx()",
    "deep repr": "import sys\nsys.setrecursionlimit(10**8)\nx = []\nfor _ in range(10**6):\n    x = [x]\nrepr(x)",
    "deep json": "import json, sys\nsys.setrecursionlimit(10**8)\njson.loads('[' * 10**6)",
    "deep pattern": "import re, sys\nsys.setrecursionlimit(10**8)\nre.compile('(' * 10**5 + ')' * 10**5)",
    "deep code": "import sys\nsys.setrecursionlimit(10**8)\ncompile('-' * 10**6 + '1', 'x', 'eval')",
    "memory of the runtime": "import gc\nfor o in gc.get_objects():\n    if type(o).__name__ in ('Calls', 'Repl', 'Channel', 'Service'):\n        ctypes.memset(id(o), 65, 64)\ngc.collect()",
    "the lock given up": "ctypes.pythonapi.PyEval_SaveThread()",
    "timer of the fault handler": "import faulthandler\nfaulthandler.dump_traceback_later(0.05, exit=True)\ntime.sleep(2)",
    "processor limit": "import signal\nos.kill(os.getpid(), signal.SIGXCPU)\ntime.sleep(2)",
}
CRASHES = [
    attack(name, cell, ends="ok error timeout crashed killed") for name, cell in CRASHES.items()
]
HARMLESS = {
    "exit": "import sys\nsys.exit(3)",
    "exit with text": "import sys\nsys.exit('x' * 10**7)",
    "quit": "raise SystemExit",
    "exit in a thread": "import threading\ndef go():\n    raise SystemExit(1)\nt = threading.Thread(target=go)\nt.start()\nt.join()",
    "error in a thread": "import threading\ndef go():\n    raise ValueError('x')\nt = threading.Thread(target=go)\nt.start()\nt.join()",
    "interrupt": "raise KeyboardInterrupt",
    "generator exit": "raise GeneratorExit",
    "base exception": "class B(BaseException):\n    pass\nraise B",
    "exception group": "raise BaseExceptionGroup('g', [KeyboardInterrupt(), SystemExit(1)])",
    "close everything": "os.closerange(0, 4096)",
    "close one by one": "for fd in range(4096):\n    try:\n        os.close(fd)\n    except OSError:\n        pass",
    "the standard ones replaced": "fd = os.open('f', os.O_RDWR | os.O_CREAT)\nfor n in (0, 1, 2):\n    os.dup2(fd, n)",
    "everything replaced": "for n in range(0, 1024):\n    try:\n        os.dup2(os.open('/dev/null', os.O_RDWR), n)\n    except OSError:\n        pass",
    "streams closed": "import sys\nsys.stdout.close()\nsys.stderr.close()\nsys.stdin and sys.stdin.close()",
    "wrong code": "def f(:\n",
    "nul": "x = 1\0",
    "odd characters": "\ud800 = 1",
    "deep brackets": "(" * 5000 + ")" * 5000,
    "end of the interpreter": "import atexit\natexit._run_exitfuncs()",
    "finalizers": "import weakref\nclass C:\n    pass\nc = C()\nweakref.finalize(c, os._exit, 0)",
    "recursive repr": "class R:\n    def __repr__(self):\n        return repr(self)\nR()",
    "no globals": "globals().clear()",
    "odd names": "globals()['\\n\\x1b[31m'] = 1\nglobals()[1] = 2\nglobals()['\\ud800'] = 3",
}
HARMLESS = [attack(name, cell, ends="ok error timeout") for name, cell in HARMLESS.items()]


@pytest.mark.parametrize("what", CRASHES, ids=names(CRASHES))
def test_crash(timed_arena, what):
    (result,) = timed_arena.play(what)
    if result.status in ("crashed", "killed"):
        assert result.lost and "`context`" in result.lost
        assert timed_arena.run("print(context)").stdout == "some text\n"


@pytest.mark.parametrize("what", HARMLESS, ids=names(HARMLESS))
def test_no_crash_at_all(what):
    """The worker survives, its variables with it."""
    with Arena() as arena:
        arena.run("kept = 'there'")
        arena.play(what)
        if "globals" not in what.cells[0]:
            assert arena.run("print(kept)").stdout == "there\n"
