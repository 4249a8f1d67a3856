"""Sub-LM calls and child RLMs: concurrent, in order, failing in place, to a depth, with schemas and
tools."""

import asyncio

import pytest

from rlm.fake_environment import FakeEnvironment
from rlm.loop_helpers import ScriptedLM, cell, done, echo, rlm, types
from rlm_runtime.errors import LMError, UsageError
from rlm_runtime.lms.base import Message, Reply, ToolCall
from rlm_runtime.rlm.schemas import shape_of
from rlm_runtime.rlm.subcalls import Prompt

SAFE = "[r if not isinstance(r, CallError) else [r.kind, str(r)] for r in rs]"


def answer_of(code, sub=None, **options):
    return rlm([cell(code), done("out")], sub, **options).completion("text").answer


def test_a_batch_is_concurrent_and_in_order():
    sub = echo(latency=lambda messages: 0.05 if messages[-1].content == "p0" else 0.005)
    assert answer_of("out = llm_batch([f'p{i}' for i in range(200)])", sub) == [
        f"P{i}" for i in range(200)
    ]
    assert sub.max_concurrency == 64


def test_concurrency_is_one_bound_for_the_whole_tree():
    sub = ScriptedLM(
        lambda m: (
            done("llm_batch(['x'] * 20)") if "`context` in the REPL" in m[-1].content else "y"
        ),
        latency=0.002,
    )
    code = "rs = rlm_batch(['a'] * 10)\nout = [len(r) for r in rs]"
    assert answer_of(code, sub, max_depth=2, concurrency=7) == [20] * 10
    assert sub.max_concurrency == 7


def test_failures_are_values_in_their_places():
    def reply(messages):
        if messages[-1].content == "bad":
            raise LMError("slow down", kind="rate_limit", status=429)
        return "fine"

    code = f"rs = llm_batch(['a', 'bad', 'b'])\nout = {SAFE}"
    assert answer_of(code, ScriptedLM(reply)) == ["fine", ["rate_limit", "slow down"], "fine"]


def test_a_lone_failure_is_raised():
    code = "try:\n    llm_query('x')\nexcept CallError as e:\n    out = e.kind"
    assert answer_of(code, ScriptedLM([LMError("no", kind="auth")])) == "auth"


def test_prompts_may_be_any_json():
    seen = []
    sub = ScriptedLM(lambda m: seen.append(m) or "ok")
    code = (
        "out = llm_batch(['text', {'a': [1, None]}, 7, [{'role': 'system', 'content': 's'}, "
        "{'role': 'user', 'content': 'u'}], 'lone \\ud800'])"
    )
    assert answer_of(code, sub) == ["ok"] * 5
    assert [m.content for m in seen[0]] == ["text"]
    assert [[m.content for m in ms] for ms in seen[1:3]] == [['{"a": [1, null]}'], ["7"]]
    assert [m.role for m in seen[3]] == ["system", "user"]
    seen[4][0].content.encode()


def test_only_chat_messages_are_taken_for_a_conversation():
    assert (
        len(
            Prompt.of(
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            ).messages()
        )
        == 2
    )
    for odd in (
        [],
        [{"role": "tool", "content": "a"}],
        [{"role": "user", "content": 1}],
        [{"role": "user"}],
    ):
        assert [m.role for m in Prompt.of(odd).messages()] == ["user"]


def test_models_by_name_and_by_depth():
    big, deep = ScriptedLM(["from big"]), ScriptedLM(["from deep"])
    code = f"rs = llm_batch(['a'], model='big') + llm_batch(['a']) + llm_batch(['a'], model='other')\nout = {SAFE}"
    out = answer_of(code, models={"big": big}, models_by_depth={1: deep})
    assert out[:2] == ["from big", "from deep"]
    assert out[2][0] == "refused" and "allowed: big" in out[2][1]


def test_no_sub_calls_at_depth_zero():
    code = f"rs = llm_batch(['a']) + rlm_batch(['a'])\nout = {SAFE}"
    sub = echo()
    assert [kind for kind, _ in answer_of(code, sub, max_depth=0)] == ["refused", "refused"]
    assert sub.count == 0


def test_at_the_deepest_level_a_child_is_a_plain_call():
    sub = echo()
    assert answer_of("out = rlm_query('the text', 'what?')", sub) == "WHAT?\n\nTHE TEXT"


