"""A maker of attestations: chains like those of a YubiHSM 2, from a root of the tests."""

import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from tokens.provider import Attestation

SERIAL = 12345678
ID = 0x0100


def der(tag: int, content: bytes) -> bytes:
    return bytes([tag, len(content)]) + content


def said(**changes: bytes | None) -> dict[int, bytes]:
    """The extensions' values by number; `e3=b"..."` is another value of number 3, None leaves it out."""
    values = {
        1: der(4, bytes([2, 4, 0])),
        2: der(2, SERIAL.to_bytes(4)),
        3: der(3, b"\0\x01"),
        4: der(3, b"\0\x80\x05"),
        5: der(3, b"\0" + (1 << 5 | 1 << 6).to_bytes(8)),
        6: der(2, ID.to_bytes(2)),
        9: der(12, "Schlüssel".encode()),
    }
    values |= {int(name[1:]): value for name, value in changes.items() if value is not None}
    return {number: value for number, value in values.items() if changes.get(f"e{number}", b"") is not None}


@dataclass
class Party:
    """A key with its certificate."""

    key: Any
    certificate: x509.Certificate

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)


def certify(
    name: str,
    issuer: Party | None,
    key: Any = None,
    *,
    public_key: Any = None,
    ca: x509.BasicConstraints | None = None,
    extensions: tuple[tuple[Any, bool], ...] = (),
    days: tuple[int, int] = (-1, 1),
    hash_: hashes.HashAlgorithm | None = None,
) -> Party:
    """A certificate, self-signed where there is no issuer; `days` from now it is valid."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name.from_rfc4514_string(f"CN={name}")
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        issuer.certificate.subject if issuer else subject,
        subject,
        public_key or key.public_key(),
        x509.random_serial_number(),
        now + timedelta(days=days[0]),
        now + timedelta(days=days[1]),
    )
    for extension, critical in (*([(ca, True)] if ca else []), *extensions):
        builder = builder.add_extension(extension, critical)
    return Party(key, builder.sign(issuer.key if issuer else key, hash_ or hashes.SHA256()))


def authority(name: str, issuer: Party | None, length: int | None, **changes: Any) -> Party:
    return certify(name, issuer, **({"ca": x509.BasicConstraints(True, length)} | changes))


@dataclass
class Chain:
    """Root, Sub-CA and device; each can be replaced before it attests."""

    root: Party = field(default_factory=lambda: authority("Test Root", None, 2))
    sub: Party = field(init=False)
    device: Party = field(init=False)

    def __post_init__(self) -> None:
        self.sub = authority("Test Sub-CA", self.root, 1)
        self.device = authority(f"YubiHSM Attestation ({SERIAL})", self.sub, 0)

    @property
    def roots(self) -> tuple[x509.Certificate, ...]:
        """What is pinned: as of Yubico's, the root and the Sub-CA, which the device has not."""
        return (self.root.certificate, self.sub.certificate)

    def attest(self, public_key: Any, /, **changes: Any) -> Attestation:
        """An attestation of the key; `changes` are those of `said`, and of `certify`."""
        values = said(**{name: changes.pop(name) for name in list(changes) if name[0] == "e" and name[1:].isdigit()})
        extensions = tuple(
            (x509.UnrecognizedExtension(x509.ObjectIdentifier(f"1.3.6.1.4.1.41482.4.{number}"), value), False)
            for number, value in values.items()
        )
        made = certify(
            f"YubiHSM Attestation id:0x{ID:04x}",
            self.device,
            self.device.key,
            public_key=public_key,
            **({"extensions": extensions} | changes),
        )
        return Attestation(made.der, (self.device.der,))


def openssl_accepts(directory: Path, attestation: Attestation, roots: tuple[x509.Certificate, ...]) -> bool:
    """Whether `openssl verify` finds a chain to the pinned certificates."""
    pem = Encoding.PEM
    load = x509.load_der_x509_certificate
    files = {
        "roots.pem": b"".join(each.public_bytes(pem) for each in roots),
        "chain.pem": b"".join(load(each).public_bytes(pem) for each in attestation.issuers),
        "attestation.pem": load(attestation.certificate).public_bytes(pem),
    }
    for name, content in files.items():
        (directory / name).write_bytes(content)
    verify = ("openssl", "verify", "-partial_chain", "-CAfile", "roots.pem", "-untrusted", "chain.pem")
    done = subprocess.run([*verify, "attestation.pem"], cwd=directory, capture_output=True, timeout=60, check=False)
    return done.returncode == 0
