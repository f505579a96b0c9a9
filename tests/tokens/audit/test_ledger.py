from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokens.audit.ledger import Balance, HeldElsewhere, Ledger, Operation

ECDSA = Operation(0x56, 0x100, 2)
PSS = Operation(0x55, 0x101, 2)
UNCERTAIN_S = 60.0


class Bench:
    """A ledger, the signatures that the device's log has not shown yet, and a clock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 0.0
        self.kept: list[dict[str, object]] = []
        self.ledger = self._open()

    def _open(self) -> Ledger:
        ledger = Ledger(self.path, UNCERTAIN_S, lambda: self.now)
        ledger.hold()
        ledger.load(self.kept)
        return ledger

    def crash(self) -> None:
        self.ledger.close()
        self.ledger = self._open()

    def drain(self, logged: int = 0, *, complete: bool = True, operation: Operation = ECDSA) -> Balance:
        """One drain at which the log shows so many signatures; returns the operation's balance."""
        balances = self.ledger.balance(self.ledger.answers(), {operation: logged} if logged else {}, complete=complete)
        self.kept = self.ledger.records(balances)
        self.ledger.settle(balances)
        nothing = Balance(operation, 0, 0, 0, 0, 0)
        return next((balance for balance in balances if balance.operation == operation), nothing)

    def sign(self, count: int = 1, operation: Operation = ECDSA) -> None:
        for _ in range(count):
            self.ledger.asked(operation)
            self.ledger.answered(operation)

    def off(self, logged: int = 0) -> tuple[int, int]:
        balance = self.drain(logged)
        return balance.surplus, balance.missing


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "audit" / "counts")
    yield bench
    bench.ledger.close()


class TestBalance:
    def test_even(self, bench: Bench) -> None:
        bench.sign(3)
        assert bench.off(3) == (0, 0)
        assert bench.off() == (0, 0)

    def test_one_too_many_is_told_once(self, bench: Bench) -> None:
        bench.sign(3)
        assert bench.off(4) == (1, 0)
        assert bench.off() == (0, 0)
        assert bench.off(1) == (1, 0)

    def test_one_that_nobody_ever_asked_for(self, bench: Bench) -> None:
        assert bench.drain(2, operation=PSS).surplus == 2
        assert bench.drain(operation=PSS).surplus == 0

    def test_operations_do_not_make_up_for_each_other(self, bench: Bench) -> None:
        bench.sign(1)
        bench.sign(1, PSS)
        balances = bench.ledger.balance(bench.ledger.answers(), {ECDSA: 2}, complete=True)
        assert {(each.operation, each.surplus, each.missing) for each in balances} == {(ECDSA, 1, 0), (PSS, 0, 1)}

    def test_one_too_few_is_told_once(self, bench: Bench) -> None:
        bench.sign(3)
        assert bench.off(2) == (0, 1)
        assert bench.off() == (0, 0)

    def test_what_a_gap_may_have_held_is_not_missing(self, bench: Bench) -> None:
        bench.sign(3)
        assert bench.drain(1, complete=False).missing == 0
        assert bench.off() == (0, 0)

    def test_an_attempt_in_flight_may_be_in_the_log_or_not(self, bench: Bench) -> None:
        bench.ledger.asked(ECDSA)
        assert bench.off() == (0, 0)
        assert bench.off(1) == (0, 0)
        bench.ledger.answered(ECDSA)
        assert bench.off() == (0, 0)

    def test_an_answer_that_came_after_the_log_was_read_is_not_missing(self, bench: Bench) -> None:
        bench.ledger.asked(ECDSA)
        before = bench.ledger.answers()
        bench.ledger.answered(ECDSA)
        (balance,) = bench.ledger.balance(before, {}, complete=True)
        assert balance.missing == 0

    def test_a_refused_attempt_allows_for_no_signature(self, bench: Bench) -> None:
        bench.ledger.asked(ECDSA)
        bench.ledger.refused(ECDSA)
        assert bench.off(1) == (1, 0)


class TestLost:
    """Attempts whose end nobody saw."""

    def test_the_log_has_it(self, bench: Bench) -> None:
        bench.ledger.asked(ECDSA)
        bench.ledger.lost(ECDSA)
        assert bench.off(1) == (0, 0)
        assert bench.off(1) == (1, 0)

    def test_it_turns_up_later(self, bench: Bench) -> None:
        bench.ledger.asked(ECDSA)
        bench.ledger.lost(ECDSA)
        assert bench.off() == (0, 0)
        bench.now += UNCERTAIN_S - 1
        assert bench.off(1) == (0, 0)

    def test_it_is_given_up_in_the_end(self, bench: Bench) -> None:
        bench.ledger.asked(ECDSA)
        bench.ledger.lost(ECDSA)
        bench.now += UNCERTAIN_S
        assert bench.drain().given_up == 1
        assert bench.off(1) == (1, 0)

    def test_not_when_another_came_and_went_meanwhile(self, bench: Bench) -> None:
        bench.ledger.asked(ECDSA)
        bench.ledger.lost(ECDSA)
        bench.now += UNCERTAIN_S
        before = bench.ledger.answers()
        bench.sign()  # is not in what was read; the lost one is
        bench.ledger.settle(bench.ledger.balance(before, {ECDSA: 1}, complete=True))
        assert bench.off(1) == (0, 0)
        assert bench.off(1) == (1, 0)

    def test_not_while_others_are_in_flight(self, bench: Bench) -> None:
        bench.ledger.asked(ECDSA)
        bench.ledger.asked(ECDSA)
        bench.ledger.lost(ECDSA)
        bench.now += UNCERTAIN_S
        assert bench.drain().given_up == 0
        assert bench.off(2) == (0, 0)
        bench.ledger.answered(ECDSA)
        assert bench.off() == (0, 0)
        assert bench.off(1) == (1, 0)


