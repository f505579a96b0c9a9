"""The service as users start it, with keys on SoftHSM tokens, in files and in S3."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from moto.server import ThreadedMotoServer

PATIENCE_S = 20.0

AWS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}

PASSPHRASE = "correct-horse-canary"


@dataclass
class Running:
    """A service that runs."""

    process: subprocess.Popen[bytes]
    log_file: Path
    spool: Path
    url: str = ""

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def wait_until_serving(self) -> "Running":
        end = time.monotonic() + PATIENCE_S
        while True:
            for line in self.log.splitlines():
                if line.startswith("{") and (entry := json.loads(line))["event"] == "serving":
                    self.url = f"http://127.0.0.1:{entry['port']}"
                    return self
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.05)

    def sign(self, distro: str, artifact: bytes, field: str = "sw-description", **fields: str) -> httpx.Response:
        form = {"distro": distro, **{name.replace("_", "-"): value for name, value in fields.items()}}
        return httpx.post(self.url + "/sign/swupdate", data=form, files={field: (field, artifact)}, timeout=60)

    def assert_no_files(self) -> None:
        """A job removes its files, in a thread, when its answer is out."""
        end = time.monotonic() + PATIENCE_S
        while list(self.spool.glob("*/*")):
            assert time.monotonic() < end, "the spool never became empty"
            time.sleep(0.02)

    def processes(self) -> list[Path]:
        """The directories in /proc of the service and of all that it started."""
        found, waiting = [], [str(self.process.pid)]
        while waiting:
            directory = Path("/proc", waiting.pop())
            found.append(directory)
            # processes and threads end while they are looked for
            with contextlib.suppress(OSError):
                for task in directory.glob("task/*/children"):
                    with contextlib.suppress(OSError):
                        waiting += task.read_text().split()
        return found


def write_toml(tables: dict[str, Any]) -> str:
    """Settings as a TOML file: JSON's strings, numbers and lists are TOML's too."""

    def inline(value: Any) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{key} = {inline(entry)}" for key, entry in value.items()) + " }"
        return json.dumps(value)

    lines = []
    for name, table in tables.items():
        for heading, entry in (
            [(f"[[{name}]]", entry) for entry in table] if isinstance(table, list) else [(f"[{name}]", table)]
        ):
            lines += [heading, *(f"{key} = {inline(value)}" for key, value in entry.items()), ""]
    return "\n".join(lines)


def curl(url: str, directory: Path, *fields: str) -> bytes:
    """What a line of the layers' own answers, which is made of these words; run in a directory."""
    limits = ("--connect-timeout", "30", "--max-time", "1800", "--retry", "1")
    form = [argument for field in fields for argument in ("-F", field)]
    command = ("curl", *limits, "--silent", "--fail", "-X", "POST", *form, "--output", "out", url)
    subprocess.run(command, cwd=directory, check=True, timeout=60)
    return (directory / "out").read_bytes()


def accepts(directory: Path, *command: str | Path) -> bool:
    """Whether a verifier that runs in a directory ends well."""
    return subprocess.run(command, cwd=directory, capture_output=True, timeout=60, check=False).returncode == 0


def flipped(content: bytes, at: int) -> bytes:
    """Another bit there; from the end where `at` is negative."""
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


def assert_problem(answer: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    problem: dict[str, Any] = answer.json()
    assert problem["type"] == f"/problems/{slug}"
    assert problem["hint"]
    assert ("Retry-After" in answer.headers) == (status == 503)
    return problem


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """Starts `hsmsign serve` with these tables of settings."""
    started: list[Running] = []

    def start(tables: dict[str, Any]) -> Running:
        directory = tmp_path_factory.mktemp("service")
        server = {"port": 0, "spool_directory": str(directory / "spool"), "state_directory": str(directory / "state")}
        settings = {"server": server, "log": {"format": "json", "level": "debug"}, **tables}
        (directory / "hsmsign.toml").write_text(write_toml(settings))
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                [Path(sys.executable).with_name("hsmsign"), "serve", "--config", directory / "hsmsign.toml"],
                stderr=log,
                env={"PATH": os.environ["PATH"], **AWS},
            )
        running = Running(process, directory / "log", directory / "spool")
        started.append(running)
        return running.wait_until_serving()

    yield start
    for running in started:
        running.process.terminate()
        assert running.process.wait(30) == 0, running.log


