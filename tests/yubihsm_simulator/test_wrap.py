"""Wrap keys: what comes out is decrypted here, what goes in is made here."""

import os
import struct
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, keywrap, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESCCM
from yubihsm import YubiHsm
from yubihsm.core import AuthSession
from yubihsm.defs import ALGORITHM, CAPABILITY, COMMAND, ERROR, OBJECT, ORIGIN
from yubihsm.objects import (
    AsymmetricKey,
    AuthenticationKey,
    HmacKey,
    Opaque,
    OtpAeadKey,
    PublicWrapKey,
    SymmetricKey,
    Template,
    WrapKey,
)

from tests.yubihsm_simulator.conftest import EVERYWHERE, PASSWORD, Limited, connect, refused
from yubihsm_simulator import Device

ALL, NONE = CAPABILITY.ALL, CAPABILITY.NONE
HEADER = struct.Struct(">BQHHHBBBB40s")


@pytest.fixture
def secret() -> bytes:
    return os.urandom(32)


@pytest.fixture
def wrap_key(session: AuthSession, secret: bytes) -> WrapKey:
    return WrapKey.put(session, 2, "wrap", EVERYWHERE, ALL, ALGORITHM.AES256_CCM_WRAP, ALL, secret)


@pytest.fixture
def rsa_wrap_keys(session: AuthSession, rsa_key: rsa.RSAPrivateKey) -> tuple[PublicWrapKey, WrapKey]:
    return (
        PublicWrapKey.put(session, 3, "public", EVERYWHERE, ALL, ALL, rsa_key.public_key()),
        WrapKey.put(session, 3, "private", EVERYWHERE, ALL, ALGORITHM.RSA_2048, ALL, rsa_key),
    )


def unwrap(secret: bytes, wrapped: bytes) -> bytes:
    return AESCCM(secret, 16).decrypt(wrapped[:13], wrapped[13:], None)


def wrap(secret: bytes, plaintext: bytes) -> bytes:
    nonce = os.urandom(13)
    return nonce + AESCCM(secret, 16).encrypt(nonce, plaintext, None)


def put_opaque(session: AuthSession, capabilities: CAPABILITY = ALL, domains: int = EVERYWHERE) -> Opaque:
    return Opaque.put(session, 5, "opaque", domains, capabilities, ALGORITHM.OPAQUE_DATA, b"data")


def test_layout_of_an_object_under_wrap(session: AuthSession, wrap_key: WrapKey, secret: bytes) -> None:
    put_opaque(session).delete()
    put_opaque(session, domains=0x00F0)
    plaintext = unwrap(secret, wrap_key.export_wrapped(Opaque(session, 5)))
    assert plaintext == HEADER.pack(42, ALL, 5, 4, 0x00F0, OBJECT.OPAQUE, 30, 1, ORIGIN.IMPORTED, b"opaque") + b"data"


def test_layout_of_keys_under_wrap(
    session: AuthSession, wrap_key: WrapKey, secret: bytes, rsa_key: rsa.RSAPrivateKey
) -> None:
    numbers = rsa_key.private_numbers()
    p256 = ec.generate_private_key(ec.SECP256R1())
    point = p256.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    rsa_parts = (numbers.p, numbers.q, numbers.dmp1, numbers.dmq1, numbers.iqmp)
    block = b"hmac key".ljust(64, b"\x00")
    expected: list[tuple[Any, bytes]] = [
        (
            AsymmetricKey.put(session, 10, "", 1, ALL, rsa_key),
            b"".join(part.to_bytes(128, "big") for part in rsa_parts) + numbers.public_numbers.n.to_bytes(256, "big"),
        ),
        (
            AsymmetricKey.put(session, 11, "", 1, ALL, p256),
            p256.private_numbers().private_value.to_bytes(32, "big") + point[1:],
        ),
        (
            HmacKey.put(session, 12, "", 1, ALL, b"hmac key"),
            bytes(b ^ 0x36 for b in block) + bytes(b ^ 0x5C for b in block),
        ),
        (SymmetricKey.put(session, 13, "", 1, ALL, ALGORITHM.AES128, bytes(range(16))), bytes(range(16))),
        (
            WrapKey.put(session, 14, "", 1, ALL, ALGORITHM.AES128_CCM_WRAP, CAPABILITY.SIGN_PSS, bytes(16)),
            CAPABILITY.SIGN_PSS.to_bytes(8, "big") + bytes(16),
        ),
        (
            AuthenticationKey.put(session, 15, "", 1, ALL, NONE, b"e" * 16, b"m" * 16),
            bytes(8) + b"e" * 16 + b"m" * 16,
        ),
        (
            OtpAeadKey.put(session, 16, "", 1, ALL, ALGORITHM.AES128_YUBICO_OTP, 0x01020304, b"o" * 16),
            b"\x04\x03\x02\x01" + b"o" * 16,
        ),
    ]
    for stored, value in expected:
        plaintext = unwrap(secret, wrap_key.export_wrapped(stored))
        assert plaintext[HEADER.size :] == value, stored
        assert HEADER.unpack_from(plaintext)[3] == len(value)


