"""The bound on a worker's files holds wherever they lie, however long it takes to look at them, and
whatever they are."""

from __future__ import annotations

import os
import tempfile
import time

import pytest

from rlm.attacks.arena import SMALL, Arena
from rlm.attacks.test_resources import DISK
from rlm_runtime.repl import workdir

NAMELESS = [what for what in DISK if "without a name" in what.name]
MIB = 1 << 20


@pytest.fixture
def behind_a_link(tmp_path, monkeypatch):
    """The folder for temporary files is a link, as /tmp is on some systems: the kernel names files
    by its target."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "link"))


@pytest.mark.parametrize("what", NAMELESS, ids=lambda what: what.name)
def test_files_without_a_name_behind_a_link(what, behind_a_link):
    with Arena(**SMALL) as arena:
        (result,) = arena.play(what)
        assert result.status == "killed" and "MiB" in result.error.message


@pytest.mark.parametrize(
    "write", ["file.write(block)", "view[:] = block"], ids=["written", "mapped"]
)
def test_what_is_written_while_a_look_goes_on_is_bounded(write, monkeypatch):
    """Each look takes seconds; the worker is held when the disk has filled up by what it may
    use."""
    measured = workdir._measured

    def slowly(*arguments):
        time.sleep(1.5)
        return measured(*arguments)

    monkeypatch.setattr(workdir, "_measured", slowly)
    cell = f"""
import mmap, os
block = bytes(4 << 20)
for i in range(2000):
    with open(f"f{{i}}", "w+b") as file:
        file.truncate(4 << 20)
        view = mmap.mmap(file.fileno(), 0)
        {write}
        view.flush()
        view.close()
    os.write(1, b".")
"""
    with Arena(scratch=64 * MIB, cell_seconds=60.0) as arena:
        result = arena.run(cell)
        assert result.status == "killed" and "64 MiB" in result.error.message, result
        # 8,000 without a bound
        assert result.stdout.count(".") * 4 < 64 + 500, f"{result.stdout.count('.') * 4} MiB"


def test_a_watch_knows_when_a_look_cannot_wait(tmp_path, monkeypatch):
    free = [1000 * MIB]
    monkeypatch.setattr(workdir.Watch, "_free_now", lambda watch: free[0])
    watch = workdir.Watch(tmp_path, 100 * MIB, 10)
    assert watch.glance() == 100 * MIB / watch.FASTEST
    free[0] -= 60 * MIB
    assert watch.glance() == 40 * MIB / watch.FASTEST
    free[0] += 500 * MIB  # of somebody else: not the worker's gain
    assert watch.glance() == 40 * MIB / watch.FASTEST
    free[0] -= 40 * MIB
    assert watch.glance() == 0
    (tmp_path / "f").write_bytes(b"x" * 30 * MIB)
    assert watch.look(os.getpid()) is None
    assert 69 * MIB <= watch.glance() * watch.FASTEST <= 70 * MIB


def test_a_watch_counts_named_and_nameless_files_together(tmp_path):
    watch = workdir.Watch(tmp_path, 10 * MIB, 10)
    with open(tmp_path / "nameless", "w+b") as file:
        file.write(b"x" * 6 * MIB)
        file.flush()
        os.unlink(file.name)
        assert watch.look(os.getpid()) is None
        (tmp_path / "named").write_bytes(b"x" * 6 * MIB)
        assert "without a name" in watch.look(os.getpid())


def test_the_watch_of_a_folder_that_is_gone_is_quiet(tmp_path):
    watch = workdir.Watch(tmp_path / "gone", 10 * MIB, 10)
    assert watch.glance() > 0 and watch.look(os.getpid()) is None
