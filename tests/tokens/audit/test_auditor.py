import asyncio
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokens.audit import LogPage, Operation
from tokens.audit.alarms import Alarm, Alarms
from tokens.audit.log import Break
from tokens.audit.store import verify
from tokens.errors import ProviderUnavailable, SigningFailed

SERIAL = 12345678
ECDSA = Operation(0x56, 0x100, 2)


def files(tmp_path: Path) -> Path:
    return tmp_path / "state" / "audit"


def standing(tmp_path: Path) -> tuple[Alarm, ...]:
    return Alarms(files(tmp_path) / f"{SERIAL}.alarms.jsonl", SERIAL).standing()


def kinds(tmp_path: Path) -> list[str]:
    return [alarm.kind for alarm in standing(tmp_path)]


async def sign(auditor, device_log, count: int = 1, *, logged: bool = True) -> None:
    """Signatures as a provider makes them."""
    for _ in range(count):
        async with auditor.gate():
            auditor.ledger.asked(ECDSA)
            if logged:
                device_log.sign()
            auditor.ledger.answered(ECDSA)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)


class Failing:
    """A log that fails, or does something else, at what a test names; else it is the one behind it."""

    def __init__(self, source, **calls) -> None:
        self.source = source
        self.calls = calls

    async def read(self) -> LogPage:
        if call := self.calls.get("read"):
            return await call()
        return await self.source.read()

    async def advance(self, number: int) -> None:
        if call := self.calls.get("advance"):
            return await call(number)
        return await self.source.advance(number)


async def gone(*_: object) -> Any:
    raise ProviderUnavailable("No device.", "Plug it in.")


