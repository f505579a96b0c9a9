"""Objects under wrap: how an object is laid out in bytes, and how these bytes are encrypted.

Source: Yubico's yubihsm-wrap (the layout), YubiHSM 2 user guide, "EXPORT WRAPPED" and "EXPORT RSA WRAPPED"; PKCS #11
v3.0 section 2.1.21 (CKM_RSA_AES_KEY_WRAP), RFC 5649 (AES key wrap with padding), RFC 3610 (CCM).
"""

import os
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESCCM
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap_with_padding, aes_key_wrap_with_padding
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

from yubihsm_simulator import keys
from yubihsm_simulator.definitions import ALL_CAPABILITIES, Algorithm, DeviceError, ErrorCode, ObjectType
from yubihsm_simulator.ed25519 import EXPANDED_BYTES, SEED_BYTES, Ed25519Key
from yubihsm_simulator.frames import Fields
from yubihsm_simulator.objects import StoredObject
from yubihsm_simulator.rsa_padding import oaep_decrypt, oaep_encrypt

NONCE_BYTES = 13
TAG_BYTES = 16

# wrap key's algorithm, capabilities, id, length of the rest, domains, type, algorithm, sequence, origin, label
_HEADER = struct.Struct(">BQHHHBBBB40s")

OAEP_HASHES: dict[int, hashes.HashAlgorithm] = {
    Algorithm.RSA_OAEP_SHA1: hashes.SHA1(),  # noqa: S303
    Algorithm.RSA_OAEP_SHA256: hashes.SHA256(),
    Algorithm.RSA_OAEP_SHA384: hashes.SHA384(),
    Algorithm.RSA_OAEP_SHA512: hashes.SHA512(),
}
MGF1_HASHES: dict[int, hashes.HashAlgorithm] = {
    Algorithm.RSA_MGF1_SHA1: hashes.SHA1(),  # noqa: S303
    Algorithm.RSA_MGF1_SHA256: hashes.SHA256(),
    Algorithm.RSA_MGF1_SHA384: hashes.SHA384(),
    Algorithm.RSA_MGF1_SHA512: hashes.SHA512(),
}


def ccm_encrypt(key: bytes, plaintext: bytes) -> bytes:
    """Nonce (13 bytes), ciphertext, tag (16 bytes)."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESCCM(key, TAG_BYTES).encrypt(nonce, plaintext, None)


def ccm_decrypt(key: bytes, wrapped: bytes) -> bytes:
    """Raises DeviceError: WRONG_LENGTH, INVALID_DATA."""
    if len(wrapped) < NONCE_BYTES + TAG_BYTES:
        raise DeviceError(ErrorCode.WRONG_LENGTH)
    try:
        return AESCCM(key, TAG_BYTES).decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], None)
    except InvalidTag:
        raise DeviceError(ErrorCode.INVALID_DATA) from None


def rsa_encrypt(
    key: rsa.RSAPublicKey, aes: bytes, plaintext: bytes, oaep: tuple[bytes, hashes.HashAlgorithm, hashes.HashAlgorithm]
) -> bytes:
    """CKM_RSA_AES_KEY_WRAP: the AES key under RSA-OAEP, then the plaintext under the AES key.

    `oaep`: the label's hash, the hash, the hash of MGF1.
    """
    return oaep_encrypt(key, aes, *oaep) + aes_key_wrap_with_padding(aes, plaintext)


def rsa_decrypt(
    key: rsa.RSAPrivateKey, wrapped: bytes, oaep: tuple[bytes, hashes.HashAlgorithm, hashes.HashAlgorithm]
) -> bytes:
    """The plaintext. Raises DeviceError: WRONG_LENGTH, INVALID_DATA."""
    length = key.key_size // 8
    if len(wrapped) < length + 16 or len(wrapped) % 8:
        raise DeviceError(ErrorCode.WRONG_LENGTH)
    aes = oaep_decrypt(key, wrapped[:length], *oaep)
    try:
        return aes_key_unwrap_with_padding(aes, wrapped[length:])
    except (InvalidUnwrap, ValueError):
        raise DeviceError(ErrorCode.INVALID_DATA) from None


def serialize(stored: StoredObject, wrap_algorithm: Algorithm, with_seed: bool) -> bytes:
    """An object as it goes under wrap. Raises DeviceError (INVALID_DATA) for a seed that there is not."""
    value = _internal(stored, with_seed)
    if stored.type in keys.WITH_DELEGATED:
        value = stored.delegated.to_bytes(8, "big") + value
    return (
        _HEADER.pack(
            wrap_algorithm,
            stored.capabilities,
            stored.id,
            len(value),
            stored.domains,
            stored.type,
            stored.algorithm,
            stored.sequence,
            stored.origin,
            stored.label,
        )
        + value
    )


def deserialize(plaintext: bytes, wrap_algorithm: Algorithm) -> StoredObject:
    """The object of `serialize`. Raises DeviceError: WRONG_LENGTH, INVALID_DATA."""
    fields = Fields(plaintext)
    wrapped_by, capabilities, object_id, length, domains, type_, algorithm, _sequence, origin, label = _HEADER.unpack(
        fields.take(_HEADER.size)
    )
    try:
        stored = StoredObject(
            id=object_id,
            type=ObjectType(type_),
            algorithm=Algorithm(algorithm),
            label=label,
            domains=domains,
            capabilities=capabilities & ALL_CAPABILITIES,
            origin=origin,
            value=b"",
        )
    except ValueError:
        raise DeviceError(ErrorCode.INVALID_DATA) from None
    if wrapped_by != wrap_algorithm or object_id == 0 or stored.algorithm not in keys.ALGORITHMS[stored.type]:
        raise DeviceError(ErrorCode.INVALID_DATA)
    if length != len(fields):
        raise DeviceError(ErrorCode.WRONG_LENGTH)
    if stored.type in keys.WITH_DELEGATED:
        stored.delegated = fields.u64() & ALL_CAPABILITIES
    internal = fields.rest()
    stored.value = _external(stored.type, stored.algorithm, Fields(internal))
    keys.check(stored.type, stored.algorithm, stored.value)
    with_seed = stored.algorithm is Algorithm.EC_ED25519 and len(stored.value) == SEED_BYTES
    if _internal(stored, with_seed) != internal:  # public or derived numbers are another key's
        raise DeviceError(ErrorCode.INVALID_DATA)
    return stored


def _internal(stored: StoredObject, with_seed: bool) -> bytes:
    """The value in the device's own form."""
    if with_seed and stored.algorithm is not Algorithm.EC_ED25519:
        raise DeviceError(ErrorCode.INVALID_DATA)
    if stored.algorithm in keys.RSA_BITS and stored.type is not ObjectType.PUBLIC_WRAP_KEY:
        numbers = stored.rsa_key.private_numbers()
        half = len(stored.value) // 2
        crt = (n.to_bytes(half, "big") for n in (numbers.dmp1, numbers.dmq1, numbers.iqmp))
        return stored.value + b"".join(crt) + keys.public_bytes(stored.public_key)
    if stored.algorithm in keys.CURVES:
        return stored.value + keys.public_bytes(stored.public_key)
    if stored.algorithm is Algorithm.EC_ED25519:
        seed = stored.ed25519_key.seed
        if with_seed and seed is None:
            raise DeviceError(ErrorCode.INVALID_DATA)
        return stored.ed25519_key.expanded + (seed if with_seed and seed else b"")
    if stored.algorithm in keys.HMAC_BLOCK_BYTES:
        block = stored.value.ljust(keys.HMAC_BLOCK_BYTES[stored.algorithm], b"\x00")
        return bytes(byte ^ 0x36 for byte in block) + bytes(byte ^ 0x5C for byte in block)  # RFC 2104: ipad, opad
    return stored.value


