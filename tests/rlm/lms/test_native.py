"""The model that comes with the package leads real runs, as root and as sub-model at once."""

import pytest

from rlm_runtime import RLM, UsageError, tasks
from rlm_runtime.lms import resolve

QUESTIONS = 8


def test_it_finds_values_that_it_has_never_seen(tmp_path):
    """Keys, values and question of the benchmark are none that it was trained on. 39 of 40 were
    right when it was shipped (docs/native.md); another XLA may round to another token."""
    pytest.importorskip("jax")
    task = tasks.get("s_niah")
    found = 0.0
    with RLM(resolve("native"), budget={"turns": 6}) as rlm:
        for index in range(QUESTIONS):
            example = task.example(8000, seed=42, index=index, folder=tmp_path)
            found += task.score(example, rlm.completion(example.context, example.question).answer)
    assert found >= QUESTIONS - 2


def test_it_is_a_name_like_any_other():
    with pytest.raises(UsageError, match="native"):
        resolve("nativ")
    with pytest.raises(UsageError, match="base_url"):
        resolve("native", base_url="http://h/v1")
