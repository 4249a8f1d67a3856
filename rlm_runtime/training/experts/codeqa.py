"""Questions about a source tree: parse the files with `ast`, then let the tree answer.

Names are those of real code; a file belongs to one split by the hash of its path, so the trees
share none.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from rlm_runtime import tasks
from rlm_runtime.tasks.codeqa import CodeQA
from rlm_runtime.training.expert import Expert, Problem, Say, Strategy, Turns, done, quoted
from rlm_runtime.training.splits import split_of

PARSE = (
    'import ast\nfiles = {}\nfor part in context.split("##### file: ")[1:]:\n    path, text = part.split("\\n", 1)\n'
    "    files[path] = ast.parse(text)\nprint(len(files))"
)
FUNCTIONS = "(ast.FunctionDef, ast.AsyncFunctionDef)"
NODES = "for p, t in files.items() for x in ast.walk(t)"
QUESTIONS: dict[str, str] = {
    "functions": r"in the file (\S+) with",
    "methods": r"body of the class (\w+)",
    "file_of_class": r"is the class (\w+) defined",
    "file_of_function": r"function or method (\w+) defined",
    "base": r"one base class of (\w+)\?",
    "default": r"parameter (\w+) of the function or method (\w+)\?",
    "parameters": r"function or method (\w+) take",
    "importers": r"top-level module (\w+),",
    "longest": r"method of the file (\S+) has",
}


def problem(spec: str, length: int, seed: int, index: int, split: str, folder: Path) -> Problem:
    task = tasks.get(spec)
    assert isinstance(task, CodeQA)
    task._paths = lambda: [  # type: ignore[method-assign]
        p for p in CodeQA._paths(task) if split_of(p.relative_to(task.root).as_posix()) == split
    ]
    example = task.example(length, seed=seed, index=index, folder=folder)
    return Problem(task, example, split, lambda prompt: "not found", template=example.meta["kind"])


def _code(problem: Problem) -> str:
    """Code that binds `found`."""
    kind, question = problem.example.meta["kind"], problem.example.question
    names = [quoted(g) for g in re.search(QUESTIONS[kind], question).groups()]  # type: ignore[union-attr]
    name = names[-1]
    defs = f"[(p, x) {NODES} if isinstance(x, {FUNCTIONS}) and x.name == name]"
    classes = f"[(p, x) {NODES} if isinstance(x, ast.ClassDef) and x.name == name]"
    body = {
        "functions": f"found = sum(isinstance(x, {FUNCTIONS}) for x in ast.walk(files[name]))",
        "methods": f"found = sum(isinstance(x, {FUNCTIONS}) for x in {classes}[0][1].body)",
        "file_of_class": f"found = {classes}[0][0]",
        "file_of_function": f"found = {defs}[0][0]",
        "base": f"found = {classes}[0][1].bases[0].id",
        "parameters": f"a = {defs}[0][1].args\nfound = len(a.posonlyargs + a.args + a.kwonlyargs)\n"
        "found += (a.vararg is not None) + (a.kwarg is not None)",
        "default": f"a = {defs}[0][1].args\nargs = a.posonlyargs + a.args\n"
        "pairs = list(zip(args[len(args) - len(a.defaults):], a.defaults)) + list(zip(a.kwonlyargs, a.kw_defaults))\n"
        f"found = [ast.unparse(d) for x, d in pairs if d is not None and x.arg == {names[0]}][0]",
        "importers": "found = set()\n"
        f"for p, x in [(p, x) {NODES}]:\n"
        '    if isinstance(x, ast.Import) and any(n.name.split(".")[0] == name for n in x.names):\n        found.add(p)\n'
        '    if isinstance(x, ast.ImportFrom) and x.module and not x.level and x.module.split(".")[0] == name:\n'
        "        found.add(p)\nfound = len(found)",
        "longest": f"found = max((x.end_lineno - x.lineno, x.name) for x in ast.walk(files[name]) if isinstance(x, {FUNCTIONS}))[1]",
    }[kind]
    return f"name = {name}\n{body}"


def tree(problem: Problem, rng: random.Random) -> Turns:
    """Parse, answer from the tree, hand in."""
    yield Say(PARSE)
    yield Say(f"{_code(problem)}\n{done('found')}")


def verify(problem: Problem, rng: random.Random) -> Turns:
    """The same, with the answer printed first."""
    yield Say(PARSE)
    yield Say(f"{_code(problem)}\nprint(found)")
    yield Say(done("found"))


def recover(problem: Problem, rng: random.Random) -> Turns:
    """The whole context is no Python: it has to be split into files."""
    yield Say("import ast\ntree = ast.parse(context)\nprint(len(tree.body))", weight=0.0)
    yield from tree(problem, rng)


EXPERT = Expert(
    ("codeqa",),
    problem,
    {"tree": Strategy(tree), "verify": Strategy(verify), "recover": Strategy(recover)},
)
