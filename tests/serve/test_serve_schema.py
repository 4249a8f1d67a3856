"""Requests made from the server's own OpenAPI document, good and bad ones: never a 5xx, always as documented."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (it is in the extra dev)")

EXAMPLES = {"completions": 40, "chat_completions": 40, "tokenize": 25, "detokenize": 25}  # of each mode; the rest 5


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

        @settings(
            max_examples=EXAMPLES.get(name, 5), deadline=None, derandomize=True, database=None,
            phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(strategy)
        def check(case):
            response = case.call(timeout=60)
            case.validate_response(response, checks=checks)
            statuses.setdefault(name, set()).add(response.status_code)  # noqa: B023 - used up in this round

        check()
    assert set(EXAMPLES) <= set(statuses)
    assert all(status < 500 for group in statuses.values() for status in group)
    if mode == "POSITIVE":
        assert all(200 in statuses[name] for name in statuses), statuses
    assert server.request("GET", "/health")[0] == 200
    server.wait_for(lambda: server.admission.running == 0, "everything has ended")
