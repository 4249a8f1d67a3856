"""Serve trained models to any OpenAI client.

    python -m launch.serve runs/mor
    python -m launch.serve small=runs/mor plain=runs/vanilla --port 8100 --lanes 16
    python -m launch.serve runs/mor --host 0.0.0.0 --api_key_file keys.txt
    python -m launch.serve runs/llama8b --mesh tensor=8 --weights int8

The name of a model is what stands before `=`, else the last part of its path. The server listens at
once, answers 503 while it loads and warms up, and says when it is ready. See docs/serving.md.
"""

import sys
import time
from typing import TYPE_CHECKING

import jax
from absl import flags
from jax.sharding import Mesh

from launch import cli
from mor_jax.config import Config, MeshConfig
from mor_jax.data.chat import ChatTemplate
from mor_jax.data.progress import still
from mor_jax.errors import UserError
from mor_jax.inference.engine import request as engine_types
from mor_jax.inference.engine.build import build_service
from mor_jax.inference.engine.device import EngineConfig, can_serve
from mor_jax.inference.engine.fit import device_room, require_fit
from mor_jax.inference.engine.grammar import Grammars
from mor_jax.inference.engine.plain import PlainService
from mor_jax.inference.engine.service import EngineService, ServiceConfig
from mor_jax.model.lm import LM
from mor_jax.parallel.mesh import make_mesh
from mor_jax.parallel.serving import serving_mesh
from mor_jax.paths import as_path
from mor_jax.train.load import Loaded, load_model
from rlm_runtime.errors import UsageError

if TYPE_CHECKING:
    from rlm_runtime.serve.model import ModelBackend

_BEGAN = time.monotonic()
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "Address to listen on; other than loopback needs keys."
)
_PORT = flags.DEFINE_integer("port", 8000, "Port; 0 takes a free one.")
_KEYS = flags.DEFINE_string(
    "api_key_file", None, "API keys, one a line. Without it nobody needs one."
)
_NO_KEY = flags.DEFINE_bool("allow_no_key", False, "Serve other machines without keys.")
_HOSTS = flags.DEFINE_list(
    "allowed_host", [], "Names the Host header may carry, besides those of this machine."
)
_ORIGINS = flags.DEFINE_list(
    "cors_origin", [], "Web pages that may call, e.g. https://example.org; none by default."
)
_LANES = flags.DEFINE_integer("lanes", 8, "Sequences decoded at once, of each model.")
_CONTEXT = flags.DEFINE_integer("context", 0, "Longest sequence, tokens; 0: the model's own.")
_MESH = flags.DEFINE_string(
    "mesh",
    None,
    "tensor=N: cut weights and keys over the first N devices. Without it each device has a copy.",
)
_WEIGHTS = flags.DEFINE_enum(
    "weights",
    "compute",
    ["compute", "int8"],
    "Matrices in the model's dtype, or rounded to 8 bits; launch.evaluate says what that costs.",
)
_SPECULATE = flags.DEFINE_integer(
    "speculate",
    0,
    "Tokens drafted with one recursion, verified with all at once; same text up to near ties. 0: none.",
)
_QUEUE = flags.DEFINE_integer("queue", 256, "Sequences that may wait, of each model; more get 429.")
_ENGINE = flags.DEFINE_enum(
    "engine", "batched", ["batched", "plain"], "plain: one request at a time, for comparison."
)
_TEMPLATE = flags.DEFINE_string(
    "chat_template", None, "A Jinja file to use instead of the checkpoint's."
)
_DRAIN = flags.DEFINE_float(
    "drain_seconds", 30.0, "After SIGTERM running requests may go on for so long."
)
_SECONDS = flags.DEFINE_float(
    "request_seconds", 600.0, "Longest life of a request; it then ends with what there is."
)


