"""A realistic trajectory without running anything: a root of many turns, batches of concurrent
sub-calls, child RLMs with calls of their own, failures of each kind. Times are made up but
consistent; the same seed gives the same events."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from rlm_runtime.lms.base import Message, Usage
from rlm_runtime.repl.base import Answer, CellError, CellResult
from rlm_runtime.trajectory import (
    EVENTS,
    AnyEvent,
    Asked,
    BudgetNote,
    CellEnd,
    CellStart,
    Compacted,
    ContextLoaded,
    NodeEnd,
    NodeStart,
    Nudged,
    Replied,
    RunEnd,
    RunStart,
    SandboxUp,
    encode,
)

QUESTION = "Across the 212 harbour log books, which vessel was held up by ice most often, and in how many winters?"
VESSELS = [
    "Aurora",
    "Kittiwake",
    "Nordlys",
    "Saint Brendan",
    "Havfruen",
    "Margit",
    "Three Sisters",
    "Polaris",
    "Elida",
]
WEATHER = [
    "fog until noon",
    "ice in the outer basin",
    "wind NNE 7",
    "snow, no sight",
    "clear and cold",
    "thaw",
]
SYSTEM = (
    "You answer a question about a long text that lies in the variable `context` of a Python REPL. "
    "Write code in ```repl fences; what it prints comes back to you.\n\n" + "Guidance. " * 300
)

SURVEY = """\
import re
books = re.split(r"\\n(?==== BOOK \\d+ ===)", context)
print(len(books), "books,", sum(map(len, books)), "characters")
for b in books[:3]:
    print(b[:160].replace("\\n", " / "))"""
BATCH = """\
# read books {lo} to {hi}, one sub-call a book, and keep what each reports
todo = books[{lo}:{hi}]
found = llm_batch(
    ["List every vessel this book says was held up by ice, with dates, as JSON.\\n\\n" + b for b in todo],
    schema=REPORT,
)
for i, f in enumerate(found, start={lo}):
    if isinstance(f, CallError):
        retry.append(i)
    else:
        reports[i] = f["vessels"]
print(len(reports), "reports so far,", len(retry), "to retry")"""
CHILD = """\
# these books disagree with each other: let a child look at each pair closely
pairs = [(a, b) for a, b in conflicts[{lo}:{hi}]]
verdicts = rlm_batch([{{"a": books[a], "b": books[b]}} for a, b in pairs],
                     question="Do both books describe the same delay? Quote the two entries.")
for p, v in zip(pairs, verdicts):
    print(p, "->", v)"""
COUNT = """\
from collections import Counter
winters = Counter()
for i, vessels in reports.items():
    for v in vessels:
        winters[v["name"], season(v["date"])] += 1
