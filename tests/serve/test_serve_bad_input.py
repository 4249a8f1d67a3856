"""What a client may get wrong: an error in OpenAI's shape that names the field, and a server as
good as before."""

import json
import socket

import pytest

from serve.support import HELLO

LONG_SCHEMA = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
COMPLETIONS = {
    "context overflow": ({"prompt": "x" * 500}, "prompt", ["128", "501"]),
    "overflow by the reply": ({"max_tokens": 125}, "max_tokens", ["128", "125", "6"]),
    "no such token": ({"prompt": [5, 9999]}, "prompt", ["9999", "258"]),
    "negative token": ({"prompt": [-1]}, "prompt", ["prompt"]),
    "empty list": ({"prompt": []}, "prompt", ["prompt"]),
    "empty token list": ({"prompt": [[]]}, "prompt", ["prompt"]),
    "prompt of another type": ({"prompt": {"a": 1}}, "prompt", ["prompt"]),
    "temperature": ({"temperature": -0.1}, "temperature", []),
    "temperature as text": ({"temperature": "hot"}, "temperature", []),
    "top_p": ({"top_p": 0}, "top_p", []),
    "top_k": ({"top_k": -2}, "top_k", []),
    "min_p": ({"min_p": 1.5}, "min_p", []),
    "repetition_penalty": ({"repetition_penalty": 0}, "repetition_penalty", []),
    "presence_penalty": ({"presence_penalty": 3}, "presence_penalty", []),
    "five stops": ({"stop": ["a", "b", "c", "d", "e"]}, "stop", []),
    "n": ({"n": 0}, "n", []),
    "best_of below n": ({"n": 3, "best_of": 2}, "best_of", ["3", "2"]),
    "best_of in a stream": ({"best_of": 2, "stream": True}, "best_of", []),
    "logprobs": ({"logprobs": 21}, "logprobs", []),
    "suffix": ({"suffix": "end"}, "suffix", ["not supported"]),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens", ["echo"]),
    "bias of no token": ({"logit_bias": {"9999": 1}}, "logit_bias", []),
    "bias by a word": ({"logit_bias": {"hello": 1}}, "logit_bias", []),
    "stop of no token": ({"stop_token_ids": [9999]}, "stop_token_ids", []),
    "options without a stream": ({"stream_options": {"include_usage": True}}, "stream_options", []),
    "depth beyond the model": ({"max_depth": 9}, None, ["1 to 3", "9"]),
    "depths that cross": ({"min_depth": 3, "max_depth": 1}, None, ["3", "1"]),
    "deadline": ({"deadline": 0}, "deadline", []),
    "seed": ({"seed": 2**70}, "seed", []),
    "no model": ({"model": None}, "model", []),
    "too many sequences": ({"prompt": ["a"] * 1000, "n": 128}, "n", ["128,000", "1,024"]),
    "two constraints": ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", []),
    "schema that cannot be compiled": ({"guided_json": LONG_SCHEMA}, "guided_json", []),
    "schema of a wrong type": ({"guided_json": {"type": "nothing"}}, "guided_json", []),
    "pattern that is none": ({"guided_regex": "a("}, "guided_regex", []),
}
CHATS = {
    "no messages": ({"messages": []}, "messages", []),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages.0.content",
        ["image"],
    ),
    "a role": ({"messages": [{"role": "boss", "content": "x"}]}, "messages.0.role", []),
    "tools": ({"tools": [{"type": "function"}]}, "tools", ["not supported"]),
    "tool choice": ({"tool_choice": "required"}, "tool_choice", []),
    "past tool calls": (
        {"messages": [{"role": "assistant", "tool_calls": [1]}]},
        "messages.0.tool_calls",
        [],
    ),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs", ["logprobs"]),
    "audio": ({"modalities": ["audio"]}, "modalities", []),
    "format": ({"response_format": {"type": "yaml"}}, "response_format", []),
    "schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": LONG_SCHEMA},
            }
        },
        "response_format",
        [],
    ),
    "overflow": ({"messages": [{"role": "user", "content": "x" * 500}]}, "messages", ["128"]),
}


def check(status, body, param, words):
    assert status == 400, body
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    found = body["error"]["param"]
    assert found == param or found.startswith(f"{param}."), found  # inside a field: its path
    assert body["error"]["type"] == "invalid_request_error"
    assert all(word in body["error"]["message"] for word in words), body["error"]["message"]


@pytest.mark.parametrize("case", COMPLETIONS)
def test_completions(server, case):
    fields, param, words = COMPLETIONS[case]
    status, _, body = server.complete(**fields)
    check(status, body, param, words)


@pytest.mark.parametrize("case", CHATS)
def test_chats(server, case):
    fields, param, words = CHATS[case]
    status, _, body = server.post("/v1/chat/completions", **{"messages": HELLO, **fields})
    check(status, body, param, words)


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", JSON, 400),
        (b"\xff\xfe{}", JSON, 400),
        (b'{"model": "small", "prompt": "\xff"}', JSON, 400),
        (b'{"model": "small", "prompt": "\\ud800"}', JSON, 400),
        (b"[" * 50_000, JSON, 400),
        (b"{}", JSON, 400),
        (b"", JSON, 400),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"", {**JSON, "Content-Length": str(17 << 20)}, 413),
        (b'{"model": "small", "prompt": "' + b"x" * (9 << 20) + b'"}', JSON, 413),
        (b'{"model": "nothing", "prompt": "x"}', JSON, 404),
    ],
    ids=lambda value: repr(value)[:24] if isinstance(value, bytes) else "",
)
def test_bodies(server, body, headers, status):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        got, _, raw = server.request("POST", path, body, headers)
        assert got in (status, 400), raw[:300]
        assert (got == status) or path != "/v1/completions"
        assert set(json.loads(raw)["error"]) == {"message", "type", "param", "code"}


def test_routes_and_methods(server):
    for method, path, status in [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("PUT", "/health", 405),
    ]:
        got, _, raw = server.request(method, path)
        assert got == status and json.loads(raw)["error"]["message"]


def test_a_head_that_is_no_http(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
        s.sendall(b"\x16\x03\x01 not http\r\n\r\n")
        assert b"400" in s.recv(4096)


def test_tokenize_takes_one_of_two(server):
    for fields in ({}, {"prompt": "x", "messages": HELLO}):
        status, _, body = server.post("/tokenize", **fields)
        check(status, body, "prompt", ["either"])
    status, _, body = server.post("/detokenize", tokens=[9999])
    check(status, body, "tokens", ["258"])


def test_after_all_of_that_the_server_is_as_before(server):
    assert server.request("GET", "/ready")[0] == 200 and server.complete(max_tokens=2)[0] == 200

    def idle():
        return server.stat("num_requests_running") == 0 and server.admission.running == 0

    server.wait_for(idle, "a client may see its answer before the request has left")
