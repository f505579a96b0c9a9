"""Puts the service together. Nothing else knows Quart's app object."""

import asyncio
from collections.abc import AsyncGenerator

from quart import Quart
from quart_schema import Info, QuartSchema

import hsmsign
from hsmsign import log, openapi, origin, problems
from hsmsign.asgi import Connection, NoWebsocket, Request
from hsmsign.jobs import Jobs
from hsmsign.keyring import Keyring
from hsmsign.routes import health, keys, sign
from hsmsign.settings import Settings
from signers.registry import SIGNERS
from signers.sandbox import Sandbox
from signers.signer import Signer
from tokens.registry import create


def create_app(settings: Settings, signers: tuple[Signer, ...] = SIGNERS) -> Quart:
    """The service as an ASGI application; its providers start, and stop, with the server's lifespan.

    `app.extensions["jobs"]` is its Jobs, by which a server says that it is stopping.
    """
    providers = {
        name: create(name, provider, settings.server.state_directory) for name, provider in settings.providers.items()
    }
    keyring = Keyring(settings, providers, signers)
    jobs = Jobs(settings)
    tools = Sandbox(settings.tools)

    app = Quart("hsmsign", static_folder=None)
    # errors are logged by `problems`, and those of the start by whoever starts it
    app.logger.disabled = True
    app.asgi_http_class = Connection
    app.asgi_websocket_class = NoWebsocket
    app.request_class = Request
    app.url_map.merge_slashes = False  # an answer is never a redirection
    app.config.update(
        MAX_CONTENT_LENGTH=None,  # `uploads` counts: this one looks at Content-Length only
        BODY_TIMEOUT=None,  # likewise
        RESPONSE_TIMEOUT=settings.server.response_timeout_s,
        LINGER_TIMEOUT=settings.server.linger_timeout_s,
    )
    app.before_request(origin.guard(settings.server))
    problems.register(app)
    app.register_blueprint(health.blueprint(jobs, keyring, tools))
    app.register_blueprint(keys.blueprint(jobs, keyring, settings.limits))
    app.register_blueprint(sign.blueprint(signers, jobs, keyring, tools, settings))
    QuartSchema(
        app,
        info=Info(title="hsmsign", version=hsmsign.__version__, summary="Signs firmware artifacts."),
        openapi_provider_class=openapi.Provider,
        conversion_preference="pydantic",
        # these pages load scripts from elsewhere
        swagger_ui_path=None,
        redoc_ui_path=None,
        scalar_ui_path=None,
    )
    app.extensions["jobs"] = jobs

    @app.while_serving
    async def live() -> AsyncGenerator[None, None]:
        jobs.open()
        if settings.tools.sandbox == "none":
            log.logger.warning("tools run without a sandbox", hint='set sandbox = "bubblewrap" in [tools]')
        await asyncio.gather(*(provider.start() for provider in providers.values()))
        yield
        await jobs.close()
        await asyncio.gather(*(provider.stop() for provider in providers.values()))

    return app
