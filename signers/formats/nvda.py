"""The headers that a Jetson's boot ROM and boot loaders read in front of an image, by their magic `NVDA`.

Source: ../shared/tegra.md, section 1.4. Of tegra234 the places of all that is verified are known. Of tegra194 only what
the signature covers is: there it can be said whether given bytes stand in the header, and not where.
"""

import hashlib
import struct
from dataclasses import dataclass

MAGIC = b"NVDA"

T234_HEADER_BYTES = 8192
T194_HEADER_BYTES = 4096

_T234_DIGEST = slice(4, 68)  # SHA-512 of what follows it
_T234_SIGNATURE, _T234_PUBLIC_KEY = 144, 2976
_T234_SIGNED = slice(4032, T234_HEADER_BYTES)
_T234_PAYLOAD_LENGTH = 5124
_T234_PAYLOAD_DIGEST = slice(5216, 5280)
_T194_SIGNED = slice(T194_HEADER_BYTES - 1136, T194_HEADER_BYTES)


class HeaderError(ValueError):
    """The bytes are no such header."""


@dataclass(frozen=True, slots=True)
class T234Header:
    """The header of an image for tegra234.

    Arguments:
        signed: what the signature covers, by SHA-512.
        payload_bytes: how long the image behind it is.
        payload_sha512: its digest.
    """

    signed: bytes
    payload_bytes: int
    payload_sha512: bytes
    _data: bytes

    def signature(self, size: int) -> bytes:
        """The signature's `size` bytes, as they are stored."""
        return self._data[_T234_SIGNATURE:_T234_PUBLIC_KEY][:size]


def is_t234(data: bytes) -> bool:
    """Whether a whole header is at the beginning: its own digest says so."""
    header = data[:T234_HEADER_BYTES]
    return (
        len(header) == T234_HEADER_BYTES
        and header.startswith(MAGIC)
        and hashlib.sha512(header[_T234_DIGEST.stop :]).digest() == header[_T234_DIGEST]
    )


def parse_t234(data: bytes) -> T234Header:
    """The header at the beginning of an image. Raises HeaderError."""
    if not is_t234(data):
        raise HeaderError("its header is cut off, or not what its digest says")
    header = data[:T234_HEADER_BYTES]
    (size,) = struct.unpack_from("<I", header, _T234_PAYLOAD_LENGTH)
    return T234Header(header[_T234_SIGNED], size, header[_T234_PAYLOAD_DIGEST], header)


@dataclass(frozen=True, slots=True)
class T194Header:
    """The header of an image for tegra194 (and tegra186).

    Arguments:
        signed: what the signature covers, by SHA-256; the digest of the image is somewhere in it.
        unsigned: what stands before that; the signature is somewhere in it.
    """

    signed: bytes
    unsigned: bytes


def parse_t194(data: bytes) -> T194Header:
    """The header at the beginning of an image. Raises HeaderError."""
    header = data[:T194_HEADER_BYTES]
    if len(header) < T194_HEADER_BYTES or not header.startswith(MAGIC):
        raise HeaderError("its header is cut off")
    return T194Header(header[_T194_SIGNED], header[: _T194_SIGNED.start])
