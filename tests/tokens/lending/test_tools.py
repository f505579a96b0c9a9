"""Other tools sign with keys on loan; every result is verified by another tool, without the loan."""

import hashlib
import shutil
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest

from tokens.lending import provider_uri_pem
from tokens.schemes import Ecdsa, Hash, RsaPkcs1v15

BY_BOTH = pytest.mark.parametrize("way", ["engine", "provider"])
RSA_2048 = "pkcs11:token=YubiHSM;object=rsa2048;type=private"
SHA256 = RsaPkcs1v15(Hash.SHA256)


def tamper(path: Path, part: bytes) -> None:
    """Changes that part of a file."""
    data = path.read_bytes()
    assert data.count(part) == 1
    path.write_bytes(data.replace(part, bytes(len(part))))


@pytest.mark.parametrize(
    ("id_", "name", "mechanism", "options"),
    [
        ("01", "rsa2048", "SHA256-RSA-PKCS", ("-sha256",)),
        ("02", "rsa4096", "SHA512-RSA-PKCS", ("-sha512",)),
        (
            "01",
            "rsa2048",
            "RSA-PKCS-PSS",
            ("-sha256", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32"),
        ),
    ],
)
async def test_pkcs11_tool(
    lend: Any, tools: Any, id_: str, name: str, mechanism: str, options: tuple[str, ...]
) -> None:
    verify = ("openssl", "dgst", *options, "-verify", f"{name}.pub", "-signature")
    source, pss = "content", ()
    if mechanism == "RSA-PKCS-PSS":
        source, pss = "digest", ("--hash-algorithm", "SHA256", "--mgf", "MGF1-SHA256", "--salt-len", "32")
        (tools.directory / "digest").write_bytes(hashlib.sha256((tools.directory / "content").read_bytes()).digest())

    async def run(number: int) -> None:
        sign = ("pkcs11-tool", "--module", tools.client, "--sign", "--id", id_, "-m", mechanism, *pss)
        await tools.ok(*sign, "-i", source, "-o", f"{number}", loan=loan)
        await tools.ok(*verify, f"{number}", "content")

    async with lend() as loan:
        await tools.repeat(run)
    (tools.directory / "content").write_bytes(b"tampered")
    await tools.refuses(*verify, "0", "content")


async def test_the_token_holds_the_lent_keys_and_nothing_else(lend: Any, tools: Any) -> None:
    async with lend() as loan:
        listed = await tools.ok("pkcs11-tool", "--module", tools.client, "-O", loan=loan)
        certificate = ("pkcs11-tool", "--module", tools.client, "--read-object", "--type", "cert", "--id", "03")
        await tools.ok(*certificate, "-o", "read.der", loan=loan)
    assert listed.count("Private Key Object") == 4
    assert listed.count("Certificate Object") == 4
    assert "ed25519" not in listed
    read = await tools.ok("openssl", "x509", "-inform", "DER", "-in", "read.der")
    assert read == (tools.directory / "p256.crt").read_text()


@BY_BOTH
async def test_sbsign(lend: Any, tools: Any, signed: list[Any], way: str) -> None:
    """An EFI program."""
    program = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"
    (tools.directory / "key.pem").write_bytes(provider_uri_pem(RSA_2048))
    key = ("--engine", "pkcs11", "--key", RSA_2048) if way == "engine" else ("--key", "key.pem")

    async def run(number: int) -> None:
        await tools.ok("sbsign", *key, "--cert", "rsa2048.crt", "--output", f"{number}.efi", program, loan=loan)
        await tools.ok("sbverify", "--cert", "rsa2048.crt", f"{number}.efi")

    async with lend() as loan:
        await tools.repeat(run)
    assert signed == [("rsa2048", SHA256)] * 20
    tamper(tools.directory / "0.efi", b"#### LoaderInfo: systemd-boot ")
    await tools.refuses("sbverify", "--cert", "rsa2048.crt", "0.efi")


def split_module(path: Path) -> None:
    """Writes what a kernel takes apart: PATH.content and PATH.cms (include/linux/module_signature.h)."""
    signed, magic = path.read_bytes().split(b"~Module signature appended~\n")
    assert magic == b""
    size = int.from_bytes(signed[-4:], "big")
    path.with_suffix(".content").write_bytes(signed[: -12 - size])
    path.with_suffix(".cms").write_bytes(signed[-12 - size : -12])


@pytest.mark.parametrize("way", ["provider"])
@pytest.mark.parametrize(("name", "scheme"), [("rsa2048", SHA256), ("p256", Ecdsa(Hash.SHA256))])
@pytest.mark.parametrize("pem", [True, False])
async def test_sign_file(lend: Any, tools: Any, signed: list[Any], name: str, scheme: Any, pem: bool) -> None:
    """A kernel module: to sign-file any file is one. It knows no engine."""
    uri = f"pkcs11:token=YubiHSM;object={name};type=private"
    (tools.directory / "key.pem").write_bytes(provider_uri_pem(uri))
    sign = ("/usr/lib/linux-kbuild-6.1/scripts/sign-file", "sha256", "key.pem" if pem else uri, f"{name}.crt")
    verify = ("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-certfile", f"{name}.crt", "-noverify",
              "-out", "/dev/null", "-content")  # fmt: skip

    async def run(number: int) -> None:
        await tools.ok(*sign, "content", f"{number}.ko", loan=loan)
        split_module(tools.directory / f"{number}.ko")
        await tools.ok(*verify, f"{number}.content", "-in", f"{number}.cms")

    async with lend() as loan:
        await tools.repeat(run)
    assert signed == [(name, scheme)] * 20
    (tools.directory / "0.content").write_bytes(b"tampered")
    await tools.refuses(*verify, "0.content", "-in", "0.cms")


FIT = """\
/dts-v1/;
/ {
    description = "an image";
    images {
        kernel {
            description = "kernel";
            data = /incbin/("content");
            type = "kernel";
            arch = "arm64";
            os = "linux";
            compression = "none";
            load = <0>;
            entry = <0>;
            signature {
                algo = "sha256,rsa2048";
                key-name-hint = "rsa2048";
            };
        };
    };
    configurations {
        default = "conf";
        conf {
            kernel = "kernel";
        };
    };
};
"""


@BY_BOTH
async def test_mkimage(lend: Any, tools: Any, signed: list[Any], way: str) -> None:
    """An image of a U-Boot FIT: what is signed is the image's data (doc/uImage.FIT/signature.txt of U-Boot)."""
    (tools.directory / "image.its").write_text(FIT)
    await tools.ok("mkimage", "-f", "image.its", "unsigned.itb")
    # -k is a directory of PEM files, or with the engine a part of the URI
    (tools.directory / "rsa2048.key").write_bytes(provider_uri_pem(RSA_2048))
    key = ("-N", "pkcs11", "-k", "token=YubiHSM") if way == "engine" else ("-k", ".")
    verify = ("openssl", "dgst", "-sha256", "-verify", "rsa2048.pub", "-signature")

    async def run(number: int) -> None:
        shutil.copy(tools.directory / "unsigned.itb", tools.directory / f"{number}.itb")
        await tools.ok("mkimage", "-F", *key, f"{number}.itb", loan=loan)
        value = await tools.ok("fdtget", "-t", "bx", f"{number}.itb", "/images/kernel/signature", "value")
        (tools.directory / f"{number}").write_bytes(bytes(int(each, 16) for each in value.split()))
        await tools.ok(*verify, f"{number}", "content")

    async with lend() as loan:
        await tools.repeat(run)
    # each time the file has no room for the signature at first; it makes room, and signs again
    assert signed == [("rsa2048", SHA256)] * 40
    (tools.directory / "content").write_bytes(b"tampered")
    await tools.refuses(*verify, "0", "content")


async def test_mender_artifact(lend: Any, tools: Any, signed: list[Any]) -> None:
    """Its ECDSA by PKCS#11 is DER, which its own `validate` refuses: RSA only."""
    write = ("mender-artifact", "write", "module-image", "-T", "script", "-n", "release", "-t", "device")
    await tools.ok(*write, "--compression", "none", "-f", "content", "-o", "unsigned.mender")

    async def run(number: int) -> None:
        sign = ("mender-artifact", "sign", "--key-pkcs11", RSA_2048, "-o", f"{number}.mender", "unsigned.mender")
        await tools.ok(*sign, loan=loan)
        await tools.ok("mender-artifact", "validate", "-k", "rsa2048.pub", f"{number}.mender")
        signature = await tools.ok("tar", "-xOf", f"{number}.mender", "manifest.sig")
        (tools.directory / f"{number}.sig").write_bytes(b64decode(signature))
        manifest = await tools.ok("tar", "-xOf", f"{number}.mender", "manifest")
        (tools.directory / f"{number}.manifest").write_text(manifest)
        verify = ("openssl", "dgst", "-sha256", "-verify", "rsa2048.pub", "-signature", f"{number}.sig")
        await tools.ok(*verify, f"{number}.manifest")

    async with lend() as loan:
        await tools.repeat(run)
    assert signed == [("rsa2048", SHA256)] * 20
    tamper(tools.directory / "0.mender", (tools.directory / "content").read_bytes()[:100])
    await tools.refuses("mender-artifact", "validate", "-k", "rsa2048.pub", "0.mender")
