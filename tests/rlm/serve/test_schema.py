"""Requests made from the server's own OpenAPI document."""

import pytest
from fuzzing import MODES, fuzz

from rlm.serve.support import Scripted, running

EXAMPLES = {"chat_completions": 150, "upload_file": 40, "get_file": 15}  # of each mode; the rest 15


@pytest.fixture(scope="module")
def server():
    with running(Scripted("rlm"), max_runs=64, file_seconds=5.0) as server:
        yield server


@pytest.mark.parametrize("mode", MODES)
def test_no_request_breaks_the_server(server, mode):
    statuses = fuzz(server, mode, EXAMPLES, 15)
    if mode == "POSITIVE":
        assert all(
            200 in statuses[name] for name in ("get_model", "chat_completions", "upload_file")
        ), statuses
