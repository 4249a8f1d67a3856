"""Every form in which models are known to write code, tool calls and answers."""

import html
import json
import textwrap

import pytest

from rlm_runtime.lms.base import Reply, ToolCall
from rlm_runtime.parsing import EMPTY, parse

CODE = 'total = sum(len(x) for x in context if len(x) < 9)\nprint(total, "done")'
TICKS = (
    'doc = """\nUse it so:\n```python\nprint(1)\n```\nand:\n```\nplain\n```\n"""\nprint(len(doc))'
)
TAGS = "s = '''\n</code> </tool_call> </python>\n<think>\n</think>\n''' + \"</parameter>\"\nprint(s)  # not </execute> yet\nprint()"
NS = "ant" + "ml:"  # the prefix some models put before the names of call tags


def read(text, **kwargs):
    return parse(Reply(text=text, **kwargs))


def reasons(parsed):
    return [n.reason for n in parsed.nudges]


def native(name, arguments, text="", finish_reason="tool_calls", **kwargs):
    call = ToolCall(id="1", name=name, arguments=arguments)
    return parse(Reply(text=text, tool_calls=(call,), finish_reason=finish_reason), **kwargs)


def args(code):
    return json.dumps({"code": code})


FENCES = {
    "repl": lambda c: f"```repl\n{c}\n```",
    "python": lambda c: f"Let me look.\n\n```python\n{c}\n```\n",
    "py": lambda c: f"```py\n{c}\n```",
    "Python3": lambda c: f"```Python3\n{c}\n```",
    "REPL": lambda c: f"``` REPL\n{c}\n```",
    "python3.11": lambda c: f"```python3.11\n{c}\n```",
    "braces": lambda c: f"```{{python}}\n{c}\n```",
    "title": lambda c: f'```python title="probe"\n{c}\n```',
    "two words": lambda c: f"```repl python\n{c}\n```",
    "tool_code": lambda c: f"```tool_code\n{c}\n```",
    "unknown word": lambda c: f"```cell\n{c}\n```",
    "bare": lambda c: f"```\n{c}\n```",
    "bare, named inside": lambda c: f"```\npython\n{c}\n```",
    "long fence": lambda c: f"`````repl\n{c}\n`````",
    "tildes": lambda c: f"~~~python\n{c}\n~~~",
    "bare tildes": lambda c: f"~~~\n{c}\n~~~",
    "beside prose": lambda c: f"The code:```python\n{c}\n```",
    "prose around": lambda c: f"I count.\n```repl\n{c}\n```\nThen I read the number.",
    "windows": lambda c: f"```repl\n{c}\n```\n".replace("\n", "\r\n"),
    "indented": lambda c: textwrap.indent(f"```repl\n{c}\n```", "    "),
    "end token": lambda c: f"```repl\n{c}\n```<|im_end|>",
    "think": lambda c: f"<think>I should count.</think>\n```repl\n{c}\n```",
    "thinking": lambda c: (
        f"<thinking>\nhm\n```python\nnot_this()\n```\n</thinking>\n\n```repl\n{c}\n```"
    ),
    "reasoning": lambda c: f"<reasoning>a</reasoning>```repl\n{c}\n```",
    "template's thinking": lambda c: (
        f"so\n```python\nnot_this()\n```\n</think>\n\n```repl\n{c}\n```"
    ),
    "harmony": lambda c: (
        f"<|channel|>analysis<|message|>a\n```repl\nno()\n```<|end|><|start|>assistant<|channel|>final<|message|>```repl\n{c}\n```"
    ),
    "python_tag": lambda c: f"<|python_tag|>{c}<|eom_id|>",
    "harmony call": lambda c: (
        f"<|channel|>commentary to=python <|constrain|>code<|message|>{c}<|call|>"
    ),
    "unclosed": lambda c: f"```repl\n{c}",
    "unclosed, newline": lambda c: f"First:\n```python\n{c}\n",
    "unclosed, end token": lambda c: f"```repl\n{c}\n<|im_end|>",
}
TAGGED = {
    "code": lambda c: f"<code>\n{c}\n</code>",
    "python": lambda c: f"I count.\n<python>\n{c}\n</python>",
    "execute": lambda c: f"<execute>\n{c}\n</execute>",
    "fence in a tag": lambda c: f"<execute>\n```python\n{c}\n```\n</execute>",
    "function=": lambda c: (
        f"<tool_call>\n<function=python>\n<parameter=code>\n{c}\n</parameter>\n</function>\n</tool_call>"
    ),
    "invoke": lambda c: (
        f'<function_calls>\n<invoke name="python">\n<parameter name="code">{c}</parameter>\n</invoke>\n</function_calls>'
    ),
    "prefixed": lambda c: (
        f'<{NS}invoke name="repl">\n<{NS}parameter name="code">{c}</{NS}parameter>\n</{NS}invoke>'
    ),
}
JSON_CALLS = {
    "tool_call": lambda c: (
        f'I call.\n<tool_call>\n{{"name": "python", "arguments": {args(c)}}}\n</tool_call>'
    ),
    "two in json": lambda c: json.dumps({"name": "repl", "parameters": {"code": c}}),
    "openai": lambda c: json.dumps(
        {"tool_calls": [{"type": "function", "function": {"name": "python", "arguments": args(c)}}]}
    ),
    "react": lambda c: json.dumps({"action": "python_repl", "action_input": c}),
    "list": lambda c: json.dumps([{"name": "execute_code", "arguments": {"source": c}}], indent=1),
    "json fence": lambda c: f'```json\n{{"name": "python", "arguments": {args(c)}}}\n```',
    "code only": lambda c: args(c),
    "after prose": lambda c: f'I will count.\n{{"name": "run_python", "arguments": {args(c)}}}\n',
    "mistral": lambda c: f'[TOOL_CALLS][{{"name": "python", "arguments": {args(c)}}}]',
    "mistral args": lambda c: f"[TOOL_CALLS]python[ARGS]{args(c)}",
    "deepseek": lambda c: (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>python\n```json\n{args(c)}\n```<｜tool▁call▁end｜>"
    ),
    "harmony json": lambda c: (
        f"<|channel|>commentary to=functions.python <|constrain|>json<|message|>{args(c)}<|call|>"
    ),
    "function_call": lambda c: (
        f'<function_call>{{"name": "python", "arguments": {args(c)}}}</function_call>'
    ),
}


