"""The audit log and the options."""

import struct
from hashlib import sha256
from itertools import pairwise

import pytest
from yubihsm import YubiHsm
from yubihsm.core import AuthSession, LogEntry
from yubihsm.defs import ALGORITHM, AUDIT, CAPABILITY, COMMAND, ERROR, OPTION
from yubihsm.exceptions import YubiHsmAuthenticationError, YubiHsmInvalidResponseError
from yubihsm.objects import AsymmetricKey, Opaque

from tests.yubihsm_simulator.conftest import PASSWORD, connect, refused
from yubihsm_simulator import Device


def entries(session: AuthSession) -> list[LogEntry]:
    """The log after its first two entries; the chain of hashes is checked."""
    log = session.get_log_entries().entries
    for previous, entry in pairwise(log):
        assert entry.digest == sha256(entry.data + previous.digest).digest()[:16]
    return [entry for entry in log if entry.number > 2]


def fill(session: AuthSession, device: Device) -> None:
    """The log is full, and no entry may be overwritten."""
    session.set_command_audit({COMMAND.BLINK_DEVICE: AUDIT.ON})
    session.set_force_audit(AUDIT.ON)
    while len(device.log.entries) < device.faults.log_entries:
        session.send_secure_cmd(COMMAND.BLINK_DEVICE, b"\x01")


def test_a_new_device_has_logged_its_reset_and_its_boot(session: AuthSession) -> None:
    boots, authentications, log = session.get_log_entries()
    assert (boots, authentications) == (0, 0)
    assert [entry.data for entry in log] == [
        b"\x00\x01" + b"\xff" * 14,
        struct.pack(">HBHHHHBL", 2, 0, 0, 0xFFFF, 0, 0, 0, 0),
    ]


def test_nothing_is_audited_unless_it_is_set(session: AuthSession) -> None:
    assert set(session.get_command_audit().values()) == {AUDIT.OFF}
    session.get_pseudo_random(1)
    assert entries(session) == []


def test_an_entry_says_who_did_what_with_which_key(device: Device, hsm: YubiHsm, session: AuthSession) -> None:
    audited = (COMMAND.CREATE_SESSION, COMMAND.AUTHENTICATE_SESSION, COMMAND.SIGN_ECDSA, COMMAND.ECHO)
    session.set_command_audit(dict.fromkeys(audited, AUDIT.ON))
    key = AsymmetricKey.generate(session, 5, "", 1, CAPABILITY.SIGN_ECDSA, ALGORITHM.EC_P256)
    device.skip(1.5)
    key.sign_ecdsa(b"data")
    with refused(ERROR.OBJECT_NOT_FOUND):
        AsymmetricKey(session, 6).sign_ecdsa(b"data")
    hsm.create_session_derived(1, PASSWORD)
    hsm.send_cmd(COMMAND.ECHO, b"x")
    log = entries(session)
    none = 0xFFFF
    assert [
        (each.number, each.command, each.length, each.session_key, each.target_key, each.second_key, each.result)
        for each in log
    ] == [
        (3, COMMAND.SIGN_ECDSA, 34, 1, 5, none, 0xD6),
        (4, COMMAND.SIGN_ECDSA, 34, 1, 6, none, ERROR.OBJECT_NOT_FOUND),
        (5, COMMAND.CREATE_SESSION, 10, none, 1, none, 0x83),
        (6, COMMAND.AUTHENTICATE_SESSION, 17, none, 1, none, 0x84),
        (7, COMMAND.ECHO, 1, none, none, none, 0x81),
    ]
    assert log[0].tick >= 1500


def test_a_refused_authentication_is_logged(device: Device, hsm: YubiHsm, session: AuthSession) -> None:
    session.set_command_audit({COMMAND.AUTHENTICATE_SESSION: AUDIT.ON})
    with pytest.raises(YubiHsmAuthenticationError):
        hsm.create_session_derived(1, "passwort")
    device.process(b"\x04\x00\x11\x01" + bytes(16))
    (entry,) = entries(session)
    assert (entry.target_key, entry.result) == (1, ERROR.AUTHENTICATION_FAILED)


