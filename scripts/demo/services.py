"""The parts of the demo that run: the service, an S3 server and a simulated YubiHSM 2."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import boto3
import httpx
from moto.server import ThreadedMotoServer

from yubihsm_simulator import Connector, Device

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
BUCKET = "keys"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server(root: Path) -> Iterator[str]:
    """An S3 server whose bucket holds the files below a directory. Gives its URL."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        os.environ.update(CREDENTIALS)
        client = boto3.client("s3", endpoint_url=url)
        client.create_bucket(Bucket=BUCKET)
        for path in root.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), BUCKET, str(path.relative_to(root)))
        yield url
    finally:
        server.stop()


@contextmanager
def yubihsm(directory: Path, scratch: Path) -> Iterator[str]:
    """The simulator with a copy of the device that make_yubihsm.py set up. Gives its connector's URL."""
    serial = tomllib.loads((directory / "setup.toml").read_text())["device"]["serial"]
    state = shutil.copy(directory / "device.json", scratch / "device.json")
    with Connector(Device(serial, state=state)) as connector:
        yield connector.url


@contextmanager
def service(config: Path, log: Path, env: Mapping[str, str]) -> Iterator[str]:
    """`hsmsign serve` on a free port, ready to sign. Gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    hsmsign = Path(sys.executable).with_name("hsmsign")
    command: list[str | Path] = [hsmsign, "serve", "--config", config, "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **env}
        )
    try:
        wait_until_ready(url, process, log)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until /readyz says 200. Exits where it does not come to that."""
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
    sys.exit(f"The service did not become ready. Its last answer: {answer}\nIts log ({log}):\n{log.read_text()}")
