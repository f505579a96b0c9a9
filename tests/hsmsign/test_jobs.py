"""Jobs: their files, threads and limits, whatever their client and the service do."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from hsmsign.jobs import Job
from hsmsign.problems import SpoolFull

MIB = 1024 * 1024

ON_DISK = bytes(100_000)
"""An artifact that is too large to stay in memory."""


@pytest.fixture
def leave(service: Any) -> Callable[..., None]:
    """Posts a form and hangs up before the answer."""

    def leave(path: str = "/sign/tiny", **fields: Any) -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                service.url + path,
                files=[
                    (name, ("x", value) if isinstance(value, bytes) else (None, value))
                    for name, value in fields.items()
                ],
                timeout=httpx.Timeout(30, read=0.2),
            )

    return leave


def test_a_client_that_hangs_up_while_signing_does_not_stop_the_job(service: Any, leave: Callable[..., None]) -> None:
    leave(machine="abc", artifact=ON_DISK, seconds="1")
    # its thread runs on, and its files stay until the thread has ended
    assert sorted(file.rpartition(".")[2] for file in service.files()) == ["0", "d"]
    service.assert_clean()


def test_a_job_that_fails_after_its_client_has_left_is_logged(service: Any, leave: Callable[..., None]) -> None:
    before = len(service.requests())
    leave(machine="abc", artifact=ON_DISK, seconds="0.5", error="RuntimeError")
    service.eventually(
        lambda: any(line.get("problem") == "internal-error" for line in service.requests()[before:]), "it is logged"
    )
    service.assert_clean()


def test_a_job_that_takes_too_long_is_given_up(service: Any) -> None:
    began = time.monotonic()
    problem = service.assert_problem(service.post(machine="abc", artifact=ON_DISK, seconds="4"), 504, "job-timeout")
    assert 3 <= time.monotonic() - began < 4
    assert "3 s" in problem["detail"]
    # the thread cannot be stopped: its files stay for it
    assert service.files()
    service.assert_clean()


def test_only_so_many_jobs_run_at_once(start_service: Any) -> None:
    service = start_service(limits={"jobs_max": 2}).wait_until_serving()
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(service.post, machine="abc", artifact=ON_DISK, seconds="1") for _ in range(2)]
        service.eventually(lambda: len(service.files()) == 4, "two jobs run")
        service.assert_problem(service.post(machine="abc", artifact=ON_DISK), 503, "too-many-jobs")
        assert httpx.get(service.url + "/healthz").status_code == 200
    assert [answer.result().status_code for answer in running] == [200, 200]
    service.assert_clean()


def test_many_clients_at_once(service: Any) -> None:
    with ThreadPoolExecutor(16) as pool:
        artifacts = [bytes([number]) * (number + 1) * 1000 for number in range(200)]
        answers = pool.map(lambda artifact: service.post(machine="abc", artifact=artifact), artifacts)
        for artifact, answer in zip(artifacts, answers, strict=True):
            service.verify(answer.content, artifact)
    service.assert_clean()


def test_a_slow_reader_gets_the_whole_answer(service: Any) -> None:
    artifact = os.urandom(1000) * 20_000
    with slow_connection(service) as connection:
        connection.sendall(echo(artifact))
        received = connection.recv(1000)
        time.sleep(1)
        assert service.files(), "the artifact lasts until it is sent"
        length = len(received.partition(b"\r\n\r\n")[0]) + 4 + len(artifact) + 8
        while len(received) < length:
            received += connection.recv(MIB)
    assert received.endswith(b"head" + artifact + b"tail")
    service.assert_clean()


def test_a_reader_that_leaves_leaves_nothing_behind(service: Any) -> None:
    with slow_connection(service) as connection:
        connection.sendall(echo(bytes(20 * MIB)))
        connection.recv(1000)
    service.assert_clean()


def test_a_reader_that_stops_is_given_up(start_service: Any) -> None:
    service = start_service(server={"response_timeout_s": 1}).wait_until_serving()
    with slow_connection(service) as connection:
        connection.sendall(echo(bytes(20 * MIB)))
        service.eventually(service.requests, "the request has ended")
    assert service.requests()[0]["status"] is None
    service.assert_clean()


def slow_connection(service: Any) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 10_000)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", service.port))
    return connection


def echo(artifact: bytes) -> bytes:
    """A request for /sign/echo."""
    body = (
        b'--b\r\nContent-Disposition: form-data; name="machine"\r\n\r\nabc\r\n'
        b'--b\r\nContent-Disposition: form-data; name="artifact"; filename="x"\r\n\r\n' + artifact + b"\r\n--b--\r\n"
    )
    head = (
        f"POST /sign/echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    )
    return head.encode() + body


def test_what_a_dead_instance_left_is_removed(start_service: Any, tmp_path: Path) -> None:
    first = start_service(spool=tmp_path).wait_until_serving()
    threading.Thread(target=post_and_fail, args=(first,)).start()
    first.eventually(first.files, "a job runs")
    alive = start_service(spool=tmp_path).wait_until_serving()
    assert first.files(), "what a living instance has stays"
    first.stop(signal.SIGKILL)
    assert len(list(tmp_path.iterdir())) == 2
    second = start_service(spool=tmp_path).wait_until_serving()
    assert second.wait_for("removed the files of an instance that died")
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {
        str(alive.process.pid), str(second.process.pid)
    }  # fmt: skip
    second.assert_clean()
    alive.assert_clean()
    assert (alive.stop(), second.stop()) == (0, 0)
    assert not list(tmp_path.iterdir())


def post_and_fail(service: Any) -> None:
    with pytest.raises(httpx.HTTPError):
        service.post(machine="abc", artifact=ON_DISK, seconds="20")


def test_stopping_finishes_what_runs_and_refuses_what_comes(start_service: Any, tmp_path: Path) -> None:
    service = start_service(spool=tmp_path).wait_until_serving()
    with ThreadPoolExecutor(1) as pool, service.connect() as idle:
        running = pool.submit(service.post, machine="abc", artifact=ON_DISK, seconds="1.5")
        service.eventually(service.files, "a job runs")
        service.process.send_signal(signal.SIGTERM)
        service.wait_for("stopping")
        assert idle.recv(1) == b"", "an idle connection is closed"
        with pytest.raises(httpx.ConnectError):
            service.post(machine="abc", artifact=ON_DISK)
        service.verify(running.result().content, ON_DISK)
    assert service.process.wait(10) == 0
    assert not list(tmp_path.iterdir())


def test_stopping_waits_for_the_jobs_of_clients_that_have_left(start_service: Any, tmp_path: Path) -> None:
    service = start_service(spool=tmp_path).wait_until_serving()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            service.url + "/sign/tiny",
            files={"machine": (None, "abc"), "artifact": ("x", ON_DISK), "seconds": (None, "1.5")},
            timeout=httpx.Timeout(30, read=0.5),
        )
    began = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - began > 0.5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_stopping_does_not_wait_for_ever(start_service: Any, tmp_path: Path, numbers: list[signal.Signals]) -> None:
    drain_timeout_s = 0.5 if len(numbers) == 1 else 60
    service = start_service(spool=tmp_path, server={"drain_timeout_s": drain_timeout_s}).wait_until_serving()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(service.post, machine="abc", artifact=ON_DISK, seconds="3")
        service.eventually(service.files, "a job runs")
        began = time.monotonic()
        for number in numbers:
            service.process.send_signal(number)
            time.sleep(0.3)
        service.assert_problem(running.result(), 503, "stopping")
        assert time.monotonic() - began < 2
        assert service.process.wait(10) == 0
    assert not list(tmp_path.iterdir())


def test_stopping_cuts_off_a_reader_that_stops(start_service: Any, tmp_path: Path) -> None:
    service = start_service(
        spool=tmp_path, server={"drain_timeout_s": 0.5, "keep_alive_timeout_s": 2}
    ).wait_until_serving()
    with slow_connection(service) as connection:
        connection.sendall(echo(bytes(20 * MIB)))
        connection.recv(1000)
        assert service.stop() == 0
    assert not list(tmp_path.iterdir())


def test_a_spool_that_others_can_read_is_refused(start_service: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    service = start_service(spool=tmp_path)
    assert service.process.wait(10) != 0
    service.eventually(lambda: "spool directory does not belong to the service alone" in service.log, "it says why")


def test_a_spool_that_is_a_link_is_refused(start_service: Any, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "link").symlink_to("real")
    assert start_service(spool=tmp_path / "link").process.wait(10) != 0


def test_files_are_private(service: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(service.post, machine="abc", artifact=ON_DISK, seconds="0.5")
        service.eventually(lambda: len(service.files()) == 2, "a job runs")
        paths = [service.spool, *service.spool.glob("*"), *service.spool.glob("*/*")]
        modes = {oct(path.stat().st_mode & 0o777) for path in paths}
        running.result()
    assert modes == {"0o700", "0o600"}


async def test_a_file_system_without_room_is_told_apart(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as threads:
        job: Job[None] = Job(tmp_path / "0", threads, 1)
        for run in (job.hash, job.spool):
            with pytest.raises(SpoolFull, match="has no room"):
                await run(Path("/dev/full").write_bytes, b"x")
        with pytest.raises(FileNotFoundError):
            await job.hash((tmp_path / "missing").read_bytes)