def main(argv: list[str]) -> None:
    try:
        from rlm_runtime.serve.http.settings import host_names, read_keys
        from rlm_runtime.serve.model import ModelSettings
        from rlm_runtime.serve.model.host import run_server
    except ModuleNotFoundError as e:
        raise UserError(
            f'launch.serve needs the package {e.name}: in a checkout of this project, pip install ".[serve]".'
        ) from None
    if not argv:
        raise UserError("give a checkpoint: python -m launch.serve runs/mor.")
    try:
        keys = tuple(read_keys(_KEYS.value, "--api_key_file")) if _KEYS.value else ()
        template = (
            ChatTemplate(as_path(_TEMPLATE.value).read_text("utf-8")) if _TEMPLATE.value else None
        )
        settings = ModelSettings(
            api_keys=keys,
            allowed_hosts=host_names(_HOST.value, _HOSTS.value, keys),
            cors_origins=tuple(_ORIGINS.value),
            drain_seconds=_DRAIN.value,
            request_seconds=_SECONDS.value,
        )
        run_server(
            lambda: [backend(text, template) for text in argv],
            settings,
            host=_HOST.value,
            port=_PORT.value,
            say=say,
            began=_BEGAN,
            allow_no_key=_NO_KEY.value,
        )
    except (UsageError, OSError) as e:
        raise UserError(str(e)) from e


def backend(text: str, template: ChatTemplate | None = None) -> "ModelBackend":
    """One model of the server, loaded and warm. `text`: NAME=PATH or PATH."""
    from rlm_runtime.serve.model import ModelBackend

    name, _, path = text.rpartition("=")
    path = as_path(path)
    name = name or path.resolve().name
    began = time.monotonic()
    # Rounding to 8 bits begins with the weights as they were trained; plain decode casts itself.
    compute = _ENGINE.value == "batched" and _WEIGHTS.value == "compute"
    loaded = load_model(path, mesh=mesh_of, compute=compute)
    read = time.monotonic()
    service = make_service(loaded)
    # The engine has its own.
    loaded = loaded._replace(params={"router": loaded.params["router"]})
    with still("compiling the programs of the engine", say):
        service.warm_up()
    say(f"{name}: loaded in {read - began:.1f} s, warmed up in {time.monotonic() - read:.1f} s")
    grammars, why = make_grammars(loaded)
    return ModelBackend(
        name=name,
        tokenizer=loaded.tokenizer,
        window=service.context,
        service=service,
        engine_types=engine_types,
        template=template or loaded.template,
        recursions=loaded.lm.program.recursions,
        grammars=grammars,
        no_grammars=why,
    )


def engine_config() -> EngineConfig:
    return EngineConfig(
        lanes=_LANES.value,
        context=_CONTEXT.value,
        speculate=_SPECULATE.value,
        weights="int8" if _WEIGHTS.value == "int8" else "compute",
    )


def mesh_of(config: Config) -> Mesh:
    """The mesh to serve a model on. Raises UserError: it does not cut the model in equal parts, or
    the model does not fit it with its lanes."""
    if _WEIGHTS.value == "int8" and _ENGINE.value == "plain":
        raise UserError("--weights int8 is for the batching engine; leave --engine plain out.")
    mesh = (
        serving_mesh(_MESH.value, config.model) if _MESH.value else make_mesh(MeshConfig(data=-1))
    )
    room, lm = device_room(), LM.from_config(config)
    if room and _ENGINE.value == "batched" and can_serve(lm):
        require_fit(lm, engine_config(), mesh.shape["tensor"], room, devices=jax.device_count())
    return mesh


def make_service(loaded: Loaded) -> PlainService | EngineService:
    """The engine of a model, not yet compiled."""
    service: PlainService | EngineService
    if _ENGINE.value == "plain":
        service = PlainService(loaded, queue=_QUEUE.value, context=_CONTEXT.value or None)
    else:
        service = build_service(
            loaded, engine_config(), ServiceConfig(queue=_QUEUE.value), scoring=True
        )
    if _SPECULATE.value and _ENGINE.value == "batched" and loaded.lm.model.dtype != "float32":
        say(
            f"speculating in {loaded.lm.model.dtype}: tokens within its rounding of each other may change places"
        )
    return service


def make_grammars(loaded: Loaded) -> tuple[Grammars | None, str]:
    """What constrains output to a schema; without its library None, and why."""
    try:
        return Grammars(loaded.tokenizer), ""
    except UserError as e:
        return None, str(e)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, arguments=True)
