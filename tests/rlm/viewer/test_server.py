"""The viewer over HTTP: what it hands out, and what it refuses."""

import http.client
import json
import os
import subprocess
import sys
import urllib.parse

import pytest

from rlm.big_trajectory import build, write
from rlm.viewer import attack
from rlm_runtime.errors import UsageError
from rlm_runtime.trajectory import EVENTS, NodeEnd, RunEnd, encode, read
from rlm_runtime.viewer import assets, export, make_app, running, serve
from rlm_runtime.viewer.data import EventsFile, Library, dumps

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    base = tmp_path_factory.mktemp("viewer")
    runs = base / "runs"
    write(runs / "small", build(8, 20))
    write(runs / "deep" / "er" / "attack", attack.events())
    write(runs / "unfinished", build(9, 20)[:-1])
    write(base / "secret-run", build(4, 4))
    (base / "secret.txt").write_text("TOP SECRET")
    os.symlink(base / "secret-run", runs / "linked-folder")
    (runs / "linked-file").mkdir()
    os.symlink(base / "secret-run" / EVENTS, runs / "linked-file" / EVENTS)
    return runs


@pytest.fixture(scope="module")
def server(library):
    with running(library) as url:
        yield urllib.parse.urlsplit(url)


def ask(server, path, method="GET", host=None):
    connection = http.client.HTTPConnection(server.hostname, server.port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    if host is None:
        host = server.netloc
    for name in [host] if isinstance(host, str) else host:
        connection.putheader("Host", name)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def get(server, what, **query):
    response, body = ask(server, f"/api/{what}?{urllib.parse.urlencode(query)}")
    return response.status, json.loads(body)


def test_the_page_and_its_parts(server):
    response, body = ask(server, "/")
    assert response.status == 200 and response.headers["Content-Type"] == "text/html; charset=utf-8"
    page = body.decode()
    assert "<script>" not in page and "style=" not in page and " on" + "click=" not in page
    for name in (assets.STYLE, *assets.SCRIPTS):
        assert f'"{name}"' in page
        response, body = ask(server, f"/{name}")
        assert response.status == 200 and body.decode() == assets.text(name)


def test_every_answer_carries_the_rules(server):
    for path in ("/", "/page.js", "/page.css", "/api/runs", "/api/events?run=nope"):
        response, _ = ask(server, path)
        policy = response.headers["Content-Security-Policy"]
        assert (
            "default-src 'none'" in policy
            and "script-src 'self'" in policy
            and "frame-ancestors 'none'" in policy
        )
        assert "unsafe" not in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_the_page_asks_nobody_else():
    for name in ("page.html", assets.STYLE, *assets.SCRIPTS):
        text = assets.text(name)
        assert "://" not in text and "@import" not in text and "url(" not in text, name
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
        ):
            assert word not in text, f"{name}: {word}"


def test_the_list_of_runs(server, library):
    status, found = get(server, "runs")
    assert status == 200 and not found["single"]
    by_id = {run["id"]: run for run in found["runs"]}
    assert set(by_id) == {"small", "deep/er/attack", "unfinished"}
    small = by_id["small"]
    end = read(library / "small")[-1]
    assert (
        small["complete"] and small["answer"] == end.answer and small["stop_reason"] == "answered"
    )
    assert small["usage"]["input_tokens"] == end.usage.input_tokens and small["turns"] == 8
    assert not by_id["unfinished"]["complete"]


def test_events_come_in_parts_and_whole(server, library):
    events = read(library / "small")
    _, first = get(server, "events", run="small")
    assert first["next"] == len(events) and first["complete"]
    assert [e["type"] for e in first["events"]] == [e.type for e in events]
    _, rest = get(server, "events", run="small", **{"from": len(events) - 2})
    assert len(rest["events"]) == 2 and rest["events"] == first["events"][-2:]
    _, none = get(server, "events", run="small", **{"from": 10**6})
    assert none["events"] == []


def test_long_texts_are_cut_first_and_whole_on_demand(server, library):
    events = read(library / "deep/er/attack")
    _, found = get(server, "events", run="deep/er/attack")
    cut = [i for i, e in enumerate(found["events"]) if e.get("cut")]
    long = [i for i, e in enumerate(events) if b"W" * 50_000 in encode(e)]
    assert set(long) <= set(cut) and long
    assert len(json.dumps(found)) < 3_000_000
    _, whole = get(server, "event", run="deep/er/attack", number=long[0])
    assert whole == json.loads(encode(events[long[0]]))


