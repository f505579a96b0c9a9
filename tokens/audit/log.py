"""The audit log of a YubiHSM 2: its entries, and the hash chain that links them.

The device keeps the last 62. Each is 32 bytes and ends in a digest over itself and the digest before it, so that
nothing can be changed, left out or put in between two entries without its being seen. What was signed is not in it.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, Self

CAPACITY = 62
"""Entries in the device's log (DEVICE INFO)."""

_ENTRY = struct.Struct(">HBHHHHBL16s")
_DATA_BYTES = 16
_RESET_DATA = b"\xff" * 14
_SUCCESS = 0x80
_NUMBERS = 1 << 16

SET_OPTION = 0x4F
SET_LOG_INDEX = 0x67
GET_LOG_ENTRIES = 0x4D
BOOT = 0x00

COMMANDS = {
    BOOT: "boot", 0x01: "echo", 0x03: "create-session", 0x04: "authenticate-session", 0x05: "session-message",
    0x06: "device-info", 0x08: "reset", 0x0A: "get-device-public-key", 0x40: "close-session", 0x41: "storage-info",
    0x42: "put-opaque", 0x43: "get-opaque", 0x44: "put-authentication-key", 0x45: "put-asymmetric-key",
    0x46: "generate-asymmetric-key", 0x47: "sign-pkcs1", 0x48: "list-objects", 0x49: "decrypt-pkcs1",
    0x4A: "export-wrapped", 0x4B: "import-wrapped", 0x4C: "put-wrap-key", GET_LOG_ENTRIES: "get-log-entries",
    0x4E: "get-object-info", SET_OPTION: "set-option", 0x50: "get-option", 0x51: "get-pseudo-random",
    0x52: "put-hmac-key", 0x53: "sign-hmac", 0x54: "get-public-key", 0x55: "sign-pss", 0x56: "sign-ecdsa",
    0x57: "derive-ecdh", 0x58: "delete-object", 0x59: "decrypt-oaep", 0x5A: "generate-hmac-key",
    0x5B: "generate-wrap-key", 0x5C: "verify-hmac", 0x5D: "sign-ssh-certificate", 0x5E: "put-template",
    0x5F: "get-template", 0x60: "decrypt-otp", 0x61: "create-otp-aead", 0x62: "randomize-otp-aead",
    0x63: "rewrap-otp-aead", 0x64: "sign-attestation-certificate", 0x65: "put-otp-aead-key",
    0x66: "generate-otp-aead-key", SET_LOG_INDEX: "set-log-index", 0x68: "wrap-data", 0x69: "unwrap-data",
    0x6A: "sign-eddsa", 0x6B: "blink-device", 0x6C: "change-authentication-key", 0x6D: "put-symmetric-key",
    0x6E: "generate-symmetric-key", 0x6F: "decrypt-ecb", 0x70: "encrypt-ecb", 0x71: "decrypt-cbc",
    0x72: "encrypt-cbc", 0x73: "put-public-wrap-key", 0x74: "wrap-key-rsa", 0x75: "unwrap-key-rsa",
    0x76: "export-wrapped-rsa", 0x77: "import-wrapped-rsa",
}  # fmt: skip
"""What Yubico's command reference calls the commands."""

SIGNATURES = frozenset({0x47, 0x55, 0x56, 0x5D, 0x6A} | {0x53, 0x6F, 0x70, 0x71, 0x72})
"""The commands that are reconciled with what the service asked for: signatures, and the uses of symmetric keys."""


@dataclass(frozen=True, slots=True)
class LogPage:
    """What the device answers to GET LOG ENTRIES."""

    unlogged_boots: int
    unlogged_authentications: int
    entries: bytes
    """n x 32 bytes, the oldest first."""


class LogSource(Protocol):
    """A device's log, by a credential with `get-log-entries` and nothing else. Both raise ProviderProblem."""

    async def read(self) -> LogPage:
        """All entries in the device's log; they stay there."""

    async def advance(self, number: int) -> None:
        """SET LOG INDEX: removes the entries up to and including `number`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry (Yubico's "Get Log Entries"): a command that ran, who ran it, on what, and how it ended.

    Key numbers are object IDs; 0xffff where there is none. `tick` counts since the device got power.
    """

    number: int
    command: int
    length: int
    session_key: int
    target_key: int
    second_key: int
    result: int
    tick: int
    digest: bytes

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """The entry in 32 bytes. Raises ValueError for another length."""
        if len(raw) != _ENTRY.size:
            raise ValueError(f"a log entry has {_ENTRY.size} bytes, this one has {len(raw)}")
        return cls(*_ENTRY.unpack(raw))

    @property
    def raw(self) -> bytes:
        """The 32 bytes."""
        return _ENTRY.pack(
            self.number, self.command, self.length, self.session_key, self.target_key,
            self.second_key, self.result, self.tick, self.digest,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """The command's name."""
        return "initialise" if self.is_first else COMMANDS.get(self.command, f"command-{self.command:02x}")

    @property
    def is_first(self) -> bool:
        """Whether it begins a log: the device was made or reset, and what was in it before is gone."""
        return self.raw[2:_DATA_BYTES] == _RESET_DATA

    @property
    def succeeded(self) -> bool:
        """Whether the command did what it was to do: the result is that of a good answer."""
        return self.result == self.command | _SUCCESS

    @property
    def is_signature(self) -> bool:
        """Whether a signature was made."""
        return self.command in SIGNATURES and self.succeeded

    def digest_after(self, previous: bytes) -> bytes:
        """The digest that it must have behind an entry with the digest `previous`."""
        return hashlib.sha256(self.raw[:_DATA_BYTES] + previous).digest()[:16]


class Break(StrEnum):
    """Why an entry does not follow the one before it."""

    GAP = "gap"
    """Entries between the two are missing."""
    BROKEN_CHAIN = "broken-chain"
    """The digest is another: one of the two was changed."""
    RESET = "reset"
    """The device was reset to its factory state, which empties the log."""


def parse_entries(raw: bytes) -> tuple[Entry, ...]:
    """The entries in n x 32 bytes. Raises ValueError for other lengths."""
    return tuple(Entry.parse(raw[start : start + _ENTRY.size]) for start in range(0, len(raw), _ENTRY.size))


def find_break(previous: Entry | None, entry: Entry) -> Break | None:
    """What is wrong between two entries; None where `entry` follows `previous`, or nothing comes before it."""
    if previous is None:
        return None
    if entry.is_first:
        return Break.RESET
    missing = (entry.number - previous.number - 1) % _NUMBERS  # they are 16 bits, and begin anew after 65535
    if missing and missing < _NUMBERS - CAPACITY:
        return Break.GAP
    # a number that is not behind `previous` at all is that of an entry that was there already, and is now another
    if missing or entry.digest != entry.digest_after(previous.digest):
        return Break.BROKEN_CHAIN
    return None


def entries_after(recent: Sequence[Entry], page: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """The entries of a page that come after the `recent` ones; all of them where the two do not agree."""
    if recent and recent[-1] in page:
        end = page.index(recent[-1]) + 1
        common = min(end, len(recent))
        if page[end - common : end] == tuple(recent[-common:]):
            return page[end:]
    return page
