"""Mixtures: exact shares, positions that follow from the step, every row of each source once before
any comes again."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from mor_jax.config import DataConfig
from mor_jax.config.check_train import check_data
from mor_jax.data.loader import Loader
from mor_jax.data.mixture import CYCLE, MixedOrder, cycle
from mor_jax.data.prepare import prepare
from mor_jax.errors import ConfigError


@pytest.mark.parametrize(
    "weights", [(1, 1), (0.7, 0.2, 0.1), (1e-6, 1), (1, 2, 3, 4, 5, 6, 7), (1e-9, 1e-9, 5)]
)
def test_shares_are_exact_and_spread(weights):
    of_cycle = cycle(weights)
    counts = np.bincount(of_cycle, minlength=len(weights))
    wanted = np.maximum(1, np.asarray(weights) / sum(weights) * CYCLE)
    assert len(of_cycle) == CYCLE and np.all(np.abs(counts - wanted) <= len(weights))
    # any stretch has its share, up to one place at either end
    for source, count in enumerate(counts):
        seen = np.cumsum(of_cycle == source)
        assert np.all(np.abs(seen - count * np.arange(1, CYCLE + 1) / CYCLE) <= 1 + 1e-9)


def test_each_source_is_read_through_before_it_comes_again():
    sizes = (7, 300)
    order = MixedOrder(sizes, (1, 2), seed=3)
    stream = [order[n] for n in range(4 * CYCLE)]
    assert [r < 7 for r in stream] == [order.source(n) == 0 for n in range(4 * CYCLE)]
    for first, size in ((0, 7), (7, 300)):
        mine = [r for r in stream if first <= r < first + size]
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(
                range(first, first + size)
            )
    assert [MixedOrder(sizes, (1, 2), seed=3)[n] for n in (5, 2500)] == [stream[5], stream[2500]], (
        "no memory"
    )
    assert stream[:50] != [MixedOrder(sizes, (1, 2), seed=4)[n] for n in range(50)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixture")
    for name, letter, documents in (("a", "a", 60), ("b", "b", 12)):
        lines = [json.dumps({"text": letter * (20 + i)}) for i in range(documents)]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    mixture = ((str(directory / "a.jsonl"), 3.0), (str(directory / "b.jsonl"), 1.0))
    return DataConfig(
        source="files", mixture=mixture, cache_dir=str(directory / "cache"), holdout=0.2
    )


def test_a_prepared_mixture_keeps_its_shares_in_batches_and_evaluations(config):
    data = prepare(config, 16, progress=False)
    loader = Loader(data.train, 8, seed=0)
    drawn = [i >= data.train.first[1] for step in range(25) for i in loader.indices_at(step)]
    assert Counter(drawn) == {False: 150, True: 50}
    letters = {
        b for i in range(data.train.first[1], len(data.train)) for b in data.train[i]["tokens"]
    } - {0, 256, 257}
    assert letters == {ord("b")}, "read from the source that the number is of"
    np.testing.assert_array_equal(
        loader.at(17)["tokens"], Loader(data.train, 8, seed=0).at(17)["tokens"]
    )
    held_out = [set(data.validation[i]["tokens"]) for i in range(len(data.validation))]
    assert [ord("b") in row for row in held_out[:4]].count(True) == 1
    assert [name for name, _ in data.sources] == [name for name, _ in config.mixture]
    assert len(held_out) == sum(len(rows) for _, rows in data.sources)
    total = sum(s["train"]["documents"] for s in data.stats["sources"].values())
    assert data.stats["train"]["documents"] == total


def test_other_weights_are_other_data(config):

    (a, _), (b, _) = config.mixture
    other = dataclasses.replace(config, mixture=((a, 1.0), (b, 1.0)))
    assert (
        prepare(other, 16, progress=False).fingerprint
        != prepare(config, 16, progress=False).fingerprint
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"paths": ("x",)},
        {"source": "pystdlib"},
        {"mixture": (("x", 0.0),)},
        {"mixture": (("x", 1.0), ("x", 2.0))},
        {"tokenizer": "bpe"},
    ],
)
def test_what_is_no_mixture_is_refused(fields):
    with pytest.raises(ConfigError, match=r"config\.data\.mixture"):
        check_data(DataConfig(**{"source": "files", "mixture": (("x", 1.0),)} | fields))
