import fcntl
import os
import resource
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokens.audit import lines


def test_appended_lines_are_read_forwards_and_backwards(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.jsonl"
    lines.append(path, [{"a": 1}, {"b": "\u2028 and \n"}])
    lines.append(path, [{"c": [3]}])
    assert list(lines.read(path)) == [{"a": 1}, {"b": "\u2028 and \n"}, {"c": [3]}]
    assert list(lines.read_backwards(path)) == [{"c": [3]}, {"b": "\u2028 and \n"}, {"a": 1}]


def test_others_cannot_read_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.jsonl"
    lines.append(path, [{"a": 1}])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert list(lines.read(tmp_path / "none")) == list(lines.read_backwards(tmp_path / "none")) == []


@given(sizes=st.lists(st.integers(0, 3000), max_size=120))
def test_backwards_is_the_reverse(sizes: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("lines") / "file.jsonl"
    lines.append(path, [{"n": number, "text": "x" * size} for number, size in enumerate(sizes)])
    assert list(lines.read_backwards(path)) == list(lines.read(path))[::-1]


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "file.jsonl"
    lines.append(path, [{"whole": 1}, {"cut": 22222}])
    os.truncate(path, path.stat().st_size - cut)
    assert list(lines.read(path)) == list(lines.read_backwards(path)) == [{"whole": 1}]
    lines.append(path, [{"next": 3}])
    assert list(lines.read(path)) == [{"whole": 1}, {"next": 3}]


def test_a_file_of_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'{"cut": ')
    assert list(lines.read_backwards(path)) == []
    lines.append(path, [{"next": 3}])
    assert path.read_bytes() == b'{"next": 3}\n'


@pytest.mark.parametrize("damage", [b"nonsense\n", b"[1]\n", b"\xff\n", b"\n"])
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "file.jsonl"
    lines.append(path, [{"a": 1}])
    with path.open("ab") as file:
        file.write(damage)
    lines.append(path, [{"b": 2}])
    with pytest.raises(lines.Damaged, match="line 2: it is not"):
        list(lines.read(path))
    with pytest.raises(lines.Damaged):
        list(lines.read_backwards(path))


def test_what_another_is_about_to_write_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    appending = threading.Thread(target=lines.append, args=(path, [{"b": 2}]))
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b'{"a": ')
        appending.start()
        appending.join(0.1)
        file.write(b"1}\n")
    appending.join()
    assert list(lines.read(path)) == [{"a": 1}, {"b": 2}]


def test_where_there_is_no_room_no_half_line_stays(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    lines.append(path, [{"a": 1}])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            lines.append(path, [{"b": "x" * 200}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b'{"a": 1}\n'
