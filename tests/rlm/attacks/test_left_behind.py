"""What a cell leaves running or waiting touches neither the host between cells nor the cells that
follow."""

from __future__ import annotations

import time

import pytest

from rlm.attacks.arena import Arena, attack, names

LEFT = {
    "thread that calls": "import threading\ndef go():\n    while True:\n        try:\n            llm_query('late')\n        except BaseException:\n            time.sleep(0.01)\nthreading.Thread(target=go, daemon=True).start()",
    "thread that prints": "import threading\ndef go():\n    while True:\n        print('late', flush=True)\n        os.write(1, b'late')\n        time.sleep(0.01)\nthreading.Thread(target=go, daemon=True).start()",
    "threads that spin": "import threading\ndef go():\n    while True:\n        pass\nfor _ in range(4):\n    threading.Thread(target=go, daemon=True).start()",
    "thread of a timer": "import threading\nthreading.Timer(0.2, lambda: llm_query('late')).start()",
    "at exit": "import atexit\natexit.register(llm_query, 'late')",
    "finalizer": "import weakref\nclass C:\n    pass\nkept = C()\nweakref.finalize(kept, llm_query, 'late')",
    "ending": "class D:\n    def __del__(self):\n        llm_query('late')\nd = D()\nd.me = d\ndel d",
    "generator": "def g():\n    try:\n        yield\n    finally:\n        llm_query('late')\nkept = g()\nnext(kept)",
    "event loop": "import asyncio\nloop = asyncio.new_event_loop()\nloop.call_later(0.2, llm_query, 'late')\nasync def f():\n    asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.5)\nloop.run_until_complete(f())",
    "alarm": "import signal\nsignal.alarm(1)",
    "alarm with a handler": "import signal\nsignal.signal(signal.SIGALRM, lambda *a: llm_query('late'))\nsignal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)",
    "timer of the processor": "import signal\nsignal.setitimer(signal.ITIMER_VIRTUAL, 0.01, 0.01)",
    "timer of both": "import signal\nsignal.signal(signal.SIGPROF, lambda *a: 1 / 0)\nsignal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)",
    "timer of the fault handler": "import faulthandler\nfaulthandler.dump_traceback_later(0.2, exit=True)",
    "a pending signal": "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})\nos.kill(os.getpid(), signal.SIGTERM)\nos.kill(os.getpid(), signal.SIGUSR1)",
    "handlers of all signals": "import signal\nfor n in range(1, 65):\n    try:\n        signal.signal(n, lambda *a: 1 / 0)\n    except (OSError, ValueError):\n        pass",
    "tracing": "def t(*a):\n    llm_query('late')\nsys.settrace(t)\nsys.setprofile(t)",
    "monitoring of collection": "import gc\ngc.callbacks.append(lambda *a: llm_query('late'))\ngc.set_threshold(1)",
    "unraisable": "sys.unraisablehook = lambda *a: llm_query('late')",
    "pool": "from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(8)\n[pool.submit(time.sleep, 5) for _ in range(8)]",
    "thread that ends the worker at once": "import threading\ndef go():\n    time.sleep(0.05)\n    os._exit(0)\nthreading.Thread(target=go).start()",
    "thread that writes files": "import threading\ndef go():\n    i = 0\n    while True:\n        i += 1\n        open('late', 'w').write(str(i))\n        time.sleep(0.01)\nthreading.Thread(target=go).start()",
    "thread holding the lock of print": "import threading\nthreading.Thread(target=lambda: sys.stdout.__class__ and time.sleep(50)).start()",
    "pending call": "f = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda p: llm_query('late') and 0)\nctypes.pythonapi.Py_AddPendingCall(f, None)",
    "asynchronous exception": "import threading\nctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), ctypes.py_object(SystemExit))",
    "interrupt of the main thread": "import _thread, threading\nthreading.Timer(0.02, _thread.interrupt_main).start()",
    "umask and folder": "os.umask(0o777)\nos.mkdir('gone')\nos.chdir('gone')\nos.rmdir('../gone')",
}
LEFT = [attack(name, cell) for name, cell in LEFT.items()]


