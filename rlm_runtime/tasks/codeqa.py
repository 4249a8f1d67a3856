"""Questions about a real source tree whose answers the syntax trees give: the standard library of
the running Python, or any folder of Python files.

Bound to what is installed: two interpreters ask about different trees. `meta["tree"]` is a hash of
what was read.
"""

from __future__ import annotations

import ast
import hashlib
import math
import random
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlm_runtime.errors import UsageError
from rlm_runtime.tasks.base import Example, Ruler, Task, text_of, writing

SKIPPED = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "node_modules",
}
LARGEST = 1 << 20  # bytes of a file
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef
Made = tuple[str, str, Any]  # kind, question, answer


@dataclass
class SourceFile:
    path: str
    text: str
    tree: ast.Module
    functions: list[Function] = field(default_factory=list)
    classes: list[ast.ClassDef] = field(default_factory=list)

    def __post_init__(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, FUNCTIONS):
                self.functions.append(node)
            elif isinstance(node, ast.ClassDef):
                self.classes.append(node)


class CodeQA(Task):
    """Knobs: `root`: the folder (default: the standard library, tests left out); `tests`: tests and
    the rest as well."""

    name = "codeqa"
    tips = (
        "The context holds Python files, each after a line with its path. Split it into files, parse each with the module "
        "ast, and answer from the syntax trees: ast.walk finds calls, definitions and imports that a search for text "
        "confuses. No model call is needed."
    )
    per_context = 10
    bounded = True

    def __init__(self, *, root: str | Path | None = None, tests: bool = False):
        self.root = Path(root or sysconfig.get_paths()["stdlib"])
        self.tests = bool(tests)
        # the questions about one tree come one after the other
        self._last: tuple[Any, list[SourceFile]] = (None, [])
        if not self.root.is_dir():
            raise UsageError(f"{self.name}: root={str(root)!r} is not a folder.")

    def _build(self, length: int, seed: int, index: int, folder: Path, ruler: Ruler) -> Example:
        number, which = divmod(index, self.per_context)
        sources = self._chosen(length, seed, number, ruler)
        path = self.file(folder, length, seed, index)
        digest = hashlib.sha256()
        with writing(path) as file:
            for source in sources:
                framed = _framed(source.path, source.text)
                digest.update(framed.encode())
                file.write(framed)
        kind, question, answer = self._questions(sources, length, seed, number)[which]
        meta = {
            "length": length,
            "seed": seed,
            "index": index,
            "kind": kind,
            "files": len(sources),
            "tree": digest.hexdigest(),
        }
        return Example(
            f"{self.name}-{length}-{seed}-{index}", path, f"{question} {FORM}", answer, INTRO, meta
        )

    def _chosen(self, length: int, seed: int, number: int, ruler: Ruler) -> list[SourceFile]:
        """Files at random until the length is full, sorted by path."""
        key = (length, seed, number, ruler.tokens)
        if self._last[0] == key:
            return self._last[1]
        paths = self._paths()
        self.rng(*key[:3]).shuffle(paths)
        room = length - self.reply_tokens - 120
        sources, used = [], 0.0
        for path in paths:
            if used > 0.97 * room:
                break
            text = self._text(path)
            cost = ruler(_framed(path.name, text)) if text else math.inf
            # one file alone is no tree; a smaller one may fit
            if cost > 0.6 * room or used + cost > room:
                continue
            source = self._read(path, text)
            if source is not None:
                sources.append(source)
                used += ruler(_framed(source.path, text))
        if len(sources) < 2:
            raise self.too_short(length, 4000)
        if used < 0.5 * room:
            raise UsageError(
                f"{self.name}: {self.root} holds about {used:,.0f} tokens of Python, {length:,} were asked for. Give a larger "
                "tree (root=...), or include the tests (tests=true)."
            )
        sources.sort(key=lambda s: s.path)
        self._last = (key, sources)
        return sources

    def score(self, example: Example, reply: Any) -> float:
        """1 for the answer, quotes, backticks and a call's brackets aside."""
        said = text_of(reply).strip()
        if "answer:" in said.lower():
            said = said[said.lower().rindex("answer:") + len("answer:") :]
        quoted = said.strip().strip("*` .")
        said = quoted.strip("'\"").removesuffix("()")
        true = str(example.answer)
        if example.meta["kind"].startswith("file"):
            return float(said == true or said.endswith("/" + true))
        if example.meta["kind"] == "default":
            # True is not 1 here, and '1' is not 1
            return float(true in (repr(_literal(quoted)), repr(said)))
        return float(said == true)

    def _paths(self) -> list[Path]:
        skipped = set() if self.tests else SKIPPED
        found = []
        for path in sorted(self.root.rglob("*.py")):
            parts = path.relative_to(self.root).parts
            packages = {"site-packages", "dist-packages"}
            if (
                not skipped.intersection(parts)
                and not packages.intersection(parts)
                and path.stat().st_size <= LARGEST
            ):
                found.append(path)
        return found

    def _text(self, path: Path) -> str:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""
        return "" if MARK in text else text.strip() and text

    def _read(self, path: Path, text: str) -> SourceFile | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the sources' own escapes
                return SourceFile(path.relative_to(self.root).as_posix(), text, ast.parse(text))
        except (SyntaxError, ValueError, RecursionError):
            return None

    def _questions(
        self, sources: list[SourceFile], length: int, seed: int, number: int
    ) -> list[Made]:
        rng = self.rng(length, seed, number, "questions")
        out: list[Made] = []
        for attempt in range(400 * self.per_context):
            made = MAKERS[attempt % len(MAKERS)](rng, sources)
            if made is not None and made not in out:
                out.append(made)
            if len(out) == self.per_context:
                return out
        while len(out) < self.per_context:
            out.append(_functions_in(rng, sources))
        return out


