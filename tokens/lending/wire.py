"""The wire form of p11-kit's RPC protocol: frames, messages, values.

A frame is u32 code | u32 length of options | u32 length of data | options | data. Data is a message: u32 call |
blob signature of the arguments | arguments. All integers are big-endian; CK_ULONG is u64. There is no specification
but p11-kit's source (p11-kit/rpc-message.c); what is here was measured against clients 0.24.1, 0.25.5 and 0.26.4.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

FRAME_HEADER = struct.Struct(">III")
NULL_LENGTH: Final = 0xFFFFFFFF
UNAVAILABLE: Final = 0xFFFFFFFFFFFFFFFF  # CK_UNAVAILABLE_INFORMATION


class WireError(Exception):
    """The other side sent something that is no message of this protocol."""


class Call(IntEnum):
    """The calls that are answered; all others are not supported. The numbers follow CK_FUNCTION_LIST."""

    ERROR = 0
    INITIALIZE = 1
    FINALIZE = 2
    GET_INFO = 3
    GET_SLOT_LIST = 4
    GET_SLOT_INFO = 5
    GET_TOKEN_INFO = 6
    GET_MECHANISM_LIST = 7
    GET_MECHANISM_INFO = 8
    OPEN_SESSION = 10
    CLOSE_SESSION = 11
    CLOSE_ALL_SESSIONS = 12
    GET_SESSION_INFO = 13
    LOGIN = 18
    LOGOUT = 19
    GET_ATTRIBUTE_VALUE = 24
    FIND_OBJECTS_INIT = 26
    FIND_OBJECTS = 27
    FIND_OBJECTS_FINAL = 28
    SIGN_INIT = 42
    SIGN = 43
    SIGN_UPDATE = 44
    SIGN_FINAL = 45
    SEED_RANDOM = 63
    GENERATE_RANDOM = 64


# call -> signatures of its request and of its answer
SIGNATURES: dict[Call, tuple[bytes, bytes]] = {
    Call.INITIALIZE: (b"ayyay", b""),
    Call.FINALIZE: (b"", b""),
    Call.GET_INFO: (b"", b"vsusv"),
    Call.GET_SLOT_LIST: (b"yfu", b"au"),
    Call.GET_SLOT_INFO: (b"u", b"ssuvv"),
    Call.GET_TOKEN_INFO: (b"u", b"ssssuuuuuuuuuuuvvs"),
    Call.GET_MECHANISM_LIST: (b"ufu", b"au"),
    Call.GET_MECHANISM_INFO: (b"uu", b"uuu"),
    Call.OPEN_SESSION: (b"uu", b"u"),
    Call.CLOSE_SESSION: (b"u", b""),
    Call.CLOSE_ALL_SESSIONS: (b"u", b""),
    Call.GET_SESSION_INFO: (b"u", b"uuuu"),
    Call.LOGIN: (b"uuay", b""),
    Call.LOGOUT: (b"u", b""),
    Call.GET_ATTRIBUTE_VALUE: (b"uufA", b"aAu"),
    Call.FIND_OBJECTS_INIT: (b"uaA", b""),
    Call.FIND_OBJECTS: (b"ufu", b"au"),
    Call.FIND_OBJECTS_FINAL: (b"u", b""),
    Call.SIGN_INIT: (b"uMu", b""),
    Call.SIGN: (b"uayfy", b"ay"),
    Call.SIGN_UPDATE: (b"uay", b""),
    Call.SIGN_FINAL: (b"ufy", b"ay"),
    Call.SEED_RANDOM: (b"uay", b""),
    Call.GENERATE_RANDOM: (b"ufy", b"ay"),
}

# How an attribute's value is encoded goes by its type (CKA_...); all that is not here is a blob.
_BYTE_ATTRIBUTES = frozenset(
    {0x01, 0x02, 0x86, *range(0x103, 0x10D), *range(0x162, 0x166), 0x170, 0x171, 0x200, 0x202, 0x210,
     0x301, 0x302, 0x405}
)  # fmt: skip
_ULONG_ATTRIBUTES = frozenset(
    {0x00, 0x80, 0x87, 0x88, 0x100, 0x121, 0x133, 0x134, 0x160, 0x161, 0x166, 0x201, 0x300,
     *range(0x400, 0x405), 0x406, 0x500}
)  # fmt: skip
_ULONG_LIST_ATTRIBUTES = frozenset({0x40000600})
_TEMPLATE_ATTRIBUTES = frozenset({0x40000211, 0x40000212, 0x40000213})

Value = bool | int | bytes
"""An attribute's value; a bool is one byte, an int a CK_ULONG."""


@dataclass(frozen=True, slots=True)
class Mechanism:
    """CK_MECHANISM; `parameters` are those of PSS (hash, mgf, salt length in bytes) or none."""

    type: int
    parameters: tuple[int, int, int] | None