@pytest.mark.parametrize("what", LEFT, ids=names(LEFT))
def test_left_behind(what):
    with Arena(cell_seconds=5.0, grace_seconds=0.4) as arena:
        arena.run(what.cells[0])
        process = arena.environment._process  # None where the cell has ended its worker
        at_the_end, cpu = len(arena.calls), process.cpu() if process else 0
        pause(arena, 0.4 if what.name != "alarm" else 1.2)
        assert len(arena.calls) == at_the_end, "the host was called between two cells"
        assert not process or process.cpu() - cpu < 0.05, "code ran between two cells"
        late = [c for c in arena.calls if c.prompts == ("late",)]
        started = time.monotonic()
        # it sleeps for less than a cell takes to begin
        if what.name == "thread that ends the worker at once":
            arena.run("1")
        if what.name == "thread that prints":  # into the output of whichever cell is running
            result = arena.run("print(6 * 7, llm_query('ping'))")
            assert result.status == "ok" and "42 ping" in result.stdout, result
        else:
            arena.alive()
        assert time.monotonic() - started < 10
        # a thread goes on with the next cell, and its calls are that cell's
        if not what.name.startswith("thread"):
            assert [c for c in arena.calls if c.prompts == ("late",)] == late
        arena.host.unharmed()


def test_an_interrupt_that_the_host_did_not_send_ends_no_cell():
    with Arena(cell_seconds=5.0, grace_seconds=0.4) as arena:
        for i in range(60):  # before, at and after the beginning of the next cell
            timer = f"threading.Timer({i * 2e-4}, _thread.interrupt_main).start()"
            arena.run("import _thread, threading\n" + timer)
            arena.alive()


def pause(arena, seconds: float) -> None:
    import asyncio

    arena.runner.run(asyncio.sleep(seconds))


def test_a_call_of_an_ended_cell_is_answered_with_an_error_not_with_silence():
    with Arena() as arena:
        arena.run(
            "import threading\nheld, said = threading.Event(), []\ndef go():\n    held.wait()\n    try:\n        said.append(llm_query('x'))\n    except CallError as e:\n        said.append(e)\nt = threading.Thread(target=go)\nt.start()"
        )
        result = arena.run("held.set()\nt.join(5)\nprint(len(said))")
        assert result.stdout == "1\n"


def test_files_left_in_the_work_folder_do_not_shadow_a_restarted_worker():
    with Arena() as arena:
        for name in (
            "json",
            "re",
            "os",
            "sitecustomize",
            "usercustomize",
            "asyncio",
            "encodings",
            "worker",
            "ctypes",
            "random",
        ):
            arena.run(f"open({name + '.py'!r}, 'w').write('raise SystemExit(\"shadowed\")')")
        arena.run(
            "import os\nos.mkdir('encodings')\nopen('pyvenv.cfg', 'w').write('home = /')\nopen('python311._pth', 'w').write('.')"
        )
        assert arena.run("import os\nos._exit(0)").status == "crashed"
        arena.alive()
        assert arena.run("import json, random, ctypes\nprint(json.dumps(1))").stdout == "1\n"


def test_nothing_is_left_when_the_host_lets_go_in_the_middle():
    """Closed while a cell runs, with threads, files and a call under way."""
    import asyncio

    async def forever(request):
        await asyncio.sleep(1000)

    with Arena() as arena:
        arena.handler = forever

        async def go():
            cell = "import threading, os\nfor i in range(50):\n    threading.Thread(target=llm_query, args=('x',)).start()\n    os.makedirs(f'a/{i}/b')\nllm_query('y')"
            task = asyncio.ensure_future(arena.environment.run(cell, arena.handler))
            await asyncio.sleep(0.3)
            await arena.environment.aclose()
            return await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 10)

        arena.runner.run(go())
