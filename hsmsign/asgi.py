"""How a request reaches Quart and how its answer leaves: with back-pressure, and with an end.

Quart's own connection takes in a body as fast as it comes, however slowly it is read, ends the connection
under a client that is still sending, and leaves its tasks behind when the server cancels it.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, cast

import quart
import quart.wrappers.request
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent
from quart.asgi import ASGIHTTPConnection, ASGIWebsocketConnection

from hsmsign import log
from tokens.errors import Error

UNREAD_CHUNKS_MAX = 4
"""Chunks of a body that may wait to be read: 256 KiB, as Hypercorn reads 64 KiB at a time."""


class ClientDisconnected(Error):
    """The client left before it had sent the whole of its request, or got the whole of its answer."""


class Body(quart.wrappers.request.Body):
    """The body of a request, to be read once with `async for`."""

    def __init__(self, expected_content_length: int | None, max_content_length: int | None) -> None:
        super().__init__(expected_content_length, max_content_length)
        self.received = 0
        self._chunks: deque[bytes] = deque()
        self._room = asyncio.Event()
        self._discarding = False

    @property
    def complete(self) -> bool:
        """Whether no more of it will come."""
        return self._complete.is_set()

    async def put(self, chunk: bytes) -> None:
        """Adds a chunk; waits while `UNREAD_CHUNKS_MAX` of them are unread."""
        if not chunk or self._discarding:
            return
        self.received += len(chunk)
        self._chunks.append(chunk)
        self._has_data.set()
        while len(self._chunks) >= UNREAD_CHUNKS_MAX:
            self._room.clear()
            await self._room.wait()

    def disconnect(self) -> None:
        """Says that the client has left. No effect on a body that is complete."""
        if not self.complete:
            self._must_raise = ClientDisconnected("The connection ended before the request did.")
            self.set_complete()

    async def discard(self) -> None:
        """Drops all of it that is unread, and waits for its end.

        Nobody reads it any more: a full queue would keep the server from seeing that the client leaves.
        """
        self._discarding = True
        self._chunks.clear()
        self._room.set()
        await self._complete.wait()

    async def __anext__(self) -> bytes:
        while not self._chunks:
            if self._must_raise is not None:
                raise self._must_raise
            if self.complete:
                raise StopAsyncIteration
            self._has_data.clear()
            await self._has_data.wait()
        chunk = self._chunks.popleft()
        self._room.set()
        return chunk

    def __await__(self) -> Generator[Any, None, bytes]:
        return self._whole().__await__()

    async def _whole(self) -> bytes:
        return b"".join([chunk async for chunk in self])


class Request(quart.wrappers.request.Request):
    """A request with an id, and with calls to make when it has ended."""

    body_class = Body
    body: Body

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.id = secrets.token_hex(8)
        self.disconnected = False
        self._at_end: list[Callable[[], None]] = []

    @property
    def target(self) -> str:
        """The path as the client wrote it, percent-encoded."""
        return self.scope["raw_path"].decode("ascii", "replace")

    def at_end(self, call: Callable[[], None]) -> None:
        """Has `call` called when the answer is sent, or given up."""
        self._at_end.append(call)

    def end(self) -> None:
        """Makes those calls."""
        for call in self._at_end:
            call()


def current_request() -> Request:
    """The request that the current task answers."""
    return cast(Request, quart.request)


class Connection(ASGIHTTPConnection):
    """One request and its answer.

    A client that leaves does not cancel the handler: a body that is cut off raises ClientDisconnected where it is
    read, and so does a long answer where it is sent.
    """

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Takes in the request and answers it, and writes its line in the log."""
        request = cast(Request, self._create_request_from_scope(send))
        line = log.begin(request_id=request.id, client=request.remote_addr, method=request.method, path=request.target)
        answer = _Answer(request, send, self.app.config["LINGER_TIMEOUT"])
        receiver = asyncio.create_task(_receive(request, receive))
        try:
            await self.handle_request(request, answer.send)
        except ClientDisconnected:
            pass
        finally:
            receiver.cancel()
            request.end()
            line.write(answer.status if answer.complete else None, request.body.received, answer.sent)


async def _receive(request: Request, receive: ASGIReceiveCallable) -> None:
    """Takes in the body as fast as it is read, until the client leaves."""
    while (message := await receive())["type"] == "http.request":
        await request.body.put(message.get("body", b""))
        if not message.get("more_body", False):
            request.body.set_complete()
    request.disconnected = True
    request.body.disconnect()


class _Answer:
    """What is sent to the client: with the request's id, and in a way that it gets through."""

    def __init__(self, request: Request, send: ASGISendCallable, linger_timeout_s: float) -> None:
        self.status: int | None = None
        self.sent = 0
        self.complete = False
        self._request = request
        self._send = send
        self._linger_timeout_s = linger_timeout_s
        self._discarding: asyncio.Task[None] | None = None

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.body" and not message["more_body"]:
            self.complete = True
            await self._linger()
        elif self._request.disconnected and self.sent:
            raise ClientDisconnected("The connection ended before the answer did.")
        elif message["type"] == "http.response.start":
            # who has closed one half of the connection still gets a short answer; nobody knows whether it arrives
            self.status = None if self._request.disconnected else message["status"]
            message["headers"] = [*message["headers"], *self._headers()]
        elif message["type"] == "http.response.body":
            self.sent += len(message["body"])
        await self._send(message)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", self._request.id.encode())]
        if not self._request.body.complete:
            self._discarding = asyncio.create_task(self._request.body.discard())
            if self._request.http_version != "2":
                headers.append((b"connection", b"close"))
        return headers

    async def _linger(self) -> None:
        # a connection that is closed on unread bytes is reset, and the answer is lost with it
        if self._discarding is not None:
            await asyncio.wait((self._discarding,), timeout=self._linger_timeout_s)
            self._discarding.cancel()


class NoWebsocket(ASGIWebsocketConnection):
    """Refuses a websocket: there are none here."""

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Closes it before it opens: Hypercorn answers with 403."""
        await receive()
        await send({"type": "websocket.close", "code": 1000, "reason": None})
