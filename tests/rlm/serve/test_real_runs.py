"""The server over real RLMs: real workers, scripted models."""

import asyncio
import socket
import threading

import openai
import psutil
import pytest

from rlm.serve.support import running
from rlm_runtime.budget import Budget
from rlm_runtime.lms.scripted import ScriptedLM
from rlm_runtime.serve import ServedModel


def cell(code):
    return f"```repl\n{code}\n```"


def done(expression):
    return cell(f"answer['content'] = {expression}\nanswer['ready'] = True")


def served(script, sub=lambda messages: "sub reply", **options):
    return ServedModel(
        "rlm",
        ScriptedLM(script, repeat_last=True, name="root"),
        ScriptedLM(sub, name="sub"),
        **options,
    )


def client(server):
    return openai.OpenAI(
        base_url=server.url, api_key="none", max_retries=0, _strict_response_validation=True
    )


def workers():
    return [
        p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE
    ]


def test_a_long_upload_is_searched_by_code_and_sub_calls_are_counted(tmp_path):
    text = "filler line\n" * 200_000 + "The magic number is 4217.\n" + "filler line\n" * 200_000
    script = [
        cell("at = context.find('magic')\nprint(len(context), llm_batch(['a', 'b', 'c']))"),
        done("context[at + 16:at + 20]"),
    ]
    with running(served(script), log_dir=tmp_path) as server:
        c = client(server)
        file = c.files.create(file=("book.txt", text.encode()), purpose="user_data")
        part = {"type": "file", "file": {"file_id": file.id}}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "Which number?"}]}]
        raw = c.chat.completions.with_raw_response.create(model="rlm", messages=messages)
        reply = raw.parse()
        assert reply.choices[0].message.content == "4217"
        report = reply.model_extra["rlm"]
        assert (report["turns"], report["sub_calls"], report["calls"]) == (2, 3, 5)
        assert report["usage_by_depth"]["1"]["calls"] == 3
        assert len(list(tmp_path.glob(f"*{raw.headers['x-rlm-run']}/events.jsonl"))) == 1
    assert workers() == []


def test_progress_of_a_real_run_is_streamed():
    with running(served([cell("print('looking')"), done("'found'")])) as server:
        messages = [{"role": "user", "content": "what?"}]
        chunks = list(
            client(server).chat.completions.create(model="rlm", messages=messages, stream=True)
        )
    notes = [
        c.model_extra["rlm"]["progress"] for c in chunks[:-1] if "rlm" in (c.model_extra or {})
    ]
    assert [n["event"] for n in notes] == ["turn", "cell", "output", "turn", "cell", "output"]
    assert notes[2]["text"].strip() == "looking" and chunks[-1].choices[0].finish_reason == "stop"


def test_parameters_reach_the_root():
    model = served([done("{'n': 3}")])
    with running(model) as server:
        reply = client(server).chat.completions.create(
            model="rlm",
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "how many?"},
            ],
            temperature=0.25,
            seed=7,
            response_format={
                "type": "json_schema",
                "json_schema": {
                    "name": "n",
                    "schema": {
                        "type": "object",
                        "properties": {"n": {"type": "integer"}},
                        "required": ["n"],
                    },
                },
            },
        )
        assert reply.choices[0].message.content == '{"n": 3}'
        call = model.root.calls[0]
        assert (call.sampling.temperature, call.sampling.seed) == (0.25, 7)
        assert "Be brief.\n\nhow many?" in call.text
        with pytest.raises(openai.BadRequestError):
            client(server).chat.completions.create(
                model="rlm",
                messages=[{"role": "user", "content": "x"}],
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "integr"}},
                },
            )


def test_the_servers_budget_ends_a_run_with_a_partial_answer():
    with running(served([cell("print(1)"), "The best so far."], budget=Budget(turns=1))) as server:
        reply = client(server).chat.completions.create(
            model="rlm", messages=[{"role": "user", "content": "what?"}]
        )
    assert (
        reply.choices[0].finish_reason == "length"
        and reply.model_extra["rlm"]["stop_reason"] == "turns"
    )
    assert "best so far" in reply.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["root", "sub", "cell"])
def test_a_client_that_goes_away_leaves_no_worker(stream, where):
    reached = threading.Event()

    async def hang(messages):
        reached.set()
        await asyncio.Event().wait()

    code = {"root": hang, "sub": [cell("llm_query('x')")], "cell": [cell("while True: pass")]}[
        where
    ]
    model = served(code, sub=hang)
    with running(model, max_runs=1) as server:
        connection = server.open_chat(stream=stream)
        if where == "cell":
            server.wait_metric("rlm_num_requests_running", 1)
            wait_for(lambda: model.root.count == 1 and workers())
        else:
            assert reached.wait(30)
        assert workers(), "there is a worker"
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        server.wait_metric("rlm_num_requests_running", 0)
        assert workers() == []
        if where != "cell":
            lm = model.root if where == "root" else model.sub
            assert lm.cancelled == 1 and lm.active == 0


def wait_for(condition):
    tick = threading.Event()
    for _ in range(1000):
        if condition():
            return
        tick.wait(0.02)
    raise AssertionError("it did not happen")
