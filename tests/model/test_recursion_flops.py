"""What is counted of a recursion's knobs is what the traced programs multiply."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.analysis import accounting
from mor_jax.analysis.accounting import DTYPE_BYTES
from mor_jax.analysis.traffic import decode_traffic
from mor_jax.config import RecursionConfig, from_config_dict
from mor_jax.model.lm import LM
from mor_jax.model.recursion.sampling import draw, probabilities
from mor_jax.train.loops import loop_loss
from mor_jax.train.step import loss_fn, loss_scales

T = 6
SHAPE = {
    "width": 8,
    "heads": 2,
    "kv_heads": 1,
    "mlp_width": 12,
    "vocab_size": 64,
    "context": T,
    "loss_chunk": 0,
}


def products(jaxpr, turns: int) -> float:
    """FLOPs of the products with weights, which have no batch dimensions. A scan counts as often as
    it runs, a `while`, whose length is a value, `turns` times."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general" and not eqn.params["dimension_numbers"][1][0]:
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = np.prod([eqn.invars[0].aval.shape[i] for i in contract])
            total += 2 * inner * np.prod(eqn.outvars[0].aval.shape)
        times = {"scan": eqn.params.get("length"), "while": turns}.get(name, 1)
        inside = [j for v in eqn.params.values() for j in (v if isinstance(v, tuple) else [v])]
        inside = [getattr(j, "jaxpr", j) for j in inside if hasattr(getattr(j, "jaxpr", j), "eqns")]
        if name == "cond":  # one of its branches runs, and the others do nothing
            inside = [max(inside, key=lambda j: products(j, turns))]
        total += times * sum(products(j, turns) for j in inside)
    return total


def preset(name: str, argument: str, **recursion) -> LM:
    made = importlib.import_module(f"configs.family.{name}").get_config(argument)
    made.model.update(SHAPE)
    made.recursion.update(recursion)
    return LM.from_config(from_config_dict(made))


# every injection and read-out; the gradient through all steps, and through the last ones alone
COUNTED = {
    "ouro": ("ouro", "r=3", {}),
    "huginn": ("huginn", "r=3,k=2", {"sampling": "fixed", "exit": "latent"}),
    "parcae": ("parcae", "r=3,k=1", {"sampling": "fixed", "gradient_steps": 2}),
    "uniform": ("looped", "r=3", {"injection": "add", "loss": "uniform", "exit": "kl"}),
    "cdf": ("pondernet", "r=3", {"exit": "cdf"}),
    "trm": ("trm", "n=1,t=2,m=2", {}),
    "hrm": ("hrm", "n=2,t=1,m=3", {}),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_traced_programs_multiply_what_is_counted(name):
    """Every product with a weight, forward and backward, to the last one."""
    of, argument, recursion = COUNTED[name]
    lm = preset(of, argument, **recursion)
    c, params = lm.recursion, jax.eval_shape(lm.init, jax.random.key(0))
    tokens = jnp.zeros((1, T), jnp.int32)
    flops = accounting.true_flops_per_token(lm.model, lm.depth, recursion=c)
    forward = jax.make_jaxpr(lambda p: lm.apply(p, tokens, mode="causal"))(params)
    assert products(forward.jaxpr, 0) == T * (flops.total - flops.attention + flops.exit)
    # a token that is decoded alone reads each weight once for each product, but for the gate
    gate = flops.exit if c.exit == "cdf" else 0
    weights = decode_traffic(lm.model, lm.depth, recursion=c).weights / DTYPE_BYTES[lm.model.dtype]
    assert 2 * weights == flops.total - flops.attention + flops.exit - gate

    rows = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}
    loss = loop_loss if c.trains else loss_fn
    salt = {"salt": jnp.zeros((1,), jnp.uint32)} if lm.draws else {}

    def objective(p):
        return loss(lm, p, rows | salt, loss_scales(lm, rows))

    steps = lm.program.recursions
    of_segment = c.gradient_steps or steps // c.segments
    free, window = steps // c.segments - of_segment, of_segment * c.segments
    traced = products(jax.make_jaxpr(jax.grad(objective, has_aux=True))(params).jaxpr, free)
    # scores of attention, which the trace leaves out: 3 times those of a step with a gradient
    program = lm.program
    applied = program.prelude + program.core * steps + program.coda
    reads = 1 if c.loss == "final" else c.segments if c.segments > 1 else window
    pairs = 3 * (program.prelude + program.core * window + program.coda * reads)
    pairs += program.core * (steps - window)
    # losses after each step are also read as figures, forward alone
    figures = flops.head * (0 if c.loss == "final" else reads)
    want = flops.training - flops.attention * pairs / applied + figures
    if c.injection == "diagonal":  # B e is one number for all steps: JAX makes it before its scan
        want -= flops.recursion / steps * (window - 1)
    assert traced == pytest.approx(T * want, rel=1e-12)


@pytest.mark.parametrize("sampling", ["lognormal_poisson", "poisson", "binomial", "uniform"])
def test_training_costs_what_is_drawn(sampling):
    """The chances are those of the draws, cap included."""
    c = RecursionConfig(sampling=sampling, sampling_scope="sequence", sampling_skip=0.3)
    chances = np.asarray(probabilities(c, 4))
    rows = np.asarray(draw(c, 4, jnp.asarray(3), 20_000))
    assert chances.sum() == pytest.approx(1) and len(chances) == c.most(4)
    # 4 standard deviations of a share of 20 000 rows
    shares = np.bincount(rows - 1, minlength=len(chances)) / 20_000
    np.testing.assert_allclose(shares, chances, atol=0.015)
    lm = preset("huginn", "r=4,k=2", sampling=sampling, sampling_skip=0.3)

    whole = accounting.true_flops_per_token(lm.model, lm.depth, recursion=lm.recursion)
    # a linear function of the steps from the window on, which two fixed numbers of steps show
    two, four = (
        accounting.true_flops_per_token(
            lm.at_depth(r).model,
            lm.depth,
            recursion=preset("huginn", f"r={r},k=2", sampling="fixed").recursion,
        ).training
        for r in (2, 4)
    )
    free = sum(p * max(n - 2, 0) for n, p in enumerate(chances, 1))
    kept = sum(p * min(n, 2) for n, p in enumerate(chances, 1))
    core = (four - two) / 2
    assert whole.training == pytest.approx(two + core * (free + 3 * (kept - 2)))
