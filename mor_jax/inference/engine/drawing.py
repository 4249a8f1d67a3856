"""Drawing the next token of every lane, on device, each by its own parameters.

What no active lane asks for is not computed (`lax.cond`), and what one lane asks for changes
nothing in another's result, to the last bit. The order is

    logits + bias -> repetition, presence, frequency penalties -> bans (stop tokens too early,
    grammar)
    -> / temperature -> top-k -> top-p of what that left -> min-p -> draw

A draw is the largest of score + Gumbel noise, which follows the softmax exactly, with no cap on how
many tokens take part. The noise of a token is a hash of (seed, position, token id): it costs a
fifth of what a generator of streams does over a large vocabulary, and a rounding difference in one
logit cannot shift another token's share, as it would with one uniform number laid on the cumulative
sum.

Tokens that tie with the last one kept by top-k, top-p or min-p are kept, too. At temperature 0 the
lowest id wins a tie, as in `inference/sampler.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mor_jax.inference.engine.rows import NO_GRAMMAR, DrawConfig, DrawRows, bits


class Drawn(NamedTuple):
    """Log-probabilities are those of the model: before temperature, penalties, bias and bans."""

    token_N: jax.Array  # int32; -1 where the lane was not active
    stopped_N: jax.Array  # bool; it is one of the lane's stop tokens
    logprob_N: jax.Array  # float32; 0 where no active lane asked
    top_ids_NxK: jax.Array
    top_logprobs_NxK: jax.Array


def draw(
    logits_NxV: jax.Array,
    rows: DrawRows,
    position_N: jax.Array,
    active_N: jax.Array,
    config: DrawConfig,
) -> tuple[Drawn, DrawRows]:
    """One token for every active lane.

    Args:
      logits_NxV: float32; columns from `config.vocab_size` on are ignored.
      position_N: index the drawn token will have in its sequence, that is the tokens before it.
      active_N: lanes that draw. The others get token -1, and their rows stay as they are.
      config: static.
    Returns:
      (what was drawn, the rows with the drawn tokens counted).
    """
    raw_NxV = logits_NxV[:, : config.vocab_size].astype(jnp.float32)
    samples_N = active_N & (rows.temperature_N > 0)
    shaped_N = active_N & _shaped(rows, position_N)

    def full(raw_NxV: jax.Array) -> jax.Array:
        def shape(x: jax.Array) -> jax.Array:
            return _shape(x, rows, position_N)

        x_NxV = jax.lax.cond(jnp.any(shaped_N), shape, lambda x: x, raw_NxV)

        def sample(x: jax.Array) -> jax.Array:
            return _largest(_scores(x, rows, position_N, samples_N, config))

        return jax.lax.cond(jnp.any(samples_N), sample, _largest, x_NxV)

    token_N = jax.lax.cond(jnp.any(samples_N | shaped_N), full, _largest, raw_NxV)
    logprobs = jax.lax.cond(
        jnp.any(active_N & (rows.logprobs_N >= 0)),
        lambda raw, token: top_logprobs(raw, token, config.max_logprobs),
        lambda raw, token: _no_logprobs(raw.shape[0], min(config.max_logprobs, config.vocab_size)),
        raw_NxV,
        token_N,
    )
    counted_N = jnp.where(active_N & _penalised(rows), token_N, config.vocab_size)
    counts = rows.counts_NxV.at[jnp.arange(token_N.shape[0]), counted_N].add(1, mode="drop")
    stopped_N = active_N & jnp.any(rows.stop_ids_NxS == token_N[:, None], axis=1)
    return Drawn(jnp.where(active_N, token_N, -1), stopped_N, *logprobs), rows._replace(
        counts_NxV=counts
    )


def top_logprobs(
    raw_NxV: jax.Array, token_N: jax.Array, k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log-probability of each row's token, ids and log-probabilities of the k most likely ones,
    most likely first)."""
    total_N = jax.nn.logsumexp(raw_NxV, axis=-1)
    own_N = jnp.take_along_axis(raw_NxV, token_N[:, None], axis=1)[:, 0]
    top_NxK, ids_NxK = jax.lax.top_k(raw_NxV, min(k, raw_NxV.shape[1]))
    return own_N - total_N, ids_NxK, top_NxK - total_N[:, None]


