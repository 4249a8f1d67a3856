"""The command line's options for contexts, packages, tips and wrong usage, as a person meets
them."""

import json
import signal
import threading

import pytest

from rlm.fake_server import FakeServer, Hang, Say
from rlm.test_cli import Command, cell, done, one_line, trajectory_in

SUBCOMMANDS = ("ask", "serve", "view", "replay", "eval", "tasks", "sandbox")


@pytest.fixture
def rlm(tmp_path):
    return Command(tmp_path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "notes"
    root.mkdir()
    (root / "plain.txt").write_text("plain")
    (root / "old.txt").write_bytes(
        "Äpfel und Öl, Größe und Übermaß, für jeden Tag ein Stück\n".encode("latin-1") * 4
    )
    (root / "picture.png").write_bytes(b"\x89PNG\r\n\0")
    (root / "skip.log").write_text("log")
    (root / ".gitignore").write_text("*.log\n")
    return root


def system_and_task(server):
    messages = server.requests[0].body["messages"]
    return messages[0]["content"], messages[1]["content"]


# ---- files


def test_what_a_folder_leaves_out_is_told_to_the_user_and_to_the_root(rlm, folder):
    with FakeServer(done("sorted(context)")) as server:
        code, out, err = rlm.ask(server, "What?", "-c", folder, "--json")
        assert code == 0 and json.loads(out)["answer"] == [".gitignore", "plain.txt"]
        left = next(line for line in err.splitlines() if "left out" in line)
        assert (
            left.startswith("rlm: 2 of 4 files were left out")
            and "cp1252" in left
            and "a PNG image" in left
        )
        assert err.count("2 of 4 files") == 1 and "1 by .gitignore" in err
        assert "2 of 4 files were left out" in system_and_task(server)[1]


def test_encoding_include_exclude_and_no_gitignore(rlm, folder):
    show = done(
        "context[:5] if isinstance(context, str) else {name: len(context[name]) for name in context}"
    )
    with FakeServer(show) as server:

        def files(*args):
            code, out, err = rlm.ask(server, "What?", "-c", folder, "-q", "--json", *args)
            assert code == 0, err
            return json.loads(out)["answer"]

        assert "old.txt" in files("--encoding", "latin-1") and "picture.png" not in files(
            "--encoding", "latin-1"
        )
        assert set(files("--include", "*.txt")) == {"plain.txt"}
        assert set(files("--exclude", "*.txt", "--no-gitignore")) == {".gitignore", "skip.log"}
        code, out, _ = rlm.ask(
            server, "What?", "-c", folder / "old.txt", "-q", "--encoding", "latin-1", "--json"
        )
        assert code == 0 and json.loads(out)["answer"] == "Äpfel"
    code, out, err = rlm("ask", "q", "-c", folder / "old.txt", "--root", "openai:m")
    assert (code, out) == (2, "") and one_line(err, "--encoding cp1252", "a guess", "old.txt")
    code, out, err = rlm("ask", "q", "-c", folder, "--root", "openai:m", "--encoding", "klingon")
    assert (code, out) == (2, "") and one_line(err, "klingon")


# ---- a piped run


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_piped_run_can_be_replayed(rlm, encoding):
    text = "Die Größe ist 4217.\n" * 50
    with FakeServer([cell("print(len(context), context[:9])"), done("context[14:18]")]) as server:
        model = ("--root", "openai:fake", "--base-url", server.url)
        with rlm.start(
            "ask", "What?", *model, "--encoding", encoding, stdin=-1, text=False
        ) as process:
            out, err = process.communicate(text.encode(encoding), timeout=60)
    assert (process.returncode, out) == (0, b"4217\n"), err
    folder = trajectory_in(err.decode())
    (blob,) = (folder / "blobs").iterdir()
    assert blob.read_bytes() == text.encode(encoding)
    code, out, err = rlm("replay", folder)
    assert code == 0 and "all the same" in out, (out, err)


def test_a_pipe_that_is_too_long_to_keep_says_so(rlm, monkeypatch, capsys):
    import io
    import sys

    from rlm_runtime import context
    from rlm_runtime.cli import main

    monkeypatch.setattr(context, "HASH_LIMIT", 100)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"long text " * 100)))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with FakeServer(done("'x'")) as server:
        args = [
            "ask",
            "What?",
            "--root",
            "openai:m",
            "--base-url",
            server.url,
            "--log",
            str(rlm.home / "runs"),
            "-q",
        ]
        assert main(args) == 0
    assert "too long to be kept" in capsys.readouterr().err
    assert not list((rlm.home / "runs").glob("*/blobs/*"))