MARK = "##### file: "
INTRO = (
    "The following is a source tree in one text: in front of each file stands a line with its path."
)
FORM = "Answer with the last line of your reply in the form 'Answer: X'."


def _framed(path: str, text: str) -> str:
    return f"{MARK}{path}\n{text}" + ("" if text.endswith("\n") else "\n")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _single(names: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    counts = Counter(name for name, _ in names)
    return [pair for pair in names if counts[pair[0]] == 1]


Maker = Callable[[random.Random, list[SourceFile]], Made | None]


def _functions_in(rng: random.Random, sources: list[SourceFile]) -> Made:
    source = rng.choice(sources)
    question = f"How many functions are defined in the file {source.path} with def or async def, methods and nested functions included?"
    return "functions", question, len(source.functions)


def _methods_of(rng: random.Random, sources: list[SourceFile]) -> Made | None:
    classes = _single([(c.name, c) for s in sources for c in s.classes])
    if not classes:
        return None
    name, node = rng.choice(classes)
    count = sum(isinstance(n, FUNCTIONS) for n in node.body)
    return (
        "methods",
        f"How many methods are defined directly in the body of the class {name} (def or async def)?",
        count,
    )


def _file_of_class(rng: random.Random, sources: list[SourceFile]) -> Made | None:
    classes = _single([(c.name, s.path) for s in sources for c in s.classes])
    if not classes:
        return None
    name, path = rng.choice(classes)
    return "file_of_class", f"In which file is the class {name} defined? Give its path.", path


def _file_of_function(rng: random.Random, sources: list[SourceFile]) -> Made | None:
    functions = _single([(f.name, s.path) for s in sources for f in s.functions])
    if not functions:
        return None
    name, path = rng.choice(functions)
    return (
        "file_of_function",
        f"In which file is the function or method {name} defined? Give its path.",
        path,
    )


def _base_of(rng: random.Random, sources: list[SourceFile]) -> Made | None:
    classes = _single([(c.name, c) for s in sources for c in s.classes])
    classes = [(n, c) for n, c in classes if len(c.bases) == 1 and isinstance(c.bases[0], ast.Name)]
    if not classes:
        return None
    name, node = rng.choice(classes)
    return "base", f"Which class is the one base class of {name}?", node.bases[0].id


def _default_of(rng: random.Random, sources: list[SourceFile]) -> Made | None:
    functions = _single([(f.name, f) for s in sources for f in s.functions])
    found = []
    for name, node in functions:
        positional = [*node.args.posonlyargs, *node.args.args]
        pairs = list(
            zip(
                positional[len(positional) - len(node.args.defaults) :],
                node.args.defaults,
                strict=True,
            )
        )
        pairs += [
            (a, d)
            for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            if d is not None
        ]
        found += [
            (name, a.arg, d.value)
            for a, d in pairs
            if isinstance(d, ast.Constant)
            and isinstance(d.value, int | str | None)
            and d.value not in (None, "")
        ]
    if not found:
        return None
    name, argument, value = rng.choice(found)
    question = f"What is the default value of the parameter {argument} of the function or method {name}? Write it as in Python."
    return "default", question, repr(value)


def _parameters_of(rng: random.Random, sources: list[SourceFile]) -> Made | None:
    functions = _single([(f.name, f) for s in sources for f in s.functions])
    if not functions:
        return None
    name, node = rng.choice(functions)
    a = node.args
    count = (
        len(a.posonlyargs)
        + len(a.args)
        + len(a.kwonlyargs)
        + (a.vararg is not None)
        + (a.kwarg is not None)
    )
    question = (
        f"How many parameters does the function or method {name} take? Count all of them: self or cls, keyword-only ones, *args "
        "and **kwargs as well."
    )
    return "parameters", question, count


def _importers_of(rng: random.Random, sources: list[SourceFile]) -> Made | None:
    importers: dict[str, set[str]] = {}
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importers.setdefault(alias.name.split(".")[0], set()).add(source.path)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                importers.setdefault(node.module.split(".")[0], set()).add(source.path)
    names = sorted(n for n, paths in importers.items() if len(paths) >= 2)
    if not names:
        return None
    name = rng.choice(names)
    question = (
        f"How many files import the top-level module {name}, anywhere in the file, as 'import {name}', 'import {name}.x' or "
        f"'from {name} import ...' (relative imports do not count)?"
    )
    return "importers", question, len(importers[name])


def _longest_in(rng: random.Random, sources: list[SourceFile]) -> Made | None:
    source = rng.choice(sources)
    lengths = sorted(
        (((f.end_lineno or f.lineno) - f.lineno + 1, f.name) for f in source.functions),
        reverse=True,
    )
    if len(lengths) < 3 or lengths[0][0] == lengths[1][0]:
        return None
    question = (
        f"Which function or method of the file {source.path} has the most lines, counted from its line with def to its last "
        "line, decorators left out? Give its name alone."
    )
    return "longest", question, lengths[0][1]


MAKERS: tuple[Maker, ...] = (
    _functions_in,
    _file_of_class,
    _methods_of,
    _default_of,
    _importers_of,
    _base_of,
    _file_of_function,
    _parameters_of,
    _longest_in,
)
