"""Training on eight devices is training on one: the same numbers on every mesh, and no traffic the
maths does not need."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.sharding import PartitionSpec

from mor_jax.analysis import units
from mor_jax.analysis.collective_plan import planned_collectives, total_bytes
from mor_jax.analysis.memory import MERGES_GATHERS, parameter_bytes, training_memory
from mor_jax.config import (
    Config,
    DepthConfig,
    MeshConfig,
    MeshShape,
    ModelConfig,
    TrainConfig,
    from_dict,
    mesh_shape,
)
from mor_jax.errors import ConfigError
from mor_jax.parallel.mesh import arrange_slices, make_mesh
from mor_jax.parallel.rows import forget_gathered, gather_weight, scatter_parts
from mor_jax.parallel.rules import DEFAULT_RULES, Rules

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("vanilla", "mor", "token")
MESHES = ("8x1x1", "1x8x1", "2x2x2", "1x2x4", "1x2x2x2")  # data, fsdp, tensor, sequence
CASES = [f"{kind} {mesh}" for kind in KINDS for mesh in MESHES]
# A second router and relaxed recursions; drawn depths; all features of the block; drawn steps over
# the core; a gate after each.
KINDS_MORE = ("aux", "random", "features", "drawn", "gate")
MORE = [f"{kind} 1x2x2x2" for kind in KINDS_MORE]
# Their steps are the turns of a loop: each turn joins its keys along the row and, where rows run
# different numbers of steps, asks in one byte whether anyone goes on. Weights stay outside as ever.
SCANNED = ("drawn", "gate")
ACCUMULATED = ["vanilla accumulated", "mor accumulated"]  # in two micro-batches: the same as in one
SMALL = 768  # bytes: metrics, norms, routers and counts of tokens are below it, weights above


@pytest.fixture(scope="module")
def found():
    env = os.environ | {
        # The second flag halves the time to compile. It is about machine code: the program, its
        # collectives and its memory are planned before that.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
    }
    program = ROOT / "tests" / "parallel" / "mesh_program.py"
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, cwd=ROOT, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1])


def traffic(found, name, *kinds):
    return [c for c in found[name]["traffic"] if c["kind"] in kinds and c["payload"] >= SMALL]


@pytest.mark.parametrize("name", CASES + MORE + ACCUMULATED)
def test_twenty_steps_equal_one_device(found, name):
    one = found[f"{name.split()[0]} one"]["losses"]
    assert one[-1]["loss"] < one[4]["loss"]  # the same batch: five of them go round
    for step, (mine, theirs) in enumerate(zip(found[name]["losses"], one, strict=True), 1):
        for key in ("loss", "lm_loss", "router_loss", "grad_norm", "mean_depth"):
            assert abs(mine[key] - theirs[key]) < 1e-4, f"{key} at step {step}"
    # Parameters and selection bias; and the optimiser's moments, which are sums of all gradients so
    # far.
    assert found[name]["state_differs"] < 1e-4
    assert found[name]["survey_differs"] < 1e-3


@pytest.mark.parametrize("name", CASES)
def test_state_lies_on_all_devices_in_equal_parts(found, name):
    """Optimiser state is cut as the weights are: two moments of each, and nothing whole but norms
    and routers."""
    local, whole = found[name]["local"], found[f"{name.split()[0]} one"]["local"]
    assert found[name]["devices"] == [8]
    assert local["opt_state"] == 2 * local["params"]
    _, fsdp, tensor, *_ = map(int, name.split()[1].split("x"))
    small = 2 * 256 * 4 + 2 * 32 * 4  # survey and routers, whole on each device
    assert local["params"] <= whole["params"] / (fsdp * tensor) + small


# ---------------------------------------------------------------- traffic


@pytest.mark.parametrize("name", CASES + MORE)
def test_nothing_travels_inside_a_loop_but_what_the_tensor_axis_needs(found, name):
    """Not the tied core, not the table's gradient: what the recursion and the loss accumulate is
    reduced once, after."""
    scanned = name.split()[0] in SCANNED
    loops = [c for c in found[name]["traffic"] if c["loop"] and c["payload"] > scanned]
    inside = {axis for c in loops for axis in c["axes"]}
    assert inside <= {"tensor"} | ({"sequence"} if scanned else set())


def table() -> dict[str, dict[str, str]]:
    """The table of docs/pods.md: "kind mesh" -> column -> cell."""
    lines = [
        line
        for line in (ROOT / "docs" / "pods.md").read_text().splitlines()
        if line.startswith("|")
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    at = next(i for i, row in enumerate(rows) if row[:2] == ["model", "mesh"])
    columns, found = rows[at][2:], {}
    for row in rows[at + 2 :]:
        if row[0] not in KINDS:
            break
        found[f"{row[0]} {row[1].replace(' ', '')}"] = dict(zip(columns, row[2:], strict=True))
    return found


def column(kind: str) -> str:
    """XLA for CPUs of jax 0.10 merges the two gathers of a block that is used once; the table says
    so apart."""
    return "merged, jax 0.10" if kind == "all-gather" and MERGES_GATHERS else kind


@pytest.mark.parametrize("name", CASES)
def test_gathers_are_written_as_the_table_says(found, name):
    """Before any compiler: a tied core once, a block that is used once forward and backward, the
    table once."""
    cell = table()[name]["all-gather"]
    planned = int(cell.split(" fsdp")[0]) if "fsdp" in cell else 0
    assert found[name]["written"].get("fsdp", 0) == planned


@pytest.mark.parametrize("name", CASES)
def test_collectives_are_those_of_the_table(found, name):
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute")
    for kind, cell in ((kind, table()[name][column(kind)]) for kind in kinds):
        counts: dict[str, int] = {}
        for c in traffic(found, name, kind):
            axes = "+".join(c["axes"])
            counts[axes] = counts.get(axes, 0) + c["times"]
        # How many reductions the compiler joins into one is its own affair; which axes they span is
        # not.
        cells = [
            f"{n} {axes}" if kind != "all-reduce" else axes for axes, n in sorted(counts.items())
        ]
        assert (", ".join(cells) or "none") == cell, f"{name}: {kind}"


@pytest.mark.parametrize("name", ACCUMULATED)
def test_each_micro_batch_gathers_and_scatters_what_a_step_does(found, name):
    """Scatters lie inside of the loop, so that what is added up is a device's part of the
    gradients. (XLA for CPUs takes gathers out of it, where they do not depend on the micro-batch;
    what is written is held here.)"""
    once = {"vanilla": "vanilla 1x2x2x2", "mor": "mor 2x2x2"}[name.split()[0]]
    assert found[name]["written"]["fsdp"] == 2 * found[once]["written"]["fsdp"]

    def scatters(name):
        return [c for c in traffic(found, name, "reduce-scatter") if c["axes"] == ["fsdp"]]

    assert sum(c["times"] for c in scatters(name)) == 2 * sum(c["times"] for c in scatters(once))
    assert all(c["loop"] and c["times"] == 2 for c in scatters(name))


def test_loss_weights_and_a_teacher_count_the_same_on_eight_devices(found):
    """Rows, weights of the losses and both models cut over the devices, in two micro-batches."""
    assert found["taught"]["largest"] > 0.1
    # float32, sums in another order
    assert found["taught"]["differs"] < 1e-4 * found["taught"]["largest"]


def test_the_gradient_of_a_weight_is_summed_in_float32_to_the_end(found):
    assert found["gradient"] == {"dtype": "float32", "values": [8 + 28 / 128]}


def test_a_scatter_in_two_parts_is_one_scatter(found):
    assert all(d < 1e-6 for d in found["parts"])  # float32, another order of eight terms
    assert [scatter_parts(n) for n in (1, 8, 12, 13, 16, 32, 256)] == [
        (1,),
        (8,),
        (4, 3),
        (13,),
        (4, 4),
        (8, 4),
        (16, 16),
    ]


def test_data_parallel_gathers_nothing(found):
    """Rows are chosen, embedded and scored where they lie; only gradients travel, in
    all-reduces."""
    for kind in KINDS:
        assert {c["kind"] for c in found[f"{kind} 8x1x1"]["traffic"]} == {"all-reduce"}


@pytest.mark.parametrize("name", [c for c in CASES if not c.endswith("1x2x2x2")])
def test_selection_and_counts_travel_as_sums_alone(found, name):
    """No gather brings scores, positions or picked tokens together while rows are whole on a
    device."""
    for c in found[name]["traffic"]:
        assert c["kind"] != "all-to-all" and c["kind"] != "collective-permute", c
        if c["kind"] == "all-gather":
            assert c["axes"] == ["fsdp"] and not any(
                s.startswith(("pred", "s32", "u32")) for s in c["of"]
            ), c


# ---------------------------------------------------------------- plans against the compiler


@pytest.mark.parametrize("which", [0, 1], ids=["1x8x1", "2x2x2"])
def test_planned_bytes_are_the_compilers(found, which):
    measured = found["planned"][which]
    cfg = from_dict(measured["config"])
    memory = training_memory(cfg, devices=8, merged=True)
    state = parameter_bytes(cfg, mesh_shape(cfg.mesh, 8))
    batch = 2 * 4 * cfg.train.batch_size * cfg.model.context / (8 / cfg.mesh.tensor)
    counters = 3 * 4  # the step, and those of the optimiser
    assert measured["state"] == pytest.approx(3 * state + batch + counters, abs=8)
    planned = memory.total - memory.weights - memory.optimizer + 3 * state + batch
    assert planned == pytest.approx(measured["total"], rel=0.10)


def test_planned_bytes_are_the_compilers_for_programs_of_every_kind():
    """Some of those that docs/pods.md lists, compiled anew; the command ends with 1 where a plan is
    10 % off."""
    some = [
        "vanilla, fsdp and tensor",
        "mor, shared keys",
        "mor, sequence and tensor",
        "token, fsdp",
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "benchmarks.plan_accuracy", "--only", *some]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]

    def off(text):
        return {
            n: float(p)
            for n, p in re.findall(
                r"^\| ([a-z, ]+) \| [\dx ]+ \|.*\| ([+-][\d.]+)% \|$", text, re.M
            )
        }

    printed, documented = off(done.stdout), off((ROOT / "docs" / "pods.md").read_text())
    assert printed.keys() == set(some) < documented.keys()
    for name in some if MERGES_GATHERS else ():  # the page's figures are those of jax 0.10
        assert printed[name] == pytest.approx(documented[name], abs=2.0), name


@pytest.mark.parametrize("which", [0, 1], ids=["1x8x1", "2x2x2"])
def test_planned_traffic_is_the_compilers(found, which):
    measured = found["planned"][which]
    cfg = from_dict(measured["config"])
    plan = planned_collectives(cfg, devices=8, regather=not MERGES_GATHERS)
    for kind in ("all-gather", "reduce-scatter", "all-reduce"):
        sent = sum(c["bytes"] for c in measured["traffic"] if c["kind"] == kind)
        assert total_bytes(plan, kind) == pytest.approx(sent, rel=0.05), kind


def test_gathered_weights_are_not_kept_for_the_backward_pass():
    """A checkpointed product keeps the weight as it lay, told by its dtype, and neither the
    gathered one nor a view of that; activations it keeps."""
    mesh, rules, names = make_mesh(MeshConfig(), jax.devices()[:1]), Rules(), ("mlp", "embed")
    w, x = jax.ShapeDtypeStruct((8, 4), "float32"), jax.ShapeDtypeStruct((3, 4), "bfloat16")

    def kept(policy):
        def run(w, x):
            return jax.numpy.sin(
                jax.numpy.sin(x) @ gather_weight(rules, w.astype(x.dtype), names).T
            )

        island = jax.shard_map(
            jax.checkpoint(run, policy=policy),
            in_specs=(PartitionSpec(None, "fsdp"), PartitionSpec()),
            out_specs=PartitionSpec(),
            axis_names={"fsdp"},
            check_vma=False,
        )
        backward = jax.tree.leaves(jax.eval_shape(lambda w, x: jax.vjp(island, w, x)[1], w, x))
        return {leaf.dtype.name for leaf in backward if leaf.size == 8 * 4}, [
            leaf.size for leaf in backward
        ]

    with jax.set_mesh(mesh):
        everything, (ours, sizes) = (
            kept(jax.checkpoint_policies.everything_saveable),
            kept(forget_gathered),
        )
    assert ours == {"float32"} and everything[0] == {"bfloat16"}
    assert 3 * 8 in sizes


def test_weak_scaling_is_what_the_docs_show():
    """The planned column of every row; of two rows, what the command prints."""
    from benchmarks.weak_scaling import config

    documented = (ROOT / "docs" / "pods.md").read_text()
    rows = re.findall(
        r"^\| (data|fsdp|tensor|sequence) \| (\d) \| (.*?) \| (.*?) \|", documented, re.M
    )
    assert len(rows) == 12
    for axis, n, sent, planned in rows:
        cfg = config("mor", axis, int(n))
        # The page's figures are those of jax 0.10, which merges the two gathers of a block.
        assert (
            units.size(total_bytes(planned_collectives(cfg, devices=int(n), regather=False)))
            == planned
            == sent
        )
    line = [sys.executable, "-m", "benchmarks.weak_scaling", "--devices=2", "--axes", "sequence"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=env, check=True)
    printed = done.stdout.splitlines()
    assert len(printed) == 4, printed
    if MERGES_GATHERS:
        assert all(row in documented for row in printed), printed
    for row in printed[2:]:
        _, _, _, compiled, planned, *_ = row.split("|")
        assert compiled == planned, row


# ---------------------------------------------------------------- rules and meshes


def test_rules_name_what_they_do_not_know():
    with pytest.raises(
        ConfigError, match=r"no logical axis 'mlpp'.*Did you mean 'mlp'.*Valid: batch, time"
    ):
        Rules.create((("mlpp", "tensor"),))
    with pytest.raises(ConfigError, match="'mlp' -> 'tensr': no mesh axis 'tensr'"):
        Rules.create((("mlp", "tensr"),))
    with pytest.raises(ConfigError, match="no mesh axis 'model'"):
        Rules.create((("mlp", "tensor+model"),))


def test_rules_become_specs():
    rules = Rules.create((("mlp", "tensor+fsdp"), ("embed", "")))
    assert rules.spec(("batch", "time")) == PartitionSpec(("data", "fsdp"), "sequence")
    assert rules.spec(("embed", "mlp")) == PartitionSpec(None, ("tensor", "fsdp"))
    assert rules.spec(("batch", None), drop=("fsdp",)) == PartitionSpec("data", None)
    assert Rules.create() == Rules(DEFAULT_RULES) and hash(rules) != hash(Rules())


def test_constrain_is_the_identity_without_a_mesh():
    x = jax.numpy.ones((2, 3))
    assert Rules().constrain(x, "batch", "time") is x


def test_mesh_must_fit_the_devices():
    assert make_mesh(MeshConfig(), jax.devices()[:1]).devices.shape == (1, 1, 1, 1)
    with pytest.raises(ConfigError, match="2 x 1 x 1 x 1 = 2, but there are 1 devices"):
        make_mesh(MeshConfig(data=2), jax.devices()[:1])


def tpu(slices: int, each: tuple[int, int]) -> list:
    """What JAX shows of the chips of several v5e slices, in the order in which it lists them."""
    chips = [(s, x, y) for s in range(slices) for y in range(each[1]) for x in range(each[0])]
    return [
        SimpleNamespace(
            id=i,
            slice_index=s,
            process_index=i // 4,
            coords=(x, y, 0),
            core_on_chip=0,
            platform="tpu",
            device_kind="TPU v5 lite",
        )
        for i, (s, x, y) in enumerate(chips)
    ]


def test_only_data_crosses_slices():
    shape = MeshShape(data=4, fsdp=4, sequence=1, tensor=1)
    mesh = arrange_slices(tpu(2, (4, 2)), shape, 2)
    assert mesh.shape == shape and len({d.id for d in mesh.flat}) == 16
    for i, within in enumerate(mesh):
        assert {d.slice_index for d in within.flat} == {i // 2}


def test_nodes_are_slices_where_nothing_else_says():
    gpus = [
        SimpleNamespace(id=i, process_index=i // 8, platform="gpu", device_kind="H100")
        for i in range(16)
    ]
    mesh = arrange_slices(gpus, MeshShape(2, 8, 1, 1), 2)
    assert [{d.process_index for d in part.flat} for part in mesh] == [{0}, {1}]
    plain = [SimpleNamespace(id=i, process_index=0, platform="cpu") for i in range(8)]
    assert [d.id for d in arrange_slices(plain, MeshShape(4, 1, 1, 2), 2).flat] == list(range(8))


def test_slices_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match="slices = 4, but the devices are in parts of"):
        arrange_slices(tpu(2, (4, 2)), MeshShape(4, 4, 1, 1), 4)
    with pytest.raises(ConfigError, match="slices = 2, but the devices are in 1 slice"):
        arrange_slices(tpu(1, (4, 4)), MeshShape(4, 4, 1, 1), 2)
    with pytest.raises(
        ConfigError, match=re.escape("slices = 3 does not divide config.mesh.data = 4")
    ):
        mesh_shape(MeshConfig(data=4, slices=3), 4)


def test_rows_that_cannot_be_cut_are_refused():
    from mor_jax.config import check

    cfg = Config(
        "x",
        ModelConfig(context=30),
        DepthConfig(),
        train=TrainConfig(steps=1),
        mesh=MeshConfig(1, 1, 1, 4),
    )
    with pytest.raises(
        ConfigError, match=re.escape("context = 30 is not divisible by config.mesh.sequence = 4")
    ):
        check(cfg, devices=4)
