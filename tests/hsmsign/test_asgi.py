"""Connections: back-pressure, clients that leave, and what is no request."""

import socket
import threading
import time
from typing import Any

import httpx

MIB = 1024 * 1024


def late(length: int) -> bytes:
    return f"POST /late HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


def test_a_body_that_nobody_reads_yet_is_not_taken_in(service: Any) -> None:
    size = 200 * MIB
    service.assert_clean()
    before = service.memory()
    with service.connect() as connection:
        began = time.monotonic()
        sender = threading.Thread(target=connection.sendall, args=(late(size) + bytes(size),))
        sender.start()
        peak = before
        while time.monotonic() - began < 1.5:
            peak = max(peak, service.memory())
            time.sleep(0.05)
        assert peak - before < 10 * MIB
        sender.join()
        answer = b""
        while not answer.endswith(str(size).encode()):
            chunk = connection.recv(MIB)
            assert chunk, answer
            answer += chunk
    assert time.monotonic() - began > 2


def test_memory_does_not_grow_with_the_upload(start_service: Any) -> None:
    service = start_service().wait_until_serving()
    assert service.post(machine="abc", artifact=bytes(MIB)).status_code == 200
    before = service.memory("VmHWM")
    artifact = bytes(100 * MIB)
    answer = service.post("/sign/echo", machine="abc", artifact=artifact)
    assert len(answer.content) == len(artifact) + 8
    assert service.memory("VmHWM") - before < 20 * MIB
    service.assert_clean()


def test_many_small_chunks_wait_too(service: Any) -> None:
    before = service.memory()
    with service.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(b"POST /late HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(5000):
            connection.sendall(b"1\r\nx\r\n" * 20)
        assert service.memory() - before < 10 * MIB
        connection.sendall(b"0\r\n\r\n")
        answer = b""
        while not answer.endswith(b"100000"):
            chunk = connection.recv(MIB)
            assert chunk, answer
            answer += chunk


def test_a_client_that_leaves_while_nobody_reads_is_noticed(service: Any) -> None:
    before = len(service.requests())
    with service.connect() as connection:
        connection.sendall(late(100 * MIB) + bytes(10000))
    service.eventually(lambda: len(service.requests()) > before, "the request has ended")
    service.assert_clean()


def test_an_unread_body_does_not_keep_a_refusal_from_a_client_that_leaves(service: Any) -> None:
    # the queue to the application is full when the connection breaks
    for _ in range(5):
        with service.connect() as connection:
            connection.sendall(late(100 * MIB).replace(b"/late", b"/none") + bytes(4 * MIB))
    service.assert_clean()
    service.eventually(lambda: not open_connections(service), "it has closed them")


def test_a_connection_ends_with_its_client(service: Any) -> None:
    with service.connect():
        pass
    service.assert_clean()
    with service.connect() as connection:
        connection.sendall(late(1) + b"x")
    # while the service waits before it reads
    assert open_connections(service)
    service.eventually(lambda: not open_connections(service), "it has closed them")


def open_connections(service: Any) -> list[list[str]]:
    """Connections to the service that it has not closed."""
    port = f":{service.port:04X}"
    with open("/proc/net/tcp") as table:  # noqa: PTH123
        rows = [line.split() for line in table.readlines()[1:]]
    listening, time_wait = "0A", "06"
    return [row[1:5] for row in rows if row[1].endswith(port) and row[3] not in (listening, time_wait)]


def test_every_request_has_another_id(service: Any) -> None:
    ids = {httpx.get(service.url + "/healthz").headers["X-Request-Id"] for _ in range(10)}
    assert len(ids) == 10


def test_what_is_no_http_is_refused(service: Any) -> None:
    with service.connect() as connection:
        connection.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
        assert connection.recv(MIB).startswith(b"HTTP/1.1 400")
    service.assert_clean()


def test_a_head_without_an_end_is_refused(service: Any) -> None:
    with service.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000)
        assert connection.recv(MIB).startswith(b"HTTP/1.1 431")
    service.assert_clean()


def test_a_websocket_is_refused(service: Any) -> None:
    with service.connect() as connection:
        connection.sendall(
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        assert connection.recv(MIB).startswith(b"HTTP/1.1 403")
    service.assert_clean()
