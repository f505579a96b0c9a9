"""Keys that stay on a PKCS#11 token: any module, any number of sessions, RSA, ECDSA and Ed25519.

This side of it never loads the module: `tokens.drivers.pkcs11` does, in a worker process.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tokens.certificates import certifies, check_certifies, load_certificates
from tokens.errors import Error, KeyUnusable, ProviderUnavailable, SigningFailed
from tokens.frames import Header, scheme_to_wire
from tokens.provider import KeyReference, PublicKey
from tokens.schemes import Scheme, check_data
from tokens.secret import SecretSource
from tokens.supervisor import Limits, Supervisor
from tokens.verify import check_suited, verify

Seconds = Annotated[float, Field(gt=0)]


class Pkcs11Settings(BaseModel):
    """`[providers.NAME]` with `kind = "pkcs11"`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["pkcs11"]
    module: Path
    """The PKCS#11 module, for example /usr/lib/softhsm/libsofthsm2.so."""
    token: str | None = None
    """The token's label."""
    serial: str | None = None
    """The token's serial number; with `token`, both must match."""
    pin: SecretSource
    """Where the user PIN comes from."""
    sessions: Annotated[int, Field(ge=1, le=16)] = 1
    """How many workers, each a process with a session of its own, sign at the same time."""
    aliases: tuple[str, ...] = ()
    """Other names that a client's pkcs11: URI may use for the token, such as YubiHSM."""
    env: dict[str, str] = {}
    """Variables for the module, such as SOFTHSM2_CONF; only the workers see them."""
    call_timeout_s: Seconds = 30.0
    """How long one call may take, from when a worker could begin it; then the worker is killed."""
    start_timeout_s: Seconds = 30.0
    """How long loading the module and logging in may take."""
    queue_depth: Annotated[int, Field(gt=0)] = 1024
    """How many calls may wait for the token; more are refused (503)."""
    queue_timeout_s: Seconds = 20.0
    """How long a call may wait in that queue (503)."""
    backoff_min_s: Seconds = 0.1
    """The pause before a worker is replaced for the second time in a row; it doubles each time."""
    backoff_max_s: Seconds = 10.0
    """The longest such pause: a token that is plugged in again is noticed within it."""

    @model_validator(mode="after")
    def _token_is_named(self) -> Self:
        if not self.token and not self.serial:
            raise ValueError("name the token by `token` (its label) or `serial`: there is no default token")
        return self


@dataclass(frozen=True, slots=True)
class _Found:
    """A key as it was looked up on the token."""

    public: Any
    public_key: PublicKey
    certificates: tuple[x509.Certificate, ...]


class Pkcs11Provider:
    """Implements `tokens.provider.KeyProvider`.

    Arguments:
        name: the NAME of `[providers.NAME]`.
        settings: that table.
        state_directory: outlives the service; here it is remembered which PIN the token refused.
    """

    kind = "pkcs11"

    def __init__(self, name: str, settings: Pkcs11Settings, state_directory: Path) -> None:
        self.name = name
        self._settings = settings
        self._state_directory = state_directory
        self._supervisor: Supervisor | None = None
        self._not_started = ProviderUnavailable("The token's workers have not been started.", "Wait a moment.")
        self._found: dict[KeyReference, _Found] = {}
        self._looking_up = asyncio.Lock()

    @property
    def uri_attributes(self) -> Mapping[str, frozenset[str]]:
        """What the token attributes of a URI may say: the configured names, and what the token says of itself."""
        told = self._supervisor.token if self._supervisor else {}
        labels = {self._settings.token, told.get("label"), *self._settings.aliases}
        attributes = {
            "token": labels,
            "serial": {self._settings.serial, told.get("serial")},
            "manufacturer": {told.get("manufacturer")},
            "model": {told.get("model")},
        }
        return {name: frozenset(value for value in values if value) for name, values in attributes.items()}

    async def start(self) -> None:
        """Starts the workers; a token that is absent is a state that `check` reports."""
        settings = self._settings
        try:
            pin_file = settings.pin.path()
        except KeyUnusable as error:
            self._not_started = ProviderUnavailable(error.message, error.hint)
            return
        self._supervisor = Supervisor(
            self.name,
            "pkcs11",
            {
                "module": str(settings.module),
                "token": settings.token or "",
                "serial": settings.serial or "",
                "pin_file": str(pin_file),
                "state_directory": str(self._state_directory),
            },
            env=settings.env,
            workers=settings.sessions,
            limits=Limits(
                call_timeout_s=settings.call_timeout_s,
                start_timeout_s=settings.start_timeout_s,
                queue_depth=settings.queue_depth,
                queue_timeout_s=settings.queue_timeout_s,
                backoff_min_s=settings.backoff_min_s,
                backoff_max_s=settings.backoff_max_s,
            ),
        )
        self._supervisor.start()

    async def stop(self) -> None:
        """Finishes what runs and ends the workers."""
        if self._supervisor is not None:
            await self._supervisor.stop()

    async def check(self) -> None:
        """Asks the token; keys are looked up anew after it."""
        self._found.clear()
        await self._started().check()

    @asynccontextmanager
    async def open(self, reference: KeyReference) -> AsyncIterator["Pkcs11Key"]:
        """The key for one job: nothing but its name and public key is here."""
        supervisor = self._started()
        found = self._found.get(reference)
        if found is None:
            async with self._looking_up:  # a hundred jobs that begin at once look a key up once
                found = self._found.get(reference) or await self._find(supervisor, reference)
                self._found[reference] = found
        key = Pkcs11Key(supervisor, reference, found, self._forget)
        try:
            yield key
        finally:
            key.closed = True

    def _started(self) -> Supervisor:
        if self._supervisor is None:
            raise self._not_started
        return self._supervisor

    def _forget(self, reference: KeyReference) -> None:
        self._found.pop(reference, None)

    async def _find(self, supervisor: Supervisor, reference: KeyReference) -> _Found:
        answer = await supervisor.call({"op": "find", **_identity(reference)}, repeatable=True)
        public = answer.header["public"]
        public_key = _public_key(public)
        if reference.certificate is not None:
            certificates = await asyncio.to_thread(_read_certificates, Path(reference.certificate))
        else:
            on_token = [bytes.fromhex(der) for der in answer.header["certificates"]]
            certificates = tuple(found for der in on_token for found in _readable(der) if certifies(found, public_key))
            certificates = certificates[:1]
        check_certifies(certificates, public_key)
        return _Found(public, public_key, certificates)


