"""PE images: real EFI programs, against what binutils and sbsign say of them; and hostile ones."""

import struct
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signers.formats import pe
from signers.formats.reading import ReadAt
from tokens.schemes import Hash

PROGRAMS = sorted(Path("/usr/lib/systemd/boot/efi").glob("*.efi*"))
SMALL = PROGRAMS[0].read_bytes()


def read_at(data: bytes) -> ReadAt:
    return lambda offset, length: data[offset : offset + length]


def parse(data: bytes) -> pe.Image:
    return pe.parse(read_at(data), len(data))


def patched(offset: int, form: str, *values: int, data: bytes = SMALL) -> bytes:
    changed = bytearray(data)
    struct.pack_into(f"<{form}", changed, offset, *values)
    return bytes(changed)


IMAGE = parse(SMALL)
COFF = struct.unpack_from("<I", SMALL, 60)[0]
OPTIONAL = COFF + 24
SECTIONS = OPTIONAL + struct.unpack_from("<H", SMALL, COFF + 20)[0]


def test_there_are_real_programs():
    assert len(PROGRAMS) >= 2


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_the_checksum_is_that_of_binutils(program):
    data = program.read_bytes()
    image = parse(data)
    stored = data[image.checksum : image.checksum + 4]
    assert any(stored)
    assert pe.checksum(read_at(data), image) == stored
    assert pe.checksum(read_at(data[:-1] + b"\xfe"), image) != stored


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_the_digest_and_table_are_those_of_sbsign(pairs, tmp_path, program, cut):
    data = program.read_bytes()
    data = data[: len(data) - cut]
    (tmp_path / "program").write_bytes(data)
    (tmp_path / "key.pem").write_bytes(pairs["rsa2048"].private_pem)
    (tmp_path / "crt.pem").write_bytes(pairs["rsa2048"].certificate_pem)
    command = ["sbsign", "--key", "key.pem", "--cert", "crt.pem", "--output", "signed", "program"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    signed = (tmp_path / "signed").read_bytes()
    image = parse(signed)
    assert image.content_size == len(data) + len(pe.padding(len(data)))
    (message,) = pe.messages(signed[image.content_size :])
    digest = pe.digest(read_at(data), parse(data), Hash.SHA256)
    assert pe.indirect_data(digest, Hash.SHA256) in message
    assert pe.digest(read_at(signed), image, Hash.SHA256) == digest


OCTETS = [b"\x04\x01\0", b"\x04\x08" + b"\1" * 8, b"\x04\x11" + b"\2" * 15 + bytes(2)]


def test_a_table_has_its_messages():
    table = b"".join(map(pe.entry, OCTETS))
    assert len(table) % 8 == 0
    assert pe.messages(table) == tuple(OCTETS)
    assert pe.messages(b"") == ()


def test_lengths_may_leave_out_the_padding():
    entries = [struct.pack("<IHH", 8 + len(each), 0x0200, 2) + each for each in OCTETS]
    assert pe.messages(b"".join(each + pe.padding(len(each)) for each in entries)) == tuple(OCTETS)
    assert pe.messages(entries[-1]) == (OCTETS[-1],)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pe.entry(OCTETS[1])[:7], "cut off"),
        (pe.entry(OCTETS[1])[:-1], "does not fit"),
        (struct.pack("<IHH", 8, 0x0200, 2), "does not fit"),
        (struct.pack("<IHH", 0, 0x0200, 2), "does not fit"),
        (struct.pack("<IHH", 9, 0x0100, 2) + bytes(8), "unknown type"),
        (struct.pack("<IHH", 9, 0x0200, 1) + bytes(8), "unknown type"),
        (pe.entry(b"\x04\x7f"), "no DER"),
    ],
)
def test_tables_that_are_none(table, words):
    with pytest.raises(pe.PeError, match=words):
        pe.messages(table)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "MZ"),
        (b"MZ", "MZ"),
        (b"\x7fELF" + SMALL[4:], "MZ"),
        (patched(60, "I", 0xFFFF_FFF0), "no PE header"),
        (patched(COFF, "4s", b"LE\0\0"), "no PE header"),
        (SMALL[: COFF + 1] + SMALL[COFF:], "no PE header"),
        (patched(60, "I", COFF + 1, data=SMALL[:COFF] + b"\0" + SMALL[COFF:]), "not aligned"),
        (patched(COFF + 20, "H", 60), "too short"),
        (patched(COFF + 20, "H", 112), "no place"),
        (patched(COFF + 20, "H", 0xFFFF), "lie within SizeOfHeaders|too short"),
        (patched(OPTIONAL, "H", 0x107), "neither PE32"),
        (patched(OPTIONAL + 108, "I", 4), "no place"),
        (patched(OPTIONAL + 68, "H", 3), "subsystem 3"),
        (patched(OPTIONAL + 60, "I", 0xFFFF_FFFF), "SizeOfHeaders"),
        (patched(OPTIONAL + 60, "I", SECTIONS), "SizeOfHeaders"),
        (patched(COFF + 6, "H", 0xFFFF), "SizeOfHeaders"),
        (patched(SECTIONS + 16, "I", 0x7FFF_FFFF), "overlap, or lie outside"),
        (patched(SECTIONS + 20, "I", 0), "in its headers"),
        (patched(SECTIONS + 20, "I", len(SMALL)), "outside the file"),
        (patched(IMAGE.directory, "II", len(SMALL) - 4, 4), "not aligned"),
        (patched(IMAGE.directory, "II", len(SMALL) & ~7, 8), "not at its end"),
        (patched(IMAGE.directory, "II", 8, len(SMALL) - 8), "overlap, or lie outside"),
        (SMALL[: IMAGE.headers_size], "overlap, or lie outside"),
    ],
)
def test_images_that_are_none(data, words):
    with pytest.raises(pe.PeError, match=words):
        parse(data)


