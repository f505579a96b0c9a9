"""A log as a device keeps it, made entry by entry; digests are computed here, not by what is tested."""

import hashlib
import logging
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tokens.audit import Auditor, AuditSettings, LogPage, Operation
from tokens.secret import SecretSource

SERIAL = 12345678
SIGNER = 2
AUDITOR = 3
KEY = 0x0100
ECDSA = Operation(0x56, KEY, SIGNER)


class DeviceLog:
    """A `LogSource` whose entries the test makes."""

    def __init__(self, number: int = 0, digest: bytes = b"\x5a" * 16) -> None:
        self.number = number
        self.digest = digest
        self.entries: list[bytes] = []
        self.unlogged = (0, 0)
        self.advances: list[int] = []
        self.reads = 0

    def add(self, command: int, session: int = SIGNER, target: int = KEY, result: int | None = None) -> None:
        self.number = (self.number + 1) % 65536
        result = command | 0x80 if result is None else result
        self._append(struct.pack(">HBHHHHBI", self.number, command, 34, session, target, 0xFFFF, result, 77))

    def sign(self, count: int = 1, **options: int) -> None:
        for _ in range(count):
            self.add(0x56, **options)

    def reset(self) -> None:
        self.entries.clear()
        self.number, self.digest = 1, b"\xa5" * 16
        self._append(b"\x00\x01" + b"\xff" * 14)

    def _append(self, data: bytes) -> None:
        self.digest = hashlib.sha256(data + self.digest).digest()[:16]
        self.entries.append(data + self.digest)

    async def read(self) -> LogPage:
        self.reads += 1
        return LogPage(*self.unlogged, b"".join(self.entries))

    async def advance(self, number: int) -> None:
        self.advances.append(number)
        numbers = [int.from_bytes(entry[:2], "big") for entry in self.entries]
        del self.entries[: numbers.index(number) + 1]
        self.add(0x67, session=AUDITOR, target=0xFFFF)


def settings(tmp_path: Path, **changes: object) -> AuditSettings:
    return AuditSettings.model_validate(
        {"auth_key_id": AUDITOR, "password": SecretSource(file=tmp_path / "password"), **changes}
    )


@pytest.fixture
def device_log() -> DeviceLog:
    log = DeviceLog()
    log.reset()
    log.add(0x00, session=0xFFFF, target=0, result=0)
    return log


@pytest.fixture
def clock() -> "Clock":
    return Clock()


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Callable[..., Auditor]:
    """Makes an auditor, in the place of the one before as a new process would; not started."""
    made: list[Auditor] = []

    def _make(source: DeviceLog, **changes: object) -> Auditor:
        for auditor in made:
            auditor.ledger.close()  # as the end of its process does
        auditor = Auditor(
            source,
            settings(tmp_path, **changes),
            serial=SERIAL,
            auth_key_id=SIGNER,
            state_directory=tmp_path / "state",
            clock=clock,
        )
        made.append(auditor)
        return auditor

    yield _make
    for auditor in made:
        auditor.ledger.close()


@pytest.fixture
def alarms(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The alarms that were logged since it was called last: their messages."""
    caplog.set_level(logging.WARNING, "tokens.audit")

    def _alarms() -> list[str]:
        said = [record.message for record in caplog.records if record.levelno >= logging.ERROR]
        caplog.clear()
        return said

    return _alarms
