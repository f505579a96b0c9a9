"""Counts the signatures that the service asks a device for, and compares them with those in the device's log.

The log holds no digests, so signatures are told apart by command, key and authentication key alone. Of each kind the
log must hold no more than were asked for, and no fewer than were answered. Between the two are attempts in flight, and
those whose end nobody saw (a timeout, a crash): the log says later whether they were made.

The counts outlive a crash of the service: each change is one write, without waiting for the disk. After a loss
of power they may lack the last few, as far back as what was last kept with the log.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokens.audit.log import COMMANDS
from tokens.errors import ProviderUnavailable

log = logging.getLogger(__name__)

_HEADER = f"{'# operation':12} {'asked':>15} {'answered':>15} {'refused':>15}\n".encode()
_LINE_BYTES = len(_HEADER)
_CODES = {name: code for code, name in COMMANDS.items()}


@dataclass(frozen=True, slots=True)
class Operation:
    """What can be told apart in the device's log: a command, the object ID of its key, and who asked."""

    command: int
    key_id: int
    auth_key_id: int

    def __str__(self) -> str:
        return f"{COMMANDS[self.command]} with key 0x{self.key_id:04x} by authentication key 0x{self.auth_key_id:04x}"


@dataclass(slots=True)
class Account:
    """The attempts at one operation, since the device's log is followed."""

    asked: int = 0
    """Sent to the device."""
    answered: int = 0
    """Ended with a signature."""
    refused: int = 0
    """Ended without one."""
    lost: int = 0
    """Ended in a way that leaves open whether there is one."""
    lost_at: float = 0.0
    """When the last of those ended, by the ledger's clock."""
    logged: int = 0
    """Signatures in the device's log, but for those that an alarm was raised about."""

    @property
    def in_flight(self) -> int:
        """Attempts that have not ended."""
        return self.asked - self.answered - self.refused - self.lost


@dataclass(frozen=True, slots=True)
class Balance:
    """One account beside the log: what is off, and what the log says about attempts whose end nobody saw."""

    operation: Operation
    logged: int
    surplus: int
    """Signatures in the log that nobody asked for."""
    missing: int
    """Signatures that were answered and are not in the log."""
    found: int
    """Attempts without an answer that the log has."""
    given_up: int
    """Attempts without an answer that the log does not have, and will not have any more."""


class HeldElsewhere(ProviderUnavailable):
    """Another process does the audit of the device."""


