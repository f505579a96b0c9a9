"""The requests of NVIDIA's scripts, as tegra.md, section 1.5, describes them; and what is answered."""

import contextlib
import hashlib
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from signers.formats import tegra_requests as requests
from signers.formats.tegra_requests import RequestError

MESSAGE = b"a message\0with zeros"
KDF_LABELS = [b"", b"BL", b"", b"GP", b"KDK", b"DK"]


def request(*fields: bytes, flags: tuple[int, ...] = ()) -> bytes:
    return struct.pack(f"<{len(fields) + len(flags)}I", *map(len, fields), *flags) + b"".join(fields)


def number(value: int) -> bytes:
    return value.to_bytes((value.bit_length() + 7) // 8, "little")


def derivation(label: bytes) -> bytes:
    return b"\0\0\0\1" + label + b"\0\0\0\0\1\0"


def kdf_request(labels: list[bytes], **changes: bytes) -> bytes:
    fields = {
        "deckdk": bytes(32), "deckdk_iv": bytes(12), "deckdk_aad": bytes(16), "sbk": bytes(range(32)),
        "deckdk_msg": b"x", **{f"m{at}": derivation(label) if label else b"" for at, label in enumerate(labels)},
        "iv": b"i" * 12, "aad": b"a" * 80, "tag": bytes(16), "content": b"content" * 9, "flag": b"5",
        "output": b"/x/out.tag\0", **changes,
    }  # fmt: skip
    return request(*fields.values())


RSA = request(b"/in/pkc.pem\0", number(len(MESSAGE)), MESSAGE, bytes(384), b"p\0", b"m\0", b"/x/out\0", flags=(1,))
ECC = request(b"/in/pkc.pem\0", number(9), MESSAGE, bytes(96), b"", b"out\0", flags=(0,))
ED25519 = request(b"/in/pkc.pem\0", number(len(MESSAGE)), MESSAGE, bytes(64), b"", b"out\0")
CBC = request(bytes(16), b"\x10", number(32), bytes(40), bytes(32), b"out\0", b"v" * 16)
MAC = request(bytes(16), b"\x10", number(32), bytes(40), bytes(16), b"out\0")
KDF = kdf_request(KDF_LABELS[:5])
PARSERS = {
    requests.parse_rsa: RSA, requests.parse_ecc: ECC, requests.parse_ed25519: ED25519, requests.parse_cbc: CBC,
    requests.parse_mac: MAC, requests.parse_kdf: KDF,
}  # fmt: skip


def test_rsa() -> None:
    parsed = requests.parse_rsa(RSA)
    assert parsed == requests.SignRequest(MESSAGE, 384, b"p", b"m", b"/x/out", is_sha512=True)


def test_ecc() -> None:
    assert requests.parse_ecc(ECC) == requests.SignRequest(MESSAGE[:9], 96, None, None, b"out", is_sha512=False)


def test_ed25519() -> None:
    assert requests.parse_ed25519(ED25519).message == MESSAGE


def test_aes() -> None:
    assert requests.parse_cbc(CBC) == requests.AesRequest(bytes(16), bytes(32), b"v" * 16, b"out")
    assert requests.parse_mac(MAC) == requests.AesRequest(bytes(16), bytes(32), b"", b"out")


@pytest.mark.parametrize("count", [5, 6])
def test_kdf_of_both_lengths(count: int) -> None:
    data = kdf_request([*KDF_LABELS[: count - 1], b"DK"])
    parsed = requests.parse_kdf(data)
    labels = [label for label in (*KDF_LABELS[: count - 1], b"DK") if label]
    assert parsed.chain == tuple(map(derivation, labels))
    assert (parsed.sbk, parsed.iv, parsed.aad, parsed.output_path) == (
        bytes(range(32)), b"i" * 12, b"a" * 80, b"/x/out.tag",
    )  # fmt: skip
    end = parsed.content_offset + len(parsed.content)
    assert data[parsed.content_offset : end] == parsed.content == b"content" * 9


@pytest.mark.parametrize(
    "data",
    [
        kdf_request([]), kdf_request([b""] * 5), kdf_request(KDF_LABELS[:5], flag=b"6"),
        kdf_request(KDF_LABELS[:5], iv=bytes(11)), kdf_request(KDF_LABELS[:5], content=b""),
        kdf_request(KDF_LABELS[:5], m3=b"no derivation at all"), kdf_request(KDF_LABELS[:5], output=b"x"),
    ],
)  # fmt: skip
def test_what_is_no_kdf_request(data: bytes) -> None:
    with pytest.raises(RequestError):
        requests.parse_kdf(data)


@pytest.mark.parametrize(
    ("parse", "data"),
    [
        (requests.parse_rsa, request(b"k\0", b"\xff", b"short", bytes(9), b"", b"", b"o\0", flags=(0,))),
        (requests.parse_rsa, request(b"k\0", b"", b"message", bytes(9), b"", b"", b"o\0", flags=(0,))),
        (requests.parse_rsa, request(b"k\0", b"\1", b"message", bytes(9), b"", b"", b"o\0", flags=(2,))),
        (requests.parse_rsa, request(b"k\0", b"\1", b"message", bytes(9), b"", b"", b"o", flags=(0,))),
        (requests.parse_rsa, request(b"k\0", b"\1", b"message", bytes(9), b"", b"", b"a\0b\0", flags=(0,))),
        (requests.parse_rsa, request(b"k\0", b"\1", b"message", bytes(9), b"", b"", b"a" * 5000 + b"\0", flags=(0,))),
        (requests.parse_cbc, request(bytes(16), b"\x20", b"\x10", bytes(16), bytes(16), b"o\0", b"")),
        (requests.parse_cbc, request(bytes(16), b"\x10", b"\x10", bytes(16), bytes(16), b"o\0", bytes(8))),
    ],
)
def test_what_is_no_request(parse, data: bytes) -> None:
    with pytest.raises(RequestError):
        parse(data)


@pytest.mark.parametrize("parse", PARSERS)
@given(data=st.data())
def test_nothing_else_is_raised(parse, data) -> None:
    whole = PARSERS[parse]
    if data.draw(st.booleans()):
        changed = whole[: data.draw(st.integers(0, len(whole)))] + data.draw(st.binary(max_size=40))
    else:
        at = data.draw(st.integers(0, len(whole) - 1))
        changed = whole[:at] + data.draw(st.binary(min_size=1, max_size=4)) + whole[at + 1 :]
    with contextlib.suppress(RequestError):
        parse(changed)


def test_rsa_numbers() -> None:
    """By the arithmetic that a verifier does with them: Montgomery's product of a and b is ab/R mod n."""
    key = rsa.generate_private_key(65537, 2048).public_key()
    n, r = key.public_numbers().n, 1 << 2048
    assert int.from_bytes(requests.public_key(key), "little") == n
    data = requests.montgomery(key)
    inverse, square = (int.from_bytes(data[at : at + 256], "little") for at in (0, 256))
    assert len(data) == 512
    assert (inverse * n + 1) % r == 0
    product = 3 * square
    product += (product * inverse % r) * n
    assert product % r == 0
    assert product // r % n == 3 * r % n


def test_ecc_numbers() -> None:
    for curve, size in ((ec.SECP256R1(), 32), (ec.SECP521R1(), 68)):
        key = ec.generate_private_key(curve).public_key()
        data = requests.public_key(key)
        numbers = key.public_numbers()
        assert (int.from_bytes(data[:size], "little"), int.from_bytes(data[size:], "little")) == (numbers.x, numbers.y)
        assert len(data) == 2 * size
    signature = bytes(range(64))
    stored = requests.ecdsa_signature(signature, 96)
    assert stored == signature[:32][::-1] + bytes(16) + signature[32:][::-1] + bytes(16)
    assert requests.ecdsa_signature(signature, 64) == signature[:32][::-1] + signature[32:][::-1]
    for size in (63, 62, 0):
        with pytest.raises(RequestError):
            requests.ecdsa_signature(signature, size)


def test_ed25519_key() -> None:
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    assert requests.public_key(key) == key.public_bytes_raw()


def test_meta_blob() -> None:
    entry = (b"i" * 12, b"t" * 16, hashlib.sha512(b"").digest())
    blob = requests.meta_blob([entry] * 2)
    assert (len(blob), blob[:92]) == (4096, b"\2" + bytes(91))
    assert blob[92:276] == b"".join(entry) * 2
    assert not any(blob[276:])
    with pytest.raises(RequestError):
        requests.meta_blob([entry] * 44)
