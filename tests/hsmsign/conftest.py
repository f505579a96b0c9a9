"""The service with small signers, in a process of its own, and what must be true of it after every request."""

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SCRIPT = Path(__file__).parent / "tiny_service.py"

NO_TLS = ssl.create_default_context()
"""Given to httpx so that it does not make one for each request: that takes longer than the request."""

PATIENCE_S = 10.0
"""How long a test waits for what must come true."""


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """Waits until `condition` is true, and returns its value."""
    end = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < end, f"it never came true that {what}"
        time.sleep(0.02)
    return value


@dataclass
class Service:
    """A service that runs."""

    process: subprocess.Popen[str]
    spool: Path
    key: rsa.RSAPrivateKey
    lines: list[dict[str, Any]] = field(default_factory=list)
    port: int = 0

    eventually = staticmethod(eventually)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return "\n".join(json.dumps(line) for line in self.lines)

    def requests(self) -> list[dict[str, Any]]:
        """The log's lines of requests."""
        return [line for line in self.lines if line["event"] == "request"]

    def line(self, answer: httpx.Response) -> dict[str, Any]:
        """The log's line of the request that got this answer."""
        id_ = answer.headers["X-Request-Id"]
        return self.eventually(
            lambda: next((line for line in self.requests() if line["request_id"] == id_), None), "the request is logged"
        )

    def read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(json.loads(line) if line.startswith("{") else {"event": "raw", "text": line})

    def wait_for(self, event: str) -> dict[str, Any]:
        """The first line of the log with this event."""
        return eventually(
            lambda: next((line for line in self.lines if line["event"] == event), None), f"it logs {event}\n{self.log}"
        )

    def wait_until_serving(self) -> "Service":
        self.port = self.wait_for("serving")["port"]
        return self

    def post(self, path: str = "/sign/tiny", **fields: Any) -> httpx.Response:
        """Posts a form: bytes are files, text is text."""
        files = [
            (name, ("name", value) if isinstance(value, bytes) else (None, value)) for name, value in fields.items()
        ]
        return httpx.post(self.url + path, files=files, timeout=60, verify=NO_TLS)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def files(self) -> list[str]:
        """What is in this instance's spool."""
        return [path.name for path in self.spool.glob("*/*")]

    def threads(self) -> list[str]:
        return [(task / "comm").read_text().strip() for task in Path(f"/proc/{self.process.pid}/task").iterdir()]

    def children(self) -> list[str]:
        return Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()

    def descriptors(self) -> list[str]:
        """The files of jobs that it has open."""
        found = []
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            # others are opened and closed meanwhile
            with contextlib.suppress(FileNotFoundError):
                found.append(str(link.readlink()))
        return [path for path in found if re.match(f"{self.spool}/[^/]+/", path)]

    def memory(self, name: str = "VmRSS") -> int:
        """A value of /proc/PID/status, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{name}:"))

    def assert_clean(self) -> None:
        """Nothing of a request is left, and the next good one works."""
        eventually(lambda: not self.files(), f"the spool is empty: {self.files()}")
        assert not self.descriptors()
        assert not self.children()
        assert len(self.threads()) <= MOST_THREADS, self.threads()
        answer = self.post(machine="abc", artifact=b"good")
        assert answer.status_code == 200, answer.text
        self.verify(answer.content, b"good")
        eventually(lambda: not self.files(), f"the spool is empty: {self.files()}")

    @staticmethod
    def assert_problem(answer: httpx.Response, status: int, slug: str) -> dict[str, Any]:
        """The answer is this problem document, in full."""
        assert answer.status_code == status, answer.text
        assert answer.headers["Content-Type"] == "application/problem+json"
        problem = answer.json()
        assert problem["type"] == f"/problems/{slug}"
        assert problem["status"] == status
        assert problem["request_id"] == answer.headers["X-Request-Id"]
        assert problem["title"]
        assert ("Retry-After" in answer.headers) == (status == 503)
        return dict(problem)

    def verify(self, signature: bytes, artifact: bytes) -> None:
        self.key.public_key().verify(signature, artifact, padding.PKCS1v15(), hashes.SHA256())

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


MOST_THREADS = 1 + 2 + 6 + 4 + (os.cpu_count() or 1)
"""The main thread; hashing; the event loop's pool (asyncio: CPUs + 4); reading and signing with key files."""


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, rsa.RSAPrivateKey]:
    """A directory of key files, and the private key of `tiny`."""
    directory = tmp_path_factory.mktemp("keys")
    rsa_key = rsa.generate_private_key(65537, 2048)
    other_keys = {"p256.pem": ec.generate_private_key(ec.SECP256R1()), "ed25519.pem": Ed25519PrivateKey.generate()}
    for name, key in {"rsa.pem": rsa_key, **other_keys}.items():
        (directory / name).touch(0o600)
        (directory / name).write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    return directory, rsa_key


@pytest.fixture(scope="session")
def start_service(
    keys: tuple[Path, rsa.RSAPrivateKey], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Service]]:
    """Starts a service; its arguments are tables of the settings."""
    started: list[Service] = []

    def start(spool: Path | None = None, **tables: Any) -> Service:
        spool = spool or tmp_path_factory.mktemp("spool")
        directory, key = keys
        settings = {
            "providers": {"files": {"kind": "file", "root": str(directory)}},
            "grants": [
                {"provider": "files", "signer": signer, "role": "key", "name": name, **grant}
                for name, signer, grant in (
                    ("tiny", "tiny", {"object": "rsa.pem", "machine": "abc*", "digest": True}),
                    ("gone", "tiny", {"object": "none.pem", "machine": "gone"}),
                    ("echo", "echo", {"object": "p256.pem", "machine": "abc*", "digest": True}),
                    ("edwards", "echo", {"object": "ed25519.pem", "machine": "edwards", "digest": True}),
                )
            ],
            "limits": tables.pop("limits", {}),
            "log": {"format": "json", **tables.pop("log", {})},
            "server": {
                "port": 0,
                "spool_directory": str(spool),
                "state_directory": str(tmp_path_factory.mktemp("state")),
                **tables.pop("server", {}),
            },
            **tables,
        }  # fmt: skip
        process = subprocess.Popen([sys.executable, SCRIPT, json.dumps(settings)], stderr=subprocess.PIPE, text=True)
        service = Service(process, spool, key)
        started.append(service)
        threading.Thread(target=service.read_log, daemon=True).start()
        return service

    yield start
    for service in started:
        service.process.kill()
        service.process.wait()
        assert service.process.stderr is not None
        service.process.stderr.close()


@pytest.fixture(scope="session")
def service(start_service: Callable[..., Service]) -> Service:
    """A service with small limits, shared by the tests that leave it as it was."""
    service = start_service(
        limits={
            "upload_max_bytes": 64 * 1024**2, "field_max_bytes": 1000, "fields_max": 10, "json_max_bytes": 1000,
            "upload_grace_s": 1, "upload_min_bytes_per_s": 100_000, "upload_timeout_s": 30, "job_timeout_s": 3,
        },
        server={"linger_timeout_s": 2},
    )  # fmt: skip
    return service.wait_until_serving()
