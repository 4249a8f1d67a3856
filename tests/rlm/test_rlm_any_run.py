"""Whatever the models do and whatever the limits are: a run ends with a result or a typed error,
inside its budget, with a complete record and nothing left behind."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rlm.fake_environment import FakeEnvironment
from rlm.loop_helpers import ScriptedLM, cell, done, rlm
from rlm_runtime.errors import LMError, RlmError
from rlm_runtime.lms.base import Reply

REPLIES = [
    cell("print('hello')"),
    cell("print('y' * 3000)"),
    cell("1/0"),
    cell("rs = llm_batch(['a'] * 7)"),
    cell("rs = rlm_batch(['a', 'b'], 'what?')"),
    cell("llm_query('x', schema={'type': 'integer'})"),
    cell("answer['content'] = 'draft'"),
    cell("answer['ready'] = True"),
    cell("answer = 5"),
    cell("raise SystemExit"),
    cell("print(1)") + "\nOutput:\n1",
    done("'yes'"),
    done("7"),
    done("{'n': [1]}"),
    "Only words.",
    "",
    "FINAL(12)",
    "<think>never ends",
    "```repl\nprint('cut",
    Reply(text="cut of", finish_reason="length"),
    LMError("too long", kind="context_overflow"),
    LMError("down", kind="connection"),
    ValueError("a bug"),
]
LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "turns": st.integers(1, 6),
        "sub_calls": st.integers(0, 20),
        "input_tokens": st.integers(1, 9000),
        "output_tokens": st.integers(1, 300),
        "usd": st.floats(1e-4, 1.0),
        "depth": st.integers(0, 2),
        "consecutive_errors": st.integers(1, 3),
        "reply_tokens": st.integers(1, 100),
    },
)


@settings(max_examples=120, deadline=None)
@given(
    script=st.lists(st.sampled_from(REPLIES), max_size=12),
    subs=st.lists(st.sampled_from(REPLIES), max_size=30),
    budget=LIMITS,
    max_depth=st.integers(0, 3),
    output=st.sampled_from([None, int, {"type": "object"}]),
    window=st.sampled_from([None, 2500, 4000]),
)
def test_a_run_always_ends_well(script, subs, budget, max_depth, output, window):
    def cut(reply, sampling):
        """A model keeps to max_tokens (four characters a token)."""
        text, most = (reply if isinstance(reply, str) else reply.text), sampling.max_tokens
        if most is None or len(text) <= 4 * most:
            return reply
        return Reply(text=text[: 4 * most], finish_reason="length")

    def model(replies, **options):
        left = iter(replies)

        def reply(messages, sampling):
            line = next(left, "nothing more")
            return line if isinstance(line, Exception) else cut(line, sampling)

        return ScriptedLM(reply, usd_per_token=1e-5, **options)

    root, sub = model(script, window=window, name="root"), model(subs, name="sub")
    settings = {"system_prompt": "Work.", "max_depth": max_depth, "budget": {"turns": 12, **budget}}
    try:
        result = rlm(root, sub, **settings).completion("the text", "q?", output=output)
    except RlmError as e:
        result = e.result
        assert result.stop_reason == "error" and result.error
    assert not FakeEnvironment.live
    if output is not None:
        assert result.answer is None or isinstance(result.answer, int if output is int else dict)
    assert result.partial == (result.stop_reason != "answered")

    events = list(result.events)
    assert events[0].type == "run_start" and events[-1].type == "run_end"
    assert [e.type for e in events].count("run_end") == 1
    for begin, end in (("node_start", "node_end"), ("cell_start", "cell_end")):
        assert sorted(e.node for e in events if e.type == begin) == sorted(
            e.node for e in events if e.type == end
        )
    assert [e.t for e in events] == sorted(e.t for e in events)

    used = {"input_tokens": result.usage.input_tokens, "output_tokens": result.usage.output_tokens}
    used |= {"usd": result.cost_usd or 0.0, "sub_calls": result.sub_calls, "turns": result.turns}
    for name, limit in budget.items():
        assert used.get(name, 0) <= limit * (1 + 1e-9), name
    assert max(result.usage_by_depth, default=0) <= budget.get("depth", 99)

    if not any(e.type == "compacted" for e in events):
        for before, after in zip(root.messages, root.messages[1:], strict=False):
            # a call that failed is asked again, with more to say
            assert after[: len(before) - 1] == before[:-1]
