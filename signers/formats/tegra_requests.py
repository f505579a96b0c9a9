"""The requests that NVIDIA's signing scripts make of their program `tegraopenssl`, and how its answers look.

Source: ../shared/tegra.md, sections 1.4 and 1.5, observed with L4T R35.1, R35.3.1 and R36.2. A request is a file: first
the sizes of its fields, 32 bits each and little-endian, then the fields in the same order, without padding. Paths are
strings that end with a zero byte; counts are numbers of as many bytes as they need.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

KDF_BITS = b"\x00\x00\x01\x00"
"""The last field of a message that derives 256 bits (NIST SP 800-108, section 4.1)."""

KDF_COUNTER = b"\x00\x00\x00\x01"
"""Its first field: the counter, big-endian."""

BLOB_BYTES = 4096
"""The meta blob of an image that is encrypted in blocks: a count, then an entry for each block."""

BLOB_ENTRY_BYTES = 92
"""An entry: IV (12), tag (16), SHA-512 of the ciphertext (64). The count is padded to as many bytes."""

_NUMBER_MAX_BYTES = 8
_PATH_MAX_BYTES = 4096


class RequestError(ValueError):
    """The bytes are no such request."""


@dataclass(frozen=True, slots=True)
class SignRequest:
    """`--rsa`, `--ecc`, `--ed25519`: a signature over a message.

    Arguments:
        message: what to sign.
        signature_bytes: how long the scripts expect the signature to be.
        public_key_path: where the public key is wanted as well, as a file of raw numbers; None: nowhere.
        montgomery_path: likewise the numbers that a verifier computes of it.
        output_path: where the signature goes.
        is_sha512: whether SHA-512 hashes the message, else SHA-256.
    """

    message: bytes
    signature_bytes: int
    public_key_path: bytes | None
    montgomery_path: bytes | None
    output_path: bytes
    is_sha512: bool


@dataclass(frozen=True, slots=True)
class AesRequest:
    """`--aescbc`, `--aescmac`, `--hmacsha256`: encryption, or a MAC, by a key that the request holds.

    Arguments:
        key: the key's bytes.
        message: what to encrypt, or to authenticate.
        iv: of `--aescbc`, 16 bytes; empty where the scripts name none, which means zeros.
        output_path: where the result goes.
    """

    key: bytes
    message: bytes
    iv: bytes
    output_path: bytes


@dataclass(frozen=True, slots=True)
class KdfRequest:
    """`--kdfoem`: encryption by AES-256-GCM with a key that is derived from the SBK.

    Arguments:
        sbk: the key's bytes.
        chain: the messages of the derivations, in their order; at least one.
        iv: 12 bytes.
        aad: what is authenticated and not encrypted.
        content: what is encrypted.
        content_offset: where in the request file that is: the ciphertext is written there.
        output_path: where the tag goes.
    """

    sbk: bytes
    chain: tuple[bytes, ...]
    iv: bytes
    aad: bytes
    content: bytes
    content_offset: int
    output_path: bytes


def parse_rsa(data: bytes) -> SignRequest:
    """Parses the file of `--rsa`. Raises RequestError."""
    (_, length, message, signature, public, montgomery, output), flag = _fields(data, 7, flags=1)
    return _sign_request(length, message, signature, (public, montgomery, output), flag[0])


def parse_ecc(data: bytes) -> SignRequest:
    """Parses the file of `--ecc`. Raises RequestError."""
    (_, length, message, signature, public, output), flag = _fields(data, 6, flags=1)
    return _sign_request(length, message, signature, (public, b"", output), flag[0])


def parse_ed25519(data: bytes) -> SignRequest:
    """Parses the file of `--ed25519`. Raises RequestError."""
    (_, length, message, signature, public, output), _flags = _fields(data, 6)
    return _sign_request(length, message, signature, (public, b"", output), 0)


def parse_cbc(data: bytes) -> AesRequest:
    """Parses the file of `--aescbc`. Raises RequestError."""
    (key, key_size, length, message, _, output, iv), _flags = _fields(data, 7)
    if len(iv) not in (0, 16):
        raise RequestError("an IV of another size than 16 bytes")
    return _aes_request(key, key_size, (length, message), iv, output)


def parse_mac(data: bytes) -> AesRequest:
    """Parses the file of `--aescmac` or `--hmacsha256`. Raises RequestError."""
    (key, key_size, length, message, _, output), _flags = _fields(data, 6)
    return _aes_request(key, key_size, (length, message), b"", output)


def parse_kdf(data: bytes) -> KdfRequest:
    """Parses the file of `--kdfoem`: with 16 fields, or with the 17 of later versions. Raises RequestError."""
    sizes = _sizes(data, 16)
    count = 16 if 4 * 16 + sum(sizes) == len(data) else 17
    # of NVIDIA's own keys, which wrap an SBK that is not in the clear, come three fields before and one behind it
    fields, _flags = _fields(data, count)
    sbk, chain, (iv, aad, _tag, content, flag, output) = fields[3], fields[5 : count - 6], fields[count - 6 :]
    if flag != b"5":
        raise RequestError("an SBK that is not in the clear")
    messages = tuple(message for message in chain if message)
    if not messages or not all(map(_derives, messages)):
        raise RequestError("a derivation that is none of NIST SP 800-108")
    if len(iv) != 12 or not content:
        raise RequestError("an IV of another size than 12 bytes, or nothing to encrypt")
    offset = len(data) - len(output) - len(flag) - len(content)
    return KdfRequest(sbk, messages, iv, aad, content, offset, _path(output))


def _derives(message: bytes) -> bool:
    # counter, label, a zero byte, context, length: labels are at the job's choice, and never the frame of them
    return len(message) > 9 and message.startswith(KDF_COUNTER) and message.endswith(KDF_BITS)


def _sign_request(
    length: bytes, message: bytes, signature: bytes, paths: tuple[bytes, bytes, bytes], flag: int
) -> SignRequest:
    if flag not in (0, 1):
        raise RequestError("a hash function that is neither SHA-256 nor SHA-512")
    public, montgomery, output = paths
    return SignRequest(
        message=_part(message, length),
        signature_bytes=len(signature),
        public_key_path=_path(public) if public else None,
        montgomery_path=_path(montgomery) if montgomery else None,
        output_path=_path(output),
        is_sha512=bool(flag),
    )


def _aes_request(key: bytes, key_size: bytes, counted: tuple[bytes, bytes], iv: bytes, output: bytes) -> AesRequest:
    if int.from_bytes(key_size, "little") != len(key):
        raise RequestError("a key of another size than it says")
    length, message = counted
    return AesRequest(key, _part(message, length), iv, _path(output))


def _sizes(data: bytes, count: int) -> tuple[int, ...]:
    if len(data) < 4 * count:
        raise RequestError("a request that is cut off")
    return struct.unpack_from(f"<{count}I", data)


def _fields(data: bytes, count: int, flags: int = 0) -> tuple[list[bytes], tuple[int, ...]]:
    """The fields, and the numbers that stand behind their sizes."""
    sizes = _sizes(data, count + flags)
    at = 4 * (count + flags)
    if at + sum(sizes[:count]) != len(data):
        raise RequestError("fields that do not fill the request")
    fields = []
    for size in sizes[:count]:
        fields.append(data[at : at + size])
        at += size
    return fields, sizes[count:]


def _part(message: bytes, length: bytes) -> bytes:
    size = int.from_bytes(length, "little")
    if len(length) > _NUMBER_MAX_BYTES or not 0 < size <= len(message):
        raise RequestError("a length that the message does not have")
    return message[:size]


def _path(field: bytes) -> bytes:
    path = field[:-1]
    if not path or len(path) > _PATH_MAX_BYTES or field[-1:] != b"\0" or b"\0" in path:
        raise RequestError("a path that is none")
    return path


# What the answers are made of


def rsa_signature(signature: bytes) -> bytes:
    """An RSA signature as Jetsons store it: the number, little-endian."""
    return signature[::-1]


def ecdsa_signature(signature: bytes, size: int) -> bytes:
    """r || s, each little-endian and padded to half of `size` bytes. Raises RequestError where that is too short."""
    half = len(signature) // 2
    if size % 2 or size // 2 < half:
        raise RequestError("a signature that is longer than its place")
    return b"".join(number[::-1].ljust(size // 2, b"\0") for number in (signature[:half], signature[half:]))


def public_key(key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey) -> bytes:
    """A public key as Jetsons store it.

    RSA: the modulus, little-endian. ECDSA: x || y, each little-endian, of 32 bytes on P-256 and of 68 on P-521.
    Ed25519: its 32 bytes.
    """
    match key:
        case rsa.RSAPublicKey():
            return key.public_numbers().n.to_bytes((key.key_size + 7) // 8, "little")
        case ec.EllipticCurvePublicKey():
            # whole words of 32 bits
            size = (key.key_size + 31) // 32 * 4
            numbers = key.public_numbers()
            return numbers.x.to_bytes(size, "little") + numbers.y.to_bytes(size, "little")
        case ed25519.Ed25519PublicKey():
            return key.public_bytes_raw()


def montgomery(key: rsa.RSAPublicKey) -> bytes:
    """What a verifier of RSA signatures computes of the modulus n: -1/n mod R || R^2 mod n, each little-endian.

    R is 2 to the power of the key's size in bits.
    """
    n, size = key.public_numbers().n, (key.key_size + 7) // 8
    r = 1 << 8 * size
    return (-pow(n, -1, r) % r).to_bytes(size, "little") + (r * r % n).to_bytes(size, "little")


def meta_blob(entries: Sequence[tuple[bytes, bytes, bytes]]) -> bytes:
    """The meta blob for blocks of which each has an IV, a tag and the SHA-512 of its ciphertext.

    Raises RequestError where they are too many.
    """
    count = struct.pack("<I", len(entries)).ljust(BLOB_ENTRY_BYTES, b"\0")
    blob = count + b"".join(map(b"".join, entries))
    if len(blob) > BLOB_BYTES:
        raise RequestError("an image of too many blocks")
    return blob.ljust(BLOB_BYTES, b"\0")
