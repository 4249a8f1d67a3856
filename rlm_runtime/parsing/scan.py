"""A reply cut into prose, thinking and blocks (fences, tags, written-out tool calls), in one walk
from left to right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from typing import Any, Literal

from rlm_runtime.parsing import calls
from rlm_runtime.parsing.imitation import MARK
from rlm_runtime.parsing.python import Effort, is_code, line_share, outside_strings, parses, words
from rlm_runtime.replies import model_json
from rlm_runtime.replies.thinking import (
    CLOSE,
    HEADER,
    MESSAGE_END,
    OPEN,
    RECEIVER,
    closing_tag,
    without_last_tokens,
)

PYTHON = words(
    "repl python py python2 python3 py3 ipython ipython3 python-repl pycon tool_code python_repl pyrepl"
)
SHELL = words("bash sh shell zsh console terminal cmd powershell ps1 fish shell-session")
OTHER = words(
    "javascript js typescript ts jsx tsx java c cpp c++ csharp cs go rust ruby php perl r sql lua kotlin swift scala "
    "haskell julia matlab html css"
)
DATA = words(
    "output out stdout stderr result results text txt plaintext plain log logs json jsonl yaml yml toml xml csv tsv "
    "markdown md diff latex tex mermaid none"
)
MAX_BLOCKS = 2_000  # past it the rest of a reply is prose


@dataclass(frozen=True)
class Part:
    """A stretch `start:end` of the reply. `text` is what is inside a block's marks; `value` a
    call's decoded JSON."""

    kind: Literal["prose", "thinking", "fence", "tag", "call"]
    start: int
    end: int
    text: str = ""
    name: str = ""  # the word after the fence, the tag, the function called
    closed: bool = True
    value: Any = None


OPENING = re.compile(
    r"""
    (?P<fence>^(?P<indent>[ \t]*+)(?P<marks>`{3,16}(?!`)|~{3,16}(?!~))(?P<info>[^\n`]*+)$)
    |(?P<inline>(?<!`)```(?:repl|python3?|py)[ ]++(?P<line>[^`\n]++)```)
    |(?P<beside>(?<!`)```(?P<word>repl|python3?|py|ipython)[ \t]*+$)
    |(?<!`)(?P<think>OPEN)
    |(?P<unthink>CLOSE)
    |<(?P<call>tool_call|toolcall|function_call|tool_use)>
    |<(?P<invoke>(?:antml:)?invoke)[ ]name=["']?(?P<invoked>[\w.:-]{1,80})["']?[ ]*+>
    |<function=(?P<function>[\w.:-]{1,80})>
    |(?<!`)<(?P<tag>code|python|py|execute|exec|repl|execute_python|run_python|tool_code|ipython|execute_ipython|python_code)>
    |(?P<token><\|python_tag\|>)
    |HEADER
    |<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<deepseek>[\w.]{1,80})(?:<｜tool▁sep｜>|[ \t]*+\n)
    |^Action[ ]?:[ \t]*+(?P<react>[\w.]{1,80})[ \t]*+\nAction[ ]Input[ ]?:[ \t]*+\n?
    |(?P<mistral>\[TOOL_CALLS\][ ]*+)
    |(?P<json>^[ \t]*+(?=[\[{][\[{\s]{0,20}+"(?:name|tool|tool_name|function|tool_calls|type|id|action|recipient_name|arguments|parameters|code)"))
    """.replace("OPEN", OPEN.pattern)
    .replace("CLOSE", CLOSE.pattern)
    .replace("HEADER", HEADER.pattern),
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)
INNER = re.compile(r"^[ \t]*+`{3,16}(?:repl|python3?|py)[ \t]*+$", re.M | re.I)
BRACE = re.compile(r"\s*+(?=[\[{])")
REACT_END = re.compile(r"^(?:Observation|Thought|Action|Final Answer)[ ]?:", re.M | re.I)
DEEPSEEK_END = re.compile(r"<｜tool▁call▁end｜>")
TOKEN_END = re.compile(rf"{MESSAGE_END.pattern}|<\|(?:eom_id|eot_id|im_end|endoftext)\|>")


