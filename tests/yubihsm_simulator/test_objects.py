"""Objects: creation with all its checks, listing, sizes, sequence numbers, deletion."""

import os
import struct
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
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

NONE = CAPABILITY.NONE


def put_opaque(session: AuthSession, id_: int = 0, domains: int = EVERYWHERE, label: str = "x") -> Opaque:
    return Opaque.put(session, id_, label, domains, NONE, ALGORITHM.OPAQUE_DATA, b"data")


def header(algorithm: int, id_: int = 0, domains: int = 1, capabilities: int = 0) -> bytes:
    return struct.pack(">H40sHQB", id_, b"label", domains, capabilities, algorithm)


def test_factory_state(session: AuthSession) -> None:
    (key,) = session.list_objects()
    info = key.get_info()
    assert (info.id, info.object_type, info.size, info.sequence) == (1, OBJECT.AUTHENTICATION_KEY, 40, 0)
    assert (info.algorithm, info.domains, info.origin) == (38, 0xFFFF, ORIGIN.IMPORTED)
    assert info.capabilities == info.delegated_capabilities == CAPABILITY.ALL
    assert info.label == "DEFAULT AUTHKEY CHANGE THIS ASAP"


def test_information_is_66_bytes(session: AuthSession) -> None:
    put_opaque(session, 0x1234, 0x00F0, label="é" * 20)
    info = session.send_secure_cmd(COMMAND.GET_OBJECT_INFO, b"\x12\x34\x01")
    assert info == struct.pack(
        ">QHHHBBBB40sQ", 0, 0x1234, 4, 0x00F0, OBJECT.OPAQUE, 30, 0, ORIGIN.IMPORTED, ("é" * 20).encode(), 0
    )


@pytest.mark.parametrize(
    ("algorithm", "size"),
    [
        (ALGORITHM.RSA_2048, 896),
        (ALGORITHM.EC_P224, 84),
        (ALGORITHM.EC_P256, 96),
        (ALGORITHM.EC_K256, 96),
        (ALGORITHM.EC_P384, 144),
        (ALGORITHM.EC_P521, 198),
        (ALGORITHM.EC_BP512, 192),
        (ALGORITHM.EC_ED25519, 128),
    ],
)
def test_sizes_of_asymmetric_keys(session: AuthSession, algorithm: ALGORITHM, size: int) -> None:
    info = AsymmetricKey.generate(session, 0, "size", 1, NONE, algorithm).get_info()
    assert (info.size, info.origin, info.algorithm) == (size, ORIGIN.GENERATED, algorithm)


def test_sizes_of_other_objects(session: AuthSession, rsa_key: rsa.RSAPrivateKey) -> None:
    point = ec.generate_private_key(ec.SECP256R1()).public_key()
    sizes: list[tuple[Any, int]] = [
        (AuthenticationKey.put_public_key(session, 0, "", 1, NONE, NONE, point), 72),
        (HmacKey.generate(session, 0, "", 1, NONE, ALGORITHM.HMAC_SHA1), 128),
        (HmacKey.put(session, 0, "", 1, NONE, b"short", ALGORITHM.HMAC_SHA512), 256),
        (SymmetricKey.generate(session, 0, "", 1, NONE, ALGORITHM.AES192), 24),
        (WrapKey.generate(session, 0, "", 1, NONE, ALGORITHM.AES256_CCM_WRAP, NONE), 40),
        (WrapKey.put(session, 0, "", 1, NONE, ALGORITHM.RSA_2048, NONE, rsa_key), 904),
        (PublicWrapKey.put(session, 0, "", 1, NONE, NONE, rsa_key.public_key()), 264),
        (OtpAeadKey.generate(session, 0, "", 1, NONE, ALGORITHM.AES256_YUBICO_OTP, 1), 36),
        (Template.put(session, 0, "", 1, NONE, ALGORITHM.TEMPLATE_SSH, b"abc"), 3),
    ]
    for stored, size in sizes:
        assert stored.get_info().size == size, stored


def test_sequence_counts_creations_of_an_id_for_each_type(session: AuthSession) -> None:
    for sequence in range(3):
        assert put_opaque(session, 7).get_info().sequence == sequence
        Opaque(session, 7).delete()
    assert Template.put(session, 7, "", 1, NONE, ALGORITHM.TEMPLATE_SSH, b"abc").get_info().sequence == 0
    (listed,) = session.list_objects(object_id=7)
    assert listed._seq == 0


