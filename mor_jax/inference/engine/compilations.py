"""How many programs XLA compiled, counted by the thread that asked for them."""

from __future__ import annotations

import threading
from collections import Counter

from jax import monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"  # also told when the compilation cache had it
_by_thread: Counter[int] = Counter()


def _count(event: str, duration: float, **_: object) -> None:
    if event == _EVENT:
        _by_thread[threading.get_ident()] += 1


monitoring.register_event_duration_secs_listener(_count)


def here() -> int:
    """Programs that this thread has had compiled."""
    return _by_thread[threading.get_ident()]
