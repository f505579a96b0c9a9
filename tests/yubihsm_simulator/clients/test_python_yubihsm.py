"""Yubico's python-yubihsm: each command that it has, and each refusal that it can provoke."""

import base64
import hashlib
import hmac
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHCertificate,
    load_der_private_key,
    load_ssh_public_identity,
)
from yubihsm import YubiHsm
from yubihsm.core import AuthSession
from yubihsm.defs import ALGORITHM, AUDIT, CAPABILITY, COMMAND, ERROR, OBJECT, OPTION, ORIGIN
from yubihsm.exceptions import (
    YubiHsmAuthenticationError,
    YubiHsmConnectionError,
    YubiHsmDeviceError,
    YubiHsmInvalidResponseError,
)
from yubihsm.objects import (
    AsymmetricKey,
    AttestationExtensions,
    AuthenticationKey,
    HmacKey,
    KeyAttestationExtensions,
    Opaque,
    OtpAeadKey,
    OtpData,
    PublicWrapKey,
    SymmetricKey,
    Template,
    WrapKey,
    YhsmObject,
)
from yubihsm.utils import password_to_key

from tests.yubihsm_simulator.clients import ssh_ca
from tests.yubihsm_simulator.clients.conftest import CURVES, HASHES, PASSWORD, SERIAL, Hsm, certificate, private_key

C = CAPABILITY
ALL = CAPABILITY.ALL
EVERYWHERE = 0xFFFF
EC_ALGORITHMS = {name: ALGORITHM.for_curve(curve) for name, curve in CURVES.items()}
FIRMWARES = pytest.mark.parametrize("firmware", [(2, 4, 0), (2, 5, 0)], ids=["2.4", "2.5"])


@pytest.fixture
def yubihsm(hsm: Hsm) -> Iterator[YubiHsm]:
    with YubiHsm.connect(hsm.url) as connected:
        yield connected


@pytest.fixture
def session(yubihsm: YubiHsm) -> AuthSession:
    """With all capabilities. The device is gone before anyone could miss a close."""
    return yubihsm.create_session_derived(1, PASSWORD)


@contextmanager
def refused(code: ERROR) -> Iterator[None]:
    with pytest.raises(YubiHsmDeviceError) as raised:
        yield
    assert raised.value.code == code


def put(session: AuthSession, kind: str, capabilities: CAPABILITY = ALL, id: int = 0) -> AsymmetricKey:
    return AsymmetricKey.put(session, id, kind, EVERYWHERE, capabilities, private_key(kind))


def spki(key: Any) -> bytes:
    return bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def objects_of(session: AuthSession, **filters: Any) -> set[tuple[int, int]]:
    return {(each.object_type, each.id) for each in session.list_objects(**filters)}


# The device and its sessions


@FIRMWARES
def test_device_info(yubihsm: YubiHsm, firmware: tuple[int, int, int]) -> None:
    info = yubihsm.get_device_info()
    assert (info.version, info.serial, info.log_size) == (firmware, SERIAL, 62)
    assert info.log_used == 2
    assert info.supported_algorithms == set(ALGORITHM)
    assert info.part_number


@pytest.mark.parametrize("size", [0, 1, 15, 16, 2021, 3000])
def test_echo(yubihsm: YubiHsm, session: AuthSession, size: int) -> None:
    data = os.urandom(size)
    assert yubihsm.send_cmd(COMMAND.ECHO, data) == data
    assert session.send_secure_cmd(COMMAND.ECHO, data) == data


def test_commands_of_the_wrong_place_or_length(yubihsm: YubiHsm, session: AuthSession) -> None:
    with refused(ERROR.INVALID_COMMAND):
        yubihsm.send_cmd(COMMAND.LIST_OBJECTS)
    with refused(ERROR.INVALID_COMMAND):
        session.send_secure_cmd(0x7E)  # no such command
    with refused(ERROR.WRONG_LENGTH):
        session.send_secure_cmd(COMMAND.GET_PSEUDO_RANDOM, b"\0")
    with refused(ERROR.WRONG_LENGTH):
        session.send_secure_cmd(COMMAND.GET_OBJECT_INFO, b"\0\1")
    session.close()


def test_random_storage_and_blink(session: AuthSession) -> None:
    assert len(session.get_pseudo_random(300)) == 300
    assert session.get_pseudo_random(16) != session.get_pseudo_random(16)
    total, free, pages, free_pages, page_size = struct.unpack(">5H", session.send_secure_cmd(COMMAND.GET_STORAGE_INFO))
    assert (total, pages, page_size) == (256, 1024, 126)
    assert (free, free_pages) < (total, pages)
    assert session.send_secure_cmd(COMMAND.BLINK_DEVICE, b"\1") == b""


def test_sixteen_sessions(hsm: Hsm, yubihsm: YubiHsm) -> None:
    enc, mac = password_to_key(PASSWORD)
    sessions = [yubihsm.create_session(1, enc, mac) for _ in range(16)]
    assert [each.sid for each in sessions] == list(range(16))
    with refused(ERROR.SESSIONS_FULL):
        yubihsm.create_session(1, enc, mac)
    sessions[5].close()
    sessions[5] = yubihsm.create_session(1, enc, mac)
    assert sessions[5].sid == 5
    assert all(each.send_secure_cmd(COMMAND.ECHO, b"x") == b"x" for each in sessions)
    assert hsm.device.sessions == 16
    hsm.device.skip(31)
    assert hsm.device.sessions == 0
    with refused(ERROR.INVALID_SESSION):
        sessions[0].get_pseudo_random(1)


def test_a_command_renews_a_session(hsm: Hsm, session: AuthSession) -> None:
    for _ in range(3):
        hsm.device.skip(20)
        session.send_secure_cmd(COMMAND.ECHO)


def test_wrong_passwords_and_keys(yubihsm: YubiHsm) -> None:
    with pytest.raises(YubiHsmAuthenticationError):
        yubihsm.create_session_derived(1, "Password")
    with refused(ERROR.OBJECT_NOT_FOUND):
        yubihsm.create_session_derived(2, PASSWORD)
    enc, mac = password_to_key(PASSWORD)
    with pytest.raises(YubiHsmAuthenticationError):
        yubihsm.create_session(1, enc, enc)
    # the device's own refusal, and a client that knows K-MAC only
    negotiation = yubihsm.init_session(1)
    with refused(ERROR.AUTHENTICATION_FAILED):
        yubihsm.send_cmd(COMMAND.AUTHENTICATE_SESSION, bytes([negotiation._sid]) + bytes(16))
    half_known = yubihsm.create_session(1, mac, mac)
    with pytest.raises((YubiHsmDeviceError, YubiHsmInvalidResponseError)):
        half_known.get_pseudo_random(1)


def test_a_session_dies_with_the_device(hsm: Hsm, yubihsm: YubiHsm, session: AuthSession) -> None:
    hsm.device.reboot()
    with refused(ERROR.INVALID_SESSION):
        session.get_pseudo_random(1)
    hsm.device.faults.unplugged = True
    with pytest.raises(YubiHsmConnectionError):
        yubihsm.get_device_info()
    hsm.device.faults.unplugged = False
    with yubihsm.create_session_derived(1, PASSWORD) as again:
        assert again.get_pseudo_random(1)


