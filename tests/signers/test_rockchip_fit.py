"""FITs for Rockchip's U-Boot, verified by U-Boot's rules (fit_rules.py) and by what Rockchip's has besides."""

import asyncio
import hashlib
import io
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import fit_images
import fit_rules
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from pydantic import ValidationError

from signers import rockchip_fit
from signers.rockchip import Rk, RkForm
from signers.sandbox import Sandbox, ToolSettings
from signers.signer import Job, Upload
from tokens.errors import ArtifactRejected, KeyUnsuited, ToolUnavailable

PSS = 'padding = "pss";'


def packed(files: Mapping[str, bytes]) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return output.getvalue()


@pytest.fixture
def sign(tmp_path, keys_of) -> Callable:
    async def run(pair, files: Mapping[str, bytes], sandbox: str = "bubblewrap", **fields) -> dict[str, bytes]:
        job = tmp_path / f"job-{len(list(tmp_path.glob('job-*')))}"
        job.mkdir()
        for directory in (tmp_path, job):
            directory.chmod(0o755)
        artifact = packed(files)
        upload = Upload(artifact, "input.tar.gz", len(artifact))
        form = RkForm.model_validate(
            {"machine": "demo", "soctype": "rk3588", "artifact_type": "fit-image", "artifact": upload, **fields}
        )
        keys = keys_of(pair)
        tools = Sandbox(ToolSettings(memory_max_bytes=4 << 30, sandbox=sandbox))
        signed = await Rk().sign(form, Job(lambda: job, keys, asyncio.to_thread, tools))
        assert {(role, request["machine"]) for role, request in keys.asked} == {("key", "demo")}
        with tarfile.open(fileobj=io.BytesIO(b"".join(signed.chunks(65536))), mode="r:gz") as tar:
            return {member.name: tar.extractfile(member).read() for member in tar}

    return run


@pytest.fixture
def dtb(tmp_path) -> bytes:
    """U-Boot's own device tree, which asks for the hash of the key to be burnt."""
    source = '/dts-v1/; / { model = "spl"; signature { key-dev { burn-key-hash = <1>; rsa,np = <0>; }; }; };'
    return fit_images.write_dtb(tmp_path / "spl.dtb", source).read_bytes()


def get(path: Path, *arguments: str) -> bytes:
    """A property as fdtget has it."""
    output = subprocess.run(["fdtget", "-t", "bx", path, *arguments], check=True, capture_output=True, text=True).stdout
    return bytes(int(word, 16) for word in output.split())


def check(fit: bytes, dtb: bytes, public_key: rsa.RSAPublicKey, directory: Path) -> None:
    """What Rockchip's U-Boot would make of them. Raises where it would not boot."""
    path, image = directory / "checked.dtb", directory / "checked.itb"
    path.write_bytes(dtb)
    image.write_bytes(fit)
    n, size = public_key.public_numbers().n, public_key.key_size // 8
    np = 2 ** (public_key.key_size + 132) // n
    for name, number in (("rsa,np", np), ("rsa,c", 2**4100 % n), ("rsa,exponent-BN", 65537), ("rsa,modulus", n)):
        assert get(path, "/signature/key-dev", name) == number.to_bytes(size, "big"), name
    assert get(path, "/signature/key-dev", "required") == b"conf\0"
    # rsa_burn_key_hash of lib/rsa/rsa-verify.c: the key in a zeroed buffer, each number at its place
    buffer = bytearray(3 * size)
    for at, number, length in ((0, n, 0x200), (0x200, 65537, 0x10), (0x210, 2**4100 % n, 0x20)):
        buffer[at : at + length] = number.to_bytes(0x200, "little")[:length]
    assert get(path, "/signature/key-dev/hash@c", "value") == hashlib.sha256(buffer).digest()
    buffer[0x210:0x230] = np.to_bytes(0x20, "little")
    assert get(path, "/signature/key-dev/hash@np", "value") == hashlib.sha256(buffer[:0x230]).digest()
    for name in ("hash@c", "hash@np"):  # as Rockchip's build takes them out, once they are of no use
        subprocess.run(["fdtput", "-r", path, f"/signature/key-dev/{name}"], check=True)
    assert fit_rules.verify(fit, path.read_bytes()) == 2
    tree = fit_rules.Blob(fit)
    for conf in ("conf-1", "conf-2"):
        node = f"/configurations/{conf}/signature-1"
        if tree.text(node, "padding") == "pss":
            # padding_pss_verify takes no other salt than the longest
            strings = int.from_bytes(tree.nodes[node]["hashed-strings"][4:], "big")
            covered = fit_rules.covered_nodes(tree, f"/configurations/{conf}")
            content = fit_rules.hashed_bytes(tree, covered) + fit[tree.strings_at :][:strings]
            scheme = padding.PSS(padding.MGF1(hashes.SHA256()), size - 34)
            public_key.verify(tree.nodes[node]["value"], content, scheme, hashes.SHA256())