def test_sequence_wraps(session: AuthSession, device: Device) -> None:
    device.objects.sequences[OBJECT.OPAQUE, 7] = 255
    assert put_opaque(session, 7).get_info().sequence == 0


@pytest.mark.parametrize(
    ("command", "data", "code"),
    [
        (COMMAND.PUT_OPAQUE, header(30), ERROR.WRONG_LENGTH),
        (COMMAND.PUT_OPAQUE, header(30)[:-1], ERROR.WRONG_LENGTH),
        (COMMAND.PUT_OPAQUE, header(12) + b"x", ERROR.INVALID_DATA),
        (COMMAND.PUT_OPAQUE, header(0) + b"x", ERROR.INVALID_DATA),
        (COMMAND.PUT_OPAQUE, header(255) + b"x", ERROR.INVALID_DATA),
        (COMMAND.PUT_OPAQUE, header(30, id_=0xFFFF) + b"x", ERROR.INVALID_ID),
        (COMMAND.PUT_OPAQUE, header(30, domains=0) + b"x", ERROR.INSUFFICIENT_PERMISSIONS),
        (COMMAND.PUT_TEMPLATE, header(30) + b"x", ERROR.INVALID_DATA),
        (COMMAND.PUT_ASYMMETRIC_KEY, header(12) + bytes(31), ERROR.WRONG_LENGTH),
        (COMMAND.PUT_ASYMMETRIC_KEY, header(12) + bytes(33), ERROR.WRONG_LENGTH),
        (COMMAND.PUT_ASYMMETRIC_KEY, header(12) + bytes(32), ERROR.INVALID_DATA),
        (COMMAND.PUT_ASYMMETRIC_KEY, header(12) + b"\xff" * 32, ERROR.INVALID_DATA),
        (COMMAND.PUT_ASYMMETRIC_KEY, header(46) + bytes(31), ERROR.WRONG_LENGTH),
        (COMMAND.PUT_ASYMMETRIC_KEY, header(46) + bytes(96), ERROR.WRONG_LENGTH),
        (COMMAND.PUT_ASYMMETRIC_KEY, header(9) + bytes(255), ERROR.WRONG_LENGTH),
        (COMMAND.PUT_ASYMMETRIC_KEY, header(9) + bytes(256), ERROR.INVALID_DATA),
        (COMMAND.PUT_ASYMMETRIC_KEY, header(9) + b"\xff" * 256, ERROR.INVALID_DATA),
        (COMMAND.PUT_ASYMMETRIC_KEY, header(29) + bytes(16), ERROR.INVALID_DATA),
        (COMMAND.GENERATE_ASYMMETRIC_KEY, header(12) + b"x", ERROR.WRONG_LENGTH),
        (COMMAND.GENERATE_ASYMMETRIC_KEY, header(50), ERROR.INVALID_DATA),
        (COMMAND.PUT_HMAC_KEY, header(20), ERROR.WRONG_LENGTH),
        (COMMAND.PUT_HMAC_KEY, header(20) + bytes(65), ERROR.WRONG_LENGTH),
        (COMMAND.PUT_SYMMETRIC_KEY, header(50) + bytes(24), ERROR.WRONG_LENGTH),
        (COMMAND.PUT_OTP_AEAD_KEY, header(37) + bytes(16), ERROR.WRONG_LENGTH),
        (COMMAND.GENERATE_OTP_AEAD_KEY, header(37), ERROR.WRONG_LENGTH),
        (COMMAND.PUT_AUTHENTICATION_KEY, header(38) + bytes(8) + bytes(31), ERROR.WRONG_LENGTH),
        (COMMAND.PUT_AUTHENTICATION_KEY, header(49) + bytes(8) + bytes(64), ERROR.INVALID_DATA),
        (COMMAND.PUT_WRAP_KEY, header(29) + bytes(8) + bytes(24), ERROR.WRONG_LENGTH),
        (COMMAND.PUT_WRAP_KEY, header(29), ERROR.WRONG_LENGTH),
        (COMMAND.PUT_PUBLIC_WRAP_KEY, header(9) + bytes(8) + bytes(256), ERROR.INVALID_DATA),
        (COMMAND.GENERATE_WRAP_KEY, header(29) + bytes(9), ERROR.WRONG_LENGTH),
    ],
)
def test_what_cannot_be_put(session: AuthSession, device: Device, command: COMMAND, data: bytes, code: int) -> None:
    with refused(code):
        session.send_secure_cmd(command, data)
    assert len(device.objects) == 1


