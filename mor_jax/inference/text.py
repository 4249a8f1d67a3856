"""Text in, text out: tokens of a prompt and of its continuation, each with its depth, as they
appear."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, Protocol

from jax.sharding import Mesh

from mor_jax.data.vocabulary import Tokenizer
from mor_jax.errors import UserError
from mor_jax.inference.engine.build import build_service
from mor_jax.inference.engine.device import EngineConfig, can_serve
from mor_jax.inference.engine.plain import PlainService
from mor_jax.inference.engine.request import (
    DepthWish,
    Drawing,
    Event,
    Finished,
    PromptRead,
    Request,
    Service,
    Ticket,
    Token,
)
from mor_jax.inference.engine.service import ServiceConfig
from mor_jax.inference.sampler import Sampling
from mor_jax.model.block import Params
from mor_jax.model.lm import LM

# One sequence, so there is nothing to share. Two lanes, since products of one row are slow.
ONE = EngineConfig(lanes=2, full_lanes=2, chunks=(64,))
ONE_AT_A_TIME = ServiceConfig(prefix_bytes=0, idle_s=0.0)


class Model(Protocol):
    """What is needed of a loaded model (`train.load.Loaded`)."""

    @property
    def lm(self) -> LM: ...

    @property
    def params(self) -> Params: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def mesh(self) -> Mesh: ...


class TextPiece(NamedTuple):
    """Text of one token (empty while a multi-byte character is incomplete) and the recursions that
    token ran."""

    text: str
    depth: int
    in_prompt: bool


def stream_text(
    model: Model,
    prompt: str,
    *,
    max_tokens: int = 200,
    sampling: Sampling | None = None,
    seed: int = 0,
    mean_depth: float | None = None,
    min_depth: int | None = None,
    max_depth: int | None = None,
    service: Service | None = None,
) -> Iterator[TextPiece]:
    """Yield the prompt's pieces, then the continuation's, up to the end of the document or
    `max_tokens`.

    A piece appears one token late: its depth is known once the model has read it.

    Args:
      model: of `train.load.load_model`.
      sampling: default temperature 0.8.
      mean_depth, min_depth, max_depth: see `dial.depth_control`; default: as the model was
        configured.
      service: an engine of this model to run on (`engine.build.build_service`); default: one for
        this text alone.
    Raises:
      UserError: the prompt does not fit the context, or the model cannot have such depths.
    """
    tokenizer, context = model.tokenizer, model.lm.model.context
    request = _request(
        model, prompt, max_tokens, sampling, seed, DepthWish(mean_depth, min_depth, max_depth)
    )
    ids, room = list(request.prompt), context - len(request.prompt)
    # One more, which says how deep the last one thought.
    request = dataclasses.replace(request, max_tokens=min(max_tokens + 1, room), prompt_depths=True)
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    if (running := service) is None:
        a_token_a_tick = dataclasses.replace(ONE, boundary_every=model.lm.program.recursions)
        running = _service(model, a_token_a_tick, ONE_AT_A_TIME)
    ticket = running.submit(request, events.put)
    try:
        yield from _pieces(tokenizer, ids, min(max_tokens, room), events)
    finally:
        ticket.cancel()
        if service is None:
            running.close()
    if max_tokens > room:
        print(f"[stopped: the context of {context} tokens is full]", file=sys.stderr)


class Completion(NamedTuple):
    """What one prompt was continued with. `finish`: "stop" (end of the document, or a stop string)
    or "length"."""

    prompt: str | Sequence[int]
    # among the n of its prompt
    index: int  # type: ignore[assignment]  # not tuple.index
    text: str
    finish: str


def complete(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    *,
    n: int = 1,
    stop: Sequence[str] = (),
    max_tokens: int = 200,
    sampling: Sampling | None = None,
    seed: int = 0,
    mean_depth: float | None = None,
    min_depth: int | None = None,
    max_depth: int | None = None,
    lanes: int = 16,
    stop_tokens: Collection[int] | None = None,
) -> list[Completion]:
    """Continue all prompts in one batch: n times each, in the order of the prompts.

    Args:
      prompts: texts, or ids as they are.
      n: continuations of a prompt; the i-th draws with seed + i, so each is what it would be alone.
      stop: strings at the first of which a text ends, without it.
      lanes: sequences decoded at once.
      stop_tokens: ids that end a text; default: the tokenizer's own.
      Others: as in `stream_text`.
    Raises:
      UserError: as `stream_text`; nothing has been generated then.
    """
    if n < 1:
        raise UserError(f"n must be at least 1, got {n}.")
    if any(not text for text in stop):
        raise UserError("a stop string must not be empty.")
    wish = DepthWish(mean_depth, min_depth, max_depth)
    wanted = [(p, i) for p in prompts for i in range(n)]
    requests = [_request(model, p, max_tokens, sampling, seed + i, wish) for p, i in wanted]
    if stop_tokens is not None:
        requests = [dataclasses.replace(r, stop_tokens=frozenset(stop_tokens)) for r in requests]
    service = _service(
        model,
        EngineConfig(lanes=max(2, min(lanes, len(requests)))),
        ServiceConfig(queue=len(requests)),
    )
    with contextlib.closing(service):
        events: list[queue.SimpleQueue[list[Event]]] = [queue.SimpleQueue() for _ in requests]
        tickets = [service.submit(r, q.put) for r, q in zip(requests, events, strict=True)]
        return [
            Completion(prompt, i, *_finished(model.tokenizer, q, ticket, stop))
            for (prompt, i), q, ticket in zip(wanted, events, tickets, strict=True)
        ]


def _service(model: Model, engine: EngineConfig, config: ServiceConfig) -> Service:
    """The batching engine, or plain decode for a model that it does not compute."""
    if can_serve(model.lm):
        return build_service(model, engine, config)
    return PlainService(model, queue=max(config.queue, 1))


def _finished(
    tokenizer: Tokenizer,
    events: queue.SimpleQueue[list[Event]],
    ticket: Ticket,
    stop: Sequence[str],
) -> tuple[str, str]:
    """(text, why it ended) of one request, when it has."""
    decoder, text = tokenizer.stream(), ""
    while True:
        for event in events.get():
            if isinstance(event, Token) and not event.stopped:
                text += decoder.push(event.id)
                at = [place for place in map(text.find, stop) if place >= 0]
                if at:
                    ticket.finish()
                    return text[: min(at)], "stop"
            elif isinstance(event, Finished):
                if event.error is not None:
                    raise RuntimeError(f"generation failed: {event.error}")
                return text + decoder.flush(), event.reason


def _request(
    model: Model,
    prompt: str | Sequence[int],
    max_tokens: int,
    sampling: Sampling | None,
    seed: int,
    wish: DepthWish,
) -> Request:
    """Raises UserError."""
    tokenizer, context = model.tokenizer, model.lm.model.context
    ids = tokenizer.prompt(prompt) if isinstance(prompt, str) else list(prompt)
    if len(ids) >= context:
        raise UserError(
            f"the prompt has {len(ids)} tokens, the model's context is {context}, which must also hold what is "
            f"generated. Shorten the prompt to at most {context - 1} tokens, or train with a larger config.model.context."
        )
    if max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, got {max_tokens}.")
    s = sampling or Sampling(0.8)
    drawing = Drawing(
        temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, seed=seed
    )
    return Request(
        tuple(ids),
        min(max_tokens, context - len(ids)),
        drawing,
        stop_tokens=tokenizer.ends,
        depth=wish,
    )


def _pieces(
    tokenizer: Tokenizer, ids: list[int], most: int, events: queue.SimpleQueue[list[Event]]
) -> Iterator[TextPiece]:
    """Pieces of the prompt and of `most` tokens at most, from the engine's events."""
    decoder, count, depth = tokenizer.stream(), 0, 0
    waiting: int | None = ids[-1]

    def all_events() -> Iterator[Event]:
        while True:
            yield from events.get()

    for event in all_events():
        if isinstance(event, PromptRead):
            for token, depth in zip(ids[:-1], event.depths, strict=True):
                yield TextPiece(decoder.push(token), depth, True)
        elif isinstance(event, Token):  # its depth is that of the token before it
            depth = event.depth
            assert waiting is not None, "it was drawn from one"
            yield TextPiece(decoder.push(waiting), depth, count == 0)
            waiting = None
            if count == most or event.stopped:
                break
            waiting = event.id
            count += 1
        elif isinstance(event, Finished):
            if event.error is not None:
                raise RuntimeError(f"generation failed: {event.error}")
            if waiting is not None:  # the context is full, and nobody reads the last token
                yield TextPiece(decoder.push(waiting), depth, False)
            break
    if tail := decoder.flush():
        yield TextPiece(tail, 0, False)
