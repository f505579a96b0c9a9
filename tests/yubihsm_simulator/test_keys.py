"""What the keys do, verified by OpenSSL (through `cryptography`)."""

import hashlib
import hmac
import os
import struct

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from yubihsm.core import AuthSession
from yubihsm.defs import ALGORITHM, CAPABILITY, COMMAND, ERROR
from yubihsm.objects import AsymmetricKey, HmacKey, SymmetricKey

from tests.yubihsm_simulator.conftest import refused

HASHES = {20: hashes.SHA1(), 28: hashes.SHA224(), 32: hashes.SHA256(), 48: hashes.SHA384(), 64: hashes.SHA512()}
ID = b"\x00\x05"


@pytest.fixture
def rsa_public(session: AuthSession, rsa_key: rsa.RSAPrivateKey) -> rsa.RSAPublicKey:
    """Key 5 on the device."""
    AsymmetricKey.put(session, 5, "rsa", 1, CAPABILITY.ALL, rsa_key)
    return rsa_key.public_key()


@pytest.mark.parametrize("length", [20, 32, 48, 64])
def test_pkcs1_of_a_hash(session: AuthSession, rsa_public: rsa.RSAPublicKey, length: int) -> None:
    digest = os.urandom(length)
    signature = session.send_secure_cmd(COMMAND.SIGN_PKCS1, ID + digest)
    rsa_public.verify(signature, digest, padding.PKCS1v15(), utils.Prehashed(HASHES[length]))
    with pytest.raises(InvalidSignature):
        rsa_public.verify(signature, os.urandom(length), padding.PKCS1v15(), utils.Prehashed(HASHES[length]))


@pytest.mark.parametrize("length", [1, 19, 28, 51, 245])
def test_pkcs1_of_other_data_is_padded_only(session: AuthSession, rsa_public: rsa.RSAPublicKey, length: int) -> None:
    data = os.urandom(length)
    signature = session.send_secure_cmd(COMMAND.SIGN_PKCS1, ID + data)
    assert rsa_public.recover_data_from_signature(signature, padding.PKCS1v15(), None) == data


@pytest.mark.parametrize("length", [0, 246])
def test_pkcs1_of_no_data_and_of_too_much(session: AuthSession, rsa_public: rsa.RSAPublicKey, length: int) -> None:
    with refused(ERROR.WRONG_LENGTH):
        session.send_secure_cmd(COMMAND.SIGN_PKCS1, ID + bytes(length))


@pytest.mark.parametrize(("mgf", "mgf_hash"), [(32, hashes.SHA1()), (33, hashes.SHA256()), (35, hashes.SHA512())])
@pytest.mark.parametrize("salt", [0, 32, 222])
def test_pss(session: AuthSession, rsa_public: rsa.RSAPublicKey, mgf: int, mgf_hash: hashes.HashAlgorithm, salt: int):
    digest = os.urandom(32)
    signature = session.send_secure_cmd(COMMAND.SIGN_PSS, ID + struct.pack(">BH", mgf, salt) + digest)
    pss = padding.PSS(padding.MGF1(mgf_hash), salt)
    rsa_public.verify(signature, digest, pss, utils.Prehashed(hashes.SHA256()))


@pytest.mark.parametrize(
    ("mgf", "salt", "length", "code"),
    [
        (33, 223, 32, ERROR.INVALID_DATA),
        (36, 32, 32, ERROR.INVALID_DATA),
        (26, 32, 32, ERROR.INVALID_DATA),
        (33, 32, 31, ERROR.WRONG_LENGTH),
        (33, 32, 0, ERROR.WRONG_LENGTH),
    ],
)
def test_pss_refused(session: AuthSession, rsa_public: rsa.RSAPublicKey, mgf: int, salt: int, length: int, code: int):
    with refused(code):
        session.send_secure_cmd(COMMAND.SIGN_PSS, ID + struct.pack(">BH", mgf, salt) + bytes(length))


def test_decrypt_pkcs1(session: AuthSession, rsa_public: rsa.RSAPublicKey) -> None:
    key = AsymmetricKey(session, 5)
    for message in (b"", b"\x00\x00", os.urandom(245)):
        assert key.decrypt_pkcs1v1_5(rsa_public.encrypt(message, padding.PKCS1v15())) == message
    n = rsa_public.public_numbers().n
    for refused_ in (b"\xff" * 256, n.to_bytes(256, "big"), bytes(256)):
        with refused(ERROR.INVALID_DATA):
            session.send_secure_cmd(COMMAND.DECRYPT_PKCS1, ID + refused_)
    for length in (0, 255, 257):
        with refused(ERROR.WRONG_LENGTH):
            session.send_secure_cmd(COMMAND.DECRYPT_PKCS1, ID + bytes(length))


