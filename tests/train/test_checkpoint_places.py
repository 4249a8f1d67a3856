"""The place of the checkpoints changes under a run: vanished, replaced by a file, read-only. One
message, nothing lost.

Full disks, removed commit markers, truncated and flipped files are in test_checkpoint.py.
"""

import os
import shutil
import subprocess

import pytest
from train.test_checkpoint import abstract, bits, make_state

from mor_jax.errors import CheckpointError
from mor_jax.train.checkpoint import Checkpointer


def test_a_vanished_directory_is_made_anew_with_a_warning(tmp_path, caplog):
    with Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, make_state(1), {})
        ckpt.wait()
        shutil.rmtree(tmp_path / "run")
        ckpt.save(2, make_state(2), {})
        ckpt.wait()
        assert f"{tmp_path / 'run'} has vanished" in caplog.text
        assert ckpt.steps() == [2]
        assert bits(ckpt.restore_latest(abstract(make_state(0))).state) == bits(make_state(2))


def test_a_file_in_its_place_is_one_message(tmp_path):
    message = (
        r"could not save step 2 to .*run.ckpt: Not a directory\. There is no earlier checkpoint"
    )
    with Checkpointer(tmp_path / "run" / "ckpt") as ckpt:
        ckpt.save(1, make_state(1), {})
        ckpt.wait()
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").write_text("")
        # at once, or from the background at the next look
        with pytest.raises(CheckpointError, match=message):
            ckpt.save(2, make_state(2), {})
            ckpt.wait()


@pytest.fixture
def becomes_read_only(tmp_path):
    """(directory, a call that makes it read-only): by a mount where we may, else by permissions."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "none", place], capture_output=True
    ).returncode
    if not mounted and os.geteuid() == 0:
        pytest.skip("root may write anywhere, and no file system can be mounted here")

    def forbid():
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        else:
            (place / "run").chmod(0o500)

    yield place, forbid
    if mounted:
        subprocess.run(["umount", "-l", place], check=True)
    elif (place / "run").exists():
        (place / "run").chmod(0o700)


def test_a_read_only_directory_is_one_message_and_keeps_what_it_holds(becomes_read_only):
    place, forbid = becomes_read_only
    with Checkpointer(place / "run") as ckpt:
        ckpt.save(1, make_state(1), {})
        ckpt.wait()
        forbid()
        message = r"could not save step 2 .*(Read-only|Permission denied).* Earlier checkpoints are intact \(steps 1\)"
        with pytest.raises(CheckpointError, match=message):
            ckpt.save(2, make_state(2), {})
            ckpt.wait()
        assert bits(ckpt.restore_latest(abstract(make_state(0))).state) == bits(make_state(1))
    with pytest.raises(
        CheckpointError,
        match=r"cannot write checkpoints to .*read-only or the permissions forbid it",
    ):
        Checkpointer(place / "run")
