"""Answers given in prose: FINAL(...), FINAL_VAR(...), `answer[...] = ...` without a fence, a JSON
object as the reply."""

from __future__ import annotations

import ast
import builtins
import json
import re
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from rlm_runtime.parsing import calls
from rlm_runtime.parsing.python import BLANKS, LARGE, QUOTES, Effort, is_code, parses, tree, words

Kind = Literal["cell", "text", "placeholder", "open"]


@dataclass(frozen=True)
class Found:
    """`cell`: Python that hands the answer in, run in the REPL; `text`: the answer itself;
    `placeholder`: neither;
    `open`: FINAL( without its end."""

    start: int
    kind: Kind
    text: str = ""


FINAL = re.compile(
    r"^[ \t]*+[*_`>#-]{0,6}+[ \t]*+(?:(?:final )?answer:[ \t*]*+)?FINAL(?P<var>_VAR)?[ ]?\(",
    re.M | re.I,
)
LAST = re.compile(r"\b(?-i:FINAL)(?P<var>_VAR)?\(")
TAGGED = re.compile(r"^[ \t]*+<(answer|final_answer)>((?:(?!<\1>).)*?)</\1>[ \t]*+$", re.M | re.S)
PLAN = re.compile(
    r"\b(?:will|then|when|once|use|using|call|calling|should|must|would|could|later|via|with|if|by)\b",
    re.I,
)
ANSWER = re.compile(
    r"""^[ \t]*+`{0,2}(?=answer(?:\[["'“‘](?:content|ready)["'”’]\][ \t]*+=|[ \t]*+=[ \t]*+[{d]|\.update\())""",
    re.M,
)
PLACEHOLDER = re.compile(
    r"""["'<\[{(]*+(?:\.\.\.|…|(?:your|the|my|insert|put|place)[ _](?:final[ _])?(?:answer|result|value|text)(?:[ _](?:here|goes here|string))?
    |(?<=<)[^<>\n]{1,60}|answer[ _]here|final[ _]answer|variable[_ ]name|var(?:iable)?|x)?["'>\]})]*+""",
    re.VERBOSE | re.IGNORECASE,
)


PLANNED = re.compile(
    r"""\W{0,4}+(?:(?:first|next|now|ok(?:ay)?|sure|certainly)\b[,.!:]?[ ]++)*+
    (?:(?:I|we)(?:[ ](?:will|shall|need[ ]to|should|must|have[ ]to|(?:am|are)[ ]going[ ]to|want[ ]to|would[ ](?:first|start|begin))
        |['’]ll|['’](?:m|re)[ ]going[ ]to)
    |let(?:['’]s|[ ]me|[ ]us)|to[ ](?:answer|find|solve|do|determine)\b[^\n]{0,200}?[,][ ](?:I|we)\b
    |I[ ](?:don['’]t|do[ ]not)[ ]have[ ](?:enough|the|any)[ ](?:information|context|data))\b""",
    re.VERBOSE | re.IGNORECASE,
)


def is_plan(answer: Any) -> bool:
    """Whether an answer only says what its author is about to do."""
    return isinstance(answer, str) and PLANNED.match(answer.strip()[:400]) is not None


def in_prose(prose: str, effort: Effort, cells: bool) -> list[Found]:
    """Answers in a stretch of prose, in order. `cells`: the reply holds code too, so a mention in a
    sentence is none."""
    found: list[Found] = []
    at = 0
    while len(found) < 32 and (opening := FINAL.search(prose, at)):
        item, at = _final(prose, opening, effort, cells)
        found.append(item)
        if item.kind == "open":
            break
    if not found and not cells:
        last = _last(LAST, prose, max(0, len(prose) - 4000))
        if last is not None:
            line = prose[prose.rfind("\n", 0, last.start()) + 1 : last.start()]
            item, end = _final(prose, last, effort, cells)
            if (
                not PLAN.search(line[-200:])
                and not prose[end:].strip(" \t\n.`*)\"'")
                and item.kind != "placeholder"
            ):
                found.append(item)
        tagged = TAGGED.search(prose)
        if not found and tagged is not None and tagged[2].strip():
            kind: Kind = "placeholder" if PLACEHOLDER.fullmatch(tagged[2].strip()) else "text"
            found.append(Found(tagged.start(), kind, tagged[2].strip()))
    if not found:
        found = _assignments(prose, effort)
    return found


