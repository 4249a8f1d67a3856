"""The conformance list of the MoR spec (section 10), an entry a test, named after it.

Most entries have tests of their own at length; each says where, and holds something of its own that
is cheap.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, small_lm, spread_routers

from configs import mor, recursive, vanilla
from configs.ablations import kv, random_routing, routers, sharing
from mor_jax.analysis import accounting
from mor_jax.config import DepthConfig, ModelConfig, from_config_dict
from mor_jax.inference.decode import decode_step, prefill
from mor_jax.model.convert import convert
from mor_jax.model.depth import build_policy
from mor_jax.model.recurse import run_gathered, run_masked
from mor_jax.train.evaluate import evaluate

T = 24
SMALL = {"width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 24, "context": T, "loss_chunk": 0}


@functools.cache
def model(kind):
    lm = small_lm(kind, **SMALL, layers=3, sharing="cycle")
    return lm, spread_routers(random_params(lm))


@functools.partial(jax.jit, static_argnums=(0, 4))
def forward(lm, params, tokens, seg, mode):
    out = lm.forward(params, tokens, seg, mode=mode)
    return lm.logits(params, out.h_BxTxD), out.depth_BxT


def tokens(seed=0):
    return np.random.default_rng(seed).integers(0, 64, (2, T), dtype=np.int32)


def worst_change_of_the_past(kind, mode):
    """Largest change of logits before the middle when every token from there on is another."""
    lm, params = model(kind)
    changed = [tokens(seed) for seed in range(4)]
    for row in changed[1:]:
        row[:, : T // 2] = changed[0][:, : T // 2]
    found = [np.asarray(forward(lm, params, row, np.ones_like(row), mode)[0]) for row in changed]
    return max(np.abs(other - found[0])[:, : T // 2].max() for other in found[1:])


@pytest.mark.parametrize(("recursions", "millions"), [(2, 167.2), (3, 118.0), (4, 98.3)])
def test_1_unique_parameters_of_360m_middle_cycle(recursions, millions):
    """All sizes: tests/test_config.py. Plus a router of width D for each recursion."""
    cfg = from_config_dict(mor.get_config(f"360m,nr={recursions}"))
    count = accounting.parameters(cfg.model, cfg.depth)
    assert round((count.non_embedding - count.router) / 1e6, 1) == millions
    assert count.router == recursions * 960


def test_1_tying_survives_every_transformation():
    """Counted, and by gradient: tests/model/test_executors.py. Conversion, relaxation, placing:
    each block once."""
    source = small_lm("vanilla", **SMALL, layers=6)
    for kind, model in (("mor", {}), ("token", {}), ("mor", {"norms": "own", "lora_rank": 2})):
        lm = small_lm(kind, **SMALL, layers=6, sharing="cycle", **model)
        made = convert(random_params(source), source.model, lm.model, "average")
        whole = jax.eval_shape(lm.init, jax.random.key(0))
        for params in (made, whole):
            assert sorted(params["core"]) == ["0", "1"]
            matrices = [block["attention"]["qkv"].shape for block in params["core"].values()]
            assert matrices == [(1, 4, 8, 16)] * 2  # no axis of recursions on what is shared
        assert lm.program.unrolled_layers == 6 and len(lm.gathered_core(random_params(lm))) == 2


RELEASED = {
    "vanilla": (vanilla, "360m", 833.7, 9438),
    "recursive, 2": (recursive, "360m,nr=2", 833.7, 9438),
    "recursive, 3": (recursive, "360m,nr=3", 833.7, 9438),
    "recursive, 4": (recursive, "360m,nr=4", 885.8, 8883),
    "mor, 2": (mor, "360m,nr=2", 623.5, 12619),
    "mor, 3": (mor, "360m,nr=3", 555.7, 14161),
    "mor, 4": (mor, "360m,nr=4", 553.5, 14216),
    "mor, 3, shared": (mor, "360m,nr=3,kv=shared", 536.3, 14672),
    "mor, 3, token-choice": (mor, "360m,nr=3,policy=token", 555.7, 14161),
    "mor, 3, 135m": (mor, "135m,nr=3", None, 36326),
}


@pytest.mark.parametrize("name", RELEASED)
def test_2_flops_and_steps_of_the_released_configurations(name):
    """Spec sections 6.3 and 6.4, through our configuration files, to 0.1 %. Table 9's tokens, and a
    brute-force count of the true FLOPs: tests/analysis."""
    module, arg, mflops, steps = RELEASED[name]
    cfg = from_config_dict(module.get_config(arg))
    assert accounting.training_steps(cfg) == pytest.approx(steps, rel=1e-3)
    if mflops:
        assert accounting.paper_flops_per_token(cfg.model, cfg.depth) / 1e6 == pytest.approx(
            mflops, rel=1e-3
        )


def test_3_token_choice_is_causal_and_blind_to_padding():
    """Over all kinds, cuts and packings: tests/model/test_causality.py."""
    assert worst_change_of_the_past("token", "causal") == 0
    lm, params = model("token")
    seg = (np.arange(T) < 15).astype(np.int32) * np.ones((2, 1), np.int32)
    found = []
    for filler in (0, 7, 63):  # what lies in the padding
        row = np.where(seg > 0, tokens(), filler)
        logits, depth = forward(lm, params, row, seg, "causal")
        assert (np.asarray(depth)[:, 15:] == 0).all()
        found.append(np.asarray(logits)[:, :15])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    whole = np.asarray(forward(lm, params, tokens(), np.ones_like(seg), "causal")[0])[:, :15]
    np.testing.assert_allclose(found[0], whole, atol=1e-4)


def test_4_expert_choice_is_causal_by_threshold_and_not_by_top_k():
    assert worst_change_of_the_past("mor", "causal") == 0
    assert worst_change_of_the_past("mor", "topk") > 1e-2
    lm, params = model("mor")
    depth = {
        mode: forward(lm, params, tokens(), np.ones((2, T), np.int32), mode)[1]
        for mode in ("topk", "causal")
    }
    assert set(np.unique(depth["causal"])) == {0, 1, 2, 3}
    np.testing.assert_array_equal(np.sort(depth["topk"]), [[1] * 8 + [2] * 8 + [3] * 8] * 2)


def test_4_an_evaluation_reports_both_modes_and_how_they_differ():
    lm, params = model("mor")
    batch = {"tokens": jnp.asarray(tokens()), "segment_ids": jnp.ones((2, T), jnp.int32)}
    record = evaluate(lm, params, [batch], jnp.ones((64,)))
    logits, depth = forward(lm, params, tokens(), np.ones((2, T), np.int32), "topk")
    nll = -jnp.take_along_axis(
        jax.nn.log_softmax(logits[:, :-1]), tokens()[:, 1:, None], axis=-1
    ).mean()
    assert (
        record["topk/nll"] == pytest.approx(float(nll), rel=1e-4)
        and record["causal/nll"] != record["topk/nll"]
    )
    assert record["topk/mean_depth"] == pytest.approx(2) != record["causal/mean_depth"]
    assert record["dead_token_ratio"] == pytest.approx((np.asarray(depth).max(0) < 3).mean())
    by_router = [record[f"router/{r}/sampling_accuracy"] for r in (1, 2, 3)]
    assert record["sampling_accuracy"] == pytest.approx(np.mean(by_router)) and all(
        0 < a < 1 for a in by_router
    )


@pytest.mark.parametrize("kind", ["mor", "mor_shared"])
def test_5_incremental_decoding_is_the_full_threshold_forward(kind):
    """210 tokens of ragged batches, every policy and strategy: tests/inference/test_decode.py."""
    lm, params = model(kind)
    row = tokens(3)
    want, depth = forward(lm, params, row, np.ones_like(row), "causal")
    assert len(np.unique(depth)) > 2
    lengths = jnp.asarray([6, 11])
    logits, cache, _ = jax.jit(prefill, static_argnums=(0, 4))(lm, params, row[:, :11], lengths, T)
    step = jax.jit(functools.partial(decode_step, lm))
    for i in range(T - 11):
        np.testing.assert_allclose(
            logits, np.asarray(want)[np.arange(2), lengths - 1 + i], atol=1e-4
        )
        logits, cache, deep = step(params, cache, row[np.arange(2), lengths + i])
        np.testing.assert_array_equal(deep, np.asarray(depth)[np.arange(2), lengths + i])
    if kind == "mor":  # 7. a depth's entries are the tokens that ran it
        seen = np.arange(T) < (np.asarray(lengths) + T - 11)[:, None]
        ran = [((np.asarray(depth) > r) & seen).sum(-1) for r in range(3)]
        np.testing.assert_array_equal(cache.entries_RxB(), ran)


def test_6_full_capacity_and_an_identity_gate_is_the_recursive_transformer():
    """With the whole network: tests/model/test_executors.py. Here over a core whose own residual
    the additive gate brings back: H + (f(H) - H) = f(H)."""
    shape = ModelConfig(
        layers=3, recursions=3, sharing="cycle", width=8, heads=2, kv_heads=1, vocab_size=8
    )
    full = DepthConfig("expert_choice", capacities=(1.0, 1.0, 1.0), gate="additive")
    w = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)

    def f(h):
        return jnp.tanh(h @ w)

    h = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, 8)), jnp.float32)
    pos, seg = jnp.broadcast_to(jnp.arange(9), (2, 9)), jnp.ones((2, 9), jnp.int32)
    routed, fixed = build_policy(shape, full), build_policy(shape, DepthConfig())
    routers = routed.init(jax.random.key(0))
    plain = run_masked(fixed, {}, lambda h, *_: (f(h), None), h, pos, seg, causal=True)
    for run in (run_gathered, functools.partial(run_masked, causal=False)):
        got = run(routed, routers, lambda h, *_: (f(h) - h, None), h, pos, seg)
        np.testing.assert_allclose(got.h_BxTxD, plain.h_BxTxD, atol=1e-6)
        assert (got.depth_BxT == 3).all()


@pytest.mark.parametrize("recursions", [2, 3, 4])
def test_7_cache_ratios(recursions):
    """Memory (R + 1) / 2R and 1 / R of the recursion blocks. Entries against selected counts: entry
    5 above and tests/inference/test_decode.py; what is read:
    tests/analysis/test_analysis_accounting.py."""
    model = ModelConfig(layers=12, recursions=recursions, sharing="cycle", vocab_size=64)

    def size(**depth):
        return accounting.kv_bytes_per_token(model, DepthConfig(**depth))

    assert size(policy="expert_choice") / size() == pytest.approx(
        (recursions + 1) / (2 * recursions)
    )
    assert size(policy="expert_choice", kv="shared") / size() == pytest.approx(1 / recursions)


def test_8_orderings_of_the_paper_stand_in_the_ablations():
    """The tables our sweeps print beside their own results; `benchmarks/quality.py` says which of
    them ours bear out."""
    full, _, schemes = sharing.PAPER["360m"]
    by_scheme = {scheme: nll[1] for scheme, nll in schemes.items()}  # N_r = 3
    assert sorted(by_scheme, key=by_scheme.get) == [
        "middle_cycle",
        "cycle",
        "middle_sequence",
        "sequence",
    ]
    assert full < by_scheme["middle_cycle"]
    linear, tanh = (
        routers.PAPER[(0.001, score, 0.1, kind, False)]
        for score, kind in (("sigmoid", "linear"), ("tanh", "mlp"))
    )
    drawn = random_routing.PAPER[("random", "constant")]
    assert linear == random_routing.PAPER[("expert_choice", "multiplicative")] < drawn < tanh
    at = kv.PAPER
    assert at["expert_choice", "recursion_wise"] < at["token_choice", "recursion_wise"]
    assert at["expert_choice", "shared"] - at["expert_choice", "recursion_wise"] == pytest.approx(
        0.02, abs=0.005
    )
    assert at["token_choice", "recursion_wise"] - at["token_choice", "shared"] == pytest.approx(
        0.02, abs=0.005
    )
