"""The command `rlm` as a person meets it: a process, its two outputs, its exit code."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from rlm.fake_server import Fail, FakeServer, Hang, Say

TEXT = "The magic number is 4217.\n" + "filler line\n" * 1000


def cell(code):
    return f"Next step.\n```repl\n{code}\n```"


def done(expression):
    return cell(f"answer['content'] = {expression}\nanswer['ready'] = True")


FIND = ["", done("context.split('number is ')[1].split('.')[0]")]


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


class Command:
    """`rlm` with a home of its own and a model endpoint."""

    def __init__(self, home: Path):
        self.home = home

    def env(self, **more):
        kept = {
            k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "PYTHONPATH", "SYSTEMROOT")
        }
        path = os.pathsep.join(
            filter(None, [str(Path(__file__).parents[2]), kept.get("PYTHONPATH")])
        )
        return {
            **kept,
            "PYTHONPATH": path,
            "HOME": str(self.home),
            "OPENAI_API_KEY": "sk-test",
            **more,
        }

    def start(self, *args, env=None, **options):
        command = [sys.executable, "-m", "rlm_runtime", *map(str, args)]
        pipes = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
        }
        return subprocess.Popen(
            command, env=self.env(**(env or {})), cwd=self.home, **{**pipes, **options}
        )

    def __call__(self, *args, text=None, env=None):
        stdin = subprocess.PIPE if text is not None else subprocess.DEVNULL
        with self.start(*args, env=env, stdin=stdin) as process:
            try:
                out, err = process.communicate(text, timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        assert "Traceback" not in err, err
        return process.returncode, out, err

    def ask(self, server, question, *args, **options):
        model = ("--root", "openai:fake", "--base-url", getattr(server, "url", server))
        return self("ask", question, *args, *model, **options)


@pytest.fixture
def rlm(tmp_path):
    return Command(tmp_path)


def one_line(err, *words):
    """The complaint among the lines of standard error: exactly one, and it holds these words."""
    lines = [line for line in err.splitlines() if line.startswith("rlm: ")]
    assert len(lines) == 1, err
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


# ---- answering


def test_the_answer_alone_is_on_standard_output(rlm, book):
    with FakeServer([cell("print(context[:30])"), done("'4217'")]) as server:
        code, out, err = rlm.ask(server, "Which number?", "--context", book)
    assert (code, out) == (0, "4217\n")
    assert "turn 1" in err and "> print(context[:30])" in err and "< The magic number" in err
    assert "2 turns" in err and "rlm view" in err


def test_quiet_and_json(rlm, book):
    with FakeServer(done("{'n': 4217}")) as server:
        code, out, err = rlm.ask(server, "Which?", "-c", book, "-q", "--json", "--no-log")
    result = json.loads(out)
    assert (
        code == 0
        and err == ""
        and result["answer"] == {"n": 4217}
        and result["stop_reason"] == "answered"
    )
    assert result["usage"]["calls"] == 1 and result["trajectory"] is None


def test_a_pipe_a_folder_and_several_files(rlm, book, tmp_path):
    show = done("str(type(context).__name__) + ' ' + str(len(context))")
    with FakeServer(show) as server:
        code, out, _ = rlm.ask(server, "What?", text="piped text")
        assert (code, out) == (0, "str 10\n")
        assert rlm.ask(server, "What?", "-c", "-", text="piped text")[:2] == (0, "str 10\n")
        (tmp_path / "notes").mkdir()
        for name in ("a.txt", "b.txt"):
            (tmp_path / "notes" / name).write_text(name)
        code, folder, _ = rlm.ask(server, "What?", "-c", tmp_path / "notes")
        assert code == 0 and folder.split()[1] == "2"
        code, several, _ = rlm.ask(server, "What?", "-c", book, tmp_path / "notes" / "a.txt")
        assert code == 0 and several == folder


def test_schema_tools_prompt_and_settings_reach_the_run(rlm, book, tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "integer"}')
    (tmp_path / "tools.py").write_text(
        "def double(n: int) -> int:\n    'Twice n.'\n    return 2 * n\n"
    )
    (tmp_path / "system.txt").write_text("You are terse. {repl}")
    with FakeServer([done("'no number'"), done("double(21)")]) as server:
        code, out, _ = rlm.ask(
            server,
            "How many?",
            "-c",
            book,
            "--output-schema",
            "schema.json",
            "--tools",
            "tools.py",
            "--system-prompt",
            "system.txt",
            "--set",
            "turns=7",
            "--set",
            "memory=1GiB",
        )
        assert (code, out) == (0, "42\n")
        system = server.requests[0].body["messages"][0]["content"]
        assert system.startswith("You are terse.") and "double" in system


def test_escape_codes_of_a_model_do_not_reach_the_terminal(rlm, book):
    nasty = (
        "print('\\x1b]0;owned\\x07\\x1b[31mred')\nanswer['content'] = 'x'\nanswer['ready'] = True"
    )
    with FakeServer(cell(nasty)) as server:
        code, _, err = rlm.ask(server, "What?", "-c", book)
    assert code == 0 and "owned" in err and "\x1b" not in err and "\x07" not in err


# ---- what goes wrong, one clear line each

BAD_USE = [
    (["ask"], "question"),
    (["ask", "q", "--frobnicate"], "frobnicate"),
    (["ask", "q", "-c", "missing.txt", "--root", "openai:m"], "missing.txt"),
    (["ask", "q", "-c", "empty.txt", "--root", "openai:m"], "empty"),
    (["ask", "q", "-c", "binary.bin", "--root", "openai:m"], "binary.bin"),
    (["ask", "q", "-c", "empty_folder", "--root", "openai:m"], "empty_folder"),
    (["ask", " ", "-c", "book.txt", "--root", "openai:m"], "question"),
    (["ask", "q", "--root", "openai:m"], "empty"),
    (["ask", "q", "-c", "book.txt"], "--root"),
    (["ask", "q", "-c", "book.txt", "--root", "opnai:m"], "Did you mean openai:m"),
    (["ask", "q", "-c", "book.txt", "--root", "openai:m", "--set", "turn=5"], "Did you mean turns"),
    (["ask", "q", "-c", "book.txt", "--root", "openai:m", "--set", "turns=many"], "many"),
    (["ask", "q", "-c", "book.txt", "--root", "openai:m", "--max-depth", "99"], "max_depth"),
    (["ask", "q", "-c", "book.txt", "--root", "openai:m", "--budget-usd", "0"], "more than 0"),
    (["ask", "q", "-c", "book.txt", "--root", "openai:unpriced", "--budget-usd", "1"], "price"),
    (["ask", "q", "-c", "book.txt", "--root", "openai:m", "--price", "cheap"], "--price"),
    (["ask", "q", "-c", "book.txt", "--root", "openai:m", "--base-url", "not a url"], "not a url"),
    (
        ["ask", "q", "-c", "book.txt", "--root", "openai:m", "--output-schema", "missing.json"],
        "missing.json",
    ),
    (
        ["ask", "q", "-c", "book.txt", "--root", "openai:m", "--output-schema", "book.txt"],
        "not JSON",
    ),
    (
        ["ask", "q", "-c", "book.txt", "--root", "openai:m", "--output-schema", "bad_schema.json"],
        "schema",
    ),
    (["ask", "q", "-c", "book.txt", "--root", "openai:m", "--tools", "missing.py"], "missing.py"),
    (["ask", "q", "-c", "book.txt", "--root", "openai:m", "--tools", "broken.py"], "broken.py"),
    (
        ["ask", "q", "-c", "book.txt", "--root", "openai:m", "--system-prompt", "missing.md"],
        "missing.md",
    ),
    (["ask", "q", "-c", "book.txt", "--root", "openai:m", "--log", "book.txt/x"], "book.txt"),
    (["serve"], "--root"),
    (["serve", "--model", "nonsense"], "NAME=ROOT"),
    (["serve", "--root", "openai:m", "--host", "0.0.0.0"], "--api-key-file"),
    (["serve", "--root", "openai:m", "--api-key-file", "empty.txt"], "holds no key"),
    (["serve", "--root", "openai:m", "--host", "192.0.2.1", "--allow-no-key"], "192.0.2.1"),
    (["serve", "--root", "openai:m", "--budget-usd", "1"], "price"),
    (["view", "nowhere"], "nowhere"),
    (["view"], "No run"),
    (["replay", "nowhere"], "nowhere"),
    (["tasks", "nonsense"], "nonsense"),
    (["eval", "--task", "nonsense", "--root", "openai:m"], "nonsense"),
]


@pytest.mark.parametrize(("args", "words"), BAD_USE, ids=[" ".join(a) for a, _ in BAD_USE])
def test_bad_use_is_one_line_and_2(rlm, book, tmp_path, args, words):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)) * 50)
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "bad_schema.json").write_text('{"type": "integr"}')
    code, out, err = rlm(*args, env={"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"})
    assert (code, out) == (2, ""), err
    complaint = err.splitlines()[-1]
    assert words in complaint and "rlm" in complaint.split(":")[0], err
    assert "usage:" in err or len(err.splitlines()) == 1, err


def test_an_endpoint_that_fails_is_4(rlm, book):
    with FakeServer("x", api_key="right") as server:
        code, out, err = rlm.ask(server, "What?", "-c", book)
        assert (code, out) == (4, "")
        one_line(err, "openai:fake", "key")
        assert "sk-test" not in err
    with FakeServer(Fail(404, "The model `fake` does not exist", "model_not_found")) as server:
        code, _, err = rlm.ask(server, "What?", "-c", book)
        assert code == 4 and one_line(err, "does not exist")
    code, _, err = rlm.ask("http://127.0.0.1:9/v1", "What?", "-c", book, "--set", "turns=1")
    assert code == 4 and one_line(err, "127.0.0.1:9")


def trajectory_in(text):
    return Path(re.search(r"(?:Trajectory: |rlm view )(\S+)", text).group(1))


def test_an_endpoint_that_dies_in_the_middle_keeps_the_trajectory(rlm, book):
    with FakeServer([cell("print('first turn')"), Fail(400, "it broke")]) as server:
        code, out, err = rlm.ask(server, "What?", "-c", book)
    assert (code, out) == (4, "") and one_line(err, "it broke")
    events = [
        json.loads(line) for line in (trajectory_in(err) / "events.jsonl").read_text().splitlines()
    ]
    assert events[-1]["type"] == "run_end" and events[-1]["stop_reason"] == "error"
    assert any("first turn" in json.dumps(e) for e in events)


def test_an_endpoint_that_dies_after_an_answer_in_the_making_gives_it(rlm, book):
    with FakeServer([cell("answer['content'] = 'so far'"), Fail(400, "it broke")]) as server:
        code, out, err = rlm.ask(server, "What?", "-c", book)
    assert (code, out) == (4, "so far\n") and one_line(err, "partial", "it broke")


def test_a_limit_gives_the_best_answer_and_3(rlm, book):
    with FakeServer([cell("print(1)"), "The best I have is 4217."]) as server:
        code, out, err = rlm.ask(server, "What?", "-c", book, "--budget-turns", "1")
    assert code == 3 and "4217" in out and one_line(err, "partial", "turns")


def test_a_schema_that_cannot_be_met_is_3(rlm, book, tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "integer", "minimum": 5, "maximum": 3}')
    with FakeServer(done("4")) as server:
        code, out, err = rlm.ask(
            server, "What?", "-c", book, "--output-schema", "schema.json", "--budget-turns", "3"
        )
    assert (code, out) == (3, "") and one_line(err, "no answer", "minimum")


@pytest.mark.parametrize("command", ["ask", "sandbox"])
def test_a_missing_layer_is_5(command, book, monkeypatch, capsys):
    """In this process, whose machine is told to need a layer that there is not."""
    from rlm_runtime.cli import main
    from rlm_runtime.repl import sandbox
    from rlm_runtime.repl.local import LocalEnvironment

    monkeypatch.setitem(sandbox.LAYERS, "vault", "a door of steel")
    monkeypatch.setattr(LocalEnvironment, "required", (*LocalEnvironment.required, "vault"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    ask = ["ask", "What?", "-c", str(book), "--root", "openai:fake", "--no-log", "-q"]
    with FakeServer(done("'x'")) as server:
        args = [*ask, "--base-url", server.url] if command == "ask" else ["sandbox"]
        assert main(args) == 5
        assert one_line(capsys.readouterr().err, "vault") and server.count == 0
        assert main([*args, "--allow-missing", "vault"]) == 0
        assert main([*args, "--allow-missing", "valt"]) == 2


def test_a_home_that_cannot_be_written_costs_the_trajectory_not_the_run(rlm, book):
    with FakeServer(done("'fine'")) as server:
        code, out, err = rlm.ask(server, "What?", "-c", book, env={"HOME": "/proc/nothing"})
    assert (code, out) == (0, "fine\n") and "no trajectory is kept" in err


# ---- being stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_what_there_is(rlm, book, number):
    asked = threading.Event()
    replies = iter([cell("answer['content'] = 'half of it'"), None])

    def reply(body):
        text = next(replies)
        if text is None:
            asked.set()
            return Hang()
        return Say(text)

    with FakeServer(reply) as server:
        process = rlm.start(
            "ask", "What?", "-c", book, "--root", "openai:fake", "--base-url", server.url
        )
        try:
            assert asked.wait(30)
            process.send_signal(number)
            out, err = process.communicate(timeout=40)
        finally:
            process.kill()
    assert (process.returncode, out) == (130, "half of it\n") and "cancelled" in err
    assert (
        json.loads((trajectory_in(err) / "events.jsonl").read_text().splitlines()[-1])[
            "stop_reason"
        ]
        == "cancelled"
    )


def test_a_reader_that_has_seen_enough_is_no_error(rlm, book):
    with FakeServer(done("'x' * 10_000_000")) as server:
        process = rlm.start(
            "ask", "What?", "-c", book, "--root", "openai:fake", "--base-url", server.url, "-q"
        )
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
        process.stderr.close()


# ---- the other commands


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The home, and the folder of a run in it, of two turns and two sub-calls."""
    home = tmp_path_factory.mktemp("home")
    (home / "book.txt").write_text(TEXT)
    script = [cell("replies = llm_batch(['one', 'two'])\nprint(replies)"), done("context[:9]")]
    turns = iter(script)

    def reply(body):
        return "sub reply" if body["messages"][-1]["content"] in ("one", "two") else next(turns)

    with FakeServer(reply) as server:
        code, out, err = Command(home).ask(server, "What?", "-c", home / "book.txt")
    assert (code, out) == (0, "The magic\n"), err
    return Command(home), trajectory_in(err)


