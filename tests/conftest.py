"""Shared by all tests: a private cache, shapes in which a rank slip is an error, small models."""

import os
import tempfile

# Before anything reads it: tests never touch the user's cache of prepared data, but share one among themselves.
os.environ.setdefault("MOR_JAX_CACHE", tempfile.mkdtemp(prefix="mor_jax_test_cache_"))
import jax
import pytest
from hypothesis import HealthCheck, settings
from small import KINDS

jax.config.update("jax_platforms", "cpu")
# Programs compiled by one run of the tests serve the next.
jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/mor_jax/xla-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# Compiling is deterministic work; examples run as long as they need, without a flaky deadline.
settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("default")


@pytest.fixture(params=list(KINDS))
def kind(request) -> str:
    return request.param
