"""Rockchip's USB loader: what a host sends to the boot ROM in MaskROM mode, and writes to flash then.

    header   102 bytes: "LDR ", the SoC, and where the lists of entries for 471, 472 and the loader are
    entries  57 bytes each: a name in UTF-16, and where its data is
    data     of each entry; of the loader's and, unless the header says otherwise, of the others it is scrambled
    CRC      32 bits, of all before it

The entries UsbHead and FlashHead of the loader are headers of idblocks (see `signers.formats.idblock`); the images are
other entries. Numbers are little-endian.

Source: tools/rockchip/boot_merger.c and boot_merger.h of Rockchip's U-Boot; rk-format.h of rk3588-tools at 1f0e1e10.
"""

import hashlib
import itertools
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cryptography.hazmat.decrepit.ciphers.algorithms import ARC4
from cryptography.hazmat.primitives.ciphers import Cipher

from signers.formats.idblock import HEADER_BYTES, SECTOR_BYTES, Image

LOADER_MAX_BYTES = 16 * 1024 * 1024
"""The largest file that is read; those that Rockchip ships have less than 1 MiB."""

PADDING_BYTES = 2048
"""An image is padded to a multiple of this size, in the file or when it is hashed."""

HEADS = ("UsbHead", "FlashHead")
"""The entries that are headers of idblocks."""

_MAGIC = b"LDR "
_OLDER_MAGIC = b"BOOT"
# magic, size, versions, time, SoC; number, offset and size of entries for each list; signed or not, plain or not
_HEADER = struct.Struct("<4sH4x4x7sI BIB BIB BIB BB57x")
_ENTRY = struct.Struct("<BI40sII4x")  # size, list, name, offset and size of the data
_CRC_BYTES = 4

_POLYNOMIAL = 0x04C10DB7  # not the usual one: that is 0x04C11DB7
_SCRAMBLING_KEY = bytes.fromhex("7c4e0304550509072d2c7b38170d1711")


class LoaderError(ValueError):
    """The bytes are no such file, or one that is signed in another way."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry: its name, and where in the file its data is."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Loader:
    """A loader.

    Arguments:
        soc: which SoC it is for, as 3588.
        heads: the entries of HEADS that it has.
        others: its other entries, which hold the images.
    """

    data: bytes
    soc: str
    heads: tuple[Entry, ...]
    others: tuple[Entry, ...]

    def head(self, entry: Entry) -> bytes:
        """An idblock's header, whether it is scrambled in the file or not."""
        data = self._of(entry)[:HEADER_BYTES]
        return data if data.startswith(b"RK") else scrambled(data)

    def has(self, image: Image) -> bool:
        """Whether the data of an entry is this image."""
        return any(
            hashlib.sha256(data[: image.size].ljust(image.size, b"\0")).digest() == image.digest
            for entry in self.others
            if image.size - entry.size < PADDING_BYTES
            for data in _readings(self._of(entry))
        )

    def with_heads(self, heads: Mapping[Entry, bytes]) -> bytes:
        """The file with these headers of idblocks in place of those that it has."""
        data = bytearray(self.data[:-_CRC_BYTES])
        for entry, head in heads.items():
            plain = self._of(entry).startswith(b"RK")
            data[entry.offset : entry.offset + HEADER_BYTES] = head if plain else scrambled(head)
        return bytes(data) + crc(data).to_bytes(_CRC_BYTES, "little")

    def _of(self, entry: Entry) -> bytes:
        return self.data[entry.offset : entry.offset + entry.size]


def parse(data: bytes) -> Loader:
    """Raises LoaderError."""
    if data.startswith(_OLDER_MAGIC):
        raise LoaderError("it is of the older format BOOT, which RK356x and RK3588 do not use")
    if not data.startswith(_MAGIC) or len(data) < _HEADER.size + _CRC_BYTES:
        raise LoaderError("it does not begin with a header LDR")
    _, size, _, soc, *lists, _, _ = _HEADER.unpack_from(data)
    if size != _HEADER.size:
        raise LoaderError(f"its header has {size} bytes; {_HEADER.size} are expected")
    end = len(data) - _CRC_BYTES
    if crc(data[:end]) != int.from_bytes(data[end:], "little"):
        raise LoaderError("its CRC is wrong: it is damaged or cut off")
    tables = [_Table(*lists[at : at + 3]) for at in range(0, len(lists), 3)]
    entries = [entry for table in tables for entry in table.entries(data[:end])]
    _check_places(entries, max(table.end for table in tables))
    heads = tuple(entry for entry in entries if entry.name in HEADS)
    name = soc.to_bytes(4, "big").decode("ascii", "replace")
    if len({entry.name for entry in heads}) != len(heads) or any(entry.size < HEADER_BYTES for entry in heads):
        raise LoaderError("a header of an idblock is there twice, or too short")
    if not heads:
        raise LoaderError(f"it is of the older format for {name!r}: it has neither UsbHead nor FlashHead")
    return Loader(data, name, heads, tuple(entry for entry in entries if entry.name not in HEADS))


@dataclass(frozen=True, slots=True)
class _Table:
    """A list of entries, as the header has it."""

    count: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.offset + self.count * self.size if self.count else _HEADER.size

    def entries(self, data: bytes) -> Iterator[Entry]:
        """What stands in it. Raises LoaderError."""
        if self.count and (self.size != _ENTRY.size or self.end > len(data)):
            raise LoaderError("a list of its entries is cut off, or of another form")
        for at in range(self.offset, self.end, _ENTRY.size) if self.count else ():
            size, _, name, offset, length = _ENTRY.unpack_from(data, at)
            if size != _ENTRY.size or offset + length > len(data):
                raise LoaderError("an entry of it is of another form, or its data is cut off")
            yield Entry(name.decode("utf-16-le", "replace").partition("\0")[0], offset, length)


def _check_places(entries: list[Entry], start: int) -> None:
    """What is signed must not be another entry's data, or a list of entries, as well."""
    ordered = sorted(entries, key=lambda entry: entry.offset)
    if ordered and ordered[0].offset < start:
        raise LoaderError("the data of an entry stands among the entries")
    if any(entry.offset + entry.size > following.offset for entry, following in itertools.pairwise(ordered)):
        raise LoaderError("two of its entries have the same data")


def _readings(data: bytes) -> Iterator[bytes]:
    """What an entry's data may mean: as it is, or scrambled sector by sector, or (471 and 472) all of it in one go."""
    yield data
    yield scrambled(data)
    yield Cipher(ARC4(_SCRAMBLING_KEY), None).encryptor().update(data)


def scrambled(data: bytes) -> bytes:
    """The data with each sector scrambled, or back: RC4 by a key that everybody knows."""
    stream = Cipher(ARC4(_SCRAMBLING_KEY), None).encryptor().update(bytes(SECTOR_BYTES))
    whole = stream * (len(data) // SECTOR_BYTES + 1)
    number = int.from_bytes(data, "big") ^ int.from_bytes(whole[: len(data)], "big")
    return number.to_bytes(len(data), "big")


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = value << 1 ^ (_POLYNOMIAL if value & 0x8000_0000 else 0)
        table.append(value & 0xFFFF_FFFF)
    return tuple(table)


_CRC_TABLE = _crc_table()


def crc(data: bytes | bytearray) -> int:
    """CRC-32 of a polynomial of Rockchip's own, the most significant bit first, from 0 on."""
    value = 0
    for byte in data:
        value = value << 8 & 0xFFFF_FFFF ^ _CRC_TABLE[value >> 24 ^ byte]
    return value
