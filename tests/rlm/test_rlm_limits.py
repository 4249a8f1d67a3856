"""Budgets of a whole tree, hit exactly while 64 calls are in flight."""

import pytest

from rlm.loop_helpers import CountingLM, ScriptedLM, cell, done, rlm
from rlm_runtime.errors import LMError

COUNT = "good = [r for r in rs if isinstance(r, str)]\nkinds = sorted({r.kind for r in rs if not isinstance(r, str)})\n"
ROOT = "output = [len(good), len(rs) - len(good), kinds]"


def run(calls, budget, sub, **options):
    """The root asks `calls` at once and reports how many were made and refused."""
    root = ScriptedLM(
        [
            cell(f"rs = llm_batch([f'one two {{i}}' for i in range({calls})])\n{COUNT}{ROOT}"),
            done("output"),
        ],
        name="root",
        tokens=lambda text: 0,
        usd_per_token=1e-9 if sub.usd is not None else None,
    )
    return rlm(root, sub, budget=budget, **options).completion("text")


def test_sub_calls():
    sub = CountingLM(latency=0.001)
    result = run(250, {"sub_calls": 100}, sub)
    assert result.answer == [100, 150, ["budget"]]
    assert (sub.calls, sub.most, result.sub_calls, result.stop_reason) == (100, 64, 100, "answered")


def test_sub_calls_are_shared_with_children():
    def lead(messages):
        return (
            done("[isinstance(r, str) for r in llm_batch(list('abcdefghij'))].count(True)")
            if len(messages) > 1
            else "y"
        )

    sub = ScriptedLM(lead, latency=0.001)
    code = "rs = rlm_batch(['a'] * 8)\ntotal = sum(r for r in rs if isinstance(r, int))"
    model = rlm([cell(code), done("total")], sub, max_depth=2, budget={"sub_calls": 50})
    result = model.completion("text")
    assert result.answer == 50 - 8  # the children count, too
    assert result.sub_calls == 50


def test_output_tokens_to_the_last_one():
    sub = CountingLM(reply_tokens=7, latency=0.0005)
    result = run(600, {"output_tokens": 4000, "reply_tokens": 20}, sub)
    kept = 1000  # for the root's last call, a quarter
    assert result.usage_by_depth[1].output_tokens == 4000 - kept
    # 428 of 7 tokens and one of the 4 that were left
    assert result.answer == [429, 171, ["budget"]]


def test_output_tokens_refuse_what_is_too_much():
    sub = CountingLM(reply_tokens=10, latency=0.0005)
    result = run(250, {"output_tokens": 1000, "reply_tokens": 20}, sub)
    made, refused, kinds = result.answer
    assert (made, refused, kinds) == (75, 175, ["budget"])
    assert result.usage_by_depth[1].output_tokens == 750


def test_input_tokens():
    sub = CountingLM(latency=0.0005)  # 3 tokens a prompt
    result = run(250, {"input_tokens": 400}, sub)
    assert result.answer == [100, 150, ["budget"]]  # a quarter is kept for the last call
    assert result.usage_by_depth[1].input_tokens == 300


def test_dollars_over_the_tree():
    sub = CountingLM(reply_tokens=5, usd_per_token=0.001, latency=0.0005)  # 8 tokens a call
    result = run(250, {"usd": 1.0, "reply_tokens": 10}, sub)
    made, refused, kinds = result.answer
    assert kinds == ["budget"] and made + refused == 250
    assert result.cost_usd <= 1.0 + 1e-9
    assert result.cost_usd == pytest.approx(0.008 * made, rel=0.02)
    assert 120 <= made <= 125  # next to nothing is kept for a root this cheap


def test_a_root_that_spends_all_gets_its_last_call():
    root = CountingLM(reply_tokens=1000, name="root")
    result = rlm(root, budget={"output_tokens": 450, "turns": 30}).completion("text")
    assert (result.stop_reason, result.partial) == ("budget:output_tokens", True)
    assert result.usage.output_tokens == 450
    assert result.answer


def test_a_root_that_has_no_room_left_gives_what_it_has():
    def lead(messages):
        if len(messages) == 2:
            return cell("answer['content'] = 'a draft'")
        raise LMError("never asked", kind="server")

    root = ScriptedLM(lead, tokens=lambda text: 400 if text.startswith(("You", "Question")) else 10)
    result = rlm(root, budget={"input_tokens": 1100}).completion("text", "q")
    assert (result.answer, result.stop_reason, result.partial) == (
        "a draft",
        "budget:input_tokens",
        True,
    )
    assert root.count == 1 and result.usage.input_tokens <= 1100


def test_depth():
    sub = ScriptedLM(lambda m: done("llm_query('x')") if len(m) > 1 else "y")
    code = "rs = llm_batch(['x']) + rlm_batch(['a'], 'q')\nout = [r if isinstance(r, str) else r.kind for r in rs]"
    model = rlm([cell(code), done("out")], sub, max_depth=2, budget={"depth": 1, "turns": 2})
    result = model.completion("text")
    assert result.answer[0] == "y"
    assert max(result.usage_by_depth) == 1


def test_a_root_hears_when_a_limit_comes_near():
    script = [cell("llm_batch(list('abcde'))"), cell("llm_batch(list('abcd'))"), done("1")]
    root = ScriptedLM(script)
    rlm(root, budget={"sub_calls": 10}).completion("text")
    assert "Left for this run" not in root.messages[1][-1].content
    assert "Left for this run: 1 calls" in root.messages[2][-1].content


def test_refusals_are_noted_once_a_turn_and_named():
    result = run(40, {"sub_calls": 10}, CountingLM())
    notes = [e for e in result.events if e.type == "budget" and e.refused]
    assert [n.refused for n in notes] == ["sub_calls"]
    assert notes[0].used["sub_calls"] == 10
    ends = [e for e in result.events if e.type == "node_end"]
    assert len(ends) == 40 and sum(e.kind == "budget" for e in ends) == 30


def test_many_tiny_calls_leave_nothing_behind():
    """5,000 calls of one batch: as many tasks as slots, and the books are exact."""
    import tracemalloc

    sub = CountingLM(reply_tokens=1)
    tracemalloc.start()
    result = run(5000, {}, sub, on_event=None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.answer == [5000, 0, []]
    assert result.usage_by_depth[1].calls == 5000
    assert peak < 30e6
