"""Recursive models as directories with PyTorch code: back bit for bit, and what transformers reads.

The second needs torch and transformers, here or in the Python that $MOR_JAX_TORCH names
(`pip install torch transformers`)."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, spread_routers
from weights.test_export import IDS, RECURSIVE, SHAPE

import mor_jax
from mor_jax.config import Config, DepthConfig, ModelConfig, RecursionConfig
from mor_jax.data.vocabulary import ByteTokenizer
from mor_jax.errors import CheckpointError
from mor_jax.model.depth.survey import PROBES_G, SURVEY
from mor_jax.model.lm import LM
from mor_jax.train.checkpoint import save_weights
from mor_jax.train.load import load_model
from mor_jax.weights.exporting import export_weights
from mor_jax.weights.importing import import_weights

CODE = Path(mor_jax.__file__).parent / "weights/remote"
THREE = {"layers": 5, "recursions": 3, "sharing": "middle_cycle"}
TWO_BLOCKS = {"layers": 6, "recursions": 3, "sharing": "cycle"}
# name: shape, depth; among them every policy, KV strategy, gate, score and part of a block
CODED = {
    "expert": (THREE, {"policy": "expert_choice"}),
    "expert_hybrid": (
        TWO_BLOCKS | {"tied": False, "norms": "own", "lora_rank": 2, "recursion_encoding": True},
        {"policy": "expert_choice", "kv": "hybrid", "router": "mlp", "inference": "auxiliary"},
    ),
    "expert_first": (
        TWO_BLOCKS | {"qkv_bias": True, "qk_norm": True, "norm_placement": "sandwich_in"},
        {"policy": "expert_choice", "kv": "hybrid_first", "score": "tanh", "temperature": 2.0},
    ),
    "expert_shared": (
        THREE | {"smear": 2, "logit_cap": 4.0, "norms": "own"},
        {
            "policy": "expert_choice",
            "kv": "shared",
            "inference": "calibrated",
            "gate": "additive",
            "router": "wide_mlp",
        },
    ),
    "token": (
        THREE
        | {"layer_scale": 0.5, "rope_scaling": "yarn"}
        | {"rope_factor": 4.0, "rope_original_context": 16},
        {"policy": "token_choice", "alpha": 1.0},
    ),
    "token_every": (
        TWO_BLOCKS | {"norm_placement": "post"},
        {
            "policy": "token_choice",
            "gate": "every",
            "score": "sigmoid",
            "kv": "hybrid",
            "bias_rate": 0.01,
            "router": "mlp",
        },
    ),
    "kth": (TWO_BLOCKS | {"norm_placement": "sandwich_out"}, {"policy": "every_kth"}),
    "fixed": (THREE | {"head_dim": 12}, {}),
    "fixed_shared": (TWO_BLOCKS, {"kv": "shared"}),
    "in_place": ({"layers": 6, "recursions": 3, "sharing": "sequence"}, {}),
}


def saved(path, shape, depth):
    config = Config(model=ModelConfig(**{**SHAPE, **shape}), depth=DepthConfig(**depth))
    lm = LM.from_config(config)
    params = spread_routers(random_params(lm))
    if SURVEY in params["router"]:  # falling from all to none: calibration finds a threshold
        reach = np.clip(0.5 - PROBES_G / 4, 0, 1)
        params["router"][SURVEY] = jnp.broadcast_to(
            jnp.asarray(reach, jnp.float32), params["router"][SURVEY].shape
        )
    meta = {"config": config.to_dict(), "tokenizer": ByteTokenizer().to_json(), "data": ""}
    save_weights(path / "checkpoints", params, meta)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{name: (run, directory)}"""
    root, found = tmp_path_factory.mktemp("exported"), {}
    for name, (shape, depth) in CODED.items():
        run = saved(root / "runs" / name, shape, depth)
        export_weights(run, root / "hf" / name, remote_code=True)
        found[name] = run, root / "hf" / name
    return found


