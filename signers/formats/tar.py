"""The tar formats: POSIX ustar and pax, and GNU tar's own with its long names.

Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Interchange Format"; GNU tar's manual, "Basic Tar
Format". A member is any extension headers (pax records, GNU long names), a header of 512 bytes, its content, and zeros
up to a multiple of 512; two blocks of zeros end the archive. Only headers are read here: a member's content is where
`Member` says. What two readers of tar understand differently is refused: sizes outside the header's octal field, sparse
files, names that are given twice.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from signers.formats.reading import ReadAt

BLOCK_BYTES = 512

RECORD_BYTES = 20 * BLOCK_BYTES
"""tar fills an archive up to a multiple of this size."""

PADDING_MAX_BYTES = 1024 * 1024
"""What may follow the last member, all zeros: tar fills a record, whose size its user may choose."""

EXTENSION_MAX_BYTES = 64 * 1024
"""The most that the extension headers of one kind may hold for one member; they are read in memory."""

SIZE_MAX_BYTES = 8**11 - 1
"""The largest member: eleven octal digits."""

REGULAR, HARD_LINK, SYMBOLIC_LINK, DIRECTORY = b"0", b"1", b"2", b"5"

_OTHERS = {b"3": "a character device", b"4": "a block device", b"6": "a FIFO", b"S": "a sparse file"}
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_EXTENSIONS = frozenset((_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL))

_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_RECORD = re.compile(rb"([1-9][0-9]{0,5}) ([^=]+)=", re.DOTALL)


class TarError(ValueError):
    """The bytes are no such archive, or exceed a limit; `offset` is the member's, in bytes."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(f"{message} (at byte {offset})")
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Member:
    """One member of an archive. Offsets and sizes are in bytes.

    `kind` is REGULAR, HARD_LINK, SYMBOLIC_LINK or DIRECTORY; `name` and `link` are spelt as in the archive. The headers
    stand from `offset` to `data_offset`.
    """

    name: bytes
    kind: bytes
    link: bytes
    size: int
    offset: int
    data_offset: int

    @property
    def end(self) -> int:
        """Where the next member begins."""
        return self.data_offset + self.size + padding(self.size)


def is_tar(head: bytes) -> bool:
    """Whether an archive begins with these bytes, of which BLOCK_BYTES are enough."""
    return head[257:262] == b"ustar"


def padding(size: int) -> int:
    """How many zeros follow that many bytes."""
    return -size % BLOCK_BYTES


def members(read_at: ReadAt, size: int) -> Iterator[Member]:
    """Walks over the members of an archive of `size` bytes.

    Raises TarError where it is not sound: the walk ends after the last member or with this error.
    """
    offset = 0
    while (block := _block(read_at, offset)) != bytes(BLOCK_BYTES):
        member = _member(read_at, size, offset, block)
        yield member
        offset = member.end
    if size - offset > PADDING_MAX_BYTES or any(read_at(offset, PADDING_MAX_BYTES)):
        raise TarError("something other than padding follows its end", offset)


def stream(chunks: Iterator[bytes]) -> Iterator[tuple[Member, Iterator[memoryview]]]:
    """The members of an archive that can be read but once, each with the pieces of its content.

    What is left of a content when the next member is asked for is passed over. Raises TarError, also while a content is
    read, where the archive is not sound.
    """
    source = _Source(chunks)
    offset = 0
    while (block := _block(source.read_at, offset)) != bytes(BLOCK_BYTES):
        member = _member(source.read_at, sys.maxsize, offset, block)
        yield member, _content(source, member)
        offset = member.end
    if any(rest := source.read_at(offset + BLOCK_BYTES, PADDING_MAX_BYTES)) or len(rest) == PADDING_MAX_BYTES:
        raise TarError("something other than padding follows its end", offset)


