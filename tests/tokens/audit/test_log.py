import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokens.audit.log import CAPACITY, Break, Entry, entries_after, find_break, parse_entries

# a device's first three entries: log begun, boot, SIGN ECDSA with key 0x0100 by authentication key 2
BEGUN = bytes.fromhex("0001" + "ff" * 14)
BOOT = bytes.fromhex("0002 00 0000 ffff 0000 0000 00 00000000")
SIGN = bytes.fromhex("0003 56 0022 0002 0100 ffff d6 0000004d")


def chain(*data: bytes, digest: bytes = b"\x5a" * 16) -> bytes:
    """The data with their digests, by hashlib alone."""
    raw = b""
    for each in data:
        digest = hashlib.sha256(each + digest).digest()[:16]
        raw += each + digest
    return raw


def with_number(number: int) -> bytes:
    return number.to_bytes(2, "big") + SIGN[2:]


def test_the_fields_of_an_entry() -> None:
    begun, boot, sign = parse_entries(chain(BEGUN, BOOT, SIGN))
    assert begun.is_first
    assert (boot.number, boot.name, boot.session_key, boot.is_signature) == (2, "boot", 0xFFFF, False)
    assert (sign.number, sign.name, sign.length, sign.tick) == (3, "sign-ecdsa", 34, 77)
    assert (sign.session_key, sign.target_key, sign.second_key, sign.result) == (2, 0x100, 0xFFFF, 0xD6)
    assert sign.is_signature
    assert not sign.is_first


def test_a_digest_worked_out_by_hand() -> None:
    # printf '000356002200020100ffffd60000004d%032d' 0 | xxd -r -p | sha256sum | head -c 32
    assert Entry.parse(SIGN + bytes(16)).digest_after(bytes(16)).hex() == "fedbd91df0248699b95f58ecca6d027c"


def test_a_command_that_is_not_known_has_a_name() -> None:
    assert Entry.parse(bytes(2) + b"\x7e" + bytes(29)).name == "command-7e"


def test_a_command_that_failed_made_no_signature() -> None:
    failed = bytearray(SIGN + bytes(16))
    failed[11] = 0x09
    assert not Entry.parse(bytes(failed)).is_signature


@given(st.binary(min_size=32, max_size=32))
def test_nothing_is_lost_in_parsing(raw: bytes) -> None:
    assert Entry.parse(raw).raw == raw


@given(st.binary(max_size=200))
def test_only_whole_entries(raw: bytes) -> None:
    if len(raw) % 32:
        with pytest.raises(ValueError, match="a log entry has 32 bytes"):
            parse_entries(raw)
    else:
        assert b"".join(entry.raw for entry in parse_entries(raw)) == raw


class TestChain:
    def test_it_holds(self) -> None:
        begun, boot, sign = parse_entries(chain(BEGUN, BOOT, SIGN))
        assert find_break(None, begun) is None
        assert find_break(begun, boot) is None
        assert find_break(boot, sign) is None

    @given(st.integers(0, 31), st.integers(1, 255))
    def test_any_byte_that_is_changed_breaks_it(self, position: int, change: int) -> None:
        raw = bytearray(chain(BOOT, SIGN))
        raw[32 + position] ^= change
        assert find_break(*parse_entries(bytes(raw))) is not None

    @given(st.integers(0, 15), st.integers(1, 255))
    def test_a_change_with_a_new_digest_breaks_the_next(self, position: int, change: int) -> None:
        data = bytearray(BOOT)
        data[position] ^= change
        previous = Entry.parse(chain(BEGUN, BOOT)[32:])
        changed = Entry.parse(chain(BEGUN, bytes(data))[32:])
        sign = Entry.parse(chain(BEGUN, BOOT, SIGN)[64:])
        assert find_break(previous, sign) is None
        assert find_break(changed, sign) is not None

    def test_numbers_begin_anew_after_65535(self) -> None:
        last, first = parse_entries(chain(with_number(65535), with_number(0)))
        assert find_break(last, first) is None

    @pytest.mark.parametrize(("before", "after"), [(3, 5), (65535, 1), (65000, 100), (0, 60000)])
    def test_entries_that_are_missing(self, before: int, after: int) -> None:
        assert find_break(*parse_entries(chain(with_number(before), with_number(after)))) is Break.GAP

    @pytest.mark.parametrize(("before", "after"), [(5, 5), (5, 3), (1, 65535 - 20)])
    def test_a_number_that_was_there_already(self, before: int, after: int) -> None:
        assert find_break(*parse_entries(chain(with_number(before), with_number(after)))) is Break.BROKEN_CHAIN

    def test_a_reset(self) -> None:
        sign, begun = parse_entries(chain(SIGN) + chain(BEGUN))
        assert find_break(sign, begun) is Break.RESET


class TestEntriesAfter:
    entries = parse_entries(chain(*map(with_number, range(10, 10 + CAPACITY))))

    @given(st.integers(1, CAPACITY), st.integers(0, CAPACITY))
    def test_what_is_known_is_left_out(self, known: int, dropped: int) -> None:
        page = self.entries[min(dropped, known) :]
        assert entries_after(self.entries[:known], page) == self.entries[known:]

    def test_nothing_is_known(self) -> None:
        assert entries_after((), self.entries) == self.entries

    def test_a_page_that_tells_another_story_is_new_from_its_beginning(self) -> None:
        other = parse_entries(chain(*map(with_number, range(10, 13)), digest=bytes(16)))
        page = (*other[:2], *self.entries[2:5])
        assert entries_after(self.entries[:5], page) == page
