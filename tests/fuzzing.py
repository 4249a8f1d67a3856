"""Requests made from a server's own OpenAPI document, good and bad ones: never a 5xx, always as
documented."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from loopback import Loopback

MODES = ("POSITIVE", "NEGATIVE")


def fuzz(
    server: Loopback, mode: str, examples: Mapping[str, int], others: int
) -> dict[str, set[int]]:
    """Statuses that each operation answered with. `examples`: of these operations, `others` of the
    rest; all of those named must be there."""
    schemathesis = pytest.importorskip(
        "schemathesis", reason="schemathesis is not installed (it is in the extra dev)"
    )
    from schemathesis.checks import not_a_server_error
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    statuses: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        name = operation.definition.raw["operationId"]
        if mode == "NEGATIVE" and not {"parameters", "requestBody"} & set(operation.definition.raw):
            continue  # nothing in it could be wrong
        strategy = operation.as_strategy(generation_mode=GenerationMode[mode])

        @settings(
            max_examples=examples.get(name, others),
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def check(case):
            response = case.call(timeout=60)
            case.validate_response(response, checks=checks)
            statuses.setdefault(name, set()).add(response.status_code)  # noqa: B023 - used up in this round

        check()
    assert set(examples) <= set(statuses)
    assert all(status < 500 for group in statuses.values() for status in group)
    assert server.request("GET", "/health")[0] == 200
    server.wait_for(lambda: server.admission.running == 0, "everything has ended")
    return statuses
