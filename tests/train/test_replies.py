"""Exact match of generated replies, on a model whose every reply is known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.config import Config, MeshConfig, ModelConfig
from mor_jax.data.vocabulary import ByteTokenizer
from mor_jax.errors import DataError
from mor_jax.model.lm import LM
from mor_jax.parallel.mesh import make_mesh
from mor_jax.train.load import Loaded
from mor_jax.train.replies import answer


@pytest.fixture(scope="module")
def loaded():
    """After each token comes a token that hangs on it alone: after "assistant:" the reply " 42",
    then the end."""
    tokenizer = ByteTokenizer()
    shape = {
        "layers": 1,
        "width": 32,
        "heads": 2,
        "kv_heads": 1,
        "mlp_width": 8,
        "context": 48,
        "vocab_size": 320,
    }
    lm = LM(ModelConfig(**shape, tied=False))
    params = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float32), jax.eval_shape(lm.init, jax.random.key(0))
    )
    table = np.random.default_rng(0).normal(size=(320, 32)).astype(np.float32)
    params["embed"]["table"], params["norm"]["scale"] = table, np.ones(32, np.float32)
    for now, then in zip([*b": 42"], [*b" 42", tokenizer.eos], strict=True):
        params["head"]["table"][then] = 10 * table[now]
    cfg = Config(model=lm.model)
    return Loaded(
        lm, jax.tree.map(jnp.asarray, params), tokenizer, cfg, 0, "", make_mesh(MeshConfig(data=-1))
    )


def test_a_reply_is_exact_or_not(loaded, tmp_path):
    def talk(*texts):
        return {
            "messages": [
                {"role": r, "content": t}
                for r, t in zip(["user", "assistant"] * 2, texts, strict=False)
            ]
        }

    talks = [
        talk("6 x 7?", "42"),
        talk("6 x 7?", "43"),
        talk("a", "b", "c", "42 "),
        talk("x" * 60, "42"),
        talk("no"),
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(t) + "\n" for t in talks))
    found = answer(loaded, [str(tmp_path / "*.jsonl")])
    assert [(a.expected, a.text, a.exact) for a in found.answers] == [
        ("42", " 42", True),
        ("43", " 42", False),
        ("42 ", " 42", True),
    ]
    assert found.record() == {"replies": 3, "exact": 2, "exact_share": 2 / 3, "too_long": 1}
    cut = answer(loaded, [str(tmp_path / "*.jsonl")], max_tokens=3, rows=1)
    assert [(a.text, a.exact) for a in cut.answers] == [(" 42", False)], "cut before it could end"


def test_conversations_without_a_reply_are_named(loaded, tmp_path):
    (tmp_path / "chats.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "no"}]}) + "\n"
    )
    with pytest.raises(DataError, match="no conversation has a message of the role 'assistant'"):
        answer(loaded, [str(tmp_path / "*.jsonl")])
