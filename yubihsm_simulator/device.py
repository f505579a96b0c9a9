"""The device: sessions, the order in which a command is authorised, executed and logged, and its parts.

Where hardware's behaviour is not known, the less convenient one is simulated: a full log with force-audit refuses
unaudited commands too; a number that is not in the log is refused by SET LOG INDEX.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from hashlib import pbkdf2_hmac
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.serialization import Encoding

from yubihsm_simulator import frames, latency, secure_channel, statefile
from yubihsm_simulator.attestation import Attestation, Firmware, derived_key
from yubihsm_simulator.commands.call import Call
from yubihsm_simulator.commands.table import TABLE
from yubihsm_simulator.definitions import Algorithm, Command, DeviceError, ErrorCode, ObjectType
from yubihsm_simulator.faults import Faults
from yubihsm_simulator.frames import Fields
from yubihsm_simulator.log import NO_KEY, AuditLog
from yubihsm_simulator.objects import ObjectStore, StoredObject, factory_authentication_key
from yubihsm_simulator.options import OFF, Options
from yubihsm_simulator.secure_channel import INNER_MAX_BYTES, Session

Latency = Literal["none", "hardware"]

FIRMWARES: tuple[Firmware, ...] = ((2, 4, 0), (2, 5, 0))
PART_NUMBER = b"78CLUFX50000PH"

_TICK_HZ = 1000


@cache
def _password_keys(password: bytes) -> bytes:
    """K-ENC and K-MAC of a password, 32 bytes (YubiHSM 2 user guide, "Authentication Key")."""
    return pbkdf2_hmac("sha256", password, b"Yubico", 10000)


class Device:
    """One YubiHSM 2. All of it may be used from any thread; commands are executed one after the other.

    Attributes:
        serial, firmware: as DEVICE INFO tells them.
        objects, options, log: what is on it.
        attestation: its attestation key and certificates.
        commands: how often each command was executed, in a session or in the clear.
        busy_s: seconds spent in latencies so far.
        faults: what goes wrong; see `Faults`.
    """

    def __init__(
        self,
        serial: int = 12345678,
        firmware: Firmware = (2, 4, 0),
        state: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        latency: Latency = "none",
    ) -> None:
        """A device in the factory's state, or in that of the file `state` if it exists; it is kept there.

        Raises ValueError for an unknown firmware and for another device's state.
        """
        if firmware not in FIRMWARES:
            raise ValueError(f"firmware {firmware} is none of {FIRMWARES}")
        self.serial = serial
        self.firmware = firmware
        self.objects = ObjectStore()
        self.options = Options()
        self.log = AuditLog()
        self.attestation = Attestation(serial, firmware)
        self.commands: Counter[int] = Counter()
        self.busy_s = 0.0
        self.faults = Faults(power_cycled=self.reboot)
        self._state = state
        self._saved: tuple[int, ...] = ()
        self._clock = clock
        self._skipped_s = 0.0
        self._sleep = sleep
        self._latency = latency
        self._sessions: dict[int, Session] = {}
        self._lock = threading.RLock()
        self._key = derived_key(f"authentication {serial}")
        self._booted_at = self._now()
        if state is not None and state.exists():
            statefile.load(state, serial, self.objects, self.options, self.log)
            self.reboot()
        else:
            self.factory_reset()
            self._save()

    def process(self, request: bytes) -> bytes:
        """One frame in, one frame out, whatever comes in."""
        with self._lock:
            try:
                command, data = frames.split(request)
                answer = self._process(command, data)
            except DeviceError as error:
                answer = frames.error(error.code)
            self._save()
            return answer

    def reboot(self) -> None:
        """Power off and on: sessions are gone, the boot is logged."""
        with self._lock:
            self._boot()
            self._save()

    def skip(self, seconds: float) -> None:
        """The device's clock jumps."""
        with self._lock:
            self._skipped_s += seconds

    @property
    def sessions(self) -> int:
        """How many sessions are open."""
        with self._lock:
            self._expire_sessions()
            return 0 if self.faults.unplugged else len(self._sessions)

    @property
    def attestation_root(self) -> bytes:
        """The root certificate of the attestation chain, PEM."""
        return self.attestation.root.public_bytes(Encoding.PEM)

    @property
    def attestation_issuers(self) -> list[bytes]:
        """The issuers of the device's attestation certificate, DER: the sub-CA, the root."""
        return [cert.public_bytes(Encoding.DER) for cert in (self.attestation.sub_ca, self.attestation.root)]

    # what the commands call

    def echo(self, fields: Fields) -> bytes:
        """Data -> data."""
        return fields.rest()

    def device_info(self, fields: Fields) -> bytes:
        """Nothing -> version 3 x u8, serial u32, log entries u8, used u8, algorithms u8...; page 01 -> part number."""
        page = fields.rest()
        if len(page) > 1:
            raise DeviceError(ErrorCode.WRONG_LENGTH)
        if page == b"\x01":
            return PART_NUMBER
        if page not in (b"", b"\x00"):
            raise DeviceError(ErrorCode.INVALID_DATA)
        numbers = bytes(self.firmware) + self.serial.to_bytes(4, "big")
        return numbers + bytes([self.faults.log_entries, len(self.log.entries), *Algorithm])

    def device_public_key(self, fields: Fields) -> bytes:
        """Nothing -> algorithm u8, x and y of the key for asymmetric authentication."""
        fields.end()
        point = secure_channel.point(self._key.public_key())
        return bytes([Algorithm.EC_P256_YUBICO_AUTHENTICATION]) + point[1:]

    def factory_reset(self) -> None:
        """All objects and options as in the factory; the log says so; the device boots."""
        self.objects = ObjectStore()
        self.objects.add(factory_authentication_key(_password_keys(b"password")))
        self.options = Options()
        self.log.reset()
        self._boot()

    def close_session(self, session: Session) -> None:
        """The session is over."""
        del self._sessions[session.sid]

    # commands in the clear

    def _process(self, command: int, data: bytes) -> bytes:
        if command == Command.SESSION_MESSAGE:
            return self._session_message(data)
        handlers: dict[int, Callable[[Fields], bytes]] = {
            Command.CREATE_SESSION: self._create_session,
            Command.AUTHENTICATE_SESSION: self._authenticate_session,
            Command.ECHO: self.echo,
            Command.DEVICE_INFO: self.device_info,
            Command.GET_DEVICE_PUBLIC_KEY: self.device_public_key,
        }
        if command not in handlers:
            raise DeviceError(ErrorCode.INVALID_COMMAND)
        return self._clear(command, data, handlers[command])

    def _clear(self, command: int, data: bytes, handler: Callable[[Fields], bytes]) -> bytes:
        """Executes a command outside any session; its answer's frame. Sessions can be had though the log is full."""
        if self._log_blocks and command == Command.ECHO:
            raise DeviceError(ErrorCode.LOG_FULL)
        target = self._authentication_key_id(command, data)
        answer = self._execute(command, lambda: handler(Fields(data)))
        self._finish(command, None)
        self._audit(command, (len(data), NO_KEY, target, NO_KEY, _result(answer)))
        return answer

    def _authentication_key_id(self, command: int, data: bytes) -> int:
        """The authentication key that a session is created or authenticated with, for the log."""
        if command == Command.CREATE_SESSION and len(data) >= 2:
            return int.from_bytes(data[:2], "big")
        if command == Command.AUTHENTICATE_SESSION and data and data[0] in self._sessions:
            return self._sessions[data[0]].key_id
        return NO_KEY

    def _create_session(self, fields: Fields) -> bytes:
        """Key id u16, challenge 8 -> sid u8, challenge 8, cryptogram 8; or point 65 -> sid u8, point 65, receipt 16."""
        key_id, challenge = fields.u16(), fields.rest()
        if len(challenge) not in (secure_channel.CHALLENGE_BYTES, secure_channel.POINT_BYTES):
            raise DeviceError(ErrorCode.WRONG_LENGTH)
        stored = self.objects.get(key_id, ObjectType.AUTHENTICATION_KEY)
        if stored is None:
            raise DeviceError(ErrorCode.OBJECT_NOT_FOUND)
        asymmetric = stored.algorithm is Algorithm.EC_P256_YUBICO_AUTHENTICATION
        if asymmetric != (len(challenge) == secure_channel.POINT_BYTES):
            raise DeviceError(ErrorCode.INVALID_DATA)
        self.options.require(stored.algorithm)
        sid = self._free_sid()
        if asymmetric:
            host_key = secure_channel.p256_public_key(b"\x04" + stored.value)
            device_point, receipt, keys = secure_channel.agree(self._key, host_key, challenge)
            session = self._open(sid, stored, (keys[0], keys[1], keys[2]))
            session.chain, session.authenticated = receipt, True
            return bytes([sid]) + device_point + receipt
        card_challenge = os.urandom(secure_channel.CHALLENGE_BYTES)
        session = self._open(sid, stored, secure_channel.symmetric_keys(stored.value, challenge, card_challenge))
        session.context = challenge + card_challenge
        return bytes([sid]) + card_challenge + session.card_cryptogram()

    def _free_sid(self) -> int:
        self._expire_sessions()
        for sid in range(self.faults.session_limit):
            if sid not in self._sessions:
                return sid
        raise DeviceError(ErrorCode.SESSIONS_FULL)

    def _open(self, sid: int, stored: StoredObject, session_keys: tuple[bytes, bytes, bytes]) -> Session:
        session = Session(
            sid, stored.id, stored.domains, stored.capabilities, stored.delegated, *session_keys, self._now()
        )
        self._sessions[sid] = session
        return session

    def _authenticate_session(self, fields: Fields) -> bytes:
        """Sid u8, cryptogram 8, MAC 8 -> nothing. A wrong proof frees the session's place."""
        sid, cryptogram, mac = fields.u8(), fields.take(8), fields.take(8)
        fields.end()
        session = self._session(sid)
        if session.authenticated:
            raise DeviceError(ErrorCode.INVALID_SESSION)
        try:
            session.authenticate(cryptogram, mac)
        except DeviceError:
            self.close_session(session)
            raise
        session.used_at = self._now()
        return b""

    def _session(self, sid: int) -> Session:
        self._expire_sessions()
        if sid not in self._sessions:
            raise DeviceError(ErrorCode.INVALID_SESSION)
        return self._sessions[sid]

    def _expire_sessions(self) -> None:
        last = self._now() - secure_channel.IDLE_S
        for session in [session for session in self._sessions.values() if session.used_at < last]:
            self.close_session(session)

    # commands in a session

    def _session_message(self, data: bytes) -> bytes:
        """Sid u8, encrypted frame, MAC 8 -> the same; errors of the channel itself are answered in the clear."""
        if (code := self.faults.take_error(Command.SESSION_MESSAGE)) is not None:
            raise DeviceError(code)
        if len(data) < 1 + 16 + 8:
            raise DeviceError(ErrorCode.WRONG_LENGTH)
        session = self._session(data[0])
        if not session.authenticated:
            raise DeviceError(ErrorCode.INVALID_SESSION)
        try:
            inner = session.decrypt(data)
        except DeviceError as error:
            wrong_mac = error.code == ErrorCode.AUTHENTICATION_FAILED
            if error.code == ErrorCode.SESSION_FAILED or (wrong_mac and self.faults.drop_session_on_bad_mac):
                self.close_session(session)
            raise
        try:
            answer = self._inner(session, *frames.split(inner))
        except DeviceError as error:
            answer = frames.error(error.code)
        session.used_at = self._now()  # not before: a key takes longer to generate than a session may be idle
        return session.encrypt(answer)

    def _inner(self, session: Session, command: int, data: bytes) -> bytes:
        """Executes a command for a session; its answer's frame."""
        entry = TABLE.get(command)
        if entry is None:
            raise DeviceError(ErrorCode.INVALID_COMMAND)
        if self._log_blocks and not entry.with_full_log:
            raise DeviceError(ErrorCode.LOG_FULL)
        call = Call(self, session)

        def run() -> bytes:
            if entry.capability:
                call.allow(entry.capability)
            answer = entry.handler(call, Fields(data))
            if len(answer) > INNER_MAX_BYTES - 3:
                raise DeviceError(ErrorCode.WRONG_LENGTH)
            return answer

        answer = self._execute(command, run)
        self._finish(command, None if _failed(answer) else call.algorithm)
        self._audit(command, (len(data), session.key_id, call.target, call.second, _result(answer)))
        return answer

    # common to both

    def _execute(self, command: int, run: Callable[[], bytes]) -> bytes:
        self.commands[command] += 1
        if (code := self.faults.take_error(command)) is not None:
            return frames.error(code)
        try:
            return frames.answer(command, run())
        except DeviceError as error:
            return frames.error(error.code)

    def _finish(self, command: int, algorithm: Algorithm | None) -> None:
        """Takes the time that the hardware takes."""
        seconds = self.faults.delays_s.get(command, 0.0)
        if self._latency == "hardware":
            seconds += latency.hardware_s(command, algorithm)
        if seconds:
            self._sleep(seconds)
            self.busy_s += seconds

    def _audit(self, command: int, values: tuple[int, int, int, int, int]) -> None:
        """Logs a command if it is audited: length, session key, target key, second key, result."""
        if self.options.command_audit.get(command, OFF) == OFF:
            return
        if self._log_blocks:
            if command in (Command.CREATE_SESSION, Command.AUTHENTICATE_SESSION):
                self.log.skip_authentication()
            return
        tick = int((self._now() - self._booted_at) * _TICK_HZ) & 0xFFFFFFFF
        self.log.record((command, *values, tick), self.faults.log_entries)

    @property
    def _log_blocks(self) -> bool:
        """Whether no entry may be overwritten and there is no room for another."""
        return self.options.force_audit != OFF and len(self.log.entries) >= self.faults.log_entries

    def _boot(self) -> None:
        self._sessions.clear()
        self._booted_at = self._now()
        self.log.boot(self.faults.log_entries, forced=self.options.force_audit != OFF)

    def _now(self) -> float:
        return self._clock() + self._skipped_s

    def _save(self) -> None:
        revisions = (self.objects.revision, self.options.revision, self.log.revision)
        if self._state is not None and revisions != self._saved:
            statefile.save(self._state, self.serial, self.objects, self.options, self.log)
            self._saved = revisions


def _failed(answer: bytes) -> bool:
    return answer[0] == frames.ERROR


def _result(answer: bytes) -> int:
    """The log's result: the answer's command, or the error."""
    return answer[3] if _failed(answer) else answer[0]