def test_asymmetric_authentication(yubihsm: YubiHsm, session: AuthSession) -> None:
    own, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    key = AuthenticationKey.put_public_key(session, 7, "asymmetric", 1, ALL, ALL, own.public_key())
    info = key.get_info()
    assert (info.algorithm, info.size, info.domains) == (ALGORITHM.EC_P256_YUBICO_AUTHENTICATION, 72, 1)
    with yubihsm.create_session_asymmetric(7, own) as opened:
        assert opened.send_secure_cmd(COMMAND.ECHO, b"here") == b"here"
        key.with_session(opened).change_public_key(other.public_key())
    with pytest.raises(YubiHsmAuthenticationError):
        yubihsm.create_session_asymmetric(7, own)
    with yubihsm.create_session_asymmetric(7, other, yubihsm.get_device_public_key()) as opened:
        assert len(opened.get_pseudo_random(8)) == 8
    with pytest.raises(YubiHsmAuthenticationError):
        yubihsm.create_session_asymmetric(7, other, own.public_key())  # that is not the device's
    assert yubihsm.get_device_public_key().public_numbers() == yubihsm.get_device_public_key().public_numbers()


def test_change_a_password(yubihsm: YubiHsm, session: AuthSession) -> None:
    key = AuthenticationKey.put_derived(session, 5, "five", 1, C.CHANGE_AUTHENTICATION_KEY, C.NONE, "first")
    with refused(ERROR.INVALID_ID):
        key.change_password("second")  # another session's key
    with yubihsm.create_session_derived(5, "first") as own:
        key.with_session(own).change_password("second")
        assert own.send_secure_cmd(COMMAND.ECHO, b"still open") == b"still open"
    with pytest.raises(YubiHsmAuthenticationError):
        yubihsm.create_session_derived(5, "first")
    with yubihsm.create_session_derived(5, "second") as own:
        key.with_session(own).change_key(*password_to_key("third"))
    yubihsm.create_session_derived(5, "third").close()
    key.delete()
    with refused(ERROR.OBJECT_NOT_FOUND):
        yubihsm.create_session_derived(5, "third")


def test_a_reset_restores_the_factory_state(hsm: Hsm, yubihsm: YubiHsm, session: AuthSession) -> None:
    put(session, "ecp256", id=9)
    AuthenticationKey.put_derived(session, 2, "two", 1, ALL, ALL, "another")
    AuthenticationKey(session, 1).delete()
    session.reset_device()
    assert hsm.device.sessions == 0
    with YubiHsm.connect(hsm.url) as again, again.create_session_derived(1, PASSWORD) as new:
        assert objects_of(new) == {(OBJECT.AUTHENTICATION_KEY, 1)}
        info = AuthenticationKey(new, 1).get_info()
        assert (info.label, info.origin, info.sequence) == ("DEFAULT AUTHKEY CHANGE THIS ASAP", ORIGIN.IMPORTED, 0)
        assert (info.capabilities, info.delegated_capabilities, info.domains) == (ALL, ALL, EVERYWHERE)
        entries = new.get_log_entries().entries
        assert entries[0].data == b"\0\1" + b"\xff" * 14
        assert entries[1].data == struct.pack("!HBHHHHBL", 2, 0, 0, 0xFFFF, 0, 0, 0, 0)


# Asymmetric keys


@pytest.mark.parametrize("curve", CURVES)
def test_ecdsa(session: AuthSession, curve: str) -> None:
    generated = AsymmetricKey.generate(session, 0, curve, 1, C.SIGN_ECDSA, EC_ALGORITHMS[curve])
    imported = put(session, curve, C.SIGN_ECDSA)
    assert imported.get_public_key().public_numbers() == private_key(curve).public_key().public_numbers()
    for key, origin in ((generated, ORIGIN.GENERATED), (imported, ORIGIN.IMPORTED)):
        info = key.get_info()
        width = (CURVES[curve].key_size + 7) // 8
        assert (info.algorithm, info.size, info.origin) == (EC_ALGORITHMS[curve], 3 * width, origin)
        for hash in HASHES.values():
            signature = key.sign_ecdsa(b"content", hash)
            key.get_public_key().verify(signature, b"content", ec.ECDSA(hash))
            with pytest.raises(InvalidSignature):
                key.get_public_key().verify(signature, b"Content", ec.ECDSA(hash))
        # P-521: the digest as an integer of the curve's width
        if width >= 64:
            padded = key.sign_ecdsa(b"content", hashes.SHA512(), length=width)
            key.get_public_key().verify(padded, b"content", ec.ECDSA(hashes.SHA512()))
        with refused(ERROR.INSUFFICIENT_PERMISSIONS):
            key.derive_ecdh(private_key(curve).public_key())
    assert generated.sign_ecdsa(b"content") != generated.sign_ecdsa(b"content")


@pytest.mark.parametrize("curve", CURVES)
def test_ecdh(session: AuthSession, curve: str) -> None:
    key = put(session, curve, C.DERIVE_ECDH)
    other = ec.generate_private_key(CURVES[curve])
    assert key.derive_ecdh(other.public_key()) == other.exchange(ec.ECDH(), private_key(curve).public_key())
    point = other.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    no_point = point[:-1] + bytes([point[-1] ^ 1])
    with refused(ERROR.INVALID_DATA):
        session.send_secure_cmd(COMMAND.DERIVE_ECDH, struct.pack("!H", key.id) + no_point)


@pytest.mark.parametrize("kind", ["rsa2048", "rsa3072", "rsa4096"])
def test_rsa(session: AuthSession, kind: str) -> None:
    key, private = put(session, kind), private_key(kind)
    public = private.public_key()
    assert spki(key.get_public_key()) == spki(public)
    assert key.get_info().size == private.key_size // 8 * 7 // 2
    for hash in HASHES.values():
        public.verify(key.sign_pkcs1v1_5(b"content", hash), b"content", padding.PKCS1v15(), hash)
        for mgf_hash in HASHES.values():
            pss = padding.PSS(padding.MGF1(mgf_hash), hash.digest_size)
            signature = key.sign_pss(b"content", hash.digest_size, hash, mgf_hash)
            public.verify(signature, b"content", pss, hash)
        oaep = padding.OAEP(padding.MGF1(hash), hash, b"label")
        assert key.decrypt_oaep(public.encrypt(b"secret", oaep), b"label", hash, hash) == b"secret"
    with pytest.raises(InvalidSignature):
        public.verify(signature, b"Content", pss, hash)
    assert key.decrypt_pkcs1v1_5(public.encrypt(b"secret", padding.PKCS1v15())) == b"secret"
    with refused(ERROR.INVALID_DATA):
        key.decrypt_oaep(public.encrypt(b"secret", oaep), b"another label", hash, hash)


def test_rsa_is_generated(session: AuthSession) -> None:
    key = AsymmetricKey.generate(session, 0x1234, "generated", 1, C.SIGN_PKCS | C.SIGN_PSS, ALGORITHM.RSA_2048)
    public = key.get_public_key()
    assert (public.key_size, public.public_numbers().e) == (2048, 65537)
    public.verify(key.sign_pkcs1v1_5(b"content"), b"content", padding.PKCS1v15(), hashes.SHA256())
    info = key.get_info()
    assert (info.id, info.origin, info.label, info.domains) == (0x1234, ORIGIN.GENERATED, "generated", 1)
    assert info.capabilities == C.SIGN_PKCS | C.SIGN_PSS


