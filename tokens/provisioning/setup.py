"""Takes the steps of a plan on a new device: all of them, or the device is reset and as new."""

import re
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from yubihsm.core import AuthSession, YubiHsm
from yubihsm.defs import AUDIT, CAPABILITY, ERROR, OBJECT, ORIGIN
from yubihsm.exceptions import (
    YubiHsmAuthenticationError,
    YubiHsmConnectionError,
    YubiHsmDeviceError,
    YubiHsmError,
)
from yubihsm.objects import AsymmetricKey, AuthenticationKey, HmacKey, Opaque, SymmetricKey, WrapKey

from tokens.errors import Error, KeyMismatch, ProviderProblem, ProviderRefused, ProviderUnavailable
from tokens.provisioning.declaration import FACTORY_AUTH_KEY, Declaration, DeviceTable
from tokens.provisioning.device import RESET_BY_HAND, connect, explain, logged_in, objects, public_key
from tokens.provisioning.files import FACTORY_PASSWORD, Files, prepare
from tokens.provisioning.plan import (
    AUDITED,
    Attest,
    AuditCommands,
    DeleteFactoryAuthKey,
    ForceAudit,
    GenerateKey,
    ImportKey,
    NewObject,
    PutAuthKey,
    PutCertificate,
    PutWrapKey,
    ReplaceFactoryPassword,
    Step,
    StoreLog,
    plan,
)
from tokens.provisioning.transcript import Transcript, certificate_pem, describe, pem

Result = dict[str, Any]
"""What a step's line in the transcript says besides."""

_AUDIT = {"off": AUDIT.OFF, "on": AUDIT.ON, "fixed": AUDIT.FIXED}
_PASSWORD_BYTES = 32

RESET_TIMEOUT_S = 20
"""How long the device may take to start anew; the vendor's tools wait for 3 to 5 s."""

_RESET_POLL_S = 0.5


class SetupFailed(ProviderProblem):
    """A step failed. The message says which and why, the hint what state the device is in."""


def look(device: DeviceTable) -> str:
    """Which device there is, in a sentence; nothing else is asked of it. Raises ProviderRefused if it is another."""
    try:
        with connect(device) as hsm:
            return f"The device is there: {device.serial}, firmware {_version(hsm)}."
    except ProviderUnavailable as error:
        return f"{error.message} {error.hint}"


def set_up(declaration: Declaration, transcript: Path, tell: Callable[[str], None]) -> None:
    """Sets a new device up.

    Arguments:
        transcript: a new file, where it is written down.
        tell: hears each step as it begins.

    Raises:
        KeyUnusable, KeyMismatch: a file does not fit; the device was not changed.
        ProviderRefused: it is another device, or not new; it was not changed.
        ProviderUnavailable: there is no device.
        SetupFailed: a step failed.
    """
    steps = plan(declaration)
    device = declaration.device
    with connect(device) as hsm:
        check_new(hsm)
        with Transcript(transcript) as written:
            written.write("begin", connector=device.connector, serial=device.serial, firmware=_version(hsm))
            try:
                files = prepare(steps)
            except Error as error:
                written.write("refused", message=error.message)
                raise
            taking, now = _Taking(hsm, files), "Log in."
            try:
                taking.log_in(FACTORY_PASSWORD)
                for step in steps:
                    now = str(step)
                    tell(now)
                    written.write(_event(step), step=now, **taking.take(step))
            except BaseException as error:
                was_reset = _reset(device, taking.passwords)
                if was_reset:
                    files.forget_shares()
                failure = _failure(now, error, was_reset)
                with suppress(OSError):
                    written.write("failed", message=failure.message, hint=failure.hint)
                raise failure from error


