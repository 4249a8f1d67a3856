"""A mor_jax checkpoint in this process as a chat model; concurrent calls run as one batch.

Messages become text by a template. The default is plain, for models that were trained on text alone:

    system: You are ...

    user: What is ...?

    assistant:

and the reply ends where the model ends the document or begins a new speaker's line. Pass `template=` for another.
jax and mor_jax are imported when a model is made, and nowhere else in this package.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any

from rlm_runtime.errors import LMError, UsageError
from rlm_runtime.lms import plain, prices
from rlm_runtime.lms.base import DEFAULT_SAMPLING, Message, Reply, Sampling, ToolSpec, Usage
from rlm_runtime.lms.batcher import Batcher, Job
from rlm_runtime.lms.stops import StopCutter

STOPS = ("\nsystem:", "\nuser:", "\nassistant:")


def chat_text(messages: Sequence[Message]) -> str:
    """The default template (see the module)."""
    spoken = [f"{m.role}: {m.content}" for m in map(plain.as_text, messages)]
    return "\n\n".join([*spoken, "assistant:"])


class CheckpointLM:
    """A trained model from its run directory, or from its checkpoints/ folder.

    Args:
      path: as of `mor_jax.train.load.load_model`.
      step: the newest by default.
      template: messages -> prompt text.
      stop: strings that end a reply, besides the sampling's own; those of the default template by default.
      max_tokens: of a reply, where the sampling does not say; the window is a limit too.
      temperature: where the sampling does not say; 0 is greedy.
      max_batch, gather: see `Batcher`.
      price: see `prices.price_of`; default: free, it runs on your own machine.
      model: a loaded model to use instead of loading `path`.
    `Sampling.seed` makes a sampled reply repeatable (such a call runs as a batch of its own); `Sampling.extra` may
    hold `top_k`.
    Raises:
      UsageError: no such checkpoint, one that is damaged, or no jax here.
    """

    def __init__(
        self, path: str, *, step: int | None = None, template: Callable[[Sequence[Message]], str] | None = None,
        stop: Sequence[str] | None = None, max_tokens: int = 512, temperature: float = 0.0, max_batch: int = 32,
        gather: float = 0.003, price: Any = None, model: Any = None,
    ):  # fmt: skip
        self.name, self.path = f"checkpoint:{path}", str(path)
        if max_tokens < 1 or max_batch < 1:
            raise UsageError(f"{self.name}: max_tokens and max_batch must be at least 1.")
        self._model = model or _load(self.path, step)
        self.window: int | None = self._model.lm.model.context
        self._template = template or chat_text
        self._stop = tuple(stop) if stop is not None else (() if template else STOPS)
        self._max_tokens, self._temperature = max_tokens, temperature
        self._price = prices.price_of(self.name, price) or prices.Price(0.0, 0.0)
        start = functools.partial(_generate, self._model)
        self.batcher = Batcher(start, context=self.window, max_batch=max_batch, gather=gather)

    def __repr__(self) -> str:
        return f"CheckpointLM({self.path!r}, window={self.window})"

    async def complete(
        self, messages: Sequence[Message], *, sampling: Sampling = DEFAULT_SAMPLING, tools: Sequence[ToolSpec] = (),
        schema: dict[str, Any] | None = None, on_text: Callable[[str], None] | None = None,
    ) -> Reply:  # fmt: skip
        """One reply. Tools and a schema are asked for in words.

        Raises:
          LMError: context_overflow, with both numbers; bad_request for a sampling that is none.
        """
        if tools:
            messages = plain.with_tools(messages, tools)
        if schema is not None:
            messages = plain.with_schema(messages, schema)
        ids = self._ids(messages)
        if len(ids) >= self.window:
            raise LMError(
                f"{self.name}: the prompt has {len(ids)} tokens, the model holds {self.window}, reply included. "
                "Send it in smaller pieces.",
                kind="context_overflow", model=self.name,
            )  # fmt: skip
        loop = asyncio.get_running_loop()
        row = _Row(loop, self._model.tokenizer, (*self._stop, *sampling.stop), on_text)
        row.left = min(sampling.max_tokens or self._max_tokens, self.window - len(ids))
        self.batcher.submit(
            Job(
                ids,
                row.left,
                self._sampling(sampling),
                sampling.seed,
                row.take,
                row.done,
                lambda: not row.future.done(),
            )
        )
        try:
            finish = await row.future  # cancelled with this task; the batcher then drops the row
        except (LMError, asyncio.CancelledError):
            raise
        except Exception as e:
            if row.handed_back is e:
                raise
            raise LMError(f"{self.name}: generation failed: {e}", kind="server", model=self.name) from e
        text = row.text
        calls = plain.read_tool_calls(text, tools) if tools else ()
        usage = Usage(calls=1, input_tokens=len(ids), output_tokens=row.taken, cost_usd=self.price(len(ids), row.taken))
        return Reply(
            text="" if calls else text, tool_calls=calls, usage=usage, model=self.name,
            finish_reason="tool_calls" if calls else finish,
        )  # fmt: skip

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Exact, for a call without tools and schema."""
        return len(self._ids(messages))

    def price(self, input_tokens: int, output_tokens: int, cached_tokens: int = 0) -> float | None:
        return self._price.dollars(input_tokens, output_tokens, cached_tokens)

    async def aclose(self) -> None:
        """End the batcher's thread once its work is done; the model stays usable."""
        await asyncio.to_thread(self.batcher.close)

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        tokenizer = self._model.tokenizer
        return [tokenizer.bos, *tokenizer.encode(self._template(messages))]

    def _sampling(self, wanted: Sampling) -> Any:
        from mor_jax.errors import UserError
        from mor_jax.inference.sampler import Sampling as Drawing

        temperature = self._temperature if wanted.temperature is None else wanted.temperature
        top_p = 1.0 if wanted.top_p is None else wanted.top_p
        try:
            if temperature == 0:
                return Drawing(temperature=0.0)  # the rest has no effect; one program serves all greedy calls
            return Drawing(temperature=temperature, top_k=int(wanted.extra.get("top_k", 0)), top_p=top_p)
        except (UserError, TypeError, ValueError) as e:
            raise LMError(f"{self.name}: {e}", kind="bad_request", model=self.name) from e


