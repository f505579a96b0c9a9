"""The service under measurement, and the memory of its processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from tools import CST_BASE

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
SAMPLE_INTERVAL_S = 0.02
KIB_PER_MIB = 1024


@dataclass(frozen=True)
class Service:
    """A service that runs: its URL, and the id of its main process."""

    url: str
    pid: int


@contextmanager
def service(
    config: Path,
    log: Path,
    sessions: int,
    provider: str = "softhsm",
    settings: Mapping[str, str] | None = None,
) -> Iterator[Service]:
    """`hsmsign serve` on a free port of 127.0.0.1, ready to sign, with that many workers of the provider's token.

    `settings` are more variables.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    hsmsign = Path(sys.executable).with_name("hsmsign")
    with log.open("ab") as output:
        process = subprocess.Popen(
            [hsmsign, "serve", "--config", config, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={
                **os.environ,
                f"HSMSIGN_PROVIDERS__{provider.upper()}__SESSIONS": str(sessions),
                "HSMSIGN_SIGNERS__IMX__CST_BASE": str(CST_BASE),
                **(settings or {}),
            },
        )
    running = Service(f"http://127.0.0.1:{port}", process.pid)
    try:
        _wait_until_ready(running.url, process)
        yield running
        if process.poll() is not None:
            raise RuntimeError(f"the service ended while it was measured; its log is {log}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Until /readyz says 200. Raises RuntimeError where it does not come to that."""
    deadline = time.monotonic() + START_TIMEOUT_S
    answer = "none"
    while process.poll() is None and time.monotonic() < deadline:
        try:
            response = httpx.get(f"{url}/readyz")
        except httpx.TransportError:
            time.sleep(0.05)
            continue
        if response.status_code == httpx.codes.OK:
            return
        answer = response.text
        time.sleep(0.2)
    raise RuntimeError(f"the service did not become ready; the last answer: {answer}")


class PeakMemory:
    """Samples the memory of a process and its children in a thread, until the `with` block ends.

    What is summed up is PSS (proportional set size, proc_pid_smaps(5)): a page that two processes share counts once.
    `peak_mib` is the largest sum that was seen, and None where this user may not look: the service is not dumpable,
    so only root may.
    """

    def __init__(self, pid: int) -> None:
        self.peak_mib: float | None = None
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            try:
                # a child between vfork and exec is in its parent's memory, at the same addresses: that counts once
                mib = sum(dict(map(_pss_kib, _family(self._pid))).values()) / KIB_PER_MIB
            except PermissionError:
                return
            except (FileNotFoundError, ProcessLookupError):  # a process ended between two looks
                continue
            self.peak_mib = max(self.peak_mib or 0.0, mib)


def _family(pid: int) -> Iterator[int]:
    """The process, its children, and theirs."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from _family(int(child))


def _pss_kib(pid: int) -> tuple[str, int]:
    """Where a process's memory lies, and how much it is."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss: +(\d+) kB$", text, re.MULTILINE)
    return text.partition(" ")[0], int(found[1]) if found else 0
