"""The OpenAPI document."""

from typing import Any

import httpx
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from hsmsign.app import create_app
from hsmsign.problems import KINDS
from hsmsign.settings import Settings
from signers.registry import SIGNERS


@pytest.fixture
async def document() -> Any:
    answer = await create_app(Settings()).test_client().get("/openapi.json", headers={"Host": "localhost"})
    return await answer.get_json()


async def test_it_is_valid(document: Any) -> None:
    OpenAPIV31SpecValidator(document).validate()
    assert document["openapi"].startswith("3.1")


async def test_it_has_every_endpoint(document: Any) -> None:
    assert set(document["paths"]) == {
        "/healthz", "/readyz", "/keys", "/keys/{name}", "/keys/{name}/attestation", "/keys/{name}/sign",
        *(signer.path for signer in SIGNERS),
    }  # fmt: skip
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(ids) == len(set(ids))
    assert all(operation["summary"] and operation["tags"] for operation in operations)


async def test_forms_have_the_names_that_clients_send(document: Any) -> None:
    body = document["paths"]["/sign/swupdate"]["post"]["requestBody"]
    assert body["required"] is True
    schema = body["content"]["multipart/form-data"]["schema"]
    assert {"distro", "sw-description", "artifact", "method", "backend", "key-uri"} == set(schema["properties"])
    assert schema["required"] == ["distro"]
    assert {"type": "string", "format": "binary"} in schema["properties"]["sw-description"]["anyOf"]


async def test_artifacts_are_bytes(document: Any) -> None:
    for signer in SIGNERS:
        answer = document["paths"][signer.path]["post"]["responses"]["200"]
        schema = answer["content"]["application/octet-stream"]["schema"]
        assert schema == {"type": "string", "format": "binary"}


async def test_problems_are_described(document: Any) -> None:
    answers = document["paths"]["/sign/swupdate"]["post"]["responses"]
    told = {status for status in answers if status != "200"}
    assert told == {str(kind.status) for kind in KINDS.values()} - {"405"}
    for status, answer in answers.items():
        if status != "200":
            assert answer["content"] == {
                "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
            }
            assert "/problems/" in answer["description"]
    assert "/problems/pin-refused" in answers["503"]["description"]
    assert {"type", "title", "status", "detail", "instance", "request_id"} <= set(
        document["components"]["schemas"]["Problem"]["properties"]
    )


def test_the_service_gives_it(service: Any) -> None:
    document = httpx.get(service.url + "/openapi.json").json()
    OpenAPIV31SpecValidator(document).validate()
    assert {"/sign/tiny", "/sign/echo"} <= set(document["paths"])
    assert "a-label" in str(document["paths"]["/sign/tiny"])