def test_the_log_keeps_the_last_62_entries(session: AuthSession) -> None:
    session.set_command_audit({COMMAND.BLINK_DEVICE: AUDIT.ON})
    for _ in range(100):
        session.send_secure_cmd(COMMAND.BLINK_DEVICE, b"\x01")
    assert [entry.number for entry in entries(session)] == list(range(41, 103))


def test_numbers_wrap(device: Device, session: AuthSession) -> None:
    session.set_log_index(2)
    device.log.last_number = 0xFFFE
    session.set_command_audit({COMMAND.BLINK_DEVICE: AUDIT.ON})
    for _ in range(3):
        session.send_secure_cmd(COMMAND.BLINK_DEVICE, b"\x01")
    log = session.get_log_entries().entries
    assert [entry.number for entry in log] == [0xFFFF, 0, 1]
    session.set_log_index(0)
    assert [entry.number for entry in session.get_log_entries().entries] == [1]


def test_log_index_removes_what_was_read(session: AuthSession) -> None:
    session.set_command_audit({COMMAND.BLINK_DEVICE: AUDIT.ON, COMMAND.SET_LOG_INDEX: AUDIT.ON})
    for _ in range(3):
        session.send_secure_cmd(COMMAND.BLINK_DEVICE, b"\x01")
    session.set_log_index(4)
    assert [(entry.number, entry.command) for entry in entries(session)] == [(5, 0x6B), (6, 0x67)]
    for number in (4, 99):
        with refused(ERROR.INVALID_DATA):
            session.set_log_index(number)


def test_a_full_log_with_force_audit_stops_all_but_reading_it(
    device: Device, hsm: YubiHsm, session: AuthSession
) -> None:
    fill(session, device)
    for command, data in [
        (COMMAND.BLINK_DEVICE, b"\x01"),
        (COMMAND.ECHO, b""),
        (COMMAND.LIST_OBJECTS, b""),
        (COMMAND.RESET_DEVICE, b""),
        (COMMAND.SET_OPTION, b"\x01\x00\x01\x00"),
    ]:
        with refused(ERROR.LOG_FULL):
            session.send_secure_cmd(command, data)
    with refused(ERROR.INVALID_COMMAND):
        session.send_secure_cmd(0x78, b"")  # type: ignore[arg-type]
    assert hsm.get_device_info().log_used == 62
    hsm.create_session_derived(1, PASSWORD).close()
    log = entries(session)
    session.set_log_index(log[-1].number)
    session.send_secure_cmd(COMMAND.BLINK_DEVICE, b"\x01")
    assert [entry.number for entry in entries(session)] == [log[-1].number + 1]


def test_what_could_not_be_logged_is_counted(device: Device, hsm: YubiHsm, session: AuthSession) -> None:
    session.set_command_audit({COMMAND.AUTHENTICATE_SESSION: AUDIT.ON})
    fill(session, device)
    for _ in range(2):
        hsm.create_session_derived(1, PASSWORD).close()
    device.reboot()
    with hsm.create_session_derived(1, PASSWORD) as anew:
        boots, authentications, log = anew.get_log_entries()
        assert (boots, authentications, len(log)) == (1, 3, 62)
        anew.set_log_index(log[-1].number)
        assert anew.get_log_entries()[:2] == (0, 0)


def test_without_force_audit_a_boot_overwrites_the_oldest_entry(device: Device, session: AuthSession) -> None:
    device.faults.log_entries = 3
    for _ in range(5):
        device.reboot()
    with connect(device).create_session_derived(1, PASSWORD) as anew:
        assert [entry.number for entry in anew.get_log_entries().entries] == [5, 6, 7]