def _final(prose: str, opening: re.Match[str], effort: Effort, cells: bool) -> tuple[Found, int]:
    start, body = opening.start(), opening.end()
    end = _argument_end(prose, body, effort)
    if end is None:
        inner, end, kind = prose[body:], len(prose), "open"
    else:
        inner, kind = prose[body:end], "text"
        end += 1
    inner = inner.strip().translate(BLANKS)
    if PLACEHOLDER.fullmatch(inner):
        return Found(start, "placeholder", inner), end
    if kind == "open":
        return Found(start, "open", inner.strip("\"'`")), end
    return _argument(start, inner, opening["var"] is not None, cells, effort), end


def _argument(start: int, inner: str, variable: bool, cells: bool, effort: Effort) -> Found:
    """What the argument stands for: a string is the answer, an expression is left to the REPL,
    words are the answer."""
    for spelled in (inner, inner.translate(QUOTES)):
        module = tree(f"({spelled}\n)") if effort.spend(len(spelled)) else None
        if module is not None and len(module.body) == 1 and isinstance(module.body[0], ast.Expr):
            value = module.body[0].value
            break
    else:
        return Found(start, "text", _bare(inner))
    if variable and (name := _name(value)):
        return Found(start, "cell", f"FINAL_VAR({name!r})")
    if isinstance(value, ast.Constant) and isinstance(value.value, str) and not variable:
        return Found(start, "text", value.value)
    free = sorted(_free_names(value))
    if not free or variable or cells:
        return Found(start, "cell", f"FINAL({spelled})")
    # "Paris" and "well-known" parse as expressions too: they are one only where the REPL has the
    # names.
    return Found(
        start,
        "cell",
        f"FINAL(({spelled}) if all(n in globals() for n in {free!r}) else {_bare(inner)!r})",
    )


def _name(value: ast.expr) -> str | None:
    if isinstance(value, ast.Name):
        return value.id
    if (
        isinstance(value, ast.Constant)
        and isinstance(value.value, str)
        and value.value.strip().isidentifier()
    ):
        return value.value.strip()
    return None


def _free_names(value: ast.expr) -> set[str]:
    names = [n for n in ast.walk(value) if isinstance(n, ast.Name)]
    bound = {n.id for n in names if not isinstance(n.ctx, ast.Load)}
    bound |= {
        a.arg
        for n in ast.walk(value)
        if isinstance(n, ast.arguments)
        for a in (*n.posonlyargs, *n.args, *n.kwonlyargs)
    }
    return {n.id for n in names} - bound - set(dir(builtins))


def _bare(text: str) -> str:
    text = text.strip()
    for quotes in ('"""', "'''", '"', "'", "`"):
        if len(text) > 2 * len(quotes) and text.startswith(quotes) and text.endswith(quotes):
            return text[len(quotes) : -len(quotes)].strip()
    return text


def _argument_end(prose: str, body: int, effort: Effort) -> int | None:
    """The parenthesis that closes the one before `body`: by the grammar where it is Python, else by
    counting."""
    counted = _balanced(prose, body, effort, "")
    line_end = re.compile(r"\)[ \t.*_`;]*+$", re.M)
    if counted is not None and not line_end.match(prose, counted):
        # "FINAL(1) first, 2) second)": where the line goes on to one parenthesis too many, that one
        # closes it
        last = line_end.search(prose, counted, _line_end(prose, counted))
        if last is not None and prose.count("(", counted, last.start()) < prose.count(
            ")", counted, last.start()
        ):
            return last.start()
    if counted is not None and parses(f"({prose[body:counted]}\n)", effort):
        return counted
    lexed = _balanced(prose, body, effort, "\"'")
    if lexed is not None and lexed != counted and parses(f"({prose[body:lexed]}\n)", effort):
        return lexed
    if counted is not None:
        return counted
    last = _last(line_end, prose, body)
    return None if last is None else last.start()


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _last(pattern: re.Pattern[str], text: str, start: int) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text, start), maxlen=1)), None)


