"""One session with one YubiHSM 2, over python-yubihsm. Runs in a token worker, in one thread.

A session is a secure channel (GlobalPlatform SCP03) in which each side counts: once an answer is missing or wrong the
two disagree, so the session is thrown away and never closed. The device frees its place (one of 16) after 30 s.
"""

import contextlib
import hmac
import math
import os
import ssl
import struct
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import urllib3
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.cmac import CMAC
from yubihsm.backends import YhsmBackend
from yubihsm.backends.usb import UsbBackend
from yubihsm.core import AuthSession, DeviceInfo, YubiHsm
from yubihsm.defs import COMMAND, ERROR
from yubihsm.exceptions import (
    YubiHsmConnectionError,
    YubiHsmDeviceError,
    YubiHsmError,
    YubiHsmInvalidRequestError,
)
from yubihsm.utils import password_to_key

from tokens.drivers.driver import DriverError
from tokens.drivers.pin_gate import PinGate
from tokens.errors import KeyUnusable
from tokens.frames import Action, Header
from tokens.secret import read_secret

_RETRY_HINT = "Try again; if it stays, look at the device with `yubihsm-shell` and `hsmsign doctor`."
_REACH_HINT = "Check that the YubiHSM is plugged in and its connector runs; the service tries again."
_UNSUITED_HINT = "Ask for a method that the device and this key support, or grant another key."

# What each error code means for the call and for the session: the error's class, what is to be done, and a hint.
# A code that is not here ends the call: the same one would meet the same answer.
_CODES: dict[ERROR, tuple[str, Action, str]] = {
    ERROR.INVALID_COMMAND: ("KeyUnsuited", Action.GIVE_UP, "The device's firmware is too old for this method."),
    ERROR.INVALID_DATA: ("KeyUnsuited", Action.GIVE_UP, _UNSUITED_HINT),
    ERROR.WRONG_LENGTH: ("KeyUnsuited", Action.GIVE_UP, _UNSUITED_HINT),
    ERROR.ALGORITHM_DISABLED: ("KeyUnsuited", Action.GIVE_UP, "The device's options switch this algorithm off."),
    # the session is gone, or the two sides count differently
    ERROR.INVALID_SESSION: ("ProviderUnavailable", Action.REOPEN, _RETRY_HINT),
    ERROR.AUTHENTICATION_FAILED: ("ProviderUnavailable", Action.REOPEN, _RETRY_HINT),
    ERROR.SESSION_FAILED: ("ProviderUnavailable", Action.REOPEN, _RETRY_HINT),
    ERROR.SESSIONS_FULL: (
        "ProviderUnavailable",
        Action.REOPEN,
        "Its 16 sessions are taken; each that is not used ends after 30 s. See which programs open them.",
    ),
    # nothing is signed before the log has been read
    ERROR.LOG_FULL: (
        "LogFull",
        Action.GIVE_UP,
        "Have the log read and its entries freed: the `audit` table of the provider's settings does it.",
    ),
    ERROR.OBJECT_NOT_FOUND: (
        "KeyNotFound",
        Action.GIVE_UP,
        "Compare the grant with `yubihsm-shell -a list-objects`: the authentication key sees only what shares a domain "
        "with it.",
    ),
    ERROR.DEMO_MODE: ("ProviderRefused", Action.GIVE_UP, "Use a device that is not in demo mode."),
    # the answer to an earlier command was lost in the device
    ERROR.COMMAND_UNEXECUTED: ("SigningFailed", Action.RETRY, _RETRY_HINT),
}

_CAPABILITIES = {
    COMMAND.SIGN_PKCS1: "sign-pkcs",
    COMMAND.SIGN_PSS: "sign-pss",
    COMMAND.SIGN_ECDSA: "sign-ecdsa",
    COMMAND.SIGN_EDDSA: "sign-eddsa",
    COMMAND.SIGN_ATTESTATION_CERTIFICATE: "sign-attestation-certificate",
    COMMAND.GET_OPAQUE: "get-opaque",
    COMMAND.GET_LOG_ENTRIES: "get-log-entries",
    COMMAND.SET_LOG_INDEX: "get-log-entries",
}


