"""Plans of runs on devices that are not there, and the reader of compiled programs they are held
against.

The plan's figures are compared with compiled programs in tests/parallel/test_mesh.py.
"""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mor_jax.analysis.collective_plan import planned_collectives, total_bytes
from mor_jax.analysis.collectives import axes_of, read_collectives, summary
from mor_jax.analysis.inspection import with_vocabulary
from mor_jax.analysis.memory import parameter_bytes
from mor_jax.analysis.plan import FILL, overrides, plan, require_fit, suggest
from mor_jax.analysis.topologies import GIB, topology
from mor_jax.config import MeshConfig, from_dict, mesh_shape
from mor_jax.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def config(name, arg, **mesh):
    cfg, _ = with_vocabulary(
        from_dict(importlib.import_module(f"configs.{name}").get_config(arg).to_dict())
    )
    return dataclasses.replace(cfg, mesh=MeshConfig(**mesh)) if mesh else cfg


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("name", "arg"),
    [("mor", "1.7b,nr=3"), ("llama8b", "mor"), ("llama8b", "vanilla")],
    ids=["1.7b", "8b", "8b plain"],
)
@pytest.mark.parametrize("place", ["v5e-256", "v5e-256x4"])
def test_big_models_are_planned_without_allocating(name, arg, place):
    cfg, where = config(name, arg), topology(place)
    before = len(jax.live_arrays())
    found = suggest(cfg, where)
    assert len(jax.live_arrays()) == before
    assert found.fits and found.memory.total <= FILL * 15.75 * GIB
    assert sum(found.bytes_by_kind().values()) == pytest.approx(found.memory.total)
    data, fsdp, sequence, tensor = found.mesh
    assert cfg.model.width // fsdp >= 128 and not found.narrow  # shards fill a TPU's register
    assert data * fsdp * sequence * tensor == where.devices == found.topology.devices
    assert data % where.slices == 0 and found.config.mesh.slices == where.slices
    # State is sharded: no device holds more than its part of it, the small whole arrays aside.
    whole = parameter_bytes(cfg, mesh_shape(MeshConfig(), 1))
    assert found.memory.weights <= whole / (fsdp * tensor) + 2**22
    # Between slices travel gradients alone.
    across = [p for p in found.collectives if p.dcn]
    assert {p.kind for p in across} <= {"all-reduce"} and (where.slices > 1) == bool(across)
    assert all("data" in p.axes for p in across) and (found.dcn_s > 0) == bool(across)


def test_the_flags_of_a_plan_give_that_plan():
    found = suggest(config("mor", "1.7b,nr=3"), topology("v5e-256"))
    done = command(
        "configs/mor.py:1.7b,nr=3", "--topology=v5e-256", "--json", *overrides(found).split()
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fits"] and report["bytes"]["total"] == pytest.approx(found.memory.total)
    assert report["mesh"] == found.mesh._asdict() | {"slices": 1} and report["flags"] == overrides(
        found
    )


def test_what_does_not_fit_is_refused_with_the_numbers_and_what_would():
    cfg = config("mor", "1.7b,nr=3", data=8)
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, accum=1))
    with pytest.raises(
        ConfigError, match=r"does not fit v5e-8: each device needs .*GiB and has 14\.5"
    ) as e:
        require_fit(plan(cfg, topology("v5e-8")))
    assert "optimiser" in str(e.value) and "This fits: --config.mesh." in str(e.value)
    assert suggest(config("llama8b", "vanilla"), topology("v5e-8")) is None
    done = command("configs/llama8b.py:vanilla", "--topology=v5e-8", "--suggest")
    assert done.returncode == 2 and done.stderr.startswith("error: vanilla-8b does not fit v5e-8")


