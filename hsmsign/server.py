"""Serves the application with Hypercorn, and stops it gracefully."""

import asyncio
import ctypes
import gc
import ipaddress
import logging
import os
import resource
import signal
import socket
import sys

import hypercorn.asyncio
import hypercorn.asyncio.run
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.config import Config
from hypercorn.utils import LifespanFailureError
from quart import Quart

from hsmsign import log
from hsmsign.app import create_app
from hsmsign.jobs import CANCEL_TIMEOUT_S
from hsmsign.settings import ServerSettings, Settings
from tokens.errors import Error

PR_SET_DUMPABLE = 4  # prctl(2)


async def serve(settings: Settings) -> None:
    """Runs the service until SIGTERM or SIGINT; a second one does not wait for what runs.

    Raises Error where it cannot start.
    """
    harden()
    log.configure(settings.log)
    app = create_app(settings)
    gc.collect()
    gc.freeze()  # a full collection looks at what there is by now and stays: it would hold up every request
    await run(app, settings.server)


async def run(app: Quart, settings: ServerSettings) -> None:
    """See `serve`."""
    listener = listen(settings)
    address, port, *_ = listener.getsockname()
    stop = asyncio.Event()

    async def stopped() -> None:
        log.logger.info("serving", address=address, port=port)
        await stop.wait()
        log.logger.info("stopping")
        app.extensions["jobs"].stop()

    serving = asyncio.ensure_future(
        hypercorn.asyncio.serve(app, _config(settings, listener.detach()), shutdown_trigger=stopped)
    )
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            log.logger.warning("stopping without waiting for what runs")
            app.extensions["jobs"].cancel()
            loop.call_later(CANCEL_TIMEOUT_S, serving.cancel)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await serving
    except asyncio.CancelledError:
        log.logger.warning("clients were cut off")
    except LifespanFailureError as failure:
        # Hypercorn raises it while it handles what went wrong at the start
        raise failure.__context__ or failure from None


class _Connection(TCPServer):
    """A connection that ends when its client closes it.

    Hypercorn keeps it for the rest of its idle time: where each request has a connection of its own, descriptors
    run out.
    """

    async def _read_data(self) -> None:
        await super()._read_data()
        await self.idle_task.stop()

    async def _idle_timeout(self) -> None:
        if not self.reader.at_eof():
            await super()._idle_timeout()


# it has no other hook, and does not say that it exports the name
hypercorn.asyncio.run.TCPServer = _Connection  # type: ignore[attr-defined]


def _config(settings: ServerSettings, listener: int) -> Config:
    config = Config()
    config.bind = [f"fd://{listener}"]
    config.errorlog = logging.getLogger("hypercorn.error")
    config.include_server_header = False
    config.keep_alive_timeout = settings.keep_alive_timeout_s
    config.keep_alive_max_requests = sys.maxsize
    # jobs are cancelled after drain_timeout_s: their clients shall be told
    config.graceful_timeout = settings.drain_timeout_s + CANCEL_TIMEOUT_S
    config.shutdown_timeout += settings.drain_timeout_s
    return config


def listen(settings: ServerSettings) -> socket.socket:
    """The listening socket. Raises Error where the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.address, settings.port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
        # a client that does not read would keep its connection, even a closed one, for ever (tcp(7))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(settings.keep_alive_timeout_s * 1000))
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # socket repeats the address there
        raise Error(
            f"Cannot listen on {settings.address} port {settings.port}: {reason}.",
            "Choose another address or port, or stop what listens there.",
        ) from None
    if not ipaddress.ip_address(address[0]).is_loopback:
        log.logger.warning(
            "listening beyond this machine: there is no authentication, whoever reaches the port can sign",
            address=address[0],
        )
    return listener


def harden() -> None:
    """Keeps what the process holds out of core files and out of others' reach."""
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