def test_pkcs1_of_a_ready_digest_info(session: AuthSession) -> None:
    """What is not as long as a digest is padded as it is."""
    key = put(session, "rsa2048")
    digest = hashlib.sha256(b"content").digest()
    digest_info = bytes.fromhex("3031300d060960864801650304020105000420") + digest
    signature = session.send_secure_cmd(COMMAND.SIGN_PKCS1, struct.pack("!H", key.id) + digest_info)
    assert signature == key.sign_pkcs1v1_5(b"content")
    key.get_public_key().verify(signature, digest, padding.PKCS1v15(), Prehashed(hashes.SHA256()))


def test_ed25519(session: AuthSession) -> None:
    generated = AsymmetricKey.generate(session, 0, "generated", 1, C.SIGN_EDDSA, ALGORITHM.EC_ED25519)
    for key in (generated, put(session, "ed25519")):
        assert key.get_info().size == 128
        public = key.get_public_key()
        for size in (1, 32, 2019):
            data = os.urandom(size)
            public.verify(key.sign_eddsa(data), data)
    assert spki(public) == spki(private_key("ed25519").public_key())
    with pytest.raises(InvalidSignature):
        public.verify(key.sign_eddsa(b"content"), b"Content")


def test_keys_of_the_wrong_kind(session: AuthSession) -> None:
    p256, ed, rsa2048 = put(session, "ecp256"), put(session, "ed25519"), put(session, "rsa2048")
    wrong: list[Callable[[], object]] = [
        lambda: p256.sign_pkcs1v1_5(b""),
        lambda: p256.sign_eddsa(b"x"),
        lambda: rsa2048.sign_ecdsa(b""),
        lambda: ed.sign_ecdsa(b""),
        lambda: ed.decrypt_pkcs1v1_5(bytes(256)),
        lambda: rsa2048.derive_ecdh(private_key("ecp256").public_key()),
    ]
    for call in wrong:
        with pytest.raises(YubiHsmDeviceError) as raised:
            call()
        assert raised.value.code in (ERROR.INVALID_DATA, ERROR.WRONG_LENGTH)


def test_ssh_certificates(session: AuthSession) -> None:
    time_key = private_key("rsa2048")
    template = ssh_ca.template(time_key.public_key(), [20])
    stored = Template.put(session, 11, "ssh", 1, C.NONE, ALGORITHM.TEMPLATE_SSH, template)
    assert stored.get() == template
    info = stored.get_info()
    assert (info.algorithm, info.size) == (ALGORITHM.TEMPLATE_SSH, len(template))

    authority = AsymmetricKey.put(session, 20, "CA", 1, C.SIGN_SSH_CERTIFICATE, private_key("rsa3072"))
    tbs = ssh_ca.certificate(authority.get_public_key(), "somebody")
    answer = authority.sign_ssh_certificate(11, ssh_ca.request(time_key, tbs))
    issued = load_ssh_public_identity(b"ssh-rsa-cert-v01@openssh.com " + base64.b64encode(tbs + answer))
    assert isinstance(issued, SSHCertificate)
    issued.verify_cert_signature()
    assert issued.valid_principals == [b"somebody"]
    answer = authority.sign_ssh_certificate(11, ssh_ca.request(time_key, tbs), ALGORITHM.RSA_PKCS1_SHA256)
    authority.get_public_key().verify(answer[-384:], tbs, padding.PKCS1v15(), hashes.SHA256())

    root = ssh_ca.certificate(authority.get_public_key(), "root")
    with refused(ERROR.SSH_CA_CONSTRAINT_VIOLATION):
        authority.sign_ssh_certificate(11, ssh_ca.request(time_key, root))
    other = AsymmetricKey.put(session, 21, "CA", 1, C.SIGN_SSH_CERTIFICATE, private_key("rsa3072"))
    with refused(ERROR.SSH_CA_CONSTRAINT_VIOLATION):
        other.sign_ssh_certificate(11, ssh_ca.request(time_key, tbs))
    with pytest.raises(YubiHsmDeviceError):  # a time that nobody stamped
        authority.sign_ssh_certificate(11, bytes(4 + 256) + tbs)
    with refused(ERROR.OBJECT_NOT_FOUND):
        authority.sign_ssh_certificate(12, ssh_ca.request(time_key, tbs))


# Other objects


@pytest.mark.parametrize("name", ["SHA1", "SHA256", "SHA384", "SHA512"])
def test_hmac(session: AuthSession, name: str) -> None:
    algorithm = ALGORITHM[f"HMAC_{name}"]
    generated = HmacKey.generate(session, 0, "generated", 1, C.SIGN_HMAC | C.VERIFY_HMAC, algorithm)
    assert generated.get_info().size == 2 * HASHES[name].block_size
    assert generated.verify_hmac(generated.sign_hmac(b"content"), b"content")
    for size in (1, 20, HASHES[name].block_size, 200):
        secret = os.urandom(size)
        key = HmacKey.put(session, 0, "imported", 1, C.SIGN_HMAC | C.VERIFY_HMAC, secret, algorithm)
        for data in (b"", b"content", bytes(1500)):
            mac = key.sign_hmac(data)
            assert mac == hmac.digest(secret, data, name)
            assert key.verify_hmac(mac, data)
            assert not key.verify_hmac(bytes(len(mac)), data)


