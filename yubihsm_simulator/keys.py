"""Key material by algorithm: lengths, checks, generation, public keys.

The value of an object is what a client puts: p and q of an RSA key (e is 65537), the scalar of an EC key, the seed of
an Ed25519 key (or its expanded form, see `ed25519`), x and y or n of a public key, else the bytes themselves.
"""

import os
from math import lcm

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from yubihsm_simulator.definitions import Algorithm, DeviceError, ErrorCode, ObjectType
from yubihsm_simulator.ed25519 import EXPANDED_BYTES, SEED_BYTES, Ed25519Key

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | Ed25519Key
PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

PUBLIC_EXPONENT = 65537

RSA_BITS = {Algorithm.RSA_2048: 2048, Algorithm.RSA_3072: 3072, Algorithm.RSA_4096: 4096}
CURVES: dict[Algorithm, ec.EllipticCurve] = {
    Algorithm.EC_P224: ec.SECP224R1(),
    Algorithm.EC_P256: ec.SECP256R1(),
    Algorithm.EC_P384: ec.SECP384R1(),
    Algorithm.EC_P521: ec.SECP521R1(),
    Algorithm.EC_K256: ec.SECP256K1(),
    Algorithm.EC_BP256: ec.BrainpoolP256R1(),
    Algorithm.EC_BP384: ec.BrainpoolP384R1(),
    Algorithm.EC_BP512: ec.BrainpoolP512R1(),
}
HMAC_HASHES: dict[Algorithm, hashes.HashAlgorithm] = {
    Algorithm.HMAC_SHA1: hashes.SHA1(),  # noqa: S303
    Algorithm.HMAC_SHA256: hashes.SHA256(),
    Algorithm.HMAC_SHA384: hashes.SHA384(),
    Algorithm.HMAC_SHA512: hashes.SHA512(),
}
HMAC_BLOCK_BYTES = {
    Algorithm.HMAC_SHA1: 64,
    Algorithm.HMAC_SHA256: 64,
    Algorithm.HMAC_SHA384: 128,
    Algorithm.HMAC_SHA512: 128,
}
AES_CCM_WRAP_BYTES = {Algorithm.AES128_CCM_WRAP: 16, Algorithm.AES192_CCM_WRAP: 24, Algorithm.AES256_CCM_WRAP: 32}
OTP_BYTES = {Algorithm.AES128_YUBICO_OTP: 16, Algorithm.AES192_YUBICO_OTP: 24, Algorithm.AES256_YUBICO_OTP: 32}
AES_BYTES = {Algorithm.AES128: 16, Algorithm.AES192: 24, Algorithm.AES256: 32}
AUTHENTICATION_BYTES = {Algorithm.AES128_YUBICO_AUTHENTICATION: 32, Algorithm.EC_P256_YUBICO_AUTHENTICATION: 64}
NONCE_ID_BYTES = 4

ALGORITHMS: dict[ObjectType, frozenset[Algorithm]] = {
    ObjectType.OPAQUE: frozenset({Algorithm.OPAQUE_DATA, Algorithm.OPAQUE_X509_CERTIFICATE}),
    ObjectType.AUTHENTICATION_KEY: frozenset(AUTHENTICATION_BYTES),
    ObjectType.ASYMMETRIC_KEY: frozenset({*RSA_BITS, *CURVES, Algorithm.EC_ED25519}),
    ObjectType.WRAP_KEY: frozenset({*AES_CCM_WRAP_BYTES, *RSA_BITS}),
    ObjectType.HMAC_KEY: frozenset(HMAC_HASHES),
    ObjectType.TEMPLATE: frozenset({Algorithm.TEMPLATE_SSH}),
    ObjectType.OTP_AEAD_KEY: frozenset(OTP_BYTES),
    ObjectType.SYMMETRIC_KEY: frozenset(AES_BYTES),
    ObjectType.PUBLIC_WRAP_KEY: frozenset(RSA_BITS),
}
"""Which algorithms an object of each type can have."""


WITH_DELEGATED = (ObjectType.AUTHENTICATION_KEY, ObjectType.WRAP_KEY, ObjectType.PUBLIC_WRAP_KEY)
"""Objects with delegated capabilities, which count for their size."""


def scalar_bytes(curve: ec.EllipticCurve) -> int:
    """The length of a scalar and of a coordinate."""
    return (curve.key_size + 7) // 8


def stored_bytes(object_type: ObjectType, algorithm: Algorithm, value: bytes) -> int:
    """The size that GET OBJECT INFO tells; measured on firmware 2.5.0 by users of the hardware."""
    size = len(value)
    if algorithm in RSA_BITS and object_type is not ObjectType.PUBLIC_WRAP_KEY:
        size = 7 * len(value) // 2  # p q dp dq qinv n
    elif algorithm in CURVES:
        size = 3 * len(value)  # d x y
    elif algorithm is Algorithm.EC_ED25519:
        size = EXPANDED_BYTES + (SEED_BYTES if len(value) == SEED_BYTES else 0)
    elif algorithm in HMAC_BLOCK_BYTES:
        size = 2 * HMAC_BLOCK_BYTES[algorithm]  # the inner and the outer key
    return size + (8 if object_type in WITH_DELEGATED else 0)


def check(object_type: ObjectType, algorithm: Algorithm, value: bytes) -> None:
    """Whether `value` can be put. Raises DeviceError: INVALID_DATA, WRONG_LENGTH."""
    if algorithm not in ALGORITHMS[object_type]:
        raise DeviceError(ErrorCode.INVALID_DATA)
    if len(value) not in _lengths(algorithm):
        raise DeviceError(ErrorCode.WRONG_LENGTH)
    try:
        _check_numbers(object_type, algorithm, value)
    except ValueError:
        raise DeviceError(ErrorCode.INVALID_DATA) from None


