"""Output and turns that a model made up are discarded, and it is told so."""

import pytest

from rlm_runtime.lms.base import Reply
from rlm_runtime.parsing import parse

CELL = "I look.\n```repl\nprint(len(context))\n```\n"
MADE_UP = {
    "Output": "Output:\n42",
    "bold": "**Output:**\n42",
    "heading": "### Output\n42",
    "execution": "Execution result: 42",
    "REPL output": "REPL output:\n```\n42\n```",
    "REPL output, block": "REPL output, block 1:\n```\n42\n```",
    "brackets": "[REPL output]\n42",
    "result": "The number follows.\nResult: 42",
    "stdout": "stdout: 42",
    "prompt": ">>> len(context)\n42",
    "Out": "Out[1]: 42",
    "output fence": "```output\n42\n```",
    "text fence": "This prints:\n```text\n42\n```",
    "bare fence": "```\n42\n```",
    "user": "user: the output is 42",
    "Human": "\nHuman: 42",
    "observation": "Observation: 42",
    "tag": "<output>42</output>",
    "tool_response": "<tool_response>\n42\n</tool_response>",
    "function_results": "<function_results><result>42</result></function_results>",
    "chat tokens": "<|im_end|>\n<|im_start|>user\n42<|im_end|>",
    "llama tokens": "<|eot_id|><|start_header_id|>user<|end_header_id|>\n42",
    "traceback": "Traceback (most recent call last):\n  42",
    "turn": "Turn 2 of 30.",
}


@pytest.mark.parametrize("name", MADE_UP)
def test_made_up_output_is_discarded_with_all_that_follows(name):
    """Also a cell and an answer that build on it."""
    tail = (
        MADE_UP[name]
        + '\n\nSo:\n```repl\nanswer["content"] = 42\nanswer["ready"] = True\n```\nFINAL(42)'
    )
    parsed = parse(Reply(text=CELL + tail))
    assert parsed.cells == ("print(len(context))",) and parsed.final is None
    assert [n.reason for n in parsed.nudges] == ["hallucinated_output"]
    assert "1 later block" in parsed.nudges[0].text
    assert "42" not in parsed.kept and "print(len(context))" in parsed.kept
    assert 0 < parsed.discarded <= len(tail)


def test_the_cells_before_it_all_run():
    parsed = parse(Reply(text=CELL + "and\n```repl\nb = 2\n```\nOutput: 3\n```repl\nc = 3\n```"))
    assert parsed.cells == ("print(len(context))", "b = 2")


@pytest.mark.parametrize(
    "tail",
    [
        "This counts the characters; the output will tell how to go on.",
        "Next I would look at the results of the search.",
        "Then:\n```repl\nb = 2\n```",
        "Expected: a number.",
        "The user: see the question.",
    ],
)
def test_plain_words_after_a_cell_are_not_output(tail):
    parsed = parse(Reply(text=CELL + tail))
    assert parsed.nudges == () and parsed.discarded == 0 and tail in parsed.kept


def test_words_before_any_cell_are_not_output():
    parsed = parse(Reply(text="Output: I need the length first.\n" + CELL))
    assert parsed.cells == ("print(len(context))",) and parsed.nudges == ()


def test_output_inside_an_unclosed_block():
    parsed = parse(Reply(text="```repl\nprint(1)\nOutput:\n1\n"))
    assert parsed.cells == ("print(1)",) and [n.reason for n in parsed.nudges] == [
        "hallucinated_output"
    ]


def test_a_string_in_the_code_that_looks_like_output_is_code():
    code = 's = """\nOutput:\n>>> 1\nuser: hi\n"""\nprint(s)'
    for text in (f"```repl\n{code}\n```", f"```repl\n{code}"):
        parsed = parse(Reply(text=text))
        assert parsed.cells == (code,) and parsed.nudges == ()


def test_a_continued_conversation_after_the_answer_is_dropped():
    parsed = parse(
        Reply(text='```repl\nanswer["ready"] = True\n```<|im_end|>\n<|im_start|>user\nThanks!')
    )
    assert parsed.cells == ('answer["ready"] = True',) and "Thanks" not in parsed.kept
