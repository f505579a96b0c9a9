"""Signatures that OpenSSL's command line made are accepted; whatever is changed in them is not."""

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tokens.errors import KeyUnsuited, SigningFailed
from tokens.schemes import Ecdsa, Ed25519, Hash, RsaPkcs1v15, RsaPss, Scheme
from tokens.verify import check_suited, ecdsa_der, verify

MESSAGE = b"what the device will run"
PSS = ("-sigopt", "rsa_padding_mode:pss", "-sigopt")
SIGNED: dict[str, tuple[str, Scheme, tuple[str, ...]]] = {
    "v1.5": ("rsa2048", RsaPkcs1v15(Hash.SHA256), ()),
    "v1.5 SHA-512": ("rsa2048", RsaPkcs1v15(Hash.SHA512), ()),
    "PSS": ("rsa2048", RsaPss(Hash.SHA256, 32), (*PSS, "rsa_pss_saltlen:32")),
    "PSS without salt": ("rsa2048", RsaPss(Hash.SHA384, 0), (*PSS, "rsa_pss_saltlen:0")),
    "PSS longest salt": ("rsa2048", RsaPss(Hash.SHA256, 222), (*PSS, "rsa_pss_saltlen:max")),
    "P-256": ("p256", Ecdsa(Hash.SHA256), ()),
    "P-384": ("p384", Ecdsa(Hash.SHA3_384), ()),
    "P-521": ("p521", Ecdsa(Hash.SHA512), ()),
    "Ed25519": ("ed25519", Ed25519(), ()),
}


def data_for(scheme: Scheme, message: bytes = MESSAGE) -> bytes:
    return message if isinstance(scheme, Ed25519) else hashlib.new(scheme.hash.hashlib_name, message).digest()


def openssl_signature(key: Any, scheme: Scheme, options: tuple[str, ...], directory: Path) -> bytes:
    (directory / "key").write_bytes(key.pem)
    (directory / "message").write_bytes(MESSAGE)
    if isinstance(scheme, Ed25519):
        command = ["openssl", "pkeyutl", "-sign", "-rawin", "-inkey", "key", "-in", "message"]
    else:
        command = ["openssl", "dgst", f"-{scheme.hash}", "-sign", "key", *options, "message"]
    signature = subprocess.run(command, cwd=directory, check=True, capture_output=True).stdout
    if not isinstance(scheme, Ecdsa):
        return signature
    size = (key.private.key_size + 7) // 8
    return b"".join(number.to_bytes(size, "big") for number in decode_dss_signature(signature))


@pytest.mark.parametrize("name", SIGNED)
def test_verify(name: str, keys: Any, tmp_path: Path) -> None:
    key_name, scheme, options = SIGNED[name]
    public = keys[key_name].private.public_key()
    signature = openssl_signature(keys[key_name], scheme, options, tmp_path)
    verify(public, scheme, data_for(scheme), signature)

    zeros = bytes(len(signature))
    changed = [signature[:-1], signature + b"\0", b"", zeros, bytes([signature[0] ^ 1]) + signature[1:]]
    for wrong in changed:
        with pytest.raises(SigningFailed):
            verify(public, scheme, data_for(scheme), wrong)
    with pytest.raises(SigningFailed):
        verify(public, scheme, data_for(scheme, b"another"), signature)


def test_salt_counts(keys: Any, tmp_path: Path) -> None:
    _, scheme, options = SIGNED["PSS"]
    signature = openssl_signature(keys["rsa2048"], scheme, options, tmp_path)
    with pytest.raises(SigningFailed):
        verify(keys["rsa2048"].private.public_key(), RsaPss(Hash.SHA256, 31), data_for(scheme), signature)


def test_key_counts(keys: Any, tmp_path: Path) -> None:
    _, scheme, options = SIGNED["v1.5"]
    signature = openssl_signature(keys["rsa2048"], scheme, options, tmp_path)
    with pytest.raises(SigningFailed):
        verify(keys["rsa4096"].private.public_key(), scheme, data_for(scheme), signature)


@pytest.mark.parametrize("name", ["rsa2048", "p256", "ed25519"])
def test_suited(name: str, keys: Any) -> None:
    public = keys[name].private.public_key()
    for key_name, scheme, _ in SIGNED.values():
        if key_name[0] == name[0]:
            check_suited(public, scheme)
        else:
            with pytest.raises(KeyUnsuited):
                check_suited(public, scheme)
            with pytest.raises(KeyUnsuited):
                verify(public, scheme, data_for(scheme), bytes(64))


@pytest.mark.parametrize(("name", "longest"), [("rsa2048", 256 - 64 - 2), ("rsa4096", 512 - 64 - 2)])
def test_room_for_a_salt(name: str, longest: int, keys: Any) -> None:
    public = keys[name].private.public_key()
    check_suited(public, RsaPss(Hash.SHA512, longest))
    with pytest.raises(KeyUnsuited, match=f"room for {longest}"):
        check_suited(public, RsaPss(Hash.SHA512, longest + 1))


@pytest.mark.parametrize(("name", "size"), [("p256", 32), ("p384", 48), ("p521", 66)])
def test_ecdsa_der(name: str, size: int, keys: Any) -> None:
    public = keys[name].private.public_key()
    signature = (1).to_bytes(size, "big") + (0x80).to_bytes(size, "big")
    # RFC 3279, section 2.2.3: SEQUENCE { INTEGER r, INTEGER s }, minimal and positive
    assert ecdsa_der(signature, public) == bytes.fromhex("3007020101 02020080")
    for wrong in (signature[1:], signature + b"\0", b""):
        with pytest.raises(ValueError, match=f"{2 * size} expected"):
            ecdsa_der(wrong, public)
