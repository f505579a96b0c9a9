"""What all providers share whose keys stay on a token that worker processes hold.

This side never loads a driver and never reads a PIN: `tokens.worker` does, and `tokens.supervisor` hands it the calls.
A key is looked up when it is first used and again after each `check`. Every signature is verified with the public key
that was found before anybody gets it; what a symmetric key computes cannot be.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from cryptography import x509
from pydantic import BaseModel, ConfigDict, Field

from tokens.certificates import certifies, check_certifies, load_certificates
from tokens.errors import Error, KeyUnsuited, KeyUnusable, ProviderUnavailable, SigningFailed
from tokens.frames import Header, scheme_to_wire
from tokens.provider import KeyReference, PublicKey
from tokens.schemes import Scheme, check_data
from tokens.supervisor import Answer, Limits, Supervisor
from tokens.symmetric import BLOCK_BYTES, MAC_BYTES, Computing, Operation, SymmetricAlgorithm, check_algorithm
from tokens.verify import check_suited, verify

T = TypeVar("T")
Seconds = Annotated[float, Field(gt=0)]


class ResidentSettings(BaseModel):
    """The settings of the workers, whatever token they hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sessions: Annotated[int, Field(ge=1, le=16)] = 1
    """How many workers, each a process with a session of its own, sign at the same time."""
    aliases: tuple[str, ...] = ()
    """Other names that a client's pkcs11: URI may use for the token, such as YubiHSM."""
    call_timeout_s: Seconds = 30.0
    """How long one call may take, from when a worker could begin it; then the worker is killed."""
    start_timeout_s: Seconds = 30.0
    """How long loading the driver and logging in may take."""
    queue_depth: Annotated[int, Field(gt=0)] = 1024
    """How many calls may wait for the token; more are refused (503)."""
    queue_timeout_s: Seconds = 20.0
    """How long a call may wait in that queue (503)."""
    backoff_min_s: Seconds = 0.1
    """The pause before a worker is replaced for the second time in a row; it doubles each time."""
    backoff_max_s: Seconds = 10.0
    """The longest such pause: a token that is plugged in again is noticed within it."""

    @property
    def limits(self) -> Limits:
        """What the supervisor goes by."""
        return Limits(
            call_timeout_s=self.call_timeout_s,
            start_timeout_s=self.start_timeout_s,
            queue_depth=self.queue_depth,
            queue_timeout_s=self.queue_timeout_s,
            backoff_min_s=self.backoff_min_s,
            backoff_max_s=self.backoff_max_s,
        )


@dataclass(frozen=True, slots=True)
class Found:
    """A key as it was looked up on the token; `public` is what the driver knows it by from then on."""

    public: Any
    public_key: PublicKey
    certificates: tuple[x509.Certificate, ...]


@dataclass(frozen=True, slots=True)
class FoundSymmetric:
    """A symmetric key as it was looked up on the token.

    Arguments:
        secret: what the driver knows it by from then on; no part of the key.
        algorithm: what it is for.
        data_max_bytes: what the token takes in one command.
    """

    secret: Any
    algorithm: SymmetricAlgorithm
    data_max_bytes: int


