"""Every test of the REPL ends as it began: no process, descriptor, thread or folder more."""

from __future__ import annotations

import gc
import tempfile
import threading

import pytest

from rlm.repl import harness


@pytest.fixture(autouse=True)
def nothing_left():
    gc.collect()
    before = harness.children(), harness.descriptors(), set(harness.folders(tempfile.gettempdir()))
    threads = set(threading.enumerate())
    yield
    gc.collect()
    for thread in set(threading.enumerate()) - threads:  # one that is just ending
        thread.join(5)
    assert harness.children() <= before[0]
    assert harness.descriptors() <= before[1]
    assert set(harness.folders(tempfile.gettempdir())) <= before[2]
    assert set(threading.enumerate()) <= threads
