"""A reply without its thinking: in what `llm_query` returns, and for the root."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm.loop_helpers import ScriptedLM, cell, done, rlm
from rlm_runtime.lms.base import Reply
from rlm_runtime.parsing import parse
from rlm_runtime.replies.thinking import Cleaned, clean

ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>final<|message|>"
THOUGHTS = {
    "think": "<think>\nis it 41?\n</think>\n\n{}",
    "thinking": "<thinking>is it 41?</thinking>{}",
    "reasoning": "<reasoning>is it 41?</reasoning>\n{}",
    "capitals": "<THINK>is it 41?</Think>{}",
    "opened by the template": "is it 41?\n</think>\n\n{}",
    "closed twice": "<think>is it 41?</think>\n41, no\n</think>\n{}",
    "nested": "<think>is it <think>41?</think> no</think>{}",
    "with code": "<think>\n```python\nx = 41\n```\n</think>\n{}",
    "code, opened by the template": "I try\n```python\nx = 41\n```\n</think>\n{}",
    "Magistral": "[THINK]is it 41?[/THINK]{}",
    "Kimi": "◁think▷is it 41?◁/think▷{}",
    "Seed": "<seed:think>is it 41?</seed:think>{}",
    "OpenThinker": "<|begin_of_thought|>is it 41?<|end_of_thought|>\n<|begin_of_solution|>\n{}\n<|end_of_solution|>",
    "harmony": ANALYSIS + "is it 41?<|end|>" + FINAL + "{}<|return|>",
    "harmony, first token eaten": "<|start|>assistant"
    + ANALYSIS
    + "is it 41?<|end|>"
    + FINAL
    + "{}",
    "harmony, two thoughts": ANALYSIS
    + "40?<|end|><|start|>assistant"
    + ANALYSIS
    + "41?<|end|>"
    + FINAL
    + "{}<|return|>",
    "harmony, preamble": ANALYSIS
    + "41?<|end|><|start|>assistant<|channel|>commentary<|message|>I add 41.<|end|>"
    + FINAL
    + "{}",
    "harmony, plays on": ANALYSIS + "41?<|end|>" + FINAL + "{}<|end|><|start|>user<|message|>41?",
    "harmony without its tokens": "analysisIs it 41?assistantfinal{}",
}


@pytest.mark.parametrize("name", THOUGHTS)
@pytest.mark.parametrize("answer", ["42", '{"a": [42]}', "It is 42 < 43.\n\nSo it is."])
def test_the_answer_is_left(name, answer):
    found = clean(THOUGHTS[name].replace("{}", answer))
    assert found.text == answer and "4" in found.thinking and not found.open


@pytest.mark.parametrize("name", THOUGHTS)
def test_the_root_reads_past_it_too(name):
    parsed = parse(Reply(text=THOUGHTS[name].replace("{}", "I look.\n```repl\nprint(42)\n```")))
    assert parsed.cells == ("print(42)",) and "4" in parsed.thinking and "41" not in parsed.kept
    assert "assistant" not in parsed.kept and "final" not in parsed.kept


@pytest.mark.parametrize(
    "text",
    [
        "<think>is it 41?",
        "\n<think>\nis it 41?\n```\n42",
        ANALYSIS + "is it 41?",
        "[THINK]is it 41?",
        "<|begin_of_thought|>41",
    ],
)
def test_thinking_that_never_ends_leaves_nothing(text):
    found = clean(text)
    assert found.text == "" and "41" in found.thinking and found.open


@pytest.mark.parametrize(
    "text",
    [
        "42",
        "  indented\n",
        "",
        "The tags <think> and </think> stand around it.",
        "It writes `<think>` and `</think>`.",
        '{"tag": "</think>"}',
        "```html\n<think>\na\n</think>\n```",
        "So:\n```\nx\n</think>\ny\n```\nend",
        "a <think> b",
        "analysis of the text: good",
        "f<|x| y",
        "[INST",
        "1 < 2",
        "analysis\nassistant final",
        "</thinker>",
    ],
)
def test_what_is_no_thinking_stays_as_it_is(text):
    assert clean(text) == Cleaned(text)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "<think>",
                "</think>",
                "\n",
                "a ",
                "```",
                "`",
                "[THINK]",
                "<|end|>",
                ANALYSIS,
                FINAL,
                "42",
                "</s>",
            ]
        ),
        max_size=14,
    ).map("".join)
)
def test_any_text_is_cleaned_once_and_for_all(text):
    found = clean(text)
    words = found.text + found.thinking
    assert sum(map(words.count, ("42",))) <= text.count("42")
    if not found.thinking and not found.open:
        assert found.text.strip() in text


def asked(reply, **options):
    sub = ScriptedLM(reply if isinstance(reply, list) else [reply], name="sub", repeat_last=True)
    return rlm(
        [cell("out = llm_query('q'" + options.pop("more", "") + ")"), done("out")], sub, **options
    ).completion("text")


@pytest.mark.parametrize("name", THOUGHTS)
def test_llm_query_returns_the_answer_alone(name):
    assert asked(THOUGHTS[name].replace("{}", "42")).answer == "42"
    assert (
        asked(THOUGHTS[name].replace("{}", "42"), more=", schema={'type': 'integer'}").answer == 42
    )


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply(text="<think>is it 41", finish_reason="length"), "truncated"),
        (Reply(text="", finish_reason="length"), "truncated"),
        (Reply(text="<think>is it 41?</think>"), "empty"),
        (Reply(text="  \n"), "empty"),
    ],
)
def test_a_reply_without_an_answer_is_no_success(reply, kind):
    code = "try:\n    llm_query('q')\nexcept CallError as e:\n    out = [e.kind, str(e)]"
    result = rlm(
        [cell(code), done("out")], ScriptedLM([reply], name="sub", repeat_last=True)
    ).completion("text")
    found, text = result.answer
    assert found == kind and "sub: the reply" in text
    batch = rlm(
        [
            cell("out = [r if isinstance(r, str) else r.kind for r in llm_batch(['a', 'b'])]"),
            done("out"),
        ],
        ScriptedLM(lambda m: reply if m[-1].content == "a" else "good"),
    )
    assert batch.completion("text").answer == [kind, "good"]
