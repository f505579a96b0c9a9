"""Faults and latencies, with a sleep that only counts."""

import pytest
from yubihsm import YubiHsm
from yubihsm.core import AuthSession
from yubihsm.defs import ALGORITHM, CAPABILITY, COMMAND, ERROR
from yubihsm.objects import AsymmetricKey

from tests.yubihsm_simulator.conftest import PASSWORD, connect, refused
from yubihsm_simulator import Device


def test_next_errors_come_once_in_their_order(device: Device, session: AuthSession) -> None:
    device.faults.next_errors.extend([(COMMAND.ECHO, ERROR.STORAGE_FAILED), (COMMAND.ECHO, ERROR.LOG_FULL)])
    session.list_objects()
    with refused(ERROR.STORAGE_FAILED):
        session.send_secure_cmd(COMMAND.ECHO, b"x")
    with refused(ERROR.LOG_FULL):
        session.send_secure_cmd(COMMAND.ECHO, b"x")
    assert session.send_secure_cmd(COMMAND.ECHO, b"x") == b"x"


def test_an_error_instead_of_execution(device: Device, session: AuthSession) -> None:
    device.faults.next_errors.append((COMMAND.GENERATE_ASYMMETRIC_KEY, ERROR.STORAGE_FAILED))
    with refused(ERROR.STORAGE_FAILED):
        AsymmetricKey.generate(session, 5, "", 1, CAPABILITY.NONE, ALGORITHM.EC_P256)
    assert len(device.objects) == 1


@pytest.mark.parametrize("command", [COMMAND.CREATE_SESSION, COMMAND.AUTHENTICATE_SESSION])
def test_next_errors_of_authentication(device: Device, hsm: YubiHsm, command: COMMAND) -> None:
    device.faults.next_errors.append((command, ERROR.SESSIONS_FULL))
    with refused(ERROR.SESSIONS_FULL):
        hsm.create_session_derived(1, PASSWORD)


def test_next_error_of_the_channel(device: Device, session: AuthSession) -> None:
    device.faults.next_errors.append((COMMAND.SESSION_MESSAGE, ERROR.SESSION_FAILED))
    with refused(ERROR.SESSION_FAILED):
        session.send_secure_cmd(COMMAND.ECHO, b"x")
    assert session.send_secure_cmd(COMMAND.ECHO, b"x") == b"x"


def test_unplugged_and_plugged_in(device: Device, hsm: YubiHsm, session: AuthSession) -> None:
    device.faults.unplugged = True
    assert device.sessions == 0
    with pytest.raises(ConnectionError):
        session.send_secure_cmd(COMMAND.ECHO, b"x")
    device.faults.unplugged = False
    with refused(ERROR.INVALID_SESSION):
        session.send_secure_cmd(COMMAND.ECHO, b"x")
    log = hsm.create_session_derived(1, PASSWORD).get_log_entries().entries
    assert [entry.command for entry in log] == [0xFF, 0, 0]


def test_a_switch_that_does_not_change_does_nothing(device: Device, session: AuthSession) -> None:
    device.faults.unplugged = False
    assert device.sessions == 1


def test_hardware_latencies() -> None:
    slept: list[float] = []
    device = Device(sleep=slept.append, latency="hardware")
    session = connect(device).create_session_derived(1, PASSWORD)
    keys = {
        algorithm: AsymmetricKey.generate(session, 0, "", 1, CAPABILITY.ALL, algorithm)
        for algorithm in (ALGORITHM.RSA_2048, ALGORITHM.EC_P256, ALGORITHM.EC_ED25519)
    }
    slept.clear()
    keys[ALGORITHM.RSA_2048].sign_pkcs1v1_5(b"data")
    keys[ALGORITHM.EC_P256].sign_ecdsa(b"data")
    keys[ALGORITHM.EC_ED25519].sign_eddsa(b"data")
    with refused(ERROR.OBJECT_NOT_FOUND):
        AsymmetricKey(session, 1).sign_eddsa(b"data")
    assert slept[:3] == [0.140, 0.075, 0.105]
    assert slept[3] < 0.01
    assert device.busy_s > sum(slept)


def test_delays(hsm: YubiHsm) -> None:
    slept: list[float] = []
    device = Device(sleep=slept.append)
    session = connect(device).create_session_derived(1, PASSWORD)
    device.faults.delays_s[COMMAND.ECHO] = 20.0
    session.list_objects()
    session.send_secure_cmd(COMMAND.ECHO, b"x")
    assert slept == [20.0]
    assert device.busy_s == 20.0


def test_a_session_is_not_idle_while_a_command_runs() -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    device = Device(clock=lambda: now[0], sleep=sleep)
    device.faults.delays_s[COMMAND.ECHO] = 60.0
    session = connect(device).create_session_derived(1, PASSWORD)
    for _ in range(2):
        assert session.send_secure_cmd(COMMAND.ECHO, b"x") == b"x"


def test_commands_are_counted(device: Device, hsm: YubiHsm, session: AuthSession) -> None:
    device.commands.clear()
    session.send_secure_cmd(COMMAND.ECHO, b"x")
    hsm.send_cmd(COMMAND.ECHO, b"x")
    session.list_objects()
    with refused(ERROR.INVALID_COMMAND):
        session.send_secure_cmd(0x78, b"")  # type: ignore[arg-type]
    assert device.commands == {COMMAND.ECHO: 2, COMMAND.LIST_OBJECTS: 1}


def test_an_injected_clock() -> None:
    now = [0.0]
    device = Device(clock=lambda: now[0])
    session = connect(device).create_session_derived(1, PASSWORD)
    now[0] = 30.0
    session.send_secure_cmd(COMMAND.ECHO, b"x")
    now[0] = 60.1
    assert device.sessions == 0
