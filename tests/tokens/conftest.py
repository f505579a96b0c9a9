"""Keys, an S3 server, and a token with the same keys on it."""

import datetime
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from moto.server import ThreadedMotoServer

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True)
class Key:
    """A private key made for this run, and a certificate for it."""

    private: PrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def der(self) -> bytes:
        return self.private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def certificate_der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)


def make_key(name: str, private: PrivateKey) -> Key:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    day = datetime.timedelta(days=1)
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .sign(private, None if isinstance(private, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    )
    return Key(private, certificate)


@pytest.fixture(scope="session")
def keys() -> dict[str, Key]:
    """One key of each type; making RSA keys is slow, so they are made once."""
    privates: dict[str, PrivateKey] = {
        "rsa2048": rsa.generate_private_key(65537, 2048),
        "rsa4096": rsa.generate_private_key(65537, 4096),
        "p256": ec.generate_private_key(ec.SECP256R1()),
        "p384": ec.generate_private_key(ec.SECP384R1()),
        "p521": ec.generate_private_key(ec.SECP521R1()),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
    }
    return {name: make_key(name, private) for name, private in privates.items()}


@dataclass(frozen=True)
class KeyToken:
    """A SoftHSM token that holds `keys` under their names."""

    directory: Path
    module: Path = Path("/usr/lib/softhsm/libsofthsm2.so")
    label: str = "conformance"

    @property
    def env(self) -> dict[str, str]:
        return {"SOFTHSM2_CONF": str(self.directory / "softhsm2.conf")}

    @property
    def pin_file(self) -> Path:
        return self.directory / "pin"

    def run(self, *arguments: str | Path) -> None:
        subprocess.run(arguments, env=self.env | {"PATH": "/usr/bin:/bin"}, check=True, capture_output=True)


@pytest.fixture(scope="session")
def key_token(keys: dict[str, Key], tmp_path_factory: pytest.TempPathFactory) -> KeyToken:
    """The keys on a token, each with its certificate under the same CKA_ID."""
    token = KeyToken(tmp_path_factory.mktemp("token"))
    pin = "conformance-pin"
    token.pin_file.write_text(pin + "\n")
    (token.directory / "tokens").mkdir()
    (token.directory / "softhsm2.conf").write_text(f"directories.tokendir = {token.directory / 'tokens'}\n")
    util = ("softhsm2-util", "--module", token.module)
    token.run(*util, "--init-token", "--free", "--label", token.label, "--so-pin", "so-pin", "--pin", pin)
    for number, (name, key) in enumerate(keys.items(), 1):
        private, certificate = token.directory / f"{name}.p8", token.directory / f"{name}.der"
        private.write_bytes(key.pem)
        certificate.write_bytes(key.certificate_der)
        identity = ("--label", name, "--id", f"{number:02x}")
        token.run(*util, "--import", private, "--token", token.label, "--pin", pin, *identity)
        private.unlink()
        tool = ("pkcs11-tool", "--module", token.module, "--token-label", token.label, "--login", "--pin", pin)
        token.run(*tool, "--write-object", certificate, "--type", "cert", *identity)
    return token


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3 server: moto's, over HTTP."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def aws() -> Iterator[pytest.MonkeyPatch]:
    """Credentials for that server, and nothing of the machine's own configuration."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        yield patch