@dataclass(frozen=True, slots=True)
class DeviceSettings:
    """What it takes to open a session; `tokens.yubihsm.YubihsmSettings` says what the values mean."""

    connector: str
    serial: int
    auth_key_id: int
    password_file: str
    state_directory: str
    connect_timeout_s: float
    command_timeout_s: float
    keep_alive_s: float
    cacert: str | None = None
    certificate: str | None = None
    key: str | None = None


class Device:
    """The device, with at most one session."""

    def __init__(self, settings: DeviceSettings) -> None:
        self._settings = settings
        self._backend: YhsmBackend | None = None
        self._session: AuthSession | None = None
        self._derived: tuple[bytes, tuple[bytes, bytes]] | None = None
        self.frame_max_bytes = 0

    def open(self) -> Header:
        """Connects anew, checks that it is the right device, and opens a session."""
        self.close()
        if self._backend is not None:
            self._backend.close()
        try:
            self._backend = _connect(self._settings)
            device = _YubiHsm(self._backend)
        except Exception as error:
            raise _unavailable(error, COMMAND.DEVICE_INFO) from None
        info = device.info
        if info.serial != self._settings.serial:
            raise DriverError(
                "ProviderUnavailable",
                f"The connector leads to the YubiHSM {info.serial}, not to {self._settings.serial}.",
                "Plug in the right device, or correct `serial` in the provider's settings.",
                Action.REOPEN,
            )
        # the largest frame; sessions came with 3136 bytes in firmware 2.4.0
        self.frame_max_bytes = 3136 if info.version >= (2, 4, 0) else 2048
        self._session = self._log_in(device)
        return {
            "label": "YubiHSM",
            "serial": f"{info.serial:08}",
            "model": "YubiHSM",
            "manufacturer": "Yubico (www.yubico.com)",
        }

    def close(self) -> None:
        """Ends the session, so that the device need not wait for it to expire."""
        if self._session is not None:
            with contextlib.suppress(Exception):  # it may have gone with the device
                self._session.close()
            self._session = None

    def keep_alive(self) -> None:
        """Uses the session, which would end after 30 s of silence."""
        if self._session is not None:
            with contextlib.suppress(DriverError):
                self.send(COMMAND.ECHO, b"\0")

    def send(self, command: COMMAND, data: bytes = b"") -> bytes:
        """What the device answers to one command in the session. Raises DriverError."""
        if self._session is None:
            raise DriverError(
                "ProviderUnavailable", "The session with the YubiHSM is gone.", _REACH_HINT, Action.REOPEN
            )
        try:
            return self._session.send_secure_cmd(command, data)
        except Exception as error:
            translated = _translate(error, command)
            if translated.action is Action.REOPEN:
                self._session = None
            raise translated from None

    def _log_in(self, device: YubiHsm) -> AuthSession:
        try:
            password = read_secret(Path(self._settings.password_file))
        except KeyUnusable as error:
            message = f"No password: {error.message}"
            raise DriverError("ProviderUnavailable", message, error.hint, Action.REOPEN) from None
        if not password:  # a file that is being rewritten
            raise DriverError(
                "ProviderUnavailable", "The password's source is empty.", "Put the password into it.", Action.REOPEN
            )
        settings = self._settings
        gate = PinGate(Path(settings.state_directory), f"yubihsm {settings.serial} {settings.auth_key_id}")
        with gate.locked():
            if gate.refused(password):
                raise _password_refused("The YubiHSM refused this password before.")
            try:
                return _open_session(device, settings.auth_key_id, *self._keys(password))
            except _WrongPassword:
                gate.end(password, refused=True)
                raise _password_refused("The YubiHSM refused the password.") from None
            except YubiHsmDeviceError as error:
                if error.code is not ERROR.OBJECT_NOT_FOUND:
                    raise _unavailable(error, COMMAND.CREATE_SESSION) from None
                raise DriverError(
                    "ProviderUnavailable",
                    f"The YubiHSM has no authentication key 0x{settings.auth_key_id:04x}.",
                    "Correct `auth_key_id` in the provider's settings, or make the key: `hsmsign yubihsm setup` does.",
                    Action.REOPEN,
                ) from None
            except Exception as error:
                raise _unavailable(error, COMMAND.CREATE_SESSION) from None

    def _keys(self, password: bytes) -> tuple[bytes, bytes]:
        """K-ENC and K-MAC, derived once for each password."""
        if self._derived is None or self._derived[0] != password:
            try:
                self._derived = password, password_to_key(password.decode())
            except UnicodeDecodeError:
                raise DriverError(
                    "ProviderUnavailable", "The password is not UTF-8.", "Put the right one into it.", Action.REOPEN
                ) from None
        return self._derived[1]