class Pkcs11Key:
    """Implements `tokens.provider.SigningKey`; bound to the public key that was found."""

    def __init__(self, supervisor: Supervisor, reference: KeyReference, found: _Found, forget: Any) -> None:
        self.closed = False
        self._supervisor = supervisor
        self._reference = reference
        self._found = found
        self._forget = forget

    @property
    def public_key(self) -> PublicKey:
        """The public half, as it was found on the token."""
        return self._found.public_key

    @property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        """The grant's certificate file, or the certificate on the token that has the key's CKA_ID."""
        return self._found.certificates

    async def sign(self, scheme: Scheme, data: bytes) -> bytes:
        """Has a worker sign, and verifies what it returns."""
        if self.closed:
            raise ProviderUnavailable("The job that opened this key has ended.", "Open the key again.")
        check_data(scheme, data)
        check_suited(self.public_key, scheme)
        header: Header = {
            "op": "sign",
            **_identity(self._reference),
            "public": self._found.public,
            "scheme": scheme_to_wire(scheme),
        }
        try:
            answer = await self._supervisor.call(header, data, repeatable=True)
        except Error:
            self._forget(self._reference)  # it may have been deleted or re-created
            raise
        try:
            verify(self.public_key, scheme, data, answer.body)
        except SigningFailed:
            self._supervisor.distrust(answer)
            raise
        return answer.body


def _identity(reference: KeyReference) -> Header:
    return {"label": reference.object, "key_id": None if reference.id is None else reference.id.hex()}


def _readable(der: bytes) -> tuple[x509.Certificate, ...]:
    """The certificate of an object on the token; none where it cannot be read, as another key's may be."""
    try:
        return load_certificates(der)
    except KeyUnusable:
        return ()


def _read_certificates(path: Path) -> tuple[x509.Certificate, ...]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise KeyUnusable(
            f"The grant's certificate file cannot be read: {error.strerror}.", "Check its path and mode in the grant."
        ) from None
    return load_certificates(data)


# DER OBJECT IDENTIFIERs of the curves (RFC 5480, section 2.1.1.1): CKA_EC_PARAMS
_CURVES: dict[bytes, ec.EllipticCurve] = {
    bytes.fromhex("06082a8648ce3d030107"): ec.SECP256R1(),
    bytes.fromhex("06052b81040022"): ec.SECP384R1(),
    bytes.fromhex("06052b81040023"): ec.SECP521R1(),
}


_RSA_MIN_BITS = 2048


def _public_key(public: Any) -> PublicKey:
    """The public key of the values that the driver found. Raises KeyUnusable."""
    try:
        match public:
            case ["rsa", modulus, exponent] if int(modulus, 16).bit_length() >= _RSA_MIN_BITS:
                return rsa.RSAPublicNumbers(int(exponent, 16), int(modulus, 16)).public_key()
            case ["ec", parameters, point]:
                curve = _CURVES[bytes.fromhex(parameters)]
                size = 1 + 2 * ((curve.key_size + 7) // 8)
                return ec.EllipticCurvePublicKey.from_encoded_point(curve, _point(bytes.fromhex(point), size))
            case ["edwards", _, point]:
                return ed25519.Ed25519PublicKey.from_public_bytes(_point(bytes.fromhex(point), 32))
    except (KeyError, ValueError):
        pass
    raise KeyUnusable(
        "The key's type, size or curve is not supported.",
        "Grant an RSA key of 2048 bits or more, a P-256, P-384, P-521 or an Ed25519 key.",
    )


def _point(value: bytes, size: int) -> bytes:
    """The point of CKA_EC_POINT: a DER OCTET STRING (PKCS#11 v2.40 current mechanisms, 2.3.3), bare on some tokens."""
    header = b"\x04" + (b"\x81" if size > 127 else b"") + bytes([size])
    return value.removeprefix(header) if len(value) == len(header) + size else value