def check_new(hsm: YubiHsm) -> None:
    """Raises ProviderRefused where the device is not as it came from the factory, or from a reset."""
    why = ""
    try:
        with logged_in(hsm, FACTORY_AUTH_KEY, FACTORY_PASSWORD) as session:
            held = [f"{info.object_type.name.lower()} 0x{info.id:04x}" for info in objects(session)]
            held.remove(f"authentication_key 0x{FACTORY_AUTH_KEY:04x}")
            if held:
                why = f"it holds {', '.join(held).replace('_', ' ')}"
            elif session.get_force_audit() is not AUDIT.OFF:
                why = "its force-audit is set"
    except YubiHsmAuthenticationError:
        why = "it does not take the factory password"
    except YubiHsmDeviceError as error:
        if error.code is not ERROR.OBJECT_NOT_FOUND:
            raise
        why = "it has no authentication key 0x0001"
    if why:
        raise ProviderRefused(f"The device is not new: {why}.", f"{RESET_BY_HAND} All that it holds is lost.")


class _Taking:
    """Takes one step after the other, in a session of the authentication key that the device came with."""

    _session: AuthSession

    def __init__(self, hsm: YubiHsm, files: Files) -> None:
        self._hsm = hsm
        self._files = files
        self.passwords = [FACTORY_PASSWORD]
        """What that key's password may be: while it is replaced, nobody knows which."""

    def log_in(self, password: str) -> None:
        """Opens the session."""
        self._session = self._hsm.create_session_derived(FACTORY_AUTH_KEY, password)

    def take(self, step: Step) -> Result:
        """What came of it."""
        result: Result = {}
        match step:
            case PutAuthKey(new):
                result = self._put_auth_key(new)
            case ReplaceFactoryPassword():
                self._replace_factory_password()
            case PutWrapKey(new):
                WrapKey.put(self._session, *_header(new), new.algorithm, new.delegated, self._files.wrap_key)
                result = self._read_back(new, ORIGIN.IMPORTED)
            case GenerateKey(new):
                _KINDS[new.type].generate(self._session, *_header(new), new.algorithm)
                result = self._read_back(new, ORIGIN.GENERATED)
            case ImportKey(new):
                result = self._import_key(new)
            case PutCertificate(new):
                certificate = self._files.certificates[new.id]
                Opaque.put_certificate(self._session, *_header(new), certificate)
                result = self._read_back(new, ORIGIN.IMPORTED) | {"certificate": certificate_pem(certificate)}
            case Attest(id_):
                result = self._attest(AsymmetricKey(self._session, id_))
            case StoreLog():
                result = self._store_log()
            case AuditCommands(value):
                result = self._audit_commands(_AUDIT[value])
            case ForceAudit(value):
                self._session.set_force_audit(_AUDIT[value])
            case DeleteFactoryAuthKey(admin):
                result = self._delete_factory_auth_key(admin)
        return result

    def _put_auth_key(self, new: NewObject) -> Result:
        password = self._files.passwords[new.id]
        AuthenticationKey.put_derived(self._session, *_header(new), new.delegated, password)
        with logged_in(self._hsm, new.id, password):
            return self._read_back(new, ORIGIN.IMPORTED)

    def _replace_factory_password(self) -> None:
        password = secrets.token_urlsafe(_PASSWORD_BYTES)
        self.passwords.insert(0, password)
        AuthenticationKey(self._session, FACTORY_AUTH_KEY).change_password(password)
        self._session.close()
        self.log_in(password)

    def _import_key(self, new: NewObject) -> Result:
        key: Any = self._files.keys[new.id]
        if new.type is OBJECT.ASYMMETRIC_KEY:
            AsymmetricKey.put(self._session, *_header(new), key)
        elif new.type is OBJECT.HMAC_KEY:
            HmacKey.put(self._session, *_header(new), key, new.algorithm)
        else:
            SymmetricKey.put(self._session, *_header(new), new.algorithm, key)
        return self._read_back(new, ORIGIN.IMPORTED)

    def _attest(self, key: AsymmetricKey) -> Result:
        certificate, issuer = key.attest(), Opaque(self._session, 0).get_certificate()
        try:
            certificate.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature):
            raise KeyMismatch(
                "The attestation does not verify with the device's own certificate.", "Do not trust this device."
            ) from None
        if certificate.public_key() != public_key(key):
            raise KeyMismatch("The attestation is for another key.", "Do not trust this device.")
        return {"attestation": certificate_pem(certificate), "issuer": certificate_pem(issuer)}

    def _store_log(self) -> Result:
        log = self._session.get_log_entries()
        if log.entries:
            self._session.set_log_index(log.entries[-1].number)
        entries = [(entry.data + entry.digest).hex() for entry in log.entries]
        return {"unlogged_boots": log.n_boot, "unlogged_authentications": log.n_auth, "entries": entries}

    def _audit_commands(self, value: AUDIT) -> Result:
        # the firmware says which commands it has
        commands = sorted(AUDITED & self._session.get_command_audit().keys())
        self._session.set_command_audit(dict.fromkeys(commands, value))
        return {"commands": [command.name.lower().replace("_", "-") for command in commands]}

    def _delete_factory_auth_key(self, admin: int) -> Result:
        self._session.close()
        password = self._files.passwords[admin]
        # where the answer is lost, the look that follows tells what has become of it
        with suppress(YubiHsmConnectionError), logged_in(self._hsm, admin, password) as session:
            AuthenticationKey(session, FACTORY_AUTH_KEY).delete()
        with logged_in(self._hsm, admin, password) as session:
            left = objects(session)
        if any((info.object_type, info.id) == (OBJECT.AUTHENTICATION_KEY, FACTORY_AUTH_KEY) for info in left):
            raise ProviderProblem("The authentication key is still there.", "Try again.")
        return {"objects": [describe(info) for info in left]}

    def _read_back(self, new: NewObject, origin: ORIGIN) -> Result:
        """The object as the device has it. Raises KeyMismatch where that is not what was asked for."""
        object_ = self._session.get_object(new.id, new.type)
        info = object_.get_info()
        asked = (new.label, new.domains, new.algorithm, new.capabilities, new.delegated, origin)
        has = (info.label, info.domains, info.algorithm, info.capabilities, info.delegated_capabilities, info.origin)
        if asked != has:
            raise KeyMismatch(f"The device has made something else of it: {describe(info)}.", "Look at its firmware.")
        result: Result = {"object": describe(info)}
        if isinstance(object_, AsymmetricKey):
            result["public_key"] = pem(public_key(object_))
        return result