class _YubiHsm(YubiHsm):
    """Keeps what the device said of itself when the connection was made."""

    info: DeviceInfo

    def get_device_info(self) -> DeviceInfo:
        self.info = super().get_device_info()
        return self.info


class _NoDevice(YubiHsmConnectionError):
    """The connector answers, and has no YubiHSM."""


class _TooLate(YubiHsmConnectionError):
    """No answer came in time: the device may have done what it was asked."""


class _WrongPassword(YubiHsmError):
    """The device and this side derived different keys."""


class _HttpBackend(YhsmBackend):
    """Frames over HTTP. Unlike python-yubihsm's own it has short timeouts, and neither proxies nor redirections."""

    def __init__(self, settings: DeviceSettings) -> None:
        url = urlsplit(settings.connector)
        tls = {"ssl_context": _tls(settings)} if url.scheme == "https" else {}
        self._path = url.path.rstrip("/") + "/connector/api"
        self._pool = urllib3.connection_from_url(
            settings.connector,
            maxsize=1,
            retries=False,
            timeout=urllib3.Timeout(connect=settings.connect_timeout_s, read=settings.command_timeout_s),
            headers={"Content-Type": "application/octet-stream"},
            **tls,
        )

    def transceive(self, msg: bytes) -> bytes:
        try:
            answer = self._pool.request("POST", self._path, body=msg, redirect=False)
        except urllib3.exceptions.ReadTimeoutError:
            raise _TooLate from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise YubiHsmConnectionError(type(error).__name__) from None
        if answer.status == HTTPStatus.INTERNAL_SERVER_ERROR:  # what yubihsm-connector says without a device
            raise _NoDevice
        if answer.status != HTTPStatus.OK:
            raise YubiHsmConnectionError(f"status {answer.status}")
        return answer.data

    def close(self) -> None:
        self._pool.close()


def _tls(settings: DeviceSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=settings.cacert)
    if settings.certificate is not None:
        context.load_cert_chain(settings.certificate, settings.key)
    return context


def _connect(settings: DeviceSettings) -> YhsmBackend:
    """Raises YubiHsmConnectionError."""
    try:
        if urlsplit(settings.connector).scheme == "yhusb":
            return UsbBackend(settings.serial, math.ceil(settings.command_timeout_s))
        return _HttpBackend(settings)
    except (OSError, ValueError) as error:  # certificates that cannot be read; no libusb
        raise YubiHsmConnectionError(type(error).__name__) from None


