"""The batch is a function of the step: for any number of hosts, devices and restarts."""

import inspect
import itertools
import os
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mor_jax.data import loader as loader_module
from mor_jax.data import mixture
from mor_jax.data.loader import Loader, eval_batches
from mor_jax.errors import DataError

T = 4


class FakeRows:
    """Row i holds i everywhere; remembers what was read."""

    def __init__(self, n: int):
        self.n = n
        self.read_log: list[int] = []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.read_log.append(i)
        return {"tokens": np.full(T, i, np.int32), "segment_ids": np.ones(T, np.int32)}


def numbers(batch) -> list[int]:
    return np.asarray(batch["tokens"])[:, 0].tolist()


def one_device() -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data", None))


@pytest.mark.parametrize("n", [1, 2, 7, 50])
@pytest.mark.parametrize("small", [0, 1 << 15], ids=["grain", "explicit"])
def test_each_epoch_is_a_permutation_of_its_own(n, small, monkeypatch):
    monkeypatch.setattr(mixture, "SMALL", small)
    stream = mixture.Order(n, seed=3)
    epochs = [[stream[e * n + i] for i in range(n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n == 50:
        assert len({tuple(e) for e in epochs}) == 3
        assert [mixture.Order(n, seed=3)[i] for i in range(n)] == epochs[0]
        assert [mixture.Order(n, seed=4)[i] for i in range(n)] != epochs[0]


def test_batches_run_through_the_stream_without_gaps():
    loader = Loader(FakeRows(10), 4, seed=0)
    seen = list(itertools.chain.from_iterable(numbers(loader.at(s)) for s in range(5)))
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_order_is_fixed_forever():
    """A change here would silently change what a resumed run sees."""
    assert [mixture.Order(8, seed=0)[i] for i in range(16)] == [
        0,
        2,
        1,
        5,
        4,
        3,
        6,
        7,
        5,
        3,
        7,
        2,
        4,
        1,
        0,
        6,
    ]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    b=st.integers(1, 12),
    step=st.integers(0, 10**6),
    seed=st.integers(0, 2**32 - 1),
)
def test_position_is_a_function_of_the_step(n, b, step, seed):
    a, c = Loader(FakeRows(n), b, seed=seed), Loader(FakeRows(n), b, seed=seed)
    c.at(0)
    assert numbers(a.at(step)) == numbers(c.at(step)) == c.indices_at(step)


@settings(max_examples=60, deadline=None)
@given(hosts=st.sampled_from([1, 2, 3, 4, 6, 12]), step=st.integers(0, 1000))
def test_slices_of_hosts_make_up_the_batch(hosts, step):
    loader = Loader(FakeRows(30), 12, seed=1)
    per = 12 // hosts
    union = [
        n for h in range(hosts) for n in loader.indices_at(step, range(h * per, (h + 1) * per))
    ]
    assert union == numbers(loader.at(step))


def test_fewer_rows_than_the_batch_repeat():
    batch = Loader(FakeRows(3), 8, seed=0).at(0)
    assert batch["tokens"].shape == (8, T) and set(numbers(batch)) == {0, 1, 2}


@pytest.mark.parametrize("start", [0, 1, 17])
def test_iterating_from_a_step_equals_asking_for_it(start):
    loader = Loader(FakeRows(10), 4, seed=0)
    it = loader.iter_from_step(start)
    assert [numbers(b) for b in itertools.islice(it, 6)] == [
        numbers(loader.at(start + i)) for i in range(6)
    ]
    it.close()


def prefetchers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "prefetch"]


def test_reading_ahead_is_bounded_and_closing_ends_the_thread():
    rows = FakeRows(100)
    it = Loader(rows, 2, seed=0).iter_from_step(0)
    next(it)
    time.sleep(0.3)
    # One handed out, two ready, one in hand.
    # the loader looked at one row's width
    assert len(rows.read_log) - 1 <= 2 * (loader_module.PREFETCH + 2)
    assert prefetchers()
    it.close()
    assert not prefetchers()


def test_an_exception_in_the_thread_arrives_where_the_batch_was_wanted():
    class Broken(FakeRows):
        def __getitem__(self, i):
            if len(self.read_log) >= 7:
                raise DataError("damaged")
            return super().__getitem__(i)

    it = Loader(Broken(10), 2, seed=0).iter_from_step(0)
    assert [len(numbers(next(it))) for _ in range(3)] == [2, 2, 2]
    with pytest.raises(DataError, match="damaged"):
        next(it)
    assert not prefetchers()


def test_sharded_on_one_device_equals_numpy():
    plain, sharded = (Loader(FakeRows(10), 4, seed=0, sharding=s) for s in (None, one_device()))
    for step in range(4):
        a, b = plain.at(step), sharded.at(step)
        assert all(isinstance(x, jax.Array) and x.sharding == one_device() for x in b.values())
        assert all((a[k] == np.asarray(b[k])).all() and a[k].dtype == b[k].dtype for k in a)


def test_each_row_is_read_once_however_often_it_is_replicated():
    """4 devices, 2 x 2: batch rows in halves, each half on two devices; also with T divided."""
    code = """
import numpy as np, jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mor_jax.data.loader import Loader, eval_batches
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "tensor"))
for spec in (P("data", None), P("data", "tensor"), P(("data", "tensor")), P()):
    rows = FakeRows(30)
    sharding = NamedSharding(mesh, spec)
    loader = Loader(rows, 8, seed=0, sharding=sharding)
    rows.read_log.clear()
    batch = loader.at(3)
    assert sorted(rows.read_log) == sorted(loader.indices_at(3)), rows.read_log
    assert batch["tokens"].sharding == sharding and batch["tokens"].shape == (8, 4)
    plain = Loader(FakeRows(30), 8, seed=0).at(3)
    assert all((np.asarray(batch[k]) == plain[k]).all() for k in plain)
    evals = zip(eval_batches(rows, 8, sharding=sharding), eval_batches(rows, 8), strict=True)
    assert all((np.asarray(a[k]) == b[k]).all() for a, b in evals for k in a)
print("fine")
"""
    code = f"import numpy as np\nT = {T}\n{inspect.getsource(FakeRows)}\n{code}"
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120
    )
    assert run.stdout.strip() == "fine", run.stderr


