"""Relaxation: what each recursion has of its own is used at that recursion and nowhere else,
everywhere alike."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, small_lm

from mor_jax.analysis import accounting
from mor_jax.analysis.traffic import decode_traffic
from mor_jax.config import DepthConfig, MeshConfig
from mor_jax.errors import ConfigError
from mor_jax.model.convert import convert, overlay
from mor_jax.model.lm import LM
from mor_jax.parallel.mesh import make_mesh
from mor_jax.train.step import loss_fn, loss_scales

R, T = 3, 24
SMALL = {"width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 24, "context": T, "loss_chunk": 0}
ALL = {"norms": "own", "lora_rank": 2, "recursion_encoding": True}


def relaxed(policy="fixed", kv="", **model):
    shape = {"sharing": "cycle", "recursions": R, "layers": 2 * R}
    lm = small_lm("recursive", **SMALL, **shape | ALL | model)
    return dataclasses.replace(lm, depth=DepthConfig(policy, kv=kv))


def unrolled(lm: LM, params: dict) -> tuple[LM, dict]:
    """The unshared twin: of each application of a block a layer with everything written out."""
    twin = LM(
        dataclasses.replace(
            lm.model,
            sharing="none",
            recursions=1,
            norms="shared",
            lora_rank=0,
            recursion_encoding=False,
        )
    )
    core, groups = {}, lm.model.heads // lm.model.kv_heads
    for r in range(R):
        for i, block in params["core"].items():
            block = dict(block)
            own = jax.tree.map(lambda leaf, r=r: leaf[r], block.pop("own"))
            lora = own.pop("lora")
            qkv = np.array(block["attention"]["qkv"])
            qkv[:, :groups] += np.einsum("KGHR,RD->KGHD", lora["query_up"], lora["query_down"])
            qkv[:, groups + 1] += np.einsum("KHR,RD->KHD", lora["value_up"], lora["value_down"])
            block["attention"] = block["attention"] | {"qkv": jnp.asarray(qkv)}
            own.pop("encoding", None)
            core[str(r * len(params["core"]) + int(i))] = block | own
    return twin, params | {"core": core}


@functools.cache
def tokens(batch=2):
    return np.random.default_rng(0).integers(0, 64, (batch, T), dtype=np.int32)


def test_each_recursion_is_the_layer_it_adds_up_to():
    lm = relaxed(recursion_encoding=False)
    params = random_params(lm)
    twin, twin_params = unrolled(lm, params)
    want, got = apply(twin, twin_params), apply(lm, params)
    np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()))
    swapped = jax.tree.map(lambda leaf: leaf, params)
    for block in swapped["core"].values():
        block["own"] = jax.tree.map(lambda leaf: leaf[::-1], block["own"])
    assert float(jnp.abs(apply(lm, swapped) - want).max()) > 1e-2  # whose is whose matters


@functools.cache
def fresh():
    return jax.jit(relaxed().init)(jax.random.key(0))


@functools.cache
def of_tied():
    """Logits of the model that is not relaxed, as a function of its weights."""
    plain = relaxed(norms="shared", lora_rank=0, recursion_encoding=False)
    return jax.jit(plain.apply)


def test_a_fresh_relaxed_model_is_the_tied_one():
    params = fresh()
    norm = {"scale": jnp.ones(16)}
    tied = {
        i: {name: block[name] for name in ("attention", "mlp")} | {"norm_1": norm, "norm_2": norm}
        for i, block in params["core"].items()
    }
    got, want = apply(relaxed(), params), of_tied()(params | {"core": tied}, tokens())
    np.testing.assert_allclose(got, want, atol=1e-6)
    downs = params["core"]["0"]["own"]["lora"]["query_down"]
    assert np.abs(downs[0] - downs[1]).max() > 0  # each recursion may go its own way


@functools.partial(jax.jit, static_argnums=0)
def apply(lm, params):
    return lm.apply(params, tokens())


def test_executors_are_equal_under_token_choice():
    lm = relaxed("token_choice", layers=R)
    params = random_params(lm)

    def run(executor):
        return jax.jit(lambda p: lm.forward(p, tokens(), executor=executor, profile=profile))(
            params
        )

    profile = len(lm.policy.profiles(T)) - 1
    a, b = run("masked"), run("gathered")
    np.testing.assert_array_equal(a.depth_BxT, b.depth_BxT)
    np.testing.assert_allclose(a.h_BxTxD, b.h_BxTxD, atol=1e-5)


def test_executors_are_equal_and_every_part_learns():
    lm = relaxed("expert_choice", "shared", layers=R)
    params = random_params(lm)
    batch = {
        "tokens": tokens(),
        "segment_ids": np.where(np.arange(T) < 15, 1, 2) * np.ones((2, 1), np.int32),
    }

    def run(executor):
        def loss(p):
            return loss_fn(lm, p, batch, loss_scales(lm, batch), executor=executor)[0]

        return jax.jit(jax.value_and_grad(loss))(params)

    (loss_m, grads_m), (loss_g, grads_g) = run("masked"), run("gathered")
    np.testing.assert_allclose(loss_m, loss_g, rtol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grads_m), jax.tree.leaves(grads_g), strict=True
    ):
        np.testing.assert_allclose(
            a, b, atol=2e-5 * max(float(jnp.abs(a).max()), 1e-3), err_msg=str(path)
        )
    for name, leaf in jax.tree_util.tree_leaves_with_path(grads_g["core"]["0"]["own"]):
        moved = np.abs(np.asarray(leaf)).reshape(R, -1).max(-1) > 0
        made_once = "value" in jax.tree_util.keystr(name)
        np.testing.assert_array_equal(
            moved, [True, not made_once, not made_once], err_msg=str(name)
        )


def test_rows_at_recursions_of_their_own():
    """A batch of lanes, each at another recursion, is what each lane is alone."""
    lm = relaxed()
    params = random_params(lm)
    core, x = lm.gathered_core(params), jax.random.normal(jax.random.key(0), (R, 5, 16))
    pos, seg = jnp.broadcast_to(jnp.arange(5), (R, 5)), jnp.ones((R, 5), jnp.int32)

    def run(x, n, r):
        return lm.blocks(
            core, x, lm.rope(pos[:n]), lm.attend_row(pos[:n], seg[:n], seg[:n]), recursion=r
        )[0]

    together = jax.jit(lambda x: run(x, R, jnp.arange(R)))(x)
    alone = jax.jit(lambda x: jnp.concatenate([run(x[r : r + 1], 1, r) for r in range(R)]))(x)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    with pytest.raises(ValueError, match="which recursion"):
        lm.blocks(core, x, lm.rope(pos), lm.attend_row(pos, seg, seg))


@pytest.mark.parametrize(
    "part", [{}, {"norms": "shared"}, {"lora_rank": 0}, {"recursion_encoding": False}]
)
def test_what_is_its_own_is_counted_and_placed(part):
    lm = relaxed(**part)
    made = jax.eval_shape(lm.init, jax.random.key(0))
    count = accounting.parameters(lm.model, lm.depth)
    assert count.total == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made))
    axes = lm.logical_axes()
    names = jax.tree.map(len, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert names == jax.tree.map(lambda leaf: leaf.ndim, made)
    shardings = lm.rules.shardings(make_mesh(MeshConfig(), jax.devices()[:1]), axes)
    assert jax.tree.structure(shardings) == jax.tree.structure(made)
    plain = dataclasses.replace(lm.model, norms="shared", lora_rank=0, recursion_encoding=False)

    def cost(m):
        return accounting.true_flops_per_token(m, lm.depth).blocks

    # two blocks; q 16 -> 16 and v 16 -> 8 wide
    additions = 2 * 2 * R * lm.model.lora_rank * (16 + 16 + 16 + 8)
    assert cost(lm.model) - cost(plain) == pytest.approx(additions)

    def read(m):
        return decode_traffic(m, lm.depth, 10).weights

    assert read(lm.model) - read(plain) == pytest.approx(4 * additions / 2)


# ---------------------------------------------------------------- from unshared weights


@functools.cache
def source():
    """An unshared model whose layers are one block's but for queries, values and norms."""
    lm = small_lm("vanilla", **SMALL, layers=2 * R)
    params = random_params(lm)
    for i in range(2, 2 * R):
        first, mine = params["core"][str(i % 2)], params["core"][str(i)]
        qkv = first["attention"]["qkv"].at[:, [0, 1, 3]].set(mine["attention"]["qkv"][:, [0, 1, 3]])
        params["core"][str(i)] = mine | {
            "mlp": first["mlp"],
            "attention": first["attention"] | {"qkv": qkv},
        }
    return lm, params


