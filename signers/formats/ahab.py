"""AHAB containers of version 0 (i.MX 8, 8X, 8ULP, 93) as NXP's `cst` signs them: verified before they are released.

Sources: the structures as the headers of `cst` 3.4.1 name them (code/front_end/hdr/ahab_types.h), and what `srktool`
and `cst` write, which the tests compare. All numbers are little endian.

    container        version 0, length (2 bytes), 87, flags (4), software version (2), fuse version, number of images,
                     offset of the signature block (2), 0 (2): 16 bytes
    images           128 bytes each; offset of the image's data from the container's start
    signature block  version 0, length (2 bytes), 90, offsets of certificate, SRK table, signature and blob (2 each),
                     key identifier (4): 16 bytes; then what it names, each at a multiple of 8
    SRK table        D7, length (2 bytes), 42, four records
    SRK record       E1, length (2 bytes), algorithm, hash, size or curve, 0, flags, two lengths (2 each), two numbers
    signature        version 0, length (2 bytes), D8, 0 (4), the signature; of all bytes from the container's start

The algorithm of an SRK record says how the key signs, and follows from the type of key in the certificate: 21
(rsaEncryption) is PKCS #1 v1.5, 22 (id-RSASSA-PSS) is PSS, 27 is ECDSA as r || s.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from signers.formats.hab import is_ca
from signers.formats.reading import ReadAt
from tokens.errors import ArtifactRejected, SignatureMismatch
from tokens.schemes import Hash
from tokens.verify import HASHES, ecdsa_der

_CONTAINER = 0x87
_SIGNATURE_BLOCK = 0x90
_SRK_TABLE = 0xD7
_SRK_TABLE_VERSION = 0x42
_SRK_RECORD = 0xE1
_SIGNATURE = 0xD8
_SRK_CA = 0x80

RSA_PKCS1 = 0x21
RSA_PSS = 0x22
ECDSA = 0x27

_HASHES = (Hash.SHA256, Hash.SHA384, Hash.SHA512)
_RSA_SIZES = {2048: 0x5, 3072: 0x6, 4096: 0x7}
_CURVES: dict[int, type[ec.EllipticCurve]] = {0x1: ec.SECP256R1, 0x2: ec.SECP384R1, 0x3: ec.SECP521R1}

SRK_COUNT = 4
"""Records in an SRK table, always."""

IMAGES_MAX = 32

NXP = 1
OEM = 2
"""Source sets: whose SRK fuses a container is verified by."""

HEADER_BYTES = 16
IMAGE_BYTES = 128
CONTAINER_MAX_BYTES = 0xFFFF
"""The length field has no room for more."""

_CHUNK_BYTES = 1 << 20

Key = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


class AhabError(ValueError):
    """The bytes are no such container or SRK table, or hold what hsmsign does not release."""


@dataclass(frozen=True, slots=True)
class SrkRecord:
    """One super root key: what it signs with, whether it may issue certificates, and the whole record."""

    key: Key
    algorithm: int
    hash: Hash
    ca: bool
    raw: bytes


@dataclass(frozen=True, slots=True)
class SrkTable:
    """The four super root keys; `raw` is the whole table."""

    records: tuple[SrkRecord, ...]
    raw: bytes

    def fuses(self, hash_: Hash) -> bytes:
        """What is burnt into the SRK fuses: the digest of the table, by the hash that the SoC wants (`srktool -d`)."""
        return hashlib.new(hash_.hashlib_name, self.raw).digest()


@dataclass(frozen=True, slots=True)
class Image:
    """An entry of the image array; `offset` is from the container's start, `digest` as long as the hash makes it."""

    offset: int
    size: int
    load: int
    entry: int
    flags: int
    hash: Hash
    digest: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """A container's header and its images; `length` covers the signature block, where there is one already."""

    length: int
    flags: int
    software_version: int
    fuse_version: int
    images: tuple[Image, ...]
    signature_block: int


@dataclass(frozen=True, slots=True)
class Container:
    """A signed container: its header, the SRK table whole, the raw signature, and all bytes that this covers."""

    header: Header
    srk_table: bytes
    signature: bytes
    signed: bytes


