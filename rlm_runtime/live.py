"""What a person sees while a run goes on: finished turns above, one live block below; or plain
lines.

Everything a model or a cell wrote is cleaned before it is shown: it may hold escape codes meant for
the terminal.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Any, TextIO

from rlm_runtime.terminal import clean
from rlm_runtime.trajectory import (
    BudgetNote,
    CellEnd,
    CellStart,
    Compacted,
    ContextLoaded,
    NodeEnd,
    NodeStart,
    Nudged,
    Replied,
    RunStart,
    SandboxUp,
)

CODE_LINES, OUTPUT_LINES, WIDTH = 12, 6, 400


class LiveState:
    """What is known of a run from its events. Fed by the run's thread, read by the screen's."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.root = self.sub = self.context = self.sandbox = ""
        self.budget: dict[str, Any] = {}
        self.used: dict[str, float] = {}
        self.turn = 0
        self.doing = "starting the sandbox"
        self.input_tokens = self.output_tokens = 0
        self.cost: float | None = None
        self.started = self.done = self.failed = self.children = 0
        self.refused: str | None = None

    @property
    def running(self) -> int:
        return max(0, self.started - self.done)

    def note(self, event: Any) -> None:
        mine = event.node == "0"
        match event:
            case RunStart():
                self.root, self.sub, self.budget = event.root, event.sub, event.budget
            case ContextLoaded() if mine and event.name == "context":
                self.context = event.kind
                if event.chars is not None:
                    self.context += f", {event.chars:,} characters"
                elif event.bytes is not None:
                    self.context += f", {event.bytes:,} bytes"
            case SandboxUp() if mine:
                self.sandbox, self.doing = event.environment, "asking the root"
            case Replied():
                self._spend(event.usage)
                if mine:
                    self.turn, self.doing = event.turn, "reading the reply"
            case CellStart() if mine:
                self.doing = "running the cell"
            case CellEnd() if mine:
                self.doing = "asking the root"
            case NodeStart():
                self.started += 1
                self.children += event.kind == "rlm"
            case NodeEnd():
                self.done += 1
                self.failed += event.error is not None
                self._spend(event.usage)
            case BudgetNote():
                self.used = event.used
                self.refused = event.refused or self.refused
                # the books are right where the sum of events lags behind
                if "input_tokens" in event.used:
                    self.input_tokens = int(event.used["input_tokens"])
                    self.output_tokens = int(event.used.get("output_tokens", 0))
                if event.used.get("usd"):
                    self.cost = event.used["usd"]

    def _spend(self, usage: Any) -> None:
        self.input_tokens += usage.input_tokens
        self.output_tokens += usage.output_tokens
        if usage.cost_usd is not None:
            self.cost = (self.cost or 0.0) + usage.cost_usd

    def share(self) -> tuple[str, float] | None:
        """The limit that is nearest to its end, and how much of it is used."""
        used = {
            "turns": float(self.turn),
            "sub_calls": float(self.started),
            "input_tokens": float(self.input_tokens),
            "output_tokens": float(self.output_tokens),
            "usd": self.cost or 0.0,
            "seconds": time.monotonic() - self.began,
        }
        shares = [
            (name, used[name] / limit)
            for name, limit in self.budget.items()
            if limit and name in used
        ]
        return max(shares, key=lambda pair: pair[1], default=None)

    def numbers(self) -> str:
        parts = [f"{short(self.input_tokens)} in", f"{short(self.output_tokens)} out"]
        if self.cost is not None:
            parts.append(f"${self.cost:.4f}")
        parts.append(f"{time.monotonic() - self.began:.1f} s")
        return " · ".join(parts)


class LiveLines:
    """Progress as plain lines: for pipes, logs and small terminals."""

    def __init__(self, stream: TextIO | None = None):
        self.state = LiveState()
        self._stream = stream or sys.stderr

    def __enter__(self) -> LiveLines:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __call__(self, event: Any) -> None:
        before, state = self.state.refused, self.state
        state.note(event)
        mine = event.node == "0"
        match event:
            case ContextLoaded() if mine:
                self._say(f"{event.name}: {state.context}")
            case SandboxUp() if mine:
                self._say(f"sandbox: {event.environment}, up in {event.start_seconds:.2f} s")
            case Replied() if mine:
                u = event.usage
                self._say(
                    f"turn {event.turn}: {short(u.input_tokens)} in, {short(u.output_tokens)} out, {event.seconds:.1f} s"
                )
            case CellStart() if mine:
                for row in preview(event.code, CODE_LINES):
                    self._say(f"  > {row}")
            case CellEnd() if mine:
                for row in preview(output_of(event.result), OUTPUT_LINES):
                    self._say(f"  < {row}")
                if state.started:
                    self._say(f"  sub-calls so far: {state.done} done, {state.failed} failed")
            case Nudged() if mine:
                self._say(f"  the reply had to be corrected: {event.reason}")
            case Compacted() if mine:
                self._say(
                    f"  history compacted: {event.tokens_before:,} to {event.tokens_after:,} tokens"
                )
            case BudgetNote() if state.refused and state.refused != before:
                self._say(f"  limit reached: {state.refused}")

    def say(self, text: str) -> None:
        """A line that is not an event's."""
        self._say(text)

    def _say(self, text: str) -> None:
        # nobody reads the progress: no reason to lose the run
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(clean(text) + "\n")
            self._stream.flush()


