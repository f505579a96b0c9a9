"""Keys that stay on a YubiHSM 2, reached through its connector or by USB: RSA, ECDSA and Ed25519.

[providers.yubihsm]
kind = "yubihsm"
serial = 12345678
auth_key_id = 2
password = { file = "/etc/hsmsign/yubihsm.password" }

This side of it never talks to the device: `tokens.drivers.yubihsm` does, in a worker process.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from pydantic import Field, model_validator

from tokens import audit
from tokens.audit import Auditor, AuditSettings, Ledger, LogPage
from tokens.certificates import load_certificates
from tokens.errors import KeyMismatch, KeyUnusable, LogFull
from tokens.frames import Header
from tokens.provider import Attestation, KeyReference, PublicKey
from tokens.resident import Found, FoundSymmetric, ResidentKey, ResidentProvider, ResidentSettings, Seconds
from tokens.schemes import Scheme
from tokens.secret import SecretSource
from tokens.supervisor import Answer, Listener, Outcome, Supervisor
from tokens.symmetric import Operation

log = logging.getLogger(__name__)

T = TypeVar("T")

SESSION_TIMEOUT_S = 30
"""The device ends a session that was silent for so long."""

JOB_SIGNATURES = 4
"""How many signatures of a job the device's log has room for when the job opens a key: `cst` makes one for each key."""

ObjectId = Annotated[int, Field(ge=1, le=0xFFFE)]


class YubihsmSettings(ResidentSettings):
    """`[providers.NAME]` with `kind = "yubihsm"`."""

    kind: Literal["yubihsm"]
    connector: str = "http://127.0.0.1:12345"
    """The URL of the yubihsm-connector (http: or https:), or yhusb:// for a device plugged into this machine."""
    serial: Annotated[int, Field(ge=0, lt=1 << 32)]
    """The device's serial number; another device is not used."""
    auth_key_id: ObjectId
    """The authentication key that opens the sessions: one with the capabilities to sign and nothing else."""
    password: SecretSource
    """Where its password comes from."""
    cacert: Path | None = None
    """https: PEM of the authorities that the connector's certificate may come from."""
    certificate: Path | None = None
    """https: PEM of the certificate that the connector wants to see."""
    key: Path | None = None
    """https: PEM of the private key that belongs to it."""
    sessions: Annotated[int, Field(ge=1, le=16)] = 2
    """How many of the device's 16 sessions sign: while it works for one, the other's next command is on its way."""
    aliases: tuple[str, ...] = ("YubiHSM",)
    """What a client's pkcs11: URI may call the token."""
    connect_timeout_s: Seconds = 2.0
    """How long connecting to the connector may take."""
    command_timeout_s: Seconds = 10.0
    """How long the device may take for one command."""
    keep_alive_s: Annotated[float, Field(gt=0, lt=SESSION_TIMEOUT_S)] = 15.0
    """How long a session is silent before it is used, lest the device end it."""
    attestation_roots: Path | None = None
    """PEM of what the device's attestations must lead to; by default Yubico's."""
    audit: AuditSettings | None = None
    """How the device's log is read, verified and reconciled; without it nobody does."""

    @model_validator(mode="after")
    def _connector_is_known(self) -> Self:
        url = urlsplit(self.connector)
        if url.scheme == "yhusb":
            if url.netloc not in ("", f"serial={self.serial}"):
                raise ValueError("connector: yhusb:// is enough, `serial` says which device is meant")
        elif url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("connector: a URL that begins with http://, https:// or yhusb://")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        if self.connect_timeout_s + self.command_timeout_s >= self.call_timeout_s:
            raise ValueError("call_timeout_s is longer than connect_timeout_s and command_timeout_s together")
        if self.audit is not None and self.audit.auth_key_id == self.auth_key_id:
            raise ValueError("audit.auth_key_id is another authentication key than auth_key_id: the one must not sign")
        return self


