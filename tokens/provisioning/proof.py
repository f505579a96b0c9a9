"""Proves that an object on one device is what it is on another, by using it."""

import secrets

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from yubihsm.core import AuthSession
from yubihsm.defs import CAPABILITY, OBJECT
from yubihsm.objects import AsymmetricKey, HmacKey, ObjectInfo, SymmetricKey

from tokens.errors import KeyMismatch
from tokens.provider import PublicKey
from tokens.provisioning.capabilities import SIGNING
from tokens.provisioning.side import Side

_SIGN = (CAPABILITY.SIGN_PKCS, CAPABILITY.SIGN_PSS, CAPABILITY.SIGN_ECDSA, CAPABILITY.SIGN_EDDSA)


def prove(source: Side, target: Side, info: ObjectInfo) -> str:
    """Uses the object, where a declared authentication key may.

    Returns how it was proven, or that it was not tried. Raises KeyMismatch where it is another one.
    """
    match info.object_type:
        case OBJECT.OPAQUE:
            return "the same data"
        case OBJECT.ASYMMETRIC_KEY if info.capabilities & SIGNING:
            return _signature(source, target, info)
        case OBJECT.HMAC_KEY if info.capabilities & CAPABILITY.SIGN_HMAC:
            return _same_answer(source, target, info, CAPABILITY.SIGN_HMAC)
        case OBJECT.SYMMETRIC_KEY if info.capabilities & CAPABILITY.ENCRYPT_ECB:
            return _same_answer(source, target, info, CAPABILITY.ENCRYPT_ECB)
        case _:
            return "not used: it signs nothing"


def _signature(source: Side, target: Side, info: ObjectInfo) -> str:
    capability = next(each for each in _SIGN if info.capabilities & each)
    with target.user(info, capability) as session:
        if session is None:
            return "not used: no declared authentication key may"
        data = secrets.token_bytes(32)
        signature = _sign(AsymmetricKey(session, info.id), capability, data)
    public = source.public(info)
    try:
        _verify(public, capability, data, signature)
    except InvalidSignature:
        raise KeyMismatch(
            f"{target.name} signs with another key 0x{info.id:04x} than {source.name}.", "Do not use it."
        ) from None
    return "a signature by the copy verifies with the source's public key"


def _sign(key: AsymmetricKey, capability: CAPABILITY, data: bytes) -> bytes:
    match capability:
        case CAPABILITY.SIGN_PKCS:
            return key.sign_pkcs1v1_5(data)
        case CAPABILITY.SIGN_PSS:
            return key.sign_pss(data, hashes.SHA256.digest_size)
        case CAPABILITY.SIGN_ECDSA:
            return key.sign_ecdsa(data)
        case _:
            return key.sign_eddsa(data)


def _verify(public: PublicKey | bytes | None, capability: CAPABILITY, data: bytes, signature: bytes) -> None:
    """Raises InvalidSignature."""
    match public:
        case rsa.RSAPublicKey() if capability is CAPABILITY.SIGN_PKCS:
            public.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
        case rsa.RSAPublicKey():
            pss = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256.digest_size)
            public.verify(signature, data, pss, hashes.SHA256())
        case ec.EllipticCurvePublicKey():
            public.verify(signature, data, ec.ECDSA(hashes.SHA256()))
        case ed25519.Ed25519PublicKey():
            public.verify(signature, data)
        case _:
            raise InvalidSignature


def _same_answer(source: Side, target: Side, info: ObjectInfo, capability: CAPABILITY) -> str:
    data = secrets.token_bytes(16)
    with source.user(info, capability) as one, target.user(info, capability) as other:
        if one is None or other is None:
            return "not used: no declared authentication key may"
        if _use(one, info, data) != _use(other, info, data):
            raise KeyMismatch(f"{source.name} and {target.name} hold different keys 0x{info.id:04x}.", "Do not use it.")
    return "both devices make the same of random data"


def _use(session: AuthSession, info: ObjectInfo, data: bytes) -> bytes:
    if info.object_type is OBJECT.HMAC_KEY:
        return HmacKey(session, info.id).sign_hmac(data)
    return SymmetricKey(session, info.id).encrypt_ecb(data)