def test_round_trip_of_every_type(session: AuthSession, wrap_key: WrapKey, rsa_key: rsa.RSAPrivateKey) -> None:
    objects: list[Any] = [
        put_opaque(session),
        AuthenticationKey.put_derived(session, 5, "", 1, ALL, CAPABILITY.SIGN_PSS, "another password"),
        AsymmetricKey.put(session, 5, "", 1, ALL, rsa_key),
        AsymmetricKey.generate(session, 6, "", 1, ALL, ALGORITHM.EC_P521),
        AsymmetricKey.generate(session, 7, "", 1, ALL, ALGORITHM.EC_ED25519),
        WrapKey.put(session, 5, "", 1, ALL, ALGORITHM.RSA_2048, NONE, rsa_key),
        HmacKey.generate(session, 5, "", 1, ALL, ALGORITHM.HMAC_SHA384),
        Template.put(session, 5, "", 1, ALL, ALGORITHM.TEMPLATE_SSH, b"template"),
        OtpAeadKey.generate(session, 5, "", 1, ALL, ALGORITHM.AES192_YUBICO_OTP, 1),
        SymmetricKey.generate(session, 5, "", 1, ALL, ALGORITHM.AES256),
        PublicWrapKey.put(session, 5, "", 1, ALL, NONE, rsa_key.public_key()),
    ]
    for stored in objects:
        before = stored.get_info()
        wrapped = wrap_key.export_wrapped(stored)
        with refused(ERROR.OBJECT_EXISTS):
            wrap_key.import_wrapped(wrapped)
        stored.delete()
        imported = wrap_key.import_wrapped(wrapped)
        assert (imported.object_type, imported.id) == (stored.object_type, stored.id)
        after = imported.get_info()
        assert after.sequence == before.sequence + 1
        assert after.origin == before.origin | ORIGIN.IMPORTED_WRAPPED
        assert (after.capabilities, after.delegated_capabilities) == (ALL, before.delegated_capabilities)
        if stored.id != 7:  # an Ed25519 key loses its seed
            assert after.size == before.size


def test_wrapped_keys_work(hsm: YubiHsm, session: AuthSession, wrap_key: WrapKey) -> None:
    key = AuthenticationKey.put_derived(session, 5, "", 1, ALL, NONE, "another password")
    hmac_key = HmacKey.generate(session, 5, "", 1, ALL)
    mac = hmac_key.sign_hmac(b"data")
    for stored in (key, hmac_key):
        wrapped = wrap_key.export_wrapped(stored)
        stored.delete()
        wrap_key.import_wrapped(wrapped)
    assert hmac_key.verify_hmac(mac, b"data")
    assert hsm.create_session_derived(5, "another password").sid is not None


def test_from_one_device_to_another(session: AuthSession, wrap_key: WrapKey, secret: bytes) -> None:
    key = AsymmetricKey.generate(session, 5, "", 1, ALL, ALGORITHM.EC_P256)
    wrapped = wrap_key.export_wrapped(key)
    elsewhere = connect(Device(serial=2)).create_session_derived(1, PASSWORD)
    copied = WrapKey.put(elsewhere, 9, "", 1, ALL, ALGORITHM.AES256_CCM_WRAP, ALL, secret).import_wrapped(wrapped)
    key.get_public_key().verify(copied.sign_ecdsa(b"data"), b"data", ec.ECDSA(hashes.SHA256()))  # type: ignore[attr-defined]


