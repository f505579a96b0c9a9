"""SWUpdate: a sw-description by RSA, RSA-PSS and CMS, and a whole .swu."""

import hashlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from case import PLACES, ROOT, Case, Fixtures, Post, accepts

SWUPDATE = ROOT / ".cache/debian/bin/swupdate"
VERSION = b"1.0.0"
DESCRIPTION = """\
software =
{{
  version = "1.0.0";
  hardware-compatibility: [ "1.0" ];
  images: ( {{ filename = "rootfs.img"; device = "/dev/null"; type = "raw"; sha256 = "{sha256}"; }} );
}}
"""


def cases(fixtures: Fixtures) -> Iterator[Case]:
    """Every variant with every provider, and longer keys."""
    demo_ca, file_cms = (fixtures.certificate(name) for name in ("demo-ca", "file-cms"))
    for provider, distro, prefix in (*PLACES, ("s3", "demo-s3", "file-")):
        public_key = fixtures.public_key("file-rsa" if prefix else "swupdate-rsa")
        trusted = file_cms if prefix else demo_ca
        yield Rsa("RSA", provider, distro, "RSA", public_key)
        yield Rsa("RSA-PSS", provider, distro, "RSA-PSS", public_key)
        yield Cms("CMS P-256", provider, distro, trusted)
        yield Swu("CMS P-256, .swu", provider, distro, trusted)
    yield Rsa("RSA-4096", "softhsm", "demo-large", "RSA", fixtures.public_key("large-rsa"))
    yield Rsa("ECDSA P-256", "softhsm", "demo-ec", "RSA", fixtures.public_key("digest-p256"))
    yield Cms("CMS RSA-3072", "softhsm", "demo-large", fixtures.certificate("large-cms"))
    yield Swu("CMS RSA-2048, .swu", "softhsm", "demo-token-rsa", demo_ca)


class Description:
    """A sw-description: what is signed and the signature lie side by side."""

    signer = "swupdate"
    distro: str
    method: str

    def sign(self, post: Post, directory: Path) -> Path:
        """Returns the path of the signature."""
        description = write_description(directory)
        signature = directory / "sw-description.sig"
        fields = {"distro": self.distro, "method": self.method}
        signature.write_bytes(post("/sign/swupdate", fields, {"sw-description": description}))
        return signature

    def tamper(self, signed: Path) -> None:
        """Another version."""
        replace(signed.with_name("sw-description"), VERSION, b"6.6.6")


@dataclass(frozen=True)
class Rsa(Description):
    """A raw RSA signature, or one by ECDSA; OpenSSL verifies it."""

    variant: str
    provider: str
    distro: str
    method: str
    public_key: Path
    verifier = "openssl dgst"

    def verify(self, signed: Path) -> bool:
        """PSS with whatever salt, as SWUpdate takes it."""
        pss = ("-sigopt", "rsa_padding_mode:pss") if self.method == "RSA-PSS" else ()
        key = ("-verify", self.public_key, *pss)
        description = signed.with_name("sw-description")
        return accepts("openssl", "dgst", "-sha256", *key, "-signature", signed, description, directory=signed.parent)


@dataclass(frozen=True)
class Cms(Description):
    """A detached CMS signature; OpenSSL verifies it, up to a certificate that is trusted."""

    variant: str
    provider: str
    distro: str
    trusted: Path
    method = "CMS"
    verifier = "openssl cms"

    def verify(self, signed: Path) -> bool:
        """With OpenSSL's purpose for mail, which is SWUpdate's too."""
        trust = ("-CAfile", self.trusted, "-purpose", "smimesign")
        content = ("-binary", "-content", signed.with_name("sw-description"), "-out", "/dev/null")
        return accepts(
            *("openssl", "cms", "-verify", "-inform", "DER", "-in", signed), *content, *trust, directory=signed.parent
        )


@dataclass(frozen=True)
class Swu:
    """A whole .swu; Debian's swupdate checks it as a device would before it installs."""

    variant: str
    provider: str
    distro: str
    trusted: Path
    signer = "swupdate"
    verifier = "swupdate -c"

    def sign(self, post: Post, directory: Path) -> Path:
        """The archive is cpio's own."""
        write_description(directory)
        unsigned, signed = directory / "unsigned.swu", directory / "signed.swu"
        with unsigned.open("wb") as archive:
            # newc, whose files have no checksum: none can give the tampering away
            command = ["cpio", "--quiet", "--create", "--format=newc"]
            subprocess.run(command, cwd=directory, input=b"sw-description\nrootfs.img", stdout=archive, check=True)
        fields = {"distro": self.distro, "method": "CMS"}
        signed.write_bytes(post("/sign/swupdate", fields, {"artifact": unsigned}))
        return signed

    def verify(self, signed: Path) -> bool:
        """Checks all but the installation itself."""
        return accepts(SWUPDATE, "-c", "-k", self.trusted, "-H", "demo:1.0", "-i", signed, directory=signed.parent)

    def tamper(self, signed: Path) -> None:
        """Another version in the archive's sw-description."""
        replace(signed, VERSION, b"6.6.6")


def write_description(directory: Path) -> Path:
    """Writes sw-description and the image that it describes."""
    image = b"an image\n" * 1000
    (directory / "rootfs.img").write_bytes(image)
    description = directory / "sw-description"
    description.write_text(DESCRIPTION.format(sha256=hashlib.sha256(image).hexdigest()))
    return description


def replace(path: Path, old: bytes, new: bytes) -> None:
    """Replaces the one place in a file where `old` stands by as many other bytes."""
    content = path.read_bytes()
    assert content.count(old) == 1
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new))
