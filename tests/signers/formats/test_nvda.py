"""Headers of boot images."""

import hashlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signers.formats import nvda
from signers.formats.nvda import HeaderError


def t234(payload: bytes = b"payload") -> bytes:
    header = bytearray(os.urandom(8192))
    header[:4] = b"NVDA"
    header[5124:5128] = len(payload).to_bytes(4, "little")
    header[5216:5280] = hashlib.sha512(payload).digest()
    header[4:68] = hashlib.sha512(header[68:]).digest()
    return bytes(header) + payload


WHOLE = t234()


def test_t234() -> None:
    header = nvda.parse_t234(WHOLE)
    assert header.signed == WHOLE[4032:8192]
    assert (header.payload_bytes, header.payload_sha512) == (7, hashlib.sha512(b"payload").digest())
    assert header.signature(384) == WHOLE[144:528]


@given(st.integers(0, 8191), st.integers(1, 255))
def test_each_byte_of_a_t234_header_matters(at: int, change: int) -> None:
    changed = bytearray(WHOLE)
    changed[at] ^= change
    with pytest.raises(HeaderError):
        nvda.parse_t234(bytes(changed))


@given(st.binary(max_size=200), st.integers(0, 8191))
def test_what_is_no_header(data: bytes, size: int) -> None:
    for cut in (data, WHOLE[:size], b"NVDA" + data):
        with pytest.raises(HeaderError):
            nvda.parse_t234(cut)
        if len(cut) < 4096:
            with pytest.raises(HeaderError):
                nvda.parse_t194(cut)


def test_t194() -> None:
    data = b"NVDA" + os.urandom(5000)
    header = nvda.parse_t194(data)
    assert header.unsigned + header.signed == data[:4096]
    assert len(header.signed) == 1136
    with pytest.raises(HeaderError):
        nvda.parse_t194(b"NVDB" + data)
