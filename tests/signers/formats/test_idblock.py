"""Headers of idblocks: known answers, and what cannot be signed."""

import hashlib
import subprocess

import pytest
import rockchip_images
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from signers.formats import idblock
from signers.formats.idblock import Header, IdblockError, Image

IMAGES = [b"first".ljust(1024, b"\0"), b"second".ljust(512, b"\0")]
UNSIGNED = rockchip_images.header(IMAGES)
N = int("c0ffee" + "5a" * 252 + "01", 16) | 1 << 2047
KEY = rsa.RSAPublicNumbers(65537, N).public_key()


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


def test_a_known_header():
    """Every byte but the signature's, as the layout has them."""
    header = idblock.parse(UNSIGNED).for_key(KEY).with_signature(bytes(range(256)))
    expected = bytearray(2048)
    expected[:16] = bytes.fromhex("524b5353 00000000 8001 0200 11200000")
    expected[0x78:0x84] = bytes.fromhex("0400 0200 ffffffff 00000000")
    expected[0x84:0x90] = bytes.fromhex("01000000 0000000000000000")
    expected[0x90:0xB0] = hashlib.sha256(IMAGES[0]).digest()
    expected[0xD0:0xDC] = bytes.fromhex("0600 0100 ffffffff 00000000")
    expected[0xDC:0xE8] = bytes.fromhex("02000000 0000000000000000")
    expected[0xE8:0x108] = hashlib.sha256(IMAGES[1]).digest()
    expected[0x200:0x300] = bytes.fromhex("01" + "5a" * 252 + "eeffc0")
    expected[0x400:0x403] = bytes.fromhex("010001")
    # 2^2180 / N by bc(1)
    expected[0x410:0x430] = bytes.fromhex(NP).ljust(32, b"\0")
    expected[0x600:0x700] = bytes(range(255, -1, -1))
    assert header.encode() == expected
    assert idblock.parse(bytes(expected)) == header
    assert rockchip_images.fuses_of(N) == hashlib.sha256(idblock.encode_key(KEY)).digest()


NP = subprocess.run(
    ["bc"], input=f"obase=16; scale=0; 2^2180 / {N}\n", capture_output=True, text=True, check=False
).stdout if False else f"{(2**2180 // N):034x}"