@pytest.mark.parametrize("code", [CODE, TICKS, TAGS], ids=["plain", "ticks", "tags"])
@pytest.mark.parametrize("form", [*FENCES, *TAGGED, *JSON_CALLS])
def test_each_form_yields_exactly_the_code(form, code):
    parsed = read({**FENCES, **TAGGED, **JSON_CALLS}[form](code))
    assert parsed.cells == (code,)
    assert parsed.final is None and parsed.discarded == 0 and parsed.nudges == ()


@pytest.mark.parametrize("form", [*FENCES, *TAGGED, *JSON_CALLS])
def test_what_is_kept_reads_back_as_the_same_cell(form):
    """The history shows every form as a block that the parser, and so the model's next imitation of
    it, finds again."""
    kept = read({**FENCES, **TAGGED, **JSON_CALLS}[form](TICKS)).kept
    assert read(kept).cells == (TICKS,)
    assert "<|" not in kept and "not_this" not in kept and "tool_call" not in kept


@pytest.mark.parametrize(
    "name", ["python", "repl", "execute_python", "functions.python", "code_interpreter", "Python"]
)
def test_native_tool_calls(name):
    assert native(name, {"code": TICKS}).cells == (TICKS,)
    assert native(name, args(CODE)).cells == (CODE,)


@pytest.mark.parametrize(
    "arguments",
    [
        '{"code": "' + CODE.replace('"', '\\"') + '"}',  # raw newline in a JSON string
        '{"code": "' + CODE.replace("\n", "\\n") + '"}',  # inner quotes not escaped
        '{"code": """' + CODE + '"""}',
        '{"code": "' + CODE.replace("\n", "\\n").replace('"', '\\"') + '"',  # the brace is missing
        json.dumps(args(CODE)),
        CODE,
        f"```python\n{CODE}\n```",
        {"input": CODE},
        {"code": CODE.split("\n")},
        {"code": f"```python\n{CODE}\n```"},
    ],
)
def test_native_calls_with_broken_or_odd_arguments(arguments):
    assert native("python", arguments).cells == (CODE,)


