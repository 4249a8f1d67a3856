"""What bounds a program: bytes read off compiled programs, and planned ones."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from test_plan import config

from mor_jax.analysis.hbm import traffic
from mor_jax.analysis.peaks import peak_flops
from mor_jax.analysis.plan import plan
from mor_jax.analysis.roofline import SHOWN, Cost, bound, costs, training_bytes
from mor_jax.analysis.topologies import CHIPS, topology


def moved(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return traffic(jax.jit(function).lower(*arrays).compile().as_text())


def test_a_product_reads_both_factors_and_writes_the_result():
    assert moved(jnp.matmul, (256, 128), (128, 64)) == 4 * (256 * 128 + 128 * 64 + 256 * 64)


def test_a_loop_counts_each_turn_and_of_stacked_weights_its_slice():
    def run(x, w_LxDxD):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w_LxDxD)[0]

    four, eight = (moved(run, (8, 256), (layers, 256, 256)) for layers in (4, 8))
    weights = 4 * 256 * 256
    # a turn reads its slice, perhaps by way of a copy of it; reading the stack would be 8 of them
    assert 4 * weights <= eight - four <= 4 * 3.5 * weights


def test_of_branches_the_one_that_moves_the_most_counts():
    def run(which, x):
        return jax.lax.cond(jnp.sum(which) > 0, lambda x: x @ x @ x, lambda x: x + 1, x)

    # two products against one sum, which moves two arrays
    assert moved(run, (1,), (512, 512)) > 4 * 4 * 512**2


# As XLA for TPUs writes it: space 1 is vector memory, and a copy into it starts and ends.
TPU = """HloModule m

%fused (p0: f32[8,128], p1: s32[]) -> f32[1,128] {
  %p0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[1,128]{1,0:T(1,128)} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,128}
}

ENTRY %main (a: f32[8,128], i: s32[]) -> f32[1,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %near = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%start)
  %twice = f32[8,128]{1,0:T(8,128)S(1)} add(%near, %near)
  ROOT %out = f32[1,128]{1,0:T(1,128)} fusion(%a, %i), kind=kLoop, calls=%fused
}
"""


def test_vector_memory_is_not_counted_and_a_copy_into_it_is_read_once():
    copied, index, sliced = 4 * 8 * 128, 4, 2 * 4 * 128
    assert traffic(TPU) == copied + index + sliced


# ---------------------------------------------------------------- bounds


def test_the_bound_changes_where_the_intensity_is_that_of_the_chip():
    for name in SHOWN:
        ridge = peak_flops(CHIPS[name].kind, "bfloat16") / CHIPS[name].hbm
        above, below = (bound(Cost("x", f * ridge, 1.0), name, "bfloat16") for f in (1.01, 0.5))
        assert (above.by, below.by) == ("compute", "memory")
        assert above.mfu == 1.0 and below.mfu == pytest.approx(0.5)


def test_of_a_published_model_training_is_bound_by_compute_and_decoding_by_memory():
    cfg = config("mor", "1.7b,nr=3", data=1, fsdp=8)
    found = plan(cfg, topology("v5e-8"))
    step, prefill, tick = found.costs()
    assert [bound(c, "v5e", "bfloat16").by for c in (step, prefill, tick)] == [
        "compute",
        "compute",
        "memory",
    ]
    # more lanes read the same weights; keys and values of their own
    assert costs(cfg, devices=8, lanes=512)[2].intensity > tick.intensity
    # FLOPs of the step are those that MFU counts; a compiled step says its own bytes
    assert step.flops * 8 * 0.4 == pytest.approx(
        found.compute_s * 8 * peak_flops("TPU v5e", "bfloat16") * 0.4 * 0.4
    )
    measured = found.costs(compiled_bytes=1e9)[0]
    assert (measured.bytes, measured.source, step.source) == (1e9, "compiled", "plan")


def test_planned_bytes_follow_what_a_step_does():
    cfg = config("mor", "360m,nr=3", data=1, fsdp=8)

    def of(**model):
        return training_bytes(
            dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **model)), devices=8
        )

    plain = of(attention="splash")
    assert of(attention="splash", remat="none") < plain  # nothing is computed again
    assert of(attention="xla") > of(attention="blocked") > plain  # scores are written
    assert of(attention="splash", dtype="float32") > 1.5 * plain
