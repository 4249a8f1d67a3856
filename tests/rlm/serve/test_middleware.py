"""What a request must pass: routes, keys, hosts, origins, sizes, pace; all errors in one shape."""

import contextlib
import json
import logging
import socket

import pytest

from rlm.serve.support import Scripted, running


@pytest.fixture(scope="module")
def server():
    with running(Scripted("rlm"), body_bytes=10_000) as server:
        yield server


def error_of(raw):
    body = json.loads(raw)
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_every_error_has_the_same_shape(server):
    cases = [
        ("GET", "/nowhere", None, {}, 404),
        ("GET", "/v1/nowhere/%00%1b", None, {}, 404),
        ("GET", "/v1/chat/completions", None, {}, 405),
        ("PUT", "/v1/models", None, {}, 405),
        ("POST", "/v1/chat/completions", b"{", {"Content-Type": "application/json"}, 400),
        ("POST", "/v1/chat/completions", b"\xff\xfe", {"Content-Type": "application/json"}, 400),
        ("POST", "/v1/chat/completions", b"[" * 9_000, {"Content-Type": "application/json"}, 400),
        ("POST", "/v1/chat/completions", b"{}", {"Content-Type": "application/json"}, 400),
        ("POST", "/v1/chat/completions", b"{}", {"Content-Type": "text/plain"}, 415),
        ("POST", "/v1/chat/completions", b"{}", {}, 415),
        ("POST", "/v1/chat/completions", b" " * 10_001, {"Content-Type": "application/json"}, 413),
        ("GET", "/v1/files/nothing", None, {}, 404),
    ]
    for method, path, body, headers, status in cases:
        got, out, raw = server.request(method, path, body, headers)
        assert got == status, (method, path, got, raw)
        error_of(raw)
        assert out["x-request-id"].startswith("req_")
        if status == 405:
            assert out["allow"]


def test_values_are_not_repeated_in_errors(server):
    status, _, body = server.chat(temperature="my secret prompt")
    assert status == 400 and "secret" not in json.dumps(body)


def test_request_ids_come_back_if_they_are_plain(server):
    assert (
        server.request("GET", "/health", headers={"X-Request-Id": "abc-1"})[1]["x-request-id"]
        == "abc-1"
    )
    assert server.request("GET", "/health", headers={"X-Request-Id": "a b\x1b"})[1][
        "x-request-id"
    ].startswith("req_")


def test_a_chunked_body_is_cut_off_while_it_comes(server):
    """Endless: the server must answer without waiting for its end."""
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
        s.sendall(head.encode())
        try:
            for _ in range(100):
                s.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
        except OSError:
            pass  # it hung up on us
        assert s.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_slow_body_and_a_slow_head_are_cut_off():
    with running(Scripted("rlm"), body_idle_seconds=0.1, header_seconds=0.1) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
            s.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            assert s.recv(4096).startswith(b"HTTP/1.1 408")
        for opening in (b"", b"GET /health HTTP/1.1\r\nHo"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
                s.sendall(opening)
                assert s.recv(4096) == b"", "the connection should have been closed"
        # a second head, after a good one
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
            s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += s.recv(4096)
            s.sendall(b"GET /hea")
            assert s.recv(4096) == b""


def test_a_long_run_is_not_cut_off_by_the_bounds_on_heads_and_bodies():
    model = Scripted("rlm")
    model.gate.closed = True
    with running(model, body_idle_seconds=0.05, header_seconds=0.05) as server:
        connection = server.open_chat()
        model.gate.wait_for(lambda: model.gate.started)
        server.wait_metric("rlm_num_requests_running", 1)
        with pytest.raises(TimeoutError):
            connection.sock.settimeout(0.3)
            connection.sock.recv(1)
        connection.sock.settimeout(20)
        model.gate.opened.set()
        assert connection.getresponse().status == 200
        connection.close()


def test_connections_are_bounded():
    with running(Scripted("rlm"), max_connections=2) as server:
        open_ = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(2)]
        for s in open_:
            s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert s.recv(4096).startswith(b"HTTP/1.1 200")
        third = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        with third, contextlib.suppress(ConnectionResetError):
            assert third.recv(1) == b""
        for s in open_:
            s.close()


