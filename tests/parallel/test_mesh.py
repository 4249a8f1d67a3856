"""Training on eight devices is training on one: the same losses on every mesh, and no traffic the maths does not need."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec

from mor_jax.config import MeshConfig
from mor_jax.errors import ConfigError
from mor_jax.parallel.mesh import make_mesh
from mor_jax.parallel.rules import DEFAULT_RULES, Rules

ROOT = Path(__file__).resolve().parents[2]

# Eight devices have to be asked for before jax starts, hence a process of its own. It trains each kind on each mesh
# and prints the losses and the collectives of the compiled step as JSON.
PROGRAM = """
import dataclasses, json, re, sys
sys.path.insert(0, "tests")
import numpy as np, jax
from jax.sharding import NamedSharding
from small import small_lm
from mor_jax.config import Config, MeshConfig, OptimConfig
from mor_jax.parallel.mesh import make_mesh
from mor_jax.train.schedule import optimizer_of
from mor_jax.train.state import create_state
from mor_jax.train.step import make_train_step

STEPS, ROWS, LENGTH, VOCAB = 20, 8, 24, 64
SHAPE = dict(width=16, heads=4, kv_heads=2, mlp_width=32, context=LENGTH, vocab_size=VOCAB, init_std=0.1)
rng = np.random.default_rng(0)
batches = []
for _ in range(STEPS):
    seg = np.zeros((ROWS, LENGTH), np.int32)
    for row in seg:  # packed: documents of random length, a padded end
        cuts = np.sort(rng.choice(np.arange(1, LENGTH), 3, replace=False))
        for i, (a, b) in enumerate(zip([0, *cuts], cuts)):
            row[a:b] = i + 1
    batches.append({"tokens": rng.integers(0, VOCAB, seg.shape).astype(np.int32) * (seg > 0), "segment_ids": seg})

KIND = {"mor": "mor", "token": "token", "vanilla": "vanilla", "aux": "mor", "random": "random_shared"}

def train(kind, shape, devices):
    more = {"layers": 1} if kind == "vanilla" else {"layers": 3, "sharing": "cycle"}
    if kind == "aux":  # everything a run can have at once: a second router with its own optimiser, relaxed recursions
        more |= {"norms": "own", "lora_rank": 2, "recursion_encoding": True}
    lm = small_lm(KIND[kind], **SHAPE, **more)
    if kind == "aux":
        lm = dataclasses.replace(lm, depth=dataclasses.replace(lm.depth, inference="auxiliary", aux_loss_weight=0.1))
    if kind == "token":
        lm = dataclasses.replace(lm, depth=dataclasses.replace(lm.depth, bias_rate=0.01, buckets=2))
    tx = optimizer_of(Config(depth=lm.depth, optim=OptimConfig(peak_lr=1e-2)), STEPS)
    mesh = make_mesh(MeshConfig(*shape), devices)
    with jax.set_mesh(mesh):
        state = create_state(lm, tx, mesh, seed=0)
        sharding = NamedSharding(mesh, lm.rules.spec(("batch", "time")))
        placed = [{k: jax.device_put(v, sharding) for k, v in b.items()} for b in batches]
        step = jax.jit(make_train_step(lm, tx), donate_argnums=0).lower(state, placed[0]).compile()
        shards = {len(x.sharding.device_set) for x in jax.tree.leaves(state)}
        counted = state.params | {"router": {k: v for k, v in state.params["router"].items() if k != "survey"}}
        local = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(counted))
        losses, biases = [], []
        for batch in placed:
            state, metrics = step(state, batch)
            biases.append([float(b) for b in state.params["router"].get("bias", [])])
            losses.append({k: float(metrics[k]) for k in ("loss", "lm_loss", "router_loss", "grad_norm", "mean_depth")})
    text = step.as_text()
    gathered = re.findall(r"= \\(?(\\w+\\[[\\d,]*\\])[^=]* all-gather(?:-start)?\\(", text)
    print(kind, shape, file=sys.stderr, flush=True)
    return {"losses": losses, "biases": biases, "gathered": gathered, "devices": sorted(shards), "local_bytes": local}

found = {}
for kind, shapes in {
    "mor": [(2, 2, 2), (1, 8, 1), (8, 1, 1)], "token": [(2, 2, 2), (8, 1, 1)], "vanilla": [(2, 2, 2)],
    "aux": [(2, 2, 2)], "random": [(2, 2, 2)],
}.items():
    found[f"{kind} one"] = train(kind, (1, 1, 1), jax.devices()[:1])
    for shape in shapes:
        found[f"{kind} {'x'.join(map(str, shape))}"] = train(kind, shape, jax.devices())
