"""What every room of the tests may use: tokens with keys, and the tools that scripts/setup unpacks.

Own fixtures of a room stand in its own conftest.py.
"""

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from yubihsm_simulator import Connector, Device

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "softhsm-fixtures"))  # imx_images, imx_pki


@dataclass(frozen=True)
class SoftHsm:
    """What softhsm-fixtures/make_fixtures.py made; fixtures.toml and imx.toml say which keys there are.

    The tokens are `hsmsign` (RSA and ECDSA keys) and `edwards` (Ed25519 keys). They are shared by the whole run:
    a test that changes a token makes one of its own, with `own_softhsm`.
    """

    directory: Path
    module: Path = Path("/usr/lib/softhsm/libsofthsm2.so")

    @property
    def config(self) -> Path:
        """hsmsign.toml, ready to serve."""
        return self.directory / "hsmsign.toml"

    @property
    def env(self) -> dict[str, str]:
        """What the module needs in its environment."""
        return {"SOFTHSM2_CONF": str(self.directory / "softhsm2.conf")}

    @property
    def pin_file(self) -> Path:
        return self.directory / "pin"

    @property
    def pin(self) -> str:
        return self.pin_file.read_text().rstrip("\n")

    @property
    def keys(self) -> Path:
        """The root of the key files: digsigserver's layout."""
        return self.directory / "keys"

    def public_key(self, label: str) -> Path:
        """The PEM file of a key's public half."""
        return self.directory / "public" / f"{label}.pem"

    def certificate(self, label: str) -> Path:
        """The PEM file of a key's or an authority's certificate."""
        return self.directory / "certificates" / f"{label}.pem"


def make_softhsm(directory: Path, *options: str) -> SoftHsm:
    """Makes the fixtures, in a process of its own: a PKCS#11 module has no place in the one that runs the tests."""
    subprocess.run([sys.executable, ROOT / "softhsm-fixtures/make_fixtures.py", directory, *options], check=True)
    return SoftHsm(directory)


@pytest.fixture(scope="session")
def softhsm(tmp_path_factory: pytest.TempPathFactory) -> SoftHsm:
    """The fixtures, made once for the run: for tests that only read."""
    return make_softhsm(tmp_path_factory.mktemp("softhsm"))


@pytest.fixture
def own_softhsm(tmp_path: Path) -> SoftHsm:
    """The fixtures without those for i.MX, made for one test that changes them (a second or two)."""
    return make_softhsm(tmp_path / "softhsm", "--without-imx")


@dataclass(frozen=True)
class Yubihsm:
    """The fixtures' simulated YubiHSM 2, which softhsm-fixtures/make_yubihsm.py set up, behind its connector."""

    directory: Path
    connector: Connector

    @property
    def device(self) -> Device:
        return self.connector.device

    @property
    def config(self) -> str:
        """The fixtures' hsmsign.toml, and the device with the keys that the others have in files."""
        text = (self.directory / "hsmsign.toml").read_text()
        return text.replace("http://127.0.0.1:12345", self.connector.url)


@pytest.fixture(scope="session")
def make_yubihsm(softhsm: SoftHsm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Yubihsm]]:
    """Makes a device like the fixtures'. One for each service: two that audit one device would be alarmed."""
    subprocess.run([sys.executable, ROOT / "softhsm-fixtures/make_yubihsm.py", softhsm.directory], check=True)
    directory = softhsm.directory / "yubihsm"
    serial = tomllib.loads((directory / "setup.toml").read_text())["device"]["serial"]
    with ExitStack() as stack:

        def make() -> Yubihsm:
            state = Path(shutil.copy(directory / "device.json", tmp_path_factory.mktemp("device")))
            return Yubihsm(directory, stack.enter_context(Connector(Device(serial, state=state))))

        yield make


@pytest.fixture(scope="session")
def hostile_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PKCS#11 module that misbehaves on demand, round SoftHSM; its source says how."""
    module = tmp_path_factory.mktemp("hostile") / "hostile.so"
    flags = subprocess.check_output(["pkg-config", "--cflags", "p11-kit-1"], text=True).split()
    source = ROOT / "tests/tokens/hostile.c"
    subprocess.run(["gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", module, source, *flags, "-ldl"], check=True)
    return module


@pytest.fixture(scope="session")
def swupdate() -> Path:
    """Debian's swupdate of bookworm-backports: wolfSSL, CMS only."""
    program = ROOT / ".cache/debian/bin/swupdate"
    assert program.exists(), f"{program} is missing: run `make setup`"
    return program
