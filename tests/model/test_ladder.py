"""The identity ladder of the recursion family: settings that must be one another, and solvers that
must agree. (Others stand in test_recursion.py, test_relaxation.py and test_conformance.py.)"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params
from test_recursion import TOLERANCE, T, assert_equal, batch, found, small, states

from mor_jax.config import RecursionConfig
from mor_jax.model.recursion import adjoint, solver
from mor_jax.model.recursion.exit import hashed

IDS = batch()["tokens"]
NESTED = {"injection": "add", "state": "drawn", "inner": 2}


def assert_same(lm, params, other, others) -> None:
    """The same states of whole rows."""
    got, want = states(lm, params, IDS), states(other, others, IDS)
    np.testing.assert_allclose(got.h_BxTxD, want.h_BxTxD, atol=TOLERANCE)


def test_one_recursion_is_the_plain_transformer():
    lm = small(recursions=1, layers=4, prelude=1, coda=1)
    plain = small(sharing="none", recursions=1, layers=4, prelude=-1, coda=-1)
    params = random_params(lm)
    stack = [*params["prelude"].values(), *params["core"].values(), *params["coda"].values()]
    others = params | {"prelude": {}, "core": dict(zip("0123", stack, strict=True)), "coda": {}}
    assert_same(lm, params, plain, others)


def test_as_many_networks_as_recursions_is_the_plain_transformer():
    """In the full pass, where the number of the step is traced. Fewer take turns."""
    lm = small(networks=3)
    plain = small(sharing="none", recursions=1, layers=4, prelude=-1, coda=-1)
    params = random_params(lm)
    stack = [*params["prelude"].values(), *params["core"].values()]
    others = params | {"prelude": {}, "core": dict(zip("0123", stack, strict=True))}
    assert_same(lm, params, plain, others)
    two = params | {"core": {n: params["core"][n] for n in "01"}}
    again = params | {"core": params["core"] | {"2": params["core"]["0"]}}
    assert_same(small(networks=2), two, lm, again)


def test_act_at_its_extremes_and_in_between():
    """A gate that never halts is the fixed depth, one that always does is one step. The weights of
    a token's states sum to 1, over as many as it ran."""
    fixed, act = small(), small({}, {"policy": "act", "kv": "recursion_wise"})
    params = random_params(fixed)
    gate = {"kernel": jnp.zeros((1, 16)), "bias": jnp.full((1,), -60.0)}
    assert_same(act, params | {"router": gate}, fixed, params)
    always = {"router": gate | {"bias": jnp.full((1,), 60.0)}}
    assert_same(act, params | always, fixed.at_depth(1), params)

    policy, key = act.policy, jax.random.key(0)
    router = {"kernel": jax.random.normal(key, (1, 16)), "bias": jnp.zeros((1,))}
    one = jnp.ones((2, T, 16))  # a state of ones: the mean is the sum of the weights
    steps = policy.steps(router)
    memory, going, ran = policy.remember(one), np.ones((2, T), bool), np.zeros((2, T), int)
    for r in range(3):
        h = jax.random.normal(jax.random.fold_in(key, r), (2, T, 16)).at[..., 0].set(1.0)
        ran += going
        step = jax.tree.map(lambda leaf, r=r: leaf[r], steps)
        on, memory = policy.judge(step, memory, h, h)
        going &= np.asarray(on)
    out = policy.finish(memory, one)
    np.testing.assert_allclose(out[..., 0], 1, rtol=1e-5)
    assert ran.min() == 1 and 1 < ran.mean() < 3


def test_only_the_remainder_of_act_has_a_gradient():
    """The ponder cost of tokens that stop at step 2 is 2 + (1 - p_1)."""
    lm = small({}, {"policy": "act", "ponder_weight": 1.0})
    params = random_params(lm)
    params |= {"router": {"kernel": jnp.zeros((1, 16)), "bias": jnp.full((1,), 0.2)}}
    rows = batch()

    def ponder(bias):
        p = params | {"router": params["router"] | {"bias": jnp.full((1,), bias)}}
        out = lm.forward(p, rows["tokens"], rows["segment_ids"])
        real_B = jnp.sum(rows["segment_ids"] > 0, axis=-1)
        return lm.policy.losses(out.stats, lm.policy.candidate_counts(real_B, T))["ponder_loss"]

    cost, slope = jax.jit(jax.value_and_grad(ponder))(0.2)
    p = 1 / (1 + np.exp(-0.2))
    np.testing.assert_allclose(cost, 2 + 1 - p, rtol=1e-5)
    np.testing.assert_allclose(slope, -p * (1 - p), rtol=1e-4)


