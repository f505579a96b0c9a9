"""Any file, by OpenSSL: raw RSA and ECDSA, and CMS."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from case import PLACES, Case, Fixtures, Post, accepts


def cases(fixtures: Fixtures) -> Iterator[Case]:
    """Every method with a key on the tokens and one in a file."""
    trusted = fixtures.certificate("demo-ca")
    for provider, machine, prefix in PLACES:
        rsa, p256 = (fixtures.public_key(f"{prefix}generic-{name}") for name in ("rsa", "p256"))
        yield Raw("RSA-2048", provider, machine, "RSA", rsa)
        yield Raw("RSA-PSS", provider, machine, "RSA-PSS", rsa)
        yield Raw("ECDSA P-256", provider, f"{machine}-p256", "ECDSA", p256)
        yield Cms("CMS RSA-2048", provider, machine, trusted)


class AnyFile:
    """What is signed and the signature lie side by side."""

    signer = "generic"
    machine: str
    method: str

    def sign(self, post: Post, directory: Path) -> Path:
        """Returns the path of the signature."""
        content, signature = directory / "content", directory / "signature"
        content.write_bytes(b"any file\n" * 10_000)
        signature.write_bytes(
            post("/sign/generic", {"machine": self.machine, "method": self.method}, {"artifact": content})
        )
        return signature

    def tamper(self, signed: Path) -> None:
        """Another first byte."""
        content = signed.with_name("content")
        content.write_bytes(b"A" + content.read_bytes()[1:])


@dataclass(frozen=True)
class Raw(AnyFile):
    """A raw signature."""

    variant: str
    provider: str
    machine: str
    method: str
    public_key: Path
    verifier = "openssl dgst"

    def verify(self, signed: Path) -> bool:
        """By the public key."""
        pss = ("-sigopt", "rsa_padding_mode:pss") if self.method == "RSA-PSS" else ()
        key = ("-verify", self.public_key, *pss)
        return accepts("openssl", "dgst", "-sha256", *key, "-signature", signed, "content", directory=signed.parent)


@dataclass(frozen=True)
class Cms(AnyFile):
    """A detached CMS signature."""

    variant: str
    provider: str
    machine: str
    trusted: Path
    method = "CMS"
    verifier = "openssl cms"

    def verify(self, signed: Path) -> bool:
        """Up to a certificate that is trusted."""
        verify = ("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", signed, "-purpose", "any")
        content = ("-content", "content", "-out", "verified")
        return accepts(*verify, *content, "-CAfile", self.trusted, directory=signed.parent)
