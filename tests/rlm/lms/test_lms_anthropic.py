"""AnthropicLM against a loopback server that speaks the Messages API."""

import asyncio
import json

import pytest
from rlm.fake_server import Cut, Fail, FakeServer, Hang, Raw, Say

from rlm_runtime.errors import LMError, UsageError
from rlm_runtime.lms import resolve
from rlm_runtime.lms.anthropic import AnthropicLM, turns
from rlm_runtime.lms.base import LM, Message, Sampling, ToolCall, ToolSpec

KEY = "sk-ant-0123456789abcdef"
HI = [Message(role="system", content="Be brief."), Message(role="user", content="hi")]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}
SEARCH = ToolSpec(name="search", description="finds", parameters={"type": "object"})
STREAMED = pytest.mark.parametrize(
    "stream", [False, True, None], ids=["whole", "streamed", "unwatched"]
)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in (
        "ANTHROPIC_API_KEY",
        "ANTHROPIC_BASE_URL",
        "RLM_PRICES",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)


def model(server, name="m", **options):
    return AnthropicLM(
        name,
        **{"base_url": server.origin, "api_key": KEY, "backoff": 0.001, "stream": False, **options},
    )


def ask(server, messages=HI, *, stream=False, lm=None, options=None, **call):
    pieces = []
    if stream is not False:
        options = {"stream": True, **(options or {})}
    reply = asyncio.run(
        (lm or model(server, **(options or {}))).complete(
            messages, on_text=pieces.append if stream else None, **call
        )
    )
    if stream:
        assert "".join(pieces) == reply.text
    return reply


def fails(server, kind, match=None, **more):
    with pytest.raises(LMError, match=match) as e:
        ask(server, **more)
    assert e.value.kind == kind and KEY not in str(e.value)
    return e.value


@STREAMED
def test_a_reply_with_cached_tokens_and_their_price(stream):
    usage = {
        "input_tokens": 10,
        "output_tokens": 7,
        "cache_read_input_tokens": 80,
        "cache_creation_input_tokens": 20,
    }
    with FakeServer(Say("hello wörld", usage=usage, reasoning="hm"), api_key=KEY) as server:
        reply = ask(server, stream=stream, options={"price": (4.0, 20.0, 0.4)})
    assert reply.text == "hello wörld" and reply.finish_reason == "stop"
    assert (
        reply.usage.input_tokens == 110
        and reply.usage.cached_tokens == 80
        and reply.usage.output_tokens == 7
    )
    assert reply.usage.cost_usd == pytest.approx((10 * 4 + 20 * 4 * 1.25 + 80 * 0.4 + 7 * 20) / 1e6)
    request = server.requests[0]
    assert request.path == "/v1/messages" and request.headers["anthropic-version"] == "2023-06-01"
    assert request.headers["x-api-key"] == KEY and "authorization" not in request.headers
    assert request.body["max_tokens"] == 8192


def test_the_stable_prefix_is_marked_for_caching():
    history = [*HI, Message(role="assistant", content="a"), Message(role="user", content="b")]

    def marks(body):
        return ["cache_control" in block for m in body["messages"] for block in m["content"]]

    with FakeServer("ok") as server:
        ask(server, history)
        ask(server, HI[1:])  # a lone message is not worth a cache entry
        ask(server, history, options={"cache": False})
    first, lone, off = (r.body for r in server.requests)
    assert first["system"] == [
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
    ]
    assert marks(first) == [False, False, True]
    assert marks(lone) == [False] and "system" not in lone
    assert not any(marks(off)) and "cache_control" not in off["system"][0]


@STREAMED
def test_tool_calls_there_and_back(stream):
    with FakeServer(
        Say("let me look", tool_calls=(("search", '{"q": "a b"}'), ("search", "{}")))
    ) as server:
        reply = ask(server, stream=stream, tools=[SEARCH])
        history = [
            *HI,
            Message(role="assistant", content=reply.text, tool_calls=reply.tool_calls),
            *[Message(role="tool", content="r", tool_call_id=c.id) for c in reply.tool_calls],
        ]
        ask(server, history, tools=[SEARCH])
    assert [c.arguments for c in reply.tool_calls] == [
        {"q": "a b"},
        {},
    ] and reply.finish_reason == "tool_calls"
    assert server.requests[0].body["tools"] == [
        {"name": "search", "description": "finds", "input_schema": {"type": "object"}}
    ]
    _, assistant, results = server.requests[1].body["messages"]
    assert [b["type"] for b in assistant["content"]] == ["text", "tool_use", "tool_use"]
    assert [b["tool_use_id"] for b in results["content"]] == ["toolu_0", "toolu_1"] and results[
        "role"
    ] == "user"


@STREAMED
def test_a_schema_is_a_tool_the_model_must_call(stream):
    with FakeServer(Say(None, tool_calls=(("reply", '{"n": 1}'),))) as server:
        reply = ask(server, stream=stream, schema=SCHEMA)
    assert (
        json.loads(reply.text) == {"n": 1}
        and reply.finish_reason == "stop"
        and not reply.tool_calls
    )
    body = server.requests[0].body
    assert body["tools"][0]["input_schema"] == SCHEMA and body["tool_choice"] == {
        "type": "tool",
        "name": "reply",
    }


