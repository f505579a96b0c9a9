"""Headers of idblocks: known answers, and what cannot be signed."""

import hashlib
import struct

import pytest
import rockchip_images
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from signers.formats import idblock
from signers.formats.idblock import IdblockError, Image
from tokens.errors import SignatureMismatch

IMAGES = [b"first".ljust(1024, b"\0"), b"second".ljust(512, b"\0")]
UNSIGNED = rockchip_images.header(IMAGES)


def key(bits: int) -> rsa.RSAPublicKey:
    """2^(bits - 1) + 1, by which 2^(bits + 132) can be divided in one's head: 2^133 - 1, and something."""
    return rsa.RSAPublicNumbers(65537, 2 ** (bits - 1) + 1).public_key()


def changed(at: int, value: bytes) -> bytes:
    """An unsigned header with other bytes, and its hash."""
    content = bytearray(UNSIGNED[: idblock.SIGNED_BYTES])
    content[at : at + len(value)] = value
    return (bytes(content) + hashlib.sha256(content).digest()).ljust(idblock.HEADER_BYTES, b"\0")


def test_what_it_says():
    header = idblock.parse(UNSIGNED)
    assert header.encode() == UNSIGNED
    assert not header.is_signed
    assert header.images == (
        Image(2048, 1024, hashlib.sha256(IMAGES[0]).digest()), Image(3072, 512, hashlib.sha256(IMAGES[1]).digest()),
    )  # fmt: skip


@pytest.mark.parametrize(("bits", "flags"), [(2048, "11200000"), (4096, "21200000")])
def test_a_known_header(bits, flags):
    """Every byte, as the layout has them."""
    size = bits // 8
    signature = bytes(index % 251 for index in range(size))
    expected = bytearray(2048)
    expected[:16] = bytes.fromhex("524b5353 00000000 8001 0200" + flags)
    expected[0x78:0x90] = bytes.fromhex("0400 0200 ffffffff 00000000 01000000 0000000000000000")
    expected[0x90:0xB0] = hashlib.sha256(IMAGES[0]).digest()
    expected[0xD0:0xE8] = bytes.fromhex("0600 0100 ffffffff 00000000 02000000 0000000000000000")
    expected[0xE8:0x108] = hashlib.sha256(IMAGES[1]).digest()
    expected[0x200] = 0x01
    expected[0x200 + size - 1] = 0x80
    expected[0x400:0x403] = bytes.fromhex("010001")
    expected[0x410:0x421] = b"\xff" * 16 + b"\x1f"
    expected[0x600 : 0x600 + size] = signature[::-1]
    header = idblock.parse(UNSIGNED).for_key(key(bits)).with_signature(signature)
    assert header.encode() == expected
    assert idblock.parse(bytes(expected)) == header
    assert header.is_signed
    # a header that is signed already, by a longer key: nothing of that stays
    assert idblock.parse(bytes(expected)).for_key(key(2048)) == idblock.parse(UNSIGNED).for_key(key(2048))


def test_what_is_unknown_of_the_header_stays():
    unknown = changed(0x14, b"rollback") + bytes(4)
    flags = struct.pack("<I", 0x40001)
    header = idblock.parse(changed(0x0C, flags)).for_key(key(2048))
    assert header.content[0x0C:0x10] == bytes.fromhex("11200400")
    assert b"rollback" in idblock.parse(unknown).for_key(key(2048)).content


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"", "neither RKNS nor RKSS"),
        (b"RKFW" + UNSIGNED[4:], "neither RKNS nor RKSS"),
        (UNSIGNED[:-1], "cut off"),
        (bytes.fromhex("3b8cdcfc").ljust(2048, b"\1") + b"RK33", "older format of RK33xx, which"),
        (bytes.fromhex("3b8cdcfc"), "older format, which"),
        (changed(0x08, b"\x00\x01"), "behind 1024 bytes and not 1536"),
        (changed(0x0C, b"\x02"), "other hashes than SHA-256"),
        (changed(0x0C, b"\x00"), "other hashes than SHA-256"),
        (changed(0x0D, b"\x10"), "it is encrypted"),
        (changed(0x0A, b"\x00"), "tells of 0 images"),
        (changed(0x0A, b"\x05"), "tells of 5 images"),
        (changed(0x78, b"\x03"), "begins within the header"),
        (UNSIGNED[:0x600] + bytes(512), "another hash than it says"),
        (UNSIGNED[:-1] + b"\1", "another hash than it says"),
    ],
)
def test_what_cannot_be_signed(head, words):
    with pytest.raises(IdblockError, match=words):
        idblock.parse(head)


def test_a_signature_is_of_one_key_and_one_header(pairs):
    private = pairs["rsa2048"].private_key
    public = private.public_key()
    header = idblock.parse(UNSIGNED).for_key(public)
    with pytest.raises(IdblockError, match="another"):
        header.verify(key(2048))
    with pytest.raises(SignatureMismatch):
        header.with_signature(bytes(256)).verify(public)
    with pytest.raises(IdblockError, match="follows its signature"):
        header.with_signature(b"\1" + bytes(256)).verify(public)


@given(st.binary(max_size=200), st.integers(0, 2047), st.integers(0, 2052))
def test_hostile_headers(noise, at, end):
    head = bytearray(UNSIGNED + b"RK33")
    head[at : at + len(noise)] = noise
    for each in (bytes(head[:end]), b"RKSS" + bytes(head[4:]), noise):
        try:
            header = idblock.parse(each)
        except IdblockError:
            continue
        assert header.encode() == each[:2048]
        assert all(image.offset >= 2048 and image.size <= 32 * 1024 * 1024 for image in header.images)
