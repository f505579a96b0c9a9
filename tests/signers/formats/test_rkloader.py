"""USB loaders, as boot_merger writes them and as nobody should."""

import struct

import pytest
import rockchip_images
from hypothesis import given
from hypothesis import strategies as st

from signers.formats import idblock, rkloader
from signers.formats.rkloader import LoaderError

IMAGES = {"471": b"ddr" * 1000, "472": b"usbplug" * 1000, "FlashData": b"ddr" * 1000, "FlashBoot": b"spl" * 2000}
LOADER = rockchip_images.loader(IMAGES)


def with_crc(data: bytes) -> bytes:
    return data + rkloader.crc(data).to_bytes(4, "little")


def changed(at: int, value: bytes) -> bytes:
    data = bytearray(LOADER[:-4])
    data[at : at + len(value)] = value
    return with_crc(bytes(data))


def test_the_usual_check_values():
    # of a table that Rockchip's sources have printed: the CRC of one byte is its entry
    assert [rkloader.crc(bytes([byte])) for byte in (1, 2, 255)] == [0x04C10DB7, 0x09821B6E, 0xB1F880B4]
    assert rkloader.crc(b"123456789") == rockchip_images.crc(b"123456789")
    # the magic 0x0FF0AA55 of every older idblock, as it stands at their beginning
    assert rkloader.scrambled(bytes.fromhex("55aaf00f")) == bytes.fromhex("3b8cdcfc")


@given(st.binary(max_size=3000))
def test_scrambling_and_crc(data):
    assert rkloader.scrambled(data) == rockchip_images.scrambled(data)
    assert rkloader.scrambled(rkloader.scrambled(data)) == data
    assert rkloader.crc(data[:300]) == rockchip_images.crc(data[:300])


@pytest.mark.parametrize("plain", [True, False])
def test_what_it_holds(plain):
    loader = rkloader.parse(rockchip_images.loader(IMAGES, plain=plain))
    assert loader.soc == "3588"
    assert [entry.name for entry in loader.heads] == ["UsbHead", "FlashHead"]
    assert [entry.name for entry in loader.others] == ["ddr", "usbplug", "FlashData", "FlashBoot"]
    heads = [idblock.parse(loader.head(entry)) for entry in loader.heads]
    assert all(loader.has(image) for head in heads for image in head.images)
    assert not loader.has(idblock.Image(2048, 4096, bytes(32)))
    assert loader.with_heads({}) == loader.data


def test_another_header_is_all_that_changes():
    loader = rkloader.parse(LOADER)
    new = {entry: bytes([number]) * 2048 for number, entry in enumerate(loader.heads, 1)}
    signed = loader.with_heads(new)
    assert list(rockchip_images.entries_of(signed)) == [
        (kind, name, new.get(next((e for e in loader.heads if e.name == name), None), content))
        for kind, name, content in rockchip_images.entries_of(LOADER)
    ]
    changes = {at for at in range(len(LOADER) - 4) if signed[at] != LOADER[at]}
    assert changes <= {at for entry in loader.heads for at in range(entry.offset, entry.offset + 2048)}


def test_a_header_that_is_not_scrambled_stays_so():
    loader = rkloader.parse(LOADER)
    entry = loader.heads[0]
    plain = rkloader.parse(changed(entry.offset, loader.head(entry)))
    assert plain.head(entry) == loader.head(entry)
    assert plain.with_heads({entry: plain.head(entry)}) == plain.data


TABLE = 25  # where the header has the lists: number, offset and size of the entries of each
ENTRIES = 102  # where the entries begin; in each, where its data is at 45


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "does not begin with"),
        (b"LDR " + bytes(90), "does not begin with"),
        (b"BOOT" + LOADER[4:], "older format BOOT"),
        (changed(4, b"\x65"), "has 101 bytes"),
        (LOADER[:-5] + b"\1" + LOADER[-4:], "CRC is wrong"),
        (LOADER[:-1], "CRC is wrong"),
        (changed(TABLE + 5, b"\x38"), "a list of its entries"),
        (changed(TABLE + 1, b"\xff\xff\xff\x7f"), "a list of its entries"),
        (changed(ENTRIES, b"\x38"), "an entry of it"),
        (changed(ENTRIES + 45, b"\xff\xff\xff\xff"), "an entry of it"),
        (changed(ENTRIES + 49, b"\xff\xff\xff\xff"), "an entry of it"),
        (changed(ENTRIES + 45, struct.pack("<I", ENTRIES)), "among the entries"),
        (changed(ENTRIES + 45, struct.pack("<I", len(LOADER) - 4096 - 4)), "the same data"),
        (changed(ENTRIES + 3 * 57 + 5, "UsbHead".encode("utf-16-le").ljust(40, b"\0")), "there twice"),
        (changed(ENTRIES + 2 * 57 + 49, b"\x00\x04"), "too short"),
        (rockchip_images.loader(IMAGES, soc="330C", heads=False), "older format for '330C'"),
    ],
)
def test_what_cannot_be_signed(data, words):
    with pytest.raises(LoaderError, match=words):
        rkloader.parse(data)


@given(st.binary(max_size=80), st.integers(0, 102 + 6 * 57), st.integers(0, len(LOADER)))
def test_hostile_loaders(noise, at, end):
    data = bytearray(LOADER[:-4])
    data[at : at + len(noise)] = noise
    for each in (with_crc(bytes(data)), with_crc(bytes(data[:end])), noise):
        try:
            loader = rkloader.parse(each)
        except LoaderError:
            continue
        for entry in loader.heads:
            assert len(loader.head(entry)) == 2048
        loader.has(idblock.Image(2048, 4096, bytes(32)))
        assert loader.with_heads({}) == each