def test_keys():
    with running(Scripted("rlm"), api_keys=("key-1", "key-2")) as server:
        for path in ("/health", "/ready", "/openapi.json"):
            assert server.request("GET", path)[0] == 200
        for value in (
            "",
            "Bearer ",
            "Bearer wrong",
            "Bearer key-1x",
            "Basic key-1",
            "key-1",
            "Bearer \xff",
        ):
            status, out, raw = server.request("GET", "/v1/models", headers={"Authorization": value})
            assert status == 401 and out["www-authenticate"] == "Bearer", value
            assert error_of(raw)["code"] == "invalid_api_key" and "key-1" not in raw.decode()
        for path in ("/metrics", "/v1/files", "/v1/models/rlm", "/nowhere"):
            assert server.request("GET", path)[0] == 401
        for key in ("key-1", "key-2"):
            assert server.chat(headers={"Authorization": f"Bearer {key}"})[0] == 200


def test_hosts_and_origins():
    with running(Scripted("rlm"), allowed_hosts=("localhost", "127.0.0.1", "::1")) as server:
        for host, status in (
            ("localhost:80", 200),
            ("127.0.0.1", 200),
            ("[::1]:8", 200),
            ("evil.example", 403),
            ("", 403),
        ):
            assert server.request("GET", "/health", headers={"Host": host})[0] == status, host
        here = f"127.0.0.1:{server.port}"
        for origin, status in (
            (f"http://{here}", 200),
            ("https://evil.example", 403),
            ("null", 403),
        ):
            assert (
                server.request("GET", "/v1/models", headers={"Origin": origin, "Host": here})[0]
                == status
            ), origin
        assert (
            server.request(
                "OPTIONS", "/v1/models", headers={"Origin": f"http://{here}", "Host": here}
            )[0]
            == 405
        )


def test_cors_when_it_is_allowed():
    page = "https://app.example"
    with running(Scripted("rlm"), cors_origins=(page,)) as server:
        asked = {
            "Origin": page,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        status, out, _ = server.request("OPTIONS", "/v1/chat/completions", headers=asked)
        assert status == 200 and out["access-control-allow-origin"] == page
        status, out, _ = server.request("GET", "/nowhere", headers={"Origin": page})
        assert status == 404 and out["access-control-allow-origin"] == page
        assert (
            "access-control-allow-origin"
            not in server.request("GET", "/health", headers={"Origin": "https://x"})[1]
        )


def test_metrics_and_health(server):
    server.chat()
    status, out, raw = server.request("GET", "/metrics")
    text = raw.decode()
    assert status == 200 and out["content-type"].startswith("text/plain")
    for line in text.splitlines():
        assert line.startswith("# ") or (
            len(line.rsplit(" ", 1)) == 2 and float(line.rsplit(" ", 1)[1]) >= 0
        )
    assert (
        'rlm_requests_total{finished_reason="answered"}' in text
        and "rlm_e2e_request_latency_seconds_bucket" in text
    )
    for path in ("/health", "/ready"):
        assert server.request("GET", path)[0] == 200


def test_the_log_holds_no_prompt_key_or_answer(caplog):
    with (
        caplog.at_level(logging.DEBUG, logger="rlm_runtime"),
        running(
            Scripted("rlm", act=lambda c, q, g: RuntimeError("prompt-words in an error")),
            api_keys=("key-secret",),
        ) as server,
    ):
        server.chat("prompt-words", headers={"Authorization": "Bearer key-secret"})
        server.request("GET", "/v1/models?token=key-secret")
        server.request("GET", "/v1/%0d%0afaked")
    text = "\n".join(r.getMessage() for r in caplog.records)
    assert "POST /v1/chat/completions 500" in text and "RuntimeError" in text
    assert "prompt-words" not in text and "key-secret" not in text
    assert "\nfaked" not in text and "\r" not in text
