"""The work of everything that reads what a cell, a model or an endpoint sent grows no faster than
its length.

Counted in steps, never in seconds: see `steps`. Each reader is given n and 2n characters of every
unit below.
"""

import html
import itertools
import json
import re
import sys
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm import steps
from rlm.steps import calls_made
from rlm_runtime import parsing, structured
from rlm_runtime.errors import UsageError
from rlm_runtime.lms.base import Reply, ToolCall
from rlm_runtime.parsing import calls, finals, imitation, python, scan
from rlm_runtime.prompts import messages
from rlm_runtime.replies import model_json, thinking
from rlm_runtime.rlm import schemas
from rlm_runtime.structured import STEPS, Shape

MODULES = (
    parsing,
    calls,
    finals,
    imitation,
    python,
    scan,
    thinking,
    model_json,
    structured,
    messages,
    textwrap,
    html,
)
N = 200
# steps: a hundred alternatives of all patterns, and what the budget allows for syntax trees
PER_CHARACTER = 400
SLACK = 60_000  # what a budget allows for the shortest text, weighed as `steps` does
PIECES = [
    "```",
    "```repl\n",
    "```python",
    "\n",
    "\u2028",
    "\t",
    " ",
    "~~~\n",
    "<think>",
    "</think>",
    "a <think>",
    "<code>",
    "</code>",
    "</s>",
    "<tool_call>",
    "</tool_call>",
    "<function=python>",
    "<parameter=code>",
    "</parameter>",
    '<invoke name="python">',
    "<arg_key>k</arg_key><arg_value>",
    '{"name": "python", "arguments": {"code": "',
    '{"name": "f", "arguments": ',
    "FINAL(",
    "FINAL('",
    "FINAL_VAR(",
    ")",
    "(",
    '"',
    "'",
    '"""',
    "\\'",
    "\\\\",
    "\\",
    'answer["content"] = ',
    'answer["content"] = (\n',
    "answer = {",
    "Output:",
    ">>> ",
    "user:",
    "<|im_end|>",
    "<|python_tag|>",
    "<|call|>",
    "<|channel|>analysis<|message|>",
    "<|channel|>commentary to=python<|message|>",
    "<|start|>assistant",
    "analysis",
    "assistantfinal",
    "[TOOL_CALLS]",
    "<｜tool▁call▁begin｜>f\n",
    "Action: f\nAction Input: ",
    "print(1)",
    "x = 1\n",
    "x = (\n",
    "def f():\n",
    "    ",
    "!ls\n",
    "#",
    "# </code>",
    "&lt;",
    "“",
    "{",
    "}",
    "[",
    "]",
    "[1, ",
    '{"a": ',
    "{'a': ",
    ",",
    "é",
    "<answer>\n",
    "</answer>",
    "[THINK]",
    "◁think▷",
    "I will ",
    "let me ",
    "0",
    "1,000",
    'def f():\nanswer["ready"] = True<think>\u2028',
]
BEFORE = ["```repl\n", "```python\nx = 1\n```\n", "FINAL('", "<tool_call>", "<code>"]


def reply(text):
    parsing.parse(Reply.model_construct(text=text, tool_calls=(), finish_reason="stop"))


def cut_reply(text):
    parsing.parse(Reply.model_construct(text=text, tool_calls=(), finish_reason="length"))


def tool_arguments(text):
    call = ToolCall.model_construct(id="1", name="python", arguments=text)
    parsing.parse(Reply.model_construct(text="", tool_calls=(call,), finish_reason="tool_calls"))


PERSON = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "of": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
}
SHAPES = [
    Shape.of({"type": "array", "items": PERSON}),
    Shape.of(PERSON),
    Shape.of(list[int]),
    Shape.of(str),
]


def shaped(text):
    for shape in SHAPES:
        shape.parse(text)


READERS = {
    "reply": reply,
    "cut reply": cut_reply,
    "tool arguments": tool_arguments,
    "clean": thinking.clean,
    "harmony": thinking.harmony,
    "json": model_json.in_reply,
    "plan": finals.is_plan,
    "fenced": messages.fenced,
    "shape": shaped,
}


def spent(read, text):
    with steps.counting(*MODULES) as taken:
        read(steps.Text(text))
        return taken()


