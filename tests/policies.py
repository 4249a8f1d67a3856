"""What must hold of every depth policy, as functions of its configuration; a new policy is tested
without a new test."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from small import random_params, spread_routers

from mor_jax.analysis import accounting
from mor_jax.analysis.collective_plan import planned_collectives
from mor_jax.analysis.inspection import inspect_config
from mor_jax.config import (
    Config,
    DepthConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    check,
    from_dict,
)
from mor_jax.inference.decode import decode_step, prefill
from mor_jax.model import program
from mor_jax.model.lm import LM
from mor_jax.train.schedule import optimizer_of
from mor_jax.train.state import TrainState
from mor_jax.train.step import gradients, make_train_step

T = 32
MODEL = ModelConfig(
    layers=3,
    recursions=3,
    sharing="cycle",
    width=16,
    heads=2,
    kv_heads=1,
    mlp_width=24,
    vocab_size=64,
    context=T,
    init_std=0.3,
)
TOLERANCE = 1e-4  # float32 of order 10: other shapes, other summation order


def small(depth: DepthConfig) -> tuple[LM, dict]:
    """A small model under this policy, its router's scores far from ties."""
    lm = LM(MODEL, depth)
    return lm, spread_routers(random_params(lm))


def batch() -> dict:
    """Rows of two documents and padding."""
    tokens = jax.random.randint(jax.random.key(0), (4, T), 0, 64)
    seg = jnp.broadcast_to(1 + (jnp.arange(T) >= 18), (4, T)) * (jnp.arange(T) < T - 3)
    return {"tokens": tokens, "segment_ids": seg.astype(jnp.int32)}


def holds_in_configurations(depth: DepthConfig) -> None:
    """It passes the door, comes back from JSON, and says a KV strategy."""
    cfg = Config(model=MODEL, depth=depth, train=TrainConfig(steps=10))
    check(cfg)
    assert from_dict(cfg.to_dict()) == cfg and hash(from_dict(cfg.to_dict()).depth) == hash(depth)
    assert depth.kv_name in depth.kv_strategies


def holds_in_executors(depth: DepthConfig) -> None:
    """Masked and gathered run the same tokens to the same states, losses and gradients."""
    if depth.halts:  # it has the masked one alone
        return
    lm, params = small(depth)
    rows = batch() | {"salt": jnp.arange(4, dtype=jnp.uint32)}
    found = {}
    for executor in ("masked", "gathered"):
        of = dataclasses.replace(lm, depth=dataclasses.replace(depth, executor=executor))

        @jax.jit
        def run(params, of=of):
            out = of.forward(params, rows["tokens"], rows["segment_ids"], salt_B=rows["salt"])
            return out.h_BxTxD, out.depth_BxT, gradients(of, params, rows, 1)

        found[executor] = run(params)
    (h_m, depth_m, (grad_m, sums_m)), (h_g, depth_g, (grad_g, sums_g)) = (
        found["masked"],
        found["gathered"],
    )
    np.testing.assert_array_equal(depth_m, depth_g)
    np.testing.assert_allclose(h_m, h_g, atol=TOLERANCE)
    np.testing.assert_allclose(sums_m["loss"], sums_g["loss"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grad_m), jax.tree.leaves(grad_g), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE * max(1.0, float(jnp.abs(a).max())))


def holds_in_training(depth: DepthConfig) -> None:
    """The loss of a batch falls over a few steps on it, and what the policy promises is in the
    metrics."""
    lm, params = small(depth)
    tx = optimizer_of(
        Config(model=MODEL, depth=depth, optim=OptimConfig(peak_lr=1e-2, schedule="constant")), 20
    )
    state, step = (
        TrainState(jnp.zeros((), jnp.int32), params, tx.init(params)),
        jax.jit(make_train_step(lm, tx)),
    )
    losses = []
    for _ in range(12):
        state, metrics = step(state, batch())
        losses.append(float(metrics["lm_loss"]))
    assert losses[-1] < losses[0] - 0.1
    assert set(lm.policy.loss_weights()) <= set(metrics)
    assert any(name.startswith("router/") for name in metrics) == depth.routed
    assert jax.tree.structure(state.params) == jax.tree.structure(params)