@pytest.mark.parametrize(("bits", "more"), [("rsa2048", PSS), ("rsa4096", PSS), ("rsa2048", "")])
@pytest.mark.parametrize("external", ["", "-E -B 200", "-E -p 2000"])
async def test_a_fit(sign, pairs, dtb, tmp_path, *, bits, more, external):
    pair = pairs[bits]
    unsigned = fit_images.make(tmp_path, algo=f"sha256,{bits}", more=more, external=external).read_bytes()
    signed = await sign(pair, {"./fitImage": unsigned, "./uboot.dtb": dtb})
    assert list(signed) == ["fitImage", "uboot.dtb"]
    public_key = pair.private_key.public_key()
    check(signed["fitImage"], signed["uboot.dtb"], public_key, tmp_path)
    (tmp_path / "checked.dtb").write_bytes(signed["uboot.dtb"])
    assert get(tmp_path / "checked.dtb", "/signature/key-dev", "burn-key-hash") == b"\0\0\0\1"
    # again, by another key: all of the old one is replaced
    if bits == "rsa2048":
        other = pairs["rsa2048 again"]
        again = await sign(other, signed)
        check(again["fitImage"], again["uboot.dtb"], other.private_key.public_key(), tmp_path)
        with pytest.raises((AssertionError, fit_rules.Refused, InvalidSignature)):
            check(signed["fitImage"], again["uboot.dtb"], other.private_key.public_key(), tmp_path)


@pytest.fixture(scope="module")
def pairs(pairs, pair):
    more = {"rsa2048 again": 2048, "rsa4096": 4096}
    return {**pairs, **{name: pair(rsa.generate_private_key(65537, bits)) for name, bits in more.items()}}


async def test_tampering_is_refused(sign, pairs, dtb, tmp_path):
    unsigned = fit_images.make(tmp_path, algo="sha256,rsa2048", more=PSS, external="-E -B 200").read_bytes()
    signed = await sign(pairs["rsa2048"], {"fitImage": unsigned, "uboot.dtb": dtb})
    public_key = pairs["rsa2048"].private_key.public_key()
    for at in (
        signed["fitImage"].index(b"a kernel"),
        signed["fitImage"].index(b"demo"),
        signed["fitImage"].rindex(b"model"),
    ):
        tampered = bytearray(signed["fitImage"])
        tampered[at] ^= 1
        with pytest.raises((fit_rules.Refused, InvalidSignature)):
            check(bytes(tampered), signed["uboot.dtb"], public_key, tmp_path)


async def test_where_the_data_stands(sign, pairs, dtb, tmp_path):
    unsigned = fit_images.make(tmp_path, algo="sha256,rsa2048", more=PSS, external="-E -B 200").read_bytes()
    files = {"fitImage": unsigned, "uboot.dtb": dtb}
    for text in ("0x3000", "3000"):
        signed = await sign(pairs["rsa2048"], files, external_data_offset=text)
        assert signed["fitImage"].index(fit_images.KERNEL) == 0x3000
        check(signed["fitImage"], signed["uboot.dtb"], pairs["rsa2048"].private_key.public_key(), tmp_path)
    assert await sign(pairs["rsa2048"], files, external_data_offset="")
    for text in ("0", "x", "-1", "80000000", "0x1000000000"):
        with pytest.raises(ValidationError):
            await sign(pairs["rsa2048"], files, external_data_offset=text)


async def test_data_that_is_counted_from_the_tree_s_end(sign, pairs, dtb, tmp_path):
    """Rockchip's mkimage puts it at a multiple of 512, and does not count what is between; U-Boot's at one of 4."""
    made = fit_images.make(tmp_path, algo="sha256,rsa2048", more=PSS, external="-E -B 200").read_bytes()
    size = int.from_bytes(made[4:8], "big")
    used = int.from_bytes(made[12:16], "big") + int.from_bytes(made[32:36], "big")  # the strings' place and size
    for total in (size, max(used, size - 511)):
        rockchips = made[:4] + total.to_bytes(4, "big") + made[8:]
        signed = await sign(pairs["rsa2048"], {"fitImage": rockchips, "uboot.dtb": dtb})
        check(signed["fitImage"], signed["uboot.dtb"], pairs["rsa2048"].private_key.public_key(), tmp_path)
        assert int.from_bytes(signed["fitImage"][4:8], "big") % 512 == 0
        assert signed["fitImage"].index(fit_images.KERNEL) % 512 == 0
    u_boots = fit_images.make(tmp_path, algo="sha256,rsa2048", more=PSS, external="-E").read_bytes()
    assert int.from_bytes(u_boots[4:8], "big") % 512
    with pytest.raises(ArtifactRejected, match="the image 'kernel-1' has another hash"):
        await sign(pairs["rsa2048"], {"fitImage": made[:size] + bytes(64) + made[size:]})
    with pytest.raises(ArtifactRejected, match="is not where Rockchip's U-Boot looks for it") as raised:
        await sign(pairs["rsa2048"], {"fitImage": u_boots, "uboot.dtb": dtb})
    assert "mkimage -E -B 200" in raised.value.hint