def test_attention_is_that_of_the_devices_or_refused():
    cfg = config("mor", "360m,nr=3", data=1, fsdp=8)

    def of(impl):
        return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, attention=impl))

    def chosen(place):
        return plan(of("auto"), topology(place)).config.model.attention

    assert [chosen(p) for p in ("v5e-8", "h100x8", "cpux8")] == ["splash", "blocked", "blocked"]
    for search in (plan, suggest):
        with pytest.raises(
            ConfigError,
            match=r"'splash' runs on TPUs, and this is a GPU\. Use 'auto'.*here 'blocked'",
        ):
            search(of("splash"), topology("h100x8"))

    # The kernel keeps no probabilities: a block that is being differentiated needs less.
    def memory(impl):
        return plan(of(impl), topology("v5e-8")).memory

    assert memory("splash").working < memory("blocked").working


def test_a_mesh_that_does_not_divide_is_refused_before_it_is_planned():
    done = command("configs/mor.py:1.7b,nr=3", "--topology=v5e-256")
    assert done.returncode == 2 and "64 rows a micro-batch cannot be divided" in done.stderr


def command(*arguments):
    line = [sys.executable, "-m", "launch.plan", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)


def test_each_axis_cuts_what_it_should():
    cfg = config("mor", "360m,nr=3")
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, accum=1))

    def at(**mesh):
        return plan(dataclasses.replace(cfg, mesh=MeshConfig(**mesh)), topology("cpux8"))

    whole, fsdp, long = at(data=8), at(data=1, fsdp=8), at(data=4, sequence=2)
    assert fsdp.memory.weights == pytest.approx(whole.memory.weights / 8, rel=0.02)
    assert fsdp.memory.saved == whole.memory.saved  # the rows of a device are the same
    assert long.memory.saved == whole.memory.saved  # twice the rows of half the length
    assert long.memory.weights == whole.memory.weights

    def kinds(p):
        return {c.kind for c in p.collectives}

    assert kinds(whole) == {"all-reduce"} and kinds(fsdp) == {
        "all-gather",
        "reduce-scatter",
        "all-reduce",
    }

    # What FSDP scatters and gathers once is what data parallelism reduces, plus the second gather
    # of unshared blocks.
    def sent(p, *kinds):
        return total_bytes(p.collectives, *kinds)

    assert sent(fsdp, "reduce-scatter") == pytest.approx(sent(whole) / 2, rel=0.01)
    once = total_bytes(planned_collectives(fsdp.config, devices=8, regather=False), "all-gather")
    # Weights travel in bfloat16, sums of gradients in float32; the table in float32 both ways.
    table = sum(c.bytes for c in fsdp.collectives if c.what == "embedding")
    assert 2 * (once - table) == pytest.approx(sent(fsdp, "reduce-scatter") - table, rel=0.01)


def test_the_tied_core_is_gathered_once_however_often_it_is_used():
    shared, plain = (config("llama8b", kind, data=1, fsdp=8) for kind in ("recursive", "vanilla"))

    def gathers(cfg):
        return {
            p.what: p.count for p in planned_collectives(cfg, devices=8) if p.kind == "all-gather"
        }

    assert gathers(shared) == {"core": 4 * 10, "blocks used once": 2 * 4 * 2, "embedding": 1}
    assert gathers(plain) == {"blocks used once": 2 * 4 * 32, "embedding": 1}


# ---------------------------------------------------------------- reading compiled programs

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %all-reduce.1 = f32[4,8]{1,0} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%add, metadata={op_name="in loop"}
  ROOT %t = (s32[], f32[4,8]) tuple(%i, %all-reduce.1)
}