def test_replay_finds_a_run_equal_and_a_changed_one_not(recorded, tmp_path):
    rlm, folder = recorded
    code, out, _ = rlm("replay", folder)
    assert code == 0 and "all the same" in out
    changed = tmp_path / "changed"
    changed.mkdir()
    text = (folder / "events.jsonl").read_text()
    (changed / "events.jsonl").write_text(
        text.replace("'sub reply', 'sub reply'", "'sub reply', 'sub REPLY'")
    )
    code, out, _ = rlm("replay", changed)
    assert code == 1 and "turn 1" in out and "sub REPLY" in out
    code, out, _ = rlm("replay", changed, "--json")
    assert code == 1 and len(json.loads(out)["differences"]) == 1


def test_view_exports_one_file(recorded, tmp_path):
    rlm, folder = recorded
    code, out, _ = rlm("view", folder, "--export", tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    assert code == 0 and out.strip() == str(tmp_path / "run.html") and "sub reply" in page


def test_view_serves_the_default_folder(recorded):
    rlm, _ = recorded
    with serving(rlm, "view", "--port", "0") as (url, process):
        import urllib.request

        with urllib.request.urlopen(url, timeout=20) as page:
            assert b"<html" in page.read().lower()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


@contextlib.contextmanager
def serving(rlm, *args, env=None):
    """The address a command says it serves at, and its process."""
    process = rlm.start(*args, env=env, stdout=subprocess.DEVNULL)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        for line in process.stderr:
            if found := re.search(r"http://\S+", line):
                break
        else:
            raise AssertionError("it served nothing")
        yield found.group(0), process
    finally:
        watchdog.cancel()
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()
        process.stderr.close()


def test_sandbox_says_what_is_active(rlm):
    code, out, _ = rlm("sandbox")
    assert code in (0, 5) and "seccomp" in out and "landlock" in out
    code_json, out, _ = rlm("sandbox", "--json")
    report = json.loads(out)
    assert (
        code_json == code
        and report["environment"] == "local"
        and bool(report["missing"]) == (code == 5)
    )


def test_tasks_lists_and_writes_a_sample(rlm, tmp_path):
    code, out, _ = rlm("tasks")
    assert code == 0 and "s_niah" in out and "oolong" in out
    code, out, _ = rlm("tasks", "s_niah", "--length", "2k", "--seed", "3", "--out", "sample")
    assert code == 0
    files = {p.name for p in (tmp_path / "sample").iterdir()}
    sample = json.loads((tmp_path / "sample" / "example.json").read_text())
    assert sample["question"] and sample["answer"] and Path(sample["context"]).name in files
    code, again, _ = rlm("tasks", "s_niah", "--length", "2k", "--seed", "3")
    assert code == 0 and json.loads(again)["answer"] == sample["answer"]


def test_eval_scores_by_length_and_goes_on(rlm, tmp_path):
    needle = re.compile(r"is: (\d+)")

    def reply(body):
        text = body["messages"][-1]["content"]
        if "special magic" in text and needle.search(text):
            return Say(needle.search(text).group(1))  # base: the whole text is in the prompt
        return Say(done("__import__('re').search(r'is: (\\d+)', str(context)).group(1)"))

    args = (
        "eval",
        "--task",
        "s_niah",
        "--lengths",
        "1k,2k",
        "--modes",
        "base,rlm",
        "--samples",
        "2",
        "--out",
        "out",
    )
    with FakeServer(reply) as server:
        model = ("--root", "openai:fake", "--base-url", server.url)
        code, out, err = rlm(*args, *model)
        assert code == 0, err
        assert "s_niah" in out and "base" in out and "rlm" in out
        asked = server.count
        assert asked >= 8
        code, _, _ = rlm(*args, *model)
        assert code == 0 and server.count == asked, "a second time nothing is left to do"


def test_serve_answers_the_official_client_and_stops_cleanly(rlm, tmp_path):
    openai = pytest.importorskip(
        "openai", reason="openai is not installed (it is in the extra dev)"
    )
    (tmp_path / "keys.txt").write_text("# clients\nclient-key\n")
    find = done("context[context.find('number is ') + 10:][:4]")
    with (
        FakeServer(find) as server,
        serving(
            rlm,
            "serve",
            "--root",
            "openai:fake",
            "--base-url",
            server.url,
            "--port",
            "0",
            "--api-key-file",
            "keys.txt",
            "--log",
            "runs",
        ) as (url, process),
    ):
        client = openai.OpenAI(base_url=url, api_key="client-key", max_retries=0)
        file = client.files.create(file=("book.txt", TEXT.encode()), purpose="user_data")
        part = {"type": "file", "file": {"file_id": file.id}}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "Which number?"}]}]
        raw = client.chat.completions.with_raw_response.create(model="rlm", messages=messages)
        reply = raw.parse()
        assert reply.choices[0].message.content == "4217" and reply.usage.total_tokens > 0
        assert (
            next((tmp_path / "runs").glob(f"*{raw.headers['x-rlm-run']}")) / "events.jsonl"
        ).is_file()
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="other", max_retries=0).models.list()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        log = process.stderr.read()
    assert "client-key" not in log and "sk-test" not in log and "Which number" not in log
    assert children_of(process.pid) == []


