"""Archives of a job, in and out: tar, plain or compressed by gzip, xz or zstd.

    scratch = Scratch(job.directory(), limits)
    packed = compression_of(upload.read(0, HEAD_BYTES))
    archive = read(scratch.unpack(upload, packed) if packed else upload, limits)
    signed = archive.replaced({b"./lib/a.ko": (archive.content(member), signature)}, "signed.tar")

An archive is hostile until it is read: its members are checked by rules of our own, not by those of `tarfile`. Nothing
is extracted. What is compressed is unpacked into files of the job's directory under names of our own, bounded in sum;
every other byte stays in the upload. So memory is bounded by the number of members, and not by their sizes.
"""

import hashlib
import itertools
import lzma
import sys
import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field

from signers.formats import tar
from signers.formats.reading import ReadAt
from signers.signer import FileRange, Signed, Upload, read_through, size_of, unsound
from tokens.errors import ArtifactRejected

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CHUNK_BYTES = 1024 * 1024
"""How much of a file is in memory while it is read, packed or unpacked."""

PACKED_CHUNK_BYTES = 64 * 1024
"""How much of a compressed file is read at a time: each stream in it copies what is left of that."""

STREAMS_MAX = 65_536
"""How many compressed streams may follow each other in one file."""

HEAD_BYTES = tar.BLOCK_BYTES
"""How many of its first bytes tell what a file is."""

NAME_MAX_BYTES = 1024
"""The longest name of a member, and of what it links to."""

SMALL_BYTES = 16 * 1024 * 1024
"""So much may come of any compressed file, however small it is itself."""

XZ_MEMORY_BYTES = 128 * 1024 * 1024
"""What unpacking xz may take: `xz -9` needs half of it."""

ZSTD_WINDOW_LOG_MAX = 27
"""Unpacking zstd takes 2 to this power bytes at most, which `zstd --ultra -22` needs."""

Part = bytes | FileRange
Positive = Annotated[int, Field(gt=0)]


