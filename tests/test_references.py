"""What the code and the documents send a reader to is there: files by their path, commands by their
name."""

import re
import subprocess
from pathlib import Path

import pytest

import mor_jax
import rlm_runtime

ROOT = Path(__file__).resolve().parents[1]
TOPS = (
    "mor_jax",
    "rlm_runtime",
    "configs",
    "launch",
    "tests",
    "benchmarks",
    "notebooks",
    "docs",
    "constraints",
    "spec",
)
FILES = [
    p
    for folder in ("mor_jax", "rlm_runtime", "configs", "launch", "benchmarks", "docs")
    for p in sorted((ROOT / folder).rglob("*"))
    if p.suffix in (".py", ".md", ".sh", ".sbatch", ".yaml") and "__pycache__" not in p.parts
] + [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
PATH = re.compile(
    rf"(?<![\w/.:{{}}-])((?:{'|'.join(TOPS)})/[\w/.-]*\.(?:py|md|sh|sbatch|yaml|json|html|css|js|txt|png|ipynb))\b"
)
MODULE = re.compile(r"python -m ((?:launch|benchmarks|rlm_runtime)(?:\.\w+)*)")
OUTPUT = re.compile(r"--out[= ]\S+")  # what a command is told to write need not be there


def references(path):
    text = OUTPUT.sub("", path.read_text(encoding="utf-8", errors="replace"))
    return set(PATH.findall(text)), set(MODULE.findall(text))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_and_modules_exist(path):
    files, modules = references(path)
    missing = sorted(
        name for name in files if not (ROOT / name).exists() and not (path.parent / name).exists()
    )
    assert not missing
    for name in modules:
        place = ROOT / name.replace(".", "/")
        # "launch.NAME" and the like stand for any.
        assert (
            name.rpartition(".")[2].isupper() or place.with_suffix(".py").exists() or place.is_dir()
        ), name


@pytest.mark.parametrize("page", ["architecture.md", "glossary.md"])
def test_the_maps_name_files_that_exist(page):
    """Their paths may start below a package, or below the file named before."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rooms = [
        p for top in ("mor_jax", "rlm_runtime") for p in (ROOT / top, *(ROOT / top).rglob("*/"))
    ]
    names = set(re.findall(r"`([\w/]+/|[\w/]+\.py)`", text))
    assert len(names) > 50
    assert not [
        name for name in names if not any((room / name).exists() for room in (ROOT, *rooms))
    ]


def test_it_finds_what_is_missing():
    assert PATH.findall("see spec/jax_stack.md section 3, and `docs/pods.md`") == [
        "spec/jax_stack.md",
        "docs/pods.md",
    ]
    assert PATH.findall("https://host/docs/a.md x/docs/b.md") == []


def test_no_secret_folder_of_a_name_with_a_colon():
    """A scheme taken for a folder leaves `gs:` or `s3:` behind."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    assert not [name for name in listed.splitlines() if ":" in name]


def test_packages_and_changelog_have_one_version():
    """`setup.py` reads the version of mor_jax. rlm_runtime may not import mor_jax and has its
    own."""
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[
        1
    ]
    assert mor_jax.__version__ == rlm_runtime.__version__ == newest
