"""Which job this process belongs to, read from its environment: TPU VMs, Slurm, Kubernetes, or
plain variables.

Nothing here touches JAX or the network; `parallel/multihost.py` acts on what is found.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping

from mor_jax.errors import ConfigError

PORT = 8476  # of the coordinator, where none is given; JAX's own choice on TPUs
PLAIN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A job of several processes.

    kind: "plain" | "kubernetes" | "slurm" | "tpu". The last two leave address, count and rank to
    JAX's own detection, which asks Slurm's node list or the TPU metadata server; they are then None
    here.
    """

    kind: str
    coordinator: str | None = None  # host:port of process 0
    count: int | None = None
    rank: int | None = None


def detect(env: Mapping[str, str] | None = None) -> Cluster | None:
    """The job described by the environment; None for a process of its own.

    In this order: the three variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID; an indexed Kubernetes job, alone or of a JobSet (JOB_COMPLETION_INDEX, which
    Kubernetes sets, and what `_kubernetes` says); a Slurm step of several tasks; a TPU virtual
    machine.

    Raises:
      ConfigError: some of the plain variables are missing, or one is no number or out of range.
    """
    env = os.environ if env is None else env
    return _kubernetes(env) or _plain(env) or _slurm(env) or _tpu(env)


def _plain(env: Mapping[str, str]) -> Cluster | None:
    given = [name for name in PLAIN if env.get(name)]
    # A pod's index is its process id unless another one is given; the rest of a half-given set is a
    # mistake.
    if not given or ("JAX_PROCESS_ID" not in given and env.get("JOB_COMPLETION_INDEX")):
        return None
    missing = [name for name in PLAIN if name not in given]
    if missing:
        raise ConfigError(
            f"the environment sets {' and '.join(given)} but not {' and '.join(missing)}; a job of several processes "
            "needs all three, a process of its own none."
        )
    return _checked("plain", env[PLAIN[0]], _number(env, PLAIN[1]), _number(env, PLAIN[2]))


def _kubernetes(env: Mapping[str, str]) -> Cluster | None:
    """An indexed job. JAX_NUM_PROCESSES counts the pods of all jobs; of a JobSet with several
    replicas JOB_INDEX says which job this is and PODS_PER_JOB how many pods each has. The
    coordinator is JAX_COORDINATOR_ADDRESS, or pod 0 of job 0 of the JobSet by the name the JobSet
    controller gives it (JOBSET_NAME, REPLICATED_JOB_NAME: put there by the downward API from the
    annotations jobset.sigs.k8s.io/jobset-name and .../replicatedjob-name)."""
    if (
        env.get("JAX_PROCESS_ID")
        or not env.get("JOB_COMPLETION_INDEX")
        or not env.get("JAX_NUM_PROCESSES")
    ):
        return None
    count, pod = _number(env, "JAX_NUM_PROCESSES"), _number(env, "JOB_COMPLETION_INDEX")
    job = _number(env, "JOB_INDEX") if env.get("JOB_INDEX") else 0
    if job and not env.get("PODS_PER_JOB"):
        raise ConfigError(
            "the environment sets JOB_INDEX but not PODS_PER_JOB, so the process id is not known."
        )
    rank = job * _number(env, "PODS_PER_JOB") + pod if job else pod
    address = env.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        jobset, replicated = env.get("JOBSET_NAME"), env.get("REPLICATED_JOB_NAME")
        if not (jobset and replicated):
            raise ConfigError(
                "this is an indexed Kubernetes job, but nothing says where process 0 is: set JAX_COORDINATOR_ADDRESS "
                "(host:port), or JOBSET_NAME and REPLICATED_JOB_NAME from the JobSet's annotations."
            )
        address = f"{jobset}-{replicated}-0-0.{jobset}:{PORT}"
    return _checked("kubernetes", address, count, rank)


def _slurm(env: Mapping[str, str]) -> Cluster | None:
    # Set for tasks that srun started. The batch script itself is a step of one task, whatever the
    # job asked for.
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or "1"
    started = all(
        env.get(name)
        for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_LOCALID")
    )
    return Cluster("slurm") if started and tasks.isdecimal() and int(tasks) > 1 else None


def _tpu(env: Mapping[str, str]) -> Cluster | None:
    if env.get("JAX_PLATFORMS") == "cpu" or importlib.util.find_spec("libtpu") is None:
        return None
    several = "," in (env.get("TPU_WORKER_HOSTNAMES") or env.get("TPU_PROCESS_ADDRESSES") or "")
    return (
        Cluster("tpu")
        if several or os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
        else None
    )


def _number(env: Mapping[str, str], name: str) -> int:
    if not (env.get(name) or "").strip().isdecimal():
        raise ConfigError(
            f"the environment variable {name} = {env.get(name)!r} must be a whole number, 0 or more."
        )
    return int(env[name])


def _checked(kind: str, address: str, count: int, rank: int) -> Cluster:
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise ConfigError(
            f"the coordinator's address {address!r} must be host:port, e.g. 10.0.0.1:{PORT}."
        )
    if not 0 <= rank < count:
        raise ConfigError(
            f"process id {rank} must be below the number of processes, {count}; they count from 0."
        )
    return Cluster(kind, address, count, rank)
