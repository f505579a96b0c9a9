"""OP-TEE's signed headers: Trusted Applications (TAs), and the subkeys that may stand before one.

    struct shdr     magic, img_type, img_size, algo, hash_size, sig_size; the hash; the signature
    fields          of a TA: its UUID and version; of an encrypted one struct shdr_encrypted_ta too, with nonce and tag
    image           img_size bytes: the TA's ELF file, or struct shdr_subkey

The hash covers struct shdr up to it, the fields and the image; of an encrypted TA, the image as it is before
encryption. The signature is of the hash. A TA's file is a chain of subkeys, mostly an empty one, and then the TA; each
subkey is followed by the name of what is below it.

Source: core/include/signed_hdr.h, core/crypto/signed_hdr.c, core/kernel/ree_fs_ta.c and scripts/sign_encrypt.py of
OP-TEE OS at d5001fe0 (2026-08), and architecture/subkeys.rst of its documentation. Numbers are little-endian, UUIDs and
the numbers of RSA keys big-endian.
"""

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric import rsa

from signers.formats.reading import ReadAt
from tokens.errors import SignatureMismatch
from tokens.schemes import Hash, RsaPkcs1v15, RsaPss
from tokens.verify import verify

HASH = Hash.SHA256
"""What OP-TEE's own tool signs with, and its TAs are made with."""

PSS = RsaPss(HASH, HASH.size)  # TEE_ALG_RSASSA_PKCS1_PSS_MGF1_SHA256, the tool's default
PKCS1V15 = RsaPkcs1v15(HASH)  # TEE_ALG_RSASSA_PKCS1_V1_5_SHA256

TaScheme = RsaPss | RsaPkcs1v15

KEY_BITS = range(2048, 4096 + 1)
"""How large a key OP-TEE takes: is_weak_key_size, CFG_CORE_BIGNUM_MAX_BITS."""

IMAGE_MAX_BYTES = 0xFFFF_FFFF
"""img_size has 32 bits."""

ELF_HEAD_BYTES = 18
"""How many bytes `check_elf` needs."""

SUBKEY_MAX_BYTES = 2048
"""The largest struct shdr_subkey that is read; one with an RSA-4096 key has 577 bytes."""

NAME_MAX_BYTES = 255
"""The longest name below a subkey."""

SUBKEYS_MAX = 16
"""The longest chain of subkeys."""

DEPTH_MAX = 0xFFFF_FFFE
"""The largest max_depth: each must be smaller than the one before, and the first than UINT32_MAX."""

_MAGIC = 0x4F545348  # SHDR_MAGIC
_ALGORITHMS: dict[int, TaScheme] = {0x70414930: PSS, 0x70004830: PKCS1V15}
_NUMBERS = {scheme: number for number, scheme in _ALGORITHMS.items()}

_SHDR = struct.Struct("<IIIIHH")
_TA = struct.Struct("<16sI")  # struct shdr_bootstrap_ta: uuid, ta_version
_ENCRYPTED = struct.Struct("<IIHH")  # struct shdr_encrypted_ta: enc_algo, flags, iv_size, tag_size
_SUBKEY = struct.Struct("<16sIIIII")  # uuid, name_size, subkey_version, max_depth, algo, attr_count
_ATTRIBUTE = struct.Struct("<III")  # id, offset from the start of struct shdr_subkey, size
_MODULUS, _EXPONENT = 0xD0000130, 0xD0000230  # TEE_ATTR_RSA_MODULUS, TEE_ATTR_RSA_PUBLIC_EXPONENT

_AES_GCM = 0x40000810  # TEE_ALG_AES_GCM
NONCE_BYTES = 12
TAG_BYTES = 16


class TaError(ValueError):
    """The bytes are no such file, or break one of OP-TEE's rules."""


class Kind(IntEnum):
    """enum shdr_img_type."""

    PLAIN = 0
    """A TA without UUID and version, as OP-TEE had them first."""
    BOOTSTRAP = 1
    ENCRYPTED = 2
    SUBKEY = 3


