"""The signer with keys in memory, on a BSP that plays NVIDIA's: types of keys, and what becomes of their errors."""

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from signers.sandbox import Sandbox, ToolSettings
from signers.signer import Job, Upload
from signers.tegra import Tegra, TegraForm, TegraSettings, redacted
from tests.signers.conftest import Pair
from tests.stand_in_bsp.build import make_bsp, pack, request_files
from tests.stand_in_bsp.checks import derived
from tokens.errors import KeyNotFound, KeyUnsuited, ProviderUnavailable, ToolFailed, ToolUnavailable
from tokens.schemes import Ed25519
from tokens.symmetric import AES_BYTES, SymmetricAlgorithm
from tokens.symmetric_file import MemorySymmetricKey
from tokens.verify import verify

AES, HMAC = SymmetricAlgorithm.AES_128, SymmetricAlgorithm.HMAC_SHA256
SECRET = bytes(range(32))


@dataclass
class Keyring:
    """`signers.signer.Keys` with a signing key, and symmetric ones by their roles."""

    pair: Pair
    symmetric: dict[str, SymmetricAlgorithm] = field(default_factory=dict)
    fails_after: int | None = None

    @asynccontextmanager
    async def open(self, role: str, **_: Any) -> AsyncIterator[Any]:
        assert role == "pkc"
        yield self

    @property
    def public_key(self) -> Any:
        return self.pair.key.public_key

    async def sign(self, scheme: Any, data: bytes) -> bytes:
        if self.fails_after is not None:
            self.fails_after -= 1
            if self.fails_after < 0:
                raise ProviderUnavailable("The token was pulled out.", "Put it in.")
        return await self.pair.key.sign(scheme, data)

    @asynccontextmanager
    async def open_symmetric(self, role: str, **_: Any) -> AsyncIterator[MemorySymmetricKey]:
        algorithm = self.symmetric.get(role)
        if algorithm is None:
            raise KeyNotFound("none", "none")
        yield MemorySymmetricKey(algorithm, SECRET[: AES_BYTES.get(algorithm, 32)], role, self.pair.threads)


async def in_thread(function: Any, *args: Any, **kwargs: Any) -> Any:
    return await asyncio.to_thread(function, *args, **kwargs)


@pytest.fixture
def sign(tmp_path: Path):
    """Has a set of files signed; returns what came back, by name."""

    async def sign(
        soctype: str, keys: Keyring, version: str = "35.4.1", more: dict[str, bytes] | None = None, **tools: Any
    ) -> dict[str, bytes]:
        make_bsp(tmp_path / "nvidia", version, soctype)
        (directory := tmp_path / "job").mkdir()
        data = pack(request_files(soctype) | (more or {}))
        settings = TegraSettings(l4t_base=tmp_path / "nvidia", timeout_s=30.0)
        job = Job(lambda: directory, keys, in_thread, Sandbox(ToolSettings(**tools)), settings)  # type: ignore[arg-type]
        form = TegraForm(
            machine="m", soctype=soctype, bspversion=version, artifact=Upload(data, "in.tar.gz", len(data))
        )
        signed = await Tegra().sign(form, job)
        with tarfile.open(fileobj=io.BytesIO(b"".join(signed.chunks(1 << 20)))) as archive:
            return {member.name[2:]: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]

    return sign


@pytest.mark.parametrize(
    ("soctype", "kind"),
    [
        ("tegra234", "p521"), ("tegra234", "ed25519"), ("tegra194", "rsa3072"), ("tegra194", "ed25519"),
        ("tegra186", "rsa2048"),
    ],
)  # fmt: skip
async def test_other_types_of_keys(sign, pairs, soctype: str, kind: str) -> None:
    made = await sign(soctype, Keyring(pairs[kind]))
    assert len([name for name in made if name.endswith(".signed")]) == 5
    if kind == "ed25519":
        image = made["boot_sigheader.img.signed"]
        at, signed = (144, image[4032:8192]) if soctype == "tegra234" else (512, image[2960:4096])
        public_key = load_pem_public_key(pairs[kind].public_pem)
        verify(public_key, Ed25519(), signed, image[at : at + 64])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("soctype", "kind", "symmetric", "text"),
    [
        ("tegra234", "rsa2048", {}, "boots nothing that this key signs"),
        ("tegra234", "p384", {}, "boots nothing that this key signs"),
        ("tegra194", "p256", {}, "boots nothing that this key signs"),
        ("tegra186", "ed25519", {}, "boots nothing that this key signs"),
        ("tegra234", "p256", {"sbk": AES}, "The SBK of tegra234 is a key for HMAC-SHA256, and this one is for AES-128"),
        ("tegra194", "rsa2048", {"sbk": HMAC}, "The SBK of tegra194 is a key for AES-128, and this one is for HMAC"),
        ("tegra234", "p256", {"user": AES}, "by a user key is not supported"),
        ("tegra194", "rsa2048", {"user": AES}, "by a user key is not supported with L4T 35.4.1"),
    ],
)
async def test_keys_that_do_not_suit(sign, pairs, soctype: str, kind: str, symmetric: Any, text: str) -> None:
    with pytest.raises(KeyUnsuited, match=text):
        await sign(soctype, Keyring(pairs[kind], symmetric))


async def test_an_image_in_blocks(sign, pairs) -> None:
    content = bytes(range(256)) * 3000
    keys = Keyring(pairs["p256"], {"sbk": HMAC})
    image = (await sign("tegra234", keys, more={"dce.bin": content}))["dce_sigheader_encrypt.bin.signed"]
    encrypted, blob = image[8192 : 8192 + len(content)], image[8192 + len(content) :]
    found = b""
    for number, at in enumerate(range(0, len(content), 262144), 1):
        entry = blob[92 * number :]
        block = encrypted[at : at + 262144] + entry[12:28]
        found += AESGCM(derived(SECRET)).decrypt(entry[:12], block, image[5120:5200])
    assert found == content


async def test_an_error_of_the_key_is_the_answer(sign, pairs) -> None:
    with pytest.raises(ProviderUnavailable, match="pulled out"):
        await sign("tegra234", Keyring(pairs["p256"], fails_after=3))


async def test_never_without_a_sandbox(sign, pairs) -> None:
    with pytest.raises(ToolUnavailable, match="turn the sandbox off"):
        await sign("tegra234", Keyring(pairs["p256"]), sandbox="none")


async def test_no_bsp(sign, pairs) -> None:
    with pytest.raises(ToolUnavailable, match="cannot be used"):
        await sign("tegra210", Keyring(pairs["rsa2048"]), version="32.7.4")


async def test_a_file_that_the_scripts_want_is_not_there(sign, pairs) -> None:
    with pytest.raises(ToolFailed):
        await sign("tegra234", Keyring(pairs["p256"]), more={"MANIFEST": b"DTBFILE=other.dtb\nLNXFILE=boot.img\n"})


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (b"Traceback: no such file a.bin", "Traceback: no such file a.bin"),
        (b"PIN 123456", "PIN [...]"),
        (b"0x11223344 0x5", "[...] [...]"),
        (b"--key " + b"ab" * 32, "--key [...]"),
        (b"MIIEvQIBADANBgkqhkiG9w0BAQEFAASC==", "[...]"),
    ],
)
def test_what_is_logged(said: bytes, shown: str) -> None:
    assert redacted(said).strip("'") == shown
