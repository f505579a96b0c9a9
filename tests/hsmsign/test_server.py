"""The server: its log, how it starts and what it keeps to itself."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

SCRIPT = Path(__file__).parent / "tiny_service.py"


def run(**settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, json.dumps(settings)], capture_output=True, text=True, timeout=20, check=False
    )


def test_a_request_has_one_line(service: Any) -> None:
    line = service.line(service.post(machine="abc", artifact=b"hello"))
    assert line["event"] == "request"
    assert (line["method"], line["path"], line["status"]) == ("POST", "/sign/tiny", 200)
    assert (line["signer"], line["machine"], line["key"]) == ("tiny", "abc", "tiny")
    assert line["client"] == "127.0.0.1"
    assert line["received_bytes"] > 100
    assert line["sent_bytes"] == 256
    assert 0 < line["duration_ms"] < 10_000
    assert line["timestamp"].endswith("Z")
    refused = service.line(service.post(machine="gone", artifact=b"x"))
    assert set(line) | {"problem"} == set(refused)
    assert refused["key"] == "gone"


def test_the_log_can_be_for_people(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    ended = run(log={"format": "console"}, server={"spool_directory": str(tmp_path), "port": 0, "address": "0.0.0.0"})  # noqa: S104
    assert re.search(r"\[warning +\] listening beyond this machine", ended.stderr)


def test_lines_below_the_level_are_left_out(start_service: Any) -> None:
    service = start_service(log={"level": "warning"}, server={"port": (port := free_port())})
    service.port = port
    service.eventually(lambda: is_up(service), "it serves")
    service.post(machine="abc", artifact=b"x")
    service.post(machine="abc", artifact=b"x", error="KeyMismatch")
    service.eventually(service.requests, "the failure is logged")
    assert [line["status"] for line in service.requests()] == [500]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def is_up(service: Any) -> bool:
    try:
        return httpx.get(service.url + "/healthz").status_code == 200
    except httpx.ConnectError:
        return False


def test_a_port_that_is_taken_is_an_error(service: Any, tmp_path: Path) -> None:
    ended = run(server={"port": service.port, "spool_directory": str(tmp_path / "spool")})
    assert ended.returncode != 0
    assert f"Cannot listen on 127.0.0.1 port {service.port}" in ended.stderr


def test_an_address_that_is_not_ours_is_an_error(tmp_path: Path) -> None:
    for address in ("192.0.2.1", "no.such.host.invalid"):
        ended = run(server={"address": address, "port": 0, "spool_directory": str(tmp_path / "spool")})
        assert ended.returncode != 0
        assert f"Cannot listen on {address}" in ended.stderr


def test_it_listens_on_ipv6(start_service: Any) -> None:
    service = start_service(server={"address": "::1"}).wait_until_serving()
    assert httpx.get(f"http://[::1]:{service.port}/healthz").status_code == 200


def test_it_keeps_its_memory_to_itself(service: Any) -> None:
    limits = Path(f"/proc/{service.process.pid}/limits").read_text()
    assert re.search(r"Max core file size +0 +0", limits)
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    assert "Umask:\t0077" in status
    script = (
        "from hsmsign import server; import ctypes; server.harden();"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"0\n"


def test_it_stops_at_once_when_nothing_runs(start_service: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        service = start_service().wait_until_serving()
        assert service.post(machine="abc", artifact=b"x").status_code == 200
        assert service.stop(number) == 0
        assert not list(service.spool.iterdir())
        assert [line["event"] for line in service.lines] == ["serving", "request", "stopping"]
    assert os.path.exists(service.spool)  # noqa: PTH110