class ArchiveLimits(BaseModel):
    """What an archive may hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    members_max: Positive = 32_768
    """The most files, directories and links in an archive."""
    unpacked_max_bytes: Positive = 8 * 1024**3
    """The most that all compressed files of a request may hold together."""
    ratio_max: Positive = 100
    """How many times its own size a compressed file may hold."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _Gunzip:
    """zlib's decompressor, which leaves it to its caller to keep what it did not yet take."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)  # 31: with gzip's header and checksum

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


@dataclass(frozen=True, slots=True)
class Compression:
    """A compressed format.

    Arguments:
        name: what a message calls it.
        magic: how its files begin.
        unpacking, packing: make what does it; the latter takes the size of the content.
    """

    name: str
    magic: bytes
    unpacking: Callable[[], _Decompressor]
    packing: Callable[[int], _Compressor]


def _unxz() -> _Decompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_BYTES)


def _xz(_size: int) -> _Compressor:
    # the kernel can check a CRC-32 and no more (Documentation/staging/xz.rst), and has little memory for a dictionary
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1024 * 1024}]
    return lzma.LZMACompressor(check=lzma.CHECK_CRC32, filters=filters)


def _unzstd() -> _Decompressor:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG_MAX})


def _zstd(size: int) -> _Compressor:
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.checksum_flag: True})
    compressor.set_pledged_input_size(size)
    return compressor


# as `gzip -n` writes it: no name, no time
GZIP = Compression("gzip", b"\x1f\x8b", _Gunzip, lambda _size: zlib.compressobj(wbits=31))
XZ = Compression("xz", b"\xfd7zXZ\0", _unxz, _xz)
ZSTD = Compression("zstd", b"\x28\xb5\x2f\xfd", _unzstd, _zstd)

COMPRESSIONS = (GZIP, XZ, ZSTD)


def compression_of(head: bytes) -> Compression | None:
    """How a file is compressed that begins with these bytes; None where it is not, or in no way that is known."""
    return next((each for each in COMPRESSIONS if head.startswith(each.magic)), None)


def packed(chunks: Iterable[bytes], size: int, compression: Compression) -> Iterator[bytes]:
    """The chunks, `size` bytes in all, compressed; the same ones give the same bytes."""
    compressor = compression.packing(size)
    for chunk in chunks:
        yield compressor.compress(chunk)
    yield compressor.flush()


def unpacked(chunks: Iterator[bytes], compression: Compression) -> Iterator[bytes]:
    """What is compressed in the chunks, CHUNK_BYTES at most at a time.

    Raises ArtifactRejected where that is broken.
    """
    try:
        yield from _streams(chunks, compression)
    except (zlib.error, lzma.LZMAError, zstd.ZstdError, EOFError, MemoryError):
        # never with a word of the libraries: what they say is not for users
        raise ArtifactRejected(
            f"What is compressed by {compression.name} is broken or cut off, or needs too much memory.",
            f"Compress it with {compression.name}'s usual options, and send all of it.",
        ) from None


def _streams(chunks: Iterator[bytes], compression: Compression) -> Iterator[bytes]:
    data = next(chunks, b"")
    for _ in range(STREAMS_MAX):
        stream = compression.unpacking()
        while not stream.eof:
            content = stream.decompress(data, CHUNK_BYTES)
            data = b""
            if content:
                yield content
            elif not stream.eof:  # it has taken all and wants more
                data = next(chunks, b"")
                if not data:
                    raise EOFError
        data = stream.unused_data or next(chunks, b"")
        if not data:
            return
    raise EOFError


class Scratch:
    """Files of a job's directory for what is unpacked and packed. Threads may use it at the same time.

    Arguments:
        directory: the job's own.
        limits: what may be unpacked, in all.
    """

    def __init__(self, directory: Path, limits: ArchiveLimits) -> None:
        self.limits = limits
        self._directory = directory
        self._numbers = itertools.count()
        self._unpacked_bytes = 0
        self._lock = threading.Lock()

    def unpack(self, content: FileRange, compression: Compression) -> Upload:
        """What is compressed there, in a file. Raises ArtifactRejected where it is broken or too large."""
        largest = max(SMALL_BYTES, self.limits.ratio_max * content.length)
        chunks = unpacked(read_through((content,), PACKED_CHUNK_BYTES), compression)
        return self.write(self._bounded(chunks, largest))

    def plain(self, upload: Upload) -> tuple[Upload, Compression | None]:
        """What was uploaded, unpacked where it is compressed, and how it was. Raises as `unpack` does."""
        compression = compression_of(upload.read(0, HEAD_BYTES))
        return (upload, None) if compression is None else (self.unpack(upload.whole, compression), compression)

    def pack(self, content: Signed, compression: Compression) -> Upload:
        """The content, compressed, in a file."""
        return self.write(packed(content.chunks(CHUNK_BYTES), content.size, compression))

    def compressed(self, signed: Signed, compression: Compression) -> Signed:
        """The answer, compressed. Raises SignatureMismatch where it does not unpack to the same."""
        upload = self.pack(signed, compression)
        if not holds(upload, compression, signed):
            raise unsound("it does not unpack to what was packed")
        return Signed((upload.whole,), signed.filename)

    def write(self, chunks: Iterable[bytes]) -> Upload:
        """The chunks, in a file."""
        path = self._directory / f"{next(self._numbers)}"
        with path.open("xb") as file:
            size = sum(file.write(chunk) for chunk in chunks)
        return Upload(path, path.name, size)

    def remove(self, upload: Upload) -> None:
        """Removes a file that it made, where it is needed no more before the job's end."""
        (self._directory / upload.filename).unlink()

    def _bounded(self, chunks: Iterator[bytes], largest: int) -> Iterator[bytes]:
        size = 0
        for chunk in chunks:
            size += len(chunk)
            if size > largest:
                raise ArtifactRejected(
                    f"A compressed file holds more than {self.limits.ratio_max} times its own size.",
                    "Check what it is; send it without that compression if it is right.",
                )
            with self._lock:
                self._unpacked_bytes += len(chunk)
                if self._unpacked_bytes > self.limits.unpacked_max_bytes:
                    raise ArtifactRejected(
                        f"Unpacked, the artifact has more than {self.limits.unpacked_max_bytes} bytes.",
                        "Send less at a time.",
                    )
            yield chunk


def holds(packed: Upload, compression: Compression, content: Signed) -> bool:
    """Whether a compressed file holds this content; it is unpacked, and not to a file."""
    chunks = unpacked(read_through((packed.whole,), PACKED_CHUNK_BYTES), compression)
    return _sha256(chunks) == _sha256(content.chunks(CHUNK_BYTES))


