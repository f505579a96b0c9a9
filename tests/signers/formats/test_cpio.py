import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signers.formats import cpio
from signers.formats.cpio import CRC, NEWC, CpioError

FILES = {"sw-description": b"software = {};\n", "a": b"", "rootfs.ext4": bytes(range(256)) * 5 + b"x"}


def walk(archive: bytes) -> list[cpio.Member]:
    return list(cpio.members(lambda offset, length: archive[offset : offset + length], len(archive)))


def build(magic: bytes, files: dict[str, bytes] = FILES) -> bytes:
    body = b"".join(cpio.encode(magic, name.encode(), content) for name, content in files.items())
    return body + cpio.trailer(magic, len(body))


@pytest.mark.parametrize(("form", "magic"), [("newc", NEWC), ("crc", CRC)])
def test_reads_what_cpio_writes(swu, form, magic):
    archive = swu(FILES, form=form).read_bytes()
    *files, trailer = walk(archive)
    assert [(each.magic, each.name.decode(), each.size) for each in files] == [
        (magic, name, len(content)) for name, content in FILES.items()
    ]
    for member, content in zip(files, FILES.values(), strict=True):
        assert archive[member.data_offset : member.data_offset + member.size] == content
        assert member.mode == 0o100644
        if magic == CRC:
            assert member.checksum == cpio.checksum(content) == sum(content)
    assert trailer.name == cpio.TRAILER


@pytest.mark.parametrize("magic", [NEWC, CRC])
def test_cpio_reads_what_is_written(tmp_path, magic):
    archive = build(magic)
    assert len(archive) % 512 == 0
    listed = subprocess.run(["cpio", "-t", "--quiet"], input=archive, capture_output=True, check=True)
    assert listed.stdout.decode().split() == list(FILES)
    assert listed.stderr == b""
    subprocess.run(["cpio", "-i", "--quiet"], cwd=tmp_path, input=archive, check=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == FILES
    if magic == CRC:
        only_verify = ["cpio", "-i", "--only-verify-crc", "--quiet"]
        assert subprocess.run(only_verify, input=archive, capture_output=True, check=True).stderr == b""
        damaged = archive.replace(b"\xfe\xffx", b"\xfd\xffx")
        assert b"checksum error" in subprocess.run(only_verify, input=damaged, capture_output=True, check=False).stderr


@given(st.binary(max_size=3000), st.binary(max_size=3000))
def test_checksum_is_the_sum_of_the_bytes(first, second):
    assert cpio.checksum(second, cpio.checksum(first)) == sum(first + second)


def test_checksum_wraps():
    assert cpio.checksum(b"\x03", 0xFFFFFFFE) == 1
    assert cpio.checksum(b"\xff" * (1 << 20)) == 0xFF << 20


def altered(at: int, field: bytes) -> bytes:
    """An archive whose first member has another field at that offset of its header."""
    archive = build(NEWC)
    return archive[:at] + field + archive[at + len(field) :]


NAMESIZE = 94
FILESIZE = 54


@pytest.mark.parametrize(
    ("archive", "words"),
    [
        (b"", "cut off"),
        (b"070701", "cut off"),
        (build(NEWC)[:-512], "cut off"),
        (build(NEWC)[:112], "cut off in a name"),
        (b"070707" + build(NEWC)[6:], "no header"),
        (bytes(1024), "no header"),
        (altered(FILESIZE, b"0000001Z"), "not hexadecimal"),
        (altered(FILESIZE, b"      1 "), "not hexadecimal"),
        (altered(FILESIZE, b"-0000001"), "not hexadecimal"),
        (altered(FILESIZE, b"0x000001"), "not hexadecimal"),
        (altered(FILESIZE, b"FFFFFFFF"), "cut off in a member"),
        (altered(NAMESIZE, b"00000000"), "a name has 0 bytes"),
        (altered(NAMESIZE, b"00000001"), "a name has 1 bytes"),
        (altered(NAMESIZE, b"FFFFFFFF"), "a name has 4294967295 bytes"),
        (altered(NAMESIZE, b"00000100"), "a name has 256 bytes"),
        (altered(NAMESIZE, b"0000000E"), "NUL"),
        (altered(NAMESIZE, b"00000010"), "NUL"),
        (build(NEWC, {"a" * 255: b""}), "a name has 256 bytes"),
        (cpio.encode(NEWC, cpio.TRAILER, b"x"), "trailer has content"),
        (cpio.encode(NEWC, b"a", b"") * (cpio.MEMBERS_MAX + 1), "more than 4096 members"),
    ],
)
def test_refused(archive, words):
    with pytest.raises(CpioError, match=words):
        walk(archive)


@settings(max_examples=500)
@given(st.data())
def test_a_damaged_archive_ends_in_members_or_the_own_error(data):
    archive = bytearray(build(data.draw(st.sampled_from([NEWC, CRC]))))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(archive) - 1))
        patch = data.draw(st.binary(max_size=8) | st.sampled_from([b"FFFFFFFF", b"00000000", b"070701", b"\0"]))
        archive[at : at + len(patch)] = patch
    del archive[data.draw(st.integers(0, len(archive))) :]
    bounded(bytes(archive))


@given(st.binary(max_size=600))
def test_any_bytes_end_in_members_or_the_own_error(archive):
    bounded(archive)
    bounded(NEWC + archive)


def bounded(archive: bytes) -> None:
    read: list[int] = []

    def read_at(offset: int, length: int) -> bytes:
        read.append(length)
        return archive[offset : offset + length]

    try:
        for member in cpio.members(read_at, len(archive)):
            assert member.data_offset <= len(archive) + 3
            assert not member.size or member.data_offset + member.size <= len(archive)
    except CpioError:
        pass
    assert max(read) <= 255
    assert len(read) <= 2 * (len(archive) // 112 + 1)