def test_serve_that_is_stopped_in_the_middle_of_a_run_leaves_nothing(rlm):
    asked = threading.Event()

    def reply(body):
        asked.set()
        return Hang()

    with (
        FakeServer(reply) as server,
        serving(
            rlm,
            "serve",
            "--root",
            "openai:fake",
            "--base-url",
            server.url,
            "--port",
            "0",
            "--drain-seconds",
            "0.2",
        ) as (url, process),
    ):
        host, port = re.search(r"//([^:/]+):(\d+)", url).groups()
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        body = {"model": "rlm", "messages": [{"role": "user", "content": "what?"}]}
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        assert asked.wait(30)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        process.send_signal(signal.SIGTERM)
        assert connection.getresponse().status == 503
        connection.close()
        assert process.wait(30) == 0
        gone, left = psutil.wait_procs(workers, timeout=10)
        assert left == [] and len(gone) == len(workers)


def children_of(pid):
    return [p for p in psutil.process_iter(["ppid"]) if p.info["ppid"] == pid]


def test_help_teaches(rlm):
    for args in ([], ["ask"], ["serve"], ["view"], ["replay"], ["eval"], ["tasks"], ["sandbox"]):
        code, out, _ = rlm(*args, "--help")
        assert code == 0 and "exit codes:" in out
        assert args == ["sandbox"] or f"rlm {args[0] if args else 'ask'}" in out
    assert rlm()[0] == 2
    assert rlm("--version")[0] == 0