def test_a_schema_that_is_no_object_is_asked_for_in_words():
    with FakeServer("[1]") as server:
        ask(server, schema={"type": "array"})
    assert '{"type": "array"}' in server.requests[0].body["messages"][-1]["content"][0]["text"]


def test_messages_in_the_order_the_api_wants():
    def say(role, content, **more):
        return Message(role=role, content=content, **more)

    call = ToolCall(id="c", name="f", arguments="not json")
    out = turns(
        [
            say("assistant", "first"),
            say("user", "a"),
            say("user", ""),
            say("assistant", "", tool_calls=(call,)),
            say("tool", "r", tool_call_id="c"),
            say("user", "b"),
            say("assistant", "begin \n"),
        ]
    )
    assert [m["role"] for m in out] == [
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    texts = [b["text"] for m in out for b in m["content"] if b["type"] == "text"]
    assert all(t.strip() for t in texts) and texts[-1] == "begin"
    assert turns([])[0]["role"] == "user"


@pytest.mark.parametrize(
    "sent, got", [("length", "length"), ("content_filter", "content_filter"), (None, "stop")]
)
@STREAMED
def test_finish_reasons(stream, sent, got):
    with FakeServer(Say("x", finish=sent)) as server:
        assert ask(server, stream=stream).finish_reason == got


def test_sampling():
    sampling = Sampling(temperature=0.5, max_tokens=5, seed=3, stop=("X", "\n"), extra={"top_k": 4})
    with FakeServer("ok") as server:
        ask(server, sampling=sampling)
    body = server.requests[0].body
    assert {
        "temperature": 0.5,
        "max_tokens": 5,
        "stop_sequences": ["X"],
        "top_k": 4,
    }.items() <= body.items()
    assert "seed" not in body


def test_temperature_and_top_p_together_are_refused_by_some_models():
    def reply(body):
        both = {"temperature", "top_p"} <= body.keys()
        return (
            Fail(400, "`temperature` and `top_p` cannot both be specified for this model.")
            if both
            else "ok"
        )

    with FakeServer(reply) as server:
        assert ask(server, sampling=Sampling(temperature=0.1, top_p=0.5)).text == "ok"
    assert server.count == 2 and "temperature" in server.requests[-1].body


@pytest.mark.parametrize("status", [429, 500, 529])
@STREAMED
def test_passing_failures_are_retried(status, stream):
    with FakeServer([Fail(status), "fine"]) as server:
        assert ask(server, stream=stream).text == "fine"


@pytest.mark.parametrize("status, kind", [(400, "bad_request"), (401, "auth"), (404, "not_found")])
def test_final_failures_are_not(status, kind):
    with FakeServer(Fail(status, "because")) as server:
        fails(server, kind, "because")
        assert server.count == 1


def test_a_prompt_too_long():
    with FakeServer(Fail(400, "prompt is too long: 210000 tokens > 200000 maximum")) as server:
        fails(server, "context_overflow", "210000")


def test_streams_that_break():
    overloaded = {"type": "overloaded_error", "message": "Overloaded"}
    with FakeServer([Cut(pieces=1, error=overloaded), Cut(pieces=1), "ok"]) as server:
        assert ask(server, stream=True).text == "ok"
    with FakeServer(Cut(pieces=4, error=overloaded)) as server:
        assert fails(server, "server", "Overloaded", stream=True).status == 529
        assert server.count == 1
    quiet = b'event: message_start\ndata: {"type": "message_start", "message": {}}\n\n'
    with FakeServer(Raw(quiet, "text/event-stream")) as server:
        fails(server, "connection", "ended before", stream=True, options={"max_retries": 0})


@STREAMED
def test_silence_and_nonsense(stream):
    with FakeServer(Hang()) as server:
        fails(server, "timeout", stream=stream, options={"timeout": 0.3})
    for raw in (b"<html>", b"{}", b'{"content": 1}', b"[]"):
        with FakeServer(Raw(raw)) as server:
            fails(server, "protocol", stream=stream)


def test_odd_shapes_never_raise_anything_else():
    for odd in (None, 1, "x", [], {}, [None], [{"type": "text", "text": 5}], True):
        block = {"type": "text", "text": odd, "id": odd, "name": odd, "input": odd}
        blocks = [odd, block, {**block, "type": "tool_use"}, {**block, "type": odd}]
        whole = {"content": blocks, "usage": odd, "stop_reason": "end_turn", "model": odd}
        with FakeServer(Raw(json.dumps(whole).encode())) as server:
            assert isinstance(ask(server).text, str)
        kinds = (
            "message_start",
            "content_block_start",
            "content_block_delta",
            "message_delta",
            "other",
            "message_stop",
        )
        fields = {"message": odd, "index": odd, "content_block": odd, "delta": odd, "usage": odd}
        events = "".join(
            f"event: {k}\ndata: {json.dumps({'type': k, **fields})}\n\n" for k in kinds
        )
        with FakeServer(Raw(events.encode(), "text/event-stream")) as server:
            assert isinstance(ask(server, stream=True).text, str)


def test_key_name_window_and_price(monkeypatch):
    with pytest.raises(UsageError, match="ANTHROPIC_API_KEY"):
        resolve("anthropic:claude-sonnet-4-5")
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    lm = resolve("anthropic:claude-sonnet-4-5-20250929")
    assert (
        isinstance(lm, LM) and lm.window == 200_000 and lm.price(100_000, 0) == pytest.approx(0.3)
    )
    assert KEY not in repr(lm)
