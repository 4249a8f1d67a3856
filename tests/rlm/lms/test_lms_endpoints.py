"""What endpoints do that a user must not have to know: keys stay at home, streams, odd tool calls,
missing roles."""

import asyncio
import itertools
import json
import logging
import re
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlm.fake_server import Cut, Fail, FakeServer, Raw, Say

from rlm_runtime.errors import LMError, UsageError
from rlm_runtime.lms import resolve
from rlm_runtime.lms.anthropic import AnthropicLM
from rlm_runtime.lms.base import Message, Sampling, ToolCall, ToolSpec
from rlm_runtime.lms.openai import OpenAILM
from rlm_runtime.lms.redact import Redactor, foreign

HI = [Message(role="system", content="Be brief."), Message(role="user", content="hi")]
KEY = "sk-live-0123456789abcdefghij"
SEARCH = ToolSpec(name="search", parameters={"type": "object", "properties": {"q": {}}})


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in (
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "ANTHROPIC_API_KEY",
        "ANTHROPIC_BASE_URL",
        "RLM_PRICES",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)


def complete(lm, messages=HI, **call):
    return asyncio.run(lm.complete(messages, **call))


def make(server, **options):
    return OpenAILM("m", **{"base_url": server.url, "api_key": KEY, "backoff": 0.001, **options})


def sent_keys(server):
    named = ("authorization", "x-api-key", "api-key")
    return [v for r in server.requests for n, v in r.headers.items() if n in named]


# Keys


@pytest.mark.parametrize(("kind", "variable"), [(OpenAILM, "OPENAI"), (AnthropicLM, "ANTHROPIC")])
def test_a_key_of_the_environment_stays_with_the_endpoint_it_was_given_for(
    kind, variable, monkeypatch
):
    monkeypatch.setenv(f"{variable}_API_KEY", KEY)
    with FakeServer("ok") as home, FakeServer("ok") as other:
        complete(kind("m", base_url=other.url))  # the key is the official endpoint's
        assert sent_keys(other) == []
        monkeypatch.setenv(f"{variable}_BASE_URL", home.url)  # now it is this one's
        complete(kind("m"))
        complete(kind("m", base_url=home.url + "/"))
        assert len(sent_keys(home)) == 2 and all(KEY in v for v in sent_keys(home))
        complete(kind("m", base_url=other.url))
        # another name is another host
        complete(kind("m", base_url=home.url.replace("127.0.0.1", "localhost")))
        assert sent_keys(other) == [] and len(sent_keys(home)) == 2