by_ship = Counter(name for name, _ in winters)
print(by_ship.most_common(6))"""
CHILD_LOOK = """\
a, b = context["a"], context["b"]
print(len(a), len(b))
print([l for l in a.splitlines() if "ice" in l.lower()][:4])"""
CHILD_ASK = """\
same = llm_batch([f"Same event? {x}\\n---\\n{y}" for x, y in candidates(a, b)])
answer["content"] = "yes" if any(s.startswith("yes") for s in same) else "no"
answer["ready"] = True"""


@dataclass
class Script:
    """Collects events on one clock."""

    dice: random.Random
    events: list[AnyEvent] = field(default_factory=list)
    at: float = 0.0
    children: dict[str, int] = field(default_factory=dict)
    spent: list[tuple[int, Usage]] = field(default_factory=list)

    def add(self, event: AnyEvent, at: float | None = None) -> None:
        self.events.append(event.model_copy(update={"t": round(self.at if at is None else at, 6)}))

    def usage(self, depth: int, tokens_in: int, tokens_out: int) -> Usage:
        dear, cheap = (1.25e-6, 1e-5), (2.5e-7, 2e-6)
        price = dear if depth == 0 else cheap
        cost = round(tokens_in * price[0] + tokens_out * price[1], 6)
        used = Usage(
            calls=1,
            input_tokens=tokens_in,
            output_tokens=tokens_out,
            cached_tokens=tokens_in // 2,
            cost_usd=cost,
        )
        self.spent.append((depth, used))
        return used

    def child(self, node: str) -> str:
        self.children[node] = self.children.get(node, 0) + 1
        return f"{node}.{self.children[node]}"

    def think(
        self,
        node: str,
        depth: int,
        turn: int,
        text: str,
        asked: list[Message],
        raw: str | None = None,
    ) -> None:
        self.add(Asked(node=node, turn=turn, messages=tuple(asked)))
        seconds = self.dice.uniform(1.2, 4.5)
        self.at += seconds
        used = self.usage(depth, 3_000 + 700 * turn, 80 + len(text) // 4)
        cut = len(raw) - len(text) if raw else 0
        self.add(
            Replied(
                node=node,
                turn=turn,
                message=Message(role="assistant", content=text),
                raw=raw,
                discarded=max(cut, 0),
                usage=used,
                seconds=seconds,
            )
        )

    def cell(self, node: str, turn: int, code: str, result: CellResult, calls=None) -> CellResult:
        self.add(CellStart(node=node, turn=turn, cell=1, code=code))
        began = self.at
        waited = calls() if calls else 0.0
        self.at = max(self.at, began + waited) + self.dice.uniform(0.01, 0.2)
        timed = result.model_copy(
            update={"wall_seconds": round(self.at - began, 3), "waited_seconds": round(waited, 3)}
        )
        self.add(CellEnd(node=node, turn=turn, cell=1, result=timed))
        return timed

    def batch(self, node: str, depth: int, turn: int, prompts: list[str], model: str) -> float:
        """Concurrent plain calls; the events lie in the order in which they would have been
        written."""
        began, pending = self.at, []
        for prompt in prompts:
            name = self.child(node)
            start = began + self.dice.uniform(0, 0.05)
            seconds = self.dice.lognormvariate(0.2, 0.5)
            fails = self.dice.random() < 0.025
            used = Usage(calls=1) if fails else self.usage(depth, len(prompt) // 4, 60)
            value: object = (
                "yes, both name the same ship and day"
                if self.dice.random() < 0.6
                else "no, two winters apart"
            )
            if depth == 1:
                day = f"18{self.dice.randint(50, 99)}-01-{self.dice.randint(1, 28):02d}"
                value = {"vessels": [{"name": self.dice.choice(VESSELS), "date": day}]}
            begin = NodeStart(
                node=name,
                parent=node,
                kind="lm",
                model=model,
                depth=depth,
                turn=turn,
                cell=1,
                prompt=prompt,
            )
            end = NodeEnd(
                node=name,
                value=None if fails else value,
                error="HTTP 429 after 5 tries: the endpoint's rate limit" if fails else None,
                kind="rate_limit" if fails else None,
                usage=used,
                seconds=round(seconds, 3),
            )
            pending += [(start, begin), (start + seconds, end)]
        pending.sort(key=lambda p: p[0])
        for at, event in pending:
            self.add(event, at)
        self.at = pending[-1][0]
        return self.at - began

    def together(self, jobs) -> float:
        """Run jobs as if at the same time: each from now, the clock at the end of the longest."""
        began, ends = self.at, []
        for job in jobs:
            self.at = began
            job()
            ends.append(self.at)
        self.at = max(ends)
        return self.at - began

    def child_rlm(self, node: str, turn: int, a: int, b: int) -> float:
        name, began = self.child(node), self.at
        prompt = f'{{"a": "=== BOOK {a} === {book(self.dice, 600)}", "b": "=== BOOK {b} === {book(self.dice, 600)}"}}'
        question = "Do both books describe the same delay? Quote the two entries."
        self.add(
            NodeStart(
                node=name,
                parent=node,
                kind="rlm",
                model="openai:gpt-5-mini",
                depth=1,
                turn=turn,
                cell=1,
                prompt=prompt,
                question=question,
            )
        )
        self.add(ContextLoaded(node=name, kind="dict", chars=len(prompt), preview=prompt[:200]))
        self.think(
            name,
            1,
            1,
            f"I look at both.\n\n```repl\n{CHILD_LOOK}\n```",
            [Message(role="system", content=SYSTEM)],
        )
        out = "612 604\n['ice in the outer basin, the Aurora not moved', 'ice, all ships held']\n"
        told = self.cell(
            name, 1, CHILD_LOOK, CellResult(status="ok", stdout=out, stdout_chars=len(out))
        )
        report = [Message(role="user", content="stdout:\n" + told.stdout)]
        self.think(
            name, 1, 2, f"Two candidates; I ask about each.\n\n```repl\n{CHILD_ASK}\n```", report
        )
        asks = [
            f"Same event? {book(self.dice, 120)}\n---\n{book(self.dice, 120)}" for _ in range(2)
        ]
        done = CellResult(
            status="ok",
            answer=Answer(content="yes", ready=True),
            variables={"same": "list, 2 items"},
        )
        self.cell(
            name, 2, CHILD_ASK, done, lambda: self.batch(name, 2, 2, asks, "openai:gpt-5-nano")
        )
        self.add(
            NodeEnd(
                node=name, value="yes", usage=self.usage(1, 0, 0), seconds=round(self.at - began, 3)
            )
        )
        return self.at - began


def book(dice: random.Random, chars: int) -> str:
    lines, size = [], 0
    while size < chars:
        line = f"{dice.randint(1, 28)} Jan. {dice.choice(WEATHER)}; the {dice.choice(VESSELS)} lies at berth {dice.randint(1, 9)}."
        lines.append(line)
        size += len(line)
    return "\n".join(lines)


def build(
    turns: int = 50, calls: int = 300, seed: int = 7, prompt_chars: int = 1_500
) -> list[AnyEvent]:
    """`turns` root turns with `calls` sub-calls over all depths (exactly), the deepest of them at
    depth 2."""
    s = Script(random.Random(seed))
    s.add(
        RunStart(
            run="harbour-7f3a",
            started_at="2026-03-14T09:26:53Z",
            question=QUESTION,
            root="openai:gpt-5",
            sub="openai:gpt-5-mini",
            max_depth=2,
            budget={"turns": turns + 10, "usd": 5.0, "sub_calls": 1000},
            settings={"concurrency": 64, "version": "0.1.0"},
        )
    )
    preview = "=== BOOK 1 ===\n" + book(s.dice, 300)
    s.add(
        ContextLoaded(
            kind="file",
            chars=40_312_556,
            bytes=40_312_556,
            path="harbour/logs.txt",
            preview=preview,
        )
    )
    layers = {
        "landlock": "active (ABI 7: files, TCP, signals)",
        "seccomp": "active",
        "rlimits": "active",
    }
    s.at += 0.11
    s.add(SandboxUp(environment="local", layers=layers, start_seconds=0.108))
    made, told = (
        0,
        [
            Message(role="system", content=SYSTEM),
            Message(role="user", content="context: str, 40,312,556 characters"),
        ],
    )
    working = max(turns - 5, 2)
    for turn in range(1, turns + 1):
        left, reserve = calls - made, max(working - turn, 0)
        lo, kind = 4 * turn % 200, turn % 12
        raw, note, counted = None, None, None
        result = CellResult(
            status="ok", variables={"books": "list, 212 items", "reports": f"dict, {made} items"}
        )
        if turn == 1:
            code, out = (
                SURVEY,
                "212 books, 40312556 characters\n=== BOOK 1 === / 1 Jan. fog until noon\n",
            )
            text = "First I see how the text is built: it looks like a sequence of numbered books."
        elif turn == turns:
            code = 'answer["content"] = "The Kittiwake: held up by ice in 17 winters."\nanswer["ready"] = True'
            out, text = "", "The count is the same both ways, so I answer."
            result = result.model_copy(
                update={
                    "answer": Answer(
                        content="The Kittiwake: held up by ice in 17 winters.", ready=True
                    )
                }
            )
        elif not left or (turn != working and (turn > working or kind == 5)):
            code, out = (
                COUNT,
                f"[('Kittiwake', {10 + turn // 8}), ('Aurora', 9), ('Nordlys', 7), ('Margit', 4)]\n",
            )
            text = (
                "Before I go on I count what is there, to see whether the leader is already clear."
            )
            if kind == 5:
                raw = f"{text}\n\n```repl\n{code}\n```\n\nOutput:\n[('Aurora', 31)]\n\nSo the answer must be the Aurora."
        elif turn != working and kind == 9 and left >= 15 + reserve:
            code, out = (
                CHILD.format(lo=lo, hi=lo + 5),
                f"({lo}, {lo + 7}) -> yes\n({lo + 1}, {lo + 8}) -> yes\n",
            )
            text = "Some books overlap. Two readers may count one delay twice, so I let a child compare them."

            def counted(t=turn, x=lo):
                return s.together(
                    [lambda i=i: s.child_rlm("0", t, x + i, x + i + 7) for i in range(5)]
                )

            made += 15
        else:
            n = min(
                left, max(1, round(left / max(working - turn + 1, 1) * s.dice.uniform(0.9, 2.0)))
            )
            n = left if turn == working else n
            code, out = (
                BATCH.format(lo=lo, hi=lo + n),
                f"{made + n} reports so far, {turn // 9} to retry\n",
            )
            text = f"Books {lo} to {lo + n} next, all at once. The schema keeps the answers short."
            made += n
            prompts = [
                f"List every vessel this book says was held up by ice.\n\n=== BOOK {lo + i} ===\n{book(s.dice, prompt_chars)}"
                for i in range(n)
            ]

            def counted(t=turn, p=prompts):
                return s.batch("0", 1, t, p, "openai:gpt-5-mini")

        if kind == 7:
            error = CellError(
                type="KeyError",
                message="'date'",
                traceback="Traceback (most recent call last):\n  File \"<cell>\", line 12, in <module>\nKeyError: 'date'\n",
            )
            result = result.model_copy(update={"status": "error", "error": error})
        if turn == turns // 2:
            result = result.model_copy(
                update={"status": "timeout", "lost": "The cell ran for 120 s and was interrupted."}
            )
        reply = f"{text}\n\n```repl\n{code}\n```"
        raw = raw or (
            f"<think>\nThe last batch looked fine. {text}\n</think>\n{reply}"
            if turn % 3 == 0
            else None
        )
        s.think("0", 0, turn, reply, told, raw)
        if raw and "Output:" in raw:
            note = "Text after the cell was cut: it imitated the cell's output. Only what the REPL prints is real."
            s.add(Nudged(turn=turn, reason="imitated_output", text=note))
        result = result.model_copy(update={"stdout": out, "stdout_chars": len(out)})
        s.cell("0", turn, code, result, counted)
        told = [
            Message(
                role="user",
                content=f"Turn {turn + 1} of {turns + 10}\nstdout:\n{out}"
                + (f"\n{note}" if note else ""),
            )
        ]
        if turn == turns * 3 // 5:
            s.add(
                Compacted(
                    turn=turn,
                    tokens_before=212_000,
                    tokens_after=9_400,
                    summary="Books 1-130 are read; leader: Kittiwake.",
                )
            )
        s.add(
            BudgetNote(
                used={
                    "turns": turn,
                    "sub_calls": made,
                    "usd": round(sum(u.cost_usd or 0 for _, u in s.spent), 4),
                }
            )
        )
    assert made == calls, (made, calls)
    by_depth: dict[str, Usage] = {}
    for depth, used in s.spent:
        by_depth[str(depth)] = by_depth.get(str(depth), Usage()) + used
    s.add(
        RunEnd(
            stop_reason="answered",
            answer="The Kittiwake: held up by ice in 17 winters.",
            turns=turns,
            usage=sum(by_depth.values(), Usage()),
            usage_by_depth=by_depth,
            seconds=round(s.at, 3),
        )
    )
    return sorted(s.events, key=lambda e: e.t)


def write(folder: Path, events: list[AnyEvent]) -> Path:
    """Write a run folder with the events' own times (a `TrajectoryWriter` would stamp them now)."""
    (folder / "blobs").mkdir(parents=True)
    (folder / EVENTS).write_bytes(b"".join(encode(e) + b"\n" for e in events))
    return folder
