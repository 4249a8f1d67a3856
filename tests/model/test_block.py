"""The network is what its formulas say: against a forward pass written by hand, in float64, for one document.

Each feature of the block is a case here and one of the model in `tests/inference/engine/test_block_features.py`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import FEATURES
from small import random_params, small_lm

from mor_jax.analysis import accounting
from mor_jax.config import Config, check
from mor_jax.errors import ConfigError
from mor_jax.model import block as network
from mor_jax.model.loss import next_token_targets
from mor_jax.parallel.mesh import make_mesh
from mor_jax.train.step import loss_fn, loss_scales

T = 24


def model(name, **more):
    return small_lm("vanilla", context=T, layers=2, **FEATURES[name] | more)


def tokens():
    return np.random.default_rng(0).integers(0, 64, T)


# ---------------------------------------------------------------- the formulas


def norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def rotated(m, x_TxH, pos):
    half = m.dims[2] // 2
    frequency = m.rope_theta ** (-np.arange(half) / half)
    angle = pos * frequency
    turned = np.empty_like(x_TxH)
    turned[:half] = x_TxH[:half] * np.cos(angle) - x_TxH[half:] * np.sin(angle)
    turned[half:] = x_TxH[half:] * np.cos(angle) + x_TxH[:half] * np.sin(angle)
    return turned


def heads_by_hand(m, p, n_TxD):
    """Queries [T, N, H], keys and values [T, K, H] of a layer."""
    heads, kv_heads, _ = m.dims
    groups = heads // kv_heads
    h_TxKxExH = np.einsum("TD,KEHD->TKEH", n_TxD, p["qkv"])
    if m.qkv_bias:
        h_TxKxExH += p["bias"]
    q, k, v = h_TxKxExH[:, :, :groups], h_TxKxExH[:, :, groups], h_TxKxExH[:, :, groups + 1]
    if m.qk_norm:
        q = norm(q, p["q_norm"]["scale"], m.norm_eps)
        k = norm(k, p["k_norm"]["scale"], m.norm_eps)
    for t in range(len(n_TxD)):
        for head in range(kv_heads):
            k[t, head] = rotated(m, k[t, head], t)
            for g in range(groups):
                q[t, head, g] = rotated(m, q[t, head, g], t)
    return q, k, v


def layer(m, p, x_TxD):
    heads, kv_heads, head_dim = m.dims
    n = norm(x_TxD, p["norm_1"]["scale"], m.norm_eps)
    q, k, v = heads_by_hand(m, p["attention"], n)
    x = x_TxD.copy()
    for t in range(len(x)):
        for head in range(kv_heads):
            for g in range(heads // kv_heads):
                score = k[: t + 1, head] @ q[t, head, g] / math.sqrt(head_dim)
                share = np.exp(score - score.max())
                x[t] += p["attention"]["out"][:, head, g] @ (share / share.sum() @ v[: t + 1, head])
    n = norm(x, p["norm_2"]["scale"], m.norm_eps)
    gate, up = (n @ p["mlp"]["gate_up"][i].T for i in range(2))
    return x + (gate / (1 + np.exp(-gate)) * up) @ p["mlp"]["down"].T


def by_hand(m, params, tokens_T):
    """float64 logits [T, V] of a vanilla model."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = p["embed"]["table"][tokens_T]
    for i in range(len(p["core"])):
        x = layer(m, p["core"][str(i)], x)
    table = p["embed" if m.tied else "head"]["table"]
    logits = norm(x, p["norm"]["scale"], m.norm_eps) @ table.T
    return m.logit_cap * np.tanh(logits / m.logit_cap) if m.logit_cap else logits


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("name", FEATURES)
def test_logits_are_those_of_the_formulas(name):
    lm = model(name)
    params = random_params(lm)
    want = by_hand(lm.model, params, tokens())
    got = jax.jit(lm.apply)(params, tokens()[None])[0]
    # float32 sums of 48 terms and less, through two layers.
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    if name != "none":  # the feature matters in this model, so that leaving it out would be seen
        plain = by_hand(model("none").model, params, tokens())
        assert np.abs(plain - want).max() > 0.05 * np.abs(want).max()


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("chunk", [0, 7])
def test_the_loss_and_its_gradient_are_those_of_the_logits(name, chunk):
    """The chunked loss, whose gradient is written by hand, against automatic differentiation through all logits."""
    lm = model(name, loss_chunk=chunk)
    params = random_params(lm)
    batch = {"tokens": jnp.asarray(tokens()[None], jnp.int32), "segment_ids": jnp.ones((1, T), jnp.int32)}
    targets, weights = next_token_targets(batch["tokens"], batch["segment_ids"])

    def plain(p):
        logp = jax.nn.log_softmax(lm.apply(p, batch["tokens"]))
        nll = -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(nll * weights) / jnp.sum(weights)

    mine = jax.jit(jax.value_and_grad(lambda p: loss_fn(lm, p, batch, loss_scales(lm, batch))[0]))
    (loss, grads), (want, want_grads) = mine(params), jax.jit(jax.value_and_grad(plain))(params)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for (path, got), leaf in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(got, leaf, atol=2e-5 * np.abs(leaf).max() + 1e-8, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", FEATURES)
def test_parameters_are_counted_and_placed(name):
    lm = model(name)
    made = jax.eval_shape(lm.init, jax.random.key(0))
    count = accounting.parameters(lm.model, lm.depth)
    assert count.total == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made))
    names = jax.tree.map(len, lm.logical_axes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert names == jax.tree.map(lambda leaf: leaf.ndim, made)
    mesh = make_mesh(Config().mesh, jax.devices()[:1])
    assert jax.tree.structure(lm.rules.shardings(mesh, lm.logical_axes())) == jax.tree.structure(made)


# ---------------------------------------------------------------- the soft cap


def test_no_cap_is_no_operation():
    x = jnp.arange(3.0)
    assert network.finish(model("none").model, x) is x


def test_capped_logits_keep_their_order_and_stay_within_the_cap():
    m = model("logit_cap").model
    x = jnp.linspace(-9.0, 9.0, 101)
    capped = network.finish(m, x)
    assert (jnp.diff(capped) > 0).all() and jnp.abs(capped).max() < m.logit_cap
    near = jnp.abs(x) < 0.1
    np.testing.assert_allclose(capped[near], x[near], atol=1e-4)  # the cap's cubic term: 0.1^3 / (3 * 3^2)


@pytest.mark.parametrize("cap", [-1.0, float("nan"), float("inf")])
def test_a_cap_that_is_none_is_refused(cap):
    cfg = Config()
    with pytest.raises(ConfigError, match="logit_cap must be positive, or 0"):
        check(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, logit_cap=cap)))
