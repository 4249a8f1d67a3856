"""OpenAILM against a loopback server that behaves."""

import asyncio
import gc
import json
import logging
import subprocess
import sys
import threading
import warnings

import pytest
from rlm.fake_server import Fail, FakeServer, Raw, Say
from rlm.openai_client import HI, KEY, SCHEMA, SEARCH, STREAMED, ask, fails, model, no_environment  # noqa: F401

from rlm_runtime.errors import UsageError
from rlm_runtime.lms import resolve
from rlm_runtime.lms.base import LM, Message, Sampling, ToolCall
from rlm_runtime.lms.openai import OpenAILM, strict

# What a reply holds


@STREAMED
def test_a_reply_with_its_usage(stream):
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 60},
    }
    with FakeServer(Say("hello wörld", usage=usage), api_key=KEY) as server:
        reply = ask(server, stream=stream, options={"price": (2.0, 10.0, 0.5)})
    assert reply.text == "hello wörld" and reply.finish_reason == "stop" and reply.model == "m"
    assert reply.usage.model_dump() == {
        "calls": 1,
        "input_tokens": 100,
        "output_tokens": 7,
        "cached_tokens": 60,
        "estimated": False,
        "cost_usd": pytest.approx((40 * 2.0 + 60 * 0.5 + 7 * 10.0) / 1e6),
    }
    body = server.requests[0].body
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]
    assert (
        body.get("stream", False) == (stream is not False)
        and server.requests[0].path == "/v1/chat/completions"
    )


@STREAMED
@pytest.mark.parametrize(
    "usage", [False, {"prompt_tokens": "many"}, {"prompt_tokens": -1, "completion_tokens": 2}]
)
def test_usage_that_is_missing_or_nonsense_is_estimated_and_marked(stream, usage):
    with FakeServer(Say("x" * 300, usage=usage)) as server:
        lm = model(server)
        reply = ask(server, lm=lm, stream=stream)
    assert reply.usage.estimated and reply.usage.input_tokens == lm.count_tokens(HI)
    assert reply.usage.output_tokens in (100, 2)
    assert (reply.usage + reply.usage).estimated


@STREAMED
def test_tool_calls(stream):
    calls = (("search", '{"q": "a b"}'), ("search", "{not json"))
    with FakeServer(Say(None, tool_calls=calls)) as server:
        reply = ask(server, stream=stream, tools=[SEARCH])
    assert [c.arguments for c in reply.tool_calls] == [{"q": "a b"}, "{not json"]
    assert [c.name for c in reply.tool_calls] == [
        "search",
        "search",
    ] and reply.finish_reason == "tool_calls"
    assert len({c.id for c in reply.tool_calls}) == 2 and reply.text == ""
    sent = server.requests[0].body["tools"][0]["function"]
    assert sent == {"name": "search", "description": "finds", "parameters": SEARCH.parameters}


def test_tool_messages_go_back_in_the_endpoints_shape():
    call = ToolCall(id="c1", name="search", arguments={"q": "x"})
    history = [
        *HI,
        Message(role="assistant", tool_calls=(call,)),
        Message(role="tool", content="r", tool_call_id="c1"),
    ]
    with FakeServer("ok") as server:
        ask(server, history)
    assistant, tool = server.requests[0].body["messages"][2:]
    assert assistant["tool_calls"][0]["function"] == {"name": "search", "arguments": '{"q": "x"}'}
    assert tool == {"role": "tool", "tool_call_id": "c1", "content": "r"}


@STREAMED
def test_reasoning_is_passed_over_and_counted_where_usage_is_missing(stream):
    with FakeServer(Say("yes", reasoning="r" * 297, usage=False)) as server:
        reply = ask(server, stream=stream)
    assert reply.text == "yes" and reply.usage.output_tokens == 100


@pytest.mark.parametrize(
    "sent, got", [("length", "length"), ("content_filter", "content_filter"), ("eos", "stop")]
)
@STREAMED
def test_finish_reasons(stream, sent, got):
    with FakeServer(Say("x", finish=sent)) as server:
        assert ask(server, stream=stream).finish_reason == got


def test_content_in_parts_and_a_refusal():
    parts = {
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image"}]
    }
    with FakeServer([Say(fields=parts), Say(None, fields={"refusal": "no"})]) as server:
        lm = model(server)
        assert ask(server, lm=lm).text == "ab"
        refused = ask(server, lm=lm)
    assert refused.text == "no" and refused.finish_reason == "content_filter"


