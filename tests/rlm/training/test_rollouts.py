"""Runs to learn from: none is lost or made twice, the best of each problem is kept; and tasks in
held-out words."""

import asyncio

import pytest

from rlm.loop_helpers import cell
from rlm_runtime.errors import UsageError
from rlm_runtime.lms.function import FunctionLM
from rlm_runtime.tasks.s_niah import SNiah
from rlm_runtime.training.experts.outside import SORRY
from rlm_runtime.training.reworded import get
from rlm_runtime.training.rollouts import Rollout, best, read, roll_out

ANSWER = f'answer["content"] = "{SORRY}"\nanswer["ready"] = True'


def lead(model, out, **options):
    tasks = options.pop("tasks", ["outside"])
    return asyncio.run(roll_out(FunctionLM(model, window=1024), tasks, 2, out=out, **options))


def test_finished_runs_are_kept_and_not_made_again(tmp_path):
    asked = []

    def model(messages, **options):
        asked.append(messages)
        return cell(ANSWER)

    def crash(run):
        if len(asked) == 2:
            raise RuntimeError("crash")

    out = tmp_path / "runs.jsonl"
    with pytest.raises(RuntimeError, match="crash"):
        lead(model, out, draws=2, concurrency=1, on_run=crash)
    with open(out, "a") as file:
        file.write('{"task": "outside", "ind')  # what a crash leaves
    runs = lead(model, out, draws=2, concurrency=1)
    assert len(asked) == 4 and [(r.index, r.draw) for r in runs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(r.score == 1 and r.turns == 1 for r in runs) and len(read(out)) == 4


def test_the_right_run_with_the_fewest_turns_is_learnt_from():
    def run(index, draw, score, turns):
        said = {"messages": [{"role": "assistant", "content": f"{index}{draw}"}], "provenance": {}}
        return Rollout(
            task="t",
            index=index,
            draw=draw,
            score=score,
            turns=turns,
            stop_reason="answered",
            conversations=(said,),
        )

    runs = [run(0, 0, 1, 3), run(0, 1, 1, 2), run(0, 2, 0, 1), run(1, 0, 0.5, 1)]
    assert [c.messages[0]["content"] for c in best(runs)] == ["01"]


def test_a_score_that_is_no_number_stops_and_loses_nothing(tmp_path, monkeypatch):
    out = tmp_path / "runs.jsonl"
    lead(lambda messages, **options: cell(ANSWER), out)
    monkeypatch.setattr(SNiah, "score", lambda self, example, reply: float("nan"))
    with pytest.raises(UsageError, match="score is nan"):
        lead(lambda messages, **options: cell(ANSWER), out, draws=2)
    assert len(read(out)) == 2


@pytest.mark.parametrize("name", ["s_niah", "absent", "injected", "outside", "verbatim"])
def test_a_task_in_held_out_words(name, tmp_path):
    task, train = get(f"{name}@heldout"), get(f"{name}@train")
    example = task.example(2000, seed=1, folder=tmp_path)
    again = task.example(2000, seed=1, folder=tmp_path / "again")
    assert example.question == again.question
    assert example.context.read_text() == again.context.read_text()
    assert example.question != train.example(2000, seed=1, folder=tmp_path / "train").question
    answer = example.answer[0] if isinstance(example.answer, list) else example.answer
    assert task.score(example, answer) == 1 and task.score(example, "?") == 0


def test_a_split_that_is_none():
    with pytest.raises(UsageError, match="train, heldout"):
        get("s_niah@test")
    with pytest.raises(UsageError, match="unknown"):
        get("nope@heldout")
