"""OpenAILM and an endpoint that fails: retries, broken streams, silence."""

import asyncio
import email.utils
import json
import socket
import time

import pytest
from rlm.fake_server import Cut, Fail, FakeServer, Hang, Raw
from rlm.openai_client import HI, KEY, SCHEMA, SEARCH, STREAMED, ask, fails, model, no_environment  # noqa: F401

from rlm_runtime.lms.openai import OpenAILM

# Failures


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
@STREAMED
def test_passing_failures_are_retried(status, stream):
    with FakeServer([Fail(status), Fail(status), "fine"]) as server:
        assert ask(server, stream=stream).text == "fine"
        assert server.count == 3


@pytest.mark.parametrize(
    "status, kind",
    [(400, "bad_request"), (401, "auth"), (403, "auth"), (404, "not_found"), (422, "bad_request")],
)
def test_final_failures_are_not_retried(status, kind):
    with FakeServer(Fail(status, "because")) as server:
        error = fails(server, kind, "because")
        assert server.count == 1 and error.status == status and error.model == "openai:m"


def test_a_quota_used_up_is_not_retried():
    with FakeServer(Fail(429, "You exceeded your current quota", "insufficient_quota")) as server:
        fails(server, "rate_limit", "quota")
        assert server.count == 1


def test_retries_end_and_the_message_says_how_many():
    with FakeServer(Fail(503, "busy")) as server:
        fails(server, "server", "busy.*3 tries", options={"max_retries": 2})
        assert server.count == 3


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens",
        "prompt is too long: 210000 tokens > 200000 maximum",
        "the request exceeds the available context size, try increasing it",
    ],
)
@pytest.mark.parametrize("status", [400, 413, 500])
def test_a_prompt_too_long_is_its_own_kind_and_final(message, status):
    with FakeServer(Fail(status, message)) as server:
        fails(server, "context_overflow", message[:20])
        assert server.count == 1


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_waited_for(as_date):
    def after():
        return email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "1"

    with FakeServer(
        lambda body: Fail(429, headers={"Retry-After": after()}) if server.count == 1 else "ok"
    ) as server:
        began = time.monotonic()
        assert ask(server).text == "ok"
        assert time.monotonic() - began >= 0.95  # a date has whole seconds


def test_retry_after_holds_for_all_callers():
    """Of many calls at once only those in flight meet the limit; none comes back before its
    time."""
    at = []

    def reply(_):
        at.append(time.monotonic())
        return Fail(429, headers={"Retry-After": "0.5"}) if len(at) == 1 else "ok"

    async def main(lm):
        first = asyncio.create_task(lm.complete(HI))
        while not lm.endpoint._pause.remaining():
            await asyncio.sleep(0.001)
        await asyncio.gather(first, *[lm.complete(HI) for _ in range(10)])

    with FakeServer(reply) as server:
        lm = model(server)
        asyncio.run(asyncio.wait_for(main(lm), 20))
    assert len(at) == 12 and min(at[1:]) - at[0] >= 0.45


def test_a_retry_after_beyond_the_timeout_is_not_waited_for():
    with FakeServer(Fail(429, "later", headers={"Retry-After": "3600"})) as server:
        fails(server, "rate_limit", "3600 s would pass the timeout", options={"timeout": 30})