def test_stream_with_comments_odd_line_ends_and_no_done():
    def event(d, finish=None):
        return json.dumps({"choices": [{"delta": d, "finish_reason": finish}]})

    lines = (
        b"\xef\xbb\xbf: hello\r\n\r\nevent: x\r\ndata: "
        + event({"content": "a"}).encode()
        + b"\r\n\r\n"
        b"id: 4\rdata:" + event({"content": "b"}).encode() + b"\r\r"
        b"data: " + json.dumps({"choices": [], "usage": None}).encode() + b"\n\n"
        b"data: " + event({}, "stop").encode() + b"\n"
    )
    for reply in (Raw(lines, "text/event-stream"), Say("ab", comments=True, done=False)):
        with FakeServer(reply) as server:
            assert ask(server, stream=True).text == "ab"


def test_an_endpoint_that_does_not_stream_when_asked_to():
    whole = json.dumps({"choices": [{"message": {"content": "all at once"}}]}).encode()
    with FakeServer(Raw(whole)) as server:
        assert ask(server, stream=True).text == "all at once"


def test_lone_surrogates_reach_the_server_as_valid_utf8():
    with FakeServer("ok") as server:
        ask(
            server,
            [
                Message.model_construct(
                    role="user", content="a\ud800b", tool_calls=(), tool_call_id=None
                )
            ],
        )
    assert server.requests[0].body["messages"][0]["content"] == "a?b"


def test_sampling_and_extra_fields():
    sampling = Sampling(
        temperature=0.5, top_p=0.9, max_tokens=5, seed=3, stop=("X",), extra={"min_p": 0.1, "b": 2}
    )
    with FakeServer("ok") as server:
        ask(server, sampling=sampling, options={"extra_body": {"a": 1, "b": 1}})
    body = server.requests[0].body
    wanted = {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 5,
        "seed": 3,
        "stop": ["X"],
        "min_p": 0.1,
        "a": 1,
        "b": 2,
    }
    assert wanted.items() <= body.items()


# Limits, loops, connections


def test_the_environments_proxy_is_used(monkeypatch):
    with FakeServer("by proxy") as proxy, FakeServer("directly") as server:
        monkeypatch.setenv("http_proxy", proxy.origin)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert ask(None, lm=OpenAILM("m", base_url="http://model.invalid/v1")).text == "by proxy"
        assert ask(server).text == "directly"
    assert proxy.requests[0].path == "http://model.invalid/v1/chat/completions"


def test_concurrency_is_capped_and_used():
    async def main(lm, n):
        await asyncio.gather(*[lm.complete(HI) for _ in range(n)])

    with FakeServer("ok", latency=0.02) as server:
        asyncio.run(main(model(server, concurrency=5), 25))
        assert server.max_concurrency == 5
    with FakeServer("ok", latency=0.5) as server:
        asyncio.run(main(model(server), 50))
        assert server.max_concurrency > 25


def test_one_model_in_many_loops_leaves_nothing_behind():
    """Each loop has its connections, kept while it lives and closed when it ends, without a
    warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with FakeServer("ok") as server:
            lm = model(server)
            trouble = []

            async def several():
                asyncio.get_running_loop().set_exception_handler(
                    lambda _, context: trouble.append(context)
                )
                for _ in range(3):
                    await lm.complete(HI)

            threads = [threading.Thread(target=lambda: asyncio.run(several())) for _ in range(4)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            for _ in range(3):
                asyncio.run(several())
            asyncio.run(lm.aclose())
            gc.collect()
            assert server.connections == 7 and server.count == 21
            assert len(lm.endpoint._clients) == 0 and not trouble


def test_the_model_is_usable_after_aclose():
    async def main(lm):
        await lm.complete(HI)
        await lm.aclose()
        return await lm.complete(HI)

    with FakeServer("ok") as server:
        assert asyncio.run(main(model(server))).text == "ok"
        assert server.connections == 2


def test_nothing_is_said_at_exit():
    with FakeServer("ok") as server:
        code = (
            "import asyncio\nfrom rlm_runtime.lms import resolve\nfrom rlm_runtime.lms.base import Message\n"
            f"lm = resolve('openai:m', base_url='{server.url}')\n"
            "print(asyncio.run(lm.complete([Message(role='user', content='x')])).text)\n"
        )
        done = subprocess.run(
            [sys.executable, "-W", "always", "-c", code],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.stdout == "ok\n" and done.stderr == ""


# Endpoints that do not take everything


def refusing(field: str, message: str | None = None, status: int = 400):
    """A server's reply function that refuses bodies with this field."""
    text = message or f"Unsupported parameter: '{field}' is not supported with this model."
    return lambda body: Fail(status, text) if field in body else "ok"