class TestCrash:
    def test_counts_survive_it(self, bench: Bench) -> None:
        bench.sign(5)
        bench.off(5)
        bench.sign(2)
        bench.crash()
        assert bench.off(1) == (0, 1)

    @pytest.mark.parametrize("signed", [0, 1])
    def test_attempts_in_flight_become_lost_ones(self, bench: Bench, signed: int) -> None:
        bench.ledger.asked(ECDSA)
        bench.crash()
        assert bench.off(signed) == (0, 0)
        bench.now += UNCERTAIN_S
        bench.off()
        assert bench.off(1) == (1, 0)

    def test_without_the_file_the_kept_counts_hold(self, bench: Bench) -> None:
        bench.sign(5)
        bench.off(5)
        bench.path.unlink()
        bench.crash()
        bench.sign(1)
        assert bench.off(1) == (0, 0)

    def test_an_older_file_does_not_put_the_counts_back(self, bench: Bench) -> None:
        bench.sign(5)
        older = bench.path.read_bytes()
        bench.sign(2)
        bench.off(7)
        bench.ledger.close()
        bench.path.write_bytes(older)
        bench.crash()
        assert bench.ledger.answers() == {ECDSA: (7, 7)}
        assert bench.off() == (0, 0)

    def test_a_line_that_is_not_whole_is_dropped(self, bench: Bench) -> None:
        bench.sign(5)
        bench.sign(1, PSS)
        bench.off(5)
        header, _, second = bench.path.read_bytes().splitlines(keepends=True)
        bench.path.write_bytes(header + b"\0" * len(second) + second[:-3])
        bench.crash()
        assert bench.off() == (0, 0)
        assert [line.split() for line in bench.path.read_text().splitlines()[1:]] == [
            ["56", "0100", "0002", "5", "5", "0"],
            ["55", "0101", "0002", "1", "1", "0"],
        ]

    def test_lines_keep_their_places(self, bench: Bench) -> None:
        operations = [Operation(0x47, key, 2) for key in range(1, 40)]
        for operation in operations * 3:
            bench.sign(1, operation)
        bench.crash()
        for operation in reversed(operations):
            bench.sign(1, operation)
        rows = [line.split() for line in bench.path.read_text().splitlines()[1:]]
        assert [(row[1], row[3], row[4]) for row in rows] == [(f"{key:04x}", "4", "4") for key in range(1, 40)]


def test_one_process_has_it(bench: Bench) -> None:
    other = Ledger(bench.path, UNCERTAIN_S)
    with pytest.raises(HeldElsewhere, match="Another process"):
        other.hold()
    bench.ledger.close()
    other.hold()
    other.close()


EVENTS = st.lists(st.sampled_from(["ask", "answer", "refuse", "lose", "late", "drain", "wait", "crash"]), max_size=60)


class Truth:
    """What really happened, beside a ledger: attempts that run, and signatures that the log is yet to show."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.running = 0
        self.uncertain = 0
        self.unread = 0

    def step(self, event: str) -> None:
        bench, ledger = self.bench, self.bench.ledger
        match event:
            case "ask":
                ledger.asked(ECDSA)
                self.running += 1
            case "answer" if self.running:
                self.unread += 1
                self.running -= 1
                ledger.answered(ECDSA)
            case "refuse" if self.running:
                self.running -= 1
                ledger.refused(ECDSA)
            case "lose" if self.running:
                self.running -= 1
                self.uncertain += 1
                ledger.lost(ECDSA)
            case "late" if self.uncertain:  # the device makes it all the same
                self.uncertain -= 1
                self.unread += 1
            case "drain":
                assert bench.off(self.unread) == (0, 0)
                self.unread = 0
            case "wait":
                bench.now += UNCERTAIN_S
                self.uncertain = 0
            case "crash":
                bench.crash()
                self.uncertain += self.running
                self.running = 0


@settings(max_examples=200, deadline=None)
@given(events=EVENTS)
def test_no_alarm_without_cause_and_none_missed(events: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    bench = Bench(tmp_path_factory.mktemp("ledger") / "counts")
    truth = Truth(bench)
    try:
        for event in events:
            truth.step(event)
        for _ in range(truth.running):
            truth.step("lose")
        truth.step("drain")
        truth.step("wait")
        truth.step("drain")  # now nothing is open: whatever else comes is one too many
        assert bench.off(1) == (1, 0)
    finally:
        bench.ledger.close()


def test_the_sum_of_what_is_kept(bench: Bench) -> None:
    bench.sign(2)
    bench.ledger.asked(ECDSA)
    bench.ledger.lost(ECDSA)
    bench.off(3)
    assert bench.kept == [
        {"command": "sign-ecdsa", "key": 0x100, "auth_key": 2, "asked": 3, "answered": 3, "refused": 0, "logged": 3}
    ]
    assert Counter(bench.ledger.answers()) == {ECDSA: (3, 3)}
