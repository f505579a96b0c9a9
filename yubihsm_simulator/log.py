"""The audit log: 32-byte entries in a chain of hashes.

    number u16 | command u8 | length u16 | session key u16 | target key u16 | second key u16 | result u8 | tick u32
    | digest 16 bytes: of SHA-256 over the 16 bytes before it and the previous entry's digest

Source: YubiHSM 2 user guide, "GET LOG ENTRIES".
"""

import os
import struct
from hashlib import sha256

from yubihsm_simulator.definitions import DeviceError, ErrorCode

ENTRY_BYTES = 32
NO_KEY = 0xFFFF
"""Stands where a command used no key."""

_DIGEST_BYTES = 16
_COUNTER_MAX = 0xFFFF


class AuditLog:
    """The entries, and how many boots and authentications could not be logged.

    Attributes:
        entries: 32 bytes each, oldest first.
        unlogged_boots, unlogged_authentications: since the log was last full with force-audit on.
        revision: counts changes.
    """

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self.unlogged_boots = 0
        self.unlogged_authentications = 0
        self.last_number = 0
        self.last_digest = os.urandom(_DIGEST_BYTES)
        self.revision = 0

    def reset(self) -> None:
        """Forgets everything; the first entry says so."""
        self.entries.clear()
        self.unlogged_boots = self.unlogged_authentications = self.last_number = 0
        self.last_digest = os.urandom(_DIGEST_BYTES)
        self._append(b"\xff" * 14)

    def boot(self, capacity: int, forced: bool) -> None:
        """The device was switched on."""
        if forced and len(self.entries) >= capacity:
            self.unlogged_boots = min(self.unlogged_boots + 1, _COUNTER_MAX)
            self.revision += 1
        else:
            self._make_room(capacity)
            self._append(struct.pack(">BHHHHBL", 0, 0, NO_KEY, 0, 0, 0, 0))

    def record(self, values: tuple[int, int, int, int, int, int, int], capacity: int) -> None:
        """A command was executed: command, length, session key, target key, second key, result, tick."""
        self._make_room(capacity)
        self._append(struct.pack(">BHHHHBL", *values))

    def skip_authentication(self) -> None:
        """A session was created or authenticated while the log was full and had to be kept."""
        self.unlogged_authentications = min(self.unlogged_authentications + 1, _COUNTER_MAX)
        self.revision += 1

    def acknowledge(self, number: int) -> None:
        """Removes the entries up to and including `number`. Raises DeviceError (INVALID_DATA) where it is not there."""
        numbers = [int.from_bytes(entry[:2], "big") for entry in self.entries]
        if number not in numbers:
            raise DeviceError(ErrorCode.INVALID_DATA)
        del self.entries[: numbers.index(number) + 1]
        self.unlogged_boots = self.unlogged_authentications = 0
        self.revision += 1

    def encoded(self) -> bytes:
        """As GET LOG ENTRIES answers it."""
        counts = struct.pack(">HHB", self.unlogged_boots, self.unlogged_authentications, len(self.entries))
        return counts + b"".join(self.entries)

    def _make_room(self, capacity: int) -> None:
        while len(self.entries) >= capacity:
            del self.entries[0]

    def _append(self, values: bytes) -> None:
        self.last_number = (self.last_number + 1) & 0xFFFF
        head = struct.pack(">H", self.last_number) + values
        self.last_digest = sha256(head + self.last_digest).digest()[:_DIGEST_BYTES]
        self.entries.append(head + self.last_digest)
        self.revision += 1
