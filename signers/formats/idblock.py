"""Rockchip's idblock, from RK3566, RK3568 and RK3588 on: a header, and the images that the boot ROM loads.

    0x000  magic: RKNS, or RKSS where it is signed; at 0x008 how many words are signed and how many images there are;
           at 0x00C flags
    0x078  four entries of 88 bytes: the first sector and the number of sectors (from the header on, of 512 bytes);
           at 24 the image's SHA-256
    0x200  the public key: modulus (512 bytes), exponent (16), and 2^(bits + 132) // modulus (32)
    0x600  SHA-256 of what is before, or its signature by RSASSA-PSS (512)

Numbers are little-endian, the signature too. The fuses hold the SHA-256 of the public key as it stands there.

Source: scripts/rkimage.c and scripts/rockchip.h of barebox at 18f4312d; tools/rkcommon.c of U-Boot (struct
header0_info_v2); rk-format.h and rk-genotp.c of rk3588-tools at 1f0e1e10.
"""

import hashlib
import struct
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric import rsa

from tokens.schemes import Hash, RsaPss
from tokens.verify import verify

SCHEME = RsaPss(Hash.SHA256, Hash.SHA256.size)
"""How it is signed: rk_sign_tool refuses another length of the salt (scripts/rkimage.c)."""

KEY_BITS = (2048, 4096)
"""How large a key the boot ROM takes."""

HEADER_BYTES = 2048
SIGNED_BYTES = 0x600
SECTOR_BYTES = 512
IMAGES_MAX = 4

UNSIGNED_MAGIC, SIGNED_MAGIC = b"RKNS", b"RKSS"

_START = struct.Struct("<4s4xHHI")  # magic, words before the signature, images, flags
_ENTRY = struct.Struct("<HH20s32s32x")  # first sector, sectors; of what is between, nothing is known; SHA-256
_ENTRIES_AT = 0x78
_KEY_AT = 0x200
_MODULUS_BYTES, _EXPONENT_BYTES, _FACTOR_BYTES = 512, 16, 32
_KEY_BYTES = _MODULUS_BYTES + _EXPONENT_BYTES + _FACTOR_BYTES

_HASH_FLAGS, _SHA256_FLAG = 0xF, 0x1
_KEY_FLAGS = 0xF0
_RSA_FLAGS = {2048: 0x10, 4096: 0x20}
_ENCRYPTED_FLAG, _SIGNED_FLAG = 0x1000, 0x2000

# the magic 0x0FF0AA55 of the older format, scrambled by the key that is in every boot ROM (U-Boot, tools/rkcommon.c)
_OLDER_MAGIC = bytes.fromhex("3b8cdcfc")
_OLDER_TAG_AT = 2048
"""There an older idblock says which SoC its first image is for: RK33, RK32 and so on."""

HEAD_BYTES = _OLDER_TAG_AT + 4
"""How many of its first bytes `parse` needs."""


