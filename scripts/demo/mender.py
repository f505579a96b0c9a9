"""Mender: artifacts of both versions and each compression, uploaded."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from case import PLACES, Case, Fixtures, Post, accepts

PAYLOAD_BYTES = 100_000
FORMS = {
    "v3": ("module-image", "-T", "demo"),
    "v3, uncompressed": ("module-image", "-T", "demo", "--compression", "none"),
    "v3, lzma": ("module-image", "-T", "demo", "--compression", "lzma"),
    "v2": ("rootfs-image", "-v", "2"),
}


def cases(fixtures: Fixtures) -> Iterator[Case]:
    """Every form with an RSA key, and one with a P-256 key, of each provider."""
    for provider, distro, prefix in PLACES:
        for form in FORMS:
            yield Artifact(f"RSA-2048, {form}", provider, distro, fixtures.public_key(f"{prefix}mender-rsa"), form)
        yield Artifact("P-256, v3", provider, f"{distro}-p256", fixtures.public_key(f"{prefix}mender-p256"), "v3")


@dataclass(frozen=True)
class Artifact:
    """An artifact, as mender-artifact writes it."""

    variant: str
    provider: str
    distro: str
    public_key: Path
    form: str
    signer = "mender"
    verifier = "mender-artifact"

    def sign(self, post: Post, directory: Path) -> Path:
        """Returns the signed artifact."""
        payload, unsigned, signed = (directory / name for name in ("payload", "unsigned.mender", "signed.mender"))
        payload.write_bytes(os.urandom(PAYLOAD_BYTES))
        command = ["mender-artifact", "write", *FORMS[self.form], "-n", "release-1", "-t", "board"]
        subprocess.run([*command, "-f", payload, "-o", unsigned], check=True, capture_output=True)
        signed.write_bytes(post("/sign/mender", {"distro": self.distro}, {"artifact": unsigned}))
        return signed

    def verify(self, signed: Path) -> bool:
        """By the public key that a device has."""
        return accepts("mender-artifact", "validate", "-k", self.public_key, signed, directory=signed.parent)

    def tamper(self, signed: Path) -> None:
        """The manifest's first two lines change places: all that it says is still true."""
        content = signed.read_bytes()
        start = content.index(b"  data/0000/payload") - 64
        first, second = content[start:].split(b"\n", 2)[:2]
        end = start + len(first) + len(second) + 2
        signed.write_bytes(content[:start] + second + b"\n" + first + b"\n" + content[end:])
