"""What a worker asks of a driver, and the error by which a driver says what is to be done."""

from dataclasses import dataclass
from typing import Any, Protocol

from tokens.frames import Action, Header
from tokens.schemes import Scheme


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
    """Which private key object is meant: CKA_LABEL, CKA_ID, or both."""

    label: str | None
    id: bytes | None


class Driver(Protocol):
    """Holds one session with one token. Every method raises DriverError."""

    def open(self) -> Header:
        """Opens the session and logs in, after closing an earlier one. Returns the token's `label`, `serial`, ..."""

    def find(self, reference: ObjectReference) -> Header:
        """Looks the key up anew. Returns `public` (its public key's values) and `certificates` (DER in hex)."""

    def sign(self, reference: ObjectReference, public: Any, scheme: Scheme, data: bytes) -> bytes:
        """Signs with the key if its public key's values are `public`."""

    def check(self) -> None:
        """Raises what a signature would meet now."""
