"""The simulator behind its connector, and what the vendor's and others' programs need to reach it."""

import datetime
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from yubihsm import YubiHsm
from yubihsm.defs import CAPABILITY
from yubihsm.objects import AsymmetricKey, Opaque

from tests.conftest import ROOT
from yubihsm_simulator import Connector, Device

BACKPORTS = ROOT / ".cache/debian/bookworm-backports"
LIBRARIES = BACKPORTS / "root/usr/lib/x86_64-linux-gnu"
MODULE = LIBRARIES / "pkcs11/yubihsm_pkcs11.so"
PASSWORD = "password"
PIN = f"0001{PASSWORD}"
SERIAL = 12345678
LOOPBACK = "127.0.0.1,localhost"

HASHES = {name: getattr(hashes, name)() for name in ("SHA1", "SHA256", "SHA384", "SHA512")}
CURVES: dict[str, ec.EllipticCurve] = {
    "ecp224": ec.SECP224R1(),
    "ecp256": ec.SECP256R1(),
    "ecp384": ec.SECP384R1(),
    "ecp521": ec.SECP521R1(),
    "eck256": ec.SECP256K1(),
    "ecbp256": ec.BrainpoolP256R1(),
    "ecbp384": ec.BrainpoolP384R1(),
    "ecbp512": ec.BrainpoolP512R1(),
}


@cache
def private_key(kind: str) -> Any:
    """One key of a kind for the whole run: by Yubico's names, rsa2048, ecp256, ed25519."""
    if kind.startswith("rsa"):
        return rsa.generate_private_key(65537, int(kind[3:]))
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(CURVES[kind])