def holds_in_decoding(depth: DepthConfig) -> None:
    """Prefill and cached decoding compute the full causal forward pass, and the cache holds what
    accounting says."""
    lm, params = small(depth)
    tokens = jax.random.randint(jax.random.key(1), (2, T), 0, 64)
    full = jax.jit(lambda p: lm.forward(p, tokens, mode="causal"))(params)
    want, depths = np.asarray(lm.logits(params, full.h_BxTxD)), np.asarray(full.depth_BxT)
    lengths, rows = np.array([5, 9]), np.arange(2)
    logits, cache, seen = jax.jit(prefill, static_argnums=(0, 4))(
        lm, params, tokens[:, :9], jnp.asarray(lengths), T
    )
    np.testing.assert_allclose(logits, want[rows, lengths - 1], atol=TOLERANCE)
    for b, n in enumerate(lengths):
        np.testing.assert_array_equal(np.asarray(seen)[b, :n], depths[b, :n])
    step = jax.jit(functools.partial(decode_step, lm), donate_argnums=1)
    for at in lengths + np.arange(20)[:, None]:
        logits, cache, d = step(params, cache, tokens[rows, at])
        np.testing.assert_allclose(logits, want[rows, at], atol=TOLERANCE)
        np.testing.assert_array_equal(d, depths[rows, at])
    entries = np.asarray(cache.entries_RxB()).sum(axis=0)
    per_entry = accounting.kv_values(MODEL) * 4 * lm.program.core  # float32, no prelude or coda
    for b, n in enumerate(lengths + 20):
        counted = accounting.kv_bytes_of_depths(MODEL, depth, depths[b, :n].tolist())
        # Shared keys are made of every token, also of one that no step runs.
        assert entries[b] * per_entry == counted[-1]


def holds_in_causality(depth: DepthConfig) -> None:
    """No logit depends on later tokens, and none on the document before."""
    lm, params = small(depth)
    run = jax.jit(lambda tokens, seg: lm.apply(params, tokens, seg, mode="causal"))
    a, b = jax.random.randint(jax.random.key(2), (2, 2, T), 0, 64)
    one = jnp.ones_like(a)
    for cut in (1, 13, T - 1):
        changed = jnp.concatenate([a[:, :cut], b[:, cut:]], axis=1)
        np.testing.assert_array_equal(run(a, one)[:, :cut], run(changed, one)[:, :cut])
    cut = 11
    behind = jnp.concatenate([b[:, :cut], a[:, : T - cut]], axis=1)
    packed = run(behind, one + (jnp.arange(T) >= cut))
    np.testing.assert_allclose(packed[:, cut:], run(a, one)[:, : T - cut], atol=TOLERANCE)


def holds_in_accounting(depth: DepthConfig) -> None:
    """Parameters, row sizes and shares are those of the program that runs."""
    lm, params = small(depth)
    leaves = {name: leaf for name, leaf in params["router"].items() if name != "survey"}
    assert accounting.parameters(MODEL, depth).router == sum(
        leaf.size for leaf in jax.tree.leaves(leaves)
    )
    counts = lm.policy.counts(T)
    assert counts.surveyed == math.prod(
        params["router"]["survey"].shape if "survey" in params["router"] else (0,)
    )
    tokens = jax.random.randint(jax.random.key(3), (8, T), 0, 64)
    run = jax.jit(lambda p: lm.forward(p, tokens, executor="masked").active_RxBxT)
    ran_RxB = np.asarray(run(params)).sum(axis=-1)
    assert (ran_RxB <= np.array(counts.row_sizes)[:, None]).all()
    # known beforehand, so counted exactly
    if len(lm.policy.profiles(T)) == 1 and not depth.halts:
        np.testing.assert_array_equal(
            ran_RxB, np.array([program.active_counts(depth.shares(MODEL), T)] * 8).T
        )
    assert len(lm.policy.expected_shares(params["router"])) == MODEL.recursions
    ran = ran_RxB.mean(axis=1)
    at_all_depths = accounting.true_flops_per_token(
        MODEL, depth, mean_counts=[T] * MODEL.recursions
    )
    found = accounting.true_flops_per_token(MODEL, depth, mean_counts=ran.tolist())
    assert (found.blocks < at_all_depths.blocks) == (ran.sum() < T * MODEL.recursions)
    assert found.router * T == lm.policy.counts(T, ran).flops >= 0
    cfg = Config(
        model=MODEL, depth=depth, train=TrainConfig(steps=10, batch_size=4), mesh=MeshConfig()
    )
    report = inspect_config(cfg)
    assert report["memory"]["total"] > 0 and report["program"]["capacities"] == list(
        depth.shares(MODEL)
    )
    assert planned_collectives(cfg, devices=4)


HOLDS = (
    holds_in_configurations,
    holds_in_executors,
    holds_in_training,
    holds_in_decoding,
    holds_in_causality,
    holds_in_accounting,
)
