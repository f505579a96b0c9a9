"""Yubico OTPs and SSH certificates; the clients' own examples cover the good case of the latter, see clients/."""

import os
import struct
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils
from cryptography.hazmat.primitives.ciphers.aead import AESCCM
from yubihsm.core import AuthSession
from yubihsm.defs import ALGORITHM, CAPABILITY, COMMAND, ERROR
from yubihsm.objects import AsymmetricKey, OtpAeadKey, OtpData, Template

from tests.yubihsm_simulator.conftest import refused

ALL = CAPABILITY.ALL
# Yubico, "OTP test vectors": the OTP dvgtiblfkbgturecfllberrvkinnctnn
KEY = bytes(range(16))
PRIVATE_ID = b"\x01\x02\x03\x04\x05\x06"
OTP = bytes.fromhex("2f5d71a4915dec304aa13ccf97bb0dbb")


@pytest.mark.parametrize(
    ("algorithm", "length"),
    [(ALGORITHM.AES128_YUBICO_OTP, 16), (ALGORITHM.AES192_YUBICO_OTP, 24), (ALGORITHM.AES256_YUBICO_OTP, 32)],
)
def test_aead(session: AuthSession, algorithm: ALGORITHM, length: int) -> None:
    secret = os.urandom(length)
    key = OtpAeadKey.put(session, 5, "", 1, ALL, algorithm, 0x01020304, secret)
    aead = key.create_otp_aead(KEY, PRIVATE_ID)
    nonce = b"\x04\x03\x02\x01" + aead[:6] + bytes(3)
    assert AESCCM(secret, 8).decrypt(nonce, aead[6:], None) == KEY + PRIVATE_ID
    assert key.decrypt_otp(aead, OTP) == OtpData(1, 1, 1, 1)


def test_rewrap(session: AuthSession) -> None:
    old = OtpAeadKey.generate(session, 5, "", 1, ALL, ALGORITHM.AES128_YUBICO_OTP, 1)
    new = OtpAeadKey.generate(session, 6, "", 1, ALL, ALGORITHM.AES256_YUBICO_OTP, 2)
    aead = old.create_otp_aead(KEY, PRIVATE_ID)
    assert new.decrypt_otp(old.rewrap_otp_aead(6, aead), OTP) == OtpData(1, 1, 1, 1)
    with refused(ERROR.INVALID_DATA):
        new.decrypt_otp(aead, OTP)
    powerless = OtpAeadKey.generate(session, 7, "", 1, CAPABILITY.NONE, ALGORITHM.AES128_YUBICO_OTP, 1)
    with refused(ERROR.INSUFFICIENT_PERMISSIONS):
        old.rewrap_otp_aead(7, aead)
    with refused(ERROR.INSUFFICIENT_PERMISSIONS):
        powerless.rewrap_otp_aead(6, aead)


def test_otp_refused(session: AuthSession) -> None:
    key = OtpAeadKey.generate(session, 5, "", 1, ALL, ALGORITHM.AES128_YUBICO_OTP, 1)
    aead = key.create_otp_aead(KEY, PRIVATE_ID)
    with refused(ERROR.INVALID_OTP):
        key.decrypt_otp(aead, OTP[:-1] + b"\x00")
    with refused(ERROR.INVALID_OTP):  # another's
        key.decrypt_otp(key.create_otp_aead(KEY, bytes(6)), OTP)
    with refused(ERROR.INVALID_DATA):
        key.decrypt_otp(aead[:-1] + bytes([aead[-1] ^ 1]), OTP)
    with refused(ERROR.WRONG_LENGTH):
        key.decrypt_otp(aead, OTP[:-1])
    with refused(ERROR.WRONG_LENGTH):
        session.send_secure_cmd(COMMAND.CREATE_OTP_AEAD, b"\x00\x05" + bytes(21))
    assert len(key.randomize_otp_aead()) == 36


NOW = 1_700_000_000


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def certificate_request(principal: bytes) -> bytes:
    """The fields of OpenSSH's PROTOCOL.certkeys before the signature; the device reads those up to the principals."""
    before = string(b"ssh-rsa-cert-v01@openssh.com") + string(os.urandom(32)) + string(b"\x01\x00\x01")
    return before + string(os.urandom(256)) + struct.pack(">QI", 0, 1) + string(b"id") + string(string(principal))


