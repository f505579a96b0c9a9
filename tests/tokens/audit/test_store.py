import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tokens.audit import lines
from tokens.audit.log import Break, Entry, parse_entries
from tokens.audit.store import Store, verify

ROOT = Path(__file__).parents[3]
RECONCILED = {"unlogged_boots": 0, "unlogged_authentications": 0, "accounts": [], "boot_id": "x"}


def page(device_log) -> tuple[Entry, ...]:
    return parse_entries(b"".join(device_log.entries))


def keep(path: Path, device_log) -> Store:
    """Opens the store, as a new process does, and puts a page into it."""
    store = Store(path)
    store.append(store.new(page(device_log)), RECONCILED)
    return store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "12345678.jsonl"


@pytest.fixture
def kept(path: Path, device_log) -> Path:
    """A store of three pages and 72 entries."""
    for _ in range(3):
        device_log.sign(24)
        keep(path, device_log)
        del device_log.entries[:-2]
    return path


def test_what_is_in_a_line(path: Path, device_log) -> None:
    device_log.sign()
    keep(path, device_log)
    begun, boot, sign, reconciled = map(json.loads, path.read_text().splitlines())
    assert (begun["command"], boot["command"], boot["session_key"]) == ("initialise", "boot", None)
    assert {key: value for key, value in sign.items() if key not in ("read", "digest", "raw")} == {
        "index": 3,
        "number": 3,
        "command": "sign-ecdsa",
        "session_key": 2,
        "target_key": 0x100,
        "second_key": None,
        "result": "success",
        "tick": 77,
    }
    assert sign["raw"] == device_log.entries[2].hex()
    assert sign["digest"] == device_log.entries[2][16:].hex()
    assert reconciled["reconciled"] == 3


def test_entries_that_come_again_are_kept_once(path: Path, device_log) -> None:
    device_log.sign(3)
    keep(path, device_log)
    device_log.sign(2)
    keep(path, device_log)
    assert entries(path) == list(page(device_log))


def entries(path: Path) -> list[Entry]:
    """The entries that are kept, after they were verified."""
    verify(path)
    return [Entry.parse(bytes.fromhex(line["raw"])) for line in lines.read(path) if "raw" in line]


def test_it_goes_on_after_a_restart(kept: Path) -> None:
    verified = verify(kept)
    assert (verified.entries, verified.breaks) == (74, ())
    store = Store(kept)
    assert store.last is not None
    assert (store.last.index, store.last.entry.number) == (74, 74)
    assert store.reconciled is not None
    assert store.pending == ()


@pytest.mark.parametrize("missing", [0, 1, 10, 400])
def test_after_a_crash_in_mid_write_the_same_page_makes_it_whole(path: Path, device_log, missing: int) -> None:
    device_log.sign(3)
    keep(path, device_log)
    before = path.stat().st_size
    device_log.sign(2)
    keep(path, device_log)
    os.truncate(path, max(before, path.stat().st_size - missing))
    store = Store(path)
    new = store.new(page(device_log))
    assert [stored.entry.number for stored in (*store.pending, *new)] == ([] if missing == 0 else [6, 7])
    store.append(new, RECONCILED)
    assert entries(path) == list(page(device_log))


def test_a_break_is_noted(path: Path, device_log) -> None:
    device_log.sign(3)
    keep(path, device_log)
    device_log.sign(3)
    del device_log.entries[:-2]
    keep(path, device_log)
    (broken,) = verify(path).breaks
    assert (broken.index, broken.entry.number, broken.broken) == (6, 7, Break.GAP)
    keep(path, device_log)
    assert verify(path).entries == 7


def test_a_page_that_differs_from_what_is_kept_is_kept_too(path: Path, device_log) -> None:
    device_log.sign(5)
    keep(path, device_log)
    device_log.entries[3] = device_log.entries[3][:-1] + b"?"
    keep(path, device_log)
    assert [stored.index for stored in verify(path).breaks] == [8, 11, 12]
    assert entries(path)[7:] == list(page(device_log))
    keep(path, device_log)
    assert verify(path).entries == 14


def edit(path: Path, line: int, /, **changes: object) -> None:
    """Changes fields of one line."""
    rows = path.read_text().splitlines()
    row = json.loads(rows[line - 1]) | changes
    rows[line - 1] = json.dumps({key: value for key, value in row.items() if value != "gone"})
    path.write_text("\n".join(rows) + "\n")


class TestTampering:
    @pytest.mark.parametrize("field", ["index", "number", "session_key", "target_key", "tick"])
    def test_a_number(self, kept: Path, field: str) -> None:
        edit(kept, 10, **{field: 999})
        self.fails(kept, "line 10")

    @pytest.mark.parametrize("field", ["command", "result", "digest", "raw", "read"])
    def test_a_text(self, kept: Path, field: str) -> None:
        edit(kept, 10, **{field: "gone"})
        self.fails(kept, "line 10")

    def test_an_entry_with_its_fields(self, kept: Path) -> None:
        rows = [json.loads(row) for row in kept.read_text().splitlines()]
        edit(kept, 10, **{**rows[8], "index": 10})  # the entry before once more
        self.fails(kept, "line 10")

    def test_an_entry_taken_out(self, kept: Path) -> None:
        rows = kept.read_text().splitlines(keepends=True)
        kept.write_text("".join(rows[:9] + rows[10:]))
        self.fails(kept, "line 10")

    def test_an_entry_taken_out_and_the_others_counted_anew(self, kept: Path) -> None:
        rows = [json.loads(row) for row in kept.read_text().splitlines()]
        del rows[9]
        for row in rows[9:]:
            row["reconciled" if "reconciled" in row else "index"] -= 1
        kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.fails(kept, "line 10: entry 11: gap before it")

    def test_a_break_that_is_none(self, kept: Path) -> None:
        edit(kept, 10, **{"break": "gap"})
        self.fails(kept, "line 10")

    def test_a_line_that_says_nothing(self, kept: Path) -> None:
        with kept.open("a") as file:
            file.write("{}\n")
        self.fails(kept, "line 78")

    @staticmethod
    def fails(path: Path, where: str) -> None:
        with pytest.raises(lines.Damaged, match=where):
            verify(path)


def documented(command: str) -> str:
    """The script of docs/audit.md that begins with a line."""
    text = (ROOT / "docs/audit.md").read_text()
    (script,) = (part.split("```")[0] for part in text.split("```python\n")[1:] if part.startswith(command))
    return script


@pytest.fixture
def auditors_script(tmp_path: Path) -> Callable[[Path], "subprocess.CompletedProcess[str]"]:
    script = tmp_path / "verify.py"
    script.write_text(documented("import hashlib"))

    def _run(path: Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-I", script, path]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)

    return _run


def test_an_auditor_needs_no_hsmsign(kept: Path, auditors_script) -> None:
    done = auditors_script(kept)
    assert (done.returncode, done.stdout) == (0, "74 entries\n")
    rows = kept.read_text().splitlines()
    row = json.loads(rows[9])
    row["raw"] = row["raw"].replace("56", "47", 1)
    kept.write_text("\n".join([*rows[:9], json.dumps(row), *rows[10:]]) + "\n")
    done = auditors_script(kept)
    assert done.returncode == 1
    assert "index 10" in done.stderr
