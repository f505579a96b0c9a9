"""Mender artifacts, written and validated by Debian's mender-artifact."""

import asyncio
import base64
import hashlib
import io
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from signers.formats import mender
from signers.mender import Mender, MenderForm, MenderSettings
from signers.signer import Job, Upload
from tokens.errors import ArtifactRejected, KeyUnsuited, ProviderBusy, SignatureMismatch, SigningFailed
from tokens.keyfile import MemoryKey

PAYLOAD = hashlib.shake_256(b"payload").digest(300_000)
SCRIPT = b"#!/bin/sh\nexit 0\n"
WRITTEN = {
    "gzip": ("module-image", "-T", "module", "-f", "payload.bin", "-f", "b.txt", "-s", "ArtifactInstall_Enter_00"),
    "none": ("module-image", "-T", "module", "-f", "payload.bin", "--compression", "none"),
    "lzma": ("module-image", "-T", "module", "-f", "payload.bin", "--compression", "lzma"),
    "augmented": (
        "module-image", "-T", "module", "-f", "payload.bin", "--augment-type", "module", "--augment-file", "b.txt",
    ),
    "rootfs": ("rootfs-image", "-f", "payload.bin"),
    "v2": ("rootfs-image", "-f", "payload.bin", "-v", "2"),
    "bootstrap": ("bootstrap-artifact",),
}  # fmt: skip
KEYS = ["rsa2048", "rsa3072", "p256"]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Artifacts of every kind."""
    directory = tmp_path_factory.mktemp("mender")
    for name, content in (("payload.bin", PAYLOAD), ("b.txt", b"b\n"), ("ArtifactInstall_Enter_00", SCRIPT)):
        (directory / name).write_bytes(content)
    for kind, options in WRITTEN.items():
        command = ["mender-artifact", "write", *options, "-n", "release-1", "-t", "board", "-o", f"{kind}.mender"]
        subprocess.run(command, cwd=directory, capture_output=True, check=True)
    return {kind: (directory / f"{kind}.mender").read_bytes() for kind in WRITTEN}


def tree(artifact: bytes) -> dict[str, bytes]:
    """The members of a tar archive, in their order."""
    with tarfile.open(fileobj=io.BytesIO(artifact)) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def built(members: dict[str, bytes], **fields: Any) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return output.getvalue()


def artifact(files: dict[str, bytes], pack: Callable[[bytes], bytes] = bytes, suffix: str = "", **more: bytes) -> bytes:
    """An artifact with a payload of these files; `more` replaces members."""
    payload, header = pack(built(files)), pack(built({"header-info": b"{}"}))
    version = b'{"format":"mender","version":3}'
    sums = {f"data/0000/{name}": content for name, content in files.items()}
    sums |= {f"header.tar{suffix}": header, "version": version}
    manifest = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sums.items())
    members = {"version": version, "manifest": manifest.encode(), f"header.tar{suffix}": header}
    members[f"data/0000.tar{suffix}"] = payload
    return built(members | more)


@pytest.fixture
def validate(tmp_path: Path) -> Callable[[bytes, Any], bool]:
    """What `mender-artifact validate` says of an artifact, by a public key."""

    def run(artifact: bytes, pair: Any) -> bool:
        (tmp_path / "checked.mender").write_bytes(artifact)
        (tmp_path / "public.pem").write_bytes(pair.public_pem)
        command = ["mender-artifact", "validate", "-k", "public.pem", "checked.mender"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, check=False)
        return done.returncode == 0

    return run


@pytest.fixture
def sign(tmp_path: Path, keys_of: Any) -> Callable[..., bytes]:
    """Signs an artifact with a pair; the answer's bytes."""

    def run(pair: Any, content: bytes | Path, settings: MenderSettings | None = None, **fields: Any) -> bytes:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        upload = Upload(content, "build/release.mender", size)

        async def signed() -> bytes:
            job = Job(lambda: tmp_path, keys_of(pair), asyncio.to_thread, settings=settings)
            signed = await Mender().sign(MenderForm(distro="poky", artifact=upload, **fields), job)
            assert signed.filename == "release.mender"
            return b"".join(signed.chunks(100_000))

        return asyncio.run(signed())

    return run


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("kind", WRITTEN)
def test_mender_artifact_accepts_what_is_signed_and_nothing_else(
    pairs: Any, written: dict[str, bytes], sign: Any, validate: Any, kind: str, key: str
) -> None:
    pair = pairs[key]
    signed = sign(pair, written[kind])
    assert validate(signed, pair)
    assert not validate(signed, pairs["p256" if key != "p256" else "rsa2048"])
    assert not validate(written[kind], pair)
    members = tree(signed)
    signature = members.pop("manifest.sig")
    assert members == tree(written[kind])
    assert list(tree(signed))[:3] == ["version", "manifest", "manifest.sig"]
    for name, content in (("manifest.sig", signature), ("manifest", members["manifest"])):
        other = bytes([content[0] ^ 1]) + content[1:]
        tampered = signed.replace(content, other)
        assert tampered != signed
        assert not validate(tampered, pair), name