class _Row:
    """One call's side of the batcher: tokens to text, stop strings, and the way back into the event loop."""

    def __init__(self, loop: Any, tokenizer: Any, stop: Sequence[str], on_text: Callable[[str], None] | None):
        self.future = loop.create_future()
        self.stops = StopCutter(stop)
        self.taken = self.left = 0
        self.handed_back: Exception | None = None  # what the caller's on_text raised
        self._loop, self._eos, self._decoder, self._on_text = loop, tokenizer.eos, tokenizer.stream(), on_text
        self._finish = "length"
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._shown)

    def take(self, token: int) -> bool:
        self.taken += 1
        if token == self._eos:
            self._finish = "stop"
            return False
        self._show(self.stops.push(self._decoder.push(token)))
        if self.stops.hit:
            self._finish = "stop"
        return not self.stops.hit and self.taken < self.left

    def done(self, error: BaseException | None) -> None:
        self._show(self.stops.push(self._decoder.flush()))
        self._show(self.stops.flush())
        self._call(self._settle, error)

    def _show(self, text: str) -> None:
        text = text if self._shown else text.lstrip()  # the space after "assistant:"
        if text:
            self._shown.append(text)
            if self._on_text:
                self._call(self._hand, text)

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
            self._loop.call_soon_threadsafe(function, *args)

    def _hand(self, text: str) -> None:
        if not self.future.done():
            try:
                self._on_text(text)
            except Exception as e:
                self.handed_back = e
                self.future.set_exception(e)

    def _settle(self, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(self._finish)
        else:
            self.future.set_exception(error)


def _load(path: str, step: int | None) -> Any:
    try:
        from mor_jax.errors import UserError
        from mor_jax.train.load import load_model
    except ImportError as e:
        raise UsageError(
            f"checkpoint:{path} needs jax and mor_jax, and {e.name or 'one of them'} cannot be imported here ({e}). "
            "Install this project whole, or use an endpoint (openai:MODEL with base_url)."
        ) from e
    try:
        return load_model(path, step)
    except UserError as e:
        raise UsageError(f"checkpoint:{path}: {e}") from e


def _generate(
    model: Any, prompts: list[list[int]], max_tokens: int, sampling: Any, seed: int
) -> Generator[Sequence[int], None, None]:
    """The tokens of each step, one a prompt."""
    import jax

    from mor_jax.inference.generate import Generation

    with jax.set_mesh(model.mesh):
        run = Generation(
            model.lm, model.params, prompts, max_tokens=max_tokens, sampling=sampling, seed=seed,
            vocab_size=model.tokenizer.vocab_size,
        )  # fmt: skip
        for step in run:
            yield step.token_B
