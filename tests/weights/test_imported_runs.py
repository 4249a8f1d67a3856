"""An imported checkpoint through the commands and the runtime: template, ends and the rule of BOS
are honoured."""

import asyncio
import json

import numpy as np
import pytest
from train.tiny_run import run, write_corpus
from weights.foreign import CHATML, config_for, tensors_for, write_hf

from mor_jax.data.packing import pack
from mor_jax.data.tokenizer import load_tokenizer
from mor_jax.inference.generate import Generation
from mor_jax.inference.sampler import Sampling
from mor_jax.inference.text import complete, stream_text
from mor_jax.train.checkpoint import load_meta
from mor_jax.train.load import load_model
from mor_jax.weights.importing import import_weights
from rlm_runtime.lms.base import Message
from rlm_runtime.lms.base import Sampling as Wanted
from rlm_runtime.lms.checkpoint import CheckpointLM, chat_text


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    d = tmp_path_factory.mktemp("imported")
    config = config_for("smollm2", num_hidden_layers=4)
    tensors = tensors_for(config)
    write_hf(d / "hf", config, tensors)
    import_weights(f"hf:{d / 'hf'}", d / "run", context=48)
    return d / "run"


def test_the_runtime_asks_as_the_checkpoints_template_says(imported):
    loaded = load_model(imported)
    lm = CheckpointLM(str(imported), model=loaded)
    messages = [Message(role="user", content="the cat")]
    expected = loaded.template.ids(loaded.tokenizer, [{"role": "user", "content": "the cat"}])
    assert (
        lm._ids(messages) == expected
        and expected[0] == 1
        and lm.count_tokens(messages) == len(expected)
    )
    request = lm._request(expected, 4, Wanted(), None)
    assert request.stop_tokens == {0, 2} and lm._stop == ()
    own = CheckpointLM(str(imported), model=loaded, template=chat_text, stop=["x"])
    assert own._ids(messages) == loaded.tokenizer.encode(chat_text(messages)) and own._stop == (
        "x",
    )
    reply = asyncio.run(lm.complete(messages, sampling=Wanted(max_tokens=3)))
    assert reply.usage.input_tokens == len(expected)
    asyncio.run(lm.aclose())


def test_text_ends_at_every_stored_end(imported, tmp_path):
    """The third greedy token, stored as an end beside the others, ends the text before it."""
    loaded = load_model(imported)
    prompt = loaded.tokenizer.prompt("the cat")
    vocab = loaded.tokenizer.vocab_size
    drawn = [
        int(x.token_B[0])
        for x in Generation(loaded.lm, loaded.params, [prompt], max_tokens=3, vocab_size=vocab)
    ]
    # else this tests nothing
    assert drawn[2] not in drawn[:2] and not set(drawn) & loaded.tokenizer.ends
    stored = json.loads(loaded.tokenizer.to_json())
    stored["framing"]["ends"] = [2, drawn[2]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    other = loaded._replace(tokenizer=load_tokenizer(tmp_path))
    [before] = complete(loaded, ["the cat"], max_tokens=3, sampling=Sampling(0.0))
    [after] = complete(other, ["the cat"], max_tokens=3, sampling=Sampling(0.0))
    assert before.finish == "length" and after.finish == "stop"
    assert after.text == loaded.tokenizer.decode(drawn[:2])
    streamed = "".join(
        p.text for p in stream_text(other, "the cat", max_tokens=3, sampling=Sampling(0.0))
    )
    assert streamed == "the cat" + after.text


def test_documents_are_packed_without_bos():
    rows = list(pack([np.array([5, 6]), np.array([7])], 6, bos=None, eos=2))
    np.testing.assert_array_equal(rows[0]["tokens"], [5, 6, 2, 7, 2, 2])
    np.testing.assert_array_equal(rows[0]["segment_ids"], [1, 1, 1, 2, 2, 0])


def test_an_imported_model_becomes_recursive_and_trains(imported, tmp_path):
    """The whole way by commands: import, convert, train; template and tokens travel along."""
    write_corpus(tmp_path)
    (tmp_path / "config.py").write_text(
        "import ml_collections\n"
        "def get_config(arg=''):\n"
        "    c = ml_collections.ConfigDict(dict(\n"
        "        model=dict(layers=4, recursions=2, sharing='cycle', width=32, heads=4, kv_heads=2, mlp_width=48,\n"
        "                   context=32, rope_theta=5000.0, norm_eps=1.00000001e-5, tied=True),\n"
        "        depth=dict(policy='expert_choice' if arg == 'mor' else 'fixed'),\n"
        f"        data=dict(source='files', paths=('{tmp_path}/*.jsonl',), tokenizer='{imported}/tokenizer.json'),\n"
        "        train=dict(steps=2, batch_size=2, eval_every=0, eval_rows=2)))\n"
        "    return c\n"
    )
    for kind in ("", ":mor"):
        target = tmp_path / f"up{kind.removeprefix(':')}"
        args = ("--config", f"{tmp_path / 'config.py'}{kind}", "--workdir", target)
        done = run("convert", "--checkpoint", imported, *args)
        assert done.returncode == 0, done.stderr
        meta = load_meta(target / "checkpoints")[1]
        assert meta["chat_template"] == CHATML and json.loads(meta["tokenizer"])["framing"][
            "ends"
        ] == [2, 0]
    done = run("train", *args)
    assert done.returncode == 0, done.stderr
    assert load_meta(target / "checkpoints")[1]["chat_template"] == CHATML
    assert load_model(target).tokenizer.ends == {0, 2}


def test_the_command_imports_and_exports(imported, tmp_path):
    done = run("convert", "--checkpoint", imported, "--to", f"hf:{tmp_path / 'hf'}")
    assert done.returncode == 0 and "4 layers" in done.stdout, done.stderr + done.stdout
    done = run("convert", "--from", f"hf:{tmp_path / 'hf'}", "--workdir", tmp_path / "run")
    assert done.returncode == 0 and "do not begin with <|im_start|>" in done.stdout, (
        done.stderr + done.stdout
    )
    for wrong, said in [
        (("--from", "hf:x", "--checkpoint", "y"), "--from"),
        (("--from", f"hf:{tmp_path / 'hf'}"), "--workdir is missing"),
        (("--from", "model.bin", "--workdir", tmp_path / "w"), "FILE.gguf"),
        (("--checkpoint", imported, "--to", tmp_path / "x"), "hf:DIRECTORY"),
    ]:
        done = run("convert", *wrong)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