def test_ed25519_without_its_seed(session: AuthSession, wrap_key: WrapKey, secret: bytes) -> None:
    private = ed25519.Ed25519PrivateKey.generate()
    key = AsymmetricKey.put(session, 5, "", 1, ALL, private)
    without, with_seed = wrap_key.export_wrapped(key), wrap_key.export_wrapped(key, seed=True)
    assert len(unwrap(secret, without)) == 59 + 96
    assert len(unwrap(secret, with_seed)) == 59 + 128
    key.delete()
    wrap_key.import_wrapped(without)
    assert key.get_info().size == 96
    for message in (b"", os.urandom(100)):
        assert key.sign_eddsa(message) == private.sign(message)
    with refused(ERROR.INVALID_DATA):
        wrap_key.export_wrapped(key, seed=True)
    key.delete()
    wrap_key.import_wrapped(with_seed)
    assert key.get_info().size == 128
    assert wrap_key.export_wrapped(key, seed=True) != with_seed


def test_seed_is_for_ed25519(session: AuthSession, wrap_key: WrapKey) -> None:
    with refused(ERROR.INVALID_DATA):
        wrap_key.export_wrapped(put_opaque(session), seed=True)
    with refused(ERROR.INVALID_DATA):
        session.send_secure_cmd(COMMAND.EXPORT_WRAPPED, b"\x00\x02\x01\x00\x05\x02")


def test_exportable_and_delegated(session: AuthSession, wrap_key: WrapKey, secret: bytes) -> None:
    stored = put_opaque(session, ALL & ~CAPABILITY.EXPORTABLE_UNDER_WRAP)
    with refused(ERROR.INSUFFICIENT_PERMISSIONS):
        wrap_key.export_wrapped(stored)
    stored.delete()
    stored = put_opaque(session, CAPABILITY.EXPORTABLE_UNDER_WRAP | CAPABILITY.SIGN_PSS)
    narrow = WrapKey.put(session, 4, "", 1, ALL, ALGORITHM.AES256_CCM_WRAP, CAPABILITY.EXPORTABLE_UNDER_WRAP, secret)
    with refused(ERROR.INSUFFICIENT_PERMISSIONS):
        narrow.export_wrapped(stored)
    wrapped = wrap_key.export_wrapped(stored)
    stored.delete()
    with refused(ERROR.INSUFFICIENT_PERMISSIONS):
        narrow.import_wrapped(wrapped)
    wrap_key.import_wrapped(wrapped)


def test_imported_objects_are_in_the_domains_of_wrap_key_and_session(
    session: AuthSession, wrap_key: WrapKey, secret: bytes, limited: Limited
) -> None:
    wrapped = wrap_key.export_wrapped(put_opaque(session))
    Opaque(session, 5).delete()
    WrapKey.put(session, 4, "", 0b0110, ALL, ALGORITHM.AES256_CCM_WRAP, ALL, secret)
    WrapKey(limited(CAPABILITY.IMPORT_WRAPPED, domains=0b0011), 4).import_wrapped(wrapped)
    assert Opaque(session, 5).get_info().domains == 0b0010


