"""Which job a process belongs to, and what its processes tell each other; real services, real
clients."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mor_jax.errors import CheckpointError, ConfigError
from mor_jax.parallel.cluster import Cluster, detect
from mor_jax.parallel.multihost import LOST, Hosts, _own

ROOT = Path(__file__).resolve().parents[2]
CPU = {"JAX_PLATFORMS": "cpu"}
PLAIN = CPU | {
    "JAX_COORDINATOR_ADDRESS": "node0:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = CPU | {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_LOCALID": "0",
}
POD = CPU | {
    "JOB_COMPLETION_INDEX": "2",
    "JAX_NUM_PROCESSES": "8",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
}
JOBSET = POD | {"JOBSET_NAME": "run", "REPLICATED_JOB_NAME": "workers"}


@pytest.mark.parametrize(
    ("env", "found"),
    [
        (CPU, None),
        (PLAIN, Cluster("plain", "node0:1234", 4, 3)),
        # what is said counts
        (PLAIN | {"JOB_COMPLETION_INDEX": "1"}, Cluster("plain", "node0:1234", 4, 3)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "2"}, Cluster("slurm")),
        # the batch script, not a task of srun
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "2"}, None),
        (CPU | {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),
        (JOBSET, Cluster("kubernetes", "run-workers-0-0.run:8476", 8, 2)),
        (
            JOBSET | {"JOB_INDEX": "1", "PODS_PER_JOB": "4"},
            Cluster("kubernetes", "run-workers-0-0.run:8476", 8, 6),
        ),
        (POD | {"JAX_COORDINATOR_ADDRESS": "first:99"}, Cluster("kubernetes", "first:99", 8, 2)),
        (CPU | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod of its own
    ],
)
def test_the_job_is_read_from_the_environment(env, found):
    assert detect(env) == found


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({k: v for k, v in PLAIN.items() if k != "JAX_PROCESS_ID"}, "but not JAX_PROCESS_ID"),
        (CPU | {"JAX_PROCESS_ID": "0"}, "but not JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES"),
        (
            PLAIN | {"JAX_NUM_PROCESSES": "four"},
            "JAX_NUM_PROCESSES = 'four' must be a whole number",
        ),
        (PLAIN | {"JAX_PROCESS_ID": "4"}, "process id 4 must be below the number of processes, 4"),
        (PLAIN | {"JAX_COORDINATOR_ADDRESS": "node0"}, "'node0' must be host:port"),
        (POD, "nothing says where process 0 is"),
        (JOBSET | {"JOB_INDEX": "1"}, "JOB_INDEX but not PODS_PER_JOB"),
    ],
)
def test_a_half_described_job_is_refused(env, message):
    with pytest.raises(ConfigError, match=message):
        detect(env)


def test_a_process_of_its_own_waits_for_nobody():
    hosts = Hosts()
    hosts.barrier("x", timeout=0.0)
    hosts.assert_equal("x", "1", "")
    hosts.report(step=1)
    assert (hosts.rank, hosts.count, hosts.reports()) == (0, 1, []) and not hosts.stop_at(1)
    with pytest.raises(ZeroDivisionError), hosts.guard():
        _ = 1 / 0
    with pytest.raises(SystemExit, match="3"):
        hosts.leave(3)


def test_an_error_that_came_out_of_a_collective_is_not_surely_ones_own():
    def caused(error, cause):
        error.__cause__ = cause
        return error

    full = caused(CheckpointError("could not save"), OSError(28, "No space left on device"))
    lost = caused(
        CheckpointError("could not save"),
        ValueError("Gloo AllGather failed: connection closed by peer"),
    )
    assert (
        _own(CheckpointError("x"))
        and _own(full)
        and _own(caused(ConfigError("x"), full))
        and _own(KeyboardInterrupt())
    )
    assert not _own(lost) and not _own(caused(ConfigError("x"), lost)) and not _own(ValueError("x"))


# Both ends of JAX's coordination service in one process, and a third host that says its name and
# nothing more.
PROGRAM = """
import json, os, sys, threading, time
from jax._src.lib import _jax
from mor_jax.errors import UserError
from mor_jax.parallel.multihost import Hosts

