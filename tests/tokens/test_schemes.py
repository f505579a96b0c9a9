"""Hashes, DigestInfo and what counts as a digest."""

import hashlib
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15

from tokens.errors import KeyUnsuited
from tokens.schemes import Ecdsa, Ed25519, Hash, RsaPkcs1v15, RsaPss, check_data, digest_info
from tokens.verify import HASHES


@pytest.mark.parametrize("hash_", Hash)
def test_sizes(hash_: Hash) -> None:
    assert hashlib.new(hash_.hashlib_name).digest_size == hash_.size == HASHES[hash_].digest_size


@pytest.mark.parametrize("hash_", Hash)
def test_digest_info(hash_: Hash, keys: Any) -> None:
    """It is what OpenSSL pads."""
    private = keys["rsa2048"].private
    signature = private.sign(b"message", PKCS1v15(), HASHES[hash_])
    padded = private.public_key().recover_data_from_signature(signature, PKCS1v15(), None)
    assert digest_info(hash_, hashlib.new(hash_.hashlib_name, b"message").digest()) == padded


def test_digest_info_of_the_rfc() -> None:
    """RFC 8017, section 9.2, note 1."""
    expected = bytes.fromhex("3031300d060960864801650304020105000420") + bytes(32)
    assert digest_info(Hash.SHA256, bytes(32)) == expected


@pytest.mark.parametrize("hash_", Hash)
def test_check_data(hash_: Hash) -> None:
    for scheme in (RsaPkcs1v15(hash_), RsaPss(hash_, 0), Ecdsa(hash_)):
        check_data(scheme, bytes(hash_.size))
        for length in (0, hash_.size - 1, hash_.size + 1):
            with pytest.raises(KeyUnsuited, match=f"has {hash_.size} bytes; this one has {length}"):
                check_data(scheme, bytes(length))


@pytest.mark.parametrize("length", [0, 1, 32, 1000])
def test_a_message_has_any_length(length: int) -> None:
    check_data(Ed25519(), bytes(length))