def test_signatures_of_more_than_the_limit():
    table = pe.CERTIFICATES_MAX_BYTES + 8
    padded = SMALL + pe.padding(len(SMALL))
    with pytest.raises(pe.PeError, match="more than"):
        parse(patched(IMAGE.directory, "II", len(padded), table, data=padded) + bytes(table))


def test_sizes_that_have_no_32_bits():
    with pytest.raises(pe.PeError, match="4 GiB"):
        pe.parse(read_at(SMALL), 1 << 32)


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_image_ends_in_parts_or_the_own_error(data):
    image = bytearray(SMALL)
    for _ in range(data.draw(st.integers(0, 4))):
        # where the headers are, and seldom elsewhere
        at = data.draw(st.integers(0, IMAGE.headers_size) | st.integers(0, len(image) - 1))
        patch = data.draw(st.binary(max_size=8) | st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f"]))
        image[at : at + len(patch)] = patch
    del image[data.draw(st.integers(0, len(image)) | st.just(len(image))) :]
    bounded(bytes(image))


@given(st.binary(max_size=600))
def test_any_bytes_end_in_parts_or_the_own_error(data):
    bounded(data)
    bounded(SMALL[: IMAGE.headers_size] + data)


@given(st.binary(max_size=200))
def test_any_table_ends_in_messages_or_the_own_error(table):
    for each in (table, pe.entry(OCTETS[0]) + table, pe.entry(table)):
        with suppress(pe.PeError):
            assert sum(map(len, pe.messages(each))) < len(each) or not each


def bounded(data: bytes) -> None:
    read: list[int] = []

    def counted(offset: int, length: int) -> bytes:
        assert offset >= 0
        assert length >= 0
        read.append(length)
        return data[offset : offset + length]

    try:
        image = pe.parse(counted, len(data))
    except pe.PeError:
        return
    finally:
        assert sum(read) <= 64 + 24 + 0xFFFF + len(data)
    covered = list(image.hashed())
    assert all(0 <= begin <= end <= len(data) for begin, end in covered)
    assert sum(end - begin for begin, end in covered) == image.content_size - 12
    assert len(pe.digest(read_at(data), image, Hash.SHA256)) == 32
    pe.checksum(read_at(data), image)
