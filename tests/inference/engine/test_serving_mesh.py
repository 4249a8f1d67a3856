"""An engine cut over devices draws what one device draws; every device has its part and no more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from serving_program import CASES, KINDS, SHAPE
from small import small_lm

from mor_jax.config import ModelConfig
from mor_jax.errors import ConfigError
from mor_jax.parallel.serving import check_tensor, serving_mesh, sizes_that_divide

ROOT = Path(__file__).resolve().parents[3]
CUT = [(kind, n, how) for kind, (sizes, how) in CASES.items() for n in sizes[1:]]
VECTORS = ("scale", "smear", "router", "recursion", "encoding")


@pytest.fixture(scope="module")
def found():
    here = Path(__file__).parent
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", here))),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, here / "serving_program.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind,tensor,weights", CUT)
def test_the_same_tokens_as_one_device(found, kind, tensor, weights):
    """Greedy and sampled, prefilled and from saved rows, and the scores of a prompt. Sums over
    devices are added in another order, so log-probabilities may differ by rounding of float32:
    1e-4 is a hundred times what was seen."""
    one, cut = found[f"{kind} 1 {weights}"], found[f"{kind} {tensor} {weights}"]
    assert cut["tokens"] == one["tokens"] and cut["depths"] == one["depths"]
    assert cut["from saved rows"] == one["from saved rows"] == one["tokens"][1]
    for name in ("logprobs", "scores"):
        np.testing.assert_allclose(np.ravel(cut[name]), np.ravel(one[name]), atol=1e-4)
    assert len({tuple(t) for t in one["tokens"]}) == 4


@pytest.mark.parametrize("kind,tensor,weights", CUT)
def test_every_device_has_its_part_alone(found, kind, tensor, weights):
    cut = found[f"{kind} {tensor} {weights}"]
    assert set(cut["shares of logs"]) == {1 / tensor}
    for name, share in cut["shares of weights"].items():
        # the factor of an output that is not cut is whole, as vectors are
        whole = any(f"'{v}'" in name for v in VECTORS) or (
            name.endswith(".scale") and ("'out'" in name or "'down'" in name)
        )
        assert share == (1 if whole or "lora" in name else 1 / tensor), name


@pytest.mark.parametrize("kind,tensor,weights", CUT)
def test_two_sums_a_block_and_the_logits_are_sent(found, kind, tensor, weights):
    """In a tick of m = 1: a core pass and a boundary. No matrix and no log travels."""
    cut = found[f"{kind} {tensor} {weights}"]
    name, shape = KINDS[kind]
    lm = small_lm(name, **SHAPE | shape)
    p = lm.program
    applied = p.prelude + p.core * p.repeat + p.coda
    lanes, chunk = 4, 8
    states, logits = 4 * lanes * lm.model.width, 4 * lanes * lm.model.vocab_size
    tick = cut["tick"]
    assert set(tick) == {"all-reduce", "all-gather"}
    assert tick["all-gather"] == [logits]
    # two a block, and the embeddings; the factors of 8-bit ones
    factors = [4 * lanes * (1 + lm.model.smear)] if weights == "int8" else []
    assert tick["all-reduce"] == sorted(factors + [states] * (2 * applied + 1))
    assert set(cut["prefill"]) == {"all-reduce"}
    assert max(cut["prefill"]["all-reduce"]) <= 4 * chunk * lm.model.width


EIGHT = ModelConfig(
    width=64, heads=8, kv_heads=8, mlp_width=96, vocab_size=128, layers=2, context=32
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tensr=8", ["'tensr'", "tensor"]),
        ("data=2", ["data", "--replicas"]),
        ("fsdp=2,tensor=4", ["fsdp", "tensor=N"]),
        ("tensor=0", ["tensor=0", "tensor=N"]),
        ("tensor", ["tensor=N"]),
        ("tensor=2,tensor=2", ["tensor=N"]),
        ("", ["tensor=N"]),
        ("tensor=64", ["64 devices", "there are 8", "tensor=8"]),
        ("tensor=3", ["kv heads (8)", "vocabulary (128)", "tensor=8, tensor=4"]),
    ],
)
def test_a_mesh_that_cannot_be_is_one_message(text, words):
    with pytest.raises(ConfigError) as error:
        serving_mesh(text, EIGHT, [None] * 8)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("kv_heads", 2, "kv heads (2)"),
        ("mlp_width", 90, "mlp width (90)"),
        ("vocab_size", 130, "vocabulary (130)"),
    ],
)
def test_each_thing_that_does_not_divide_is_named(field, value, words):
    model = ModelConfig(
        **{name: getattr(EIGHT, name) for name in ("width", "heads", "layers", "context")}
        | {"kv_heads": 8, "mlp_width": 96, "vocab_size": 128, field: value}
    )
    with pytest.raises(ConfigError) as error:
        check_tensor("tensor=8", 8, model, 8)
    assert words in str(error.value) and str(error.value).count("(") == 1
    best = sizes_that_divide(model, 8)[-1]
    assert f"tensor={best}" in str(error.value)
    check_tensor(f"tensor={best}", best, model, 8)
