"""The record of a run: what is written survives whatever happens to the process, the disk and the
text in it."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.big_trajectory import build, write
from rlm_runtime.context import Context
from rlm_runtime.errors import UsageError
from rlm_runtime.lms.base import Message, Usage
from rlm_runtime.repl.base import CellResult
from rlm_runtime.trajectory import (
    EVENTS,
    Asked,
    CellEnd,
    CellStart,
    NodeEnd,
    NodeStart,
    Replied,
    RunEnd,
    RunStart,
    Tail,
    TrajectoryWriter,
    decode,
    encode,
    follow,
    read,
    run_folder,
    summary,
)
from rlm_runtime.trajectory.writer import shorten

START = RunStart(run="r", started_at="2026-01-01T00:00:00Z", question="q?")
END = RunEnd(stop_reason="answered", answer=42)
HOSTILE = [
    "\x1b[31mred\x1b[0m \x1b]8;;http://x\x07link",
    "lone \ud800 and \udfff halves",
    "nul \x00 bell \x07 backspace \x08",
    "line\u2028sep\u2029para\x85next\x0bvt\x0cff\r\ncrlf",
    "\u202egnp.exe\u2066 \u200b\ufeff",
    "</script><!--<script>",
    '\\u0000 \\ud800 {"type":"run_end"}\n{"type":"run_end"}\n',
    "😀" * 100,
]


def untimed(events):
    return [e.model_copy(update={"t": 0.0}) for e in events]


def test_what_is_written_is_read(tmp_path):
    events = build(6, 12)
    with TrajectoryWriter(tmp_path / "a" / "run") as writer:
        stamped = [writer.write(e) for e in events]
    found = read(tmp_path / "a" / "run")
    assert found == stamped and untimed(found) == untimed(events)
    assert found.warnings == [] and found.complete and found.path == tmp_path / "a" / "run" / EVENTS
    times = [e.t for e in found]
    assert times == sorted(times) and times[0] >= 0


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_data_in_every_field(tmp_path, text):
    events = [
        NodeStart(node="0.1", parent="0", kind="lm", prompt=text, question=text),
        NodeEnd(node="0.1", value={text: [text]}, error=text),
        Asked(turn=1, messages=(Message(role="user", content=text),)),
        Replied(turn=1, message=Message(role="assistant", content=text), raw=text),
        CellStart(turn=1, cell=1, code=text),
        CellEnd(turn=1, cell=1, result=CellResult(status="ok", stdout=text, variables={"v": text})),
        RunEnd(stop_reason="answered", answer=text),
    ]
    with TrajectoryWriter(tmp_path / "run") as writer:
        for event in events:
            writer.write(event)
    assert writer.error is None
    lines = (tmp_path / "run" / EVENTS).read_bytes().split(b"\n")
    assert len(lines) == len(events) + 1 and lines[-1] == b""
    assert untimed(read(tmp_path / "run")) == events


@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_any_text_survives_encoding(text):
    event = NodeEnd(value=text, error=text)
    line = encode(event)
    assert b"\n" not in line
    assert decode(line)[0] == event


def test_ten_megabytes_in_one_line(tmp_path):
    text = "ab\n\x00\u2028" * 2_000_000
    with TrajectoryWriter(tmp_path / "run") as writer:
        writer.write(NodeEnd(value=text))
    assert read(tmp_path / "run")[0].value == text


def test_what_is_not_json_is_recorded_as_well_as_it_can_be():
    deep = leaf = {}
    for _ in range(3000):
        leaf["a"] = leaf = {}
    for value in (deep, object(), 10**5000, {"x": {1, 2}}, ["\ud800", float("nan")]):
        event, remark = decode(encode(NodeEnd(value=value)))
        assert isinstance(event, NodeEnd) and remark is None
    event, _ = decode(encode(NodeEnd(value=["\ud800", float("nan"), float("inf")])))
    assert event.value == ["\ud800", "nan", "inf"]


def test_a_killed_process_leaves_a_readable_file(tmp_path):
    code = """