def _open_session(device: YubiHsm, auth_key_id: int, key_enc: bytes, key_mac: bytes) -> AuthSession:
    """Opens a session by GlobalPlatform's SCP03 (Amendment D, section 6.2), as the YubiHSM 2 frames it.

    python-yubihsm's own way ends where the device's cryptogram is not the expected one: the half-open session then
    takes one of the device's 16 places for 30 s. Here the device gets to refuse a wrong password, and frees the place.

    Raises _WrongPassword, and what YubiHsm.send_cmd raises.
    """
    challenge = os.urandom(8)
    # CREATE SESSION: key u16, challenge 8 -> session u8, challenge 8, cryptogram 8
    answer = device.send_cmd(COMMAND.CREATE_SESSION, struct.pack(">H8s", auth_key_id, challenge))
    session, card_challenge, card_cryptogram = struct.unpack(">B8s8s", answer)
    context = challenge + card_challenge
    s_enc, s_mac = _derive(key_enc, 0x04, context, 128), _derive(key_mac, 0x06, context, 128)
    host_cryptogram = _derive(s_mac, 0x01, context, 64)
    # AUTHENTICATE SESSION: session u8, cryptogram 8, the first half of the MAC that begins the chain
    chain = _cmac(s_mac, bytes(16) + struct.pack(">BHB8s", COMMAND.AUTHENTICATE_SESSION, 17, session, host_cryptogram))
    try:
        device.send_cmd(COMMAND.AUTHENTICATE_SESSION, struct.pack(">B8s8s", session, host_cryptogram, chain[:8]))
    except YubiHsmDeviceError as error:
        if error.code is ERROR.AUTHENTICATION_FAILED:
            raise _WrongPassword from None
        raise
    if not hmac.compare_digest(card_cryptogram, _derive(s_mac, 0x00, context, 64)):
        raise _WrongPassword
    return AuthSession(device, session, s_enc, s_mac, _derive(key_mac, 0x07, context, 128), chain)


def _derive(key: bytes, constant: int, context: bytes, bits: int) -> bytes:
    """SCP03's key derivation (Amendment D, section 4.1.5): NIST SP 800-108 in counter mode, one block."""
    return _cmac(key, bytes(11) + struct.pack(">BBHB", constant, 0, bits, 1) + context)[: bits // 8]


def _cmac(key: bytes, data: bytes) -> bytes:
    mac = CMAC(AES(key))
    mac.update(data)
    return mac.finalize()


def _translate(error: Exception, command: COMMAND) -> DriverError:
    name, action, hint = "ProviderUnavailable", Action.REOPEN, _REACH_HINT
    match error:
        case YubiHsmDeviceError(code=ERROR.INSUFFICIENT_PERMISSIONS):
            capability = _CAPABILITIES.get(command, command.name.lower().replace("_", "-"))
            name, action = "ProviderRefused", Action.GIVE_UP
            message = "The YubiHSM does not let this authentication key do that."
            hint = f"The authentication key and the object both need the capability {capability}."
        case YubiHsmDeviceError():
            message = f"The YubiHSM answered {error.code.name}."
            name, action, hint = _CODES.get(error.code, ("SigningFailed", Action.GIVE_UP, _RETRY_HINT))
        case YubiHsmInvalidRequestError():
            message = "The data is too long for the YubiHSM."
            name, action, hint = "KeyUnsuited", Action.GIVE_UP, _UNSUITED_HINT
        case _TooLate():
            name, message = "ProviderTimeout", "The YubiHSM did not answer in time."
        case _NoDevice():
            message = "The connector runs, and no YubiHSM is plugged in."
        case YubiHsmConnectionError():
            message = f"The YubiHSM cannot be reached ({error})."
        case _:
            message, hint = f"The YubiHSM's answer makes no sense ({type(error).__name__}).", _RETRY_HINT
    return DriverError(name, message, hint, action)


def _unavailable(error: Exception, command: COMMAND) -> DriverError:
    """No answer to opening a session is worth more than waiting and trying again."""
    if isinstance(error, DriverError):
        return error
    translated = _translate(error, command)
    return DriverError("ProviderUnavailable", translated.message, translated.hint, Action.REOPEN)


def _password_refused(message: str) -> DriverError:
    return DriverError(
        "PinRefused",
        message,
        "Put the right password into the provider's password source; no session is opened before it has changed.",
        Action.REOPEN,
    )