def test_all_64_capability_bits_mean_all_known(session: AuthSession) -> None:
    session.send_secure_cmd(COMMAND.PUT_OPAQUE, header(30, 5, capabilities=2**64 - 1) + b"x")
    assert Opaque(session, 5).get_info().capabilities == CAPABILITY.ALL


def test_an_id_is_taken_once_for_each_type(session: AuthSession) -> None:
    put_opaque(session, 5)
    with refused(ERROR.OBJECT_EXISTS):
        put_opaque(session, 5)
    AsymmetricKey.generate(session, 5, "", 1, NONE, ALGORITHM.EC_P256)
    with refused(ERROR.OBJECT_EXISTS):
        AsymmetricKey.generate(session, 5, "", 1, NONE, ALGORITHM.RSA_4096)  # before it is generated


def test_id_0_lets_the_device_choose(session: AuthSession) -> None:
    ids = {put_opaque(session).id for _ in range(20)}
    assert len(ids) == 20
    assert all(0 < id_ < 0xFFFF for id_ in ids)


def test_store_has_256_records(session: AuthSession) -> None:
    for id_ in range(1, 256):
        put_opaque(session, id_)
    with refused(ERROR.STORAGE_FAILED):
        put_opaque(session)
    assert len(session.list_objects()) == 256
    assert session.send_secure_cmd(COMMAND.GET_STORAGE_INFO) == struct.pack(">5H", 256, 0, 1024, 768, 126)


def test_store_has_1024_pages(session: AuthSession) -> None:
    big = os.urandom(3000)  # 24 pages
    for _ in range(42):
        Opaque.put(session, 0, "", 1, NONE, ALGORITHM.OPAQUE_DATA, big)
    with refused(ERROR.STORAGE_FAILED):
        Opaque.put(session, 0, "", 1, NONE, ALGORITHM.OPAQUE_DATA, big)
    Opaque.put(session, 0, "", 1, NONE, ALGORITHM.OPAQUE_DATA, big[:1800])  # 15 pages
    assert session.send_secure_cmd(COMMAND.GET_STORAGE_INFO)[6:8] == b"\x00\x00"


def test_biggest_object(session: AuthSession) -> None:
    data = os.urandom(3063)
    assert Opaque.put(session, 5, "", 1, NONE, ALGORITHM.OPAQUE_DATA, data).get() == data


def test_list_filters(session: AuthSession) -> None:
    key = AsymmetricKey.generate(session, 5, "key", 0b0110, CAPABILITY.SIGN_ECDSA, ALGORITHM.EC_P256)
    put_opaque(session, 5, domains=0b0001, label="opaque")

    def found(**filters: Any) -> set[tuple[int, int]]:
        return {(each.object_type, each.id) for each in session.list_objects(**filters)}

    a_key, an_opaque, own = (OBJECT.ASYMMETRIC_KEY, key.id), (OBJECT.OPAQUE, 5), (OBJECT.AUTHENTICATION_KEY, 1)
    assert found() == {a_key, an_opaque, own}
    assert found(object_id=5) == {a_key, an_opaque}
    assert found(object_type=OBJECT.OPAQUE) == {an_opaque}
    assert found(domains=0b0010) == {a_key, own}
    assert found(domains=0b1001) == {an_opaque, own}  # any of them
    assert found(capabilities=CAPABILITY.SIGN_ECDSA | CAPABILITY.SIGN_PSS) == {a_key, own}
    assert found(algorithm=ALGORITHM.EC_P256) == {a_key}
    assert found(label="opaque") == {an_opaque}
    assert found(label="opaqu") == set()
    assert found(object_id=5, object_type=OBJECT.OPAQUE, algorithm=ALGORITHM.EC_P256) == set()
    with refused(ERROR.INVALID_DATA):
        session.send_secure_cmd(COMMAND.LIST_OBJECTS, b"\x07")
    with refused(ERROR.WRONG_LENGTH):
        session.send_secure_cmd(COMMAND.LIST_OBJECTS, b"\x01\x00")