@cache
def _closing(char: str, count: int) -> re.Pattern[str]:
    """A line of marks alone; the special token that ends a reply may stand behind them."""
    ends = r"$|<[|｜]|</s>|<end_of_turn>|</?end_code>|</(?:code|repl|python|execute)>"
    return re.compile(rf"^[ \t]*+{char}{{{count},16}}(?!{char})[ \t]*+(?={ends})", re.M)


@cache
def _literal(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text), re.I)


def _tag_end(tag: str) -> re.Pattern[str]:
    # one pattern for all spellings: a reply may hold thousands
    return _literal(f"</{tag.lower()}>")


@dataclass
class Scanner:
    text: str
    effort: Effort
    cut: bool  # by the length limit
    found: dict[re.Pattern[str], re.Match[str] | None] = field(default_factory=dict)
    unclosed: set[str] = field(default_factory=set)  # tags that were looked at once and never end

    def parts(self) -> list[Part]:
        """Every part in order; together they cover the text."""
        parts: list[Part] = []
        at, prose = 0, 0
        reset = False
        while len(parts) < MAX_BLOCKS and (opening := OPENING.search(self.text, at)):
            if opening["unthink"]:
                at = opening.end()
                # opened by the chat template
                if not reset and not any(p.kind == "thinking" for p in parts):
                    parts = [Part("thinking", 0, at, self.text[: opening.start()])]
                    prose, reset = at, True
                # closed once more, with words alone in between
                elif parts and parts[-1].kind == "thinking":
                    parts.append(Part("thinking", prose, at, self.text[prose : opening.start()]))
                    prose = at
                continue
            block = self._block(opening)
            if block is None:
                at = max(opening.end(), at + 1)
                continue
            if block.start > prose:
                parts.append(Part("prose", prose, block.start, self.text[prose : block.start]))
            parts.append(block)
            at = prose = max(block.end, opening.end())
        if prose < len(self.text):
            parts.append(Part("prose", prose, len(self.text), self.text[prose:]))
        return parts

    def _next(self, pattern: re.Pattern[str], at: int) -> re.Match[str] | None:
        """`pattern.search` for positions that only grow: what lies ahead is looked for once."""
        known = self.found.get(pattern)
        if pattern in self.found and (known is None or known.start() >= at):
            return known
        self.found[pattern] = pattern.search(self.text, at)
        return self.found[pattern]

    def _block(self, opening: re.Match[str]) -> Part | None:
        start, end = opening.span()
        if opening["fence"] is not None:
            return self._fence(
                start, end, opening["marks"], opening["info"].strip(), opening["indent"]
            )
        if opening["beside"]:
            return self._fence(start, end, "```", opening["word"], "")
        if opening["inline"]:
            return Part("fence", start, end, opening["line"], "python")
        if opening["think"]:
            return self._thinking(start, end, _literal(closing_tag(opening["think"])))
        if opening["channel"]:
            to = RECEIVER.search(f"{opening['role'] or ''} {opening['rest']}")
            return self._until(start, end, TOKEN_END, to[1]) if to else None
        if opening["deepseek"]:
            return self._until(start, end, DEEPSEEK_END, opening["deepseek"])
        if opening["react"]:
            found = self._next(REACT_END, end)
            stop = found.start() if found else len(self.text)
            return Part("call", start, stop, self.text[end:stop].strip("\n"), opening["react"])
        if opening["token"] or opening["mistral"]:
            return self._token(start, end, opening["mistral"] is not None)
        if opening["json"] is not None:
            return self._json(start, end)
        if opening["tag"]:
            return self._tag(start, end, opening["tag"])
        return self._call(start, end, opening)

    def _thinking(self, start: int, body: int, closing: re.Pattern[str]) -> Part | None:
        close = self._next(closing, body)
        if close is None:
            if self.text[self.text.rfind("\n", max(0, start - 200), start) + 1 : start].strip(
                " \t\n"
            ):
                return None  # a mention of the tag in a sentence
            return Part("thinking", start, len(self.text), self.text[body:], closed=False)
        return Part("thinking", start, close.end(), self.text[body : close.start()])

    def _token(self, start: int, body: int, listed: bool) -> Part:
        if listed:
            named = re.compile(r"([\w.]{1,80})(?:\[ARGS\])?[ ]*+(?=\{)").match(self.text, body)
            decoded = self._decode(named.end() if named else body)
            if decoded is not None:
                value = {"name": named[1], "arguments": decoded[0]} if named else decoded[0]
                return Part("call", start, decoded[1], value=value)
        return self._until(start, body, TOKEN_END)

    def _until(self, start: int, body: int, closing: re.Pattern[str], name: str = "") -> Part:
        """A call up to its closing mark; one inside a string of its JSON or code is none."""
        brace = BRACE.match(self.text, body)
        decoded = self._decode(brace.end()) if brace else None
        if decoded is not None:
            tail = re.compile(rf"\s*+(?:{closing.pattern})", re.I).match(self.text, decoded[1])
            return Part(
                "call", start, tail.end() if tail else decoded[1], name=name, value=decoded[0]
            )
        first = self._next(closing, body)
        close = self._outside(body, first, closing) if first else None
        stop, end = (close.start(), close.end()) if close else (len(self.text), len(self.text))
        return Part("call", start, end, self.text[body:stop], name, closed=close is not None)

    def _decode(self, at: int) -> tuple[Any, int] | None:
        return model_json.raw_decode(self.text, at, self.effort)

    def _json(self, start: int, body: int) -> Part | None:
        decoded = self._decode(body)
        if decoded is not None:
            return (
                Part("call", start, decoded[1], value=decoded[0])
                if calls.from_json(decoded[0])
                else None
            )
        rest = self.text[body : body + 400]
        if re.search(r'"(?:name|tool|action)"\s*+:\s*+"', rest) and calls.CODE_STRING.search(rest):
            return Part("call", start, len(self.text), self.text[body:], closed=False)
        return None

    def _tag(self, start: int, body: int, tag: str) -> Part | None:
        closing = _tag_end(tag)
        first = self._next(closing, body)
        if first is None:
            if tag in self.unclosed:
                return None
            self.unclosed.add(tag)
            inner = self.text[body:]
            wanted = "\n" in inner and is_code(calls.unfenced(inner.strip()), self.effort)
            return Part("tag", start, len(self.text), inner, tag, closed=False) if wanted else None
        close = self._outside(body, first, closing)
        if close is None:
            return Part("tag", start, len(self.text), self.text[body:], tag, closed=False)
        inner = self.text[body : close.start()]
        plain = tag.lower() == "code" and not is_code(calls.unfenced(inner.strip()), self.effort)
        return Part(
            "prose" if plain else "tag",
            start,
            close.end(),
            self.text[start : close.end()] if plain else inner,
            tag,
        )

    def _call(self, start: int, body: int, opening: re.Match[str]) -> Part:
        tag = opening["call"] or opening["invoke"] or "function"
        name = opening["invoked"] or opening["function"] or ""
        closing = _tag_end(tag)
        if BRACE.match(self.text, body):
            return self._until(start, body, closing, name)
        at = body
        for _ in range(16):  # a closing tag inside a parameter's code is not the end of the call
            parameter = calls.PARAMETER.search(self.text, at, min(len(self.text), at + 200))
            if parameter is None or not self.effort.spend(1000):
                break
            at = calls.parameter_end(self.text, parameter.end(), self.effort)
        close = self._next(closing, at)
        stop, end = (close.start(), close.end()) if close else (len(self.text), len(self.text))
        return Part("call", start, end, self.text[body:stop], name, closed=close is not None)

    def _outside(
        self, body: int, first: re.Match[str], closing: re.Pattern[str], indent: str = ""
    ) -> re.Match[str] | None:
        """The closing mark: the first outside the code's strings where the code up to it parses,
        else the first. None where every mark stands in a string and the whole rest parses."""
        if self.effort.left <= 0:
            return first
        close = outside_strings(self.text, body, len(self.text), self._places(first, closing))
        stop = close.start() if close else len(self.text)
        self.effort.spend(stop - body)
        if close is not None and close.start() == first.start():
            return first
        code = calls.unfenced(outdented(without_last_tokens(self.text[body:stop]), indent))
        return close if parses(code, self.effort) else first

    def _places(self, first: re.Match[str], closing: re.Pattern[str]) -> Iterator[re.Match[str]]:
        yield first
        yield from closing.finditer(self.text, first.end())

    def _fence(self, start: int, body: int, marks: str, info: str, indent: str) -> Part:
        body = min(body + 1, len(self.text))
        word = re.split(r"[\s,:{}=]", info.strip("{} .").lower(), maxsplit=1)[0]
        closing = _closing(marks[0], len(marks))
        first = self._next(closing, body)
        if word in DATA or word in OTHER or word in SHELL:
            stop, end = (first.start(), first.end()) if first else (len(self.text), len(self.text))
            return Part(
                "fence", start, end, self._inside(body, stop), word, closed=first is not None
            )
        close = None if first is None else self._outside(body, first, closing, indent)
        stop = len(self.text) if close is None else close.start()
        code = self._inside(body, stop, indent)
        fence = Part(
            "fence", start, close.end() if close else stop, code, word, closed=close is not None
        )
        if parses(code, self.effort):
            return fence
        late = re.compile(
            rf"(?<=[^{marks[0]}\n]){marks[0]}{{{len(marks)}}}(?!{marks[0]})[ \t]*+$", re.M
        )
        for mark in islice(late.finditer(self.text, body, stop), 3):  # print(1)```
            code = self._inside(body, mark.start(), indent)
            if parses(code, self.effort):
                return replace(fence, end=mark.end(), text=code, closed=True)
        inner = outside_strings(self.text, body, stop, INNER.finditer(self.text, body, stop))
        if inner is not None:  # the next block opens before this one was closed
            code = self._inside(body, inner.start(), indent)
            return self._unclosed(replace(fence, end=inner.start(), text=code), body, indent)
        return fence if close else self._unclosed(fence, body, indent)

    def _inside(self, body: int, stop: int, indent: str = "") -> str:
        return outdented(self.text[body:stop].removesuffix("\n"), indent)

    def _unclosed(self, fence: Part, body: int, indent: str) -> Part:
        """A block without its end: made-up output, prose and special tokens after the code are not
        code."""
        fence = replace(fence, closed=False)
        if parses(fence.text, self.effort):
            return fence
        bare = without_last_tokens(fence.text)
        if bare != fence.text and parses(bare, self.effort):
            return replace(fence, text=bare)
        code = self.text[body : fence.end]
        for pattern in (MARK, CLOSE):
            mark = outside_strings(code, 0, len(code), pattern.finditer(code))
            if (
                mark is not None
                and mark.start()
                and parses(outdented(code[: mark.start()], indent), self.effort)
            ):
                text = outdented(code[: mark.start()].rstrip("\n"), indent)
                return replace(fence, end=body + mark.start(), text=text)
        if self.cut and fence.end == len(self.text):
            return fence
        stop = len(code)
        for _ in range(6):
            stop = code.rfind("\n\n", 0, stop)
            if stop <= 0 or line_share(code[stop:]) > 0:
                break
            if parses(outdented(code[:stop], indent), self.effort):
                return replace(fence, end=body + stop, text=outdented(code[:stop], indent))
        return fence


def outdented(code: str, indent: str) -> str:
    """A fence that stands indented has its code indented with it."""
    return re.sub(rf"^[ \t]{{1,{len(indent)}}}", "", code, flags=re.M) if indent else code
