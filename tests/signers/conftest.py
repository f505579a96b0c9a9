"""Keys with certificates, the real verifiers, and a builder of .swu files."""

import asyncio
import hashlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tokens.keyfile import MemoryKey
from tokens.threads import Threads


@dataclass(frozen=True)
class Pair:
    """A private key in memory and its certificate, the latter's chain behind it."""

    private_key: Any
    certificates: tuple[x509.Certificate, ...]
    threads: Threads

    @property
    def key(self) -> MemoryKey:
        """What a provider would give the signer."""
        return MemoryKey(self.private_key, self.certificates, self.threads)

    @property
    def certificate(self) -> x509.Certificate:
        return self.certificates[0]

    @property
    def public_pem(self) -> bytes:
        return self.private_key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def private_pem(self) -> bytes:
        return self.private_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


@dataclass(frozen=True)
class LyingPair:
    """A key whose signatures are another key's."""

    honest: Any
    other: Any

    @property
    def key(self) -> "LyingPair":
        return self

    @property
    def public_key(self) -> Any:
        return self.honest.key.public_key

    @property
    def certificates(self) -> Any:
        return self.honest.certificates

    async def sign(self, scheme: Any, data: bytes) -> bytes:
        return await self.other.key.sign(scheme, data)


def _certificate(
    private_key,
    name: str,
    *,
    issuer: Pair | None = None,
    usage: Any = ExtendedKeyUsageOID.EMAIL_PROTECTION,
    valid_to: timedelta = timedelta(days=3650),
    ca: bool = False,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(private_key.public_key())
        # the top bit of the first byte is set: its INTEGER needs a leading zero
        .serial_number(0xF0 << 112 | x509.random_serial_number() >> 48)
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + valid_to)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private_key.public_key()), critical=False)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    signing = issuer.private_key if issuer else private_key
    return builder.sign(signing, None if isinstance(signing, ed25519.Ed25519PrivateKey) else hashes.SHA256())


@pytest.fixture(scope="session")
def threads() -> Iterator[Threads]:
    threads = Threads("test-keys", 2)
    yield threads
    asyncio.run(threads.stop())


@pytest.fixture(scope="session")
def pair(threads) -> Callable[..., Pair]:
    """Makes a certificate for a key: `pair(key, "name", issuer=..., usage=..., valid_to=..., ca=...)`."""

    def make(private_key: Any, name: str = "hsmsign test", **options: Any) -> Pair:
        chain = options["issuer"].certificates if options.get("issuer") else ()
        return Pair(private_key, (_certificate(private_key, name, **options), *chain), threads)

    return make


@pytest.fixture(scope="session")
def pairs(pair) -> dict[str, Pair]:
    """One key of each type, self-signed."""
    private = {
        "rsa2048": rsa.generate_private_key(65537, 2048),
        "rsa3072": rsa.generate_private_key(65537, 3072),
        "p256": ec.generate_private_key(ec.SECP256R1()),
        "p384": ec.generate_private_key(ec.SECP384R1()),
        "p521": ec.generate_private_key(ec.SECP521R1()),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
    }
    return {kind: pair(key, f"hsmsign test {kind}") for kind, key in private.items()}


@pytest.fixture
def openssl(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a command line of openssl in `tmp_path`; `check=False` where it is to fail."""

    def run(line: str, *, check: bool = True) -> subprocess.CompletedProcess:
        command = ["openssl", *line.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, check=False)
        assert not check or done.returncode == 0, done.stderr.decode()
        return done

    return run


@pytest.fixture
def swupdate_check(swupdate, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """`swupdate -c` on an archive, trusting one certificate: exit code 0 where a device would install it."""

    def check(archive: bytes, trusted: Pair) -> subprocess.CompletedProcess:
        (tmp_path / "checked.swu").write_bytes(archive)
        (tmp_path / "trusted.pem").write_bytes(trusted.certificate_pem)
        return subprocess.run(
            [swupdate, "-c", "-v", "-k", "trusted.pem", "-H", "board:rev1", "-i", "checked.swu"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
            # it makes its sockets there
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )

    return check


@dataclass(frozen=True)
class SwuBuilder:
    """Makes .swu files with the real cpio."""

    directory: Path

    def description(self, files: Mapping[str, bytes], **sha256: str) -> bytes:
        """A libconfig description that installs each of the files; `sha256` overrides the sum of `name`."""
        images = ",\n".join(
            f'    {{ filename = "{name}"; device = "/dev/null"; type = "raw";\n'
            f'      sha256 = "{sha256.get(name.partition(".")[0]) or hashlib.sha256(content).hexdigest()}"; }}'
            for name, content in files.items()
        )
        return (
            f'software =\n{{\n  version = "1.0";\n  hardware-compatibility: [ "rev1" ];\n'
            f"  images: (\n{images}\n  );\n}}\n"
        ).encode()

    def __call__(self, files: Mapping[str, bytes], *, form: str = "crc", name: str = "update.swu") -> Path:
        """An archive of the files, in their order; `form` is cpio's: crc (070702) or newc (070701)."""
        stage = self.directory / f"{name}.stage"
        stage.mkdir(exist_ok=True)
        for member, content in files.items():
            (stage / member).write_bytes(content)
        archive = self.directory / name
        with archive.open("wb") as output:
            subprocess.run(
                ["cpio", "--quiet", "-o", "-H", form],
                cwd=stage,
                input="\n".join(files).encode(),
                stdout=output,
                check=True,
            )
        return archive


@pytest.fixture
def swu(tmp_path) -> SwuBuilder:
    return SwuBuilder(tmp_path)


@dataclass
class OneKey:
    """`signers.signer.Keys` that gives the same key for every role, and remembers what it was asked."""

    pair: Pair
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @asynccontextmanager
    async def open(self, role: str, **request: Any) -> AsyncIterator[MemoryKey]:
        self.asked.append((role, request))
        yield self.pair.key


@pytest.fixture
def keys_of() -> type[OneKey]:
    return OneKey
