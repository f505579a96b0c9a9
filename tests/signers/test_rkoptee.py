"""TAs of Rockchip's OP-TEE, verified from the layout of their headers; change_puk is played by a stand-in."""

import asyncio
import io
import tarfile
from collections.abc import Callable
from uuid import UUID

import optee_rules
import pytest
from rockchip_images import trusted_application

from signers.rkoptee import RkopteeTa, RkopteeTaForm, RkopteeTee, RkopteeTeeForm
from signers.rockchip import RkSettings
from signers.sandbox import Sandbox, ToolSettings
from signers.signer import GrantedFile, Job, Upload
from tokens.errors import ArtifactRejected, KeyUnsuited, KeyUnusable, ToolFailed, ToolUnavailable

ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00" + b"code" * 500
ID = UUID("8aaaf200-2450-11e4-abe2-0002a5d5c51b")


def archive(files: dict[str, bytes]) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return output.getvalue()


@pytest.fixture
def sign(tmp_path, keys_of) -> Callable:
    async def run(pair, artifact: bytes) -> bytes:
        form = RkopteeTaForm(machine="demo", artifact=Upload(artifact, "tas.tar.gz", len(artifact)))
        signed = await RkopteeTa().sign(form, Job(lambda: tmp_path, keys_of(pair), asyncio.to_thread))
        return b"".join(signed.chunks(65536))

    return run


async def test_each_ta_keeps_its_algorithm(sign, pairs):
    old, new = pairs["rsa2048"], pairs["rsa3072"]
    files = {
        f"./usr/lib/{name}.ta": trusted_application(old.private_key, ELF, pss=pss, uuid=uuid)
        for name, pss, uuid in (("a", False, ID), ("b", True, ID), ("c", False, None), ("d", True, None))
    }
    signed = await sign(new, archive({**files, "./usr/lib/readme": b"text"}))
    with tarfile.open(fileobj=io.BytesIO(signed), mode="r:gz") as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}
    assert found.pop("./usr/lib/readme") == b"text"
    assert list(found) == list(files)
    for name, content in found.items():
        assert optee_rules.load(content, str(ID), new.public_pem) == (ELF, 0 if name[-4] in "cd" else 3)
        assert content[:16] == files[name][:16]  # its type, size and algorithm
        assert content[52 + 384 :] == files[name][52 + 256 :]
        with pytest.raises(optee_rules.Refused, match="not of the right key"):
            optee_rules.load(content, str(ID), old.public_pem)
    # the sample that Rockchip's documents show: type 1 and PKCS #1 v1.5, and its payload at 328
    sample = files["./usr/lib/a.ta"]
    assert (sample[:8], sample[12:16]) == (bytes.fromhex("4853544f 01000000"), bytes.fromhex("30480070"))
    assert sample[328:] == ELF


async def test_what_is_damaged_is_refused(sign, pairs):
    ta = trusted_application(pairs["rsa2048"].private_key, ELF, pss=True, uuid=ID)
    damaged = bytearray(ta)
    damaged[-1] ^= 1
    with pytest.raises(ArtifactRejected, match="damaged"):
        await sign(pairs["rsa2048"], bytes(damaged))
    with pytest.raises(ArtifactRejected):
        await sign(pairs["rsa2048"], archive({"readme": b"no TA"}))
    with pytest.raises(KeyUnsuited):
        await sign(pairs["p256"], ta)


# In place of change_puk: a program of the tests' own, which looks at how it is called and puts the modulus where the
# TEE has room for it. It proves what the service gives a tool and takes from it, and nothing of Rockchip's own program.
STAND_IN = """\
#!/usr/bin/python3 -I
import subprocess, sys
tee, path, key, pem = sys.argv[1:]
assert (tee, key) == ("--teebin", "--key"), sys.argv
data = open(path, "rb").read()
command = ("openssl", "rsa", "-pubin", "-in", pem, "-noout", "-modulus")
modulus = bytes.fromhex(subprocess.run(command, check=True, capture_output=True).stdout.split(b"=")[1].decode())
if b"room" not in data:
    sys.exit("no TEE")
at = data.index(b"room")
if b"longer" in data:
    data += b"x"
if b"nothing" not in data:
    data = data[:at] + modulus + data[at + len(modulus) :]
open(path, "wb").write(data)
"""
TEE = b"tee" * 1000 + b"room" + bytes(1000)


class Files:
    """`signers.signer.Keys` with the file of a public key."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    async def read(self, role: str, *, machine: str) -> GrantedFile:
        assert (role, machine) == ("pubkey", "demo")
        return GrantedFile(self.content)


@pytest.fixture
def change(tmp_path) -> Callable:
    async def run(pem: bytes, tee: bytes, *, installed: bool = True) -> bytes:
        tools = tmp_path / "tools"
        tools.mkdir()
        for directory in (tmp_path, tools):
            directory.chmod(0o755)
        if installed:
            (tools / "change_puk").write_text(STAND_IN)
            (tools / "change_puk").chmod(0o755)
        (tmp_path / "job").mkdir()
        sandbox = Sandbox(ToolSettings(memory_max_bytes=4 << 30))
        form = RkopteeTeeForm(machine="demo", artifact=Upload(tee, "bl32.bin", len(tee)))
        job = Job(lambda: tmp_path / "job", Files(pem), asyncio.to_thread, sandbox, RkSettings(tools=tools))
        signed = await RkopteeTee().sign(form, job)
        assert signed.filename == "tee.bin.signed"
        return b"".join(signed.chunks(65536))

    return run


async def test_the_public_key_is_changed(change, pairs):
    pair = pairs["rsa2048"]
    modulus = pair.private_key.public_key().public_numbers().n.to_bytes(256, "big")
    assert await change(pair.public_pem, TEE) == b"tee" * 1000 + modulus + bytes(1004 - 256)


@pytest.mark.parametrize(
    ("tee", "error", "words"),
    [
        (b"", ArtifactRejected, "empty"),
        (b"elf", ToolFailed, "ended with an error"),
        (TEE + b"nothing", ToolFailed, "without the public key"),
        (TEE + b"longer", ToolFailed, "without the public key"),
    ],
)
async def test_the_tool_is_not_trusted(change, pairs, tee, error, words):
    with pytest.raises(error, match=words):
        await change(pairs["rsa2048"].public_pem, tee)


async def test_files_that_hold_no_such_key(change, pairs):
    with pytest.raises(KeyUnusable):
        await change(pairs["rsa2048"].private_pem, TEE)


async def test_other_keys(change, pairs):
    with pytest.raises(KeyUnsuited):
        await change(pairs["p256"].public_pem, TEE)


async def test_without_the_tool(change, pairs, tmp_path):
    with pytest.raises(ToolUnavailable, match="no change_puk") as raised:
        await change(pairs["rsa2048"].public_pem, TEE, installed=False)
    assert "rk_tee_user" in raised.value.hint
    assert str(tmp_path) not in raised.value.message + raised.value.hint