def test_labels_of_40_bytes(session: AuthSession) -> None:
    label = "abcdefghijklmnopqrstuvwxyz0123456789abcd"
    put_opaque(session, 5, label=label)
    assert Opaque(session, 5).get_info().label == label
    assert len(session.list_objects(label=label)) == 1


def test_objects_of_other_domains_are_not_there(session: AuthSession, limited: Limited) -> None:
    put_opaque(session, 5, domains=0b01)
    put_opaque(session, 6, domains=0b11)
    stranger = limited(CAPABILITY.GET_OPAQUE | CAPABILITY.DELETE_OPAQUE, domains=0b10)
    assert [each.id for each in stranger.list_objects(object_type=OBJECT.OPAQUE)] == [6]
    for action in (Opaque.get, Opaque.get_info, Opaque.delete):
        with refused(ERROR.OBJECT_NOT_FOUND):
            action(Opaque(stranger, 5))
    assert Opaque(stranger, 6).get() == b"data"


def test_domains_of_a_new_object_are_filtered(limited: Limited) -> None:
    author = limited(CAPABILITY.PUT_OPAQUE, domains=0b0110)
    assert put_opaque(author, 5, domains=EVERYWHERE).get_info().domains == 0b0110
    with refused(ERROR.INSUFFICIENT_PERMISSIONS):
        put_opaque(author, 6, domains=0b1000)


def test_capabilities_of_a_new_object_must_be_delegated(limited: Limited) -> None:
    author = limited(
        CAPABILITY.PUT_AUTHENTICATION_KEY | CAPABILITY.GENERATE_ASYMMETRIC_KEY, delegated=CAPABILITY.SIGN_ECDSA
    )
    AsymmetricKey.generate(author, 0, "", 1, CAPABILITY.SIGN_ECDSA, ALGORITHM.EC_P256)
    with refused(ERROR.INSUFFICIENT_PERMISSIONS):
        AsymmetricKey.generate(author, 0, "", 1, CAPABILITY.SIGN_ECDSA | CAPABILITY.SIGN_PSS, ALGORITHM.EC_P256)
    with refused(ERROR.INSUFFICIENT_PERMISSIONS):
        AuthenticationKey.put_derived(author, 0, "", 1, NONE, CAPABILITY.SIGN_PSS, PASSWORD)


DELETE = [
    (OBJECT.OPAQUE, 39),
    (OBJECT.AUTHENTICATION_KEY, 40),
    (OBJECT.ASYMMETRIC_KEY, 41),
    (OBJECT.WRAP_KEY, 42),
    (OBJECT.HMAC_KEY, 43),
    (OBJECT.TEMPLATE, 44),
    (OBJECT.OTP_AEAD_KEY, 45),
    (OBJECT.SYMMETRIC_KEY, 49),
    (OBJECT.PUBLIC_WRAP_KEY, 55),
]


@pytest.mark.parametrize(("object_type", "bit"), DELETE)
def test_each_type_has_a_capability_to_delete(
    session: AuthSession, limited: Limited, rsa_key: rsa.RSAPrivateKey, object_type: OBJECT, bit: int
) -> None:
    creators = {
        OBJECT.OPAQUE: lambda: put_opaque(session, 9),
        OBJECT.AUTHENTICATION_KEY: lambda: AuthenticationKey.put_derived(session, 9, "", 1, NONE, NONE, PASSWORD),
        OBJECT.ASYMMETRIC_KEY: lambda: AsymmetricKey.generate(session, 9, "", 1, NONE, ALGORITHM.EC_P256),
        OBJECT.WRAP_KEY: lambda: WrapKey.generate(session, 9, "", 1, NONE, ALGORITHM.AES128_CCM_WRAP, NONE),
        OBJECT.HMAC_KEY: lambda: HmacKey.generate(session, 9, "", 1, NONE),
        OBJECT.TEMPLATE: lambda: Template.put(session, 9, "", 1, NONE, ALGORITHM.TEMPLATE_SSH, b"x"),
        OBJECT.OTP_AEAD_KEY: lambda: OtpAeadKey.generate(session, 9, "", 1, NONE, ALGORITHM.AES128_YUBICO_OTP, 1),
        OBJECT.SYMMETRIC_KEY: lambda: SymmetricKey.generate(session, 9, "", 1, NONE, ALGORITHM.AES128),
        OBJECT.PUBLIC_WRAP_KEY: lambda: PublicWrapKey.put(session, 9, "", 1, NONE, NONE, rsa_key.public_key()),
    }
    stored = creators[object_type]()
    with refused(ERROR.INSUFFICIENT_PERMISSIONS):
        stored.with_session(limited(CAPABILITY.ALL & ~CAPABILITY(1 << bit))).delete()
    stored.with_session(limited(CAPABILITY(1 << bit))).delete()
    with refused(ERROR.OBJECT_NOT_FOUND):
        stored.get_info()


