"""Trains each kind on each mesh of eight simulated devices; prints what happened as JSON. Run by
test_mesh.py.

Eight devices have to be asked for before JAX starts, hence a process of its own.
"""

import dataclasses
import json
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from kinds import ALL_FEATURES
from small import random_params, small_lm

from mor_jax.analysis.collectives import read_collectives
from mor_jax.config import Config, MeshConfig, OptimConfig, RecursionConfig, TrainConfig
from mor_jax.parallel import rows as rows_module
from mor_jax.parallel.mesh import make_mesh
from mor_jax.parallel.rows import gather_weight
from mor_jax.parallel.rules import Rules
from mor_jax.train.distill import Teacher
from mor_jax.train.schedule import optimizer_of
from mor_jax.train.state import abstract_state, create_state
from mor_jax.train.step import gradients, make_train_step

STEPS, DIFFERENT, ROWS, LENGTH, VOCAB = 20, 5, 8, 26, 64
SHAPE = dict(
    width=32,
    heads=4,
    kv_heads=4,
    mlp_width=64,
    context=LENGTH,
    vocab_size=VOCAB,
    init_std=0.1,
    loss_chunk=7,
)
ROUTED = dict(layers=3, recursions=2, sharing="cycle", prelude=1)
KINDS = {"vanilla": dict(layers=1), "mor": ROUTED, "token": ROUTED | dict(layers=2, prelude=0)}
# Everything a run can have at once: a second router with its own optimiser, relaxed recursions; and
# drawn depths.
RELAXED = ROUTED | dict(norms="own", lora_rank=2, recursion_encoding=True)
# And all features of the block at once.
MORE = {
    "aux": ("mor", RELAXED),
    "random": ("random_shared", ROUTED),
    "features": ("mor", ROUTED | ALL_FEATURES),
    "drawn": ("recursive", ROUTED),
    "gate": ("recursive", ROUTED | dict(coda=1, layers=4)),
}
# What a step reads and how it is trained: rows of several depths with a truncated gradient, as in
# Huginn and Parcae; a loss and a gate after each step, as in Ouro and PonderNet.
KNOBS = {
    "drawn": RecursionConfig(
        state="random",
        injection="concat",
        conditioning="time",
        sampling="poisson",
        sampling_scope="sequence",
        gradient_steps=2,
    ),
    "gate": RecursionConfig(injection="diagonal", loop_norm=True, loss="gate"),
}
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 2, 2, 2)]  # data, fsdp, tensor, sequence
ACCUMULATED = {"vanilla": (1, 4, 1, 2), "mor": (2, 2, 2)}  # in two micro-batches, of four rows each
SMALL = 768  # bytes, see test_mesh.py
# Long enough for arrays to matter more than the compiler's odds and ends, wide enough for weights
# to matter at all.
PLANNED = dict(
    width=256, heads=4, kv_heads=4, mlp_width=704, context=64, vocab_size=1024, loss_chunk=32
)


def packed_batches() -> list[dict]:
    """Rows of documents of random length, with a padded end; the same few again and again, so that
    there is something to learn."""
    rng, batches = np.random.default_rng(0), []
    for _ in range(DIFFERENT):
        seg = np.zeros((ROWS, LENGTH), np.int32)
        for row in seg:
            cuts = np.sort(rng.choice(np.arange(1, LENGTH), 3, replace=False))
            for i, (a, b) in enumerate(zip([0, *cuts], cuts, strict=False)):
                row[a:b] = i + 1
        batches.append(
            {
                "tokens": rng.integers(0, VOCAB, seg.shape).astype(np.int32) * (seg > 0),
                "segment_ids": seg,
            }
        )
    return [batches[i % DIFFERENT] for i in range(STEPS)]


def model(kind: str, **shape):
    name, own = MORE.get(kind) or (kind, KINDS[kind])
    lm = small_lm(name, **{**SHAPE, **own, **shape})
    lm = dataclasses.replace(lm, recursion=KNOBS.get(kind, lm.recursion))
    if kind == "aux":
        return dataclasses.replace(
            lm, depth=dataclasses.replace(lm.depth, inference="auxiliary", aux_loss_weight=0.1)
        )
    return (
        dataclasses.replace(lm, depth=dataclasses.replace(lm.depth, bias_rate=0.01))
        if kind == "token"
        else lm
    )


