"""Errors become problem documents (RFC 9457), each of a stable type.

`KINDS` is the whole table: which error answers with which status and type.
"""

from dataclasses import dataclass
from http import HTTPStatus

from pydantic import BaseModel, Field, ValidationError
from quart import Quart, Response
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound

from hsmsign import log
from hsmsign.asgi import ClientDisconnected, current_request
from tokens.errors import (
    ArtifactChanged,
    ArtifactNotFound,
    ArtifactRejected,
    Error,
    KeyAmbiguous,
    KeyLocked,
    KeyMismatch,
    KeyNotAttested,
    KeyNotFound,
    KeyNotGranted,
    KeyUnsuited,
    KeyUnusable,
    LocationNotAllowed,
    LogFull,
    PinRefused,
    ProviderBusy,
    ProviderRefused,
    ProviderTimeout,
    ProviderUnavailable,
    SignatureMismatch,
    SigningFailed,
    StoreFailed,
    ToolFailed,
    ToolTimeout,
    ToolUnavailable,
)


class RequestError(Error):
    """The request cannot be served as it is; the HTTP side's own errors."""


class InvalidRequest(RequestError):
    """A field is missing, doubled or malformed, or the body is no form; `fields` says which field and why."""

    def __init__(self, message: str, hint: str = "", fields: tuple["FieldProblem", ...] = ()) -> None:
        super().__init__(message, hint)
        self.fields = fields


class ForeignHost(RequestError):
    """The Host header is none of this server's names."""


class CrossSite(RequestError):
    """A browser sends this for a page of another site."""


class UploadTooSlow(RequestError):
    """The upload came too slowly, or took too long."""


class TooLarge(RequestError):
    """The body, a field or the number of fields is over its limit."""


class UnsupportedMediaType(RequestError):
    """The body is not of the type that the endpoint takes."""


class NotNow(RequestError):
    """The service cannot take this on at the moment; `retry_after` (seconds) says when to try again."""

    retry_after = 5


class TooManyJobs(NotNow):
    """As many jobs as may run at once are running."""


class Stopping(NotNow):
    """The service is stopping."""


class SpoolFull(NotNow):
    """There is no room for the upload."""


class JobTimeout(RequestError):
    """Signing took longer than a job may."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of problem: its status, the last part of its URI reference, and its title."""

    status: int
    slug: str
    title: str

    @property
    def type(self) -> str:
        """The URI reference."""
        return f"/problems/{self.slug}"


KINDS: dict[type[Exception], Kind] = {
    ClientDisconnected: Kind(400, "disconnected", "The client left"),
    InvalidRequest: Kind(400, "invalid-request", "The request is not valid"),
    ForeignHost: Kind(403, "foreign-host", "The Host header names another server"),
    CrossSite: Kind(403, "cross-site", "The request comes from another site"),
    KeyNotGranted: Kind(403, "key-not-granted", "The key is not granted"),
    KeyNotAttested: Kind(403, "key-not-attested", "The key is not attested"),
    LocationNotAllowed: Kind(403, "location-not-allowed", "Artifacts at this place may not be signed"),
    KeyNotFound: Kind(404, "key-not-found", "There is no such key"),
    ArtifactNotFound: Kind(404, "artifact-not-found", "There is no such artifact"),
    NotFound: Kind(404, "no-such-endpoint", "There is no such endpoint"),
    MethodNotAllowed: Kind(405, "method-not-allowed", "The endpoint has another method"),
    UploadTooSlow: Kind(408, "upload-too-slow", "The upload is too slow"),
    KeyAmbiguous: Kind(409, "key-ambiguous", "More than one key matches"),
    ArtifactChanged: Kind(409, "artifact-changed", "The artifact changed while it was signed"),
    TooLarge: Kind(413, "too-large", "The request is too large"),
    UnsupportedMediaType: Kind(415, "unsupported-media-type", "The body is of another type"),
    ArtifactRejected: Kind(422, "artifact-rejected", "The artifact cannot be signed"),
    KeyUnsuited: Kind(422, "key-unsuited", "The key does not suit the request"),
    KeyLocked: Kind(423, "key-locked", "The key is locked"),
    KeyUnusable: Kind(500, "key-unusable", "The key cannot be used"),
    KeyMismatch: Kind(500, "key-mismatch", "The key is not the expected one"),
    SignatureMismatch: Kind(500, "signature-mismatch", "What was signed does not verify"),
    SigningFailed: Kind(500, "signing-failed", "The signature could not be made"),
    ToolFailed: Kind(500, "tool-failed", "The signing tool failed"),
    Exception: Kind(500, "internal-error", "The service failed"),
    ToolUnavailable: Kind(501, "tool-unavailable", "The signing tool is not installed"),
    StoreFailed: Kind(502, "store-failed", "The artifact could not be read or replaced"),
    ProviderRefused: Kind(502, "provider-refused", "The key's provider refuses the service"),
    ProviderUnavailable: Kind(503, "provider-unavailable", "The key's provider cannot be used now"),
    ProviderBusy: Kind(503, "provider-busy", "The key's provider is busy"),
    PinRefused: Kind(503, "pin-refused", "The token refused the PIN"),
    LogFull: Kind(503, "log-full", "The token's audit log is full"),
    TooManyJobs: Kind(503, "too-many-jobs", "Too many jobs are running"),
    Stopping: Kind(503, "stopping", "The service is stopping"),
    SpoolFull: Kind(503, "spool-full", "There is no room for the upload"),
    ProviderTimeout: Kind(504, "provider-timeout", "The key's provider did not answer in time"),
    ToolTimeout: Kind(504, "tool-timeout", "The signing tool took too long"),
    JobTimeout: Kind(504, "job-timeout", "Signing took too long"),
}


