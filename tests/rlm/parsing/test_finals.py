"""Answers given outside a cell."""

import pytest

from rlm_runtime.lms.base import Reply
from rlm_runtime.parsing import parse


def read(text, **kwargs):
    return parse(Reply(text=text, **kwargs))


def reasons(parsed):
    return [n.reason for n in parsed.nudges]


def run(code, **names):
    """What a cell hands in, in a namespace like the REPL's."""
    handed = []
    space = dict(names, FINAL=handed.append, FINAL_VAR=lambda name: handed.append(space[name]))
    space["answer"] = {"content": None, "ready": False}
    exec(code, space)
    return handed[0] if handed else space["answer"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("FINAL(New York)", "New York"),
        ('FINAL("New York")', "New York"),
        ("FINAL('a) b')", "a) b"),
        ("FINAL(It's (really) good)", "It's (really) good"),
        ("I am sure.\n\nFINAL(f(x) = (a + b) is the form)\n", "f(x) = (a + b) is the form"),
        ('FINAL("""two\n\nlines (and) more""")', "two\n\nlines (and) more"),
        ("FINAL(first line\nsecond (line)\n)", "first line\nsecond (line)"),
        ("FINAL(1) first, 2) second)", "1) first, 2) second"),
        ("**FINAL(New York)**", "New York"),
        ("Final answer: FINAL(New York)", "New York"),
        ("The answer is FINAL(New York).", "New York"),
        ("FINAL(“New York”)", "New York"),
        ("FINAL(New York", "New York"),
        ("I know it.\n<answer>\nNew York\n</answer>", "New York"),
        ("<final_answer>New York</final_answer>", "New York"),
        ("<think>FINAL(no)</think>\nFINAL(New York)<|im_end|>", "New York"),
    ],
)
def test_final_with_words(text, answer):
    parsed = read(text)
    assert parsed.final == answer and parsed.cells == () and parsed.nudges == ()


@pytest.mark.parametrize(
    ("text", "names", "answer"),
    [
        ("FINAL(42)", {}, 42),
        ("FINAL([1, 2])", {}, [1, 2]),
        ("FINAL(None)", {}, None),
        ("FINAL(result)", {"result": 7}, 7),
        ("FINAL(Paris)", {}, "Paris"),
        ("FINAL(well-known)", {}, "well-known"),
        ("FINAL(', '.join(sorted(names)))", {"names": ["b", "a"]}, "a, b"),
        ("FINAL(f'{x:.2f}')", {"x": 1.0}, "1.00"),
        ("FINAL([n * 2 for n in found])", {"found": [1]}, [2]),
        ("FINAL_VAR(result)", {"result": "r"}, "r"),
        ('FINAL_VAR("result")', {"result": "r"}, "r"),
        ("So it is.\nFINAL_VAR(result)", {"result": "r"}, "r"),
        ("`FINAL_VAR(result)`", {"result": "r"}, "r"),
    ],
)
def test_final_with_code_is_left_to_the_repl(text, names, answer):
    parsed = read(text)
    assert parsed.final is None and len(parsed.cells) == 1 and parsed.nudges == ()
    assert run(parsed.cells[0], **names) == answer


@pytest.mark.parametrize(
    "text",
    [
        "FINAL(...)",
        "FINAL(your answer here)",
        "FINAL()",
        "FINAL_VAR(variable_name)",
        "FINAL(<answer>)",
    ],
)
def test_placeholders_are_no_answers(text):
    parsed = read(text)
    assert parsed.cells == () and parsed.final is None and reasons(parsed) == ["placeholder"]


@pytest.mark.parametrize(
    "text",
    [
        "When I have it, I will use FINAL(answer) to hand it in.",
        "Then call FINAL_VAR(result).",
        "I would finish with FINAL(x + 1) later on.",
    ],
)
def test_a_plan_to_answer_is_no_answer(text):
    parsed = read(text)
    assert parsed.cells == () and parsed.final is None and reasons(parsed) == ["no_code"]


def test_final_inside_a_cell_is_code():
    assert read("```repl\nFINAL(result)\n```").cells == ("FINAL(result)",)
    parsed = read("```repl\nFINAL(The needle is (almost) blue)\n```")
    assert run(parsed.cells[0]) == "The needle is (almost) blue"


def test_a_variable_named_after_the_cell_is_handed_in_after_it():
    parsed = read("```repl\nresult = 2\n```\nFINAL_VAR(result)")
    assert parsed.cells == ("result = 2", "FINAL_VAR('result')")


def test_words_beside_a_cell_are_not_taken():
    """They were written before the cell's output was seen."""
    parsed = read("```repl\nprint(context[:10])\n```\nFINAL(It is blue, I think.)")
    assert (
        parsed.cells == ("print(context[:10])",)
        and parsed.final is None
        and reasons(parsed) == ["final_with_code"]
    )


@pytest.mark.parametrize(
    "text",
    [
        'answer["content"] = result\nanswer["ready"] = True',
        'I have it:\n\nanswer["content"] = result; answer["ready"] = True\n\nDone.',
        "answer['content'] = (\n    result\n)\nanswer['ready'] = True",
        'answer = {"content": result, "ready": True}',
        "answer.update(content=result, ready=True)",
        '`answer["content"] = result`\n`answer["ready"] = True`',
        "answer[“content”] = result\nanswer[“ready”] = True",
        'It is done.\nanswer["content"] = result\n\nand\n\nanswer["ready"] = True',
    ],
)
def test_answer_set_in_prose(text):
    parsed = read(text)
    assert len(parsed.cells) == 1 and parsed.nudges == ()
    assert run(parsed.cells[0], result="blue") == {"content": "blue", "ready": True}


def test_answer_set_in_prose_to_plain_words():
    parsed = read('answer["content"] = The needle is blue\nanswer["ready"] = True')
    assert run(parsed.cells[0]) == {"content": "The needle is blue", "ready": True}
    fenced = read('```repl\nanswer["content"] = The needle is blue\nanswer["ready"] = True\n```')
    assert run(fenced.cells[0]) == {"content": "The needle is blue", "ready": True}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('{"answer": "blue"}', "blue"),
        ('```json\n{"answer": "blue", "confidence": 0.9}\n```', "blue"),
        ('{"reasoning": "so", "final_answer": [1, 2]}', "[1, 2]"),
        ('{"content": "blue", "ready": true}', "blue"),
        ('{"answer": {"content": "blue", "ready": true}}', "blue"),
    ],
)
def test_a_json_object_as_the_reply(text, answer):
    parsed = read(text)
    assert (
        parsed.final == answer and parsed.whole_json and parsed.cells == () and parsed.nudges == ()
    )


@pytest.mark.parametrize(
    "text",
    [
        '{"content": "blue", "ready": false}',
        '{"answer": 1, "other": 2}',
        'It might be {"answer": 1} or not.',
        '{"plan": "look"}',
    ],
)
def test_other_json_is_no_answer(text):
    parsed = read(text)
    assert parsed.final is None and parsed.cells == () and reasons(parsed) == ["no_code"]