print("RESULT" + json.dumps(found))
"""
MESHES = [
    "mor 2x2x2",
    "mor 1x8x1",
    "mor 8x1x1",
    "token 2x2x2",
    "token 8x1x1",
    "vanilla 2x2x2",
    "aux 2x2x2",
    "random 2x2x2",
]


@pytest.fixture(scope="module")
def found():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        capture_output=True, text=True, cwd=ROOT, env=env | {"JAX_PLATFORMS": "cpu"}, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1])


@pytest.mark.parametrize("name", MESHES)
def test_twenty_steps_equal_one_device(found, name):
    one = found[f"{name.split()[0]} one"]["losses"]
    assert one[-1]["loss"] < one[0]["loss"]
    for step, (mine, theirs) in enumerate(zip(found[name]["losses"], one, strict=True), 1):
        for key in ("loss", "lm_loss", "router_loss", "mean_depth"):
            assert abs(mine[key] - theirs[key]) < 1e-4, f"{key} at step {step}"
        assert abs(mine["grad_norm"] - theirs["grad_norm"]) < 1e-3 * theirs["grad_norm"], f"gradient at step {step}"


@pytest.mark.parametrize("name", ["token 2x2x2", "token 8x1x1"])
def test_the_selection_bias_moves_as_on_one_device(found, name):
    """Loads are counted over all devices, not over each one's rows."""
    one, many = found["token one"]["biases"], found[name]["biases"]
    assert any(map(any, one))
    for step, (mine, theirs) in enumerate(zip(many, one, strict=True), 1):
        assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) < 1e-6, f"at step {step}"


@pytest.mark.parametrize("name", MESHES)
def test_state_lies_on_all_devices(found, name):
    assert found[name]["devices"] == [8]
    if name == "mor 1x8x1":  # every matrix in eighths; the table, the norms and the survey (not counted) whole
        whole = found["mor one"]["local_bytes"]
        assert found[name]["local_bytes"] < 0.5 * whole


def test_data_parallel_gathers_nothing(found):
    """Rows are chosen, embedded and scored where they lie; only gradients travel, in all-reduces."""
    assert found["mor 8x1x1"]["gathered"] == found["token 8x1x1"]["gathered"] == []


def test_selection_gathers_no_scores(found):
    """No all-gather makes an array of whole-batch scores or positions, [8, 24] or a sorted part of it."""
    for name in ("mor 2x2x2", "mor 1x8x1"):
        for shape in found[name]["gathered"]:
            dims = [int(d) for d in shape[shape.index("[") + 1 : -1].split(",") if d]
            assert not (len(dims) == 2 and dims[0] == 8 and dims[1] <= 24 and dims != [8, 16]), f"{name}: {shape}"
            assert not shape.startswith(("pred", "s32")), f"{name}: {shape}"


# ---------------------------------------------------------------- rules and meshes


def test_rules_name_what_they_do_not_know():
    with pytest.raises(ConfigError, match=r"no logical axis 'mlpp'.*Did you mean 'mlp'.*Valid: batch, time"):
        Rules.create((("mlpp", "tensor"),))
    with pytest.raises(ConfigError, match="'mlp' -> 'tensr': no mesh axis 'tensr'"):
        Rules.create((("mlp", "tensr"),))
    with pytest.raises(ConfigError, match="no mesh axis 'model'"):
        Rules.create((("mlp", "tensor+model"),))


def test_rules_become_specs():
    rules = Rules.create((("mlp", "tensor+fsdp"), ("embed", "")))
    assert rules.spec(("batch", "time")) == PartitionSpec(("data", "fsdp"), None)
    assert rules.spec(("embed", "mlp")) == PartitionSpec(None, ("tensor", "fsdp"))
    assert rules.spec(("batch", None), drop=("fsdp",)) == PartitionSpec("data", None)
    assert Rules.create() == Rules(DEFAULT_RULES) and hash(rules) != hash(Rules())


def test_constrain_is_the_identity_without_a_mesh():
    x = jax.numpy.ones((2, 3))
    assert Rules().constrain(x, "batch", "time") is x


def test_mesh_must_fit_the_devices():
    assert make_mesh(MeshConfig(), jax.devices()[:1]).devices.shape == (1, 1, 1)
    with pytest.raises(ConfigError, match="2 x 1 x 1 = 2, but there are 1 devices"):
        make_mesh(MeshConfig(data=2), jax.devices()[:1])
