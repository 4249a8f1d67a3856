"""What `rlm_overhead` measures: for each case a context, the cells that a scripted root replies
with, and the figures that are read off. The same cells run in every runtime; only how a reply and
an answer are written differs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MB = 1_000_000
FORMS: dict[str, tuple[str, str]] = {  # how a root writes a cell, and how a cell hands in an answer
    "fenced": (
        "Next step.\n```repl\n{}\n```",
        'answer["content"] = str({})\nanswer["ready"] = True',
    ),
    "dspy": (
        "[[ ## reasoning ## ]]\nNext step.\n\n[[ ## code ## ]]\n```python\n{}\n```\n\n[[ ## completed ## ]]",
        "SUBMIT(str({}))",
    ),
}


@dataclass
class Ran:
    """One run of one case: what the driver said, what the server saw, what the processes took."""

    spawned: float  # when its process was started; all times are seconds of one clock
    said: dict[str, Any]
    log: dict[str, Any]
    host_rss: int  # bytes, highest
    worker_rss: int
    # time, host RSS and descriptors, worker RSS and descriptors
    samples: list[tuple[float, int, int, int, int]]

    @property
    def gaps(self) -> list[float]:
        times = self.log["root_times"]
        return [b - a for a, b in itertools.pairwise(times)]

    @property
    def first(self) -> float:
        return self.log["root_times"][0]

    def at(self, moment: float) -> tuple[float, int, int, int, int]:
        """The last sample before a moment."""
        return max((s for s in self.samples if s[0] <= moment), default=self.samples[0])


@dataclass(frozen=True)
class Case:
    name: str
    what: str
    cells: tuple[str, ...]  # without the last one, which hands in `answer`
    read: Callable[[Ran], dict[str, float]]
    answer: str = "'done'"  # an expression
    context: str = "tiny"
    file: bool = False  # the context is handed over as a file, not as a text
    latency: float = 0.0
    sub_calls: int = 0
    peers: bool = True
    log: bool = False  # record to a folder
    once: bool = False  # too long to repeat

    def replies(self, form: str) -> list[str]:
        fence, submit = FORMS[form]
        return [fence.format(cell) for cell in (*self.cells, submit.format(self.answer))]


@dataclass(frozen=True)
class Sizes:
    """How large the cases are."""

    turns: tuple[int, int] = (10, 50)
    text: int = 40 * MB
    file: int = 1000 * MB
    batch: int = 100
    prompt: int = 4 * MB
    prints: tuple[int, int] = (20 * MB, 100 * MB)
    many: int = 2000
    tiny: int = 100_000


QUICK = Sizes((2, 3), 1 * MB, 10 * MB, 8, MB // 10, (MB, 2 * MB), 20, 200)


def _timed(code: str) -> str:
    """A cell that measures itself; `took` is the answer."""
    return f"import time\nbegan = time.perf_counter()\n{code}\ntook = time.perf_counter() - began\nprint(len(replies))"


def _memory(ran: Ran) -> dict[str, float]:
    return {"host_rss": ran.host_rss, "worker_rss": ran.worker_rss}


def _first(ran: Ran) -> dict[str, float]:
    return {
        "to_first_call": ran.first - ran.spawned,
        "import": ran.said["import_seconds"],
        **_memory(ran),
    }


def _turns(ran: Ran) -> dict[str, float]:
    seconds = statistics.mean(ran.gaps)
    return {
        "per_turn": seconds,
        "median_turn": statistics.median(ran.gaps),
        "sent": sum(ran.log["root_bytes"]),
        **_memory(ran),
    }


def _context(ran: Ran) -> dict[str, float]:
    run = ran.said["returned"] - ran.said["called"]
    return {
        "load": ran.first - ran.said["called"],
        "per_turn": statistics.median(ran.gaps),
        "run": run,
        **_memory(ran),
    }


def _big_file(ran: Ran) -> dict[str, float]:
    return {"open": ran.first - ran.said["called"], "find": ran.gaps[-1], **_memory(ran)}


def _took(ran: Ran) -> dict[str, float]:
    return {"took": float(ran.said["answer"]), "at_once": ran.log["most"]}


def _print(ran: Ran) -> dict[str, float]:
    return {"turn": ran.gaps[-1], **_memory(ran)}


def _growth(ran: Ran) -> dict[str, float]:
    """From the end of the second of ten cells, when every pool is full, to the last root call."""
    times = ran.log["root_times"]
    before, after = ran.at(times[2]), ran.at(times[-1])
    names = ("host_growth", "host_descriptors", "worker_growth", "worker_descriptors")
    grown = dict(
        zip(names, (b - a for a, b in zip(before[1:], after[1:], strict=True)), strict=True)
    )
    return {"per_call": (times[-1] - times[0]) / ran.log["sub_calls"], **grown, **_memory(ran)}


def cases(sizes: Sizes) -> list[Case]:
    """In the order in which they run and are shown."""
    few, many = sizes.turns

    def look(turns: int) -> tuple[str, ...]:
        """Cells that look at the context, as a root does."""
        return tuple(
            f"x{i} = context[{i * 37} : {i * 37 + 40}]\nprint(len(context), x{i})"
            for i in range(turns)
        )

    def batch(count: int, prompt: str = '"piece %d" % i') -> str:
        return f"replies = llm_query_batched([{prompt} for i in range({count})])"

    def prints(size: int) -> tuple[str, ...]:
        piece, lines = sizes.prints[0] // 20, 20 * size // sizes.prints[0]
        return (
            "line = 'y' * 79 + '\\n'",
            f"for i in range({lines}):\n    print(line * {piece // 80}, end='')",
        )

    one = "replies = [llm_query('x' * %d)]"
    loop = "replies = [llm_query('piece %d' % i) for i in range({})]"
    tenth = sizes.tiny // 10
    flood = tuple(
        f"n = 0\nfor k in range({max(1, tenth // 1000)}):\n    n += len(llm_query_batched([f'a {{k}} {{i}}' for i in range({min(1000, tenth)})]))"
        f"\nprint({cell}, n)"  # equal prompts of a batch are asked once, and equal cells end a run
        for cell in range(10)
    )
    took = dict(answer="took", read=_took)
    return [
        Case("first_call", "from the start of the process to the first root call", (), _first),
        Case("turns_few", f"{few} turns", look(few), _turns),
        Case("turns_many", f"{many} turns", look(many), _turns),
        Case("text", f"{sizes.text // MB} MB text", look(few), _context, context="text"),
        Case(
            "text_file",
            f"{sizes.text // MB} MB file",
            look(few),
            _context,
            context="text",
            file=True,
            peers=False,
        ),
        Case(
            "big_file",
            f"{sizes.file // MB} MB file",
            (
                "print(len(context))",
                f"print(context[{sizes.file // 2} : {sizes.file // 2 + 50}])",
                "print(context.find('NEEDLE'))",
            ),
            _big_file,
            context="big",
            file=True,
            peers=False,
        ),
        Case(
            "batch",
            f"{sizes.batch} sub-calls of 50 ms at once",
            (_timed(batch(sizes.batch)),),
            latency=0.05,
            sub_calls=sizes.batch,
            **took,
        ),
        Case(
            "batch_of_10",
            "10 sub-calls of 50 ms at once",
            (_timed(batch(10)),),
            latency=0.05,
            sub_calls=10,
            **took,
        ),
        Case(
            "one_by_one",
            f"{sizes.batch} sub-calls of 0 ms, one after the other",
            (_timed(loop.format(sizes.batch)),),
            sub_calls=sizes.batch,
            **took,
        ),
        Case(
            "many",
            f"{sizes.many} sub-calls of 0 ms at once",
            (_timed(batch(sizes.many)),),
            sub_calls=sizes.many,
            **took,
        ),
        Case(
            "long_prompt",
            f"one sub-call with a prompt of {sizes.prompt / MB:g} MB",
            (_timed(one % sizes.prompt),),
            sub_calls=1,
            **took,
        ),
        *(
            Case(name, f"print of {size // MB} MB", prints(size), _print)
            for name, size in zip(("print", "print_large"), sizes.prints, strict=True)
        ),
        Case(
            "flood",
            f"{sizes.tiny:,} tiny sub-calls in ten cells, recorded",
            flood,
            _growth,
            sub_calls=tenth * 10,
            peers=False,
            log=True,
            once=True,
        ),
    ]


def write_contexts(folder: Path, sizes: Sizes, wanted: set[str]) -> dict[str, Path]:
    """The files that contexts come from, those of `wanted`."""
    line = "The quick brown fox jumps over the lazy dog, again and again, until evening comes.\n"
    block = (line * (MB // len(line) + 1))[: MB - 1] + "\n"
    count = {"tiny": 0, "text": sizes.text // MB, "big": sizes.file // MB}
    paths = {}
    for name in sorted(wanted):
        paths[name] = folder / f"{name}.txt"
        with paths[name].open("w", encoding="utf-8") as file:
            for i in range(count[name]):
                needle = "NEEDLE\n" if i == count[name] * 9 // 10 else ""
                file.write(needle + block[len(needle) :])
            if not count[name]:
                file.write(line * 20)
    return paths
