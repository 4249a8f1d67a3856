"""A shipped model is the checkpoint's in bfloat16, and what is not one is refused in one
message."""

import jax
import numpy as np
import pytest
from small import random_params, small_lm

from mor_jax.config import Config
from mor_jax.data.chat import CHATML
from mor_jax.data.vocabulary import ByteTokenizer
from mor_jax.errors import CheckpointError
from mor_jax.train.bundle import MODEL, WEIGHTS, is_bundle
from mor_jax.train.load import Loaded, describe, load_model, save_bundle


def test_round_trip_and_damage(tmp_path):
    lm = small_lm("mor", smear=2, vocab_size=320)
    params = random_params(lm)
    config = Config(model=lm.model, depth=lm.depth)
    model = Loaded(lm, params, ByteTokenizer(), config, 7, "x", None, chat_template=CHATML)
    size = save_bundle(model, tmp_path / "b", {"command": "make"})
    assert (
        is_bundle(tmp_path / "b")
        and size < 2.2 * sum(w.size for w in jax.tree.leaves(params)) + 20_000
    )
    loaded = load_model(tmp_path / "b")
    assert (loaded.step, loaded.lm.model, loaded.chat_template) == (7, lm.model, CHATML)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(loaded.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a.astype("bfloat16").astype("float32")), b)
    assert describe(tmp_path / "b")[0].model == lm.model

    whole = (tmp_path / "b" / WEIGHTS).read_bytes()
    (tmp_path / "b" / WEIGHTS).write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"not a bundle of weights\.npz and model\.json"):
        load_model(tmp_path / "b")
    (tmp_path / "b" / WEIGHTS).write_bytes(whole)
    text = (tmp_path / "b" / MODEL).read_text()
    (tmp_path / "b" / MODEL).write_text(text.replace('"width": 32', '"width": 64'))
    with pytest.raises(CheckpointError, match="does not fit its config"):
        load_model(tmp_path / "b")
