"""Small models for tests, with weights large enough that every part matters."""

import jax
import jax.numpy as jnp
import numpy as np
from kinds import KINDS, MORE_KV

from mor_jax.config import DepthConfig, ModelConfig
from mor_jax.model.lm import LM


def small_lm(kind: str, **model) -> LM:
    """A model of one of these kinds, small, with weights large enough that every part matters."""
    shape, depth = (KINDS | MORE_KV)[kind]
    base = {
        "width": 32,
        "heads": 4,
        "kv_heads": 2,
        "mlp_width": 48,
        "vocab_size": 64,
        "context": 64,
        "init_std": 0.2,
    }
    return LM(ModelConfig(**{**base, **shape, **model}), DepthConfig(**depth))


def random_params(lm: LM, seed: int = 0) -> dict:
    """Parameters drawn by numpy, `init_std` large, norms near one: `LM.init` without compiling its
    generators."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape).astype(np.float32)
        # of a selection, beside scores that are close
        if path[-1].key == "bias" and path[0].key == "router":
            return jnp.asarray(0.003 * x)
        return jnp.asarray(1 + 0.1 * x if path[-1].key == "scale" else lm.model.init_std * x)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lm.init, jax.random.key(0)))


def spread_routers(params: dict, scale: float = 3.0) -> dict:
    """Router weights scaled up so that scores lie on both sides of the threshold, far from it."""
    return params | {"router": jax.tree.map(lambda w: w * scale, params["router"])}