def test_unknown_types(session: AuthSession) -> None:
    for command in (COMMAND.DELETE_OBJECT, COMMAND.GET_OBJECT_INFO):
        for object_type in (0, 10):
            with refused(ERROR.INVALID_DATA):
                session.send_secure_cmd(command, b"\x00\x01" + bytes([object_type]))
        with refused(ERROR.WRONG_LENGTH):
            session.send_secure_cmd(command, b"\x00\x01")


SESSION_CAPABILITIES = [
    (COMMAND.RESET_DEVICE, 28),
    (COMMAND.PUT_OPAQUE, 1),
    (COMMAND.GET_OPAQUE, 0),
    (COMMAND.PUT_AUTHENTICATION_KEY, 2),
    (COMMAND.PUT_ASYMMETRIC_KEY, 3),
    (COMMAND.GENERATE_ASYMMETRIC_KEY, 4),
    (COMMAND.SIGN_PKCS1, 5),
    (COMMAND.SIGN_PSS, 6),
    (COMMAND.SIGN_ECDSA, 7),
    (COMMAND.SIGN_EDDSA, 8),
    (COMMAND.DECRYPT_PKCS1, 9),
    (COMMAND.DECRYPT_OAEP, 10),
    (COMMAND.DERIVE_ECDH, 11),
    (COMMAND.EXPORT_WRAPPED, 12),
    (COMMAND.IMPORT_WRAPPED, 13),
    (COMMAND.PUT_WRAP_KEY, 14),
    (COMMAND.GENERATE_WRAP_KEY, 15),
    (COMMAND.SET_OPTION, 17),
    (COMMAND.GET_OPTION, 18),
    (COMMAND.GET_PSEUDO_RANDOM, 19),
    (COMMAND.PUT_HMAC_KEY, 20),
    (COMMAND.GENERATE_HMAC_KEY, 21),
    (COMMAND.SIGN_HMAC, 22),
    (COMMAND.VERIFY_HMAC, 23),
    (COMMAND.GET_LOG_ENTRIES, 24),
    (COMMAND.SET_LOG_INDEX, 24),
    (COMMAND.SIGN_SSH_CERTIFICATE, 25),
    (COMMAND.GET_TEMPLATE, 26),
    (COMMAND.PUT_TEMPLATE, 27),
    (COMMAND.DECRYPT_OTP, 29),
    (COMMAND.CREATE_OTP_AEAD, 30),
    (COMMAND.RANDOMIZE_OTP_AEAD, 31),
    (COMMAND.REWRAP_OTP_AEAD, 32),
    (COMMAND.REWRAP_OTP_AEAD, 33),
    (COMMAND.SIGN_ATTESTATION_CERTIFICATE, 34),
    (COMMAND.PUT_OTP_AEAD_KEY, 35),
    (COMMAND.GENERATE_OTP_AEAD_KEY, 36),
    (COMMAND.WRAP_DATA, 37),
    (COMMAND.UNWRAP_DATA, 38),
    (COMMAND.CHANGE_AUTHENTICATION_KEY, 46),
    (COMMAND.PUT_SYMMETRIC_KEY, 47),
    (COMMAND.GENERATE_SYMMETRIC_KEY, 48),
    (COMMAND.DECRYPT_ECB, 50),
    (COMMAND.ENCRYPT_ECB, 51),
    (COMMAND.DECRYPT_CBC, 52),
    (COMMAND.ENCRYPT_CBC, 53),
    (COMMAND.PUT_PUBLIC_WRAP_KEY, 54),
    (COMMAND.WRAP_KEY_RSA, 12),
    (COMMAND.UNWRAP_KEY_RSA, 13),
    (COMMAND.EXPORT_WRAPPED_RSA, 12),
    (COMMAND.IMPORT_WRAPPED_RSA, 13),
]


