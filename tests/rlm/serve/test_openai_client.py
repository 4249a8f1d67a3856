"""The official client against the server: every answer passes its strict models, every error
becomes its exception."""

import asyncio
import json

import openai
import pytest

from rlm.serve.support import Scripted, result, running
from rlm_runtime.errors import ContextError, LMError, SandboxError
from rlm_runtime.rlm.results import at_limit


def client(server, **options):
    options = {"api_key": "none", "max_retries": 0, **options}
    return openai.OpenAI(base_url=server.url, _strict_response_validation=True, **options)


@pytest.fixture(scope="module")
def server():
    with running(Scripted("rlm"), Scripted("other", act=lambda c, q, g: {"n": 1})) as server:
        yield server


HELLO = [{"role": "user", "content": "hello"}]


def test_models(server):
    c = client(server)
    assert [m.id for m in c.models.list()] == ["rlm", "other"]
    assert c.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError) as e:
        c.models.retrieve("third")
    assert e.value.code == "model_not_found" and "rlm" in str(e.value)


def test_completion_has_answer_usage_and_report(server):
    reply = client(server).chat.completions.create(model="rlm", messages=HELLO)
    assert (
        reply.choices[0].message.content == "the answer"
        and reply.choices[0].finish_reason == "stop"
    )
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (
        100,
        40,
        140,
    )
    assert reply.usage.prompt_tokens_details.cached_tokens == 60
    report = reply.model_extra["rlm"]
    assert report["sub_calls"] == 2 and report["turns"] == 2 and report["cost_usd"] == 0.25
    assert (
        report["run"] == "run-1" and report["stop_reason"] == "answered" and not report["partial"]
    )


@pytest.mark.parametrize("progress", ["field", "reasoning", "comment", "none"])
def test_stream(server, progress):
    stream = client(server).chat.completions.create(
        model="rlm",
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"rlm": {"progress": progress}},
    )
    chunks = list(stream)
    first, last = chunks[0], chunks[-1]
    assert first.choices[0].delta.role == "assistant"
    assert (
        last.choices == []
        and last.usage.total_tokens == 140
        and last.model_extra["rlm"]["run"] == "run-1"
    )
    assert all(c.usage is None for c in chunks[:-1])
    with_choice = chunks[:-1]
    assert "".join(c.choices[0].delta.content or "" for c in with_choice) == "the answer"
    assert [c.choices[0].finish_reason for c in with_choice if c.choices[0].finish_reason] == [
        "stop"
    ]
    assert with_choice[-1].choices[0].finish_reason == "stop"
    assert len({c.id for c in chunks}) == 1
    notes = [
        c.model_extra["rlm"]["progress"] for c in with_choice if "rlm" in (c.model_extra or {})
    ]
    thoughts = [c.choices[0].delta.model_extra.get("reasoning_content") for c in with_choice]
    assert bool(notes) == (progress == "field") and any(thoughts) == (progress == "reasoning")
    if notes:
        assert [n["event"] for n in notes] == ["turn", "cell", "calls", "calls"]


def test_stream_without_usage_carries_the_report_on_the_finish_chunk(server):
    chunks = list(client(server).chat.completions.create(model="rlm", messages=HELLO, stream=True))
    assert all(c.choices for c in chunks) and chunks[-1].model_extra["rlm"]["run"] == "run-1"


def test_async_client_and_concurrency(server):
    async def main():
        c = openai.AsyncOpenAI(
            base_url=server.url, api_key="none", _strict_response_validation=True
        )
        async with c:
            replies = await asyncio.gather(
                *(c.chat.completions.create(model="rlm", messages=HELLO) for _ in range(8))
            )
            stream = await c.chat.completions.create(model="rlm", messages=HELLO, stream=True)
            return replies, "".join(
                [chunk.choices[0].delta.content or "" async for chunk in stream]
            )

    replies, streamed = asyncio.run(main())
    assert {r.choices[0].message.content for r in replies} == {"the answer"} and len(
        {r.id for r in replies}
    ) == 8
    assert streamed == "the answer"


def test_comments_keep_a_silent_stream_alive():
    model = Scripted("rlm")
    model.gate.closed = True
    with running(model, keep_alive_seconds=0.02) as server:
        connection = server.open_chat(stream=True, rlm={"progress": "none"})
        response = connection.getresponse()
        assert response.getheader("content-type").startswith("text/event-stream")
        assert response.getheader("x-rlm-run") == "run-1"
        seen = [response.readline() for _ in range(8)]
        assert seen.count(b": keep-alive\n") >= 2
        model.gate.opened.set()
        rest = response.read()
        assert rest.endswith(b"data: [DONE]\n\n") and b"the answer" in rest
        connection.close()


