"""A model's reply read as cells to run: forgiving about form, strict about what was never computed.

Small models fail mostly at this boundary, so every form they are known to use is read, and what
cannot be used is answered with a nudge that says what was found and what is expected. Pure
functions; any text parses, in linear time.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from rlm_runtime.lms.base import Reply
from rlm_runtime.parsing import calls, finals, imitation, nudges
from rlm_runtime.parsing.finals import is_plan
from rlm_runtime.parsing.nudges import Nudge
from rlm_runtime.parsing.python import SHELL, Effort, is_code, parses, repaired, without_prompts
from rlm_runtime.parsing.scan import DATA, OTHER, PYTHON, Part, Scanner
from rlm_runtime.parsing.scan import SHELL as SHELL_WORDS
from rlm_runtime.replies import thinking
from rlm_runtime.replies.thinking import SPECIAL

__all__ = ["MAX_CELLS", "Nudge", "Parsed", "is_plan", "parse"]

MAX_CELLS = 64  # of one reply
MAX_CHARS = 400_000  # of one reply without its thinking; what follows is discarded
# behind a fence that it should have closed
STRAY = re.compile(r"\A\s*+</(?:end_code|code|repl|python|execute)>")
EMPTY = (
    # stands in the history for a reply with nothing to keep: some endpoints refuse an empty message
    "(empty reply)"
)


@dataclass(frozen=True)
class Parsed:
    """What a reply comes to.

    `cells` run in order. `kept` is the reply as it goes into the history: without thinking and
    special tokens, without what was discarded, foreign forms of code rewritten as ```repl blocks;
    never empty. `final` is an answer given as text where the reply holds no cell (an answer that
    needs the REPL, FINAL_VAR(x), is a cell instead); `whole_json` marks one that came as a JSON
    object, so that a caller with a schema of its own may prefer the object in `kept`.
    """

    cells: tuple[str, ...] = ()
    kept: str = EMPTY
    discarded: int = 0
    thinking: str = ""
    final: str | None = None
    nudges: tuple[Nudge, ...] = ()
    whole_json: bool = False
    cut_thinking: bool = False  # the length limit fell into the thinking, and nothing else came


def parse(reply: Reply, *, tools: Collection[str] = ()) -> Parsed:
    """Read a reply. `tools` are the user's functions in the REPL, which a model may also call as
    tools. Never raises."""
    found = thinking.harmony(reply.text.replace("\r\n", "\n"))
    cut = reply.finish_reason == "length"
    reading = _Reading(found, cut, tools)
    reading.read()
    for call in reply.tool_calls[:MAX_CELLS]:
        reading.native(call.name, call.arguments)
    return reading.result()


def block(code: str) -> str:
    """The cell as the history shows it: a ```repl block whose fence no line of the code can
    close."""
    marks = "`" * max([3, *(len(m) + 1 for m in re.findall(r"^[ \t]*+(`{3,15})", code, re.M))])
    return f"{marks}repl\n{code}\n{marks}"


@dataclass
class _Cell:
    code: str
    answer: bool = False  # hands in an answer given in prose


class _Reading:
    """One reply on its way to a `Parsed`: parts in order, cells, what is kept, what the model must
    be told."""

    def __init__(self, found: thinking.Cleaned, cut: bool, tools: Collection[str]):
        self.text, self.cut, self.tools = found.text, cut, tools
        self.cells: list[_Cell] = []
        self.kept: list[str] = []
        self.thinking: list[str] = [found.thinking]
        self.told: list[Nudge] = []
        self.finals: list[finals.Found] = []
        self.discarded = 0
        self.thought_open = found.open
        self.seen: list[str] = []  # what else was found, for the nudge
        self._shorten()
        self.effort = Effort(len(self.text))

    def _shorten(self) -> None:
        """To MAX_CHARS behind its thinking, which may be longer than that by far."""
        if len(self.text) <= MAX_CHARS:
            return
        close = thinking.CLOSE.search(self.text)
        if close is not None:
            self.thinking.append(thinking.OPEN.sub("", self.text[: close.start()], count=1).strip())
            self.text = self.text[close.end() :]
        if len(self.text) > MAX_CHARS:
            self.discarded += len(self.text) - MAX_CHARS
            self.text = self.text[:MAX_CHARS]
            self.told.append(nudges.too_long(MAX_CHARS))

    def read(self) -> None:
        parts = Scanner(self.text, self.effort, self.cut).parts()
        blocks = any(self._to_run(p) for p in parts)
        for i, part in enumerate(parts):
            if part.kind == "thinking":
                self.thinking.append(part.text.strip())
                self.thought_open |= not part.closed
            elif part.kind == "prose":
                at = imitation.marker(part.text) if self.cells else None
                stop = len(part.text) if at is None else at
                self._prose(part.text[:stop], blocks)
                if at is not None:
                    return self._imitated(part.start + at, parts[i + 1 :])
            elif self._plays_output(part, parts[i - 1] if i else None):
                return self._imitated(part.start, parts[i + 1 :])
            elif len(self.cells) >= MAX_CELLS:
                self.told.append(nudges.too_many(MAX_CELLS))
                self.discarded += len(self.text) - part.start
                return None
            else:
                self._block(part)
        return None

    def _to_run(self, part: Part) -> bool:
        if part.kind == "fence":
            return part.name in PYTHON or (
                part.name not in DATA | OTHER | SHELL_WORDS and is_code(part.text, self.effort)
            )
        return part.kind in ("tag", "call")

    def _plays_output(self, part: Part, before: Part | None) -> bool:
        """A block that is no code, right behind a cell, where its output would stand."""
        if (
            not self.cells
            or part.kind != "fence"
            or self._to_run(part)
            or part.name in OTHER | SHELL_WORDS
        ):
            return False
        if part.name == "json" and calls.from_json(calls.loads(part.text, self.effort)):
            return False
        if part.name in ("output", "stdout", "stderr", "out", "result", "results"):
            return True
        return before is not None and (
            before.kind != "prose" or imitation.follows_as_output(before.text)
        )

    def _imitated(self, at: int, later: list[Part]) -> None:
        self.discarded += len(self.text) - at
        line = next(
            (x for x in SPECIAL.sub("", self.text[at : at + 400]).split("\n") if x.strip()),
            self.text[at : at + 40],
        )
        dropped = sum(self._to_run(p) for p in later)
        self.told.append(nudges.imitation(line.strip()[:60], len(self.cells), dropped))

    def _prose(self, prose: str, blocks: bool) -> None:
        if self.cells:
            prose = STRAY.sub("", prose)
        self.kept.append(re.sub(r"\n{3,}", "\n\n", SPECIAL.sub("", prose)))
        for found in finals.in_prose(prose, self.effort, cells=blocks):
            if found.kind == "cell":
                if not blocks or self.cells:  # before the first block it is a plan, not an answer
                    self.cells.append(_Cell(found.text, answer=True))
            else:
                self.finals.append(found)

    def _block(self, part: Part) -> None:
        source = self.text[part.start : part.end]
        if part.kind == "call":
            return self._call(part)
        if part.kind == "fence" and not self._to_run(part):
            if part.name in DATA | {""} and (
                found := calls.from_json(calls.loads(part.text, self.effort))
            ):
                return self._made(found)
            self.kept.append(source)
            if part.name in SHELL_WORDS:
                self.told.append(nudges.shell(part.text.strip().split("\n")[0], alone=True))
            elif part.name in OTHER:
                self.told.append(nudges.language(part.name))
            else:
                self.seen.append("a block that is not Python")
            return None
        code = calls.unfenced(part.text) if part.kind == "tag" else part.text
        code = _headed(code) if part.name == "" else code
        if part.kind == "tag" and code == part.text:
            code = code.strip("\n")
        if not code.strip():
            self.kept.append(source)
            self.seen.append("an empty block")
            return None
        return self._cell(
            code, source if part.kind == "fence" and part.closed else None, part.closed
        )

    def _cell(self, code: str, source: str | None, closed: bool) -> None:
        """One cell; `source` is how the reply spelled it, None where the history shall show a
        ```repl block."""
        fixed = repaired(code, self.effort)
        if not closed and self.cut and not parses(fixed):
            self.kept.append(block(code))
            self.told.append(nudges.cut_cell())
            return
        if fixed == code and not parses(code, self.effort):
            fixed = self._without_shell(code)
        if not fixed.strip():
            self.kept.append(source or block(code))
            return
        if fixed != code:
            prompts, output = without_prompts(code)
            if output and prompts == fixed:
                self.told.append(nudges.session(output))
                self.discarded += len(code) - len(fixed)
        if not closed and self.cut:
            self.told.append(nudges.cut_but_ran())
        self.cells.append(_Cell(fixed))
        self.kept.append(source if source is not None and fixed == code else block(fixed))

    def _without_shell(self, code: str) -> str:
        lines = code.split("\n")
        shell = [line for line in lines if SHELL.match(line)]
        if not shell:
            return code
        rest = repaired(
            "\n".join("" if SHELL.match(line) else line for line in lines), self.effort
        ).strip("\n")
        self.told.append(nudges.shell(shell[0].strip(), alone=not rest.strip()))
        return rest

    def _call(self, part: Part) -> None:
        if part.value is not None:
            found = [(part.name, part.value)] if part.name else calls.from_json(part.value)
            if (
                part.name
                and isinstance(part.value, dict)
                and (spelled := calls.from_json(part.value))
            ):
                found = spelled
        elif part.name:
            found = [
                c if c[0] != "python" else (part.name, c[1])
                for c in calls.from_xml(part.text, self.effort)
            ]
            found = found or [(part.name, part.text)]
        else:
            found = calls.from_xml(part.text, self.effort)
        if found:
            return self._made(found, part.closed)
        self.kept.append(self.text[part.start : part.end])
        if part.value is not None or part.text.strip():
            self.told.append(nudges.bad_call("tool"))
        return None

    def _made(self, found: list[tuple[str, object]], closed: bool = True) -> None:
        for name, arguments in found[:MAX_CELLS]:
            made = calls.cell(name, arguments, self.effort, self.tools)
            if made.nudge is not None:
                self.told.append(made.nudge)
            elif made.code is not None:
                self._cell(made.code, None, closed and made.sound)

    def native(self, name: str, arguments: object) -> None:
        if len(self.cells) < MAX_CELLS:
            self._made([(name, arguments)])

    def result(self) -> Parsed:
        final, whole_json = self._final()
        kept = "".join(self._spaced()).strip("\n").rstrip()
        kept = kept if kept.strip() else EMPTY
        cells = tuple(c.code for c in self.cells)
        parsed = Parsed(
            cells,
            kept,
            self.discarded,
            "\n\n".join(t for t in self.thinking if t),
            final,
            whole_json=whole_json,
        )
        nothing = not cells and final is None and not self.told
        if nothing:
            self.told.append(self._nothing(kept))
        cut_thinking = nothing and self.cut and self.thought_open
        return replace(parsed, nudges=tuple(dict.fromkeys(self.told)), cut_thinking=cut_thinking)

    def _spaced(self) -> list[str]:
        """Kept pieces, with a line break where a rewritten block would otherwise stand inside a
        line."""
        out: list[str] = []
        for piece in self.kept:
            before = out[-1] if out else "\n"
            opens = piece.startswith("```") and not before.endswith("\n")
            closes = before.endswith("```") and bool(piece.strip()) and not piece.startswith("\n")
            out.append("\n" + piece if opens or closes else piece)
        return out

    def _final(self) -> tuple[str | None, bool]:
        texts = [f for f in self.finals if f.kind == "text"]
        unended = [f for f in self.finals if f.kind == "open" and not self.cut]
        if self.cells:
            if texts or unended:
                self.told.append(nudges.final_with_code())
            return None, False
        if texts or unended:
            return (texts or unended)[0].text, False
        if any(f.kind == "placeholder" for f in self.finals):
            self.told.append(nudges.placeholder())
            return None, False
        prose = "".join(self.kept).strip()
        given, value = (
            finals.in_json(prose, self.effort)
            if prose.startswith(("{", "`", "~")) and not self.cut
            else (False, None)
        )
        if given:
            self.told = [n for n in self.told if n.reason != "unknown_tool"]
            return finals.as_text(value), True
        code = (
            finals.bare_code(prose, self.effort)
            if prose and not self.cut and not self.told
            else None
        )
        if code is not None:
            self.kept = []
            self._cell(code, None, closed=True)
        return None, False

    def _nothing(self, kept: str) -> Nudge:
        if self.cut:
            # an endpoint may keep the thinking to itself
            self.thought_open = self.thought_open or kept == EMPTY
            return nudges.cut_thinking() if self.thought_open else nudges.cut_prose()
        if kept == EMPTY:
            if not any(self.thinking):
                return nudges.empty()
            return nudges.thinking_only(
                any(re.search(r"```|<code>|<tool_call>", t) for t in self.thinking)
            )
        if self.seen:
            return nudges.no_code(self.seen[0])
        if is_code(kept, self.effort):
            return nudges.no_code("what looks like code, but not in a block")
        return nudges.no_code()


def _headed(code: str) -> str:
    """Without a first line that only names the language: the word meant for the fence."""
    first, newline, rest = code.partition("\n")
    return (
        rest if newline and first.strip().lower() in ("python", "repl", "py", "python3") else code
    )