class Screen:
    """The same on a terminal: finished turns scroll by, the last block shows what goes on now."""

    def __init__(self, console: Any = None):
        from rich.console import Console
        from rich.live import Live

        self.state = LiveState()
        self._lock = threading.Lock()
        self._console = console or Console(stderr=True, highlight=False)
        self._cell: CellStart | None = None
        self._reply: Replied | None = None
        self._calls_before = 0
        self._live = Live(self, console=self._console, refresh_per_second=8, transient=True)
        from rich.spinner import Spinner

        self._spinner = Spinner("dots", style="cyan")

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def __call__(self, event: Any) -> None:
        from rich.text import Text

        with self._lock:
            before = self.state.refused
            self.state.note(event)
        if isinstance(event, BudgetNote) and self.state.refused and self.state.refused != before:
            self._print(Text(f"  limit reached: {self.state.refused}", style="yellow"))
        if event.node != "0":
            return
        match event:
            case ContextLoaded():
                self._print(Text.assemble(("context ", "bold"), clean(self.state.context)))
            case Replied():
                self._reply = event
                u = event.usage
                head = Text.assemble(
                    (f"turn {event.turn} ", "bold cyan"),
                    (
                        f"{short(u.input_tokens)} in · {short(u.output_tokens)} out · {event.seconds:.1f} s",
                        "dim",
                    ),
                )
                self._print(head)
            case CellStart():
                with self._lock:
                    self._cell, self._calls_before = event, self.state.started
                self._print(self._code(event.code))
            case CellEnd():
                with self._lock:
                    self._cell, calls = None, self.state.started - self._calls_before
                self._print(self._output(event.result, calls))
            case Nudged():
                self._print(
                    Text(
                        f"  ↺ the reply had to be corrected: {clean(event.reason)}", style="yellow"
                    )
                )
            case Compacted():
                self._print(
                    Text(
                        f"  history compacted: {event.tokens_before:,} → {event.tokens_after:,} tokens",
                        style="dim",
                    )
                )

    def say(self, text: str) -> None:
        """A line that is not an event's."""
        from rich.text import Text

        self._print(Text(clean(text)))

    def _print(self, renderable: Any) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._live.console.print(renderable)

    def _code(self, code: str) -> Any:
        from rich.padding import Padding
        from rich.syntax import Syntax

        text = "\n".join(preview(code, CODE_LINES))
        return Padding(
            Syntax(text, "python", theme="ansi_dark", background_color="default", word_wrap=True),
            (0, 0, 0, 2),
        )

    def _output(self, result: Any, calls: int) -> Any:
        from rich.text import Text

        good = result.status == "ok"
        text = Text()
        for row in preview(output_of(result), OUTPUT_LINES):
            text.append("  │ ", "green" if good else "red")
            text.append(row + "\n", "dim" if good else "red")
        tail = [f"{result.wall_seconds:.1f} s"] + ([f"{calls} sub-calls"] if calls else [])
        text.append(
            f"  {'✓' if good else '✗ ' + result.status} {' · '.join(tail)}",
            "green" if good else "red",
        )
        return text

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        with self._lock:
            s = self.state
            doing = (
                s.doing
                if not (s.running and s.doing == "running the cell")
                else "waiting for sub-calls"
            )
            self._spinner.update(
                text=Text.assemble(
                    (f" {doing}", "bold"),
                    (f"  turn {s.turn + (s.doing == 'asking the root')}", "dim"),
                )
            )
            rows: list[Any] = [self._spinner]
            if s.started:
                bar = Table.grid(padding=(0, 1))
                bar.add_row(
                    Text("  sub-calls", style="dim"),
                    ProgressBar(total=s.started, completed=s.done, width=30),
                    Text(
                        f"{s.done}/{s.started}"
                        + (f" · {s.running} running" if s.running else "")
                        + (f" · {s.failed} failed" if s.failed else "")
                        + (f" · {s.children} child RLMs" if s.children else "")
                    ),
                )
                rows.append(bar)
            line = Text.assemble(("  " + s.numbers(), "dim"))
            near = s.share()
            if near and near[1] >= 0.05:
                line.append(
                    f" · {near[0]} {min(1.0, near[1]):.0%} used",
                    "yellow" if near[1] > 0.8 else "dim",
                )
            rows.append(line)
            return Group(*rows)


def viewer(*, plain: bool, quiet: bool) -> Any:
    """What shows the progress here: nothing, lines, or the live screen."""
    if quiet:
        return None
    if plain or not sys.stderr.isatty():
        return LiveLines()
    return Screen()


def output_of(result: Any) -> str:
    parts = [result.stdout, result.stderr]
    if result.error is not None:
        parts.append(f"{result.error.type}: {result.error.message}")
    if result.lost:
        parts.append(f"({result.lost})")
    return "\n".join(p.rstrip("\n") for p in parts if p) or (
        "(no output)" if result.status == "ok" else result.status
    )


def preview(text: str, lines: int) -> list[str]:
    """The first and last lines of a text, each of bounded width."""
    rows = [clean(r[:WIDTH]) for r in text.rstrip().split("\n")]
    if len(rows) > lines:
        tail = lines // 3
        hidden = len(rows) - lines + 1
        rows = [
            *rows[: lines - tail - 1],
            f"… {hidden} more lines",
            *(rows[-tail:] if tail else []),
        ]
    return rows


def short(count: int) -> str:
    if count < 1_000:
        return str(count)
    return f"{count / 1_000:.1f}k" if count < 1_000_000 else f"{count / 1_000_000:.2f}M"
