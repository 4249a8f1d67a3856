"""A mor_jax checkpoint in this process as a chat model; concurrent calls share one engine, which
batches them.

Messages become text by the checkpoint's own chat template. A checkpoint without one has the plain
template, for models that were trained on text alone:

    system: You are ...

    user: What is ...?

    assistant:

and the reply ends where the model ends the document or its turn, or, under the plain template,
begins a new speaker's line. Pass `template=` for another.
jax and mor_jax are imported when a model is made, and nowhere else in this package.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rlm_runtime.errors import LMError, UsageError
from rlm_runtime.lms import plain, prices
from rlm_runtime.lms.base import DEFAULT_SAMPLING, Message, Reply, Sampling, ToolSpec, Usage
from rlm_runtime.lms.stops import StopCutter

if TYPE_CHECKING:
    from mor_jax.inference.engine.device import Device
    from mor_jax.inference.engine.grammar import Grammars
    from mor_jax.inference.engine.service import EngineService

# calls that may wait: whoever fans them out in this process has a budget of its own
QUEUE = 1 << 20
EXTRA = ("top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


def chat_text(messages: Sequence[Message]) -> str:
    """The plain template (see the module)."""
    spoken = [f"{m.role}: {m.content}" for m in map(plain.as_text, messages)]
    return "\n\n".join([*spoken, "assistant:"])


class CheckpointLM:
    """A trained model from its run directory, or from its checkpoints/ folder.

    Args:
      path: as of `mor_jax.train.load.load_model`.
      step: the newest by default.
      template: messages -> prompt text; default: the checkpoint's own chat template.
      stop: strings that end a reply, besides the sampling's own; those of the checkpoint's template
        by default.
      max_tokens: of a reply, where the sampling does not say; the window is a limit too.
      temperature: where the sampling does not say; 0 is greedy.
      lanes: sequences that are decoded at once; more wait their turn.
      prefix_bytes: memory for what prompts have in common (a shared question, the turns of a
        conversation), which is then read once; None: as much as the lanes take; 0: none.
      price: see `prices.price_of`; default: free, it runs on your own machine.
      model: a loaded model to use instead of loading `path`.
    `Sampling.seed` makes a sampled reply repeatable, whatever else is asked at the same time.
    `Sampling.extra` may hold `top_k`, `min_p`, `presence_penalty`, `frequency_penalty`,
    `repetition_penalty`, `priority` (lower goes first) and `mean_depth`, `min_depth`, `max_depth`:
    how many recursions the tokens of this call run.
    Raises:
      UsageError: no such checkpoint, one that is damaged, or no jax here.
    """

    def __init__(
        self,
        path: str,
        *,
        step: int | None = None,
        template: Callable[[Sequence[Message]], str] | None = None,
        stop: Sequence[str] | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
        lanes: int = 8,
        prefix_bytes: int | None = None,
        price: Any = None,
        model: Any = None,
    ):
        self.name, self.path = f"checkpoint:{path}", str(path)
        if max_tokens < 1 or lanes < 1:
            raise UsageError(f"{self.name}: max_tokens and lanes must be at least 1.")
        self._model = model or _load(self.path, step)
        self.window: int = self._model.lm.model.context
        self._template, self._chat = template, _chat(self._model)
        self._stop = tuple(stop) if stop is not None else (() if template else self._chat.stops)
        tokenizer = self._model.tokenizer
        config = getattr(self._model, "config", None)
        self.prompt_variant: str | None = (config.data.prompt_variant or None) if config else None
        self._stop_tokens = tokenizer.ends if template else self._chat.stop_tokens(tokenizer)
        self._max_tokens, self._temperature = max_tokens, temperature
        self._price = prices.price_of(self.name, price) or prices.Price(0.0, 0.0)
        self._engine = _Engine(self._model, lanes, prefix_bytes)

    def __repr__(self) -> str:
        return f"CheckpointLM({self.path!r}, window={self.window})"

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        tools: Sequence[ToolSpec] = (),
        schema: dict[str, Any] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """One reply. Tools and a schema are asked for in words. A schema also constrains what can
        be drawn, where the package for that (the extra `serve`) is installed, can enforce it, and
        no tool might be called instead.

        Raises:
          LMError: context_overflow, with both numbers; bad_request for a sampling that is none.
        """
        from mor_jax.errors import UserError

        constraint = None if tools else schema
        if tools:
            messages = plain.with_tools(messages, tools)
        if schema is not None:
            messages = plain.with_schema(messages, schema)
        ids = self._ids(messages)
        if len(ids) >= self.window:
            raise LMError(
                f"{self.name}: the prompt has {len(ids)} tokens, the model holds {self.window}, reply included. "
                "Send it in smaller pieces.",
                kind="context_overflow",
                model=self.name,
            )
        row = _Row(
            asyncio.get_running_loop(),
            self._model.tokenizer,
            (*self._stop, *sampling.stop),
            on_text,
        )
        room = min(sampling.max_tokens or self._max_tokens, self.window - len(ids))
        try:
            # the first call casts weights and compiles
            service = await asyncio.to_thread(self._engine.service)
            request = self._request(
                ids, room, sampling, await asyncio.to_thread(self._engine.grammar, constraint)
            )
            row.ticket = service.submit(request, row)
        except (UserError, TypeError, ValueError) as e:
            raise LMError(f"{self.name}: {e}", kind="bad_request", model=self.name) from e
        row.end_if_enough()
        try:
            finish = await row.future
        except _Failed as e:
            raise LMError(
                f"{self.name}: generation failed: {e}", kind="server", model=self.name
            ) from e
        finally:
            row.ticket.cancel()  # does nothing to one that is over
        text = row.text
        calls = plain.read_tool_calls(text, tools) if tools else ()
        usage = Usage(
            calls=1,
            input_tokens=len(ids),
            output_tokens=row.taken,
            cost_usd=self.price(len(ids), row.taken),
        )
        return Reply(
            text="" if calls else text,
            tool_calls=calls,
            usage=usage,
            model=self.name,
            finish_reason="tool_calls" if calls else finish,
        )

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Exact, for a call without tools and schema."""
        return len(self._ids(messages))

    def price(self, input_tokens: int, output_tokens: int, cached_tokens: int = 0) -> float | None:
        return self._price.dollars(input_tokens, output_tokens, cached_tokens)

    def set_params(self, params: Any) -> None:
        """Other weights of the same shape, from the next call on. No call may be under way."""
        self._engine.set_params(params)

    async def aclose(self) -> None:
        """End the engine's thread once its work is done; the model stays usable."""
        await asyncio.to_thread(self._engine.close)

    def stats(self) -> dict[str, float]:
        """What the engine counts (`mor_jax.inference.engine`); {} before the first call."""
        return self._engine.stats()

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        """Raises LMError: bad_request, the template refuses these messages."""
        from mor_jax.errors import UserError

        tokenizer = self._model.tokenizer
        if self._template is not None:
            prompt: list[int] = tokenizer.prompt(self._template(messages))
            return prompt
        spoken = [{"role": m.role, "content": m.content} for m in map(plain.as_text, messages)]
        try:
            ids: list[int] = self._chat.ids(tokenizer, spoken)
            return ids
        except UserError as e:
            raise LMError(f"{self.name}: {e}", kind="bad_request", model=self.name) from e

    def _request(self, ids: list[int], room: int, wanted: Sampling, grammar: Any) -> Any:
        from mor_jax.inference.engine.request import DepthWish, Drawing, Request

        extra = dict(wanted.extra)
        drawing = Drawing(
            temperature=self._temperature if wanted.temperature is None else wanted.temperature,
            top_p=1.0 if wanted.top_p is None else wanted.top_p,
            seed=secrets.randbits(31) if wanted.seed is None else wanted.seed,
            **{name: extra[name] for name in EXTRA if name in extra},
        )
        wish = DepthWish(*(extra.get(name) for name in ("mean_depth", "min_depth", "max_depth")))
        return Request(
            tuple(ids),
            room,
            drawing,
            stop_tokens=self._stop_tokens,
            grammar=grammar,
            depth=wish,
            priority=int(extra.get("priority", 0)),
        )


