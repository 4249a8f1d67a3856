"""Expert-choice without the future: the auxiliary router and the calibrated thresholds, beside the
fixed threshold."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import random_params, small_lm, spread_routers

from mor_jax.analysis import accounting
from mor_jax.config import Config, OptimConfig
from mor_jax.inference.dial import calibrate
from mor_jax.model.depth import survey
from mor_jax.train.schedule import optimizer_of

T, R = 32, 3
SHAPE = {
    "layers": 3,
    "sharing": "cycle",
    "width": 16,
    "heads": 2,
    "kv_heads": 1,
    "mlp_width": 24,
    "context": T,
}


def model(inference: str, **depth):
    lm = small_lm("mor", **SHAPE)
    return dataclasses.replace(
        lm, depth=dataclasses.replace(lm.depth, inference=inference, **depth)
    )


@functools.cache
def rows(seed=0, batch=8):
    tokens = np.random.default_rng(seed).integers(0, 64, (batch, T), dtype=np.int32)
    return {"tokens": tokens, "segment_ids": np.ones_like(tokens)}


@functools.cache
def taught():
    """A few updates of the routers on fixed states: (policy, first routers, last, losses,
    overlaps)."""
    lm = model("auxiliary")
    policy, h_BxTxD = lm.policy, jax.random.normal(jax.random.key(5), (8, T, 16))
    real = jnp.ones((8, T), bool)
    tx = optimizer_of(Config(depth=lm.depth, optim=OptimConfig(peak_lr=3e-3, warmup=0.0)), 100)

    def loss(params):
        routers, stats, active = params["router"], [], real
        steps = policy.steps(routers)
        for r, k in enumerate(policy.profiles(T)[0]):
            step = jax.tree.map(lambda leaf, r=r: leaf[r], steps)
            scores, before = policy.score(step, h_BxTxD), active
            active = policy.select(step, scores, before, (), k)
            stats.append(policy.step_stats(step, scores, before, active, ()))
        stats = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)
        return policy.losses(stats, stats.candidates)["router_loss"], stats.overlap / stats.selected

    @jax.jit
    def update(params, state):
        (value, overlap), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, (value, overlap, grads)

    first = params = {"router": random_params(lm)["router"]}
    state, seen = tx.init(params), []
    for _ in range(60):
        params, state, found = update(params, state)
        seen.append(found)
    return lm, tx, first, params, seen


def test_the_auxiliary_router_learns_the_choice_of_the_other():
    *_, seen = taught()
    assert seen[-1][0] < 0.7 * seen[0][0]
    np.testing.assert_allclose(seen[0][1][0], 1)  # step 1 takes all
    assert (seen[-1][1][1:] > seen[0][1][1:] + 0.1).all() and (seen[-1][1][1:] > 0.8).all()


def test_the_auxiliary_loss_teaches_the_auxiliary_router_alone():
    """No gradient of it reaches the router that chooses; nor, the state being detached, the
    model."""
    lm, *_, seen = taught()
    grads = seen[0][2]["router"]
    assert (
        not np.any(grads["kernel"]) and np.abs(np.asarray(grads["auxiliary"]["kernel"])).max() > 0
    )
    h_BxTxD, real = jax.random.normal(jax.random.key(1), (2, 8, 16)), jnp.ones((2, 8), bool)
    step = jax.tree.map(lambda leaf: leaf[1], lm.policy.steps(random_params(lm)["router"]))

    def aux(h):
        scores = lm.policy.score(step, h)
        return lm.policy.step_stats(
            step, scores, real, lm.policy.select(step, scores, real, (), 3), ()
        ).aux

    assert not np.any(jax.grad(aux)(h_BxTxD))


def test_its_learning_rate_is_its_own():
    """Adam's first step is the learning rate, in each direction: ten times as far for the auxiliary
    router."""
    lm, tx, first, *_ = taught()
    ones = jax.tree.map(jnp.ones_like, first)
    updates, _ = jax.jit(tx.update)(ones, tx.init(first), jax.tree.map(jnp.zeros_like, first))
    factor = updates["router"]["auxiliary"]["kernel"] / updates["router"]["kernel"]
    np.testing.assert_allclose(factor, lm.depth.aux_lr, rtol=1e-3)


def test_only_the_auxiliary_router_decides_at_inference():
    lm, _, _, after, _ = taught()
    params = random_params(lm)
    run = jax.jit(
        lambda router: lm.forward(params | router, rows()["tokens"], mode="causal").depth_BxT
    )
    level = after["router"] | {"auxiliary": {"kernel": jnp.zeros_like(after["router"]["kernel"])}}
    assert (run({"router": level}) == R).all()  # sigmoid(0) reaches the threshold of 0.5
    assert (run(after) < R).any()


def test_unique_parameters_and_flops_of_a_second_router():
    lm, plain = model("auxiliary"), model("threshold")

    def count(lm):
        return accounting.parameters(lm.model, lm.depth).router

    assert count(lm) == 2 * count(plain) == 2 * R * 16
    made = jax.eval_shape(lm.init, jax.random.key(0))["router"]
    assert sum(
        x.size for name, part in made.items() if name != "survey" for x in jax.tree.leaves(part)
    ) == count(lm)

    def flops(lm):
        return accounting.true_flops_per_token(lm.model, lm.depth).router

    assert flops(lm) == 2 * flops(plain)
    assert jax.tree.structure(
        lm.logical_axes()["router"], is_leaf=lambda x: isinstance(x, tuple)
    ) == jax.tree.structure(made)


@functools.partial(jax.jit, static_argnums=0)
def depths(lm, params):
    return lm.forward(params, rows()["tokens"], mode="causal").depth_BxT


@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_calibrated_thresholds_keep_the_shares_of_training_wherever_the_scores_lie(shift):
    """A router whose scores are all on one side of the fixed threshold still keeps of each step's
    candidates what training kept."""
    lm = model("calibrated")
    params = spread_routers(random_params(lm))
    # A direction that all states share, so that every score moves by about `shift`.
    table = params["embed"]["table"].at[:, 0].set(1.0)
    kernel = params["router"]["kernel"].at[:, 0, 0].add(shift)
    params = params | {"embed": {"table": table}, "router": params["router"] | {"kernel": kernel}}
    params["router"]["survey"] = survey.empty(R)
    fixed = dataclasses.replace(lm, depth=dataclasses.replace(lm.depth, inference="threshold"))
    if shift:  # nothing surveyed yet: the fixed threshold, at which all or nearly none go on
        np.testing.assert_array_equal(depths(lm, params), depths(fixed, params))
    params = calibrate(lm, params, [rows()])
    depth = np.asarray(depths(lm, params))
    for r, share in enumerate((1, 2 / 3, 1 / 3)):
        assert (depth > r).mean() == pytest.approx(share, abs=0.03)