def test_a_native_call_joins_the_text_in_the_history():
    parsed = native("python", {"code": "print(1)"}, text="I look.")
    assert parsed.kept == "I look.\n```repl\nprint(1)\n```"


def test_helpers_and_user_tools_called_as_tools_become_code():
    assert native("llm_query", {"prompt": "a 'b'"}).cells == (
        """print(llm_query(prompt="a 'b'"))""",
    )
    assert native("lookup", {"key": 3}, tools=("lookup",)).cells == ("print(lookup(key=3))",)
    assert native("final_answer", {"answer": "42"}).cells == ("FINAL('42')",)
    unknown = native("lookup", {"key": 3})
    assert (
        unknown.cells == ()
        and reasons(unknown) == ["unknown_tool"]
        and "lookup" in unknown.nudges[0].text
    )
    empty = native("python", {})
    assert empty.cells == () and reasons(empty) == ["bad_tool_call"]


def test_thought_action_observation():
    said = f"Thought: I count.\nAction: python\nAction Input: {CODE}\n"
    assert read(said).cells == (CODE,) and read(
        said.replace(CODE, f"```python\n{CODE}\n```")
    ).cells == (CODE,)
    made_up = read(said + "Observation: 42\nFinal Answer: 42")
    assert made_up.cells == (CODE,) and reasons(made_up) == ["hallucinated_output"]
    assert read(f'Action: repl\nAction Input: {{"code": {json.dumps(CODE)}}}').cells == (CODE,)


def test_a_call_of_pairs_of_keys_and_values():
    """GLM."""
    said = (
        f"<tool_call>python\n<arg_key>code</arg_key>\n<arg_value>{CODE}</arg_value>\n</tool_call>"
    )
    assert read(said).cells == (CODE,)


def test_an_unclosed_tag():
    assert read(f"<execute>\n{TICKS}").cells == (TICKS,)
    assert read("I look at <code> tags\nand so on.").cells == ()


def test_several_cells_run_in_order():
    parsed = read(
        "One:\n```repl\na = 1\n```\ntwo:\n~~~py\nb = 2\n~~~\n<execute>c = 3</execute>\n```\nd = a + b\n```"
    )
    assert parsed.cells == ("a = 1", "b = 2", "c = 3", "d = a + b") and parsed.nudges == ()


def test_a_block_left_open_before_the_next_one():
    parsed = read("```repl\na = 1\n\nNow the next step:\n```repl\nb = 2\n```")
    assert parsed.cells == ("a = 1", "b = 2")


def test_prose_after_an_unclosed_block_is_not_code():
    assert read("```repl\na = 1\nprint(a)\n\nThis prints the number we want.").cells == (
        "a = 1\nprint(a)",
    )


def test_code_on_the_line_of_the_fence():
    assert read("Do ```python print(len(context))``` now").cells == ("print(len(context))",)
    assert read("```repl\nprint(1)```\nand so on").cells == ("print(1)",)


@pytest.mark.parametrize(
    "text",
    ["42", "yes", "a, b, c", "total: 5", '{"a": 1}', "The needle is blue.", "- one\n- two", "x"],
)
def test_a_bare_fence_without_code_is_no_cell(text):
    parsed = read(f"It says:\n```\n{text}\n```")
    assert parsed.cells == () and reasons(parsed) == ["no_code"]


@pytest.mark.parametrize(
    "code",
    [
        "print(1)",
        "x = 5",
        "import re",
        "for a in b:\n    pass",
        "context[:100]",
        "print('a'\nx = 5",
    ],
)
def test_a_bare_fence_with_code_is_a_cell(code):
    assert read(f"```\n{code}\n```").cells == (code,)


