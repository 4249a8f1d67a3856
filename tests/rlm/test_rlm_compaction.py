"""When the history fills the window: a summary takes its place, the REPL has all of it, and the run
goes on."""

import pytest

from rlm.loop_helpers import ScriptedLM, cell, done, rlm, types
from rlm_runtime.errors import LMError

SUMMARY = "about to be replaced by a summary"


def lead(turns, final):
    """Prints long lines for some turns, then `final`; writes summaries when asked."""
    made = []

    def reply(messages):
        if SUMMARY in messages[-1].content:
            return (
                f"summary {sum(1 for m in made if m == 's') + 1}"
                if made.append("s") is None
                else ""
            )
        made.append("t")
        turn = made.count("t")
        return cell(f"print('line {turn} ' + 'x' * 400)") if turn <= turns else final

    return reply


def small(script, window=4000, **options):
    root = ScriptedLM(script, window=window, name="root")
    return rlm(root, system_prompt="Work.", limits={"output_chars": 500}, **options), root


def test_twice_and_everything_is_in_history():
    model, root = small(lead(75, done("[m['content'] for m in history]")), budget={"turns": 90})
    result = model.completion("text", "q?")
    compacted = [e for e in result.events if e.type == "compacted"]
    assert len(compacted) >= 2
    assert all(e.tokens_before >= 0.85 * 4000 > e.tokens_after for e in compacted)
    said = "\n".join(result.answer)
    # what is older than the last compaction
    assert all(f"line {i} x" in said for i in range(1, 45))
    assert said.count("Question: q?") == 1
    assert max(root.count_tokens(m) for m in root.messages) < 4000
    after = root.messages[[SUMMARY in m[-1].content for m in root.messages].index(True) + 1]
    assert [m.role for m in after] == ["system", "user", "assistant", "user"]
    assert (
        "Question: q?" in after[1].content
        and "summary" in after[2].content
        and "`history`" in after[3].content
    )


def test_the_history_grows_between_compactions_only_at_its_end():
    model, root = small(lead(30, done("1")), budget={"turns": 60})
    result = model.completion("text")
    breaks = 0
    for before, after in zip(root.messages, root.messages[1:], strict=False):
        if SUMMARY in before[-1].content:
            breaks += 1
        elif SUMMARY not in after[-1].content:
            assert after[: len(before)] == before
    assert breaks == types(result).count("compacted") >= 1


def test_an_overflow_the_endpoint_reports_is_compacted_once():
    calls = []

    def reply(messages):
        calls.append(messages)
        if SUMMARY in messages[-1].content:
            return "what was done"
        if len(messages) > 6:
            raise LMError("too long", kind="context_overflow")
        return cell("print(1)") if len(calls) < 6 else done("len(history)")

    model, _ = small(reply, window=None)
    result = model.completion("text")
    assert result.answer == 7
    assert types(result).count("compacted") == 1


def test_an_overflow_that_stays_is_an_error():
    def reply(messages):
        if len(messages) > 6:
            raise LMError("too long", kind="context_overflow")
        if SUMMARY in messages[-1].content:
            return "s"
        if len(messages) == 4 and messages[2].content == "s":
            raise LMError("still too long", kind="context_overflow")
        return cell("print(1)")

    model, _ = small(reply, window=None)
    with pytest.raises(LMError, match="too long") as e:
        model.completion("text")
    assert types(e.value.result)[-1] == "run_end"


def test_a_summary_that_does_not_fit_is_asked_of_less():
    def reply(messages):
        if len(messages) > 5:
            raise LMError("too long", kind="context_overflow")
        if SUMMARY in messages[-1].content:
            return "short summary"
        return done("len(history)") if "short summary" in messages[-2].content else cell("print(1)")

    model, _ = small(reply, window=None)
    assert model.completion("text").answer == 5


def test_the_window_may_be_told():
    model, _ = small(lead(20, done("1")), window=None)
    assert "compacted" not in types(model.completion("text"))
    root = ScriptedLM(lead(20, done("1")))
    result = rlm(root, window=2500, system_prompt="Work.").completion("text")
    assert "compacted" in types(result)


def test_compaction_is_charged_but_is_no_turn():
    model, root = small(lead(20, done("1")), window=1500, budget={"turns": 21})
    result = model.completion("text")
    assert result.answer == 1 and result.turns == 21
    assert result.usage.calls == root.count > 21


def test_a_small_window_cuts_what_a_cell_shows():
    model = rlm(ScriptedLM([done("1")], window=4096))
    assert model.options.limits_for(model.options.root).output_chars == 2457
    assert (
        rlm(ScriptedLM([], window=128_000)).options.limits_for(model.options.root).output_chars
        <= 20_000
    )