def private_pem(key: Any) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(key: Any) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def certificate(key: Any, name: str = "hsmsign test") -> x509.Certificate:
    """Self-signed, valid today."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    )


@dataclass(frozen=True)
class Hsm:
    """A simulated device, and programs that run in a directory of their own with its connector configured.

    That directory holds no yubihsm_pkcs11.conf, which would win over the environment.
    """

    device: Device
    connector: Connector
    directory: Path
    env: dict[str, str]

    @property
    def url(self) -> str:
        return str(self.connector.url)

    def try_run(self, *command: str | Path, text: str | None = None, timeout_s: float = 60) -> tuple[int, str]:
        """A program's exit status, negative after a signal, and what it said; it is killed after `timeout_s`."""
        done = subprocess.run(
            command,
            cwd=self.directory,
            env=self.env,
            input=text or "",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
        return done.returncode, done.stdout

    def run(self, *command: str | Path, text: str | None = None) -> str:
        """What a program said that succeeded."""
        status, output = self.try_run(*command, text=text)
        assert status == 0, output
        return output

    def refuses(self, *command: str | Path, text: str | None = None) -> str:
        """What a program said that failed, and was not killed by a signal."""
        status, output = self.try_run(*command, text=text)
        assert status > 0, output
        return output

    def write(self, name: str, content: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(content)
        return path

    def read(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()


def put_key(hsm: Hsm, id: int, label: str, key: Any, issued: x509.Certificate | None = None) -> None:
    """Imports a key that may do all, and its certificate as the PKCS#11 module looks for it: by the same id and label.

    Leaves `LABEL.crt` and `LABEL.pub` in the directory.
    """
    with YubiHsm.connect(hsm.url) as yubihsm, yubihsm.create_session_derived(1, PASSWORD) as session:
        AsymmetricKey.put(session, id, label, 0xFFFF, CAPABILITY.ALL, key)
        issued = issued or certificate(key, label)
        Opaque.put_certificate(session, id, label, 0xFFFF, CAPABILITY.NONE, issued)
    hsm.write(f"{label}.crt", issued.public_bytes(Encoding.PEM))
    hsm.write(f"{label}.pub", public_pem(key))


@pytest.fixture(scope="session", autouse=True)
def _no_proxy() -> Iterator[None]:
    """The clients in this process honour one, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", LOOPBACK)
        yield


@pytest.fixture(scope="session")
def module_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a program of this system needs on its library path to load the module: Yubico's libraries, no others.

    The module's own place holds another Debian's C library as well.
    """
    assert MODULE.exists(), f"{MODULE} is missing: run `make setup`"
    directory = tmp_path_factory.mktemp("libyubihsm")
    for library in LIBRARIES.glob("libyubihsm*.so.*"):
        (directory / library.name).symlink_to(library)
    return directory


@pytest.fixture
def firmware() -> tuple[int, int, int]:
    """The device's; tests are parametrized over it where it matters."""
    return (2, 4, 0)


@pytest.fixture
def hsm(tmp_path: Path, module_libraries: Path, firmware: tuple[int, int, int]) -> Iterator[Hsm]:
    """A device in its factory state, for this test alone: no session that a program leaks reaches another test."""
    device = Device(serial=SERIAL, firmware=firmware)
    directory = tmp_path / "work"
    directory.mkdir()
    configuration = tmp_path / "yubihsm_pkcs11.conf"
    with Connector(device) as connector:
        configuration.write_text(f"connector = {connector.url}\n")
        env = {
            "PATH": f"{BACKPORTS / 'bin'}:/usr/bin:/bin",
            "HOME": str(directory),
            "LC_ALL": "C.UTF-8",
            "LD_LIBRARY_PATH": str(module_libraries),
            "NO_PROXY": LOOPBACK,
            "YUBIHSM_PKCS11_CONF": str(configuration),
        }
        yield Hsm(device, connector, directory, env)


@pytest.fixture
def content(hsm: Hsm) -> bytes:
    """Of the file `content`, for programs to sign."""
    data = os.urandom(1500)
    hsm.write("content", data)
    return data


@pytest.fixture
def verifies(hsm: Hsm, content: bytes) -> Callable[..., None]:
    """Whether OpenSSL accepts `signature` of `content`, by the key of `public.pem`; tampering has to fail."""

    def check(*options: str, public: str = "public.pem", signature: str = "signature") -> None:
        command = ("/usr/bin/openssl", "dgst", *options, "-verify", public, "-signature", signature)
        assert "Verified OK" in hsm.run(*command, "content")
        hsm.write("tampered", bytes([content[0] ^ 1]) + content[1:])
        hsm.refuses(*command, "tampered")

    return check


ENGINE = """\
openssl_conf = conf
[conf]
engines = engines
[engines]
pkcs11 = pkcs11
[pkcs11]
engine_id = pkcs11
dynamic_path = /usr/lib/x86_64-linux-gnu/engines-3/pkcs11.so
MODULE_PATH = {module}
PIN = {pin}
init = 0
"""


@pytest.fixture
def engine(hsm: Hsm) -> tuple[str, ...]:
    """Options by which Debian's OpenSSL takes a key by libp11's engine, of which programs are told by OPENSSL_CONF.

    Each program leaves a session open, for 30 seconds.
    """
    hsm.env["OPENSSL_CONF"] = str(hsm.write("engine.cnf", ENGINE.format(module=MODULE, pin=PIN).encode()))
    return ("-engine", "pkcs11", "-keyform", "engine")


# no-deinit: or the module is closed down when what it uses of OpenSSL is gone, and now and then hangs or crashes
PROVIDER = """\
openssl_conf = conf
[conf]
providers = providers
[providers]
default = built-in
pkcs11 = pkcs11
[built-in]
activate = 1
[pkcs11]
module = {provider}
pkcs11-module-path = {module}
pkcs11-module-token-pin = {pin}
pkcs11-module-quirks = no-deinit
activate = 1
"""


@pytest.fixture
def provider(hsm: Hsm) -> None:
    """Tells programs by OPENSSL_CONF of pkcs11-provider. Each leaves a session open, for 30 seconds."""
    text = PROVIDER.format(provider=LIBRARIES / "ossl-modules/pkcs11.so", module=MODULE, pin=PIN)
    hsm.env["OPENSSL_CONF"] = str(hsm.write("provider.cnf", text.encode()))
