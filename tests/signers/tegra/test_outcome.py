"""What scripts left: verified, and chosen, with images that are signed here by `cryptography` alone."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from signers.tegra.outcome import Verifier, check_size, flash_files, payload_files
from signers.tegra.service import Made
from tokens.errors import ToolFailed

PSS = padding.PSS(padding.MGF1(hashes.SHA512()), 32)


def t234(private_key: Any, payload: bytes, salt: padding.PSS = PSS, **spoilt: int) -> bytes:
    header = bytearray(os.urandom(8192).replace(b"NVDA", b"ADVN"))
    header[:4] = b"NVDA"
    header[5124:5128] = (len(payload) + spoilt.get("longer", 0)).to_bytes(4, "little")
    header[5216:5280] = hashlib.sha512(payload).digest()
    header[144:528] = private_key.sign(bytes(header[4032:]), salt, hashes.SHA512())[::-1]
    header[4:68] = hashlib.sha512(header[68:]).digest()
    return bytes(header) + payload


@pytest.fixture
def private_key(pairs) -> Any:
    return pairs["rsa3072"].private_key


@pytest.fixture
def check(private_key, tmp_path):
    """Verifies a file of a set, or a payload."""

    def check(data: bytes, what: str = "flash_set", soctype: Any = "tegra234") -> None:
        for name, content in (("a.signed", data), ("flashcmd.txt", b"#!/bin/sh\n")):
            (tmp_path / name).write_bytes(content)
        files = {path.name: path for path in tmp_path.iterdir()}
        getattr(Verifier(soctype, private_key.public_key(), Made()), what)(files)

    return check


def test_a_good_one(check, private_key) -> None:
    image = t234(private_key, b"payload")
    check(image)
    check(image + b"what stands behind it")
    for parts in ([image], [b"NVDA", image], [b"x" * 77, image, b"NVDA", image, b"NV"]):
        check(b"".join(parts), "payloads")


@pytest.mark.parametrize("what", ["flash_set", "payloads"])
def test_what_is_refused(check, private_key, what) -> None:
    image = t234(private_key, b"payload")
    other_salt = padding.PSS(padding.MGF1(hashes.SHA512()), 64)
    for data, text in (
        (image[:-1], "shorter than its header says"),
        (image[:-1] + b"x", "not what its header was signed for"),
        (t234(private_key, b"payload", longer=1), "shorter than its header says"),
        (t234(private_key, b"payload", other_salt), "does not verify"),
        (t234(rsa.generate_private_key(65537, 3072), b"payload"), "does not verify"),
        (b"no image", "no "),
        (b"", "no "),
    ):
        with pytest.raises(ToolFailed, match=text):
            check(data, what)


def test_a_header_that_is_none(check, private_key) -> None:
    """In a set it is an error; in a payload, the word alone."""
    image = bytearray(t234(private_key, b"payload"))
    image[5000] ^= 1
    with pytest.raises(ToolFailed, match="not what its digest says"):
        check(bytes(image))
    with pytest.raises(ToolFailed, match="no update payload"):
        check(bytes(image), "payloads")


def test_a_header_alone(check, private_key) -> None:
    header = t234(private_key, b"payload")[:8192]
    check(header)
    changed = bytearray(header)
    changed[6000] ^= 1
    changed[4:68] = hashlib.sha512(changed[68:]).digest()
    with pytest.raises(ToolFailed, match="does not verify"):
        check(bytes(changed))


def test_a_payload_of_nothing_but_magic(check) -> None:
    with pytest.raises(ToolFailed, match="more than 16384 times"):
        check(b"NVDA" * 20_000, "payloads")


def test_headers_that_overlap_are_not_looked_at(check, private_key) -> None:
    """The payload of the first has another in it, which would not verify."""
    inner = bytearray(t234(private_key, b"inner"))
    inner[5300] ^= 1
    inner[4:68] = hashlib.sha512(inner[68:8192]).digest()
    check(t234(private_key, bytes(inner)), "payloads")
    with pytest.raises(ToolFailed, match="does not verify"):
        check(bytes(inner), "payloads")


def test_t194_needs_a_signature_that_was_made(private_key, tmp_path) -> None:
    made, payload = Made(), b"payload" * 9
    header = bytearray(4096)
    header[:4] = b"NVDA"
    header[2960:2992] = hashlib.sha256(payload).digest()
    signature = os.urandom(384)
    header[100:484] = signature
    (tmp_path / "flashcmd.txt").write_bytes(b"x")
    image = tmp_path / "a.signed"
    files = {path.name: path for path in (image, tmp_path / "flashcmd.txt")}
    image.write_bytes(bytes(header) + payload)
    verifier = Verifier("tegra194", private_key.public_key(), made)
    with pytest.raises(ToolFailed, match="not the one that was made for it"):
        verifier.flash_set(files)
    made.signatures[hashlib.sha256(header[2960:]).digest()] = {signature}
    verifier.flash_set(files)
    image.write_bytes(bytes(header) + payload + b"x")
    with pytest.raises(ToolFailed, match="not what its header was signed for"):
        verifier.flash_set(files)


def test_what_a_client_gets() -> None:
    names = [
        "new.signed", "sent", "signed/x", "enc_signed/x", "1234/x", "flash.xml", "flash.xml.tmp", "_tools/x", "a\nb",
        "boot_sigheader.img.encrypt.signed", "payloads_t23x/bl", "payloads_t23x/\udcff", "rollback/x", "sub/new",
    ]  # fmt: skip
    files = {name: Path(name) for name in names}
    assert flash_files(files, {"sent"}, "boot.img").keys() == {"new.signed", "payloads_t23x/bl", "sub/new"}
    assert payload_files(files, {"sent"}).keys() == {"payloads_t23x/bl"}


def test_too_much(tmp_path) -> None:
    (tmp_path / "a").write_bytes(bytes(10))
    files = {"a": tmp_path / "a", "b": tmp_path / "a"}
    check_size(files, 20)
    with pytest.raises(ToolFailed, match="more than 19 bytes"):
        check_size(files, 19)
