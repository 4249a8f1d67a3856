"""Every attention implementation equals the plain masked softmax, gradients included."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.errors import ConfigError
from mor_jax.nn.attention import attention

module = sys.modules["mor_jax.nn.attention"]  # the package exports the function of the same name


def example(length, kv_heads=2, groups=3, head_dim=8, seed=0):
    """Packed rows of two documents and padding, a third of the keys hidden, as in a recursion
    step."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q = draw(2, kv_heads, groups, length, head_dim)
    k, v = draw(2, kv_heads, length, head_dim), draw(2, kv_heads, length, head_dim)
    seg = np.ones((2, length), np.int32)
    seg[:, length // 3 :] = 2
    seg[1, -length // 8 :] = 0
    starts = np.where(np.arange(length) >= length // 3, length // 3, 0)
    pos = np.broadcast_to(np.arange(length) - starts, seg.shape).astype(np.int32)
    active = rng.random(seg.shape) > 0.33
    return (
        q,
        k,
        v,
        jnp.asarray(pos),
        jnp.asarray(seg),
        jnp.asarray(np.where(active, seg, -1)),
        active,
    )


def run(impl, q, k, v, pos, seg, kv_seg, active):
    # outputs of halted tokens are never used
    weight = jnp.asarray(active, jnp.float32)[:, None, None, :, None]

    def out(q, k, v):
        return attention(q, k, v, pos, pos, seg, kv_seg, impl) * weight

    grads = jax.grad(lambda *a: jnp.sum(jnp.sin(out(*a))), argnums=(0, 1, 2))(q, k, v)
    return out(q, k, v), *grads


@pytest.mark.parametrize("length", [5, 128, 300])  # below, at and above the block size
def test_blocked_equals_plain(length):
    args = example(length)
    for got, want in zip(
        jax.jit(run, static_argnums=0)("blocked", *args), run("xla", *args), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=2e-5)  # float32, another order of sums


@functools.partial(jax.jit, static_argnums=0)
def run_some(impl, at_K, q, k, v, pos, seg):
    def some(q, k, v):
        out = attention(q[..., at_K, :], k, v, pos[:, at_K], pos, seg[:, at_K], seg, impl)
        return jnp.where((seg[:, at_K] > 0)[:, None, None, :, None], out, 0)

    return some(q, k, v), *jax.grad(lambda *a: jnp.sum(jnp.sin(some(*a))), argnums=(0, 1, 2))(
        q, k, v
    )


@pytest.mark.parametrize(
    "picked", [range(150, 300), range(150), range(0, 300, 2), [*range(75), *range(225, 300)]]
)
def test_blocked_equals_plain_for_some_queries_and_all_keys(picked):
    """Shared keys: the queries of tokens that go on, wherever in the row they lie."""
    args = jnp.asarray(list(picked)), *example(300)[:5]
    for got, want in zip(run_some("blocked", *args), run_some("xla", *args), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_library_attention_is_called_with_the_right_layout_and_mask(monkeypatch):
    """The cuDNN path, with the library's portable implementation in cuDNN's place: layouts, groups
    and mask."""
    portable = functools.partial(module._cudnn_attention, implementation="xla")
    monkeypatch.setitem(module._IMPLEMENTATIONS, "cudnn", portable)
    monkeypatch.setattr(module, "choose", lambda impl, *_: impl)  # on a CPU, in float32
    args = example(40)
    for got, want in zip(run("cudnn", *args), run("xla", *args), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_an_unknown_implementation_is_named():
    with pytest.raises(ConfigError, match="flash9"):
        attention(*example(4)[:3], *[jnp.zeros((2, 4), jnp.int32)] * 4, "flash9")
