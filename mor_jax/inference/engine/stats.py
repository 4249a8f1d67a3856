"""Counters of an engine, which its own thread writes and any thread may read, and of compiled
programs."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import numpy as np
from jax import monitoring

SMOOTH = 0.1  # weight of the newest in a running mean


class Counts:
    """Totals since the start; `mean_*` over all of them."""

    def __init__(self) -> None:
        self.ticks = self.passes = self.rows = self.exits = self.newest_exits = 0
        self.drawn = self.depths = self.prompt = self.queried = self.hits = self.computed = 0
        self.lost_listeners = 0  # requests whose listener raised an error
        self.by_depth: dict[int, int] = {}
        self.first_s = self.queued_s = self.whole_s = 0.0
        self.firsts = self.admissions = 0
        self.by_reason: dict[str, int] = {}
        self.compiled = self.compiled_before = 0
        self._recent_s = 0.0

    def watch(self, compiled: int) -> None:
        """Compilations counted from here on."""
        self.compiled_before = compiled - self.compiled

    def admitted(self, queried: int, hits: int, queued_s: float) -> None:
        self.admissions += 1
        self.queried += queried
        self.hits += hits
        self.prompt += queried + 1
        self.queued_s += queued_s

    def prefilled(self, tokens: int) -> None:
        self.computed += tokens

    def ticked(self, t: Any) -> None:
        self.ticks += 1
        self.passes += int(t.passes)
        self.rows += int(t.rows)
        self.exits += int(t.exits)
        self.newest_exits = int(np.sum(t.token_N >= 0))

    def drew(self, depth: int, since_s: float | None) -> None:
        """`since_s`: seconds since the request came, for its first token."""
        self.drawn += 1
        self.depths += depth
        self.by_depth[depth] = self.by_depth.get(depth, 0) + 1
        if since_s is not None:
            self.firsts += 1
            self.first_s += since_s

    def finished(self, reason: str, whole_s: float) -> None:
        self.by_reason[reason] = self.by_reason.get(reason, 0) + 1
        self.whole_s += whole_s
        self._recent_s += SMOOTH * (whole_s - self._recent_s)

    def wait_for(self, waiting: int, lanes: int) -> float:
        """Seconds after which there may be room, judged by how long requests took lately; 1 to
        60."""
        return float(min(max(self._recent_s * waiting / (waiting + lanes), 1.0), 60.0))

    def to_dict(self) -> dict[str, float]:
        out = {
            "prefix_cache_queries_total": self.queried,
            "prefix_cache_hits_total": self.hits,
            "prompt_tokens_total": self.prompt,
            "prefill_tokens_total": self.computed,
            "generation_tokens_total": self.drawn,
            "ticks_total": self.ticks,
            "core_passes_total": self.passes,
            "core_rows_total": self.rows,
            "boundary_rows_total": self.exits,
            "boundary_rows": self.newest_exits,
            "mean_depth": self.depths / self.drawn if self.drawn else 0.0,
            "lost_listeners_total": self.lost_listeners,
            "time_to_first_token_seconds_sum_total": self.first_s,
            "time_to_first_token_seconds_count_total": self.firsts,
            "request_queue_time_seconds_sum_total": self.queued_s,
            "request_queue_time_seconds_count_total": self.admissions,
            "e2e_request_latency_seconds_sum_total": self.whole_s,
        }
        out |= {
            f"recursion_depth_{depth}_total": n for depth, n in sorted(dict(self.by_depth).items())
        }
        out |= {f"requests_{reason}_total": n for reason, n in sorted(dict(self.by_reason).items())}
        return {name: float(value) for name, value in out.items()}


# -------------------------------------------------------- programs compiled, by the thread that
# asked

_EVENT = "/jax/core/compile/backend_compile_duration"  # also told when the compilation cache had it
_by_thread: Counter[int] = Counter()


def _count(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _EVENT:
        _by_thread[threading.get_ident()] += 1


monitoring.register_event_duration_secs_listener(_count)


def compiled_here() -> int:
    """Programs that this thread has had compiled."""
    return _by_thread[threading.get_ident()]
