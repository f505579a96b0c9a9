"""The "new ASCII" cpio formats: newc (070701) and crc (070702), as SWUpdate and the kernel's initramfs use them.

Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. A member is a header of 110
characters, its name with a NUL, zeros up to a multiple of 4, its content, and zeros up to a multiple of 4; the
member TRAILER!!! ends the archive. Only headers and names are read here; a member's content is where `Member` says.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from signers.formats.reading import ReadAt

NEWC = b"070701"
CRC = b"070702"
TRAILER = b"TRAILER!!!"

HEADER_BYTES = 110
BLOCK_BYTES = 512
"""cpio writes archives in whole blocks of this size."""

NAME_MAX_BYTES = 255
"""With its NUL: SWUpdate reads names into 256 bytes (MAX_IMAGE_FNAME)."""

MEMBERS_MAX = 4096
"""A bound for hostile archives; real ones have a dozen members."""


class CpioError(ValueError):
    """The bytes are no such archive, or exceed a limit; `offset` is the member's, in bytes."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(f"{message} (at byte {offset})")
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Member:
    """One member of an archive. Offsets and sizes are in bytes.

    `magic` is NEWC or CRC. `checksum` is the sum of the content's bytes modulo 2^32 in a crc archive, and means
    nothing in a newc one.
    """

    magic: bytes
    name: bytes
    mode: int
    mtime: int
    size: int
    checksum: int
    offset: int
    data_offset: int

    @property
    def end(self) -> int:
        """Where the next member begins."""
        return _aligned(self.data_offset + self.size)


def members(read_at: ReadAt, size: int) -> Iterator[Member]:
    """Walks over an archive of `size` bytes, the trailer included and last.

    Raises CpioError where it is not sound: the walk ends with the trailer or with this error.
    """
    offset = 0
    for _ in range(MEMBERS_MAX):
        member = _member(read_at, size, offset)
        yield member
        if member.name == TRAILER:
            return
        offset = member.end
    raise CpioError(f"the archive has more than {MEMBERS_MAX} members", offset)


def _member(read_at: ReadAt, size: int, offset: int) -> Member:
    header = read_at(offset, HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        raise CpioError("the archive is cut off: a header was expected", offset)
    magic = NEWC if header.startswith(NEWC) else CRC if header.startswith(CRC) else None
    if magic is None:
        raise CpioError("there is no header of a cpio archive in the newc or crc format", offset)
    fields = [_hex(header[at : at + 8], offset) for at in range(6, HEADER_BYTES, 8)]
    _, mode, _, _, _, mtime, length, _, _, _, _, namesize, check = fields
    if not 2 <= namesize <= NAME_MAX_BYTES:
        raise CpioError(f"a name has {namesize} bytes; 2 to {NAME_MAX_BYTES} are allowed", offset)
    name = read_at(offset + HEADER_BYTES, namesize)
    if len(name) < namesize:
        raise CpioError("the archive is cut off in a name", offset)
    if name.find(b"\0") != namesize - 1:
        raise CpioError("a name does not end with its only NUL", offset)
    data_offset = _aligned(offset + HEADER_BYTES + namesize)
    if length and data_offset + length > size:
        raise CpioError(f"the archive is cut off in a member of {length} bytes", offset)
    if length and name[:-1] == TRAILER:
        raise CpioError("the trailer has content", offset)
    return Member(magic, name[:-1], mode, mtime, length, check, offset, data_offset)


def _hex(field: bytes, offset: int) -> int:
    # int() alone would take signs, spaces and underscores
    if not all(digit in b"0123456789abcdefABCDEF" for digit in field):
        raise CpioError("a field of a header is not hexadecimal", offset)
    return int(field, 16)


def _aligned(offset: int) -> int:
    return (offset + 3) & ~3


def encode(magic: bytes, name: bytes, content: bytes, *, mode: int = 0o100644, mtime: int = 0) -> bytes:
    """A member with its padding, to stand at a multiple of 4; owned by root, one link, inode and devices 0."""
    total = checksum(content) if magic == CRC else 0
    fields = (0, mode, 0, 0, 1, mtime, len(content), 0, 0, 0, 0, len(name) + 1, total)
    header = magic + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name + b"\0") + _padded(content)


def trailer(magic: bytes, offset: int) -> bytes:
    """The end of an archive whose members end at `offset`: the trailer, and zeros up to a whole block."""
    end = encode(magic, TRAILER, b"", mode=0)
    return end + bytes(-(offset + len(end)) % BLOCK_BYTES)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def checksum(data: bytes, start: int = 0) -> int:
    """The sum of all bytes modulo 2^32: the checksum of a crc archive. `start`: the sum of the bytes before.

    adler32's low half is the sum modulo 65521, exact for 256 bytes: a third of the time of sum(), 0.6 s for 1 GiB.
    """
    view = memoryview(data)
    return (start + sum(zlib.adler32(view[at : at + 256], 0) & 0xFFFF for at in range(0, len(view), 256))) & 0xFFFFFFFF
