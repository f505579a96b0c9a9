import contextlib
import gzip
import io
import lzma
import subprocess
import tarfile
import threading
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signers import archives
from signers.archives import GZIP, XZ, ZSTD, ArchiveLimits, Pieces, Scratch
from signers.signer import FileRange, Signed, Upload
from tokens.errors import ArtifactRejected

EVERY = pytest.mark.parametrize("compression", archives.COMPRESSIONS, ids=lambda each: each.name)
TOOLS = {"gzip": ("gzip", "-n"), "xz": ("xz",), "zstd": ("zstd", "-q")}
WIDE_ZSTD = ZSTD.magic + b"\x00" + bytes([21 << 3]) + b"\x01\x00\x00"
"""A frame that asks for a window of 2 GiB (RFC 8878, section 3.1.1.1.2): its exponent is 21 more than 10."""
CONTENT = b"some content\n" * 300_000


def tool(compression, *options: str, data: bytes) -> bytes:
    return subprocess.run(
        [*TOOLS[compression.name], *options, "-c"], input=data, capture_output=True, check=True
    ).stdout


def whole(data: bytes) -> FileRange:
    return FileRange(Upload(data, "data", len(data)), 0, len(data))


@pytest.fixture
def scratch(tmp_path) -> Scratch:
    directory = tmp_path / "job"
    directory.mkdir()
    return Scratch(directory, ArchiveLimits())


