"""The file provider: what it reads, and what it refuses to."""

import asyncio
import hashlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from pydantic import ValidationError

from tokens.errors import KeyNotFound, KeyUnusable, ProviderUnavailable
from tokens.file import FileProvider, FileSettings
from tokens.keyfile import KEY_FILE_MAX_BYTES
from tokens.provider import KeyReference
from tokens.schemes import Ecdsa, Hash, RsaPkcs1v15
from tokens.secret import SecretSource

DIGEST = hashlib.sha256(b"what is signed").digest()
P256 = Ecdsa(Hash.SHA256)


@pytest.fixture
def root(tmp_path: Path, keys: Any) -> Path:
    """digsigserver's layout, in small."""
    root = tmp_path / "keys"
    (root / "poky/swupdate").mkdir(parents=True)
    for name in ("p256", "rsa2048"):
        file = root / f"poky/swupdate/{name}.key"
        file.write_bytes(keys[name].pem)
        file.chmod(0o600)
    return root


@pytest.fixture
async def provider(root: Path) -> AsyncIterator[FileProvider]:
    made = FileProvider("store", FileSettings(kind="file", root=root, aliases=("YubiHSM",)))
    await made.start()
    yield made
    await made.stop()


async def sign(provider: FileProvider, path: str, certificate: str | None = None) -> bytes:
    async with provider.open(KeyReference(object=path, certificate=certificate)) as key:
        return await key.sign(P256, DIGEST)


async def test_layout(provider: FileProvider) -> None:
    assert await sign(provider, "poky/swupdate/p256.key")
    await provider.check()
    assert provider.kind == "file"
    assert provider.uri_attributes == {"token": {"store", "YubiHSM"}}


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "/etc/passwd",
        "../outside.key",
        "poky/../../outside.key",
        "poky/./swupdate/p256.key",
        "poky//swupdate/p256.key",
        "poky/swupdate/p256.key/",
        "poky/swupdate/p256.key/more",
        "poky/swupdate/p256.key\0.pem",
        "poky/swupdate/p256.key\n",
        "absent",
        "poky/absent/p256.key",
    ],
)
async def test_path_that_leads_nowhere(provider: FileProvider, root: Path, keys: Any, path: str) -> None:
    (root.parent / "outside.key").write_bytes(keys["p256"].pem)
    with pytest.raises(KeyNotFound) as caught:
        await sign(provider, path)
    assert caught.value.hint
    assert str(root) not in caught.value.message + caught.value.hint
    with pytest.raises(KeyNotFound):
        await sign(provider, "poky/swupdate/p256.key", certificate=path)


@pytest.mark.parametrize("path", ["x" * 300, "x/" * 3000 + "x"])
async def test_path_that_is_too_long(provider: FileProvider, path: str) -> None:
    with pytest.raises(KeyNotFound) as caught:
        await sign(provider, path)
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize("reference", [KeyReference(id=b"\1"), KeyReference(object="a", id=b"\1"), KeyReference()])
async def test_reference_for_a_token(provider: FileProvider, reference: KeyReference) -> None:
    with pytest.raises(KeyNotFound, match="by path only"):
        async with provider.open(reference):
            pass


async def test_links(provider: FileProvider, root: Path, keys: Any) -> None:
    # as Kubernetes mounts a secret: key -> ..data/key, ..data -> ..2026
    (root / "..2026").mkdir()
    (root / "..2026/key").write_bytes(keys["p256"].pem)
    (root / "..data").symlink_to("..2026")
    (root / "key").symlink_to("..data/key")
    assert await sign(provider, "key")

    outside = root.parent / "outside.key"
    outside.write_bytes(keys["p256"].pem)
    (root / "out").symlink_to(outside)
    (root / "up").symlink_to("../outside.key")
    (root / "parent").symlink_to("..")
    for path in ("out", "up", "parent/outside.key"):
        with pytest.raises(KeyUnusable, match="out of the root"):
            await sign(provider, path)
    (root / "loop").symlink_to("loop")
    with pytest.raises(KeyUnusable):
        await sign(provider, "loop")
    # a directory that only begins with the root's name is not below it
    beside = root.parent / "keys-of-others"
    beside.mkdir()
    (beside / "key").write_bytes(keys["p256"].pem)
    (root / "beside").symlink_to(beside / "key")
    with pytest.raises(KeyUnusable, match="out of the root"):
        await sign(provider, "beside")


async def test_root_that_is_a_link(root: Path) -> None:
    link = root.parent / "current"
    link.symlink_to(root)
    provider = FileProvider("store", FileSettings(kind="file", root=link))
    await provider.check()
    assert await sign(provider, "poky/swupdate/p256.key")
    await provider.stop()


async def test_no_regular_file(provider: FileProvider, root: Path) -> None:
    os.mkfifo(root / "fifo")
    began = time.monotonic()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for path in ("fifo", "poky"):
        with pytest.raises(KeyUnusable, match="not a regular file"):
            await sign(provider, path)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert time.monotonic() - began < 5, "a FIFO without a writer must not be waited for"