def grows_linearly(read, unit, before=""):
    """A budget is used up at some length; so far, twice the text may cost more than twice as much,
    but never more than the budget is."""
    small = spent(read, before + unit * (N // len(unit)))
    large = spent(read, before + unit * (2 * N // len(unit)))
    assert large <= 2.3 * small + SLACK, (unit, before, small, large)
    assert large <= PER_CHARACTER * 2 * N + SLACK, (unit, before, large)


@pytest.mark.parametrize("name", READERS)
def test_one_unit_again_and_again(name):
    for unit in PIECES[:: 3 if name in ("cut reply", "shape", "tool arguments") else 1]:
        grows_linearly(READERS[name], unit)


@pytest.mark.parametrize("before", BEFORE)
def test_one_unit_again_and_again_inside_of_something(before):
    for unit in PIECES[::3]:
        grows_linearly(reply, unit, before)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), min_size=2, max_size=4).map("".join),
    st.sampled_from(BEFORE),
    st.sampled_from(["reply", "clean", "shape"]),
)
def test_units_put_together(unit, before, name):
    grows_linearly(READERS[name], unit, before)


def test_the_counter_sees_what_it_is_for():
    """The patterns of earlier versions, which were quadratic, and a walk that begins anew at every
    mark."""
    strings = re.compile(r"""[()]|"(?:[^"\\]|\\.)*?"|'(?:[^'\\]|\\.)*?\'""", re.S)
    tail = re.compile(r"\s+\Z")
    for pattern, unit in ((strings, "\\'"), (tail, " \n")):
        old = type(sys)("old")
        old.pattern = pattern

        def read(text, old=old):
            return list(old.pattern.finditer(text + "x"))

        counts = []
        for n in (N, 2 * N):
            with steps.counting(old) as taken:
                read("'" + unit * (n // 2))
                counts.append(taken())
        assert counts[1] > 3.5 * counts[0] > 100_000

    def again(text):
        return [text[i:] for i in range(len(text)) if text[i] == "\n"]

    assert spent(again, "\n" * 2 * N) > 3.5 * spent(again, "\n" * N)


PATTERNS = sorted(
    {
        (v.pattern, v.flags)
        for m in MODULES
        for v in vars(m).values()
        if isinstance(v, re.Pattern) and isinstance(v.pattern, str)
    }
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.lists(st.sampled_from([*PIECES, "a", "=", "\r"]), max_size=8).map("".join),
)
def test_the_counting_matcher_finds_what_re_finds(pattern, text):
    real, counted = re.compile(*pattern), steps.Pattern(pattern[0], pattern[1] & ~re.U)
    assert [(m.span(), m.groups()) for m in counted.finditer(text)] == [
        (m.span(), m.groups()) for m in real.finditer(text)
    ]
    assert (counted.match(text) is None) == (real.match(text) is None)
    assert (counted.fullmatch(text) is None) == (real.fullmatch(text) is None)


# -- schemas of cells ------------------------------------------------------------------------------
def doubling(levels, kind, leaf):
    again = {"$ref": "#/$defs/d{}"}
    forms = {
        "anyOf": lambda r: {"anyOf": [r, r]},
        "allOf": lambda r: {"allOf": [r, r]},
        "oneOf": lambda r: {"oneOf": [r, r]},
        "properties": lambda r: {"type": "object", "properties": {"a": r, "b": r}},
        "prefixItems": lambda r: {"prefixItems": [r, r]},
        "if": lambda r: {"if": r, "then": r, "else": r},
        "not": lambda r: {"not": {"allOf": [r, r]}},
    }
    defs = {f"d{i}": forms[kind]({"$ref": again["$ref"].format(i + 1)}) for i in range(levels)} | {
        f"d{levels}": leaf
    }
    return {"$ref": "#/$defs/d0", "$defs": defs}


LEAVES = {
    "integer": {"type": "integer"},
    "object": {"type": "object", "properties": {"x": {"type": "integer"}}},
    "enum": {"enum": [f"k{i}" for i in range(500)]},
    "required": {"required": [f"k{i}" for i in range(500)]},
    "array": {"type": "array", "items": {"type": "object"}},
}
VALUES = [
    "[" * 1800,
    '{"a":' * 360,
    '"' * 1800,
    "[" + "1," * 900 + "1]",
    json.dumps([{}] * 600),
    json.dumps(["{" * 900] * 2),
    "x" * 1800,
    json.dumps({"a": "[" * 1700, "b": "{" * 100}),
    json.dumps({f"k{i}": i for i in range(200)}),
]


@pytest.mark.parametrize(
    "kind", ["anyOf", "allOf", "oneOf", "properties", "prefixItems", "if", "not"]
)
def test_schemas_that_double_at_every_step(kind):
    """However many levels: the work is bounded by schema and value alone."""
    for leaf, levels in itertools.product(LEAVES, (8, 11, 60)):
        schema = doubling(levels, kind, LEAVES[leaf])
        made, shape = calls_made(schemas.shape_of, schema)
        assert made < 600_000, (leaf, levels, made)
        if isinstance(shape, Shape):
            for value in VALUES:
                made, _ = calls_made(shape.parse, value)
                assert made < 60 * (STEPS + 2 * len(value)), (leaf, levels, value[:20], made)


def test_schemas_that_are_large_or_say_much_of_each_item():
    names = [f"k{i}" for i in range(4000)]
    for inside in (
        {"enum": names},
        {"required": names},
        {"properties": {n: {"type": "integer"} for n in names[:400]}},
    ):
        shape = schemas.shape_of({"type": "array", "items": inside})
        counts = [calls_made(shape.check, [{"x": 1}] * n)[0] for n in (500, 1000)]
        assert counts[1] < 2.5 * counts[0] + 20_000 and counts[1] < 60 * (STEPS + 2 * 9_000)
    many = {"$defs": {"a": {"items": [1] * 2000}}, "anyOf": [{"$ref": "#/$defs/a"}] * 2000}
    made, refused = calls_made(schemas.shape_of, many)
    assert isinstance(refused, UsageError) and made < 100_000
    long_name = "n" * 40_000
    made, refused = calls_made(
        schemas.shape_of,
        {"$defs": {long_name: {}}, "allOf": [{"$ref": f"#/$defs/{long_name}"}] * 2},
    )
    assert isinstance(refused, UsageError) and made < 100_000


def test_a_type_does_not_describe_each_of_its_errors():
    made, (_, problem) = calls_made(Shape.of(list[int]).check, ["x"] * 20_000)
    assert "20,000 places" in problem and made < 30 * 20_000