async def test_without_a_device_tree(sign, pairs, tmp_path):
    unsigned = fit_images.make(tmp_path, algo="sha256,rsa2048").read_bytes()
    assert list(await sign(pairs["rsa2048"], {"fitImage": unsigned})) == ["fitImage"]


def its(directory: Path, **options: str) -> dict[str, bytes]:
    """A FIT's source and its files, in a tree."""
    fit_images.make(directory, algo="sha256,rsa2048", more=PSS, **options)
    return {name: (directory / name).read_bytes() for name in ("fit.its", "kernel", "tree.dtb")}


@pytest.mark.parametrize("offset", ["", "0x2000"])
async def test_a_fit_of_its_source(sign, pairs, dtb, tmp_path, offset):
    files = {f"./{name}": content for name, content in its(tmp_path).items()}
    files["./fit.its"] = files["./fit.its"].replace(b'"kernel")', b'"boot/kernel")')
    files["./boot/kernel"] = files.pop("./kernel")
    # a FIT beside it is what is to be made of it
    signed = await sign(
        pairs["rsa2048"], {**files, "fitImage": b"old", "uboot.dtb": dtb}, external_data_offset=offset
    )  # fmt: skip
    assert list(signed) == ["fitImage", "uboot.dtb"]
    check(signed["fitImage"], signed["uboot.dtb"], pairs["rsa2048"].private_key.public_key(), tmp_path)
    assert offset == "" or signed["fitImage"].index(fit_images.KERNEL) == 0x2000


async def test_a_source_reaches_nothing_of_the_server(sign, pairs, tmp_path, monkeypatch):
    files = its(tmp_path)
    (tmp_path / "secret.key").write_bytes(b"secret")
    for path in (
        tmp_path / "secret.key",
        "/etc/passwd",
        "/proc/1/environ",
        "../../job-0/source/0",
        "/in/../etc/passwd",
    ):
        hostile = {**files, "fit.its": files["fit.its"].replace(b'"kernel")', f'"{path}")'.encode())}
        with pytest.raises(ArtifactRejected, match="mkimage cannot build"):
            await sign(pairs["rsa2048"], hostile)
    with pytest.raises(ToolUnavailable, match="without a sandbox"):
        await sign(pairs["rsa2048"], files, "none")
    monkeypatch.setattr(rockchip_fit, "DTC", Path("/nonexistent"))
    with pytest.raises(ToolUnavailable, match="is not installed") as raised:
        await sign(pairs["rsa2048"], files)
    assert "device-tree-compiler" in raised.value.hint


async def test_what_cannot_be_signed(sign, pairs, dtb, tmp_path):
    def fit(algo: str) -> dict[str, bytes]:
        return {"fitImage": fit_images.make(tmp_path, algo=algo).read_bytes(), "uboot.dtb": dtb}

    cut = fit_images.make(tmp_path, algo="sha256,rsa2048", external="-E -B 200").read_bytes()[:-1024]
    for files, words in (
        ({"uboot.dtb": dtb}, "neither fitImage nor fit.its"),
        ({"fitImage": b"no FIT"}, "no flattened device tree"),
        (fit("sha512,rsa2048"), "none that the device verifies, which are sha256,rsa2048, sha256,rsa4096"),
        (fit("sha256,rsa3072"), "none that the device verifies"),
        ({**fit("sha256,rsa2048"), "uboot.dtb": b"no tree"}, "no flattened device tree"),
        ({"fit.its": b"nothing"}, "mkimage cannot build"),
        ({"fitImage": cut, "uboot.dtb": dtb}, "is cut off"),
        ({"fit.its": b"x", **{f"{number}": b"" for number in range(300)}}, "more than 256 files"),
    ):
        with pytest.raises(ArtifactRejected, match=words):
            await sign(pairs["rsa2048"], files)
    for pair in (pairs["rsa4096"], pairs["p256"]):
        with pytest.raises(KeyUnsuited):
            await sign(pair, fit("sha256,rsa2048"))
