"""What new entries of a device's log, and the balance with what the service asked for, mean: alarms and notes."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokens.audit.alarms import Kind
from tokens.audit.ledger import Balance, Operation
from tokens.audit.log import BOOT, SET_OPTION, SIGNATURES, Break, Entry, LogPage
from tokens.audit.store import Stored

_EXPORTS = frozenset({0x4A, 0x74, 0x76})
_CHANGES = frozenset(
    {BOOT, 0x08, 0x42, 0x44, 0x45, 0x46, 0x4B, 0x4C, 0x52, 0x58, 0x5A, 0x5B, 0x5E, 0x65, 0x66}
    | {0x6C, 0x6D, 0x6E, 0x73, 0x75, 0x77}
)
_BREAKS = {
    Break.GAP: (Kind.GAP, "The device's log lacks entries before number {}."),
    Break.BROKEN_CHAIN: (Kind.BROKEN_CHAIN, "The hash chain of the device's log is broken before entry number {}."),
    Break.RESET: (Kind.RESET, "The device was reset: its log begins anew with entry number {}."),
}


def unlogged(page: LogPage, kept: Mapping[str, Any]) -> Iterator[tuple[Kind, str]]:
    """Alarms about what the device could not log since the counters in `kept`."""
    for kind, what, before, count in (
        (Kind.UNLOGGED_BOOTS, "starts", kept.get("unlogged_boots", 0), page.unlogged_boots),
        (
            Kind.UNLOGGED_AUTHENTICATIONS,
            "authentications",
            kept.get("unlogged_authentications", 0),
            page.unlogged_authentications,
        ),
    ):
        if count not in (0, before):  # it may have begun to count anew meanwhile
            yield (
                kind,
                f"The device's log was full, and {count - before if count > before else count} {what} are not in it.",
            )


def in_entries(entries: Iterable[Stored], auth_key_id: int, others: frozenset[int]) -> Iterator[tuple[Kind, str]]:
    """Alarms about single entries.

    Arguments:
        entries: those that are new.
        auth_key_id: the service's authentication key.
        others: authentication keys that may sign besides.
    """
    foreign: Counter[Operation] = Counter()
    for stored in entries:
        entry = stored.entry
        if stored.broken:
            kind, message = _BREAKS[stored.broken]
            yield kind, message.format(entry.number)
        if entry.is_signature and entry.session_key not in others | {auth_key_id}:
            foreign[operation(entry)] += 1
        elif entry.command == SET_OPTION and entry.succeeded:
            yield Kind.OPTIONS_CHANGED, f"An option of the device was set: {_describe(entry)}."
        elif entry.command in _EXPORTS and entry.succeeded:
            yield Kind.KEY_EXPORTED, f"A key left the device: {_describe(entry)}."
    for signed, count in foreign.items():
        yield Kind.FOREIGN_SIGNATURE, f"Signatures that are not the service's: {count} of {signed}."


def in_balances(balances: Iterable[Balance], *, rebooted: bool) -> Iterator[tuple[Kind, str]]:
    """Alarms about signatures that one of the two sides does not know.

    `rebooted`: the host was started since the log was last reconciled, so that counts may have been lost.
    """
    for balance in balances:
        if balance.surplus:
            message = (
                f"The device made more signatures than the service asked for: {balance.surplus} of {balance.operation}."
            )
            if rebooted:
                message += " This host was started anew meanwhile; if it lost power, they may be the service's own."
            yield Kind.SURPLUS_SIGNATURE, message
        if balance.missing:
            message = (
                f"The device's log lacks signatures that the service got: {balance.missing} of {balance.operation}."
            )
            if balance.logged == balance.missing:
                message += " It has none of them at all: the device does not log that command."
            yield Kind.MISSING_SIGNATURE, message


def notes(entries: Sequence[Stored], auth_key_id: int) -> Iterator[str]:
    """What is to be seen in the service's log, and is no alarm: changes of what the device holds, and what failed."""
    for stored in entries:
        entry = stored.entry
        own_signature = entry.command in SIGNATURES and entry.session_key == auth_key_id
        if entry.is_first or own_signature:
            continue
        if entry.command in _CHANGES:
            yield _describe(entry)
        elif not entry.succeeded:
            yield f"{_describe(entry)}, failed"


def operation(entry: Entry) -> Operation:
    """What an entry counts as."""
    return Operation(entry.command, entry.target_key, entry.session_key)


def _describe(entry: Entry) -> str:
    if entry.command == BOOT:
        return f"{entry.name}, entry {entry.number}"
    who = f"authentication key 0x{entry.session_key:04x}"
    return f"{entry.name} on 0x{entry.target_key:04x} by {who}, entry {entry.number}"