def _external(object_type: ObjectType, algorithm: Algorithm, fields: Fields) -> bytes:
    """The value from the device's own form; what follows from it is not looked at."""
    if algorithm in keys.RSA_BITS and object_type is not ObjectType.PUBLIC_WRAP_KEY:
        n = keys.RSA_BITS[algorithm] // 8
        value = fields.take(n)
        fields.take(3 * n // 2 + n)
        fields.end()
        return value
    if algorithm in keys.CURVES:
        length = keys.scalar_bytes(keys.CURVES[algorithm])
        value = fields.take(length)
        fields.take(2 * length)
        fields.end()
        return value
    if algorithm is Algorithm.EC_ED25519:
        expanded = fields.take(EXPANDED_BYTES)
        return fields.rest() or expanded
    if algorithm in keys.HMAC_BLOCK_BYTES:
        length = keys.HMAC_BLOCK_BYTES[algorithm]
        block = bytes(byte ^ 0x36 for byte in fields.take(length))
        fields.take(length)
        fields.end()
        return block
    return fields.rest()


def key_to_pkcs8(stored: StoredObject) -> bytes:
    """The key alone: PKCS #8 (RFC 5958) of an asymmetric key, the bytes of a symmetric one.

    Raises DeviceError (INVALID_DATA) for other objects and for an Ed25519 key without its seed.
    """
    if stored.type is ObjectType.SYMMETRIC_KEY:
        return stored.value
    if stored.type is not ObjectType.ASYMMETRIC_KEY:
        raise DeviceError(ErrorCode.INVALID_DATA)
    key = stored.private_key
    if isinstance(key, Ed25519Key):
        if key.seed is None:
            raise DeviceError(ErrorCode.INVALID_DATA)
        key_with_seed = ed25519.Ed25519PrivateKey.from_private_bytes(key.seed)
        return key_with_seed.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def key_from_pkcs8(object_type: ObjectType, algorithm: Algorithm, encoded: bytes) -> bytes:
    """The value of `key_to_pkcs8`'s key. Raises DeviceError (INVALID_DATA) where it is another kind of key."""
    if object_type is ObjectType.SYMMETRIC_KEY:
        return encoded
    try:
        key = load_der_private_key(encoded, password=None)
    except (ValueError, TypeError):
        raise DeviceError(ErrorCode.INVALID_DATA) from None
    if isinstance(key, rsa.RSAPrivateKey) and keys.RSA_BITS.get(algorithm) == key.key_size:
        return keys.rsa_value(key)
    curve = keys.CURVES.get(algorithm)
    if isinstance(key, ec.EllipticCurvePrivateKey) and curve is not None and curve.name == key.curve.name:
        return keys.ec_value(key)
    if isinstance(key, ed25519.Ed25519PrivateKey) and algorithm is Algorithm.EC_ED25519:
        return key.private_bytes_raw()
    raise DeviceError(ErrorCode.INVALID_DATA)
