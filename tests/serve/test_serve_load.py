"""Clients that go away, a queue that is full, engines that are not there yet or no more, and
stopping in order."""

import json
import socket
import threading

import pytest

from mor_jax.inference.engine.plain import PlainService
from serve.support import HELLO, backend, plain, running


@pytest.fixture
def held(small):
    """A server whose engine draws nothing until it is let go."""
    with running(plain(small, queue=2), drain_seconds=30) as server:
        server.model.service.hold.clear()
        yield server


def hang_up(connection):
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


def stats_are(server, running, waiting):
    server.wait_for(
        lambda: (
            (server.stat("num_requests_running"), server.stat("num_requests_waiting"))
            == (running, waiting)
        ),
        f"{running} running and {waiting} waiting, not {server.model.service.stats()}",
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_lane_and_its_place_in_the_queue(held, stream):
    first, second = held.open(stream=stream), held.open(stream=stream)
    stats_are(held, 1, 1)
    hang_up(first)
    hang_up(second)
    held.wait_for(lambda: held.metrics.value("mor_jax:disconnects_total") == 2, "both are missed")
    held.model.service.hold.set()
    stats_are(held, 0, 0)
    held.wait_for(lambda: held.admission.running == 0, "nobody is inside")
    drawn = held.model.service.stats()["generation_steps_total"]
    assert drawn <= 1, "nothing was drawn for those who had gone"
    assert held.complete(max_tokens=2)[0] == 200
    held.wait_for(
        lambda: (
            held.metrics.value(
                "mor_jax:request_failure_total", model_name="small", finished_reason="abort"
            )
            == 2
        ),
        "both are counted",
    )


def test_a_full_queue_is_429_and_leaves_nothing_behind(held):
    open_ = [held.open()]
    stats_are(held, 1, 0)  # it has left the queue for the lane
    open_ += [held.open() for _ in range(2)]
    stats_are(held, 1, 2)
    for fields in ({"prompt": "x"}, {"prompt": ["x"] * 9}):
        status, headers, body = held.complete(**fields)
        assert (
            status == 429
            and int(headers["retry-after"]) >= 1
            and body["error"]["code"] == "queue_full"
        )
        assert body["error"]["type"] == "rate_limit_error"
    assert held.request("GET", "/health")[0] == 200
    stats_are(held, 1, 2)
    held.model.service.hold.set()
    assert [c.getresponse().status for c in open_] == [200] * 3
    for connection in open_:
        connection.close()


def test_a_request_that_fits_the_queue_in_part_is_taken_out_whole(held):
    first = held.open()
    stats_are(held, 1, 0)
    assert held.complete(prompt=["x"] * 3)[0] == 429
    held.model.service.hold.set()
    assert first.getresponse().status == 200
    first.close()
    stats_are(held, 0, 0)


def test_a_deadline_gives_what_there_is(held):
    connection = held.open(deadline=0.05)
    stats_are(held, 1, 0)
    threading.Event().wait(0.1)
    held.model.service.hold.set()
    body = json.loads(connection.getresponse().read())
    connection.close()
    choice = body["choices"][0]
    assert (
        choice["mor"]["ended"] == "deadline"
        and choice["finish_reason"] == "length"
        and choice["text"] == ""
    )


def test_a_silent_stream_is_kept_alive(small):
    with running(plain(small), keep_alive_seconds=0.02) as server:
        server.model.service.hold.clear()
        connection = server.open(stream=True, max_tokens=2)
        response = connection.getresponse()
        assert response.readline() == b": keep-alive\n"
        server.model.service.hold.set()
        assert response.read().endswith(b"data: [DONE]\n\n")
        connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_drain_lets_requests_finish_and_takes_no_new_ones(held, stream):
    connection = held.open(stream=stream)
    stats_are(held, 1, 0)
    held.stop()
    held.wait_for(lambda: held.admission.draining, "the drain has begun")
    assert held.request("GET", "/ready")[0] == 503 and held.request("GET", "/health")[0] == 200
    status, headers, body = held.complete()
    assert status == 503 and "retry-after" in headers and body["error"]["code"] == "draining"
    held.model.service.hold.set()
    response = connection.getresponse()
    assert response.status == 200 and b'"length"' in response.read()
    connection.close()
    assert held.done.wait(30)


@pytest.mark.parametrize("stream", [False, True])
def test_a_drain_that_takes_too_long_cancels(small, stream):
    with running(plain(small), drain_seconds=0.05) as server:
        server.model.service.hold.clear()
        connection = server.open(stream=stream)
        stats_are(server, 1, 0)
        server.stop()
        threading.Timer(0.2, server.model.service.hold.set).start()
        response = connection.getresponse()
        body = response.read()
        assert (response.status == 200) == stream and b'"cancelled"' in body
        assert not stream or body.endswith(b"data: [DONE]\n\n")
        connection.close()
        assert server.done.wait(30)


def test_before_the_models_are_there_everything_is_503(small):
    gate = threading.Event()

    def load():
        gate.wait()
        return [backend("small", small, PlainService(small))]

    with running(load, wait=False) as server:
        for path in ("/health", "/ready", "/v1/models"):
            status, headers, raw = server.request("GET", path)
            assert (
                status == 503
                and json.loads(raw)["error"]["code"] == "warming_up"
                and headers["retry-after"]
            )
        assert server.complete()[0] == 503
        assert (
            server.request("GET", "/metrics")[0] == 200
            and server.request("GET", "/openapi.json")[0] == 200
        )
        gate.set()
        server.wait_for(lambda: server.request("GET", "/health")[0] == 200, "it is ready")
        assert server.complete(max_tokens=1)[0] == 200


def test_a_dead_engine_is_told(small):
    """An engine that fails ends its requests with an error, and the server says that it is not
    healthy."""
    with running(plain(small)) as server:
        service = server.model.service
        service.hold.clear()
        whole, stream = server.open(), server.open(stream=True)
        stats_are(server, 1, 1)
        service._draw = lambda *a: 1 / 0
        service.hold.set()
        response = whole.getresponse()
        assert (
            response.status == 500
            and json.loads(response.read())["error"]["code"] == "engine_error"
        )
        assert b'"engine_error"' in stream.getresponse().read()
        status, _, raw = server.request("GET", "/health")
        assert status == 503 and json.loads(raw)["error"]["code"] == "engine_dead"
        assert server.complete()[0] == 503
        for connection in (whole, stream):
            connection.close()


def test_keys_hosts_and_pages(small):
    with running(plain(small), api_keys=("sesame",), allowed_hosts=("127.0.0.1",)) as server:
        assert server.complete()[0] == 401
        key = {"Authorization": "Bearer sesame"}
        assert server.request("GET", "/v1/models", headers=key)[0] == 200
        assert server.request("GET", "/health")[0] == 200
        assert server.request("GET", "/health", headers={"Host": "evil.example"})[0] == 403
        status, headers, _ = server.request(
            "GET", "/v1/models", headers={**key, "Origin": "https://evil.example"}
        )
        assert status == 403 and "access-control-allow-origin" not in headers


def test_a_slow_body_is_cut_off(small):
    with running(plain(small), body_idle_seconds=0.1, header_seconds=0.2) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
            s.sendall(head)
            assert s.recv(4096).startswith(b"HTTP/1.1 408")
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
            s.sendall(head[:30])
            assert s.recv(4096) == b""
        assert server.post("/v1/chat/completions", messages=HELLO, max_tokens=1)[0] == 200