def test_wrapped_objects_are_checked(session: AuthSession, wrap_key: WrapKey, secret: bytes) -> None:
    def attempt(**changes: Any) -> None:
        values = dict(wrap=42, caps=0, id=5, length=4, domains=1, type=1, algorithm=30, sequence=0, origin=2, label=b"")
        wrap_key.import_wrapped(wrap(secret, HEADER.pack(*(values | changes).values()) + b"data"))

    for changes in (dict(wrap=41), dict(id=0), dict(type=0), dict(type=10), dict(algorithm=12), dict(algorithm=0)):
        with refused(ERROR.INVALID_DATA):
            attempt(**changes)
    for changes in (dict(length=3), dict(length=5), dict(type=8, algorithm=50)):
        with refused(ERROR.WRONG_LENGTH):
            attempt(**changes)
    with refused(ERROR.INVALID_ID):
        attempt(id=0xFFFF)
    attempt(caps=2**64 - 1)  # as yubihsm-wrap writes "all"
    assert Opaque(session, 5).get_info().capabilities == ALL
    good = wrap(secret, HEADER.pack(42, 0, 6, 4, 1, 1, 30, 0, 2, b"") + b"data")
    for length in (0, 28):
        with refused(ERROR.WRONG_LENGTH):
            wrap_key.import_wrapped(good[:length])
    for at in (0, 13, 40, len(good) - 1):
        with refused(ERROR.INVALID_DATA):
            wrap_key.import_wrapped(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    with refused(ERROR.WRONG_LENGTH):
        wrap_key.import_wrapped(wrap(secret, b"short"))


@pytest.mark.parametrize("firmware", [(2, 4, 0), (2, 5, 0)])
def test_wrap_data(firmware: tuple[int, int, int], secret: bytes) -> None:
    session = connect(Device(firmware=firmware)).create_session_derived(1, PASSWORD)
    key = WrapKey.put(session, 2, "", 1, ALL, ALGORITHM.AES256_CCM_WRAP, ALL, secret)
    wrapped = key.wrap_data(b"data")
    assert unwrap(secret, wrapped) == b"\x2adata"  # the wrap key's algorithm stands before the data
    assert key.unwrap_data(wrapped) == b"data"
    with refused(ERROR.INVALID_DATA):
        key.unwrap_data(wrap(secret, b"\x29data"))
    with refused(ERROR.INVALID_DATA):
        key.unwrap_data(wrapped[:-1] + bytes([wrapped[-1] ^ 1]))
    with refused(ERROR.WRONG_LENGTH):
        key.wrap_data(b"")
    with refused(ERROR.WRONG_LENGTH):  # its answer would not fit
        key.wrap_data(bytes(3100))
    powerless = WrapKey.put(session, 3, "", 1, NONE, ALGORITHM.AES256_CCM_WRAP, NONE, secret)
    code = ERROR.INVALID_DATA if firmware < (2, 5, 0) else ERROR.INSUFFICIENT_PERMISSIONS
    with refused(code):
        powerless.wrap_data(b"data")
    with refused(code):
        powerless.unwrap_data(wrapped)


def test_rsa_wrap_of_an_object(
    session: AuthSession, rsa_wrap_keys: tuple[PublicWrapKey, WrapKey], rsa_key: rsa.RSAPrivateKey
) -> None:
    public, private = rsa_wrap_keys
    stored = put_opaque(session)
    wrapped = public.export_wrapped_rsa(stored, ALGORITHM.AES192, hashes.SHA384(), hashes.SHA1(), b"label")
    aes = rsa_key.decrypt(wrapped[:256], padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA384(), b"label"))
    assert len(aes) == 24
    plaintext = keywrap.aes_key_unwrap_with_padding(aes, wrapped[256:])
    assert plaintext == HEADER.pack(9, ALL, 5, 4, 0xFFFF, 1, 30, 0, 2, b"opaque") + b"data"
    stored.delete()
    with refused(ERROR.INVALID_DATA):
        private.import_wrapped_rsa(wrapped, hashes.SHA384(), hashes.SHA1(), b"another")
    with refused(ERROR.INVALID_DATA):
        private.import_wrapped_rsa(wrapped[:-8] + bytes(8), hashes.SHA384(), hashes.SHA1(), b"label")
    private.import_wrapped_rsa(wrapped, hashes.SHA384(), hashes.SHA1(), b"label")
    assert stored.get() == b"data"
    assert stored.get_info().origin == ORIGIN.IMPORTED | ORIGIN.IMPORTED_WRAPPED


