"""What a run shares with the world outside: own models, MCP tools, traces, progress, events as they
happen."""

import asyncio
import contextlib
import subprocess
import sys
import threading
import time

import pytest

from rlm.fake_environment import FakeEnvironment
from rlm.loop_helpers import cell, done, rlm
from rlm_runtime import RLM, FunctionLM, MCPTools, Message, Reply, Sampling, Usage, UsageError
from rlm_runtime.errors import LMError, RlmError
from rlm_runtime.lms.base import LM, ToolSpec
from rlm_runtime.lms.scripted import ScriptedLM
from rlm_runtime.trajectory import CellEnd, Replied, RunEnd, RunStart

ASK = done("llm_query('read')")
FAIL = cell("1 / 0")
USER = [Message(role="user", content="one two")]


def ask(lm, messages=USER, **call):
    return asyncio.run(lm.complete(messages, **call))


# A function as a model


def completion(text="hello", **more):
    choice = {"message": {"content": text, **more}, "finish_reason": "stop"}
    return {
        "model": "m-1",
        "choices": [choice],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2},
    }


class Dumped:
    def model_dump(self):
        return completion()


async def awaited(messages, **options):
    return completion()


FORMS = [
    lambda m: "hello",
    lambda m: completion(),
    lambda m: Dumped(),
    awaited,
    lambda m: awaited(m),
    lambda m: Reply(text="hello"),
]


@pytest.mark.parametrize(
    "function", FORMS, ids=["text", "mapping", "object", "async", "awaitable", "reply"]
)
def test_a_function_is_a_model(function):
    lm = FunctionLM(function, price=(1.0, 2.0))
    assert isinstance(lm, LM)
    reply = ask(lm)
    assert reply.text == "hello" and reply.usage.calls == 1 and reply.usage.input_tokens >= 7
    assert reply.usage.cost_usd == pytest.approx(
        (reply.usage.input_tokens + 2 * reply.usage.output_tokens) / 1e6
    )
    result = RLM(ScriptedLM([ASK]), lm, environment=FakeEnvironment).completion("x", "?")
    assert result.answer == "hello" and result.stop_reason == "answered"


def test_a_function_is_given_what_a_call_asks_for():
    seen = {}

    def function(messages, **options):
        seen.update(options, messages=messages)
        return completion(
            None, tool_calls=[{"id": "x", "function": {"name": "f", "arguments": "{}"}}]
        )

    pieces = []
    reply = ask(
        FunctionLM(function, name="mine:m", window=99, api_base="http://h"),
        on_text=pieces.append,
        sampling=Sampling(temperature=0.5, stop=("END",), extra={"top_k": 3}),
        tools=[ToolSpec(name="f")],
        schema={"type": "object"},
    )
    assert (
        seen["messages"] == [{"role": "user", "content": "one two"}]
        and seen["api_base"] == "http://h"
    )
    assert (
        seen["temperature"] == 0.5
        and seen["stop"] == ["END"]
        and seen["top_k"] == 3
        and "seed" not in seen
    )
    assert (
        seen["tools"][0]["function"]["name"] == "f"
        and seen["response_format"]["type"] == "json_schema"
    )
    assert reply.tool_calls[0].name == "f" and reply.finish_reason == "tool_calls" and pieces == []


@pytest.mark.parametrize("made", [None, 3, {}, {"choices": []}, {"error": {"message": "no"}}])
def test_what_is_no_reply_is_an_error_of_the_model(made):
    with pytest.raises(LMError, match=r"function:.*the function"):
        ask(FunctionLM(lambda m: made))
    with pytest.raises(UsageError, match="function of messages"):
        FunctionLM("openai:m")


# MCP


SERVER = '''
import os
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("test")


@server.tool()
def add(a: int, b: int = 1) -> int:
    """Adds two numbers."""
    return a + b


@server.tool()
def who(name: str) -> str:
    """Says who."""
    return f"{name} of {os.environ.get('OPENAI_API_KEY', 'nobody')}"


@server.tool()
def fail() -> str:
    """Fails."""
    raise ToolError("the disk is full")


server.run("stdio")
'''


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    return [sys.executable, str(path)]