# ---- packages and tips


def test_packages_can_be_imported_and_the_prompt_names_them(rlm, folder):
    code = "import pathspec\nanswer['content'] = pathspec.__name__\nanswer['ready'] = True"
    with FakeServer([cell(code), done("'not importable'")]) as server:
        code, out, err = rlm.ask(
            server, "What?", "-c", folder, "--packages", "pathspec,charset-normalizer"
        )
        assert (code, out) == (0, "pathspec\n"), err
        system = system_and_task(server)[0]
        assert "these installed packages: pathspec, charset-normalizer; no others" in system
        assert rlm("replay", trajectory_in(err))[0] == 0
    with FakeServer([cell("import pathspec"), done("'no'")]) as server:
        assert rlm.ask(server, "What?", "-c", folder)[1] == "no\n"
        assert "installed packages:" not in system_and_task(server)[0]
    code, out, err = rlm(
        "ask", "q", "-c", folder, "--root", "openai:m", "--packages", "no-such-package"
    )
    assert (code, out) == (2, "") and one_line(err, "no-such-package", "not installed")


def test_tips_reach_the_task_and_not_the_system_prompt(rlm, folder, tmp_path):
    (tmp_path / "tips.txt").write_text("Count with Python, not by eye.\n")
    with FakeServer(done("'x'")) as server:
        assert rlm.ask(server, "What?", "-c", folder, "-q", "--no-log")[0] == 0
        plain = system_and_task(server)
    with FakeServer(done("'x'")) as server:
        code, _, err = rlm.ask(server, "What?", "-c", folder, "--tips", tmp_path / "tips.txt")
        tipped = system_and_task(server)
    assert code == 0 and tipped[0] == plain[0]
    added = "Tips from the user, for contexts of this kind:\nCount with Python, not by eye.\n\n"
    assert tipped[1].replace(added, "") == plain[1] and added in tipped[1]
    start = json.loads((trajectory_in(err) / "events.jsonl").read_text().splitlines()[0])
    assert start["settings"]["tips"] == "Count with Python, not by eye."
    code, _, err = rlm("ask", "q", "-c", folder, "--root", "openai:m", "--tips", "missing.txt")
    assert code == 2 and one_line(err, "--tips missing.txt")


# ---- Ctrl-C


def test_ctrl_c_prints_no_reply_as_an_answer(rlm, folder):
    """Neither code on its way nor prose: the root had not said that it was done."""
    for first in (cell("print(1)"), "I will now look at the files."):
        asked = threading.Event()
        replies = iter([first, None])

        def reply(body, replies=replies, asked=asked):
            text = next(replies)
            if text is None:
                asked.set()
                return Hang()
            return Say(text)

        with FakeServer(reply) as server:
            process = rlm.start(
                "ask", "What?", "-c", folder, "--root", "openai:fake", "--base-url", server.url
            )
            try:
                assert asked.wait(30)
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=40)
            finally:
                process.kill()
        assert (process.returncode, out) == (130, ""), out
        assert "no answer (cancelled)" in err


# ---- usage


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_wrong_usage_prints_the_usage_of_its_command(rlm, command):
    required = {"ask": ["q"], "replay": ["x"], "eval": ["--task", "s_niah"]}.get(command, [])
    code, out, err = rlm(command, *required, "--frobnicate")
    assert (code, out) == (2, "")
    assert (
        err.startswith(f"usage: rlm {command} ") and "unrecognized arguments: --frobnicate" in err
    )
    assert f"rlm {command} --help" in err


def test_a_value_that_is_wrong_prints_it_too(rlm, folder):
    code, out, err = rlm("ask", "q", "-c", folder, "--root", "openai:m", "--set", "turn=5")
    assert (
        (code, out) == (2, "")
        and err.startswith("usage: rlm ask ")
        and "Did you mean turns" in err.splitlines()[-1]
    )
    code, _, err = rlm("frobnicate")
    assert code == 2 and err.startswith("usage: rlm ") and "frobnicate" in err
