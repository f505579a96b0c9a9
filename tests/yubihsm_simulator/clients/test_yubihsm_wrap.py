"""Yubico's yubihsm-wrap: objects wrapped without a device, imported and used by python-yubihsm."""

import base64
import hmac
import os
from collections.abc import Callable, Iterator

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from yubihsm import YubiHsm
from yubihsm.core import AuthSession
from yubihsm.defs import ALGORITHM, CAPABILITY, ERROR, OBJECT, ORIGIN
from yubihsm.exceptions import YubiHsmDeviceError
from yubihsm.objects import (
    AsymmetricKey,
    AuthenticationKey,
    HmacKey,
    Opaque,
    OtpAeadKey,
    SymmetricKey,
    WrapKey,
    YhsmObject,
)

from tests.yubihsm_simulator.clients.conftest import CURVES, PASSWORD, Hsm, private_key, private_pem

ALL = CAPABILITY.ALL
SECRET = bytes(range(32))


@pytest.fixture
def session(hsm: Hsm) -> Iterator[AuthSession]:
    with YubiHsm.connect(hsm.url) as yubihsm, yubihsm.create_session_derived(1, PASSWORD) as opened:
        yield opened


@pytest.fixture(params=[128, 192, 256])
def wrap_key(request: pytest.FixtureRequest, hsm: Hsm, session: AuthSession) -> WrapKey:
    """One that the device and the file `wrap.key` share."""
    return shared(hsm, session, request.param)


