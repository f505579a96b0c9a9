"""A request's body becomes a form: its files are streamed to the job's files, with limits on everything.

Files are stored under names of our own. Whatever is wrong is told apart in `hsmsign.problems`.
"""

import asyncio
from functools import cache
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar, get_args

from multipart import (
    MultipartError,
    MultipartSegment,
    ParserLimitReached,
    PushMultipartParser,
    parse_options_header,
)
from pydantic import ValidationError

from hsmsign import log
from hsmsign.asgi import Body, Request
from hsmsign.jobs import Job
from hsmsign.problems import (
    FieldProblem,
    InvalidRequest,
    TooLarge,
    UnsupportedMediaType,
    UploadTooSlow,
    invalid,
    invalid_fields,
)
from hsmsign.settings import LimitSettings
from signers.signer import Form, Upload
from tokens.errors import ArtifactRejected

WRITE_BYTES = 1024 * 1024
"""How much of an upload is held in memory before a thread writes it."""

SMALL_BYTES = 64 * 1024
"""Files up to this size stay in memory: writing them would cost more than most signatures."""

FILENAME_MAX = 255
"""How much of a file's name is kept, in characters."""

F = TypeVar("F", bound=Form)


def boundary(request: Request, limits: LimitSettings) -> bytes:
    """The boundary of a multipart request, from its headers alone.

    Raises UnsupportedMediaType, InvalidRequest, TooLarge.
    """
    media_type, options = parse_options_header(request.headers.get("Content-Type", ""))
    if media_type != "multipart/form-data":
        raise UnsupportedMediaType(
            "The body is not multipart/form-data.", "Send the fields as a form, as curl does with -F."
        )
    boundary: str = options.get("boundary", "")
    if not boundary:
        raise InvalidRequest("The Content-Type names no boundary.", "Let the HTTP client write the Content-Type.")
    if (request.content_length or 0) > limits.upload_max_bytes:
        raise _too_large(limits.upload_max_bytes)
    return boundary.encode("latin-1", "replace")


async def receive(body: Body, boundary: bytes, form: type[F], job: Job[Any], limits: LimitSettings) -> F:
    """Reads the body to its end and makes the form of it.

    Raises InvalidRequest, TooLarge, UploadTooSlow, SpoolFull, ArtifactRejected (an empty file), ClientDisconnected.
    """
    parts = _Parts(form, job, limits)
    parser = PushMultipartParser(boundary, max_segment_count=limits.fields_max)
    try:
        async for chunk in Limited(body, limits.upload_max_bytes, limits):
            for event in parser.parse(chunk):
                await parts.handle(event)
        parser.close()
    except ParserLimitReached as error:
        raise TooLarge(f"The form is too large: {error}.", "Send fewer fields, with shorter headers.") from None
    except MultipartError as error:
        raise InvalidRequest(f"The form is broken: {error}.", "Send the whole form, as curl does with -F.") from None
    return parts.form()


class Limited:
    """The chunks of a body, as long as it is not too large and does not come too slowly.

    Raises TooLarge, UploadTooSlow, ClientDisconnected.
    """

    def __init__(self, body: Body, max_bytes: int, limits: LimitSettings) -> None:
        self._body = body
        self._max_bytes = max_bytes
        self._limits = limits
        self._start = asyncio.get_running_loop().time()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            async with asyncio.timeout_at(self._start + _time_for(self._body.received, self._limits)):
                chunk = await anext(self._body)
        except TimeoutError:
            raise UploadTooSlow(
                f"The upload came at less than {self._limits.upload_min_bytes_per_s} bytes/s,"
                f" or took more than {self._limits.upload_timeout_s:g} s.",
                "Send it over a faster connection.",
            ) from None
        if self._body.received > self._max_bytes:
            raise _too_large(self._max_bytes)
        return chunk


def _time_for(received: int, limits: LimitSettings) -> float:
    """How many seconds after its start an upload must have gone on from `received` bytes."""
    if not limits.upload_min_bytes_per_s:
        return limits.upload_timeout_s
    return min(limits.upload_timeout_s, limits.upload_grace_s + received / limits.upload_min_bytes_per_s)


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(
        f"The request is larger than {max_bytes} bytes.", "Send less, or raise the limit in the server's settings."
    )