@pytest.mark.parametrize(
    "reply",
    [Cut(pieces=-1), Cut(), Raw(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{", whole=True)],
)
def test_a_connection_that_breaks_is_tried_again(reply):
    with FakeServer([reply, "ok"]) as server:
        assert ask(server).text == "ok" and server.count == 2
    with FakeServer(reply) as server:
        fails(server, "connection", "127.0.0.1", options={"max_retries": 1})


def test_a_server_that_is_down_is_named():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/v1"  # bound, not listening
        error = fails(
            None, "connection", "cannot reach " + url, lm=OpenAILM("m", base_url=url, backoff=0.001)
        )
    assert "refused" in str(error) and "Is the server running" in str(error)


def test_a_server_that_went_away_and_came_back():
    async def main(lm):
        await lm.complete(HI)
        server.drop_connections()
        return await lm.complete(HI)

    with FakeServer("ok") as server:
        assert asyncio.run(main(model(server))).text == "ok"


@STREAMED
@pytest.mark.parametrize(
    "raw",
    [b"<html>gateway</html>", b"", b"[1]", b'{"choices": 4}', b"{}", b"\xff\xfe", b"[" * 100_000],
    ids=range(7),
)
def test_a_body_that_is_no_reply_is_a_protocol_error(raw, stream):
    with FakeServer(Raw(raw)) as server:
        fails(server, "protocol", stream=stream)
        assert server.count == 1


@STREAMED
def test_a_reply_without_choices_is_its_own_kind_and_tried_again(stream):
    """Gateways send it when the model behind them failed."""
    end = b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 0}}\n\ndata: [DONE]\n\n'
    none = Raw(b'{"choices": []}') if stream is False else Raw(end, "text/event-stream")
    with FakeServer([none, "whole"]) as server:
        assert ask(server, stream=stream).text == "whole" and server.count == 2
    with FakeServer(none) as server:
        fails(
            server,
            "empty",
            "without any choice.*3 tries",
            stream=stream,
            options={"max_retries": 2},
        )


@STREAMED
def test_an_error_inside_the_choice(stream):
    """Routers pass on so that the model behind them failed."""
    error = {"code": 429, "message": "slow down, please"}
    for choice, kind, match in (
        ({"error": error}, "rate_limit", "slow down, please"),
        ({"error": {"code": 400, "message": "no such tool"}}, "bad_request", "no such tool"),
        ({"finish_reason": "error"}, "server", "ended in an error"),
    ):
        part = {"message": {"content": ""}} if stream is False else {"delta": {"content": ""}}
        body = json.dumps({"choices": [{**part, "finish_reason": None, **choice}]})
        raw = (
            Raw(body.encode())
            if stream is False
            else Raw(f"data: {body}\n\n".encode(), "text/event-stream")
        )
        with FakeServer([raw, "fine"]) as server:
            if kind == "bad_request":
                fails(server, kind, match, stream=stream)
                assert server.count == 1
            else:
                assert ask(server, stream=stream).text == "fine" and server.count == 2
        with FakeServer(raw) as server:
            fails(server, kind, match, stream=stream, options={"max_retries": 1})


def test_bytes_that_are_no_http():
    with FakeServer(Raw(b"SSH-2.0-OpenSSH_9\r\n", whole=True)) as server:
        fails(server, "protocol", "127.0.0.1")


def test_odd_shapes_never_raise_anything_else():
    shapes = [None, 1, "x", [], {}, [None], {"a": 1}, [[]], True]
    for message in ({"content": s, "tool_calls": s, "reasoning": s, "refusal": s} for s in shapes):
        for stream in (False, True):
            choice = {"message": message, "delta": message, "finish_reason": message["content"]}
            whole = {"choices": [choice], "usage": message["content"], "model": message["content"]}
            kind = "text/event-stream" if stream else "application/json"
            text = f"data: {json.dumps(whole)}\n\ndata: [DONE]\n\n" if stream else json.dumps(whole)
            with FakeServer(Raw(text.encode(), kind)) as server:
                assert isinstance(ask(server, stream=stream).text, str)


def test_a_redirect_names_its_target():
    with FakeServer(Fail(308, headers={"Location": "https://elsewhere.example/v1"})) as server:
        fails(server, "not_found", "https://elsewhere.example/v1")


def test_a_wrong_key():
    with FakeServer("ok", api_key="sk-right-one-000000") as server:
        fails(server, "auth", "Incorrect API key")


# Streams that break


def test_a_cut_stream_is_retried_only_before_anything_was_handed_on():
    with FakeServer([Cut(pieces=0), "whole"]) as server:
        assert ask(server, stream=True).text == "whole"
    pieces = []
    with FakeServer([Cut(pieces=2), "whole"]) as server:
        error = fails(
            server,
            "connection",
            "characters of the reply had been handed on",
            stream=True,
            pieces=pieces,
        )
        assert server.count == 1 and pieces and str(len("".join(pieces))) in str(error)


def test_a_stream_that_ends_quietly_without_a_finish_is_cut():
    raw = b'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
    with FakeServer(Raw(raw, "text/event-stream")) as server:
        fails(server, "connection", "ended before", stream=True)


@pytest.mark.parametrize("stream", [True])
def test_an_error_in_the_middle_of_a_stream(stream):
    with FakeServer([Cut(pieces=0, error={"message": "overloaded", "code": 503}), "ok"]) as server:
        assert ask(server, stream=stream).text == "ok"
    with FakeServer(Cut(pieces=1, error={"message": "gone", "code": 503})) as server:
        assert fails(server, "server", "gone", stream=stream).status == 503
        assert server.count == 1
    with FakeServer(
        Cut(pieces=0, error={"message": "maximum context length is 5", "code": 400})
    ) as server:
        fails(server, "context_overflow", stream=stream)


def test_an_error_with_status_200():
    with FakeServer(Raw(b'{"error": {"message": "no credits", "code": 402}}')) as server:
        assert fails(server, "bad_request", "no credits").status == 402


# Time


@STREAMED
def test_silence_ends_in_a_timeout(stream):
    hang = Hang(pieces=1) if stream else Hang()
    with FakeServer(hang) as server:
        fails(
            server,
            "timeout",
            "within the timeout of 0.3 s",
            stream=stream,
            options={"timeout": 0.3},
        )
    with FakeServer([hang, "ok"] if not stream else [Hang(), "ok"]) as server:
        assert ask(server, stream=stream, options={"read_timeout": 0.2}).text == "ok"


def test_cancelling_the_task_cancels_the_request():
    async def main(lm):
        task = asyncio.create_task(lm.complete(HI))
        while not server.active:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while not server.aborted:  # the server has seen the client go
            await asyncio.sleep(0.001)

    with FakeServer(Hang()) as server:
        asyncio.run(asyncio.wait_for(main(model(server)), 20))


def test_an_exception_of_on_text_is_the_callers_own():
    def broken(_):
        raise BrokenPipeError("the reader left")

    with FakeServer("ok") as server:
        with pytest.raises(BrokenPipeError, match="the reader left"):
            asyncio.run(model(server).complete(HI, on_text=broken))
        assert server.count == 1


def test_waiting_for_our_own_limits_is_not_the_endpoints_time():
    async def main(lm):
        return await asyncio.gather(*[lm.complete(HI) for _ in range(6)])

    with FakeServer("ok", latency=0.3) as server:
        assert len(asyncio.run(main(model(server, concurrency=1, timeout=1.5)))) == 6