def _no_logprobs(rows: int, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    return jnp.zeros((rows,)), jnp.zeros((rows, k), jnp.int32), jnp.zeros((rows, k))


def _largest(x_NxV: jax.Array) -> jax.Array:
    """argmax, lowest id first, as two reductions: several times faster than `jnp.argmax` on a
    CPU."""
    ids = jnp.arange(x_NxV.shape[1], dtype=jnp.int32)
    at_top = x_NxV == jnp.max(x_NxV, axis=1, keepdims=True)
    # A row of NaN has no largest; any id will do, as long as it is one.
    return jnp.min(jnp.where(at_top, ids, x_NxV.shape[1] - 1), axis=1)


# ------------------------------------------------------------------------------------- bias,
# penalties, bans


def _penalised(rows: DrawRows) -> jax.Array:
    return (rows.presence_N != 0) | (rows.frequency_N != 0) | (rows.repetition_N != 1)


def _shaped(rows: DrawRows, position_N: jax.Array) -> jax.Array:
    """Lanes whose logits are changed before anything is drawn."""
    biased_N, banned_N = jnp.any(rows.bias_NxB != 0, axis=1), position_N < rows.free_from_N
    return _penalised(rows) | biased_N | banned_N | (rows.grammar_at_N != NO_GRAMMAR)


def _shape(x_NxV: jax.Array, rows: DrawRows, position_N: jax.Array) -> jax.Array:
    vocab = x_NxV.shape[1]
    lane = jnp.arange(x_NxV.shape[0])[:, None]
    x_NxV = x_NxV.at[lane, rows.bias_ids_NxB].add(rows.bias_NxB, mode="drop")

    def penalise(x: jax.Array) -> jax.Array:
        generated = rows.counts_NxV > 0
        seen = generated | bits(rows.prompt_NxW, vocab)
        repetition = rows.repetition_N[:, None]
        x = jnp.where(seen, jnp.where(x > 0, x / repetition, x * repetition), x)
        return (
            x - rows.presence_N[:, None] * generated - rows.frequency_N[:, None] * rows.counts_NxV
        )

    x_NxV = jax.lax.cond(jnp.any(_penalised(rows)), penalise, lambda x: x, x_NxV)
    too_early = jnp.where((position_N < rows.free_from_N)[:, None], rows.stop_ids_NxS, vocab)
    x_NxV = x_NxV.at[lane, too_early].set(-jnp.inf, mode="drop")
    free = (rows.grammar_at_N == NO_GRAMMAR)[:, None]

    def keep(x: jax.Array) -> jax.Array:
        return jnp.where(free | bits(rows.grammar_NxW, vocab), x, -jnp.inf)

    return jax.lax.cond(jnp.any(~free), keep, lambda x: x, x_NxV)


# ------------------------------------------------------------------------------------- drawing


def _scores(
    x_NxV: jax.Array,
    rows: DrawRows,
    position_N: jax.Array,
    samples_N: jax.Array,
    config: DrawConfig,
) -> jax.Array:
    """What the drawn token is the largest of; of greedy lanes the logits themselves."""
    scaled_NxV = x_NxV / jnp.where(rows.temperature_N > 0, rows.temperature_N, 1)[:, None]
    top_N = jnp.max(scaled_NxV, axis=1)
    lowest_N = top_N + jnp.log(rows.min_p_N)  # log 0 = -inf: off
    cuts_N = samples_N & ((rows.top_k_N > 0) | (rows.top_p_N < 1))

    def cut(x: jax.Array) -> jax.Array:
        return _lowest_kept(x, top_N, rows, cuts_N, config.candidates)

    lowest_N = jnp.maximum(
        lowest_N,
        jax.lax.cond(jnp.any(cuts_N), cut, lambda x: jnp.full_like(top_N, -jnp.inf), scaled_NxV),
    )
    noise_NxV = gumbel(_keys(rows.key_Nx2, position_N), x_NxV.shape[1])
    noisy = jnp.where(scaled_NxV >= lowest_N[:, None], scaled_NxV + noise_NxV, -jnp.inf)
    return jnp.where((rows.temperature_N > 0)[:, None], noisy, x_NxV)


def _keys(key_Nx2: jax.Array, position_N: jax.Array) -> jax.Array:
    def fold(key: jax.Array, t: jax.Array) -> jax.Array:
        return jax.random.key_data(
            jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), t)
        )

    return jax.vmap(fold)(key_Nx2, position_N)


def gumbel(key_Nx2: jax.Array, vocab: int) -> jax.Array:
    """Gumbel noise [N, vocab], a function of (key, token id) alone, by two rounds of a 32-bit
    mixing function with full avalanche (multiply and xor-shift; constants of the public-domain
    "lowbias32")."""

    def mix(h: jax.Array) -> jax.Array:
        h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
        h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
        return h ^ (h >> 16)

    ids = jnp.arange(vocab, dtype=jnp.uint32)
    hashed = mix(mix(ids[None] ^ key_Nx2[:, :1]) + key_Nx2[:, 1:])
    return -jnp.log(-jnp.log(unit(hashed)))