def written_gathers(jaxpr, times: int, found: dict[str, int]) -> None:
    """Adds up the gathers that a traced program asks for, of `SMALL` bytes or more, by mesh
    axes."""
    for eqn in jaxpr.eqns:
        if (
            eqn.primitive.name == "all_gather"
            and eqn.outvars[0].aval.size * eqn.outvars[0].aval.dtype.itemsize >= SMALL
        ):
            names = eqn.params["axis_name"]
            axes = "+".join([names] if isinstance(names, str) else names)
            found[axes] = found.get(axes, 0) + times
        inner = [
            j for v in eqn.params.values() for j in (v if isinstance(v, (tuple, list)) else [v])
        ]
        inner = [getattr(j, "jaxpr", j) for j in inner if hasattr(getattr(j, "jaxpr", j), "eqns")]
        # one branch runs: of several row sizes, all ask for the same gathers
        if eqn.primitive.name == "cond":
            inner = inner[-1:]
        for j in inner:
            written_gathers(
                j, times * eqn.params["length"] if eqn.primitive.name == "scan" else times, found
            )


def train(kind: str, shape: tuple[int, ...], buckets: int, accum: int = 1) -> tuple[dict, list]:
    lm = model(kind)
    if lm.depth.policy == "token_choice":
        lm = dataclasses.replace(lm, depth=dataclasses.replace(lm.depth, buckets=buckets))
    tx = optimizer_of(Config(depth=lm.depth, optim=OptimConfig(peak_lr=1e-2)), STEPS)
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)])
    with jax.set_mesh(mesh):
        state = create_state(lm, tx, mesh, seed=0)
        rows = NamedSharding(mesh, lm.rules.spec(("batch", "time")))
        placed = [{k: jax.device_put(v, rows) for k, v in b.items()} for b in packed_batches()]
        step = jax.jit(make_train_step(lm, tx, accum), donate_argnums=0).trace(state, placed[0])
        gathers: dict[str, int] = {}
        written_gathers(step.jaxpr.jaxpr, 1, gathers)
        step = step.lower().compile()
        on = sorted({len(x.sharding.device_set) for x in jax.tree.leaves(state)})

        def kept(tree):
            return sum(
                x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree) if x.ndim > 1
            )

        local = {"params": kept(state.params), "opt_state": kept(state.opt_state)}
        losses = []
        for batch in placed:
            state, metrics = step(state, batch)
            losses.append(
                {
                    k: float(metrics[k])
                    for k in ("loss", "lm_loss", "router_loss", "grad_norm", "mean_depth")
                }
            )
    traffic = [
        dict(
            kind=c.kind,
            axes=c.axes,
            payload=c.payload,
            bytes=c.wire_bytes,
            times=c.times,
            loop=c.in_loop,
            of=c.shapes,
        )
        for c in read_collectives(step.as_text(), dict(mesh.shape))
    ]
    # The optimiser's first moments are sums of gradients: what is equal in them was equal in every
    # step's gradient.
    return dict(
        losses=losses, devices=on, local=local, traffic=traffic, written=gathers
    ), jax.tree.map(np.asarray, state)


def differences(state, one, survey: bool) -> list[float]:
    """Largest difference of each leaf. The survey counts scores above probes: one that is on a
    probe but for rounding counts here or there."""
    return [
        float(np.max(np.abs(a.astype(np.float64) - b), initial=0.0))
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(one), strict=True
        )
        if ("survey" in jax.tree_util.keystr(path)) == survey
    ]


def gradient_of_a_gather() -> dict:
    """Of a float32 weight that travels as bfloat16, whose eight devices send cotangents 1 + i /
    128: exact in bfloat16, as their sum 8 + 28 / 128 is not."""
    mesh, rules = make_mesh(MeshConfig(1, 8, 1), jax.devices()), Rules()

    def cotangent(i, like):
        return (1 + i.astype(jnp.float32) / 128).astype(like.dtype) * jnp.ones_like(like)

    def island(w):
        whole, pull = jax.vjp(lambda w: gather_weight(rules, w, ("embed", None), "bfloat16"), w)
        return pull(cotangent(jax.lax.axis_index("fsdp"), whole))[0]

    with jax.set_mesh(mesh):
        cut = PartitionSpec("fsdp")
        run = jax.shard_map(
            island, in_specs=cut, out_specs=cut, axis_names={"fsdp"}, check_vma=False
        )
        sums = jax.jit(run)(jnp.zeros((16, 4), jnp.float32))
    return {"dtype": sums.dtype.name, "values": sorted(set(np.asarray(sums).ravel().tolist()))}


