"""The error tree of hsmsign.

`tokens` and `signers` raise these; `hsmsign.problems` turns each into an HTTP answer.
Every error says what happened and, in `hint`, what to do next. Neither text ever holds
a PIN, a key byte or a path that only the server knows.

    Error
    +-- ArtifactRejected        the artifact cannot be signed as it is
    +-- StoreProblem            of an artifact that stays where it is, and is named by its URI
    |   +-- LocationNotAllowed  the settings do not open this place to clients
    |   +-- ArtifactNotFound    nothing is there that could be an artifact
    |   +-- ArtifactChanged     it became another one while it was signed
    |   +-- StoreFailed         it could not be read or replaced
    +-- KeyProblem
    |   +-- KeyNotGranted       no grant gives this key to this signer and machine
    |   +-- KeyNotFound         the provider holds no such object
    |   +-- KeyAmbiguous        more than one object matches
    |   +-- KeyUnusable         the object is there, and is no key that can be used
    |   +-- KeyUnsuited         the key cannot make the signature that is asked for
    |   +-- KeyLocked           something that the key signed did not verify; a person has to look
    |   +-- KeyMismatch         the key is not the one that was pinned, certified or found before
    |   +-- KeyNotAttested      no device proves what the grant wants to know of the key
    +-- ProviderProblem
    |   +-- ProviderUnavailable for now; try again later
    |   |   +-- ProviderBusy    the queue is full, or the call waited in it for too long
    |   |   +-- PinRefused      no login is tried until the PIN's source has changed
    |   |   +-- LogFull         the token's audit log has to be read before it does anything else
    |   +-- ProviderTimeout     the provider took a call and did not answer in time
    |   +-- ProviderRefused     the provider says that the service may not do this
    |   +-- SigningFailed       the provider answered, with no (good) signature
    |       +-- SignatureMismatch   what was signed does not verify with the key's public key
    +-- ToolProblem
        +-- ToolUnavailable     the tool, or the sandbox that it must run in, is not there
        +-- ToolTimeout         the tool did not end in time, and was killed
        +-- ToolFailed          the tool ended with an error, or made something else than was asked for
"""

__all__ = [
    "ArtifactChanged",
    "ArtifactNotFound",
    "ArtifactRejected",
    "Error",
    "KeyAmbiguous",
    "KeyLocked",
    "KeyMismatch",
    "KeyNotAttested",
    "KeyNotFound",
    "KeyNotGranted",
    "KeyProblem",
    "KeyUnsuited",
    "KeyUnusable",
    "LocationNotAllowed",
    "LogFull",
    "PinRefused",
    "ProviderBusy",
    "ProviderProblem",
    "ProviderRefused",
    "ProviderTimeout",
    "ProviderUnavailable",
    "SignatureMismatch",
    "SigningFailed",
    "StoreFailed",
    "StoreProblem",
    "ToolFailed",
    "ToolProblem",
    "ToolTimeout",
    "ToolUnavailable",
]


class Error(Exception):
    """Base of everything that hsmsign raises on purpose.

    Arguments:
        message: what happened, one sentence.
        hint: what to do next, one sentence.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ArtifactRejected(Error):
    """The artifact cannot be signed as it is; the message says why."""


class StoreProblem(Error):
    """Something is wrong with the place that an artifact's URI names."""


class LocationNotAllowed(StoreProblem):
    """The settings do not say that clients may have artifacts signed there."""


class ArtifactNotFound(StoreProblem):
    """There is no such file or object, or it is none that could be an artifact."""


class ArtifactChanged(StoreProblem):
    """The artifact became another one while it was signed, and was not replaced."""


class StoreFailed(StoreProblem):
    """The artifact could not be read, or not be replaced."""


class KeyProblem(Error):
    """Something is wrong with the key that a grant names."""


class KeyNotGranted(KeyProblem):
    """No grant gives this key to this signer for this machine or distro."""


class KeyNotFound(KeyProblem):
    """The provider holds no object that the grant's reference matches."""


class KeyAmbiguous(KeyProblem):
    """More than one object, or more than one grant, matches; the message says how many."""


class KeyUnusable(KeyProblem):
    """The object is there but is no usable key: not a key, encrypted, or of an unsupported type."""


class KeyUnsuited(KeyProblem):
    """The key is of the wrong type or size for the signature that is asked for."""


class KeyLocked(KeyProblem):
    """Something that the key signed did not verify: nothing is signed with it before a person has unlocked it."""


class KeyMismatch(KeyProblem):
    """The key is not the one that the grant pins, the certificate certifies, or the job began with."""


class KeyNotAttested(KeyProblem):
    """No attestation proves what must be known of the key; the message says what is not proven."""


class ProviderProblem(Error):
    """The provider (token, key store) could not do what it was asked."""


class ProviderUnavailable(ProviderProblem):
    """The provider cannot be used now; `retry_after` (seconds) says when to try again."""

    def __init__(self, message: str, hint: str = "", *, retry_after: int = 5) -> None:
        super().__init__(message, hint)
        self.retry_after = retry_after


class ProviderBusy(ProviderUnavailable):
    """The provider's queue is full, or the call waited in it for too long."""


class PinRefused(ProviderUnavailable):
    """The token refused the PIN, or a login could lock it: none is tried until the PIN's source changes."""


class LogFull(ProviderUnavailable):
    """The token's audit log is full, and the token does nothing before it has been read and freed."""


class ProviderTimeout(ProviderProblem):
    """The provider took the call and did not answer before its deadline."""


class ProviderRefused(ProviderProblem):
    """The provider answered that the service may not do this (access denied)."""


class SigningFailed(ProviderProblem):
    """The provider answered with an error, or with a signature that does not verify."""


class SignatureMismatch(SigningFailed):
    """A signature, or a finished artifact, that does not verify with the key's public key: it was not released."""


class ToolProblem(Error):
    """A tool that signs could not do what it was asked; never with its own words, which hold paths and URIs."""


class ToolUnavailable(ToolProblem):
    """The tool, or the sandbox that it must run in, is not there; the hint says what to install."""


class ToolTimeout(ToolProblem):
    """The tool did not end before its deadline, and was killed with all that it had started."""


class ToolFailed(ToolProblem):
    """The tool ended with an error, or what it made is not what was asked for."""