class YubihsmProvider(ResidentProvider):
    """Implements `tokens.provider.KeyProvider` and `Attests`.

    A key is bound to the ID, sequence, algorithm and public key that its first look-up found, for as long as the
    service runs.

    Arguments:
        name: the NAME of `[providers.NAME]`.
        settings: that table.
        state_directory: outlives the service; here are the audit's files, and which password the device refused.
    """

    kind = "yubihsm"

    def __init__(self, name: str, settings: YubihsmSettings, state_directory: Path) -> None:
        super().__init__(name)
        self._settings = settings
        self._state_directory = state_directory
        self._bound: dict[tuple[str, KeyReference], Any] = {}
        self._log: DeviceLog | None = None
        self._auditor: Auditor | None = None

    @property
    def uri_attributes(self) -> Mapping[str, frozenset[str]]:
        """What the token attributes of a URI may say: the configured names, and what Yubico's module says of it."""
        return {
            "token": frozenset(self._settings.aliases),
            "serial": frozenset({str(self.serial), f"{self.serial:08}"}),
            "manufacturer": frozenset({"Yubico (www.yubico.com)"}),
            "model": frozenset({"YubiHSM"}),
        }

    @property
    def serial(self) -> int:
        """The serial number that the settings pin the device to."""
        return self._settings.serial

    @property
    def attestation_roots(self) -> tuple[x509.Certificate, ...] | None:
        """The certificates of the settings; None for Yubico's. Raises KeyUnusable."""
        path = self._settings.attestation_roots
        if path is None:
            return None
        try:
            return load_certificates(path.read_bytes())
        except OSError as error:
            raise KeyUnusable(
                f"The file of the attestation roots cannot be read: {error.strerror}.",
                "Check `attestation_roots` in the provider's settings.",
            ) from None

    def supervise(self) -> Supervisor:
        """Workers that open sessions which can sign; and the audit, with a worker of its own."""
        settings = self._settings
        supervisor = Supervisor(
            self.name,
            "yubihsm",
            self._device(settings.auth_key_id, settings.password),
            env={},
            workers=settings.sessions,
            limits=settings.limits,
        )
        if settings.audit is not None:
            device = self._device(settings.audit.auth_key_id, settings.audit.password)
            self._log = DeviceLog(
                Supervisor(f"{self.name}-audit", "yubihsm-auditor", device, env={}, workers=1, limits=settings.limits)
            )
            self._auditor = Auditor(
                self._log,
                settings.audit,
                serial=settings.serial,
                auth_key_id=settings.auth_key_id,
                state_directory=self._state_directory,
            )
            supervisor.listener = _listener(self._auditor.ledger, settings.auth_key_id)
        return supervisor

    def public_key(self, public: Any) -> PublicKey:
        """The public key of GET PUBLIC KEY's answer. Raises KeyUnusable."""
        algorithm, raw = public["algorithm"], bytes.fromhex(public["key"])
        try:
            if algorithm in _RSA:
                return rsa.RSAPublicNumbers(65537, int.from_bytes(raw, "big")).public_key()
            if algorithm in _CURVES:
                return ec.EllipticCurvePublicKey.from_encoded_point(_CURVES[algorithm], b"\x04" + raw)
            if algorithm == _ED25519:
                return ed25519.Ed25519PublicKey.from_public_bytes(raw)
        except ValueError:
            pass
        raise KeyUnusable(
            "The key's type or curve is not supported.",
            "Grant an RSA, P-256, P-384, P-521, K-256, Brainpool or Ed25519 key.",
        )

    async def start(self) -> None:
        """Starts the workers and the audit."""
        await super().start()
        if self._log is not None and self._auditor is not None:
            self._log.supervisor.start()
            self._auditor.start()

    async def stop(self) -> None:
        """Finishes what runs, reads the device's log a last time, and ends the workers."""
        await super().stop()
        if self._log is not None and self._auditor is not None:
            await self._auditor.stop()
            await self._log.supervisor.stop()

    async def check(self) -> None:
        """Asks the device, and whether its audit lets it sign."""
        await self._with_room(super().check)
        if self._auditor is not None:
            await self._auditor.check()

    @asynccontextmanager
    async def open(self, reference: KeyReference) -> AsyncIterator[ResidentKey]:
        """See `ResidentProvider.open`; the device's log has room for a tool's signatures before the tool runs."""
        if self._auditor is not None:
            await self._auditor.ready(JOB_SIGNATURES)
        async with super().open(reference) as key:
            yield key

    async def call(self, header: Header, body: bytes = b"") -> Answer:
        """See `ResidentProvider.call`."""
        call = super().call
        return await self._with_room(lambda: call(header, body))

    async def sign(self, reference: KeyReference, found: Found, scheme: Scheme, data: bytes) -> Answer:
        """Has a worker sign, where the audit lets it."""
        async with self._gate():
            return await super().sign(reference, found, scheme, data)

    async def compute(
        self, reference: KeyReference, found: FoundSymmetric, operation: Operation, data: bytes, iv: bytes
    ) -> Answer:
        """Has a worker use a symmetric key, where the audit lets it."""
        async with self._gate():
            return await super().compute(reference, found, operation, data, iv)

    def _gate(self) -> AbstractAsyncContextManager[None]:
        return nullcontext() if self._auditor is None else self._auditor.gate()

    async def _with_room(self, call: Callable[[], Awaitable[T]]) -> T:
        """Calls; where the device's log is full, has it read and calls once again: nothing was done before."""
        try:
            return await call()
        except LogFull:
            if self._auditor is None:
                raise
        await self._auditor.drain()
        return await call()

    async def find(self, reference: KeyReference) -> Found:
        """Looks the key up, and refuses another one than it found first."""
        found = await super().find(reference)
        self._bind("public", reference, found.public)
        return found

    async def find_symmetric(self, reference: KeyReference) -> FoundSymmetric:
        """Looks the key up, and refuses another one than it found first."""
        found = await super().find_symmetric(reference)
        self._bind("secret", reference, found.secret)
        return found

    def _bind(self, kind: str, reference: KeyReference, known: Any) -> None:
        if self._bound.setdefault((kind, reference), known) != known:
            raise KeyMismatch(
                "The key on the YubiHSM is another one than when the service first looked it up.",
                "Find out why. If it was re-created on purpose, restart the service.",
            )

    async def attest(self, reference: KeyReference) -> Attestation:
        """See `Attests.attest`."""
        found = await self.found(reference)
        answer = await self.call({"op": "attest", "public": found.public})
        issuers = tuple(bytes.fromhex(issuer) for issuer in answer.header["issuers"])
        return Attestation(bytes.fromhex(answer.header["certificate"]), issuers)

    def _device(self, auth_key_id: int, password: SecretSource) -> Header:
        """The settings of a driver. Raises KeyUnusable where the password's source cannot be named."""
        settings = self._settings
        tls = {"cacert": settings.cacert, "certificate": settings.certificate, "key": settings.key}
        return {
            "connector": settings.connector,
            "serial": settings.serial,
            "auth_key_id": auth_key_id,
            "password_file": str(password.path()),
            "state_directory": str(self._state_directory),
            "connect_timeout_s": settings.connect_timeout_s,
            "command_timeout_s": settings.command_timeout_s,
            "keep_alive_s": settings.keep_alive_s,
            **{name: str(path) for name, path in tls.items() if path is not None},
        }


