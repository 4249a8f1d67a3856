"""The device computes what the full causal forward pass computes, whatever else is in flight, and
copies nothing."""

import re

import jax
import numpy as np
import pytest
from driving import Job, build, expected, fill, play, prompts
from small import small_lm

from mor_jax.errors import UserError
from mor_jax.inference.dial import depth_control
from mor_jax.inference.engine import choose, logs
from mor_jax.inference.engine.device import Device, EngineConfig, Lengths
from mor_jax.inference.engine.request import Drawing
from mor_jax.inference.engine.rows import host_row
from mor_jax.inference.generate import Generation

SMALL = 100  # entries of a lane that is not a full one


@pytest.fixture(scope="module")
def mor():
    """Expert-choice, depth 0 included; one full lane, three smaller ones, logs of several
    segments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "FIRST", 48)
        device = build("mor", 1, full_lanes=1, entries=SMALL)
        assert [s.lanes for s in device.shape.core] == [4, 4, 1]
        yield device


def mixed_jobs(seed: int = 0) -> list[Job]:
    """Six requests in four lanes: prompts of one token and of several chunks, arrivals while others
    decode."""
    lengths, lanes, arrivals = (7, 34, 1, 16, 21, 3), (3, 1, 0, 2, 2, 3), (0, 0, 2, 5, 5, 0)
    news = (9, 14, 18, 7, 12, 10)
    return [
        Job(p, *rest)
        for p, *rest in zip(prompts(seed, *lengths), news, lanes, arrivals, strict=True)
    ]


def holds(device: Device, jobs: list[Job]) -> list:
    played = play(device, jobs)
    for job, done, (tokens, depths) in zip(
        jobs, played, expected(device, jobs, played), strict=True
    ):
        assert done.tokens == tokens and len(tokens) == job.new
        assert done.depths == depths
    return played


@pytest.mark.parametrize(
    "kind,m",
    # "sequence" is one recursion, as a plain Transformer is, and "token_hybrid" has no blocks at
    # its ends either.
    [
        ("sequence", 1),
        ("recursive", None),
        ("token_every", 2),
        ("mor_shared", 3),
        ("token_hybrid", 1),
    ],
)
def test_greedy_tokens_and_depths_are_those_of_the_full_forward_pass(kind, m):
    device = build(kind, m)
    if m is None:  # by the formula, from what was measured
        assert device.m == choose.best(device.lanes, device.shares, *device.times)
    holds(device, mixed_jobs())


def test_every_m_draws_the_same(mor):
    """m = 1 is depth-wise, m = R lock-step; and plain decoding agrees."""
    jobs = mixed_jobs()
    by_m = {1: holds(mor, jobs)}
    assert len({depth for done in by_m[1] for depth in done.depths}) == 4, (
        "depths 0..3 must all occur"
    )
    tick = mor._programs.tick
    try:
        for m in (2, 3):
            mor._programs.compile_tick(m, 1)
            by_m[m] = play(mor, jobs)
    finally:
        mor._programs.tick = tick
    assert by_m[1] == by_m[2] == by_m[3]
    plain = Generation(mor.lm, mor.params, [jobs[1].prompt], max_tokens=jobs[1].new)
    assert [int(g.token_B[0]) for g in plain] == by_m[1][1].tokens


def test_company_changes_no_bit(mor):
    """Alone, or in another lane among others that come and go: the same sampled tokens, the same
    bits of their log-probabilities."""
    job = Job(prompts(5, 20)[0], 16, 1, 0, Drawing(seed=11), None, 2)
    (alone,) = play(mor, [job])
    others = [
        j._replace(drawing=Drawing(seed=i, top_p=0.9))
        for i, j in enumerate(mixed_jobs(3))
        if j.lane != 3
    ]
    *_, company = play(mor, [*others, job._replace(lane=3, arrives=2)])
    assert company == alone and len(alone.tokens) == 16
    assert np.isfinite(alone.logprobs).all() and any(alone.logprobs)


def test_rows_of_a_prefix_go_on_as_if_they_had_been_prefilled(mor):
    """Bit for bit; whatever the lane did after they were saved."""
    long = prompts(9, 40)[0]
    job = Job(long, 12, 2, 0, Drawing(seed=3), None, 1)
    mor.open(2)
    first = mor.prefill(2, long[:16]).fetch().lengths
    second = mor.prefill(2, long[16:32]).fetch().lengths
    assert (first.tokens, second.tokens) == (16, 32)
    saved = [mor.save(2, Lengths(0, 0), first), mor.save(2, first, second)]
    mor.stop(2)
    (want,) = play(mor, [job])
    fill(mor, Job(prompts(1, 50)[0], 3, 1))  # something else in the lane before
    mor.stop(1)
    mor.open(1)
    for rows in saved:
        mor.load(1, rows)
    assert mor.lengths(1) == second
    mor.prefill(1, long[32:39]).fetch()
    mor.start(1, long[-1], host_row(job.drawing, mor.draw_config, prompt=long, logprobs=1), 12)
    got = []
    while len(got) < 12:
        (tick,) = mor.tick().fetch()
        got += [(int(tick.token_N[1]), float(tick.logprob_N[1]))] * int(tick.token_N[1] >= 0)
    assert got == list(zip(want.tokens, want.logprobs, strict=True))
    assert saved[0].nbytes > 0


def test_a_lane_without_room_stands_still_and_loses_nothing(mor):
    deep = depth_control(mor.lm, mor.params, 1, min_depth=3)
    prompt = prompts(2, 20)[0]
    job = Job(prompt, 30, 2, 0, control=deep)  # 3 x 49 entries do not fit into SMALL
    beside = Job(prompts(4, 12)[0], 25, 1)
    starved, fine = play(mor, [job, beside])
    assert starved.starved and not fine.starved
    # of which the last one found no room
    assert len(starved.tokens) == SMALL // 3 - len(prompt) + 1
    whole, again = play(mor, [job._replace(lane=0), beside._replace(lane=3)])
    assert whole.tokens[: len(starved.tokens)] == starved.tokens and len(whole.tokens) == 30
    assert again == fine
    for done, plain in zip((whole, fine), expected(mor, [job, beside], [whole, fine]), strict=True):
        assert plain == (done.tokens, done.depths)


def test_a_prompt_without_room_is_not_written(mor):
    deep = depth_control(mor.lm, mor.params, 1, min_depth=3)
    mor.open(3, deep)
    long = prompts(6, 48)[0]
    done = [ticket.fetch() for ticket in [mor.prefill(3, long[i : i + 16]) for i in (0, 16, 32)]]
    assert [d.fits for d in done] == [True, True, False]
    assert done[2].lengths == done[1].lengths == Lengths(32, 96)
    assert not mor.prefill(3, long[:1]).fetch().fits  # nothing is appended behind a gap
    mor.open(3)
    assert mor.prefill(3, long[:1]).fetch().fits
    mor.stop(3)


def test_nothing_compiles_after_warm_up_and_nothing_is_copied(mor):
    compiled = []

    def listen(event: str, *_, **__) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        before = mor._state
        mor.tick().fetch()
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before)), (
            "the old state was copied, not reused"
        )
        play(mor, [j._replace(drawing=Drawing(top_k=5, seed=1), logprobs=2) for j in mixed_jobs(7)])
        mor.open(0)
        at = mor.prefill(0, [1, 2, 3]).fetch().lengths
        mor.load(1, mor.save(0, Lengths(0, 0), at))
        mor.stop(0)
        mor.put_mask(0, np.zeros(2, np.uint32), 5)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled
    _, kv_heads, head_dim = mor.lm.model.dims
    arrays = {
        f"f32[{s.lanes},{kv_heads},{s.size},{head_dim}]" for s in (*mor.shape.core, *mor.shape.ends)
    }
    for program in (mor._programs.tick, mor._programs.prefills[16]):
        copied = set(re.findall(r"= (f32\[[\d,]+\])\S* copy\(", program.as_text()))
        assert not copied & arrays, "XLA copies a log"
        assert program.memory_analysis().alias_size_in_bytes > mor.memory_bytes


def test_sizes_that_cannot_be():
    lm = small_lm("mor")
    for config in (
        EngineConfig(lanes=0),
        EngineConfig(context=65),
        EngineConfig(chunks=()),
        EngineConfig(boundary_every=4),
        EngineConfig(full_lanes=0),
        EngineConfig(ticks_per_dispatch=0),
    ):
        with pytest.raises(UserError):
            Device(lm, {}, config)