class Reader:
    """Takes values off a message. Every method raises WireError where the bytes do not hold that value."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """How many bytes are not taken yet."""
        return len(self._data) - self._at

    def take(self, length: int) -> bytes:
        """The next `length` bytes."""
        if length > self.left:
            raise WireError("a message that ends too early")
        self._at += length
        return self._data[self._at - length : self._at]

    def byte(self) -> int:
        """y"""
        return self.take(1)[0]

    def u32(self) -> int:
        """A count or a length."""
        return int.from_bytes(self.take(4), "big")

    def ulong(self) -> int:
        """u"""
        return int.from_bytes(self.take(8), "big")

    def blob(self) -> bytes:
        """A length and as many bytes; a NULL is empty."""
        length = self.u32()
        return b"" if length == NULL_LENGTH else self.take(length)

    def byte_array(self) -> bytes:
        """ay"""
        if self.byte():
            return self.blob()
        self.u32()  # a length without data: a NULL pointer
        return b""

    def room(self) -> int:
        """fu, fy: how much the caller has room for; since 0.25.0 NULL_LENGTH is a pointer with no room."""
        room = self.u32()
        return 0 if room == NULL_LENGTH else room

    def attribute_types(self) -> list[tuple[int, int]]:
        """fA: (type, room in bytes) of each attribute that is asked for."""
        return [(self.u32(), self.u32()) for _ in range(self._count(8))]

    def template(self) -> list[tuple[int, Value | None]]:
        """aA: (type, value) of each attribute; None where the value is not one that an object here can have."""
        return [self._attribute() for _ in range(self._count(5))]

    def mechanism(self, after: int) -> Mechanism:
        """M, with `after` bytes of other arguments behind it.

        Up to 0.25.5 PSS has its parameters at once and no parameters are NULL_LENGTH; since 0.25.6 PSS has a byte
        before them, and no parameters are nothing. The protocol's version does not tell them apart: the length does.
        """
        type_ = self.u32()
        match self.left - after:
            case 0 | 1 | 4:
                self.take(self.left - after)
                return Mechanism(type_, None)
            case 24 | 25:
                self.take(self.left - after - 24)
                return Mechanism(type_, (self.ulong(), self.ulong(), self.ulong()))
            case _:
                raise WireError("a mechanism whose parameters are unknown here")

    def end(self) -> None:
        """Raises WireError where anything is left."""
        if self.left:
            raise WireError("a message with more than its arguments")

    def _count(self, least: int) -> int:
        count = self.u32()
        if count * least > self.left:
            raise WireError("an array of more elements than the message could hold")
        return count

    def _attribute(self) -> tuple[int, Value | None]:
        type_ = self.u32()
        if not self.byte():
            return type_, None
        self.u32()  # its length in the tool's memory
        if type_ in _BYTE_ATTRIBUTES:
            return type_, bool(self.byte())
        if type_ in _ULONG_ATTRIBUTES:
            return type_, self.ulong()
        if type_ in _ULONG_LIST_ATTRIBUTES:
            self.take(8 * self._count(8))
            return type_, None
        if type_ in _TEMPLATE_ATTRIBUTES:
            raise WireError("a template within a template")
        return type_, self.blob()


class Writer:
    """Puts values together."""

    def __init__(self) -> None:
        self.data = bytearray()

    def byte(self, value: int) -> "Writer":
        """y"""
        self.data.append(value)
        return self

    def u32(self, value: int) -> "Writer":
        """A count or a length."""
        self.data += value.to_bytes(4, "big")
        return self

    def ulong(self, *values: int) -> "Writer":
        """u, one or more"""
        for value in values:
            self.data += value.to_bytes(8, "big")
        return self

    def version(self, major: int, minor: int) -> "Writer":
        """v"""
        return self.byte(major).byte(minor)

    def blob(self, value: bytes) -> "Writer":
        """A length and the bytes."""
        self.u32(len(value))
        self.data += value
        return self

    def text(self, value: str, size: int) -> "Writer":
        """s: padded with blanks to the field's size."""
        return self.blob(value.encode()[:size].ljust(size))

    def byte_array(self, value: bytes) -> "Writer":
        """ay"""
        return self.byte(1).blob(value)

    def byte_array_length(self, length: int) -> "Writer":
        """ay, with a length alone: the caller has no room for more."""
        return self.byte(0).u32(length)

    def ulong_array(self, values: list[int], room: int) -> "Writer":
        """au: the values, or how many there are where the caller has room for none."""
        if not room:
            return self.byte(0).u32(len(values))
        return self.byte(1).u32(len(values)).ulong(*values)

    def attribute(self, type_: int, value: Value | None) -> "Writer":
        """One of an array aA; None says that the object does not have it, or does not give it."""
        self.u32(type_)
        match value:
            case None:
                return self.byte(0)
            case bool():
                return self.byte(1).u32(1).byte(value)
            case int():
                return self.byte(1).u32(8).ulong(value)
            case bytes():
                return self.byte(1).u32(len(value)).blob(value)


def memory_size(value: Value) -> int:
    """How many bytes an attribute's value has in the tool's memory."""
    if isinstance(value, bool):
        return 1
    return 8 if isinstance(value, int) else len(value)


def frame(code: int, call: Call, arguments: Writer | None = None) -> bytes:
    """The frame of an answer."""
    signature = b"u" if call is Call.ERROR else SIGNATURES[call][1]
    message = Writer().u32(call).blob(signature).data
    if arguments is not None:
        message += arguments.data
    return FRAME_HEADER.pack(code, 0, len(message)) + message
