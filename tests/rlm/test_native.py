"""The native protocol: a prompt of a hundred tokens, a history that slides, reports cut by the
model's own count."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm.fake_environment import FakeEnvironment
from rlm.loop_helpers import cell, done
from rlm_runtime import RLM, prompts
from rlm_runtime.errors import LMError
from rlm_runtime.lms.scripted import ScriptedLM
from rlm_runtime.prompts import Helpers


def lead(script, window, variant="native", **options):
    lm = ScriptedLM(script, window=window, tokens=len, name="root")  # a token a character
    options.setdefault("environment", FakeEnvironment)
    return lm, RLM(lm, prompt_variant=variant, **options)


@pytest.mark.parametrize("children", [False, True])
def test_only_what_exists_is_mentioned(children):
    alone = prompts.system(Helpers(sub_calls=False), variant="native")
    assert (
        "llm_query" not in alone
        and "rlm_query" not in alone
        and "`context`" in alone
        and "answer[" in alone
    )
    text = prompts.system(Helpers(children=children), variant="native")
    assert "llm_batch" in text and ("rlm_query" in text) == children


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=8),
    st.sampled_from([1300, 1700, 4000]),
)
def test_no_prompt_is_longer_than_the_window_less_the_reply(sizes, window):
    script = [cell(f"print('x' * {n})  # {i}") for i, n in enumerate(sizes)] + [done("'yes'")]
    lm, rlm = lead(script, window)
    result = rlm.completion("a long text", "What?")
    assert result.answer == "yes" and lm.count == len(script)
    for messages in lm.messages:
        assert lm.count_tokens(messages) <= window - min(512, window // 4)
        assert [m.role for m in messages[:2]] == ["system", "user"]
        assert messages[:2] == lm.messages[0]  # the task stays
    roles = [[m.role for m in messages[1:]] for messages in lm.messages]
    assert all(a != b for turn in roles for a, b in itertools.pairwise(turn))


def test_what_was_left_out_is_recorded_and_the_newest_stays():
    script = [cell(f"print('{i}' * 500)") for i in range(5)] + [done("'yes'")]
    lm, rlm = lead(script, 2000)
    result = rlm.completion("text", "What?")
    left_out = [e.left_out for e in result.events if e.type == "asked"]
    assert left_out[0] == 0 and left_out[-1] > 0 and left_out == sorted(left_out)
    for call, (messages, n) in enumerate(zip(lm.messages, left_out, strict=True)):
        assert len(messages) == 2 + 2 * call - n
    assert "4" * 400 in lm.messages[-1][-1].content


@pytest.mark.parametrize("variant", ["native", "default"])
def test_a_report_longer_than_the_window_is_cut_not_an_error(variant):
    window = 1500 if variant == "native" else 14_000
    code = "raise ValueError('y' * 50_000)"
    lm, rlm = lead([cell(code), done("1")], window, variant, limits={"output_chars": 10_000})
    result = rlm.completion("text", "What?")
    assert result.answer == 1
    assert (
        "characters cut]" in lm.messages[1][-1].content and lm.count_tokens(lm.messages[1]) < window
    )


def test_a_window_too_small_for_the_question_is_one_clear_error():
    lm, rlm = lead([done("1")], 400)
    with pytest.raises(
        LMError, match="window of 400 tokens is too small: system prompt and question take"
    ):
        rlm.completion("text", "What? " * 50)
    assert lm.count == 0


def test_errors_and_outputs_are_short():
    script = [cell("1 / 0"), cell("x = 1"), cell("print('hi')"), done("1")]
    lm, rlm = lead(script, None)
    rlm.completion("text", "What?")
    said = [m[-1].content for m in lm.messages]
    assert said[1] == "Error: ZeroDivisionError: division by zero"
    assert said[2] == "(no output)" and said[3] == "```\nhi\n```"


def test_a_session_slides_too():
    script = [cell("print('x' * 500)"), done("1"), cell("print('y' * 500)"), done("2")]
    lm, rlm = lead(script, 1600)
    with rlm.session() as session:
        assert session.completion("one", "First?").answer == 1
        assert session.completion("two", "Second?").answer == 2
    assert all(lm.count_tokens(m) <= 1200 for m in lm.messages)
    assert "Second?" in lm.messages[-1][1].content


def test_a_model_says_itself_how_it_wants_to_be_spoken_to():
    """The variant that travels with a checkpoint, unless the caller names another."""
    for asked, short in ((None, True), ("small", False)):
        lm, rlm = lead([done("'yes'")], 14_000, asked)
        lm.prompt_variant = "native"
        rlm.completion("a long text", "What?")
        assert (len(lm.messages[0][0].content) < 500) == short
