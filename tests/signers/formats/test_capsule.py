"""FMP capsules, against what edk2's GenerateCapsule makes of the same; and hostile ones."""

import struct
import subprocess
import sys
import uuid
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signers.formats import capsule
from signers.formats.capsule import Capsule
from signers.formats.efi import EfiError

GUID = uuid.UUID("bf0d4599-20d4-414e-b2c5-3595b1cda402")
PAYLOAD = b"\x00\xffpayload" * 100
CAPSULE = Capsule(GUID, 0x00240403, 0x00240000, len(PAYLOAD))
MESSAGE = b"\x30\x82\x01\x00" + bytes(256)
WHOLE = CAPSULE.headers(MESSAGE) + PAYLOAD


def parse(data: bytes) -> tuple[Capsule, bytes]:
    return capsule.parse(lambda offset, length: data[offset : offset + length], len(data))


@pytest.mark.parametrize(("fw_version", "lowest"), [(0x00240403, 0x00240000), (0xFFFF_FFFF, 0)])
def test_bytes_are_those_of_generate_capsule(pairs, tmp_path, fw_version, lowest):
    (tmp_path / "payload").write_bytes(PAYLOAD)
    (tmp_path / "signer.pem").write_bytes(pairs["rsa2048"].private_pem + pairs["rsa2048"].certificate_pem)
    versions = ["--guid", str(GUID), "--fw-version", str(fw_version), "--lsv", str(lowest), "--monotonic-count", "1"]
    roles = ("--signer-private-cert", "--other-public-cert", "--trusted-public-cert")
    certificates = [argument for role in roles for argument in (role, "signer.pem")]
    command = [sys.executable, "-m", "edk2basetools.Capsule.GenerateCapsule", "--encode", *versions, *certificates]
    subprocess.run([*command, "-o", "theirs.cap", "payload"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    theirs = (tmp_path / "theirs.cap").read_bytes()
    found, message = parse(theirs)
    assert found == Capsule(GUID, fw_version, lowest, len(PAYLOAD))
    assert found.headers(message) + PAYLOAD == theirs


def test_a_capsule_is_found_again():
    assert parse(WHOLE) == (CAPSULE, MESSAGE)
    assert len(WHOLE) <= CAPSULE.size_max


@pytest.mark.parametrize("size", [0, 10, 100, 150, len(WHOLE) - len(PAYLOAD) - 1])
def test_cut_off(size):
    with pytest.raises(EfiError, match="cut off"):
        parse(WHOLE[:size])


@pytest.mark.parametrize("size", [len(WHOLE) - 1, len(WHOLE) - len(PAYLOAD)])
def test_a_payload_cut_off(size):
    with pytest.raises(EfiError, match="headers"):
        parse(WHOLE[:size])


def test_a_message_of_more_than_the_limit():
    message = bytes(capsule.MESSAGE_MAX_BYTES + 1)
    with pytest.raises(EfiError, match="cut off"):
        parse(CAPSULE.headers(message) + PAYLOAD)


def test_every_byte_of_the_headers_counts():
    versions_at = len(WHOLE) - len(PAYLOAD) - 8
    for at in range(len(WHOLE) - len(PAYLOAD)):
        changed = bytearray(WHOLE)
        changed[at] ^= 1
        try:
            assert parse(bytes(changed)) != (CAPSULE, MESSAGE)
        except EfiError:
            # what may differ is told apart by the caller: the firmware, the message and the versions
            assert not 52 <= at < 68
            assert at < versions_at


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_capsule_ends_in_its_parts_or_the_own_error(data):
    damaged = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, 160) | st.integers(0, len(WHOLE)))
        damaged[at : at + 4] = data.draw(st.binary(max_size=8) | st.just(struct.pack("<I", 0xFFFF_FFFF)))
    del damaged[data.draw(st.integers(0, len(damaged)) | st.just(len(damaged))) :]
    try:
        found, message = parse(bytes(damaged))
    except EfiError:
        return
    assert found.headers(message) + damaged[len(damaged) - found.payload_size :] == damaged


@given(st.binary(max_size=300))
def test_any_bytes_end_in_parts_or_the_own_error(data):
    for each in (data, WHOLE[:120] + data):
        with suppress(EfiError):
            parse(each)
