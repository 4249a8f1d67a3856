"""The training step, compiled by XLA's compiler for TPUs: it compiles, and sends what is planned
and nothing else.

Without libtpu of this jax, which the `dev` extra installs, these tests are skipped and say so.
"""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tpu_compile import CASES, measure, small
from mor_jax.analysis import tpu_compiler
from mor_jax.analysis.topologies import topology
from mor_jax.analysis.tpu_compiler import libtpu_wanted, require_libtpu
from mor_jax.errors import UserError
from mor_jax.train.aot import compiled_report, compiled_reports

ROOT = Path(__file__).resolve().parents[2]
try:
    require_libtpu()
    MISSING = ""
except UserError as error:
    MISSING = str(error)
with_libtpu = pytest.mark.skipif(bool(MISSING), reason=MISSING)
LIMIT_S = 900.0  # a program takes about ten seconds of a free machine


@pytest.fixture(scope="module")
def rows():
    return {
        row["program"]: row for row in measure([(name, *small(name)) for name in CASES], LIMIT_S)
    }


@with_libtpu
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_model_compiles_and_sends_what_is_planned(rows, name):
    """Gathers and scatters of weights to the number; nothing that no line of the plan has."""
    row = rows[name]
    assert row["wrong"] == []
    assert (
        row["seconds"]["compile"] > 0 and row["lines"]["compiled"] > row["lines"]["written"] > 1000
    )
    kinds = {name.partition(" over ")[0] for name in row["collectives"]}
    # Picked tokens and edges of rows that are cut along time travel in ways that are the compiler's
    # choice.
    assert kinds <= {"all-gather", "reduce-scatter", "all-reduce"} | (
        {"collective-permute", "all-to-all"} if "sequence" in name else set()
    )
    _, _, (_, fsdp, *_), accum = CASES[name]
    assert (fsdp > 1) == any(n.startswith("all-gather") for n in row["collectives"])
    inside = {axis for n in row["in loops"] for axis in n.partition(" over ")[2].split("+")}
    assert inside <= ({"tensor"} if accum == 1 else {"data", "fsdp", "sequence", "tensor"})
    # each micro-batch scatters its own gradients, and a device adds up its part alone
    if accum > 1 and fsdp > 1:
        scatters = {
            n: c["count"] for n, c in row["collectives"].items() if n == "reduce-scatter over fsdp"
        }
        assert {n: row["in loops"][n]["count"] for n in scatters} == scatters


@with_libtpu
def test_the_failure_of_the_compiler_is_the_one_that_the_docs_show():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "xla_tpu_scatter_in_loop.py"],
        capture_output=True,
        text=True,
    )
    cast, barrier, plain = done.stdout.splitlines()
    # Should the first one compile, the compiler is mended: say so in docs/pods.md, with the
    # version.
    assert cast.startswith("cast: ") and "user->opcode() == HloOpcode::kAdd" in cast, done.stderr[
        -2000:
    ]
    assert barrier == "cast behind a barrier: compiles, the scatter is in the loop"
    assert plain == "not cast: compiles, the scatter is out of the loop"


@with_libtpu
def test_a_compiler_that_does_not_end_is_ended_and_the_next_program_compiled():
    cfg, place = small("vanilla, fsdp, accum 4")
    reports = list(compiled_reports([(cfg, topology(place))] * 2, 0.5))
    assert reports == [{"error": "the compiler did not end within 0.5 s."}] * 2
    with pytest.raises(
        UserError, match=r"vanilla, fsdp, accum 4 was not compiled for v5e-8: .* within 0\.5 s"
    ):
        compiled_report(cfg, topology(place), 0.5)


@with_libtpu
def test_what_the_compiler_refuses_is_an_error_of_that_program_alone():
    cfg, place = small("vanilla, all axes")
    wrong = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, fsdp=16))
    refused, _ = compiled_reports([(wrong, topology(place)), (wrong, topology("v5e-8x2"))], LIMIT_S)
    assert "there are 8 devices" in refused["error"]


@with_libtpu
def test_the_command_prints_the_plan_beside_the_compiler():
    flags = ["--config.model.width=256", "--config.model.heads=4", "--config.model.kv_heads=4"]
    flags += ["--config.model.layers=1", "--config.model.vocab_size=512", "--config.train.accum=1"]
    flags += ["--config.model.context=128", "--config.train.batch_size=8", "--config.mesh.fsdp=8"]
    line = [
        sys.executable,
        "-m",
        "launch.plan",
        "configs/vanilla.py:135m",
        "--topology=v5e-8",
        "--compile",
        *flags,
    ]
    done = subprocess.run(
        [*line, "--json"], capture_output=True, text=True, cwd=ROOT, env=without_answers()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)["compiled"]
    assert report["seconds"]["compile_cpu"] > 0 and report["bytes"]["total"] > 0
    assert set(report["against the plan"]["sent by kind"]) >= {"all-gather"}
    slow = subprocess.run(
        [*line, "--compile_limit=1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=without_answers(),
    )
    assert slow.returncode == 2 and "the compiler did not end within 1 s" in slow.stderr


@with_libtpu
@pytest.mark.skipif(
    os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0"), reason="this machine has a TPU"
)
def test_commands_are_quiet_where_libtpu_is_there_and_no_tpu_is():
    env = {k: v for k, v in without_answers().items() if k != "JAX_PLATFORMS"}
    code = "from mor_jax.analysis.tpu_compiler import quiet_without_tpu as q; q(); import jax; print(jax.devices()[0].platform)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert (done.stdout, done.stderr) == ("cpu\n", "")


def without_answers() -> dict[str, str]:
    """An environment that says nothing of TPUs: what libtpu would wait for minutes to find out."""
    return {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}


def test_libtpu_that_is_missing_or_of_another_jax_is_named(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    wanted = libtpu_wanted()
    assert wanted.startswith("libtpu==0.0.")

    def gone(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", gone)
    cfg, place = small("vanilla, fsdp, accum 4")
    with pytest.raises(UserError, match=r"needs libtpu: pip install 'libtpu==.*No TPU is needed"):
        compiled_report(cfg, topology(place))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.0.7")
    with pytest.raises(
        UserError, match=r"libtpu 0\.0\.7 is not the one that jax .* pip install 'libtpu=="
    ):
        list(compiled_reports([(cfg, topology(place))], 1.0))
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/somewhere/libtpu.so")
    tpu_compiler.require_libtpu()  # one's own library is taken as it is
