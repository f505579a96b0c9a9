"""Frames between the service and a token worker: length-prefixed, typed, never pickled.

    u32 length of what follows | u32 length of the header | header (JSON object, UTF-8) | body (bytes)

Integers are big-endian. A request's header has `id` and `op`; the answer's has the same `id` and either
`error` (see `tokens.worker`) or the values of that operation. Data to sign and signatures are bodies.

Imported by the token workers: standard library only.
"""

import json
import struct
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

from tokens.schemes import Ecdsa, Ed25519, Hash, RsaPkcs1v15, RsaPss, Scheme

_LENGTHS = struct.Struct(">II")

FRAME_MAX_BYTES = 16 * 1024 * 1024
"""Room for an Ed25519 message; a frame that claims more is garbage."""

Header = dict[str, Any]


class FrameError(Exception):
    """The other side sent something that is not a frame."""


class Action(StrEnum):
    """What the supervisor is to do about a worker that answered with an error."""

    GIVE_UP = "give-up"
    RETRY = "retry"
    REOPEN = "reopen"
    RESTART = "restart"


def encode(header: Header, body: bytes = b"") -> bytes:
    """One frame."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return _LENGTHS.pack(4 + len(text) + len(body), len(text)) + text + body


class Decoder:
    """Splits a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Header, bytes]]:
        """Yields (header, body) of each frame that `data` completes. Raises FrameError."""
        self._buffer += data
        while len(self._buffer) >= _LENGTHS.size:
            length, header_length = _LENGTHS.unpack_from(self._buffer)
            if length > FRAME_MAX_BYTES or header_length + 4 > length:
                raise FrameError(f"a frame of {length} bytes with a header of {header_length}")
            end = 4 + length
            if len(self._buffer) < end:
                return
            split = _LENGTHS.size + header_length
            try:
                header = json.loads(self._buffer[_LENGTHS.size : split])
            except ValueError:
                raise FrameError("a header that is not JSON") from None
            if not isinstance(header, dict):
                raise FrameError("a header that is not an object")
            body = bytes(self._buffer[split:end])
            del self._buffer[:end]
            yield header, body


def scheme_to_wire(scheme: Scheme) -> list[str | int]:
    """A scheme as a JSON list."""
    match scheme:
        case RsaPkcs1v15():
            return ["rsa-pkcs1v15", scheme.hash]
        case RsaPss():
            return ["rsa-pss", scheme.hash, scheme.salt_length]
        case Ecdsa():
            return ["ecdsa", scheme.hash]
        case Ed25519():
            return ["ed25519"]


def scheme_from_wire(wire: list[Any]) -> Scheme:
    """The scheme that `scheme_to_wire` wrote. Raises FrameError."""
    match wire:
        case ["rsa-pkcs1v15", hash_]:
            return RsaPkcs1v15(Hash(hash_))
        case ["rsa-pss", hash_, int(salt_length)]:
            return RsaPss(Hash(hash_), salt_length)
        case ["ecdsa", hash_]:
            return Ecdsa(Hash(hash_))
        case ["ed25519"]:
            return Ed25519()
        case _:
            raise FrameError("an unknown signature scheme")
