"""NXP i.MX boot images: HABv4 on U-Boot for an i.MX 6, and an AHAB container."""

import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from case import ROOT, Case, Fixtures, Post, accepts, flip
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

sys.path.insert(0, str(ROOT / "softhsm-fixtures"))
import imx_images

IMAGE = ROOT / ".cache/u-boot/nitrogen6q/u-boot-dtb.imx"
CST = ROOT / ".cache/cst"
HAB = {"RSA-2048": "sha256_2048_65537", "RSA-4096": "sha256_4096_65537", "P-256": "sha256_secp256r1"}
AHAB = {"P-384": "sha384_secp384r1", "P-256": "sha256_secp256r1"}
ENGINE, PROVIDER = "3.4.1", "4.0.1"


def cases(fixtures: Fixtures) -> Iterator[Case]:
    """Both families, keys on the tokens and in files, by either backend of cst; 4.0.1 where it could be unpacked."""
    for where, provider, backend in (
        ("token", "softhsm", "pkcs11"),
        ("file", "file", "pkcs11"),
        ("file", "file", "ssl"),
        ("yubihsm", "yubihsm", "pkcs11"),
    ):
        for key in HAB:
            yield hab(fixtures, key, where, provider, backend, ENGINE)
        yield container(fixtures, "P-384", where, provider, backend, ENGINE)
        yield container(fixtures, "P-256", where, provider, backend, ENGINE)
    if (CST / f"cst-{PROVIDER}").exists():
        yield hab(fixtures, "RSA-2048", "token", "softhsm", "pkcs11", PROVIDER)
        yield container(fixtures, "P-384", "token", "softhsm", "pkcs11", PROVIDER)


def hab(fixtures: Fixtures, key: str, where: str, provider: str, backend: str, version: str) -> Case:
    machine = f"demo-{where}-{key.replace('-', '').lower()}"
    labels = {kind: f"{kind}1_1_{HAB[key]}_v3_usr" for kind in ("CSF", "IMG")}
    certificates = {kind: _certificate(fixtures, machine, label) for kind, label in labels.items()}
    names = {kind: _name(label, backend) for kind, label in labels.items()}
    variant = f"HABv4 {key}, {backend}, {version}"
    return Hab(variant, provider, machine, backend, version, names["CSF"], names["IMG"], certificates["IMG"])


def container(fixtures: Fixtures, key: str, where: str, provider: str, backend: str, version: str) -> Case:
    machine, label = f"demo-{where}-ahab-{key.replace('-', '').lower()}", f"SRK1_{AHAB[key]}_v3_usr"
    variant = f"AHAB {key}, {backend}, {version}"
    certificate = _certificate(fixtures, machine, label)
    return Container(variant, provider, machine, backend, version, _name(label, backend), certificate)


def _certificate(fixtures: Fixtures, machine: str, label: str) -> Path:
    if "token" in machine:
        return fixtures.certificate(label)
    machine = machine.replace("yubihsm", "file")  # the same keys
    return fixtures.directory / "keys" / machine / "imxsign/crts" / f"{label}_crt.pem"


def _name(label: str, backend: str) -> str:
    """As it stands in the CSFs of those who use a YubiHSM, or a key tarball, today."""
    if backend == "pkcs11":
        return f"pkcs11:token=YubiHSM;object={label};type=cert;pin-value=password"
    return f"../crts/{label}_crt.pem"