def _lengths(algorithm: Algorithm) -> range | tuple[int, ...]:
    """The lengths that a value can have."""
    if algorithm in HMAC_BLOCK_BYTES:
        return range(1, HMAC_BLOCK_BYTES[algorithm] + 1)
    if algorithm in RSA_BITS:
        return (RSA_BITS[algorithm] // 8,)
    if algorithm in CURVES:
        return (scalar_bytes(CURVES[algorithm]),)
    if algorithm is Algorithm.EC_ED25519:
        return (SEED_BYTES, EXPANDED_BYTES)
    if algorithm in OTP_BYTES:
        return (NONCE_ID_BYTES + OTP_BYTES[algorithm],)
    fixed = AES_CCM_WRAP_BYTES | AES_BYTES | AUTHENTICATION_BYTES
    return (fixed[algorithm],) if algorithm in fixed else range(1, 1 << 16)


def _check_numbers(object_type: ObjectType, algorithm: Algorithm, value: bytes) -> None:
    """Raises ValueError for numbers that are no key."""
    if algorithm in RSA_BITS and object_type is ObjectType.PUBLIC_WRAP_KEY:
        rsa_public_key(value)
    elif algorithm in RSA_BITS:
        _rsa_private_key(value, trusted=False)
    elif algorithm in CURVES:
        ec.derive_private_key(int.from_bytes(value, "big"), CURVES[algorithm])
    elif algorithm is Algorithm.EC_ED25519 and not Ed25519Key(value).consistent:
        raise ValueError("the public key is another key's")
    elif algorithm is Algorithm.EC_P256_YUBICO_AUTHENTICATION:
        ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + value)


def private_key(algorithm: Algorithm, value: bytes) -> PrivateKey:
    """The private key of a value that was checked when it was put. Raises DeviceError (INVALID_DATA) if it has none."""
    if algorithm in RSA_BITS:
        return _rsa_private_key(value, trusted=True)
    if algorithm in CURVES:
        return ec.derive_private_key(int.from_bytes(value, "big"), CURVES[algorithm])
    if algorithm is Algorithm.EC_ED25519:
        return Ed25519Key(value)
    raise DeviceError(ErrorCode.INVALID_DATA)


def _rsa_private_key(value: bytes, trusted: bool) -> rsa.RSAPrivateKey:
    half = len(value) // 2
    p, q = int.from_bytes(value[:half], "big"), int.from_bytes(value[half:], "big")
    n = p * q
    if min(p, q) < 2 or n.bit_length() != 8 * len(value):
        raise ValueError("p and q make no modulus of the right size")
    d = pow(PUBLIC_EXPONENT, -1, lcm(p - 1, q - 1))
    numbers = rsa.RSAPrivateNumbers(
        p,
        q,
        d,
        rsa.rsa_crt_dmp1(d, p),
        rsa.rsa_crt_dmq1(d, q),
        rsa.rsa_crt_iqmp(p, q),
        rsa.RSAPublicNumbers(PUBLIC_EXPONENT, n),
    )
    return numbers.private_key(unsafe_skip_rsa_key_validation=trusted)


def rsa_public_key(modulus: bytes) -> rsa.RSAPublicKey:
    """The public key of a modulus that fills its bytes. Raises ValueError."""
    n = int.from_bytes(modulus, "big")
    if n.bit_length() != 8 * len(modulus):
        raise ValueError("the modulus is shorter than its algorithm says")
    return rsa.RSAPublicNumbers(PUBLIC_EXPONENT, n).public_key()


def rsa_value(key: rsa.RSAPrivateKey) -> bytes:
    """p and q."""
    numbers = key.private_numbers()
    half = key.key_size // 16
    return numbers.p.to_bytes(half, "big") + numbers.q.to_bytes(half, "big")


def ec_value(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The scalar."""
    return key.private_numbers().private_value.to_bytes(scalar_bytes(key.curve), "big")


def generate(algorithm: Algorithm) -> bytes:
    """A new key's value (without the nonce id of an OTP key). Raises DeviceError (INVALID_DATA)."""
    if algorithm in RSA_BITS:
        return rsa_value(rsa.generate_private_key(PUBLIC_EXPONENT, RSA_BITS[algorithm]))
    if algorithm in CURVES:
        return ec_value(ec.generate_private_key(CURVES[algorithm]))
    if algorithm is Algorithm.EC_ED25519:
        return os.urandom(SEED_BYTES)
    lengths = AES_CCM_WRAP_BYTES | AES_BYTES | OTP_BYTES | HMAC_BLOCK_BYTES
    if algorithm not in lengths:
        raise DeviceError(ErrorCode.INVALID_DATA)
    return os.urandom(lengths[algorithm])


def public_bytes(key: PublicKey) -> bytes:
    """As GET PUBLIC KEY answers it: n (RSA), x and y (EC), 32 bytes (Ed25519)."""
    if isinstance(key, rsa.RSAPublicKey):
        return key.public_numbers().n.to_bytes(key.key_size // 8, "big")
    if isinstance(key, ec.EllipticCurvePublicKey):
        length = scalar_bytes(key.curve)
        numbers = key.public_numbers()
        return numbers.x.to_bytes(length, "big") + numbers.y.to_bytes(length, "big")
    return key.public_bytes_raw()
