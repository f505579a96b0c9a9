"""Kernel modules: real ones of Debian's, held against the kernel's own sign-file, OpenSSL and modinfo."""

import asyncio
import contextlib
import gzip
import io
import lzma
import os
import subprocess
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from signers import archives, kmod
from signers.archives import ArchiveLimits
from signers.formats import cms
from signers.kmod import Kmod, KmodForm
from signers.signer import Job, Upload
from tests.conftest import ROOT
from tokens.errors import ArtifactRejected, Error, KeyUnsuited, KeyUnusable, ProviderBusy, SignatureMismatch
from tokens.schemes import Hash

MODULES = ROOT / ".cache/modules/lib/modules"
SIGN_FILE = "/usr/lib/linux-kbuild-6.1/scripts/sign-file"
MARKER = b"~Module signature appended~\n"
HASHES = ["sha256", "sha384", "sha512", "sha3-256", "sha3-384", "sha3-512"]
PACKERS = {"": ("cat",), ".gz": ("gzip", "-n"), ".xz": ("xz",), ".zst": ("zstd", "-q")}
RELATIVE = "lib/modules/6.1/kernel/"

ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x01\x00" + b"no real module\n" * 10


def without_signature(data: bytes) -> bytes:
    """As the kernel takes it apart, in as few words as it can be said."""
    assert data.endswith(MARKER)
    return data[: -len(MARKER) - 12 - int.from_bytes(data[-len(MARKER) - 4 : -len(MARKER)], "big")]


def packed(suffix: str, data: bytes) -> bytes:
    return subprocess.run([*PACKERS[suffix], "-"], input=data, capture_output=True, check=True).stdout


def unpacked(suffix: str, data: bytes) -> bytes:
    decompress = ("-d",) if suffix else ()
    command = [*PACKERS[suffix], *decompress, "-"]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


@pytest.fixture(scope="session")
def real() -> list[Path]:
    """A few modules as Debian signed them."""
    assert MODULES.is_dir(), f"{MODULES} is missing: run `make setup`"
    found = sorted(MODULES.glob("*/kernel/fs/**/*.ko"))[:20]
    assert len(found) == 20
    return found


@pytest.fixture
def sign(tmp_path, keys_of) -> Callable[..., bytes]:
    """Signs an artifact with a pair; the answer's bytes."""

    def run(pair: Any, content: bytes, filename: str = "a.ko", limits: ArchiveLimits | None = None, **fields) -> bytes:
        upload = Upload(content, filename, len(content))
        directory = Path(tempfile.mkdtemp(prefix="job-", dir=tmp_path))

        async def signed() -> bytes:
            job = Job(lambda: directory, keys_of(pair), asyncio.to_thread, settings=limits)
            signed = await Kmod().sign(KmodForm(machine="board", artifact=upload, **fields), job)
            assert signed.filename == filename.rpartition("/")[2]
            answer = b"".join(signed.chunks(100_000))
            assert len(answer) == signed.size
            return answer

        return asyncio.run(signed())

    return run


@pytest.fixture
def sign_file(tmp_path) -> Callable[..., bytes]:
    """What the kernel's own tool makes of a module without a signature."""

    def run(pair: Any, hash_: str, content: bytes) -> bytes:
        for name, data in (("key", pair.private_pem), ("cert", pair.certificate_pem), ("mod.ko", content)):
            (tmp_path / name).write_bytes(data)
        subprocess.run([SIGN_FILE, hash_, "key", "cert", "mod.ko", "signed.ko"], cwd=tmp_path, check=True)
        return (tmp_path / "signed.ko").read_bytes()

    return run


@pytest.fixture
def cms_accepts(tmp_path, openssl) -> Callable[..., bool]:
    """Whether OpenSSL finds a signature of the pair's key behind a module."""

    def check(pair: Any, signed: bytes) -> bool:
        content = without_signature(signed)
        (tmp_path / "content").write_bytes(content)
        (tmp_path / "p7").write_bytes(signed[len(content) : -len(MARKER) - 12])
        (tmp_path / "cert.pem").write_bytes(pair.certificate_pem)
        line = "cms -verify -binary -inform DER -in p7 -content content -certfile cert.pem -nointern -noverify -out out"
        return openssl(line, check=False).returncode == 0

    return check