def test_a_key_that_was_kept_back_is_named_when_the_endpoint_wants_one(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeServer("ok", api_key="the-right-one") as server:
        with pytest.raises(
            LMError,
            match=r"OPENAI_API_KEY was not sent to .*belongs to https://api.openai.com.*api_key=",
        ) as e:
            complete(OpenAILM("m", base_url=server.url))
        assert e.value.kind == "auth" and KEY not in str(e.value)
        monkeypatch.setenv("MY_KEY", "the-right-one")
        assert complete(OpenAILM("m", base_url=server.url, api_key_env="MY_KEY")).text == "ok"
    with pytest.raises(UsageError, match="NOT_SET"):
        OpenAILM("m", base_url="http://h/v1", api_key_env="NOT_SET")
    # the key is this server's now, not OpenAI's
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(UsageError, match=r"belongs to http://127\.0\.0\.1:9/v1"):
        OpenAILM("m", base_url="https://api.openai.com/v1")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_takes_no_key_along(status):
    with FakeServer("stolen") as other:
        target = f"{other.url}/chat/completions?key={KEY}"
        with FakeServer(Fail(status, headers={"Location": target})) as server:
            with pytest.raises(LMError, match="redirects to http") as e:
                complete(make(server))
            assert other.count == 0 and KEY not in str(e.value)


def everything_shown(error):
    """All that a log with tracebacks, causes and representations can show."""
    seen, texts = set(), ["".join(traceback.format_exception(error))]
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        texts += [str(error), repr(error), repr(vars(error))]
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


SECRETS = st.text(st.sampled_from("abcXYZ019+/=&%-_"), min_size=8, max_size=60)


@pytest.mark.parametrize("stream", [False, True])
def test_no_failure_shows_a_key_wherever_the_endpoint_puts_it(stream):
    secret, tenant, query = "q+9/x=Zr8Tn4wLp2Vb7", "tenant-secret-31337", "a%2Fb&c=pass/word"
    quoted = "q%2B9%2Fx%3DZr8Tn4wLp2Vb7"
    long = "x" * 190 + secret  # a message is cut after 200 characters: not in the middle of a key
    replies = [
        *(
            Fail(s, f"key {secret}, tenant {tenant}, {query}")
            for s in (400, 401, 403, 404, 429, 500)
        ),
        *(Fail(s, body=long.encode()) for s in (400, 500)),
        Fail(400, body=f"see /?key={quoted}".encode()),
        Raw(long.encode()),
        Raw(json.dumps(long).replace("/", "\\/").encode()),
        Raw(json.dumps({"choices": 4, "echo": long}).encode()),
        Raw(f"data: {long}\n\n".encode(), "text/event-stream"),
        Raw(f"HTTP/9 {secret} {tenant}\r\n\r\n".encode(), whole=True),
        Raw(json.dumps({"error": {"message": secret, "code": 400}}).encode()),
        Cut(pieces=-1),
        Cut(error={"message": f"{secret} {tenant}", "code": 500}),
    ]
    for reply in replies:
        with FakeServer(reply) as server:
            options = {
                "headers": {"X-Tenant": tenant},
                "query": {"api_key": query, "v": "1"},
                "stream": stream,
            }
            lm = make(server, api_key=secret, max_retries=1, **options)
            with pytest.raises(LMError) as e:
                complete(lm)
        shown = everything_shown(e.value) + repr(lm)
        for hidden in (secret, quoted, tenant, query, secret[:8]):
            assert hidden not in shown, reply


@given(st.text(max_size=40), SECRETS, st.text(max_size=40))
def test_a_secret_is_redacted_in_any_company(before, secret, after):
    assert secret not in Redactor([secret])(before + secret + after).replace("***", "\0")


@pytest.mark.parametrize(
    "text",
    [
        "Incorrect API key: sk-proj-abcdefghijklmnop",
        "gsk_abcdefghijklmnopqrst failed",
        "AIzaSyA1234567890abcdefgh is bad",
        "https://user:hunter2hunter2@host/v1",
        "GET /v1?key=hunter2hunter2&x=1",
        "Authorization: Bearer hunter2hunter2",
    ],
)
def test_keys_of_others_are_known_by_their_form(text):
    shown = Redactor()(text)
    assert "***" in shown and not re.search("hunter2|abcdefgh|1234567890", shown)


def test_ordinary_words_are_left_alone(monkeypatch):
    text = "none of the keys in monkey-business was EMPTY; the token count is 12 of 4096, see http://h/v1?page=2"
    assert Redactor(["none", "EMPTY", "", None, "12"])(text) == text
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "abcd1234efgh")
    assert foreign("refused abcd1234efgh") == "refused ***"


# Options of one model


def test_options_of_a_model_reach_its_requests_and_a_call_may_differ():
    options = {
        "query": {"api-version": "2024-10-21"},
        "headers": {"X-Title": "test"},
        "extra_body": {"top_k": 5},
        "temperature": 0.25,
        "top_p": 0.5,
        "seed": 7,
        "max_tokens": 99,
        "reasoning_effort": "low",
    }
    with FakeServer("ok") as server:
        lm = make(server, **options)
        complete(lm)
        complete(lm, sampling=Sampling(temperature=0.0, max_tokens=3))
    first, second = server.requests
    assert (
        first.path == "/v1/chat/completions?api-version=2024-10-21"
        and first.headers["x-title"] == "test"
    )
    wanted = {
        "temperature": 0.25,
        "top_p": 0.5,
        "seed": 7,
        "max_tokens": 99,
        "reasoning_effort": "low",
        "top_k": 5,
    }
    assert wanted.items() <= first.body.items()
    assert (wanted | {"temperature": 0.0, "max_tokens": 3}).items() <= second.body.items()


def test_thinking_of_a_claude_model():
    with FakeServer("ok") as server:
        lm = AnthropicLM(
            "m",
            base_url=server.origin,
            api_key=KEY,
            reasoning_effort="low",
            max_tokens=100,
            temperature=0.3,
        )
        complete(lm, schema={"type": "object", "properties": {}})
        body = server.requests[0].body
    assert (
        body["thinking"] == {"type": "enabled", "budget_tokens": 2048}
        and body["max_tokens"] == 2148
    )
    assert (
        "temperature" not in body
        and "tool_choice" not in body
        and "JSON schema" in str(body["messages"])
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"reasoning_effort": "hard"}, "minimal"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"headers": {"a": 1}}, "headers"),
        ({"query": "x=1"}, "query"),
        ({"hedaers": {}}, "Did you mean headers"),
        ({"tempratur": 1}, "Did you mean temperature"),
    ],
)
def test_options_that_cannot_be(options, match):
    with pytest.raises(UsageError, match=match):
        resolve("openai:m", base_url="http://h/v1", **options)