class DeviceLog:
    """Implements `tokens.audit.LogSource`.

    Arguments:
        supervisor: of one worker whose session can read the log.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor

    async def read(self) -> LogPage:
        """See `LogSource.read`."""
        answer = await self.supervisor.call({"op": "read-log"}, repeatable=True)
        return LogPage(answer.header["unlogged_boots"], answer.header["unlogged_authentications"], answer.body)

    async def advance(self, number: int) -> None:
        """See `LogSource.advance`."""
        await self.supervisor.call({"op": "advance-log", "number": number})


def _listener(ledger: Ledger, auth_key_id: int) -> Listener:
    """Books every attempt at a signature, and every use of a symmetric key."""
    book = {Outcome.DONE: ledger.answered, Outcome.REFUSED: ledger.refused, Outcome.UNKNOWN: ledger.lost}

    def told(header: Header, book: Callable[[audit.Operation], None]) -> None:
        match header:
            case {"op": "sign", "scheme": [name, *_], "public": {"id": key_id}}:
                pass
            case {"op": "compute", "operation": name, "secret": {"id": key_id}}:
                pass
            case _:
                return
        try:
            book(audit.Operation(_COMMANDS[name], key_id, auth_key_id))
        except OSError as error:  # it is booked in memory, and written with the next one
            log.error("the counts of the audit cannot be written: %s", error.strerror)  # noqa: TRY400

    return Listener(lambda header: told(header, ledger.asked), lambda header, outcome: told(header, book[outcome]))


# The command that makes a signature of each scheme, or that uses a symmetric key, by the name in frames
_COMMANDS = {"rsa-pkcs1v15": 0x47, "rsa-pss": 0x55, "ecdsa": 0x56, "ed25519": 0x6A} | {
    Operation.DECRYPT_ECB: 0x6F,
    Operation.ENCRYPT_ECB: 0x70,
    Operation.DECRYPT_CBC: 0x71,
    Operation.ENCRYPT_CBC: 0x72,
    Operation.HMAC_SHA256: 0x53,
}


# Algorithms of YubiHSM 2 objects (Yubico's "Algorithms")
_RSA = frozenset({9, 10, 11})
_ED25519 = 46
_CURVES: dict[int, ec.EllipticCurve] = {
    12: ec.SECP256R1(),
    13: ec.SECP384R1(),
    14: ec.SECP521R1(),
    15: ec.SECP256K1(),
    16: ec.BrainpoolP256R1(),
    17: ec.BrainpoolP384R1(),
    18: ec.BrainpoolP512R1(),
}