@pytest.fixture(scope="session")
def s3() -> Iterator[tuple[str, Any]]:
    """The URL of moto's S3 server, and a client for it; the bucket is `keys`."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )
    client.create_bucket(Bucket="keys")
    yield f"http://{host}:{port}", client
    server.stop()


@pytest.fixture(scope="session")
def silent() -> Iterator[str]:
    """The URL of a server that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def grant(name: str, provider: str, object_: str, *, role: str = "rsa", **more: Any) -> dict[str, Any]:
    return {"name": name, "signer": "swupdate", "role": role, "provider": provider, "object": object_, **more}


@pytest.fixture(scope="session")
def encrypted_key() -> tuple[rsa.RSAPrivateKey, bytes]:
    """A key that only this run's passphrase opens, and its PEM."""
    key = rsa.generate_private_key(65537, 2048)
    encryption = serialization.BestAvailableEncryption(PASSPHRASE.encode())
    return key, key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


@pytest.fixture(scope="session")
def service(
    softhsm: Any, s3: tuple[str, Any], encrypted_key: tuple[Any, bytes], silent: str, start: Callable[..., Running]
) -> Running:
    """The service with every kind of provider; a distro is called after its provider."""
    url, client = s3
    for name in ("rsa-private.key", "cms-private.key", "cms.cert"):
        client.upload_file(str(softhsm.keys / "demo-file/swupdate" / name), "keys", f"swupdate/{name}")
    directory = Path(tempfile.mkdtemp(dir=softhsm.directory))
    for name, content in (
        ("passphrase", PASSPHRASE.encode() + b"\n"), ("encrypted.pem", encrypted_key[1]), ("text.pem", b"no key"),
    ):  # fmt: skip
        (directory / name).touch(0o600)
        (directory / name).write_bytes(content)
    token = {
        "kind": "pkcs11",
        "module": str(softhsm.module),
        "pin": {"file": str(softhsm.pin_file)},
        "env": softhsm.env,
    }
    return start(
        {
            "providers.token": {**token, "token": "hsmsign"},
            "providers.absent": {**token, "token": "no such token"},
            "providers.file": {"kind": "file", "root": str(softhsm.keys)},
            "providers.s3": {"kind": "s3", "bucket": "keys", "endpoint_url": url},
            "providers.down": {
                "kind": "s3", "bucket": "keys", "endpoint_url": "http://127.0.0.1:9", "connect_timeout_s": 1,
            },
            "providers.slow": {"kind": "s3", "bucket": "keys", "endpoint_url": silent, "read_timeout_s": 1},
            "providers.locked": {"kind": "file", "root": str(directory)},
            "providers.opened": {
                "kind": "file", "root": str(directory), "passphrase": {"file": str(directory / "passphrase")},
            },
            "grants": [
                grant("token-rsa", "token", "swupdate-rsa", distro="token"),
                grant("token-cms", "token", "swupdate-cms", role="cms", distro="token"),
                grant("token-cms-rsa", "token", "swupdate-cms-rsa", role="cms", distro="token-rsa"),
                grant("file-rsa", "file", "demo-file/swupdate/rsa-private.key", distro="file"),
                grant(
                    "file-cms", "file", "demo-file/swupdate/cms-private.key", role="cms", distro="file",
                    certificate="demo-file/swupdate/cms.cert",
                ),
                grant("s3-rsa", "s3", "swupdate/rsa-private.key", distro="s3"),
                grant(
                    "s3-cms", "s3", "swupdate/cms-private.key", role="cms", distro="s3", certificate="swupdate/cms.cert"
                ),
                grant("p256", "token", "digest-p256", distro="p256", digest=True),
                grant("both-token", "token", "swupdate-rsa", distro="both"),
                grant("both-file", "file", "demo-file/swupdate/rsa-private.key", distro="both"),
                grant("absent", "absent", "x", distro="absent"),
                grant("down", "down", "x", distro="down"),
                grant("slow", "slow", "x", distro="slow"),
                grant("gone", "token", "no such key", distro="gone"),
                grant("text", "locked", "text.pem", distro="text"),
                grant("locked", "locked", "encrypted.pem", distro="locked"),
                grant("opened", "opened", "encrypted.pem", distro="opened"),
                grant("pinned", "token", "swupdate-rsa", distro="pinned", spki_sha256="00" * 32),
            ],
        }
    )  # fmt: skip


@pytest.fixture(scope="session")
def fixtures_service(make_yubihsm: Callable[[], Any], start: Callable[..., Running]) -> Running:
    """The service on all of the fixtures and a simulated YubiHSM 2, with NXP's tool as `make setup` puts it."""
    tables = tomllib.loads(make_yubihsm().config)
    providers = {f"providers.{name}": table for name, table in tables["providers"].items()}
    signers = {f"signers.{name}": tables["signers"][name] for name in ("imx", "tegra")}
    return start({**providers, "grants": tables["grants"], "tools": tables["tools"], **signers})
