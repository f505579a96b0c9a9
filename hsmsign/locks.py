"""Keys that are locked, because what they signed did not verify: a client's retries must not hide that.

A lock is a file, so that it outlives the service and `hsmsign doctor --unlock NAME` can end it while the service runs.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from tokens.errors import KeyLocked

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lock:
    """Why a key is locked: the Unix time of the last mismatch, how many there were, what the last one was."""

    at: int
    count: int
    message: str


class Locks:
    """The locks of a service.

    Arguments:
        state_directory: outlives the service.
    """

    def __init__(self, state_directory: Path) -> None:
        self._directory = state_directory / "locked-keys"

    def check(self, name: str) -> None:
        """Raises KeyLocked where the key of that grant is locked."""
        if (lock := self._read(name)) is not None:
            since = f"{datetime.fromtimestamp(lock.at, UTC):%Y-%m-%d %H:%M:%SZ}"
            times = f", {lock.count} times" if lock.count > 1 else ""
            raise KeyLocked(
                f"The key {name} is locked since {since}{times}: what it signed did not verify.",
                f"Find out why, then run `hsmsign doctor --unlock {name}` on the server.",
            )

    def lock(self, name: str, message: str) -> None:
        """Locks the key of a grant; a mismatch more of one that is locked is counted."""
        before = self._read(name)
        lock = Lock(int(time.time()), 1 + (before.count if before else 0), message)
        log.error("the key %s is locked, mismatch %d: %s", name, lock.count, message)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        written = self._path(name).with_suffix(".new")
        written.write_text(json.dumps(asdict(lock)))
        written.replace(self._path(name))

    def unlock(self, name: str) -> bool:
        """Ends a lock; whether there was one."""
        there = self._path(name).exists()
        self._path(name).unlink(missing_ok=True)
        return there

    def _read(self, name: str) -> Lock | None:
        try:
            return Lock(**json.loads(self._path(name).read_text()))
        except FileNotFoundError:
            return None

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"  # a grant's name has no slash