def test_the_signature_is_the_one_of_mender_artifact(
    pairs: Any, written: dict[str, bytes], sign: Any, tmp_path: Path
) -> None:
    # 3.9.0 reads no PKCS#8
    command = ["openssl", "rsa", "-traditional", "-out", "key.pem"]
    subprocess.run(command, cwd=tmp_path, input=pairs["rsa2048"].private_pem, capture_output=True, check=True)
    (tmp_path / "theirs.mender").write_bytes(written["gzip"])
    subprocess.run(
        ["mender-artifact", "sign", "-k", "key.pem", "theirs.mender"], cwd=tmp_path, capture_output=True, check=True
    )
    theirs = (tmp_path / "theirs.mender").read_bytes()
    ours = sign(pairs["rsa2048"], written["gzip"])
    assert tree(ours) == tree(theirs)
    # theirs is a good signature of this key, and stays as it is
    assert sign(pairs["rsa2048"], theirs) == theirs


def test_an_ecdsa_signature_is_r_and_s(pairs: Any, written: dict[str, bytes], sign: Any) -> None:
    assert len(base64.b64decode(tree(sign(pairs["p256"], written["none"]))["manifest.sig"], validate=True)) == 64


@pytest.mark.parametrize("key", KEYS)
def test_a_repeated_request_changes_nothing(pairs: Any, written: dict[str, bytes], sign: Any, key: str) -> None:
    signed = sign(pairs[key], written["v2"])
    assert sign(pairs[key], signed) == signed
    assert sign(pairs[key], signed, force=True) == signed


def test_a_signature_of_another_key_is_replaced_where_that_is_asked(
    pairs: Any, written: dict[str, bytes], sign: Any, validate: Any
) -> None:
    for kind in ("gzip", "augmented"):
        other = sign(pairs["rsa3072"], written[kind])
        with pytest.raises(ArtifactRejected, match="signed already"):
            sign(pairs["p256"], other)
        signed = sign(pairs["p256"], other, force=True)
        assert validate(signed, pairs["p256"])
        assert list(tree(signed)) == list(tree(other))
        broken = other.replace(tree(other)["manifest.sig"], b"!" * len(tree(other)["manifest.sig"]))
        with pytest.raises(ArtifactRejected, match="signed already"):
            sign(pairs["rsa3072"], broken)
        assert sign(pairs["rsa3072"], broken, force=True) == other


@pytest.mark.parametrize("key", ["p384", "p521", "ed25519"])
def test_other_keys_are_refused(pairs: Any, written: dict[str, bytes], sign: Any, key: str) -> None:
    with pytest.raises(KeyUnsuited):
        sign(pairs[key], written["none"])