def test_tools_of_an_mcp_server_in_cells_and_for_sub_models(server):
    with MCPTools(server) as tools:
        assert [t.name for t in tools] == ["add", "who", "fail"]
        assert tools[0].info().description == "def add(a: int, b: int = 1)\nAdds two numbers."
        assert tools[0].spec().parameters["properties"].keys() == {"a", "b"}
        code = "try:\n    bad = fail()\nexcept Exception as e:\n    bad = str(e)\n"
        root = cell(
            code + "answer.update(content=[add(2), add(b=5, a=1), who('x'), bad], ready=True)"
        )
        result = rlm([root], tools=tools).completion("x", "?")
        three, six, who, bad = result.answer
        assert (three, six, who) == (
            3,
            6,
            "x of nobody",
        ) and "the disk is full" in bad  # the key stayed here

        async def both():
            runs = [rlm([done("add(40, 2)")], tools=tools).acompletion("x", "?") for _ in range(3)]
            return [r.answer for r in await asyncio.gather(*runs)]

        assert asyncio.run(both()) == [42, 42, 42]
    assert not [t for t in threading.enumerate() if t.name == "rlm-mcp"]
    with pytest.raises(RlmError, match="closed"):
        asyncio.run(tools[0].call((1,)))


def test_an_mcp_server_in_async_code_with_names_of_its_own(server):
    async def main():
        config = {"command": server[0], "args": server[1:]}
        async with MCPTools(config, names=["add"], prefix="math_") as tools:
            return [t.name for t in tools], await tools[0].call_named({"a": 1})

    assert asyncio.run(main()) == (["math_add"], 2)


def test_an_mcp_server_that_cannot_be(server, monkeypatch):
    with pytest.raises(UsageError, match="no tool 'ad'; it has add, who, fail"):
        MCPTools(server, names=["ad"]).__enter__()
    with pytest.raises(UsageError, match="no-such-command"):
        MCPTools(["no-such-command", "--token", "secret-1"]).__enter__()
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(UsageError, match=r"\.\[mcp\]"):
        MCPTools(server)


def test_signatures_of_odd_schemas():
    from rlm_runtime.mcp import _identifier, _signature

    schema = {
        "properties": {
            "from": {},
            "x-y": {},
            "q": {"type": ["string", "null"]},
            "n": {"type": "integer"},
        },
        "required": ["n"],
    }
    assert str(_signature(schema)) == "(n: int, q: Any = None, **more)"
    assert (
        str(_signature({})) == "()"
        and _identifier("a.b-c") == "a_b_c"
        and _identifier("1x") == "tool_1x"
    )


# Traces


@pytest.fixture
def spans():
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    provider, memory = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    return provider, memory


def named(memory):
    return {s.name: s for s in memory.get_finished_spans()}


def test_a_run_is_a_trace(spans):
    from rlm_runtime.otel import OTelExporter

    provider, memory = spans
    sub = ScriptedLM(["forty-two"], name="openai:small")
    root = ScriptedLM([FAIL, ASK], name="openai:big")
    with provider.get_tracer("app").start_as_current_span("mine") as mine:
        model = RLM(root, sub, environment=FakeEnvironment, on_event=OTelExporter(provider))
        assert model.completion("a secret context", "?").answer == "forty-two"
    found = memory.get_finished_spans()
    by_name = named(memory)
    assert sorted(s.name for s in found) == sorted(
        [
            "mine",
            "rlm.run",
            "chat openai:big",
            "chat openai:big",
            "rlm.cell",
            "rlm.cell",
            "chat openai:small",
        ]
    )
    run = by_name["rlm.run"]
    assert run.parent.span_id == mine.get_span_context().span_id
    assert {s.context.trace_id for s in found} == {run.context.trace_id}
    assert all(
        s.parent.span_id == run.context.span_id for s in found if s.name not in ("mine", "rlm.run")
    )
    call = by_name["chat openai:small"]
    assert (
        call.attributes["gen_ai.request.model"] == "small"
        and call.attributes["gen_ai.provider.name"] == "openai"
    )
    assert (
        call.attributes["gen_ai.usage.output_tokens"] == 3
        and run.attributes["rlm.stop_reason"] == "answered"
    )
    assert all(
        run.start_time <= s.start_time <= s.end_time <= run.end_time
        for s in found
        if s.name != "mine"
    )
    failed = [
        s
        for s in found
        if s.name == "rlm.cell" and not s.status.is_ok and s.attributes.get("error.type")
    ]
    assert [s.attributes["error.type"] for s in failed] == ["error"]
    assert "secret" not in str([dict(s.attributes) for s in found]) and "forty-two" not in str(
        [dict(s.attributes) for s in found]
    )