class FieldProblem(BaseModel):
    """What is wrong with one field of the request."""

    field: str
    detail: str


class ErrorDocument(BaseModel):
    """What is known of an error without a request: also a part of what `/readyz` and `/keys` answer."""

    type: str = Field(description="URI reference of the type; it never changes.")
    title: str
    detail: str | None = Field(None, description="What happened.")
    hint: str | None = Field(None, description="What to do next.")


class Problem(ErrorDocument):
    """A problem document (RFC 9457)."""

    status: int
    instance: str = Field(description="The path of the request.")
    request_id: str = Field(description="The id by which the service's log knows the request.")
    fields: list[FieldProblem] | None = Field(None, description="The fields at fault, where there are any.")


def invalid_fields(error: ValidationError) -> InvalidRequest:
    """The error that names the fields at fault, and repeats none of their values."""
    mistakes = error.errors(include_url=False, include_context=False, include_input=False)
    return invalid(
        *(
            FieldProblem(
                field=".".join(str(part) for part in mistake["loc"]),
                detail=mistake["msg"].removeprefix("Value error, "),
            )
            for mistake in mistakes
        )
    )


def invalid(*problems: FieldProblem) -> InvalidRequest:
    """The error that says what is wrong with these fields."""
    return InvalidRequest(
        "; ".join(f"{problem.field}: {problem.detail}" if problem.field else problem.detail for problem in problems),
        "Correct the request; /openapi.json describes its fields.",
        problems,
    )


def kind_of(error: Exception) -> Kind:
    """The type of problem that an error is."""
    return next(KINDS[class_] for class_ in type(error).__mro__ if class_ in KINDS)


def describe(error: Error) -> ErrorDocument:
    """An error in words."""
    kind = kind_of(error)
    return ErrorDocument(type=kind.type, title=kind.title, detail=error.message, hint=error.hint or None)


def register(app: Quart) -> None:
    """Makes every error of the app a problem document."""
    app.register_error_handler(Error, _refuse)
    app.register_error_handler(HTTPException, _refuse_by_framework)
    app.register_error_handler(Exception, _fail)


async def _refuse(error: Error) -> Response:
    fields = error.fields if isinstance(error, InvalidRequest) else ()
    response = _answer(kind_of(error), error.message, error.hint, fields)
    if isinstance(error, ProviderUnavailable | NotNow):
        response.headers["Retry-After"] = str(error.retry_after)
    return response


async def _refuse_by_framework(error: HTTPException) -> Response:
    kind = KINDS.get(type(error))
    if kind is None:
        status = HTTPStatus(error.code or 500)
        kind = Kind(status, status.phrase.lower().replace(" ", "-"), status.phrase)
    response = _answer(kind, None, "See /openapi.json for the endpoints.")
    if isinstance(error, MethodNotAllowed) and error.valid_methods:
        response.headers["Allow"] = ", ".join(error.valid_methods)
    return response


async def _fail(error: Exception) -> Response:
    log.logger.error("unexpected error", request_id=current_request().id, exc_info=error)
    return _answer(KINDS[Exception], None, "Look for the request's id in the service's log.")


def _answer(kind: Kind, detail: str | None, hint: str, fields: tuple[FieldProblem, ...] = ()) -> Response:
    log.note(problem=kind.slug)
    request = current_request()
    problem = Problem(
        type=kind.type,
        title=kind.title,
        status=kind.status,
        detail=detail,
        hint=hint or None,
        instance=request.target,
        request_id=request.id,
        fields=list(fields) or None,
    )
    return Response(problem.model_dump_json(exclude_none=True), kind.status, content_type="application/problem+json")