def unit(x: jax.Array) -> jax.Array:
    """uint32 to float32 in (0, 1), neither end: of 23 bits, since the half that is added needs the
    24th of a float32. With more, the largest would round to 1 and its Gumbel noise to infinity."""
    return ((x >> 9).astype(jnp.float32) + 0.5) * 2.0**-23


# ------------------------------------------------------------------------------------- top-k and
# top-p


def _lowest_kept(
    scaled_NxV: jax.Array, top_N: jax.Array, rows: DrawRows, cuts_N: jax.Array, candidates: int
) -> jax.Array:
    """Score of the last token that top-k, then top-p, keep; -inf in lanes that ask for neither.

    Among the most likely `candidates` first. A lane whose cut lies beyond them is searched as a
    whole."""
    vocab = scaled_NxV.shape[1]
    # the one more shows whether the last candidate ties with what follows
    enough = min(candidates + 1, vocab)
    # The barrier keeps slices of the result apart from it: merged with them XLA:CPU sorts
    # everything, 100 times slower. Around the pair of top_k's results it would end XLA:CPU, when it
    # compiles for several devices.
    best_NxC = jax.lax.optimization_barrier(jax.lax.top_k(scaled_NxV, enough)[0])
    mass_NxC = jnp.exp(best_NxC - top_N[:, None])
    sees_all = enough == vocab
    limits_k, limits_p = rows.top_k_N > 0, rows.top_p_N < 1

    k_N = jnp.clip(rows.top_k_N, 1, enough)
    kth_N = jnp.where(
        limits_k, jnp.take_along_axis(best_NxC, k_N[:, None] - 1, axis=1)[:, 0], -jnp.inf
    )

    def ends_inside(lowest: jax.Array) -> jax.Array:
        return sees_all | (lowest > best_NxC[:, -1])

    k_found = ~limits_k | ((rows.top_k_N <= enough) & ends_inside(kth_N))

    kept_NxC = jnp.where(best_NxC >= kth_N[:, None], mass_NxC, 0)
    everything_N = jnp.sum(jnp.exp(scaled_NxV - top_N[:, None]), axis=1)
    whole_N = jnp.where(limits_k, jnp.sum(kept_NxC, axis=1), everything_N)
    reached_NxC = jnp.cumsum(kept_NxC, axis=1) >= (rows.top_p_N * whole_N)[:, None]
    last_N = jnp.argmax(reached_NxC, axis=1)
    pth_N = jnp.where(
        limits_p, jnp.take_along_axis(best_NxC, last_N[:, None], axis=1)[:, 0], -jnp.inf
    )
    p_found = ~limits_p | (jnp.any(reached_NxC, axis=1) & (sees_all | ends_inside(pth_N)))
    fast_N = jnp.maximum(kth_N, pth_N)

    missing_N = cuts_N & ~(k_found & p_found)

    def search(x: jax.Array) -> jax.Array:
        return jnp.where(missing_N, _search(x, top_N, rows), fast_N)

    return jax.lax.cond(jnp.any(missing_N), search, lambda x: fast_N, scaled_NxV)


def _search(scaled_NxV: jax.Array, top_N: jax.Array, rows: DrawRows) -> jax.Array:
    """As `_lowest_kept`, over all tokens, without sorting them."""
    order_NxV = _ordered(scaled_NxV)
    one = jnp.ones_like(scaled_NxV)
    kth_N = _descend(order_NxV, one, jnp.maximum(rows.top_k_N, 1).astype(jnp.float32))
    kth_N = jnp.where(rows.top_k_N > 0, kth_N, 0)
    kept_NxV = jnp.where(order_NxV >= kth_N[:, None], jnp.exp(scaled_NxV - top_N[:, None]), 0)
    pth_N = _descend(order_NxV, kept_NxV, rows.top_p_N * jnp.sum(kept_NxV, axis=1))
    lowest_N = jnp.maximum(kth_N, jnp.where(rows.top_p_N < 1, pth_N, 0))
    return jnp.min(jnp.where(order_NxV >= lowest_N[:, None], scaled_NxV, jnp.inf), axis=1)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 in the order of float32 `x`."""
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(raw >> 31 == 1, ~raw, raw | jnp.uint32(1 << 31))


def _descend(order_NxV: jax.Array, weight_NxV: jax.Array, need_N: jax.Array) -> jax.Array:
    """Largest value [N] such that tokens at or above it weigh at least `need_N`; found bit by bit
    from the top."""

    def bit(i: jax.Array, found_N: jax.Array) -> jax.Array:
        tried_N = found_N | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        weighs_N = jnp.sum(jnp.where(order_NxV >= tried_N[:, None], weight_NxV, 0), axis=1)
        return jnp.where(weighs_N >= need_N, tried_N, found_N)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros(order_NxV.shape[:1], jnp.uint32))