def test_traces_with_content_of_runs_at_once_do_not_mix(spans):
    from rlm_runtime.otel import OTelExporter

    provider, memory = spans
    exporter = OTelExporter(provider, content=True)

    async def main():
        subs = [ScriptedLM([f"answer {i}"], latency=0.01, name=f"sub-{i}") for i in range(5)]
        models = [
            RLM(ScriptedLM([ASK]), s, environment=FakeEnvironment, on_event=exporter) for s in subs
        ]
        await asyncio.gather(*(m.acompletion("x", "?") for m in models))

    asyncio.run(main())
    found = memory.get_finished_spans()
    runs = {s.context.trace_id: s for s in found if s.name == "rlm.run"}
    assert len(runs) == 5
    for span in found:
        if span.name.startswith("chat sub-"):
            assert span.attributes["rlm.value"] == "answer " + span.name[-1]
            assert (
                runs[span.context.trace_id].attributes["rlm.answer"] == span.attributes["rlm.value"]
            )


def test_a_run_that_is_cancelled_leaves_no_span_open(spans):
    from rlm_runtime.otel import OTelExporter

    provider, memory = spans

    async def main():
        sub = ScriptedLM(["never"], latency=30)
        run = RLM(
            ScriptedLM([ASK]), sub, environment=FakeEnvironment, on_event=OTelExporter(provider)
        ).start("x", "?")
        async for event in run.events():
            if event.type == "node_start":
                run.cancel()
        await run.result()

    asyncio.run(main())
    run = named(memory)["rlm.run"]
    assert run.attributes["rlm.stop_reason"] == "cancelled" and "chat scripted" in named(memory)


# Progress


def test_verbose_shows_turns_on_standard_error(capsys):
    rlm([ASK], verbose=True).completion("x", "?")
    shown = capsys.readouterr()
    assert "turn 1:" in shown.err and "llm_query('read')" in shown.err and shown.out == ""
    rlm([ASK]).completion("x", "?")
    assert capsys.readouterr().err == ""


def test_verbose_and_on_event_go_together_and_one_that_fails_leaves_the_other(capsys):
    def broken(event):
        raise ValueError("no")

    with pytest.warns(UserWarning, match="not called again"):
        assert rlm([ASK], verbose=True, on_event=broken).completion("x", "?").answer == "READ"
    assert "turn 1:" in capsys.readouterr().err
    with pytest.raises(UsageError, match="on_event"):
        rlm([ASK], on_event=3)


# Events as they happen


def test_events_come_as_they_happen_and_end_with_the_answer():
    async def main():
        sub = ScriptedLM(["slow"], latency=0.2)
        seen, times = [], {}
        async for event in RLM(ScriptedLM([FAIL, ASK]), sub, environment=FakeEnvironment).stream(
            "x", "?"
        ):
            seen.append(event)
            times.setdefault(event.type, time.monotonic())
        assert (
            isinstance(seen[0], RunStart)
            and isinstance(seen[-1], RunEnd)
            and seen[-1].answer == "slow"
        )
        assert (
            sum(isinstance(e, Replied) for e in seen) == 2
            and sum(isinstance(e, CellEnd) for e in seen) == 2
        )
        assert times["run_end"] - times["node_start"] >= 0.2
        assert [e.t for e in seen] == sorted(e.t for e in seen)

    asyncio.run(main())


def test_leaving_the_loop_early_ends_the_run():
    async def main():
        sub = ScriptedLM(["never"], latency=30)
        model = RLM(ScriptedLM([ASK]), sub, environment=FakeEnvironment)
        async with contextlib.aclosing(model.stream("x", "?")) as events:
            async for event in events:
                if event.type == "node_start":
                    break
        assert sub.cancelled == 1 and len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_a_stream_raises_what_a_completion_raises():
    async def main():
        async for _ in RLM(ScriptedLM([]), environment=FakeEnvironment).stream("x", "?"):
            pass

    with pytest.raises(LMError, match="the script has 0 replies"):
        asyncio.run(main())


def test_breaking_off_the_events_of_a_run_does_not_end_it():
    async def main():
        run = RLM(ScriptedLM([ASK]), ScriptedLM(["x"]), environment=FakeEnvironment).start("x", "?")
        async for _ in run.events():
            break
        return await run.result()

    assert asyncio.run(main()).answer == "x"


def test_nothing_of_it_is_imported_before_it_is_used():
    code = (
        "import sys, rlm_runtime\nfrom rlm_runtime import RLM, FunctionLM, MCPTools\n"
        "RLM(FunctionLM(lambda m: 'x'))\n"
        "print([m for m in ('mcp', 'opentelemetry', 'genai_prices', 'jax', 'rich') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[]", run.stderr


def test_usage_of_a_function_that_counts_for_itself_is_kept():
    reply = Reply(text="x", usage=Usage(calls=1, input_tokens=5, output_tokens=6, cost_usd=0.5))
    assert ask(FunctionLM(lambda m: reply)).usage == reply.usage
