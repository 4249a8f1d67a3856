"""Text in, text out: tokens of a prompt and of its continuation, each with its depth, as they appear."""

from __future__ import annotations

import dataclasses
import queue
import sys
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from mor_jax.errors import UserError
from mor_jax.inference.engine.build import build_service
from mor_jax.inference.engine.device import EngineConfig
from mor_jax.inference.engine.request import DepthWish, Drawing, Finished, PromptRead, Request, Service, Token
from mor_jax.inference.engine.service import ServiceConfig
from mor_jax.inference.sampler import Sampling

# One sequence, so there is nothing to share. Two lanes, since products of one row are slow.
ONE = EngineConfig(lanes=2, full_lanes=2, chunks=(64,))
ONE_AT_A_TIME = ServiceConfig(prefix_bytes=0, idle_s=0.0)


class Model(Protocol):
    """What is needed of a loaded model."""

    lm: object
    params: object
    tokenizer: object
    mesh: object


class Piece(NamedTuple):
    """Text of one token (empty while a multi-byte character is incomplete) and the recursions that token ran."""

    text: str
    depth: int
    in_prompt: bool


def stream_text(
    model: Model, prompt: str, *, max_tokens: int = 200, sampling: Sampling | None = None, seed: int = 0,
    mean_depth: float | None = None, min_depth: int | None = None, max_depth: int | None = None,
    service: Service | None = None,
) -> Iterator[Piece]:  # fmt: skip
    """Yield the prompt's pieces, then the continuation's, up to the end of the document or `max_tokens`.

    A piece appears one token late: its depth is known once the model has read it.

    Args:
      model: of `train.load.load_model`.
      sampling: default temperature 0.8.
      mean_depth, min_depth, max_depth: see `dial.depth_control`; default: as the model was configured.
      service: an engine of this model to run on (`engine.build.build_service`); default: one for this text alone.
    Raises:
      UserError: the prompt does not fit the context, or the model cannot have such depths.
    """
    tokenizer, context = model.tokenizer, model.lm.model.context
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    if len(ids) >= context:
        raise UserError(
            f"the prompt has {len(ids)} tokens, the model's context is {context}, which must also hold what is "
            f"generated. Shorten the prompt to at most {context - 1} tokens, or train with a larger config.model.context."
        )
    if max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, got {max_tokens}.")
    room = context - len(ids)
    s = sampling or Sampling(0.8)
    request = Request(
        tuple(ids), min(max_tokens + 1, room),  # one more, which says how deep the last one thought
        Drawing(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, seed=seed),
        stop_tokens=frozenset([tokenizer.eos]), prompt_depths=True, depth=DepthWish(mean_depth, min_depth, max_depth),
    )  # fmt: skip
    events: queue.SimpleQueue = queue.SimpleQueue()
    if (running := service) is None:
        a_token_a_tick = dataclasses.replace(ONE, boundary_every=model.lm.program.recursions)
        running = build_service(model, a_token_a_tick, ONE_AT_A_TIME)
    ticket = running.submit(request, events.put)
    try:
        yield from _pieces(tokenizer, ids, min(max_tokens, room), events)
    finally:
        ticket.cancel()
        if service is None:
            running.close()
    if max_tokens > room:
        print(f"[stopped: the context of {context} tokens is full]", file=sys.stderr)


def _pieces(tokenizer, ids: list[int], most: int, events: queue.SimpleQueue) -> Iterator[Piece]:
    """Pieces of the prompt and of `most` tokens at most, from the engine's events."""
    decoder, waiting, count = tokenizer.stream(), ids[-1], 0
    depth = 0

    def all_events():
        while True:
            yield from events.get()

    for event in all_events():
        if isinstance(event, PromptRead):
            for token, depth in zip(ids[:-1], event.depths, strict=True):
                yield Piece(decoder.push(token), depth, True)
        elif isinstance(event, Token):  # its depth is that of the token before it
            depth = event.depth
            yield Piece(decoder.push(waiting), depth, count == 0)
            waiting = None
            if count == most or event.stopped:
                break
            waiting = event.id
            count += 1
        elif isinstance(event, Finished):
            if event.error is not None:
                raise RuntimeError(f"generation failed: {event.error}")
            if waiting is not None:  # the context is full, and nobody reads the last token
                yield Piece(decoder.push(waiting), depth, False)
            break
    if tail := decoder.flush():
        yield Piece(tail, 0, False)