class ResidentProvider(ABC):
    """Implements `tokens.provider.KeyProvider`; what is particular to a kind of token is abstract.

    Arguments:
        name: the NAME of `[providers.NAME]`.
    """

    kind: ClassVar[str]

    def __init__(self, name: str) -> None:
        self.name = name
        self.supervisor: Supervisor | None = None
        self._not_started = ProviderUnavailable("The token's workers have not been started.", "Wait a moment.")
        self._found: dict[KeyReference, Found] = {}
        self._found_symmetric: dict[KeyReference, FoundSymmetric] = {}
        self._looking_up = asyncio.Lock()

    @property
    @abstractmethod
    def uri_attributes(self) -> Mapping[str, frozenset[str]]:
        """What the token attributes of a URI may say."""

    @abstractmethod
    def supervise(self) -> Supervisor:
        """The workers, not yet started. Raises KeyUnusable where the PIN's source cannot be named."""

    @abstractmethod
    def public_key(self, public: Any) -> PublicKey:
        """The public key of what the driver found. Raises KeyUnusable where it is of no supported type."""

    async def start(self) -> None:
        """Starts the workers; a token that is absent is a state that `check` reports."""
        try:
            self.supervisor = self.supervise()
        except KeyUnusable as error:
            self._not_started = ProviderUnavailable(error.message, error.hint)
            return
        self.supervisor.start()

    async def stop(self) -> None:
        """Finishes what runs and ends the workers."""
        if self.supervisor is not None:
            await self.supervisor.stop()

    async def check(self) -> None:
        """Asks the token; keys are looked up anew after it."""
        self._found.clear()
        self._found_symmetric.clear()
        await self._started().check()

    @asynccontextmanager
    async def open(self, reference: KeyReference) -> AsyncIterator["ResidentKey"]:
        """The key for one job: nothing but its name and public key is here."""
        key = ResidentKey(self, reference, await self.found(reference))
        try:
            yield key
        finally:
            key.closed = True

    @asynccontextmanager
    async def open_symmetric(
        self, reference: KeyReference, wanted: Collection[SymmetricAlgorithm]
    ) -> AsyncIterator["ResidentSymmetricKey"]:
        """The symmetric key for one job: nothing but its name and algorithm is here."""
        found = await self._look_up(self._found_symmetric, reference, self.find_symmetric)
        check_algorithm(found.algorithm, wanted)
        key = ResidentSymmetricKey(self, reference, found)
        try:
            yield key
        finally:
            key.closed = True

    async def found(self, reference: KeyReference) -> Found:
        """The key as it was looked up, now or before."""
        return await self._look_up(self._found, reference, self.find)

    async def _look_up(
        self, known: dict[KeyReference, T], reference: KeyReference, find: Callable[[KeyReference], Awaitable[T]]
    ) -> T:
        self._started()
        found = known.get(reference)
        if found is None:
            async with self._looking_up:  # a hundred jobs that begin at once look a key up once
                found = known.get(reference) or await find(reference)
                known[reference] = found
        return found

    async def find(self, reference: KeyReference) -> Found:
        """Looks the key up on the token."""
        answer = await self.call({"op": "find", **identity(reference)})
        public = answer.header["public"]
        public_key = self.public_key(public)
        if reference.certificate is not None:
            certificates = await asyncio.to_thread(_read_certificates, Path(reference.certificate))
        else:
            on_token = [bytes.fromhex(der) for der in answer.header["certificates"]]
            certificates = tuple(found for der in on_token for found in _readable(der) if certifies(found, public_key))
            certificates = certificates[:1]
        check_certifies(certificates, public_key)
        return Found(public, public_key, certificates)

    async def find_symmetric(self, reference: KeyReference) -> FoundSymmetric:
        """Looks the symmetric key up on the token."""
        header = (await self.call({"op": "find-symmetric", **identity(reference)})).header
        return FoundSymmetric(header["secret"], SymmetricAlgorithm(header["algorithm"]), header["data_max_bytes"])

    async def call(self, header: Header, body: bytes = b"") -> Answer:
        """Has a worker do what changes nothing on the token: it may be repeated, once."""
        return await self._started().call(header, body, repeatable=True)

    async def sign(self, reference: KeyReference, found: Found, scheme: Scheme, data: bytes) -> Answer:
        """Has a worker sign; the answer's body is not verified yet."""
        header = {"op": "sign", **identity(reference), "public": found.public, "scheme": scheme_to_wire(scheme)}
        return await self.call(header, data)

    async def compute(
        self, reference: KeyReference, found: FoundSymmetric, operation: Operation, data: bytes, iv: bytes
    ) -> Answer:
        """Has a worker use a symmetric key, by one command; the answer's body is of the right length."""
        header = {"op": "compute", **identity(reference), "secret": found.secret, "operation": operation}
        answer = await self.call(header | {"iv": iv.hex()}, data)
        if len(answer.body) != (MAC_BYTES if operation is Operation.HMAC_SHA256 else len(data)):
            self.distrust(answer)
            raise SigningFailed(
                "The token's answer is of a wrong length.", "Look at the token with its vendor's tools."
            )
        return answer

    def forget(self, reference: KeyReference) -> None:
        """Has the key looked up anew for the next job."""
        self._found.pop(reference, None)
        self._found_symmetric.pop(reference, None)

    def distrust(self, answer: Answer) -> None:
        """Replaces the worker that gave this answer."""
        self._started().distrust(answer)

    def _started(self) -> Supervisor:
        if self.supervisor is None:
            raise self._not_started
        return self.supervisor


