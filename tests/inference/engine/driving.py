"""Runs requests through a `Device` the way a scheduler would, one tick behind, and small models to
do it with."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from small import random_params, small_lm, spread_routers

from mor_jax.inference.engine.device import Device, EngineConfig, Lengths
from mor_jax.inference.engine.request import Drawing
from mor_jax.inference.engine.rows import host_row
from mor_jax.model.depth import DepthControl

GREEDY = Drawing(temperature=0.0)
CONTEXT = 64


class Job(NamedTuple):
    """A request, the lane it gets, and the tick before which it arrives."""

    prompt: list[int]
    new: int
    lane: int
    arrives: int = 0
    drawing: Drawing = GREEDY
    control: DepthControl | None = None
    logprobs: int | None = None


class Played(NamedTuple):
    """What came of a job."""

    tokens: list[int]
    depths: list[int]
    logprobs: list[float]
    prompt_depths: list[int]
    starved: bool


def build(kind: str, m: int | None, **config) -> Device:
    """A warm device over a small model of this kind."""
    lm = small_lm(kind, context=CONTEXT)
    params = spread_routers(random_params(lm))
    sizes = {"lanes": 4, "chunks": (16,), "full_lanes": 4, "max_logprobs": 3} | config
    device = Device(lm, params, EngineConfig(boundary_every=m, **sizes))
    device.params = params
    device.warm_up()
    return device


def fill(device: Device, job: Job) -> list[int]:
    """Open the lane, put the prompt into it but its last token, and start it; depths of what was
    prefilled."""
    device.open(job.lane, job.control)
    tickets, at = [], 0
    for size in device.cut(len(job.prompt) - 1):
        tickets.append(device.prefill(job.lane, job.prompt[at : at + size]))
        at += size
    row = host_row(job.drawing, device.draw_config, prompt=job.prompt, logprobs=job.logprobs)
    device.start(job.lane, job.prompt[-1], row, job.new)
    done = [t.fetch() for t in tickets]
    assert all(d.fits for d in done)
    return [depth for d in done for depth in d.depth_T.tolist()]


def play(device: Device, jobs: list[Job], most: int = 400) -> list[Played]:
    """All jobs to their end; a starved lane is stopped."""
    out = [Played([], [], [], [], False) for _ in jobs]
    waiting, running, before = dict(enumerate(jobs)), {}, None
    for now in range(most):
        for i, job in list(waiting.items()):
            if job.arrives <= now and job.lane not in running:
                out[i].prompt_depths.extend(fill(device, job))
                running[job.lane] = i
                del waiting[i]
        ticket = device.tick()
        for tick in before.fetch() if before else []:
            for lane, i in list(running.items()):
                if tick.token_N[lane] >= 0:
                    out[i].tokens.append(int(tick.token_N[lane]))
                    out[i].depths.append(int(tick.depth_N[lane]))
                    out[i].logprobs.append(float(tick.logprob_N[lane]))
                if tick.ended_N[lane] or tick.starved_N[lane]:
                    out[i] = out[i]._replace(starved=bool(tick.starved_N[lane]))
                    device.stop(lane)
                    del running[lane]
        before = ticket
        if not waiting and not running:
            before.fetch()
            return out
    raise AssertionError(f"not done after {most} ticks: {waiting}, {running}")


@functools.partial(jax.jit, static_argnums=0)
def _causal(lm, params, tokens, control):
    full = lm.forward(params, tokens, mode="causal", control=control)
    return lm.logits(params, full.h_BxTxD), full.depth_BxT


def expected(
    device: Device, jobs: list[Job], played: list[Played], context: int = CONTEXT
) -> list[tuple[list[int], list[int]]]:
    """(greedy tokens, depths) by the full causal forward pass over what was played: each token the
    most likely one after those before it, and the depth of the token it was drawn from."""
    lm = device.lm
    rows = np.zeros((len(jobs), context), np.int32)
    for row, job, done in zip(rows, jobs, played, strict=True):
        sequence = (job.prompt + done.tokens)[:context]
        row[: len(sequence)] = sequence
    neutral = DepthControl.neutral(1, lm.program.recursions)
    control = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves), *(job.control or neutral for job in jobs)
    )

    logits, depth = (np.asarray(x) for x in _causal(lm, device.params, jnp.asarray(rows), control))
    out = []
    for b, (job, done) in enumerate(zip(jobs, played, strict=True)):
        at = len(job.prompt) - 1
        span = slice(at, at + len(done.tokens))
        np.testing.assert_array_equal(done.prompt_depths, depth[b, :at])
        out.append((logits[b, span].argmax(-1).tolist(), depth[b, span].tolist()))
    return out


def prompts(seed: int, *lengths: int) -> list[list[int]]:
    """Random prompts of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 64, n).tolist() for n in lengths]


__all__ = [
    "CONTEXT",
    "GREEDY",
    "Job",
    "Lengths",
    "Played",
    "build",
    "expected",
    "fill",
    "play",
    "prompts",
]