import sys
from rlm_runtime.trajectory import *
w = TrajectoryWriter(sys.argv[1])
w.write(RunStart(run="r", started_at="now"))
i = 0
while True:
    w.write(NodeEnd(node=f"0.{i}", value="x" * 5000))
    i += 1
    if i == 200: print("going", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"going\n"
        process.send_signal(signal.SIGKILL)
    found = read(tmp_path / "run")
    assert len(found) > 200 and not found.complete
    assert [e.node for e in found[1:]] == [f"0.{i}" for i in range(len(found) - 1)]
    assert summary(found).stop_reason == "unfinished"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_file_cut_anywhere_gives_the_events_before_the_cut(tmp_path, share):
    write(tmp_path / "run", build(4, 8))
    file = tmp_path / "run" / EVENTS
    whole = read(file)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    found = read(file)
    assert found == whole[: len(found)] and len(found) == data[: int(len(data) * share)].count(
        b"\n"
    )
    assert len(found.warnings) == 1 and "cut" in found.warnings[0]


def test_damaged_lines_cost_only_themselves(tmp_path):
    events = [START, NodeEnd(value=1), NodeEnd(value=2), END]
    lines = [encode(e) for e in events]
    lines[1:1] = [
        b"\xff\xfe garbage",
        b"[1, 2]",
        b'{"type":"of the future","t":1}',
        b'{"type":"cell_start"}',
        b"",
    ]
    lines.insert(2, b"[" * 100_000)
    lines[-1] = lines[-1][:-1] + b',"future_field":{"a":1}}'
    (tmp_path / EVENTS).write_bytes(b"\n".join(lines) + b"\n")
    found = read(tmp_path)
    assert found == events
    assert len(found.warnings) == 6
    assert "line 2" in found.warnings[0] and "future_field" in found.warnings[-1]


def test_no_trajectory_is_said_plainly(tmp_path):
    with pytest.raises(UsageError, match=r"nothing-here.*events\.jsonl"):
        read(tmp_path / "nothing-here")


def test_a_folder_is_used_once_and_appears_whole(tmp_path):
    seen = []
    stop = threading.Event()

    def watch():
        while not stop.is_set():
            seen.extend(p.is_dir() and (p / "blobs").is_dir() for p in tmp_path.glob("run-*"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(50):
        TrajectoryWriter(tmp_path / f"run-{i}").close()
    stop.set()
    watcher.join()
    assert all(seen)
    with pytest.raises(UsageError, match="already holds a run"):
        TrajectoryWriter(tmp_path / "run-1")
    with TrajectoryWriter(tmp_path / "run-1", append=True) as writer:
        writer.write(START)
    assert len(read(tmp_path / "run-1")) == 1
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_cannot_be_made_is_told_at_the_door(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        TrajectoryWriter(tmp_path / "file" / "run")


def test_a_full_disk_stops_the_record_and_not_the_run(tmp_path, monkeypatch):
    writer = TrajectoryWriter(tmp_path / "run")
    writer.write(START)
    real, room = os.write, [700]

    def full(descriptor, data):
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(descriptor, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", full)
    for i in range(20):
        writer.write(NodeEnd(value=f"{i}" * 100))
    writer.write(END)
    monkeypatch.undo()
    assert writer.error.errno == errno.ENOSPC and writer.dropped > 15
    assert writer.blobs is None and writer.blob(b"x") is None
    found = read(tmp_path / "run")
    assert 1 < len(found) < 6 and len(found.warnings) == 1


def test_a_disk_too_full_for_the_context_costs_the_context_only(tmp_path, monkeypatch):
    from rlm.loop_helpers import done, rlm
    from rlm_runtime import context as contexts

    def full(blobs, name, pieces):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(contexts, "store", full)
    result = rlm([done("len(context)")], log_dir=tmp_path).completion("x" * 1000, "How long?")
    assert result.answer == 1000 and any("No space" in note for note in result.notes)
    found = read(result.trajectory)
    loaded = next(e for e in found if e.type == "context")
    assert found.complete and loaded.blob is None and loaded.chars == 1000 and loaded.sha256


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_disk_that_is_really_full(tmp_path):
    writer = TrajectoryWriter(tmp_path / "run")
    device = os.open("/dev/full", os.O_WRONLY)
    os.dup2(device, writer._descriptor)
    os.close(device)
    # /dev/full has no link count that would look like a removed file
    assert os.fstat(writer._descriptor).st_nlink > 0
    writer.write(START)
    assert writer.error.errno == errno.ENOSPC


def test_a_vanished_folder_stops_the_record_and_not_the_run(tmp_path):
    import shutil

    writer = TrajectoryWriter(tmp_path / "run")
    writer.write(START)
    shutil.rmtree(tmp_path / "run")
    writer.write(END)
    writer.write(END)
    assert isinstance(writer.error, FileNotFoundError) and writer.dropped == 2
    assert not (tmp_path / "run").exists()


def test_a_failing_callback_is_warned_of_once(tmp_path):
    calls = []

    def broken(event):
        calls.append(event)
        raise RuntimeError("mine")

    writer = TrajectoryWriter(tmp_path / "run", broken)
    with pytest.warns(UserWarning, match="mine"):
        writer.write(START)
    writer.write(END)
    assert len(calls) == 1 and len(read(tmp_path / "run")) == 2


def test_the_callback_sees_what_is_recorded(tmp_path):
    seen = []
    with TrajectoryWriter(tmp_path / "run", seen.append) as writer:
        for event in (START, NodeEnd(value="\ud800"), END):
            writer.write(event)
    assert seen == read(tmp_path / "run")


def test_threads_do_not_mix_lines(tmp_path):
    with TrajectoryWriter(tmp_path / "run") as writer:

        def work(k):
            for i in range(100):
                writer.write(NodeEnd(node=f"{k}.{i}", value=str(k) * 2000))

        threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    found = read(tmp_path / "run")
    assert not found.warnings and len(found) == 800
    assert {e.node for e in found} == {f"{k}.{i}" for k in range(8) for i in range(100)}


def test_in_memory_without_a_folder():
    writer = TrajectoryWriter(None, memory_bytes=2000)
    writer.write(START)
    for _ in range(100):
        writer.write(NodeEnd(value="x" * 100))
    writer.write(END)
    found = writer.events
    assert found[0].type == "run_start" and found[-1].answer == 42
    assert len(found) + writer.dropped == 102 and writer.dropped > 80
    assert writer.blobs is None and writer.path is None


def test_blobs_are_stored_once_by_hash(tmp_path):
    import hashlib

    writer = TrajectoryWriter(tmp_path / "run")
    data = os.urandom(5000)
    name = writer.blob(data)
    assert name == hashlib.sha256(data).hexdigest() == writer.blob(data)
    assert [p.name for p in writer.blobs.iterdir()] == [name]
    assert (writer.blobs / name).read_bytes() == data


def test_a_record_is_private(tmp_path):
    with TrajectoryWriter(tmp_path / "run") as writer:
        writer.blob(b"secret")
    for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_run_folder_names_are_harmless(tmp_path):
    assert run_folder(tmp_path, "../../etc/x y").parent == tmp_path
    assert "/" not in run_folder(tmp_path, "a/b").name


def test_size_grows_linearly_with_the_turns():
    def size(turns):
        return sum(len(encode(e)) for e in build(turns, 6 * turns, seed=3))

    a, b, c = size(25), size(50), size(100)
    assert 1.6 < b / a < 2.4 and 1.6 < c / b < 2.4
    assert b < 1.2e6


def test_following_a_run_that_is_being_written(tmp_path):
    folder = tmp_path / "later"
    got = []
    thread = threading.Thread(target=lambda: got.extend(follow(folder, every=0.005)))
    thread.start()
    writer = TrajectoryWriter(folder)
    sent = [writer.write(e) for e in (START, NodeEnd(value=1), NodeEnd(node="0.1", value=2), END)]
    thread.join(20)
    assert not thread.is_alive() and got == sent


def test_a_tail_waits_for_the_rest_of_a_line(tmp_path):
    tail = Tail(tmp_path)
    assert tail.poll() == []
    line = encode(START) + b"\n"
    with open(tmp_path / EVENTS, "ab", buffering=0) as file:
        file.write(line[:20])
        assert tail.poll() == []
        file.write(line[20:] + b"damaged\n" + encode(END) + b"\n")
    assert tail.poll() == [START, END] and len(tail.trajectory.warnings) == 1
    assert tail.poll() == []


def test_following_ends_when_told_to(tmp_path):
    TrajectoryWriter(tmp_path / "run").write(START)
    assert [e.type for e in follow(tmp_path / "run", stop=lambda: True)] == ["run_start"]


def test_the_summary_counts_what_happened():
    events = build(50, 300)
    found = summary(events)
    end = events[-1]
    assert (found.turns, found.calls, found.depth, found.complete) == (50, 300, 2, True)
    assert (
        found.usage == end.usage and found.stop_reason == "answered" and found.answer == end.answer
    )
    assert (
        found.failed_calls
        == sum(isinstance(e, NodeEnd) and e.error is not None for e in events)
        > 0
    )
    assert found.failed_cells > 0 and found.seconds == end.seconds
    # Without its end the same numbers come from the replies and calls.
    killed = summary(events[:-1])
    assert killed.stop_reason == "unfinished" and not killed.complete and killed.turns == 50
    assert killed.usage.input_tokens == found.usage.input_tokens
    assert killed.usage_by_depth["0"] == found.usage_by_depth["0"]


def test_the_summary_of_a_session_is_over_its_completions():
    one, two = build(8, 10, seed=1), build(12, 20, seed=2)
    found = summary(one + two)
    assert found.turns == 20 and found.calls == 30 and found.complete
    assert found.usage == one[-1].usage + two[-1].usage
    assert found.seconds == pytest.approx(one[-1].seconds + two[-1].seconds)
    assert not summary(one + two[:-1]).complete


def test_the_summary_of_nothing():
    found = summary([])
    assert found.turns == 0 and found.usage == Usage() and found.stop_reason == "unfinished"


def test_a_record_takes_no_more_than_its_bound_whatever_is_asked(tmp_path):
    """Eight prompts of 30 MB: the first are whole, the later ones cut; what the run did is all
    there."""
    writer = TrajectoryWriter(tmp_path / "run", disk_bytes=8 << 20)
    writer.write(START)
    prompts = [f"{i} " + "x" * (1 << 20) + f" {i}" for i in range(40)]
    for i, prompt in enumerate(prompts):
        writer.write(NodeStart(node=f"0.{i}", parent="0", kind="lm", prompt=prompt))
        writer.write(NodeEnd(node=f"0.{i}", value={"a": [prompt]}))
        writer.write(CellStart(turn=i, cell=0, code="llm_query('x')"))
    writer.write(END)
    writer.close()
    assert sum(f.stat().st_size for f in (tmp_path / "run").rglob("*") if f.is_file()) < 8 << 20
    found = read(tmp_path / "run")
    assert len(found) == 122 and writer.dropped == 0 and 60 < writer.shortened < 80
    starts = [e for e in found if isinstance(e, NodeStart)]
    assert starts[0].prompt == prompts[0]
    assert starts[-1].prompt == shorten(prompts[-1]) and len(starts[-1].prompt) < 9000
    assert starts[-1].prompt.startswith("39 x") and starts[-1].prompt.endswith("x 39")
    assert hashlib.sha256(prompts[-1].encode()).hexdigest() in starts[-1].prompt
    assert found[-1].answer == 42 and "long texts cut" in writer.note
    # what is there counts
    again = TrajectoryWriter(tmp_path / "run", append=True, disk_bytes=8 << 20)
    again.write(NodeEnd(value="y" * (2 << 20)))
    assert again.shortened == 1
    again.close()


def test_the_end_is_recorded_in_a_full_record(tmp_path):
    writer = TrajectoryWriter(tmp_path / "run", disk_bytes=100_000)
    writer.write(START)
    for i in range(1000):
        writer.write(NodeEnd(node=f"0.{i}", value="x" * 1000))
    writer.write(RunEnd(stop_reason="answered", answer="a" * 200_000))
    writer.close()
    found = read(tmp_path / "run")
    assert writer.dropped > 800 and found[-1].answer == "a" * 200_000
    assert sum(isinstance(e, NodeEnd) for e in found) + writer.dropped == 1000


def test_the_contexts_of_children_count_and_the_users_own_is_kept(tmp_path):
    writer = TrajectoryWriter(tmp_path / "run", disk_bytes=4 << 20)
    assert writer.context_fields(Context.of("u" * (9 << 20)))["blob"] is not None
    kept = [
        writer.context_fields(Context.of(f"{i}" + "c" * 900_000), whole=False)["blob"]
        for i in range(20)
    ]
    assert kept[0] is not None and kept[-1] is None
    assert sum(f.stat().st_size for f in (tmp_path / "run" / "blobs").iterdir()) < (9 + 4) << 20
    writer.close()


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
)
def test_short_values_are_not_changed_by_shortening(value):
    assert shorten(value) == value
