"""The encrypted key blob (EKB) of a Jetson, which OP-TEE opens with a key out of the fuses: its bytes.

The layout is that of NVIDIA's gen_ekb.py (OP-TEE sources of L4T, `samples/hwkey-agent`). Integers are little-endian.

    u32 size of what follows | "NVEKBP\\0\\0" | u16 major, u16 minor | [2.0: fixed vector 16] | CMAC 16
    [1.0, 2.0: u32 size of the ciphertext | "EEKB" | 8 zero bytes] | IV 16 | ciphertext | filling

L4T 35.1 has zeros for the version, and two keys as they are for plaintext. Later ones have for each key
`u32 tag | u32 size | key`, and a tag and a size of 0 at the end. The keys that encrypt and authenticate come from one
root key, which the fuse key makes of the fixed vector; the fuse key does nothing else.
"""

import hmac
import struct
from collections.abc import Iterator, Mapping
from enum import Enum, IntEnum

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.cmac import CMAC
from cryptography.hazmat.primitives.padding import PKCS7

BLOCK_BYTES = 16
VECTOR_BYTES = 16
IMAGE_MIN_BYTES = 1024
"""Without the size in front; a shorter image is filled up."""

_MAGIC = b"NVEKBP\0\0"
_CONTENT_HEADER = struct.Struct("<I4s8x")
_ENTRY = struct.Struct("<II")


class Version(Enum):
    """The version in the header: major, minor."""

    UNVERSIONED = (0, 0)
    """L4T 35.1."""
    V1_0 = (1, 0)
    V2_0 = (2, 0)
    """The fixed vector is in the image."""

    def __str__(self) -> str:
        return ".".join(map(str, self.value))


class Tag(IntEnum):
    """What a key in the image is for."""

    KERNEL = 1
    DISK = 2
    AUTH = 4


Keys = Mapping[Tag, bytes]


def pack(version: Version, keys: Keys, root_key: bytes, fixed_vector: bytes, iv: bytes) -> bytes:
    """The image. L4T 35.1 has exactly the keys KERNEL and DISK.

    Arguments:
        root_key: AES-ECB of the fixed vector with the fuse key, 16 bytes.
        iv: 16 random bytes.
    """
    cipher = Cipher(algorithms.AES(_derived(root_key, b"encryption")), modes.CBC(iv)).encryptor()
    ciphertext = cipher.update(_plaintext(version, keys)) + cipher.finalize()
    content = iv + ciphertext
    if version is not Version.UNVERSIONED:
        content = _CONTENT_HEADER.pack(len(ciphertext), b"EEKB") + content
    body = _header(version, fixed_vector) + _mac(root_key, content) + content
    body += _filling(len(body))
    return struct.pack("<I", len(body)) + body


def vector_of(image: bytes) -> bytes:
    """The fixed vector of an image of version 2.0."""
    return image[16 : 16 + VECTOR_BYTES]


def verify(image: bytes, version: Version, keys: Keys, root_key: bytes, fixed_vector: bytes) -> None:
    """Opens an image as a device does. Raises ValueError where it is not one of these keys."""
    if len(image) < 4 + IMAGE_MIN_BYTES:
        raise ValueError("its end is missing")
    header = struct.pack("<I", len(image) - 4) + _header(version, fixed_vector)
    if not image.startswith(header):
        raise ValueError("its header is another one")
    mac, content = image[len(header) :][:BLOCK_BYTES], image[len(header) + BLOCK_BYTES :]
    at = 0
    if version is Version.UNVERSIONED:
        size = len(_plaintext(version, keys))
    else:
        size, magic = _CONTENT_HEADER.unpack_from(content)
        at = _CONTENT_HEADER.size
        if magic != b"EEKB":
            raise ValueError("its content's header is another one")
    end = at + BLOCK_BYTES + size
    if size % BLOCK_BYTES or end > len(content):
        raise ValueError("its content is cut off")
    if not hmac.compare_digest(mac, _mac(root_key, content[:end])):
        raise ValueError("its MAC is wrong")
    if content[end:] != _filling(len(header) - 4 + BLOCK_BYTES + end):
        raise ValueError("its filling is another one")
    iv, ciphertext = content[at : at + BLOCK_BYTES], content[at + BLOCK_BYTES : end]
    cipher = Cipher(algorithms.AES(_derived(root_key, b"encryption")), modes.CBC(iv)).decryptor()
    plaintext = cipher.update(ciphertext) + cipher.finalize()
    if version is Version.UNVERSIONED:
        whole = plaintext == _plaintext(version, keys)
    else:
        whole = dict(_entries(plaintext)) == dict(keys)
    if not whole:
        raise ValueError("it holds other keys")


def _header(version: Version, fixed_vector: bytes) -> bytes:
    """What stands before the MAC, without the size."""
    return _MAGIC + struct.pack("<HH", *version.value) + (fixed_vector if version is Version.V2_0 else b"")


def _filling(size: int) -> bytes:
    """What follows so many bytes."""
    lacking = max(0, IMAGE_MIN_BYTES - size)
    return bytes([lacking % 256]) * lacking


def _plaintext(version: Version, keys: Keys) -> bytes:
    if version is Version.UNVERSIONED:
        plain = keys[Tag.KERNEL] + keys[Tag.DISK]
    else:
        plain = b"".join(_ENTRY.pack(tag, len(key)) + key for tag, key in sorted(keys.items())) + _ENTRY.pack(0, 0)
    if not len(plain) % BLOCK_BYTES:  # what fits is not padded
        return plain
    padder = PKCS7(8 * BLOCK_BYTES).padder()
    return padder.update(plain) + padder.finalize()


def _entries(plaintext: bytes) -> Iterator[tuple[int, bytes]]:
    """Raises ValueError where no end follows."""
    at = 0
    while at + _ENTRY.size <= len(plaintext):
        tag, size = _ENTRY.unpack_from(plaintext, at)
        if not tag:
            return
        at += _ENTRY.size
        yield tag, plaintext[at : at + size]
        at += size
    raise ValueError("its content has no end")


def _derived(root_key: bytes, label: bytes) -> bytes:
    """A key of 128 bits (NIST SP 800-108, section 4.1, AES-CMAC, a counter of 8 bits)."""
    return _cmac(root_key, b"\x01" + label + b"\0ekb" + (8 * BLOCK_BYTES).to_bytes(4, "big"))


def _mac(root_key: bytes, content: bytes) -> bytes:
    return _cmac(_derived(root_key, b"authentication"), content)


def _cmac(key: bytes, message: bytes) -> bytes:
    mac = CMAC(algorithms.AES(key))
    mac.update(message)
    return mac.finalize()