class IdblockError(ValueError):
    """The bytes are no such header, or one that cannot be signed."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image: where it is from the header's start on, in bytes, and its SHA-256."""

    offset: int
    size: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """A header.

    Arguments:
        content: the SIGNED_BYTES that the signature covers.
        signature: what follows them, up to HEADER_BYTES.
        images: what the content says of the images.
    """

    content: bytes
    signature: bytes
    images: tuple[Image, ...]

    @property
    def digest(self) -> bytes:
        """SHA-256 of what is signed."""
        return hashlib.sha256(self.content).digest()

    @property
    def is_signed(self) -> bool:
        """Whether it says so of itself."""
        return self.content.startswith(SIGNED_MAGIC)

    def for_key(self, public_key: rsa.RSAPublicKey) -> "Header":
        """The header as this key signs it: of KEY_BITS, with an exponent of 16 bytes at most."""
        content = bytearray(self.content)
        _, words, count, flags = _START.unpack_from(content)
        flags = flags & ~_KEY_FLAGS | _RSA_FLAGS[public_key.key_size] | _SIGNED_FLAG
        _START.pack_into(content, 0, SIGNED_MAGIC, words, count, flags)
        content[_KEY_AT : _KEY_AT + _KEY_BYTES] = encode_key(public_key)
        return replace(self, content=bytes(content), signature=bytes(len(self.signature)))

    def with_signature(self, signature: bytes) -> "Header":
        """The header with a signature of its digest, as RSA writes it: the most significant byte first."""
        return replace(self, signature=signature[::-1].ljust(len(self.signature), b"\0"))

    def verify(self, public_key: rsa.RSAPublicKey) -> None:
        """Raises SignatureMismatch, and IdblockError where it is signed, but not by this key."""
        if self.content[_KEY_AT : _KEY_AT + _KEY_BYTES] != encode_key(public_key):
            raise IdblockError("the public key in its header is another")
        *_, flags = _START.unpack_from(self.content)
        if not self.is_signed or flags & (_KEY_FLAGS | _SIGNED_FLAG) != _RSA_FLAGS[public_key.key_size] | _SIGNED_FLAG:
            raise IdblockError("its header does not say that it is signed by such a key")
        size = public_key.key_size // 8
        if any(self.signature[size:]):
            raise IdblockError("something follows its signature")
        verify(public_key, SCHEME, self.digest, self.signature[:size][::-1])

    def encode(self) -> bytes:
        """Its HEADER_BYTES."""
        return self.content + self.signature


def parse(head: bytes) -> Header:
    """The header that these first HEAD_BYTES of a file begin with; fewer are an idblock that is cut off.

    Raises IdblockError. Whether the images are what the header says, nothing looks at.
    """
    if head.startswith(_OLDER_MAGIC):
        raise IdblockError(f"it is of the older format{_tag(head)}, which RK356x and RK3588 do not boot")
    if head[:4] not in (UNSIGNED_MAGIC, SIGNED_MAGIC):
        raise IdblockError("it begins with neither RKNS nor RKSS")
    if len(head) < HEADER_BYTES:
        raise IdblockError("its header is cut off")
    _, words, count, flags = _START.unpack_from(head)
    if words * 4 != SIGNED_BYTES:
        raise IdblockError(f"its header has its signature behind {words * 4} bytes and not {SIGNED_BYTES}")
    if flags & _HASH_FLAGS != _SHA256_FLAG:
        raise IdblockError("its header has other hashes than SHA-256")
    if flags & _ENCRYPTED_FLAG:
        raise IdblockError("it is encrypted")
    if not 1 <= count <= IMAGES_MAX:
        raise IdblockError(f"its header tells of {count} images; there can be 1 to {IMAGES_MAX}")
    header = Header(head[:SIGNED_BYTES], head[SIGNED_BYTES:HEADER_BYTES], tuple(_images(head, count)))
    if not header.is_signed and header.signature != header.digest.ljust(len(header.signature), b"\0"):
        raise IdblockError("its header has another hash than it says")
    return header


def _images(head: bytes, count: int) -> list[Image]:
    images = []
    for number in range(count):
        sector, sectors, _, digest = _ENTRY.unpack_from(head, _ENTRIES_AT + number * _ENTRY.size)
        if sector * SECTOR_BYTES < HEADER_BYTES:
            raise IdblockError("one of its images begins within the header")
        images.append(Image(sector * SECTOR_BYTES, sectors * SECTOR_BYTES, digest))
    return images


def _tag(head: bytes) -> str:
    tag = head[_OLDER_TAG_AT : _OLDER_TAG_AT + 4]
    return f" of {tag.decode()}xx" if tag.isalnum() and tag.isascii() else ""


def encode_key(public_key: rsa.RSAPublicKey) -> bytes:
    """The public key as it stands in the header. Its SHA-256 is what the fuses hold."""
    numbers = public_key.public_numbers()
    # what the ROM's hardware divides by: NP of crypto_v2_pka.c in Rockchip's U-Boot
    factor = (1 << (public_key.key_size + 132)) // numbers.n
    return (
        numbers.n.to_bytes(_MODULUS_BYTES, "little")
        + numbers.e.to_bytes(_EXPONENT_BYTES, "little")
        + factor.to_bytes(_FACTOR_BYTES, "little")
    )