@pytest.mark.parametrize("field", ["temperature", "top_p", "seed", "stream_options"])
def test_a_field_the_endpoint_refuses_is_left_out_from_then_on(field, caplog):
    sampling = Sampling(temperature=0.1, top_p=0.2, seed=3)
    with FakeServer(refusing(field)) as server, caplog.at_level(logging.WARNING):
        lm = model(server, stream=True)
        ask(server, lm=lm, sampling=sampling, stream=True)
        ask(server, lm=lm, sampling=sampling, stream=True)
    assert server.count == 3 and field not in server.requests[-1].body
    kept = {"temperature", "top_p", "seed", "stream_options"} - {field}
    assert kept <= server.requests[-1].body.keys()
    assert (field in caplog.text) == (field != "stream_options"), "a changed meaning is said once"
    assert KEY not in caplog.text


def test_both_names_of_the_token_limit():
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    with FakeServer(refusing("max_tokens", message)) as server:
        lm = model(server)
        for _ in range(2):
            ask(server, lm=lm, sampling=Sampling(max_tokens=9))
    assert server.count == 3 and server.requests[-1].body["max_completion_tokens"] == 9


def test_a_value_out_of_range_is_the_callers_mistake():
    for sampling, message in (
        (
            Sampling(max_tokens=10**9),
            "max_tokens is too large: 1000000000. This model supports at most 16384",
        ),
        (
            Sampling(temperature=9),
            "Invalid 'temperature': decimal above maximum value. Expected at most 2",
        ),
    ):
        with FakeServer(Fail(400, message)) as server:
            fails(server, "bad_request", message[:15], sampling=sampling)
            assert server.count == 1


@STREAMED
def test_stop_strings_are_applied_here_where_the_endpoint_cannot(stream):
    def reply(body):
        return (
            Fail(400, "Unsupported parameter: 'stop'")
            if "stop" in body
            else Say("one STOP two", pieces=12)
        )

    with FakeServer(reply) as server:
        assert ask(server, stream=stream, sampling=Sampling(stop=("STOP",))).text == "one "


def test_a_schema_is_sent_and_strict_where_it_can_be():
    with FakeServer('{"n": 1}') as server:
        ask(server, schema=SCHEMA)
        ask(server, schema={"type": "object", "properties": {"n": {}}})
    sent = [r.body["response_format"]["json_schema"] for r in server.requests]
    assert sent[0]["schema"] == SCHEMA and [s["strict"] for s in sent] == [True, False]
    nested = {**SCHEMA, "properties": {"n": {"type": "array", "items": {"type": "object"}}}}
    assert strict(SCHEMA) and not strict(nested)


@pytest.mark.parametrize("message", ["response_format is not supported", "Bad Request"])
def test_a_schema_is_asked_for_in_words_where_the_endpoint_refuses(message):
    with FakeServer(refusing("response_format", message)) as server:
        lm = model(server)
        for _ in range(2):
            ask(server, lm=lm, schema=SCHEMA)
    assert server.count == 3, "the second call knew"
    last = server.requests[-1].body
    assert json.dumps(SCHEMA) in last["messages"][-1]["content"] and "response_format" not in last
    assert last["messages"][0] == {"role": "system", "content": "Be brief."}


def test_one_schema_refused_is_not_all_schemas():
    def reply(body):
        bad = "response_format" in body and "x" in body["response_format"]["json_schema"]["schema"]
        return Fail(400, "Invalid schema for response_format 'reply': 'x'") if bad else "{}"

    with FakeServer(reply) as server:
        lm = model(server)
        ask(server, lm=lm, schema={"type": "object", "x": 1})
        ask(server, lm=lm, schema=SCHEMA)
    assert (
        "response_format" not in server.requests[1].body
        and "response_format" in server.requests[2].body
    )


def test_a_refusal_for_another_reason_does_not_cost_the_schema():
    """A 400 that names nothing is tried without response_format; if that fails too nothing is
    concluded from it."""
    with FakeServer([Fail(400, "Bad Request"), Fail(400, "Bad Request"), "{}"]) as server:
        lm = model(server)
        fails(server, "bad_request", lm=lm, schema=SCHEMA)
        ask(server, lm=lm, schema=SCHEMA)
    assert "response_format" in server.requests[-1].body


