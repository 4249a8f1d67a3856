"""Log-probabilities of a prompt's own tokens, with the most likely ones beside each.

The prompt goes through the model in chunks of one size, like any prefill, and the head reads every
token of a chunk: equal to the full causal forward pass, with memory for one chunk of logits. It has
a lane of its own, so the lanes that decode are not touched; whoever runs both lets ticks go between
the chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mor_jax.errors import UserError
from mor_jax.inference.engine import layers
from mor_jax.inference.engine.drawing import top_logprobs
from mor_jax.inference.engine.placement import Placement
from mor_jax.inference.engine.prefill import prefill_states
from mor_jax.inference.engine.programs import open_lane
from mor_jax.inference.engine.request import PromptScored
from mor_jax.inference.engine.rows import DrawConfig
from mor_jax.inference.engine.state import Shape, State
from mor_jax.model.depth import DepthControl
from mor_jax.model.kv import SHARED
from mor_jax.model.lm import LM


class _Scores(NamedTuple):
    logprob_C: jax.Array
    ids_CxK: jax.Array
    logprobs_CxK: jax.Array
    depth_C: jax.Array


def _score_chunk(
    lm: LM,
    shape: Shape,
    config: DrawConfig,
    weights: layers.Weights,
    state: State,
    tokens_C: jax.Array,
    next_C: jax.Array,
    count: jax.Array,
) -> tuple[State, _Scores]:
    """tokens_C[:count] through the model, and what it says of the token after each."""
    state, chunk, x_CxD = prefill_states(lm, shape, weights, state, jnp.int32(0), tokens_C, count)
    logits_CxV = layers.logits(lm, weights, x_CxD)[:, : config.vocab_size]
    return state, _Scores(*top_logprobs(logits_CxV, next_C, config.max_logprobs), chunk.depth_C)


class Scorer:
    """Scores prompts one at a time. One thread calls it.

    Args:
      params: as `LM.init` returns them; or give `weights`, prepared already.
      vocab_size: ids from here on are padding of the model's table and have no probability.
      max_logprobs: K, most likely tokens beside each.
      chunk: tokens that go through the model at once.
      context: longest prompt; default: the model's.
      mesh: as of `device.Device`.
    """

    def __init__(
        self,
        lm: LM,
        params: Any,
        *,
        vocab_size: int | None = None,
        max_logprobs: int = 20,
        chunk: int = 64,
        context: int | None = None,
        mesh: Mesh | None = None,
        weights: layers.Weights | None = None,
    ):
        self._lm = lm
        self.context = context or lm.model.context
        self.chunk = min(chunk, self.context)
        self._config = DrawConfig(vocab_size or lm.model.vocab_size, max_logprobs=max_logprobs)
        most = self.context * (1 if lm.depth.kv_name == SHARED else lm.program.recursions)
        shape = Shape(self.context, (most,))
        self._place = place = Placement(mesh, lm.rules)
        self._weights = place.prepare(lm, params) if weights is None else weights
        # The rows of a sampler belong to a state; this one draws nothing, so they are the smallest
        # there are.
        self._state = place.empty_state(lm, shape, DrawConfig(1), self._weights["router"])
        self._begun = 0  # prompts
        run, state = functools.partial(_score_chunk, lm, shape, self._config), self._state
        tokens_C = np.zeros((self.chunk,), np.int32)
        with place.scope():
            made = jax.eval_shape(run, self._weights, state, tokens_C, tokens_C, np.int32(0))
        self._run = jax.jit(run, donate_argnums=1, out_shardings=place.outputs(made))
        self._open = jax.jit(open_lane, donate_argnums=0, out_shardings=place.outputs(state))

    def warm_up(self) -> None:
        """Compile; nothing compiles afterwards."""
        # the state that a chunk returned is another type to the compiler than the first, empty one
        for _ in range(2):
            self.score([0, 0])

    def score(self, tokens: Sequence[int], control: DepthControl | None = None) -> PromptScored:
        """Log-probability of each token given those before it; None for the first, which nothing
        predicts.

        Args:
          control: dial, floor and cap of the depth, of one row; default: as the model was
            configured.
        Raises:
          UserError: no tokens, more than the context, or one outside the vocabulary.
        """
        *_, scored = self.steps(tokens, control)
        assert scored is not None, "the last step gives the scores"
        return scored

    def steps(
        self, tokens: Sequence[int], control: DepthControl | None = None
    ) -> Iterator[PromptScored | None]:
        """As `score`, in steps: None after each chunk, so that other work can go between, and the
        scores at last.

        One prompt at a time: a second one must not begin before the first is through."""
        ids = np.asarray(tokens, np.int64)
        if not 1 <= len(ids) <= self.context:
            raise UserError(
                f"a prompt to score must have 1 to {self.context} tokens, got {len(ids)}."
            )
        if np.min(ids) < 0 or np.max(ids) >= self._config.vocab_size:
            raise UserError(
                f"a prompt's tokens must be ids below {self._config.vocab_size}, got {np.max(ids)}."
            )
        return self._steps(ids.astype(np.int32), control)

    def _steps(
        self, ids_T: np.ndarray, control: DepthControl | None
    ) -> Iterator[PromptScored | None]:
        control = (
            DepthControl.neutral(1, self._lm.program.recursions) if control is None else control
        )
        with self._place.scope():
            self._state = self._open(
                self._state, np.int32(0), jax.tree.map(lambda leaf: np.asarray(leaf)[0], control)
            )
        self._begun += 1
        mine, last, parts = self._begun, len(ids_T) - 1, []
        for start in range(0, last, self.chunk):
            if mine != self._begun:
                raise RuntimeError("another prompt was begun before this one was scored to its end")
            count = min(self.chunk, last - start)
            here, after = np.zeros((2, self.chunk), np.int32)
            here[:count], after[:count] = (
                ids_T[start : start + count],
                ids_T[start + 1 : start + 1 + count],
            )
            with self._place.scope():
                self._state, scores = self._run(
                    self._weights, self._state, here, after, np.int32(count)
                )
            for leaf in scores:
                leaf.copy_to_host_async()
            parts.append((scores, count))
            yield None
        logprobs: list[float | None] = [None]
        tops: list[tuple[tuple[int, float], ...]] = [()]
        for scores, count in parts:
            own, ids, likely, _ = (np.asarray(leaf)[:count].tolist() for leaf in scores)
            logprobs += own
            tops += [tuple(zip(*pair, strict=True)) for pair in zip(ids, likely, strict=True)]
        yield PromptScored(tuple(logprobs), tuple(tops))


__all__ = ["Scorer"]
