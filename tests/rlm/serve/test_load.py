"""Bounded places, a bounded queue, clients that go away, and stopping without losing anyone."""

import json
import socket
import threading

import pytest

from rlm.serve.support import Scripted, running


@pytest.fixture
def closed():
    """A model whose runs wait until the gate is opened."""
    model = Scripted("rlm")
    model.gate.closed = True
    return model


def hang_up(connection):
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_run(closed, stream):
    with running(closed, max_runs=1) as server:
        connection = server.open_chat(stream=stream)
        closed.gate.wait_for(lambda: closed.gate.started)
        hang_up(connection)
        closed.gate.wait_for(lambda: closed.gate.cancelled)
        server.wait_metric("rlm_num_requests_running", 0)
        server.wait_metric("rlm_disconnects_total", 1)
        closed.gate.opened.set()
        assert server.chat()[0] == 200, "its place is free again"


def test_a_client_that_goes_away_while_waiting_leaves_the_queue(closed):
    with running(closed, max_runs=1, max_queue=1) as server:
        first = server.open_chat()
        closed.gate.wait_for(lambda: closed.gate.started)
        second = server.open_chat()
        server.wait_metric("rlm_num_requests_waiting", 1)
        assert server.chat()[0] == 429
        hang_up(second)
        server.wait_metric("rlm_num_requests_waiting", 0)
        closed.gate.opened.set()
        assert first.getresponse().status == 200
        server.wait_metric("rlm_num_requests_running", 0)
        assert closed.gate.started == 1
        first.close()


def test_a_client_that_goes_away_in_its_body_leaves_nothing(closed):
    with running(closed, max_runs=1, max_queue=0) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
        server.wait_metric("rlm_disconnects_total", 1)
        closed.gate.opened.set()
        assert server.chat()[0] == 200


def test_a_full_server_says_429_and_when_to_come_back(closed):
    with running(closed, max_runs=2, max_queue=1) as server:
        waiting = [server.open_chat() for _ in range(3)]
        closed.gate.wait_for(lambda: closed.gate.started == 2)
        server.wait_metric("rlm_num_requests_waiting", 1)
        status, headers, body = server.chat()
        assert (
            status == 429
            and int(headers["retry-after"]) >= 1
            and body["error"]["code"] == "queue_full"
        )
        assert server.request("GET", "/health")[0] == 200
        closed.gate.opened.set()
        assert [c.getresponse().status for c in waiting] == [200] * 3
        for c in waiting:
            c.close()


def test_waiting_too_long_is_429(closed):
    with running(closed, max_runs=1, max_queue=1, queue_seconds=0.1) as server:
        first = server.open_chat()
        closed.gate.wait_for(lambda: closed.gate.started)
        status, headers, body = server.chat()
        assert status == 429 and "retry-after" in headers and body["error"]["code"] == "queue_full"
        closed.gate.opened.set()
        first.close()


def test_never_more_runs_than_places():
    peak, now, lock = [0], [0], threading.Lock()

    def act(context, question, gate):
        with lock:
            now[0] += 1
            peak[0] = max(peak[0], now[0])
            now[0] -= 1
        return "x"

    model = Scripted("rlm", act=act)
    with running(model, max_runs=2, max_queue=100) as server:
        results = []
        threads = [
            threading.Thread(target=lambda: results.append(server.chat()[0])) for _ in range(20)
        ]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert results == [200] * 20 and peak[0] <= 2
        assert server.admission.running == 0 and server.admission.waiting == 0


def test_a_drain_lets_runs_finish_and_takes_no_new_ones(closed):
    with running(closed, drain_seconds=20) as server:
        connection = server.open_chat()
        closed.gate.wait_for(lambda: closed.gate.started)
        server.stop()
        server.wait_metric("rlm_num_requests_running", 1)
        for _ in range(100):
            if server.admission.draining:
                break
            threading.Event().wait(0.02)
        assert server.request("GET", "/ready")[0] == 503
        status, headers, body = server.chat()
        assert status == 503 and "retry-after" in headers and body["error"]["code"] == "draining"
        closed.gate.opened.set()
        response = connection.getresponse()
        assert (
            response.status == 200
            and json.loads(response.read())["choices"][0]["message"]["content"] == "the answer"
        )
        connection.close()
        assert server.done.wait(20)


@pytest.mark.parametrize("stream", [False, True])
def test_a_drain_cancels_what_takes_too_long(closed, stream):
    with running(closed, drain_seconds=0.1) as server:
        connection = server.open_chat(stream=stream)
        closed.gate.wait_for(lambda: closed.gate.started)
        server.stop()
        response = connection.getresponse()
        body = response.read()
        assert (response.status == 200) == stream and b'"cancelled"' in body
        assert not stream or body.endswith(b"data: [DONE]\n\n")
        assert server.done.wait(20) and closed.gate.cancelled == 1


def test_a_second_stop_does_not_wait(closed):
    with running(closed, drain_seconds=600) as server:
        connection = server.open_chat()
        closed.gate.wait_for(lambda: closed.gate.started)
        server.stop()
        server.stop()
        assert connection.getresponse().status == 503
        assert server.done.wait(20)


def test_budgets_of_requests_are_cut_to_the_servers():
    from rlm_runtime.budget import Budget

    model = Scripted("rlm", budget=Budget(turns=10, usd=2.0), max_depth=2)
    with running(model) as server:
        server.chat(
            rlm={"budget": {"turns": 50, "usd": 0.5, "seconds": 9}, "max_depth": 5},
            max_completion_tokens=700,
        )
        _, _, body = server.chat(rlm={"max_depth": 0})
    first, second = model.gate.seen
    assert (first["budget"].turns, first["budget"].usd, first["budget"].seconds) == (10, 0.5, 9)
    assert first["budget"].output_tokens == 700 and first["depth"] == 2
    assert second["depth"] == 0 and second["budget"] == model.budget
    assert body["rlm"]["budget"]["turns"] == 10 and body["rlm"]["budget"]["max_depth"] == 0