@dataclass(frozen=True, slots=True)
class Expected:
    """What a signed container must be.

    Arguments:
        offset: of the container in the artifact.
        signature_block: its offset from the container's start.
        srk_table: the SRK table, whole.
        index: of the SRK in it that signs.
        source_set: OEM or NXP.
        revocations: mask of the SRKs to revoke.
        public_key: the granted key, which is that SRK.
    """

    offset: int
    signature_block: int
    srk_table: bytes
    index: int
    source_set: int
    revocations: int
    public_key: Key

    @property
    def flags(self) -> int:
        """The container's flags: source set, index of the SRK, revocations."""
        return self.source_set | self.index << 4 | self.revocations << 8


def parse_header(data: bytes) -> Header:
    """Parses a container that is not signed yet, or is; more may follow. Raises AhabError."""
    if len(data) < HEADER_BYTES:
        raise AhabError("the container is cut off")
    version, length, tag, flags, software, fuse, count, block, reserved = struct.unpack_from("<BHBIHBBHH", data)
    if version or tag != _CONTAINER or reserved:
        raise AhabError("there is no container of version 0")
    if count > IMAGES_MAX:
        raise AhabError(f"the container has more than {IMAGES_MAX} images")
    end = HEADER_BYTES + IMAGE_BYTES * count
    if not end <= block <= len(data) or length < end:
        raise AhabError("the container's images or its signature block do not lie within it")
    images = tuple(_image(data[at : at + IMAGE_BYTES]) for at in range(HEADER_BYTES, end, IMAGE_BYTES))
    return Header(length, flags, software, fuse, images, block)


def _image(data: bytes) -> Image:
    # then meta data (4 bytes), the hash (64, zeros behind it) and the IV (32)
    offset, size, load, entry, flags = struct.unpack_from("<IIQQI", data)
    number = flags >> 8 & 7
    if number >= len(_HASHES):
        raise AhabError("an image has an unknown hash")
    hash_ = _HASHES[number]
    if any(data[32 + hash_.size : 96]):
        raise AhabError("an image's hash is longer than it should be")
    return Image(offset, size, load, entry, flags, hash_, data[32 : 32 + hash_.size])


def parse(data: bytes) -> Container:
    """Parses a signed container of exactly these bytes.

    Raises AhabError, also where the signature block holds more than an SRK table and a signature.
    """
    header = parse_header(data)
    if header.length != len(data):
        raise AhabError("the container has another length than its header says")
    block = data[header.signature_block :]
    if len(block) < 16:
        raise AhabError("the signature block is cut off")
    version, length, tag, certificate, table_at, signature_at, blob, identifier = struct.unpack_from("<BHBHHHHI", block)
    if version or tag != _SIGNATURE_BLOCK or length != len(block):
        raise AhabError("there is no signature block of version 0 that ends with the container")
    if certificate or blob or identifier:
        raise AhabError("the signature block holds a certificate or a blob")
    if table_at != 16 or not 16 + 4 <= signature_at <= len(block) - 8 or signature_at % 8:
        raise AhabError("the SRK table or the signature is not in its place")
    table_length = int.from_bytes(block[17:19], "little")
    signature_version, signature_length, signature_tag, reserved = struct.unpack_from("<BHBI", block, signature_at)
    if signature_version or signature_tag != _SIGNATURE or reserved:
        raise AhabError("there is no signature of version 0")
    for start, size, end in ((16, table_length, signature_at), (signature_at, signature_length, len(block))):
        # what is shorter than its place has zeros behind it, less than 8
        if not start + size <= end < start + size + 8 or any(block[start + size : end]):
            raise AhabError("the SRK table or the signature has another length than its place")
    signed = data[: header.signature_block + signature_at]
    signature = block[signature_at + 8 : signature_at + signature_length]
    return Container(header, block[16 : 16 + table_length], signature, signed)


def parse_srk_table(data: bytes) -> SrkTable:
    """Parses an SRK table, as `srktool -a` writes it. Raises AhabError."""
    if len(data) < 4 or struct.unpack_from("<BHB", data) != (_SRK_TABLE, len(data), _SRK_TABLE_VERSION):
        raise AhabError("this is no SRK table, or something follows it")
    records: list[SrkRecord] = []
    at = 4
    while at < len(data) and len(records) < SRK_COUNT:
        length = int.from_bytes(data[at + 1 : at + 3], "little")
        records.append(_srk_record(data[at : at + length]))
        at += length
    if len(records) != SRK_COUNT or at != len(data):
        raise AhabError(f"the SRK table has not exactly {SRK_COUNT} keys")
    return SrkTable(tuple(records), data)


