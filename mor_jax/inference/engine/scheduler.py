"""The scheduler: which request gets which lane, and what is dispatched next. It uses no device,
thread or clock.

`plan(now)` returns the actions of one round, in order. The caller runs them and reports with
`prefilled`, `outgrew` and `remove`. The rules:

- Requests are served by priority (lower first), then by arrival. A preempted request is first
  within its priority.
- A request takes the smallest free lane that its expected entries fit into; the few lanes with full
  room are used last.
- A request that outgrew its lane needs one with full room. If none is free, the latest request that
  came after it is preempted and computed again later. The earliest request always gets its lane, so
  all requests end.
- While such a request waits, later requests do not get a lane with full room.
- A request waits for chunks of its prompt that another request is computing, if they have enough
  tokens.
- Prompts are prefilled chunk by chunk, so many tokens a round, while other lanes decode.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mor_jax.inference.engine.prefix import Node, PrefixTree, Tokens
from mor_jax.inference.engine.request import Event, OnEvents, Request

WAITING, PREFILL, DECODE, OVER = "waiting", "prefill", "decode", "over"


@dataclass(eq=False)
class Job:
    """A request and its progress through the engine. `number` counts arrivals."""

    number: int
    request: Request
    on_events: OnEvents
    came: float  # seconds of the caller's clock
    control: Any = None
    mean_depth: float | None = None  # expected, where the request wishes one

    generated: list[int] = field(default_factory=list)
    phase: str = WAITING
    lane: int = -1
    admissions: int = 0  # times it got a lane
    # reason to end it ("cancelled", "stop"), set by its owner from any thread
    wish: str | None = None
    preempted: int = 0
    needs_full_lane: bool = False  # outgrew a lane: the next one must have full room
    entries: int = 0  # in the core log of its lane, as far as known
    unread: int = 0  # tokens whose prefill was dispatched and not reported
    todo: deque[tuple[Tokens, Node | None]] = field(default_factory=deque)  # chunks to prefill
    held: list[Node] = field(default_factory=list)
    waits_for: Node | None = None
    waited: bool = False  # it was held back at least once
    unready: bool = False  # not to be admitted yet (its prompt is being scored)

    # What the last event will say.
    began: float | None = None
    cached: int = 0
    depth_sum: int = 0
    depth_count: int = 0
    prompt_depths: list[int] = field(default_factory=list)
    told_depths: bool = False
    events: list[Event] = field(default_factory=list)
    scoring: Any = None

    chunks: list[Tokens] = field(default_factory=list)

    @property
    def rank(self) -> tuple[int, int, int]:
        return (self.request.priority, 0 if self.preempted else 1, self.number)

    @property
    def age(self) -> tuple[int, int]:
        return (self.request.priority, self.number)

    @property
    def deadline(self) -> float | None:
        wanted = self.request.deadline_s
        return None if wanted is None else self.came + wanted


class End(NamedTuple):
    """The request has ended. `lane` is free again (-1: it had none)."""

    job: Job
    reason: str
    lane: int


class Preempt(NamedTuple):
    """The request loses `lane` and waits for another."""

    job: Job
    lane: int


class Admit(NamedTuple):
    """Opens the request's lane and loads the cached rows of `path`."""

    job: Job
    path: list[Node]


class Prefill(NamedTuple):
    """Prefills one chunk. `node`: the node of the prefix tree that gets its rows, or None."""

    job: Job
    chunk: Tokens
    node: Node | None


class Start(NamedTuple):
    """Starts to decode: all tokens but the last are in the lane."""

    job: Job


Action = End | Preempt | Admit | Prefill | Start


