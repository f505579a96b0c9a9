"""Token workers driven directly by their frames, without the service: what the token itself gives."""

import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from artifacts import TokenRequest

from tokens.frames import Decoder, Header, encode, scheme_to_wire
from tokens.pkcs11 import Pkcs11Settings

OUTSTANDING = 16
"""Signatures that a worker has before it at any time: it never waits for this side."""

READ_BYTES = 65536
ANSWER_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0


class BareWorker:
    """One worker process, logged in."""

    def __init__(self, settings: Pkcs11Settings, state_directory: str) -> None:
        self.connection, theirs = socket.socketpair()
        self.connection.settimeout(ANSWER_TIMEOUT_S)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-m", "tokens.worker", "pkcs11"],
                stdin=theirs.fileno(),
                env={"PATH": os.defpath, "LANG": "C.UTF-8", **settings.env},
            )
        self._decoder = Decoder()
        driver = {
            "module": str(settings.module),
            "token": settings.token or "",
            "serial": settings.serial or "",
            "pin_file": str(settings.pin.path()),
            "state_directory": state_directory,
        }
        self.call({"op": "open", "settings": driver})

    def call(self, header: Header) -> Header:
        """Has it do one thing. Raises RuntimeError where it fails."""
        self.connection.sendall(encode({"id": 0, **header}))
        while not (answers := self.receive()):
            pass
        return answers[0]

    def receive(self) -> list[Header]:
        """The headers of the answers that have come. Raises RuntimeError where one is an error."""
        answers = [header for header, _ in self._decoder.feed(self.connection.recv(READ_BYTES))]
        for header in answers:
            if "error" in header:
                raise RuntimeError(f"a bare worker answered: {header['message']}")
        return answers

    def close(self) -> None:
        """Ends it."""
        self.connection.close()
        self._process.wait(STOP_TIMEOUT_S)


@contextmanager
def bare_workers(settings: Pkcs11Settings, state_directory: str, count: int) -> Iterator[list[BareWorker]]:
    """That many workers, ended afterwards."""
    workers: list[BareWorker] = []
    try:
        for _ in range(count):
            workers.append(BareWorker(settings, state_directory))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def drive(workers: list[BareWorker], request: TokenRequest, seconds: float) -> float:
    """Signatures in a second, of all the workers together, for what the service signs in answer to `request`."""
    with selectors.DefaultSelector() as selector:
        frames = {}
        for worker in workers:
            identity = {"label": request.key, "key_id": None}
            public = worker.call({"op": "find", **identity})["public"]
            header = {"id": 0, "op": "sign", **identity, "public": public, "scheme": scheme_to_wire(request.scheme)}
            frames[worker] = encode(header, request.digest)
            selector.register(worker.connection, selectors.EVENT_READ, worker)
        start = time.perf_counter()
        for worker in workers:
            worker.connection.sendall(frames[worker] * OUTSTANDING)
        signed = 0
        while time.perf_counter() - start < seconds:
            for key, _ in selector.select(ANSWER_TIMEOUT_S):
                worker = key.data
                answered = len(worker.receive())
                signed += answered
                worker.connection.sendall(frames[worker] * answered)
        taken = time.perf_counter() - start
        for worker in workers:
            left = OUTSTANDING
            while left:
                left -= len(worker.receive())
    return signed / taken