%cond (p: (s32[], f32[4,8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%small (p: f32[2]) -> f32[2] {
  ROOT %ar = f32[2]{0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

%large (p: f32[2]) -> f32[2] {
  %ag = f32[64]{0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %r = f32[2]{0} slice(%ag), slice={[0:2]}
}

ENTRY %main (p0: f32[4,8]) -> f32[4,8] {
  %w = (s32[], f32[4,8]) while(%t0), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %c = f32[2]{0} conditional(%which, %q, %q), branch_computations={%small, %large}
  %ags = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%h), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %agd = bf16[8,4]{1,0} all-gather-done(%ags)
  %rs = f32[4]{0} reduce-scatter(%g), replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}, to_apply=%add
  %cp = f32[4]{0} collective-permute(%rs), source_target_pairs={{0,1},{1,2},{2,3}}
  %two = (f32[4]{0}, s32[]) all-reduce(%rs, %n), replica_groups=mesh['a'=8], device_ids=([2,4]T(1,0)) {'a':(1)4}, to_apply=%add
  %alone = f32[4]{0} all-reduce(%rs), replica_groups={{0},{1}}, to_apply=%add
  ROOT %o = f32[4,8]{1,0} get-tuple-element(%w), index=1
}
"""


def test_collectives_are_read_off_a_program():
    found = read_collectives(PROGRAM, {"data": 2, "fsdp": 2, "tensor": 2})
    assert [(c.kind, c.times, c.in_loop) for c in found] == [
        ("all-reduce", 3, True),
        ("all-gather", 1, False),
        ("all-gather", 1, False),
        ("reduce-scatter", 1, False),
        ("collective-permute", 1, False),
        ("all-reduce", 1, False),
    ]
    loop, branch, gather, scatter, permute, two = found
    assert loop.axes == ("tensor",) and loop.payload == 4 * 8 * 4 and loop.source == "in loop"
    assert loop.wire_bytes == 3 * 2 * (1 / 2) * 128
    # the branch that sends more
    assert branch.shapes == ("f32[64]",) and branch.axes == ("data", "fsdp", "tensor")
    assert (
        gather.payload == 8 * 4 * 2
        and gather.groups[0] == (0, 2, 4, 6)
        and gather.axes == ("data", "fsdp")
    )
    assert scatter.payload == 4 * 16 and scatter.axes == ("fsdp", "tensor")  # what goes in
    assert permute.wire_bytes == 16
    # four of 0, 4, 1, 5, 2, 6, 3, 7, two apart
    assert two.payload == 20 and two.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert summary(found)["all-reduce over tensor"] == {"count": 3, "bytes": 384.0}


OVERLAPPED = """HloModule jit_step, is_scheduled=true

%cond.clone (p: (s32[], f32[4])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(4)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %constant.7), direction=LT, metadata={op_name="while/cond/lt"}
}

%begin (p: bf16[2,8]) -> bf16[16,8] {
  %ag.1 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, frontend_attributes={chain_id="0"}
  ROOT %start = (bf16[2,8], bf16[16,8]) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p: bf16[2,8]) -> f32[4] {
  %ag.2 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, frontend_attributes={chain_id="0"}
}

%other (p: bf16[2,8]) -> f32[4] {
  %ag.3 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, frontend_attributes={chain_id="1"}
}

%body.sunk (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %f1 = bf16[16,8] fusion(%p), kind=kCustom, calls=%begin
  %f2 = f32[4] fusion(%f1), kind=kCustom, calls=%beside
  %f3 = f32[4] fusion(%f1), kind=kCustom, calls=%other
}

ENTRY %main (p0: f32[4]) -> f32[4] {
  %k = f32[4] custom-call(%p0), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
 "xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(step)/kernel"}
  %w = (s32[], f32[4]) while(%t), condition=%cond.clone, body=%body.sunk, metadata={op_name="jit(step)/while"}
}
"""


def test_pieces_of_an_overlapped_gather_are_one_and_a_counted_loop_is_multiplied():
    """As XLA for TPUs writes them: no trip count beside the loop, a gather in every fusion it runs
    beside, and what a kernel says of itself over several lines."""
    found = read_collectives(OVERLAPPED, {"fsdp": 8})
    assert [(c.kind, c.chain, c.times, c.in_loop) for c in found] == [
        ("all-gather", "0", 4, True),
        ("all-gather", "1", 4, True),
    ]
    assert found[0].wire_bytes == 4 * 7 / 8 * 16 * 8 * 2


def test_axes_follow_from_who_talks_to_whom():
    mesh = {"data": 2, "fsdp": 1, "tensor": 4}
    assert axes_of([(0, 4), (1, 5)], mesh) == ("data",)
    assert axes_of([(0, 1, 2, 3)], mesh) == ("tensor",)
    assert axes_of([tuple(range(8))], mesh) == ("data", "tensor")


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_collectives("stablehlo")
