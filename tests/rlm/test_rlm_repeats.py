"""A root that goes on without getting on is told so from the second time, and stopped by a limit
that says why."""

import pytest

from rlm.loop_helpers import CountingLM, ScriptedLM, cell, done, rlm, told
from rlm_runtime.lms.base import Reply

CUT = {
    "in the text": Reply(text="<think>I must think about", finish_reason="length"),
    "harmony": Reply(
        text="<|channel|>analysis<|message|>I must think about", finish_reason="length"
    ),
    "kept by the endpoint": Reply(text="", finish_reason="length"),
}


@pytest.mark.parametrize("name", CUT)
def test_replies_that_are_all_cut_while_thinking(name):
    root = ScriptedLM([CUT[name]] * 5 + ["my best guess"], name="root")
    result = rlm(root).completion("text")
    assert (result.stop_reason, result.turns, result.partial) == ("budget:repeats", 5, True)
    assert "5 replies in a row were cut off while the model was still thinking" in result.error
    assert result.answer == "my best guess"
    assert (
        "times in a row" not in told(root, 1)
        and "2 times in a row" in told(root, 2)
        and "3 times in a row" in told(root, 3)
    )


def test_the_same_cell_with_the_same_output():
    root = ScriptedLM([cell("print(len(context))")] * 5 + ["my best guess"], name="root")
    result = rlm(root).completion("text")
    assert (result.stop_reason, result.turns) == ("budget:repeats", 5)
    assert "repeated the same cells with the same output (5 times)" in result.error
    assert (
        "same code" not in told(root, 1)
        and "for the 2nd time" in told(root, 2)
        and "for the 4th time" in told(root, 4)
    )
    assert [e.reason for e in result.events if e.type == "nudged"] == ["repeats"] * 4


def test_going_round_in_a_circle():
    root = ScriptedLM([cell(f"print({i % 2})") for i in range(20)], name="root")
    result = rlm(root).completion("text")
    assert (result.stop_reason, result.turns) == ("budget:repeats", 9)


def test_the_same_words_without_a_cell():
    root = ScriptedLM(["I will look at the text now."] * 6, name="root")
    result = rlm(root).completion("text")
    assert result.stop_reason == "budget:repeats" and "same reply without a cell" in result.error


@pytest.mark.parametrize(
    "script",
    [
        [cell(f"print({i})") for i in range(8)],  # other code
        [cell("n = globals().get('n', 0) + 1\nprint(n)")] * 8,  # other output
        [cell("found = globals().get('found', []) + [1]")] * 8,  # no output, but something grows
        [
            "Hm.",
            cell("x = 1"),
            "Hm.",
            cell("x = 'a'"),
            "Hm.",
            cell("x = [1]"),
            "Hm.",
            cell("x = {}"),
            "Hm.",
        ],
        [CUT["in the text"], cell("print(1)"), CUT["in the text"], cell("print(2)")] * 2
        + [CUT["in the text"]],
    ],
)
def test_what_gets_on_is_not_stopped(script):
    result = rlm(ScriptedLM([*script, done("'end'")], name="root"), environment="local").completion(
        "text"
    )
    assert (result.stop_reason, result.answer) == ("answered", "end")


def test_the_limit_can_be_set_and_switched_off():
    same = [cell("print(1)")] * 12
    assert rlm([*same], budget={"repeats": 3}).completion("text").turns == 3
    assert (
        rlm([*same, done("1")], budget={"repeats": None}).completion("text").stop_reason
        == "answered"
    )


# -- a plan as a first answer
PLANS = [
    "FINAL(I will now look at the context)",
    'FINAL("Let me start by printing the first lines.")',
    cell("FINAL('First, I need to see the text.')"),
    cell("answer['content'] = \"I'll look at it\"\nanswer['ready'] = True"),
    "FINAL(To answer this, I will count the lines.)",
]


@pytest.mark.parametrize("first", PLANS)
def test_a_plan_in_the_first_reply_is_no_answer(first):
    root = ScriptedLM([first, cell("print(context)"), done("'blue'")], name="root")
    result = rlm(root).completion("text")
    assert (result.answer, result.stop_reason, result.turns) == ("blue", "answered", 3)
    assert "what you are about to do" in told(root, 1)


def test_a_plan_that_is_meant_is_taken_the_second_time_and_later():
    assert rlm([PLANS[0], PLANS[0]]).completion("text").answer == "I will now look at the context"
    assert (
        rlm([cell("print(1)"), "FINAL(I will survive)"]).completion("text").answer
        == "I will survive"
    )
    assert rlm(["FINAL(Illinois)"]).completion("text").answer == "Illinois"
    assert rlm(["FINAL(In Rome)"]).completion("text").answer == "In Rome"


# -- equal prompts in one batch
def test_equal_prompts_of_a_batch_are_asked_once():
    sub = CountingLM(reply_tokens=2)
    code = "a = llm_batch(['x', 'y', 'x', {'b': 1}, {'b': 1}, 'x'])\nb = llm_batch(['x'])"
    result = rlm(
        [cell(code), done("[len(a), len(set(map(str, a)))]")], sub, budget={"sub_calls": 4}
    ).completion("text")
    assert result.answer == [6, 1] and sub.calls == 4 and result.sub_calls == 4
    starts = [e.prompt for e in result.events if e.type == "node_start"]
    assert starts.count("x") == 4 and len(starts) == 7  # the record has each of them
    assert result.usage_by_depth[1].calls == 4


def test_equal_prompts_are_asked_each_where_replies_are_drawn():
    sub = CountingLM()
    rlm(
        [cell("llm_batch(['x'] * 5)"), done("1")], sub, sub_sampling={"temperature": 0.7}
    ).completion("text")
    assert sub.calls == 5
    rlm(
        [cell("llm_batch(['x'] * 5)"), done("1")], sub, sub_sampling={"temperature": 0.0}
    ).completion("text")
    assert sub.calls == 6


def test_an_error_stands_in_the_place_of_each():
    sub = ScriptedLM(lambda m: "" if m[-1].content == "bad" else "good", name="sub")
    code = "out = [r if isinstance(r, str) else r.kind for r in llm_batch(['bad', 'a', 'bad'])]"
    assert rlm([cell(code), done("out")], sub).completion("text").answer == [
        "empty",
        "good",
        "empty",
    ]
