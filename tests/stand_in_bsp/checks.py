"""What a Jetson would do with a signed image: by OpenSSL, and by the rules of ../shared/tegra.md, section 1.4."""

import hashlib
import hmac
import subprocess
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES128
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.cmac import CMAC

CHAIN = (b"BL", b"GP", b"KDK", b"DK")
"""The labels by which the stand-in BSP derives keys."""


def openssl_accepts(image: bytes, soctype: str, kind: str, public_key: Path, salt_bytes: int = 32) -> bool:
    """Whether OpenSSL says that the header's signature is the key's; `kind` is rsa or ec."""
    t234 = soctype == "tegra234"
    signed, at = (image[4032:8192], 144) if t234 else (image[2960:4096], 512)
    if kind == "rsa":
        signature = image[at : at + (384 if t234 else 256)][::-1]
        options = ["-sigopt", "rsa_padding_mode:pss", "-sigopt", f"rsa_pss_saltlen:{salt_bytes}"]
    else:
        r, s = (int.from_bytes(image[start : start + 48], "little") for start in (at, at + 48))
        signature, options = encode_dss_signature(r, s), []
    with tempfile.NamedTemporaryFile() as file:
        file.write(signature)
        file.flush()
        verify = ["-sha512" if t234 else "-sha256", "-verify", str(public_key), *options, "-signature", file.name]
        done = subprocess.run(["openssl", "dgst", *verify], input=signed, capture_output=True, check=False)
    return done.returncode == 0


def content(image: bytes, soctype: str, sbk: bytes | None) -> bytes:
    """The image behind a header, whose digest and, where there is an SBK, tags are verified, decrypted."""
    if soctype == "tegra234":
        payload = image[8192:]
        assert hashlib.sha512(image[68:8192]).digest() == image[4:68]
        assert hashlib.sha512(payload).digest() == image[5216:5280]
        assert int.from_bytes(image[5124:5128], "little") == len(payload)
        if sbk is None:
            return payload
        return AESGCM(derived(sbk)).decrypt(image[5188:5200], payload + image[5200:5216], image[5120:5200])
    payload = image[4096:]
    assert hashlib.sha256(payload).digest() == image[2992:3024]
    mac = CMAC(AES128(sbk or bytes(16)))
    mac.update(payload)
    mac.verify(image[3024:3040])
    if sbk is None:
        return payload
    decryptor = Cipher(AES128(sbk), CBC(bytes(16))).decryptor()
    return decryptor.update(payload) + decryptor.finalize()


def derived(sbk: bytes) -> bytes:
    """The key that a tegra234 decrypts an image with."""
    key = sbk
    for label in CHAIN:
        key = hmac.digest(key, b"\0\0\0\1" + label + b"\0" + b"\0" + b"\0\0\1\0", "sha256")
    return key
