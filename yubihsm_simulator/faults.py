"""Switches for what goes wrong in the field."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


def _nothing() -> None:
    pass


@dataclass
class Faults:
    """Change the fields at any time.

    Attributes:
        unplugged: the connector answers NO_DEVICE and status 500; the device starts anew when it is plugged in.
        session_limit: sessions that can be open at once, at most 256.
        drop_session_on_bad_mac: a message with a wrong MAC ends the session (if hardware does so is not known).
        next_errors: (command, error code): the next execution of that command answers that error.
        delays_s: extra seconds for a command.
        drop_before: so many requests: the connection is closed, the device sees nothing of them.
        drop_after: so many requests: the device executes them, then the connection is closed without an answer.
        half_answers: so many requests: half of the answer, then the connection is closed.
        log_entries: how many the audit log holds, at most 255.
        power_cycled: called after the device was plugged in again.
    """

    unplugged: bool = False
    session_limit: int = 16
    drop_session_on_bad_mac: bool = False
    next_errors: deque[tuple[int, int]] = field(default_factory=deque)
    delays_s: dict[int, float] = field(default_factory=dict)
    drop_before: int = 0
    drop_after: int = 0
    half_answers: int = 0
    log_entries: int = 62
    power_cycled: Callable[[], None] = field(default=_nothing, repr=False)

    def __setattr__(self, name: str, value: Any) -> None:
        replugged = name == "unplugged" and not value and getattr(self, name, False)
        super().__setattr__(name, value)
        if replugged:
            self.power_cycled()

    def take_error(self, command: int) -> int | None:
        """The error that this execution of `command` is to answer, if any; it is used up."""
        for entry in self.next_errors:
            if entry[0] == command:
                self.next_errors.remove(entry)
                return entry[1]
        return None

    def take(self, name: str) -> bool:
        """Whether one of the counted faults (`drop_before`...) happens now; it is used up."""
        left: int = getattr(self, name)
        if left > 0:
            setattr(self, name, left - 1)
        return left > 0