def scatter_in_parts() -> list[float]:
    """Largest difference of a scatter in two parts from one in one part, over four and over eight
    devices."""
    found, x = [], np.random.default_rng(0).normal(size=(8, 3, 16)).astype(np.float32)
    for n in (4, 8):
        mesh = make_mesh(MeshConfig(8 // n, n, 1), jax.devices())

        def at(parts, mesh=mesh):
            return jax.jit(
                jax.shard_map(
                    lambda x: rows_module._scatter(x[0], "fsdp", 1) + 0 * parts,
                    mesh=mesh,
                    check_vma=False,
                    in_specs=PartitionSpec(("data", "fsdp")),
                    out_specs=PartitionSpec("data", "fsdp"),
                )
            )(x)

        one = at(1)
        with (
            mock.patch.object(rows_module, "ONE_PART", 2),
            mock.patch.object(rows_module, "backend", lambda: "tpu"),
        ):
            found.append(float(jnp.max(jnp.abs(at(2) - one))))
    return found


def taught() -> dict[str, float]:
    """A gradient with loss weights and a teacher of another shape, on eight devices less that on
    one: the largest difference, beside the largest entry."""
    lm = model("mor")
    teacher = Teacher(small_lm("vanilla", **SHAPE, layers=1), None, 0.5, 2.0)
    rng, batch = np.random.default_rng(1), packed_batches()[0]
    batch |= {"weights": rng.integers(0, 2, (ROWS, LENGTH)).astype(np.float32)}
    params = [random_params(lm), random_params(teacher.lm, 1)]

    def run(shape: tuple[int, ...]):
        mesh = make_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)])
        with jax.set_mesh(mesh):
            rows = NamedSharding(mesh, lm.rules.spec(("batch", "time")))
            axes = (lm.logical_axes(), teacher.lm.logical_axes())
            placed = [
                jax.device_put(p, lm.rules.shardings(mesh, a))
                for p, a in zip(params, axes, strict=True)
            ]
            step = jax.jit(
                lambda p, t, b: gradients(lm, p, b, 2, objective=teacher._replace(params=t))
            )
            grads, aux = step(*placed, {k: jax.device_put(v, rows) for k, v in batch.items()})
        return jax.tree.map(
            np.asarray, (grads, {k: aux[k] for k in ("loss", "lm_loss", "distill_loss")})
        )

    one, many = run((1, 1, 1)), run((2, 2, 2))
    differ = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b), initial=0.0)), one, many)
    largest = max(float(np.max(np.abs(x), initial=0.0)) for x in jax.tree.leaves(one))
    return {"differs": max(jax.tree.leaves(differ)), "largest": largest}


def planned(kind: str, shape: tuple[int, ...]) -> dict:
    """A step that is compiled and not run: what the compiler says it needs of each device."""
    lm = model(kind, **PLANNED)
    cfg = Config(
        "planned",
        lm.model,
        lm.depth,
        train=TrainConfig(steps=1, batch_size=ROWS),
        mesh=MeshConfig(*shape),
    )
    mesh = make_mesh(cfg.mesh)
    tx = optimizer_of(cfg, STEPS)
    rows = NamedSharding(mesh, lm.rules.spec(("batch", "time")))
    batch = {
        k: jax.ShapeDtypeStruct((ROWS, lm.model.context), jnp.int32, sharding=rows)
        for k in ("tokens", "segment_ids")
    }
    state = abstract_state(lm, tx, mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(make_train_step(lm, tx), donate_argnums=0).lower(state, batch).compile()
    m = compiled.memory_analysis()
    collectives = read_collectives(compiled.as_text(), dict(mesh.shape))
    return {
        "config": cfg.to_dict(),
        "state": m.argument_size_in_bytes,
        "total": m.argument_size_in_bytes + m.temp_size_in_bytes,
        "traffic": [dict(kind=c.kind, axes=c.axes, bytes=c.wire_bytes) for c in collectives],
    }


def main() -> None:
    found = {}
    for kind in sys.argv[1:] or (*KINDS, *MORE):
        found[f"{kind} one"], one = train(kind, (1, 1, 1), 2)
        for shape in MESHES if kind in KINDS else MESHES[-1:]:
            # Any choice of compiled sizes gives the same numbers, so only one mesh pays for
            # compiling two.
            here, state = train(kind, shape, 2 if shape == (2, 2, 2) else 1)
            here["state_differs"] = max(differences(state, one, survey=False))
            here["survey_differs"] = max(differences(state, one, survey=True), default=0.0)
            found[f"{kind} {'x'.join(map(str, shape))}"] = here
            print(kind, shape, file=sys.stderr, flush=True)
        if kind in ACCUMULATED:
            here, state = train(kind, ACCUMULATED[kind], 1, accum=2)
            here["state_differs"] = max(differences(state, one, survey=False))
            here["survey_differs"] = max(differences(state, one, survey=True), default=0.0)
            found[f"{kind} accumulated"] = here
    found["gradient"], found["parts"] = gradient_of_a_gather(), scatter_in_parts()
    found["taught"] = taught()
    found["planned"] = [planned("mor", (1, 8, 1)), planned("mor", (2, 2, 2))]
    print("RESULT" + json.dumps(found))


if __name__ == "__main__":
    main()
