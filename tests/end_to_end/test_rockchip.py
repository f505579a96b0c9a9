"""Rockchip through HTTP, as the layers' own lines post it, and booted by a ROM of the tests' own.

Rockchip's closed programs are played by stand-ins (tests/signers/test_rockchip.py says of what that is proof).
"""

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import fit_images
import fit_rules
import httpx
import optee_rules
import pytest
import rockchip_images
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from tests.end_to_end.conftest import accepts, curl

MACHINES = [("demo-token", "rk", "rkoptee"), ("demo-file", "file-rk", "file-rkoptee")]
MACHINES += [("demo-yubihsm", "file-rk", "file-rkoptee")]
TA = "8aaaf200-2450-11e4-abe2-0002a5d5c51b"
ELF = Path("/bin/true").read_bytes()
IMAGES = {"471": b"ddr" * 1000, "472": b"usbplug" * 1000, "FlashData": b"ddr" * 1000, "FlashBoot": b"spl" * 2000}


def boots(kind: str, signed: bytes, public_key: Path, directory: Path) -> bool:
    """What the ROM says, in a process that has nothing of the service."""
    (directory / "signed").write_bytes(signed)
    return accepts(directory, sys.executable, rockchip_images.__file__, kind, "signed", public_key)


@pytest.mark.parametrize(("machine", "label", "_"), MACHINES)
def test_an_idblock(fixtures_service: Any, softhsm: Any, tmp_path: Path, machine: str, label: str, _: str) -> None:
    rockchip_images.write_idblock(tmp_path / "idblock.img", os.urandom(40_000), b"spl" * 30_000)
    fields = (f"machine={machine}", "soctype=rk3588", "artifact=@idblock.img", "artifact_type=idblock")
    signed = curl(f"{fixtures_service.url}/sign/rk", tmp_path, *fields)
    assert boots("idblock", signed, softhsm.public_key(label), tmp_path)
    for at in (0x14, 0x600, 5000):
        tampered = bytearray(signed)
        tampered[at] ^= 1
        assert not boots("idblock", bytes(tampered), softhsm.public_key(label), tmp_path)
    assert not boots("idblock", signed, softhsm.public_key("swupdate-rsa"), tmp_path)


@pytest.mark.parametrize(("machine", "label", "_"), MACHINES)
def test_a_usb_loader(fixtures_service: Any, softhsm: Any, tmp_path: Path, machine: str, label: str, _: str) -> None:
    (tmp_path / "download.bin").write_bytes(rockchip_images.loader(IMAGES))
    fields = (f"machine={machine}", "soctype=rk3588", "artifact=@download.bin", "artifact_type=usbloader")
    signed = curl(f"{fixtures_service.url}/sign/rk", tmp_path, *fields)
    assert boots("usbloader", signed, softhsm.public_key(label), tmp_path)
    tampered = bytearray(signed[:-4])
    tampered[6000] ^= 1
    tampered += rockchip_images.crc(bytes(tampered)).to_bytes(4, "little")
    assert not boots("usbloader", bytes(tampered), softhsm.public_key(label), tmp_path)


