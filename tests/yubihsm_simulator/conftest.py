"""A simulated device in this process, and python-yubihsm to talk to it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from yubihsm import YubiHsm
from yubihsm.core import AuthSession
from yubihsm.defs import CAPABILITY
from yubihsm.exceptions import YubiHsmDeviceError
from yubihsm.objects import AuthenticationKey

from yubihsm_simulator import Device
from yubihsm_simulator.backend import DirectBackend

PASSWORD = "password"
EVERYWHERE = 0xFFFF


def connect(device: Device) -> YubiHsm:
    return YubiHsm(DirectBackend(device))


@contextmanager
def refused(code: int) -> Iterator[None]:
    """The device must answer this error."""
    with pytest.raises(YubiHsmDeviceError) as raised:
        yield
    assert raised.value.code == code, f"0x{raised.value.code:02x}"


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def hsm(device: Device) -> YubiHsm:
    return connect(device)


@pytest.fixture
def session(hsm: YubiHsm) -> AuthSession:
    return hsm.create_session_derived(1, PASSWORD)


@pytest.fixture(scope="session")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


Limited = Callable[..., AuthSession]


@pytest.fixture
def limited(hsm: YubiHsm, session: AuthSession) -> Limited:
    """Opens a session of a new authentication key with the capabilities, delegated capabilities and domains given."""
    ids = count(0x100)

    def open_session(
        capabilities: CAPABILITY = CAPABILITY.NONE,
        delegated: CAPABILITY = CAPABILITY.NONE,
        domains: int = EVERYWHERE,
    ) -> AuthSession:
        key = AuthenticationKey.put_derived(session, next(ids), "limited", domains, capabilities, delegated, PASSWORD)
        return hsm.create_session_derived(key.id, PASSWORD)

    return open_session