def test_three_levels():
    """Root, child, grandchild: each adds its own mark around what comes from below."""

    def lead(messages):
        task = messages[1].content if len(messages) > 1 else ""
        if "level one" in task:
            return done("'1(' + rlm_query(context + '!', 'level two') + ')'")
        if "level two" in task:
            return done("'2(' + llm_query(context) + ')'")
        return messages[-1].content.upper()

    code = "out = rlm_batch(['a', 'b'], 'level one')"
    model = rlm([cell(code), done("out")], ScriptedLM(lead), max_depth=3)
    result = model.completion("text")
    assert result.answer == ["1(2(A!))", "1(2(B!))"]
    starts = {e.node: e for e in result.events if e.type == "node_start"}
    assert set(starts) == {"0.1", "0.2", "0.1.1", "0.2.1", "0.1.1.1", "0.2.1.1"}
    assert all(
        e.parent == node.rpartition(".")[0] and e.depth == node.count(".")
        for node, e in starts.items()
    )
    assert types(result, "0.1") == [
        "node_start",
        "context",
        "sandbox",
        "asked",
        "replied",
        "cell_start",
        "cell_end",
        "budget",
        "node_end",
    ]
    ends = {e.node: e for e in result.events if e.type == "node_end"}
    assert ends["0.1"].value == "1(2(A!))" and ends["0.1"].usage.calls == 3
    assert set(result.usage_by_depth) == {0, 1, 2, 3}
    assert not FakeEnvironment.live


def test_waiting_for_children_never_blocks_the_children():
    """One REPL a level and one call at a time: still no deadlock."""

    def lead(messages):
        if "`context` in the REPL" in messages[-1].content:
            deeper = "deep" if "deep" in messages[1].content else "deepest"
            return done(
                f"rlm_batch(['x', 'y'], {deeper!r})" if deeper == "deep" else "llm_batch(['x'] * 3)"
            )
        return "leaf"

    code = "out = [len(r) for r in rlm_batch(['a', 'b', 'c'], 'deep')]"
    model = rlm(
        [cell(code), done("out")], ScriptedLM(lead), max_depth=4, max_repls=1, concurrency=1
    )

    async def main():
        async with asyncio.timeout(30):
            return await model.acompletion("text")

    assert asyncio.run(main()).answer == [2, 2, 2]


def test_live_children_are_bounded():
    most = 0

    class Counted(FakeEnvironment):
        async def start(self, context, tools=()):
            nonlocal most
            report = await super().start(context, tools)
            most = max(most, len(self.live))
            return report

    sub = ScriptedLM([done("1")], repeat_last=True, latency=0.005)
    out = answer_of(
        "out = rlm_batch(['a'] * 20)", sub, max_depth=2, max_repls=3, environment=Counted
    )
    assert out == [1] * 20 and most == 4  # with the root's


def test_a_child_that_meets_its_turn_limit_gives_its_best():
    def lead(messages):
        return "a guess" if "The run ends" in messages[-1].content else cell("print(1)")

    root = [cell("out = rlm_query('a')"), done("out")]
    assert (
        rlm(root, ScriptedLM(lead), max_depth=2, budget={"turns": 3}).completion("text").answer
        == "a guess"
    )


def test_a_child_that_fails_is_a_typed_error():
    code = f"rs = rlm_batch(['a'])\nout = {SAFE}"
    [[kind, text]] = answer_of(code, ScriptedLM([LMError("no key", kind="auth")]), max_depth=2)
    assert kind == "auth" and "no key" in text


def test_a_child_answers_in_the_schema_it_was_given():
    sub = ScriptedLM([done("'five'"), done("5")])
    assert answer_of("out = rlm_query('a', schema={'type': 'integer'})", sub, max_depth=2) == 5
    assert sub.count == 2


# -- schemas ---------------------------------------------------------------------------------------
def test_a_reply_that_does_not_fit_is_sent_back_and_charged():
    sub = ScriptedLM(["no idea", '{"n": "x"}', 'Here: {"n": 3}'])
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    model = rlm([cell(f"out = llm_query('a', schema={schema})"), done("out")], sub)
    result = model.completion("text")
    assert result.answer == {"n": 3}
    assert (sub.count, result.sub_calls, result.usage_by_depth[1].calls) == (3, 3, 3)
    assert sub.calls[0].schema == schema
    assert sub.messages[2][: len(sub.messages[1])] == sub.messages[1]