def tree(files: dict[str, bytes], **options: Any) -> bytes:
    """A tar archive."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", **options) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode, info.uid, info.uname = len(content), 1_700_000_000, 0o640, 7, "me"
            archive.addfile(info, io.BytesIO(content))
    return output.getvalue()


SMALL_TREE = tree({"./lib/a.ko": ELF, "./lib/b.ko.xz": lzma.compress(ELF), "./lib/c.ko": ELF + bytes(12) + MARKER})


def files(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as reader:
        return {member.name: reader.extractfile(member).read() for member in reader if member.isreg()}


class TestModules:
    @pytest.mark.parametrize("kind", ["rsa2048", "rsa3072"])
    @pytest.mark.parametrize("hash_", HASHES)
    def test_identical_to_sign_file(self, pairs, real, sign, sign_file, kind, hash_):
        came = real[0].read_bytes()
        signed = sign(pairs[kind], came, hashalg=hash_)
        assert signed == sign_file(pairs[kind], hash_, without_signature(came))
        assert signed != came

    def test_an_unsigned_module_and_one_signed_twice(self, pairs, real, sign, sign_file):
        came = real[1].read_bytes()
        expected = sign_file(pairs["rsa2048"], "sha512", without_signature(came))
        assert sign(pairs["rsa2048"], without_signature(came)) == expected
        assert sign(pairs["rsa2048"], sign_file(pairs["rsa3072"], "sha256", came)) == expected
        assert sign(pairs["rsa2048"], expected) == expected

    @pytest.mark.parametrize("kind", ["p256", "p384"])
    @pytest.mark.parametrize("hash_", HASHES[:3])
    def test_openssl_accepts_ecdsa_and_refuses_what_was_tampered_with(
        self, pairs, real, sign, cms_accepts, kind, hash_
    ):
        signed = sign(pairs[kind], real[0].read_bytes(), hashalg=hash_)
        content = without_signature(signed)
        assert content == without_signature(real[0].read_bytes())
        assert cms_accepts(pairs[kind], signed)
        assert not cms_accepts(pairs[kind], signed.replace(content, b"\x7fELG" + content[4:]))
        assert not cms_accepts(pairs["rsa2048"], signed)

    @pytest.mark.parametrize(("kind", "hash_"), [("p256", "sha256"), ("p384", "sha512")])
    def test_ecdsa_as_sign_file_has_it(self, pairs, sign, sign_file, openssl, tmp_path, kind, hash_):  # noqa: PLR0917
        # all but the random signature itself
        shown = []
        for each in (sign(pairs[kind], ELF, hashalg=hash_), sign_file(pairs[kind], hash_, ELF)):
            (tmp_path / "message").write_bytes(each[len(ELF) : -len(MARKER) - 12])
            shown.append(
                openssl("cms -cmsout -inform DER -in message -print -noout").stdout.partition(b"signature:")[0]
            )
        assert shown[0] == shown[1] != b""

    @pytest.mark.parametrize("suffix", PACKERS)
    def test_a_single_compressed_module(self, pairs, real, sign, sign_file, suffix):
        came = real[0].read_bytes()
        answer = sign(pairs["rsa2048"], packed(suffix, came), f"some/where/fs.ko{suffix}")
        assert unpacked(suffix, answer) == sign_file(pairs["rsa2048"], "sha512", without_signature(came))

    def test_modinfo_reads_it(self, pairs, real, sign, tmp_path):
        for suffix in ("", ".xz"):
            path = tmp_path / f"fs.ko{suffix}"
            path.write_bytes(sign(pairs["rsa2048"], packed(suffix, real[0].read_bytes()), path.name, hashalg="sha384"))
            shown = subprocess.run(["/usr/sbin/modinfo", path], capture_output=True, text=True, check=True).stdout
            assert "signer:         hsmsign test rsa2048\n" in shown
            assert "sig_hashalgo:   sha384\n" in shown
            assert "sig_id:         PKCS#7\n" in shown

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"#!/bin/sh\n", "it is no ELF file"),
            (b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00", "no relocatable one"),
            (MARKER, "nothing but a signature"),
            (ELF + b"\xff" * 12 + MARKER, "longer than it can be"),
            (gzip.compress(b"no module"), "it is no ELF file"),
            (gzip.compress(ELF)[:-4], "broken or cut off"),
        ],
        ids=["script", "program", "marker", "length", "text in gzip", "cut off"],
    )
    def test_what_is_no_module_is_refused(self, pairs, sign, content, words):
        with pytest.raises(ArtifactRejected, match=words) as caught:
            sign(pairs["rsa2048"], content, "x\nname.ko")
        assert caught.value.hint
        assert "\n" not in caught.value.message

    @pytest.mark.parametrize("kind", ["p521", "ed25519"])
    def test_keys_that_no_kernel_verifies_by(self, pairs, sign, kind):
        with pytest.raises(KeyUnsuited, match="RSA, P-256 and P-384"):
            sign(pairs[kind], ELF)

    def test_a_key_without_its_certificate(self, pairs, sign):
        bare = type(pairs["p256"])(pairs["p256"].private_key, (), pairs["p256"].threads)
        with pytest.raises(KeyUnusable, match="needs the key's certificate"):
            sign(bare, ELF)


class TestTrees:
    @pytest.mark.parametrize("outer", PACKERS)
    def test_modules_of_every_kind_in_archives_of_every_kind(self, pairs, real, sign, sign_file, tmp_path, outer):
        contents = [path.read_bytes() for path in real[:8]]
        came: dict[str, bytes] = {f"./{RELATIVE}modules.order": b"text\n", f"./{RELATIVE}fake.ko.txt": b"no module"}
        for number, content in enumerate(contents):
            suffix = list(PACKERS)[number % 4]
            came[f"./{RELATIVE}{number}.ko{suffix}"] = packed(suffix, content)
        answer = sign(pairs["rsa2048"], packed(outer, tree(came)), f"modules.tar{outer}", hashalg="sha256")
        signed = files(unpacked(outer, answer))
        assert list(signed) == list(came)
        assert {name for name in came if signed[name] == came[name]} == set(list(came)[:2])
        for number, content in enumerate(contents):
            suffix = list(PACKERS)[number % 4]
            expected = sign_file(pairs["rsa2048"], "sha256", without_signature(content))
            assert unpacked(suffix, signed[f"./{RELATIVE}{number}.ko{suffix}"]) == expected
        # what was unpacked is gone again, but for what the answer is made of
        left = list(tmp_path.glob("job-*/*"))
        assert len(left) <= (2 if outer else 0) + 6

    def test_a_tree_of_gnu_tar_keeps_all_that_it_says(self, pairs, real, sign, tmp_path):
        directory = tmp_path / "tree" / RELATIVE
        directory.mkdir(parents=True)
        for path in real:
            (directory / path.name).write_bytes(path.read_bytes())
        (directory / "link.ko").symlink_to(real[0].name)
        (directory / "hard.ko").hardlink_to(directory / real[0].name)
        command = ["tar", "-c", "--owner=me:7", "--mode=u+s", "./lib"]
        archive = subprocess.run(command, cwd=tmp_path / "tree", capture_output=True, check=True).stdout
        answer = sign(pairs["rsa2048"], archive, "modules.tar")
        with tarfile.open(fileobj=io.BytesIO(archive)) as before, tarfile.open(fileobj=io.BytesIO(answer)) as after:
            for old, new in zip(before, after, strict=True):
                for field in ("name", "mode", "uid", "gid", "uname", "gname", "mtime", "type", "linkname"):
                    assert getattr(old, field) == getattr(new, field)
                assert new.size != old.size or not old.isreg()
        extracted = tmp_path / "extracted"
        extracted.mkdir()
        subprocess.run(["tar", "-x", "--no-same-owner"], cwd=extracted, input=answer, check=True)
        assert (extracted / RELATIVE / "hard.ko").samefile(extracted / RELATIVE / real[0].name)

    def test_more_modules_than_are_worked_on_at_once(self, pairs, sign, sign_file):
        count = 3 * kmod.BATCH_MODULES * kmod.BATCHES_AT_ONCE + 1
        came = {f"./{number}.ko": ELF + b"%d" % number for number in range(count)}
        signed = files(sign(pairs["rsa2048"], tree(came), "modules.tar"))
        assert list(signed) == list(came)
        assert {name: without_signature(each) for name, each in signed.items()} == came
        assert signed["./7.ko"] == sign_file(pairs["rsa2048"], "sha512", came["./7.ko"])

    def test_the_same_again_is_the_same(self, pairs, sign):
        archive = gzip.compress(tree({"./a.ko": ELF, "./b.ko.xz": packed(".xz", ELF)}))
        assert sign(pairs["rsa2048"], archive, "a.tgz") == sign(pairs["rsa2048"], archive, "a.tgz")

    @pytest.mark.parametrize(
        ("archive", "words"),
        [
            (tree({}), "no header of a tar|no ELF file"),
            (tree({"./README": b"text"}), "holds no kernel module"),
            (tree({"./a.ko": ELF, "./b.ko": b"text"}), r"'./b.ko' cannot be signed: it is no ELF file"),
            (tree({"./a.ko.gz": ELF}), "broken or cut off"),
            (tree({"./a.ko": gzip.compress(ELF)}), "it is no ELF file"),
            (tree({"../a.ko": ELF}), "leads out of it"),
            (tree({"a.ko": ELF, "./a.ko": ELF}), "there twice"),
            (gzip.compress(tree({"./a.ko": ELF}))[:-9], "broken or cut off"),
            (tree({"./a.ko": ELF})[:-10240], "cut off|no ELF"),
        ],
    )
    def test_refused(self, pairs, sign, archive, words):
        with pytest.raises(ArtifactRejected, match=words):
            sign(pairs["rsa2048"], archive, "modules.tar")

    @pytest.mark.parametrize(("name", "link"), [("a.bin", "./a.ko"), ("b.ko", "./c.bin"), ("a.ko.xz", "./a.ko")])
    def test_a_hard_link_is_a_module_exactly_where_its_file_is(self, pairs, sign, name, link):
        output = io.BytesIO(tree({"./a.ko": ELF, "./c.bin": b""}))
        with tarfile.open(fileobj=output, mode="a") as archive:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, link
            archive.addfile(info)
        with pytest.raises(ArtifactRejected, match="has another suffix than its file"):
            sign(pairs["rsa2048"], output.getvalue(), "modules.tar")

    def test_limits(self, pairs, sign):
        came = {"./a.ko.gz": gzip.compress(ELF), "./b.ko.gz": gzip.compress(ELF)}
        with pytest.raises(ArtifactRejected, match="more than 200 bytes"):
            sign(pairs["rsa2048"], tree(came), "a.tar", ArchiveLimits(unpacked_max_bytes=200))
        with pytest.raises(ArtifactRejected, match="more than 1 "):
            sign(pairs["rsa2048"], tree(came), "a.tar", ArchiveLimits(members_max=1))


class TestLargeAndHostile:
    @pytest.mark.parametrize("compress", [False, True])
    async def test_memory_does_not_grow_with_the_archive(self, pairs, tmp_path, compress):
        path = tmp_path / "tree.tar"
        path.write_bytes(tree({"./firmware.bin": os.urandom(24 << 20), "./a.ko": ELF, "./b.ko.gz": gzip.compress(ELF)}))
        if compress:
            subprocess.run(["gzip", "-1", path], check=True)
            path = tmp_path / "tree.tar.gz"
        (tmp_path / "job").mkdir()
        form = KmodForm(machine="board", artifact=Upload(path, path.name, path.stat().st_size))
        tracemalloc.start()
        signed = await Kmod().sign(form, job(tmp_path / "job", pairs["p256"].key))
        size = sum(map(len, signed.chunks(1 << 20)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert size == signed.size > 24 << 20
        assert peak < 12 << 20

    @settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_damage_ends_in_modules_or_the_own_error(self, pairs, data, tmp_path):
        content = data.draw(st.sampled_from([SMALL_TREE, gzip.compress(SMALL_TREE), ELF, gzip.compress(ELF)]))
        damaged = bytearray(content)
        for _ in range(data.draw(st.integers(0, 3))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        del damaged[data.draw(st.integers(1, len(damaged))) :]
        directory = Path(tempfile.mkdtemp(dir=tmp_path))
        scratch = archives.Scratch(directory, ArchiveLimits())
        signing = kmod._Signing(pairs["rsa2048"].key, Hash.SHA256, scratch)
        with contextlib.suppress(ArtifactRejected):
            artifact, _ = kmod._read(Upload(bytes(damaged), "a", len(damaged)), scratch)
            for each in artifact.modules:
                signing.prepare(each)


class FailingKey:
    """A key whose every signature after the first few fails."""

    def __init__(self, key: Any, good: int) -> None:
        self.public_key, self.certificates = key.public_key, key.certificates
        self._key, self.good = key, good

    async def sign(self, scheme: Any, data: bytes) -> bytes:
        self.good -= 1
        if self.good < 0:
            raise ProviderBusy("The token is busy.")
        return await self._key.sign(scheme, data)


class OtherKey(FailingKey):
    """A key that signs with another one."""

    async def sign(self, scheme: Any, data: bytes) -> bytes:
        return await self._key.sign(scheme, data)


class MixedKey(FailingKey):
    """A key that fails in both ways at the same moment."""

    async def sign(self, scheme: Any, data: bytes) -> bytes:
        self.good += 1
        if self.good % 2:
            raise ProviderBusy("The token is busy.")
        raise SignatureMismatch("It does not verify.")


def job(tmp_path: Path, key: Any) -> Job:
    class Keys:
        def open(self, *_: Any, **__: Any) -> Any:
            return Opened(key)

    return Job(lambda: tmp_path, Keys(), asyncio.to_thread)


class Opened:
    def __init__(self, key: Any) -> None:
        self._key = key

    async def __aenter__(self) -> Any:
        return self._key

    async def __aexit__(self, *_: object) -> None:
        pass


class TestBeforeRelease:
    ARCHIVE = tree({f"./{number}.ko": ELF for number in range(100)})

    async def refusal(self, tmp_path: Path, key: Any) -> Error:
        form = KmodForm(machine="board", artifact=Upload(self.ARCHIVE, "a.tar", len(self.ARCHIVE)))
        with pytest.raises(Error) as caught:
            await Kmod().sign(form, job(tmp_path, key))
        return caught.value

    async def test_one_signature_that_fails_fails_the_request(self, pairs, tmp_path):
        assert type(await self.refusal(tmp_path, FailingKey(pairs["p256"].key, 50))) is ProviderBusy

    async def test_one_that_does_not_verify_is_told_before_those_that_fail(self, pairs, tmp_path):
        assert type(await self.refusal(tmp_path, MixedKey(pairs["p256"].key, 0))) is SignatureMismatch

    async def test_another_key_s_signature_is_not_released(self, pairs, tmp_path):
        other = OtherKey(pairs["rsa2048"].key, 0)
        other.certificates = pairs["rsa3072"].certificates
        assert type(await self.refusal(tmp_path, other)) is SignatureMismatch

    async def test_a_message_with_another_signature_is_not_released(self, pairs, tmp_path, monkeypatch):
        real = cms.Message.assemble
        monkeypatch.setattr(cms.Message, "assemble", lambda self, data, signature: real(self, data, signature[::-1]))
        assert type(await self.refusal(tmp_path, pairs["rsa2048"].key)) is SignatureMismatch

    @pytest.mark.parametrize(
        "change",
        [
            lambda parts: {},
            lambda parts: {name: (whole, signature + b"!") for name, (whole, signature) in parts.items()},
            lambda parts: dict(zip(parts, list(parts.values())[::-1], strict=True)),
        ],
        ids=["as they came", "with more behind them", "in other places"],
    )
    async def test_modules_that_are_not_what_was_verified_are_not_released(self, pairs, tmp_path, monkeypatch, change):
        real = archives.Archive.replaced
        monkeypatch.setattr(
            archives.Archive, "replaced", lambda self, parts, filename: real(self, change(parts), filename)
        )
        assert type(await self.refusal(tmp_path, pairs["rsa2048"].key)) is SignatureMismatch

    async def test_what_does_not_unpack_again_is_not_released(self, pairs, tmp_path, monkeypatch):
        def other(chunks: Any, size: int, compression: Any) -> Sequence[bytes]:
            return [gzip.compress(b"something else")]

        monkeypatch.setattr(archives, "packed", other)
        for number, archive in enumerate((gzip.compress(self.ARCHIVE), tree({"./a.ko.gz": gzip.compress(ELF)}))):
            (tmp_path / f"{number}").mkdir()
            form = KmodForm(machine="board", artifact=Upload(archive, "a.tgz", len(archive)))
            with pytest.raises(SignatureMismatch, match="does not unpack"):
                await Kmod().sign(form, job(tmp_path / f"{number}", pairs["rsa2048"].key))