def _sha256(chunks: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.digest()


class Pieces:
    """The parts of an answer, to be read at any place."""

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(size_of(part) for part in parts))

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._ends[-1] if self._ends else 0

    def cut(self, offset: int, length: int) -> tuple[Part, ...]:
        """The parts of `length` bytes from `offset` on, or of fewer at the end."""
        found = []
        number = bisect_right(self._ends, offset)
        while length > 0 and number < len(self._parts):
            part, end = self._parts[number], self._ends[number]
            size = min(length, end - offset)
            found.append(_slice(part, offset - (end - size_of(part)), size))
            offset, length, number = end, length - size, number + 1
        return tuple(found)

    def read_at(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on, fewer only at the end."""
        return b"".join(read_through(self.cut(offset, length), CHUNK_BYTES))


def _slice(part: Part, start: int, length: int) -> Part:
    if isinstance(part, bytes):
        return part[start : start + length]
    return FileRange(part.file, part.offset + start, length)


@dataclass(frozen=True, slots=True)
class Archive:
    """A tar archive whose members have been checked."""

    upload: Upload
    members: tuple[tar.Member, ...]

    def content(self, member: tar.Member) -> FileRange:
        """Where a member's content is."""
        return FileRange(self.upload, member.data_offset, member.size)

    def replaced(
        self,
        contents: Mapping[bytes, tuple[Part, ...]],
        filename: str,
        *,
        names: Mapping[bytes, bytes] = MappingProxyType({}),
        without: Container[bytes] = (),
    ) -> Signed:
        """The archive with other contents for the members of these names, of which some get other `names`.

        All else (order, names, owners, modes, times, extended attributes) stays as it is, byte for byte; what is to be
        `without` is left out.
        """
        parts: list[Part] = []
        kept = 0
        for member in self.members:
            content = contents.get(member.name)
            if content is None and member.name not in without:
                continue
            if member.offset > kept:
                parts.append(FileRange(self.upload, kept, member.offset - kept))
            kept = member.end
            if content is not None:
                size = sum(map(size_of, content))
                headers = self.upload.read(member.offset, member.data_offset - member.offset)
                name = names.get(member.name)
                headers = tar.resized(headers, size) if name is None else tar.renamed(headers, name, size)
                parts += (headers, *content, bytes(tar.padding(size)))
        end = self.members[-1].end if self.members else 0
        parts.append(FileRange(self.upload, kept, end - kept))
        parts.append(tar.trailer(sum(map(size_of, parts))))
        return Signed(tuple(parts), filename)


def read(upload: Upload, limits: ArchiveLimits) -> Archive:
    """The members of a tar archive, checked by the rules of `members`. Raises ArtifactRejected."""
    with upload.open() as file:

        def read_at(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        return Archive(upload, members(read_at, upload.size, limits))


def members(read_at: ReadAt, size: int, limits: ArchiveLimits) -> tuple[tar.Member, ...]:
    """The members of a tar archive of `size` bytes: files, directories and links within its own tree.

    No name is absolute or has `..` in it, none but a directory's is there twice, and nothing is below anything but a
    directory. So wherever a client unpacks the archive, all of it ends below that place.

    Raises ArtifactRejected.
    """
    tree = _Tree(limits)
    found: list[tar.Member] = []
    try:
        for member in tar.members(read_at, size):
            tree.add(member)
            found.append(member)
            if len(found) > limits.members_max:
                raise rejected(f"it has more than {limits.members_max} members")
    except tar.TarError as error:
        raise rejected(f"{error}") from None
    return tuple(found)


class _Tree:
    """What the members so far would make on disk."""

    def __init__(self, limits: ArchiveLimits) -> None:
        self._members_max = limits.members_max
        self._directories = {b""}
        self._others: dict[bytes, bytes] = {}

    def add(self, member: tar.Member) -> None:
        """Raises ArtifactRejected where the member breaks a rule."""
        path = _path(member.name, "name")
        if member.kind == tar.DIRECTORY:
            self._add_directories(path, member)
            return
        if not path or member.name.endswith(b"/"):
            raise rejected(f"{shown(member.name)} is no name for a file or link")
        self._add_directories(_parent(path), member)
        if path in self._others or path in self._directories:
            raise rejected(f"{shown(member.name)} is there twice")
        if member.kind == tar.SYMBOLIC_LINK:
            _check_symbolic_link(member, path.count(b"/"))
        elif member.kind == tar.HARD_LINK and self._others.get(_path(member.link, "link")) != tar.REGULAR:
            raise rejected(f"the hard link {shown(member.name)} leads to no file that stands before it")
        self._others[path] = member.kind
        self._check_count()

    def _add_directories(self, path: bytes, member: tar.Member) -> None:
        while path not in self._directories:
            if path in self._others:
                raise rejected(f"{shown(member.name)} is below, or in place of, something that is no directory")
            self._directories.add(path)
            self._check_count()
            path = _parent(path)

    def _check_count(self) -> None:
        if len(self._directories) + len(self._others) > self._members_max:
            raise rejected(f"it has more than {self._members_max} files, directories and links")


def _parent(path: bytes) -> bytes:
    return path.rpartition(b"/")[0]


def _path(name: bytes, what: str) -> bytes:
    """A name without what says nothing in it: `a/b` for `./a//b/`."""
    if len(name) > NAME_MAX_BYTES:
        raise rejected(f"a {what} has {len(name)} bytes; {NAME_MAX_BYTES} are allowed")
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if not name or name.startswith(b"/") or b".." in parts or b"\0" in name:
        raise rejected(f"the {what} {shown(name)} leads out of it, or nowhere")
    return b"/".join(parts)


def _check_symbolic_link(member: tar.Member, depth: int) -> None:
    # `..` only in front: behind a name it would start from wherever that leads, which may be a link too
    target = member.link
    up = 0
    while target == b".." or target.startswith(b"../"):
        up, target = up + 1, target[3:].lstrip(b"/")
    if up > depth or member.link.startswith(b"/") or not member.link:
        raise rejected(f"the link {shown(member.name)} leads out of it")
    if target:
        _path(target, "link")


def rejected(fault: str) -> ArtifactRejected:
    """The error for an archive that has this fault."""
    return ArtifactRejected(
        f"The archive cannot be used: {fault}.",
        "Make it with GNU tar from files, directories and links within its own tree.",
    )


def shown(name: bytes) -> str:
    """A name from an archive, fit for a message."""
    return repr(name[:100].decode(errors="replace"))
