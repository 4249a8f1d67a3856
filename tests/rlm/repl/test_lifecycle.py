"""Start, cancel, rebind, restart, close, be forgotten, be killed: something usable or nothing at
all is left."""

import asyncio
import contextlib
import gc
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from rlm.repl.harness import HANG, HOLD, children, descriptors, folders, printed, run
from rlm_runtime.context import Context
from rlm_runtime.errors import ContextError, SandboxError, UsageError
from rlm_runtime.repl import make
from rlm_runtime.repl.base import Limits, ToolInfo
from rlm_runtime.repl.workdir import WorkDir, measure, remove

ROOT = Path(__file__).resolve().parents[3]


def with_repl(body, context="some text", **options):
    async def go():
        async with make("local", **options) as environment:
            await environment.start(Context.of(context))
            await body(environment)

    asyncio.run(go())


def test_start_says_what_is_active():
    async def body(environment):
        report = environment.report
        assert report.environment == "local" and report.missing == ()
        assert report.layers["landlock"].startswith("active") and report.layers[
            "seccomp"
        ].startswith("active")
        assert "landlock active" in report.line() and "\n" not in report.line()

    with_repl(body)


def test_closing_twice_before_and_after_is_fine_and_running_after_is_not():
    async def go():
        never = make("local")
        await never.aclose()
        await never.aclose()
        with pytest.raises(SandboxError):
            await never.run("1", None)
        environment = make("local")
        with pytest.raises(SandboxError):
            await environment.run("1", None)
        await environment.start(Context.of("x"))
        with pytest.raises(UsageError):
            await environment.start(Context.of("x"))
        await environment.aclose()
        await environment.aclose()
        with pytest.raises(SandboxError):
            await environment.run("1", None)

    asyncio.run(go())


@pytest.mark.parametrize(
    "name", ["context", "answer", "llm_query", "a b", "", "class", "__x__", "1a"]
)
def test_names_of_the_runtime_cannot_be_taken(name):
    async def go():
        environment = make("local")
        with pytest.raises(UsageError):
            await environment.start(Context.of("x"), (ToolInfo(name=name),))
        await environment.aclose()
        environment = make("local")
        with pytest.raises(UsageError):
            await environment.bind(name, 1)
        await environment.aclose()

    asyncio.run(go())


def test_bound_values_and_contexts_are_there_again_after_a_restart():
    async def body(environment):
        await environment.bind("history", [{"role": "user"}])
        await environment.rebind_context(Context.of({"k": [1]}), "context_1")
        cell = "(history, context_1, context)"
        expected = "([{'role': 'user'}], {'k': [1]}, 'some text')\n"
        assert printed(await run(environment, cell)) == expected
        assert (await run(environment, "import os; os._exit(1)")).lost
        assert printed(await run(environment, cell)) == expected
        assert printed(await run(environment, "history = 1; outputs")).startswith("['")
        assert printed(await run(environment, cell)) == expected
        await environment.bind("history", 7)
        assert printed(await run(environment, "history")) == "7\n"
        with pytest.raises(UsageError):
            await environment.bind("bad", object())

    with_repl(body)


def test_a_context_replaces_the_first_one():
    async def body(environment):
        await environment.rebind_context(Context.of("another"))
        assert printed(await run(environment, "context")) == "'another'\n"

    with_repl(body)


def test_later_files_and_folders_reach_a_running_worker(tmp_path):
    (tmp_path / "a.txt").write_text("in a")
    (tmp_path / "big.txt").write_text("line\n" * 3_000_000)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("in b")
    (tmp_path / "out").symlink_to("/etc/passwd")

    async def body(environment):
        await run(environment, "x = 1")
        await environment.rebind_context(Context.of(tmp_path / "a.txt"), "context_1")
        await environment.rebind_context(Context.of(tmp_path / "big.txt"), "context_2")
        await environment.rebind_context(Context.of(tmp_path), "context_3")
        code = "context_1, len(context_2), sorted(context_3), context_3['sub/b.txt'], x"
        expected = "('in a', 15000000, ['a.txt', 'big.txt', 'sub/b.txt'], 'in b', 1)\n"
        assert printed(await run(environment, code)) == expected
        result = await run(environment, f"open({str(tmp_path / 'a.txt')!r})")
        assert result.error.type == "PermissionError"
        await run(environment, "import os; os._exit(1)")
        assert printed(await run(environment, code.replace(", x", ", 1"))) == expected

    with_repl(body)


def test_a_context_that_is_gone_is_a_context_error(tmp_path):
    file = tmp_path / "f.txt"
    file.write_text("x")
    context = Context.of(file)
    file.unlink()

    async def go():
        environment = make("local")
        with pytest.raises(ContextError):
            await environment.start(context)
        assert not children()
        await environment.aclose()

    asyncio.run(go())


