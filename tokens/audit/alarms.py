"""Alarms about one device: each stands, over restarts too, until a person accepts it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from tokens.audit import lines


class Kind(StrEnum):
    """What was seen."""

    SURPLUS_SIGNATURE = "surplus-signature"
    MISSING_SIGNATURE = "missing-signature"
    FOREIGN_SIGNATURE = "foreign-signature"
    BROKEN_CHAIN = "broken-chain"
    GAP = "gap"
    RESET = "reset"
    UNLOGGED_BOOTS = "unlogged-boots"
    UNLOGGED_AUTHENTICATIONS = "unlogged-authentications"
    OPTIONS_CHANGED = "options-changed"
    KEY_EXPORTED = "key-exported"


_KINDS = frozenset(Kind)

ADVICE = {
    Kind.SURPLUS_SIGNATURE: "Somebody else may have the service's credential: find out who signed, and change it.",
    Kind.MISSING_SIGNATURE: "See that the device logs signatures (`hsmsign yubihsm setup` has it do so).",
    Kind.FOREIGN_SIGNATURE: "Find out whose authentication key it is; `other_auth_key_ids` names those that may sign.",
    Kind.BROKEN_CHAIN: "Keep the device and the stored log as they are, and find out which of them was changed.",
    Kind.GAP: "What was lost is not known: have the log drained more often, and see that nobody else advances it.",
    Kind.RESET: "Find out who reset the device; its keys are gone.",
    Kind.UNLOGGED_BOOTS: "The device was started while its log was full: find out what filled it.",
    Kind.UNLOGGED_AUTHENTICATIONS: "Sessions were opened while the device's log was full: find out whose.",
    Kind.OPTIONS_CHANGED: "See that the device still logs signatures (`hsmsign yubihsm setup` has it do so).",
    Kind.KEY_EXPORTED: "Find out who has the key and the wrap key: what is signed elsewhere is never seen here.",
}
"""What a person does about it before accepting it."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """One alarm; `at` and `accepted` are times in UTC, `id` names it to those who accept it."""

    id: str
    kind: Kind
    message: str
    at: str
    accepted: str | None = None
    accepted_by: str | None = None


class Alarms:
    """The alarms of one device, in a file that `hsmsign yubihsm audit --accept` writes to as well.

    Arguments:
        path: the file; lines that raise an alarm, and lines that accept one.
        serial: the device's.
    """

    def __init__(self, path: Path, serial: int) -> None:
        self._path = path
        self._serial = serial
        self._size = 0
        self._alarms: dict[str, Alarm] = {}

    def all(self) -> tuple[Alarm, ...]:
        """Every alarm, the oldest first; looks whether the file has grown. Raises lines.Damaged, OSError."""
        size = self._path.stat().st_size if self._path.exists() else 0
        if size != self._size:
            alarms: dict[str, Alarm] = {}  # another thread may look at the old ones
            for number, line in enumerate(lines.read(self._path), 1):
                _take(alarms, number, line)
            self._alarms, self._size = alarms, size
        return tuple(self._alarms.values())

    def standing(self) -> tuple[Alarm, ...]:
        """Those that nobody has accepted. Raises as `all`."""
        return tuple(alarm for alarm in self.all() if alarm.accepted is None)

    def raise_(self, found: Iterable[tuple[Kind, str]]) -> tuple[Alarm, ...]:
        """Writes new alarms to the disk. Raises OSError."""
        first = len(self.all()) + 1
        raised = tuple(
            Alarm(f"{self._serial}-{number}", kind, message, lines.now())
            for number, (kind, message) in enumerate(found, first)
        )
        if raised:
            lines.append(
                self._path,
                [{"alarm": alarm.id, "kind": alarm.kind, "message": alarm.message, "at": alarm.at} for alarm in raised],
            )
        return raised

    def accept(self, alarm: Alarm, by: str) -> None:
        """Notes that a person accepts an alarm. Raises OSError."""
        lines.append(self._path, [{"accepted": alarm.id, "at": lines.now(), "by": by}])


def _take(alarms: dict[str, Alarm], number: int, line: lines.Line) -> None:
    match line:
        case {"alarm": str(id_), "kind": str(kind), "message": str(message), "at": str(at)} if kind in _KINDS:
            alarms[id_] = Alarm(id_, Kind(kind), message, at)
        case {"accepted": str(id_), "at": str(at), "by": str(by)} if id_ in alarms:
            alarms[id_] = replace(alarms[id_], accepted=at, accepted_by=by)
        case _:
            raise lines.Damaged(number, "it neither raises nor accepts an alarm")