@pytest.mark.parametrize("algorithm", [ALGORITHM.EC_P384, ALGORITHM.EC_ED25519, ALGORITHM.RSA_2048])
def test_rsa_wrap_of_an_asymmetric_key(
    session: AuthSession, rsa_wrap_keys: tuple[PublicWrapKey, WrapKey], rsa_key: rsa.RSAPrivateKey, algorithm: ALGORITHM
) -> None:
    public, private = rsa_wrap_keys
    key = AsymmetricKey.generate(session, 5, "", 1, ALL, algorithm)
    wrapped = public.export_raw_key(key)
    aes = rsa_key.decrypt(wrapped[:256], padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None))
    pkcs8 = serialization.load_der_private_key(keywrap.aes_key_unwrap_with_padding(aes, wrapped[256:]), None)
    assert pkcs8.public_key() == key.get_public_key()
    imported = private.import_raw_key(6, OBJECT.ASYMMETRIC_KEY, "again", 1, ALL, algorithm, wrapped)
    assert imported.get_public_key() == key.get_public_key()  # type: ignore[attr-defined]
    assert imported.get_info().origin == ORIGIN.IMPORTED | ORIGIN.IMPORTED_WRAPPED
    with refused(ERROR.INVALID_DATA):
        private.import_raw_key(7, OBJECT.ASYMMETRIC_KEY, "again", 1, ALL, ALGORITHM.EC_P256, wrapped)


def test_rsa_wrap_of_a_symmetric_key(
    session: AuthSession, rsa_wrap_keys: tuple[PublicWrapKey, WrapKey], rsa_key: rsa.RSAPrivateKey
) -> None:
    public, private = rsa_wrap_keys
    secret, aes = os.urandom(16), os.urandom(32)
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
    mine = rsa_key.public_key().encrypt(aes, oaep) + keywrap.aes_key_wrap_with_padding(aes, secret)
    key = private.import_raw_key(5, OBJECT.SYMMETRIC_KEY, "", 1, ALL, ALGORITHM.AES128, mine)
    theirs = public.export_raw_key(key)  # type: ignore[arg-type]
    assert keywrap.aes_key_unwrap_with_padding(rsa_key.decrypt(theirs[:256], oaep), theirs[256:]) == secret
    with refused(ERROR.WRONG_LENGTH):
        private.import_raw_key(6, OBJECT.SYMMETRIC_KEY, "", 1, ALL, ALGORITHM.AES256, mine)
    with refused(ERROR.INVALID_DATA):
        private.import_raw_key(6, OBJECT.HMAC_KEY, "", 1, ALL, ALGORITHM.HMAC_SHA256, mine)
    with refused(ERROR.INVALID_DATA):
        public.export_raw_key(HmacKey.generate(session, 6, "", 1, ALL))  # type: ignore[arg-type]


def test_rsa_and_aes_wrap_keys_are_not_mixed_up(
    session: AuthSession, wrap_key: WrapKey, rsa_wrap_keys: tuple[PublicWrapKey, WrapKey]
) -> None:
    public, private = rsa_wrap_keys
    stored = put_opaque(session)
    with refused(ERROR.INVALID_DATA):
        private.export_wrapped(stored)
    with refused(ERROR.INVALID_DATA):
        private.wrap_data(b"data")
    with refused(ERROR.INVALID_DATA):
        wrap_key.import_wrapped_rsa(public.export_wrapped_rsa(stored))
    with refused(ERROR.OBJECT_NOT_FOUND):
        PublicWrapKey(session, 2).export_wrapped_rsa(stored)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x31\x1a\x21" + bytes(32), ERROR.INVALID_DATA),
        (b"\x34\x18\x21" + bytes(32), ERROR.INVALID_DATA),
        (b"\x34\x1a\x1f" + bytes(32), ERROR.INVALID_DATA),
        (b"\x34\x1a\x21" + bytes(31), ERROR.WRONG_LENGTH),
        (b"\x34\x1a", ERROR.WRONG_LENGTH),
    ],
)
def test_rsa_wrap_refused(
    session: AuthSession, rsa_wrap_keys: tuple[PublicWrapKey, WrapKey], data: bytes, code: int
) -> None:
    put_opaque(session)
    with refused(code):
        session.send_secure_cmd(COMMAND.EXPORT_WRAPPED_RSA, b"\x00\x03\x01\x00\x05" + data)


def test_rsa_unwrap_lengths(session: AuthSession, rsa_wrap_keys: tuple[PublicWrapKey, WrapKey]) -> None:
    for length in (0, 31, 32, 32 + 256, 32 + 256 + 15):
        with refused(ERROR.WRONG_LENGTH):
            session.send_secure_cmd(COMMAND.IMPORT_WRAPPED_RSA, b"\x00\x03\x1a\x21" + bytes(length))
