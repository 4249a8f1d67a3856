"""A model server on GKE: documents that Kubernetes takes, whose numbers agree with one another, and
one message for a mistake. Nothing here leaves this machine."""

import kubernetes_validate
import pytest
import yaml
from test_launchers import command

from launch.servers import LEAVE_S, render_server
from mor_jax.analysis.topologies import topology
from mor_jax.errors import ConfigError, UserError
from rlm_runtime.serve.model.metrics import HELP, SHARED

SERVE = ["launch.serve", "/data/runs/mor17", "--mesh", "tensor=8", "--drain_seconds=45"]


def render(place="v5e-8", arguments=SERVE, **more):
    return render_server(topology(place), arguments, name="chat", image="registry/mor:1", **more)


@pytest.mark.parametrize("place", ["v5e-8", "v6e-8", "v5p-8", "h100x8"])
def test_the_documents_are_valid_and_agree(place):
    """Held to the schemas that Kubernetes publishes, unknown fields refused; PodMonitoring is
    Google's and has none there."""
    arguments = [*SERVE[:2], "--mesh=tensor=4", *SERVE[4:]]
    documents = render(place, arguments, bucket="b", max_replicas=4, waiting=6)
    by_kind = {d["kind"]: d for d in documents}
    for kind in ("Deployment", "Service", "HorizontalPodAutoscaler"):
        kubernetes_validate.validate(by_kind[kind], "1.31", strict=True)
    spec = by_kind["Deployment"]["spec"]
    pod, labels = spec["template"]["spec"], spec["template"]["metadata"]["labels"]
    (server,) = pod["containers"]
    assert server["command"][:5] == ["python", "-m", *arguments[:3]]
    assert server["command"][-3:] == ["--host=0.0.0.0", "--port=8000", "--allow_no_key"]
    # A pod leaves the service, then drains, and only then is killed.
    assert server["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(LEAVE_S)]
    assert pod["terminationGracePeriodSeconds"] > LEAVE_S + 45
    paths = {p: server[p]["httpGet"]["path"] for p in server if p.endswith("Probe")}
    assert paths == {
        "startupProbe": "/ready",
        "readinessProbe": "/ready",
        "livenessProbe": "/health",
    }
    (chips,) = server["resources"]["limits"].values()
    assert chips == topology(place).devices
    assert {"name": "data", "mountPath": "/data"} in server["volumeMounts"]
    for selector in (
        spec["selector"]["matchLabels"],
        by_kind["Service"]["spec"]["selector"],
        by_kind["PodMonitoring"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    scaler = by_kind["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == by_kind["Deployment"]["metadata"]["name"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (1, 4) and "replicas" not in spec


def test_the_autoscaler_reads_what_the_server_says():
    """The metric is one that /metrics has, and stands for waiting requests."""
    (metric,) = render(max_replicas=2)[-1]["spec"]["metrics"]
    source, name, kind = metric["pods"]["metric"]["name"].split("|")
    prefix, _, key = name.partition(":")
    assert (source, prefix, kind) == ("prometheus.googleapis.com", "vllm", "gauge")
    assert key in SHARED and "wait" in HELP[key]


def test_a_fixed_number_of_replicas_has_no_autoscaler():
    documents = render(replicas=3)
    assert [d["kind"] for d in documents] == ["Deployment", "Service", "PodMonitoring"]
    assert documents[0]["spec"]["replicas"] == 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"arguments": ["launch.train"]}, ["launch.serve"]),
        ({"arguments": ["launch.serve"]}, ["what to serve"]),
        ({"arguments": [*SERVE, "--port", "9"]}, ["--port"]),
        ({"place": "v5e-16"}, ["4 machines", "v5e-8", "--replicas"]),
        ({"place": "v5e-8x2"}, ["2 machines"]),
        ({"place": "v5e-4"}, ["tensor=8", "v5e-4", "4"]),
        ({"place": "cpux8"}, ["cpux8"]),
        ({"replicas": 3, "max_replicas": 2}, ["--replicas 3", "--max_replicas 2"]),
        ({"arguments": [*SERVE, "--api_key_file=k"], "max_replicas": 2}, ["/metrics", "key"]),
        ({"arguments": [*SERVE[:-1], "--drain_seconds=x"]}, ["--drain_seconds x"]),
    ],
)
def test_a_mistake_is_one_message(more, words):
    with pytest.raises((ConfigError, UserError)) as error:
        render(**more)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_the_command_prints_them():
    done = command(
        "launch.gke",
        "--serve",
        "--topology=v5e-8",
        "--name=a",
        "--image=i",
        "--dry_run",
        "--",
        *SERVE,
    )
    assert done.returncode == 0, done.stderr
    assert [d["kind"] for d in yaml.safe_load_all(done.stdout)] == [
        "Deployment",
        "Service",
        "PodMonitoring",
    ]