@pytest.mark.parametrize("digest", [hashes.SHA1(), hashes.SHA256(), hashes.SHA384(), hashes.SHA512()])
def test_decrypt_oaep(session: AuthSession, rsa_public: rsa.RSAPublicKey, digest: hashes.HashAlgorithm) -> None:
    key = AsymmetricKey(session, 5)
    for message in (b"", b"\x00\x01\x00", os.urandom(100)):
        oaep = padding.OAEP(padding.MGF1(hashes.SHA1()), digest, b"label")
        encrypted = rsa_public.encrypt(message, oaep)
        assert key.decrypt_oaep(encrypted, b"label", digest, hashes.SHA1()) == message
        with refused(ERROR.INVALID_DATA):
            key.decrypt_oaep(encrypted, b"another", digest, hashes.SHA1())
        with refused(ERROR.INVALID_DATA):
            key.decrypt_oaep(encrypted, b"label", digest, hashes.SHA256())


def test_decrypt_oaep_lengths(session: AuthSession, rsa_public: rsa.RSAPublicKey) -> None:
    for length in (0, 255, 256, 256 + 33, 256 + 65):
        with refused(ERROR.WRONG_LENGTH):
            session.send_secure_cmd(COMMAND.DECRYPT_OAEP, ID + b"\x21" + bytes(length))
    with refused(ERROR.INVALID_DATA):
        session.send_secure_cmd(COMMAND.DECRYPT_OAEP, ID + b"\x1a" + bytes(256 + 32))


CURVES = [
    ec.SECP224R1(),
    ec.SECP256R1(),
    ec.SECP384R1(),
    ec.SECP521R1(),
    ec.SECP256K1(),
    ec.BrainpoolP256R1(),
    ec.BrainpoolP384R1(),
    ec.BrainpoolP512R1(),
]


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.name)
def test_ecdsa_with_every_hash(session: AuthSession, curve: ec.EllipticCurve) -> None:
    private = ec.generate_private_key(curve)
    AsymmetricKey.put(session, 5, "ec", 1, CAPABILITY.ALL, private)
    for length, algorithm in HASHES.items():
        digest = os.urandom(length)
        signature = session.send_secure_cmd(COMMAND.SIGN_ECDSA, ID + digest)
        private.public_key().verify(signature, digest, ec.ECDSA(utils.Prehashed(algorithm)))
        with pytest.raises(InvalidSignature):
            private.public_key().verify(signature, os.urandom(length), ec.ECDSA(utils.Prehashed(algorithm)))
    for length in (0, 19, 21, 33, 65, 66 if curve.key_size != 521 else 67):
        with refused(ERROR.INVALID_DATA):
            session.send_secure_cmd(COMMAND.SIGN_ECDSA, ID + bytes(length))


def test_ecdsa_with_p521_takes_a_padded_hash(session: AuthSession) -> None:
    private = ec.generate_private_key(ec.SECP521R1())
    AsymmetricKey.put(session, 5, "ec", 1, CAPABILITY.ALL, private)
    for length in (32, 64):
        digest = os.urandom(length)
        signature = session.send_secure_cmd(COMMAND.SIGN_ECDSA, ID + digest.rjust(66, b"\x00"))
        private.public_key().verify(signature, digest, ec.ECDSA(utils.Prehashed(HASHES[length])))


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.name)
def test_ecdh(session: AuthSession, curve: ec.EllipticCurve) -> None:
    mine, theirs = ec.generate_private_key(curve), ec.generate_private_key(curve)
    key = AsymmetricKey.put(session, 5, "ec", 1, CAPABILITY.ALL, mine)
    assert key.derive_ecdh(theirs.public_key()) == theirs.exchange(ec.ECDH(), mine.public_key())
    point = bytearray(theirs.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint))
    with refused(ERROR.WRONG_LENGTH):
        session.send_secure_cmd(COMMAND.DERIVE_ECDH, ID + point[:-1])
    point[-1] ^= 1
    with refused(ERROR.INVALID_DATA):
        session.send_secure_cmd(COMMAND.DERIVE_ECDH, ID + point)


def test_eddsa(session: AuthSession) -> None:
    private = ed25519.Ed25519PrivateKey.generate()
    AsymmetricKey.put(session, 5, "ed", 1, CAPABILITY.ALL, private)
    for message in (b"", os.urandom(3114)):
        assert session.send_secure_cmd(COMMAND.SIGN_EDDSA, ID + message) == private.sign(message)


WITH_KEY = [
    (COMMAND.SIGN_PKCS1, CAPABILITY.SIGN_PKCS),
    (COMMAND.SIGN_PSS, CAPABILITY.SIGN_PSS),
    (COMMAND.DECRYPT_PKCS1, CAPABILITY.DECRYPT_PKCS),
    (COMMAND.DECRYPT_OAEP, CAPABILITY.DECRYPT_OAEP),
    (COMMAND.SIGN_ECDSA, CAPABILITY.SIGN_ECDSA),
    (COMMAND.DERIVE_ECDH, CAPABILITY.DERIVE_ECDH),
    (COMMAND.SIGN_EDDSA, CAPABILITY.SIGN_EDDSA),
]


