"""A room imports only rooms below it (the order is the one of the plan of the house)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mor_jax"
# From the top; rooms on one line do not import each other. `errors` and the package itself are the
# ground.
ORDER = [
    ["weights"],
    ["train"],
    ["inference"],
    ["analysis"],
    ["data"],
    ["model"],
    ["nn"],
    ["kernels"],
    ["parallel"],
    ["config"],
    ["paths"],
    ["errors"],
]
LEVEL = {room: -i for i, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))

RUNTIME = ROOT / "rlm_runtime"
# From the top, as above; files of the package itself are rooms too.
RUNTIME_ORDER = [
    ["__main__"],
    ["cli"],
    ["training"],
    ["serve", "viewer", "tasks", "replay"],
    ["rlm", "mcp"],
    ["tools"],
    ["prompts", "parsing", "structured", "live", "otel"],
    ["trajectory"],
    ["repl"],
    ["budget"],
    ["context"],
    ["lms"],
    ["replies"],
    ["errors", "terminal"],
]
RUNTIME_LEVEL = {room: -i for i, rooms in enumerate(RUNTIME_ORDER) for room in rooms}
RUNTIME_FILES = sorted(RUNTIME.rglob("*.py"))
WORKER = RUNTIME / "repl" / "worker"


def imports(path: Path) -> set[str]:
    """Full dotted names of everything a file imports, wherever in it the import stands."""
    return names_in(
        path.read_text(encoding="utf-8"), path.relative_to(ROOT).with_suffix("").parts[:-1]
    )


def names_in(source: str, package: tuple[str, ...]) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            names |= {f"{module}.{a.name}" for a in node.names}
    return names


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_spelling_of_an_import_is_read():
    source = "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\ndef h():\n    from i.j import k\n"
    found = names_in(source, ("mor_jax", "model"))
    assert found == {"a.b", "c.d", "mor_jax.model.e", "mor_jax.f.g", "i.j.k"}


def test_every_room_is_in_the_plan():
    rooms = {room_of(p) for p in FILES} - {"__init__"}
    assert rooms == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    room = room_of(path)
    if room == "__init__":
        return
    for name in imports(path):
        first, *rest = name.split(".")
        if first == "mor_jax" and rest and rest[0] in LEVEL and rest[0] != room:
            assert LEVEL[rest[0]] < LEVEL[room], f"{room} imports {name}, which is above it"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_flax_only_in_nn_and_nothing_above_the_package(path):
    found = tops(path)
    assert "flax" not in found or room_of(path) == "nn"
    assert not found & {"launch", "configs", "rlm_runtime", "tests"}


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.py")), ids=name_of)
def test_commands_hold_no_model_code(path):
    assert not tops(path) & {"flax", "optax", "orbax"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.py")), ids=name_of)
def test_configs_are_data(path):
    names = {n for n in imports(path) if n.split(".")[0] != "configs"}
    # The tiny ablations read text that comes with every Python, wherever it is installed.
    standard = {"sysconfig"} if path.name == "sizes.py" else set()
    assert {n.split(".")[0] for n in names} <= {"ml_collections", "mor_jax"} | standard
    # The helper that fills in defaults reads them from the typed configuration; no configuration
    # itself does.
    allowed = (
        ("mor_jax.errors", "mor_jax.config") if path.name == "arguments.py" else ("mor_jax.errors",)
    )
    assert all(n.startswith(allowed) for n in names if n.startswith("mor_jax"))


@pytest.mark.parametrize("path", RUNTIME_FILES, ids=name_of)
def test_runtime_imports_point_down(path):
    room = path.relative_to(RUNTIME).with_suffix("").parts[0]
    if room == "__init__":
        return
    assert room in RUNTIME_LEVEL, f"{room} is not in the plan"
    for name in imports(path):
        first, *rest = name.split(".")
        if first == "rlm_runtime" and rest and rest[0] in RUNTIME_LEVEL and rest[0] != room:
            assert RUNTIME_LEVEL[rest[0]] < RUNTIME_LEVEL[room], (
                f"{room} imports {name}, which is above it"
            )


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Nodes of one circle of a graph, or []."""
    while edges:
        ends = [node for node, targets in edges.items() if not targets & edges.keys()]
        if not ends:
            walk = [next(iter(sorted(edges)))]
            while walk[-1] not in walk[:-1]:
                walk.append(min(edges[walk[-1]] & edges.keys()))
            return walk[walk.index(walk[-1]) :]
        edges = {node: targets for node, targets in edges.items() if node not in ends}
    return []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": {"elsewhere"}}) == []


@pytest.mark.parametrize("files", [FILES, RUNTIME_FILES], ids=["mor_jax", "rlm_runtime"])
def test_files_import_each_other_in_no_circle(files):
    """Imports inside functions and for type checkers count. `__init__.py` files, which collect
    names of their own package, are left out."""
    modules = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts): p
        for p in files
        if p.name != "__init__.py"
    }
    edges = {}
    for name, path in modules.items():
        found = imports(path)
        edges[name] = {
            other
            for other in modules
            if other != name and (other in found or any(f.startswith(f"{other}.") for f in found))
        }
    assert circle(edges) == []


def test_the_runtime_meets_jax_in_one_file():
    """`import rlm_runtime` needs no JAX: a checkpoint as a language model is the one place that
    does."""
    meet = {
        name_of(p)
        for p in RUNTIME_FILES
        if tops(p) & {"jax", "flax", "mor_jax", "launch", "configs"}
    }
    assert meet == {"rlm_runtime/lms/checkpoint.py"}
    code = "import sys, rlm_runtime as r; [getattr(r, n) for n in r.__all__]; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("path", sorted(WORKER.glob("*.py")), ids=name_of)
def test_the_worker_is_the_standard_library_alone(path):
    """It runs under `python -I -S`, by path, before and after it has locked itself in."""
    beside = {p.stem for p in WORKER.glob("*.py")} | {"worker"}
    for name in imports(path):
        ours = name.startswith("rlm_runtime.repl.worker") or name.split(".")[0] in beside
        assert ours or name.split(".")[0] in sys.stdlib_module_names | {
            "_frozen_importlib_external"
        }, name


def test_tensorflow_nowhere():
    for folder in ("mor_jax", "launch", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "tensorflow" not in tops(path), path