class TestReconciling:
    async def test_what_was_asked_for_is_in_the_log(self, make, device_log, tmp_path, alarms) -> None:
        auditor = make(device_log)
        await sign(auditor, device_log, 40)
        await auditor.drain()
        await auditor.drain()
        assert alarms() == []
        verified = verify(files(tmp_path) / f"{SERIAL}.jsonl")
        assert verified.breaks == ()
        # of all its entries the device has but the one that says that it forgot the others
        assert [entry[2] for entry in device_log.entries] == [0x67]
        assert verified.entries == device_log.number

    @pytest.mark.parametrize("session", [2, 3, 9])
    async def test_one_signature_more(self, make, device_log, tmp_path, alarms, session: int) -> None:
        auditor = make(device_log)
        await sign(auditor, device_log, 3)
        device_log.sign(session=session)
        await auditor.drain()
        (said,) = alarms()
        kind = "surplus-signature" if session == 2 else "foreign-signature"
        assert f"1 of sign-ecdsa with key 0x0100 by authentication key 0x000{session}" in said
        assert kinds(tmp_path) == [kind]
        with pytest.raises(ProviderUnavailable, match=f"Signing has stopped.*{kind}") as caught:
            await sign(auditor, device_log)
        assert "--accept" in caught.value.hint
        await auditor.drain()
        assert alarms() == []  # once is enough

    async def test_with_another_key(self, make, device_log, tmp_path) -> None:
        auditor = make(device_log)
        await sign(auditor, device_log)
        device_log.sign(target=0x200)
        await auditor.drain()
        assert kinds(tmp_path) == ["surplus-signature"]

    async def test_others_may_be_allowed_to_sign(self, make, device_log, tmp_path) -> None:
        auditor = make(device_log, other_auth_key_ids=[9])
        await auditor.drain()
        device_log.sign(session=9)
        await auditor.drain()
        assert kinds(tmp_path) == []

    async def test_a_signature_that_is_not_in_the_log(self, make, device_log, tmp_path, alarms) -> None:
        auditor = make(device_log)
        await sign(auditor, device_log, 3)
        await sign(auditor, device_log, logged=False)
        await auditor.drain()
        (said,) = alarms()
        assert kinds(tmp_path) == ["missing-signature"]
        assert "none of them at all" not in said

    async def test_a_device_that_logs_no_signatures(self, make, device_log, tmp_path, alarms) -> None:
        auditor = make(device_log)
        await sign(auditor, device_log, logged=False)
        await auditor.drain()
        (said,) = alarms()
        assert kinds(tmp_path) == ["missing-signature"]
        assert "the device does not log that command" in said
        assert "hsmsign yubihsm setup" in said

    async def test_what_was_in_the_log_before(self, make, device_log, tmp_path, caplog) -> None:
        device_log.sign(5)
        device_log.add(0x4F)
        auditor = make(device_log)
        await auditor.drain()
        await sign(auditor, device_log, 2)
        await auditor.drain()
        assert kinds(tmp_path) == []
        assert f"the log of device {SERIAL} is followed from entry 1 on" in caplog.text

    @pytest.mark.parametrize(
        ("command", "kind"), [(0x4F, "options-changed"), (0x4A, "key-exported"), (0x76, "key-exported")]
    )
    async def test_what_else_is_an_alarm(self, make, device_log, tmp_path, command: int, kind: str) -> None:
        auditor = make(device_log)
        await auditor.drain()
        device_log.add(command, session=1, result=0x09)
        await auditor.drain()
        assert kinds(tmp_path) == []
        device_log.add(command, session=1)
        await auditor.drain()
        assert kinds(tmp_path) == [kind]

    @pytest.mark.parametrize(
        ("entry", "said"),
        [
            ((0x58, None), "delete-object on 0x0100 by authentication key 0x0009, entry 4"),
            ((0x00, 0), "boot, entry 4"),
            ((0x04, 0x04), "authenticate-session on 0x0100 by authentication key 0x0009, entry 4, failed"),
        ],
    )
    async def test_what_is_noted(self, make, device_log, tmp_path, caplog, entry, said) -> None:
        auditor = make(device_log)
        await auditor.drain()
        caplog.clear()
        device_log.add(entry[0], session=9, result=entry[1])
        await auditor.drain()
        assert [record.message for record in caplog.records] == [f"device {SERIAL}: {said}"]
        assert kinds(tmp_path) == []

    @pytest.mark.parametrize(("unlogged", "kind"), [((2, 0), "unlogged-boots"), ((0, 1), "unlogged-authentications")])
    async def test_what_the_device_could_not_log(self, make, device_log, tmp_path, alarms, unlogged, kind) -> None:
        auditor = make(device_log)
        await auditor.drain()
        device_log.unlogged = unlogged
        await auditor.drain()
        (said,) = alarms()
        assert f"and {sum(unlogged)} " in said
        await auditor.drain()
        assert kinds(tmp_path) == [kind]

    async def test_an_alarm_after_a_loss_of_power_says_so(
        self, make, device_log, monkeypatch, tmp_path, alarms
    ) -> None:
        await sign(make(device_log), device_log)
        boot_id = tmp_path / "boot_id"
        boot_id.write_text("another")
        auditor = make(device_log)
        await auditor.drain()
        await sign(auditor, device_log)
        (files(tmp_path) / f"{SERIAL}.counts").unlink()  # it never came to the disk
        monkeypatch.setattr("tokens.audit.auditor._BOOT_ID", boot_id)
        await make(device_log).drain()
        (said,) = alarms()
        assert "This host was started anew meanwhile; if it lost power" in said