# Streams


def test_a_call_that_nobody_watches_is_a_stream_all_the_same():
    """A proxy that cuts a silent connection sees one in use; and what was cut can be tried again:
    nobody has seen it."""
    with FakeServer([Cut(pieces=2), "whole"]) as server:
        assert complete(make(server)).text == "whole"
        assert [r.body["stream"] for r in server.requests] == [True, True]
    with FakeServer("ok") as server:
        assert (
            complete(make(server, stream=False)).text == "ok"
            and "stream" not in server.requests[0].body
        )
    with FakeServer("ok") as server:
        complete(AnthropicLM("m", base_url=server.origin, api_key=KEY))
        assert server.requests[0].body["stream"] is True


@pytest.mark.parametrize(
    "message",
    [
        "Streaming is not supported for this model.",
        "Your organization must be verified to stream this model.",
    ],
)
def test_an_endpoint_that_cannot_stream_is_asked_for_one_body_from_then_on(message):
    def reply(body):
        if body.get("stream"):
            return Fail(400, message, "unsupported_value")
        assert "stream_options" not in body
        return "ok"

    with FakeServer(reply) as server:
        lm = make(server)
        assert [complete(lm).text, complete(lm).text] == ["ok", "ok"] and server.count == 3


def test_a_field_of_the_user_that_is_refused_ends_the_call():
    refusal = Fail(400, "Unsupported parameter: 'temperature' is not supported")
    with FakeServer(lambda body: refusal if "temperature" in body else "ok") as server:
        with pytest.raises(LMError, match="temperature"):  # left out once, but `extra_body` insists
            complete(make(server, extra_body={"temperature": 1}))
        assert server.count == 2


# Models without a system role


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "System role not supported"),
        (500, "Jinja Exception: System role not supported"),
        (400, "Developer instruction is not enabled for models/gemma-3-27b-it"),
        (400, "Unsupported value: 'messages[0].role' does not support 'system' with this model."),
        (400, "Conversation roles must alternate user/assistant/user/assistant/..."),
        (422, "this model does not support system messages"),
        (400, "Only user, assistant and tool roles are supported!"),
    ],
)
def test_a_missing_system_role_is_remembered(status, message):
    def reply(body):
        return Fail(status, message) if body["messages"][0]["role"] == "system" else "ok"

    with FakeServer(reply) as server:
        lm = make(server)
        assert complete(lm).text == "ok" and server.count == 2
        assert complete(lm).text == "ok" and server.count == 3
        assert server.requests[-1].body["messages"] == [
            {"role": "user", "content": "Be brief.\n\nhi"}
        ]
        talk = [HI[0], Message(role="assistant", content="a"), Message(role="user", content="b")]
        complete(lm, talk)
        assert [m["role"] for m in server.requests[-1].body["messages"]] == [
            "user",
            "assistant",
            "user",
        ]


def test_another_refusal_that_speaks_of_a_system_keeps_the_role():
    with FakeServer(Fail(400, "The system is not supported in your region")) as server:
        lm = make(server)
        with pytest.raises(LMError):
            complete(lm)
        assert server.count == 1 and not lm.adapted


# Tool calls


def deltas(*parts):
    chunks = [
        {"choices": [{"delta": {"tool_calls": part}, "finish_reason": None}]} for part in parts
    ]
    chunks.append({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]})
    return Raw(
        "".join(f"data: {json.dumps(c)}\n\n" for c in chunks).encode() + b"data: [DONE]\n\n",
        "text/event-stream",
    )


def piece(name=None, arguments="", **more):
    return {**more, "function": {**({"name": name} if name else {}), "arguments": arguments}}