class _Engine:
    """The engine of a model, made when it is first needed, and again after it was closed or has
    failed."""

    def __init__(self, model: Any, lanes: int, prefix_bytes: int | None):
        self._model, self._lanes, self._prefix_bytes = model, lanes, prefix_bytes
        self._lock = threading.Lock()
        self._device: Device | None = None
        self._service: EngineService | None = None
        self._grammars: Grammars | None = None

    def service(self) -> Any:
        """One that is warm, or becomes so before its first token."""
        from mor_jax.inference.engine.build import build_device, build_service
        from mor_jax.inference.engine.device import EngineConfig
        from mor_jax.inference.engine.service import ServiceConfig

        with self._lock:
            if self._service is not None and self._device is not None and not self._service.healthy:
                self._device.reset()
                self._service = None
            if self._service is None:
                self._device = self._device or build_device(
                    self._model, EngineConfig(lanes=self._lanes)
                )
                config = ServiceConfig(queue=QUEUE, prefix_bytes=self._prefix_bytes)
                self._service = build_service(self._model, config=config, device=self._device)
            return self._service

    def grammar(self, schema: dict[str, Any] | None) -> Any:
        """What constrains one reply; None where nothing does."""
        if schema is None:
            return None
        from mor_jax.errors import UserError
        from mor_jax.inference.engine.grammar import Grammars

        try:
            with self._lock:
                grammars = self._grammars = self._grammars or Grammars(self._model.tokenizer)
            return grammars.json_schema(schema)
        except UserError:  # not installed, or a schema it cannot enforce: the words have to do
            return None

    def set_params(self, params: Any) -> None:
        self.close()  # with it goes what it has kept of prompts
        with self._lock:
            self._model = self._model._replace(params=params)
            if self._device is not None:
                self._device.set_params(params)

    def stats(self) -> dict[str, float]:
        service = self._service
        return {} if service is None else service.stats()

    def close(self) -> None:
        with self._lock:
            service, self._service = self._service, None
        if service is not None:
            service.drain()
            service.close()
            if self._device is not None and not service.healthy:
                self._device.reset()


