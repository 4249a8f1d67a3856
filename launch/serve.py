"""Serve trained models to any OpenAI client.

    python -m launch.serve runs/mor
    python -m launch.serve small=runs/mor plain=runs/vanilla --port 8100 --lanes 16
    python -m launch.serve runs/mor --host 0.0.0.0 --api_key_file keys.txt

The name of a model is what stands before `=`, else the last part of its path. The server listens at
once, answers 503 while it loads and warms up, and says when it is ready. See docs/serving.md.
"""

import sys
import time
from typing import TYPE_CHECKING

from absl import flags

from launch import cli
from mor_jax.data.chat import ChatTemplate
from mor_jax.data.progress import still
from mor_jax.errors import UserError
from mor_jax.inference.engine import request as engine_types
from mor_jax.inference.engine.build import build_service
from mor_jax.inference.engine.device import EngineConfig
from mor_jax.inference.engine.grammar import Grammars
from mor_jax.inference.engine.plain import PlainService
from mor_jax.inference.engine.service import EngineService, ServiceConfig
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
    loaded = load_model(path)
    read = time.monotonic()
    service = make_service(loaded)
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


def make_service(loaded: Loaded) -> PlainService | EngineService:
    """The engine of a model, every program compiled."""
    service: PlainService | EngineService
    if _ENGINE.value == "plain":
        service = PlainService(loaded, queue=_QUEUE.value, context=_CONTEXT.value or None)
    else:
        engine = EngineConfig(
            lanes=_LANES.value, context=_CONTEXT.value, speculate=_SPECULATE.value
        )
        service = build_service(loaded, engine, ServiceConfig(queue=_QUEUE.value), scoring=True)
    with still("compiling the programs of the engine", say):
        service.warm_up()
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
