"""A DER writer (X.690): bytes in, bytes out.

Each function returns one complete encoding (tag, length, contents), so that a structure reads as it stands in its
specification. Parsing is not done here: certificates are read by `cryptography`, CMS messages by `asn1crypto`.
"""

from datetime import UTC, datetime
from functools import cache

NULL = b"\x05\x00"


def encode(tag: int, contents: bytes) -> bytes:
    """One encoding with an identifier octet and a definite length (X.690, sections 8.1.2 and 10.1).

    `tag` is the whole identifier octet: class, constructed bit and a tag number below 31.
    """
    length = len(contents)
    if length < 0x80:
        return bytes((tag, length)) + contents
    size = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(size))) + size + contents


def sequence(*members: bytes) -> bytes:
    """SEQUENCE or SEQUENCE OF of encodings, in the order given."""
    return encode(0x30, b"".join(members))


def set_of(*members: bytes) -> bytes:
    """SET OF of encodings, in the order that DER wants (X.690, section 11.6)."""
    return encode(0x31, b"".join(sorted(members)))


@cache  # those of the standards: a few dozen
def oid(dotted: str) -> bytes:
    """OBJECT IDENTIFIER (X.690, section 8.19), from `1.2.840.113549.1.7.2`."""
    first, second, *rest = (int(arc) for arc in dotted.split("."))
    return encode(0x06, b"".join(_base128(arc) for arc in (40 * first + second, *rest)))


def _base128(number: int) -> bytes:
    digits = [number & 0x7F]
    while number := number >> 7:
        digits.append(0x80 | number & 0x7F)
    return bytes(reversed(digits))


def integer(value: int) -> bytes:
    """INTEGER: two's complement in as few bytes as hold it (X.690, section 8.3)."""
    # the bits of the magnitude and one for the sign; ~value, because -128 fits into one byte
    bits = (value if value >= 0 else ~value).bit_length() + 1
    return encode(0x02, value.to_bytes((bits + 7) // 8, "big", signed=True))


def octet_string(value: bytes) -> bytes:
    """OCTET STRING."""
    return encode(0x04, value)


def time(moment: datetime) -> bytes:
    """Time: UTCTime for the years 1950 to 2049, else GeneralizedTime, in whole seconds (RFC 5652, section 11.3)."""
    moment = moment.astimezone(UTC)
    if 1950 <= moment.year < 2050:
        return encode(0x17, moment.strftime("%y%m%d%H%M%SZ").encode())
    # strftime does not pad the years before 1000
    return encode(0x18, f"{moment.year:04}{moment:%m%d%H%M%S}Z".encode())


def explicit(number: int, encoding: bytes) -> bytes:
    """`[number] EXPLICIT`: a context tag around an encoding."""
    return encode(0xA0 | number, encoding)


def implicit(number: int, encoding: bytes) -> bytes:
    """`[number] IMPLICIT`: a context tag in place of the encoding's own; primitive or constructed as that was."""
    return bytes((0x80 | encoding[0] & 0x20 | number,)) + encoding[1:]
