"""Run a command on GKE as a JobSet: TPU slices (one or several) or GPU nodes.

    python -m launch.gke --topology v5e-256 --name mor17 --image REGISTRY/mor-jax:1 \\
        --bucket my-data --dry_run -- \\
        launch.train --config configs/mor.py:1.7b,nr=3 --workdir /data/runs/mor17
    python -m launch.gke --topology v5e-256 --name mor17 --image REGISTRY/mor-jax:1 \\
        --bucket my-data -- launch.train ...
    python -m launch.gke --name mor17 --logs
    python -m launch.gke --name mor17 --delete

It renders launch/gke_jobset.yaml, holds it to the JobSet schema, and hands it to `kubectl apply`;
--dry_run prints the document instead. The cluster needs the JobSet controller and node pools of
that topology. A set whose machine is lost starts again from its last checkpoint.
"""

import subprocess

import yaml
from absl import flags

from launch import cli
from launch.jobs import render_jobset, shell_line
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
_LOGS = flags.DEFINE_bool("logs", False, "Follow the output of pod 0 of job 0.")
_DELETE = flags.DEFINE_bool("delete", False, "Delete the set.")
_DRY = flags.DEFINE_bool("dry_run", False, "Print the document or the command, run nothing.")


def main(arguments: list[str]) -> None:
    kubectl, document = ["kubectl", "--namespace", _NAMESPACE.value], None
    if _LOGS.value or _DELETE.value:
        pod = f"jobset.sigs.k8s.io/jobset-name={_NAME.value},batch.kubernetes.io/job-completion-index=0"
        logs = [*kubectl, "logs", "--follow", "--selector", f"{pod},jobset.sigs.k8s.io/job-index=0"]
        command = logs if _LOGS.value else [*kubectl, "delete", "jobset", _NAME.value]
    else:
        if not (_TOPOLOGY.value and _IMAGE.value):
            raise UserError("give --topology (e.g. v5e-256) and --image, or --logs or --delete.")
        document = render_jobset(
            topology(_TOPOLOGY.value),
            arguments,
            name=_NAME.value,
            image=_IMAGE.value,
            namespace=_NAMESPACE.value,
            service_account=_ACCOUNT.value,
            bucket=_BUCKET.value,
            restarts=_RESTARTS.value,
            spot=_SPOT.value,
        )
        command = [*kubectl, "apply", "--filename", "-"]
    text = yaml.safe_dump(document, sort_keys=False) if document else None
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