class _Part(Protocol):
    """One part of the body, while it comes."""

    async def write(self, chunk: bytes) -> None: ...

    async def end(self) -> str | Upload | None: ...


class _Ignored:
    """A part of a name that the form does not know."""

    async def write(self, chunk: bytes) -> None:
        pass

    async def end(self) -> None:
        pass


class _Text:
    """A text field."""

    def __init__(self, name: str, max_bytes: int) -> None:
        self._name = name
        self._max_bytes = max_bytes
        self._value = bytearray()

    async def write(self, chunk: bytes) -> None:
        self._value += chunk
        if len(self._value) > self._max_bytes:
            raise TooLarge(f"The field {self._name} is longer than {self._max_bytes} bytes.", "Send a shorter value.")

    async def end(self) -> str | None:
        try:
            # clients send an empty field for an option that is not set
            return self._value.decode() or None
        except UnicodeDecodeError:
            raise _invalid(self._name, "It is not UTF-8.") from None


class _File:
    """A file: it stays in memory as long as it is small, then goes to the job's files."""

    def __init__(self, name: str, filename: str, job: Job[Any]) -> None:
        self._name = name
        self._filename = filename[:FILENAME_MAX]
        self._job = job
        self._path: Path | None = None
        self._held = bytearray()
        self._written = 0

    async def write(self, chunk: bytes) -> None:
        self._held += chunk
        if len(self._held) >= WRITE_BYTES:
            await self._write()

    async def end(self) -> Upload:
        if not self._written and not self._held:
            raise ArtifactRejected(f"The file {self._name} is empty.", "Send the artifact that the build made.")
        if self._path is None and len(self._held) <= SMALL_BYTES:
            return Upload(bytes(self._held), self._filename, len(self._held))
        return Upload(await self._write(), self._filename, self._written)

    async def _write(self) -> Path:
        self._path = self._path or self._job.new_file()
        held, self._held = self._held, bytearray()
        await self._job.spool(_append, self._path, held)
        self._written += len(held)
        return self._path


def _append(path: Path, data: bytearray) -> None:
    with path.open("ab") as file:
        file.write(data)


class _Parts(Generic[F]):
    """The parts of a body, collected into the fields of a form."""

    def __init__(self, form: type[F], job: Job[Any], limits: LimitSettings) -> None:
        self._form = form
        self._job = job
        self._limits = limits
        self._values: dict[str, str | Upload | None] = {}
        self._ignored: list[str] = []
        self._name = ""
        self._part: _Part = _Ignored()

    async def handle(self, event: MultipartSegment | bytes | None) -> None:
        """Takes what the parser yields: a part's headers, its bytes, and None at its end."""
        if event is None:
            value = await self._part.end()
            if not isinstance(self._part, _Ignored):
                self._values[self._name] = value
        elif isinstance(event, MultipartSegment):
            self._part = self._begin(event)
        else:
            await self._part.write(event)

    def _begin(self, segment: MultipartSegment) -> _Part:
        self._name = name = segment.name or ""
        is_file = _is_file(self._form).get(name)
        if is_file is None:
            self._ignored.append(ascii(name[:64]))
            log.note(ignored_fields=self._ignored)
            return _Ignored()
        if name in self._values:
            raise _invalid(name, "It is there more than once.")
        if is_file != bool(segment.filename):
            raise _invalid(name, "It must be sent as a file." if is_file else "It must be sent as text, not as a file.")
        if is_file:
            return _File(name, segment.filename or "", self._job)
        return _Text(name, self._limits.field_max_bytes)

    def form(self) -> F:
        """The form of the parts. Raises InvalidRequest."""
        values = {name: value for name, value in self._values.items() if value is not None}
        try:
            return self._form.model_validate(values)
        except ValidationError as error:
            raise invalid_fields(error) from None


@cache
def _is_file(form: type[Form]) -> dict[str, bool]:
    """The names of a form's fields, and whether each is a file."""
    return {
        info.alias or name: info.annotation is Upload or Upload in get_args(info.annotation)
        for name, info in form.model_fields.items()
    }


def _invalid(name: str, detail: str) -> InvalidRequest:
    return invalid(FieldProblem(field=name, detail=detail))
