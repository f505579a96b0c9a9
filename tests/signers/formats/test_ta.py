"""OP-TEE's signed headers: the numbers that its documentation shows, hostile files."""

import struct
from contextlib import suppress
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from signers.formats import ta
from signers.formats.ta import Chain, Encryption, Header, Kind, Link, SignedHeader, Subkey, Ta, TaError, TaFile

UUIDS = [UUID(f"f04fa996-148a-453c-b037-{number:012x}") for number in range(4)]
ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00" + b"a TA\n" * 20
KEYS = [rsa.generate_private_key(65537, 2048).public_key() for _ in range(2)]
ENCRYPTION = Encryption(True, b"n" * 12, b"t" * 16)


def signed(kind: Kind, size: int, scheme: ta.TaScheme = ta.PSS) -> SignedHeader:
    return SignedHeader(Header(kind, size, scheme, 256), b"d" * 32, b"s" * 256)


def link(subkey: Subkey, name: bytes = b"") -> Link:
    return Link(signed(Kind.SUBKEY, len(subkey.image())), subkey.image(), subkey, name)


FIRST = Subkey(UUIDS[0], 64, 1, 4, ta.PSS, KEYS[0])
IDENTITY = Subkey(FIRST.uuid_below(b"vendor"), 0, 0xFFFF_FFFF, 3, ta.PKCS1V15, KEYS[1])
CHAIN = Chain((link(FIRST), link(IDENTITY, b"vendor")))
TAS = {
    "plain": Ta(None),
    "bootstrap": Ta(UUIDS[1], 7),
    "encrypted": Ta(UUIDS[1], 0xFFFF_FFFF, ENCRYPTION),
}


def written(ta_: Ta, chain: Chain | None = None, name: bytes = b"") -> bytes:
    before = chain.before(name) if chain else b""
    return before + signed(ta_.kind, len(ELF)).encode() + ta_.fields + ELF


def parse(data: bytes) -> TaFile:
    return ta.parse(lambda offset, length: data[offset : offset + length], len(data))


WHOLE = written(TAS["encrypted"], CHAIN)


def test_the_numbers_that_op_tee_s_documentation_shows():
    """The listing in architecture/subkeys.rst: sizes, offsets and UUIDs of two subkeys and a TA below them."""
    first = Subkey(UUID("f04fa996-148a-453c-b037-1dcfbad120a6"), 64, 1, 4, ta.PSS, KEYS[0])
    second = Subkey(first.uuid_below(b"mid_level_subkey"), 64, 1, 3, ta.PSS, KEYS[1])
    assert str(second.uuid) == "1a5948c5-1aa0-518c-86f4-be6f6a057b16"
    assert str(second.uuid_below(b"subkey1_ta")) == "5c206987-16a3-59cc-ab0f-64b9cfc9e758"
    assert len(first.image()) == 320
    chain = Chain((link(first), link(second, b"mid_level_subkey")))
    assert len(Chain((link(first),)).before(b"mid_level_subkey")) == 692
    assert len(chain.before(b"subkey1_ta")) == 1384
    head = signed(Kind.BOOTSTRAP, 84576).encode() + Ta(UUID("5c206987-16a3-59cc-ab0f-64b9cfc9e758")).fields
    assert 1384 + len(head) == 1712


def test_a_header_is_as_long_as_a_known_one():
    """The first bytes of a TA that OP-TEE 3.x signed, as users show them: 48 53 54 4f, type 1, PSS, 32, 256."""
    header = Header(Kind.BOOTSTRAP, 0x139A8, ta.PSS, 256).encode()
    assert header.hex(" ") == "48 53 54 4f 01 00 00 00 a8 39 01 00 30 49 41 70 20 00 00 01"
    assert Header(Kind.PLAIN, 1, ta.PKCS1V15, 256).encode()[12:16].hex(" ") == "30 48 00 70"


@pytest.mark.parametrize("kind", TAS)
@pytest.mark.parametrize("chain", [None, CHAIN], ids=["alone", "below subkeys"])
def test_a_ta_is_found_again(kind, chain):
    name = b"" if chain is None else b"called"
    if chain is not None:
        chain = Chain(chain.links[:1])
    found = parse(written(TAS[kind], chain, name))
    assert found == TaFile(chain, name, signed(TAS[kind].kind, len(ELF)), TAS[kind])


def test_a_chain_is_found_again():
    assert ta.parse_chain(CHAIN.encode()) == CHAIN
    assert CHAIN.last == IDENTITY
    assert parse(WHOLE).chain == CHAIN


def test_an_identity_subkey_is_for_its_own_uuid():
    assert IDENTITY.uuid_below(b"") == IDENTITY.uuid
    with pytest.raises(TaError, match="0 bytes at most"):
        IDENTITY.uuid_below(b"x")


