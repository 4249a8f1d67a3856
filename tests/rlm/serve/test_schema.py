"""Requests made from the server's own OpenAPI document, good and bad ones: never a 5xx, always as documented."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from rlm.serve.support import Scripted, running

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (it is in the extra dev)")

EXAMPLES = {"chat_completions": 150, "upload_file": 40}  # of each mode; the rest 15


@pytest.fixture(scope="module")
def server():
    with running(Scripted("rlm"), max_runs=64, file_seconds=5.0) as server:
        yield server


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_no_request_breaks_the_server(server, mode):
    from schemathesis.checks import not_a_server_error
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    statuses: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        name = operation.definition.raw["operationId"]
        if mode == "NEGATIVE" and not {"parameters", "requestBody"} & set(operation.definition.raw):
            continue  # nothing in it could be wrong
        strategy = operation.as_strategy(generation_mode=GenerationMode[mode])

        @bounded(EXAMPLES.get(name, 15))
        @given(strategy)
        def check(case):
            response = case.call(timeout=30)
            case.validate_response(response, checks=checks)
            statuses.setdefault(name, set()).add(response.status_code)  # noqa: B023 - used up in this round

        check()
    assert {"chat_completions", "upload_file", "get_file"} <= set(statuses)
    assert all(status < 500 for group in statuses.values() for status in group)
    if mode == "POSITIVE":
        assert 200 in statuses["get_model"] and 200 in statuses["chat_completions"], statuses
        assert 200 in statuses["upload_file"]
    assert server.request("GET", "/health")[0] == 200 and server.admission.running == 0


def bounded(examples):
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