def test_search_finds_text_in_the_cut_part(server, tmp_path):
    write(
        tmp_path / "runs" / "a",
        [
            NodeEnd(node="0.1", value="x" * 50_000 + "Needle" + "y" * 50),
            RunEnd(stop_reason="answered"),
        ],
    )
    with running(tmp_path / "runs" / "a") as url:
        _, found = get(urllib.parse.urlsplit(url), "search", run="a", words="nEEdle")
    assert found["hits"] == [
        {"event": 0, "field": "value", "match": "Needle", "before": "x" * 40, "after": "y" * 50},
    ]
    _, none = get(server, "search", run="small", words="  ")
    assert none["hits"] == []
    _, most = get(server, "search", run="small", words="e")
    assert most["hits"] and all(h["match"].lower() == "e" for h in most["hits"])
    _, special = get(server, "search", run="small", words="(.*")
    assert special["hits"] == []


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:80",
        "",
        "[::1].x",
        "10.0.0.1",
        "0.0.0.0",
    ],
)
def test_another_host_name_is_refused(server, host):
    response, body = ask(server, "/api/runs", host=host)
    assert response.status in (400, 421) and b"small" not in body


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:99", "127.0.0.1:1", "[::1]:5", "127.8.8.8"]
)
def test_our_own_names_are_answered(server, host):
    assert ask(server, "/api/runs", host=host)[0].status == 200


def test_two_hosts_are_refused(server):
    response, _ = ask(server, "/api/runs", host=["localhost", "evil.example"])
    assert response.status in (400, 421)


@pytest.mark.parametrize(
    "run",
    [
        "../secret-run",
        "..",
        ".",
        "/",
        "",
        "small/../../secret-run",
        "linked-folder",
        "linked-file",
        "small/events.jsonl",
        "%2e%2e/secret-run",
        "..\\secret-run",
        "small\0",
        "/etc",
        "deep",
        "SMALL",
    ],
)
def test_no_run_outside_the_folder(server, run, library):
    for what in ("events", "event", "search"):
        status, found = get(server, what, run=run, words="a")
        assert status == 404 and "No run" in found["error"]
    status, found = get(server, "events", run=str(library.parent / "secret-run"))
    assert status == 404


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "/data.py",
        "/server.py",
        "/./page.js/../data.py",
        "//etc/passwd",
        "/page.html",
        "/api",
        "/api/",
        "/api/../runs",
        "/api/files",
        "/small/events.jsonl",
        "/static/page.js",
    ],
)
def test_no_other_file_is_served(server, path):
    response, body = ask(server, path)
    assert response.status == 404, path
    assert b"SECRET" not in body and b"import" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_read_only(server, method, library):
    before = {p: p.stat().st_mtime_ns for p in library.rglob("*")}
    for path in ("/", "/api/runs", "/api/events?run=small"):
        assert ask(server, path, method)[0].status == 405
    assert before == {p: p.stat().st_mtime_ns for p in library.rglob("*")}


@pytest.mark.parametrize("number", ["-1", "x", "1e3", "9" * 30, "²", "1; drop"])
def test_a_wrong_number_is_a_client_error(server, number):
    assert get(server, "events", run="small", **{"from": number})[0] == 400
    assert get(server, "event", run="small", number=number)[0] == 400


def test_no_such_event(server):
    assert get(server, "event", run="small", number=99999)[0] == 404


def test_a_growing_file_and_a_damaged_one(tmp_path):
    events = build(4, 6)
    folder = write(tmp_path / "run", events[:5])
    run = EventsFile(folder / EVENTS)
    assert json.loads(run.since(0))["next"] == 5 and not run.complete
    with open(folder / EVENTS, "ab") as file:
        file.write(b"not json\n" + encode(events[5])[:10])
    found = json.loads(run.since(5))
    assert [e["type"] for e in found["events"]] == ["damaged"]
    with open(folder / EVENTS, "ab") as file:
        file.write(encode(events[5])[10:] + b"\n" + encode(events[-1]) + b"\n")
    found = json.loads(run.since(6))
    assert [e["type"] for e in found["events"]] == [events[5].type, "run_end"] and found["complete"]
    write(tmp_path / "other", events[:2])
    os.replace(tmp_path / "other" / EVENTS, folder / EVENTS)
    assert json.loads(run.since(0))["next"] == 2 and not run.complete


