"""What the model is told when its reply could not be used as it was: what was found, what is
expected, an example."""

from __future__ import annotations

from dataclasses import dataclass

EXAMPLE = "```repl\nprint(type(context), len(context))\nprint(context[:500])\n```"
FINISH = '```repl\nanswer["content"] = result\nanswer["ready"] = True\n```'


@dataclass(frozen=True)
class Nudge:
    """`reason` is the word for logs and statistics, `text` what the model reads."""

    reason: str
    text: str


def empty() -> Nudge:
    return Nudge(
        "empty", f"Your reply was empty. Write the next step as Python in one block:\n{EXAMPLE}"
    )


def no_code(found: str = "only prose") -> Nudge:
    return Nudge(
        "no_code",
        f"No code was run: your reply held {found}. Every reply must hold Python in a ```repl block, for example:\n"
        f"{EXAMPLE}\nIf you already have the answer and have checked it, hand it in the same way:\n{FINISH}",
    )


def thinking_only(code: bool) -> Nudge:
    had = "thinking, and the code in it is not run" if code else "thinking"
    return Nudge(
        "thinking_only",
        f"No code was run: your reply held only {had}. End the thinking, then write the block after it:\n{EXAMPLE}",
    )


def cut_thinking() -> Nudge:
    return Nudge(
        "cut",
        "Your reply reached the length limit while still thinking, so nothing was run. Think less, and write one short "
        f"step at once:\n{EXAMPLE}",
    )


def still_thinking(times: int) -> Nudge:
    return Nudge(
        "still_thinking",
        f"This happened {times} times in a row: your reply was used up by thinking, nothing came after it, and nothing was "
        f"run. Do not plan the whole task. Leave the thinking out and reply with this block or one like it:\n{EXAMPLE}",
    )


def the_same_again(times: int, *, ran: bool) -> Nudge:
    what = (
        "the same code with the same output"
        if ran
        else "the same reply, without code that could be run"
    )
    return Nudge(
        "repeats",
        f"You sent {what}, now for the {times}{'nd' if times == 2 else 'rd' if times == 3 else 'th'} time. Once more will "
        "bring nothing new, and the run is stopped if it goes on like this. Take another step: print something else, change "
        f"the code, or hand in the best answer you have:\n{FINISH}",
    )


def cut_cell() -> Nudge:
    return Nudge(
        "cut",
        "Your reply reached the length limit in the middle of a block; that block was NOT run (complete blocks before "
        "it, if any, were). Write it again, shorter: one small step per reply, and no long literals (take text from `context` "
        "by slicing).",
    )


def cut_but_ran() -> Nudge:
    return Nudge(
        "cut",
        "Your reply reached the length limit inside its last block. What had arrived was complete Python and was run "
        "as it stood; check that nothing is missing before you go on. Keep replies shorter.",
    )


def cut_prose() -> Nudge:
    return Nudge(
        "cut",
        f"Your reply reached the length limit before any complete block, so nothing was run. Write the code first:\n"
        f"{EXAMPLE}",
    )


def imitation(marker: str, cells: int, dropped: int) -> Nudge:
    """`dropped`: blocks that came after the made-up output."""
    ran = {0: "Nothing was run", 1: "Only the block before it was run"}.get(
        cells, f"Only the {cells} blocks before it were run"
    )
    also = (
        f" {dropped} later block{'s' * (dropped > 1)} built on it and {'were' if dropped > 1 else 'was'} NOT run."
        if dropped
        else ""
    )
    return Nudge(
        "hallucinated_output",
        f"You wrote output yourself (from {marker!r} on). You cannot know it: real output comes only from the REPL, in "
        f"the next message. Everything from there on was discarded. {ran}.{also} Stop right after your block and wait.",
    )


def session(outputs: bool) -> Nudge:
    tail = " The output lines in it were made up and dropped." if outputs else ""
    return Nudge(
        "hallucinated_output", f"Write plain code, without >>> prompts or output lines.{tail}"
    )


def shell(line: str, alone: bool) -> Nudge:
    rest = "Nothing was run." if alone else "These lines were left out."
    return Nudge(
        "shell",
        f"Only Python runs in the REPL: no shell, no package installation (found {line[:80]!r}). {rest} Use the standard "
        "library and what is already there; the data is in `context`, not on a disk or a server.",
    )


def language(name: str) -> Nudge:
    return Nudge(
        "language",
        f"The block marked {name[:40]!r} was not run: only Python runs in the REPL. Write it as:\n{EXAMPLE}",
    )


def unknown_tool(name: str) -> Nudge:
    return Nudge(
        "unknown_tool",
        f"There is no tool {name[:80]!r} to call. Everything is done by Python in the REPL; the functions named in the "
        f"instructions are called from code:\n{EXAMPLE}",
    )


def bad_call(name: str) -> Nudge:
    return Nudge(
        "bad_tool_call",
        f"The tool call to {name[:80]!r} could not be read: no code was found in its arguments. Write plain text instead, "
        f"with the code in a block:\n{EXAMPLE}",
    )


def final_with_code() -> Nudge:
    return Nudge(
        "final_with_code",
        "You gave a final answer in the same reply as code, before seeing that code's output, so the answer was not "
        "taken. Read the output; if the answer stands, hand it in alone:\n" + FINISH,
    )


def placeholder() -> Nudge:
    return Nudge(
        "placeholder",
        "You handed in a placeholder instead of an answer. Compute the answer in the REPL and hand in the value:\n"
        + FINISH,
    )


def too_long(limit: int) -> Nudge:
    return Nudge(
        "too_long",
        f"A reply may hold {limit:,} characters; the rest was dropped. Write one step per reply.",
    )


def too_many(limit: int) -> Nudge:
    return Nudge(
        "too_many_cells",
        f"A reply may hold {limit} blocks; the rest was dropped. Write one step per reply.",
    )
