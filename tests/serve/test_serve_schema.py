"""Requests made from the server's own OpenAPI document."""

import pytest
from fuzzing import MODES, fuzz

# of each mode; the rest 5
EXAMPLES = {"completions": 40, "chat_completions": 40, "tokenize": 25, "detokenize": 25}


@pytest.mark.parametrize("mode", MODES)
def test_no_request_breaks_the_server(server, mode):
    statuses = fuzz(server, mode, EXAMPLES, 5)
    if mode == "POSITIVE":
        assert all(200 in group for group in statuses.values()), statuses