def test_each_command_needs_its_capability_before_anything_else(limited: Limited, device: Device) -> None:
    device.faults.session_limit = 200
    for command, bit in SESSION_CAPABILITIES:
        without = limited(CAPABILITY.ALL & ~CAPABILITY(1 << bit))
        with refused(ERROR.INSUFFICIENT_PERMISSIONS):
            without.send_secure_cmd(command, b"")


def test_commands_without_a_capability(limited: Limited) -> None:
    session = limited()
    for command, data in [
        (COMMAND.ECHO, b"x"),
        (COMMAND.DEVICE_INFO, b""),
        (COMMAND.GET_STORAGE_INFO, b""),
        (COMMAND.LIST_OBJECTS, b""),
        (COMMAND.GET_OBJECT_INFO, b"\x00\x01\x02"),
        (COMMAND.BLINK_DEVICE, b"\x05"),
        (COMMAND.CLOSE_SESSION, b""),
    ]:
        session.send_secure_cmd(command, data)


def test_commands_that_are_not_for_sessions(session: AuthSession) -> None:
    for command in (0x00, 0x02, 0x03, 0x04, 0x05, 0x0A, 0x3F, 0x78, 0xFF):
        with refused(ERROR.INVALID_COMMAND):
            session.send_secure_cmd(command, b"")  # type: ignore[arg-type]


def test_public_keys(session: AuthSession, rsa_key: rsa.RSAPrivateKey) -> None:
    AsymmetricKey.put(session, 5, "", 1, NONE, rsa_key)
    modulus = rsa_key.public_key().public_numbers().n.to_bytes(256, "big")
    assert session.send_secure_cmd(COMMAND.GET_PUBLIC_KEY, b"\x00\x05") == b"\x09" + modulus
    assert session.send_secure_cmd(COMMAND.GET_PUBLIC_KEY, b"\x00\x05\x03") == b"\x09" + modulus
    key = ed25519.Ed25519PrivateKey.generate()
    AsymmetricKey.put(session, 6, "", 1, NONE, key)
    answer = session.send_secure_cmd(COMMAND.GET_PUBLIC_KEY, b"\x00\x06")
    assert answer == b"\x2e" + key.public_key().public_bytes_raw()
    p521 = ec.generate_private_key(ec.SECP521R1())
    AsymmetricKey.put(session, 7, "", 1, NONE, p521)
    assert len(session.send_secure_cmd(COMMAND.GET_PUBLIC_KEY, b"\x00\x07")) == 1 + 2 * 66
    WrapKey.generate(session, 8, "", 1, NONE, ALGORITHM.AES128_CCM_WRAP, NONE)
    for data in (b"\x00\x08\x04", b"\x00\x01\x02"):
        with refused(ERROR.INVALID_DATA):
            session.send_secure_cmd(COMMAND.GET_PUBLIC_KEY, data)


def test_both_primes_decide_about_a_key(session: AuthSession, rsa_key: rsa.RSAPrivateKey) -> None:
    numbers = rsa_key.private_numbers()
    p, q = numbers.p.to_bytes(128, "big"), numbers.q.to_bytes(128, "big")
    for value in (p + p, p + (numbers.q + 2).to_bytes(128, "big")):
        with refused(ERROR.INVALID_DATA):
            session.send_secure_cmd(COMMAND.PUT_ASYMMETRIC_KEY, header(9) + value)
    session.send_secure_cmd(COMMAND.PUT_ASYMMETRIC_KEY, header(9, 5) + q + p)
    assert AsymmetricKey(session, 5).get_public_key() == rsa_key.public_key()


def test_reset_brings_the_factory_state_back(device: Device, hsm: YubiHsm, session: AuthSession) -> None:
    put_opaque(session, 5)
    Opaque(session, 5).delete()
    session.reset_device()
    with connect(device).create_session_derived(1, PASSWORD) as anew:
        assert len(anew.list_objects()) == 1
        assert put_opaque(anew, 5).get_info().sequence == 0


def test_pseudo_random(session: AuthSession) -> None:
    assert len(session.get_pseudo_random(3116)) == 3116
    for length in (0, 3117):
        with refused(ERROR.INVALID_DATA):
            session.get_pseudo_random(length)
