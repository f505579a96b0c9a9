"""Frames between the service and its workers."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokens.frames import FRAME_MAX_BYTES, Decoder, FrameError, encode, scheme_from_wire, scheme_to_wire
from tokens.schemes import Ecdsa, Ed25519, Hash, RsaPkcs1v15, RsaPss

HEADERS = st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.integers()))


@given(st.lists(st.tuples(HEADERS, st.binary())), st.integers(1, 50))
def test_frames_survive_any_cutting(frames: list[tuple[dict[str, object], bytes]], step: int) -> None:
    stream = b"".join(encode(header, body) for header, body in frames)
    decoder = Decoder()
    pieces = (stream[at : at + step] for at in range(0, len(stream), step))
    assert [frame for piece in pieces for frame in decoder.feed(piece)] == frames


@pytest.mark.parametrize(
    "garbage",
    [
        struct.pack(">II", FRAME_MAX_BYTES + 1, 2) + b"{}",
        struct.pack(">II", 0xFFFFFFFF, 0xFFFFFFFF),
        struct.pack(">II", 6, 3) + b"{}",
        struct.pack(">II", 6, 2) + b"[]",
        struct.pack(">II", 6, 2) + b"{:",
        b"HTTP/1.1 200 OK\r\n\r\n",
    ],
)
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(FrameError):
        list(Decoder().feed(garbage))


@given(st.binary(max_size=200))
def test_hostile_bytes_end_in_a_frame_error_or_wait(data: bytes) -> None:
    with contextlib.suppress(FrameError):
        list(Decoder().feed(data))


@pytest.mark.parametrize("scheme", [RsaPkcs1v15(Hash.SHA256), RsaPss(Hash.SHA3_384, 17), Ecdsa(Hash.SHA512), Ed25519()])
def test_schemes_survive(scheme: RsaPkcs1v15 | RsaPss | Ecdsa | Ed25519) -> None:
    assert scheme_from_wire(scheme_to_wire(scheme)) == scheme


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(FrameError):
        scheme_from_wire(["rsa-raw"])
