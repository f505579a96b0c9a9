"""Where a PIN or a passphrase comes from: a file or a systemd credential, never a setting's value.

Imported by the token workers: standard library only.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from tokens.errors import KeyUnusable


@dataclass(frozen=True)
class SecretSource:
    """`{ file = "/path" }` or `{ credential = "name" }` (systemd's `LoadCredential=`).

    The secret is the exact bytes, less one trailing newline (LF or CRLF).
    """

    file: Path | None = None
    credential: str | None = None

    # read by pydantic; a misspelt key must not be ignored
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    def __post_init__(self) -> None:
        if (self.file is None) == (self.credential is None):
            raise ValueError("name one of file and credential")
        if self.credential is not None and ("/" in self.credential or self.credential in ("", ".", "..")):
            raise ValueError("a credential's name is a plain file name")

    def path(self) -> Path:
        """The file that holds the secret. Raises KeyUnusable where systemd passed no credentials."""
        if self.file is not None:
            return self.file
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        if not directory or not self.credential:
            raise KeyUnusable(
                f"The credential {self.credential} is not there: CREDENTIALS_DIRECTORY is not set.",
                "Start the service by systemd with LoadCredential=, or name a file.",
            )
        return Path(directory, self.credential)

    def read(self) -> bytes:
        """The secret. Raises KeyUnusable where it cannot be read."""
        return read_secret(self.path())


def read_secret(path: Path) -> bytes:
    """The bytes of a file, less one trailing newline. Raises KeyUnusable where it cannot be read."""
    try:
        secret = path.read_bytes()
    except OSError as error:
        raise KeyUnusable(
            f"The secret's file cannot be read: {error.strerror}.",
            "Check the file's path and mode in the provider's settings.",
        ) from None
    if secret.endswith(b"\n"):
        secret = secret[:-1].removesuffix(b"\r")
    return secret
