"""The turn loop over a scripted root: protocol, history, limits, last call, failures."""

import asyncio
import threading

import pytest
from pydantic import BaseModel

from rlm.loop_helpers import ScriptedLM, cell, done, rlm, told, types
from rlm_runtime import RLM
from rlm_runtime.errors import ContextError, LMError, UsageError
from rlm_runtime.lms.base import Reply


def test_variables_live_from_turn_to_turn_and_the_answer_is_a_value():
    model = rlm([cell("n = len(context)"), cell("n += 1\nprint('n is', n)"), done("{'n': n}")])
    result = model.completion("x" * 99, "How long?")
    assert (result.answer, result.stop_reason, result.partial, result.turns) == (
        {"n": 100},
        "answered",
        False,
        3,
    )
    root = model.options.root
    assert "n is 100" in told(root)
    assert "How long?" in told(root, 0) and "x" * 99 not in told(root, 0).replace("\n", "")[:60]


def test_the_history_only_grows():
    script = [
        cell("print(1)"),
        "I wonder.",
        cell("1/0"),
        cell("print(2)") + "\nOutput:\n2",
        done("3"),
    ]
    root = ScriptedLM(script)
    rlm(root).completion("text")
    assert root.count == 5
    for before, after in zip(root.messages, root.messages[1:], strict=False):
        assert after[: len(before)] == before  # the prefix a server has cached
        assert [m.role for m in after[len(before) :]] == ["assistant", "user"]


def test_events_come_in_order():
    result = rlm([cell("print(llm_query('a'))"), done("1")]).completion("text")
    assert types(result) == [
        "run_start",
        "context",
        "sandbox",
        "asked",
        "replied",
        "cell_start",
        "node_start",
        "node_end",
        "cell_end",
        "budget",
        "asked",
        "replied",
        "cell_start",
        "cell_end",
        "budget",
        "run_end",
    ]


def test_cells_of_a_reply_run_in_order_and_stop_at_the_first_failure():
    root = ScriptedLM([f"{cell('print(1)')}\n{cell('1/0')}\n{done('wrong')}", done("'right'")])
    result = rlm(root).completion("text")
    assert result.answer == "right"
    assert "ZeroDivisionError" in told(root) and "not run" in told(root)


def test_a_reply_without_code_is_told_so():
    root = ScriptedLM(["Let me think about it.", done("1")])
    result = rlm(root).completion("text")
    assert result.answer == 1
    assert "nudged" in types(result) and "No code was run" in told(root)


def test_an_answer_in_prose_is_taken():
    assert rlm([cell("print(1)"), "FINAL(forty-two)"]).completion("text").answer == "forty-two"
    assert rlm([cell("pair = [1, 2]"), "FINAL_VAR(pair)"]).completion("text").answer == [1, 2]


def test_ready_without_content_is_asked_about_once():
    root = ScriptedLM([cell("answer['ready'] = True"), done("None")])
    result = rlm(root).completion("text")
    assert (result.answer, result.stop_reason) == (None, "answered")
    assert "None" in told(root)


def test_a_native_tool_call_is_a_cell():
    from rlm_runtime.lms.base import ToolCall

    call = ToolCall(
        id="1", name="python", arguments={"code": "answer['content'] = 7; answer['ready'] = True"}
    )
    assert rlm([Reply(tool_calls=(call,))]).completion("text").answer == 7


# -- limits ----------------------------------------------------------------------------------------
def test_the_turn_limit_asks_once_more():
    root = ScriptedLM([cell("print(1)"), cell("print(2)"), "My best guess is 5."])
    result = rlm(root, budget={"turns": 2}).completion("text")
    assert (result.answer, result.stop_reason, result.partial) == (
        "My best guess is 5.",
        "turns",
        True,
    )
    assert (root.count, result.turns) == (3, 2)
    assert "best answer" in told(root)


def test_an_answer_in_the_last_turn_is_an_answer():
    root = ScriptedLM([cell("print(1)"), done("5")])
    result = rlm(root, budget={"turns": 2}).completion("text")
    assert (result.answer, result.stop_reason, result.partial, root.count) == (
        5,
        "answered",
        False,
        2,
    )


