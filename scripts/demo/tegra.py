"""Boot files of Jetsons: sets for flashing and update payloads, by a BSP that plays NVIDIA's."""

import hashlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from case import PLACES, Case, Fixtures, Post

from tests.stand_in_bsp.build import request_files
from tests.stand_in_bsp.checks import content, openssl_accepts

VERSION = "35.4.1"
SOCTYPES = {"t234": "tegra234", "t194": "tegra194"}
KEYS = {("t234", "rsa"): "RSA-3072", ("t234", "ec"): "P-256", ("t194", "rsa"): "RSA-2048"}
IMAGES = (".bin", ".img", ".dtb")
PAYLOAD = "payloads_t23x/bl_only_payload"
PAYLOAD_HEAD_BYTES = 1056


def cases(fixtures: Fixtures) -> Iterator[Case]:
    """Both chips with each of their keys, with and without an SBK, for each provider."""
    for provider, machine, prefix in PLACES:
        for (chip, kind), key in KEYS.items():
            public_key = fixtures.public_key(f"{prefix}tegra-{chip}-{kind}")
            owner = "demo-file" if prefix else "demo-token"
            sbk = bytes.fromhex((fixtures.directory / f"keys/{owner}-{chip}/tegrasign/sbk.txt").read_text())
            for suffix, secret in (("", None), ("-sbk", sbk)):
                what = f"{chip} {key}{', SBK' if secret else ''}"
                name = f"{machine}-{chip}-{kind}{suffix}"
                yield FlashSet(f"{what}, flash set", provider, name, SOCTYPES[chip], kind, public_key, secret)
                yield Payload(f"{what}, BUP", provider, name, SOCTYPES[chip], kind, public_key, secret)


@dataclass(frozen=True)
class Boots:
    """Images of which a Jetson with the key, and the SBK, in its fuses boots each."""

    variant: str
    provider: str
    machine: str
    soctype: str
    kind: str
    public_key: Path
    sbk: bytes | None
    signer = "tegra"
    verifier = "openssl dgst"

    def post(self, post: Post, directory: Path, **manifest: str) -> Path:
        """Packs, posts and unpacks as the Yocto classes do."""
        work, sent, received = directory / "work", directory / "in.tar.gz", directory / "out.tar.gz"
        work.mkdir()
        for name, data in request_files(self.soctype, **manifest).items():
            (work / name).write_bytes(data)
        subprocess.run(["sh", "-c", f"tar -c -h -z -f {sent} *"], cwd=work, check=True)
        fields = {"machine": self.machine, "soctype": self.soctype, "bspversion": VERSION}
        received.write_bytes(post("/sign/tegra", fields, {"artifact": sent}))
        subprocess.run(["tar", "-x", "-z", "-f", received], cwd=work, check=True)
        return work

    def sources(self, work: Path) -> list[Path]:
        """What was to be signed, in order."""
        return sorted(path for path in work.iterdir() if path.suffix in IMAGES)

    def boots(self, image: bytes, source: Path) -> bool:
        """What OpenSSL says of the signature; and the image is the one that was sent."""
        if not openssl_accepts(image, self.soctype, self.kind, self.public_key):
            return False
        sent = source.read_bytes()
        return content(image, self.soctype, self.sbk) == sent.ljust(self.size(sent), b"\0")

    def size(self, sent: bytes) -> int:
        """How long an image is behind its header."""
        return len(sent) if self.soctype == "tegra234" else len(sent) + -len(sent) % 16

    def tampered(self, image: bytes) -> bytes:
        """Another byte in what is signed, and the digest that is not signed made right again."""
        changed = bytearray(image)
        changed[4090] ^= 1
        if self.soctype == "tegra234":
            changed[4:68] = hashlib.sha512(changed[68:8192]).digest()
        return bytes(changed)


class FlashSet(Boots):
    """A full set for flashing."""

    def sign(self, post: Post, directory: Path) -> Path:
        """Returns the directory with the files that were sent, and those that came back."""
        return self.post(post, directory)

    def verify(self, signed: Path) -> bool:
        """Every image."""
        return all(self.boots(self.image(source).read_bytes(), source) for source in self.sources(signed))

    def tamper(self, signed: Path) -> None:
        """One of the images."""
        image = self.image(self.sources(signed)[0])
        image.write_bytes(self.tampered(image.read_bytes()))

    def image(self, source: Path) -> Path:
        """The signed one."""
        encrypted = "_encrypt" if self.sbk else ""
        return source.with_name(f"{source.stem}_sigheader{encrypted}{source.suffix}.signed")


class Payload(Boots):
    """A bootloader update payload."""

    def sign(self, post: Post, directory: Path) -> Path:
        """Returns the directory with the files that were sent, and the payload."""
        return self.post(post, directory, BUPGENSPECS="fab=;boardsku=0001")

    def verify(self, signed: Path) -> bool:
        """Every image in it."""
        at, payload = PAYLOAD_HEAD_BYTES, (signed / PAYLOAD).read_bytes()
        header = 8192 if self.soctype == "tegra234" else 4096
        for source in self.sources(signed):
            size = header + self.size(source.read_bytes())
            if not self.boots(payload[at : at + size], source):
                return False
            at += size
        return at == len(payload)

    def tamper(self, signed: Path) -> None:
        """The first image in it."""
        payload = (signed / PAYLOAD).read_bytes()
        changed = self.tampered(payload[PAYLOAD_HEAD_BYTES:])
        (signed / PAYLOAD).write_bytes(payload[:PAYLOAD_HEAD_BYTES] + changed)
