"""The endpoints: a blueprint for each concern."""

from pydantic import BaseModel
from quart import Response


def as_json(model: BaseModel, status: int = 200) -> Response:
    """An answer that is a model."""
    return Response(model.model_dump_json(), status, content_type="application/json")
