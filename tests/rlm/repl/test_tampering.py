"""What a cell leaves behind: patches, hooks, threads, files. The next cell and the protocol do not
notice."""

import asyncio
import os
import time

import pytest

from rlm.repl.harness import QUICK, children, one, play, printed, run
from rlm_runtime.context import Context
from rlm_runtime.repl import make
from rlm_runtime.repl.base import Outcome

NEXT = """
import json, re, io, os, threading, traceback
print(json.loads(json.dumps({'a': [1]})), re.sub('a', 'b', 'aa'), llm_query('x'), llm_batch(['y']), context)
answer['content'] = len('four'); answer['ready'] = True
"""
EXPECTED = "{'a': [1]} bb x ['y'] some text\n"


@pytest.mark.parametrize(
    "code",
    [
        "import builtins\nfor n in list(vars(builtins)):\n    if n not in ('list', 'vars'): setattr(builtins, n, None)",
        "import builtins\nbuiltins.__dict__.clear()",
        "import builtins\nbuiltins.print = builtins.eval = builtins.compile = builtins.isinstance = lambda *a: 1 / 0",
        "import builtins\nbuiltins.__import__ = None; builtins.__build_class__ = None",
        "import sys\nsys.stdout = sys.stderr = sys.stdin = sys.__stdout__ = None",
        "import sys\nsys.stdout.write = lambda *a: 1 / 0",
        "import sys\nsys.stdout._head = None; sys.stdout.chars = 'x'; sys.stdout._mirror = 5",
        "import sys\ndel sys.stdout",
        "import sys\nsys.modules.clear()",
        "import sys\nsys.modules = {}",
        "import sys\nfor n in ('os', 'json', 're', 'io', 'traceback', 'threading'): sys.modules[n] = None",
        "import sys\nsys.path[:] = []; sys.meta_path[:] = []; sys.path_hooks.clear(); sys.path_importer_cache.clear()",
        "import sys\nsys.path = None; sys.meta_path = None",
        "import sys\nsys.settrace(lambda *a: 1 / 0)\ntry:\n    (lambda: 0)()\nexcept ZeroDivisionError: pass",
        "import sys, threading\nthreading.settrace(lambda *a: 1 / 0); threading.setprofile(lambda *a: 1 / 0)",
        "import sys\nsys.setprofile(lambda *a: None)",
        "import sys\nsys.setrecursionlimit(60)",
        "import sys\nsys.setswitchinterval(1000)",
        "import sys\nsys.set_int_max_str_digits(0)",
        "import sys\nsys.excepthook = sys.displayhook = sys.unraisablehook = lambda *a: 1 / 0",
        "import sys\nsys.addaudithook(lambda *a: 1 / 0)",
        "import gc\ngc.disable(); gc.callbacks.append(lambda *a: 1 / 0); gc.set_threshold(1)",
        "import gc\ngc.freeze(); gc.set_debug(gc.DEBUG_STATS)",
        "import signal\nfor s in (2, 10, 12, 14, 15): signal.signal(s, lambda *a: 1 / 0)\nsignal.setitimer(0, 0.001, 0.001)",
        "import signal\nsignal.alarm(1); signal.set_wakeup_fd(-1)",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))",
        "import atexit, weakref\natexit.register(print, 'exit')\nclass D:\n    def __del__(s): raise RuntimeError\nD(); d = D()",
        "class D:\n    def __del__(s):\n        global d\n        d = s\nd = D()\ndel d",
        "import json\njson.dumps = json.encoder.JSONEncoder = json.decoder = None\nimport importlib; importlib.reload(json)",
        "import _json\n_json.make_encoder = _json.make_scanner = _json.encode_basestring_ascii = None",
        "import _thread\n_thread.allocate_lock = _thread.start_new_thread = None",
        "import os\nfor f in ('json', 're', 'os', 'io', 'threading', 'worker', 'sitecustomize'):\n"
        "    open(f + '.py', 'w').write('1/0')",
        "import sys, os\nopen('traceback.py', 'w').write('1/0')\nsys.path.insert(0, os.getcwd())",
        "import os, shutil\nos.mkdir('d'); os.chdir('d'); os.rmdir('../d')",
        "import os\nfor fd in range(1024):\n    try: os.close(fd)\n    except OSError: pass",
        "import os\nos.closerange(0, 4096)",
        "import os\nos.dup2(os.open('/dev/null', 2), 0); os.close(1); os.close(2); open('f', 'w')",
        "import os\nos.environ.clear(); os.umask(0o777)",
        "import locale, decimal\ndecimal.getcontext().prec = 1",
        "import warnings\nwarnings.simplefilter('error')",
        "import faulthandler\nfaulthandler.disable(); faulthandler.cancel_dump_traceback_later()",
        "import threading\nthreading.Thread.start = threading.Lock = None",
        "globals().clear()",
        "for n in list(globals()): del globals()[n]",
        "llm_query = FINAL = SHOW_VARS = 5",
        "answer = context = outputs = FINAL = CallError = None",
        "answer.clear(); outputs.append(5); del answer, outputs",
        "class Odd(dict):\n    def get(s, *a): raise RuntimeError\nanswer = Odd()",
        "import __main__\n__main__.__dict__['answer'] = 5; __main__.__name__ = 'x'",
        "import types, sys\nsys.modules['__main__'] = types.ModuleType('__main__')",
        "__name__ = __builtins__ = None",
        "import ctypes\nctypes.pythonapi = None; ctypes.CDLL = None",
        "import linecache\nlinecache.cache = None; linecache.getlines = None",
        "import tracemalloc\ntracemalloc.start(50)",
        "import asyncio\nloop = asyncio.new_event_loop(); asyncio.set_event_loop(loop)",
        "import contextvars\ncontextvars.copy_context().run(print)",
        "def __getattr__(name): 1 / 0\nimport sys\nsys.stdout.extra = sys.stdout",
    ],
)
def test_the_next_cell_is_as_if_nothing_had_been(code):
    first, second = play(code, NEXT, limits={"cell_seconds": 5, "grace_seconds": 1})
    assert second.status == "ok" and second.stdout.startswith(EXPECTED), (first, second)
    assert second.answer.content == 4 and second.answer.ready
    assert first.status in ("ok", "error") and first.lost is None and second.lost is None, (
        first,
        second,
    )