class Ledger:
    """The accounts of one device.

    Arguments:
        path: the file that keeps the counts; one process has it, from `hold` to `close`.
        uncertain_s: how long an attempt whose end nobody saw may still turn up in the log.
        clock: seconds, monotonic.
    """

    def __init__(self, path: Path, uncertain_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._uncertain_s = uncertain_s
        self._clock = clock
        self._accounts: dict[Operation, Account] = {}
        self._offsets: dict[Operation, int] = {}
        self._descriptor = -1

    def hold(self) -> None:
        """Takes the file for this process. Raises ProviderUnavailable where another has it; OSError."""
        if self._descriptor >= 0:
            return
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise HeldElsewhere(
                "Another process audits this device.",
                "Let one service sign with a device that is audited, by one provider.",
            ) from None
        self._descriptor = descriptor

    def load(self, kept: Iterable[Mapping[str, Any]]) -> None:
        """Reads the counts; attempts that a process before this one left in flight are lost ones.

        Arguments:
            kept: what `records` gave when the log was last reconciled.

        Raises KeyError, TypeError where it is something else.
        """
        self._accounts = {_operation(record): _account(record) for record in kept}
        self._load_counts()
        for account in self._accounts.values():
            account.lost = account.asked - account.answered - account.refused
            account.lost_at = self._clock()
        self._offsets = {operation: _LINE_BYTES * line for line, operation in enumerate(self._accounts, 1)}
        lines = [_HEADER, *(_line(operation, account) for operation, account in self._accounts.items())]
        os.pwrite(self._descriptor, b"".join(lines), 0)
        os.ftruncate(self._descriptor, _LINE_BYTES * len(lines))

    def _load_counts(self) -> None:
        """Takes the counts from the file, where they are newer than the kept ones."""
        _, *lines = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0).splitlines() or [b""]
        for line in lines:
            try:
                command, key_id, auth_key_id, *counts = line.split()
                operation = Operation(int(command, 16), int(key_id, 16), int(auth_key_id, 16))
                asked, answered, refused = map(int, counts)
            except ValueError:  # the power went before it was on the disk
                log.warning("a line of %s cannot be read and is dropped", self._path.name)
                continue
            account = self._accounts.setdefault(operation, Account())
            account.asked = max(account.asked, asked)
            account.answered = max(account.answered, answered)
            account.refused = max(account.refused, refused)

    def close(self) -> None:
        """Lets go of the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def asked(self, operation: Operation) -> None:
        """An attempt is about to be sent to the device; one of the three below must follow."""
        self._accounts.setdefault(operation, Account()).asked += 1
        self._write(operation)

    def answered(self, operation: Operation) -> None:
        """The device answered with a signature, whether or not it was of use."""
        self._accounts[operation].answered += 1
        self._write(operation)

    def refused(self, operation: Operation) -> None:
        """The device answered with an error, or the attempt never reached it: no signature was made."""
        self._accounts[operation].refused += 1
        self._write(operation)

    def lost(self, operation: Operation) -> None:
        """No answer came, or none that can be read: a signature may have been made."""
        account = self._accounts[operation]
        account.lost += 1
        account.lost_at = self._clock()

    def answers(self) -> dict[Operation, tuple[int, int]]:
        """How many of each were answered and asked for, up to now."""
        return {operation: (account.answered, account.asked) for operation, account in self._accounts.items()}

    def balance(
        self, before: Mapping[Operation, tuple[int, int]], logged: Mapping[Operation, int], *, complete: bool
    ) -> list[Balance]:
        """Compares the accounts with the log; changes nothing.

        Arguments:
            before: `answers()` from before the log was read; nothing was awaited since it came.
            logged: signatures that the log has beyond those balanced before.
            complete: whether the log has all entries since then.
        """
        return [
            self._balance(operation, before.get(operation, (0, 0)), logged.get(operation, 0), complete)
            for operation in self._accounts | dict.fromkeys(logged)
        ]

    def _balance(self, operation: Operation, before: tuple[int, int], entries: int, complete: bool) -> Balance:
        account = self._accounts.get(operation) or Account()
        answered, asked = before
        logged = account.logged + entries
        surplus = max(0, logged - (account.asked - account.refused))
        missing = max(0, answered - logged)
        logged += missing - surplus
        if not complete:
            missing = 0
        found = given_up = 0
        # at rest from before the log was read until now: what it has and was not answered is of the lost ones
        if not account.in_flight and account.asked == asked:
            found = min(account.lost, max(0, logged - account.answered))
            if self._clock() - account.lost_at >= self._uncertain_s:
                given_up = account.lost - found
        return Balance(operation, logged, surplus, missing, found, given_up)

    def settle(self, balances: Iterable[Balance]) -> None:
        """Books what `balance` found."""
        for balance in balances:
            account = self._accounts.setdefault(balance.operation, Account())
            account.logged = balance.logged
            account.answered += balance.found
            account.refused += balance.given_up
            account.lost -= balance.found + balance.given_up
            if balance.found or balance.given_up:
                self._write(balance.operation)

    def records(self, balances: Iterable[Balance]) -> list[dict[str, Any]]:
        """The accounts as they will be when these balances are settled, to be kept with the log."""
        return [_record(balance, self._accounts.get(balance.operation) or Account()) for balance in balances]

    def _write(self, operation: Operation) -> None:
        """Puts one account's line in its place."""
        offset = self._offsets.setdefault(operation, _LINE_BYTES * (len(self._offsets) + 1))
        try:
            os.pwrite(self._descriptor, _line(operation, self._accounts[operation]), offset)
        except OSError as error:  # it is counted all the same, and kept with the log at the next drain
            log.error("a count in %s cannot be written: %s", self._path.name, error.strerror)  # noqa: TRY400


def _line(operation: Operation, account: Account) -> bytes:
    """The account's line in the file: all of them are of one length, so that each has a place."""
    return (
        f"{operation.command:02x} {operation.key_id:04x} {operation.auth_key_id:04x}"
        f" {account.asked:15} {account.answered:15} {account.refused:15}\n"
    ).encode()


def _record(balance: Balance, account: Account) -> dict[str, Any]:
    return {
        "command": COMMANDS[balance.operation.command],
        "key": balance.operation.key_id,
        "auth_key": balance.operation.auth_key_id,
        "asked": account.asked,
        "answered": account.answered + balance.found,
        "refused": account.refused + balance.given_up,
        "logged": balance.logged,
    }


def _operation(record: Mapping[str, Any]) -> Operation:
    return Operation(_CODES[record["command"]], record["key"], record["auth_key"])


def _account(record: Mapping[str, Any]) -> Account:
    return Account(record["asked"], record["answered"], record["refused"], logged=record["logged"])
