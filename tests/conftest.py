"""Shared by all tests: a private cache, shapes in which a rank slip is an error, small models."""

import os
import tempfile

# Before anything reads it: tests never touch the user's cache of prepared data, but share one among themselves.
os.environ.setdefault("MOR_JAX_CACHE", tempfile.mkdtemp(prefix="mor_jax_test_cache_"))
# Nearly all the time of these tests is compilation of tiny programs; level 0 takes a third less of it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from mor_jax.config import DepthConfig, ModelConfig
from mor_jax.model.lm import LM

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

KINDS = {
    "vanilla": ({"sharing": "none", "recursions": 1, "layers": 4}, {}),
    "recursive": ({"sharing": "middle_cycle", "recursions": 3, "layers": 8}, {}),
    "mor": ({"sharing": "middle_cycle", "recursions": 3, "layers": 8}, {"policy": "expert_choice"}),
}


def small_lm(kind: str, **model) -> LM:
    """A model of one of the three kinds, small, with weights large enough that every part matters."""
    shape, depth = KINDS[kind]
    base = {"width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "vocab_size": 64, "context": 64, "init_std": 0.2}
    return LM(ModelConfig(**{**base, **shape, **model}), DepthConfig(**depth))


def random_params(lm: LM, seed: int = 0) -> dict:
    """Parameters drawn by numpy, `init_std` large, norms near one: `LM.init` without compiling its generators."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(1 + 0.1 * x if path[-1].key == "scale" else lm.model.init_std * x)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lm.init, jax.random.key(0)))


def spread_routers(params: dict, scale: float = 3.0) -> dict:
    """Router weights scaled up so that scores lie on both sides of the threshold, far from it."""
    return params | {"router": jax.tree.map(lambda w: w * scale, params["router"])}


@pytest.fixture(params=list(KINDS))
def kind(request) -> str:
    return request.param
