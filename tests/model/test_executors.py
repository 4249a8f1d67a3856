"""The gathered executor equals the masked one: values, gradients, router losses, over random
configurations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from small import random_params

from mor_jax.config import DepthConfig, ModelConfig, depth_policies
from mor_jax.model.lm import LM
from mor_jax.train.step import gradients, loss_fn, loss_scales

ROUTED_KV = ("recursion_wise", "shared", "hybrid", "hybrid_first")
TOLERANCE = 1e-5  # float32, relative to the largest entry: sums in another order


@pytest.fixture
def optimised():
    """The tolerance is that of programs as users run them: sums that LLVM has left one number after
    the other round more (conftest.py)."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@st.composite
def configurations(draw, recursions=None, policy="expert_choice", kv=None):
    recursions = recursions or draw(st.integers(1, 4))
    kv = draw(st.sampled_from(depth_policies()[policy].kv_strategies)) if kv is None else kv
    core = draw(st.integers(1, 2)) if recursions < 3 else 1  # compiling is most of the time
    heads, kv_heads = draw(st.sampled_from([(2, 2), (4, 2), (4, 1), (6, 3)]))
    sharing = draw(st.sampled_from(["cycle", "middle_cycle"]))
    shares = draw(st.lists(st.floats(0.05, 1.0), min_size=recursions, max_size=recursions))
    model = ModelConfig(
        layers=core * recursions + (2 if sharing == "middle_cycle" else 0),
        recursions=recursions,
        sharing=sharing,
        width=24,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=4,
        mlp_width=32,
        vocab_size=40,
        init_std=0.3,
        attention=draw(st.sampled_from(["xla", "blocked"])),
        remat=draw(st.sampled_from(["none", "block"])),
        loss_chunk=draw(st.sampled_from([0, 7])),
    )
    common = dict(
        kv=kv,
        z_loss_weight=draw(st.sampled_from([0.0, 0.01])),
        router=draw(st.sampled_from(["linear", "mlp", "wide_mlp"])),
        temperature=draw(st.sampled_from([1.0, 2.0])),
    )
    if policy == "token_choice":
        score, gate = draw(
            st.sampled_from([("softmax", "exit"), ("sigmoid", "every"), ("softmax", "every")])
        )
        bias_rate = draw(st.sampled_from([0.0, 0.001]))
        # Two sizes: each is a program to compile. The extremes below have four.
        return LM(
            model,
            DepthConfig(policy, score=score, gate=gate, bias_rate=bias_rate, buckets=2, **common),
        )
    score, gate = draw(
        st.sampled_from(
            [("sigmoid", "multiplicative"), ("tanh", "additive"), ("none", "multiplicative")]
        )
    )
    capacities = tuple(sorted(shares, reverse=True))
    if kv != "recursion_wise":
        capacities = (1.0, *capacities[1:])
    return LM(
        model,
        DepthConfig(
            policy, capacities=capacities, score=score, gate=gate, aux_loss_weight=0.1, **common
        ),
    )


@st.composite
def packed_rows(draw, batch=2):
    """Rows of documents of random lengths, the last possibly padding."""
    length = draw(st.sampled_from([9, 16, 33]))
    seg = np.zeros((batch, length), np.int32)
    for row in seg:
        cuts = sorted(draw(st.lists(st.integers(1, length - 1), max_size=3)))
        for i, (a, b) in enumerate(zip([0, *cuts], [*cuts, length], strict=True)):
            row[a:b] = i + 1
        if draw(st.booleans()) and cuts:
            row[cuts[-1] :] = 0
    # Few different ids make many equal states, hence ties, which both executors must break alike.
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    tokens = rng.integers(0, draw(st.sampled_from([3, 40])), size=(batch, length))
    return {"tokens": jnp.asarray(tokens, jnp.int32), "segment_ids": jnp.asarray(seg)}


def close(a, b, what):
    scale = max(float(jnp.max(jnp.abs(a))), 1e-3)
    assert float(jnp.max(jnp.abs(a - b))) <= TOLERANCE * scale, what