_KINDS: dict[OBJECT, type[AsymmetricKey | HmacKey | SymmetricKey]] = {
    OBJECT.ASYMMETRIC_KEY: AsymmetricKey,
    OBJECT.HMAC_KEY: HmacKey,
    OBJECT.SYMMETRIC_KEY: SymmetricKey,
}


def _version(hsm: YubiHsm) -> str:
    return ".".join(map(str, hsm.get_device_info().version))


def _header(new: NewObject) -> tuple[int, str, int, CAPABILITY]:
    """What each of python-yubihsm's functions that make an object begins with."""
    return new.id, new.label, new.domains, new.capabilities


def _event(step: Step) -> str:
    """`PutAuthKey` as `put-auth-key`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", type(step).__name__).lower()


def _reset(device: DeviceTable, passwords: Sequence[str]) -> bool:
    """Resets a device that was new when it began: nothing is lost. Whether it is new again."""
    for password in passwords:
        with suppress(Error), connect(device) as hsm:
            hsm.create_session_derived(FACTORY_AUTH_KEY, password).reset_device()
            return _becomes_new(device)
    return False


def _becomes_new(device: DeviceTable) -> bool:
    """Whether it is new when it answers again; python-yubihsm takes a request that was lost for a reset."""
    deadline = time.monotonic() + RESET_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with connect(device) as hsm:
                check_new(hsm)
                return True
        except ProviderUnavailable:
            time.sleep(_RESET_POLL_S)
    return False


def _failure(step: str, error: BaseException, was_reset: bool) -> SetupFailed:
    match error:
        case Error():
            why, what = error.message, error.hint
        case YubiHsmError():
            explained = explain("The device", error)
            why, what = explained.message, explained.hint
        case KeyboardInterrupt():
            why, what = "It was interrupted.", ""
        case _:
            why, what = f"{type(error).__name__}: {error}", ""
    state = (
        "The device was reset and is as new; passwords that were made are kept, and used the next time."
        if was_reset
        else f"The device could not be reset, and is half set up: use it for nothing. {RESET_BY_HAND}"
    )
    return SetupFailed(f"This step failed: {step}\n{why}", f"{what}\n{state}".strip())
