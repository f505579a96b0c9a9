"""`POST /sign/...`: an endpoint for each signer."""

import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import TracebackType

from quart import Blueprint, Response
from quart.wrappers.response import ResponseBody
from quart_schema import DataSource, document_request, document_response, hide, operation_id, tag

import signers.signer
from hsmsign import log, uploads
from hsmsign.asgi import current_request
from hsmsign.jobs import Job, Jobs
from hsmsign.keyring import Keyring
from hsmsign.openapi import Artifact, problems
from hsmsign.settings import Settings
from signers.sandbox import Sandbox
from signers.signer import Signed, Signer

CHUNK_BYTES = 1024 * 1024
"""How much of an answer is read and sent at a time."""

OLD_PATHS = {"uefi": "/sign/uefi", "capsule": "/sign/ueficapsule"}
"""What some layers call signers by; OpenAPI does not have them."""


def blueprint(
    signers: tuple[Signer, ...], jobs: Jobs, keyring: Keyring, tools: Sandbox, settings: Settings
) -> Blueprint:
    """The endpoints of these signers."""
    blueprint = Blueprint("sign", __name__)
    for signer in signers:
        view = _endpoint(signer, jobs, keyring, tools, settings)
        view.__doc__ = signer.summary
        operation_id(signer.name)(view)
        document_request(signer.form, source=DataSource.FORM_MULTIPART)(view)
        document_response(Artifact)(view)
        problems(400, 403, 404, 408, 409, 413, 415, 422, 423, 500, 501, 502, 503, 504)(view)
        tag(["sign"])(view)
        blueprint.add_url_rule(signer.path, signer.name, view, methods=["POST"])
        if old := OLD_PATHS.get(signer.name):
            view = hide(_endpoint(signer, jobs, keyring, tools, settings))
            blueprint.add_url_rule(old, f"{signer.name}-old", view, methods=["POST"])
    return blueprint


def _endpoint(
    signer: Signer, jobs: Jobs, keyring: Keyring, tools: Sandbox, settings: Settings
) -> Callable[[], Awaitable[Response]]:
    limits, own = settings.limits, settings.signers.of(signer.name)

    async def sign() -> Response:
        request = current_request()
        log.note(signer=signer.name)
        boundary = uploads.boundary(request, limits)

        async def work(job: Job[Signed]) -> Signed:
            form = await uploads.receive(request.body, boundary, signer.form, job, limits)
            log.note(**{signer.scope: getattr(form, signer.scope)})
            keys = keyring.keys(signer.name)
            with keyring.locking(keys):
                given = signers.signer.Job(job.directory, keys, job.hash, tools, own)
                return await job.limited(signer.sign(form, given))

        job = jobs.start(work)
        request.at_end(job.release)
        return _answer(await job.result(), job)

    return sign


def _answer(signed: Signed, job: Job[Signed]) -> Response:
    # a small artifact goes in one piece: it may be all there is to send
    body = b"".join(signed.chunks(CHUNK_BYTES)) if signed.size <= uploads.SMALL_BYTES else _Chunks(signed, job)
    response = Response(body, content_type=signed.media_type)
    response.content_length = signed.size
    filename = re.sub(r"[^A-Za-z0-9._+-]", "_", signed.filename)
    response.headers["Content-Disposition"] = f'attachment; filename="{filename}"'
    return response


class _Chunks(ResponseBody):
    """The signed artifact, read by a thread while it is sent."""

    def __init__(self, signed: Signed, job: Job[Signed]) -> None:
        self._signed = signed
        self._job = job

    async def __aenter__(self) -> AsyncGenerator[bytes, None]:
        self._chunks = self._read()
        return self._chunks

    async def __aexit__(self, _type: type, _error: BaseException, _traceback: TracebackType) -> None:
        await self._chunks.aclose()

    async def _read(self) -> AsyncGenerator[bytes, None]:
        chunks = self._signed.chunks(CHUNK_BYTES)
        while (chunk := await self._job.spool(next, chunks, None)) is not None:
            yield chunk
