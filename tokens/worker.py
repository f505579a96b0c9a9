"""The process that holds a token: the only one that loads its driver and knows its PIN.

    python -I -m tokens.worker DRIVER        (frames on the socket that is its standard input)

One thread, one session. It answers each request in turn: `open`, `find`, `sign`, `check`. An error's
answer has `error` (a class of `tokens.errors`), `message`, `hint` and `action`. It exits when the socket closes.
"""

import ctypes
import importlib
import os
import resource
import signal
import socket
import sys

from tokens.drivers.driver import Driver, DriverError, ObjectReference
from tokens.frames import Action, Decoder, Header, encode, scheme_from_wire

DRIVERS = {"pkcs11": ("tokens.drivers.pkcs11", "Pkcs11Driver")}

_READ_BYTES = 65536
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4


def main() -> None:
    """Serves until the socket closes."""
    harden()
    connection = socket.socket(fileno=os.dup(0))
    silence()
    worker = Worker(sys.argv[1])
    decoder = Decoder()
    while data := connection.recv(_READ_BYTES):
        for header, body in decoder.feed(data):
            connection.sendall(worker.answer(header, body))


def harden() -> None:
    """No core file and no tracing (the PIN is in this memory); no life after the service's."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.umask(0o077)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # systemd sends it to every process of the service, which then finishes what runs: by this one
        signal.signal(number, signal.SIG_IGN)


def silence() -> None:
    """Modules print what they like, PINs included: none of it goes anywhere."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)


class Worker:
    """Answers requests by means of a driver, which the first `open` loads."""

    def __init__(self, driver: str) -> None:
        module, self._class_name = DRIVERS[driver]
        self._module = importlib.import_module(module)
        self._driver: Driver | None = None

    def answer(self, header: Header, body: bytes) -> bytes:
        """The frame that answers a request."""
        try:
            values, result = self._perform(header, body)
        except DriverError as error:
            values, result = _error(error), b""
        except Exception as error:
            internal = DriverError(
                "SigningFailed",
                f"The token worker failed ({type(error).__name__}).",
                "Try again; if it stays, report it.",
                Action.RESTART,
            )
            values, result = _error(internal), b""
        return encode({"id": header.get("id"), **values}, result)

    def _perform(self, header: Header, body: bytes) -> tuple[Header, bytes]:
        if header["op"] == "open":
            self._driver = self._driver or getattr(self._module, self._class_name)(**header["settings"])
            return self._driver.open(), b""
        if self._driver is None:
            raise DriverError("ProviderUnavailable", "The token worker has no session.", action=Action.REOPEN)
        driver = self._driver
        if header["op"] == "check":
            driver.check()
            return {}, b""
        id_ = header["key_id"]
        reference = ObjectReference(header["label"], None if id_ is None else bytes.fromhex(id_))
        if header["op"] == "find":
            return driver.find(reference), b""
        return {}, driver.sign(reference, header["public"], scheme_from_wire(header["scheme"]), body)


def _error(error: DriverError) -> Header:
    return {"error": error.error, "message": error.message, "hint": error.hint, "action": error.action}


if __name__ == "__main__":
    main()
