"""What `/openapi.json` says beyond quart-schema: artifacts are bytes, and errors are problem documents."""

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel
from quart_schema import OpenAPIProvider, document_response
from werkzeug.routing.rules import Rule

from hsmsign.problems import KINDS, Problem

T = TypeVar("T", bound=Callable[..., Any])

COMPONENTS = "#/components/schemas/{model}"


class Artifact(BaseModel):
    """The signed artifact."""


def problems(*statuses: int) -> Callable[[T], T]:
    """Documents the statuses by which an endpoint answers with a problem document."""

    def decorate(function: T) -> T:
        for status in statuses:
            document_response(Problem, status)(function)
        return function

    return decorate


class Provider(OpenAPIProvider):
    """Builds the document."""

    def build_paths(self, rule: Rule) -> tuple[dict[str, Any], dict[str, Any]]:
        """Says that bodies are required, and which problems each status stands for."""
        paths, components = super().build_paths(rule)
        for operation in (operation for path in paths.values() for operation in path.values()):
            if "requestBody" in operation:
                operation["requestBody"]["required"] = True
            for status, response in operation["responses"].items():
                if "application/problem+json" in response["content"]:
                    response["description"] = "; ".join(
                        f"{kind.title} (`{kind.type}`)" for kind in KINDS.values() if kind.status == status
                    )
        return paths, components

    def build_response_object(self, model: Any, headers_model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Gives artifacts and problems their media types."""
        if model is Artifact:
            content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
            return {"description": "The signed artifact.", "content": content}, {}
        if model is Problem:
            schema = Problem.model_json_schema(ref_template=COMPONENTS, mode="serialization")
            definitions = schema.pop("$defs", {})
            content = {"application/problem+json": {"schema": {"$ref": COMPONENTS.format(model="Problem")}}}
            return {"description": "", "content": content}, {"Problem": schema, **definitions}
        return super().build_response_object(model, headers_model)