class TestBreaks:
    async def test_a_gap(self, make, device_log, tmp_path, alarms) -> None:
        auditor = make(device_log)
        await sign(auditor, device_log, 10)
        del device_log.entries[:5]
        await auditor.drain()
        assert kinds(tmp_path) == ["gap"]  # and no missing signatures besides
        assert "before number 8" in alarms()[0]
        (broken,) = verify(files(tmp_path) / f"{SERIAL}.jsonl").breaks
        assert broken.broken is Break.GAP

    async def test_a_reset(self, make, device_log, tmp_path) -> None:
        auditor = make(device_log)
        await sign(auditor, device_log, 10)
        device_log.reset()
        await auditor.drain()
        assert kinds(tmp_path) == ["reset"]

    @pytest.mark.parametrize(
        ("position", "said"),
        [
            (2 * 32 + 4, ["broken-chain"]),  # in the data of an entry
            (3 * 32 - 1, ["broken-chain"] * 2),  # in its digest: the next does not fit either
            (0, ["gap"] * 2),  # in the number of the first
        ],
    )
    async def test_a_broken_chain(self, make, device_log, tmp_path, position: int, said: list[str]) -> None:
        auditor = make(device_log)
        await auditor.drain()
        await sign(auditor, device_log, 4)

        async def corrupted() -> LogPage:
            page = await device_log.read()
            entries = bytearray(page.entries)
            entries[position] ^= 1
            return LogPage(0, 0, bytes(entries))

        auditor._source = Failing(device_log, read=corrupted, advance=gone)
        with pytest.raises(ProviderUnavailable):
            await auditor.drain()
        assert kinds(tmp_path) == said
        before = standing(tmp_path)
        with pytest.raises(ProviderUnavailable):
            await auditor.drain()
        assert standing(tmp_path) == before  # the same page raises nothing again

    async def test_numbers_begin_anew(self, make, device_log, tmp_path) -> None:
        device_log = type(device_log)(65520)
        auditor = make(device_log)
        await auditor.drain()
        for _ in range(3):
            await sign(auditor, device_log, 20)
            await auditor.drain()
        assert kinds(tmp_path) == []
        assert device_log.number < 100
        assert verify(files(tmp_path) / f"{SERIAL}.jsonl").breaks == ()

    async def test_no_log_at_all(self, make, device_log) -> None:
        async def nonsense() -> LogPage:
            return LogPage(0, 0, b"nonsense")

        with pytest.raises(SigningFailed, match="no log"):
            await make(Failing(device_log, read=nonsense)).drain()