class Scheduler:
    """Args:
    rooms: entries of each lane's core log.
    most: entries one token may take there.
    expected: (tokens, mean depth or None) -> entries they will take, about.
    cut: tokens -> lengths of chunks.
    round_tokens: prompt tokens prefilled in one round, about (one chunk at least).
    hold_tokens: so many tokens under way elsewhere are worth waiting for.
    keep_tokens: a chunk of fewer tokens is not kept; the tail of a prompt is seldom met again, and
    soon computed.
    """

    def __init__(
        self,
        rooms: Sequence[int],
        tree: PrefixTree,
        *,
        most: int,
        expected: Callable[[int, float | None], int],
        cut: Callable[[int], Sequence[int]],
        round_tokens: int = 256,
        hold_tokens: int = 32,
        keep_tokens: int = 32,
    ):
        self._rooms, self._full, self._most = tuple(rooms), max(rooms), most
        self._expected, self._cut = expected, cut
        self._round_tokens, self._hold_tokens, self._keep_tokens = (
            round_tokens,
            hold_tokens,
            keep_tokens,
        )
        self.tree = tree
        self.free = set(range(len(rooms)))
        self.waiting: list[Job] = []  # by rank
        self.running: dict[int, Job] = {}  # by lane
        self.preemptions = self.held_back = 0

    # ------------------------------------------------------------------------------------- from
    # outside

    def prepare(self, job: Job) -> None:
        """Cuts the tokens that the lane must hold before it decodes into chunks. The prompt is cut
        by itself, so a preempted request finds its chunks in the prefix tree."""
        prompt, generated = job.request.prompt, job.generated
        tokens = (*prompt, *generated)[:-1]
        alone = len(prompt) - 1
        lengths = [*self._cut(alone), *self._cut(len(tokens) - alone)]
        job.chunks, at = [], 0
        for n in lengths:
            job.chunks.append(tokens[at : at + n])
            at += n

    def add(self, job: Job) -> None:
        """Queue a prepared job."""
        bisect.insort(self.waiting, job, key=lambda j: j.rank)

    def prefilled(self, job: Job, tokens: int, entries: int) -> None:
        """A chunk was computed; the lane's core log now has `entries` entries."""
        job.unread -= tokens
        job.entries = entries
        if job.phase in (PREFILL, DECODE) and not job.todo and not job.unread:
            self._let_go(job)

    def outgrew(self, job: Job) -> bool:
        """The lane is too small, so the next plan moves the request. Returns False if no lane has
        more room."""
        job.needs_full_lane = True
        return self._rooms[job.lane] < self._full

    def remove(self, job: Job, reason: str) -> End:
        """Removes a request that has ended and frees its lane."""
        lane = self._leave(job)
        job.phase = OVER
        return End(job, reason, lane)

    def jobs(self) -> list[Job]:
        """All requests that have not ended."""
        return [*self.running.values(), *self.waiting]

    # ------------------------------------------------------------------------------------- the plan

    def plan(self, now: float) -> list[Action]:
        """What to do next, in order."""
        return [*self._ends(now), *self._moves(), *self._admissions(now), *self._prefills()]

    def _ends(self, now: float) -> list[Action]:
        out: list[Action] = []
        for job in self.jobs():
            if job.wish:
                out.append(self.remove(job, job.wish))
            elif job.deadline is not None and now >= job.deadline:
                out.append(self.remove(job, "deadline"))
        return out

    def _moves(self) -> list[Action]:
        """Preempts requests that outgrew their lanes, then later requests that hold the lanes they
        need."""
        stuck = [
            job
            for job in self.running.values()
            if job.needs_full_lane and self._rooms[job.lane] < self._full
        ]
        out: list[Action] = [self._preempt(job) for job in sorted(stuck, key=lambda j: j.age)]
        for job in [job for job in self.waiting if job.needs_full_lane]:
            if any(self._rooms[lane] == self._full for lane in self.free):
                break
            later = [
                j
                for j in self.running.values()
                if self._rooms[j.lane] == self._full and j.age > job.age
            ]
            if not later:
                break  # all others came before it
            out.append(self._preempt(max(later, key=lambda j: j.age)))
        return out

    def _preempt(self, job: Job) -> Preempt:
        lane = self._leave(job)
        job.phase = WAITING
        job.preempted += 1
        self.preemptions += 1
        self.prepare(job)
        self.add(job)
        return Preempt(job, lane)

    def _leave(self, job: Job) -> int:
        self._let_go(job)
        job.todo.clear()
        job.unread = 0
        if job.phase == WAITING:
            self.waiting.remove(job)
            return -1
        lane, job.lane = job.lane, -1
        del self.running[lane]
        self.free.add(lane)
        return lane

    def _let_go(self, job: Job) -> None:
        self.tree.let_go(job.held)
        job.held = []

    def _admissions(self, now: float) -> list[Action]:
        out: list[Action] = []
        full_is_reserved = False
        for job in list(self.waiting):
            if not self.free:
                break
            if job.unready or (job.waits_for is not None and job.waits_for.pending):
                continue
            path, job.waits_for, pending = self.tree.match(job.request.depth, job.chunks)
            if job.waits_for is not None and pending >= self._hold_tokens:
                self.held_back += not job.waited
                job.waited = True
                continue
            job.waits_for = None
            lane = self._lane_for(job, path, full_is_reserved)
            if lane is None:
                full_is_reserved = True
                continue
            out.append(self._admit(job, lane, path, now))
        return out

    def _lane_for(self, job: Job, path: list[Node], full_is_reserved: bool) -> int | None:
        known = path[-1].rows.stop.entries if path else 0
        need = self._full
        if not job.needs_full_lane:
            tokens = (
                len(job.request.prompt)
                + job.request.max_tokens
                - sum(len(node.chunk) for node in path)
            )
            need = min(need, known + self._expected(tokens, job.mean_depth))
        fits = [
            lane
            for lane in self.free
            if self._rooms[lane] >= need
            and not (full_is_reserved and self._rooms[lane] == self._full)
        ]
        return min(fits, key=lambda lane: (self._rooms[lane], lane), default=None)

    def _admit(self, job: Job, lane: int, path: list[Node], now: float) -> Admit:
        self.waiting.remove(job)
        self.free.remove(lane)
        self.running[lane] = job
        job.phase, job.lane = PREFILL, lane
        job.admissions += 1
        rest = job.chunks[len(path) :]
        kept = list(itertools.takewhile(lambda chunk: len(chunk) >= self._keep_tokens, rest))
        claimed = self.tree.claim(job.request.depth, path, kept)
        job.held = [*path, *claimed]
        job.todo = deque(itertools.zip_longest(rest, claimed))
        job.entries, job.unread = path[-1].rows.stop.entries if path else 0, 0
        if job.began is None:
            job.began = now
            job.cached = sum(len(node.chunk) for node in path)
        return Admit(job, path)

    def _prefills(self) -> list[Action]:
        out: list[Action] = []
        decoding = sum(job.phase == DECODE for job in self.running.values())
        budget, none_yet = self._round_tokens - decoding, True
        for job in sorted(self.running.values(), key=lambda j: j.rank):
            if job.phase != PREFILL or (job.needs_full_lane and self._rooms[job.lane] < self._full):
                continue
            while job.todo and (none_yet or len(job.todo[0][0]) <= budget):
                chunk, node = job.todo.popleft()
                job.unread += len(chunk)
                budget -= len(chunk)
                none_yet = False
                out.append(Prefill(job, chunk, node))
            if job.todo:
                break  # a later one does not overtake it with a smaller chunk
            if (
                job.entries + self._most * job.unread <= self._rooms[job.lane]
            ):  # else wait until it is known whether they fit
                job.phase = DECODE
                if not job.unread:
                    self._let_go(job)
                out.append(Start(job))
        return out
