"""Files of symmetric keys: the forms that they have, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokens.errors import KeyUnusable
from tokens.symmetric import SymmetricAlgorithm
from tokens.symmetric_file import load_symmetric_key, unhexed

AES_128, AES_256, HMAC_SHA256 = SymmetricAlgorithm
KEY = bytes(range(0x10, 0x30))
TEXT = KEY.hex().encode()
# an SBK as NVIDIA's tools take it
WORDS = b" ".join(b"0x" + TEXT[at : at + 8] for at in range(0, 64, 8))


@pytest.mark.parametrize(
    "data",
    [
        KEY, TEXT, TEXT + b"\n", TEXT.upper() + b"\r\n", b"0x" + TEXT,
        WORDS, WORDS + b"\n", b"\n" + WORDS.replace(b" ", b"\n"),
    ],
)  # fmt: skip
def test_each_form(data: bytes) -> None:
    assert load_symmetric_key(data, {AES_256}) == (AES_256, KEY)


@pytest.mark.parametrize(
    ("size", "wanted", "algorithm"),
    [
        (16, {AES_128}, AES_128),
        (16, {HMAC_SHA256}, HMAC_SHA256),
        (16, {AES_128, HMAC_SHA256}, AES_128),
        (32, {AES_128, HMAC_SHA256}, HMAC_SHA256),
        (32, {AES_128, AES_256}, AES_256),
        (64, {HMAC_SHA256}, HMAC_SHA256),
    ],
)
def test_what_a_key_is_for(size: int, wanted: set[SymmetricAlgorithm], algorithm: SymmetricAlgorithm) -> None:
    key = bytes([0xA0]) * size
    assert load_symmetric_key(key, wanted) == (algorithm, key)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\n", b"0x", KEY[:-1], KEY + b"\n",
        TEXT[:-1], TEXT[:-2], TEXT + b"00", b"0x" + TEXT[:63] + b" ", b"x" * 4096,
    ],
)  # fmt: skip
@pytest.mark.parametrize("wanted", [{AES_256}, {AES_128, AES_256}])
def test_no_key(data: bytes, wanted: set[SymmetricAlgorithm]) -> None:
    with pytest.raises(KeyUnusable, match="holds no key for AES-") as caught:
        load_symmetric_key(data, wanted)
    assert repr(data)[2:-1] not in f"{caught.value.message} {caught.value.hint}" or not data.strip()


@pytest.mark.parametrize("size", [0, 15, 65, 1704])  # the last is a PEM file's
def test_no_key_for_hmac(size: int) -> None:
    with pytest.raises(KeyUnusable):
        load_symmetric_key(b"-" * size, {HMAC_SHA256})


@given(st.binary(max_size=200))
def test_anything(data: bytes) -> None:
    try:
        _, key = load_symmetric_key(data, frozenset(SymmetricAlgorithm))
    except KeyUnusable:
        return
    assert key in (data, unhexed(data))
    assert load_symmetric_key(key.hex().encode(), frozenset(SymmetricAlgorithm))[1] == key
