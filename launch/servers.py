"""A model server as Kubernetes documents: text alone, so that `--dry_run` prints exactly what would
run; `gke.py` applies it."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from typing import Any

import yaml

from launch.jobs import HERE, check_name, mount_bucket, node_selector, python_command
from mor_jax.analysis.topologies import Topology
from mor_jax.errors import ConfigError, UserError
from mor_jax.parallel.serving import tensor_axis

LEAVE_S = 10  # seconds until no proxy sends requests to a pod that stops
SPARE_S = 20  # after the drain, to end in order
DRAIN_S = 30.0  # default of launch.serve
# What the documents say themselves.
OURS = ("host", "port", "allow_no_key")


def render_server(
    topology: Topology,
    arguments: Sequence[str],
    *,
    name: str,
    image: str,
    namespace: str = "default",
    service_account: str = "default",
    bucket: str = "",
    spot: bool = False,
    replicas: int = 1,
    max_replicas: int = 0,
    waiting: int = 8,
) -> list[dict[str, Any]]:
    """Deployment, Service, PodMonitoring and, where the number of replicas may change, autoscaler
    of `launch.serve` with these arguments, each replica on one machine of this topology.

    Args:
      image, bucket: as of `jobs.render_jobset`.
      replicas, max_replicas: at least and at most; 0: always `replicas`.
      waiting: requests in the queue of a replica, on average, above which there will be more.
    Raises:
      UserError, ConfigError: something else than launch.serve, a topology of several machines, a
        name Kubernetes does not take, or flags that the documents set themselves.
    """
    check_name(name)
    if not arguments or arguments[0] != "launch.serve" or len(arguments) < 2:
        raise UserError(
            "--serve runs launch.serve: say what to serve after --, e.g. -- launch.serve /data/runs/mor --mesh tensor=8."
        )
    for flag in OURS:
        if _flag(arguments, flag) is not None:
            raise UserError(f"--{flag} is set by --serve itself; leave it out.")
    if topology.slices > 1 or topology.hosts_per_slice > 1:
        raise ConfigError(
            f"{topology.name} is {topology.slices * topology.hosts_per_slice} machines, and a server runs on one: its engine "
            f"has one scheduler. Take a topology of one machine, e.g. {_one_machine(topology)}, and --replicas for more of them."
        )
    max_replicas = max_replicas or replicas
    if not 1 <= replicas <= max_replicas or waiting < 1:
        raise UserError(
            f"--replicas {replicas} must be 1 to --max_replicas {max_replicas}, and --waiting {waiting} at least 1."
        )
    keys = _flag(arguments, "api_key_file") is not None
    if keys and max_replicas > replicas:
        raise UserError(
            "the autoscaler reads /metrics, which needs a key where there are keys: leave --api_key_file or --max_replicas out."
        )
    mesh = _flag(arguments, "mesh")
    if mesh and tensor_axis(mesh) > topology.devices:
        raise ConfigError(
            f"--mesh {mesh} needs more devices than a replica has on {topology.name}, {topology.devices}."
        )
    open_to_pods = [] if keys else ["--allow_no_key"]
    command = python_command([*arguments, "--host=0.0.0.0", "--port=8000", *open_to_pods])
    resource, selector = node_selector(topology, spot)
    drain = _seconds(_flag(arguments, "drain_seconds"))
    text = string.Template((HERE / "gke_serve.yaml").read_text(encoding="utf-8")).substitute(
        name=name,
        namespace=namespace,
        service_account=service_account,
        image=json.dumps(image),
        replicas=replicas,
        max_replicas=max_replicas,
        waiting=waiting,
        leave=LEAVE_S,
        grace=round(LEAVE_S + drain + SPARE_S),
        resource=resource,
        chips=topology.devices,
        selector=json.dumps(selector),
        command=json.dumps(command),
    )
    deployment, service, monitoring, autoscaler = yaml.safe_load_all(text)
    if bucket:
        mount_bucket(deployment["spec"]["template"], bucket)
    if max_replicas == replicas:
        return [deployment, service, monitoring]
    del deployment["spec"]["replicas"]  # the autoscaler's; applying again must not set it back
    return [deployment, service, monitoring, autoscaler]


def _one_machine(topology: Topology) -> str:
    kind = topology.name.partition("-")[0]
    return f"{kind}-8" if topology.is_tpu else topology.name.partition("x")[0] + "x8"


def _flag(arguments: Sequence[str], name: str) -> str | None:
    """What an argument list sets a flag to; None: nothing. "" for a flag without a value."""
    for i, word in enumerate(arguments):
        dashes, _, value = word.partition("=")
        if dashes in (f"--{name}", f"-{name}"):
            follows = arguments[i + 1] if i + 1 < len(arguments) else ""
            return value if "=" in word else "" if follows.startswith("-") else follows
    return None


def _seconds(text: str | None) -> float:
    try:
        return DRAIN_S if text is None else float(text)
    except ValueError:
        raise UserError(f"--drain_seconds {text}: expected a number of seconds.") from None
