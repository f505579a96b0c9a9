"""Jetson EKB images, opened by OpenSSL as OP-TEE opens them on a device."""

import hmac
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from case import PLACES, Case, Fixtures, Post, flip

KEYS = {1: "kernel-encryption.key", 2: "disk-encryption.key", 4: "uefi-variable-authentication.key"}


def cases(fixtures: Fixtures) -> Iterator[Case]:
    """Every kind of fuse, and both versions of the image."""
    keys = fixtures.directory / "keys"
    files, token = keys / "demo-file/ekbsign", keys / "demo-token/ekbsign/oem_k1.key"
    for provider, machine, prefix in PLACES:
        fuse = files / "oem_k1.key" if prefix else token
        for l4t in ("35.4.1", "36.4.3"):
            yield Ekb(f"tegra234, L4T {l4t}", provider, machine, "tegra234", l4t, fuse, files)
    kek2 = keys / "demo-token-t194/ekbsign/kek2.key"
    yield Ekb("tegra194, L4T 35.4.1", "softhsm", "demo-token-t194", "tegra194", "35.4.1", kek2, files)


@dataclass(frozen=True)
class Ekb:
    """An image for one machine, whose fuses hold the key in the file `fuse`."""

    variant: str
    provider: str
    machine: str
    soctype: str
    l4t: str
    fuse: Path
    files: Path

    signer = "ekb"
    verifier = "openssl mac, enc"

    def sign(self, post: Post, directory: Path) -> Path:
        """No artifact is sent: the image is made of granted keys."""
        image = directory / "ekb.img"
        fields = {"machine": self.machine, "soctype": self.soctype, "bspversion": self.l4t}
        image.write_bytes(post("/sign/tegra/ekb", fields, {}))
        return image

    def verify(self, signed: Path) -> bool:
        """Checks the MAC, decrypts, and compares the keys."""
        image, fuse = signed.read_bytes(), self.fuse.read_text().strip()
        at, vector = 16, bytes.fromhex((self.files / "fixed-vector").read_text())
        if image[12] == 2:
            at, vector = 32, image[16:32]
        root = openssl(f"enc -aes-{4 * len(fuse)}-ecb -nopad -K {fuse}", vector)
        mac, content = image[at : at + 16], image[at + 16 :]
        (size,) = struct.unpack_from("<I", content)
        if not hmac.compare_digest(mac, cmac(derived(root, b"authentication"), content[: 32 + size])):
            return False
        key, iv = derived(root, b"encryption").hex(), content[16:32].hex()
        plain = openssl(f"enc -d -aes-128-cbc -nopad -K {key} -iv {iv}", content[32 : 32 + size])
        expected = b""
        for tag, name in KEYS.items():
            value = bytes.fromhex((self.files / name).read_text())
            expected += struct.pack("<II", tag, len(value)) + value
        return plain.startswith(expected + bytes(8))

    def tamper(self, signed: Path) -> None:
        """Another byte in the ciphertext."""
        flip(signed, 100)


def derived(root: bytes, label: bytes) -> bytes:
    """NIST SP 800-108 in counter mode, by AES-CMAC: 128 bits."""
    return cmac(root, b"\x01" + label + b"\0ekb\0\0\0\x80")


def cmac(key: bytes, data: bytes) -> bytes:
    return openssl(f"mac -cipher AES-128-CBC -macopt hexkey:{key.hex()} -binary CMAC", data)


def openssl(command: str, data: bytes) -> bytes:
    return subprocess.run(["openssl", *command.split()], input=data, check=True, stdout=subprocess.PIPE).stdout