def test_at_full_rank_the_decomposition_gives_the_source_back():
    old, params = source()
    lm = relaxed(lora_rank=16, recursion_encoding=False)
    whole = convert(params, old.model, lm.model, "lower", relaxation="svd") | {"router": {}}
    want = apply(old, params)
    np.testing.assert_allclose(apply(lm, whole), want, atol=3e-5 * float(jnp.abs(want).max()))


def test_of_a_lower_rank_it_is_the_nearest():
    """Eckart and Young: what is missing of a layer's projection is the tail of the singular
    values."""
    old, params = source()
    groups, last = 2, None
    for rank in (1, 2, 4):
        lm = relaxed(lora_rank=rank)
        lora = convert(params, old.model, lm.model, "average", relaxation="svd")["core"]["1"][
            "own"
        ]["lora"]
        shared = np.mean([params["core"][str(i)]["attention"]["qkv"] for i in (1, 3, 5)], axis=0)
        rest = (np.asarray(params["core"]["5"]["attention"]["qkv"]) - shared)[:, :groups].reshape(
            -1, 16
        )
        found = np.einsum("KGHR,RD->KGHD", lora["query_up"][2], lora["query_down"][2]).reshape(
            -1, 16
        )
        tail = np.linalg.svd(rest, compute_uv=False)[rank:]
        missing = np.linalg.norm(rest - found)
        assert missing == pytest.approx(np.sqrt(np.sum(tail**2)), rel=1e-4)
        assert last is None or missing < last
        last = missing


def test_at_zero_it_is_the_tied_model():
    old, params = source()
    lm, plain = relaxed(), relaxed(norms="shared", lora_rank=0, recursion_encoding=False)
    made = overlay(fresh(), convert(params, old.model, lm.model, "stepwise"))
    tied = convert(params, old.model, plain.model, "stepwise") | {"router": {}}
    kept = [p["core"]["0"]["own"]["lora"]["query_down"] for p in (made, fresh())]
    np.testing.assert_array_equal(*kept)
    np.testing.assert_allclose(apply(lm, made), of_tied()(tied, tokens()), atol=1e-6)


@pytest.mark.parametrize(
    ("relaxation", "layers", "more", "message"),
    [
        ("pca", 6, {}, "no relaxation 'pca'; choose one of zero, svd"),
        ("svd", 9, {}, "6 there, 9 here"),
        ("svd", 6, {"lora_rank": 0, "norms": "shared"}, "neither is set"),
    ],
)
def test_what_cannot_be_relaxed_is_named(relaxation, layers, more, message):
    old, params = source()
    with pytest.raises(ConfigError, match=message):
        convert(
            params, old.model, relaxed(layers=layers, **more).model, "lower", relaxation=relaxation
        )
