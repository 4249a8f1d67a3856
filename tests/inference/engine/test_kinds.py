"""The whole engine on the real device, for every kind of model and from depth-wise to lock-step: in
any schedule the tokens are those of plain decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CONTEXT, WISHES
from small import random_params, small_lm, spread_routers
from stepped import Stepped
from test_schedules import LENGTHS, NEW, TEXTS, arrivals, play_out, request_of

from mor_jax.inference.dial import depth_control
from mor_jax.inference.engine.device import Device, EngineConfig
from mor_jax.inference.engine.request import Token
from mor_jax.inference.generate import Generation
from mor_jax.model.depth import DepthControl

# Passes a tick; each m is a program more, each kind all of them. test_engine.py has expert-choice
# in its plainest form.
KINDS = {
    "vanilla": (1,),
    "recursive": (1, 3),
    "token": (1, 3),
    "mor_shared": (1, 3),
    "mor_relaxed": (1, 3),
    "random_shared": (1,),
}
met = dict.fromkeys(("preempted", "cached", "whole"), 0)


class Kind:
    """A small model, a device of it whose lanes are too small for what some requests need, and what
    plain decoding says to all prompts at once."""

    def __init__(self, name):
        # One block a step: compiling is what these tests take long for.
        self.lm = small_lm(
            name, context=CONTEXT, layers={"vanilla": 3, "random_shared": 3}.get(name, 5)
        )
        self.params = spread_routers(random_params(self.lm))
        self.device = Device(
            self.lm, self.params, EngineConfig(lanes=3, chunks=(8,), boundary_every=1, entries=40)
        )
        # so that lanes are outgrown
        self.device.expected_entries = lambda tokens, mean_depth=None: tokens // 2
        self.device.warm_up()
        self.ticks = {1: self.device._programs.tick}
        self.wishes = [wish for wish in WISHES if (wish.least or 0) <= self.lm.program.recursions]
        asked = [(text[:n], wish) for text in TEXTS for n in LENGTHS for wish in self.wishes]
        control = jax.tree.map(
            lambda *rows: jnp.concatenate(rows), *(self.control(wish) for _, wish in asked)
        )
        plain = Generation(
            self.lm, self.params, [p for p, _ in asked], max_tokens=NEW, control=control
        )
        drawn_BxN = np.stack([g.token_B for g in plain], axis=1)
        logprobs = self.logprobs([prompt for prompt, _ in asked], drawn_BxN, control)
        self.plain = dict(zip(asked, zip(drawn_BxN.tolist(), logprobs, strict=True), strict=True))

    def logprobs(self, prompts, drawn_BxN, control):
        """Of the drawn tokens, by the full causal forward pass."""
        rows = np.zeros((len(prompts), CONTEXT), np.int32)
        for row, prompt, drawn in zip(rows, prompts, drawn_BxN, strict=True):
            row[: len(prompt) + NEW] = (*prompt, *drawn)
        run = jax.jit(
            lambda params, tokens, control: self.lm.apply(
                params, tokens, mode="causal", control=control
            )
        )
        all_BxTxV = np.asarray(jax.nn.log_softmax(run(self.params, jnp.asarray(rows), control)))
        return [
            of_row[len(prompt) - 1 + np.arange(NEW), drawn]
            for of_row, prompt, drawn in zip(all_BxTxV, prompts, drawn_BxN, strict=True)
        ]

    def control(self, wish):
        """Under fixed depths only the neutral one means something."""
        if not self.lm.depth.routed:
            return DepthControl.neutral(1, self.lm.program.recursions)
        return depth_control(self.lm, self.params, 1, min_depth=wish.least, max_depth=wish.most)

    def set_passes(self, m):
        if m not in self.ticks:
            self.device._programs.compile_tick(m, 1)
            self.ticks[m] = self.device._programs.tick
        self.device._programs.tick = self.ticks[m]


kind_of = functools.cache(Kind)


def play(kind, schedule, **config):
    service = Stepped(kind.device, control_of=kind.control, **config)
    arriving = []
    for a in schedule:
        a = a | {"seed": None, "wish": a["wish"] if a["wish"] in kind.wishes else WISHES[0]}
        arriving.append(a | {"request": dataclasses.replace(request_of(a), logprobs=0)})
    for a, heard in play_out(service, arriving):
        request = a["request"]
        (want, logprobs), count = kind.plain[request.prompt, request.depth], len(heard.tokens)
        assert list(heard.tokens) == want[:count]
        # Of small models greedy tokens alone do not show what a gate of 0.1 lets through.
        np.testing.assert_allclose(
            [e.logprob for e in heard.events if isinstance(e, Token)], logprobs[:count], atol=1e-4
        )
        assert count == request.max_tokens or heard.end.reason != "length"
        met["preempted"] += heard.end.preempted
        met["cached"] += heard.end.cached_tokens
        met["whole"] += heard.end.reason == "length"


@pytest.mark.parametrize(
    ("name", "m"), [(name, m) for name, passes in KINDS.items() for m in passes]
)
def test_tokens_are_those_of_plain_decoding_in_any_schedule(name, m):
    kind = kind_of(name)
    kind.set_passes(m)

    @settings(max_examples=6)
    @given(
        st.sampled_from([4, 256]),
        st.sampled_from([0, None]),
        st.lists(arrivals, min_size=4, max_size=8),
    )
    def any_schedule(round_tokens, prefix_bytes, schedule):
        play(kind, schedule, round_tokens=round_tokens, prefix_bytes=prefix_bytes, hold_tokens=8)

    met.update(dict.fromkeys(met, 0))
    any_schedule()
    assert all(met.values()), f"the schedules met none of some of these: {met}"
