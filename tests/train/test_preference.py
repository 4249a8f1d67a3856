"""Direct preference optimisation: equation 7 exactly, from a file of pairs to a model that prefers
one of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, small_lm

from configs import dpo
from mor_jax.config import DataConfig, check, from_config_dict, from_dict
from mor_jax.data.prepare import prepare
from mor_jax.errors import ConfigError, DataError
from mor_jax.model.loss import next_token_targets
from mor_jax.train.loop import train
from mor_jax.train.preference import Reference
from mor_jax.train.step import gradients

BETA, LENGTH = 0.3, 24
TINY = {"width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 24, "context": 32}
# Pairs of rows: (tokens of each side, those of them at the start that have no loss).
PAIRS = {0: [(6, 2, 5, 2), (4, 1, 6, 1)], 1: [(7, 3, 9, 3)]}


def rows() -> dict[str, jax.Array]:
    """Two rows, of two pairs and of one, with padding behind them."""
    tokens = np.random.default_rng(0).integers(0, 64, (2, LENGTH)).astype(np.int32)
    seg, weights = np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH), np.float32)
    for b, pairs in PAIRS.items():
        at = segment = 0
        for long, same, other, same_too in pairs:
            for size, skip, sign in ((long, same, 1.0), (other, same_too, -1.0)):
                segment += 1
                seg[b, at : at + size] = segment
                weights[b, at + skip : at + size] = sign
                at += size
    made = {"tokens": tokens, "segment_ids": seg, "weights": weights}
    return {name: jnp.asarray(x) for name, x in made.items()}


@pytest.fixture(scope="module", params=["vanilla", "token"])
def model(request):
    shape = {"layers": 1} if request.param == "vanilla" else {"layers": 3, "sharing": "cycle"}
    lm = small_lm(request.param, **TINY, **shape)
    if lm.depth.routed:  # a loss of the micro-batch as a whole, not a sum over pairs
        lm = dataclasses.replace(
            lm, depth=dataclasses.replace(lm.depth, balance_loss_weight=0.0, executor="masked")
        )
    return lm, random_params(lm), random_params(lm, seed=1)


def plain_loss(lm, params, held, batch):
    """Equation 7 by its letter, every logit at once, each pair by name."""

    def log_likelihood(params):
        logits = lm.apply(params, batch["tokens"], batch["segment_ids"], mode="topk")
        targets, _ = next_token_targets(batch["tokens"], batch["segment_ids"])
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return found

    seg, weighted = np.asarray(batch["segment_ids"]), np.asarray(batch["weights"]) != 0
    ours, theirs = log_likelihood(params), log_likelihood(held)

    def reply(b, segment):
        """Log-ratio of the weighted tokens of one conversation; position t predicts t + 1."""
        mine = np.zeros(seg.shape, np.float32)
        mine[b, :-1] = (seg[b, 1:] == segment) & (seg[b, :-1] == segment) & weighted[b, 1:]
        return jnp.sum(mine * (ours - theirs))

    losses = [
        -jax.nn.log_sigmoid(BETA * (reply(b, 2 * p + 1) - reply(b, 2 * p + 2)))
        for b, pairs in PAIRS.items()
        for p in range(len(pairs))
    ]
    return sum(losses) / len(losses)


def test_loss_and_gradient_are_equation_7(model):
    lm, params, held = model
    batch, reference = rows(), Reference(lm, held, BETA)

    # whole, and in two micro-batches of unequal numbers of pairs
    accumulations = (1,) if lm.depth.routed else (1, 2)

    @jax.jit
    def both(params, held):
        of = reference._replace(params=held)
        return (
            jax.value_and_grad(lambda p: plain_loss(lm, p, held, batch))(params),
            *(gradients(lm, params, batch, n, None, of) for n in accumulations),
        )

    (loss, grads), *ours = both(params, held)
    for found, aux in ours:
        np.testing.assert_allclose(aux["preference/loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(aux["loss"], loss, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
    _, (_, aux), *_ = both(params, params)  # nothing has moved yet, up to rounding
    np.testing.assert_allclose(aux["preference/margin"], 0.0, atol=1e-6)
    np.testing.assert_allclose(aux["preference/loss"], np.log(2), rtol=1e-6)


def test_what_has_no_weight_has_no_part(model):
    """Padding, and tokens after the last weighted one of a reply, may be anything."""
    lm, params, held = model
    batch, reference = rows(), Reference(lm, held, BETA)
    last = batch["weights"].at[0, 5].set(0.0)  # of the first chosen reply
    batch = batch | {"weights": last}
    free = (batch["segment_ids"] == 0).at[0, 5].set(True)
    others = jnp.where(free, (batch["tokens"] + 7) % 64, batch["tokens"])
    run = jax.jit(lambda p, b: gradients(lm, p, b, 1, None, reference)[0])
    one, two = run(params, batch), run(params, batch | {"tokens": others})
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)  # sums in the same order but for zeros


# ---------------------------------------------------------------- from a file


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def records():
    """Replies in capitals are better than in small letters."""
    rng = np.random.default_rng(3)
    for i in range(48):
        word = "".join(rng.choice(list("abcdef"), 3))
        if i % 2:
            yield {"prompt": word, "chosen": word.upper(), "rejected": word}
        else:
            yield {"chosen": talk(word, word.upper()), "rejected": talk(word, word)}


def data(path, tmp_path, **more):
    fields = {"source": "files", "format": "preference", "paths": (str(path),)}
    return DataConfig(**fields, cache_dir=str(tmp_path / "cache"), holdout=0.2, **more)


def test_pairs_lie_side_by_side_with_the_loss_on_what_differs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    long = {"prompt": "w" * 40, "chosen": "W" * 40, "rejected": "w" * 40}  # each alone would fit
    path.write_text("\n".join(map(json.dumps, [*records(), long])))
    rows = prepare(data(path, tmp_path), 128, progress=False)
    assert rows.stats["train"]["skipped"] + rows.stats["validation"]["skipped"] == 1
    decode, seen = rows.tokenizer.decode, 0
    for i in range(len(rows.train)):
        row = rows.train[i]
        seg, last = row["segment_ids"], row["segment_ids"].max()
        assert last % 2 == 0
        for s in range(1, last + 1, 2):
            one, other = (row["tokens"][seg == k] for k in (s, s + 1))
            w, v = (row["weights"][seg == k] for k in (s, s + 1))
            assert w.min() >= 0 and v.max() <= 0
            better, worse = decode(one[w > 0]).strip(), decode(other[v < 0]).strip()
            assert better == worse.upper() and decode(one[w == 0]) == decode(other[v == 0])
            assert f"user: {worse}" in decode(one)
            seen += 1
    assert seen == rows.stats["train"]["documents"] - rows.stats["train"]["skipped"]


@pytest.mark.parametrize(
    "record, said",
    [
        ({"chosen": "a"}, "'rejected'"),
        ({"chosen": 1, "rejected": "b"}, "chosen: expected a text or messages"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt must be"),
        ({"chosen": [{"role": "user"}], "rejected": "b"}, "content"),
        (
            {"chosen": [{"role": "assistant", "content": "a", "weight": -1}], "rejected": "b"},
            "below 0",
        ),
    ],
)
def test_a_bad_record_is_named(record, said, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [*records(), record])))
    with pytest.raises(DataError, match=said) as e:
        prepare(data(path, tmp_path), 96, progress=False)
    assert "line 49" in str(e.value)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run to start from, and the configuration of one that prefers."""
    root = tmp_path_factory.mktemp("dpo")
    path = root / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records())))
    made = dpo.get_config("vanilla")
    made.model.update(TINY | {"layers": 1, "context": 64})
    made.data.update(
        paths=(str(path),), tokenizer="bytes", cache_dir=str(root / "cache"), holdout=0.2
    )
    # constant: the same rates however many steps are still to come
    made.optim.update(peak_lr=1e-2, warmup=0.0, schedule="constant")
    made.train.update(
        steps=16, batch_size=8, log_every=1, eval_every=0, eval_rows=0, checkpoint_every=8
    )
    cfg = from_config_dict(made)
    text = root / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": "ab " * 9}) for _ in range(20)))
    plain = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, format="text", paths=(str(text),), dedup="none"),
        train=dataclasses.replace(cfg.train, steps=1),
    )
    train(plain, root / "start", progress=False)
    return cfg, root / "start"


