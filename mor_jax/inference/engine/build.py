"""An engine for a loaded model: device, depth wishes, prompt scores and the thread that runs
them."""

from __future__ import annotations

import functools
from typing import Any

from mor_jax.inference.dial import depth_control
from mor_jax.inference.engine.device import Device, EngineConfig
from mor_jax.inference.engine.request import DepthWish
from mor_jax.inference.engine.scoring import Scorer
from mor_jax.inference.engine.service import EngineService, ServiceConfig

KEPT_WISHES = 256


def build_device(model: Any, config: EngineConfig | None = None) -> Device:
    """The device part of `build_service`, to be used by one service at a time."""
    vocab_size = model.tokenizer.vocab_size
    return Device(
        model.lm, model.params, config or EngineConfig(), vocab_size=vocab_size, mesh=model.mesh
    )


def build_service(
    model: Any,
    engine: EngineConfig | None = None,
    config: ServiceConfig | None = None,
    *,
    device: Device | None = None,
    scoring: bool = False,
) -> EngineService:
    """A service that is not warm yet: call `warm_up`, or let the first request wait for it.

    Args:
      model: of `train.load.load_model`, or anything with lm, params, tokenizer and mesh.
      device: one made before, whose service was closed, or has failed and `Device.reset` was
        called.
      scoring: whether log-probabilities of prompts may be asked for; a program more to compile.
    """
    device = device or build_device(model, engine)
    router = {"router": model.params["router"]}  # alone, so that the weights can be freed

    @functools.lru_cache(maxsize=KEPT_WISHES)
    def control_of(wish: DepthWish) -> Any:
        if wish == DepthWish():
            return None
        return depth_control(
            model.lm,
            router,
            1,
            mean_depth=wish.mean,
            min_depth=wish.least,
            max_depth=wish.most,
        )

    scorer = _scorer(model, device) if scoring else None
    eos = model.tokenizer.eos
    return EngineService(device, config, control_of=control_of, scorer=scorer, eos=eos)


def _scorer(model: Any, device: Device) -> Any:
    return Scorer(
        model.lm,
        model.params,
        vocab_size=device.draw_config.vocab_size,
        context=device.context,
        mesh=model.mesh,
        max_logprobs=device.draw_config.max_logprobs,
        weights=device.weights,
    )
