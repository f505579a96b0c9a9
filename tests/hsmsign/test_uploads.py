"""Uploads: as clients send them, and as they should not."""

import hashlib
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

MIB = 1024 * 1024

BAD_NAMES = "a/b", "..", "../abc", "abc/../abc", "/abc", "a\0b", "a\nb", "abc\n", ".abc", " abc", "x" * 300, "\u00e5"

GOOD = [("machine", (None, "abc")), ("artifact", ("a.bin", b"hello"))]


def form(*parts: tuple[str, str, bytes], boundary: str = "b") -> bytes:
    """A multipart body: of each part its name, the rest of its Content-Disposition, and its bytes."""
    return (
        b"".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{rest}\r\n\r\n'.encode() + value + b"\r\n"
            for name, rest, value in parts
        )
        + f"--{boundary}--\r\n".encode()
    )


MULTIPART = {"Content-Type": "multipart/form-data; boundary=b"}
FORM = form(("machine", "", b"abc"), ("artifact", '; filename="x"', b"hello"))


def head(length: int | None, **headers: str) -> bytes:
    """The head of a request for /sign/tiny whose body has this length, or is chunked."""
    lines = [
        "POST /sign/tiny HTTP/1.1",
        "Host: localhost",
        "Content-Type: multipart/form-data; boundary=b",
        "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def test_a_form_is_signed(service: Any) -> None:
    answer = service.post(machine="abc", artifact=b"hello")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["Content-Disposition"] == 'attachment; filename="odd__name_.sig"'
    assert len(answer.headers["X-Request-Id"]) == 16
    assert "Server" not in answer.headers
    service.verify(answer.content, b"hello")
    service.assert_clean()


def test_a_repeated_request_is_harmless(service: Any) -> None:
    answers = {service.post(machine="abc", artifact=b"hello").content for _ in range(3)}
    assert len(answers) == 1
    service.assert_clean()


def test_one_connection_serves_many_requests(service: Any) -> None:
    with httpx.Client(base_url=service.url) as client:
        for _ in range(3):
            assert client.post("/sign/tiny", files=GOOD).status_code == 200
            # a refusal that has read its request leaves the connection as it is
            assert "Connection" not in client.post("/sign/tiny", files=[*GOOD, ("mode", (None, "odd"))]).headers


@pytest.mark.parametrize(
    ("fields", "field", "why"),
    [
        ([("artifact", ("a", b"x"))], "machine", "Field required"),
        ([("machine", (None, "abc"))], "artifact", "Field required"),
        ([("machine", (None, "")), GOOD[1]], "machine", "Field required"),
        ([*GOOD, ("machine", (None, "abc"))], "machine", "more than once"),
        ([*GOOD, ("artifact", ("a", b"x"))], "artifact", "more than once"),
        ([GOOD[0], ("artifact", (None, "/etc/passwd"))], "artifact", "sent as a file"),
        ([GOOD[0], ("artifact", (None, ""))], "artifact", "sent as a file"),
        ([("machine", ("a", b"abc")), GOOD[1]], "machine", "sent as text"),
        ([*GOOD, ("mode", (None, "odd"))], "mode", "'plain' or 'fancy'"),
        ([*GOOD, ("a-label", (None, b"\xff\xfe"))], "a-label", "UTF-8"),
        *(
            ([("machine", (None, name)), GOOD[1]], "machine", "pattern")
            for name in BAD_NAMES
        ),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(service: Any, fields: Any, field: str, why: str) -> None:
    problem = service.assert_problem(httpx.post(service.url + "/sign/tiny", files=fields), 400, "invalid-request")
    assert [entry["field"] for entry in problem["fields"]] == [field]
    assert why in problem["detail"]
    assert problem["hint"]
    service.assert_clean()


def test_all_bad_fields_are_named_at_once(service: Any) -> None:
    problem = service.assert_problem(service.post(mode="odd", a="b"), 400, "invalid-request")
    assert [entry["field"] for entry in problem["fields"]] == ["machine", "artifact", "mode"]


def test_values_are_not_repeated(service: Any) -> None:
    answer = service.post(machine="abc/canary", artifact=b"x", mode="canary")
    service.assert_problem(answer, 400, "invalid-request")
    assert "canary" not in answer.text
    assert "canary" not in service.log


def test_an_empty_optional_field_is_not_sent(service: Any) -> None:
    assert service.post(machine="abc", artifact=b"x", mode="").status_code == 200


def test_a_field_may_be_called_as_no_python_name_can(service: Any) -> None:
    fields = [*GOOD, ("a-label", (None, "something"))]
    answer = httpx.post(service.url + "/sign/tiny", files=fields)
    assert answer.status_code == 200
    assert "ignored_fields" not in service.line(answer)


def test_unknown_fields_are_ignored_and_logged(service: Any) -> None:
    fields = [*GOOD, ("odd\x1b[31m", (None, "x")), ("odd", ("a", b"y" * MIB))]
    answer = httpx.post(service.url + "/sign/tiny", files=fields)
    assert answer.status_code == 200
    assert service.line(answer)["ignored_fields"] == [r"'odd\x1b[31m'", "'odd'"]
    assert "\x1b" not in service.log
    service.assert_clean()


def test_an_empty_artifact_is_refused(service: Any) -> None:
    problem = service.assert_problem(service.post(machine="abc", artifact=b""), 422, "artifact-rejected")
    assert "empty" in problem["detail"]
    service.assert_clean()


@pytest.mark.parametrize(
    "media_type",
    ["application/x-www-form-urlencoded", "application/json", "text/plain", "multipart/mixed; boundary=b", ""],
)
def test_another_media_type_is_refused(service: Any, media_type: str) -> None:
    answer = httpx.post(service.url + "/sign/tiny", content=FORM, headers={"Content-Type": media_type})
    service.assert_problem(answer, 415, "unsupported-media-type")
    service.assert_clean()


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"Content-Type": "multipart/form-data"}, FORM),
        ({"Content-Type": 'multipart/form-data; boundary=""'}, FORM),
        (MULTIPART, b""),
        (MULTIPART, b"no form at all"),
        (MULTIPART, FORM[:-10]),
        (MULTIPART, FORM[: len(FORM) // 2]),
        (MULTIPART, FORM.replace(b"Content-Disposition", b"Content")),
        (MULTIPART, FORM.replace(b"form-data", b"attachment")),
        (MULTIPART, FORM.replace(b"name=", b"nome=", 1)),
        (MULTIPART, FORM.replace(b'"machine"\r\n', b'"machine"\n')),
    ],
)
def test_a_broken_form_is_refused(service: Any, headers: dict[str, str], body: bytes) -> None:
    answer = httpx.post(service.url + "/sign/tiny", content=body, headers=headers)
    service.assert_problem(answer, 400, "invalid-request")
    service.assert_clean()


def test_a_field_without_an_end_is_refused(service: Any) -> None:
    service.assert_problem(service.post(machine="abc", artifact=b"x", mode="x" * 1001), 413, "too-large")
    service.assert_clean()


def test_too_many_fields_are_refused(service: Any) -> None:
    fields = [(f"odd{number}", (None, "x")) for number in range(9)]
    answer = httpx.post(service.url + "/sign/tiny", files=[*GOOD, *fields])
    service.assert_problem(answer, 413, "too-large")
    service.assert_clean()


def test_headers_of_a_part_without_an_end_are_refused(service: Any) -> None:
    body = FORM.replace(b"form-data;", b"form-data; odd=" + b"x" * 9000 + b";", 1)
    answer = httpx.post(service.url + "/sign/tiny", content=body, headers=MULTIPART)
    service.assert_problem(answer, 413, "too-large")
    service.assert_clean()


def test_an_upload_that_says_it_is_too_large_is_refused_before_it_comes(service: Any) -> None:
    with service.connect() as connection:
        connection.sendall(head(65 * MIB))
        began = time.monotonic()
        answer = read(connection)
        assert time.monotonic() - began < 1
    service.assert_problem(answer, 413, "too-large")
    assert answer.headers["Connection"] == "close"
    service.assert_clean()


def test_a_client_that_sends_all_the_same_sees_the_answer(service: Any) -> None:
    answer = service.post(machine="abc", artifact=bytes(100 * MIB))
    service.assert_problem(answer, 413, "too-large")
    service.assert_clean()


def test_an_upload_without_a_length_is_counted(service: Any) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield FORM[:-10]
        while True:
            sent += MIB
            yield bytes(MIB)

    try:
        answer = httpx.post(service.url + "/sign/tiny", content=endless(), headers=MULTIPART)
    except httpx.WriteError:
        # a client that never stops sending is cut off in the end
        assert service.requests()[-1]["problem"] == "too-large"
    else:
        service.assert_problem(answer, 413, "too-large")
    assert sent > 64 * MIB
    service.assert_clean()


def test_an_upload_that_trickles_is_refused(service: Any) -> None:
    with service.connect() as connection:
        connection.sendall(head(1000))
        began = time.monotonic()
        for at in range(5):
            connection.sendall(FORM[at : at + 1])
            time.sleep(0.3)
        answer = read(connection)
        assert 1 <= time.monotonic() - began < 3
    service.assert_problem(answer, 408, "upload-too-slow")
    service.assert_clean()


def test_an_upload_that_stops_is_refused(service: Any) -> None:
    with service.connect() as connection:
        connection.sendall(head(30 * MIB) + FORM[:-10] + bytes(100_000))
        service.assert_problem(read(connection), 408, "upload-too-slow")
    service.assert_clean()


def test_an_upload_may_be_sent_byte_by_byte(service: Any) -> None:
    with service.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(head(len(FORM)))
        for at in range(len(FORM)):
            connection.sendall(FORM[at : at + 1])
        answer = read(connection)
    assert answer.status_code == 200
    service.verify(answer.content, b"hello")


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("size", [10, 3 * MIB])
def test_a_client_that_leaves_half_way_leaves_nothing_behind(service: Any, size: int, reset: bool) -> None:
    def left() -> list[Any]:
        return [line for line in service.requests() if line.get("problem") == "disconnected"]

    before = len(left())
    with service.connect() as connection:
        connection.sendall(head(30 * MIB) + FORM[:-10] + bytes(size))
        time.sleep(0.2)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    service.eventually(lambda: len(left()) > before, "the request has ended")
    assert left()[-1]["status"] is None
    service.assert_clean()


def test_a_half_closed_upload_is_answered(service: Any) -> None:
    with service.connect() as connection:
        connection.sendall(head(1000) + FORM[:50])
        connection.shutdown(socket.SHUT_WR)
        answer = read(connection)
    assert answer.status_code == 400
    if answer.content:  # where both come at once Hypercorn is first to see the end, and answers without a body
        service.assert_problem(answer, 400, "disconnected")
    service.assert_clean()


@pytest.mark.parametrize("size", [64 * 1024, 64 * 1024 + 1, MIB - 1, MIB, MIB + 1, 20 * MIB])
def test_every_byte_of_a_file_arrives(service: Any, size: int) -> None:
    artifact = hashlib.shake_128(b"seed").digest(size)
    answer = service.post("/sign/echo", machine="abc", artifact=artifact)
    assert answer.status_code == 200
    assert answer.content == b"head" + artifact + b"tail"
    service.assert_clean()


def test_a_chunked_upload_arrives(service: Any) -> None:
    artifact = hashlib.shake_128(b"seed").digest(3 * MIB)
    body = form(("machine", "", b"abc"), ("artifact", '; filename="x"', artifact))
    chunks = (body[at : at + 70_000] for at in range(0, len(body), 70_000))
    answer = httpx.post(service.url + "/sign/echo", content=chunks, headers=MULTIPART)
    assert answer.content == b"head" + artifact + b"tail"


def test_a_clients_file_name_names_no_file(service: Any) -> None:
    names = "../../canary", "/tmp/canary", "canary\0", "c" * 3000  # noqa: S108
    for name in names:
        files = [GOOD[0], ("artifact", (name, bytes(100_000))), ("seconds", (None, "0.3"))]
        with httpx.Client() as client:
            request = client.build_request("POST", service.url + "/sign/tiny", files=files)
            body = request.read()
        with service.connect() as connection:
            connection.sendall(
                head(len(body)).replace(b"boundary=b", request.headers["Content-Type"][21:].encode()) + body
            )
            service.eventually(service.files, "it has files")
            assert all(file.replace(".", "").rstrip("d").isdigit() for file in service.files()), service.files()
            assert read(connection).status_code == 200
    service.assert_clean()


def read(connection: socket.socket) -> httpx.Response:
    """The answer that comes, up to its length or the end of the connection."""
    received = b""
    while chunk := connection.recv(MIB):
        received += chunk
        head, found, body = received.partition(b"\r\n\r\n")
        lines = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
        if found and len(body) >= int(lines["content-length"]):
            break
    assert received, "the connection was closed without an answer"
    return httpx.Response(int(head.split()[1]), headers=lines, content=body)
