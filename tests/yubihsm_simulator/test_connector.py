"""The connector over HTTP, and the program `python -m yubihsm_simulator`."""

import http.client
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from cryptography.hazmat.primitives.asymmetric import ec
from yubihsm import YubiHsm
from yubihsm.defs import CAPABILITY, COMMAND, ERROR
from yubihsm.exceptions import YubiHsmConnectionError
from yubihsm.objects import AsymmetricKey

from tests.yubihsm_simulator.conftest import PASSWORD, refused
from yubihsm_simulator import Connector, Device
from yubihsm_simulator import connector as connector_module

ECHO = b"\x01\x00\x02hi"


@pytest.fixture
def connector(device: Device) -> Iterator[Connector]:
    others = set(threading.enumerate())  # of the run's own device, if a test has asked for that
    with Connector(device) as started:
        yield started
    left = set(threading.enumerate()) - others
    assert not [each for each in left if each.name.startswith("yubihsm-connector")]


@pytest.fixture
def http_(connector: Connector) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", connector.port, timeout=10)
    yield connection
    connection.close()


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def test_status(http_: http.client.HTTPConnection, connector: Connector, device: Device) -> None:
    status, headers, body = ask(http_, "GET", "/connector/status")
    assert (status, headers["content-type"]) == (200, "text/plain; charset=utf-8")
    lines = dict(line.split("=") for line in body.decode().splitlines())
    assert (lines["status"], lines["serial"], lines["port"]) == ("OK", "*", str(connector.port))
    assert set(lines) == {"status", "serial", "version", "pid", "address", "port"}
    assert len(body) < 256
    device.faults.unplugged = True
    assert b"status=NO_DEVICE\n" in ask(http_, "GET", "/connector/status")[2]


def test_api(http_: http.client.HTTPConnection) -> None:
    status, headers, body = ask(http_, "POST", "/connector/api", ECHO, **{"X-Request-ID": "abc"})
    assert (status, headers["content-type"], headers["x-request-id"]) == (200, "application/octet-stream", "abc")
    assert body == b"\x81\x00\x02hi"


@pytest.mark.parametrize("length", [0, 2, 3140])
def test_bodies_that_are_no_frame(http_: http.client.HTTPConnection, length: int) -> None:
    assert ask(http_, "POST", "/connector/api", bytes(length))[::2] == (400, b"Bad Request\n")


def test_longest_body(http_: http.client.HTTPConnection) -> None:
    longest = b"\x01" + (3136).to_bytes(2, "big") + bytes(3136)
    assert ask(http_, "POST", "/connector/api", longest)[::2] == (200, b"\x81" + longest[1:])


@pytest.mark.parametrize(("path", "allowed"), [("/connector/api", "POST"), ("/connector/status", "GET")])
def test_other_methods(http_: http.client.HTTPConnection, path: str, allowed: str) -> None:
    status, headers, _ = ask(http_, "PUT", path, b"body")
    assert (status, headers["allow"]) == (405, allowed)
    assert ask(http_, "POST", "/connector/api", ECHO)[0] == 200  # on the same connection


def test_other_paths(http_: http.client.HTTPConnection) -> None:
    assert ask(http_, "GET", "/")[0] == 404


def test_a_client_that_waits_before_it_sends(connector: Connector) -> None:
    """As libcurl does with bodies of more than 1 KiB."""
    with socket.create_connection(("127.0.0.1", connector.port), timeout=10) as connection:
        head = b"POST /connector/api HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(ECHO)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("head", [b"nonsense\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/1.1\r\nnonsense\r\n\r\n"])