def test_idblocks_of_other_socs_are_refused_by_name(fixtures_service: Any, tmp_path: Path) -> None:
    """Of the format that U-Boot's mkimage makes for them."""
    (tmp_path / "spl").write_bytes(b"spl" * 1000)
    for soc, tag in (("rk3399", "RK33"), ("rk3328", "RK32")):
        subprocess.run(
            ["mkimage", "-T", "rksd", "-n", soc, "-d", "spl", "idblock.img"],
            cwd=tmp_path, check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        answer = httpx.post(
            f"{fixtures_service.url}/sign/rk",
            data={"machine": "demo-token", "soctype": "rk3588", "artifact_type": "idblock"},
            files={"artifact": ("idblock.img", (tmp_path / "idblock.img").read_bytes())},
        )
        assert answer.status_code == 422
        assert f"older format of {tag}xx" in answer.json()["detail"]


def test_statuses(fixtures_service: Any) -> None:
    url, files = f"{fixtures_service.url}/sign/rk", {"artifact": ("x", b"x")}
    fields = {"machine": "demo-token", "soctype": "rk3588", "artifact_type": "idblock"}
    for change, status in (
        ({}, 422), ({"soctype": "rk3399"}, 400), ({"artifact_type": "boot"}, 400), ({"machine": "nobody"}, 422),
    ):  # fmt: skip
        assert httpx.post(url, data={**fields, **change}, files=files).status_code == status
    rockchip = rockchip_images.header([bytes(512)]) + bytes(512)
    nobody = httpx.post(url, data={**fields, "machine": "nobody"}, files={"artifact": ("x", rockchip)})
    assert nobody.status_code == 404
    burning = httpx.post(url, data={**fields, "burn_key_hash": "yes"}, files={"artifact": ("x", rockchip)})
    assert burning.status_code == 501
    assert "rk_sign_tool" in burning.json()["detail"]
    tee = httpx.post(f"{fixtures_service.url}/sign/rkoptee-tee", data={"machine": "demo-token"}, files=files)
    assert tee.status_code == 501
    assert "change_puk" in tee.json()["detail"]
    fixtures_service.assert_no_files()


@pytest.mark.parametrize(("machine", "label", "_"), MACHINES)
def test_a_fit(fixtures_service: Any, softhsm: Any, tmp_path: Path, machine: str, label: str, _: str) -> None:
    """As digsigserver's page signs the kernel's, and U-Boot's, of its source."""
    fit = fit_images.make(tmp_path, algo="sha256,rsa2048", more='padding = "pss";', external="-E -B 200")
    fit.rename(tmp_path / "fitImage")
    fit_images.write_dtb(tmp_path / "uboot.dtb")
    fields = (f"machine={machine}", "soctype=rk3588", "artifact=@input.tar.gz", "artifact_type=fit-image")
    source = ("fit.its", "kernel", "tree.dtb", "uboot.dtb")
    for files, more in ((("fitImage", "uboot.dtb"), ("external_data_offset=0x2000",)), (source, ())):
        subprocess.run(["tar", "-czf", "input.tar.gz", *files], cwd=tmp_path, check=True)
        (tmp_path / "output.tar.gz").write_bytes(curl(f"{fixtures_service.url}/sign/rk", tmp_path, *fields, *more))
        subprocess.run(["tar", "-xzf", "output.tar.gz"], cwd=tmp_path, check=True)
        signed, dtb = (tmp_path / name for name in ("fitImage", "uboot.dtb"))
        modulus = subprocess.check_output(["fdtget", "-t", "x", dtb, "/signature/key-dev", "rsa,modulus"], text=True)
        key = load_pem_public_key(softhsm.public_key(label).read_bytes())
        assert int("".join(f"{int(word, 16):08x}" for word in modulus.split()), 16) == key.public_numbers().n  # type: ignore[union-attr]
        for name in ("hash@c", "hash@np"):  # as Rockchip's build takes them out
            subprocess.run(["fdtput", "-r", dtb, f"/signature/key-dev/{name}"], check=True)
        assert fit_rules.verify(signed.read_bytes(), dtb.read_bytes()) == 2
        tampered = signed.read_bytes().replace(b"a kernel", b"A kernel", 1)
        with pytest.raises(fit_rules.Refused):
            fit_rules.verify(tampered, dtb.read_bytes())
        fit_images.write_dtb(dtb)


@pytest.mark.parametrize(("machine", "_", "label"), MACHINES)
def test_tas(fixtures_service: Any, softhsm: Any, tmp_path: Path, machine: str, _: str, label: str) -> None:
    vendor = rsa.generate_private_key(65537, 2048)
    files = {}
    for number, (pss, uuid) in enumerate([(True, UUID(TA)), (False, UUID(TA)), (False, None)]):
        directory = tmp_path / f"lib/{number}"
        directory.mkdir(parents=True)
        ta = rockchip_images.trusted_application(vendor, ELF, pss=pss, uuid=uuid)
        (directory / f"{TA}.ta").write_bytes(ta)
        files[f"./lib/{number}/{TA}.ta"] = ta
    line = "find . -type f -name '*.ta' | xargs tar -czf ta-files.tar.gz"  # as digsigserver's page has it
    subprocess.run(["/bin/sh", "-c", line], cwd=tmp_path, check=True)
    fields = (f"machine={machine}", "artifact=@ta-files.tar.gz")
    signed = curl(f"{fixtures_service.url}/sign/rkoptee-ta", tmp_path, *fields)
    with tarfile.open(fileobj=io.BytesIO(signed), mode="r:gz") as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert found.keys() == files.keys()
    key, other = softhsm.public_key(label).read_bytes(), softhsm.public_key("swupdate-rsa").read_bytes()
    for name, content in found.items():
        assert content[:16] == files[name][:16]  # its type, size and algorithm
        assert optee_rules.load(content, TA, key)[0] == ELF
        for data, root in ((content[:-1] + b"x", key), (content, other)):
            with pytest.raises(optee_rules.Refused):
                optee_rules.load(data, TA, root)


def test_digsigserver_s_key_files_and_tools(start: Callable[..., Any], softhsm: Any, tmp_path: Path) -> None:
    """All of its layout, and its variables' meaning."""
    home = tmp_path / "keys/board"
    for name in ("rksign/dev.key", "rkopteesign/optee-signing-key.pem"):
        (home / name).parent.mkdir(parents=True)
        (home / name).write_bytes((softhsm.keys / "demo-file" / name).read_bytes())
        (home / name).chmod(0o600)
    public_key = softhsm.public_key("file-rkoptee").read_bytes()
    (home / "rkopteesign/optee-signing-pubkey.pem").write_bytes(public_key)
    (home / "rkopteesign/optee-signing-pubkey.pem").chmod(0o600)
    tools = tmp_path / "tools"
    (tools / "rkbin-tools").mkdir(parents=True)
    (tools / "change_puk").write_text("#!/bin/sh\nopenssl rsa -pubin -in $4 -outform DER -out $2 2>/dev/null\n")
    (tools / "rkbin-tools/rk_sign_tool").write_text("#!/bin/sh\nexit 7\n")
    for name in ("boot_merger", "setting.ini"):
        (tools / "rkbin-tools" / name).write_text("")
    for path in (tools / "change_puk", tools / "rkbin-tools/rk_sign_tool", *tmp_path.parents, tmp_path, tools):
        if path.is_relative_to(tmp_path.parent.parent):
            path.chmod(0o755)
    grants = [
        {"name": f"{signer}-{role}", "signer": signer, "role": role, "provider": "files", "object": object_}
        for signer, role, object_ in (
            ("rk", "key", "{machine}/rksign/dev.key"),
            ("rk", "burn", "{machine}/rksign/dev.key"),
            ("rkoptee-ta", "key", "{machine}/rkopteesign/optee-signing-key.pem"),
            ("rkoptee-tee", "pubkey", "{machine}/rkopteesign/optee-signing-pubkey.pem"),
        )
    ]
    service = start(
        {
            "providers.files": {"kind": "file", "root": str(tmp_path / "keys")},
            "signers.rk": {"tools": str(tools)},
            "grants": grants,
        }
    )
    rockchip_images.write_idblock(tmp_path / "idblock.img", b"ddr" * 1000, b"spl" * 1000)
    fields = ("machine=board", "soctype=3588", "artifact=@idblock.img", "artifact_type=idblock")
    signed = curl(f"{service.url}/sign/rk", tmp_path, *fields)
    assert boots("idblock", signed, softhsm.public_key("file-rk"), tmp_path)
    # one key for the signatures that are made here, and for those of the tool
    burning = httpx.post(
        f"{service.url}/sign/rk",
        data={"machine": "board", "soctype": "3588", "artifact_type": "idblock", "burn_key_hash": "yes"},
        files={"artifact": ("idblock.img", (tmp_path / "idblock.img").read_bytes())},
    )
    assert burning.status_code == 500
    assert "rk_sign_tool ended with an error" in burning.json()["detail"]
    der = subprocess.check_output(["openssl", "rsa", "-pubin", "-outform", "DER"], input=public_key, stderr=-3)
    (tmp_path / "bl32.bin").write_bytes(bytes(len(der)))
    tee = curl(f"{service.url}/sign/rkoptee-tee", tmp_path, "machine=board", "artifact=@bl32.bin")
    assert tee == der
    assert softhsm.keys.joinpath("demo-file/rksign/dev.key").read_text().splitlines()[1] not in service.log
    service.assert_no_files()
