"""Every depth policy runs in the engine: its greedy tokens and depths are those of the full causal
forward pass. Policies whose tokens halt or come back are refused in one message."""

import pytest
from driving import Job, expected, play, prompts
from policies import MODEL, T, small

from mor_jax.config import DepthConfig, depth_policies
from mor_jax.errors import UserError
from mor_jax.inference.engine.device import Device, EngineConfig


def in_the_engine(depth, m):
    lm, params = small(depth)
    device = Device(lm, params, EngineConfig(lanes=3, chunks=(8,), boundary_every=m, full_lanes=3))
    device.params = params
    device.warm_up()
    lengths, lanes, arrivals = (5, 12, 1, 9), (2, 0, 1, 2), (0, 0, 2, 3)
    news = (6, 9, 12, 8)
    jobs = [
        Job(p, *rest) for p, *rest in zip(prompts(0, *lengths), news, lanes, arrivals, strict=True)
    ]
    played = play(device, jobs)
    for job, done, (tokens, depths) in zip(
        jobs, played, expected(device, jobs, played, T), strict=True
    ):
        assert done.tokens == tokens and len(tokens) == job.new
        assert done.depths == depths


REFUSED = ("act", "mod")


@pytest.mark.parametrize("policy", sorted(set(depth_policies()) - set(REFUSED)))
def test_greedy_tokens_and_depths_are_those_of_the_full_forward_pass(policy):
    in_the_engine(DepthConfig(policy), MODEL.recursions - 1)


@pytest.mark.parametrize("policy", REFUSED)
def test_tokens_that_halt_or_come_back_are_refused(policy):
    with pytest.raises(UserError, match="PlainService"):
        in_the_engine(DepthConfig(policy), MODEL.recursions - 1)
