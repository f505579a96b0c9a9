"""The RSA encodings of which `cryptography` does not give enough.

It decrypts PKCS #1 v1.5 with implicit rejection where the device answers an error, and OAEP takes the label where
the device is given the label's hash. Source: RFC 8017, sections 7.1 and 7.2.2 and appendix B.2.1.
"""

import hmac
import os

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa

from yubihsm_simulator.definitions import DeviceError, ErrorCode


def _digest(algorithm: hashes.HashAlgorithm, data: bytes) -> bytes:
    digest = hashes.Hash(algorithm)
    digest.update(data)
    return digest.finalize()


def _mgf1(seed: bytes, length: int, algorithm: hashes.HashAlgorithm) -> bytes:
    count = -(-length // algorithm.digest_size)
    return b"".join(_digest(algorithm, seed + at.to_bytes(4, "big")) for at in range(count))[:length]


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


def _private(key: rsa.RSAPrivateKey, ciphertext: bytes) -> bytes:
    """RSADP with the Chinese remainder theorem; the encoded message, as long as the modulus."""
    numbers = key.private_numbers()
    c, n = int.from_bytes(ciphertext, "big"), numbers.public_numbers.n
    if c >= n:
        raise DeviceError(ErrorCode.INVALID_DATA)
    m_p, m_q = pow(c, numbers.dmp1, numbers.p), pow(c, numbers.dmq1, numbers.q)
    m = m_q + numbers.q * ((m_p - m_q) * numbers.iqmp % numbers.p)
    return m.to_bytes(key.key_size // 8, "big")


def pkcs1_decrypt(key: rsa.RSAPrivateKey, ciphertext: bytes) -> bytes:
    """RSAES-PKCS1-v1_5. Raises DeviceError (INVALID_DATA) for wrong padding."""
    encoded = _private(key, ciphertext)
    separator = encoded.find(0, 2)
    if encoded[:2] != b"\x00\x02" or separator < 10:  # at least 8 bytes of padding
        raise DeviceError(ErrorCode.INVALID_DATA)
    return encoded[separator + 1 :]


def oaep_decrypt(
    key: rsa.RSAPrivateKey,
    ciphertext: bytes,
    label_hash: bytes,
    digest: hashes.HashAlgorithm,
    mgf: hashes.HashAlgorithm,
) -> bytes:
    """RSAES-OAEP. Raises DeviceError (INVALID_DATA) for wrong padding or another label."""
    encoded = _private(key, ciphertext)
    size = digest.digest_size
    masked_seed, masked_block = encoded[1 : 1 + size], encoded[1 + size :]
    seed = _xor(masked_seed, _mgf1(masked_block, size, mgf))
    block = _xor(masked_block, _mgf1(seed, len(masked_block), mgf))
    padding, one, message = block[size:].partition(b"\x01")
    if encoded[0] or not hmac.compare_digest(block[:size], label_hash) or padding.strip(b"\x00") or not one:
        raise DeviceError(ErrorCode.INVALID_DATA)
    return message


def oaep_encrypt(
    key: rsa.RSAPublicKey, message: bytes, label_hash: bytes, digest: hashes.HashAlgorithm, mgf: hashes.HashAlgorithm
) -> bytes:
    """RSAES-OAEP of a message that fits."""
    size, length = digest.digest_size, key.key_size // 8
    block = label_hash + bytes(length - len(message) - 2 * size - 2) + b"\x01" + message
    seed = os.urandom(size)
    masked_block = _xor(block, _mgf1(seed, len(block), mgf))
    masked_seed = _xor(seed, _mgf1(masked_block, size, mgf))
    numbers = key.public_numbers()
    encoded = int.from_bytes(masked_seed + masked_block, "big")
    return pow(encoded, numbers.e, numbers.n).to_bytes(length, "big")