@pytest.mark.parametrize(
    "budget, code",
    [
        ({"sub_calls": 1}, "rs = llm_batch(['a', 'b', 'c'])"),
        ({"consecutive_errors": 1}, "pass"),
        ({"output_tokens": 60, "reply_tokens": 30}, "rs = llm_batch(['a' * 400] * 9)"),
    ],
)
def test_an_answer_in_the_turn_that_meets_a_limit_is_an_answer(budget, code):
    result = rlm(
        [cell(f"{code}\nanswer.update(content='got it', ready=True)")], budget=budget
    ).completion("text")
    assert (result.answer, result.stop_reason, result.partial) == ("got it", "answered", False)


def test_consecutive_errors_count_cells_and_start_again_after_a_good_one():
    root = ScriptedLM(
        [cell("1/0"), cell("2/0"), cell("print(1)"), cell("3/0"), "prose", cell("4/0"), "the end"]
    )
    result = rlm(root, budget={"consecutive_errors": 3}).completion("text")
    assert (result.stop_reason, result.answer, result.turns) == (
        "budget:consecutive_errors",
        "the end",
        6,
    )


def test_the_last_call_may_answer_in_code():
    result = rlm([cell("x = 4"), done("x + 1")], budget={"turns": 1}).completion("text")
    assert (result.answer, result.stop_reason, result.partial) == (5, "turns", True)


def test_without_a_last_call_the_best_there_was_is_returned():
    script = [cell("answer['content'] = 'a draft'"), LMError("gone", kind="server")]
    result = rlm(script, budget={"turns": 1}).completion("text")
    assert (result.answer, result.stop_reason, result.partial) == ("a draft", "turns", True)
    assert "gone" in result.error


def test_seconds_stop_a_cell_and_ask_once_more():
    root = ScriptedLM([cell("answer['content'] = 'half'\nwhile True: pass"), "whole"])
    result = rlm(root, budget={"seconds": 0.2}).completion("text")
    assert (result.answer, result.stop_reason, result.partial) == ("whole", "budget:seconds", True)


def test_seconds_stop_a_model_that_does_not_answer():
    root = ScriptedLM(
        lambda m: "the end" if "The run ends" in m[-1].content else asyncio.sleep(60), name="slow"
    )
    result = rlm(root, budget={"seconds": 0.1}).completion("text")
    assert (result.answer, result.stop_reason) == ("the end", "budget:seconds")


def test_an_answer_finished_before_the_time_ran_out_counts():
    code = "answer.update(content='in time', ready=True)\nwhile True: pass"
    result = rlm([cell(code)], budget={"seconds": 0.2}).completion("text")
    assert (result.answer, result.stop_reason, result.partial) == ("in time", "answered", False)


# -- structured answers ----------------------------------------------------------------------------
class Count(BaseModel):
    word: str
    times: int


def test_a_wrong_answer_goes_back_to_the_model():
    root = ScriptedLM(
        [
            done("{'word': 'a'}"),
            done("{'word': 'a', 'times': 'many'}"),
            done("{'word': 'a', 'times': 3}"),
        ]
    )
    result = rlm(root).completion("text", output=Count)
    assert result.answer == Count(word="a", times=3)
    assert "times" in told(root, 1) and "not accepted" in told(root, 2)


def test_an_answer_that_never_fits_never_reaches_the_caller():
    root = ScriptedLM([done("'three'")], repeat_last=True)
    result = rlm(root, budget={"turns": 2}).completion("text", output=int)
    assert (result.answer, result.partial, result.stop_reason) == (None, True, "turns")
    assert result.text == "three" and "schema" in result.error


def test_the_last_call_is_held_to_the_schema_too():
    script = [cell("print(1)"), "It is five, I think.", '{"n": 5}']
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    result = rlm(script, budget={"turns": 1}).completion("text", output=schema)
    assert (result.answer, result.partial) == ({"n": 5}, True)


def test_an_answer_in_prose_is_held_to_the_schema():
    result = rlm([cell("print(1)"), "FINAL(5)"]).completion("text", output=int)
    assert result.answer == 5


# -- failures --------------------------------------------------------------------------------------
def test_a_model_that_fails_at_once_raises_with_the_record():
    with pytest.raises(LMError, match="no such key") as e:
        rlm([LMError("no such key", kind="auth", status=401)]).completion("text")
    assert e.value.kind == "auth"
    assert e.value.result.stop_reason == "error" and types(e.value.result)[-1] == "run_end"


