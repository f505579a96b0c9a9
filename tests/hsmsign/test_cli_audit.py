import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hsmsign.cli import main
from tokens.audit.alarms import Alarms, Kind
from tokens.audit.log import Entry
from tokens.audit.store import Store

ACCOUNT = {"command": "sign-ecdsa", "key": 256, "auth_key": 2, "asked": 3, "answered": 2, "refused": 1, "logged": 2}
RECONCILED = {"unlogged_boots": 0, "unlogged_authentications": 0, "accounts": [ACCOUNT], "boot_id": "x"}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with the logs of two devices, and three alarms."""
    for serial in (7, 12345678):
        store = Store(tmp_path / "audit" / f"{serial}.jsonl")
        page: list[Entry] = []
        for number in range(1, 6):
            entry = Entry(number, 0x56, 34, 2, 256, 0xFFFF, 0xD6, 77, bytes(16))
            digest = entry.digest_after(page[-1].digest if page else bytes(16))
            page.append(Entry.parse(entry.raw[:16] + digest))
        store.append(store.new(tuple(page)), RECONCILED)
    Alarms(tmp_path / "audit/7.alarms.jsonl", 7).raise_([(Kind.GAP, "Entries lack."), (Kind.RESET, "It was reset.")])
    Alarms(tmp_path / "audit/12345678.alarms.jsonl", 12345678).raise_([(Kind.SURPLUS_SIGNATURE, "One too many.")])
    return tmp_path


@pytest.fixture
def audit(state: Path) -> Callable[..., Result]:
    def _audit(*arguments: str) -> Result:
        env = {"HSMSIGN_SERVER__STATE_DIRECTORY": str(state)}
        return CliRunner().invoke(main, ["yubihsm", "audit", *arguments], env=env)

    return _audit


def test_what_is_shown(audit, state: Path) -> None:
    shown = audit()
    assert shown.exit_code == 0
    first, second = shown.output.split("\n\n")
    assert first.startswith(f"device 7: {state}/audit/7.jsonl\n  last entry: 5 sign-ecdsa, read 20")
    assert (
        "  sign-ecdsa with key 0x0100 by authentication key 0x0002: 3 asked for, 2 answered, 1 refused, 2 in the log\n"
        in second
    )
    assert "alarm 12345678-1, surplus-signature, " in second
    assert ", STANDS\n    One too many.\n    Somebody else may have the service's credential" in second
    assert "verified" not in shown.output


def test_verify(audit) -> None:
    shown = audit("--verify")
    assert shown.exit_code == 0
    assert shown.output.count("verified: 5 entries, 0 breaks in the chain") == 2


def test_verify_fails_where_an_entry_was_changed(audit, state: Path) -> None:
    path = state / "audit/7.jsonl"
    path.write_text(path.read_text().replace("000356", "000347"))
    shown = audit("--verify")
    assert shown.exit_code == 1
    assert "DAMAGED: line 3: " in shown.output
    assert "verified: 5 entries" in shown.output  # the other device
    assert "alarm 7-1" in shown.output


def test_verify_fails_where_an_entry_was_taken_out(audit, state: Path) -> None:
    path = state / "audit/7.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[:2] + rows[3:]))
    assert audit("--verify").exit_code == 1


def test_without_verify_a_damaged_end_is_told(audit, state: Path) -> None:
    with (state / "audit/7.jsonl").open("a") as file:
        file.write("nonsense\n")
    shown = audit()
    assert shown.exit_code == 1
    assert "it is not JSON" in shown.output
    assert "--verify" in shown.output


def test_accept(audit, state: Path) -> None:
    assert audit("--accept", "7-2", "--accept", "12345678-1").exit_code == 0
    (standing,) = Alarms(state / "audit/7.alarms.jsonl", 7).standing()
    assert standing.id == "7-1"
    alarms = json.loads(audit("--json").output)[1]["alarms"]
    assert [(alarm["id"], bool(alarm["accepted"]), bool(alarm["accepted_by"])) for alarm in alarms] == [
        ("12345678-1", True, True)
    ]


def test_accept_what_was_seen(audit, state: Path) -> None:
    assert audit("--accept-until", "7-2").exit_code == 0
    assert Alarms(state / "audit/7.alarms.jsonl", 7).standing() == ()
    assert len(Alarms(state / "audit/12345678.alarms.jsonl", 12345678).standing()) == 1
    assert audit("--accept-until", "7-2").exit_code == 1


@pytest.mark.parametrize("wrong", ["7-3", "7", "gap"])
def test_accept_an_alarm_that_does_not_stand(audit, state: Path, wrong: str) -> None:
    shown = audit("--accept", "7-1", "--accept", wrong)
    assert shown.exit_code == 1
    assert f"No alarm {wrong} stands.\nThere are: 7-1, 7-2, 12345678-1." in shown.output
    assert len(Alarms(state / "audit/7.alarms.jsonl", 7).standing()) == 2


def test_no_device_was_audited(tmp_path: Path) -> None:
    env = {"HSMSIGN_SERVER__STATE_DIRECTORY": str(tmp_path)}
    shown = CliRunner().invoke(main, ["yubihsm", "audit"], env=env)
    assert shown.exit_code == 1
    assert "No device has been audited." in shown.output


def test_wrong_settings() -> None:
    shown = CliRunner().invoke(main, ["yubihsm", "audit"], env={"HSMSIGN_LOG__LEVEL": "loud"})
    assert shown.exit_code == 2
    assert "log.level" in shown.output