@pytest.mark.parametrize("name", [b"x" * 65, b"a\0b"])
def test_names_that_cannot_be(name):
    with pytest.raises(TaError, match="64 bytes at most"):
        FIRST.uuid_below(name)


@pytest.mark.parametrize("key_bits", [2048, 3072, 4096])
def test_subkeys_of_every_size(key_bits):
    subkey = Subkey(UUIDS[0], 16, 0, 0, ta.PSS, rsa.generate_private_key(65537, key_bits).public_key())
    assert ta.parse_chain(Chain((link(subkey),)).encode()).last == subkey


def patched(at: int, value: int, data: bytes = WHOLE) -> bytes:
    """Another 32-bit number somewhere."""
    return data[:at] + struct.pack("<I", value) + data[at + 4 :]


IMAGE_AT = 308
"""Where the first subkey's image begins."""


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "cut off"),
        (WHOLE[:-1], "cut off"),
        (WHOLE + b"x", "follows"),
        (CHAIN.encode(), "no TA"),
        (patched(0, 1), "no signed header"),
        (patched(4, 4), "unknown type 4"),
        (patched(12, 0x70414931), "neither RSA-PSS nor"),
        (patched(16, 0x0100_0014), "neither RSA-PSS nor"),
        (patched(8, 2049), "more than 2048 bytes"),
        (patched(16, 0x0201_0020), "longer than that of any key"),
        (patched(8, 30), "a subkey is cut off"),
        (patched(IMAGE_AT + 16, 256), "fields that cannot be"),
        (patched(IMAGE_AT + 28, 5), "fields that cannot be"),
        (patched(IMAGE_AT + 32, 0xFFFF_FFFF), "fields that cannot be"),
        (patched(IMAGE_AT + 32, 0), "none of RSA with 2048"),
        (patched(IMAGE_AT + 44, 400), "an attribute of a subkey is cut off"),
        (patched(IMAGE_AT + 44, 128), "none of RSA with 2048"),
        (patched(IMAGE_AT + 56, 0), "no RSA key"),
        (patched(len(WHOLE) - len(ELF) - 40, 1), "encrypted in another way"),
        (patched(len(WHOLE) - len(ELF) - 36, 2), "encrypted in another way"),
    ],
)
def test_broken_files(data, fault):
    with pytest.raises(TaError, match=fault):
        parse(data)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "cut off"),
        (CHAIN.before(b""), None),
        (Chain((link(FIRST),)).before(b"name"), "cut off"),
        (WHOLE, "does not end with a subkey"),
        (written(TAS["plain"]), "does not end with a subkey"),
    ],
)
def test_files_that_are_no_chain(data, fault):
    if fault is None:
        assert ta.parse_chain(data) == CHAIN
        return
    with pytest.raises(TaError, match=fault):
        ta.parse_chain(data)


def test_a_chain_of_too_many_subkeys():
    subkeys = (link(Subkey(UUIDS[0], 0, 0, 0, ta.PSS, KEYS[0])),) * (ta.SUBKEYS_MAX + 1)
    with pytest.raises(TaError, match="more than 16 subkeys"):
        ta.parse_chain(Chain(subkeys).encode())
    assert len(ta.parse_chain(Chain(subkeys[1:]).encode()).links) == ta.SUBKEYS_MAX


@pytest.mark.parametrize(
    ("head", "fault"),
    [
        (b"", "no ELF"),
        (ELF[:17], "no ELF"),
        (b"\x7fELG" + ELF[4:], "no ELF"),
        (ELF[:16] + b"\x02\x00", "another type"),
        (ELF[:16] + b"\x00\x03", "another type"),
        (ELF[:5] + b"\x02" + ELF[6:], "another type"),
    ],
)
def test_files_that_are_no_elf_of_a_ta(head, fault):
    with pytest.raises(TaError, match=fault):
        ta.check_elf(head)


@settings(max_examples=300)
@given(st.data())
def test_hostile_files_are_refused_or_understood(data):
    hostile = bytearray(data.draw(st.sampled_from([WHOLE, CHAIN.encode(), *map(written, TAS.values())])))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(hostile) - 1))
        hostile[at] = data.draw(st.integers(0, 255))
    whole = bytes(hostile[: data.draw(st.integers(0, len(hostile)))])
    with suppress(TaError):
        found = parse(whole)
        assert len(found.signed.encode() + found.ta.fields) + found.signed.header.image_size <= len(whole)
        if found.chain:
            found.chain.check()
    with suppress(TaError):
        assert ta.parse_chain(ta.parse_chain(whole).encode()) == ta.parse_chain(whole)
        ta.parse_chain(whole).check()


@given(st.binary(max_size=400))
def test_any_bytes(data):
    for read in (parse, ta.parse_chain):
        with suppress(TaError):
            read(data)