def test_a_context_too_large_for_the_memory_is_an_error_and_the_repl_goes_on():
    async def body(environment):
        assert printed(await run(environment, "x = bytearray(180 << 20); 1")) == "1\n"
        # brings its own room
        await environment.rebind_context(Context.of("y" * 50_000_000), "context_1")
        assert printed(await run(environment, "len(context_1)")) == "50000000\n"
        assert (await run(environment, "z = bytearray(400 << 20)")).error.type == "MemoryError"

    with_repl(body, limits=Limits(memory=256 << 20))


def test_reset_answer():
    async def body(environment):
        assert (await run(environment, "FINAL(1)")).answer.ready
        assert (await run(environment, "1")).answer.ready
        await environment.reset_answer()
        assert not (await run(environment, "1")).answer.ready
        assert printed(await run(environment, "answer")) == "{'content': None, 'ready': False}\n"

    with_repl(body)


@pytest.mark.parametrize(
    ("code", "kept"),
    [
        ("y = 1\nimport time\ntime.sleep(600)", True),
        ("y = 1\nwhile True: pass", True),
        ("y = 1\nllm_query('never')", True),
        (f"y = 1\n{HOLD}", False),
    ],
)
def test_a_cancelled_cell_leaves_a_usable_repl(code, kept):
    async def never(request):
        await asyncio.sleep(600)

    async def body(environment):
        task = asyncio.ensure_future(environment.run(code, never))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, HANG)
        after = await run(environment, "'y' in globals(), context")
        assert printed(after) == f"({kept}, 'some text')\n"
        assert (after.lost is None) == kept

    with_repl(body, limits=Limits(grace_seconds=0.5))


def test_cancelled_twice_is_cancelled_at_once():
    async def body(environment):
        task = asyncio.ensure_future(environment.run(HOLD, None))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)
        assert printed(await run(environment, "context")) == "'some text'\n"

    with_repl(body, limits=Limits(grace_seconds=600))


def test_cancelled_while_it_starts():
    async def go():
        for wait in (0, 0.001, 0.005, 0.01, 0.02, 0.03, 0.05):
            environment = make("local")
            task = asyncio.ensure_future(environment.start(Context.of("x")))
            await asyncio.sleep(wait)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await environment.aclose()
            assert not children()

    asyncio.run(go())


def test_cancelling_ends_the_unpacking_of_a_context(tmp_path, monkeypatch):
    (tmp_path / "log.gz").write_bytes(gzip.compress(b"a line"))
    began = threading.Event()

    def for_ever(context, target, limit, stop):
        began.set()
        while not stop():
            time.sleep(0.01)
        raise ContextError("stopped")

    monkeypatch.setattr(Context, "_unpack", for_ever)

    async def go():
        environment = make("local")
        start = asyncio.ensure_future(environment.start(Context.of(tmp_path / "log.gz")))
        await asyncio.to_thread(began.wait)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(start, HANG)
        async with make("local") as environment:  # and while a session takes its next text
            await environment.start(Context.of("x"))
            began.clear()
            later = asyncio.ensure_future(
                environment.rebind_context(Context.of(tmp_path / "log.gz"), "context_1")
            )
            await asyncio.to_thread(began.wait)
            later.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(later, HANG)
            assert printed(await run(environment, "context")) == "'x'\n"

    asyncio.run(go())


def test_a_worker_killed_while_it_starts_is_started_again():
    async def go():
        environment = make("local")
        start = asyncio.ensure_future(environment.start(Context.of("x")))
        while environment._process is None:
            await asyncio.sleep(0)
        os.kill(environment._process.pid, signal.SIGKILL)
        await asyncio.wait_for(start, HANG)
        assert printed(await run(environment, "context")) == "'x'\n"
        await environment.aclose()

    asyncio.run(go())


def test_closing_while_a_cell_runs_ends_it():
    async def go():
        environment = make("local")
        await environment.start(Context.of("x"))
        task = asyncio.ensure_future(environment.run("while True: pass", None))
        await asyncio.sleep(0.1)
        await environment.aclose()
        result = await asyncio.wait_for(task, 10)
        assert result.status == "killed" and not children()

    asyncio.run(go())


def test_many_repls_at_once():
    async def go():
        async def life(i):
            async with make("local") as environment:
                await environment.start(Context.of(f"text {i}"))
                return printed(await run(environment, "llm_query(context)"))

        assert await asyncio.gather(*(life(i) for i in range(12))) == [
            f"'text {i}'\n" for i in range(12)
        ]

    asyncio.run(go())


def test_cells_asked_for_at_once_run_one_after_the_other():
    async def body(environment):
        await run(environment, "seen = []")
        await asyncio.gather(
            *(
                run(environment, f"seen.append({i}); llm_query('x'); seen.append({i})")
                for i in range(5)
            )
        )
        assert (
            printed(await run(environment, "seen[::2] == seen[1::2], len(seen)")) == "(True, 10)\n"
        )

    with_repl(body)