@pytest.mark.parametrize("policy", ["expert_choice", "token_choice"])
@pytest.mark.parametrize(
    ("recursions", "kv"),
    [(1, "shared"), *itertools.product((2, 3), ROUTED_KV), (4, "hybrid")],
)
@pytest.mark.usefixtures("optimised")
@settings(
    max_examples=1,
    suppress_health_check=[
        *settings.default.suppress_health_check,
        HealthCheck.function_scoped_fixture,
    ],
)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_gathered_equals_masked(policy, recursions, kv, data, seed):
    # Each example is two programs to compile. The first one drawn is the simplest, alike for all of
    # these parameters; tests/model/test_policies.py has such a one of every policy and strategy.
    assume(seed > 0)
    lm, batch = data.draw(configurations(recursions, policy, kv)), data.draw(packed_rows())
    params = random_params(lm, seed)
    scales = loss_scales(lm, batch)

    def run(executor):
        this = LM(lm.model, DepthConfig(**{**lm.depth.__dict__, "executor": executor}))

        def everything(params):
            (loss, aux), grads = jax.value_and_grad(
                lambda p: loss_fn(this, p, batch, scales), has_aux=True
            )(params)
            return loss, aux, grads, this.forward(params, batch["tokens"], batch["segment_ids"])

        return jax.jit(everything)(params)

    loss_m, aux_m, grads_m, out_m = run("masked")
    loss_g, aux_g, grads_g, out_g = run("gathered")
    np.testing.assert_array_equal(out_m.depth_BxT, out_g.depth_BxT)
    close(out_m.h_BxTxD, out_g.h_BxTxD, "states")
    close(loss_m, loss_g, "loss")
    # A score beside a probe may be counted on either side of it.
    above = [aux["router"].above for aux in (aux_m, aux_g)]
    assert float(jnp.max(jnp.abs(above[0] - above[1]))) <= 2
    for name in set(aux_m["router"]._fields) - {"above"}:
        close(getattr(aux_m["router"], name), getattr(aux_g["router"], name), name)
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: close(a, b, jax.tree_util.keystr(path)), grads_m, grads_g
    )


@settings(max_examples=4)
@given(lm=configurations(), batch=packed_rows())
def test_every_step_selects_its_capacity_of_real_tokens(lm, batch):
    """Hierarchical: a step's tokens ran the step before; counts are min(k_r, real tokens); padding
    never runs."""
    out = jax.jit(lambda p: lm.forward(p, batch["tokens"], batch["segment_ids"]))(random_params(lm))
    active = np.asarray(out.active_RxBxT)
    real = np.asarray(batch["segment_ids"]) > 0
    (counts,) = lm.policy.profiles(real.shape[1])
    before = real
    for r, k in enumerate(counts):
        assert not (active[r] & ~before).any()
        np.testing.assert_array_equal(active[r].sum(-1), np.minimum(k, before.sum(-1)))
        before = active[r]
    np.testing.assert_array_equal(active.sum(0), out.depth_BxT)
    # What the losses are divided by, computed from the segment ids alone, is what there was.
    _, candidates = loss_scales(lm, batch)
    np.testing.assert_array_equal(candidates, np.maximum(out.stats.candidates, 1))


def forced(depths, kv="", model_seed=3, buckets=4):
    """A token-choice model and a batch whose tokens choose these depths: each token's embedding
    spells its depth."""
    depths = jnp.asarray(depths, jnp.int32)
    recursions = 3
    model = ModelConfig(
        layers=3,  # one block a step: compiling is most of the time
        recursions=recursions,
        sharing="cycle",
        width=24,
        heads=4,
        kv_heads=2,
        head_dim=4,
        mlp_width=32,
        vocab_size=40,
        init_std=0.3,
        loss_chunk=7,
    )
    lm = LM(model, DepthConfig("token_choice", buckets=buckets, kv=kv))
    params = random_params(lm, model_seed)
    # Token ids below R decide: id i is drawn to output i of the router.
    kernel = np.zeros((recursions, 24), np.float32)
    kernel[:, :recursions] = 50 * np.eye(recursions)
    table = np.array(params["embed"]["table"])
    table[:, :recursions] = 0
    table[:recursions, :recursions] = np.eye(recursions)
    params = params | {
        "router": {"choice": {"kernel": jnp.asarray(kernel)}},
        "embed": {"table": jnp.asarray(table)},
    }
    batch = {"tokens": jnp.maximum(depths - 1, 0), "segment_ids": (depths > 0).astype(jnp.int32)}
    return lm, params, batch


