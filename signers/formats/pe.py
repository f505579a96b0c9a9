"""PE/COFF images and their Authenticode signatures: what UEFI loads under Secure Boot.

Layouts are those of Microsoft's "PE Format", of its paper "Windows Authenticode Portable Executable Signature Format"
(2008), and of the UEFI specification 2.10, section 32.2.4. An image is read in pieces, through a function that gives
`length` bytes from `offset` on, fewer only at its end.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import asn1crypto.parser

from signers.formats import cms, der
from signers.formats.reading import ReadAt, chunks
from tokens.schemes import Hash

SPC_INDIRECT_DATA = "1.3.6.1.4.1.311.2.1.4"
_SPC_PE_IMAGE_DATA = "1.3.6.1.4.1.311.2.1.15"

CERTIFICATES_MAX_BYTES = 1024 * 1024
"""The largest table of signatures: one signature with its certificates has a few KiB."""

IMAGE_MAX_BYTES = 0xFFFF_FFFF
"""Offsets in an image have 32 bits."""

ENTRY_ALIGNMENT = 8
"""Of an entry in the table of signatures ("PE Format", The Attribute Certificate Table)."""

_SIGNATURE = b"PE\0\0"
_COFF_HEADER_BYTES = 24  # with the signature before it
_SECTION_BYTES = 40
# offsets in the optional header
_SIZE_OF_HEADERS, _CHECKSUM, _SUBSYSTEM = 60, 64, 68
_DIRECTORIES = {0x10B: 96, 0x20B: 112}  # PE32, PE32+: where the data directories begin
_CERTIFICATE_TABLE = 4  # its index among them
_DIRECTORY_BYTES = 8
_EFI_SUBSYSTEMS = range(10, 14)  # application, boot service driver, runtime driver, ROM

# WIN_CERTIFICATE (UEFI, section 32.2.4.1): dwLength, wRevision, wCertificateType
_WIN_CERTIFICATE = struct.Struct("<IHH")
_REVISION, _PKCS_SIGNED_DATA = 0x0200, 0x0002


class PeError(ValueError):
    """It is no PE image that UEFI loads; the message says why."""


@dataclass(frozen=True, slots=True)
class Image:
    """Where the parts of an image are. Offsets and sizes are in bytes of the file.

    Arguments:
        checksum: the offset of the header's CheckSum, 4 bytes.
        directory: the offset of the data directory's entry for the signatures: their offset and size, 8 bytes.
        headers_size: SizeOfHeaders.
        sections: offset and size of the data of each section that has some, in the order of the file.
        content_size: what comes before the table of signatures.
        size: of the whole file.
    """

    checksum: int
    directory: int
    headers_size: int
    sections: tuple[tuple[int, int], ...]
    content_size: int
    size: int

    def hashed(self) -> Iterator[tuple[int, int]]:
        """Begin and end of what a signature covers ("Calculating the PE Image Hash", steps 3 to 14)."""
        yield 0, self.checksum
        yield self.checksum + 4, self.directory
        yield self.directory + _DIRECTORY_BYTES, self.headers_size
        for offset, size in self.sections:
            yield offset, offset + size
        # what follows the last section, counted as if the sections left no gaps
        yield self._counted, self.content_size

    @property
    def _counted(self) -> int:
        return self.headers_size + sum(size for _, size in self.sections)


def parse(read_at: ReadAt, size: int) -> Image:
    """Finds the parts of an image. Raises PeError."""
    _require(size <= IMAGE_MAX_BYTES, "it has more than 4 GiB")
    dos = read_at(0, 64)
    _require(len(dos) == 64 and dos.startswith(b"MZ"), "it does not begin with an MZ header")
    (coff,) = struct.unpack_from("<I", dos, 60)
    header = read_at(coff, _COFF_HEADER_BYTES)
    _require(len(header) == _COFF_HEADER_BYTES and header.startswith(_SIGNATURE), "it has no PE header")
    # the checksum adds up 16-bit words
    _require(coff % 2 == 0, "its PE header is not aligned")
    section_count, optional_size = struct.unpack_from("<H12xH", header, 6)
    optional = coff + _COFF_HEADER_BYTES
    fields = read_at(optional, optional_size)
    _require(len(fields) == optional_size >= _SUBSYSTEM + 2, "its optional header is too short")
    directories = _DIRECTORIES.get(int.from_bytes(fields[:2], "little"))
    if directories is None:
        raise PeError("it is neither PE32 nor PE32+")
    entry = directories + _CERTIFICATE_TABLE * _DIRECTORY_BYTES
    _require(optional_size >= entry + _DIRECTORY_BYTES, "its header has no place for a signature")
    (directory_count,) = struct.unpack_from("<I", fields, directories - 4)
    _require(directory_count > _CERTIFICATE_TABLE, "its header has no place for a signature")
    (subsystem,) = struct.unpack_from("<H", fields, _SUBSYSTEM)
    _require(subsystem in _EFI_SUBSYSTEMS, f"it is for the subsystem {subsystem}, and none of UEFI's")
    (headers_size,) = struct.unpack_from("<I", fields, _SIZE_OF_HEADERS)
    sections = optional + optional_size
    sections_end = sections + section_count * _SECTION_BYTES
    _require(sections_end <= headers_size <= size, "its headers do not lie within SizeOfHeaders")
    table_offset, table_size = struct.unpack_from("<II", fields, entry)
    image = Image(
        checksum=optional + _CHECKSUM,
        directory=optional + entry,
        headers_size=headers_size,
        sections=_sections(read_at(sections, sections_end - sections)),
        content_size=table_offset if table_size else size,
        size=size,
    )
    _check(image, table_size)
    return image


def _sections(table: bytes) -> tuple[tuple[int, int], ...]:
    # SizeOfRawData and PointerToRawData of each entry
    found = ((offset, size) for size, offset in struct.iter_unpack("<16xII16x", table) if size)
    return tuple(sorted(found))


def _check(image: Image, table_size: int) -> None:
    # overlapping sections would be hashed twice: this also bounds the work
    _require(image._counted <= image.content_size, "its sections overlap, or lie outside the file")
    _require(
        all(image.headers_size <= offset and offset + size <= image.content_size for offset, size in image.sections),
        "a section lies outside the file, or in its headers",
    )
    if table_size:
        _require(image.content_size % ENTRY_ALIGNMENT == 0, "its table of signatures is not aligned")
        # firmware takes all that follows for the table
        _require(image.content_size + table_size == image.size, "its table of signatures is not at its end")
        _require(table_size <= CERTIFICATES_MAX_BYTES, f"its signatures have more than {CERTIFICATES_MAX_BYTES} bytes")


def check_room(content_size: int, table_size: int, size: int) -> None:
    """Raises PeError where so many bytes more in the table of signatures are more than `parse` takes."""
    _require(table_size + size <= CERTIFICATES_MAX_BYTES, "its signatures leave no room for another one")
    _require(content_size + table_size + size <= IMAGE_MAX_BYTES, "it has no room for a signature below 4 GiB")


def digest(read_at: ReadAt, image: Image, hash_: Hash) -> bytes:
    """The Authenticode digest of an image: of all but its checksum and signatures, padded as `padding` says."""
    found = hashlib.new(hash_.hashlib_name)
    for begin, end in image.hashed():
        for chunk in chunks(read_at, begin, end):
            found.update(chunk)
    found.update(padding(image.content_size))
    return found.digest()


def padding(size: int) -> bytes:
    """The zeros that lead to the place of the next entry in the table of signatures."""
    return bytes(-size % ENTRY_ALIGNMENT)


def indirect_data(digest_: bytes, hash_: Hash) -> bytes:
    """SpcIndirectDataContent with the digest of an image: what the PKCS #7 message signs ("SpcIndirectDataContent")."""
    # SpcLink: [2] file, SpcString: [0] unicode; the text is the paper's
    link = der.explicit(2, der.encode(0x80, "<<<Obsolete>>>".encode("utf-16-be")))
    no_flags = der.encode(0x03, b"\0")
    image_data = der.sequence(no_flags, der.explicit(0, link))
    return der.sequence(
        der.sequence(der.oid(_SPC_PE_IMAGE_DATA), image_data),
        der.sequence(cms.digest_algorithm(hash_), der.octet_string(digest_)),
    )


