"""Run a command on GKE: training as a JobSet on TPU slices (one or several) or GPU nodes; with
--serve a model server as a Deployment.

    python -m launch.gke --topology v5e-256 --name mor17 --image REGISTRY/mor-jax:1 \\
        --bucket my-data --dry_run -- \\
        launch.train --config configs/mor.py:1.7b,nr=3 --workdir /data/runs/mor17
    python -m launch.gke --topology v5e-256 --name mor17 --image REGISTRY/mor-jax:1 \\
        --bucket my-data -- launch.train ...
    python -m launch.gke --name mor17 --logs
    python -m launch.gke --name mor17 --delete
    python -m launch.gke --serve --topology v5e-8 --name chat --image REGISTRY/mor-jax:1 \\
        --bucket my-data --replicas 1 --max_replicas 4 --dry_run -- \\
        launch.serve /data/runs/mor17 --mesh tensor=8 --lanes 64

It renders launch/gke_jobset.yaml, holds it to the JobSet schema, and hands it to `kubectl apply`;
--dry_run prints the document instead. The cluster needs the JobSet controller and node pools of
that topology. A set whose machine is lost starts again from its last checkpoint.

--serve renders launch/gke_serve.yaml: each replica has one machine of the topology, and there are
more of them while requests wait (docs/serving.md).
"""

import subprocess
from typing import Any

import yaml
from absl import flags

from launch import cli
from launch.jobs import render_jobset, shell_line
from launch.servers import render_server
from mor_jax.analysis.topologies import topology
from mor_jax.errors import UserError

_NAME = flags.DEFINE_string("name", None, "Name of the JobSet.", required=True)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Devices, e.g. v5e-256, v5e-256x4 (four slices), h100x64."
)
_IMAGE = flags.DEFINE_string("image", None, "Container image with this project installed.")
_NAMESPACE = flags.DEFINE_string("namespace", "default", "Kubernetes namespace.")
_ACCOUNT = flags.DEFINE_string(
    "service_account", "default", "Kubernetes service account of the pods."
)
_BUCKET = flags.DEFINE_string(
    "bucket", "", "Cloud Storage bucket to mount at /data; empty for none."
)
_RESTARTS = flags.DEFINE_integer("restarts", 100, "Times the set is started again.", lower_bound=0)
_SPOT = flags.DEFINE_bool("spot", False, "Take spot capacity.")
_SERVE = flags.DEFINE_bool("serve", False, "A model server instead of a job that ends.")
_REPLICAS = flags.DEFINE_integer("replicas", 1, "Of --serve: servers, at least.", lower_bound=1)
_MAX_REPLICAS = flags.DEFINE_integer(
    "max_replicas", 0, "Of --serve: servers at most, as many as the queue needs; 0: --replicas."
)
_WAITING = flags.DEFINE_integer(
    "waiting", 8, "Of --serve: waiting requests of a server above which there will be more."
)
_LOGS = flags.DEFINE_bool("logs", False, "Follow the output of pod 0 of job 0.")
_DELETE = flags.DEFINE_bool("delete", False, "Delete the set.")
_DRY = flags.DEFINE_bool("dry_run", False, "Print the document or the command, run nothing.")


def main(arguments: list[str]) -> None:
    kubectl = ["kubectl", "--namespace", _NAMESPACE.value]
    documents: list[dict[str, Any]] = []
    if _SERVE.value and (_LOGS.value or _DELETE.value):
        chosen = ["--selector", f"app={_NAME.value}"]
        kinds = "deployment,service,podmonitoring,horizontalpodautoscaler"
        logs = [*kubectl, "logs", "--follow", "--prefix", *chosen]
        command = logs if _LOGS.value else [*kubectl, "delete", kinds, *chosen]
    elif _LOGS.value or _DELETE.value:
        pod = f"jobset.sigs.k8s.io/jobset-name={_NAME.value},batch.kubernetes.io/job-completion-index=0"
        logs = [*kubectl, "logs", "--follow", "--selector", f"{pod},jobset.sigs.k8s.io/job-index=0"]
        command = logs if _LOGS.value else [*kubectl, "delete", "jobset", _NAME.value]
    else:
        if not (_TOPOLOGY.value and _IMAGE.value):
            raise UserError("give --topology (e.g. v5e-256) and --image, or --logs or --delete.")
        where: dict[str, Any] = {
            "name": _NAME.value,
            "image": _IMAGE.value,
            "namespace": _NAMESPACE.value,
            "service_account": _ACCOUNT.value,
            "bucket": _BUCKET.value,
            "spot": _SPOT.value,
        }
        place = topology(_TOPOLOGY.value)
        if _SERVE.value:
            documents = render_server(
                place,
                arguments,
                **where,
                replicas=_REPLICAS.value,
                max_replicas=_MAX_REPLICAS.value,
                waiting=_WAITING.value,
            )
        else:
            documents = [render_jobset(place, arguments, **where, restarts=_RESTARTS.value)]
        command = [*kubectl, "apply", "--filename", "-"]
    text = yaml.safe_dump_all(documents, sort_keys=False) if documents else None
    if _DRY.value:
        print(f"# {shell_line(command)}\n{text}" if text else shell_line(command))
        return
    try:
        done = subprocess.run(command, input=text, text=True, check=False)
    except FileNotFoundError as e:
        raise UserError(
            "kubectl is not installed; --dry_run prints the document, to be applied elsewhere."
        ) from e
    if done.returncode:
        raise UserError(f"`{shell_line(command)}` ended with status {done.returncode}.")


if __name__ == "__main__":
    cli.run(main, arguments=True)
