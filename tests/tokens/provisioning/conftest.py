"""A simulated device at a connector, and files that declare what it is to hold."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from yubihsm import YubiHsm
from yubihsm.core import AuthSession
from yubihsm.defs import OBJECT

from tokens.provisioning.declaration import Declaration, load
from tokens.provisioning.device import logged_in
from yubihsm_simulator import Connector, Device
from yubihsm_simulator.backend import DirectBackend

AUTH_KEYS = """
[auth_keys.admin]
id = 2
role = "admin"
password = { file = "DIRECTORY/admin.password" }

[auth_keys.signer]
id = 3
role = "signer"
domains = [1]
password = { file = "DIRECTORY/signer.password" }

[auth_keys.auditor]
id = 4
role = "auditor"
password = { file = "DIRECTORY/auditor.password" }
"""

EC_KEY = """
[[keys]]
id = 0x0100
label = "generated"
algorithm = "ecp256"
domains = [1]
capabilities = ["sign-ecdsa"]
generate = true
"""


@dataclass
class Bench:
    """One device, and a directory for its files."""

    device: Device
    connector: Connector
    directory: Path

    def file(self, *tables: str, serial: int | None = None, auth_keys: str = AUTH_KEYS) -> Path:
        """The file that declares the authentication keys and these tables."""
        head = f'[device]\nconnector = "{self.connector.url}"\nserial = {serial or self.device.serial}\n'
        path = self.directory / "setup.toml"
        path.write_text("\n".join((head, auth_keys, *tables)).replace("DIRECTORY", str(self.directory)))
        return path

    def declare(self, *tables: str) -> Declaration:
        return load(self.file(*tables))

    @property
    def transcript(self) -> Path:
        return self.directory / "transcript.jsonl"

    def password(self, name: str) -> str:
        return (self.directory / f"{name}.password").read_text().rstrip("\n")

    @contextmanager
    def session(self, auth_key_id: int, password: str) -> Iterator[AuthSession]:
        """A session beside the connector, whose faults do not reach it."""
        with logged_in(YubiHsm(DirectBackend(self.device)), auth_key_id, password) as session:
            yield session

    @contextmanager
    def admin(self) -> Iterator[AuthSession]:
        with self.session(2, self.password("admin")) as session:
            yield session

    @contextmanager
    def signer(self) -> Iterator[AuthSession]:
        with self.session(3, self.password("signer")) as session:
            yield session

    def is_new(self) -> bool:
        """Whether the device is as it came from the factory."""
        try:
            with self.session(1, "password") as session:
                held = [(each.object_type, each.id) for each in session.list_objects()]
        except Exception:
            return False
        return bool(held == [(OBJECT.AUTHENTICATION_KEY, 1)])


@pytest.fixture
def make_bench(tmp_path: Path) -> Iterator[Callable[[int], Bench]]:
    """Benches with devices of these serial numbers."""
    with ExitStack() as stack:

        def make(serial: int) -> Bench:
            directory = tmp_path / str(serial)
            directory.mkdir()
            device = Device(serial=serial)
            return Bench(device, stack.enter_context(Connector(device)), directory)

        yield make


@pytest.fixture
def bench(make_bench: Callable[[int], Bench]) -> Bench:
    """A new device."""
    return make_bench(7550099)