def test_mixture_of_depths_that_leaves_nobody_out_is_the_fixed_depth():
    mod, fixed = small({}, {"policy": "mod", "capacities": (1.0,) * 3}), small()
    params = random_params(mod)
    assert_same(mod, params, fixed, params)


def _map(rho: float) -> tuple:
    """A causal map of states with a derivative of size `rho` at most, and its parameters."""
    w = jax.random.normal(jax.random.key(0), (8, 8))
    w = rho * w / jnp.linalg.norm(w, 2)
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))

    def f(learned, rest, z):
        mean = jnp.cumsum(z, axis=1) / jnp.arange(1, 6)[:, None]
        return jnp.tanh(mean @ learned[0].T + learned[1])

    return f, (w, x)


def test_solvers_find_one_fixed_point_and_its_gradient():
    """Picard, Anderson and a long unrolling; the implicit gradient is the unrolled one, and the
    Neumann series comes to it from the one-step gradient."""
    f, learned = _map(0.8)
    zero = jnp.zeros((2, 5, 8))

    def unrolled(learned, steps, free=0):
        z = zero
        for i in range(steps):
            z = f(learned, (), z if i >= free else jax.lax.stop_gradient(z))
        return z

    @jax.jit
    def solved():
        g = functools.partial(f, learned, ())
        return [solver.CHOICES[n](g, zero, 100, 1e-6) for n in ("picard", "anderson")]

    by_picard, by_anderson = solved()
    want = unrolled(learned, 60)
    for one in (by_picard, by_anderson):
        np.testing.assert_allclose(one.z, want, atol=1e-5)
        assert one.residual <= 1e-6
    assert by_anderson.steps < by_picard.steps
    # fewer steps than are needed: as many as may be, and the residual says so
    assert solver.picard(functools.partial(f, learned, ()), zero, 2, 1e-6).residual > 1e-3

    def gradient(of):
        return jax.grad(lambda learned: jnp.sum(jnp.sin(of(learned))))(learned)

    def at_rest(kind, steps):
        c = RecursionConfig(adjoint=kind, adjoint_steps=steps, tolerance=1e-7)
        return gradient(lambda learned: adjoint.attached(f, c, learned, (jnp.arange(2),), want))

    whole = gradient(lambda learned: unrolled(learned, 60))

    def away(got):
        return max(float(jnp.abs(a - b).max()) for a, b in zip(got, whole, strict=True))

    assert away(at_rest("anderson", 50)) < 1e-4
    errors = [away(at_rest("neumann", k)) for k in (0, 2, 8, 40)]
    assert errors[-1] < 1e-4 and all(a > b for a, b in itertools.pairwise(errors))
    last = gradient(lambda learned: unrolled(learned, 61, free=61))
    for a, b in zip(last, at_rest("neumann", 0), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_one_step_gradient_of_a_model_is_that_of_its_last_step():
    """At R steps and one more, with a tolerance that nothing meets."""
    shape = {"norm_placement": "post", "recursions": 3, "layers": 4}
    knobs = {"injection": "add", "solver": "picard", "tolerance": 1e-30}
    lm = small(knobs, **shape)
    params = random_params(lm)
    last = small({"injection": "add", "gradient_steps": 1}, norm_placement="post").at_depth(4)
    assert_equal(found(lm, params), found(last, params))


def test_a_longer_row_leaves_the_fixed_point_of_its_start():
    """Weights of each token alone: what comes later does not move what came before."""
    f, learned = _map(0.5)

    def start(x):
        return solver.anderson(functools.partial(f, (learned[0], x), ()), 0 * x, 50, 1e-6).z

    changed = learned[1].at[:, 3:].add(1.0)
    np.testing.assert_allclose(start(changed)[:, :3], start(learned[1])[:, :3], atol=1e-5)


@pytest.mark.parametrize("networks", [1, 2])
def test_two_states_are_the_nested_loop_written_down(networks):
    """z <- F(z + y + e) twice, y <- G(y + z), and again; the gradient through the last round alone
    is that of a state that is held fixed before it."""
    lm = small(NESTED | {"gradient_steps": 3}, recursions=6, layers=7, networks=networks)
    params, rows = random_params(lm), batch()
    seg = rows["segment_ids"]

    def by_hand(params, free):
        e = lm.enter(params, rows["tokens"], seg)
        pos = jnp.where(seg == 2, jnp.arange(T) - 7, jnp.arange(T)) * (seg > 0)
        pos = jnp.where(seg > 0, pos, jnp.arange(T) - (T - 2))
        rope, attend = lm.rope(pos), lm.attend_row(pos, seg, seg)
        y, z = jnp.split(lm.loop.begin({}, e, pos), 2, axis=-1)

        def apply(n, u, old):
            return jnp.where((seg > 0)[..., None], lm.block(n, u, rope, attend)[0], old)

        of_z, of_y = params["core"]["0"], params["core"][str(networks - 1)]
        for i in range(2):
            if i == free:
                y, z = jax.lax.stop_gradient((y, z))
            for _ in range(2):
                z = apply(of_z, z + y + e, z)
            y = apply(of_y, y + z, y)
        weights = ((seg[:, 1:] == seg[:, :-1]) & (seg[:, 1:] > 0)).astype(jnp.float32)
        weights = jnp.pad(weights, ((0, 0), (0, 1)))
        targets = jnp.pad(rows["tokens"][:, 1:], ((0, 0), (0, 1)))
        return lm.cross_entropy(params, lm.final_norm(params, y), targets, weights) / weights.sum()

    grads, sums = found(lm, params)
    loss, want = jax.jit(jax.value_and_grad(functools.partial(by_hand, free=1)))(params)
    assert_equal((want, {"loss": loss}), (grads, sums))
    # all updates: the whole gradient
    all_of_it = dataclasses.replace(lm, recursion=RecursionConfig(**NESTED))
    loss, want = jax.jit(jax.value_and_grad(functools.partial(by_hand, free=-1)))(params)
    assert_equal((want, {"loss": loss}), found(all_of_it, params))


def test_segments_are_runs_from_where_the_last_one_stopped():
    """Each with a loss at its end, and no gradient into the one before."""
    one = small({"injection": "add"}, recursions=2, layers=3)
    both = small(
        {"injection": "add", "segments": 2, "loss": "decay", "loss_decay": 0.5},
        recursions=4,
        layers=5,
    )
    params, rows = random_params(one), batch()
    seg = rows["segment_ids"]

    def by_hand(params):
        e = one.enter(params, rows["tokens"], seg)
        s, loss = e, 0.0
        weights = ((seg[:, 1:] == seg[:, :-1]) & (seg[:, 1:] > 0)).astype(jnp.float32)
        weights = jnp.pad(weights, ((0, 0), (0, 1)))
        targets = jnp.pad(rows["tokens"][:, 1:], ((0, 0), (0, 1)))
        for weight in (2 / 3, 1 / 3):
            s = one.run_steps(params, jax.lax.stop_gradient(s), e, seg).h_BxTxD
            h = one.leave(params, s, seg)
            loss += weight * one.cross_entropy(params, h, targets, weights) / weights.sum()
        return loss

    loss, want = jax.jit(jax.value_and_grad(by_hand))(params)
    assert_equal((want, {"loss": loss}), found(both, params))


def test_halting_is_drawn_by_the_document_so_far():
    """Rows draw on their own, packed documents as if alone, and a hash that goes on from a cache is
    the one of the whole row."""
    ids = jax.random.randint(jax.random.key(0), (2, 9), 0, 32)
    pos = jnp.broadcast_to(jnp.arange(9), (2, 9))
    whole = hashed(ids, pos)
    np.testing.assert_array_equal(hashed(ids[:, :5], pos[:, :5]), whole[:, :5])
    at, seen = 5, whole[:, 4]
    while at < 9:
        seen = hashed(ids[:, at : at + 1], pos[:, at : at + 1], seen)[:, 0]
        np.testing.assert_array_equal(seen, whole[:, at])
        at += 1
    packed = hashed(jnp.concatenate([ids[1:], ids[:1]], 1), jnp.concatenate([pos[1:], pos[:1]], 1))
    np.testing.assert_array_equal(packed[0, 9:], whole[0])
    same = ids.at[1].set(ids[0]).at[1, 3].add(1)
    a, b = hashed(same, pos)
    np.testing.assert_array_equal(a == b, jnp.arange(9) < 3)


def test_a_bidirectional_model_sees_all_of_its_document_and_no_other():
    lm = small({"injection": "add"})
    both = dataclasses.replace(lm.model, bidirectional=True, attention="xla")
    lm, params, rows = dataclasses.replace(lm, model=both), random_params(lm), batch()
    changed = rows["tokens"].at[:, 6].set((rows["tokens"][:, 6] + 5) % 32)
    a, b = (
        states(lm, params, tokens, rows["segment_ids"]).h_BxTxD
        for tokens in (rows["tokens"], changed)
    )
    moved = np.asarray(jnp.abs(a - b).max(-1) > 0)
    assert moved[:, :7].all() and not moved[:, 7:].any()
