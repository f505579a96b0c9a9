"""Idblocks and USB loaders, verified by a boot ROM of the tests' own; rk_sign_tool is played by a stand-in."""

import asyncio
import os
from collections.abc import Callable

import pytest
import rockchip_images
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from pydantic import ValidationError

from signers.formats import rkloader
from signers.formats.idblock import SCHEME
from signers.rockchip import Rk, RkForm, RkSettings
from signers.sandbox import Sandbox, ToolSettings
from signers.signer import GrantedFile, Job, Signed, Upload
from tokens.errors import (
    ArtifactRejected,
    KeyUnsuited,
    KeyUnusable,
    SigningFailed,
    ToolFailed,
    ToolUnavailable,
)

IMAGES = {"471": b"ddr" * 1000, "472": b"usbplug" * 1000, "FlashData": b"ddr" * 1000, "FlashBoot": b"spl" * 2000}
LOADER = rockchip_images.loader(IMAGES)


@pytest.fixture(scope="module")
def rsa4096(pair):
    return pair(rsa.generate_private_key(65537, 4096))


@pytest.fixture(scope="session")
def idblock(tmp_path_factory) -> bytes:
    """An idblock by U-Boot's mkimage."""
    path = tmp_path_factory.mktemp("idblock") / "idblock.img"
    rockchip_images.write_idblock(path, os.urandom(40_000), b"spl" * 30_000)
    return path.read_bytes()


@pytest.fixture
def sign(tmp_path, keys_of) -> Callable:
    async def run(pair, artifact: bytes, kind: str = "idblock", soctype: str = "rk3588", **fields) -> bytes:
        path = tmp_path / "upload"
        path.write_bytes(artifact)
        upload = Upload(path, "idblock.img", len(artifact))
        form = RkForm.model_validate(
            {"machine": "demo", "soctype": soctype, "artifact_type": kind, "artifact": upload, **fields}
        )
        keys = keys_of(pair)
        signed = await Rk().sign(form, Job(lambda: tmp_path, keys, asyncio.to_thread))
        assert keys.asked == [("key", {"machine": "demo"})]
        assert signed.filename == "artifact.signed"
        return b"".join(signed.chunks(65536))

    return run


def otp(pair) -> bytes:
    return rockchip_images.fuses(pair.public_pem)


async def test_an_idblock(sign, pairs, rsa4096, idblock, openssl, tmp_path):
    for pair in (pairs["rsa2048"], rsa4096):
        signed = await sign(pair, idblock)
        rockchip_images.boot_idblock(signed, otp(pair))
        assert signed[2048:] == idblock[2048:]
        # what is not the key, the flags and the signature is as it was
        assert signed[0x10:0x200] == idblock[0x10:0x200]
        assert signed[:4] == b"RKSS"
        size = pair.private_key.key_size // 8
        (tmp_path / "signed").write_bytes(signed[:1536])
        (tmp_path / "signature").write_bytes(signed[1536 : 1536 + size][::-1])
        (tmp_path / "key.pem").write_bytes(pair.public_pem)
        pss = "-sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:32"
        openssl(f"dgst -sha256 -verify key.pem {pss} -signature signature signed")
        # signed anew, by another key
        again = await sign(pairs["rsa2048"], signed)
        rockchip_images.boot_idblock(again, otp(pairs["rsa2048"]))
        assert again[:0x200] == (await sign(pairs["rsa2048"], idblock))[:0x200]


async def test_what_follows_an_idblock_stays(sign, pairs, idblock):
    signed = await sign(pairs["rsa2048"], idblock + b"u-boot.itb" * 1000)
    assert signed[2048:] == idblock[2048:] + b"u-boot.itb" * 1000
    rockchip_images.boot_idblock(signed, otp(pairs["rsa2048"]))


async def test_tampering_is_refused(sign, pairs, rsa4096, idblock):
    signed, fused = await sign(pairs["rsa2048"], idblock), otp(pairs["rsa2048"])
    places = (0x00, 0x0A, 0x0C, 0x14, 0x78, 0x90, 0x1FF, 0x200, 0x400, 0x410, 0x5FF, 0x600, 0x6FF, 0x700, 2048, 60_000)
    for at in places:
        tampered = bytearray(signed)
        tampered[at] ^= 1
        with pytest.raises(ValueError, match=r"not signed|another|no signature|wrong|none"):
            rockchip_images.boot_idblock(bytes(tampered), fused)
    with pytest.raises(ValueError, match="another key"):
        rockchip_images.boot_idblock(signed, otp(rsa4096))


@pytest.mark.parametrize("plain", [True, False])
async def test_a_usb_loader(sign, pairs, plain):
    loader = rockchip_images.loader(IMAGES, plain=plain)
    signed = await sign(pairs["rsa2048"], loader, "usbloader")
    rockchip_images.boot_loader(signed, otp(pairs["rsa2048"]))
    heads = {"UsbHead", "FlashHead"}
    before, after = (
        [entry for entry in rockchip_images.entries_of(data) if entry[1] not in heads] for data in (loader, signed)
    )
    assert before == after
    assert len(signed) == len(loader)
    again = await sign(pairs["rsa2048"], signed, "usbloader")
    rockchip_images.boot_loader(again, otp(pairs["rsa2048"]))


