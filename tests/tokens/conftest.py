"""Keys, an S3 server, a PKCS#11 token and a simulated YubiHSM 2 with the same keys on them."""

import asyncio
import datetime
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from moto.server import ThreadedMotoServer
from yubihsm import YubiHsm
from yubihsm.core import AuthSession
from yubihsm.defs import ALGORITHM, CAPABILITY
from yubihsm.objects import AsymmetricKey, AuthenticationKey, HmacKey, SymmetricKey

from tests.conftest import ROOT
from tokens.yubihsm import YubihsmProvider, YubihsmSettings
from yubihsm_simulator import Connector, Device
from yubihsm_simulator.backend import DirectBackend

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


@pytest.fixture(scope="session")
def symmetric_keys() -> dict[str, bytes]:
    """A symmetric key of each kind."""
    return {"aes128": secrets.token_bytes(16), "aes256": secrets.token_bytes(32), "hmac": secrets.token_bytes(32)}


# SoftHSM's and OpenSC's tools import no secret for HMAC
IMPORT_SECRET = """
import sys, softhsm
from pkcs11 import Attribute, KeyType
label, pin, kind, name, id_, value = sys.argv[1:]
with softhsm.log_in(label, pin) as session:
    attributes = {Attribute.LABEL: name, Attribute.ID: bytes.fromhex(id_)}
    softhsm.import_secret(session, bytes.fromhex(value), KeyType[kind], attributes)
"""


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
        env = self.env | {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "softhsm-fixtures")}
        subprocess.run(arguments, env=env, check=True, capture_output=True)


@pytest.fixture(scope="session")
def key_token(
    keys: dict[str, Key], symmetric_keys: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> KeyToken:
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
    for number, (name, value) in enumerate(symmetric_keys.items(), 0x51):
        kind = "GENERIC_SECRET" if name == "hmac" else "AES"
        token.run(sys.executable, "-c", IMPORT_SECRET, token.label, pin, kind, name, f"{number:02x}", value.hex())
    return token


SIGN = CAPABILITY.SIGN_PKCS | CAPABILITY.SIGN_PSS | CAPABILITY.SIGN_ECDSA | CAPABILITY.SIGN_EDDSA
COMPUTE = CAPABILITY.ENCRYPT_ECB | CAPABILITY.DECRYPT_ECB | CAPABILITY.ENCRYPT_CBC | CAPABILITY.DECRYPT_CBC
READ = CAPABILITY.GET_OPAQUE | CAPABILITY.SIGN_ATTESTATION_CERTIFICATE


@dataclass(frozen=True)
class Yubihsm2:
    """A simulated YubiHSM 2 behind its connector; the service has an authentication key that signs and reads."""

    device: Device
    connector: Connector
    directory: Path
    serial: int = 12345678
    signer: int = 2
    auditor: int = 3
    password: str = "password-of-the-signer"

    @property
    def password_file(self) -> Path:
        return self.directory / "password"

    def settings(self, **changes: Any) -> YubihsmSettings:
        values: dict[str, Any] = {
            "kind": "yubihsm",
            "connector": self.connector.url,
            "serial": self.serial,
            "auth_key_id": self.signer,
            "password": {"file": self.password_file},
            "sessions": 1,
            "backoff_min_s": 0.01,
            "backoff_max_s": 0.1,
        }
        return YubihsmSettings.model_validate(values | changes)

    @asynccontextmanager
    async def provider(self, **changes: Any) -> AsyncIterator[YubihsmProvider]:
        """A provider that runs, and leaves nothing."""
        provider = YubihsmProvider("yubihsm", self.settings(**changes), self.directory / "state")
        await provider.start()
        try:
            yield provider
        finally:
            await provider.stop()
            assert token_workers() == []

    @contextmanager
    def session(self) -> Iterator[AuthSession]:
        """The administrator's session, past the connector."""
        hsm = YubiHsm(DirectBackend(self.device))
        with hsm.create_session_derived(1, "password") as session:
            yield session

    def put(self, session: AuthSession, number: int, label: str, private: PrivateKey) -> AsymmetricKey:
        return AsymmetricKey.put(session, number, label, 0xFFFF, SIGN, private)


def token_workers() -> list[int]:
    """The token workers of this process."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if b"tokens.worker" in arguments and parent == os.getpid():
            found.append(int(process.name))
    return found


async def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited for 10 s"
        await asyncio.sleep(0.01)


@pytest.fixture
def eventually() -> Any:
    """Waits for a condition."""
    return wait_until


@pytest.fixture
def workers() -> Any:
    """Lists the token workers."""
    return token_workers


@contextmanager
def simulated_yubihsm(directory: Path) -> Iterator[Yubihsm2]:
    device = Device(serial=Yubihsm2.serial)
    with Connector(device) as connector:
        yubihsm = Yubihsm2(device, connector, directory)
        yubihsm.password_file.write_text(yubihsm.password + "\n")
        yubihsm.password_file.chmod(0o600)
        none = CAPABILITY.NONE
        with yubihsm.session() as session:
            for number, label, capabilities, password in (
                (yubihsm.signer, "signer", SIGN | COMPUTE | CAPABILITY.SIGN_HMAC | READ, yubihsm.password),
                (yubihsm.auditor, "auditor", CAPABILITY.GET_LOG_ENTRIES, "password-of-the-auditor"),
            ):
                AuthenticationKey.put_derived(session, number, label, 0xFFFF, capabilities, none, password)
        yield yubihsm


@pytest.fixture(scope="session")
def key_yubihsm(
    keys: dict[str, Key], symmetric_keys: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Yubihsm2]:
    """The keys on a YubiHSM 2, each with its certificate; shared, so no test changes it."""
    with simulated_yubihsm(tmp_path_factory.mktemp("yubihsm")) as yubihsm:
        with yubihsm.session() as session:
            for number, (name, key) in enumerate(keys.items(), 0x101):
                put = yubihsm.put(session, number, name, key.private)
                put.put_certificate(name, 0xFFFF, CAPABILITY.NONE, key.certificate)
            for number, (name, value) in enumerate(symmetric_keys.items(), 0x151):
                if name == "hmac":
                    HmacKey.put(session, number, name, 0xFFFF, CAPABILITY.SIGN_HMAC, value)
                else:
                    SymmetricKey.put(session, number, name, 0xFFFF, COMPUTE, ALGORITHM[name.upper()], value)
        yield yubihsm


@pytest.fixture
def yubihsm(keys: dict[str, Key], tmp_path: Path) -> Iterator[Yubihsm2]:
    """A device for one test, with the key `p256` as 0x0201."""
    directory = tmp_path / "yubihsm"
    directory.mkdir()
    with simulated_yubihsm(directory) as yubihsm:
        with yubihsm.session() as session:
            yubihsm.put(session, 0x0201, "p256", keys["p256"].private)
        yield yubihsm


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
