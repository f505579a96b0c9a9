"""The durable copy of a device's log: one JSON object a line, to be read and verified without hsmsign.

A line is an entry, or what the log was reconciled with up to there. An entry that does not follow the one before it
says so in `break`. `raw` is what the device gave; the other fields are for those who read it.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokens.audit import lines
from tokens.audit.log import CAPACITY, Break, Entry, entries_after, find_break

_NO_KEY = 0xFFFF


@dataclass(frozen=True, slots=True)
class Stored:
    """An entry in the store; `index` counts all that the store ever had, from 1."""

    index: int
    entry: Entry
    broken: Break | None
    read: str


@dataclass(frozen=True, slots=True)
class Verified:
    """What `verify` found: the first and the last entry, and those that do not follow the one before, as was noted."""

    first: Stored | None
    last: Stored | None
    breaks: tuple[Stored, ...]

    @property
    def entries(self) -> int:
        """How many entries there are."""
        return self.last.index - self.first.index + 1 if self.first and self.last else 0


class Store:
    """The stored log of one device.

    Arguments:
        path: the file.

    Raises lines.Damaged where its last lines are not what was written, OSError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.reconciled: Mapping[str, Any] | None = None
        """What the log was reconciled with last."""
        self.pending: tuple[Stored, ...] = ()
        """Entries that came after that: a crash kept them from being reconciled."""
        self._recent: deque[Stored] = deque(maxlen=CAPACITY)
        pending = []
        for line in lines.read_backwards(path):
            if "raw" in line:
                stored = _stored(line)
                self._recent.appendleft(stored)
                if self.reconciled is None:
                    pending.append(stored)
            elif self.reconciled is None:
                self.reconciled = line
            if self.reconciled is not None and len(self._recent) == CAPACITY:
                break
        self.pending = tuple(reversed(pending))

    @property
    def last(self) -> Stored | None:
        """The last entry."""
        return self._recent[-1] if self._recent else None

    def new(self, page: tuple[Entry, ...]) -> tuple[Stored, ...]:
        """The entries of a page that are not in the store yet, as they will be there."""
        previous = self.last.entry if self.last else None
        index, read = self.last.index if self.last else 0, lines.now()
        found = []
        for entry in entries_after([stored.entry for stored in self._recent], page):
            index += 1
            found.append(Stored(index, entry, find_break(previous, entry), read))
            previous = entry
        return tuple(found)

    def append(self, entries: Sequence[Stored], reconciled: Mapping[str, Any]) -> None:
        """Puts new entries, and what they were reconciled with, on the disk. Raises OSError."""
        last = entries[-1].index if entries else self.last.index if self.last else 0
        record = {"reconciled": last, "at": lines.now(), **reconciled}
        lines.append(self._path, [*map(_line, entries), record])
        self._recent.extend(entries)
        self.reconciled = record
        self.pending = ()


def verify(path: Path) -> Verified:
    """Verifies a whole stored log. Raises lines.Damaged, which says in which line the first fault is; OSError."""
    first: Stored | None = None
    previous: Stored | None = None
    breaks = []
    for number, line in enumerate(lines.read(path), 1):
        if "raw" not in line:
            if previous and line.get("reconciled") != previous.index:
                raise lines.Damaged(number, "it was reconciled with other entries than stand before it")
            continue
        stored = _stored(line, number)
        if previous:
            if stored.index != previous.index + 1:
                raise lines.Damaged(number, f"{stored.index} is not the index after {previous.index}")
            found = find_break(previous.entry, stored.entry)
            if found != stored.broken:
                raise lines.Damaged(number, f"entry {stored.entry.number}: {found or 'nothing missing'} before it")
        if stored.broken:
            breaks.append(stored)
        first, previous = first or stored, stored
    return Verified(first, previous, tuple(breaks))


def _line(stored: Stored) -> dict[str, Any]:
    entry = stored.entry
    return {
        "index": stored.index,
        "number": entry.number,
        "command": entry.name,
        "session_key": _key(entry.session_key),
        "target_key": _key(entry.target_key),
        "second_key": _key(entry.second_key),
        "result": "success" if entry.succeeded else f"0x{entry.result:02x}",
        "tick": entry.tick,
        "digest": entry.digest.hex(),
        "read": stored.read,
        "raw": entry.raw.hex(),
        **({"break": stored.broken} if stored.broken else {}),
    }


def _key(object_id: int) -> int | None:
    return None if object_id == _NO_KEY else object_id


def _stored(line: lines.Line, number: int = -1) -> Stored:
    """The entry in a line. Raises Damaged where the line's fields are not those of its `raw`."""
    try:
        broken = Break(line["break"]) if "break" in line else None
        stored = Stored(line["index"], Entry.parse(bytes.fromhex(line["raw"])), broken, line["read"])
    except (KeyError, TypeError, ValueError):
        raise lines.Damaged(number, "it is no entry of the log") from None
    if _line(stored) != line:
        raise lines.Damaged(number, "its fields are not those of its raw bytes")
    return stored
