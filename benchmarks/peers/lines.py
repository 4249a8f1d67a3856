"""Lines of JSON between a benchmark and a peer's process: what the peer is, then one answer a
question.

A peer needs nothing of this project, so any Python that has the library can run it. Between lines
it is blocked on its input and uses no core; the end of the input ends it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def converse(start: Callable[[dict[str, Any]], tuple[dict[str, Any], Answer]]) -> None:
    """`start(settings)`, the settings from the command line, returns (what to say first, the answer
    to a question). To each answer the CPU seconds of this process, all threads, are added."""
    # a library that prints must not break the conversation
    answers, sys.stdout = sys.stdout, sys.stderr

    def say(record: dict[str, Any]) -> None:
        print(json.dumps(record), file=answers, flush=True)

    facts, answer = start(json.loads(sys.argv[1]))
    say({"python": sys.version.split()[0]} | facts)
    for line in sys.stdin:
        if line.strip():
            cpu = time.process_time()
            reply = answer(json.loads(line))
            say(reply | {"cpu": time.process_time() - cpu})