def _srk_record(raw: bytes) -> SrkRecord:
    if len(raw) < 12 or raw[3] not in (RSA_PKCS1, RSA_PSS, ECDSA):
        raise AhabError("a key of the SRK table is neither RSA nor EC")
    try:
        algorithm, hash_, curve, _, flags, first = struct.unpack_from("<xxxBBBBBH", raw)
        numbers = raw[12 : 12 + first], raw[12 + first :]
        if algorithm != ECDSA:
            modulus, exponent = (int.from_bytes(each, "big") for each in numbers)
            key: Key = rsa.RSAPublicNumbers(exponent, modulus).public_key()
        else:
            key = ec.EllipticCurvePublicKey.from_encoded_point(_CURVES[curve](), b"\x04" + raw[12:])
        record = SrkRecord(key, algorithm, _HASHES[hash_], flags == _SRK_CA, raw)
    except (ValueError, KeyError, IndexError, UnsupportedAlgorithm):
        raise AhabError("a key of the SRK table is none") from None
    if raw != _encode_record(record.key, algorithm, record.hash, record.ca):
        raise AhabError("a key of the SRK table is encoded otherwise")
    return record


def _encode_record(key: Key, algorithm: int, hash_: Hash, ca: bool) -> bytes:
    size: int | None
    match key:
        case rsa.RSAPublicKey():
            public = key.public_numbers()
            first, second = (each.to_bytes((each.bit_length() + 7) // 8, "big") for each in (public.n, public.e))
            size = _RSA_SIZES.get(key.key_size)
        case ec.EllipticCurvePublicKey():
            point = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)[1:]
            first, second = point[: len(point) // 2], point[len(point) // 2 :]
            size = next((number for number, curve in _CURVES.items() if isinstance(key.curve, curve)), None)
    if size is None:
        raise AhabError("AHAB knows no such key size or elliptic curve")
    length = 12 + len(first) + len(second)
    fields = algorithm, _HASHES.index(hash_), size, 0, _SRK_CA if ca else 0
    header = struct.pack("<BHBBBBBHH", _SRK_RECORD, length, *fields, len(first), len(second))
    return header + first + second


def encode_srk_table(certificates: Sequence[x509.Certificate], hash_: Hash) -> bytes:
    """The SRK table of four certificates whose keys sign with a hash: what `srktool -a -s` writes.

    Raises AhabError where a key is of no fitting type, or the hash none of AHAB's.
    """
    if hash_ not in _HASHES:
        raise AhabError(f"AHAB does not know {hash_}")
    if len(certificates) != SRK_COUNT:
        raise AhabError(f"an SRK table has {SRK_COUNT} keys")
    records = b"".join(_encode_record(*_key(each), hash_, is_ca(each)) for each in certificates)
    return struct.pack("<BHB", _SRK_TABLE, 4 + len(records), _SRK_TABLE_VERSION) + records


def _key(certificate: x509.Certificate) -> tuple[Key, int]:
    """The key, and the algorithm that the type of key in the certificate means."""
    key = certificate.public_key()
    match key:
        case rsa.RSAPublicKey():
            pss = certificate.public_key_algorithm_oid == x509.PublicKeyAlgorithmOID.RSASSA_PSS
            return key, RSA_PSS if pss else RSA_PKCS1
        case ec.EllipticCurvePublicKey():
            return key, ECDSA
    raise AhabError("a certificate's key is neither RSA nor EC")


def verify(expected: Expected, unsigned: ReadAt, unsigned_size: int, signed: ReadAt, signed_size: int) -> Container:
    """Checks the artifact with its signed container against the artifact that was to be signed; returns the container.

    All bytes must be the same but the length and the flags in the container's header, which must be as asked for, and
    the signature block, which must hold the SRK table and a signature of the granted key, and may lie only where the
    unsigned artifact has a signature block's place or zeros. The images must have the hashes that the container says.

    Raises SignatureMismatch, and ArtifactRejected where the unsigned artifact is at fault: a client that sends such a
    one must not get the key locked.
    """
    start = expected.offset
    try:
        before = parse_header(unsigned(start, CONTAINER_MAX_BYTES))
    except AhabError as error:
        raise _rejected(f"{error}") from None
    if before.signature_block != expected.signature_block:
        raise _rejected("its signature block is elsewhere than the CSF says")
    for image in before.images:
        _check_image(image, start, unsigned, unsigned_size)
    try:
        length = int.from_bytes(signed(start + 1, 2), "little")
        container = parse(signed(start, length))
        table = parse_srk_table(expected.srk_table)
    except AhabError as error:
        raise _bad(f"it cannot be parsed ({error})") from None
    end = start + length
    _require(signed_size == max(unsigned_size, end), "it has another size")
    _require(container.header.flags == expected.flags, "its flags are not those asked for")
    head = unsigned(start, expected.signature_block)
    head = head[:1] + length.to_bytes(2, "little") + head[3:4] + expected.flags.to_bytes(4, "little") + head[8:]
    _require(container.signed.startswith(head), "its header or its images are other ones")
    place = start + max(before.length, expected.signature_block)
    if any(unsigned(place, max(end - place, 0))) or any(each.size and each.offset < length for each in before.images):
        raise _rejected(f"its signature block needs {length - before.signature_block} bytes and overwrites something")
    for first, last in ((0, start), (end, signed_size)):
        same = all(ours == theirs for ours, theirs in _pairs(unsigned, signed, first, last))
        _require(same, "it differs outside of the container")
    _require(container.srk_table == expected.srk_table, "the SRK table in it is another one")
    _require(0 <= expected.index < SRK_COUNT, "its SRK table has no key at that index")
    record = table.records[expected.index]
    _require(record.key == expected.public_key, "the SRK at that index is not the granted key")
    _check_signature(container, record)
    return container


def _check_image(image: Image, start: int, unsigned: ReadAt, size: int) -> None:
    if not image.size:
        return
    first = start + image.offset
    if first + image.size > size:
        raise _rejected("an image does not lie in the artifact")
    digest = hashlib.new(image.hash.hashlib_name)
    for chunk in _chunks(unsigned, first, first + image.size):
        digest.update(chunk)
    if digest.digest() != image.digest:
        raise _rejected("an image has another hash than it says")


def _check_signature(container: Container, record: SrkRecord) -> None:
    prehashed = Prehashed(HASHES[record.hash])
    digest = hashlib.new(record.hash.hashlib_name, container.signed).digest()
    try:
        match record.key:
            case rsa.RSAPublicKey() if record.algorithm == RSA_PSS:
                # cst leaves the salt's length to OpenSSL, whose default is the longest that fits
                scheme = padding.PSS(padding.MGF1(HASHES[record.hash]), padding.PSS.AUTO)
                record.key.verify(container.signature, digest, scheme, prehashed)
            case rsa.RSAPublicKey():
                record.key.verify(container.signature, digest, padding.PKCS1v15(), prehashed)
            case ec.EllipticCurvePublicKey():
                record.key.verify(ecdsa_der(container.signature, record.key), digest, ec.ECDSA(prehashed))
    except (InvalidSignature, ValueError):
        raise _bad("its signature is not one of the granted key") from None


def _pairs(unsigned: ReadAt, signed: ReadAt, first: int, last: int) -> Iterator[tuple[bytes, bytes]]:
    return zip(_chunks(unsigned, first, last), _chunks(signed, first, last), strict=True)


def _chunks(read: ReadAt, first: int, last: int) -> Iterator[bytes]:
    for at in range(first, last, _CHUNK_BYTES):
        length = min(_CHUNK_BYTES, last - at)
        chunk = read(at, length)
        _require(len(chunk) == length, "it is cut off")
        yield chunk


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise _bad(fault)


def _rejected(fault: str) -> ArtifactRejected:
    return ArtifactRejected(
        f"The AHAB container cannot be signed: {fault}.", "Send the container that mkimage makes, and its own offsets."
    )


def _bad(fault: str) -> SignatureMismatch:
    return SignatureMismatch(
        f"The AHAB container that was made is not what was asked for: {fault}.",
        "Report this with the request id: it was not released.",
    )