def test_what_is_not_http(connector: Connector, head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", connector.port), timeout=10) as connection:
        connection.sendall(head)
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert connection.recv(1000) == b""


def test_idle_connections_are_closed(connector: Connector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connector_module, "IDLE_S", 0.05)
    with socket.create_connection(("127.0.0.1", connector.port), timeout=10) as connection:
        assert connection.recv(1) == b""


def test_half_a_request_is_no_request(connector: Connector, device: Device) -> None:
    with socket.create_connection(("127.0.0.1", connector.port), timeout=10) as connection:
        connection.sendall(b"POST /connector/api HTTP/1.1\r\nContent-Length: 5\r\n\r\n\x01\x00")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert not device.commands


def test_client_over_http(connector: Connector, device: Device) -> None:
    with YubiHsm.connect(connector.url) as hsm, hsm.create_session_derived(1, PASSWORD) as session:
        key = AsymmetricKey.put(session, 5, "", 1, CAPABILITY.SIGN_ECDSA, ec.generate_private_key(ec.SECP256R1()))
        for _ in range(3):
            key.sign_ecdsa(b"data")
    assert device.commands[COMMAND.SIGN_ECDSA] == 3


def test_unplugged(connector: Connector, device: Device) -> None:
    with YubiHsm.connect(connector.url) as hsm:
        device.faults.unplugged = True
        with pytest.raises(YubiHsmConnectionError, match="500"):
            hsm.get_device_info()
        device.faults.unplugged = False
        assert hsm.get_device_info().serial == device.serial


def test_another_device(connector: Connector) -> None:
    with YubiHsm.connect(connector.url) as hsm:
        connector.device = Device(serial=99)
        assert hsm.get_device_info().serial == 99


def test_killed_and_back_on_the_same_port(connector: Connector) -> None:
    with YubiHsm.connect(connector.url) as hsm, hsm.create_session_derived(1, PASSWORD) as session:
        port = connector.port
        connector.stop()
        connector.stop()
        with pytest.raises(YubiHsmConnectionError):
            session.send_secure_cmd(COMMAND.ECHO, b"x")
        connector.start()
        assert connector.port == port
        assert session.send_secure_cmd(COMMAND.ECHO, b"x") == b"x"  # the device knows nothing of it


@pytest.mark.parametrize(("fault", "executed"), [("drop_before", 0), ("drop_after", 1), ("half_answers", 1)])
def test_dropped_connections(connector: Connector, device: Device, fault: str, executed: int) -> None:
    with requests.Session() as client:
        client.post(f"{connector.url}/connector/api", data=ECHO, timeout=10)
        device.commands.clear()
        setattr(device.faults, fault, 1)
        with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
            client.post(f"{connector.url}/connector/api", data=ECHO, timeout=10)
        assert device.commands[COMMAND.ECHO] == executed
        assert client.post(f"{connector.url}/connector/api", data=ECHO, timeout=10).content == b"\x81\x00\x02hi"


def test_an_answer_that_does_not_come_costs_the_session(connector: Connector, device: Device) -> None:
    with YubiHsm.connect(connector.url) as hsm:
        session = hsm.create_session_derived(1, PASSWORD)
        device.faults.drop_after = 1
        with pytest.raises(YubiHsmConnectionError):
            session.send_secure_cmd(COMMAND.ECHO, b"x")
        with refused(ERROR.AUTHENTICATION_FAILED):
            session.send_secure_cmd(COMMAND.ECHO, b"x")


def test_many_clients_at_once(connector: Connector, device: Device) -> None:
    failures: list[BaseException] = []

    def client() -> None:
        try:
            with YubiHsm.connect(connector.url) as hsm, hsm.create_session_derived(1, PASSWORD) as session:
                for _ in range(20):
                    assert session.send_secure_cmd(COMMAND.ECHO, b"x") == b"x"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert device.commands[COMMAND.ECHO] == 160


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_program(tmp_path: Path, stop: signal.Signals) -> None:
    state = tmp_path / "state.json"
    options = ["--listen", "127.0.0.1:0", "--state", str(state), "--serial", "77", "--firmware", "2.5"]
    command = [sys.executable, "-m", "yubihsm_simulator", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            with YubiHsm.connect(line.split()[-1]) as hsm:
                info = hsm.get_device_info()
                assert (info.serial, info.version) == (77, (2, 5, 0))
        finally:
            process.send_signal(stop)
        assert process.wait(10) == 0
        assert process.stdout.read() == ""
    assert state.exists()
