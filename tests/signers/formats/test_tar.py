import io
import subprocess
import tarfile
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signers.formats import tar
from signers.formats.tar import TarError

LONG = "./lib/modules/" + "a" * 90 + "/" + "b" * 90 + ".ko"
CONTENTS = {"./a.ko": b"module", "empty": b"", LONG: bytes(range(256)) * 5, "ünï/x": b"y"}
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def walk(archive: bytes) -> list[tar.Member]:
    return list(tar.members(lambda offset, length: archive[offset : offset + length], len(archive)))


def content(archive: bytes, member: tar.Member) -> bytes:
    return archive[member.data_offset : member.data_offset + member.size]


def build(form: int = tarfile.GNU_FORMAT, **fields) -> bytes:
    """An archive by Python's tarfile; `fields` are the first member's own."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=form) as archive:
        for name, data in CONTENTS.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))
            fields = {}
    return output.getvalue()


def patched(at: int, field: bytes, archive: bytes | None = None, block: int = 0) -> bytes:
    """An archive with another field in a header, and its checksum right."""
    archive = bytearray(build() if archive is None else archive)
    start = block * 512
    archive[start + at : start + at + len(field)] = field
    archive[start + 148 : start + 156] = b" " * 8
    archive[start + 148 : start + 156] = b"%06o\0 " % sum(archive[start : start + 512])
    return bytes(archive)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_reads_what_tarfile_writes(form):
    archive = build(form)
    assert {each.name.decode(): content(archive, each) for each in walk(archive)} == CONTENTS


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_reads_what_gnu_tar_writes(tmp_path, form):
    (tmp_path / "lib/modules").mkdir(parents=True)
    (tmp_path / "lib/modules/a.ko").write_bytes(b"module")
    (tmp_path / "lib/modules/b.ko").hardlink_to(tmp_path / "lib/modules/a.ko")
    (tmp_path / "lib/modules/c.ko").symlink_to("a.ko")
    command = ["tar", "--create", "--sort=name", f"--format={form}", "./lib"]
    archive = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    if form == "v7":  # as nobody writes them any more
        with pytest.raises(TarError, match="no header"):
            walk(archive)
        return
    assert [(each.name, each.kind, each.link, each.size) for each in walk(archive)] == [
        (b"./lib/", tar.DIRECTORY, b"", 0),
        (b"./lib/modules/", tar.DIRECTORY, b"", 0),
        (b"./lib/modules/a.ko", tar.REGULAR, b"", 6),
        (b"./lib/modules/b.ko", tar.HARD_LINK, b"./lib/modules/a.ko", 0),
        (b"./lib/modules/c.ko", tar.SYMBOLIC_LINK, b"a.ko", 0),
    ]


@pytest.mark.parametrize("name", [b"a", b"./lib/a.ko", b"n" * 100, b"n" * 101, LONG.encode(), b"d/" * 400 + b"e"])
def test_tar_reads_what_is_written(tmp_path, name):
    body = tar.header(name, 5, mode=0o755, mtime=1_700_000_000) + b"hello" + bytes(tar.padding(5))
    archive = body + tar.trailer(len(body))
    assert len(archive) % tar.RECORD_BYTES == 0
    assert [(each.name, content(archive, each)) for each in walk(archive)] == [(name, b"hello")]
    listed = subprocess.run(
        ["tar", "--list", "--verbose", "--utc", "--full-time", "--numeric-owner"],
        input=archive, capture_output=True, check=True,
    )  # fmt: skip
    assert listed.stderr == b""
    assert listed.stdout == b"-rwxr-xr-x 0/0               5 2023-11-14 22:13:20 " + name + b"\n"


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_resized_changes_the_size_alone(form):
    archive = build(form, mtime=1_700_000_000, mode=0o640, uid=7, gid=8, uname="me", gname="us")
    member = walk(archive)[0]
    headers = archive[member.offset : member.data_offset]
    assert tar.resized(headers, member.size) == headers
    body = tar.resized(headers, 1000) + bytes(1000) + bytes(tar.padding(1000))
    with tarfile.open(fileobj=io.BytesIO(body + tar.trailer(len(body)))) as reader:
        info = reader.next()
    found = info.name, info.size, info.mtime, info.mode, info.uid, info.gid, info.uname, info.gname
    assert found == ("./a.ko", 1000, 1_700_000_000, 0o640, 7, 8, "me", "us")
    with pytest.raises(ValueError, match="are possible"):
        tar.resized(headers, tar.SIZE_MAX_BYTES + 1)


def pax(*records: bytes) -> bytes:
    """An archive whose first member has a pax header of these records."""
    content = b"".join(records)
    head = patched(156, b"x", tar.header(b"pax", len(content)))
    return head + content + bytes(tar.padding(len(content))) + build()


@pytest.mark.parametrize(
    ("archive", "words"),
    [
        (b"", "cut off"),
        (build()[:511], "cut off"),
        (build()[:515], "cut off in a member"),
        (build()[:1536], "cut off: a header was expected"),
        (b"x" * 1024, "no header"),
        (b"\1" + build()[1:], "no header"),
        (build() + b"x", "something other than padding"),
        (build() + bytes(tar.PADDING_MAX_BYTES), "something other than padding"),
        (patched(124, b"00000000008 "), "not octal"),
        (patched(124, b"-0000000001 "), "not octal"),
        (patched(124, b"\x80" + bytes(10) + b"\x06"), "not octal"),
        (patched(124, b"77777777777\0"), "cut off in a member of 8589934591 bytes"),
        (patched(156, b"3"), "a character device"),
        (patched(156, b"4"), "a block device"),
        (patched(156, b"6"), "a FIFO"),
        (patched(156, b"S"), "a sparse file"),
        (patched(156, b"V"), "unknown type"),
        (patched(156, b"\xff"), "unknown type"),
        (patched(156, b"5"), "link or directory has content"),
        (patched(156, b"2"), "link or directory has content"),
        (patched(124, b"00000200001\0", patched(156, b"x")), "65537 bytes; 65536 are allowed"),
        (pax(b"8 path=a"), "pax header is broken"),
        (pax(b"9 path=a\n" * 2), "same record twice"),
        (pax(b"99 path=a\n"), "pax header is broken"),
        (pax(b"08 path=\n"), "pax header is broken"),
        (pax(b"5 =a\n"), "pax header is broken"),
        (pax(b"7 path\n"), "pax header is broken"),
        (pax(b"2 \n"), "pax header is broken"),
        (pax(b"999999999 a=b\n"), "pax header is broken"),
        (pax(b"10 size=1\n"), "sparse file, or one of more"),
        (pax(b"22 GNU.sparse.major=1\n"), "sparse file, or one of more"),
        (patched(156, b"g", pax(b"9 path=a\n")), "all members the same name"),
        (pax(b"9 path=a\n")[:1024] + pax(b"9 path=a\n"), "two extension headers"),
        (build(tarfile.PAX_FORMAT, name="n" * 200)[:1024] + build(name="n" * 200), "both by a pax record and"),
        (patched(156, b"x")[:1024] + bytes(10240), "pax header is broken|no header"),
    ],
)  # fmt: skip
def test_refused(archive, words):
    with pytest.raises(TarError, match=words):
        walk(archive)


def test_a_global_header_of_git_is_good():
    archive = patched(156, b"g", pax(b"15 comment=abc\n"))
    assert [each.name.decode() for each in walk(archive)] == list(CONTENTS)


@settings(max_examples=500)
@given(st.data())
def test_a_damaged_archive_ends_in_members_or_the_own_error(data):
    archive = bytearray(data.draw(st.sampled_from([build(form) for form in FORMATS.values()])))
    for _ in range(data.draw(st.integers(0, 3))):
        block = data.draw(st.integers(0, len(archive) // 512 - 1))
        at = data.draw(st.integers(0, 511))
        patch = data.draw(st.binary(max_size=12) | st.sampled_from([b"x", b"L", b"g", b"77777777777\0", b"\xff" * 12]))
        archive = bytearray(patched(at, patch[: 512 - at], archive, block))
    del archive[data.draw(st.integers(0, len(archive))) :]
    bounded(bytes(archive))


@given(st.binary(max_size=1500), st.binary(max_size=600))
def test_any_bytes_end_in_members_or_the_own_error(archive, records):
    bounded(archive)
    bounded(pax(records))


def bounded(archive: bytes) -> None:
    read: list[int] = []

    def read_at(offset: int, length: int) -> bytes:
        read.append(length)
        return archive[offset : offset + length]

    try:
        for member in tar.members(read_at, len(archive)):
            assert member.data_offset + member.size <= len(archive)
            assert member.kind in (tar.REGULAR, tar.DIRECTORY, tar.HARD_LINK, tar.SYMBOLIC_LINK)
    except TarError:
        pass
    assert max(read) <= tar.PADDING_MAX_BYTES
    assert len(read) <= 2 * (len(archive) // 512 + 2)


def chunked(archive: bytes, size: int) -> Iterator[bytes]:
    return (archive[at : at + size] for at in range(0, len(archive), size))


def outcome(read: Callable[[], list[tuple[tar.Member, bytes]]]) -> list[tuple[tar.Member, bytes]] | str:
    try:
        return read()
    except TarError:
        return "refused"


@pytest.mark.parametrize("size", [1, 511, 512, 513, 1_000_000])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_stream_has_the_same_members(form, size):
    archive = build(form)
    found = [(member, b"".join(pieces)) for member, pieces in tar.stream(chunked(archive, size))]
    assert found == [(each, content(archive, each)) for each in walk(archive)]
    # nobody need read a content
    assert [member for member, _ in tar.stream(chunked(archive, size))] == walk(archive)


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_stream_is_read_or_refused_as_a_file_is(data):
    archive = bytearray(data.draw(st.sampled_from([build(form) for form in FORMATS.values()])))
    for _ in range(data.draw(st.integers(0, 2))):
        block = data.draw(st.integers(0, len(archive) // 512 - 1))
        patch = data.draw(st.binary(max_size=12) | st.sampled_from([b"x", b"L", b"g", b"77777777777\0", b"\xff" * 12]))
        archive = bytearray(patched(data.draw(st.integers(0, 500)), patch, archive, block))
    del archive[data.draw(st.integers(0, len(archive))) :]
    damaged = bytes(archive)
    streamed = outcome(lambda: [(each, b"".join(pieces)) for each, pieces in tar.stream(chunked(damaged, 700))])
    whole = outcome(lambda: [(each, content(damaged, each)) for each in walk(damaged)])
    assert streamed == whole