A, B = '{"q": "a"}', '{"q": "b"}'
HEAD, TAIL = A[:4], A[4:]
ODD = {
    "empty ids, one index, whole": [
        [piece("search", A, id="", index=0)],
        [piece("search", B, id="", index=0)],
    ],
    "empty ids, one index, one delta": [
        [piece("search", A, id="", index=0), piece("search", B, id="", index=0)]
    ],
    "equal ids": [[piece("search", A, id="x", index=0)], [piece("search", B, id="x", index=1)]],
    "equal ids, one index": [
        [piece("search", A, id="x", index=0), piece("search", B, id="x", index=0)]
    ],
    "one index, new ids, in pieces": [
        [piece("search", HEAD, id="x", index=0)],
        [piece(arguments=TAIL, index=0)],
        [piece("search", B[:4], id="y", index=0)],
        [piece(arguments=B[4:], index=0)],
    ],
    "no index, whole": [[piece("search", A)], [piece("search", B)]],
    "no index, one delta": [[piece("search", A), piece("search", B)]],
    "no index, in pieces": [
        [piece("search", HEAD, id="x")],
        [piece(arguments=TAIL)],
        [piece("search", B[:4], id="y")],
        [piece(arguments=B[4:])],
    ],
    "head repeated with each piece": [
        [piece("search", HEAD, id="x", index=0)],
        [piece("search", TAIL, id="x", index=0)],
        [piece("search", B, id="y", index=1)],
    ],
    "head first, arguments later": [
        [piece("search", "", id="x", index=0)],
        [piece("search", A, id="x", index=0)],
        [piece("search", B, id="y", index=1)],
    ],
    "interleaved": [
        [piece("search", HEAD, id="x", index=0), piece("search", B[:4], id="y", index=1)],
        [piece(arguments=B[4:], index=1), piece(arguments=TAIL, index=0)],
    ],
    "arguments as an object": [
        [piece("search", {"q": "a"}, index=0)],
        [piece("search", {"q": "b"}, index=0)],
    ],
}


@pytest.mark.parametrize("parts", ODD.values(), ids=ODD.keys())
def test_streamed_calls_stay_apart(parts):
    with FakeServer(deltas(*parts)) as server:
        calls = complete(make(server), tools=[SEARCH]).tool_calls
    assert [(c.name, c.arguments) for c in calls] == [
        ("search", {"q": "a"}),
        ("search", {"q": "b"}),
    ]
    assert len({c.id for c in calls}) == 2 and all(c.id for c in calls)


@pytest.mark.parametrize("ids", [("", ""), ("x", "x"), (None, None), ("x", "y")])
def test_whole_calls_stay_apart(ids):
    calls = [{**piece("search", a, index=0), "id": i} for i, a in zip(ids, (A, B), strict=True)]
    message = {"content": None, "tool_calls": calls}
    with FakeServer(
        Raw(json.dumps({"choices": [{"message": message, "finish_reason": "tool_calls"}]}).encode())
    ) as server:
        found = complete(make(server, stream=False), tools=[SEARCH]).tool_calls
    assert [c.arguments for c in found] == [{"q": "a"}, {"q": "b"}] and len(
        {c.id for c in found}
    ) == 2
    assert ids[0] != "x" or found[0].id == "x"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["search", "find"]),
            st.dictionaries(st.text(max_size=3), st.text(max_size=5)),
        )
    ),
    st.data(),
)
def test_calls_in_standard_deltas_come_out_as_they_were(calls, data):
    """However their arguments are cut and woven, when index and id say what belongs together."""
    from rlm_runtime.lms.openai import _Calls

    queues = []
    for index, (name, arguments) in enumerate(calls):
        text = json.dumps(arguments)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
        parts = [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]
        queues.append(
            [
                piece(name, id=f"c{index}", index=index),
                *(piece(arguments=p, index=index) for p in parts),
            ]
        )
    reading = _Calls()
    for number, queue in enumerate(queues):  # calls begin in order, their pieces come in any
        reading.part([queue.pop(0)], whole=False)
        if number and data.draw(st.booleans()) and queues[0]:
            reading.part([queues[0].pop(0)], whole=False)
    while rest := [q for q in queues if q]:
        reading.part([data.draw(st.sampled_from(rest)).pop(0)], whole=False)
    assert [(c.name, c.arguments) for c in reading.made()] == calls


def test_a_stream_made_to_look_like_many_beginnings_costs_a_bounded_number_of_checks():
    from rlm_runtime.lms.openai import _Calls

    reading = _Calls()
    reading.part([piece("search", '{"a": [', index=0)], whole=False)
    for _ in range(5000):
        reading.part([piece("search", "{},", index=0)], whole=False)
    assert reading._checked <= _Calls.CHECKED + 10_000 and len(reading.made()) == 1