def put_template(session: AuthSession, timestamps: rsa.RSAPublicKey, **changes: bytes) -> None:
    values = {
        "algorithm": b"\x09",
        "key": timestamps.public_numbers().n.to_bytes(256, "big"),
        "ca_keys": b"\x00\x05\x00\x06",
        "not_before": struct.pack(">I", NOW - 60),
        "not_after": struct.pack(">I", NOW + 60),
        "principals": b"root\x00toor\x00",
    } | changes
    encoded = b"".join(struct.pack(">BH", tag, len(value)) + value for tag, value in enumerate(values.values(), 1))
    Template.put(session, 5, "", 1, CAPABILITY.NONE, ALGORITHM.TEMPLATE_SSH, encoded)


def signed_request(timestamps: rsa.RSAPrivateKey, request: bytes, now: int = NOW) -> bytes:
    timestamp = struct.pack(">I", now)
    digest = sha256(sha256(request).digest() + timestamp).digest()
    return timestamp + timestamps.sign(digest, padding.PKCS1v15(), utils.Prehashed(hashes.SHA256())) + request


@pytest.fixture
def ca(session: AuthSession, rsa_key: rsa.RSAPrivateKey) -> AsymmetricKey:
    return AsymmetricKey.put(session, 5, "ca", 1, CAPABILITY.SIGN_SSH_CERTIFICATE, rsa_key)


@pytest.mark.parametrize(
    ("algorithm", "name", "digest"),
    [
        (ALGORITHM.RSA_PKCS1_SHA1, b"ssh-rsa", hashes.SHA1()),
        (ALGORITHM.RSA_PKCS1_SHA256, b"rsa-sha2-256", hashes.SHA256()),
        (ALGORITHM.RSA_PKCS1_SHA512, b"rsa-sha2-512", hashes.SHA512()),
    ],
)
def test_ssh_certificate(
    session: AuthSession,
    ca: AsymmetricKey,
    rsa_key: rsa.RSAPrivateKey,
    algorithm: ALGORITHM,
    name: bytes,
    digest: hashes.HashAlgorithm,
) -> None:
    put_template(session, rsa_key.public_key())
    request = certificate_request(b"alice")
    answer = ca.sign_ssh_certificate(5, signed_request(rsa_key, request), algorithm)
    head = struct.pack(">I", len(answer) - 4) + string(name) + struct.pack(">I", 256)
    assert answer[:-256] == head
    rsa_key.public_key().verify(answer[-256:], request, padding.PKCS1v15(), digest)


def test_ssh_constraints(session: AuthSession, ca: AsymmetricKey, rsa_key: rsa.RSAPrivateKey) -> None:
    put_template(session, rsa_key.public_key())
    request = certificate_request(b"alice")
    good = signed_request(rsa_key, request)
    for bad in (
        signed_request(rsa_key, certificate_request(b"root")),
        signed_request(rsa_key, request, NOW - 61),
        signed_request(rsa_key, request, NOW + 61),
        good[:3] + bytes([good[3] ^ 1]) + good[4:],
        good[:-1] + bytes([good[-1] ^ 1]),
    ):
        with refused(ERROR.SSH_CA_CONSTRAINT_VIOLATION):
            ca.sign_ssh_certificate(5, bad)
    for bad in (good[:100], good[:300]):
        with refused(ERROR.INVALID_DATA):
            ca.sign_ssh_certificate(5, bad)
    with refused(ERROR.INVALID_DATA):
        ca.sign_ssh_certificate(5, good, ALGORITHM.RSA_PSS_SHA256)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"ca_keys": b"\x00\x06"}, ERROR.SSH_CA_CONSTRAINT_VIOLATION),
        ({"key": bytes(256)}, ERROR.INVALID_DATA),
        ({"key": b""}, ERROR.INVALID_DATA),
    ],
)
def test_ssh_template(
    session: AuthSession, ca: AsymmetricKey, rsa_key: rsa.RSAPrivateKey, changes: dict[str, bytes], code: int
) -> None:
    put_template(session, rsa_key.public_key(), **changes)
    with refused(code):
        ca.sign_ssh_certificate(5, signed_request(rsa_key, certificate_request(b"alice")))


def test_ssh_template_that_is_none(session: AuthSession, ca: AsymmetricKey, rsa_key: rsa.RSAPrivateKey) -> None:
    Template.put(session, 5, "", 1, CAPABILITY.NONE, ALGORITHM.TEMPLATE_SSH, b"\x01\x00\x01\x09")
    with refused(ERROR.INVALID_DATA):
        ca.sign_ssh_certificate(5, signed_request(rsa_key, certificate_request(b"alice")))
