"""No PIN, passphrase or key byte is anywhere that it should not be."""

import base64
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import serialization

DESCRIPTION = b'software = { version = "1"; }'
LARGE = DESCRIPTION + b"\n" * 200_000  # on disk, while its job runs


def traces(name: str, secret: bytes) -> Iterator[tuple[str, bytes]]:
    """What a secret may look like."""
    yield name, secret
    yield f"{name} in hex", secret.hex().encode()
    for shift in range(3):
        # base64, wherever in the encoded bytes it begins
        encoded = base64.b64encode(bytes(shift) + secret).rstrip(b"=")
        yield f"{name} in base64", encoded[4:-2]


@pytest.fixture(scope="module")
def canaries(softhsm: Any, encrypted_key: tuple[Any, bytes]) -> list[tuple[str, bytes]]:
    secrets = [("the PIN", softhsm.pin.encode()), ("the passphrase", b"correct-horse-canary")]
    files = (softhsm.keys / "demo-file/swupdate/rsa-private.key").read_bytes()
    for name, key in (("file", serialization.load_pem_private_key(files, None)), ("encrypted", encrypted_key[0])):
        numbers = key.private_numbers()
        secrets += [(f"the {name} key's {part}", getattr(numbers, part).to_bytes(128, "big")) for part in ("p", "q")]
    pem = re.findall(rb"[A-Za-z0-9+/]{64}", files)[3]
    return [("the file key's PEM", pem), *(trace for name, secret in secrets for trace in traces(name, secret))]


def look(where: str, content: bytes, canaries: list[tuple[str, bytes]]) -> None:
    found = [name for name, canary in canaries if canary in content]
    assert not found, f"{found} in {where}"


def test_the_canaries_would_be_found(canaries: list[tuple[str, bytes]], softhsm: Any) -> None:
    for content in (b"PIN=" + softhsm.pin.encode(), base64.b64encode(b"x" + softhsm.pin.encode() + b"y")):
        with pytest.raises(AssertionError, match="the PIN"):
            look("a test", content, canaries)
    with pytest.raises(AssertionError, match="PEM"):
        look("a test", (softhsm.keys / "demo-file/swupdate/rsa-private.key").read_bytes(), canaries)


def test_no_secret_leaks(service: Any, canaries: list[tuple[str, bytes]]) -> None:
    answers: list[httpx.Response] = []

    def use() -> None:
        for _ in range(5):
            for distro in ("token", "file", "s3", "opened", "locked", "text", "absent", "pinned"):
                answers.extend(service.sign(distro, artifact) for artifact in (DESCRIPTION, LARGE))
                answers.append(service.sign(distro, DESCRIPTION, key_uri="pkcs11:object=x?pin-value=1234"))
        answers.extend(httpx.get(service.url + path, timeout=60) for path in ("/keys", "/readyz", "/keys/opened"))

    thread = threading.Thread(target=use)
    thread.start()
    looked = 0
    while thread.is_alive():
        for process in service.processes():
            for name in ("cmdline", "environ"):
                look(f"{name} of {process}", read(process / name), canaries)
        for path in service.spool.rglob("*"):
            look(f"the spool's {path.name}", read(path), canaries)
        looked += 1
    thread.join()
    assert looked > 10
    assert {200, 500, 503} <= {answer.status_code for answer in answers}
    for answer in answers:
        look("an answer", answer.content + str(answer.headers).encode(), canaries)
    look("the log", service.log.encode(), canaries)


def read(path: Path) -> bytes:
    """The file, if it is one that still is there and that we may read."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, PermissionError, ProcessLookupError):
        return b""