class TestCrash:
    async def test_between_keeping_and_advancing(self, make, device_log, tmp_path, alarms) -> None:
        auditor = make(Failing(device_log, advance=gone))
        with pytest.raises(ProviderUnavailable):
            await sign(auditor, device_log)
        auditor = make(device_log)
        await sign(auditor, device_log, 5)
        auditor._source = Failing(device_log, advance=gone)
        with pytest.raises(ProviderUnavailable):
            await auditor.drain()
        auditor = make(device_log)
        await auditor.drain()
        assert kinds(tmp_path) == []
        assert verify(files(tmp_path) / f"{SERIAL}.jsonl").entries == device_log.number - len(device_log.entries)

    @pytest.mark.parametrize("cut", [1, 200, 500])
    async def test_in_the_middle_of_keeping(self, make, device_log, tmp_path, cut: int) -> None:
        auditor = make(device_log)
        await auditor.drain()
        auditor._source = Failing(device_log, advance=gone)
        await sign(auditor, device_log, 5)
        device_log.sign()
        with pytest.raises(ProviderUnavailable):
            await auditor.drain()
        store = files(tmp_path) / f"{SERIAL}.jsonl"
        os.truncate(store, store.stat().st_size - cut)
        await make(device_log).drain()
        assert kinds(tmp_path) == ["surplus-signature", "surplus-signature"]  # said again, rather than not at all
        assert verify(store).breaks == ()

    @pytest.mark.parametrize("signed", [True, False])
    async def test_with_signatures_in_flight(self, make, device_log, tmp_path, clock, signed: bool) -> None:
        auditor = make(device_log)
        await sign(auditor, device_log, 3)
        auditor.ledger.asked(ECDSA)  # and the service is gone
        if signed:
            device_log.sign()
        auditor = make(device_log)
        await auditor.drain()
        assert kinds(tmp_path) == []
        clock.now += 60
        await auditor.drain()
        device_log.sign()
        await auditor.drain()
        assert kinds(tmp_path) == ["surplus-signature"]

    async def test_alarms_stand_over_a_restart_until_they_are_accepted(
        self, make, device_log, tmp_path, alarms
    ) -> None:
        auditor = make(device_log)
        await auditor.drain()
        device_log.sign()
        await auditor.drain()
        alarms()
        auditor = make(device_log)
        with pytest.raises(ProviderUnavailable, match="Signing has stopped"):
            await auditor.check()
        assert "stands" in alarms()[0]
        (alarm,) = standing(tmp_path)
        Alarms(files(tmp_path) / f"{SERIAL}.alarms.jsonl", SERIAL).accept(alarm, "tester")  # another process
        await sign(auditor, device_log)
        await auditor.check()

    async def test_a_warning_stops_nothing(self, make, device_log, tmp_path, alarms) -> None:
        auditor = make(device_log, on_alarm="warn")
        await auditor.drain()
        device_log.sign()
        await auditor.drain()
        assert len(alarms()) == 1
        await sign(auditor, device_log)
        await auditor.check()

    async def test_a_damaged_store_stops_signing(self, make, device_log, tmp_path) -> None:
        await make(device_log).drain()
        with (files(tmp_path) / f"{SERIAL}.jsonl").open("a") as file:
            file.write("nonsense\n")
        with pytest.raises(ProviderUnavailable, match="cannot be read or written") as caught:
            await sign(make(device_log), device_log)
        assert str(tmp_path) not in caught.value.message + caught.value.hint

    @pytest.mark.parametrize("damage", [{}, {"accounts": [{"command": "sign-it"}]}, {"accounts": 3}])
    async def test_so_does_one_whose_counts_are_none(self, make, device_log, tmp_path, damage) -> None:
        await make(device_log).drain()
        with (files(tmp_path) / f"{SERIAL}.jsonl").open("a") as file:
            file.write(json.dumps({"reconciled": 2, "boot_id": "x", **damage}) + "\n")
        with pytest.raises(ProviderUnavailable, match="cannot be read or written"):
            await sign(make(device_log), device_log)

    async def test_damaged_alarms_stop_signing(self, make, device_log, tmp_path) -> None:
        auditor = make(device_log)
        await auditor.drain()
        (files(tmp_path) / f"{SERIAL}.alarms.jsonl").write_text("nonsense\n")
        with pytest.raises(ProviderUnavailable, match="cannot be read or written"):
            await sign(auditor, device_log)

    async def test_two_processes(self, make, device_log, tmp_path) -> None:
        first = make(device_log)
        await first.drain()
        second = make(device_log)  # which closes the first's file
        await first.check()
        with pytest.raises(ProviderUnavailable, match="Another process audits this device"):
            await sign(second, device_log)
        await second.check()
        device_log.sign()
        await first.drain()
        with pytest.raises(ProviderUnavailable, match="Signing has stopped"):
            await second.check()


