"""A model server on a loopback port, over a small model with random weights and a real engine."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from loopback import Loopback, loopback
from small import random_params, small_lm, spread_routers

from mor_jax.config import MeshConfig
from mor_jax.data.chat import ChatTemplate
from mor_jax.data.vocabulary import ByteTokenizer
from mor_jax.inference.engine import request as engine_types
from mor_jax.inference.engine.build import build_service
from mor_jax.inference.engine.device import EngineConfig
from mor_jax.inference.engine.grammar import Grammars
from mor_jax.inference.engine.plain import PlainService
from mor_jax.inference.generate import Generation
from mor_jax.parallel.mesh import make_mesh
from rlm_runtime.serve.model import ModelBackend, ModelSettings, create_app

HELLO = [{"role": "user", "content": "hello"}]


class SmallModel(NamedTuple):
    """What an engine needs of a loaded checkpoint."""

    lm: Any
    params: Any
    tokenizer: Any
    mesh: Any


def small_model(kind: str = "mor", **model: Any) -> SmallModel:
    """A model over bytes; its table has a few rows more than the tokenizer has tokens."""
    lm = small_lm(kind, vocab_size=264, context=128, **model)
    return SmallModel(
        lm, spread_routers(random_params(lm)), ByteTokenizer(), make_mesh(MeshConfig(data=-1))
    )


def backend(name: str, model: SmallModel, service: Any, **fields: Any) -> ModelBackend:
    return ModelBackend(
        name=name,
        template=ChatTemplate(),
        grammars=Grammars(model.tokenizer),
        tokenizer=model.tokenizer,
        window=service.context,
        service=service,
        engine_types=engine_types,
        recursions=model.lm.program.recursions,
        **fields,
    )


def greedy(model: SmallModel, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """Tokens of plain generation, each prompt for itself."""
    with jax.set_mesh(model.mesh):
        run = Generation(
            model.lm, model.params, prompts, max_tokens=n, vocab_size=model.tokenizer.vocab_size
        )
        return np.stack([step.token_B for step in run], axis=1).tolist()


class Server(Loopback):
    """Its model is named "small"."""

    @property
    def registry(self) -> Any:
        return self.app.state.registry

    @property
    def model(self) -> ModelBackend:
        return self.registry.models["small"]

    def post(self, path: str, **fields: Any) -> tuple[int, dict[str, str], dict[str, Any]]:
        status, headers, raw = self.request("POST", path, {"model": "small", **fields})
        return status, headers, json.loads(raw)

    def complete(
        self, prompt: Any = "hello", **fields: Any
    ) -> tuple[int, dict[str, str], dict[str, Any]]:
        return self.post("/v1/completions", prompt=prompt, **fields)

    def open(self, path: str = "/v1/completions", **fields: Any) -> http.client.HTTPConnection:
        """A request whose answer is not waited for."""
        return self.begin(
            "POST",
            path,
            {"model": "small", "prompt": "hello", "max_tokens": 60, "ignore_eos": True, **fields},
        )

    def stat(self, name: str) -> float:
        return self.model.service.stats()[name]


@contextlib.contextmanager
def running(
    load: Callable[[], list[ModelBackend]], *, wait: bool = True, **settings: Any
) -> Iterator[Server]:
    """`wait`: until the models are loaded."""
    loaded = threading.Event()
    app = create_app(
        load, ModelSettings(**{"drain_seconds": 0.1, **settings}), on_loaded=lambda _: loaded.set()
    )
    with loopback(app, Server) as server:
        if wait:
            assert loaded.wait(600)
            assert server.registry.failure is None, server.registry.failure
        try:
            yield server
        finally:
            for model in server.registry.models.values():
                if hasattr(model.service, "hold"):
                    model.service.hold.set()


def batched(model: SmallModel, **engine: Any) -> Callable[[], list[ModelBackend]]:
    """The engine itself, every program compiled."""

    def load() -> list[ModelBackend]:
        config = EngineConfig(**{"lanes": 4, "chunks": (16,), **engine})
        service = build_service(model, config, scoring=True)
        service.warm_up()
        return [backend("small", model, service)]

    return load


def plain(model: SmallModel, **options: Any) -> Callable[[], list[ModelBackend]]:
    """One request at a time, by the plain engine."""
    return lambda: [backend("small", model, PlainService(model, **options))]