def shared(hsm: Hsm, session: AuthSession, bits: int, domains: int = 0xFFFF, delegated: CAPABILITY = ALL) -> WrapKey:
    secret = hsm.write("wrap.key", os.urandom(bits // 8)).read_bytes()
    return WrapKey.put(session, 1, "wrap", domains, ALL, ALGORITHM[f"AES{bits}_CCM_WRAP"], delegated, secret)


@pytest.fixture
def wrap(hsm: Hsm) -> Callable[..., bytes]:
    """Wraps `data` as object 30, labelled by its algorithm, in the domains 1, 2 and 5."""

    def run(algorithm: str, data: bytes, capabilities: str, *options: str) -> bytes:
        hsm.write("input", data)
        named = ("--id", "30", "--label", algorithm, "-d", "1,2,5", "--wrapkey", "wrap.key")
        files = ("--in", "input", "--out", "wrapped")
        hsm.run("yubihsm-wrap", "-a", algorithm, "-c", capabilities, *named, *files, *options)
        return base64.b64decode(hsm.read("wrapped"))

    return run


def check(imported: YhsmObject, type: OBJECT, algorithm: str) -> None:
    info = imported.get_info()
    assert (info.object_type, info.id, info.label, info.domains) == (type, 30, algorithm, 0b10011)
    assert info.origin == ORIGIN.IMPORTED | ORIGIN.IMPORTED_WRAPPED
    assert (info.algorithm.name.lower().replace("_", ""), info.sequence) == (NAMES[algorithm], 0)


NAMES = {
    "rsa2048": "rsa2048",
    "rsa3072": "rsa3072",
    "rsa4096": "rsa4096",
    "ed25519": "eced25519",
    **{name: f"ec{name.removeprefix('ec')}" for name in CURVES},
    "hmac-sha1": "hmacsha1",
    "hmac-sha256": "hmacsha256",
    "hmac-sha384": "hmacsha384",
    "hmac-sha512": "hmacsha512",
    "aes128": "aes128",
    "aes256": "aes256",
    "opaque-data": "opaquedata",
    "aes128-yubico-otp": "aes128yubicootp",
    "aes256-yubico-otp": "aes256yubicootp",
    "aes128-yubico-authentication": "aes128yubicoauthentication",
    "aes192-ccm-wrap": "aes192ccmwrap",
}


@pytest.mark.parametrize("kind", ["rsa2048", "rsa3072", "rsa4096"])
def test_rsa(hsm: Hsm, session: AuthSession, wrap: Callable[..., bytes], kind: str) -> None:
    wrap_key = shared(hsm, session, 256)
    key = wrap_key.import_wrapped(wrap(kind, private_pem(private_key(kind)), "sign-pkcs,decrypt-oaep"))
    assert isinstance(key, AsymmetricKey)
    check(key, OBJECT.ASYMMETRIC_KEY, kind)
    public = private_key(kind).public_key()
    public.verify(key.sign_pkcs1v1_5(b"content"), b"content", padding.PKCS1v15(), hashes.SHA256())
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
    assert key.decrypt_oaep(public.encrypt(b"secret", oaep)) == b"secret"


@pytest.mark.parametrize("kind", CURVES)
def test_ecdsa(hsm: Hsm, session: AuthSession, wrap: Callable[..., bytes], kind: str) -> None:
    wrap_key = shared(hsm, session, 192)
    key = wrap_key.import_wrapped(wrap(kind, private_pem(private_key(kind)), "sign-ecdsa"))
    assert isinstance(key, AsymmetricKey)
    check(key, OBJECT.ASYMMETRIC_KEY, kind)
    public = private_key(kind).public_key()
    assert key.get_public_key().public_numbers() == public.public_numbers()
    public.verify(key.sign_ecdsa(b"content"), b"content", ec.ECDSA(hashes.SHA256()))


def test_ed25519(session: AuthSession, wrap_key: WrapKey, wrap: Callable[..., bytes]) -> None:
    private = private_key("ed25519")
    key = wrap_key.import_wrapped(wrap("ed25519", private_pem(private), "sign-eddsa"))
    assert isinstance(key, AsymmetricKey)
    check(key, OBJECT.ASYMMETRIC_KEY, "ed25519")
    private.public_key().verify(key.sign_eddsa(b"content"), b"content")
    raw = (Encoding.Raw, PublicFormat.Raw)
    assert key.get_public_key().public_bytes(*raw) == private.public_key().public_bytes(*raw)


@pytest.mark.parametrize("name", ["sha1", "sha256", "sha384", "sha512"])
def test_hmac(hsm: Hsm, session: AuthSession, wrap: Callable[..., bytes], name: str) -> None:
    wrap_key = shared(hsm, session, 128)
    key = wrap_key.import_wrapped(wrap(f"hmac-{name}", SECRET, "sign-hmac,verify-hmac"))
    assert isinstance(key, HmacKey)
    check(key, OBJECT.HMAC_KEY, f"hmac-{name}")
    mac = key.sign_hmac(b"content")
    assert mac == hmac.digest(SECRET, b"content", name)
    assert key.verify_hmac(mac, b"content")
    assert not key.verify_hmac(mac, b"Content")


def test_symmetric_keys(session: AuthSession, wrap_key: WrapKey, wrap: Callable[..., bytes]) -> None:
    key = wrap_key.import_wrapped(wrap("aes256", SECRET, "encrypt-cbc,decrypt-cbc"))
    assert isinstance(key, SymmetricKey)
    check(key, OBJECT.SYMMETRIC_KEY, "aes256")
    encryptor = Cipher(algorithms.AES(SECRET), modes.CBC(bytes(16))).encryptor()
    assert key.encrypt_cbc(bytes(16), bytes(32)) == encryptor.update(bytes(32)) + encryptor.finalize()


def test_opaque_data(session: AuthSession, wrap_key: WrapKey, wrap: Callable[..., bytes]) -> None:
    stored = wrap_key.import_wrapped(wrap("opaque-data", SECRET * 40, "none"))
    assert isinstance(stored, Opaque)
    check(stored, OBJECT.OPAQUE, "opaque-data")
    assert stored.get() == SECRET * 40


def test_authentication_keys(hsm: Hsm, session: AuthSession, wrap_key: WrapKey, wrap: Callable[..., bytes]) -> None:
    capabilities = ("get-pseudo-random", "--delegated", "sign-pkcs")
    key = wrap_key.import_wrapped(wrap("aes128-yubico-authentication", b"another password\n", *capabilities))
    assert isinstance(key, AuthenticationKey)
    check(key, OBJECT.AUTHENTICATION_KEY, "aes128-yubico-authentication")
    assert key.get_info().delegated_capabilities == CAPABILITY.SIGN_PKCS
    with YubiHsm.connect(hsm.url) as yubihsm, yubihsm.create_session_derived(30, "another password") as opened:
        assert len(opened.get_pseudo_random(8)) == 8


def test_wrap_keys(session: AuthSession, wrap_key: WrapKey, wrap: Callable[..., bytes]) -> None:
    options = ("wrap-data,unwrap-data", "--delegated", "none")
    key = wrap_key.import_wrapped(wrap("aes192-ccm-wrap", SECRET[:24], *options))
    assert isinstance(key, WrapKey)
    check(key, OBJECT.WRAP_KEY, "aes192-ccm-wrap")
    wrapped = key.wrap_data(b"content")
    assert AESCCM(SECRET[:24]).decrypt(wrapped[:13], wrapped[13:], None)[1:] == b"content"


def test_otp_keys(session: AuthSession, wrap_key: WrapKey, wrap: Callable[..., bytes]) -> None:
    """Their secret is a nonce id of 4 bytes, and the key."""
    nonce_id = b"\1\2\3\4"
    key = wrap_key.import_wrapped(wrap("aes256-yubico-otp", nonce_id + SECRET, "create-otp-aead"))
    assert isinstance(key, OtpAeadKey)
    check(key, OBJECT.OTP_AEAD_KEY, "aes256-yubico-otp")
    aead = key.create_otp_aead(bytes(16), b"identi")
    assert AESCCM(SECRET, 8).decrypt(nonce_id + aead[:6] + bytes(3), aead[6:], None) == bytes(16) + b"identi"


def test_what_is_not_taken(hsm: Hsm, session: AuthSession, wrap: Callable[..., bytes]) -> None:
    """A capability that the wrap key does not hand on; what was tampered with; another wrap key's."""
    wrap_key = shared(hsm, session, 256, domains=0b10, delegated=CAPABILITY.SIGN_EDDSA)
    pem = private_pem(private_key("ed25519"))
    with pytest.raises(YubiHsmDeviceError) as raised:
        wrap_key.import_wrapped(wrap("ed25519", pem, "sign-eddsa,exportable-under-wrap"))
    assert raised.value.code == ERROR.INSUFFICIENT_PERMISSIONS
    wrapped = wrap("ed25519", pem, "sign-eddsa")
    for at in (0, 20, len(wrapped) - 1):
        with pytest.raises(YubiHsmDeviceError) as raised:
            wrap_key.import_wrapped(wrapped[:at] + bytes([wrapped[at] ^ 1]) + wrapped[at + 1 :])
        assert raised.value.code == ERROR.INVALID_DATA
    assert wrap_key.import_wrapped(wrapped).get_info().domains == 0b10
    hsm.write("wrap.key", SECRET)
    with pytest.raises(YubiHsmDeviceError):
        wrap_key.import_wrapped(wrap("ed25519", pem, "sign-eddsa"))
