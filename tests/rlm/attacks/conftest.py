"""One arena a file for attacks that leave the REPL as it was; attacks that do not get one of their
own."""

from __future__ import annotations

import pytest

from rlm.attacks.arena import Arena


@pytest.fixture(scope="module")
def arena():
    with Arena() as made:
        yield made


@pytest.fixture(scope="module")
def open_arena():
    """The same without a sandbox: shows that an attack bites."""
    with Arena("unconfined") as made:
        yield made


@pytest.fixture(scope="module")
def timed_arena():
    with Arena(cell_seconds=0.4, grace_seconds=0.3) as made:
        yield made


@pytest.fixture(scope="module")
def small_arena():
    with Arena(memory=256 << 20, scratch=8 << 20, cell_seconds=4.0, grace_seconds=0.4) as made:
        yield made
