"""No PIN, passphrase or key byte is anywhere that it should not be."""

import base64
import json
import os
import re
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import serialization

from tests.end_to_end import test_imx as imx

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
    except OSError:  # gone, a directory, a socket
        return b""


@pytest.fixture(scope="module")
def imx_canaries(softhsm: Any) -> list[tuple[str, bytes]]:
    """The PIN, and of i.MX file keys: the numbers, PEM lines of the tarball's keys, and their passphrase."""
    directory = softhsm.keys / "demo-file-rsa2048/imxsign"
    secrets = [("the PIN", softhsm.pin.encode())]
    for path in (directory / "keys").glob("*_key.pem"):
        numbers = serialization.load_pem_private_key(path.read_bytes(), None).private_numbers()
        secrets += [(f"{path.name}: {part}", getattr(numbers, part).to_bytes(128, "big")) for part in ("p", "q")]
    canaries = [trace for name, secret in secrets for trace in traces(name, secret)]
    with tarfile.open(directory / "imx-cst-keys.tar.gz") as archive:
        members = {member.name: archive.extractfile(member) for member in archive if member.isreg()}
        for name, file in members.items():
            content = file.read() if file else b""
            if name.endswith("key_pass.txt"):
                canaries.append(("the passphrase", content.split()[0]))
            elif "keys/" in name:
                canaries.append((name, content.splitlines()[3]))
    return canaries


@pytest.mark.parametrize("backend", ["ssl", "pkcs11"])
def test_no_secret_leaks_to_tools(fixtures_service: Any, imx_canaries: list[tuple[str, bytes]], backend: str) -> None:
    """What tools are given on their command line, in their environment and on disk: no key, not even the tarball's."""
    answers: list[httpx.Response] = []
    machines = ["demo-file-rsa2048"] + (["demo-token-rsa2048"] if backend == "pkcs11" else [])

    def use() -> None:
        for _ in range(15):
            for machine in machines:
                text = imx.hab_text("rsa2048", backend)
                answers.append(imx.post(fixtures_service, machine, text, imx.IMAGE.read_bytes(), backend=backend))

    thread = threading.Thread(target=use)
    thread.start()
    tools = set()
    while thread.is_alive():
        for process in fixtures_service.processes():
            for name in ("cmdline", "environ"):
                look(f"{name} of {process}", read(process / name), imx_canaries)
            tools.add(read(process / "comm"))
        for directory, _, names in os.walk(fixtures_service.spool):  # directories that vanish are passed over
            for name in names:
                look(f"the spool's {name}", read(Path(directory, name)), imx_canaries)
    thread.join()
    assert b"cst\n" in tools, "the tool itself was looked at"
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        look("an answer", answer.content, imx_canaries)
    look("the log", fixtures_service.log.encode(), imx_canaries)
    audited = [json.loads(line) for line in fixtures_service.log.splitlines() if "the lent key" in line]
    if backend == "pkcs11":  # two signatures for each CSF, told with the id of its request
        ids = [answer.headers["X-Request-Id"] for answer in answers]
        assert sorted(line["request_id"] for line in audited if line.get("request_id") in ids) == sorted(2 * ids)