class TestGate:
    async def test_the_first_signature_waits_for_the_first_drain(self, make, device_log) -> None:
        auditor = make(Failing(device_log, read=gone))
        with pytest.raises(ProviderUnavailable, match="No device"):
            await sign(auditor, device_log)

    async def test_the_log_never_overflows(self, make, device_log) -> None:
        auditor = make(device_log)
        most = 0
        for _ in range(300):
            await sign(auditor, device_log)
            most = max(most, len(device_log.entries))
        assert most <= 62
        assert device_log.reads < 20

    async def test_not_even_with_a_hundred_at_once(self, make, device_log, tmp_path) -> None:
        auditor = make(device_log, interval_s=0.05)
        auditor.start()
        device = asyncio.Semaphore(2)
        most = 0

        async def one() -> None:
            nonlocal most
            async with auditor.gate(), device:
                auditor.ledger.asked(ECDSA)
                await asyncio.sleep(0)
                device_log.sign()
                most = max(most, len(device_log.entries))
                await asyncio.sleep(0)
                auditor.ledger.answered(ECDSA)

        await asyncio.gather(*(one() for _ in range(300)))
        await auditor.stop()
        assert most <= 62
        assert kinds(tmp_path) == []
        assert auditor.ledger.answers() == {ECDSA: (300, 300)}
        assert [entry[2] for entry in device_log.entries] == [0x67]

    async def test_a_tool_finds_the_room_that_it_needs(self, make, device_log) -> None:
        auditor = make(device_log)
        await sign(auditor, device_log, 30)
        await auditor.ready(10)
        assert len(device_log.entries) > 30
        await auditor.ready(40)
        assert len(device_log.entries) == 1
        await auditor.ready(1000)  # more than there ever is

    async def test_a_log_that_cannot_be_drained_stops_signing_before_it_is_full(self, make, device_log) -> None:
        auditor = make(device_log)
        await auditor.drain()
        auditor._source = Failing(device_log, read=gone)
        with pytest.raises(ProviderUnavailable, match="No device"):
            await sign(auditor, device_log, 100)
        assert 50 <= len(device_log.entries) <= 62
        auditor._source = device_log
        await sign(auditor, device_log, 100)

    async def test_an_error_in_a_signature_is_no_matter(self, make, device_log) -> None:
        auditor = make(device_log)
        for _ in range(100):
            with pytest.raises(SigningFailed):
                async with auditor.gate():
                    raise SigningFailed("It failed.")
        await sign(auditor, device_log)

    async def test_drains_at_once_are_one(self, make, device_log) -> None:
        auditor = make(device_log)
        await asyncio.gather(*(auditor.drain() for _ in range(10)))
        assert device_log.reads == 1


class TestLoop:
    async def test_it_drains_while_signatures_are_made(self, make, device_log) -> None:
        auditor = make(device_log, interval_s=0.01)
        auditor.start()
        await sign(auditor, device_log, 3)
        await until(lambda: len(device_log.entries) == 1)
        reads = device_log.reads
        await asyncio.sleep(0.1)
        assert device_log.reads == reads  # nothing is signed, and the clock stands still
        await auditor.stop()

    async def test_it_drains_at_once_where_half_of_the_log_is_used(self, make, device_log) -> None:
        auditor = make(device_log, interval_s=1000, idle_interval_s=1000)
        auditor.start()
        await auditor.check()
        await sign(auditor, device_log, 30)
        await until(lambda: len(device_log.entries) == 1)
        await auditor.stop()

    async def test_and_now_and_then_while_none_are(self, make, device_log, clock) -> None:
        auditor = make(device_log, interval_s=0.01)
        auditor.start()
        await auditor.check()
        clock.now += 60
        reads = device_log.reads
        await until(lambda: device_log.reads > reads)
        await auditor.stop()

    async def test_a_device_that_is_away_is_waited_for(self, make, device_log, tmp_path, caplog) -> None:
        caplog.set_level(logging.WARNING)
        source = Failing(device_log, read=gone)
        auditor = make(source, interval_s=0.01)
        auditor.start()
        await asyncio.sleep(0.1)
        assert caplog.text.count("is not drained: No device. Plug it in.") == 1
        source.calls.clear()
        await until(lambda: device_log.advances)
        await auditor.stop()

    async def test_stop_drains_once_more(self, make, device_log, tmp_path) -> None:
        auditor = make(device_log)
        auditor.start()
        await sign(auditor, device_log, 3)
        await auditor.stop()
        assert len(device_log.entries) == 1
        last = json.loads((files(tmp_path) / f"{SERIAL}.jsonl").read_text().splitlines()[-1])
        assert last["accounts"][0]["logged"] == 3
        assert len(asyncio.all_tasks()) == 1

    async def test_stop_while_it_is_woken(self, make, device_log) -> None:
        auditor = make(device_log, drain_at_entries=1)
        auditor.start()
        await auditor.check()
        await asyncio.sleep(0)
        async with asyncio.timeout(30):
            await sign(auditor, device_log)  # wakes it, and nothing runs before it is stopped
            await auditor.stop()
        assert len(device_log.entries) == 1
