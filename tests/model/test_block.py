"""The network is what its formulas say: against a forward pass written by hand, in float64, for one
document.

Each feature of the block is a case here and one of the model in
`tests/inference/engine/test_block_features.py`.
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
from mor_jax.nn.rope import scaled
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


def frequencies(m):
    """Radians a position of each pair of dimensions, one by one, from the text of each method."""
    found, pairs = [], m.dims[2] // 2
    for i in range(pairs):
        plain = m.rope_theta ** (-i / pairs)
        wavelength, scaled = 2 * math.pi / plain, plain / m.rope_factor
        if m.rope_scaling == "linear":
            found.append(scaled)
        elif m.rope_scaling == "llama3":
            turns = m.rope_original_context / wavelength
            if turns <= m.rope_low_freq_factor:
                found.append(scaled)
            elif turns >= m.rope_high_freq_factor:
                found.append(plain)
            else:
                smooth = (turns - m.rope_low_freq_factor) / (
                    m.rope_high_freq_factor - m.rope_low_freq_factor
                )
                found.append((1 - smooth) * scaled + smooth * plain)
        elif m.rope_scaling == "yarn":
            # that makes so many turns: original / (2 pi theta^(i / pairs)) = turns, solved for i
            def pair(turns):
                return (
                    pairs
                    * math.log(m.rope_original_context / (2 * math.pi * turns))
                    / math.log(m.rope_theta)
                )

            first, last = (
                max(math.floor(pair(m.rope_beta_fast)), 0),
                min(math.ceil(pair(m.rope_beta_slow)), 2 * pairs - 1),
            )
            ramp = min(max((i - first) / (last - first), 0), 1)
            found.append(ramp * scaled + (1 - ramp) * plain)
        else:
            found.append(plain)
    return np.array(found)


def rotated(m, x_H, pos):
    half, angle = m.dims[2] // 2, pos * frequencies(m)
    turned = np.empty_like(x_H)
    turned[:half] = x_H[:half] * np.cos(angle) - x_H[half:] * np.sin(angle)
    turned[half:] = x_H[half:] * np.cos(angle) + x_H[:half] * np.sin(angle)
    return turned * (0.1 * math.log(m.rope_factor) + 1 if m.rope_scaling == "yarn" else 1)


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
    """The chunked loss, whose gradient is written by hand, against automatic differentiation
    through all logits."""
    lm = model(name, loss_chunk=chunk)
    params = random_params(lm)
    batch = {
        "tokens": jnp.asarray(tokens()[None], jnp.int32),
        "segment_ids": jnp.ones((1, T), jnp.int32),
    }
    targets, weights = next_token_targets(batch["tokens"], batch["segment_ids"])

    def plain(p):
        logp = jax.nn.log_softmax(lm.apply(p, batch["tokens"]))
        nll = -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(nll * weights) / jnp.sum(weights)

    mine = jax.jit(jax.value_and_grad(lambda p: loss_fn(lm, p, batch, loss_scales(lm, batch))[0]))
    (loss, grads), (want, want_grads) = mine(params), jax.jit(jax.value_and_grad(plain))(params)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for (path, got), leaf in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want_grads), strict=True
    ):
        np.testing.assert_allclose(
            got, leaf, atol=2e-5 * np.abs(leaf).max() + 1e-8, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize("name", FEATURES)
def test_parameters_are_counted_and_placed(name):
    lm = model(name)
    made = jax.eval_shape(lm.init, jax.random.key(0))
    count = accounting.parameters(lm.model, lm.depth)
    assert count.total == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made))
    names = jax.tree.map(len, lm.logical_axes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert names == jax.tree.map(lambda leaf: leaf.ndim, made)
    mesh = make_mesh(Config().mesh, jax.devices()[:1])
    assert jax.tree.structure(lm.rules.shardings(mesh, lm.logical_axes())) == jax.tree.structure(
        made
    )


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
    # the cap's cubic term: 0.1^3 / (3 * 3^2)
    np.testing.assert_allclose(capped[near], x[near], atol=1e-4)


@pytest.mark.parametrize("cap", [-1.0, float("nan"), float("inf")])
def test_a_cap_that_is_none_is_refused(cap):
    cfg = Config()
    with pytest.raises(ConfigError, match="logit_cap must be positive, or 0"):
        check(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, logit_cap=cap)))


# ---------------------------------------------------------------- rotary scaling


def frequencies_of(**fields):
    m = small_lm("vanilla", heads=1, kv_heads=1, head_dim=64, rope_theta=500_000.0, **fields).model
    return np.asarray(scaled(m, m.rope_theta ** (-jnp.arange(32) / 32))), frequencies(m)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": "linear", "rope_factor": 2.0},
        # As Llama 3.1 and as Qwen2.5 are published.
        {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_context": 8192},
        {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_context": 32768},
    ],
)
def test_scaled_frequencies_of_published_shapes(fields):
    got, want = frequencies_of(**fields)
    np.testing.assert_allclose(got, want, rtol=2e-6)
    plain, _ = frequencies_of()
    # the slowest is interpolated
    np.testing.assert_allclose(got[-1], plain[-1] / fields["rope_factor"], rtol=1e-6)
    if fields["rope_scaling"] != "linear":
        np.testing.assert_allclose(got[0], plain[0], rtol=1e-6)  # the fastest is kept
        assert (np.diff(got / plain) <= 1e-6).all() and len(np.unique(np.round(got / plain, 3))) > 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": "yarm"}, "Did you mean 'yarn'"),
        (
            {"rope_factor": 2.0},
            "rope_factor = 2.0 means nothing under config.model.rope_scaling = 'none'",
        ),
        ({"rope_scaling": "linear", "rope_factor": 0.5}, "rope_factor must be 1 or more"),
        ({"rope_scaling": "llama3", "rope_factor": 2.0}, "rope_original_context must be positive"),
        (
            {"rope_scaling": "yarn", "rope_original_context": 64, "rope_beta_fast": 1.0},
            "rope_beta_slow = 1.0 must be below config.model.rope_beta_fast = 1.0",
        ),
        (
            {"rope_scaling": "llama3", "rope_original_context": 64, "rope_beta_fast": 9.0},
            "rope_beta_fast = 9.0 means",
        ),
    ],
)
def test_a_scaling_that_is_none_is_refused(fields, message):
    cfg = Config()
    with pytest.raises(ConfigError, match=message):
        check(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **fields)))