def test_a_forgotten_repl_takes_everything_with_it():
    before = descriptors(), set(folders(tempfile.gettempdir()))

    async def go():
        environment = make("local")
        await environment.start(Context.of("x"))
        assert children()
        del environment
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(go())
    gc.collect()
    assert not children()
    assert (descriptors(), set(folders(tempfile.gettempdir()))) == before


def test_a_repl_left_open_when_its_loop_ends_can_still_be_dropped():
    kept = []

    async def go():
        environment = make("local")
        await environment.start(Context.of("x"))
        kept.append(environment)

    asyncio.run(go())
    assert children()
    kept.clear()
    gc.collect()
    assert not children()


HOST = """
import asyncio, sys, os
sys.path.insert(0, {root!r})
from rlm_runtime.repl import make
from rlm_runtime.context import Context
async def never(request): await asyncio.sleep(600)
async def go():
    environment = make("local")
    await environment.start(Context.of("x"))
    print(environment._process.pid, environment._resources.folder.root, flush=True)
    {then}
asyncio.run(go())
"""


def start_host(then: str):
    code = HOST.format(root=str(ROOT), then=then)
    host = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker, folder = host.stdout.readline().split()
    return host, int(worker), Path(folder)


def gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def wait_for(condition) -> None:
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    "then",
    [
        "await asyncio.sleep(600)",
        "await environment.run('while True: pass', never)",
        "await environment.run('import ctypes; ctypes.PyDLL(None).sleep(600)', never)",
        "await environment.run('1', never); await asyncio.sleep(600)",  # stopped
    ],
)
def test_no_worker_outlives_a_killed_host_and_its_folder_is_swept_later(then):
    host, worker, folder = start_host(then)
    time.sleep(0.2)  # into the middle of it
    host.kill()
    host.wait()
    host.stdout.close()
    wait_for(lambda: gone(worker))
    assert folder.is_dir()
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom rlm_runtime.repl.workdir import sweep; sweep({str(folder.parent)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not folder.exists()


def test_a_host_that_ends_without_closing_leaves_nothing():
    host, worker, folder = start_host("await environment.run('1', never)")
    assert host.wait(HANG) == 0
    host.stdout.close()
    assert gone(worker) and not folder.exists()


def test_ctrl_c_in_the_host_does_not_reach_the_worker():
    host, worker, folder = start_host("await environment.run('1', never); await asyncio.sleep(600)")
    host.send_signal(signal.SIGINT)
    assert host.wait(HANG) != 0
    host.stdout.close()
    assert gone(worker) and not folder.exists()


def test_a_worker_outlives_the_thread_that_started_it():
    import threading

    started = {}

    def thread():
        loop = started["loop"] = asyncio.new_event_loop()
        started["environment"] = make("local")
        loop.run_until_complete(started["environment"].start(Context.of("x")))

    worker = threading.Thread(target=thread)
    worker.start()
    worker.join()
    loop, environment = started["loop"], started["environment"]
    assert printed(loop.run_until_complete(run(environment, "context"))) == "'x'\n"
    loop.run_until_complete(environment.aclose())
    loop.close()


# -- folders


def test_a_tree_of_any_depth_and_any_permissions_is_removed(tmp_path):
    top = tmp_path / "top"
    top.mkdir()
    here = os.open(top, os.O_RDONLY)
    for _ in range(500):  # deeper than any path can say
        os.mkdir("d" * 20, dir_fd=here)
        below = os.open("d" * 20, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("f", os.O_CREAT, dir_fd=here))
    os.close(here)
    (top / "closed").mkdir()
    (top / "closed" / "inner").mkdir(mode=0)
    (top / "closed").chmod(0)
    (tmp_path / "kept").mkdir()
    (top / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "kept" / "file").write_text("x")
    assert "nested deeper" in measure(top, 1 << 40, 10**6)
    remove(top)
    assert not top.exists() and (tmp_path / "kept" / "file").exists()


def test_measuring_counts_bytes_on_disk_and_names(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_bytes(b"x" * 100_000)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    assert measure(tmp_path, 1 << 20, 10) is None
    assert "MiB" in measure(tmp_path, 50_000, 10)
    assert "files" in measure(tmp_path, 1 << 20, 2)


def test_folders_of_living_hosts_and_of_others_are_left_alone(tmp_path):
    mine = WorkDir(str(tmp_path))
    other = tmp_path / "rlm-repl-0-0-1-1-0000000000000000"
    other.mkdir()
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom rlm_runtime.repl.workdir import sweep; sweep({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert mine.root.is_dir() and other.is_dir()
    mine.remove()
    assert os.stat(tmp_path).st_nlink == 3


def test_results_can_be_written_down():
    async def body(environment):
        result = await run(environment, "print('\\x1b[31m<b>\\x00'); raise ValueError('\\ud800')")
        assert json.loads(result.model_dump_json())["stdout"] == "\x1b[31m<b>\x00\n"

    with_repl(body)


def test_code_comes_back_to_earth():
    async def body(environment):
        assert (await run(environment, textwrap.dedent("x = '\ud800'\nlen(x)"))).stdout == "1\n"

    with_repl(body)