def test_a_file_is_a_library_of_one(tmp_path):
    write(tmp_path / "my-run", build(4, 6))
    with running(tmp_path / "my-run" / EVENTS) as url:
        _, found = get(urllib.parse.urlsplit(url), "runs")
    assert found["single"] and [r["id"] for r in found["runs"]] == ["my-run"]


def test_a_run_folder_is_shown_as_a_library_of_itself(tmp_path):
    write(tmp_path / "my-run", build(4, 6))
    assert [row["id"] for row in Library(tmp_path / "my-run").listing()] == ["my-run"]
    assert Library(tmp_path / "my-run").run("my-run").since(0).endswith('"complete":true}')


def test_a_run_with_a_long_question_and_a_long_answer_is_listed_whole(tmp_path):
    start, *rest, end = build(4, 6)
    start = start.model_copy(update={"question": "q" * (2 << 20)})
    write(tmp_path / "run", [start, *rest, end.model_copy(update={"answer": "a" * (1 << 20)})])
    (row,) = Library(tmp_path).listing()
    assert row["complete"] and row["stop_reason"] == end.stop_reason and row["answer"] == "a" * 400
    assert row["question"] == "q" * 400 and row["started_at"] == start.started_at


def test_only_this_machine(tmp_path):
    write(tmp_path / "run", build(4, 6))
    for host in ("0.0.0.0", "192.168.0.1", "example.org", "::"):
        with pytest.raises(UsageError, match="this machine only"):
            serve(tmp_path, host=host)


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(UsageError, match="No trajectory"):
        make_app(tmp_path / "missing")
    with pytest.raises(UsageError, match="No trajectory"):
        export(tmp_path, tmp_path / "x.html")
    write(tmp_path / "run", build(4, 6))
    with pytest.raises(UsageError, match="cannot be written"):
        export(tmp_path / "run", tmp_path / "no" / "such" / "x.html")
    with running(tmp_path) as url, pytest.raises(UsageError, match="cannot listen"):
        serve(tmp_path, port=urllib.parse.urlsplit(url).port)


def test_without_the_extra_the_message_says_what_to_install(tmp_path):
    write(tmp_path / "run", build(4, 6))
    code = """
import sys
sys.modules["starlette"] = sys.modules["uvicorn"] = None
from rlm_runtime import viewer
from rlm_runtime.errors import UsageError
viewer.export(sys.argv[1] + "/run", sys.argv[1] + "/out.html")
try:
    viewer.serve(sys.argv[1])
except UsageError as e:
    print(e)
"""
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "[serve]" in shown.stdout and (tmp_path / "out.html").stat().st_size > 10_000


def test_an_exported_page_holds_the_data_as_data(tmp_path):
    events = attack.events()
    write(tmp_path / "run", events)
    page = export(tmp_path / "run", tmp_path / "page.html").read_text(encoding="utf-8")
    data = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    assert not set("<>&\u2028\u2029") & set(data) and data.isascii()
    assert json.loads(data)["events"] == [json.loads(encode(e)) for e in events]
    # Whatever stands outside the data is the page's own.
    own = page.replace(data, "")
    assert "pwned" not in own
    assert own.count("</script>") == 1 + len(assets.SCRIPTS)
    policy = page.split('Content-Security-Policy" content="')[1].split('"')[0]
    assert (
        "default-src 'none'" in policy and "connect-src 'none'" in policy and "unsafe" not in policy
    )
    for name in assets.SCRIPTS:
        assert assets.hashed(assets.text(name)) in policy
        assert f"<script>{assets.text(name)}</script>" in own
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "run"]


def test_scripts_can_stand_inside_a_page():
    for name in assets.SCRIPTS:
        text = assets.text(name)
        assert "</script" not in text.lower() and "<!--" not in text
    assert "</style" not in assets.text(assets.STYLE)


def test_json_for_the_page_is_strict():
    text = dumps({"x": [float("nan"), float("inf"), "\ud800", "\u2028"]})
    assert text.isascii() and json.loads(text, parse_constant=pytest.fail)["x"][:2] == [
        "nan",
        "inf",
    ]
