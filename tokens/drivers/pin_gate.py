"""One attempt: a PIN that the token refused is not tried again, whoever is restarted.

A token locks after a few wrong PINs, for good. So what it refused is remembered in a file that outlives the
worker and the service: a salted scrypt digest of the PIN, one file a token. Another PIN is tried; the same one is
not. A lock on that file makes logins of all workers (and of `hsmsign doctor`) wait for each other, so that the
second sees what the first met.
"""

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SCRYPT_N = 2**14  # 16 MiB and about 50 ms a guess


class PinGate:
    """The PINs that one token refused.

    Arguments:
        directory: where the files are; made with mode 0700.
        token: what tells this token from others (serial number, label, model).
    """

    def __init__(self, directory: Path, token: str) -> None:
        self._directory = directory
        self._path = directory / f"pin-{hashlib.sha256(token.encode()).hexdigest()[:16]}.json"
        self._record: dict[str, Any] = {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the token's login lock; the record is read under it."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self._path.with_suffix(".lock"), "a", opener=_private) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self._record = json.loads(self._path.read_bytes())
            except (OSError, ValueError):
                self._record = {"salt": secrets.token_hex(16), "refused": [], "pending": None}
            yield

    def refused(self, pin: bytes) -> bool:
        """Whether the token refused this PIN before."""
        return bool(self._record["refused"]) and self._known(pin, self._record["refused"])

    def interrupted(self, pin: bytes) -> bool:
        """Whether a login with this PIN began and its end was never seen."""
        pending = self._record["pending"]
        return pending is not None and self._known(pin, [pending])

    def begin(self, pin: bytes) -> None:
        """Notes that a login with this PIN is about to be tried."""
        self._record["pending"] = self._digest(pin)
        self._write()

    def end(self, pin: bytes, *, refused: bool) -> None:
        """Notes how it went."""
        self._record["pending"] = None
        if refused:
            self._record["refused"].append(self._digest(pin))
        self._write()

    def _known(self, pin: bytes, digests: list[str]) -> bool:
        digest = self._digest(pin)
        return any(hmac.compare_digest(digest, known) for known in digests)

    def _digest(self, pin: bytes) -> str:
        salt = bytes.fromhex(self._record["salt"])
        return hashlib.scrypt(pin, salt=salt, n=_SCRYPT_N, r=8, p=1, dklen=32).hex()

    def _write(self) -> None:
        temporary = self._path.with_suffix(".new")
        with open(temporary, "w", opener=_private) as file:
            json.dump(self._record, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
