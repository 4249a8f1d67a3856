"""As root and as an ordinary user; and on systems where a layer of the sandbox is missing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rlm.attacks import ordinary
from rlm.attacks.arena import ROOT, X86


def as_user(module: str, *arguments: str, root: bool = False) -> dict:
    command = (sys.executable,) if root else ordinary.command()
    if isinstance(command, str):
        pytest.skip(f"no ordinary user to run as: {command}")
    run = subprocess.run(
        [*command, "-m", f"rlm.attacks.{module}", *arguments],
        env=ordinary.environment(),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_everything_holds_for_an_ordinary_user():
    """The other files run as whoever runs the tests."""
    if not ROOT:
        pytest.skip("the tests run as an ordinary user themselves")
    said = as_user("as_user")
    assert said["user"] == 65534
    assert said["attacks"] > 180
    assert said["failed"] == {}
    assert "missing" not in said["report"]


@pytest.mark.skipif(not X86, reason="system call numbers of x86-64")
@pytest.mark.parametrize("root", [True, False], ids=["as we are", "ordinary user"])
@pytest.mark.parametrize("layer", ["landlock", "seccomp", "limits", "privileges"])
def test_a_missing_layer_is_an_error_that_names_it_and_can_be_allowed(layer, root):
    if layer == "privileges" and not (root and ROOT):
        pytest.skip("an ordinary user has no privileges to drop")
    said = as_user("layers_missing", layer, root=root)
    for attempt in ("closed", "wrong name"):
        assert f"  {layer} (" in said[attempt]["error"], said
        assert (
            "no code was run" in said[attempt]["error"]
            and f"allow_missing=('{layer}'" in said["closed"]["error"]
        )
    assert said["opted out"]["said"] == "42 ping\n", said
    assert said["opted out"]["missing"] == [layer]
    assert f"{layer} missing" in said["opted out"]["line"]