def test_zstd(pairs: Any, sign: Any) -> None:
    def pack(content: bytes) -> bytes:
        return subprocess.run(["zstd", "-q"], input=content, capture_output=True, check=True).stdout

    packed = artifact({"a": PAYLOAD}, pack, ".zst")
    assert "manifest.sig" in tree(sign(pairs["p256"], packed))
    cut_off = tree(packed)["data/0000.tar.zst"][:-9]
    with pytest.raises(ArtifactRejected, match="is broken or cut off"):
        sign(pairs["p256"], artifact({"a": PAYLOAD}, pack, ".zst", **{"data/0000.tar.zst": cut_off}))


def changed(artifact: bytes, name: str) -> bytes:
    """Another last byte in a member; of one that is packed, after it was packed."""
    members = tree(artifact)
    content = bytearray(members[name])
    content[len(content) // 2] ^= 1
    return built(members | {name: bytes(content)})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("none", "header.tar"), ("none", "data/0000.tar"), ("gzip", "header.tar.gz"), ("gzip", "data/0000.tar.gz"),
        ("lzma", "data/0000.tar.xz"), ("v2", "header.tar.gz"), ("v2", "data/0000.tar.gz"),
        ("augmented", "header-augment.tar.gz"), ("augmented", "manifest-augment"), ("rootfs", "manifest"),
        ("rootfs", "version"),
    ],
)  # fmt: skip
def test_a_content_that_is_not_the_manifest_s_is_not_signed(
    pairs: Any, written: dict[str, bytes], sign: Any, kind: str, name: str
) -> None:
    with pytest.raises(ArtifactRejected):
        sign(pairs["rsa2048"], changed(written[kind], name))


def test_what_a_manifest_and_an_artifact_hold_is_the_same(pairs: Any, sign: Any) -> None:
    good = {"a": b"a\n", "b": b"b\n"}
    whole = tree(artifact(good))
    assert "manifest.sig" in tree(sign(pairs["p256"], artifact(good)))
    for more, fault in (
        ({"data/0000.tar": built({"a": b"a\n"})}, "'data/0000/b', which is not in it"),
        ({"data/0000.tar": built(good | {"c": b""})}, "'data/0000/c' is in no manifest"),
        ({"data/0000.tar": built({"a": b"a\n", "b": b"B\n"})}, "the SHA-256 of 'data/0000/b'"),
        ({"data/0000.tar": built({"a": b"a\n"})[:1024] + built(good)}, "'data/0000/a' is in no manifest, or is"),
        ({"data/0000.tar": built(good, type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0)}, "no regular file"),
        ({"data/0000.tar": whole["data/0000.tar"][:-9000]}, "'data/0000/b'|cut off"),
        ({"data/0000.tar": whole["data/0000.tar"] + b"x"}, "something other than padding"),
        ({"manifest": whole["manifest"].replace(b"  version", b"  header.tar.gz")}, "'version' is in no manifest"),
        ({"manifest": whole["manifest"][:-10]}, "a line of its manifest"),
        ({"version": b'{"format":"mender","version":1}'}, "version 2 or 3"),
        ({"data/0001.tar": built({"a": b"a\n"})}, "'data/0001/a' is in no manifest"),
        ({"evil": b""}, "'evil' where data/NNNN"),
    ):  # fmt: skip
        with pytest.raises(ArtifactRejected, match=fault) as caught:
            sign(pairs["p256"], artifact(good, **more))
        assert caught.value.hint


@pytest.mark.parametrize("content", [b"", b"no artifact", bytes(10240), PAYLOAD, b"\x1f\x8b\x08"])
def test_what_is_no_artifact(pairs: Any, sign: Any, content: bytes) -> None:
    with pytest.raises(ArtifactRejected, match="cannot be signed"):
        sign(pairs["p256"], content)