def test_a_whole_reply_of_code_without_a_fence():
    parsed = read(CODE)
    assert parsed.cells == (CODE,) and parsed.kept == f"```repl\n{CODE}\n```"
    assert read("Yes").cells == () and read("The answer, I think, is in part two").cells == ()


def test_a_broken_cell_is_passed_on():
    assert read("```repl\nprint(1\nx = = 2\n```").cells == ("print(1\nx = = 2",)


def test_a_broken_cell_does_not_swallow_the_next_one():
    parsed = read('```repl\ns = """open\n```\nand\n```repl\nt = """closed"""\n```')
    assert parsed.cells == ('s = """open', 't = """closed"""')


# -- repairs: only where the code does not parse as it is
def test_escaped_code_is_unescaped_only_where_needed():
    assert read(f"```repl\n{html.escape(CODE)}\n```").cells == (CODE,)
    fine = 's = "&lt;b&gt;"'
    assert read(f"```repl\n{fine}\n```").cells == (fine,)


def test_typographic_quotes_are_repaired_only_where_needed():
    assert read("```repl\nprint(“a”, ‘b’)\n```").cells == ("print(\"a\", 'b')",)
    fine = 's = "“quoted”"'
    assert read(f"```repl\n{fine}\n```").cells == (fine,)


def test_odd_blanks_and_uniform_indents_are_repaired():
    assert read("```repl\nif\u00a0x:\n\u00a0\u00a0\u00a0 y = 1\n```").cells == ("if x:\n    y = 1",)
    assert read("```repl\n    a = 1\n    if a:\n        b = 2\n```").cells == (
        "a = 1\nif a:\n    b = 2",
    )
    assert read("1. So:\n   ```repl\n   a = 1\n   print(a)\n   ```").cells == ("a = 1\nprint(a)",)
    assert read("- ```python\n  a = 1\n  print(a)\n  ```").cells == ("a = 1\nprint(a)",)


def test_an_interpreter_session_becomes_its_input():
    parsed = read("```python\n>>> x = 1\n>>> for i in range(2):\n...     print(i)\n...\n0\n1\n```")
    assert parsed.cells == ("x = 1\nfor i in range(2):\n    print(i)\n",)
    assert reasons(parsed) == ["hallucinated_output"]


def test_magics_are_dropped_and_shell_lines_are_told():
    assert read("```repl\n%matplotlib inline\nx = 1\n```").cells == ("\nx = 1",)
    parsed = read("```repl\n!pip install numpy\nx = 1\n```")
    assert (
        parsed.cells == ("x = 1",)
        and reasons(parsed) == ["shell"]
        and "pip install numpy" in parsed.nudges[0].text
    )
    alone = read("```repl\n!ls -l\n```")
    assert alone.cells == () and reasons(alone) == ["shell"]


# -- what is not Python
@pytest.mark.parametrize("word", ["bash", "sh", "shell", "console"])
def test_shell_blocks_are_told(word):
    parsed = read(f"```{word}\npip install x\n```")
    assert parsed.cells == () and reasons(parsed) == ["shell"]


@pytest.mark.parametrize("word", ["javascript", "js", "sql", "c++", "rust"])
def test_other_languages_are_told(word):
    parsed = read(f"```{word}\nlet x = 1\n```")
    assert parsed.cells == () and reasons(parsed) == ["language"] and word in parsed.nudges[0].text


def test_a_python_cell_beside_a_foreign_block_still_runs():
    parsed = read("```bash\nls\n```\n```repl\nprint(1)\n```")
    assert parsed.cells == ("print(1)",) and reasons(parsed) == ["shell"]


# -- thinking
def test_code_inside_thinking_is_not_run():
    parsed = read("<think>\n```repl\nprint(1)\n```\n</think>\nI am done thinking.")
    assert parsed.cells == () and "print(1)" in parsed.thinking and "print" not in parsed.kept
    assert reasons(parsed) == ["no_code"]


@pytest.mark.parametrize("tag", ["think", "thinking", "reasoning"])
def test_unclosed_thinking(tag):
    parsed = read(f"<{tag}>\nI could run\n```repl\nprint(1)\n```")
    assert parsed.cells == () and reasons(parsed) == ["thinking_only"] and parsed.kept == EMPTY
    assert reasons(read(f"<{tag}>\nand so on and", finish_reason="length")) == ["cut"]


