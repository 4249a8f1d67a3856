"""How one command becomes the processes of a job: environments, shell lines, a JobSet.

Text alone, so that `--dry_run` prints exactly what would run; `local.py`, `gke.py` and `sweep.py`
run it.
"""

from __future__ import annotations

import json
import re
import shlex
import string
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from mor_jax.analysis.topologies import Topology
from mor_jax.errors import ConfigError, UserError

HERE = Path(__file__).parent
LAUNCHERS = ("local", "slurm", "gke", "tpu_vm")
_MODULE = re.compile(r"(launch|benchmarks|rlm_runtime)(\.\w+)+")
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


def python_command(arguments: Sequence[str], python: str = "python") -> list[str]:
    """`["launch.train", "--config", ...]` as a command line. Raises UserError unless it starts with
    a module."""
    if not arguments:
        raise UserError(
            "say what to run after --, e.g. -- launch.train --config configs/quickstart.py --workdir runs/x."
        )
    if not _MODULE.fullmatch(arguments[0]):
        raise UserError(
            f"what to run must start with a module of this project, e.g. launch.train; got {arguments[0]!r}."
        )
    return [python, "-m", *arguments]


def run_line(command: Sequence[str]) -> list[str]:
    """A command line of `python_command` that runs ours, whatever package the working folder has
    under our names."""
    python, _, module, *arguments = command
    if not module.startswith("launch."):
        return list(command)
    return [python, str(HERE / "__main__.py"), module.removeprefix("launch."), *arguments]


def shell_line(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """A command as one would type it."""
    return " ".join(
        [*(f"{k}={shlex.quote(v)}" for k, v in (env or {}).items()), shlex.join(command)]
    )


def job_name(text: str) -> str:
    """A name that Kubernetes and Slurm take: lower case, digits and dashes, at most 40
    characters."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (name if name[:1].isalpha() else f"run-{name}")[:40].rstrip("-")


def local_environments(
    processes: int, *, port: int, devices: int = 0, gpus: int = 0
) -> list[dict[str, str]]:
    """What each process of a job on this machine finds in its environment, beside what is there.

    Args:
      port: where the first of them is found by the others.
      devices: simulated CPU devices of each process; 0: the hardware there is.
      gpus: GPUs of each process; 0: whatever it finds.
    """
    found = []
    for rank in range(processes):
        env: dict[str, str] = {}
        if processes > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
            }
            env |= {"JAX_PROCESS_ID": str(rank)}
        if devices:
            env |= {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            }
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(rank * gpus, (rank + 1) * gpus)))
        found.append(env)
    return found


def launcher_command(
    launcher: str, options: Sequence[str], arguments: Sequence[str], name: str
) -> list[str]:
    """The command line that runs a module with its arguments by one of the launchers.

    Args:
      options: of the launcher, e.g. ("--processes=2",); those of tpu_vm must name a TPU that is
        there.
      name: of the job; made fit for the scheduler.
    Raises:
      UserError: no such launcher, or nothing to run.
    """
    python_command(arguments)
    if launcher == "local":
        return [sys.executable, "-m", "launch.local", *options, "--", *arguments]
    if launcher == "slurm":
        return [
            "sbatch",
            f"--job-name={job_name(name)}",
            *options,
            str(HERE / "slurm.sbatch"),
            *arguments,
        ]
    if launcher == "gke":
        return [
            sys.executable,
            "-m",
            "launch.gke",
            f"--name={job_name(name)}",
            *options,
            "--",
            *arguments,
        ]
    if launcher == "tpu_vm":
        return [str(HERE / "tpu_vm.sh"), "run", *options, "--", *arguments]
    raise UserError(f"there is no launcher {launcher!r}; choose {', '.join(LAUNCHERS)}.")


def check_name(name: str) -> None:
    """Raise UserError for a name that Kubernetes does not take."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r}: lower-case letters, digits and dashes, 40 characters at most."
        )


def node_selector(topology: Topology, spot: bool) -> tuple[str, dict[str, str]]:
    """(resource that a container asks for, labels of its nodes). Raises ConfigError for a topology
    that has no GKE name."""
    if not topology.chip.gke:
        raise ConfigError(
            f"{topology.name} is nothing that GKE has; take a TPU or GPU topology, or launch.local."
        )
    tpu = topology.is_tpu
    selector = {f"cloud.google.com/gke-{'tpu-' if tpu else ''}accelerator": topology.chip.gke}
    if tpu:
        selector["cloud.google.com/gke-tpu-topology"] = topology.grid
    if spot:
        selector["cloud.google.com/gke-spot"] = "true"
    return "google.com/tpu" if tpu else "nvidia.com/gpu", selector


def mount_bucket(pod: dict[str, Any], bucket: str) -> None:
    """Mount a Cloud Storage bucket at /data in a pod's template."""
    pod["metadata"]["annotations"]["gke-gcsfuse/volumes"] = "true"
    csi = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": {"bucketName": bucket}}
    pod["spec"]["volumes"].append({"name": "data", "csi": csi})
    pod["spec"]["containers"][0]["volumeMounts"].append({"name": "data", "mountPath": "/data"})


def render_jobset(
    topology: Topology,
    arguments: Sequence[str],
    *,
    name: str,
    image: str,
    namespace: str = "default",
    service_account: str = "default",
    bucket: str = "",
    restarts: int = 100,
    spot: bool = False,
) -> dict[str, Any]:
    """The JobSet that runs a module with its arguments on these devices: one job a slice, one pod a
    machine.

    Args:
      image: container image with this project installed.
      bucket: Cloud Storage bucket mounted at /data, where workdir and corpus are; "": none.
      restarts: how often the whole set is started again; each time it goes on from its last
        checkpoint.
    Raises:
      UserError, ConfigError: a name Kubernetes does not take, a topology that has no GKE name, or a
        document that does not fit the published schema.
    """
    check_name(name)
    resource, selector = node_selector(topology, spot)
    gpu = not topology.is_tpu
    # A TPU slice is a job of its own; GPU nodes are alike, so one job holds them all.
    jobs, pods = (1, topology.slices) if gpu else (topology.slices, topology.hosts_per_slice)
    text = string.Template((HERE / "gke_jobset.yaml").read_text(encoding="utf-8")).substitute(
        name=name,
        namespace=namespace,
        service_account=service_account,
        image=json.dumps(image),
        jobs=jobs,
        pods=pods,
        processes=jobs * pods,
        restarts=restarts,
        resource=resource,
        chips=topology.devices // (jobs * pods),
        selector=json.dumps(selector),
        command=json.dumps(python_command(arguments)),
        exclusive="cloud.google.com/gke-nodepool",
    )
    document: dict[str, Any] = yaml.safe_load(text)
    if gpu:
        del document["metadata"]["annotations"]
    if bucket:
        mount_bucket(document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"], bucket)
    check_jobset(document)
    return document


def check_jobset(document: Mapping[str, Any]) -> None:
    """Raise UserError naming the first field that the JobSet schema (jobset.schema.json) does not
    take."""
    schema = json.loads((HERE / "jobset.schema.json").read_text(encoding="utf-8"))
    errors = sorted(
        Draft202012Validator(schema).iter_errors(document), key=lambda e: list(map(str, e.path))
    )
    if errors:
        where = ".".join(map(str, errors[0].absolute_path)) or "the document"
        raise UserError(f"not a valid JobSet: {where}: {errors[0].message}.")
