"""`GET /healthz` and `GET /readyz`: for load balancers and for people who ask why."""

from typing import Literal

from pydantic import BaseModel, Field
from quart import Blueprint, Response
from quart_schema import document_response, tag

from hsmsign.jobs import Jobs
from hsmsign.keyring import Keyring
from hsmsign.problems import ErrorDocument, describe
from hsmsign.routes import as_json
from hsmsign.routes.keys import KeySummary, summarise
from signers.sandbox import Sandbox
from tokens.errors import ToolUnavailable


class Health(BaseModel):
    """The process is alive."""

    alive: bool = True


class ProviderReadiness(BaseModel):
    """Whether a provider can be used."""

    ready: bool
    error: ErrorDocument | None = None


class SandboxReadiness(BaseModel):
    """Where vendors' tools run: `bubblewrap`, or `none`, and whether it can be used."""

    kind: Literal["bubblewrap", "none"]
    ready: bool
    error: ErrorDocument | None = None


class ReadinessReport(BaseModel):
    """Whether everything that is granted can be used, and what cannot, and why."""

    ready: bool
    stopping: bool = Field(description="The service takes no more requests.")
    providers: dict[str, ProviderReadiness]
    keys: list[KeySummary]
    sandbox: SandboxReadiness
    notes: list[str]


def blueprint(jobs: Jobs, keyring: Keyring, tools: Sandbox) -> Blueprint:
    """The two endpoints."""
    blueprint = Blueprint("health", __name__)

    @blueprint.get("/healthz")
    @document_response(Health)
    @tag(["health"])
    async def healthz() -> Response:
        """Says that the process is alive."""
        return as_json(Health())

    @blueprint.get("/readyz")
    @document_response(ReadinessReport)
    @document_response(ReadinessReport, 503)
    @tag(["health"])
    async def readyz() -> Response:
        """Says whether every provider and every granted key can be used now."""
        readiness = await keyring.readiness()
        sandbox = await _sandbox(tools)
        ready = readiness.ready and not jobs.stopping
        report = ReadinessReport(
            ready=ready,
            stopping=jobs.stopping,
            providers={
                name: ProviderReadiness(ready=error is None, error=describe(error) if error else None)
                for name, error in readiness.providers.items()
            },
            keys=[summarise(key) for key in readiness.keys],
            sandbox=sandbox,
            notes=list(readiness.notes),
        )
        return as_json(report, 200 if ready else 503)

    return blueprint


async def _sandbox(tools: Sandbox) -> SandboxReadiness:
    """A sandbox that is lacking does not make the service unready: signers that run no tool go on."""
    try:
        await tools.check()
    except ToolUnavailable as error:
        return SandboxReadiness(kind=tools.settings.sandbox, ready=False, error=describe(error))
    return SandboxReadiness(kind=tools.settings.sandbox, ready=True)
