"""Rockchip: an idblock and a USB loader, booted by a ROM written from the layouts; a FIT, and TAs signed anew."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from case import PLACES, ROOT, Case, Fixtures, Post, accepts, flip
from cryptography.hazmat.primitives.asymmetric import rsa

sys.path.insert(0, str(ROOT / "softhsm-fixtures"))
import fit_images
import fit_rules
import optee_rules
import rockchip_images

TA = "8aaaf200-2450-11e4-abe2-0002a5d5c51b"
IMAGES = {"471": b"ddr" * 1000, "472": b"usbplug" * 1000, "FlashData": b"ddr" * 1000, "FlashBoot": b"spl" * 2000}


def cases(fixtures: Fixtures) -> Iterator[Case]:
    """Every artifact with keys of every provider."""
    for provider, machine, prefix in PLACES:
        key = fixtures.public_key(f"{prefix}rk")
        yield Boot("idblock", provider, machine, key)
        yield Boot("usbloader", provider, machine, key)
        yield Fit("fit-image, RSA-PSS", provider, machine)
        yield Ta("TA, RSA, signed again", provider, machine, fixtures.public_key(f"{prefix}rkoptee"))


@dataclass(frozen=True)
class Boot:
    """What the boot ROM verifies."""

    variant: str
    provider: str
    machine: str
    key: Path
    signer = "rk"
    verifier = "boot ROM of the demo's own"

    def sign(self, post: Post, directory: Path) -> Path:
        """An idblock of mkimage's, or a loader; returns the signed one."""
        unsigned, signed = directory / "unsigned.img", directory / "signed.img"
        if self.variant == "idblock":
            rockchip_images.write_idblock(unsigned, b"ddr" * 10_000, b"spl" * 20_000)
        else:
            unsigned.write_bytes(rockchip_images.loader(IMAGES))
        fields = {"machine": self.machine, "soctype": "rk3588", "artifact_type": self.variant}
        signed.write_bytes(post("/sign/rk", fields, {"artifact": unsigned}))
        return signed

    def verify(self, signed: Path) -> bool:
        """By the hash of the key, as the fuses hold it."""
        program = (sys.executable, rockchip_images.__file__, self.variant, signed, self.key)
        return accepts(*program, directory=signed.parent)

    def tamper(self, signed: Path) -> None:
        """Another byte of an image; the CRC of a loader is made to fit."""
        flip(signed, 10_000)
        if self.variant == "usbloader":
            content = signed.read_bytes()[:-4]
            signed.write_bytes(content + rockchip_images.crc(content).to_bytes(4, "little"))


@dataclass(frozen=True)
class Fit:
    """A FIT for Rockchip's U-Boot, and its device tree."""

    variant: str
    provider: str
    machine: str
    signer = "rk"
    verifier = "fit_rules"

    def sign(self, post: Post, directory: Path) -> Path:
        """Returns the FIT; the device tree, with the key in it, is beside it."""
        fit = fit_images.make(directory, algo="sha256,rsa2048", more='padding = "pss";', external="-E -B 200")
        fit.rename(directory / "fitImage")
        fit_images.write_dtb(directory / "uboot.dtb")
        unsigned, signed = directory / "input.tar.gz", directory / "output.tar.gz"
        subprocess.run(["tar", "-czf", unsigned, "fitImage", "uboot.dtb"], cwd=directory, check=True)
        fields = {"machine": self.machine, "soctype": "rk3588", "artifact_type": "fit-image"}
        signed.write_bytes(post("/sign/rk", fields, {"artifact": unsigned}))
        subprocess.run(["tar", "-xzf", signed], cwd=directory, check=True)
        for name in ("hash@c", "hash@np"):  # Rockchip's build takes them out, too
            subprocess.run(["fdtput", "-r", "uboot.dtb", f"/signature/key-dev/{name}"], cwd=directory, check=True)
        return directory / "fitImage"

    def verify(self, signed: Path) -> bool:
        """By U-Boot's rules, and the key in its device tree."""
        return accepts(sys.executable, fit_rules.__file__, signed, "uboot.dtb", directory=signed.parent)

    def tamper(self, signed: Path) -> None:
        """Another byte of the kernel."""
        signed.write_bytes(signed.read_bytes().replace(b"a kernel", b"A kernel", 1))


@dataclass(frozen=True)
class Ta:
    """A TA that Rockchip has signed, as it were."""

    variant: str
    provider: str
    machine: str
    key: Path
    signer = "rkoptee-ta"
    verifier = "optee_rules, openssl"

    def sign(self, post: Post, directory: Path) -> Path:
        """Returns the TA that came back."""
        unsigned, signed = directory / f"{TA}.ta", directory / "signed.ta"
        vendor = rsa.generate_private_key(65537, 2048)
        image = Path("/bin/true").read_bytes()
        unsigned.write_bytes(rockchip_images.trusted_application(vendor, image, pss=False, uuid=UUID(TA)))
        signed.write_bytes(post("/sign/rkoptee-ta", {"machine": self.machine}, {"artifact": unsigned}))
        return signed

    def verify(self, signed: Path) -> bool:
        """By OP-TEE's rules."""
        try:
            optee_rules.load(signed.read_bytes(), TA, self.key.read_bytes())
        except optee_rules.Refused:
            return False
        return True

    def tamper(self, signed: Path) -> None:
        """Another last byte."""
        flip(signed, -1)