def test_a_schema_that_is_never_met_is_a_typed_error():
    sub = ScriptedLM(["no"], repeat_last=True)
    [[kind, text]] = answer_of(
        f"rs = llm_batch(['a'], schema={{'type': 'integer'}})\nout = {SAFE}", sub
    )
    assert kind == "schema" and "3 tries" in text and sub.count == 3


DOUBLING = {
    "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
    | {"d40": {"type": "object"}},
    "$ref": "#/$defs/d0",
}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(a+)+$"},
        {"type": "object", "patternProperties": {"(a+)+$": {}}},
        DOUBLING,
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"$ref": "http://example.com/schema"},
        {"type": "no such type"},
        {"type": "string", "description": "x" * 200_000},
    ],
)
def test_schemas_that_could_keep_the_host_busy_are_refused(schema):
    with pytest.raises(UsageError):
        shape_of(schema)


def test_property_names_are_not_keywords():
    schema = {
        "type": "object",
        "properties": {"pattern": {"type": "string"}, "$ref": {"enum": ["pattern"]}},
    }
    assert shape_of(schema).check({"pattern": "a"}) == ({"pattern": "a"}, None)


def test_a_refused_schema_is_an_error_of_every_call():
    sub = echo()
    out = answer_of(f"rs = llm_batch(['a', 'b'], schema={{'type': 'x'}})\nout = {SAFE}", sub)
    assert [kind for kind, _ in out] == ["refused", "refused"] and sub.count == 0


# -- tools of sub-LMs ------------------------------------------------------------------------------
def lookup(name: str, exact: bool = False) -> int:
    """How many there are."""
    return len(name) + exact


def call(name, /, **arguments):
    return Reply(tool_calls=(ToolCall(id=f"c{len(arguments)}", name=name, arguments=arguments),))


def test_a_sub_lm_uses_its_tools():
    def reply(messages):
        if messages[-1].role == "tool":
            return f"there are {messages[-1].content}"
        return call("lookup", name="abc", exact=True)

    sub = ScriptedLM(reply)
    result = rlm(
        [cell("out = llm_query('how many?')"), done("out")], sub, sub_tools=[lookup]
    ).completion("text")
    assert result.answer == "there are 4"
    spec = sub.calls[0].tools[0]
    assert spec.name == "lookup" and "How many" in spec.description
    assert spec.parameters["properties"]["name"]["type"] == "string" and spec.parameters[
        "required"
    ] == ["name"]
    tool = next(e for e in result.events if e.type == "node_start" and e.kind == "tool")
    assert (tool.node, tool.parent, tool.model) == ("0.1.1", "0.1", "lookup")
    assert result.sub_calls == 2


def test_tool_rounds_end():
    def reply(messages, tools):
        return call("lookup", name="abc") if tools else "at last"

    sub = ScriptedLM(reply)
    model = rlm([cell("out = llm_query('x')"), done("out")], sub, sub_tools=[lookup], sub_rounds=3)
    assert model.completion("text").answer == "at last"
    assert sub.count == 4


def test_a_sub_lm_is_told_what_went_wrong_with_its_tool():
    told = []

    def reply(messages):
        told.append(messages[-1])
        script = [call("lookup", nme="abc"), call("look", name="abc"), call("fail"), "done"]
        return script[len(told) - 1]

    def fail():
        raise ValueError("out of order")

    answer_of("out = llm_query('x')", ScriptedLM(reply), sub_tools=[lookup, fail])
    assert isinstance(told[0], Message)
    assert [m.role for m in told[1:]] == ["tool"] * 3
    assert (
        "argument" in told[1].content
        and "no tool 'look'" in told[2].content
        and "out of order" in told[3].content
    )


def test_child_rlms_have_the_sub_tools_in_their_repl():
    sub = ScriptedLM([done("lookup('abcd')")])
    assert answer_of("out = rlm_query('a')", sub, sub_tools=[lookup], max_depth=2) == 4
    root_tools = "try:\n    lookup('a')\nexcept NameError:\n    out = 'not here'"
    assert answer_of(root_tools, sub_tools=[lookup]) == "not here"
