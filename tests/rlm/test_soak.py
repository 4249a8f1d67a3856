"""A short soak; `python -m benchmarks.rlm_soak` is the long one."""

import sys
from pathlib import Path

# the benchmarks are part of the checkout only
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import rlm_soak
from benchmarks.rlm_soak_plan import plan


def test_runs_on_bad_days_leave_nothing_behind_and_end_as_they_should():
    result = rlm_soak.soak([f"test/{i}" for i in range(40)], jobs=4, seconds=60)
    assert result["violations"] == [], "python -m benchmarks.rlm_soak --only SEED shows one again"
    assert not any(result["leaked"].values()), result["leaked"]
    assert result["complaints"] == []
    assert result["runs"] >= 10 and result["not_begun"] + result["runs"] == 40
    assert result["workers_started"] >= result["runs"] // 2


def test_a_killed_host_takes_its_worker_along_and_the_next_one_tidies_up():
    seen, problems = rlm_soak.soak_hosts("test", 3)
    assert problems == [] and seen >= 1, "at least one host had a worker by the time it was killed"


def test_a_plan_depends_on_its_seed_alone_and_a_thousand_of_them_hold_every_fault():
    plans = [plan(f"0/{i}") for i in range(1000)]
    assert plans == [plan(f"0/{i}") for i in range(1000)]
    faults = {fault for p in plans for fault in p.faults()}
    assert {f.partition(":")[0] for f in faults} == {
        "cell",
        "root",
        "kill",
        "cancel",
        "disk",
        "sub",
    }
    assert {
        "cell: exit",
        "cell: segfault",
        "cell: stubborn_loop",
        "kill: SIGKILL",
        "cancel: task_twice",
    } <= faults
    assert {"disk: full", "disk: gone", "root: bug", "sub: http"} <= faults
    assert {p.way for p in plans} == {"start", "task", "sync", "session"}


def test_what_was_not_there_before_is_found(tmp_path):
    before = rlm_soak.State.now()
    with open(tmp_path / "left open", "w") as left:
        found = rlm_soak.State.now().more_than(before)
    assert found["descriptors"] == [left.name] and not found["processes"] and not found["threads"]