def test_help_is_quick():
    """What `--help` loads: neither models nor a web framework nor a REPL."""
    code = (
        "import sys, rlm_runtime.cli as c\nc.parser().format_help()\n"
        "print([m for m in ('pydantic', 'starlette', 'rich', 'numpy', 'jax', 'asyncio') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_values():
    from rlm_runtime.cli.values import number

    assert [number(t) for t in ("8k", "1.5M", "2GiB", "0.25", "1_000", "64 KiB", "3e2")] == [
        8000,
        1_500_000,
        2 << 30,
        0.25,
        1000,
        65536,
        300,
    ]
    for bad in ("", "k", "-1", "1x", "nan", "inf", "1..2"):
        with pytest.raises(ValueError):
            number(bad)


def test_the_live_screen_shows_turns_calls_and_costs():
    """Its parts, on a console that records; the events of a real run come in `recorded`."""
    from rich.console import Console

    from rlm_runtime.live import Screen
    from rlm_runtime.lms.base import Message, Usage
    from rlm_runtime.repl.base import CellResult
    from rlm_runtime.trajectory import CellEnd, CellStart, NodeEnd, NodeStart, Replied, RunStart

    console = Console(record=True, width=90, force_terminal=True, file=open(os.devnull, "w"))  # noqa: SIM115
    usage = Usage(calls=1, input_tokens=1500, output_tokens=20, cost_usd=0.5)
    with Screen(console) as screen:
        screen(RunStart(run="r", started_at="", root="m", budget={"usd": 1.0}))
        screen(Replied(turn=1, message=Message(role="assistant"), usage=usage, seconds=1.25))
        screen(CellStart(turn=1, cell=1, code="for x in range(3):\n    print(x)\x1b[2J"))
        for k in range(4):
            screen(NodeStart(node=f"0.{k}", parent="0", kind="lm"))
        screen(NodeEnd(node="0.1"))
        screen(NodeEnd(node="0.2", error="no"))
        console.print(screen)
        screen(CellEnd(turn=1, cell=1, result=CellResult(status="ok", stdout="0\n1\n\x1b[31m2")))
    shown = console.export_text()
    for words in (
        "turn 1",
        "1.5k in",
        "for x in range(3):",
        "2/4",
        "2 running",
        "1 failed",
        "$0.5000",
        "usd 50% used",
        "│ 0",
    ):
        assert words in shown, shown
    assert "\x1b[2J" not in shown


def test_progress_that_nobody_reads_does_not_stop_a_run(rlm, book):
    with FakeServer([cell("print(1)")] * 3 + [done("'fine'")]) as server:
        process = rlm.start(
            "ask", "What?", "-c", book, "--root", "openai:fake", "--base-url", server.url
        )
        process.stderr.close()
        began = time.monotonic()
        out = process.stdout.read()
        assert process.wait(60) == 0 and out == "fine\n" and time.monotonic() - began < 60
        process.stdout.close()
