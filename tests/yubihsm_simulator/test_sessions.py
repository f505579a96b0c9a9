"""Sessions byte by byte: authentication, the encrypted channel, its end."""

import struct

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from yubihsm import YubiHsm
from yubihsm.core import AuthSession, _calculate_iv, _calculate_mac
from yubihsm.defs import CAPABILITY, COMMAND, ERROR
from yubihsm.exceptions import YubiHsmAuthenticationError, YubiHsmDeviceError, YubiHsmInvalidResponseError
from yubihsm.objects import AuthenticationKey

from tests.yubihsm_simulator.conftest import PASSWORD, connect, refused
from yubihsm_simulator import Device
from yubihsm_simulator.secure_channel import INNER_MAX_BYTES


class Tap:
    """A backend that keeps what went over it, and changes requests or answers."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.requests: list[bytes] = []
        self.change_request = self.change_answer = lambda frame: frame

    def transceive(self, msg: bytes) -> bytes:
        self.requests.append(self.change_request(msg))
        return self.change_answer(self.device.process(self.requests[-1]))

    def close(self) -> None:
        pass


@pytest.fixture
def tap(device: Device) -> Tap:
    return Tap(device)


@pytest.fixture
def tapped(tap: Tap) -> AuthSession:
    return YubiHsm(tap).create_session_derived(1, PASSWORD)


def error_frame(code: int) -> bytes:
    return b"\x7f\x00\x01" + bytes([code])


def test_factory_password_opens_a_session(device: Device, session: AuthSession) -> None:
    assert session.send_secure_cmd(COMMAND.ECHO, b"hello") == b"hello"
    assert device.sessions == 1
    session.close()
    assert device.sessions == 0


@pytest.mark.parametrize("length", [0, 1, 12, 13, 28, 29, INNER_MAX_BYTES - 3])
def test_every_padding_length(session: AuthSession, length: int) -> None:
    assert session.send_secure_cmd(COMMAND.ECHO, b"\x80" * length) == b"\x80" * length


def test_wrong_password_is_seen_by_the_client_and_holds_a_place_for_30_s(device: Device, hsm: YubiHsm) -> None:
    with pytest.raises(YubiHsmAuthenticationError):
        hsm.create_session_derived(1, "passwort")
    assert device.sessions == 1
    device.skip(31)
    assert device.sessions == 0


def test_wrong_host_cryptogram_frees_the_place(device: Device) -> None:
    answer = device.process(struct.pack(">BHH8s", 3, 10, 1, bytes(8)))
    assert answer[:3] == b"\x83\x00\x11"
    assert device.process(b"\x04\x00\x11" + answer[3:4] + bytes(16)) == error_frame(ERROR.AUTHENTICATION_FAILED)
    assert device.sessions == 0


def test_a_session_that_is_not_authenticated_carries_nothing(device: Device) -> None:
    device.process(struct.pack(">BHH8s", 3, 10, 1, bytes(8)))
    assert device.process(b"\x05\x00\x19" + bytes(25)) == error_frame(ERROR.INVALID_SESSION)


def test_a_session_is_authenticated_once(tap: Tap, tapped: AuthSession) -> None:
    authenticate = tap.requests[-1]
    assert tap.device.process(authenticate) == error_frame(ERROR.INVALID_SESSION)
    assert tapped.send_secure_cmd(COMMAND.ECHO, b"1") == b"1"


def test_unknown_key(hsm: YubiHsm) -> None:
    with refused(ERROR.OBJECT_NOT_FOUND):
        hsm.create_session_derived(2, PASSWORD)


def test_sixteen_sessions_and_the_lowest_free_number(hsm: YubiHsm) -> None:
    sessions = [hsm.create_session_derived(1, PASSWORD) for _ in range(16)]
    assert [each.sid for each in sessions] == list(range(16))
    with refused(ERROR.SESSIONS_FULL):
        hsm.create_session_derived(1, PASSWORD)
    sessions[5].close()
    sessions[3].close()
    assert hsm.create_session_derived(1, PASSWORD).sid == 3


def test_fewer_sessions_by_fault(device: Device, hsm: YubiHsm) -> None:
    device.faults.session_limit = 1
    hsm.create_session_derived(1, PASSWORD)
    with refused(ERROR.SESSIONS_FULL):
        hsm.create_session_derived(1, PASSWORD)


def test_idle_sessions_end_and_used_ones_do_not(device: Device, hsm: YubiHsm) -> None:
    used, idle = hsm.create_session_derived(1, PASSWORD), hsm.create_session_derived(1, PASSWORD)
    device.skip(20)
    used.send_secure_cmd(COMMAND.ECHO, b"")
    device.skip(20)
    assert device.sessions == 1
    used.send_secure_cmd(COMMAND.ECHO, b"")
    with refused(ERROR.INVALID_SESSION):
        idle.send_secure_cmd(COMMAND.ECHO, b"")


def test_sessions_end_with_a_reboot(device: Device, session: AuthSession) -> None:
    device.reboot()
    with refused(ERROR.INVALID_SESSION):
        session.send_secure_cmd(COMMAND.ECHO, b"")


@pytest.mark.parametrize("at", [3, 4, -1])
def test_a_changed_request_is_refused_and_the_session_lives(tap: Tap, tapped: AuthSession, at: int) -> None:
    def flip(frame: bytes) -> bytes:
        changed = bytearray(frame)
        changed[at] ^= 1
        return bytes(changed)

    tap.change_request = flip
    with refused(ERROR.INVALID_SESSION if at == 3 else ERROR.AUTHENTICATION_FAILED):
        tapped.send_secure_cmd(COMMAND.ECHO, b"hello")
    tap.change_request = lambda frame: frame
    assert tapped.send_secure_cmd(COMMAND.ECHO, b"hello") == b"hello"


def test_a_bad_mac_ends_the_session_by_fault(tap: Tap, tapped: AuthSession) -> None:
    tap.device.faults.drop_session_on_bad_mac = True
    tap.change_request = lambda frame: frame[:-1] + bytes([frame[-1] ^ 1])
    with refused(ERROR.AUTHENTICATION_FAILED):
        tapped.send_secure_cmd(COMMAND.ECHO, b"hello")
    assert tap.device.sessions == 0


def test_a_repeated_message_is_refused(tap: Tap, tapped: AuthSession) -> None:
    tapped.send_secure_cmd(COMMAND.ECHO, b"hello")
    assert tap.device.process(tap.requests[-1]) == error_frame(ERROR.AUTHENTICATION_FAILED)


@pytest.mark.parametrize("at", [3, 4, -1])
def test_the_client_notices_a_changed_answer(tap: Tap, tapped: AuthSession, at: int) -> None:
    def flip(frame: bytes) -> bytes:
        changed = bytearray(frame)
        changed[at] ^= 1
        return bytes(changed)

    tap.change_answer = flip
    with pytest.raises(YubiHsmInvalidResponseError):
        tapped.send_secure_cmd(COMMAND.ECHO, b"hello")


def test_a_lost_answer_is_the_end_of_the_session_for_the_client(tap: Tap, tapped: AuthSession) -> None:
    def lose(_: bytes) -> bytes:
        raise TimeoutError

    tap.change_answer = lose
    with pytest.raises(TimeoutError):
        tapped.send_secure_cmd(COMMAND.ECHO, b"hello")
    tap.change_answer = lambda frame: frame
    with refused(ERROR.AUTHENTICATION_FAILED):
        tapped.send_secure_cmd(COMMAND.ECHO, b"hello")


def test_errors_of_a_command_are_answered_encrypted(tap: Tap, tapped: AuthSession) -> None:
    answers: list[bytes] = []
    tap.change_answer = lambda frame: answers.append(frame) or frame  # type: ignore[func-returns-value]
    with refused(ERROR.OBJECT_NOT_FOUND):
        tapped.send_secure_cmd(COMMAND.GET_OPAQUE, b"\x00\x05")
    assert answers[0][0] == 0x85
    assert len(answers[0]) == 3 + 1 + 16 + 8


def test_inner_frames_are_exact(session: AuthSession) -> None:
    for inner in (b"", b"\x01", b"\x01\x00\x02a", b"\x01\x00\x00a"):
        answer = session._secure_transceive(inner)
        assert answer[:4] == error_frame(ERROR.WRONG_LENGTH)


def test_a_message_without_padding_ends_the_session(device: Device, session: AuthSession) -> None:
    cipher = Cipher(algorithms.AES(session._key_enc), modes.CBC(_calculate_iv(session._key_enc, 1))).encryptor()
    message = struct.pack(">BHB", COMMAND.SESSION_MESSAGE, 1 + 16 + 8, 0) + cipher.update(bytes(16))
    _, mac = _calculate_mac(session._key_mac, session._mac_chain, message)
    assert device.process(message + mac) == error_frame(ERROR.SESSION_FAILED)
    assert device.sessions == 0


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (b"", ERROR.WRONG_LENGTH),
        (b"\x01\x00", ERROR.WRONG_LENGTH),
        (b"\x01\x00\x01", ERROR.WRONG_LENGTH),
        (b"\x01\x00\x00\x00", ERROR.WRONG_LENGTH),
        (b"\x01" + (3137).to_bytes(2, "big") + bytes(3137), ERROR.WRONG_LENGTH),
        (b"\x02\x00\x00", ERROR.INVALID_COMMAND),
        (b"\x40\x00\x00", ERROR.INVALID_COMMAND),
        (b"\x48\x00\x00", ERROR.INVALID_COMMAND),
        (b"\x81\x00\x00", ERROR.INVALID_COMMAND),
        (b"\x03\x00\x02\x00\x01", ERROR.WRONG_LENGTH),
        (b"\x03\x00\x43\x00\x01" + bytes(65), ERROR.INVALID_DATA),  # a point for a key that is symmetric
        (b"\x04\x00\x01\x00", ERROR.WRONG_LENGTH),
        (b"\x04\x00\x11\x0c" + bytes(16), ERROR.INVALID_SESSION),
        (b"\x05\x00\x01\x00", ERROR.WRONG_LENGTH),
        (b"\x05\x00\x19\x07" + bytes(24), ERROR.INVALID_SESSION),
        (b"\x06\x00\x01\x02", ERROR.INVALID_DATA),
        (b"\x06\x00\x02\x01\x01", ERROR.WRONG_LENGTH),
        (b"\x0a\x00\x01\x00", ERROR.WRONG_LENGTH),
    ],
)
def test_refused_in_the_clear(device: Device, request_: bytes, code: int) -> None:
    assert device.process(request_) == error_frame(code)


def test_echo_in_the_clear_is_as_long_as_a_frame(device: Device) -> None:
    longest = b"\x01" + (3136).to_bytes(2, "big") + bytes(3136)
    assert device.process(longest) == b"\x81" + longest[1:]


def test_device_info(device: Device) -> None:
    info = connect(device).get_device_info()
    assert (info.version, info.serial, info.log_size, info.log_used) == ((2, 4, 0), 12345678, 62, 2)
    assert sorted(info.supported_algorithms) == list(range(1, 56))
    assert connect(Device(serial=7, firmware=(2, 5, 0))).get_device_info().version == (2, 5, 0)


def test_other_firmware_is_not_simulated() -> None:
    with pytest.raises(ValueError, match="firmware"):
        Device(firmware=(2, 3, 1))


def test_rights_are_those_at_the_beginning(hsm: YubiHsm, session: AuthSession) -> None:
    key = AuthenticationKey.put_derived(
        session, 5, "short-lived", 1, CAPABILITY.GET_PSEUDO_RANDOM, CAPABILITY.NONE, PASSWORD
    )
    short_lived = hsm.create_session_derived(5, PASSWORD)
    key.delete()
    assert len(short_lived.get_pseudo_random(8)) == 8


def test_closed_session_is_unknown(hsm: YubiHsm, tap: Tap, tapped: AuthSession) -> None:
    tapped.close()
    assert tap.device.process(tap.requests[-1]) == error_frame(ERROR.INVALID_SESSION)


def test_asymmetric_authentication(hsm: YubiHsm, session: AuthSession) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    AuthenticationKey.put_public_key(
        session, 9, "asymmetric", 1, CAPABILITY.NONE, CAPABILITY.NONE, private.public_key()
    )
    with hsm.create_session_asymmetric(9, private) as asymmetric:
        assert asymmetric.send_secure_cmd(COMMAND.ECHO, b"hello") == b"hello"
    with pytest.raises(YubiHsmAuthenticationError):
        hsm.create_session_asymmetric(9, ec.generate_private_key(ec.SECP256R1()))
    with refused(ERROR.INVALID_DATA):
        hsm.create_session_derived(9, PASSWORD)
    with refused(ERROR.INVALID_DATA):
        hsm.init_session_asymmetric(9, b"\x04" + bytes(64))


def test_device_public_key_follows_from_the_serial() -> None:
    keys = [connect(Device(serial=serial)).get_device_public_key().public_numbers() for serial in (1, 1, 2)]
    assert keys[0] == keys[1] != keys[2]


def test_change_password_is_for_the_own_key_only(hsm: YubiHsm, session: AuthSession) -> None:
    key = AuthenticationKey.put_derived(
        session, 6, "own", 1, CAPABILITY.CHANGE_AUTHENTICATION_KEY, CAPABILITY.NONE, PASSWORD
    )
    with refused(ERROR.INVALID_ID):
        key.change_password("another")
    own = key.with_session(hsm.create_session_derived(6, PASSWORD))
    with refused(ERROR.INVALID_DATA):
        own.change_public_key(ec.generate_private_key(ec.SECP256R1()).public_key())
    with refused(ERROR.WRONG_LENGTH):
        own.session.send_secure_cmd(COMMAND.CHANGE_AUTHENTICATION_KEY, b"\x00\x06\x26" + bytes(31))
    own.change_password("another")
    with pytest.raises(YubiHsmAuthenticationError):
        hsm.create_session_derived(6, PASSWORD)
    assert hsm.create_session_derived(6, "another").sid is not None


def test_reset_ends_all_sessions(device: Device, hsm: YubiHsm, session: AuthSession) -> None:
    other = hsm.create_session_derived(1, PASSWORD)
    session.reset_device()
    assert device.sessions == 0
    with pytest.raises((YubiHsmDeviceError, TypeError)):
        other.send_secure_cmd(COMMAND.ECHO, b"")