@pytest.mark.parametrize("bits", [128, 192, 256])
def test_aes(session: AuthSession, bits: int) -> None:
    algorithm, secret, iv, data = ALGORITHM[f"AES{bits}"], os.urandom(bits // 8), os.urandom(16), os.urandom(4800)
    generated = SymmetricKey.generate(session, 0, "generated", 1, ALL, algorithm)
    assert generated.decrypt_cbc(iv, generated.encrypt_cbc(iv, data)) == data
    key = SymmetricKey.put(session, 0, "imported", 1, ALL, algorithm, secret)
    assert (key.get_info().size, key.get_info().origin) == (bits // 8, ORIGIN.IMPORTED)
    for mode, encrypted in (
        (modes.ECB(), key.encrypt_ecb(data)),
        (modes.CBC(iv), key.encrypt_cbc(iv, data)),
    ):
        encryptor = Cipher(algorithms.AES(secret), mode).encryptor()
        assert encrypted == encryptor.update(data) + encryptor.finalize()
    assert key.decrypt_ecb(key.encrypt_ecb(data)) == data
    assert key.decrypt_cbc(iv, key.encrypt_cbc(iv, data)) == data
    with pytest.raises(YubiHsmDeviceError):
        session.send_secure_cmd(COMMAND.ENCRYPT_ECB, struct.pack("!H", key.id) + bytes(17))


def crc(data: bytes) -> int:
    """Of Yubico's OTP specification: ISO 13239."""
    value = 0xFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x8408 if value & 1 else 0)
    return value


def one_time_password(credential: bytes, identity: bytes) -> bytes:
    """As a YubiKey makes it."""
    plain = identity + struct.pack("<HHBBH", 19, 51000, 49, 17, 0x1234)
    plain += struct.pack("<H", crc(plain) ^ 0xFFFF)
    encryptor = Cipher(algorithms.AES(credential), modes.ECB()).encryptor()
    return encryptor.update(plain) + encryptor.finalize()


@pytest.mark.parametrize("bits", [128, 192, 256])
def test_otp(session: AuthSession, bits: int) -> None:
    secret, credential, identity = os.urandom(bits // 8), os.urandom(16), os.urandom(6)
    algorithm, nonce_id = ALGORITHM[f"AES{bits}_YUBICO_OTP"], 0x01020304
    key = OtpAeadKey.put(session, 0, "imported", 1, ALL, algorithm, nonce_id, secret)
    other = OtpAeadKey.generate(session, 0, "generated", 1, ALL, algorithm, 7)
    assert key.get_info().size == bits // 8 + 4
    aead = key.create_otp_aead(credential, identity)
    nonce = struct.pack("<I", nonce_id) + aead[:6] + bytes(3)
    assert AESCCM(secret, 8).decrypt(nonce, aead[6:], None) == credential + identity

    otp = one_time_password(credential, identity)
    expected = OtpData(use_counter=19, session_counter=17, timestamp_high=49, timestamp_low=51000)
    assert key.decrypt_otp(aead, otp) == expected
    moved = key.rewrap_otp_aead(other.id, aead)
    assert moved != aead
    assert other.decrypt_otp(moved, otp) == expected
    for wrong in ((key, aead, bytes(16)), (key, key.randomize_otp_aead(), otp)):
        with refused(ERROR.INVALID_OTP):
            wrong[0].decrypt_otp(*wrong[1:])
    with refused(ERROR.INVALID_DATA):
        other.decrypt_otp(aead, otp)
    with refused(ERROR.WRONG_LENGTH):
        key.decrypt_otp(aead, otp[1:])


def test_opaque(session: AuthSession) -> None:
    data = os.urandom(1900)
    stored = Opaque.put(session, 0, "data", 3, C.NONE, ALGORITHM.OPAQUE_DATA, data)
    assert stored.get() == data
    assert (stored.get_info().size, stored.get_info().domains) == (1900, 3)
    key, issued = put(session, "ecp256", id=40), certificate(private_key("ecp256"))
    for compress in (False, True):
        Opaque.put_certificate(session, 40, "certificate", 1, C.NONE, issued, compress=compress)
        assert key.get_certificate() == issued
        with refused(ERROR.OBJECT_EXISTS):
            key.put_certificate("once more", 1, C.NONE, issued)
        Opaque(session, 40).delete()


def test_list_and_sequence(session: AuthSession) -> None:
    put(session, "ecp256", C.SIGN_ECDSA, id=10)
    AsymmetricKey.put(session, 11, "eleven", 2, C.DERIVE_ECDH, private_key("ecp384"))
    HmacKey.generate(session, 10, "mac", 4, C.SIGN_HMAC)
    auth, ten, eleven, mac = (2, 1), (3, 10), (3, 11), (5, 10)
    assert objects_of(session) == {auth, ten, eleven, mac}
    assert objects_of(session, object_id=10) == {ten, mac}
    assert objects_of(session, object_type=OBJECT.ASYMMETRIC_KEY) == {ten, eleven}
    assert objects_of(session, domains=2) == {auth, ten, eleven}
    assert objects_of(session, domains=6, object_type=OBJECT.HMAC_KEY) == {mac}
    assert objects_of(session, capabilities=C.DERIVE_ECDH | C.SIGN_HMAC) == {auth, eleven, mac}
    assert objects_of(session, algorithm=ALGORITHM.EC_P384) == {eleven}
    assert objects_of(session, label="eleven") == {eleven}
    assert objects_of(session, label="eleve") == set()
    key = AsymmetricKey(session, 10)
    for sequence in range(3):
        assert key.get_info().sequence == sequence
        assert {each._seq for each in session.list_objects(object_id=10, label="ecp256")} == {sequence}
        key.delete()
        with refused(ERROR.OBJECT_NOT_FOUND):
            key.get_info()
        put(session, "ecp256", C.SIGN_ECDSA, id=10)


@pytest.mark.parametrize("label", ["", "ä" * 20, "x" * 40])
def test_labels(session: AuthSession, label: str) -> None:
    key = HmacKey.generate(session, 0, label, 1, C.NONE)
    assert key.get_info().label == label
    assert objects_of(session, label=label, object_type=OBJECT.HMAC_KEY) == {(OBJECT.HMAC_KEY, key.id)}


def test_ids_and_algorithms_that_cannot_be(session: AuthSession) -> None:
    with refused(ERROR.INVALID_ID):
        put(session, "ecp256", id=0xFFFF)
    with refused(ERROR.INVALID_DATA):
        AsymmetricKey.generate(session, 0, "", 1, C.NONE, ALGORITHM.AES128)
    with refused(ERROR.OBJECT_EXISTS):
        AuthenticationKey.put_derived(session, 1, "", 1, C.NONE, C.NONE, "another")
    with refused(ERROR.WRONG_LENGTH):
        header = struct.pack("!H40sHQB", 0, b"", 1, 0, ALGORITHM.EC_P256)
        session.send_secure_cmd(COMMAND.PUT_ASYMMETRIC_KEY, header + bytes(31))


# Wrap keys


SECRET = bytes(range(32))
NONCE = bytes(range(13))


def one_of_each(session: AuthSession) -> list[YhsmObject]:
    """With all that makes it usable, id 100; secret ones have SECRET."""
    template = ssh_ca.template(private_key("rsa2048").public_key(), [101])
    return [
        put(session, "ecp256", id=100),
        Opaque.put_certificate(session, 100, "certificate", 1, ALL, certificate(private_key("ecp256"))),
        AuthenticationKey.put_derived(session, 100, "authkey", 1, ALL, ALL, "hundred"),
        WrapKey.put(session, 100, "wrap", 1, ALL, ALGORITHM.AES256_CCM_WRAP, ALL, SECRET),
        HmacKey.put(session, 100, "hmac", 1, ALL, SECRET),
        Template.put(session, 100, "ssh", 1, ALL, ALGORITHM.TEMPLATE_SSH, template),
        OtpAeadKey.put(session, 100, "otp", 1, ALL, ALGORITHM.AES256_YUBICO_OTP, 1, SECRET),
        SymmetricKey.put(session, 100, "aes", 1, ALL, ALGORITHM.AES256, SECRET),
    ]


@pytest.mark.parametrize("kind", ["aes128", "aes192", "aes256", "rsa2048"])
def test_every_object_moves_under_wrap(yubihsm: YubiHsm, session: AuthSession, kind: str) -> None:
    """Out of the device, and again into it."""
    moved = one_of_each(session)
    if kind.startswith("aes"):
        algorithm = ALGORITHM[f"AES{kind[3:]}_CCM_WRAP"]
        key = WrapKey.generate(session, 1, "wrapper", EVERYWHERE, ALL, algorithm, ALL)
        assert key.get_info().size == int(kind[3:]) // 8 + 8
        export, import_ = key.export_wrapped, key.import_wrapped
    else:
        private = private_key(kind)
        key = WrapKey.put(session, 1, "wrapper", EVERYWHERE, ALL, ALGORITHM.RSA_2048, ALL, private)
        public = PublicWrapKey.put(session, 1, "wrapper", EVERYWHERE, ALL, ALL, private.public_key())
        export, import_ = public.export_wrapped_rsa, key.import_wrapped_rsa
    for each in moved:
        before, wrapped = each.get_info(), export(each)
        with refused(ERROR.OBJECT_EXISTS):
            import_(wrapped)
        each.delete()
        again = import_(wrapped)
        assert (type(again), again.id) == (type(each), 100)
        expected = replace(before, origin=before.origin | ORIGIN.IMPORTED_WRAPPED, sequence=1)
        assert again.get_info() == expected
        with pytest.raises(YubiHsmDeviceError):
            import_(wrapped[:-1] + bytes([wrapped[-1] ^ 1]))
    signature = AsymmetricKey(session, 100).sign_ecdsa(b"content")
    private_key("ecp256").public_key().verify(signature, b"content", ec.ECDSA(hashes.SHA256()))
    assert HmacKey(session, 100).sign_hmac(b"content") == hmac.digest(SECRET, b"content", "SHA256")
    assert unwrapped(SECRET, WrapKey(session, 100).wrap_data(b"content")) == b"content"
    yubihsm.create_session_derived(100, "hundred").close()


def unwrapped(secret: bytes, wrapped: bytes) -> bytes:
    """The data of WRAP DATA: a nonce, then CCM of the wrap key's algorithm and the data."""
    plain = AESCCM(secret).decrypt(wrapped[:13], wrapped[13:], None)
    assert ALGORITHM(plain[0]).to_key_size() == len(secret)
    return plain[1:]


@pytest.mark.parametrize("kind", ["rsa2048", "rsa4096", "ecp224", "ecp521", "ecbp512", "ed25519"])
@pytest.mark.parametrize("seed", [False, True])
def test_an_asymmetric_key_moves_under_wrap(session: AuthSession, kind: str, seed: bool) -> None:
    """The seed of an Ed25519 key may go with it."""
    wrapper = WrapKey.generate(session, 1, "wrapper", 1, ALL, ALGORITHM.AES256_CCM_WRAP, ALL)
    key = put(session, kind)
    public, wrapped = spki(key.get_public_key()), wrapper.export_wrapped(key, seed=seed and kind == "ed25519")
    key.delete()
    again = wrapper.import_wrapped(wrapped)
    assert isinstance(again, AsymmetricKey)
    assert spki(again.get_public_key()) == public
    if kind == "ed25519":
        again.get_public_key().verify(again.sign_eddsa(b"content"), b"content")


def test_what_may_not_be_wrapped(session: AuthSession) -> None:
    secret = os.urandom(32)

    def wrap_key(capabilities: CAPABILITY, delegated: CAPABILITY, domains: int = EVERYWHERE) -> WrapKey:
        algorithm = ALGORITHM.AES256_CCM_WRAP
        return WrapKey.put(session, 0, "", domains, capabilities, algorithm, delegated, secret)

    signing = C.SIGN_ECDSA | C.EXPORTABLE_UNDER_WRAP
    key, fixed = put(session, "ecp256", signing), put(session, "ecp256", C.SIGN_ECDSA)
    full = wrap_key(ALL, ALL)
    wrapped = full.export_wrapped(key)
    for call in (
        lambda: full.export_wrapped(fixed),
        lambda: wrap_key(C.EXPORT_WRAPPED, C.EXPORTABLE_UNDER_WRAP).export_wrapped(key),
        lambda: wrap_key(C.IMPORT_WRAPPED, ALL).export_wrapped(key),
    ):
        with refused(ERROR.INSUFFICIENT_PERMISSIONS):
            call()
    key.delete()
    for call in (
        lambda: wrap_key(C.IMPORT_WRAPPED, C.EXPORTABLE_UNDER_WRAP).import_wrapped(wrapped),
        lambda: wrap_key(C.EXPORT_WRAPPED, ALL).import_wrapped(wrapped),
    ):
        with refused(ERROR.INSUFFICIENT_PERMISSIONS):
            call()
    other = WrapKey.generate(session, 0, "", 1, ALL, ALGORITHM.AES256_CCM_WRAP, ALL)
    with refused(ERROR.INVALID_DATA):
        other.import_wrapped(wrapped)
    assert wrap_key(ALL, ALL, 4).import_wrapped(wrapped).get_info().domains == 4  # filtered


@FIRMWARES
def test_wrapped_data(session: AuthSession, firmware: tuple[int, int, int]) -> None:
    secret = os.urandom(24)

    def wrap_key(capabilities: CAPABILITY) -> WrapKey:
        return WrapKey.put(session, 0, "", 1, capabilities, ALGORITHM.AES192_CCM_WRAP, C.NONE, secret)

    wrap, unwrap = wrap_key(C.WRAP_DATA), wrap_key(C.UNWRAP_DATA)
    for size in (1, 16, 1989):
        data = os.urandom(size)
        wrapped = wrap.wrap_data(data)
        assert unwrapped(secret, wrapped) == data
        assert unwrap.unwrap_data(wrapped) == data
    with refused(ERROR.INVALID_DATA):
        unwrap.unwrap_data(bytes(len(wrapped)))
    with refused(ERROR.INVALID_DATA if firmware < (2, 5, 0) else ERROR.INSUFFICIENT_PERMISSIONS):
        unwrap.wrap_data(data)
    with refused(ERROR.INVALID_DATA if firmware < (2, 5, 0) else ERROR.INSUFFICIENT_PERMISSIONS):
        wrap.unwrap_data(wrapped)


@pytest.mark.parametrize("kind", ["rsa2048", "ecp256", "ecp521", "ed25519", "aes"])
@pytest.mark.parametrize("hash", ["SHA1", "SHA256", "SHA512"])
def test_raw_keys_under_rsa(session: AuthSession, kind: str, hash: str) -> None:
    """CKM_RSA_AES_KEY_WRAP, undone by hand."""
    private, oaep_hash = private_key("rsa3072"), HASHES[hash]
    wrapper = WrapKey.put(session, 1, "", 1, ALL, ALGORITHM.RSA_3072, ALL, private)
    public = PublicWrapKey.put(session, 1, "", 1, ALL, ALL, private.public_key())
    assert spki(wrapper.get_public_key()) == spki(public.get_public_key()) == spki(private.public_key())
    assert wrapper.get_info().size == 384 * 7 // 2 + 8
    assert public.get_info().size == 384 + 8
    secret = os.urandom(16)
    key: AsymmetricKey | SymmetricKey
    if kind == "aes":
        key = SymmetricKey.put(session, 50, "raw", 1, ALL, ALGORITHM.AES128, secret)
    else:
        key = put(session, kind, id=50)
    wrapped = public.export_raw_key(key, ALGORITHM.AES192, oaep_hash, oaep_hash, b"label")
    oaep = padding.OAEP(padding.MGF1(oaep_hash), oaep_hash, b"label")
    aes_key = private.decrypt(wrapped[:384], oaep)
    assert len(aes_key) == 24
    raw = keywrap.aes_key_unwrap_with_padding(aes_key, wrapped[384:])
    if kind == "aes":
        assert raw == secret
    else:
        assert spki(load_der_private_key(raw, None).public_key()) == spki(private_key(kind).public_key())
    arguments = (key.object_type, "again", 1, ALL, key.get_info().algorithm, wrapped, oaep_hash, oaep_hash)
    with refused(ERROR.OBJECT_EXISTS):
        wrapper.import_raw_key(50, *arguments, b"label")
    again = wrapper.import_raw_key(51, *arguments, b"label")
    assert again.get_info().origin & ORIGIN.IMPORTED_WRAPPED
    if isinstance(again, AsymmetricKey):
        assert spki(again.get_public_key()) == spki(private_key(kind).public_key())
    elif isinstance(again, SymmetricKey) and isinstance(key, SymmetricKey):
        assert again.encrypt_ecb(bytes(16)) == key.encrypt_ecb(bytes(16))
    with refused(ERROR.INVALID_DATA):
        wrapper.import_raw_key(52, *arguments, b"another label")


def test_rsa_wrap_key_is_generated(session: AuthSession) -> None:
    wrapper = WrapKey.generate(session, 2, "generated", 1, ALL, ALGORITHM.RSA_2048, ALL)
    public = PublicWrapKey.put(session, 2, "public", 1, ALL, ALL, wrapper.get_public_key())
    key = put(session, "ecp256")
    for algorithm in (ALGORITHM.AES128, ALGORITHM.AES192, ALGORITHM.AES256):
        for hash in HASHES.values():
            wrapped = public.export_wrapped_rsa(key, algorithm, hash, hash, b"label")
            key.delete()
            assert wrapper.import_wrapped_rsa(wrapped, hash, hash, b"label").id == key.id


# Attestation


def test_attestation_by_the_device(hsm: Hsm, session: AuthSession) -> None:
    chain = [
        x509.load_pem_x509_certificate(hsm.device.attestation_root),
        *(x509.load_der_x509_certificate(each) for each in reversed(hsm.device.attestation_issuers)),
    ]
    device = Opaque(session, 0).get_certificate()
    capabilities = C.SIGN_ECDSA | C.EXPORTABLE_UNDER_WRAP
    for kind in ("ecp256", "rsa2048"):
        key = put(session, kind, capabilities)
        attested = key.attest()
        attested.verify_directly_issued_by(device)
        assert spki(attested.public_key()) == spki(key.get_public_key())
        said = AttestationExtensions.parse(attested)
        assert isinstance(said, KeyAttestationExtensions)
        assert (said.firmware_version, said.serial, said.origin) == ((2, 4, 0), SERIAL, ORIGIN.IMPORTED)
        assert (said.domains, said.capabilities) == (EVERYWHERE, capabilities)
        assert (said.object_id, said.label) == (key.id, kind)
    assert AttestationExtensions.parse(device).serial == SERIAL
    for issued, issuer in zip([*chain[1:], device], chain, strict=False):
        issued.verify_directly_issued_by(issuer)


@pytest.mark.parametrize("kind", ["rsa2048", "ecp256", "ecp384"])
def test_attestation_by_a_key(session: AuthSession, kind: str) -> None:
    attesting = put(session, kind, C.SIGN_ATTESTATION_CERTIFICATE, id=30)
    key = AsymmetricKey.generate(session, 31, "signer", 1, C.SIGN_ECDSA, ALGORITHM.EC_P256)
    with refused(ERROR.OBJECT_NOT_FOUND):
        key.attest(30)  # no template
    template = certificate(private_key(kind), "attesting")
    Opaque.put_certificate(session, 30, "template", 1, C.NONE, template)
    attested = key.attest(30)
    attested.verify_directly_issued_by(template)
    assert attested.not_valid_after_utc == template.not_valid_after_utc
    assert KeyAttestationExtensions.parse(attested).origin == ORIGIN.GENERATED
    attesting.delete()
    with refused(ERROR.OBJECT_NOT_FOUND):
        key.attest(30)
    put(session, kind, C.SIGN_ECDSA, id=30)
    with refused(ERROR.INSUFFICIENT_PERMISSIONS):
        key.attest(30)


# Log and options


def test_log(yubihsm: YubiHsm, session: AuthSession) -> None:
    key = put(session, "ecp256", id=77)
    key.sign_ecdsa(b"content")
    assert len(session.get_log_entries().entries) == 2  # nothing is audited in the factory state
    session.set_command_audit({COMMAND.SIGN_ECDSA: AUDIT.ON, COMMAND.CREATE_SESSION: AUDIT.ON})
    audit = session.get_command_audit()
    assert (audit[COMMAND.SIGN_ECDSA], audit[COMMAND.SIGN_PSS]) == (AUDIT.ON, AUDIT.OFF)
    key.sign_ecdsa(b"content")
    entries = session.get_log_entries().entries
    assert len(entries) == 3
    last = entries[-1]
    assert (last.command, last.session_key, last.target_key, last.second_key) == (COMMAND.SIGN_ECDSA, 1, 77, 0xFFFF)
    assert (last.length, last.result) == (34, COMMAND.SIGN_ECDSA | 0x80)
    session.set_log_index(last.number)
    yubihsm.create_session_derived(1, PASSWORD).close()
    key.sign_ecdsa(b"content")
    created, signed = session.get_log_entries(previous_entry=last).entries  # the chain holds
    assert (created.command, created.session_key, created.target_key) == (COMMAND.CREATE_SESSION, 0xFFFF, 1)
    assert signed.tick >= created.tick
    with pytest.raises(YubiHsmInvalidResponseError):
        session.get_log_entries(previous_entry=replace(last, digest=bytes(16)))


def test_forced_audit_of_a_full_log(hsm: Hsm, yubihsm: YubiHsm, session: AuthSession) -> None:
    key = put(session, "ecp256")
    session.set_command_audit({COMMAND.SIGN_ECDSA: AUDIT.ON})
    session.set_force_audit(AUDIT.ON)
    assert session.get_force_audit() == AUDIT.ON
    for _ in range(yubihsm.get_device_info().log_size - yubihsm.get_device_info().log_used):
        key.sign_ecdsa(b"content")
    with refused(ERROR.LOG_FULL):
        key.sign_ecdsa(b"content")
    yubihsm.create_session_derived(1, PASSWORD).close()
    log = session.get_log_entries()
    assert len(log.entries) == 62
    hsm.device.reboot()
    session = yubihsm.create_session_derived(1, PASSWORD)
    log = session.get_log_entries()
    assert (len(log.entries), log.n_boot) == (62, 1)
    session.set_log_index(log.entries[-1].number)
    key.with_session(session).sign_ecdsa(b"content")
    session.set_force_audit(AUDIT.OFF)


def test_a_log_that_turns(session: AuthSession) -> None:
    key = put(session, "ecp256")
    session.set_command_audit({COMMAND.SIGN_ECDSA: AUDIT.ON})
    for _ in range(70):
        key.sign_ecdsa(b"content")
    entries = session.get_log_entries().entries  # checks the chain
    assert [each.number for each in entries] == list(range(11, 73))


def test_options(session: AuthSession) -> None:
    session.set_command_audit({COMMAND.SIGN_PSS: AUDIT.FIXED})
    with pytest.raises(YubiHsmDeviceError):
        session.set_command_audit({COMMAND.SIGN_PSS: AUDIT.OFF})
    assert session.get_command_audit()[COMMAND.SIGN_PSS] == AUDIT.FIXED
    assert set(session.get_command_audit()) >= set(COMMAND) - {COMMAND.ERROR, COMMAND.SESSION_MESSAGE}
    with refused(ERROR.INVALID_DATA):
        session.get_fips_status()
    with refused(ERROR.INVALID_DATA):
        session.set_fips_mode(True)
    with refused(ERROR.INVALID_DATA):
        session.put_option(OPTION.FORCE_AUDIT, b"\7")


def test_algorithms_that_are_disabled(session: AuthSession) -> None:
    assert all(session.get_enabled_algorithms().values())
    session.set_enabled_algorithms({ALGORITHM.EC_P256: False, ALGORITHM.RSA_PKCS1_SHA256: False})
    enabled = session.get_enabled_algorithms()
    assert {each for each, on in enabled.items() if not on} == {ALGORITHM.EC_P256, ALGORITHM.RSA_PKCS1_SHA256}
    with refused(ERROR.ALGORITHM_DISABLED):
        AsymmetricKey.generate(session, 0, "", 1, ALL, ALGORITHM.EC_P256)
    key = put(session, "rsa2048")
    with refused(ERROR.ALGORITHM_DISABLED):
        key.sign_pkcs1v1_5(b"content")
    key.sign_pkcs1v1_5(b"content", hashes.SHA512())


# Who may do what


def test_domains(yubihsm: YubiHsm, session: AuthSession) -> None:
    AuthenticationKey.put_derived(session, 2, "two", 2, ALL, ALL, "two")
    first = AsymmetricKey.put(session, 10, "", 1, ALL, private_key("ecp256"))
    second = AsymmetricKey.put(session, 11, "", 3, ALL, private_key("ecp256"))
    with yubihsm.create_session_derived(2, "two") as two:
        assert objects_of(two, object_type=OBJECT.ASYMMETRIC_KEY) == {(OBJECT.ASYMMETRIC_KEY, 11)}
        second.with_session(two).sign_ecdsa(b"content")
        hidden = first.with_session(two)
        for call in (hidden.get_info, hidden.get_public_key, hidden.delete, hidden.attest):
            with refused(ERROR.OBJECT_NOT_FOUND):
                call()
        with refused(ERROR.OBJECT_NOT_FOUND):
            hidden.sign_ecdsa(b"content")
        with refused(ERROR.OBJECT_EXISTS):
            AsymmetricKey.generate(two, 10, "", 2, ALL, ALGORITHM.EC_P256)


def test_nobody_hands_on_what_is_not_delegated(yubihsm: YubiHsm, session: AuthSession) -> None:
    making = C.GENERATE_ASYMMETRIC_KEY | C.PUT_AUTHENTICATION_KEY | C.PUT_WRAP_KEY
    AuthenticationKey.put_derived(session, 2, "two", 1, making, C.SIGN_ECDSA, "two")
    with yubihsm.create_session_derived(2, "two") as two:
        assert AsymmetricKey.generate(two, 0, "", 1, C.SIGN_ECDSA, ALGORITHM.EC_P256).id
        for call in (
            lambda: AsymmetricKey.generate(two, 0, "", 1, C.SIGN_ECDSA | C.SIGN_EDDSA, ALGORITHM.EC_P256),
            lambda: AuthenticationKey.put_derived(two, 0, "", 1, C.SIGN_ECDSA | C.GET_OPTION, C.NONE, "x"),
            lambda: AuthenticationKey.put_derived(two, 0, "", 1, C.NONE, ALL, "x"),
            lambda: WrapKey.put(two, 0, "", 1, C.NONE, ALGORITHM.AES128_CCM_WRAP, C.SIGN_EDDSA, bytes(16)),
        ):
            with refused(ERROR.INSUFFICIENT_PERMISSIONS):
                call()


def sealed(plain: bytes) -> bytes:
    """By the wrap key of `one_of_each`."""
    return NONCE + AESCCM(SECRET).encrypt(NONCE, bytes([ALGORITHM.AES256_CCM_WRAP]) + plain, None)


def sealed_object() -> bytes:
    """An opaque one, as devices export it: its header, its data."""
    header = struct.pack(
        "!QHHHBBBB40s", 0, 99, 4, 1, OBJECT.OPAQUE, ALGORITHM.OPAQUE_DATA, 0, ORIGIN.IMPORTED, b"by hand"
    )
    return sealed(header + b"data")


def sign_ssh(session: AuthSession) -> bytes:
    tbs = ssh_ca.certificate(private_key("rsa2048").public_key(), "somebody")
    return AsymmetricKey(session, 101).sign_ssh_certificate(100, ssh_ca.request(private_key("rsa2048"), tbs))


def decrypt_otp(session: AuthSession) -> OtpData:
    aead = bytes(6) + AESCCM(SECRET, 8).encrypt(struct.pack("<I", 1) + bytes(9), bytes(22), None)
    return OtpAeadKey(session, 100).decrypt_otp(aead, one_time_password(bytes(16), bytes(6)))


SSH = ALGORITHM.TEMPLATE_SSH
WRAP, OTP, AES = ALGORITHM.AES128_CCM_WRAP, ALGORITHM.AES128_YUBICO_OTP, ALGORITHM.AES128
KEY = bytes(16)
OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)

# What needs the capability: of the session, whose own key is 92, and of the objects of `usable`.
NEEDS: dict[CAPABILITY, Callable[[AuthSession], object]] = {
    C.GET_OPAQUE: lambda it: Opaque(it, 100).get(),
    C.PUT_OPAQUE: lambda it: Opaque.put(it, 0, "", 1, C.NONE, ALGORITHM.OPAQUE_DATA, b"x"),
    C.PUT_AUTHENTICATION_KEY: lambda it: AuthenticationKey.put_derived(it, 0, "", 1, C.NONE, C.NONE, "x"),
    C.PUT_ASYMMETRIC: lambda it: put(it, "ecp256", C.NONE),
    C.GENERATE_ASYMMETRIC_KEY: lambda it: AsymmetricKey.generate(it, 0, "", 1, C.NONE, ALGORITHM.EC_P256),
    C.SIGN_PKCS: lambda it: AsymmetricKey(it, 101).sign_pkcs1v1_5(b""),
    C.SIGN_PSS: lambda it: AsymmetricKey(it, 101).sign_pss(b"", 32),
    C.SIGN_ECDSA: lambda it: AsymmetricKey(it, 100).sign_ecdsa(b""),
    C.SIGN_EDDSA: lambda it: AsymmetricKey(it, 102).sign_eddsa(b"x"),
    C.DECRYPT_PKCS: lambda it: AsymmetricKey(it, 101).decrypt_pkcs1v1_5(encrypted(padding.PKCS1v15())),
    C.DECRYPT_OAEP: lambda it: AsymmetricKey(it, 101).decrypt_oaep(encrypted(OAEP)),
    C.DERIVE_ECDH: lambda it: AsymmetricKey(it, 100).derive_ecdh(private_key("ecp256").public_key()),
    C.EXPORT_WRAPPED: lambda it: WrapKey(it, 100).export_wrapped(HmacKey(it, 100)),
    C.IMPORT_WRAPPED: lambda it: WrapKey(it, 100).import_wrapped(sealed_object()),
    C.PUT_WRAP_KEY: lambda it: WrapKey.put(it, 0, "", 1, C.NONE, WRAP, C.NONE, KEY),
    C.GENERATE_WRAP_KEY: lambda it: WrapKey.generate(it, 0, "", 1, C.NONE, WRAP, C.NONE),
    C.SET_OPTION: lambda it: it.set_force_audit(AUDIT.OFF),
    C.GET_OPTION: lambda it: it.get_force_audit(),
    C.GET_PSEUDO_RANDOM: lambda it: it.get_pseudo_random(1),
    C.PUT_HMAC_KEY: lambda it: HmacKey.put(it, 0, "", 1, C.NONE, b"x"),
    C.GENERATE_HMAC_KEY: lambda it: HmacKey.generate(it, 0, "", 1, C.NONE),
    C.SIGN_HMAC: lambda it: HmacKey(it, 100).sign_hmac(b"x"),
    C.VERIFY_HMAC: lambda it: HmacKey(it, 100).verify_hmac(bytes(32), b"x"),
    C.GET_LOG_ENTRIES: lambda it: it.set_log_index(it.get_log_entries().entries[-1].number),
    C.SIGN_SSH_CERTIFICATE: sign_ssh,
    C.GET_TEMPLATE: lambda it: Template(it, 100).get(),
    C.PUT_TEMPLATE: lambda it: Template.put(it, 0, "", 1, C.NONE, SSH, ssh_ca.template(rsa_public(), [1])),
    C.RESET_DEVICE: lambda it: it.send_secure_cmd(COMMAND.RESET_DEVICE),
    C.DECRYPT_OTP: decrypt_otp,
    C.CREATE_OTP_AEAD: lambda it: OtpAeadKey(it, 100).create_otp_aead(bytes(16), bytes(6)),
    C.RANDOMIZE_OTP_AEAD: lambda it: OtpAeadKey(it, 100).randomize_otp_aead(),
    C.SIGN_ATTESTATION_CERTIFICATE: lambda it: AsymmetricKey(it, 102).attest(100),
    C.PUT_OTP_AEAD_KEY: lambda it: OtpAeadKey.put(it, 0, "", 1, C.NONE, OTP, 1, KEY),
    C.GENERATE_OTP_AEAD_KEY: lambda it: OtpAeadKey.generate(it, 0, "", 1, C.NONE, OTP, 1),
    C.WRAP_DATA: lambda it: WrapKey(it, 100).wrap_data(b"x"),
    C.UNWRAP_DATA: lambda it: WrapKey(it, 100).unwrap_data(sealed(b"x")),
    C.DELETE_OPAQUE: lambda it: Opaque(it, 100).delete(),
    C.DELETE_AUTHENTICATION_KEY: lambda it: AuthenticationKey(it, 100).delete(),
    C.DELETE_ASYMMETRIC_KEY: lambda it: AsymmetricKey(it, 100).delete(),
    C.DELETE_WRAP_KEY: lambda it: WrapKey(it, 100).delete(),
    C.DELETE_HMAC_KEY: lambda it: HmacKey(it, 100).delete(),
    C.DELETE_TEMPLATE: lambda it: Template(it, 100).delete(),
    C.DELETE_OTP_AEAD_KEY: lambda it: OtpAeadKey(it, 100).delete(),
    C.CHANGE_AUTHENTICATION_KEY: lambda it: AuthenticationKey(it, 92).change_key(KEY, KEY),
    C.PUT_SYMMETRIC_KEY: lambda it: SymmetricKey.put(it, 0, "", 1, C.NONE, AES, KEY),
    C.GENERATE_SYMMETRIC_KEY: lambda it: SymmetricKey.generate(it, 0, "", 1, C.NONE, AES),
    C.DELETE_SYMMETRIC_KEY: lambda it: SymmetricKey(it, 100).delete(),
    C.DECRYPT_ECB: lambda it: SymmetricKey(it, 100).decrypt_ecb(bytes(16)),
    C.ENCRYPT_ECB: lambda it: SymmetricKey(it, 100).encrypt_ecb(bytes(16)),
    C.DECRYPT_CBC: lambda it: SymmetricKey(it, 100).decrypt_cbc(bytes(16), bytes(16)),
    C.ENCRYPT_CBC: lambda it: SymmetricKey(it, 100).encrypt_cbc(bytes(16), bytes(16)),
    C.PUBLIC_WRAP_KEY_WRITE: lambda it: PublicWrapKey.put(it, 0, "", 1, C.NONE, C.NONE, rsa_public()),
    C.PUBLIC_WRAP_KEY_DELETE: lambda it: PublicWrapKey(it, 100).delete(),
}


def rsa_public() -> rsa.RSAPublicKey:
    public: rsa.RSAPublicKey = private_key("rsa2048").public_key()
    return public


def encrypted(how: padding.AsymmetricPadding) -> bytes:
    return rsa_public().encrypt(b"x", how)


@pytest.fixture
def usable(session: AuthSession) -> None:
    """Objects of every type with all capabilities: id 100, but for RSA 101 and Ed25519 102."""
    one_of_each(session)
    PublicWrapKey.put(session, 100, "", 1, ALL, ALL, rsa_public())
    put(session, "rsa2048", id=101)
    put(session, "ed25519", id=102)


@pytest.mark.parametrize("capability", NEEDS, ids=[each.name for each in NEEDS])
def test_a_session_can_do_what_it_has_the_capability_for(
    yubihsm: YubiHsm, session: AuthSession, usable: None, capability: CAPABILITY
) -> None:
    """With all the others it cannot, with none of the others it can."""
    for id, capabilities in ((91, ALL & ~capability), (92, capability)):
        AuthenticationKey.put(session, id, "", 1, capabilities, ALL, KEY, KEY)
    with yubihsm.create_session(91, KEY, KEY) as without, refused(ERROR.INSUFFICIENT_PERMISSIONS):
        NEEDS[capability](without)
    NEEDS[capability](yubihsm.create_session(92, KEY, KEY))


def test_every_capability_is_among_them() -> None:
    others = {C.EXPORTABLE_UNDER_WRAP, C.REWRAP_FROM_OTP_AEAD_KEY, C.REWRAP_TO_OTP_AEAD_KEY}
    assert set(NEEDS) | others == set(CAPABILITY)


@pytest.mark.parametrize(
    ("kind", "id", "capability"),
    [
        ("ecp256", 100, C.SIGN_ECDSA),
        ("ecp256", 100, C.DERIVE_ECDH),
        ("rsa2048", 101, C.SIGN_PKCS),
        ("rsa2048", 101, C.SIGN_PSS),
        ("rsa2048", 101, C.DECRYPT_PKCS),
        ("rsa2048", 101, C.DECRYPT_OAEP),
        ("ed25519", 102, C.SIGN_EDDSA),
    ],
)
def test_a_key_can_do_what_it_has_the_capability_for(
    session: AuthSession, kind: str, id: int, capability: CAPABILITY
) -> None:
    put(session, kind, ALL & ~capability, id)
    with refused(ERROR.INSUFFICIENT_PERMISSIONS):
        NEEDS[capability](session)
    AsymmetricKey(session, id).delete()
    put(session, kind, capability, id)
    NEEDS[capability](session)