async def test_a_loader_is_for_one_kind_of_device(sign, pairs):
    older = rockchip_images.loader(IMAGES, soc="3568")
    for soctype in ("3566", "3568", "rk3566"):
        rockchip_images.boot_loader(await sign(pairs["rsa2048"], older, "usbloader", soctype), otp(pairs["rsa2048"]))
    with pytest.raises(ArtifactRejected, match="says that it is for '3568', and not for 3588"):
        await sign(pairs["rsa2048"], older, "usbloader", "rk3588")
    with pytest.raises(ArtifactRejected, match="says that it is for '3588', and not for 3566 or 3568"):
        await sign(pairs["rsa2048"], LOADER, "usbloader", "rk3568")


async def test_images_are_checked_before(sign, pairs, idblock):
    for artifact, kind, words in [
        (idblock[:-1], "idblock", "image 2 is cut off"),
        (idblock[:2048] + b"x" + idblock[2049:], "idblock", "image 1 has another SHA-256"),
        (idblock[:-2] + b"xx", "idblock", "image 2 has another SHA-256"),
        (bytes.fromhex("3b8cdcfc").ljust(2048, b"\1") + b"RK33", "idblock", "older format of RK33xx"),
        (LOADER, "idblock", "neither RKNS nor RKSS"),
        (idblock, "usbloader", "does not begin with a header LDR"),
        (b"", "usbloader", "does not begin with"),
        (b"", "idblock", "neither RKNS nor RKSS"),
        (bytes(rkloader.LOADER_MAX_BYTES + 1), "usbloader", "more than"),
        (_without_image(), "usbloader", "none of its entries is the image 2 of FlashHead"),
    ]:
        with pytest.raises(ArtifactRejected, match=words):
            await sign(pairs["rsa2048"], artifact, kind)


def _without_image() -> bytes:
    loader = rkloader.parse(LOADER)
    entry = loader.others[-1]
    data = bytearray(LOADER[:-4])
    data[entry.offset] ^= 1
    return bytes(data) + rkloader.crc(data).to_bytes(4, "little")


async def test_other_keys_are_refused(sign, pairs, idblock):
    for kind in ("rsa3072", "p256", "ed25519"):
        with pytest.raises(KeyUnsuited, match="2048 and 4096 bits"):
            await sign(pairs[kind], idblock)


async def test_a_wrong_signature_is_never_released(sign, pairs, idblock, monkeypatch):
    signature = await pairs["rsa2048"].key.sign(SCHEME, bytes(32))

    async def other(_self, _scheme, _digest):
        return signature

    monkeypatch.setattr("tokens.keyfile.MemoryKey.sign", other)
    for artifact, kind in ((idblock, "idblock"), (LOADER, "usbloader")):
        with pytest.raises(SigningFailed):
            await sign(pairs["rsa2048"], artifact, kind)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("soctype", "rk3399"), ("soctype", "3399"), ("soctype", ""), ("artifact_type", "loader"),
        ("artifact_type", ""), ("machine", "../x"), ("burn_key_hash", "perhaps"), ("artifact", "a path"),
    ],
)  # fmt: skip
def test_fields(field, value):
    upload = Upload(b"x", "x", 1)
    fields = {"machine": "demo", "soctype": "rk3588", "artifact_type": "IDBLOCK", "artifact": upload}
    assert RkForm.model_validate({**fields, "soctype": "3588", "burn_key_hash": ""}).soctype == "rk3588"
    with pytest.raises(ValidationError):
        RkForm.model_validate({**fields, field: value})


# In place of rk_sign_tool: a program of the tests' own, which looks at how it is called and signs with the key that it
# is given. It proves what the service gives a tool and takes from it, and nothing of Rockchip's own program.
STAND_IN = """\
#!/usr/bin/python3 -I
import json, os, pathlib, subprocess, sys
here = pathlib.Path(__file__).parent
assert (here / "boot_merger").exists() and os.getcwd() == str(here)
settings = here / "setting.ini"
settings.write_text(settings.read_text() + json.dumps(sys.argv[1:]) + "\\n")
mode, *calls = settings.read_text().splitlines()
calls = [json.loads(line) for line in calls]
if sys.argv[1] in ("sb", "sl"):
    assert [call[0] for call in calls[:-1]] == ["cc", "lk", "ss"], calls
    assert calls[0][1:] == ["--chip", "3588"] and calls[2][1:] == ["--flag", "0x20"], calls
    _, option, path = sys.argv[1:]
    assert option == ("--idb" if sys.argv[1] == "sb" else "--loader")
    key, public = calls[1][2], calls[1][4]
    def openssl(*line, data=None):
        return subprocess.run(("openssl", *line), input=data, check=True, capture_output=True).stdout
    n = int(openssl("rsa", "-pubin", "-in", public, "-noout", "-modulus").split(b"=")[1], 16)
    assert n == int(openssl("rsa", "-in", key, "-noout", "-modulus").split(b"=")[1], 16)
    if mode == "break":
        sys.exit("no such chip")
    data = bytearray(open(path, "rb").read())
    if mode != "nothing":
        data[:4] = b"RKSS"
        data[12:14] = bytes((0x11, 0x20))
        data[15] |= 0x80  # what has the device burn the hash is not known: this is a place like another
        for at, number, size in ((512, n, 512), (1024, 65537, 16), (1040, 2**2180 // n, 32)):
            data[at : at + size] = number.to_bytes(size, "little")
        data[0x90] ^= mode == "another image"
        pss = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32")
        signature = openssl("dgst", "-sha256", "-sign", key, *pss, data=bytes(data[:1536]))
        data[1536:2048] = signature[::-1].ljust(512, bytes(1))
        data[1536] ^= mode == "wrong signature"
    open(path, "wb").write(data)
"""