def entry(message: bytes) -> bytes:
    """A WIN_CERTIFICATE with a PKCS #7 message: one entry in the table of signatures.

    Its length counts the padding, as signtool's does: osslsigncode before 2.9 verifies no other.
    """
    message += padding(_WIN_CERTIFICATE.size + len(message))
    return _WIN_CERTIFICATE.pack(_WIN_CERTIFICATE.size + len(message), _REVISION, _PKCS_SIGNED_DATA) + message


def messages(table: bytes) -> tuple[bytes, ...]:
    """The PKCS #7 messages in a table of signatures, in their order, without padding. Raises PeError."""
    found, at = [], 0
    while at < len(table):
        _require(len(table) - at >= _WIN_CERTIFICATE.size, "its table of signatures is cut off")
        length, revision, type_ = _WIN_CERTIFICATE.unpack_from(table, at)
        _require(_WIN_CERTIFICATE.size < length <= len(table) - at, "a signature does not fit its table")
        _require((revision, type_) == (_REVISION, _PKCS_SIGNED_DATA), "a signature is of an unknown type")
        found.append(_first_encoding(table[at + _WIN_CERTIFICATE.size : at + length]))
        at += length + len(padding(length))
    return tuple(found)


def _first_encoding(padded: bytes) -> bytes:
    try:
        *_, header, contents, trailer = asn1crypto.parser.parse(padded)
    except ValueError:
        raise PeError("a signature is no DER") from None
    return bytes(header + contents + trailer)


def directory(table_offset: int, table_size: int) -> bytes:
    """The data directory's entry for the table of signatures."""
    return struct.pack("<II", table_offset, table_size)


def checksum(read_at: ReadAt, image: Image) -> bytes:
    """The header's CheckSum as it should be: the 16-bit words of the file but this field, added with end-around
    carry, and the file's size.
    """
    total = 0
    for begin, end in ((0, image.checksum), (image.checksum + 4, image.size)):
        for chunk in chunks(read_at, begin, end):
            # 2**16 is 1 modulo 2**16 - 1: a number is congruent to the sum of its words
            total += int.from_bytes(chunk, "little") % 0xFFFF
    # end-around carry makes zero of nothing only, and MZ is something
    folded = (total - 1) % 0xFFFF + 1
    return struct.pack("<I", (folded + image.size) & 0xFFFF_FFFF)


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise PeError(fault)