@dataclass(frozen=True, slots=True)
class Header:
    """struct shdr up to the hash; sizes in bytes."""

    kind: Kind
    image_size: int
    scheme: TaScheme
    signature_size: int

    def encode(self) -> bytes:
        """The bytes that are hashed before all else."""
        number = _NUMBERS[self.scheme]
        return _SHDR.pack(_MAGIC, self.kind, self.image_size, number, HASH.size, self.signature_size)


@dataclass(frozen=True, slots=True)
class SignedHeader:
    """struct shdr: a header with its hash, and the signature of that."""

    header: Header
    digest: bytes
    signature: bytes

    @property
    def size(self) -> int:
        """Length in bytes."""
        return _SHDR.size + len(self.digest) + len(self.signature)

    def encode(self) -> bytes:
        """The whole of it."""
        return self.header.encode() + self.digest + self.signature

    def verify(self, public_key: rsa.RSAPublicKey) -> None:
        """Raises SignatureMismatch where the signature is not this key's over the hash."""
        verify(public_key, self.header.scheme, self.digest, self.signature)


@dataclass(frozen=True, slots=True)
class Encryption:
    """struct shdr_encrypted_ta: AES-256-GCM; `class_wide` says that the key is one of many devices."""

    class_wide: bool
    nonce: bytes
    tag: bytes

    def encode(self) -> bytes:
        """The structure, with nonce and tag."""
        return _ENCRYPTED.pack(_AES_GCM, self.class_wide, len(self.nonce), len(self.tag)) + self.nonce + self.tag


@dataclass(frozen=True, slots=True)
class Ta:
    """What a TA's file says of its image. Without a `uuid` it is of the kind PLAIN, which has no version either."""

    uuid: UUID | None
    version: int = 0
    encryption: Encryption | None = None

    @property
    def kind(self) -> Kind:
        """The kind of file that says this."""
        if self.uuid is None:
            return Kind.PLAIN
        return Kind.ENCRYPTED if self.encryption else Kind.BOOTSTRAP

    @property
    def fields(self) -> bytes:
        """What stands between the signature and the image."""
        if self.uuid is None:
            return b""
        return _TA.pack(self.uuid.bytes, self.version) + (self.encryption.encode() if self.encryption else b"")