class Files:
    """`signers.signer.Keys` with the file of a key."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.claimed: list[object] = []

    async def read(self, role: str, *, machine: str) -> GrantedFile:
        assert (role, machine) == ("burn", "demo")
        return GrantedFile(self.content)

    async def claim(self, role: str, public_key: object, *, machine: str) -> None:
        assert (role, machine) == ("burn", "demo")
        self.claimed.append(public_key)


@pytest.fixture
def burn(tmp_path) -> Callable:
    async def run(content: bytes, artifact: bytes, mode: str = "sign", kind: str = "idblock") -> Signed:
        directory = tmp_path / "tools/rkbin-tools"
        directory.mkdir(parents=True)
        for name, text in (("rk_sign_tool", STAND_IN), ("boot_merger", ""), ("setting.ini", f"{mode}\n")):
            (directory / name).write_text(text)
            (directory / name).chmod(0o755)
        for parent in (tmp_path, tmp_path / "tools", directory):
            parent.chmod(0o755)
        (tmp_path / "upload").write_bytes(artifact)
        upload = Upload(tmp_path / "upload", "idblock.img", len(artifact))
        fields = {"machine": "demo", "soctype": "rk3588", "artifact_type": kind, "artifact": upload}
        form = RkForm.model_validate({**fields, "burn_key_hash": "yes"})
        (tmp_path / "job").mkdir()
        tools = Sandbox(ToolSettings(memory_max_bytes=4 << 30))
        job = Job(
            lambda: tmp_path / "job", Files(content), asyncio.to_thread, tools, RkSettings(tools=tmp_path / "tools")
        )
        signed = await Rk().sign(form, job)
        assert job.keys.claimed == [serialization.load_pem_private_key(content, None).public_key()]
        assert (directory / "setting.ini").read_text() == f"{mode}\n"
        return signed

    return run


async def test_having_the_hash_burnt(burn, pairs, idblock):
    pair = pairs["rsa2048"]
    signed = await burn(pair.private_pem, idblock)
    data = b"".join(signed.chunks(65536))
    rockchip_images.boot_idblock(data, otp(pair))
    assert data[15] == 0x80
    assert data[2048:] == idblock[2048:]


async def test_a_loader_goes_to_the_tool_too(burn, pairs):
    # the stand-in leaves it as it is once it has looked at its arguments
    with pytest.raises(ToolFailed, match="is not sound: the public key in its header is another"):
        await burn(pairs["rsa2048"].private_pem, LOADER, "nothing", "usbloader")


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("break", "rk_sign_tool ended with an error"),
        ("nothing", "is not sound: the public key in its header is another"),
        ("another image", "is not sound: its image 1 has another SHA-256"),
        ("wrong signature", "is not sound"),
    ],
)
async def test_the_tool_is_not_trusted(burn, pairs, idblock, mode, words):
    with pytest.raises(ToolFailed, match=words):
        await burn(pairs["rsa2048"].private_pem, idblock, mode)


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"no key", KeyUnusable), ("p256", KeyUnsuited), ("rsa3072", KeyUnsuited)],
)
async def test_files_that_hold_no_such_key(burn, pairs, idblock, content, error):
    with pytest.raises(error):
        await burn(content if isinstance(content, bytes) else pairs[content].private_pem, idblock)


async def test_without_the_tool(pairs, idblock, tmp_path):
    upload = Upload(idblock, "idblock.img", len(idblock))
    fields = {"machine": "demo", "soctype": "rk3588", "artifact_type": "idblock", "artifact": upload}
    form = RkForm.model_validate({**fields, "burn_key_hash": "true"})
    job = Job(lambda: tmp_path, Files(b""), asyncio.to_thread, settings=RkSettings(tools=tmp_path))
    with pytest.raises(ToolUnavailable, match=r"no rk_sign_tool, boot_merger, setting\.ini") as raised:
        await Rk().sign(form, job)
    assert str(tmp_path) not in raised.value.message + raised.value.hint
    assert "signers.rk.tools/rkbin-tools" in raised.value.hint