@pytest.mark.parametrize(("command", "capability"), WITH_KEY)
def test_the_key_needs_the_capability(session: AuthSession, command: COMMAND, capability: CAPABILITY) -> None:
    with refused(ERROR.OBJECT_NOT_FOUND):
        session.send_secure_cmd(command, b"\x00\x09")
    AsymmetricKey.generate(session, 9, "", 1, CAPABILITY.ALL & ~capability, ALGORITHM.EC_P256)
    with refused(ERROR.INSUFFICIENT_PERMISSIONS):
        session.send_secure_cmd(command, b"\x00\x09")


def test_a_key_of_another_kind(session: AuthSession) -> None:
    AsymmetricKey.generate(session, 9, "", 1, CAPABILITY.ALL, ALGORITHM.EC_P256)
    AsymmetricKey.generate(session, 8, "", 1, CAPABILITY.ALL, ALGORITHM.EC_ED25519)
    for command in (COMMAND.SIGN_PKCS1, COMMAND.SIGN_PSS, COMMAND.DECRYPT_PKCS1, COMMAND.SIGN_EDDSA):
        with refused(ERROR.INVALID_DATA):
            session.send_secure_cmd(command, b"\x00\x09" + bytes(32))
    for command in (COMMAND.SIGN_ECDSA, COMMAND.DERIVE_ECDH):
        with refused(ERROR.INVALID_DATA):
            session.send_secure_cmd(command, b"\x00\x08" + bytes(32))


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        (ALGORITHM.HMAC_SHA1, "sha1"),
        (ALGORITHM.HMAC_SHA256, "sha256"),
        (ALGORITHM.HMAC_SHA384, "sha384"),
        (ALGORITHM.HMAC_SHA512, "sha512"),
    ],
)
def test_hmac(session: AuthSession, algorithm: ALGORITHM, name: str) -> None:
    secret = os.urandom(20)
    key = HmacKey.put(session, 5, "", 1, CAPABILITY.SIGN_HMAC | CAPABILITY.VERIFY_HMAC, secret, algorithm)
    mac = key.sign_hmac(b"data")
    assert mac == hmac.digest(secret, b"data", name)
    assert key.verify_hmac(mac, b"data")
    assert not key.verify_hmac(mac, b"dato")
    assert not key.verify_hmac(bytes(len(mac)), b"data")
    with refused(ERROR.WRONG_LENGTH):
        key.verify_hmac(mac[:-1], b"")


def test_aes(session: AuthSession) -> None:
    secret, iv, data = os.urandom(32), os.urandom(16), os.urandom(64)
    key = SymmetricKey.put(session, 5, "", 1, CAPABILITY.ALL, ALGORITHM.AES256, secret)
    for mode, encrypted in ((modes.ECB(), key.encrypt_ecb(data)), (modes.CBC(iv), key.encrypt_cbc(iv, data))):
        decryptor = Cipher(algorithms.AES(secret), mode).decryptor()
        assert decryptor.update(encrypted) == data
    assert key.decrypt_ecb(key.encrypt_ecb(data)) == data
    assert key.decrypt_cbc(iv, key.encrypt_cbc(iv, data)) == data
    for command, length in [
        (COMMAND.ENCRYPT_ECB, 0),
        (COMMAND.DECRYPT_ECB, 17),
        (COMMAND.ENCRYPT_CBC, 16),
        (COMMAND.DECRYPT_CBC, 33),
    ]:
        with refused(ERROR.WRONG_LENGTH):
            session.send_secure_cmd(command, ID + bytes(length))


def test_algorithms_can_be_switched_off(session: AuthSession, rsa_key: rsa.RSAPrivateKey) -> None:
    session.set_enabled_algorithms(
        {ALGORITHM.RSA_PKCS1_SHA1: False, ALGORITHM.EC_K256: False, ALGORITHM.EC_ECDH: False, ALGORITHM.AES_ECB: False}
    )
    enabled = session.get_enabled_algorithms()
    assert {each for each, on in enabled.items() if not on} == {1, 15, 24, 53}
    key = AsymmetricKey.put(session, 5, "", 1, CAPABILITY.ALL, rsa_key)
    digest = hashlib.sha256(b"data").digest()
    assert len(session.send_secure_cmd(COMMAND.SIGN_PKCS1, ID + digest)) == 256
    with refused(ERROR.ALGORITHM_DISABLED):
        key.sign_pkcs1v1_5(b"data", hashes.SHA1())
    with refused(ERROR.ALGORITHM_DISABLED):
        AsymmetricKey.generate(session, 0, "", 1, CAPABILITY.NONE, ALGORITHM.EC_K256)
    p256 = AsymmetricKey.generate(session, 6, "", 1, CAPABILITY.ALL, ALGORITHM.EC_P256)
    with refused(ERROR.ALGORITHM_DISABLED):
        p256.derive_ecdh(p256.get_public_key())
    aes = SymmetricKey.generate(session, 7, "", 1, CAPABILITY.ALL, ALGORITHM.AES128)
    with refused(ERROR.ALGORITHM_DISABLED):
        aes.encrypt_ecb(bytes(16))
    with refused(ERROR.INVALID_DATA):  # the device is not fresh any more
        session.set_enabled_algorithms({ALGORITHM.EC_K256: True})
