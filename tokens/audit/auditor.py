"""Follows the log of one device: reads it, verifies it, keeps it, reconciles it, and then frees the device of it.

    auditor = Auditor(source, settings, serial=12345678, auth_key_id=2, state_directory=state)
    auditor.start()
    async with auditor.gate():             # room in the log, no alarm
        auditor.ledger.asked(operation)    # as it is sent to the device
        ...
        auditor.ledger.answered(operation)
    await auditor.stop()

What is read is on the disk, with the alarms that it raises, before the device is told to forget it: a crash at any
moment leads to entries that are read twice, and are kept once.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tokens.audit import findings, lines
from tokens.audit.alarms import ADVICE, Alarms, Kind
from tokens.audit.ledger import Balance, HeldElsewhere, Ledger
from tokens.audit.log import CAPACITY, GET_LOG_ENTRIES, SET_LOG_INDEX, Entry, LogPage, LogSource, parse_entries
from tokens.audit.settings import AuditSettings
from tokens.audit.store import Store, Stored
from tokens.errors import Error, ProviderUnavailable, SigningFailed

log = logging.getLogger(__name__)

_ROOM = CAPACITY - 7  # 7 entries for what others log, and for signatures that are tried a second time
_ALARM_RETRY_AFTER_S = 60
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Auditor:
    """The audit of one device.

    Arguments:
        source: the device's log.
        settings: `[providers.NAME.audit]`.
        serial: the device's.
        auth_key_id: the authentication key in whose sessions the service signs.
        state_directory: outlives the service; the audit's files are in `audit/` there.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        source: LogSource,
        settings: AuditSettings,
        *,
        serial: int,
        auth_key_id: int,
        state_directory: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.serial = serial
        self._source = source
        self._settings = settings
        self._auth_key_id = auth_key_id
        self._clock = clock
        files = state_directory / "audit"
        self._store_path = files / f"{serial}.jsonl"
        self._store: Store | None = None
        self._alarms = Alarms(files / f"{serial}.alarms.jsonl", serial)
        self.ledger = Ledger(files / f"{serial}.counts", settings.uncertain_s, clock)
        self._rebooted = False
        self._drained_at: float | None = None
        self._trouble: Error | None = None
        self._used = 0  # entries on the device after the last drain
        self._ended = 0  # signatures that ended since
        self._running = 0
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._drain_task: asyncio.Task[None] | None = None
        self._loop_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to drain. A device that is absent is a state that `check` reports."""
        self._loop_task = asyncio.create_task(self._keep_draining(), name=f"audit of {self.serial}")

    async def stop(self) -> None:
        """Drains a last time, where the device is there, and lets go of the files."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.wait([self._loop_task, *([self._drain_task] if self._drain_task else [])])
            await self._try_to_drain()
        self.ledger.close()

    async def check(self) -> None:
        """Raises the ProviderProblem that a signature would meet now, but where another process does the audit."""
        try:
            self.ledger.hold()
        except HeldElsewhere:
            self._refuse_in_alarm()
        except OSError as error:
            raise _unusable(self.serial, error) from None
        else:
            await self.ready()

    async def ready(self, signatures: int = 1) -> None:
        """Waits until the device's log has room for so many signatures, or for as many as it ever has.

        Raises:
            ProviderUnavailable: an alarm stands and the settings say stop, or the log stays full.
            ProviderProblem: the log could not be read, and had to be.
        """
        if self._drained_at is None:
            await self.drain()
        while not self._has_room(signatures):
            if self._running:  # what runs ends, and the loop then drains
                await self._changed.wait()
                continue
            await self.drain()
            if not self._has_room(signatures) and not self._running:
                raise ProviderUnavailable(
                    "The device's log has no room for another signature.",
                    "Find out which other program fills it, and wait.",
                )
        self._refuse_in_alarm()

    @asynccontextmanager
    async def gate(self) -> AsyncIterator[None]:
        """Holds a place in the device's log for one signature while it is made. Raises as `ready`."""
        await self.ready()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._ended += 1
            if self._used + self._ended >= self._settings.drain_at_entries:
                self._wake.set()
            self._notify()

    async def drain(self) -> None:
        """Reads, verifies, keeps, reconciles and then removes what the device's log holds.

        One at a time: who comes while it runs waits for that one. Raises ProviderProblem.
        """
        if self._drain_task is None:
            self._drain_task = asyncio.create_task(self._drain(), name=f"drain of {self.serial}")
            self._drain_task.add_done_callback(self._drain_ended)
        await asyncio.shield(self._drain_task)

    def _drain_ended(self, task: "asyncio.Task[None]") -> None:
        self._drain_task = None
        if not task.cancelled():
            task.exception()  # it belongs to those who wait, and there may be none left
        self._notify()

    async def _keep_draining(self) -> None:
        while True:
            self._wake.clear()  # before it drains: what ends during that may want another
            idle = not (self._running or self._ended)
            due = self._drained_at is None or self._clock() - self._drained_at >= self._settings.idle_interval_s
            if due or not idle:
                await self._try_to_drain()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.interval_s):
                    await self._wake.wait()

    async def _try_to_drain(self) -> None:
        try:
            await self.drain()
        except Error as error:
            if self._trouble is None or self._trouble.message != error.message:
                log.warning("the log of device %d is not drained: %s %s", self.serial, error.message, error.hint)
            self._trouble = error
        else:
            self._trouble = None

    async def _drain(self) -> None:
        try:
            store = self._store or self._open()
            await self._follow(store)
        except (OSError, lines.Damaged) as error:
            raise _unusable(self.serial, error) from None

    def _open(self) -> Store:
        """Takes up the audit where it was left. Raises ProviderUnavailable, OSError, lines.Damaged."""
        self.ledger.hold()
        store = Store(self._store_path)
        kept = store.reconciled or {"accounts": [], "boot_id": _boot_id()}
        try:
            self.ledger.load(kept["accounts"])
            self._rebooted = kept["boot_id"] != _boot_id()
        except (KeyError, TypeError):
            raise lines.Damaged(-1, "it is no reconciliation") from None
        for alarm in self._alarms.standing():
            log.error("alarm %s stands: %s %s", alarm.id, alarm.message, ADVICE[alarm.kind])
        self._store = store
        return store

    async def _follow(self, store: Store) -> None:
        """One drain."""
        answers, ended = self.ledger.answers(), self._ended
        page = await self._source.read()
        try:
            entries = parse_entries(page.entries)
        except ValueError:
            hint = "Try again; if it stays, look at the device."
            raise SigningFailed("The device's answer is no log.", hint) from None
        new = store.new(entries)
        unseen = (*store.pending, *new)
        signed = Counter(findings.operation(stored.entry) for stored in unseen if self._is_own_signature(stored.entry))
        complete = not any(stored.broken for stored in unseen)
        balances = self.ledger.balance(answers, signed, complete=complete)
        reconciled = {
            "unlogged_boots": page.unlogged_boots,
            "unlogged_authentications": page.unlogged_authentications,
            "accounts": self.ledger.records(balances),
            "boot_id": _boot_id(),
        }
        await asyncio.to_thread(self._keep, store, new, reconciled, self._findings(store, page, unseen, balances))
        self.ledger.settle(balances)
        if not all(self._is_housekeeping(entry) for entry in entries):
            await self._source.advance(entries[-1].number)
            entries = entries[-1:]  # as many as there are now, where the device logs that it forgot the others
        self._used = len(entries)
        self._ended -= ended
        self._rebooted = False
        self._drained_at = self._clock()

    def _findings(
        self, store: Store, page: LogPage, unseen: Sequence[Stored], balances: Sequence[Balance]
    ) -> list[tuple[Kind, str]]:
        """What there is to raise alarms about; nothing at a first look. Notes what is none."""
        if store.reconciled is None:
            first = f"from entry {unseen[0].entry.number} on" if unseen else "from now on"
            log.warning("the log of device %d is followed %s", self.serial, first)
            return []
        for note in findings.notes(unseen, self._auth_key_id):
            log.warning("device %d: %s", self.serial, note)
        return [
            *findings.unlogged(page, store.reconciled),
            *findings.in_entries(unseen, self._auth_key_id, self._settings.other_auth_key_ids),
            *findings.in_balances(balances, rebooted=self._rebooted),
        ]

    def _keep(
        self, store: Store, new: Sequence[Stored], reconciled: dict[str, Any], found: Sequence[tuple[Kind, str]]
    ) -> None:
        """Puts it all on the disk: the alarms first, so that a crash in between repeats them and forgets none."""
        for alarm in self._alarms.raise_(found):
            log.error("alarm %s: %s %s", alarm.id, alarm.message, ADVICE[alarm.kind])
        kept = store.reconciled
        if new or store.pending or kept is None or not reconciled.items() <= kept.items():
            store.append(new, reconciled)

    def _is_own_signature(self, entry: Entry) -> bool:
        return entry.is_signature and entry.session_key == self._auth_key_id

    def _is_housekeeping(self, entry: Entry) -> bool:
        """Whether a drain itself left this entry: were it removed, the next drain would find another."""
        return entry.command in (GET_LOG_ENTRIES, SET_LOG_INDEX) and entry.session_key == self._settings.auth_key_id

    def _has_room(self, signatures: int) -> bool:
        return self._used + self._ended + self._running + min(signatures, _ROOM - 1) <= _ROOM

    def _refuse_in_alarm(self) -> None:
        """Raises ProviderUnavailable where an alarm stands and the settings say stop."""
        if self._settings.on_alarm == "warn":
            return
        try:
            standing = self._alarms.standing()
        except (OSError, lines.Damaged) as error:
            raise _unusable(self.serial, error) from None
        if standing:
            kinds = ", ".join(sorted({alarm.kind for alarm in standing}))
            raise ProviderUnavailable(
                f"Signing has stopped: the audit of the device raised an alarm ({kinds}).",
                "The operator finds out why, and accepts the alarm by `hsmsign yubihsm audit --accept`.",
                retry_after=_ALARM_RETRY_AFTER_S,
            )

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _unusable(serial: int, error: Exception) -> ProviderUnavailable:
    log.error("the audit of device %d cannot be kept: %s", serial, error)
    return ProviderUnavailable(
        "The audit of the device's log cannot be read or written.",
        "Look for the reason in the log, and at what `hsmsign yubihsm audit --verify` says.",
    )


def _boot_id() -> str:
    """Tells one start of this host from another."""
    return _BOOT_ID.read_text().strip()