async def test_size(provider: FileProvider, root: Path, keys: Any) -> None:
    pem = keys["p256"].pem
    (root / "large").write_bytes(pem + b"#" * (KEY_FILE_MAX_BYTES - len(pem)))
    assert await sign(provider, "large")
    (root / "larger").write_bytes(pem + b"#" * (KEY_FILE_MAX_BYTES - len(pem) + 1))
    with pytest.raises(KeyUnusable, match="more than 1048576 bytes"):
        await sign(provider, "larger")


async def test_warns_of_readers_once(provider: FileProvider, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "tokens.file")
    certificate = root / "p256.crt"
    certificate.write_bytes(b"not read")
    await sign(provider, "poky/swupdate/p256.key")
    assert not caplog.records
    (root / "poky/swupdate/p256.key").chmod(0o640)
    (root / "poky/swupdate/rsa2048.key").chmod(0o604)
    for _ in range(3):
        await sign(provider, "poky/swupdate/p256.key")
    async with provider.open(KeyReference(object="poky/swupdate/rsa2048.key")):
        pass
    assert [record.args[1] for record in caplog.records if record.args] == [
        "poky/swupdate/p256.key",
        "poky/swupdate/rsa2048.key",
    ]
    assert str(root) not in caplog.text


async def test_no_warning_of_a_certificate(
    provider: FileProvider, root: Path, keys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "p256.crt").write_bytes(keys["p256"].certificate_pem)
    (root / "p256.crt").chmod(0o644)
    assert await sign(provider, "poky/swupdate/p256.key", certificate="p256.crt")
    assert not caplog.records


async def test_unreadable(keys: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("unreadable")
    (root / "key").write_bytes(keys["p256"].pem)
    (root / "key").chmod(0)
    provider = FileProvider("store", FileSettings(kind="file", root=root))
    above = [parent for parent in root.parents if parent.stat().st_uid == os.geteuid() and parent != Path("/")]
    modes = {directory: directory.stat().st_mode for directory in [root, *above]}
    user = os.geteuid()
    try:
        for directory in modes:
            directory.chmod(0o755)
        if user == 0:
            os.seteuid(65534)  # root may read everything; nobody may not
        await provider.check()
        with pytest.raises(KeyUnusable, match="Permission denied"):
            await sign(provider, "key")
        os.seteuid(user)
        root.chmod(0)
        if user == 0:
            os.seteuid(65534)
        with pytest.raises(ProviderUnavailable, match="Permission denied"):
            await provider.check()
    finally:
        os.seteuid(user)
        for directory, mode in modes.items():
            directory.chmod(mode)
        await provider.stop()


async def test_check_of_a_root_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "absent", tmp_path / "file"):
        provider = FileProvider("store", FileSettings(kind="file", root=root))
        await provider.start()
        with pytest.raises(ProviderUnavailable) as caught:
            await provider.check()
        assert "root" in caught.value.hint
        with pytest.raises(ProviderUnavailable) if root.name == "absent" else pytest.raises(KeyNotFound):
            await sign(provider, "key")
        await provider.stop()


async def test_passphrase(root: Path, keys: Any) -> None:
    secret = root.parent / "passphrase"
    secret.write_bytes(b"canary\n")
    (root / "encrypted").write_bytes(
        keys["p256"].private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"canary"))
    )
    settings = FileSettings(kind="file", root=root, passphrase=SecretSource(file=secret))
    provider = FileProvider("store", settings)
    assert await sign(provider, "encrypted")
    assert await sign(provider, "poky/swupdate/p256.key")
    # read for each job: a new passphrase needs no restart
    secret.write_bytes(b"wrong")
    with pytest.raises(KeyUnusable, match="cannot be decrypted"):
        await sign(provider, "encrypted")
    secret.unlink()
    with pytest.raises(KeyUnusable, match="secret's file"):
        await sign(provider, "encrypted")
    await provider.stop()


async def test_replaced_key(provider: FileProvider, root: Path, keys: Any) -> None:
    file = root / "poky/swupdate/p256.key"
    async with provider.open(KeyReference(object="poky/swupdate/p256.key")) as key:
        file.write_bytes(keys["p384"].pem)
        await key.sign(P256, DIGEST)
        assert key.public_key == keys["p256"].private.public_key()
    async with provider.open(KeyReference(object="poky/swupdate/p256.key")) as key:
        assert key.public_key == keys["p384"].private.public_key()


async def test_stop(root: Path) -> None:
    provider = FileProvider("ends", FileSettings(kind="file", root=root))
    await provider.start()
    async with provider.open(KeyReference(object="poky/swupdate/rsa2048.key")) as key:
        signatures = [asyncio.create_task(key.sign(RsaPkcs1v15(Hash.SHA256), DIGEST)) for _ in range(50)]
        await asyncio.sleep(0)
        await provider.stop()
        assert all(await asyncio.gather(*signatures))
        with pytest.raises(ProviderUnavailable, match="stopped"):
            await key.sign(RsaPkcs1v15(Hash.SHA256), DIGEST)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ends-")]
    for call in (provider.check(), sign(provider, "poky/swupdate/p256.key")):
        with pytest.raises(ProviderUnavailable, match="stopped"):
            await call


@pytest.mark.parametrize("extra", [{"rot": "/"}, {"passphrase": "text"}, {"passphrase": {"fil": "/"}}, {"kind": "s3"}])
def test_settings_that_are_none(extra: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FileSettings.model_validate({"kind": "file", "root": "/keys"} | extra)
