"""AES-GCM made of AES-ECB: the vectors of its inventors, and what `cryptography` makes of the same."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from tokens import gcm
from tokens.gcm import KeyStream, NotAuthentic

# D. McGrew, J. Viega, "The Galois/Counter Mode of Operation (GCM)", appendix B: key, IV, plaintext, ciphertext, tag
VECTORS = [
    ("00" * 32, "00" * 12, "", "", "530f8afbc74536b9a963b4f1c4cb738b"),
    ("00" * 32, "00" * 12, "00" * 16, "cea7403d4d606b6e074ec5d3baf39d18", "d0d1c8a799996bf0265b98b5d48ab919"),
    (
        "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308",
        "cafebabefacedbaddecaf888",
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255",
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
        "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad",
        "b094dac5d93471bdec1a502270e3cc6c",
    ),
]


def key_stream(key: bytes, nonce: bytes, size: int) -> KeyStream:
    calls: list[int] = []

    async def encrypt_ecb(data: bytes) -> bytes:
        calls.append(len(data))
        return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(data)  # noqa: S305 - the primitive itself

    symmetric: Any = SimpleNamespace(encrypt_ecb=encrypt_ecb)
    stream = asyncio.run(gcm.key_stream(symmetric, nonce, size))
    assert max(calls) <= gcm.CALL_BLOCKS * 16
    return stream


@pytest.mark.parametrize("vector", VECTORS, ids=["nothing", "one block", "four blocks"])
def test_published_vectors(vector):
    key, nonce, plaintext, ciphertext, tag = map(bytes.fromhex, vector)
    stream = key_stream(key, nonce, len(plaintext))
    assert stream.encrypt(plaintext) == (ciphertext, tag)
    assert stream.decrypt(ciphertext, tag) == plaintext


@settings(max_examples=100)
@given(st.binary(min_size=32, max_size=32), st.binary(min_size=12, max_size=12), st.binary(max_size=300))
def test_the_same_as_cryptography(key, nonce, plaintext):
    stream = key_stream(key, nonce, len(plaintext))
    ciphertext, tag = stream.encrypt(plaintext)
    assert ciphertext + tag == AESGCM(key).encrypt(nonce, plaintext, None)
    assert stream.decrypt(ciphertext, tag) == plaintext


def test_more_than_one_call_of_the_key():
    key, nonce, plaintext = bytes(range(32)), bytes(range(12)), b"much " * (gcm.CALL_BLOCKS * 4)
    ciphertext, tag = key_stream(key, nonce, len(plaintext)).encrypt(plaintext)
    assert ciphertext + tag == AESGCM(key).encrypt(nonce, plaintext, None)


@pytest.mark.parametrize("at", [0, 20, -17, -16, -1])
def test_what_was_tampered_with_is_not_decrypted(at):
    stream = key_stream(bytes(32), bytes(12), 40)
    sealed = bytearray(b"".join(stream.encrypt(b"x" * 40)))
    sealed[at] ^= 1
    with pytest.raises(NotAuthentic):
        stream.decrypt(bytes(sealed[:-16]), bytes(sealed[-16:]))


def test_a_key_stream_is_not_shown():
    assert repr(key_stream(bytes(32), bytes(12), 40)) == "KeyStream()"