def test_tools_are_asked_for_in_words_where_the_endpoint_has_none():
    def reply(body):
        if "tools" in body:
            return Fail(400, '"auto" tool choice requires --enable-auto-tool-choice to be set')
        return '```json\n{"tool": "search", "arguments": {"q": "x"}}\n```'

    with FakeServer(reply) as server:
        reply = ask(server, tools=[SEARCH])
    assert reply.tool_calls == (ToolCall(id="call_0", name="search", arguments={"q": "x"}),)
    assert reply.finish_reason == "tool_calls" and reply.text == ""
    assert '"search"' in server.requests[-1].body["messages"][-1]["content"]


# Keys, names, prices


def test_the_key_is_nowhere_to_be_read():
    with FakeServer(lambda body: Fail(401, f"Incorrect API key provided: {KEY}")) as server:
        lm = model(server)
        error = fails(server, "auth", "Incorrect", lm=lm)
    shown = [repr(lm), str(lm), str(error), repr(error), str(error.__cause__), str(lm.name)]
    assert not any(KEY in text for text in shown)
    with FakeServer(lambda body: Fail(401, "bad key sk-other-abcdefghijkl")) as server:
        assert "sk-other-abcdefghijkl" not in str(fails(server, "auth"))


def test_a_key_of_any_form_is_redacted():
    with FakeServer(Fail(400, "you sent Plain0key9 as the key")) as server:
        lm = model(server, api_key="Plain0key9", headers={"X-Tenant": "t-secret"})
        assert "Plain0key9" not in str(fails(server, "bad_request", "as the key", lm=lm))


def test_credentials_in_the_url_are_not_shown():
    with FakeServer(Fail(403)) as server:
        url = server.url.replace("://", "://user:hunter2@")
        lm = OpenAILM("m", base_url=url)
        assert "hunter2" not in str(fails(server, "auth", lm=lm)) + repr(lm)


@pytest.mark.parametrize("key", ["two words", "snow☃man-key", "a\nb"])
def test_a_key_that_cannot_be_one(key):
    with pytest.raises(UsageError) as e:
        OpenAILM("m", api_key=key)
    assert key not in str(e.value)


def test_environment_and_defaults(monkeypatch):
    with pytest.raises(UsageError, match="OPENAI_API_KEY"):
        OpenAILM("gpt-5-mini")
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    lm = OpenAILM("gpt-5-mini-2025-08-07")
    assert isinstance(lm, LM) and lm.endpoint.base_url == "https://api.openai.com/v1"
    assert lm.window == 400_000 and lm.price(1_000_000, 0) == pytest.approx(0.25)
    with FakeServer("ok", api_key=KEY) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
        lm = resolve("openai:other")
        assert ask(server, lm=lm).text == "ok" and lm.window is None and lm.price(1, 1) is None


def test_what_a_router_charges_counts_where_no_price_is_known():
    with FakeServer(
        Say("ok", usage={"prompt_tokens": 1, "completion_tokens": 1, "cost": 0.25})
    ) as server:
        assert ask(server).usage.cost_usd == 0.25
        assert ask(server, options={"price": (1.0, 1.0)}).usage.cost_usd == pytest.approx(2e-6)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x/v1", "http://", "http://h:port/v1", "http://h/v1?x=1", ""]
)
def test_a_url_that_is_none(url, monkeypatch):
    if not url:
        monkeypatch.setenv("OPENAI_BASE_URL", "nonsense")
    with pytest.raises(UsageError, match="base_url"):
        OpenAILM("m", base_url=url)


def test_options_out_of_range():
    for option, value in (
        ("timeout", 0),
        ("concurrency", 0),
        ("max_retries", -1),
        ("requests_per_minute", -1.0),
    ):
        with pytest.raises(UsageError, match=option):
            OpenAILM("m", base_url="http://h/v1", **{option: value})


def test_the_count_is_an_upper_estimate_or_the_tokenizers():
    prose = (
        "The quick brown fox jumps over the lazy dog, then it rests in the shade of an old tree. "
        * 20
    )
    lm = OpenAILM("m", base_url="http://h/v1")
    words = len(prose.split())
    count = lm.count_tokens([Message(role="user", content=prose)])
    assert 1.2 * words < count < 2 * words  # BPE spends about 1.1 tokens on such a word
    assert lm.count_tokens([Message(role="user", content="漢字" * 50)]) >= 100
    exact = OpenAILM("m", base_url="http://h/v1", tokenizer=len)
    assert exact.count_tokens([Message(role="user", content="abc")]) == 3 + 4
