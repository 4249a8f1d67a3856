"""Code questions: answers found again by other means than the ones they were made with."""

import re

import pytest

from rlm_runtime import tasks
from rlm_runtime.errors import UsageError

SHAPES = '''"""A module."""
import os.path
import json as j
from collections import abc


class Shape:
    def area(self): return 0

    async def draw(self, canvas, *, color="red", width=2): ...


class Square(Shape):
    side = 1

    def area(self):
        def square(x):
            return x * x
        return square(self.side)
'''
OTHER = '''import json
from . import shapes


def load_everything(path, *paths, strict=True, **options):
    return json.load(open(path))


def tiny(): pass


def other_one(a, b=7, /, c="x"):
    """One more."""
    return a
'''


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    (root / "pkg").mkdir(parents=True)
    (root / "pkg" / "shapes.py").write_text(SHAPES)
    (root / "pkg" / "other.py").write_text(OTHER)
    (root / "broken.py").write_text("def :")
    (root / "latin.py").write_bytes(b"x = '\xe9'")
    (root / "test").mkdir()
    (root / "test" / "test_x.py").write_text("def not_seen(): pass\n")
    return root


def test_answers_about_a_small_tree(tree, tmp_path):
    task = tasks.get("codeqa", root=tree)
    expected = {
        "functions in the file pkg/shapes.py|are defined in the file pkg/shapes.py": 4,
        "are defined in the file pkg/other.py": 3,
        "body of the class Shape ": 2,
        "body of the class Square ": 1,
        "is the class Shape defined": "pkg/shapes.py",
        "is the class Square defined": "pkg/shapes.py",
        "function or method draw defined": "pkg/shapes.py",
        "function or method square defined": "pkg/shapes.py",
        "function or method tiny defined": "pkg/other.py",
        "function or method load_everything defined": "pkg/other.py",
        "function or method other_one defined": "pkg/other.py",
        "base class of Square": "Shape",
        "parameter color of the function or method draw": "'red'",
        "parameter width of": "2",
        "parameter strict of": "True",
        "parameter b of": "7",
        "parameter c of": "'x'",
        "parameters does the function or method draw": 4,
        "method load_everything take": 4,
        "method tiny take": 0,
        "method square take": 1,
        "method other_one take": 3,
        "module json,": 2,
        "of the file pkg/shapes.py has the most lines": "area",
        "of the file pkg/other.py has the most lines": "other_one",
    }
    seen = set()
    for seed in range(12):
        for index in range(task.per_context):
            example = task.example(520, seed=seed, index=index, folder=tmp_path / "out")
            text = example.context.read_text()
            assert "not_seen" not in text and text.count("##### file: ") == 2
            match = [k for k in expected if any(p in example.question for p in k.split("|"))]
            assert len(match) == 1, example.question
            assert example.answer == expected[match[0]], example.question
            seen.add(example.meta["kind"])
    assert len(seen) == 9


def test_scoring(tree, tmp_path):
    task = tasks.get("codeqa", root=tree)
    by_kind = {}
    for seed in range(12):
        for index in range(task.per_context):
            example = task.example(520, seed=seed, index=index, folder=tmp_path / "out")
            by_kind[example.meta["kind"]] = example
    for example in by_kind.values():
        right = str(example.answer)
        for reply in (
            right,
            f"Well.\nAnswer: {right}",
            f"**Answer: `{right}`**",
            f"answer: {right}.",
        ):
            assert task.score(example, reply) == 1.0, (example.question, reply)
        assert task.score(example, "Answer: something else") == 0.0
        assert task.score(example, f"{right} or maybe not") == 0.0
    # a number, as a run may answer
    assert task.score(by_kind["functions"], by_kind["functions"].answer) == 1.0
    assert task.score(by_kind["file_of_class"], "Answer: /abs/tree/pkg/shapes.py") == 1.0
    assert task.score(by_kind["longest"], f"Answer: {by_kind['longest'].answer}()") == 1.0


def test_the_standard_library_is_a_tree(tmp_path):
    task = tasks.get("codeqa")
    example = task.example(60_000, folder=tmp_path)
    text = example.context.read_text()
    paths = re.findall(r"^##### file: (.+)$", text, re.M)
    assert len(paths) == example.meta["files"] > 3 and paths == sorted(paths)
    assert all((task.root / p).read_text(encoding="utf-8") in text for p in paths)
    assert not any("site-packages" in p or p.startswith("test/") for p in paths)


def test_a_tree_too_small_for_the_length_says_so(tree, tmp_path):
    with pytest.raises(UsageError, match=r"holds about .* tokens"):
        tasks.get("codeqa", root=tree).example(100_000, folder=tmp_path / "out")
