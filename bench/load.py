"""Puts load on a server of this machine: wrk for many small requests, curl for a large upload."""

import ipaddress
import json
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from artifacts import Request

SCRIPT = Path(__file__).with_name("post.lua")
ANSWER_TIMEOUT_S = 30
"""An answer that takes longer is an error to wrk."""
UPLOAD_TIMEOUT_S = 600


@dataclass(frozen=True)
class Load:
    """What came of one run of wrk."""

    per_second: float
    p50_ms: float
    p99_ms: float
    errors: int


@dataclass(frozen=True)
class Upload:
    """What came of one upload; `answer_bytes` is the length of the answer."""

    seconds: float
    status: int
    answer_bytes: int


def check_local(url: str) -> None:
    """Raises ValueError where a URL does not lead to this machine."""
    host = urlsplit(url).hostname
    if host is None:
        raise ValueError(f"{url} is no URL")
    addresses = {ipaddress.ip_address(found[4][0]) for found in socket.getaddrinfo(host, None)}
    if not all(address.is_loopback for address in addresses):
        raise ValueError(f"{host} is not this machine: nobody else's server is put under load")


def post(url: str, request: Request, clients: int, seconds: int) -> Load:
    """Posts the same request again and again over `clients` connections, each with one request outstanding."""
    check_local(url)
    with tempfile.NamedTemporaryFile(prefix="hsmsign-bench-") as body:
        body.write(request.body)
        body.flush()
        command = ["wrk", "--threads", "1", "--connections", str(clients), "--duration", f"{seconds}s"]
        command += ["--timeout", f"{ANSWER_TIMEOUT_S}s", "--script", str(SCRIPT), url + request.path]
        command += ["--", body.name, request.content_type]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    return Load(found["signed"] / found["seconds"], found["p50_ms"], found["p99_ms"], found["errors"])


def upload(url: str, path: str, fields: dict[str, str], artifact: Path, answer: Path = Path("/dev/null")) -> Upload:
    """Posts a form with one file, which curl reads as it sends it; the answer goes to a file."""
    check_local(url)
    command = ["curl", "--silent", "--show-error", "--max-time", str(UPLOAD_TIMEOUT_S), "--output", str(answer)]
    command += ["--write-out", "%{time_total} %{http_code} %{size_download}"]
    for name, value in fields.items():
        command += ["--form", f"{name}={value}"]
    command += ["--form", f"artifact=@{artifact}", url + path]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, status, size = output.split()
    return Upload(float(seconds), int(status), int(size))