def test_a_run_comes_to_prefer_what_was_chosen(started, tmp_path):
    cfg, start = started
    summary = train(cfg, tmp_path / "run", progress=False, init_from=start)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = [r for r in map(json.loads, lines) if r["kind"] == "train"]
    assert steps[0]["preference/margin"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["preference/loss"] < 0.5 * steps[0]["preference/loss"]
    assert summary["eval"]["preference/accuracy"] == 1.0
    assert summary["eval"]["preference/margin"] > 1
    assert summary["eval"]["preference/chosen"] > summary["eval"]["preference/rejected"]
    # A run that went on is held to the same weights, not to those it went on from.
    half = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=8))
    train(half, tmp_path / "half", progress=False, init_from=start)
    again = train(cfg, tmp_path / "half", progress=False, allow=("train.steps",))
    for name in ("loss", "margin", "chosen"):
        key = f"preference/{name}"
        assert again["eval"][key] == pytest.approx(summary["eval"][key], rel=1e-4)


def test_adapters_are_held_to_their_base(started, tmp_path):
    cfg, start = started
    lora = from_dict(cfg.to_dict() | {"adapter": {"rank": 2, "alpha": 16.0}})
    summary = train(lora, tmp_path / "run", progress=False, init_from=start)
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert first["preference/margin"] == pytest.approx(0, abs=1e-6)
    assert summary["eval"]["preference/margin"] > 0.02


def test_what_cannot_be_compared_is_refused(started, tmp_path):
    cfg, _ = started
    with pytest.raises(ConfigError, match="--init_from"):
        train(cfg, tmp_path / "run", progress=False)
    for group, fields, said in [
        ("preference", {"beta": 0.0}, "beta must be positive"),
        ("distill", {"weight": 0.5, "teacher": "x"}, r"distill\.weight"),
        ("mesh", {"sequence": 2}, r"mesh\.sequence"),
        ("data", {"text_key": "x"}, "chosen and rejected"),
    ]:
        raw = cfg.to_dict()
        with pytest.raises(ConfigError, match=said):
            check(from_dict(raw | {group: raw[group] | fields}), devices=2)
