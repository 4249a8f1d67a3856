"""Any text parses, soon, and no wrapping loses or changes the code in it."""

import ast
import textwrap
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlm_runtime.lms.base import Reply, ToolCall
from rlm_runtime.parsing import MAX_CELLS, Parsed, parse

from .test_forms import FENCES, JSON_CALLS, TAGGED, native

PIECES = st.sampled_from(
    [
        "```",
        "```repl\n",
        "```python",
        "```\n",
        "~~~\n",
        "<think>",
        "</think>",
        "<code>",
        "</code>",
        "<tool_call>",
        "</tool_call>",
        "<function=python>",
        "<parameter=code>",
        "</parameter>",
        '<invoke name="python">',
        '{"name": "python", "arguments": {"code": "',
        '"}}',
        "FINAL(",
        "FINAL_VAR(",
        ")",
        "(",
        '"',
        "'",
        '"""',
        "'''",
        "\\",
        "\n",
        "\r\n",
        " ",
        "\t",
        'answer["content"] = ',
        "answer = {",
        "Output:",
        ">>> ",
        "user:",
        "<|im_end|>",
        "<|python_tag|>",
        "<|channel|>analysis<|message|>",
        "[TOOL_CALLS]",
        "print(1)",
        "x = 1",
        "for x in y:",
        "    ",
        "!pip install x",
        "#",
        "&lt;",
        "“",
        "{",
        "}",
        "[",
        "]",
        "\x00",
        "\ud800",
        "é",
        "a",
    ]
)
MIXED = st.lists(PIECES, max_size=40).map("".join)
REASONS = ["stop", "length", "tool_calls", ""]


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(MIXED, st.text(max_size=200)), st.sampled_from(REASONS), st.one_of(st.none(), MIXED)
)
def test_any_text_parses_and_something_always_follows(text, reason, arguments):
    calls = () if arguments is None else (ToolCall(id="1", name="python", arguments=arguments),)
    parsed = parse(Reply.model_construct(text=text, tool_calls=calls, finish_reason=reason))
    assert isinstance(parsed, Parsed) and parsed.kept.strip()
    assert parsed.cells or parsed.final is not None or parsed.nudges
    assert all(cell.strip() for cell in parsed.cells) and len(parsed.cells) <= MAX_CELLS
    assert 0 <= parsed.discarded <= 2 * len(text) + len(arguments or "")


# Python whose strings and comments hold whatever confuses a parser of replies.
TRICKY = st.lists(
    PIECES.filter(lambda s: "\x00" not in s and "\ud800" not in s and "\r" not in s), max_size=8
).map("".join)


def _comment(text):
    """Nobody could say whether a closing tag or token in a comment belongs to it."""
    return "# " + text.replace("\n", " ").replace("</", "").replace("<|", "")


def _block(body, quotes):
    safe = body.replace("\\", "").replace(quotes, "").rstrip("\"'")
    return f"doc = {quotes}{safe}\n{quotes}"


SIMPLE = st.one_of(
    TRICKY.map(lambda s: f"x = {s!r}"),
    TRICKY.map(lambda s: f"print(1)  {_comment(s)}"),
    st.builds(_block, TRICKY, st.sampled_from(['"""', "'''"])),
    st.sampled_from(
        [
            "import re",
            "y = [i for i in range(3)]",
            "print(llm_query('a'))",
            "x, y = 1, 2",
            'answer["ready"] = True',
        ]
    ),
)
NESTED = st.builds(
    lambda head, body: head + "\n" + textwrap.indent("\n".join(body), "    ", lambda line: True),
    st.sampled_from(
        ["for i in range(3):", "if x:", "def f(a, *b):", "with open(p) as f:", "while True:"]
    ),
    st.lists(
        st.sampled_from(["pass", "x = 1", "print('```')", "# ```"]).filter(lambda s: s[0] != "#"),
        min_size=1,
        max_size=3,
    ),
)
PROGRAMS = st.lists(st.one_of(SIMPLE, NESTED), min_size=1, max_size=5).map("\n".join)


def _is_plain(code):
    """Valid, and not one of the rare texts that are ambiguous by nature."""
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return bool(code.strip()) and code == code.strip("\n")


@settings(max_examples=300, deadline=None)
@given(PROGRAMS, st.sampled_from([*FENCES, *JSON_CALLS]))
def test_wrapping_valid_python_in_any_form_yields_exactly_it(code, form):
    assume(_is_plain(code))
    if form.startswith("unclosed"):  # where it ends is only known if nothing in it could be an end
        ends = any(line.rstrip().endswith(("```", "|>")) for line in code.split("\n"))
        assume("\n\n" not in code and not ends)
    parsed = parse(Reply(text={**FENCES, **JSON_CALLS}[form](code)))
    assert parsed.cells == (code,), form


