"""Text in, text out: tokens of a prompt and of its continuation, each with its depth, as they appear."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import jax

from mor_jax.inference.dial import depth_control
from mor_jax.inference.generate import Generation
from mor_jax.inference.sampler import Sampling


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
) -> Iterator[Piece]:  # fmt: skip
    """Yield the prompt's pieces, then the continuation's, up to the end of the document or `max_tokens`.

    A piece appears one token late: its depth is known once the model has read it.

    Args:
      model: of `train.load.load_model`.
      sampling: default temperature 0.8.
      mean_depth, min_depth, max_depth: see `dial.depth_control`; default: as the model was configured.
    Raises:
      UserError: the prompt does not fit the context, or the model cannot have such depths.
    """
    tokenizer = model.tokenizer
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    limits = {"mean_depth": mean_depth, "min_depth": min_depth, "max_depth": max_depth}
    with jax.set_mesh(model.mesh):
        control = None
        if any(limit is not None for limit in limits.values()):
            control = depth_control(model.lm, model.params, 1, **limits)
        run = Generation(
            model.lm, model.params, [ids], max_tokens=max_tokens, sampling=sampling or Sampling(0.8),
            seed=seed, vocab_size=tokenizer.vocab_size, control=control,
        )  # fmt: skip
        decoder = tokenizer.stream()
        for token, depth in zip(ids, run.prompt_depths[0], strict=True):
            yield Piece(decoder.push(token), int(depth), True)
        waiting = None
        for step in run:
            if waiting is not None:
                yield Piece(decoder.push(waiting), int(step.previous_depth_B[0]), False)
            waiting = int(step.token_B[0])
            if waiting == tokenizer.eos:
                break
        else:
            if waiting is not None:
                yield Piece(decoder.push(waiting), int(run.last_depths()[0]), False)
        tail = decoder.flush()
        if tail:
            yield Piece(tail, 0, False)
    if run.cut_short:
        print(f"[stopped: the context of {model.lm.model.context} tokens is full]", file=sys.stderr)
