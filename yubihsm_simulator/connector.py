"""The connector: the device over HTTP/1.1, as Yubico's yubihsm-connector 3.0.5 offers it.

GET /connector/status -> text lines; POST /connector/api, one frame -> one frame
"""

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from yubihsm_simulator.device import Device
from yubihsm_simulator.frames import DATA_MAX_BYTES

IDLE_S = 5.0
"""A connection without a request for so long is closed."""

_VERSION = "3.0.5"
_REQUEST_MIN_BYTES, _REQUEST_MAX_BYTES = 3, 3 + DATA_MAX_BYTES
_HEAD_MAX_BYTES = 16384
_READ_BYTES = 65536

_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    500: "Internal Server Error",
}


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    version: str
    headers: dict[str, str]  # names in lower case

    @property
    def length(self) -> int:
        """Of the body; -1 where it is not told."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isascii() and text.isdigit() else -1

    @property
    def keep_alive(self) -> bool:
        connection = self.headers.get("connection", "").lower()
        return connection == "keep-alive" if self.version == "HTTP/1.0" else connection != "close"


class _BadRequest(Exception):
    """What came is not HTTP."""


class Connector:
    """Serves a device on a TCP port; a thread for each connection, requests one after the other.

    `device` may be replaced at any time. Use it as a context manager, or `start` and `stop`.
    """

    def __init__(self, device: Device, host: str = "127.0.0.1", port: int = 0) -> None:
        self.device = device
        self._host = host
        self._port = port
        self._listener: socket.socket | None = None
        self._threads: set[threading.Thread] = set()
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()  # of the two sets
        self._serial = threading.Lock()  # the connector has one mutex round the device

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The port; known once it was started, and the same after that."""
        return self._port

    @property
    def url(self) -> str:
        """What clients connect to."""
        return f"http://{self._host}:{self._port}"

    def start(self) -> None:
        """Listens. Raises OSError."""
        listener = socket.create_server((self._host, self._port), backlog=64)
        self._port = listener.getsockname()[1]
        self._listener = listener
        self._spawn(self._accept, listener)

    def stop(self) -> None:
        """Closes every connection at once; returns when all threads are gone."""
        if self._listener is None:
            return
        listener, self._listener = self._listener, None
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        listener.close()
        while True:
            with self._lock:
                for connection in self._connections:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
                thread = next(iter(self._threads), None)
            if thread is None:
                return
            thread.join(0.1)

    def _spawn(self, target: Callable[[socket.socket], None], connection: socket.socket) -> None:
        def run() -> None:
            try:
                target(connection)
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=f"yubihsm-connector:{self._port}", daemon=True)
        with self._lock:  # until it is started nobody may join it
            self._threads.add(thread)
            thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self._connections.add(connection)
            self._spawn(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            try:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.settimeout(IDLE_S)
                reader = _Reader(connection)
                while (request := reader.head()) is not None and self._answer(connection, reader, request):
                    pass
            except _BadRequest:
                connection.sendall(_response(400, b"Bad Request\n", {"Connection": "close"}))
            finally:
                with self._lock:
                    self._connections.discard(connection)

    def _answer(self, connection: socket.socket, reader: "_Reader", request: _Request) -> bool:
        """Answers one request; whether the connection stays open."""
        if request.path == "/connector/api" and request.method == "POST":
            if not _REQUEST_MIN_BYTES <= request.length <= _REQUEST_MAX_BYTES:
                raise _BadRequest
            if request.headers.get("expect", "").lower() == "100-continue":
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            answered = self._api(connection, reader.body(request.length), request)
        else:
            if request.length > 0:
                if request.length > _REQUEST_MAX_BYTES:
                    raise _BadRequest
                reader.body(request.length)
            connection.sendall(self._other(request))
            answered = True
        return answered and request.keep_alive

    def _api(self, connection: socket.socket, frame: bytes, request: _Request) -> bool:
        """Hands a frame to the device; whether it was answered whole."""
        with self._serial:
            device = self.device
            if device.faults.take("drop_before"):
                return False
            if device.faults.unplugged:
                connection.sendall(_response(500, b"Internal Server Error\n", _request_id(request)))
                return True
            answer = device.process(frame)
            if device.faults.take("drop_after"):
                return False
            response = _response(200, answer, _request_id(request), "application/octet-stream")
            if device.faults.take("half_answers"):
                connection.sendall(response[: len(response) - len(answer) + len(answer) // 2])
                return False
        connection.sendall(response)
        return True

    def _other(self, request: _Request) -> bytes:
        if request.path == "/connector/status":
            if request.method == "GET":
                return _response(200, self._status(), _request_id(request))
            return _response(405, b"Method Not Allowed\n", {"Allow": "GET"} | _request_id(request))
        if request.path == "/connector/api":
            return _response(405, b"Method Not Allowed\n", {"Allow": "POST"} | _request_id(request))
        return _response(404, b"404 page not found\n", {})

    def _status(self) -> bytes:
        """Less than 256 bytes: libyubihsm has no room for more."""
        lines = {
            "status": "NO_DEVICE" if self.device.faults.unplugged else "OK",
            "serial": "*",
            "version": _VERSION,
            "pid": str(os.getpid()),
            "address": self._host,
            "port": str(self._port),
        }
        return "".join(f"{name}={value}\n" for name, value in lines.items()).encode()


class _Reader:
    """Reads requests from a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""

    def head(self) -> _Request | None:
        """Request line and headers; None where the client is done. Raises _BadRequest, OSError."""
        while b"\r\n\r\n" not in self._buffer:
            if len(self._buffer) > _HEAD_MAX_BYTES:
                raise _BadRequest
            received = self._connection.recv(_READ_BYTES)
            if not received:
                return None
            self._buffer += received
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ")
        if len(words) != 3 or words[2] not in ("HTTP/1.0", "HTTP/1.1"):
            raise _BadRequest
        headers = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon:
                raise _BadRequest
            headers[name.lower()] = value.strip()
        return _Request(words[0], words[1].partition("?")[0], words[2], headers)

    def body(self, length: int) -> bytes:
        """So many bytes. Raises OSError where they do not come."""
        while len(self._buffer) < length:
            received = self._connection.recv(_READ_BYTES)
            if not received:
                raise ConnectionResetError
            self._buffer += received
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return body


def _request_id(request: _Request) -> dict[str, str]:
    return {"X-Request-ID": request.headers.get("x-request-id") or secrets.token_hex(8)}


def _response(status: int, body: bytes, headers: dict[str, str], kind: str = "text/plain; charset=utf-8") -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