@settings(max_examples=200, deadline=None)
@given(PROGRAMS, st.sampled_from([f for f in TAGGED if "unclosed" not in f]))
def test_tags_too(code, form):
    assume(_is_plain(code) and not code[0].isspace() and code == code.rstrip())
    assert parse(Reply(text=TAGGED[form](code))).cells == (code,)


@settings(max_examples=100, deadline=None)
@given(PROGRAMS)
def test_native_calls_too(code):
    assume(_is_plain(code))
    assert native("python", {"code": code}).cells == (code,)


@settings(max_examples=100, deadline=None)
@given(st.lists(PROGRAMS, min_size=1, max_size=4))
def test_several_cells_keep_their_order_and_text(programs):
    assume(all(map(_is_plain, programs)))
    text = "\nNext I look on.\n".join(f"```repl\n{code}\n```" for code in programs)
    parsed = parse(Reply(text=text))
    assert parsed.cells == tuple(programs)
    assert parse(Reply(text=parsed.kept)).cells == parsed.cells


MB = 1_000_000
HOSTILE = {
    "backticks": "`" * MB,
    "fence lines": "```\n" * (MB // 4),
    "openers": "```python\n" * (MB // 10),
    "openers with quotes": '```python\n"""\n' * (MB // 14),
    "escaped quotes": '```python\n\\"""\n```\n' * (MB // 19),
    "broken cells": "```python\nx = (\n```\n" * (MB // 20),
    "unlike fences": "".join(f"{'`' * (3 + i % 13)}python\n" for i in range(MB // 15)),
    "thinking": "<think>" * (MB // 7),
    "thinking ends": "</think>" * (MB // 8),
    "mentions": "a <think>\n" * (MB // 10),
    "tags": "<code>" * (MB // 6),
    "tags with an end": "<code>" * (MB // 6) + "</code>",
    "tool calls": "<tool_call>" * (MB // 11),
    "tool calls, open strings": '<tool_call>{"a": "' * (MB // 18),
    "braces": "{" * MB,
    "json starts": '{"name": \n' * (MB // 10),
    "json calls": '{"name": "python", "arguments": {"code": \n' * (MB // 42),
    "parameters": "<tool_call><parameter=code>" * (MB // 27),
    "finals": "FINAL(\n" * (MB // 7),
    "closed finals": "FINAL(a\n" * (MB // 8) + ")" * 10,
    "final parentheses": "FINAL(" + "(" * MB,
    "final quotes": "FINAL(" + "\"'" * (MB // 2),
    "answers": 'answer["content"] = (\n' * (MB // 22),
    "blanks": "```python\n" + " " * MB + "\n```",
    "blank lines": "```python\nx = (\n" + "\n" * MB,
    "blanks in prose": " " * MB + "x",
    "outputs": "```python\nx = 1\n```\n" + "*" * MB,
    "imitations": "```python\nx = 1\n```\n" + "Output of " * (MB // 10),
    "tokens": "<|" * (MB // 2),
    "prompts": "```python\n" + ">>> x = (\n" * (MB // 10),
    "shell": "```python\n" + "!ls (\n" * (MB // 6),
    "one long line": "x" * MB,
    "long expression": "```python\nx = " + "1+" * (MB // 2) + "1\n```",
    "nested": "```python\nx = " + "(" * 100_000 + ")" * 100_000 + "\n```",
    "minus": "```python\nx = " + "-" * 150_000 + "1\n```",
    "attributes": "```python\nx = a" + ".a" * 90_000 + "\n```",
    "list nest": "[" * MB,
    "many statements": "```python\n" + "x = 1\n" * 30_000 + "```",
    "invoke": '<invoke name="python">' * (MB // 22),
    "channels": "<|channel|>analysis<|message|>" * (MB // 30),
    "answer tags": "<answer>\n" * (MB // 9),
    "an open answer tag": "<answer>" + "a<" * (MB // 2),
    "entities": "```python\n" + "&lt;" * (MB // 4) + "\n```",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_hostile_replies_take_linear_time(name, reason):
    """A megabyte in a few seconds on a busy machine; quadratic work would take hours."""
    began = time.perf_counter()
    parsed = parse(Reply(text=HOSTILE[name], finish_reason=reason))
    assert time.perf_counter() - began < 20
    assert parsed.cells or parsed.final is not None or parsed.nudges


@pytest.mark.parametrize(
    "name", ["braces", "final quotes", "openers with quotes", "blanks", "list nest"]
)
def test_hostile_tool_arguments_take_linear_time(name):
    began = time.perf_counter()
    native("python", HOSTILE[name])
    native("python", '{"code": "' + HOSTILE[name])
    assert time.perf_counter() - began < 20