@dataclass(frozen=True, slots=True)
class Subkey:
    """struct shdr_subkey: a public key that OP-TEE trusts for TAs, or subkeys, below a UUID.

    Arguments:
        uuid: the namespace of what is below it.
        name_size: how many bytes the name of that has; 0: it has no name but this UUID itself, an identity subkey.
        version: OP-TEE refuses one that is lower than it has seen.
        max_depth: how many levels of subkeys may be below it; 0: TAs only.
        scheme: how it signs. OP-TEE heeds no more of it than that it is RSA.
        public_key: RSA.
    """

    uuid: UUID
    name_size: int
    version: int
    max_depth: int
    scheme: TaScheme
    public_key: rsa.RSAPublicKey

    def image(self) -> bytes:
        """The structure, its key's modulus and exponent behind it."""
        numbers = self.public_key.public_numbers()
        # as sign_encrypt.py has them: with a leading zero where the top bit is set
        modulus, exponent = (
            number.to_bytes((number.bit_length() + 8) // 8, "big") for number in (numbers.n, numbers.e)
        )
        head = _SUBKEY.pack(
            self.uuid.bytes, self.name_size, self.version, self.max_depth, _NUMBERS[self.scheme], 2
        )  # fmt: skip
        start = len(head) + 2 * _ATTRIBUTE.size
        attributes = _ATTRIBUTE.pack(_MODULUS, start, len(modulus))
        attributes += _ATTRIBUTE.pack(_EXPONENT, start + len(modulus), len(exponent))
        return head + attributes + modulus + exponent

    def uuid_below(self, name: bytes) -> UUID:
        """The UUID that what has this name below it must have: RFC 4122's version 5, but by SHA-512.

        Raises TaError where it can have no such name.
        """
        if len(name) > self.name_size or b"\0" in name:
            raise TaError(f"a name below this subkey has {self.name_size} bytes at most, and no NUL")
        if self.name_size == 0:
            return self.uuid
        return UUID(bytes=hashlib.sha512(self.uuid.bytes + name).digest()[:16], version=5)


@dataclass(frozen=True, slots=True)
class Link:
    """A subkey in a chain, as it stands there; `name` is its own, below the subkey before it."""

    signed: SignedHeader
    image: bytes
    subkey: Subkey
    name: bytes = b""


@dataclass(frozen=True, slots=True)
class Chain:
    """Subkeys, each below the one before it: what a subkey's file holds."""

    links: tuple[Link, ...]

    @property
    def last(self) -> Subkey:
        """The one that signs what is below the chain."""
        return self.links[-1].subkey

    def encode(self) -> bytes:
        """The chain as a file."""
        data = b""
        for number, link in enumerate(self.links):
            before = self.links[number - 1].subkey.name_size if number else 0
            data += link.name.ljust(before, b"\0") + link.signed.encode() + link.image
        return data

    def before(self, name: bytes) -> bytes:
        """What stands before that which has this name below the chain."""
        return self.encode() + name.ljust(self.last.name_size, b"\0")

    def check(self) -> None:
        """Applies OP-TEE's rules for chains. Only the first signature is not looked at: it is by the root key.

        Raises TaError.
        """
        for link, below in zip(self.links, self.links[1:], strict=False):
            if below.subkey.uuid != link.subkey.uuid_below(below.name):
                raise TaError(f"the subkey {below.subkey.uuid} is not in the namespace of the one before it")
            if below.subkey.max_depth >= link.subkey.max_depth:
                raise TaError(f"the subkey {below.subkey.uuid} is deeper than the one before it allows")
            try:
                below.signed.verify(link.subkey.public_key)
            except SignatureMismatch:
                raise TaError(f"the subkey {below.subkey.uuid} is not signed by the one before it") from None
        for link in self.links:
            if digest(link.signed.header, b"", link.image) != link.signed.digest:
                raise TaError(f"the subkey {link.subkey.uuid} has another hash than it says")


@dataclass(frozen=True, slots=True)
class TaFile:
    """What a TA's file holds; `name` is the TA's below the chain, and the image is its last `image_size` bytes."""

    chain: Chain | None
    name: bytes
    signed: SignedHeader
    ta: Ta


def digest(header: Header, fields: bytes, image: bytes) -> bytes:
    """The hash of something small."""
    return hashlib.sha256(header.encode() + fields + image).digest()


def check_elf(head: bytes) -> None:
    """Raises TaError where these first ELF_HEAD_BYTES are not those of a TA or a shared library.

    ldelf/ta_elf.c takes little-endian files of the type ET_DYN (3) alone.
    """
    if len(head) < ELF_HEAD_BYTES or head[:4] != b"\x7fELF":
        raise TaError("it is no ELF file")
    if head[5] != 1 or head[16:18] != b"\x03\x00":
        raise TaError("it is an ELF file, but of another type than TAs and shared libraries are")


def parse(read_at: ReadAt, size: int) -> TaFile:
    """What a TA's file of `size` bytes holds, its chain of subkeys unchecked. Raises TaError."""
    links, name, signed, at = _headers(read_at, size)
    if signed is None:
        raise TaError("it holds subkeys and no TA")
    ta, length = _ta(read_at, at, signed.header.kind)
    if at + length + signed.header.image_size != size:
        raise TaError("it is cut off, or something follows its image")
    return TaFile(Chain(links) if links else None, name, signed, ta)


def parse_chain(data: bytes) -> Chain:
    """The subkeys in a subkey's file, unchecked. Raises TaError."""
    links, _, signed, _ = _headers(lambda offset, length: data[offset : offset + length], len(data))
    if signed is not None:
        raise TaError("it does not end with a subkey")
    return Chain(links)


def _headers(read_at: ReadAt, size: int) -> tuple[tuple[Link, ...], bytes, SignedHeader | None, int]:
    """The subkeys of a file; and unless it ends there, the name behind them, the TA's header, and where that ends."""
    links: list[Link] = []
    name, at = b"", 0
    while (signed := _signed_header(read_at, at)).header.kind == Kind.SUBKEY:
        if len(links) == SUBKEYS_MAX:
            raise TaError(f"it has more than {SUBKEYS_MAX} subkeys")
        if signed.header.image_size > SUBKEY_MAX_BYTES:
            raise TaError(f"a subkey has more than {SUBKEY_MAX_BYTES} bytes")
        at += signed.size
        image = _exactly(read_at, at, signed.header.image_size)
        links.append(Link(signed, image, _subkey(image), name))
        at += len(image)
        if at == size:
            return tuple(links), b"", None, at
        field = _exactly(read_at, at, links[-1].subkey.name_size)
        name = field.partition(b"\0")[0]
        at += len(field)
    return tuple(links), name, signed, at + signed.size


def _signed_header(read_at: ReadAt, offset: int) -> SignedHeader:
    magic, kind, image_size, number, hash_size, signature_size = _SHDR.unpack(_exactly(read_at, offset, _SHDR.size))
    if magic != _MAGIC:
        raise TaError("there is no signed header of OP-TEE's")
    if kind not in Kind._value2member_map_:
        raise TaError(f"it is of the unknown type {kind}")
    scheme = _ALGORITHMS.get(number)
    if scheme is None or hash_size != HASH.size:
        raise TaError(f"its algorithm {number:#010x} is neither RSA-PSS nor PKCS #1 v1.5 with SHA-256")
    if signature_size > KEY_BITS[-1] // 8:
        raise TaError("its signature is longer than that of any key that OP-TEE takes")
    header = Header(Kind(kind), image_size, scheme, signature_size)
    rest = _exactly(read_at, offset + _SHDR.size, hash_size + signature_size)
    return SignedHeader(header, rest[:hash_size], rest[hash_size:])


def _ta(read_at: ReadAt, offset: int, kind: Kind) -> tuple[Ta, int]:
    """What stands before a TA's image, and how long that is."""
    if kind == Kind.PLAIN:
        return Ta(None), 0
    uuid, version = _TA.unpack(_exactly(read_at, offset, _TA.size))
    ta = Ta(UUID(bytes=uuid), version)
    if kind == Kind.ENCRYPTED:
        ta = Ta(ta.uuid, version, _encryption(read_at, offset + _TA.size))
    return ta, len(ta.fields)


def _encryption(read_at: ReadAt, offset: int) -> Encryption:
    algorithm, flags, nonce_size, tag_size = _ENCRYPTED.unpack(_exactly(read_at, offset, _ENCRYPTED.size))
    if (algorithm, nonce_size, tag_size) != (_AES_GCM, NONCE_BYTES, TAG_BYTES) or flags > 1:
        raise TaError("it is encrypted in another way than OP-TEE's tool does: AES-GCM, 12 and 16 bytes")
    rest = _exactly(read_at, offset + _ENCRYPTED.size, nonce_size + tag_size)
    return Encryption(bool(flags), rest[:nonce_size], rest[nonce_size:])


def _subkey(image: bytes) -> Subkey:
    if len(image) < _SUBKEY.size:
        raise TaError("a subkey is cut off")
    uuid, name_size, version, max_depth, number, attributes = _SUBKEY.unpack_from(image)
    end = _SUBKEY.size + attributes * _ATTRIBUTE.size
    if end > len(image) or name_size > NAME_MAX_BYTES or number not in _ALGORITHMS:
        raise TaError("a subkey has fields that cannot be")
    values: dict[int, bytes] = {}
    for kind, offset, length in _ATTRIBUTE.iter_unpack(image[_SUBKEY.size : end]):
        if offset + length > len(image):
            raise TaError("an attribute of a subkey is cut off")
        values.setdefault(kind, image[offset : offset + length])  # find_attr takes the first
    modulus, exponent = (int.from_bytes(values.get(kind, b""), "big") for kind in (_MODULUS, _EXPONENT))
    if modulus.bit_length() not in KEY_BITS:
        raise TaError("the key of a subkey is none of RSA with 2048 to 4096 bits")
    try:
        public_key = rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError:
        raise TaError("the key of a subkey is no RSA key") from None
    return Subkey(UUID(bytes=uuid), name_size, version, max_depth, _ALGORITHMS[number], public_key)


def _exactly(read_at: ReadAt, offset: int, length: int) -> bytes:
    data = read_at(offset, length)
    if len(data) < length:
        raise TaError("it is cut off")
    return data
