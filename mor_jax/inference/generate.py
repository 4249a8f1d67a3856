"""Plain generation: prefill once, then one decode step a token, streaming each as it appears."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.errors import UserError
from mor_jax.inference.cache import Cache
from mor_jax.inference.decode import decode_step, prefill
from mor_jax.inference.sampler import Sampling, sample
from mor_jax.model.depth import DepthControl
from mor_jax.model.lm import LM
from mor_jax.nn.parameters import Tree

SMALLEST_PREFILL = 16
GREEDY = Sampling(temperature=0.0)


class Generated(NamedTuple):
    """One token of each sequence. A depth is known once the model has read the token, so it comes
    one step late."""

    token_B: np.ndarray
    previous_depth_B: np.ndarray  # of the token before this one (the prompt's last, at first)


class Generation:
    """Streams tokens for a batch of prompts; iterate over it. Greedy or sampled, reproducible by
    seed.

    Args:
      prompts: token ids of each sequence, at least one each.
      max_tokens: new tokens; together with the longest prompt at most the model's context.
      seed: sequence b at position t draws with the key fold_in(fold_in(key(seed), b), t).
      vocab_size: ids from here on are padding of the table and are never drawn (default: none).
      control: dial, floor and cap of each sequence's depth (`dial.depth_control`).

    After construction `prompt_depths` holds the depth of every prompt token. `last_depths()` gives
    that of the token drawn last.

    Raises:
      UserError: an empty prompt, or a prompt that leaves no room in the context.
    """

    def __init__(
        self,
        lm: LM,
        params: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        vocab_size: int | None = None,
        control: DepthControl | None = None,
    ):
        lengths = [len(p) for p in prompts]
        context = lm.model.context
        if not lengths or min(lengths) == 0:
            raise UserError(
                "a prompt has no tokens; give at least one (the document start will do)."
            )
        if max(lengths) >= context:
            raise UserError(
                f"the prompt has {max(lengths)} tokens, the model's context is {context}, which must also hold what is "
                f"generated. Shorten the prompt to at most {context - 1} tokens, or train with a larger "
                "config.model.context."
            )
        if max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, got {max_tokens}.")
        self.max_tokens = min(max_tokens, context - max(lengths))
        self._lm, self._params, self._control = lm, params, control
        self._sampling, self._limit = sampling, vocab_size or lm.model.vocab_size
        self._key = jax.random.key(seed)
        padded = min(max(SMALLEST_PREFILL, 1 << (max(lengths) - 1).bit_length()), context)
        tokens = np.zeros((len(prompts), padded), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        self._length_B = jnp.asarray(lengths, jnp.int32)
        logits, self._cache, depth_BxT = _prefill(
            lm, params, jnp.asarray(tokens), self._length_B, context, control
        )
        self._token_B = _draw(logits, self._key, self._length_B, sampling, self._limit)
        depths = np.asarray(depth_BxT)
        self.prompt_depths = [depths[b, :n] for b, n in enumerate(lengths)]
        self._depth_B = jnp.asarray([d[-1] for d in self.prompt_depths])

    @property
    def cache(self) -> Cache:
        """The cache as it stands (read it, do not keep it: the next step reuses its memory)."""
        return self._cache

    def __iter__(self) -> Iterator[Generated]:
        for i in range(self.max_tokens):
            token, depth = self._token_B, self._depth_B
            if i + 1 < self.max_tokens:  # the device works on the next token while this one is read
                self._step()
            yield Generated(np.asarray(token), np.asarray(depth))

    def last_depths(self) -> np.ndarray:
        """Depth of the token drawn last; runs it through the model. Only after iterating to the
        end."""
        if int(self._cache.length_B.max()) < self._lm.model.context:
            self._step()
        return np.asarray(self._depth_B)

    def _step(self) -> None:
        self._token_B, self._cache, self._depth_B = _advance(
            self._lm,
            self._params,
            self._cache,
            self._token_B,
            self._key,
            self._sampling,
            self._limit,
            self._control,
        )


@functools.partial(jax.jit, static_argnums=(3, 4))
def _draw(
    logits_BxV: jax.Array, key: jax.Array, position_B: jax.Array, sampling: Sampling, limit: int
) -> jax.Array:
    rows = jnp.arange(logits_BxV.shape[0])
    keys = jax.vmap(lambda b, t: jax.random.fold_in(jax.random.fold_in(key, b), t))(
        rows, position_B
    )
    return sample(
        jnp.where(jnp.arange(logits_BxV.shape[1]) < limit, logits_BxV, -jnp.inf), keys, sampling
    )


_prefill = jax.jit(prefill, static_argnums=(0, 4))


@functools.partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=(2,))
def _advance(
    lm: LM,
    params: Tree,
    cache: Cache,
    token_B: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    limit: int,
    control: DepthControl | None,
) -> tuple[jax.Array, Cache, jax.Array]:
    logits, cache, depth_B = decode_step(lm, params, cache, token_B, control)
    return _draw(logits, key, cache.length_B, sampling, limit), cache, depth_B