@pytest.mark.parametrize(
    "code",
    [  # by reaching into the runtime's own objects
        "import gc\nfor o in gc.get_objects():\n    if type(o).__name__ in ('Channel', 'Calls', 'Repl', 'Capture'): vars(o).clear()",
        "g = llm_query.__closure__[0].cell_contents.__globals__\ng.clear()",
        "import gc\nfor o in gc.get_objects():\n    if type(o) is dict and '_shielded' in o: o.clear()",
        "llm_query.__code__ = (lambda *a, **k: 1 / 0).__code__",
        "import sys\nf = sys._getframe()\nwhile f: f.f_globals.clear(); f = f.f_back",
        "import ctypes, sys\nfor n in range(5): ctypes.pythonapi.PyErr_SetInterrupt()",
        "import ctypes, sys, threading\nfor t in list(sys._current_frames()):\n"
        "    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(t), ctypes.py_object(SystemExit))",
        "import ctypes\nf = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.py_object, ctypes.c_void_p)(lambda *a: -1)\n"
        "ctypes.pythonapi.PySys_AddAuditHook(f, None)",
    ],
)
def test_a_runtime_taken_apart_from_inside_is_replaced(code):
    """No cell can be kept from wrecking its own process; what must hold is that the run goes on."""
    results = play(code, NEXT, NEXT, limits={"cell_seconds": 3, "grace_seconds": 1})
    assert results[2].stdout.endswith(EXPECTED) and results[2].answer.content == 4, results


def test_between_cells_nothing_runs():
    code = """
    import threading
    count = 0
    def work():
        global count
        while True:
            count += 1
    for _ in range(3): threading.Thread(target=work, daemon=True).start()
    """

    async def go():
        async with make("local") as environment:
            await environment.start(Context.of("x"))
            printed(await run(environment, code))
            (worker,) = children()
            before = -1.0
            # until it has stopped; or the test would not end
            while before != (now := environment._process.cpu()):
                before = now
                time.sleep(0.05)
            time.sleep(0.2)
            assert environment._process.cpu() == before
            with open(f"/proc/{worker}/stat") as file:
                assert file.read().rpartition(")")[2].split()[0] == "T"
            assert printed(await run(environment, "count > 0")) == "True\n"

    asyncio.run(go())


def test_leftover_threads_make_no_calls_between_cells():
    calls = []

    async def handler(request):
        calls.append(request.prompts[0])
        return [Outcome(value=1)]

    code = """
    import threading
    def work():
        while True:
            try: llm_query('leftover')
            except Exception: pass
    threading.Thread(target=work, daemon=True).start()
    """

    async def go():
        async with make("local") as environment:
            await environment.start(Context.of("x"))
            printed(await run(environment, code, handler))
            seen = len(calls)
            await asyncio.sleep(0.2)
            assert len(calls) == seen
            assert (await run(environment, "1", handler)).stdout == "1\n"

    asyncio.run(go())


def test_a_name_of_the_host_is_not_trusted_for_its_looks():
    result = one(
        "globals()['\\x1b[31m<script>' + 'n' * 10**6] = 1\nx = type('Y' * 10**6, (), {})()",
        limits=QUICK,
    )
    assert result.status == "ok" and all(
        len(k) < 300 and len(v) < 400 for k, v in result.variables.items()
    )


def test_the_worker_ends_without_running_what_was_left_for_its_end(tmp_path):
    code = "import atexit\natexit.register(lambda: open('left', 'w').write('x'))\nimport os; os.getcwd()"

    async def go():
        environment = make("local")
        await environment.start(Context.of("x"))
        folder = printed(await run(environment, code)).strip().strip("'")
        assert os.path.isdir(folder)
        await environment.aclose()
        assert not os.path.exists(folder)

    asyncio.run(go())