def written(*infos: tuple[str, bytes, str | bytes]) -> bytes:
    """An archive of (name, type, content or link)."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as archive:
        for name, kind, content in infos:
            info = tarfile.TarInfo(name)
            info.type = kind
            if isinstance(content, str):
                info.linkname = content
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return output.getvalue()


def names(data: bytes, **limits: int) -> list[str]:
    archive = archives.read(Upload(data, "a.tar", len(data)), ArchiveLimits(**limits))
    return [member.name.decode(errors="replace") for member in archive.members]


FIELDS = ("name", "mode", "uid", "gid", "uname", "gname", "mtime", "type", "linkname", "pax_headers")
FILE, LINK, SYM, DIR = tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE


class TestMembers:
    def test_names_are_kept_as_they_are_spelt(self):
        spelt = ["./", "./lib/", "./lib/a", "lib/b", "lib/sub//c", "lib/sub/./d", "x..y", "..."]
        infos = [(name.rstrip("/") or ".", DIR if name.endswith("/") else FILE, b"") for name in spelt]
        assert names(written(*infos)) == spelt

    def test_links_within_the_tree_are_good(self):
        data = written(
            ("lib/a.ko", FILE, b"x"), ("lib/hard", LINK, "./lib/a.ko"), ("lib/x/near", SYM, "../a.ko"),
            ("lib/x/up", SYM, ".."), ("lib/x/dot", SYM, "./y/z"), ("top", SYM, "lib"), ("lib/x/root", SYM, "../.."),
        )  # fmt: skip
        assert len(names(data)) == 7

    def test_a_directory_may_be_there_twice(self):
        data = written(("lib", DIR, b""), ("lib/a", FILE, b""), ("./lib", DIR, b""))
        assert names(data) == ["lib/", "lib/a", "./lib/"]

    @pytest.mark.parametrize(
        ("infos", "words"),
        [
            ([("/etc/passwd", FILE, b"")], "leads out of it"),
            ([("../x", FILE, b"")], "leads out of it"),
            ([("lib/../../x", FILE, b"")], "leads out of it"),
            ([("lib/..", DIR, b"")], "leads out of it"),
            ([("", FILE, b"")], "or nowhere"),
            ([(".", FILE, b"")], "no name for a file"),
            ([("n" * 1025, FILE, b"")], "1025 bytes; 1024 are allowed"),
            ([("a", FILE, b""), ("./a", FILE, b"")], "there twice"),
            ([("a", FILE, b""), ("a", SYM, "b")], "there twice"),
            ([("a/b", FILE, b""), ("a", SYM, "b")], "there twice"),
            ([("a/b", FILE, b""), ("a", FILE, b"")], "there twice"),
            ([("a", FILE, b""), ("a/b", FILE, b"")], "no directory"),
            ([("a", FILE, b""), ("a", DIR, b"")], "no directory"),
            # what is below a link would be written wherever that leads
            ([("a", SYM, "b"), ("a/c", FILE, b"")], "no directory"),
            ([("a", SYM, "b"), ("a/c/d", DIR, b"")], "no directory"),
            ([("a", SYM, "/etc")], "leads out of it"),
            ([("a", SYM, "..")], "leads out of it"),
            ([("lib/a", SYM, "../../x")], "leads out of it"),
            ([("lib/a", SYM, "..//..//x")], "leads out of it"),
            ([("lib/a", SYM, "")], "leads out of it"),
            # in the tree by its letters, and out of it where `b` is a link upwards
            ([("lib/a", SYM, "b/../../x")], "leads out of it"),
            ([("lib/a", SYM, "./..")], "leads out of it"),
            ([("lib/a", LINK, "lib/b")], "no file that stands before"),
            ([("lib/a", LINK, "lib/b"), ("lib/b", FILE, b"")], "no file that stands before"),
            ([("lib/b", SYM, "c"), ("lib/a", LINK, "lib/b")], "no file that stands before"),
            ([("lib", DIR, b""), ("a", LINK, "lib")], "no file that stands before"),
            ([("a", LINK, "../b")], "leads out of it"),
            ([("a", LINK, "/etc/passwd")], "leads out of it"),
            ([("null", tarfile.CHRTYPE, b"")], "a character device"),
            ([("disk", tarfile.BLKTYPE, b"")], "a block device"),
            ([("pipe", tarfile.FIFOTYPE, b"")], "a FIFO"),
        ],
    )
    def test_refused(self, infos, words):
        with pytest.raises(ArtifactRejected, match=words) as caught:
            names(written(*infos))
        assert caught.value.hint

    def test_a_name_with_a_nul(self):
        record = b"13 path=a\0/b\n"
        head = bytearray(written(("pax", FILE, record)))
        head[156:157] = b"x"
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head[:512])
        with pytest.raises(ArtifactRejected, match="leads out of it, or nowhere"):
            names(bytes(head[:1024]) + written(("a", FILE, b"")))

    def test_the_number_of_members_is_bounded(self):
        data = written(*((f"{number}", FILE, b"") for number in range(10)))
        assert len(names(data, members_max=11)) == 10
        with pytest.raises(ArtifactRejected, match="more than 9"):
            names(data, members_max=9)
        # directories that are implied, and those that are repeated, take memory too
        with pytest.raises(ArtifactRejected, match="more than 9"):
            names(written(("/".join("abcdefghij"), FILE, b"")), members_max=9)
        with pytest.raises(ArtifactRejected, match="more than 9 members"):
            names(written(*[("a", DIR, b"")] * 10), members_max=9)

    def test_no_tar(self):
        with pytest.raises(ArtifactRejected, match="no header of a tar archive"):
            names(b"no tar" * 1000)


class TestReplaced:
    @pytest.fixture
    def tree(self, tmp_path) -> Path:
        """A tree with owners, modes, times, extended attributes and a long name."""
        lib = tmp_path / "tree/lib"
        deep = lib / ("d" * 120)
        deep.mkdir(parents=True)
        for path, content in ((lib / "a.ko", b"a" * 1000), (lib / "plain", b"b" * 511), (deep / "c.ko", b"")):
            path.write_bytes(content)
        (lib / "a.ko").chmod(0o4755)
        (lib / "link").symlink_to("a.ko")
        return tmp_path / "tree"

    @pytest.mark.parametrize("form", ["gnu", "pax"])
    def test_all_else_stays(self, tree, form):
        data = subprocess.run(
            ["tar", "-c", "--sort=name", f"--format={form}", "--owner=me:7", "--group=us:8", "./lib"],
            cwd=tree, capture_output=True, check=True,
        ).stdout  # fmt: skip
        archive = archives.read(Upload(data, "a.tar", len(data)), ArchiveLimits())
        long = next(member.name for member in archive.members if member.name.endswith(b"c.ko"))
        nothing = archive.replaced({}, "a.tar")
        assert b"".join(nothing.chunks(1000)) == data
        signed = archive.replaced({b"./lib/a.ko": (whole(b"a" * 1000), b"sig"), long: (b"s" * 512,)}, "a.tar")
        result = b"".join(signed.chunks(1000))
        assert len(result) == signed.size
        assert len(result) % 10240 == 0
        with tarfile.open(fileobj=io.BytesIO(data)) as before, tarfile.open(fileobj=io.BytesIO(result)) as after:
            for old, new in zip(before, after, strict=True):
                for field in FIELDS:
                    assert getattr(old, field) == getattr(new, field)
            contents = {member.name: after.extractfile(member).read() for member in after if member.isreg()}
        assert contents == {"./lib/a.ko": b"a" * 1000 + b"sig", "./lib/plain": b"b" * 511, long.decode(): b"s" * 512}

    @pytest.mark.parametrize("form", ["gnu", "pax"])
    @pytest.mark.parametrize("name", ["./lib/b.ta", "./" + "long/" * 30 + "b.ta"])
    def test_members_get_other_names_or_are_left_out(self, tree, form, name):
        command = ["tar", "-c", "--sort=name", f"--format={form}", "--owner=me:7", "--group=us:8", "./lib"]
        data = subprocess.run(command, cwd=tree, capture_output=True, check=True).stdout
        archive = archives.read(Upload(data, "a.tar", len(data)), ArchiveLimits())
        deep = next(member.name for member in archive.members if member.name.endswith(b"c.ko"))
        contents = {b"./lib/a.ko": (whole(b"signed"),), deep: (b"deep",)}
        names = {b"./lib/a.ko": name.encode(), deep: b"./lib/c.ta"}
        signed = archive.replaced(contents, "a.tar", names=names, without={b"./lib/plain", b"./lib/link"})
        result = b"".join(signed.chunks(1000))
        assert len(result) % 10240 == 0
        with tarfile.open(fileobj=io.BytesIO(data)) as before, tarfile.open(fileobj=io.BytesIO(result)) as after:
            old, new = before.getmember("./lib/a.ko"), after.getmember(name)
            for field in ("mode", "uid", "gid", "uname", "gname", "type"):
                assert getattr(old, field) == getattr(new, field)
            assert new.mtime == int(old.mtime)
            contents = {member.name: after.extractfile(member).read() for member in after if member.isreg()}
        assert contents == {name: b"signed", "./lib/c.ta": b"deep"}

    def test_pieces_are_read_at_any_place(self, tmp_path):
        path = tmp_path / "file"
        path.write_bytes(b"0123456789")
        parts = (b"ab", b"", FileRange(Upload(path, "f", 10), 2, 5), b"", b"xyz")
        pieces, all_ = Pieces(parts), b"ab23456xyz"
        assert pieces.size == len(all_)
        for offset in range(len(all_) + 2):
            for length in range(len(all_) + 2):
                assert pieces.read_at(offset, length) == all_[offset : offset + length]
        assert pieces.cut(2, 5) == (parts[2],)
        assert Pieces(()).read_at(0, 5) == b""


class TestCompression:
    @EVERY
    @pytest.mark.parametrize("content", [b"", b"x", CONTENT], ids=["empty", "short", "long"])
    def test_what_the_tool_packs_is_unpacked(self, scratch, compression, content):
        packed = tool(compression, data=content)
        assert archives.compression_of(packed[: archives.HEAD_BYTES]) is compression
        upload = scratch.unpack(whole(packed), compression)
        assert upload.content.read_bytes() == content
        assert upload.size == len(content)

    @EVERY
    @pytest.mark.parametrize("content", [b"", b"x", CONTENT], ids=["empty", "short", "long"])
    def test_the_tool_unpacks_what_is_packed(self, scratch, compression, content):
        signed = Signed((content[:5], whole(content[5:])), "")
        packed = scratch.pack(signed, compression)
        assert tool(compression, "-d", data=packed.content.read_bytes()) == content
        assert archives.holds(packed, compression, signed)
        assert not archives.holds(packed, compression, Signed((content + b"!",), ""))
        assert scratch.pack(signed, compression).content.read_bytes() == packed.content.read_bytes()

    def test_the_kernel_can_unpack_its_xz(self, scratch):
        """Its decoder knows the check crc32 alone."""
        packed = scratch.pack(Signed((CONTENT,), ""), XZ)
        listing = subprocess.run(["xz", "-l", "-v", "-v", packed.content.rename(packed.content.with_suffix(".xz"))],
                                 capture_output=True, check=True).stdout  # fmt: skip
        assert b"CRC32" in listing
        assert b"dict=1MiB" in listing

    @EVERY
    def test_several_streams_in_one_file(self, scratch, compression):
        packed = b"".join(tool(compression, data=each) for each in (b"one ", b"", b"two"))
        assert scratch.unpack(whole(packed), compression).content.read_bytes() == b"one two"

    @EVERY
    @pytest.mark.parametrize("change", ["cut", "flip", "trailing"])
    def test_broken(self, scratch, compression, change):
        packed = bytearray(tool(compression, data=CONTENT))
        if change == "cut":
            del packed[-5:]
        elif change == "flip":
            packed[len(packed) // 2] ^= 0xFF
        else:
            packed += b"something else"
        with pytest.raises(ArtifactRejected, match="broken or cut off") as caught:
            scratch.unpack(whole(bytes(packed)), compression)
        assert compression.name in caught.value.message

    @EVERY
    @settings(max_examples=60)
    @given(data=st.data())
    def test_damage_ends_in_content_or_the_own_error(self, compression, data):
        packed = bytearray(tool_output(compression))
        for _ in range(data.draw(st.integers(0, 3))):
            packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
        del packed[data.draw(st.integers(0, len(packed))) :]
        with contextlib.suppress(ArtifactRejected):
            list(archives.unpacked(iter([bytes(packed)] if packed else []), compression))

    @EVERY
    def test_a_bomb_is_cut_off(self, scratch, compression):
        bomb = b"".join(archives.packed((bytes(1 << 20) for _ in range(64)), 64 << 20, compression))
        tracemalloc.start()
        with pytest.raises(ArtifactRejected, match="more than 100 times its own size"):
            scratch.unpack(whole(bomb), compression)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20
        assert sum(path.stat().st_size for path in scratch_files(scratch)) <= archives.SMALL_BYTES

    def test_all_that_a_job_unpacks_is_bounded(self, tmp_path):
        scratch = Scratch(tmp_path, ArchiveLimits(unpacked_max_bytes=2500))
        packed = whole(gzip.compress(bytes(1000)))
        scratch.unpack(packed, GZIP)
        scratch.unpack(packed, GZIP)
        with pytest.raises(ArtifactRejected, match="more than 2500 bytes"):
            scratch.unpack(packed, GZIP)

    def test_streams_are_counted(self, scratch):
        many = gzip.compress(b"") * (archives.STREAMS_MAX + 1)
        with pytest.raises(ArtifactRejected, match="broken"):
            scratch.unpack(whole(many), GZIP)

    def test_what_needs_too_much_memory(self, scratch):
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 28}]
        greedy = lzma.compress(b"x", filters=filters)
        with pytest.raises(ArtifactRejected, match="needs too much memory"):
            scratch.unpack(whole(greedy), XZ)
        with pytest.raises(ArtifactRejected, match="needs too much memory"):
            scratch.unpack(whole(WIDE_ZSTD), ZSTD)

    def test_threads_share_the_scratch(self, scratch):
        packed, results = whole(gzip.compress(CONTENT)), []
        threads = [threading.Thread(target=lambda: results.append(scratch.unpack(packed, GZIP))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({upload.content for upload in results}) == 4
        scratch.remove(results[0])
        assert len(scratch_files(scratch)) == 3


_OUTPUTS: dict[str, bytes] = {}


def tool_output(compression) -> bytes:
    return _OUTPUTS.setdefault(compression.name, tool(compression, data=b"some content\n" * 50))


def scratch_files(scratch: Scratch) -> list[Path]:
    return list(scratch._directory.iterdir())


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_archive_ends_in_members_or_the_own_error(data):
    archive = bytearray(written(("lib/a.ko", FILE, b"x" * 600), ("lib/b", SYM, "a.ko"), ("lib/c", LINK, "lib/a.ko")))
    for _ in range(data.draw(st.integers(1, 3))):
        block = data.draw(st.sampled_from([0, 1536, 2048]))
        at = block + data.draw(st.integers(0, 344))
        patch = data.draw(st.binary(max_size=8) | st.sampled_from([b"../", b"/", b"./lib/a.ko"]))
        archive[at : at + len(patch)] = patch
        archive[block + 148 : block + 156] = b" " * 8
        archive[block + 148 : block + 156] = b"%06o\0 " % sum(archive[block : block + 512])
    with contextlib.suppress(ArtifactRejected):
        found = names(bytes(archive))
        assert not any(name.startswith(("/", "../")) or "/../" in name for name in found)