_DOUBLE, _SINGLE = r'"(?:[^"\\]++|\\.)*+("|)', r"'(?:[^'\\]++|\\.)*+('|)"
MARKS = {  # parentheses and strings; of a string that never ends the group is empty
    quotes: re.compile("|".join(["[()]", *strings]), re.S)
    for quotes, strings in {
        "": (),
        '"': [_DOUBLE],
        "'": [_SINGLE],
        "\"'": [_DOUBLE, _SINGLE],
    }.items()
}


def _balanced(prose: str, body: int, effort: Effort, quotes: str) -> int | None:
    """Where the parenthesis is closed. `quotes` are the marks of strings, inside of which none
    counts."""
    depth, at = 1, body
    stop = len(prose) if effort.left > 0 else min(len(prose), body + 2000)
    while mark := MARKS[quotes].search(prose, at, stop):
        at = mark.end()
        # an apostrophe: no later one can end a string either
        if mark[0] not in "()" and not any(mark.groups()):
            quotes, at = quotes.replace(mark[0][0], ""), mark.start() + 1
        depth += {"(": 1, ")": -1}.get(mark[0], 0)
        if depth == 0:
            effort.spend(at - body)
            return mark.start()
    effort.spend(stop - body)
    return None


def _assignments(prose: str, effort: Effort) -> list[Found]:
    """Statements on `answer` that stand on their own lines, joined into one cell."""
    statements: list[str] = []
    first, at = -1, 0
    for opening in ANSWER.finditer(prose):
        if opening.start() < at or len(statements) >= 32:
            continue
        read = _statement(prose, opening.end(), effort)
        if read is None:
            continue
        statement, at = read
        first = opening.start() if first < 0 else first
        statements.append(statement)
    return [Found(first, "cell", "\n".join(statements))] if statements else []


def _statement(prose: str, start: int, effort: Effort) -> tuple[str, int] | None:
    """The shortest run of whole lines from `start` on that is Python; the value in quotes where it
    is plain words."""
    end = start
    for _ in range(60):
        end = _line_end(prose, end)
        if not effort.spend(end - start):
            break
        code = prose[start:end].strip(" \t`").translate(BLANKS)
        for spelled in dict.fromkeys((code, code.translate(QUOTES))):
            if effort.left > 0 and parses(spelled, effort):
                return re.sub(
                    r"^answer[ \t]*+=[ \t]*+(.*)$", r"answer.update(\1)", spelled, flags=re.S
                ), end
        if end == len(prose):
            break
        end += 1
    end = _line_end(prose, start)
    content = re.match(r"""answer\[["']content["']\]\s*+=\s*+(.+)""", prose[start:end])
    return (f'answer["content"] = {_bare(content[1].strip(" `"))!r}', end) if content else None


ANSWER_KEYS = ("answer", "final_answer", "final")
BESIDE = words(
    "reasoning thought thoughts explanation rationale confidence ready type status notes evidence"
)


def in_json(text: str, effort: Effort) -> tuple[bool, Any]:
    """(True, the answer) where the whole reply is a JSON object that hands one in; (False, None)
    else."""
    value = calls.loads(calls.unfenced(text), effort)
    if not isinstance(value, dict):
        return False, None
    if (
        isinstance(value.get("answer"), dict)
        and set(value) == {"answer"}
        and "content" in value["answer"]
    ):
        value = value["answer"]
    if value.get("ready", True) is not True:
        return False, None
    keys = [k for k in (*ANSWER_KEYS, *(("content",) if "ready" in value else ())) if k in value]
    if len(keys) != 1 or set(value) - set(keys) - BESIDE:
        return False, None
    return True, value[keys[0]]


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def bare_code(text: str, effort: Effort) -> str | None:
    """The whole reply as a cell, where it is Python without a fence."""
    text = text.strip("\n")
    return text if len(text) < LARGE and parses(text, effort) and is_code(text, effort) else None