class _Failed(Exception):
    """The engine did not finish a request; the message says why."""


class _Row:
    """One call's side of the engine: tokens to text, stop strings, and the way back into the event
    loop. It is called with events in the engine's thread."""

    def __init__(
        self, loop: Any, tokenizer: Any, stop: Sequence[str], on_text: Callable[[str], None] | None
    ):
        self.future = loop.create_future()
        self.stops = StopCutter(stop)
        self.taken = 0
        self.ticket: Any = None
        self._enough = False
        self._loop, self._decoder, self._on_text = loop, tokenizer.stream(), on_text
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._shown)

    def __call__(self, events: list[Any]) -> None:
        for event in events:
            if hasattr(event, "reason"):
                self._show(self.stops.push(self._decoder.flush()))
                self._show(self.stops.flush())
                error = None if event.error is None else _Failed(event.error)
                self._call(self._settle, error, "length" if event.reason == "length" else "stop")
            elif not self._enough:
                self._take(event)

    def _take(self, token: Any) -> None:
        self.taken += 1
        if token.stopped:
            return
        self._show(self.stops.push(self._decoder.push(token.id)))
        if self.stops.hit:
            self._enough = True
            self.end_if_enough()

    def end_if_enough(self) -> None:
        """A stop string was seen: the engine need not go on."""
        if self._enough and self.ticket is not None:
            self.ticket.finish()

    def _show(self, text: str) -> None:
        text = text if self._shown else text.lstrip()  # the space after "assistant:"
        if text:
            self._shown.append(text)
            if self._on_text:
                self._call(self._hand, self._on_text, text)

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
            self._loop.call_soon_threadsafe(function, *args)

    def _hand(self, on_text: Callable[[str], None], text: str) -> None:
        if not self.future.done():
            try:
                on_text(text)
            except Exception as e:  # the caller's own: it gets it back
                self.future.set_exception(e)

    def _settle(self, error: Exception | None, finish: str) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(finish)
        else:
            self.future.set_exception(error)


def _chat(model: Any) -> Any:
    """The chat template of a loaded model."""
    from mor_jax.data.chat import ChatTemplate

    return getattr(model, "template", None) or ChatTemplate()


def _load(path: str, step: int | None) -> Any:
    try:
        from mor_jax.analysis.tpu_compiler import quiet_without_tpu
        from mor_jax.errors import UserError
        from mor_jax.paths import use_compilation_cache
        from mor_jax.train.load import load_model
    except ImportError as e:
        raise UsageError(
            f"checkpoint:{path} needs jax and mor_jax, and {e.name or 'one of them'} cannot be imported here ({e}). "
            'In a checkout of this project, pip install ".[jax]"; or use an endpoint (openai:MODEL with base_url).'
        ) from e
    try:
        quiet_without_tpu()
        use_compilation_cache()
        return load_model(path, step)
    except UserError as e:
        raise UsageError(f"checkpoint:{path}: {e}") from e
