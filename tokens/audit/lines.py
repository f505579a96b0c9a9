"""Append-only files of JSON lines: what was appended is on the disk, and a line that a crash cut off is dropped."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]

_TAIL_BYTES = 1 << 16


class Damaged(Exception):
    """A line is not what was written there; `number` counts from 1, from the end where it is negative."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"line {number}: {reason}")
        self.number = number
        self.reason = reason


def append(path: Path, lines: Iterable[Line]) -> None:
    """Appends the lines and waits until they are on the disk. Raises OSError.

    Makes the file (mode 0600) and its directory (0700). Several processes may append to one file.
    """
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a+b", buffering=0, opener=_private) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = _whole_lines(file.fileno())
        os.ftruncate(file.fileno(), end)
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:  # no room: no half of it may stay
            os.ftruncate(file.fileno(), end)
            raise
    if new:
        _sync_directory(path.parent)


def read(path: Path) -> Iterator[Line]:
    """All lines, the oldest first; none where there is no file. Raises Damaged, OSError."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):  # else: it is being written, or was cut off
                yield _parse(number, line)


def read_backwards(path: Path) -> Iterator[Line]:
    """All lines, the newest first; reads only as much of the file as is asked for. Raises Damaged, OSError."""
    if not path.exists():
        return
    with path.open("rb") as file:
        end, number = _whole_lines(file.fileno()), 0
        rest = b""
        while end:
            start = max(0, end - _TAIL_BYTES)
            block = os.pread(file.fileno(), end - start, start) + rest
            rest, *lines = block.splitlines(keepends=True) if start else (b"", *block.splitlines(keepends=True))
            for line in reversed(lines):
                number -= 1
                yield _parse(number, line)
            end = start


def now() -> str:
    """The time in UTC, as RFC 3339 writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _whole_lines(descriptor: int) -> int:
    """How many bytes of the file are whole lines."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - _TAIL_BYTES)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _parse(number: int, line: bytes) -> Line:
    try:
        parsed = json.loads(line)
    except ValueError:
        raise Damaged(number, "it is not JSON") from None
    if not isinstance(parsed, dict):
        raise Damaged(number, "it is not a JSON object")
    return parsed


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