address = f"127.0.0.1:{sys.argv[1]}"
service = _jax.get_distributed_runtime_service(address, 3)
clients = [_jax.get_distributed_runtime_client(address, r) for r in range(3)]
def on_each(call):
    threads = [threading.Thread(target=call, args=(r,)) for r in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
on_each(lambda r: clients[r].connect())
hosts, found = [None] * 3, {}
def begin(r):
    hosts[r] = Hosts(clients[r], r, 3, timeout=6.0)
on_each(begin)
hosts[2].report(phase="reading rows", step=41)
def same(r):
    try:
        hosts[r].assert_equal("the corpus", "b" if r == 1 else "a", "Copy it.")
    except UserError as e:
        found.setdefault("same", []).append([r, e.everywhere, str(e)])
on_each(same)
on_each(lambda r: [hosts[r].assert_equal("the step", "7", "") for _ in range(3)])  # a name may be used again
time.sleep(3)
try:
    hosts[0].barrier("the end", timeout=1.0)
except UserError as e:
    found["barrier"] = str(e)
found["reports"] = [r.get("step") for r in hosts[0].reports()]
print("FOUND" + json.dumps(found), flush=True)
hosts[0].advice = "Start again."
hosts[2]._closing.set()  # it falls silent, as if it were stopped
time.sleep(60)
os._exit(0)
"""


@pytest.fixture(scope="module")
def talk():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(port)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | CPU | {"PYTHONPATH": str(ROOT)},
        timeout=200,
    )


def test_what_should_be_alike_and_is_not_is_named_everywhere(talk):
    found = json.loads(talk.stdout.split("FOUND")[1])["same"]
    assert sorted(r for r, _, _ in found) == [0, 1, 2] and all(
        everywhere for _, everywhere, _ in found
    )
    for _, _, message in found:
        assert message.startswith("the corpus of process 1 (") and message.endswith("Copy it.")


def test_a_barrier_names_who_did_not_come_and_what_they_did(talk):
    said = json.loads(talk.stdout.split("FOUND")[1])["barrier"]
    assert "1 s at the meeting point 'the end'" in said and "process 0" not in said
    assert "process 1 (" in said and "process 2 (" in said and "last known: reading rows" in said
    assert json.loads(talk.stdout.split("FOUND")[1])["reports"] == [0, 0, 41]


def test_a_silent_host_ends_the_job_with_its_name(talk):
    assert talk.returncode == LOST
    [line] = [line for line in talk.stderr.splitlines() if line.startswith("error: ")][:1]
    assert (
        "no heartbeat for 6 s from process 2 (" in line and "last at step 41 (reading rows)" in line
    )
    assert "process 0 (" in line or "process 1 (" in line


# ---------------------------------------------------------------- processes of their own

MEMBER = """
import sys, time
from mor_jax.errors import DataError
from mor_jax.parallel.join import hosts, initialize

here = initialize()
assert here is hosts() and here.count == 2
here.barrier("begun")
print("begun", flush=True)
with here.guard():
    if here.rank == 1 and sys.argv[1] == "fails":
        raise DataError("rows/train.array_record, record 7: damaged.")
    time.sleep(100)
"""


def members(ranks, how, **env):
    """Processes of a job of two."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env |= CPU | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{s.getsockname()[1]}",
            "JAX_NUM_PROCESSES": "2",
        }
    return [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, how],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | env | {"JAX_PROCESS_ID": str(rank), "PYTHONPATH": str(ROOT)},
        )
        for rank in ranks
    ]


def ends(processes):
    """[(status, the line that says why)]"""
    found = []
    for process in processes:
        _, err = process.communicate(timeout=150)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        found.append((process.returncode, lines[0] if lines else err))
    return found


def test_an_error_of_one_process_ends_the_other_with_its_name():
    two = members((0, 1), "fails")
    (status, line), (own_status, own_line) = ends(two)
    assert (own_status, own_line) == (2, "error: rows/train.array_record, record 7: damaged.")
    assert (
        status == LOST
        and f"pid {two[1].pid}) stopped: rows/train.array_record, record 7: damaged." in line
    )


def test_the_loss_of_process_0_is_named_before_jax_aborts():
    two = members((0, 1), "sleeps")
    assert [p.stdout.readline() for p in two] == ["begun\n", "begun\n"]
    two[0].kill()
    (_, _), (status, line) = ends(two)
    assert status == LOST and f"process 0 ({socket.gethostname()}, pid {two[0].pid})" in line


def test_processes_that_never_come_are_listed():
    [process] = members((0,), "sleeps", MOR_JAX_MEET_TIMEOUT="4")
    _, err = process.communicate(timeout=150)
    assert process.returncode == LOST
    assert "error: not the 2 processes of this plain job met within 4 s" in err
    assert "Some timed out task names:\n1\n" in err  # of JAX's coordination service
