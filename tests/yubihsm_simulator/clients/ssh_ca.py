"""What a YubiHSM 2 needs to issue OpenSSH certificates: a template, and requests with a time that somebody vouches for.

Layouts: examples/ssh.c of yubihsm-shell, and OpenSSH's PROTOCOL.certkeys.
"""

import hashlib
import os
import struct
import time

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.yubihsm_simulator.clients.conftest import private_key


def template(time_key: rsa.RSAPublicKey, authorities: list[int]) -> bytes:
    """Who stamps the time, which keys may sign, for how long, and for which principals never."""
    fields = (
        (1, bytes([9])),
        (2, time_key.public_numbers().n.to_bytes(256, "big")),
        (3, struct.pack(f">{len(authorities)}H", *authorities)),
        (4, struct.pack(">I", 0)),
        (5, struct.pack(">I", 0xFFFFFFFF)),
        (6, b"root\0toor\0"),
    )
    return b"".join(struct.pack(">BH", tag, len(value)) + value for tag, value in fields)


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _mpint(number: int) -> bytes:
    return _string(number.to_bytes(number.bit_length() // 8 + 1, "big"))


def certificate(authority: rsa.RSAPublicKey, principal: str) -> bytes:
    """A user's, as OpenSSH's PROTOCOL.certkeys has it, but for its signature."""
    subject, issuer = private_key("rsa2048").public_key().public_numbers(), authority.public_numbers()
    return b"".join((
        _string(b"ssh-rsa-cert-v01@openssh.com"), _string(os.urandom(32)),
        _mpint(subject.e), _mpint(subject.n),
        struct.pack(">QI", 1, 1), _string(b"identity"), _string(_string(principal.encode())),
        struct.pack(">QQ", 0, 0xFFFFFFFFFFFFFFFF), _string(b""), _string(b""), _string(b""),
        _string(_string(b"ssh-rsa") + _mpint(issuer.e) + _mpint(issuer.n)),
    ))  # fmt: skip


def request(time_key: rsa.RSAPrivateKey, tbs: bytes) -> bytes:
    """A time, the time key's signature of it and of the certificate, the certificate."""
    now = struct.pack(">I", int(time.time()))
    signature = time_key.sign(hashlib.sha256(tbs).digest() + now, padding.PKCS1v15(), hashes.SHA256())
    return now + signature + tbs
