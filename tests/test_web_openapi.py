"""The HTTP interface is as its OpenAPI document says, whatever is sent: requests made from the document, and the document held against the code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import checks
from schemathesis.specs.openapi import checks as conformance

from edgeadapt.runtime.daemon import status, verbs
from edgeadapt.runtime.daemon.web import openapi
from edgeadapt.runtime.daemon.web.routes import FILES, ROUTES
from edgeadapt.runtime.daemon.web.server import Web
from tests.toyweb import TOKEN, Toy, serving, token_file

CHECKS = [
    checks.not_a_server_error,
    conformance.status_code_conformance,
    conformance.content_type_conformance,
    conformance.response_schema_conformance,
]
BOUNDED = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


@contextmanager
def toy_serving(folder: Path) -> Iterator[tuple[Toy, Web]]:
    toy = Toy(posts=True)
    with serving(toy, token_file(folder), linger=0.1) as web:
        yield toy, web


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in ROUTES if path != "/events"])
def test_requests_made_from_the_document_are_answered_as_it_says(path, tmp_path):
    document = openapi.description(ROUTES, FILES)
    document["paths"] = {path: document["paths"][path]}
    asked = []
    with toy_serving(tmp_path) as (_, web):
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=f"http://127.0.0.1:{web.address[1]}")
        for operation in schema.get_all_operations():
            strategy = operation.ok().as_strategy()

            @BOUNDED
            @_given(strategy)
            def answers(case: Any) -> None:
                headers = {"Authorization": f"Bearer {TOKEN}"} if ROUTES[path].writes else {}
                reply = case.call(headers=headers)
                asked.append(reply.status_code)
                case.validate_response(reply, checks=CHECKS)

            answers()
    assert asked
    assert set(asked) & {200, 202, 400}


def _given(strategy: Any) -> Any:
    from hypothesis import given

    return given(case=strategy)


def test_document_is_served_and_names_every_route_once():
    found = openapi.description(ROUTES, FILES)
    assert found["openapi"] == "3.1.0"
    assert found["info"]["version"] == openapi.VERSION
    assert set(found["paths"]) == set(ROUTES)
    names = [operation["operationId"] for methods in found["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))
    for path, route in ROUTES.items():
        operations = found["paths"][path]
        assert set(operations) == ({"get", "head"} if route.method == "GET" else {"post"})
        assert all(("security" in one) == route.writes for one in operations.values())


def test_status_has_every_key_of_its_types():
    schema = openapi.description(ROUTES, FILES)["components"]["schemas"]["Status"]
    assert set(schema["required"]) == set(status.Status.__annotations__) == set(schema["properties"])
    assert schema["properties"]["mode"] == {"enum": ["starting", "serving", "safe", "stopping"]}
    assert schema["properties"]["queue"]["properties"]["length"] == {"type": "integer"}
    assert {"type": "null"} in schema["properties"]["guard"]["anyOf"]


def test_parameters_are_those_of_the_verbs():
    paths = openapi.description(ROUTES, FILES)["paths"]
    for name, verb in verbs.VERBS.items():
        if verb.writes:
            body = paths[f"/api/{name}"]["post"]["requestBody"]
            schema = body["content"]["application/json"]["schema"]
            assert set(schema["properties"]) == set(verb.parameters)
            assert schema["additionalProperties"] is False
            assert schema.get("required", []) == [key for key, parameter in verb.parameters.items() if parameter.needed]
