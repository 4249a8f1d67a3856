"""Draws follow the distribution their parameters describe, worked out plainly in numpy, whatever
the other lanes do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mor_jax.errors import UserError
from mor_jax.inference.engine.drawing import draw, gumbel, unit
from mor_jax.inference.engine.request import Drawing
from mor_jax.inference.engine.rows import (
    BIASES,
    STOPS,
    DrawConfig,
    bit_mask,
    empty_rows,
    host_row,
    put_mask,
    put_row,
    seed_words,
    waiting,
)
from mor_jax.inference.sampler import Sampling, sample

# Few candidates, so that cuts beyond them are met, too; two columns of padding, and likely ones.
V, PADDED, MANY, LANES = 16, 18, 4096, 8
CONFIG = DrawConfig(vocab_size=V, candidates=4, max_logprobs=5)
LOGITS = np.random.default_rng(0).normal(size=V).astype(np.float32) * 1.5
LOGITS[[3, 9]] = LOGITS[5]  # a tie
PROMPT, GENERATED = (1, 2, 2, 7), (4, 4, 4, 7)


def padded(logits):
    return np.concatenate(
        [logits, np.full((*logits.shape[:-1], PADDED - V), 99, np.float32)], axis=-1
    )


_draw = jax.jit(draw, static_argnums=4)
_put_row, _put_mask = jax.jit(put_row), jax.jit(put_mask)


class Letters:
    """A grammar that allows some tokens, always the same."""

    finished = False

    def __init__(self, tokens):
        self.tokens = tokens

    def allowed(self):
        return bit_mask(self.tokens, V)


def many_rows(row):
    """One lane a seed."""

    def spread(leaf, one):
        return np.broadcast_to(leaf, (MANY, *np.shape(one)))

    rows = jax.tree.map(spread, row, host_row(Drawing(), CONFIG, prompt=()))
    return rows._replace(key_Nx2=np.stack([seed_words(s) for s in range(MANY)]))


def draws(row, position):
    logits = np.broadcast_to(padded(LOGITS), (MANY, PADDED))
    at = np.full(MANY, position, np.int32)
    return np.asarray(_draw(logits, many_rows(row), at, np.ones(MANY, bool), CONFIG)[0].token_N)


def plain(logits, d, *, prompt=(), generated=(), banned=(), allowed=None):
    """Probability of each token, step by step as the documentation says, in float64."""
    x = logits.astype(np.float64)
    for token, bias in d.logit_bias:
        x[token] += bias
    for token in {*prompt, *generated}:
        x[token] = (
            x[token] / d.repetition_penalty if x[token] > 0 else x[token] * d.repetition_penalty
        )
    for token in set(generated):
        x[token] -= d.presence_penalty + d.frequency_penalty * generated.count(token)
    x[list(banned)] = -np.inf
    if allowed is not None:
        x[[t for t in range(len(x)) if t not in allowed]] = -np.inf
    if d.temperature == 0:
        return (np.arange(len(x)) == np.argmax(x)).astype(float)
    x = x / d.temperature
    if d.top_k:
        x[x < np.sort(x)[-min(d.top_k, len(x))]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if d.top_p < 1:
        best = np.sort(p)[::-1]
        last = best[np.argmax(np.cumsum(best) >= d.top_p)]
        p[p < last] = 0
    p[p < d.min_p * p.max()] = 0
    return p / p.sum()


CASES = {
    "softmax": ({}, {}),
    "greedy": ({"temperature": 0.0}, {}),
    "nearly greedy": ({"temperature": 1e-5}, {}),
    "cold": ({"temperature": 0.5}, {}),
    "hot": ({"temperature": 3.0}, {}),
    "top-k": ({"top_k": 2}, {}),
    "top-k all candidates": ({"top_k": 4}, {}),
    "top-k beyond the candidates": ({"top_k": 9}, {}),
    "top-k in a tie": ({"top_k": 6}, {}),
    "top-k of more than there is": ({"top_k": 400}, {}),
    "top-p": ({"top_p": 0.4}, {}),
    "top-p beyond the candidates": ({"top_p": 0.95}, {}),
    "top-p of nearly nothing": ({"top_p": 1e-6}, {}),
    "top-k and top-p": ({"top_k": 8, "top_p": 0.8}, {}),
    "min-p": ({"min_p": 0.2}, {}),
    "all cuts": ({"temperature": 1.5, "top_k": 10, "top_p": 0.9, "min_p": 0.1}, {}),
    "presence": ({"presence_penalty": 1.5}, {}),
    "frequency": ({"frequency_penalty": 0.7}, {}),
    "repetition": ({"repetition_penalty": 1.8}, {}),
    "negative penalties": (
        {"presence_penalty": -1.0, "frequency_penalty": -0.5, "repetition_penalty": 0.7},
        {},
    ),
    "greedy with penalties": (
        {"temperature": 0.0, "frequency_penalty": 2.0, "repetition_penalty": 3.0},
        {},
    ),
    "bias": ({"logit_bias": ((0, 3.0), (5, -100.0), (0, -1.0))}, {}),
    "stop tokens too early": ({}, {"stop_tokens": {0, 3, 12}, "min_tokens": 9}),
    "stop tokens in time": ({}, {"stop_tokens": {0, 3, 12}, "min_tokens": 4}),
    "grammar": (
        {"top_p": 0.9},
        {"grammar": Letters([2, 3, 11]), "min_tokens": 9, "stop_tokens": {3}},
    ),
    "everything": (
        {
            "temperature": 0.8,
            "top_k": 7,
            "top_p": 0.9,
            "min_p": 0.02,
            "presence_penalty": 0.3,
            "frequency_penalty": 0.2,
            "repetition_penalty": 1.2,
            "logit_bias": ((8, 2.0),),
        },
        {"stop_tokens": {5}, "min_tokens": 5, "grammar": Letters(range(1, 15))},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution(name):
    drawing, more = CASES[name]
    d = Drawing(**drawing)
    row = host_row(d, CONFIG, prompt=PROMPT, generated=GENERATED, **more)
    grammar = more.get("grammar")
    early = grammar is None and len(GENERATED) < more.get("min_tokens", 0)
    want = plain(
        LOGITS,
        d if d.temperature > 1e-4 else Drawing(**drawing | {"temperature": 0.0}),
        prompt=PROMPT,
        generated=GENERATED,
        banned=more.get("stop_tokens", ()) if early else (),
        allowed=None if grammar is None else grammar.tokens,
    )
    got = np.bincount(draws(row, len(PROMPT) + len(GENERATED)), minlength=V)
    assert got[want == 0].sum() == 0, "a token that cannot come was drawn"
    if (want > 0).sum() > 1:
        assert stats.chisquare(got[want > 0], want[want > 0] * MANY).pvalue > 1e-5


def test_no_parameter_compiles_anything():
    logits, rows = np.broadcast_to(padded(LOGITS), (LANES, PADDED)), empty_rows(LANES, CONFIG)
    at, active = np.zeros(LANES, np.int32), np.ones(LANES, bool)
    _, rows = _draw(logits, rows, at, active, CONFIG)
    before = _draw._cache_size()
    for drawing, more in CASES.values():
        rows = _put_row(rows, 3, host_row(Drawing(**drawing), CONFIG, prompt=PROMPT, **more))
        _, rows = _draw(logits, rows, at, active, CONFIG)
    assert _draw._cache_size() == before and _put_row._cache_size() == 1


def test_the_number_of_candidates_changes_nothing():
    names = [name for name in CASES if name.startswith(("top", "all"))]
    one = [host_row(Drawing(**CASES[name][0]), CONFIG, prompt=()) for name in names]
    rows = many_rows(
        jax.tree.map(lambda *leaves: np.resize(np.stack(leaves), (MANY, *leaves[0].shape)), *one)
    )
    logits, at, active = (
        np.broadcast_to(padded(LOGITS), (MANY, PADDED)),
        np.zeros(MANY, np.int32),
        np.ones(MANY, bool),
    )
    few, all_ = (
        _draw(logits, rows, at, active, CONFIG._replace(candidates=n))[0].token_N for n in (4, V)
    )
    np.testing.assert_array_equal(few, all_)


def test_draws_of_one_seed_and_of_neighbouring_seeds_are_independent():
    row = host_row(Drawing(), CONFIG, prompt=())
    now, then = draws(row, 0), draws(row, 1)
    share = plain(LOGITS, Drawing())
    pairs = np.outer(share, share)
    likely = pairs * MANY > 5
    for a, b in ((now, then), (now[:-1], now[1:]), (now[: MANY // 2], now[MANY // 2 :])):
        got = np.zeros((V, V))
        np.add.at(got, (a, b), 1)
        got = np.append(got[likely], got[~likely].sum())
        want = np.append(pairs[likely], pairs[~likely].sum()) * len(a)
        assert stats.chisquare(got, want).pvalue > 1e-5


def test_uniform_numbers_and_their_noise_are_finite_at_both_ends():
    ends = unit(jnp.array([0, 511, 2**31, 2**32 - 512, 2**32 - 1], jnp.uint32))
    assert (ends > 0).all() and (ends < 1).all() and (jnp.diff(ends) >= 0).all()
    assert jnp.isfinite(-jnp.log(-jnp.log(ends))).all()


def test_noise_is_gumbel_for_every_token_and_every_key():
    keys = np.stack([seed_words(s) for s in (0, 1, 2, 2**31, 2**63, -1)]).astype(np.uint32)
    noise = np.asarray(jax.jit(gumbel, static_argnums=1)(keys, 20_000))
    for row in noise:
        assert stats.kstest(row, "gumbel_r").pvalue > 1e-4
    together = np.corrcoef(np.concatenate([noise, np.roll(noise[:1], 1, axis=1)]))
    assert np.abs(together - np.eye(len(together))).max() < 0.04  # 5.6 standard deviations


drawings = st.builds(
    Drawing,
    temperature=st.sampled_from([0.0, 0.6, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 4, 5, 12, 16]),
    top_p=st.sampled_from([1.0, 0.99, 0.7, 0.2]),
    min_p=st.sampled_from([0.0, 0.3]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([(), ((3, 1.0), (15, -2.0))]),
    seed=st.integers(0, 2**64 - 1),
)
lanes = st.fixed_dictionaries(
    {
        "drawing": drawings,
        "prompt": st.lists(st.integers(0, V - 1), max_size=6),
        "generated": st.lists(st.integers(0, V - 1), max_size=6),
        "stop_tokens": st.sets(st.integers(0, V - 1), max_size=3),
        "min_tokens": st.integers(0, 8),
        "logprobs": st.sampled_from([None, 0, 5]),
        "grammar": st.sampled_from([None, None, Letters([0, 7]), Letters(range(8))]),
    }
)


@settings(max_examples=60)
@given(
    st.lists(lanes, min_size=LANES, max_size=LANES),
    st.integers(0, 99),
    st.integers(0, LANES - 1),
    st.data(),
)
def test_company_changes_no_bit(company, number, lane, data):
    """One lane among others that want anything at all, and the same lane alone with the others
    switched off."""
    rng = np.random.default_rng(number)
    logits = padded((rng.normal(size=(LANES, V)) * 3).round(1).astype(np.float32))  # rounded: ties
    rows = empty_rows(LANES, CONFIG)
    for i, one in enumerate(company):
        rows = _put_row(rows, i, host_row(config=CONFIG, **one))
    at = np.array([len(one["prompt"]) + len(one["generated"]) for one in company], np.int32)
    together, grown = _draw(logits, rows, at, np.ones(LANES, bool), CONFIG)
    wanted = company[lane]["logprobs"] is not None

    alone = np.arange(LANES) == lane
    others = data.draw(st.permutations(range(LANES)))
    noise = logits[others] * 7
    noise[lane] = logits[lane]
    single, kept = _draw(noise, rows, at, alone, CONFIG)
    for name, a, b in zip(together._fields, together, single, strict=True):
        if wanted or name in ("token_N", "stopped_N"):
            np.testing.assert_array_equal(np.asarray(a)[lane], np.asarray(b)[lane], err_msg=name)
    np.testing.assert_array_equal(grown.counts_NxV[lane], kept.counts_NxV[lane])
    assert (np.asarray(single.token_N)[~alone] == -1).all() and not np.asarray(single.stopped_N)[
        ~alone
    ].any()
    np.testing.assert_array_equal(
        np.asarray(kept.counts_NxV)[~alone], np.asarray(rows.counts_NxV)[~alone]
    )

    tokens, d = np.asarray(together.token_N), company[lane]["drawing"]
    assert (tokens >= 0).all() and (tokens < V).all()
    for i, one in enumerate(company):  # whatever was drawn could be drawn
        early = one["grammar"] is None and len(one["generated"]) < one["min_tokens"]
        p = plain(
            logits[i, :V],
            one["drawing"],
            prompt=one["prompt"],
            generated=one["generated"],
            banned=one["stop_tokens"] if early else (),
            allowed=None if one["grammar"] is None else one["grammar"].tokens,
        )
        assert p[tokens[i]] > 0 or near_a_cut(logits[i, :V], one, tokens[i])
        assert bool(together.stopped_N[i]) == (tokens[i] in one["stop_tokens"])
    penalised = (d.presence_penalty, d.frequency_penalty, d.repetition_penalty) != (0, 0, 1)
    np.testing.assert_array_equal(
        grown.counts_NxV[lane] - rows.counts_NxV[lane], penalised * (np.arange(V) == tokens[lane])
    )


def near_a_cut(logits, one, token):
    """Sums in float32 may put a token on the other side of top-p; tied logits no longer tie once
    rounded."""
    wider = functools.partial(
        plain,
        logits,
        prompt=one["prompt"],
        generated=one["generated"],
        allowed=None if one["grammar"] is None else one["grammar"].tokens,
    )
    d = one["drawing"]
    loose = Drawing(
        **d.__dict__ | {"top_p": min(1.0, d.top_p + 1e-5), "min_p": d.min_p * (1 - 1e-5)}
    )
    return wider(loose)[token] > 0 or (
        d.top_k and abs(np.sort(logits)[-d.top_k] - logits[token]) < 1e-5
    )


def test_greedy_equals_the_plain_sampler_and_log_probabilities_the_softmax():
    rng = np.random.default_rng(1)
    logits = padded((rng.normal(size=(LANES, V)) * 4).round(1).astype(np.float32))
    rows = empty_rows(LANES, CONFIG)
    rows = _put_row(rows, 2, host_row(Drawing(temperature=0.0), CONFIG, prompt=(), logprobs=3))
    drawn, _ = _draw(logits, rows, np.zeros(LANES, np.int32), np.ones(LANES, bool), CONFIG)
    want = sample(jnp.asarray(logits[:, :V]), None, Sampling(0.0))
    np.testing.assert_array_equal(drawn.token_N, want)
    logp = logits[:, :V] - np.log(np.exp(logits[:, :V].astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(drawn.logprob_N, logp.max(-1), atol=1e-5)
    order = np.argsort(-logp, axis=-1, kind="stable")[:, :5]
    np.testing.assert_array_equal(drawn.top_ids_NxK, order)
    np.testing.assert_allclose(
        drawn.top_logprobs_NxK, np.take_along_axis(logp, order, -1), atol=1e-5
    )


def test_a_lane_waits_for_the_mask_of_its_own_position():
    rows = _put_row(
        empty_rows(LANES, CONFIG),
        4,
        host_row(Drawing(), CONFIG, prompt=(1, 2), grammar=Letters([6])),
    )
    at = np.full(LANES, 2, np.int32)
    assert not np.asarray(waiting(rows, at)).any()
    np.testing.assert_array_equal(np.flatnonzero(waiting(rows, at + 1)), [4])
    rows = _put_mask(rows, 4, bit_mask([9], V), 3)
    assert not np.asarray(waiting(rows, at + 1)).any()
    drawn, _ = _draw(
        np.zeros((LANES, PADDED), np.float32), rows, at + 1, np.ones(LANES, bool), CONFIG
    )
    assert int(drawn.token_N[4]) == 9


def test_a_seed_is_any_integer():
    for seed in (0, 1, 2**31, 2**32 - 1):
        np.testing.assert_array_equal(
            seed_words(seed), jax.random.key_data(jax.random.key(np.uint32(seed)))
        )
    assert len({tuple(seed_words(s)) for s in (0, 2**32, 2**63, -1, 2**64 - 2)}) == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("inf")),
        ("repetition_penalty", 0.0),
        ("logit_bias", ((V, 1.0),)),
        ("logit_bias", ((1, float("nan")),)),
        ("logit_bias", tuple((1, 1.0) for _ in range(BIASES + 1))),
    ],
)
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        host_row(Drawing(**{field: value}), CONFIG, prompt=())


def test_room_for_stop_tokens_and_log_probabilities_is_limited():
    with pytest.raises(UserError, match=f"{STOPS} stop tokens"):
        host_row(Drawing(), DrawConfig(64), prompt=(), stop_tokens=range(STOPS + 1))
    with pytest.raises(UserError, match="logprobs must be from 0 to 5, got 6"):
        host_row(Drawing(), CONFIG, prompt=(), logprobs=6)


def test_no_program_sorts_the_vocabulary():
    """On a CPU a sort of 49k logits costs more than many layers; slices merged into a top-k turn it
    into one."""
    vocab, config = 2048, DrawConfig(2048)
    rows = jax.eval_shape(lambda: empty_rows(2, config))
    shapes = (
        jax.ShapeDtypeStruct((2, vocab), jnp.float32),
        rows,
        *(jax.ShapeDtypeStruct((2,), t) for t in (int, bool)),
    )
    text = jax.jit(draw, static_argnums=4).lower(*shapes, config).compile().as_text()
    assert "TopK" in text and " sort(" not in text