def test_a_model_that_fails_later_leaves_what_there_is():
    result = rlm(
        [cell("answer['content'] = 'a draft'"), LMError("down", kind="connection")]
    ).completion("text")
    assert (result.answer, result.stop_reason, result.partial, result.error) == (
        "a draft",
        "error",
        True,
        "down",
    )


def test_a_bug_in_a_model_is_a_model_error():
    def broken(messages):
        raise KeyError("oops")

    with pytest.raises(LMError, match="KeyError"):
        rlm(ScriptedLM(broken)).completion("text")


def test_a_broken_environment_is_an_error_with_a_record():
    from rlm.fake_environment import FakeEnvironment

    class Broken(FakeEnvironment):
        async def run(self, code, handler):
            raise OSError("no process")

    with pytest.raises(Exception, match="no process") as e:
        rlm([cell("1")], environment=Broken).completion("text")
    assert types(e.value.result)[-1] == "run_end"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_depth": -1}, "max_depth"),
        ({"budget": {"dollars": 1}}, "dollars"),
        ({"budget": {"usd": 1}}, "price"),
        ({"concurrency": 0}, "concurrency"),
        ({"compact_at": 3}, "compact_at"),
        ({"tools": {"context": 1}}, "context"),
        ({"tools": {"print": print}}, "print"),
        ({"environment": "the moon"}, "moon"),
        ({"environment": "local", "environment_options": {"colour": 1}}, "colour"),
        ({"environment_options": {"policy": None}}, "environment_options"),
        ({"models_by_depth": {0: object()}}, "models_by_depth"),
        ({"limits": {"cell_seconds": "long"}}, "cell_seconds"),
        ({"prompt_variant": "loud"}, "loud"),
        ({"on_event": 3}, "on_event"),
    ],
)
def test_wrong_options_are_refused_at_the_door(options, words):
    with pytest.raises(UsageError, match=words):
        rlm([], **options)


def test_wrong_arguments_are_refused_at_the_door(tmp_path):
    root = ScriptedLM([])
    with pytest.raises(UsageError):
        rlm(root).completion("text", 5)
    with pytest.raises(UsageError):
        rlm(root).completion("text", output="int")
    with pytest.raises(ContextError, match=r"nowhere\.txt"):
        rlm(root).completion(tmp_path / "nowhere.txt")
    with pytest.raises(UsageError, match="language model"):
        RLM(object())
    assert root.count == 0


def test_a_failing_callback_does_not_break_the_run():
    def fail(event):
        raise RuntimeError("no")

    with pytest.warns(UserWarning, match="on_event"):
        assert rlm([done("1")], on_event=fail).completion("text").answer == 1


def test_a_disk_that_fails_is_said_and_survived(tmp_path):
    import shutil

    seen = []

    def pull_the_plug(event):
        seen.append(event)
        if event.type == "sandbox":
            shutil.rmtree(tmp_path)

    model = rlm([cell("print(1)"), done("1")], log_dir=tmp_path / "logs", on_event=pull_the_plug)
    result = model.completion("text")
    assert result.answer == 1 and "incomplete" in result.notes[0]
    assert seen[-1].type == "run_end"


def test_the_trajectory_is_on_disk(tmp_path):
    from rlm_runtime.trajectory import read

    result = rlm([cell("print(1)"), done("1")], log_dir=tmp_path).completion("text")
    assert [e.type for e in read(result.trajectory)] == types(result)
    assert result.trajectory.parent == tmp_path and result.run in result.trajectory.name


# -- sync and async --------------------------------------------------------------------------------
def test_many_runs_of_one_object_at_once():
    async def main():
        model = rlm(ScriptedLM([done("context")], repeat_last=True))
        results = await asyncio.gather(*(model.acompletion(f"text {i}") for i in range(20)))
        assert [r.answer for r in results] == [f"text {i}" for i in range(20)]

    asyncio.run(main())


def test_the_sync_api_works_inside_a_running_loop():
    async def main():
        return rlm([done("len(context)")]).completion("text").answer

    before = threading.active_count()
    assert asyncio.run(main()) == 4
    assert threading.active_count() <= before


def test_the_sync_api_works_in_threads():
    answers = {}

    def work(i):
        answers[i] = rlm([done(f"len(context) + {i}")]).completion("text").answer

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert answers == {i: 4 + i for i in range(6)}