ROW = 24
EXTREMES = {
    "all shallow": [[1] * ROW, [1] * ROW],
    "all deep": [[3] * ROW, [3] * ROW],
    "one token deep": [[1] * ROW, [1] * 11 + [3] + [1] * 12],
    "one row deep, one shallow": [[3] * ROW, [1] * ROW],
    "a full row and a row of padding": [[2] * ROW, [0] * ROW],
    "shallow and deep in turn": [[1, 3] * (ROW // 2), [3, 1] * (ROW // 2)],
}


@functools.partial(jax.jit, static_argnums=0)  # one program for all routings
def in_and_outside_of_a_step(lm, params, batch):
    return gradients(lm, params, batch, 1), lm.forward(
        params, batch["tokens"], batch["segment_ids"]
    )


@pytest.mark.parametrize("kv", ROUTED_KV)
@pytest.mark.parametrize("name", EXTREMES)
def test_token_choice_at_its_extremes(name, kv):
    """Whatever the routing, no token is dropped: gathered = masked, inside a training step and
    outside of one."""
    buckets = 4 if kv == ROUTED_KV[0] else 2  # each size is a program of its own in the step
    lm, params, batch = forced(EXTREMES[name], kv, buckets=buckets)
    masked = LM(lm.model, DepthConfig("token_choice", executor="masked", kv=kv))
    (grads_g, aux_g), out_g = in_and_outside_of_a_step(lm, params, batch)
    (grads_m, aux_m), out_m = in_and_outside_of_a_step(masked, params, batch)
    np.testing.assert_array_equal(out_g.depth_BxT, EXTREMES[name])
    np.testing.assert_array_equal(out_m.depth_BxT, EXTREMES[name])
    close(out_m.h_BxTxD, out_g.h_BxTxD, "states")
    close(aux_m["loss"], aux_g["loss"], "loss")
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: close(a, b, jax.tree_util.keystr(path)), grads_m, grads_g
    )


def test_a_step_takes_the_smallest_profile_that_holds_its_tokens():
    lm, params, batch = forced(EXTREMES["all shallow"])
    profiles = lm.policy.profiles(ROW)
    assert profiles[-1] == (ROW, ROW, ROW) and profiles == tuple(sorted(profiles))
    for name, want in {
        "all shallow": 0,
        "all deep": 3,
        "one token deep": 0,
        "shallow and deep in turn": 2,
    }.items():
        _, params, batch = forced(EXTREMES[name])
        entered = jax.jit(lm.enter)(params, batch["tokens"], batch["segment_ids"])
        index, depth = jax.jit(lm.route)(params, entered, batch["tokens"], batch["segment_ids"])
        need = [(np.asarray(depth) > r).sum(-1).max() for r in range(3)]
        assert int(index) == want
        assert all(size >= n for size, n in zip(profiles[want], need, strict=True))
        assert want == 0 or any(size < n for size, n in zip(profiles[want - 1], need, strict=True))


def test_full_capacity_with_an_additive_identity_gate_is_the_recursive_transformer(monkeypatch):
    """mor spec, section 10, item 6: routing everything with the gate replaced by the identity
    changes nothing."""
    from mor_jax.model.depth.expert_choice import ExpertChoice

    shape = dict(
        layers=8,
        recursions=3,
        sharing="middle_cycle",
        width=32,
        heads=4,
        kv_heads=2,
        mlp_width=48,
        vocab_size=64,
    )
    model = ModelConfig(**shape, init_std=0.2)
    mor = LM(model, DepthConfig(policy="expert_choice", capacities=(1.0, 1.0, 1.0)))
    fixed = LM(model, DepthConfig())
    params = random_params(mor)
    monkeypatch.setattr(ExpertChoice, "combine", lambda self, step, h, y, z, tokens: y)
    tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, 64)
    want = jax.jit(fixed.apply)(params, tokens)
    for executor in ("masked", "gathered"):
        a = jax.jit(lambda p, e=executor: mor.apply(p, tokens, executor=e))(params)
        np.testing.assert_allclose(a, want, atol=1e-5)


def test_the_core_exists_once_and_runs_r_times():
    """Tying by counting: R recursions of K blocks hold K blocks of parameters, and all of them get
    gradient."""
    model = ModelConfig(
        layers=8,
        recursions=3,
        sharing="middle_cycle",
        width=32,
        heads=4,
        kv_heads=2,
        mlp_width=48,
        vocab_size=64,
    )
    lm = LM(model, DepthConfig(policy="expert_choice"))
    params = random_params(lm)
    assert len(params["core"]) == 2 and len(params["prelude"]) == len(params["coda"]) == 1
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 64)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}
    grads = jax.jit(jax.grad(lambda p: loss_fn(lm, p, batch, loss_scales(lm, batch))[0]))(params)
    grads["router"].pop("survey")  # moved by rule
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