def test_a_mention_of_a_tag_is_not_thinking():
    assert read("The model writes <think> first.\n```repl\nprint(1)\n```").cells == ("print(1)",)
    assert read("I search for `<think>` now.\n```repl\nprint(1)\n```").cells == ("print(1)",)


# -- nothing to run
@pytest.mark.parametrize("text", ["", "   \n", "<|im_end|>", "```repl\n```\n"])
def test_an_empty_reply(text):
    parsed = read(text)
    assert parsed.cells == () and parsed.final is None and len(parsed.nudges) == 1 and parsed.kept
    assert "```repl" in parsed.nudges[0].text


def test_prose_alone_gets_an_example():
    parsed = read("I would first look at the context.")
    (nudge,) = parsed.nudges
    assert (
        nudge.reason == "no_code"
        and "```repl" in nudge.text
        and parsed.kept == "I would first look at the context."
    )


# -- cut by the length limit
def test_a_cut_cell_that_does_not_parse_is_not_run():
    parsed = read("```repl\na = 1\n```\n```repl\nfor x in range(", finish_reason="length")
    assert parsed.cells == ("a = 1",) and reasons(parsed) == ["cut"]
    assert "range(" in parsed.kept


def test_a_cut_cell_that_parses_runs_and_is_told():
    parsed = read("```repl\na = 1\nprint(a)", finish_reason="length")
    assert parsed.cells == ("a = 1\nprint(a)",) and reasons(parsed) == ["cut"]


def test_a_cut_tool_call_is_not_run():
    parsed = native("python", '{"code": "for x in ra', finish_reason="length")
    assert parsed.cells == () and reasons(parsed) == ["cut"]
    parsed = read(
        '<tool_call>{"name": "python", "arguments": {"code": "for x in ra', finish_reason="length"
    )
    assert parsed.cells == () and reasons(parsed) == ["cut"]


def test_cut_prose_and_a_cut_answer():
    assert reasons(read("I will now explain at", finish_reason="length")) == ["cut"]
    parsed = read("FINAL(the answer is", finish_reason="length")
    assert parsed.final is None and parsed.cells == () and reasons(parsed) == ["cut"]


# -- what stands behind a block, and calls of gpt-oss
@pytest.mark.parametrize(
    "text",
    [
        "```py\n{}\n```<end_code>",
        "Code:\n```python\n{}\n```\n<end_code>",
        "```repl\n{}\n<end_code>",
        "```py\n{}\n```</code>",
        "```py\n{}\n```\n</code>",
        "<code>\n```py\n{}\n```</code>",
        "<code>\n{}\n</code><end_code>",
        "```repl\n{}\n``` </end_code>",
        "<|channel|>commentary to=python<|message|>{}<|call|>",
        "<|channel|>analysis to=python code<|message|>{}<|call|>",
        "<|start|>assistant to=python<|channel|>commentary<|message|>{}<|call|>",
        "<|start|>assistant<|channel|>commentary to=repl.python <|constrain|>code<|message|>{}",
        "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=python code<|message|>{}<|call|>",
    ],
)
def test_marks_behind_a_block_and_receivers_of_a_message(text):
    parsed = read(text.replace("{}", CODE))
    assert parsed.cells == (CODE,) and parsed.nudges == ()
    assert (
        "code>" not in parsed.kept and "to=" not in parsed.kept and "assistant" not in parsed.kept
    )


def test_a_reply_may_be_long_behind_longer_thinking():
    thought = "<think>" + "so it goes\n" * 50_000 + "</think>"
    assert read(f"{thought}\n```repl\n{CODE}\n```").cells == (CODE,)
    assert read(thought.removeprefix("<think>") + f"\n```repl\n{CODE}\n```").cells == (CODE,)
    parsed = read("```repl\nx = 1\n```\n" + "so it goes\n" * 50_000)
    assert (
        parsed.cells == ("x = 1",)
        and reasons(parsed) == ["too_long"]
        and parsed.discarded > 100_000
    )