def test_payloads_are_bounded(pairs: Any, sign: Any) -> None:
    def pack(content: bytes) -> bytes:
        return subprocess.run(["gzip", "-1"], input=content, capture_output=True, check=True).stdout

    bomb = artifact({"a": bytes(40_000_000)}, pack, ".gz")
    assert len(bomb) < 1_000_000
    tracemalloc.start()
    with pytest.raises(ArtifactRejected, match="hold more than 20000000 bytes"):
        sign(pairs["p256"], bomb, MenderSettings(unpacked_max_bytes=20_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
    assert sign(pairs["p256"], bomb)


def test_memory_does_not_grow_with_the_artifact(pairs: Any, tmp_path: Path, keys_of: Any) -> None:
    size = 200_000_000
    with (tmp_path / "payload").open("wb") as file:
        file.truncate(size)
    command = ["mender-artifact", "write", "module-image", "-T", "module", "-f", "payload", "--compression", "none"]
    command += ["-n", "release-1", "-t", "board", "-o", "large.mender"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    path = tmp_path / "large.mender"

    async def signed() -> int:
        job = Job(lambda: tmp_path, keys_of(pairs["p256"]), asyncio.to_thread)
        upload = Upload(path, "large.mender", path.stat().st_size)
        signed = await Mender().sign(MenderForm(distro="poky", artifact=upload), job)
        return sum(map(len, signed.chunks(1024 * 1024)))

    tracemalloc.start()
    length = asyncio.run(signed())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert length == path.stat().st_size + 1024
    assert peak < 10_000_000


def test_a_signature_that_does_not_verify_is_not_released(
    pairs: Any, written: dict[str, bytes], sign: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lie(_key: Any, _scheme: Any, _data: bytes) -> bytes:
        return bytes(64)

    monkeypatch.setattr(MemoryKey, "sign", lie)
    with pytest.raises(SignatureMismatch):
        sign(pairs["p256"], written["none"])


def test_a_finished_artifact_that_is_not_sound_is_not_released(
    pairs: Any, written: dict[str, bytes], sign: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = mender.signature_member
    for broken, fault in (
        (lambda _content: b"", "does not have the signature"),
        (lambda content: whole(content)[:-512], "is not sound"),
        (lambda content: whole(content)[:-1] + b"x" * 513, "no header"),
        (lambda content: whole(content.swapcase()), "does not have the signature"),
        (lambda content: whole(content) + built({"evil": b""})[:512], "'evil' where"),
    ):
        monkeypatch.setattr(mender, "signature_member", broken)
        with pytest.raises(SigningFailed, match=fault):
            sign(pairs["p256"], written["none"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_damaged_artifact_is_signed_or_refused_in_words(
    pairs: Any, written: dict[str, bytes], sign: Any, data: st.DataObject
) -> None:
    content = bytearray(written[data.draw(st.sampled_from(["v2", "augmented", "none", "lzma", "bootstrap"]))])
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, 6000) | st.integers(0, len(content) - 1))
        patch = data.draw(st.binary(min_size=1, max_size=16))
        content[at : at + len(patch)] = patch
    del content[data.draw(st.integers(0, len(content)) | st.just(len(content))) :]
    try:
        signed = sign(pairs["p256"], bytes(content))
    except ArtifactRejected:
        return
    assert "manifest.sig" in tree(signed)


def test_both_or_none_of_the_artifacts_is_a_mistake() -> None:
    upload = Upload(b"x", "x", 1)
    for fields in ({}, {"artifact": upload, "artifact-uri": "file:///srv/x"}):
        with pytest.raises(ValueError, match="send one"):
            MenderForm.model_validate({"distro": "poky", **fields})


def test_the_error_of_a_key_is_its_own(tmp_path: Path, written: dict[str, bytes], pairs: Any, keys_of: Any) -> None:
    class Busy(keys_of):
        def open(self, role: str, **request: Any) -> Any:
            assert (role, request) == ("key", {"distro": "poky"})
            raise ProviderBusy("busy", "wait")

    upload = Upload(written["none"], "a", len(written["none"]))
    job = Job(lambda: tmp_path, Busy(pairs["p256"]), asyncio.to_thread)
    with pytest.raises(ProviderBusy):
        asyncio.run(Mender().sign(MenderForm(distro="poky", artifact=upload), job))
    assert not list(tmp_path.iterdir())