class ResidentKey:
    """Implements `tokens.provider.SigningKey`; bound to the public key that was found."""

    def __init__(self, provider: ResidentProvider, reference: KeyReference, found: Found) -> None:
        self.closed = False
        self._provider = provider
        self._reference = reference
        self._found = found

    @property
    def public_key(self) -> PublicKey:
        """The public half, as it was found on the token."""
        return self._found.public_key

    @property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        """The grant's certificate file, or the certificate on the token that has the key's ID."""
        return self._found.certificates

    async def sign(self, scheme: Scheme, data: bytes) -> bytes:
        """Has a worker sign, and verifies what it returns."""
        if self.closed:
            raise ProviderUnavailable("The job that opened this key has ended.", "Open the key again.")
        check_data(scheme, data)
        check_suited(self.public_key, scheme)
        try:
            answer = await self._provider.sign(self._reference, self._found, scheme, data)
        except Error:
            self._provider.forget(self._reference)  # it may have been deleted or re-created
            raise
        try:
            verify(self.public_key, scheme, data, answer.body)
        except SigningFailed:
            self._provider.distrust(answer)
            raise
        return answer.body


class ResidentSymmetricKey(Computing):
    """Implements `tokens.provider.SymmetricKey`; bound to the object that was found."""

    def __init__(self, provider: ResidentProvider, reference: KeyReference, found: FoundSymmetric) -> None:
        super().__init__(found.algorithm, " ".join(f"{name}={value}" for name, value in found.secret.items()))
        self.closed = False
        self._provider = provider
        self._reference = reference
        self._found = found

    async def compute(self, operation: Operation, data: bytes, iv: bytes) -> bytes:
        """See `Computing.compute`; what the token does not take at once goes to it in pieces."""
        if self.closed:
            raise ProviderUnavailable("The job that opened this key has ended.", "Open the key again.")
        limit = self._found.data_max_bytes
        if operation is Operation.HMAC_SHA256:
            if len(data) > limit:
                raise KeyUnsuited(
                    f"The token takes {limit} bytes for an HMAC; these are {len(data)}.",
                    "Keep this key in a key store.",
                )
            return await self._one(operation, data, iv)
        size = limit // BLOCK_BYTES * BLOCK_BYTES
        made = []
        for at in range(0, len(data), size):
            piece = data[at : at + size]
            made.append(await self._one(operation, piece, iv))
            if iv:  # a piece is chained to the ciphertext before it
                iv = (made[-1] if operation is Operation.ENCRYPT_CBC else piece)[-BLOCK_BYTES:]
        return b"".join(made)

    async def _one(self, operation: Operation, data: bytes, iv: bytes) -> bytes:
        try:
            return (await self._provider.compute(self._reference, self._found, operation, data, iv)).body
        except Error:
            self._provider.forget(self._reference)  # it may have been deleted or re-created
            raise


def identity(reference: KeyReference) -> Header:
    """What a frame says of the object that is meant."""
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