@dataclass(frozen=True)
class Hab:
    """A CSF for U-Boot; OpenSSL verifies the image's signature in it."""

    variant: str
    provider: str
    machine: str
    backend: str
    version: str
    csf: str
    img: str
    certificate: Path
    signer = "imx"
    verifier = "openssl cms"

    def sign(self, post: Post, directory: Path) -> Path:
        """The blocks are those of the image's vector table."""
        image, text = directory / IMAGE.name, directory / "csf.txt"
        image.write_bytes(IMAGE.read_bytes())
        blocks = imx_images.ivt_blocks(image.read_bytes())
        text.write_text(imx_images.hab_csf(blocks, image.name, self.csf, self.img))
        fields = {"machine": self.machine, "soctype": "mx6", "cstversion": self.version, "backend": self.backend}
        signed = directory / "csf.bin"
        signed.write_bytes(post("/sign/imx", fields, {"csf": text, "artifact": image}))
        return signed

    def verify(self, signed: Path) -> bool:
        """Takes the last signature out of the CSF, and the blocks out of the image."""
        csf = signed.read_bytes()
        blocks = re.search(r"Blocks = \S+ (\S+) (\S+)", signed.with_name("csf.txt").read_text())
        assert blocks
        offset, length = (int(number, 16) for number in blocks.groups())
        content = signed.with_name("content")
        content.write_bytes(signed.with_name(IMAGE.name).read_bytes()[offset : offset + length])
        signed.with_name("signature").write_bytes(image_signature(csf))
        command = ("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", "signature", "-content", content)
        trust = ("-certfile", self.certificate, "-noverify", "-nointern", "-out", "verified")
        return accepts(*command, *trust, directory=signed.parent)

    def tamper(self, signed: Path) -> None:
        """One byte of the image."""
        flip(signed.with_name(IMAGE.name), 0x1000)


def image_signature(csf: bytes) -> bytes:
    """The CMS of the last Authenticate Data command (HAB4 API, section 4.3.8)."""
    end, at, signature = struct.unpack_from(">H", csf, 1)[0], 4, b""
    while at < end:
        if csf[at] == 0xCA:
            start = struct.unpack_from(">I", csf, at + 8)[0]
            signature = csf[start + 4 : start + struct.unpack_from(">H", csf, start + 1)[0]]
        at += struct.unpack_from(">H", csf, at + 1)[0]
    return signature


@dataclass(frozen=True)
class Container:
    """A container of two images; OpenSSL verifies the signature in it."""

    variant: str
    provider: str
    machine: str
    backend: str
    version: str
    key: str
    certificate: Path
    signer = "imx"
    verifier = "openssl dgst"

    def sign(self, post: Post, directory: Path) -> Path:
        """The container is made here."""
        artifact, text, signed = directory / "flash.bin", directory / "csf.txt", directory / "signed.bin"
        offsets = imx_images.write_ahab_container(artifact, [b"first" * 3000, b"second" * 1000])
        text.write_text(imx_images.ahab_csf(offsets, artifact.name, self.key))
        fields = {"machine": self.machine, "soctype": "mx9", "cstversion": self.version, "backend": self.backend}
        signed.write_bytes(post("/sign/imx", fields, {"csf": text, "artifact": artifact}))
        return signed

    def verify(self, signed: Path) -> bool:
        """All of the container up to the signature is signed."""
        content = signed.read_bytes()
        block = struct.unpack_from("<H", content, 12)[0]
        start = block + struct.unpack_from("<H", content, block + 8)[0]
        raw = content[start + 8 : start + struct.unpack_from("<H", content, start + 1)[0]]
        half = len(raw) // 2
        r, s = (int.from_bytes(raw[at : at + half], "big") for at in (0, half))
        signed.with_name("signature").write_bytes(encode_dss_signature(r, s))
        signed.with_name("content").write_bytes(content[:start])
        command = ("openssl", "x509", "-in", self.certificate, "-noout", "-pubkey", "-out", "public.pem")
        subprocess.run(command, cwd=signed.parent, check=True)
        hash_ = "-sha384" if "P-384" in self.variant else "-sha256"
        key = ("-verify", "public.pem", "-signature", "signature")
        return accepts("openssl", "dgst", hash_, *key, "content", directory=signed.parent)

    def tamper(self, signed: Path) -> None:
        """Another load address of the first image."""
        flip(signed, 16 + 8)
