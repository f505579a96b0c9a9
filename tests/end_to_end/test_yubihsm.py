"""A YubiHSM 2 that fails, through HTTP: a clear 503, to tools' clients too, nothing else disturbed, back by itself.

tests/tokens/test_yubihsm_faults.py has more of what can go wrong, without HTTP.
"""

import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import pytest
from yubihsm import YubiHsm
from yubihsm.core import SymmetricAuth

from tests.end_to_end.conftest import assert_problem
from yubihsm_simulator import Connector, Device
from yubihsm_simulator.backend import DirectBackend

DESCRIPTION = b'software = { version = "1.0.0"; };'
SIGNER = 3
"""The service's authentication key."""
PATIENCE_S = 30
Cause = Callable[[Connector], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def yubihsm(make_yubihsm: Callable[[], Any]) -> Any:
    """A device of this module's own, with the keys and credentials of the fixtures'."""
    return make_yubihsm()


@pytest.fixture(scope="module")
def connector(yubihsm: Any) -> Connector:
    connector: Connector = yubihsm.connector
    return connector


@pytest.fixture(scope="module")
def service(yubihsm: Any, start: Callable[..., Any]) -> Any:
    """The fixtures' service, for SWUpdate and any file, on that device, and on key files."""
    tables = tomllib.loads(yubihsm.config)
    providers = {f"providers.{name}": tables["providers"][name] for name in ("yubihsm", "files")}
    grants = [
        grant for grant in tables["grants"]
        if grant["signer"] in ("swupdate", "generic") and grant["provider"] in ("yubihsm", "files")
    ]  # fmt: skip
    return start({**providers, "grants": grants, "tools": tables["tools"]})


@contextmanager
def unplugged(connector: Connector) -> Iterator[None]:
    connector.device.faults.unplugged = True
    try:
        yield
    finally:
        connector.device.faults.unplugged = False


@contextmanager
def without_its_connector(connector: Connector) -> Iterator[None]:
    connector.stop()
    try:
        yield
    finally:
        connector.start()


@contextmanager
def replaced(connector: Connector) -> Iterator[None]:
    right, connector.device = connector.device, Device(87654321)
    try:
        yield
    finally:
        connector.device = right


@contextmanager
def with_all_sessions_taken(connector: Connector) -> Iterator[None]:
    """By others, who do not even know the password."""
    connector.device.reboot()  # the service has to open its sessions anew
    with YubiHsm(DirectBackend(connector.device)) as hsm:
        for _ in range(16):
            SymmetricAuth.init_session(hsm, SIGNER)
        try:
            yield
        finally:
            connector.device.skip(31)


@contextmanager
def with_answers_that_break_off(connector: Connector) -> Iterator[None]:
    connector.device.faults.half_answers = 10_000
    try:
        yield
    finally:
        connector.device.faults.half_answers = 0


def sign_a_file(service: Any) -> httpx.Response:
    """By a tool, which has the key on loan."""
    files = {"artifact": ("x.bin", DESCRIPTION)}
    return httpx.post(service.url + "/sign/generic", data={"machine": "demo-yubihsm"}, files=files, timeout=60)


def until_it_signs(ask: Callable[[], httpx.Response]) -> bytes:
    """The first answer that is no 503."""
    deadline = time.monotonic() + PATIENCE_S
    while (answer := ask()).status_code == 503:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.1)
    assert answer.status_code == 200, answer.text
    return answer.content


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (unplugged, "no YubiHSM is plugged in"),
        (without_its_connector, "cannot be reached"),
        (replaced, "87654321"),
        (with_all_sessions_taken, "SESSIONS_FULL"),
        (with_answers_that_break_off, ""),
    ],
)
def test_a_clear_503_until_the_cause_is_gone(service: Any, connector: Connector, *, cause: Cause, words: str) -> None:
    signed = until_it_signs(lambda: service.sign("demo-yubihsm", DESCRIPTION))
    by_a_tool = until_it_signs(lambda: sign_a_file(service))
    with cause(connector):
        for answer in (service.sign("demo-yubihsm", DESCRIPTION), sign_a_file(service)):
            assert words in assert_problem(answer, 503, "provider-unavailable")["detail"]
        assert service.sign("demo-file", DESCRIPTION).content == signed  # the same key, in a file
        assert httpx.get(service.url + "/healthz", timeout=60).status_code == 200
    assert until_it_signs(lambda: service.sign("demo-yubihsm", DESCRIPTION)) == signed
    assert until_it_signs(lambda: sign_a_file(service)) == by_a_tool
    service.assert_no_files()
