"""A device, by its connector: found, logged in to, and its errors in words."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from yubihsm.backends import YhsmBackend
from yubihsm.backends.http import HttpBackend
from yubihsm.core import AuthSession, YubiHsm
from yubihsm.defs import ERROR
from yubihsm.exceptions import (
    YubiHsmAuthenticationError,
    YubiHsmDeviceError,
    YubiHsmError,
    YubiHsmInvalidResponseError,
)
from yubihsm.objects import AsymmetricKey, ObjectInfo

from tokens.errors import Error, ProviderProblem, ProviderRefused, ProviderUnavailable
from tokens.provider import PublicKey
from tokens.provisioning.declaration import DeviceTable

CONNECT_TIMEOUT_S = 2
"""How long making the connection may take."""

COMMAND_TIMEOUT_S = 300
"""How long the device may take for one command: making an RSA-4096 key can take it minutes."""

RESET_BY_HAND = (
    "Reset the device: hold its metal rim for ten seconds while it is plugged in (a simulator: delete its state file)."
)

_HINTS = {
    ERROR.SESSIONS_FULL: "Others hold its 16 sessions: stop them, or wait 30 s.",
    ERROR.LOG_FULL: "Have the auditor read its log.",
    ERROR.OBJECT_NOT_FOUND: "It lacks an object or authentication key, or hides it: compare it with its file.",
    ERROR.STORAGE_FAILED: "It is full: declare less.",
    ERROR.WRONG_LENGTH: "An object is too large for it.",
    ERROR.INSUFFICIENT_PERMISSIONS: "The authentication key lacks a capability.",
    ERROR.ALGORITHM_DISABLED: "Declare another algorithm, or reset the device: all algorithms are then enabled.",
    ERROR.INVALID_DATA: "Its firmware does not take this: look at its version.",
}


@contextmanager
def connect(device: DeviceTable) -> Iterator[YubiHsm]:
    """The device.

    Raises:
        ProviderUnavailable: there is no connector, no device, or no answer.
        ProviderRefused: it is another device; or what the block does is refused.
    """
    with translated(f"The YubiHSM at {device.connector}"):
        hsm = YubiHsm(_backend(device))
        try:
            if (found := hsm.get_device_info().serial) != device.serial:
                raise ProviderRefused(
                    f"The device at {device.connector} has the serial number {found}, not {device.serial}.",
                    "Plug in the one that the file is for, or correct `serial`.",
                )
            yield hsm
        finally:
            hsm.close()


@contextmanager
def logged_in(hsm: YubiHsm, auth_key_id: int, password: str) -> Iterator[AuthSession]:
    """A session; it is closed at the end, as there are only 16."""
    session = hsm.create_session_derived(auth_key_id, password)
    try:
        yield session
    finally:
        # one that broke is gone after 30 s of silence; python-yubihsm fails to pack the number of one that is closed
        with suppress(YubiHsmError, struct.error):
            session.close()


@contextmanager
def translated(who: str) -> Iterator[None]:
    """Turns python-yubihsm's exceptions into ours; `who` begins the sentence."""
    try:
        yield
    except (YubiHsmError, struct.error, IndexError) as error:
        raise explain(who, error) from None


def explain(who: str, error: Exception) -> Error:
    """What python-yubihsm's exception says, in words; `who` begins the sentence."""
    match error:
        case YubiHsmAuthenticationError():
            return ProviderRefused(f"{who} does not take the password.", "Check the password's file.")
        case YubiHsmDeviceError():
            hint = _HINTS.get(error.code, "See what the device holds, and whether it is sound.")
            return ProviderRefused(f"{who} answers {error.code.name}.", hint)
        case YubiHsmInvalidResponseError() | struct.error() | IndexError():
            return ProviderProblem(f"{who} gives an answer that makes no sense.", "Is it a YubiHSM 2, and is it sound?")
        case _:
            return ProviderUnavailable(
                f"{who} does not answer ({type(error).__name__}).", "Is its connector running, and is it plugged in?"
            )


def objects(session: AuthSession) -> list[ObjectInfo]:
    """All that the session may see, by id and type."""
    found = [each.get_info() for each in session.list_objects()]
    return sorted(found, key=lambda info: (info.id, info.object_type))


def _backend(device: DeviceTable) -> YhsmBackend:
    if device.connector.startswith("yhusb:"):
        # it looks for libusb
        from usb.core import NoBackendError  # noqa: PLC0415
        from yubihsm.backends.usb import UsbBackend  # noqa: PLC0415

        try:
            return UsbBackend(serial=device.serial, timeout=COMMAND_TIMEOUT_S)
        except NoBackendError:
            raise ProviderUnavailable(
                "There is no libusb.", "Install it (Debian: libusb-1.0-0), or have yubihsm-connector reach the device."
            ) from None
    backend = HttpBackend(device.connector, timeout=(CONNECT_TIMEOUT_S, COMMAND_TIMEOUT_S))
    # proxies are for others; python-yubihsm has no setting for it
    backend._session.trust_env = False
    return backend


def public_key(key: AsymmetricKey) -> PublicKey:
    """The public half of a key on the device."""
    public: PublicKey = key.get_public_key()  # type: ignore[no-untyped-call]
    return public
