"""The process that holds a token: the only one that loads its driver and knows its PIN.

    python -I -m tokens.worker DRIVER        (frames on the socket that is its standard input)

One thread, one session. It answers each request in turn: `open`, `check`, and what else its driver does (`find`,
`sign`, `find-symmetric`, `compute`, `attest`, `read-log`, `advance-log`). An error's answer has `error` (a class of
`tokens.errors`), `message`, `hint` and `action`. It ends the session and exits when the socket closes.
"""

import ctypes
import importlib
import os
import resource
import select
import signal
import socket
import sys

from tokens.drivers.driver import (
    AttestingDriver,
    Driver,
    DriverError,
    Expiring,
    KeyDriver,
    LogDriver,
    ObjectReference,
    SymmetricDriver,
)
from tokens.frames import Action, Decoder, Header, encode, scheme_from_wire
from tokens.symmetric import Operation

DRIVERS = {
    "pkcs11": ("tokens.drivers.pkcs11", "Pkcs11Driver"),
    "yubihsm": ("tokens.drivers.yubihsm", "YubihsmDriver"),
    "yubihsm-auditor": ("tokens.drivers.yubihsm_auditor", "YubihsmAuditorDriver"),
}

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
    while data := worker.receive(connection):
        for header, body in decoder.feed(data):
            connection.sendall(worker.answer(header, body))
    worker.close()
    os._exit(0)  # what a module does in its destructors is nobody's concern any more


def harden() -> None:
    """No core file and no tracing; no life after the service's."""
    conceal()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.umask(0o077)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # systemd sends it to every process of the service, which then finishes what runs: by this one
        signal.signal(number, signal.SIG_IGN)


def conceal() -> None:
    """No core file and no tracing: secrets are in this memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


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

    def receive(self, connection: socket.socket) -> bytes:
        """What the service sends next; b"" when it has closed the socket."""
        if isinstance(self._driver, Expiring):
            while not select.select([connection], [], [], self._driver.keep_alive_s)[0]:
                self._driver.keep_alive()
        return connection.recv(_READ_BYTES)

    def close(self) -> None:
        """Ends the session."""
        if self._driver is not None:
            self._driver.close()

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
        values: Header = {}
        result = b""
        match header["op"], self._driver:
            case "check", driver:
                driver.check()
            case "find", KeyDriver() as driver:
                values = driver.find(_reference(header))
            case "sign", KeyDriver() as driver:
                scheme = scheme_from_wire(header["scheme"])
                result = driver.sign(_reference(header), header["public"], scheme, body)
            case "find-symmetric", SymmetricDriver() as driver:
                values = driver.find_symmetric(_reference(header))
            case "compute", SymmetricDriver() as driver:
                iv = bytes.fromhex(header["iv"])
                result = driver.compute(_reference(header), header["secret"], Operation(header["operation"]), body, iv)
            case "attest", AttestingDriver() as driver:
                values = driver.attest(header["public"])
            case "read-log", LogDriver() as driver:
                values, result = driver.read_log()
            case "advance-log", LogDriver() as driver:
                driver.advance_log(header["number"])
            case op, _:
                raise DriverError("SigningFailed", f"The token's driver has no operation {op}.")
        return values, result


def _reference(header: Header) -> ObjectReference:
    id_ = header["key_id"]
    return ObjectReference(header["label"], None if id_ is None else bytes.fromhex(id_))


def _error(error: DriverError) -> Header:
    return {"error": error.error, "message": error.message, "hint": error.hint, "action": error.action}


if __name__ == "__main__":
    main()