def test_structured_answer_is_json_and_its_schema_reaches_the_run():
    model = Scripted("rlm", act=lambda c, q, g: {"n": 3, "name": "é"})
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    with running(model) as server:
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        reply = client(server).chat.completions.create(
            model="rlm", messages=HELLO, response_format=form
        )
        assert json.loads(reply.choices[0].message.content) == {"n": 3, "name": "é"}
        client(server).chat.completions.create(
            model="rlm", messages=HELLO, response_format={"type": "json_object"}
        )
        client(server).chat.completions.create(
            model="rlm", messages=HELLO, response_format={"type": "text"}
        )
    assert [s["output"] for s in model.gate.seen] == [schema, {"type": "object"}, None]


def test_partial_answer_says_length():
    partial = result(
        "so far", partial=True, stop_reason=at_limit("usd"), error="the dollars are used up"
    )
    with running(Scripted("rlm", act=lambda c, q, g: partial)) as server:
        reply = client(server).chat.completions.create(model="rlm", messages=HELLO)
    assert reply.choices[0].finish_reason == "length" and reply.model_extra["rlm"]["partial"]
    assert reply.model_extra["rlm"]["stop_reason"] == "budget:usd"


def test_stop_and_max_tokens_cut_the_answer():
    with running(Scripted("rlm", act=lambda c, q, g: "one two STOP three " + "x" * 400)) as server:
        ask = client(server).chat.completions.create
        cut = ask(model="rlm", messages=HELLO, stop=["three", "STOP"]).choices[0]
        assert (cut.message.content, cut.finish_reason) == ("one two ", "stop")
        short = ask(model="rlm", messages=HELLO, max_tokens=5).choices[0]
        assert (len(short.message.content), short.finish_reason) == (20, "length")


FAILURES = [
    (ContextError("the file is binary"), openai.BadRequestError, "the file is binary"),
    (
        LMError("key sk-secret refused by https://inner", kind="auth", status=401),
        openai.InternalServerError,
        "(auth)",
    ),
    (LMError("slow down", kind="rate_limit"), openai.RateLimitError, "rate limited"),
    (
        SandboxError("landlock is missing on host-17"),
        openai.InternalServerError,
        "sandbox cannot be started",
    ),
    (RuntimeError("secret detail"), openai.InternalServerError, "Internal error"),
]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    FAILURES,
    ids=[type(f[0]).__name__ + str(i) for i, f in enumerate(FAILURES)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_have_openais_shape_and_no_internals(error, kind, words, stream):
    with running(Scripted("rlm", act=lambda c, q, g: error)) as server:  # noqa: SIM117
        # In a stream the run may already have begun: then the error comes as an event, and is an
        # APIError.
        with pytest.raises(openai.APIError if stream else kind) as e:
            reply = client(server).chat.completions.create(
                model="rlm", messages=HELLO, stream=stream
            )
            if stream:
                list(reply)
    assert words in str(e.value)
    for secret in ("sk-secret", "inner", "host-17", "secret detail"):
        assert secret not in str(e.value)


def test_wrong_values_are_400_and_name_the_field(server):
    ask = client(server).chat.completions.create
    wrong = [
        ({"n": 2}, "n"),
        ({"temperature": 7}, "temperature"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
                ]
            },
            "messages.0.content.0",
        ),
        ({"extra_body": {"rlm": {"budget": {"dollars": 1}}}}, "rlm.budget.dollars"),
        ({"extra_body": {"rlm": {"max_depth": -1}}}, "rlm.max_depth"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ]
    for fields, param in wrong:
        with pytest.raises(openai.BadRequestError) as e:
            ask(**{"model": "rlm", "messages": HELLO, **fields})
        assert e.value.param == param and e.value.type == "invalid_request_error", fields


def test_unknown_fields_are_reported_as_ignored(server):
    extra = {"chat_id": 5, "presence_penalty": 0.5}
    reply = client(server).chat.completions.create(
        model="rlm", messages=HELLO, user="u", extra_body=extra
    )
    assert reply.model_extra["rlm"]["ignored"] == ["chat_id", "presence_penalty"]