def test_signatures_and_reasoning_go_back_with_the_call_they_belong_to():
    google = {"google": {"thought_signature": "sig-1"}}
    parts = [
        {"reasoning_content": "think "},
        {"reasoning_content": "hard", "reasoning_details": [{"text": "d1"}]},
        {"reasoning_details": [{"text": "d2"}]},
        {"tool_calls": [piece("search", A, id="x", index=0, extra_content=google)]},
        {
            "tool_calls": [
                {
                    "index": 1,
                    "id": "y",
                    "function": {"name": "search", "arguments": B, "thought_signature": "s2"},
                }
            ]
        },
    ]
    chunks = [{"choices": [{"delta": d}]} for d in parts] + [
        {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}
    ]
    raw = Raw("".join(f"data: {json.dumps(c)}\n\n" for c in chunks).encode(), "text/event-stream")
    with FakeServer([raw, "done"]) as server:
        lm = make(server)
        reply = complete(lm, tools=[SEARCH])
        said = Message(
            role="assistant", content=reply.text, tool_calls=reply.tool_calls, extra=reply.extra
        )
        results = [Message(role="tool", content="r", tool_call_id=c.id) for c in reply.tool_calls]
        complete(lm, [*HI, said, *results], tools=[SEARCH])
    back = server.requests[1].body["messages"][2]
    assert back["reasoning_content"] == "think hard"
    assert back["reasoning_details"] == [{"text": "d1"}, {"text": "d2"}]
    first, second = back["tool_calls"]
    assert first["extra_content"] == google and "extra_content" not in second
    assert (
        second["function"]["thought_signature"] == "s2"
        and "thought_signature" not in first["function"]
    )
    assert [c["id"] for c in back["tool_calls"]] == ["x", "y"]


def test_reasoning_goes_back_only_with_calls_and_not_where_it_is_refused(caplog):
    with FakeServer(Say("x", reasoning="hm")) as server:
        assert complete(make(server)).extra == {}
    call = ToolCall(id="x", name="search", arguments={})
    said = Message(role="assistant", tool_calls=(call,), extra={"reasoning_content": "hm"})

    def reply(body):
        refused = any("reasoning_content" in m for m in body["messages"])
        return (
            Fail(422, "Extra inputs are not permitted: messages.2.reasoning_content")
            if refused
            else "ok"
        )

    with FakeServer(reply) as server, caplog.at_level(logging.WARNING):
        lm = make(server)
        talk = [*HI, said, Message(role="tool", content="r", tool_call_id="x")]
        assert complete(lm, talk).text == complete(lm, talk).text == "ok" and server.count == 3


@pytest.mark.parametrize("stream", [False, True])
def test_claude_gets_its_thinking_back_with_the_call(stream):
    say = Say("", reasoning="hm", tool_calls=(("search", A), ("search", B)))
    with FakeServer([say, "done"]) as server:
        lm = AnthropicLM("m", base_url=server.origin, api_key=KEY, stream=stream)
        reply = complete(lm, tools=[SEARCH])
        said = Message(
            role="assistant", content=reply.text, tool_calls=reply.tool_calls, extra=reply.extra
        )
        results = [Message(role="tool", content="r", tool_call_id=c.id) for c in reply.tool_calls]
        complete(lm, [*HI, said, *results], tools=[SEARCH])
    back = server.requests[1].body["messages"][1]["content"]
    assert back[0] == {"type": "thinking", "thinking": "hm", "signature": "s"}
    assert [b["type"] for b in back[1:]] == ["tool_use", "tool_use"]


def test_claude_calls_under_one_index_and_id_stay_apart():
    def event(kind, **fields):
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"

    text = event("message_start", message={"model": "m"})
    for arguments in (A, B):
        block = {"type": "tool_use", "id": "", "name": "search", "input": {}}
        text += event("content_block_start", index=0, content_block=block)
        text += event(
            "content_block_delta",
            index=0,
            delta={"type": "input_json_delta", "partial_json": arguments},
        )
    text += event("message_delta", delta={"stop_reason": "tool_use"}) + event("message_stop")
    with FakeServer(Raw(text.encode(), "text/event-stream")) as server:
        calls = complete(
            AnthropicLM("m", base_url=server.origin, api_key=KEY), tools=[SEARCH]
        ).tool_calls
    assert [c.arguments for c in calls] == [{"q": "a"}, {"q": "b"}] and len(
        {c.id for c in calls}
    ) == 2
