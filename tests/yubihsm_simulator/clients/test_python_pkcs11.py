"""python-pkcs11 on Yubico's PKCS#11 module, in a process of its own: the module has no place in that of the tests."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.yubihsm_simulator.clients.conftest import MODULE, PIN, Hsm

CLIENT = Path(__file__).with_name("python_pkcs11_client.py")


def command(what: str) -> list[str | Path]:
    return [sys.executable, CLIENT, MODULE, PIN, what]


@pytest.mark.parametrize(
    "what",
    ["generated_rsa", "imported_rsa", "ecdsa", "eddsa", "ecdh", "secret_keys", "certificates", "threads", "errors"],
)
def test_it_does(hsm: Hsm, what: str) -> None:
    """It verifies its signatures by cryptography, and leaves no session behind."""
    hsm.run(*command(what))
    assert hsm.device.sessions == 0


@contextmanager
def waiting(hsm: Hsm) -> Iterator["subprocess.Popen[str]"]:
    """The client that waits for a line after each `ready`; killed after a minute."""
    with subprocess.Popen(
        command("interruptions"), cwd=hsm.directory, env=hsm.env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as client:  # fmt: skip
        watchdog = threading.Timer(60, client.kill)
        watchdog.start()
        try:
            yield client
            client.wait()
        finally:
            watchdog.cancel()
            watchdog.join()
            client.kill()


def test_interruptions(hsm: Hsm) -> None:
    def unplug() -> None:
        hsm.device.faults.unplugged = True

    def plug() -> None:
        hsm.device.faults.unplugged = False

    with waiting(hsm) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        for act in (lambda: hsm.device.skip(31), hsm.device.reboot, unplug, plug):
            assert client.stdout.readline() == "ready\n"
            act()
            client.stdin.write("\n")
            client.stdin.flush()
    assert client.returncode == 0


def test_processes_side_by_side(hsm: Hsm) -> None:
    """Each has sessions of its own."""
    clients = [
        subprocess.Popen(command("threads"), cwd=hsm.directory, env=hsm.env, stdout=subprocess.DEVNULL)
        for _ in range(3)
    ]
    try:
        assert [client.wait(60) for client in clients] == [0, 0, 0]
    finally:
        for client in clients:
            client.kill()
            client.wait()
