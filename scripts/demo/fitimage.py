"""FIT images: a small one with keys for RSA, RSA-PSS and ECDSA, and Debian's U-Boot for a Rockchip board."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from case import PLACES, ROOT, Case, Fixtures, Post, accepts

sys.path.insert(0, str(ROOT / "softhsm-fixtures"))
import fit_images

FIT_CHECK_SIGN = ROOT / ".cache/u-boot-tools/fit_check_sign"
RULES = ROOT / "softhsm-fixtures/fit_rules.py"
BOARD = ROOT / ".cache/u-boot/firefly-rk3399"
PSS = 'padding = "pss";'


def cases(_fixtures: Fixtures) -> Iterator[Case]:
    """Every variant with every provider."""
    for provider, machine, _ in PLACES:
        yield Small("RSA-2048", provider, machine, "sha256,rsa2048", "dev")
        yield Small("RSA-2048, external data", provider, machine, "sha256,rsa2048", "dev", external="-E -p 2000")
        yield Small("RSA-PSS-2048", provider, machine, "sha256,rsa2048", "dev", more=PSS)
        yield Small("P-256", provider, machine, "sha256,ecdsa256", "ec")
        yield Real("RSA-2048, Debian's U-Boot", provider, machine, "sha256,rsa2048")


class Image:
    """A FIT, and beside it U-Boot's device tree with the key, which is marked as required."""

    signer = "fitimage"
    description: bytes
    machine: str
    algo: str

    @property
    def verifier(self) -> str:
        """fit_check_sign of U-Boot 2025 takes ECDSA keys from files only."""
        return "fit_check_sign" if "rsa" in self.algo else "fit_rules.py"

    def post(self, post: Post, directory: Path, fit: Path, dtb: Path) -> Path:
        """Unpacks what came back; returns the FIT."""
        fields = {"machine": self.machine, "mark_required": "1"}
        (directory / "signed.tar.gz").write_bytes(post("/sign/fitimage", fields, {"artifact": fit, "dtb": dtb}))
        (directory / "signed").mkdir()
        subprocess.run(["tar", "-xzf", "../signed.tar.gz"], cwd=directory / "signed", check=True)
        return directory / "signed/fitImage"

    def verify(self, signed: Path) -> bool:
        """By the key in the device tree."""
        dtb = signed.with_name("u-boot.dtb")
        if self.verifier == "fit_check_sign":
            return accepts(FIT_CHECK_SIGN, "-f", signed, "-k", dtb, directory=signed.parent)
        return accepts(sys.executable, RULES, signed, dtb, directory=signed.parent)

    def tamper(self, signed: Path) -> None:
        """Another description: of an image, or of all."""
        content = signed.read_bytes()
        place = content.index(self.description)
        signed.write_bytes(content[:place] + b"x" + content[place + 1 :])


@dataclass(frozen=True)
class Small(Image):
    """A kernel and a device tree in two configurations."""

    variant: str
    provider: str
    machine: str
    algo: str
    key: str
    more: str = ""
    external: str = ""
    description = b"device tree\0"

    def sign(self, post: Post, directory: Path) -> Path:
        """The FIT is mkimage's own."""
        fit = fit_images.make(directory, algo=self.algo, key=self.key, more=self.more, external=self.external)
        return self.post(post, directory, fit, fit_images.write_dtb(directory / "u-boot.dtb"))


@dataclass(frozen=True)
class Real(Image):
    """U-Boot with TF-A."""

    variant: str
    provider: str
    machine: str
    algo: str
    description = b"FIT image for U-Boot"

    def sign(self, post: Post, directory: Path) -> Path:
        """With hash and signature nodes, which Debian's has not."""
        dtb = Path(shutil.copy(BOARD / "rk3399-firefly.dtb", directory / "u-boot.dtb"))
        fit = fit_images.with_nodes(BOARD / "u-boot.itb", directory / "u-boot.itb", self.algo)
        return self.post(post, directory, fit, dtb)