def test_fixed_means_until_reset(device: Device, session: AuthSession) -> None:
    session.set_command_audit({COMMAND.BLINK_DEVICE: AUDIT.FIXED})
    session.set_force_audit(AUDIT.FIXED)
    for mode in (AUDIT.OFF, AUDIT.ON):
        with refused(ERROR.INVALID_DATA):
            session.set_force_audit(mode)
        with refused(ERROR.INVALID_DATA):
            session.set_command_audit({COMMAND.ECHO: AUDIT.ON, COMMAND.BLINK_DEVICE: mode})
    assert session.get_command_audit()[COMMAND.ECHO] == AUDIT.OFF
    session.reset_device()
    with connect(device).create_session_derived(1, PASSWORD) as anew:
        assert anew.get_force_audit() == AUDIT.OFF
        assert anew.get_command_audit()[COMMAND.BLINK_DEVICE] == AUDIT.OFF


def test_order_of_the_audited_commands(session: AuthSession) -> None:
    # as printed in Yubico's guide "Set Command Audit Option"
    assert session.get_option(OPTION.COMMAND_AUDIT).hex() == (
        "0100030004000500060007000900080040004100420043004400450046004700550056004800490057004a004b004c004d0067004e00"
        "4f0050005100520053005400580059005a005b005c005d005e005f006000610062006300640065006600680069006a006b006c000a00"
        "6d006e006f0070007100720073007400750076007700"
    )


def test_unknown_commands_can_be_audited_and_session_messages_cannot(session: AuthSession) -> None:
    before = session.get_option(OPTION.COMMAND_AUDIT)
    session.put_option(OPTION.COMMAND_AUDIT, b"\x78\x01\xff\x01")
    assert session.get_option(OPTION.COMMAND_AUDIT) == before
    with refused(ERROR.INVALID_DATA):
        session.put_option(OPTION.COMMAND_AUDIT, b"\x05\x01")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x01\x00\x01\x03", ERROR.INVALID_DATA),
        (b"\x01\x00\x02\x00\x00", ERROR.WRONG_LENGTH),
        (b"\x01\x00\x02\x00", ERROR.WRONG_LENGTH),
        (b"\x01\x00\x01\x00\x00", ERROR.WRONG_LENGTH),
        (b"\x02\x00\x01\x00", ERROR.INVALID_DATA),
        (b"\x03\x00\x01\x00", ERROR.WRONG_LENGTH),
        (b"\x03\x00\x02\x01\x03", ERROR.INVALID_DATA),
        (b"\x04\x00\x02\x01\x02", ERROR.INVALID_DATA),
        (b"\x04\x00\x02\x38\x00", ERROR.INVALID_DATA),
        (b"\x05\x00\x01\x01", ERROR.INVALID_DATA),
    ],
)
def test_options_refused(session: AuthSession, data: bytes, code: int) -> None:
    with refused(code):
        session.send_secure_cmd(COMMAND.SET_OPTION, data)


def test_no_fips_mode(session: AuthSession) -> None:
    with refused(ERROR.INVALID_DATA):
        session.get_fips_status()
    with refused(ERROR.INVALID_DATA):
        session.set_fips_mode(True)


def test_reset_is_not_logged_as_a_command(device: Device, session: AuthSession) -> None:
    session.set_command_audit({COMMAND.RESET_DEVICE: AUDIT.ON, COMMAND.PUT_OPAQUE: AUDIT.ON})
    Opaque.put(session, 0, "", 1, CAPABILITY.NONE, ALGORITHM.OPAQUE_DATA, b"x")
    session.reset_device()
    assert [entry[2] for entry in device.log.entries] == [0xFF, 0]


def test_client_notices_a_changed_chain(device: Device, session: AuthSession) -> None:
    session.set_command_audit({COMMAND.BLINK_DEVICE: AUDIT.ON})
    session.send_secure_cmd(COMMAND.BLINK_DEVICE, b"\x01")
    first = session.get_log_entries().entries[0]
    session.set_log_index(first.number)
    session.get_log_entries(first)
    device.log.entries[-1] = device.log.entries[-1][:16] + bytes(16)
    with pytest.raises(YubiHsmInvalidResponseError, match="digest"):
        session.get_log_entries(first)