class _Source:
    """Bytes that come in chunks, read forwards only."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._held = memoryview(b"")
        self._offset = 0

    def read_at(self, offset: int, length: int) -> bytes:
        """See `ReadAt`; what stands before `offset` is passed over."""
        for _ in self.pieces(offset - self._offset):
            pass
        return b"".join(self.pieces(length))

    def pieces(self, length: int) -> Iterator[memoryview]:
        """The next `length` bytes, fewer only at the end."""
        while length > 0:
            if not self._held:
                self._held = memoryview(next(self._chunks, b""))
            if not self._held:
                return
            piece, self._held = self._held[:length], self._held[length:]
            self._offset += len(piece)
            length -= len(piece)
            yield piece


def _content(source: _Source, member: Member) -> Iterator[memoryview]:
    left = member.size
    for piece in source.pieces(left):
        left -= len(piece)
        yield piece
    if left:
        raise TarError(f"it is cut off in a member of {member.size} bytes", member.offset)


def _block(read_at: ReadAt, offset: int) -> bytes:
    block = read_at(offset, BLOCK_BYTES)
    if len(block) < BLOCK_BYTES:
        raise TarError("it is cut off: a header was expected", offset)
    return block


def _member(read_at: ReadAt, size: int, offset: int, block: bytes) -> Member:
    at, extensions = offset, {}
    while (kind := _checked(block, at)) in _EXTENSIONS:
        if kind in extensions:
            raise TarError("a member has two extension headers of the same type", at)
        length = _octal(block[124:136], at)
        if length > EXTENSION_MAX_BYTES:
            raise TarError(f"an extension header has {length} bytes; {EXTENSION_MAX_BYTES} are allowed", at)
        content = read_at(at + BLOCK_BYTES, length)
        if len(content) < length:
            raise TarError("it is cut off in an extension header", at)
        extensions[kind] = content
        at += BLOCK_BYTES + length + padding(length)
        block = _block(read_at, at)
    name, link = _names(block, extensions, offset)
    kind = _kind(kind, name, offset)
    length = _octal(block[124:136], offset)
    if length and kind != REGULAR:
        raise TarError("a link or directory has content", offset)
    if at + BLOCK_BYTES + length > size:
        raise TarError(f"it is cut off in a member of {length} bytes", offset)
    return Member(name, kind, link if kind in (HARD_LINK, SYMBOLIC_LINK) else b"", length, offset, at + BLOCK_BYTES)


def _checked(block: bytes, offset: int) -> bytes:
    """The type of a header whose checksum is right: the sum of its bytes, with spaces for the checksum itself."""
    if not is_tar(block) or sum(block) - sum(block[148:156]) + 8 * 0x20 != _octal(block[148:156], offset):
        raise TarError("there is no header of a tar archive", offset)
    return block[156:157]


def _kind(typeflag: bytes, name: bytes, offset: int) -> bytes:
    if typeflag in (b"\0", b"0", b"7"):  # as before POSIX; contiguous files are regular ones
        return DIRECTORY if name.endswith(b"/") else REGULAR
    if typeflag not in (HARD_LINK, SYMBOLIC_LINK, DIRECTORY):
        what = _OTHERS.get(typeflag, f"a member of the unknown type {typeflag!r}")
        raise TarError(f"it holds {what}; files, directories and links are allowed", offset)
    return typeflag


def _names(block: bytes, extensions: dict[bytes, bytes], offset: int) -> tuple[bytes, bytes]:
    """The name of a member, and what it links to."""
    records = _records(extensions.get(_PAX, b""), offset)
    shared = _records(extensions.get(_PAX_GLOBAL, b""), offset)
    if any(key == b"size" or key.startswith(b"GNU.sparse.") for key in (*records, *shared)):
        raise TarError(f"it holds a sparse file, or one of more than {SIZE_MAX_BYTES} bytes", offset)
    if shared.keys() & {b"path", b"linkpath"}:
        raise TarError("a global header gives all members the same name", offset)
    # the rest of a GNU header holds times where the prefix would be
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else b""
    name, link = _text(block[:100]), _text(block[157:257])
    return (
        _given(records.get(b"path"), extensions.get(_LONG_NAME), offset) or (prefix + b"/" + name if prefix else name),
        _given(records.get(b"linkpath"), extensions.get(_LONG_LINK), offset) or link,
    )


def _given(record: bytes | None, long: bytes | None, offset: int) -> bytes | None:
    """A name out of the extension headers."""
    if record is not None and long is not None:
        raise TarError("a name is given both by a pax record and by a GNU header", offset)
    return record if long is None else _text(long)


def _records(content: bytes, offset: int) -> dict[bytes, bytes]:
    """The records of a pax header: length, space, keyword, `=`, value, newline."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(content):
        found = _RECORD.match(content, at)
        end = at + int(found[1]) if found else 0
        if not found or not found.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise TarError("a pax header is broken", offset)
        if found[2] in records:
            raise TarError("a pax header has the same record twice", offset)
        records[found[2]] = content[found.end() : end - 1]
        at = end
    return records


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _octal(field: bytes, offset: int) -> int:
    # int() alone would take signs and underscores; a first bit that is set means a binary number to GNU tar
    found = _OCTAL.fullmatch(field)
    if not found:
        raise TarError("a number in a header is not octal", offset)
    return int(found[1] or b"0", 8)