def test_a_host_reads_only_the_rows_of_its_devices(monkeypatch):
    class Half:
        """The second of two hosts, each with one device."""

        def addressable_devices_indices_map(self, shape):
            return {"device": (slice(shape[0] // 2, shape[0]), slice(None))}

    made = []
    monkeypatch.setattr(
        jax,
        "make_array_from_callback",
        lambda shape, sharding, data: made.append(data((slice(4, 8), slice(None)))),
    )
    rows = FakeRows(30)
    loader = Loader(rows, 8, seed=0, sharding=Half())
    rows.read_log.clear()
    loader.at(5)
    assert rows.read_log == loader.indices_at(5)[4:] == made[0][:, 0].tolist()


@pytest.mark.parametrize(
    ("n", "b", "limit"), [(10, 4, 0), (10, 4, 6), (8, 4, 0), (3, 8, 0), (10, 4, 99), (10, 3, 1)]
)
@pytest.mark.parametrize("sharded", [False, True])
def test_evaluation_reads_each_row_once_in_order(n, b, limit, sharded):
    rows = FakeRows(n)
    batches = list(eval_batches(rows, b, limit=limit, sharding=one_device() if sharded else None))
    total = min(limit or n, n)
    assert len(batches) == -(-total // b)
    assert all(batch["tokens"].shape == (b, T) for batch in batches)
    real = np.concatenate([np.asarray(batch["segment_ids"])[:, 0] > 0 for batch in batches])
    assert real.tolist() == [True] * total + [False] * (len(batches) * b - total)
    assert list(itertools.chain.from_iterable(map(numbers, batches)))[:total] == list(range(total))


def test_messages():
    with pytest.raises(DataError, match="no training rows"):
        Loader(FakeRows(0), 4, seed=0)
    with pytest.raises(DataError, match="batch size must be at least 1"):
        Loader(FakeRows(4), 0, seed=0)
