"""Whether a server fits is said before anything is allocated: the bytes are those of the arrays
that are then made, and what is advised fits."""

import dataclasses
import re

import jax
import pytest
from small import random_params, small_lm

from mor_jax.errors import UserError
from mor_jax.inference.engine.device import Device, EngineConfig
from mor_jax.inference.engine.fit import most_lanes, require_fit, serving_memory

ENGINE = EngineConfig(lanes=4, chunks=(16,), full_lanes=2, max_logprobs=3)


@pytest.mark.parametrize("weights", ["compute", "int8"])
@pytest.mark.parametrize("kind", ["mor", "mor_shared", "vanilla"])
def test_planned_bytes_are_those_of_the_arrays(kind, weights):
    lm = small_lm(kind)
    config = dataclasses.replace(ENGINE, weights=weights)
    device = Device(lm, random_params(lm), config)
    planned = serving_memory(lm, config, shares=tuple(device.shares))
    state = device._state
    logs = sum(x.nbytes for x in jax.tree.leaves((state.prelude, state.core, state.coda)))
    assert planned.weights == sum(x.nbytes for x in jax.tree.leaves(device.weights))
    assert planned.logs == logs == device.memory_bytes
    rest = sum(x.nbytes for x in jax.tree.leaves(state)) - logs
    assert planned.rows == rest
    assert planned.prefix == logs


def test_a_part_of_everything_large():
    lm = small_lm("mor", kv_heads=4)
    one, four = (serving_memory(lm, ENGINE, n) for n in (1, 4))
    assert four.logs == one.logs / 4 and four.weights < 0.3 * one.weights
    assert four.rows == one.rows


def test_the_most_lanes_fit_and_one_more_does_not():
    lm = small_lm("mor")
    room = serving_memory(lm, ENGINE).total + 10_000
    lanes = most_lanes(lm, ENGINE, 1, room)

    def total(lanes):
        return serving_memory(lm, dataclasses.replace(ENGINE, lanes=lanes)).total

    assert total(lanes) <= room < total(lanes + 1)
    assert most_lanes(lm, ENGINE, 1, 1000) == 0


def test_what_does_not_fit_is_refused_with_what_would():
    lm = small_lm("mor", kv_heads=4)
    need = serving_memory(lm, ENGINE)
    with pytest.raises(UserError) as error:
        require_fit(lm, ENGINE, 1, need.total - 1, devices=4)
    said = str(error.value)
    assert "4 lanes of 64 tokens" in said and "keys and values" not in said.partition(":")[0]
    lanes = int(re.search(r"--lanes (\d+)", said)[1])
    assert lanes == 3
    require_fit(lm, dataclasses.replace(ENGINE, lanes=lanes), 1, need.total - 1, devices=4)
    assert "--mesh tensor=2" in said
    require_fit(lm, ENGINE, 2, need.total - 1, devices=4)
    with pytest.raises(UserError, match="take more or larger ones"):
        require_fit(lm, ENGINE, 1, 1000, devices=1)
