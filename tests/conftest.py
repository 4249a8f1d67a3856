"""Shared by all tests: a private cache, a deterministic hypothesis, the kinds of small models.

JAX is configured through the environment, and before anything imports it: tests of the RLM runtime
never do.
"""

import gc
import os
import sys
import tempfile
from pathlib import Path

# Tests never touch the user's cache of prepared data, but share one among themselves.
os.environ.setdefault("MOR_JAX_CACHE", tempfile.mkdtemp(prefix="mor_jax_test_cache_"))
os.environ["JAX_PLATFORMS"] = "cpu"
# Programs compiled by one run of the tests serve the next.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/mor_jax/xla-tests"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Most of the suite's time is compiling, and half of that is LLVM's work on machine code that runs
# once. Without it the program, its buffers and its collectives are the same; a command that a test
# starts inherits this.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
import pytest
from hypothesis import HealthCheck, settings
from kinds import KINDS

# Compiling is deterministic work; examples run as long as they need, without a flaky deadline.
settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("default")


# Files that take a minute and more: begun last, they would leave the other workers idle.
LONG = {
    "notebooks",
    "parallel",
    "train",
    "engine",
    "launch",
    "test_executors.py",
    "test_policies.py",
}


MAPS = 15_000  # of a worker


def _turn(item):
    if "rlm" in item.path.parts:
        return 0
    return 1 if LONG & {item.path.parent.name, item.path.name} else 2


def pytest_collection_modifyitems(items):
    """Those of the RLM runtime first, in processes that have no JAX and no gigabytes yet: they
    fork, and collect garbage."""
    items.sort(key=_turn)


def pytest_collection_finish():
    """What the imports made stays: looking through all of it, collection after collection, takes a
    few percent."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Each compiled program takes some twenty memory maps, and Linux gives a process 65,530: beyond
    them XLA aborts. So between two files the programs of those before are let go."""
    ends = nextitem is not None and nextitem.path != item.path
    if ends and "jax" in sys.modules and _maps() > MAPS:
        sys.modules["jax"].clear_caches()
        gc.collect()


def _maps():
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture(params=list(KINDS))
def kind(request) -> str:
    return request.param
