"""EFI variables, against what efitools make of the same; and hostile ones."""

import subprocess
import uuid
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from signers.formats import efi

NOON = datetime(2026, 7, 1, 12, 30, 5, tzinfo=UTC)
OWNER = uuid.UUID("01234567-89ab-cdef-0123-456789abcdef")


@pytest.fixture
def efitools(tmp_path):
    """Runs a command of efitools in `tmp_path`; returns the file that it writes, the command's last argument."""

    def run(line: str) -> bytes:
        command = line.split()
        # sign-efi-sig-list reads the time as local time
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60, env={"TZ": "UTC"})
        return (tmp_path / command[-1]).read_bytes()

    return run


@pytest.fixture
def certificates(pairs, efitools, tmp_path) -> bytes:
    """Signature lists of two certificates and a hash."""
    lists = []
    for kind in ("rsa2048", "p256"):
        (tmp_path / "one.pem").write_bytes(pairs[kind].certificate_pem)
        lists.append(efitools(f"cert-to-efi-sig-list -g {OWNER} one.pem one.esl"))
    (tmp_path / "program").symlink_to("/usr/lib/systemd/boot/efi/systemd-bootx64.efi")
    lists.append(efitools("hash-to-efi-sig-list program one.esl"))
    return b"".join(lists)


def test_lists_of_efitools(certificates, pairs):
    first, second, third = efi.signature_lists(certificates)
    assert (first.type, second.type, third.type) == (efi.CERT_X509, efi.CERT_X509, efi.CERT_SHA256)
    encoded = pairs["rsa2048"].certificate.public_bytes(serialization.Encoding.DER)
    assert first.signatures == (encoded,)
    assert [len(each) for each in third.signatures] == [32]


@pytest.mark.parametrize("name", efi.VENDORS)
@pytest.mark.parametrize("append", [False, True])
def test_what_is_signed_is_what_efitools_have_signed(efitools, certificates, tmp_path, name, append):
    (tmp_path / "lists.esl").write_bytes(certificates)
    options = ["-o", "-t", "2026-07-01 12:30:05", *(["-a"] if append else []), name, "lists.esl", "bundle"]
    subprocess.run(["sign-efi-sig-list", *options], cwd=tmp_path, check=True, capture_output=True, env={"TZ": "UTC"})
    write = efi.Write(name, certificates, append, NOON)
    assert write.to_sign() == (tmp_path / "bundle").read_bytes()
    elsewhere = efi.Write(name, certificates, append, NOON.astimezone(timezone(timedelta(hours=5))))
    assert elsewhere.to_sign() == write.to_sign()
    assert efi.Write(name, certificates, append, NOON + timedelta(seconds=1)).to_sign() != write.to_sign()


def test_a_message_is_found_again():
    update = efi.Write("db", b"payload", False, NOON).signed(b"\x30\x03abc")
    assert efi.message_of(update) == b"\x30\x03abc"
    assert update.endswith(b"\x30\x03abcpayload")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda update: update[:39], "cut off"),
        (lambda update: update[:44], "cut off"),
        (lambda update: update[:16] + b"\xff\xff\xff\xff" + update[20:], "cut off"),
        (lambda update: update[:16] + b"\x18\0\0\0" + update[20:], "empty"),
        (lambda update: update[:24] + b"\0" + update[25:], "unknown type"),
    ],
)
def test_updates_that_are_none(change, words):
    update = efi.Write("db", b"", False, NOON).signed(b"\x30\x03abc")
    with pytest.raises(efi.EfiError, match=words):
        efi.message_of(change(update))


def signature_list(type_: uuid.UUID, size: int, content: bytes, *, total: int | None = None, header: int = 0) -> bytes:
    total = 28 + header + len(content) if total is None else total
    numbers = b"".join(number.to_bytes(4, "little") for number in (total, header, size))
    return type_.bytes_le + numbers + bytes(header) + content


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"-----BEGIN CERTIFICATE-----", "cut off"),
        (signature_list(efi.CERT_SHA256, 48, bytes(48))[:-1], "does not fit"),
        (signature_list(efi.CERT_SHA256, 48, bytes(48), total=0), "does not fit"),
        (signature_list(efi.CERT_SHA256, 48, b""), "does not fit"),
        (signature_list(efi.CERT_SHA256, 48, bytes(48), header=48, total=76), "does not fit"),
        (signature_list(efi.CERT_SHA256, 0, bytes(48)), "multiple"),
        (signature_list(efi.CERT_SHA256, 16, bytes(48)), "multiple"),
        (signature_list(efi.CERT_SHA256, 47, bytes(48)), "multiple"),
        (signature_list(efi.CERT_SHA256, 50, bytes(100)), "32 bytes"),
        (signature_list(efi.CERT_X509, 100, bytes(100)), "not X.509"),
        (signature_list(efi.CERT_SHA256, 48, bytes(48)) + b"\0", "cut off"),
    ],
)
def test_lists_that_are_none(payload, words):
    with pytest.raises(efi.EfiError, match=words):
        list(efi.signature_lists(payload))


def test_a_certificate_of_no_known_version(pairs):
    certificate = x509.load_pem_x509_certificate(pairs["rsa2048"].certificate_pem)
    der = certificate.public_bytes(serialization.Encoding.DER)
    content = bytes(16) + der.replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020107"), 1)
    with pytest.raises(efi.EfiError, match=r"not X\.509"):
        list(efi.signature_lists(signature_list(efi.CERT_X509, len(content), content)))


def test_lists_of_other_types_and_with_headers():
    payload = signature_list(OWNER, 20, bytes(40), header=4) + signature_list(efi.CERT_SHA256, 48, bytes(96))
    other, hashes = efi.signature_lists(payload)
    assert (other.type, other.signatures) == (OWNER, (bytes(4), bytes(4)))
    assert hashes.signatures == (bytes(32), bytes(32))


@given(st.data())
def test_damaged_lists_end_in_lists_or_the_own_error(data):
    types = st.sampled_from([efi.CERT_SHA256, efi.CERT_X509, OWNER])
    payload = bytearray()
    for _ in range(data.draw(st.integers(0, 3))):
        payload += signature_list(data.draw(types), 48, bytes(48 * data.draw(st.integers(1, 3))))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(payload)))
        payload[at : at + 4] = data.draw(st.binary(max_size=8) | st.sampled_from([b"\xff" * 4, b"\0" * 4]))
    try:
        found = list(efi.signature_lists(bytes(payload)))
    except efi.EfiError:
        return
    assert sum(len(each) for found_list in found for each in found_list.signatures) <= len(payload)


@given(st.binary(max_size=200))
def test_any_bytes_end_in_a_message_or_the_own_error(update):
    for each in (update, bytes(16) + efi.pkcs7_certificate(b"message")[:24] + update):
        with suppress(efi.EfiError):
            assert efi.message_of(each) in each
