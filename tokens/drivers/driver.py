"""What a worker asks of a driver, and the error by which a driver says what is to be done."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tokens.frames import Action, Header
from tokens.schemes import Scheme
from tokens.symmetric import Operation


class DriverError(Exception):
    """A driver could not do what it was asked.

    Arguments:
        error: the name of the class in `tokens.errors` that the caller gets.
        message: what happened.
        hint: what to do next.
        action: what the supervisor is to do about this worker.
    """

    def __init__(self, error: str, message: str, hint: str = "", action: Action = Action.GIVE_UP) -> None:
        super().__init__(message)
        self.error = error
        self.message = message
        self.hint = hint
        self.action = action


@dataclass(frozen=True, slots=True)
class ObjectReference:
    """Which key object is meant: its label (CKA_LABEL), its ID (CKA_ID), or both."""

    label: str | None
    id: bytes | None


class Driver(Protocol):
    """Holds one session with one token. Every method but `close` raises DriverError."""

    def open(self) -> Header:
        """Opens the session and logs in, after ending an earlier one. Returns the token's `label`, `serial`, ..."""

    def check(self) -> None:
        """Raises what a signature would meet now."""

    def close(self) -> None:
        """Ends the session, if there is one: the worker is about to exit."""


@runtime_checkable
class KeyDriver(Driver, Protocol):
    """A driver that signs."""

    def find(self, reference: ObjectReference) -> Header:
        """Looks the key up anew. Returns `public` (what tells it from any other) and `certificates` (DER in hex)."""

    def sign(self, reference: ObjectReference, public: Any, scheme: Scheme, data: bytes) -> bytes:
        """Signs with the key if it is the one of `public`."""


@runtime_checkable
class SymmetricDriver(Driver, Protocol):
    """A driver that computes with symmetric keys."""

    def find_symmetric(self, reference: ObjectReference) -> Header:
        """Looks the key up anew.

        Returns `secret` (a flat object: what tells it from any other), `algorithm` (a `SymmetricAlgorithm`) and
        `data_max_bytes` (for one `compute`).
        """

    def compute(self, reference: ObjectReference, secret: Any, operation: Operation, data: bytes, iv: bytes) -> bytes:
        """Uses the key if it is the one of `secret`."""


@runtime_checkable
class AttestingDriver(Driver, Protocol):
    """A driver whose token certifies that it holds a key."""

    def attest(self, public: Any) -> Header:
        """Returns `certificate` and `issuers` (DER in hex) for the key of `public`."""


@runtime_checkable
class LogDriver(Driver, Protocol):
    """A driver that reads the token's audit log."""

    def read_log(self) -> tuple[Header, bytes]:
        """Returns `unlogged_boots` and `unlogged_authentications`, and the entries as the token has them."""

    def advance_log(self, number: int) -> None:
        """Frees the entries up to and including this number."""


@runtime_checkable
class Expiring(Driver, Protocol):
    """A driver whose session the token ends when it is idle."""

    @property
    def keep_alive_s(self) -> float:
        """How long the worker may hear nothing before it calls `keep_alive`."""

    def keep_alive(self) -> None:
        """Uses the session, if there is one. Raises nothing: a session that is gone is told to the next call."""