@pytest.mark.parametrize("name", CODED)
def test_what_is_written_with_code_comes_back_bit_for_bit(name, exported, tmp_path):
    run, directory = exported[name]
    config = json.loads((directory / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_mor.MorForCausalLM"
    import_weights(f"hf:{directory}", tmp_path / "again")
    first, second = load_model(run), load_model(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert first.lm.program == second.lm.program and first.lm.policy == second.lm.policy
    assert first.lm.kv() == second.lm.kv()
    assert second.tokenizer.prompt("a tail é") == first.tokenizer.prompt("a tail é")


def test_code_goes_where_no_published_architecture_does(exported, tmp_path):
    run, _ = exported["expert"]
    assert export_weights(run, tmp_path / "mor").architecture == "mor"
    assert export_weights(exported["fixed"][0], tmp_path / "plain").architecture == "llama"
    with pytest.raises(CheckpointError, match="expert_choice"):
        export_weights(run, tmp_path / "no", remote_code=False)
    random = saved(tmp_path / "random", THREE, {"policy": "random"})
    with pytest.raises(CheckpointError, match=r"random.*expert_choice"):
        export_weights(random, tmp_path / "no")
    knobs = tmp_path / "knobs"
    config = Config(model=ModelConfig(**SHAPE, **THREE), recursion=RecursionConfig(injection="add"))
    meta = {"config": config.to_dict(), "tokenizer": ByteTokenizer().to_json(), "data": ""}
    save_weights(knobs / "checkpoints", random_params(LM.from_config(config)), meta)
    with pytest.raises(CheckpointError, match="injection"):
        export_weights(knobs, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_the_code_stands_alone(exported):
    """It imports torch, transformers and itself; what lies beside the weights is that code."""
    for file in CODE.glob("*_mor.py"):
        names = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add("." if node.level else node.module.split(".")[0])
        assert names - set(sys.stdlib_module_names) <= {"torch", "transformers", "."}
        for _, directory in exported.values():
            assert (directory / file.name).read_bytes() == file.read_bytes()


# ---------------------------------------------------------------- beside transformers

AT_HAND = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
PYTHON = os.environ.get("MOR_JAX_TORCH") or (sys.executable if AT_HAND else "")
needs_torch = pytest.mark.skipif(
    not PYTHON, reason="no torch and transformers here, and MOR_JAX_TORCH names no Python with them"
)


@pytest.fixture(scope="module")
def theirs(exported, tmp_path_factory):
    """What transformers computes of every export, those of published architectures included."""
    root = tmp_path_factory.mktemp("theirs")
    of = {name: (*exported[name], DepthConfig(**CODED[name][1])) for name in CODED}
    for name, shape in RECURSIVE.items():
        name = "plain_" + name.replace(" ", "_")
        run = saved(root / "runs" / name, shape, {})
        export_weights(run, root / name)
        of[name] = run, root / name, DepthConfig()
    np.save(root / "ids.npy", IDS)
    command = [PYTHON, Path(__file__).with_name("peer_transformers.py"), root / "out.npz"]
    command += [root / "ids.npy", *(directory for _, directory, _ in of.values())]
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        "HF_HOME": str(root / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return np.load(root / "out.npz"), {name: run for name, (run, *_) in of.items()}


@needs_torch
@pytest.mark.parametrize(
    "name", [*CODED, *("plain_" + name.replace(" ", "_") for name in RECURSIVE)]
)
def test_transformers_computes_the_same_logits(name, theirs):
    found, runs = theirs
    loaded = load_model(runs[name])

    @jax.jit
    def run(ids):
        out = loaded.lm.forward(loaded.params, ids[None], mode="causal")
        return loaded.lm.logits(loaded.params, out.h_BxTxD)[0], out.depth_BxT[0]

    logits, depth = (np.asarray(x) for x in run(jnp.asarray(IDS, jnp.int32)))
    print(name, f"max |d logit| {np.abs(found[f'{name}/logits'] - logits).max():.2g}")
    # the bound that was asked for; logits are of size 1 to 10
    np.testing.assert_allclose(found[f"{name}/logits"], logits, atol=1e-4)
    np.testing.assert_allclose(found[f"{name}/cached"], logits, atol=1e-4)
    short = found[f"{name}/padded"]
    np.testing.assert_allclose(short, logits[: len(short)], atol=1e-4)
    if name in CODED and loaded.lm.depth.policy != "fixed":
        np.testing.assert_array_equal(found[f"{name}/depth"], depth)
        assert len(set(depth.tolist())) > 1  # else nothing was routed
    # greedy text of the padded row, a token at a time
    new = found[f"{name}/greedy"]
    grown = [*IDS[: len(short) - len(new)].tolist(), *new.tolist()]
    again, _ = run(jnp.asarray(grown + [0] * (len(IDS) - len(grown)), jnp.int32))
    first = len(grown) - len(new) - 1
    np.testing.assert_array_equal(np.asarray(again)[first : first + len(new)].argmax(-1), new)
