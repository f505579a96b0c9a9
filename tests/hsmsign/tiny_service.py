"""Runs the service with small signers of its own: `tiny_service.py SETTINGS`, the settings as JSON."""

import asyncio
import ctypes
import hashlib
import sys
import time
from typing import Annotated, Literal

from pydantic import Field
from quart import Response
from quart_schema import hide

from hsmsign import log, problems, server
from hsmsign.app import create_app
from hsmsign.asgi import current_request
from hsmsign.settings import Settings
from signers.signer import FileRange, Form, Job, Name, Role, Signed, Upload
from tokens import errors
from tokens.schemes import Hash, RsaPkcs1v15


class TinyForm(Form):
    machine: Name
    artifact: Upload
    second: Upload | None = None
    mode: Literal["plain", "fancy"] = "plain"
    label: Annotated[str | None, Field(alias="a-label")] = None
    seconds: float = 0.0
    error: str | None = None


class Tiny:
    """Answers with an RSA signature of the artifact; sleeps in a thread, or fails, where it is told to."""

    name = "tiny"
    path = "/sign/tiny"
    summary = "Sign a tiny thing."
    roles = (Role("key", "Signs.", "tiny/key.pem"),)
    scope: Literal["machine", "distro"] = "machine"
    form: type[Form] = TinyForm

    async def sign(self, form: TinyForm, job: Job) -> Signed:
        (job.directory() / "intermediate").write_bytes(b"x")
        if form.seconds:
            await job.run(time.sleep, form.seconds)
        if form.error is not None:
            raise error_named(form.error)
        digest = await job.run(lambda: hashlib.sha256(form.artifact.read(0, form.artifact.size)).digest())
        async with job.keys.open("key", machine=form.machine) as key:
            return Signed((await key.sign(RsaPkcs1v15(Hash.SHA256), digest),), 'odd "name".sig')


class EchoForm(Form):
    machine: Name
    artifact: Upload


class Echo:
    """Answers with the artifact, which it leaves where it is."""

    name = "echo"
    path = "/sign/echo"
    summary = "Give the artifact back."
    roles = (Role("key", "Is not used.", "echo/key.pem"),)
    scope: Literal["machine", "distro"] = "machine"
    form: type[Form] = EchoForm

    async def sign(self, form: EchoForm, job: Job) -> Signed:
        return Signed((b"head", FileRange(form.artifact, 0, form.artifact.size), b"tail"), "artifact")


def error_named(name: str) -> Exception:
    if name == "RuntimeError":
        return RuntimeError("a message that nobody outside should see")
    kind = getattr(errors, name, None) or getattr(problems, name)
    return kind(f"{name} happened.", "Do something about it.")


@hide
async def late() -> Response:
    """Does not read its body for two seconds."""
    await asyncio.sleep(2)
    size = sum([len(chunk) async for chunk in current_request().body])
    return Response(str(size), content_type="text/plain")


async def main(settings: Settings) -> None:
    server.harden()
    # tests that do not run as root look into its /proc
    ctypes.CDLL(None).prctl(server.PR_SET_DUMPABLE, 1, 0, 0, 0)
    log.configure(settings.log)
    app = create_app(settings, (Tiny(), Echo()))
    app.add_url_rule("/late", "late", late, methods=["POST"])
    await server.run(app, settings.server)


if __name__ == "__main__":
    asyncio.run(main(Settings.model_validate_json(sys.argv[1])))