def header(name: bytes, size: int, *, mode: int = 0o644, mtime: int = 0) -> bytes:
    """The headers of a new regular file of root's; a name of more than 100 bytes goes into a pax record."""
    return _long_name(name) + _header(name[:100], REGULAR, size, mode, mtime)


def _long_name(name: bytes) -> bytes:
    """The pax header of a name that has no place in a member's own."""
    if len(name) <= 100:
        return b""
    record = _record(b"path", name)
    return _header(b"././@PaxHeader", _PAX, len(record), 0o644, 0) + record + bytes(padding(len(record)))


def _record(keyword: bytes, value: bytes) -> bytes:
    rest = b" " + keyword + b"=" + value + b"\n"
    length = len(rest)
    while length != len(rest) + len(str(length)):  # its own digits count
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


def _header(name: bytes, kind: bytes, size: int, mode: int, mtime: int) -> bytes:
    numbers = b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode, 0, 0, size, mtime)
    fields = name.ljust(100, b"\0") + numbers + bytes(8) + kind + bytes(100) + b"ustar\x0000"
    return resized(fields.ljust(BLOCK_BYTES, b"\0"), size)


def resized(headers: bytes, size: int) -> bytes:
    """The headers of a member, for a content of another size.

    Raises ValueError where it is more than SIZE_MAX_BYTES.
    """
    if size > SIZE_MAX_BYTES:
        raise ValueError(f"a member of {size} bytes; {SIZE_MAX_BYTES} are possible")
    extensions, block = headers[:-BLOCK_BYTES], bytearray(headers[-BLOCK_BYTES:])
    block[124:136] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return extensions + bytes(block)


def renamed(headers: bytes, name: bytes, size: int) -> bytes:
    """The headers of a member, for another name and a content of another size.

    Owner, mode and time stay; what extension headers say (extended attributes, fractions of seconds) does not.

    Raises ValueError where the size is more than SIZE_MAX_BYTES.
    """
    block = bytearray(headers[-BLOCK_BYTES:])
    block[:100] = name[:100].ljust(100, b"\0")
    if block[257:263] == b"ustar\0":
        block[345:500] = bytes(155)  # the prefix of the old name
    return _long_name(name) + resized(bytes(block), size)


def trailer(size: int) -> bytes:
    """The end of an archive whose members have `size` bytes: two blocks of zeros, and more up to a whole record."""
    return bytes(2 * BLOCK_BYTES + -(size + 2 * BLOCK_BYTES) % RECORD_BYTES)
