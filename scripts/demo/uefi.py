"""UEFI: a program, files and a variable; and a capsule."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import asn1crypto.cms
from case import PLACES, Case, Fixtures, Post, accepts, flip

PROGRAM = Path("/usr/lib/systemd/boot/efi/systemd-bootx64.efi")
TIME = "2026-07-01 12:00:00"
JETSON = {"soctype": "tegra234", "bspversion": "36.4.3"}
GUID = "bf0d4599-20d4-414e-b2c5-3595b1cda402"
ALIGNMENT = 2048


def cases(fixtures: Fixtures) -> Iterator[Case]:
    """Each with keys on tokens and keys in files."""
    trusted = fixtures.certificate("demo-ca")
    for provider, machine, prefix in PLACES:
        db, kek = (fixtures.certificate(f"{prefix}uefi-{name}") for name in ("db", "kek"))
        yield Program("sbsign", provider, machine, db, "sbverify")
        yield Program("sbsign", provider, machine, trusted, "osslsigncode")
        yield File("signature", provider, machine, trusted)
        yield File("attach_signature", provider, machine, trusted)
        yield Variable("variable db", provider, machine, kek, db)
        yield Capsule("FMP", provider, machine, trusted)


@dataclass(frozen=True)
class Program:
    """An EFI program with its signature in it."""

    variant: str
    provider: str
    machine: str
    trusted: Path
    verifier: str
    signer = "uefi"

    def sign(self, post: Post, directory: Path) -> Path:
        """Returns the signed program."""
        signed = directory / "signed.efi"
        fields = {"machine": self.machine, "signing_type": "sbsign"}
        signed.write_bytes(post("/sign/tegra/uefi", fields, {"artifact": PROGRAM}))
        return signed

    def verify(self, signed: Path) -> bool:
        """By the signer's certificate, or up to its authority's."""
        if self.verifier == "sbverify":
            return accepts("sbverify", "--cert", self.trusted, signed, directory=signed.parent)
        return accepts("osslsigncode", "verify", "-CAfile", self.trusted, "-in", signed, directory=signed.parent)

    def tamper(self, signed: Path) -> None:
        """Another byte in the middle of the program."""
        flip(signed, PROGRAM.stat().st_size // 2)


@dataclass(frozen=True)
class File:
    """Any file, with its signature beside it or behind it."""

    variant: str
    provider: str
    machine: str
    trusted: Path
    signer = "uefi"
    verifier = "openssl cms"

    def sign(self, post: Post, directory: Path) -> Path:
        """Returns the path of the signature."""
        content, signature = directory / "content", directory / "signature"
        content.write_bytes(b"a device tree\n" * 1000)
        fields = {"machine": self.machine, "signing_type": self.variant}
        answer = post("/sign/tegra/uefi", fields, {"artifact": content})
        padded = -(-content.stat().st_size // ALIGNMENT) * ALIGNMENT
        signature.write_bytes(answer[padded:] if self.variant == "attach_signature" else answer)
        return signature

    def verify(self, signed: Path) -> bool:
        """Up to a certificate that is trusted."""
        return verify_cms(signed, signed.with_name("content"), self.trusted)

    def tamper(self, signed: Path) -> None:
        """Another first byte."""
        flip(signed.with_name("content"), 0)


@dataclass(frozen=True)
class Variable:
    """An update of an EFI variable; efitools say what its signature must cover."""

    variant: str
    provider: str
    machine: str
    trusted: Path
    entry: Path
    signer = "uefi"
    verifier = "sign-efi-sig-list, openssl cms"

    def sign(self, post: Post, directory: Path) -> Path:
        """The variable's content is a certificate. Returns the update."""
        lists, update = directory / "db.esl", directory / "db.auth"
        subprocess.run(["cert-to-efi-sig-list", self.entry, lists], check=True, capture_output=True)
        fields = {"machine": self.machine, "signing_type": "variable", "variable": "db", "timestamp": f"{TIME}Z"}
        update.write_bytes(post("/sign/tegra/uefi", fields, {"artifact": lists}))
        return update

    def verify(self, signed: Path) -> bool:
        """The content is taken from the update, and its message verified over what efitools would have signed."""
        update, lists, bundle, message = (signed.with_name(name) for name in ("db.auth", "esl", "bundle", "message"))
        content = update.read_bytes()
        end = 16 + int.from_bytes(content[16:20], "little")
        lists.write_bytes(content[end:])
        if not accepts("sign-efi-sig-list", "-t", TIME, "-o", "db", lists, bundle, directory=signed.parent):
            return False
        signed_data = asn1crypto.cms.SignedData.load(content[40:end])
        info = asn1crypto.cms.ContentInfo({"content_type": "signed_data", "content": signed_data})
        message.write_bytes(info.dump())
        return verify_cms(message, bundle, self.trusted)

    def tamper(self, signed: Path) -> None:
        """Another last byte of the certificate."""
        flip(signed, -1)


@dataclass(frozen=True)
class Capsule:
    """A firmware payload in a capsule."""

    variant: str
    provider: str
    machine: str
    trusted: Path
    signer = "capsule"
    verifier = "GenerateCapsule"

    def sign(self, post: Post, directory: Path) -> Path:
        """Returns the capsule."""
        payload, capsule = directory / "payload", directory / "signed.cap"
        payload.write_bytes(b"firmware\n" * 1000)
        capsule.write_bytes(post("/sign/tegra/ueficapsule", {"machine": self.machine, **JETSON}, {"artifact": payload}))
        return capsule

    def verify(self, signed: Path) -> bool:
        """By what it says and what it decodes: it ends well even where it refuses the signature."""
        roles = ("OpenSslSignerPrivateCertFile", "OpenSslOtherPublicCertFile", "OpenSslTrustedPublicCertFile")
        payloads = [{"Guid": GUID, "HardwareInstance": "0", **dict.fromkeys(roles, str(self.trusted))}]
        signed.with_name("payloads.json").write_text(json.dumps({"Payloads": payloads}))
        command = [sys.executable, "-m", "edk2basetools.Capsule.GenerateCapsule", "--decode", "-j", "payloads.json"]
        done = subprocess.run(
            [*command, "-o", "out", signed.name], cwd=signed.parent, check=False, capture_output=True, text=True
        )
        decoded = signed.with_name("out.Payload.1.bin").read_bytes() == signed.with_name("payload").read_bytes()
        return done.returncode == 0 and "verification failed" not in done.stdout and decoded

    def tamper(self, signed: Path) -> None:
        """A lower lowest version, which the payload does not show."""
        flip(signed, -signed.with_name("payload").stat().st_size - 4)


def verify_cms(message: Path, content: Path, trusted: Path) -> bool:
    """Whether it is a message over the content by a key whose certificate is, or leads to, the trusted one."""
    verify = ("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", message, "-purpose", "any")
    trust = ("-CAfile", trusted, "-partial_chain", "-out", "verified")
    return accepts(*verify, "-content", content, *trust, directory=message.parent)
