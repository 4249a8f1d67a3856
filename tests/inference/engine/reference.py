"""The device's contract in its plainest form: whole sequences through `prefill`, one at a time, no
cache kept.

What a lane holds is the tokens that were put into it, so a scheduler that loads the wrong rows, or
forgets some, gets the tokens of another text. Results are those of the moment of dispatch, and
tickets must be fetched in order.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from small import random_params, small_lm, spread_routers

from mor_jax.inference.decode import prefill
from mor_jax.inference.dial import depth_control
from mor_jax.inference.engine.device import Device, Lengths, Prefilled, Rows, Ticked
from mor_jax.inference.engine.drawing import draw
from mor_jax.inference.engine.request import DepthWish
from mor_jax.inference.engine.rows import DrawConfig, bits, waiting
from mor_jax.inference.generate import Generation

CONTEXT, VOCAB = 64, 64
CONFIG = DrawConfig(VOCAB, candidates=16, max_logprobs=4)
WISHES = (DepthWish(), DepthWish(most=1), DepthWish(least=2))


@functools.cache
def model():
    lm = small_lm("mor")
    return lm, spread_routers(random_params(lm))


@functools.cache
def control_of(wish):
    if wish == DepthWish():
        return None
    return depth_control(
        *model(), 1, min_depth=wish.least, max_depth=wish.most, mean_depth=wish.mean
    )


_prefill = jax.jit(prefill, static_argnums=(0, 4))
_draw = jax.jit(draw, static_argnums=4)


@functools.cache
def read(tokens, key):
    """(logits after them, depth of each) of a sequence under the control whose bytes are `key`."""
    lm, params = model()
    row = np.zeros((1, CONTEXT), np.int32)
    row[0, : len(tokens)] = tokens
    logits, _, depth = _prefill(lm, params, row, jnp.asarray([len(tokens)]), CONTEXT, CONTROLS[key])
    return np.asarray(logits)[0], np.asarray(depth)[0, : len(tokens)]


CONTROLS = {b"": None}


def key_of(control):
    key = b"" if control is None else b"".join(np.asarray(leaf).tobytes() for leaf in control)
    CONTROLS[key] = control
    return key


@functools.cache
def oracle(prompt, wish=WISHES[0]):
    """Greedy tokens of plain decoding, as many as the context has room for."""
    lm, params = model()
    return tuple(
        int(g.token_B[0])
        for g in Generation(lm, params, [prompt], max_tokens=CONTEXT, control=_neutral(wish))
    )


def _neutral(wish):
    """One program for all wishes."""
    control = control_of(wish)
    return depth_control(*model(), 1) if control is None else control


class _Ticket:
    def __init__(self, device, result):
        self.device, self.result = device, result
        device.open_tickets.append(self)

    def ready(self):
        return True

    def fetch(self):
        assert self.device.open_tickets.pop(0) is self, (
            "tickets are fetched in the order they were made"
        )
        return self.result() if callable(self.result) else self.result


class _Lane:
    def __init__(self):
        self.tokens, self.key, self.on, self.void, self.life = [], b"", False, False, 0
        self.entering, self.row, self.remaining, self.busy = None, None, 0, 0


class ReferenceDevice:
    """Lanes of these sizes (entries of the core log). m: passes a tick. expect: recursions it says
    a token runs."""

    def __init__(self, rooms=(3 * CONTEXT,) * 2, *, chunks=(4, 16), m=1, expect=1.7):
        self.rooms, self.chunks, self.m, self.expect = rooms, tuple(sorted(chunks)), m, expect
        self.lanes, self.context, self.draw_config = len(rooms), CONTEXT, CONFIG
        self._lanes = [_Lane() for _ in rooms]
        self.open_tickets = []
        self.prefills, self.loads, self.warmed = 0, 0, 0
        self.memory_bytes = sum(self.bytes_per_sequence(CONTEXT, room) for room in rooms)

    cut = Device.cut

    @property
    def warm(self):
        return self.warmed > 0

    def warm_up(self, progress=None):
        self.warmed += 1

    def _depths(self, lane):
        return read(tuple(lane.tokens), lane.key)[1] if lane.tokens else np.zeros(0, int)

    def _lengths(self, lane):
        return Lengths(len(lane.tokens), int(self._depths(lane).sum()))

    def open(self, lane, control=None):
        life = self._lanes[lane].life
        new = self._lanes[lane] = _Lane()
        new.key, new.life = key_of(control), life + 1

    def load(self, lane, rows):
        at, (key, tokens) = self._lanes[lane], rows.pieces
        assert key == at.key, "rows of another depth"
        assert rows.start == self._lengths(at), "rows are loaded in order"
        assert rows.stop.entries <= self.rooms[lane], "rows fit"
        at.tokens += tokens
        self.loads += 1

    def save(self, lane, start, stop):
        at = self._lanes[lane]
        assert stop.tokens <= len(at.tokens)
        return _Rows(start, stop, (at.key, at.tokens[start.tokens : stop.tokens]))

    def prefill(self, lane, tokens):
        at = self._lanes[lane]
        assert 1 <= len(tokens) <= self.chunks[-1] and not at.on
        self.prefills += 1
        before = len(at.tokens)
        at.tokens += tokens
        assert len(at.tokens) < CONTEXT
        depths, lengths = self._depths(at)[before:], self._lengths(at)
        if at.void or lengths.entries > self.rooms[lane]:
            at.void = True
            del at.tokens[before:]
            return _Ticket(self, Prefilled(depths, self._lengths(at), False))
        return _Ticket(self, Prefilled(depths, lengths, True))

    def start(self, lane, token, row, remaining):
        at = self._lanes[lane]
        assert not at.void and remaining >= 1 and len(at.tokens) + 1 + remaining <= CONTEXT
        at.on, at.entering, at.row, at.remaining = (
            True,
            token,
            jax.tree.map(lambda x: np.asarray(x)[None], row),
            remaining,
        )

    def stop(self, lane):
        self._lanes[lane].on = False
        self._lanes[lane].life += 1

    def put_mask(self, lane, mask_W, position):
        row = self._lanes[lane].row
        self._lanes[lane].row = row._replace(
            grammar_NxW=mask_W[None], grammar_at_N=np.array([position], np.int32)
        )

    def tick(self):
        n, k = self.lanes, CONFIG.max_logprobs
        t = Ticked(
            np.full(n, -1),
            np.zeros(n, int),
            *np.zeros((2, n), bool),
            np.zeros(n),
            np.zeros((n, k), int),
            np.zeros((n, k)),
            np.zeros(n, bool),
            np.zeros(n, int),
            np.zeros(n, int),
            0,
            0,
            0,
        )
        for lane, at in enumerate(self._lanes):
            if at.on:
                self._advance(lane, at, t)
        lives = [at.life for at in self._lanes]

        def result():
            same = np.array([at.life == life for at, life in zip(self._lanes, lives, strict=True)])
            return [
                t._replace(
                    token_N=np.where(same, t.token_N, -1),
                    ended_N=t.ended_N & same,
                    starved_N=t.starved_N & same,
                )
            ]

        return _Ticket(self, result)

    def _advance(self, lane, at, t):
        if at.entering is None:
            depth = int(self._depths(at)[-1])
            if self._lengths(at).entries > self.rooms[lane]:
                t.starved_N[lane] = True
                return
            at.busy += self.m
            position = len(at.tokens)
            if at.busy < depth or waiting(at.row, np.array([position]))[0]:
                return
            logits, _ = read(tuple(at.tokens), at.key)
            drawn, at.row = jax.tree.map(
                np.asarray,
                _draw(
                    logits[None], at.row, np.array([position], np.int32), np.ones(1, bool), CONFIG
                ),
            )
            at.remaining -= 1
            t.token_N[lane], t.depth_N[lane], t.stopped_N[lane] = (
                drawn.token_N[0],
                depth,
                drawn.stopped_N[0],
            )
            t.logprob_N[lane], t.top_ids_NxK[lane], t.top_logprobs_NxK[lane] = (
                x[0] for x in drawn[2:]
            )
            if drawn.stopped_N[0] or at.remaining == 0:
                t.ended_N[lane], at.on = True, False
                return
            at.entering = int(drawn.token_N[0])
        at.tokens.append(at.entering)
        at.entering, at.busy = None, 0

    def capacity(self, lane):
        return Lengths(CONTEXT, self.rooms[lane])

    def lengths(self, lane):
        return self._lengths(self._lanes[lane])

    def expected_entries(self, tokens, mean_depth=None):
        return int(np.ceil(tokens * (self.expect if mean_depth is None else mean_depth)))

    def bytes_per_sequence(self, tokens, entries=None):
        return 10 * tokens + 4 * (self.expected_entries(tokens) if entries is None else entries)


class _Rows(Rows):
    @property
    def nbytes(self):
        return 10 * (self.stop.tokens - self.start.tokens)


__all__ = [
    "CONFIG",
    "CONTEXT",
    "VOCAB",
    "WISHES",
    "ReferenceDevice",
    "bits",
    "control_of",
    "model",
    "oracle",
]
