"""What happens in one run of the soak: everything that is chosen is chosen here, by seed. When
exactly a fault meets the run depends on the machine; which fault, how often and after how many
seconds does not."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import Any

CELL_SECONDS, GRACE_SECONDS = 0.4, 0.3
FAN = 64  # sub-calls at once
DONE = "answer['content'] = 'done'\nanswer['ready'] = True"

# name -> cell. What a model may write on a bad day.
CELLS: dict[str, str] = {
    "work": "x = [c for c in str(context)[:2000]]\nprint(len(x), x[:5])",
    "draft": "answer['content'] = 'a draft'\nprint(answer)",
    "one_call": "print(llm_query('one piece of ' + str(context)[:50]))",
    "fan": f"r = llm_batch([f'piece {{i}}' for i in range({FAN})])\nprint(len(r), sum(isinstance(a, str) for a in r))",
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(8) as pool:\n"
        "    print(len(list(pool.map(llm_query, [f'thread {i}' for i in range(16)]))))"
    ),
    "child": "print(rlm_query(str(context)[:500], 'what is it?'))",
    "children": "print(rlm_batch(['a text', 'another text', 'a third'], 'what is it?'))",
    "files": "for i in range(20):\n    with open(f'f{i}', 'w') as f: f.write('x' * 10000)\nprint('written')",
    "flood": "print('y' * 3_000_000)",
    "error": "raise ValueError('as planned')",
    "syntax": "for in :",
    "deep": "def f(): return f()\nf()",
    "memory": "b = bytearray(16 << 30)",
    "exit": "import os\nos._exit(3)",
    "segfault": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "exit_in_fan": (
        "import os, threading\nthreading.Timer(0.01, os._exit, (1,)).start()\n"
        f"llm_batch([f'doomed {{i}}' for i in range({FAN})])"
    ),
    "loop": "while True:\n    pass",
    "stubborn_loop": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "thread_left": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nprint(1)",
}
WEIGHTS: dict[str, int] = {
    "work": 6,
    "draft": 3,
    "one_call": 4,
    "fan": 6,
    "threads": 2,
    "child": 2,
    "children": 1,
    "files": 2,
    "flood": 2,
    "error": 2,
    "syntax": 1,
    "deep": 1,
    "memory": 1,
    "exit": 3,
    "segfault": 3,
    "abort": 1,
    "exit_in_fan": 2,
    "loop": 2,
    "stubborn_loop": 1,
    "thread_left": 1,
}
TEXTS: dict[str, str] = {  # replies without a good cell
    "prose": "I would rather think about it first.",
    "empty": "",
    "unclosed": "```repl\nprint(1)",
    "tool_call": '<tool_call>{"name": "python", "arguments": {"code": "print(2)"}}</tool_call>',
}
ROOT_FAULTS = ("server", "timeout", "bug")  # of the root model's client
SUB_TROUBLE = ("calm", "slow", "failing", "buggy")
CANCELS = ("run", "task", "task_twice", "event", "seconds")
SIGNALS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGSEGV")


@dataclass(frozen=True)
class Plan:
    seed: str
    way: str  # start | task | sync | session: by which part of the API it runs
    replies: tuple[str, ...]  # names out of CELLS, TEXTS; "!" before the name of a root fault
    root_seconds: tuple[float, ...]  # what each reply takes
    sub: str  # out of SUB_TROUBLE, or "http": over the loopback server, with its faults
    kills: tuple[tuple[float, str], ...] = ()  # seconds after the start, signal
    cancel: tuple[str, float] | None = None
    disk: tuple[str, float] | None = None  # full | gone: what happens to the trajectory, and when
    max_depth: int = 1
    context: str = "text"  # text | json | file
    budget: tuple[tuple[str, Any], ...] = ()

    def faults(self) -> list[str]:
        """Names of what is injected, for the tables."""
        bad = {
            "exit",
            "segfault",
            "abort",
            "exit_in_fan",
            "loop",
            "stubborn_loop",
            "memory",
            "flood",
        }
        found = [f"cell: {r}" for r in self.replies if r in bad]
        found += [f"root: {r[1:]}" for r in self.replies if r.startswith("!")]
        found += [f"kill: {name}" for _, name in self.kills]
        found += [f"cancel: {self.cancel[0]}"] if self.cancel else []
        found += [f"disk: {self.disk[0]}"] if self.disk else []
        found += [f"sub: {self.sub}"] if self.sub != "calm" else []
        return found

    def __str__(self) -> str:
        told = ((f.name, getattr(self, f.name)) for f in fields(self))
        return ", ".join(f"{name}={value}" for name, value in told if value not in ((), None))


def plan(seed: str) -> Plan:
    """The same for the same seed."""
    r = random.Random(seed)
    replies = tuple(_reply(r) for _ in range(r.randint(1, 5)))
    way = r.choices(("start", "task", "sync", "session"), (5, 3, 2, 2))[0]
    span = 0.1 + 0.25 * len(replies)  # seconds about which a run takes
    kills = tuple(
        (r.uniform(0, span), r.choice(SIGNALS))
        for _ in range(r.choices((0, 1, 2, 4), (60, 25, 10, 5))[0])
    )
    cancel = None
    if r.random() < 0.35:
        kinds = {
            "start": CANCELS[0:1] + CANCELS[3:],
            "task": CANCELS[1:],
            "sync": CANCELS[3:],
            "session": CANCELS[1:],
        }
        cancel = r.choice(kinds[way]), r.uniform(0, span)
    disk = (
        (r.choice(("full", "gone")), r.uniform(0, span))
        if way == "start" and r.random() < 0.15
        else None
    )
    budget = []
    if r.random() < 0.15:
        budget.append(
            r.choice(
                [("turns", 2), ("sub_calls", 70), ("input_tokens", 5000), ("consecutive_errors", 2)]
            )
        )
    return Plan(
        seed=seed,
        way=way,
        replies=replies,
        root_seconds=tuple(r.choice((0.0, 0.0, 0.01, 0.05)) for _ in replies),
        sub=r.choices((*SUB_TROUBLE, "http"), (5, 3, 3, 1, 3))[0],
        kills=kills,
        cancel=cancel,
        disk=disk,
        max_depth=r.choice((0, 1, 1, 2, 2, 3)),
        context=r.choice(("text", "text", "json", "file")),
        budget=tuple(budget),
    )


def _reply(r: random.Random) -> str:
    chance = r.random()
    if chance < 0.06:
        return "!" + r.choice(ROOT_FAULTS)
    if chance < 0.16:
        return r.choice(list(TEXTS))
    return r.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
