"""Whose keys a recursion step looks at, written down a second time; and that shared keys are made
once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, small_lm

from mor_jax import nn
from mor_jax.analysis import accounting
from mor_jax.model.depth import Fixed
from mor_jax.model.lm import LM
from mor_jax.model.recurse import HIDDEN, run_gathered, run_masked

R, T = 3, 12


@dataclasses.dataclass(frozen=True)
class ByPosition(Fixed):
    """Tokens run as deep as said."""

    depths: tuple[int, ...] = ()

    def profiles(self, length):
        return (tuple(sum(d > r for d in self.depths) for r in range(R)),)

    def select(self, step, z_BxT, candidates_BxT, tokens, k):
        if z_BxT.shape[1] < T:  # gathered already: those that ran the step before
            return jnp.asarray([d > step for d in self.depths if d > step - 1])[None]
        return candidates_BxT & (jnp.asarray(self.depths) > step)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("kv", ["recursion_wise", "shared", "hybrid", "hybrid_first"])
def test_versions_of_the_keys_a_step_sees(kv, gathered):
    """A core that counts: a token's key at step r is r. Each step must then see, of token s, the
    version that the strategy says, and nothing of a token it says is hidden."""
    depths = (1, 3, 2, 3, 1, 2, 3, 1, 1, 2, 2, 3)
    seen = []

    def core(h, pos, q_seg, kv_seg, past=None):
        fresh = h[:, None]  # [B, 1, K, 1]: the state is the step's number
        if past is None:
            keys, out = fresh, [(fresh, -fresh)]
        elif past.merge is None:
            keys, out = past.kept[0][0], None
        else:
            out = [(past.merge(past.kept[0][0], fresh), past.merge(past.kept[0][1], -fresh))]
            keys = out[0][0]
            np.testing.assert_array_equal(out[0][0], -out[0][1])
        where = np.asarray(pos if past is None else past.pos_BxT)[0]
        visible = {
            int(p): int(k)
            for p, k, s in zip(where, keys[0, 0, :, 0], kv_seg[0], strict=True)
            if s != HIDDEN
        }
        seen.append({p: visible[p] for p in sorted(visible)})
        return h + 1, out

    run = run_gathered if gathered else lambda *args, **how: run_masked(*args, **how, causal=False)
    with jax.disable_jit():
        pos, seg = jnp.arange(T)[None], jnp.ones((1, T), jnp.int32)
        out = run(ByPosition(R, depths), {}, core, jnp.ones((1, T, 1)), pos, seg, kv=kv)
    np.testing.assert_array_equal(out.depth_BxT[0], depths)
    for r in range(1, R + 1):
        want = {
            "recursion_wise": {s: r for s, d in enumerate(depths) if d >= r},
            "shared": dict.fromkeys(range(T), 1),
            "hybrid": {s: min(r, d) for s, d in enumerate(depths)},
            "hybrid_first": {s: r if d >= r else 1 for s, d in enumerate(depths)},
        }[kv]
        assert seen[r - 1] == want


def test_shared_keys_are_those_of_the_first_recursion():
    """A plain loop that projects everything and then looks at the first recursion's keys all the
    same."""
    lm = small_lm("recursive_shared")
    params = random_params(lm)
    tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, 64)
    pos, seg = jnp.broadcast_to(jnp.arange(20), (2, 20)), jnp.ones((2, 20), jnp.int32)

    def plain(params):
        rope, first = lm.rope(pos), {}
        attend = lm.attend_row(pos, seg, seg)

        def attend_first(block):
            def attend(q, k, v):
                return nn.attention(q, *first.setdefault(block, (k, v)), pos, pos, seg, seg), None

            return attend

        x, _ = lm.blocks(params["prelude"], lm.embed(params, tokens, pos), rope, attend)
        for _ in range(lm.program.recursions):
            x, _ = lm.blocks(
                params["core"], x, rope, [attend_first(i) for i in range(lm.program.core)]
            )
        x, _ = lm.blocks(params["coda"], x, rope, attend)
        return lm.logits(params, lm.final_norm(params, x))

    want = jax.jit(plain)(params)
    for executor in ("masked", "gathered"):
        got = jax.jit(lambda p, e=executor: lm.apply(p, tokens, executor=e))(params)
        np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()))
    full = LM(lm.model, dataclasses.replace(lm.depth, kv="full"))
    # and that is another function
    assert float(jnp.abs(jax.jit(full.apply)(params, tokens) - want).max()) > 1e-2


def matrix_products(jaxpr) -> float:
    """FLOPs of the products without batch dimensions: those with weights, not those of
    attention."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general" and not eqn.params["dimension_numbers"][1][0]:
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = np.prod([eqn.invars[0].aval.shape[i] for i in contract])
            total += 2 * inner * np.prod(eqn.outvars[0].aval.shape)
        assert eqn.primitive.name != "scan", "a body counted once"
        total += sum(
            matrix_products(inner.jaxpr) for inner in eqn.params.values() if hasattr(inner, "jaxpr")
        )
    return total


@pytest.mark.parametrize(
    "kind", ["recursive_shared", "mor", "mor_shared", "mor_hybrid", "mor_relaxed"]
)
def test_a_gathered_row_multiplies_what_is_counted(kind):
    """Only active tokens through the blocks, and no key or value projected again: the products with
    weights in the traced program are those of the accounting, to the last one."""
    lm = small_lm(kind, loss_chunk=0)
    context = lm.model.context
    tokens = jnp.zeros((1, context), jnp.int32)
    params = jax.eval_shape(lm.init, jax.random.key(0))
    traced = matrix_products(
        jax.make_jaxpr(lambda p: lm.apply(p, tokens, executor="gathered"))(params).jaxpr
    )
    flops = accounting.true_flops_per_token(lm.model, lm.depth)
    assert traced == context * (flops.blocks + flops.head + flops.router)
