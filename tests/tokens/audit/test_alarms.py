from pathlib import Path

import pytest

from tokens.audit import lines
from tokens.audit.alarms import ADVICE, Alarms, Kind


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "7.alarms.jsonl"


def test_they_stand_until_they_are_accepted(path: Path) -> None:
    alarms = Alarms(path, 7)
    assert alarms.all() == ()
    gap, reset = alarms.raise_([(Kind.GAP, "Entries lack."), (Kind.RESET, "It was reset.")])
    assert (gap.id, reset.id) == ("7-1", "7-2")
    assert alarms.standing() == (gap, reset)
    Alarms(path, 7).accept(gap, "tester")  # by another process
    assert alarms.standing() == (reset,)
    assert alarms.all()[0].accepted_by == "tester"
    assert Alarms(path, 7).all() == alarms.all()


def test_ids_are_not_given_twice(path: Path) -> None:
    alarms = Alarms(path, 7)
    (first,) = alarms.raise_([(Kind.GAP, "Entries lack.")])
    alarms.accept(first, "tester")
    (second,) = Alarms(path, 7).raise_([(Kind.GAP, "Entries lack.")])
    assert (second.id, second.accepted) == ("7-2", None)


def test_nothing_to_raise_makes_no_file(path: Path) -> None:
    assert Alarms(path, 7).raise_([]) == ()
    assert not path.exists()


@pytest.mark.parametrize("line", ['{"alarm": "7-1"}', '{"accepted": "7-9", "at": "", "by": ""}', "{}", "x"])
def test_a_damaged_file_is_no_file_without_alarms(path: Path, line: str) -> None:
    path.write_text(line + "\n")
    with pytest.raises(lines.Damaged, match="line 1"):
        Alarms(path, 7).standing()


def test_there_is_advice_for_each() -> None:
    assert set(ADVICE) == set(Kind)
