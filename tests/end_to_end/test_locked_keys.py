"""A key whose signature does not verify is locked, and stays so, until a person has looked."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest


@pytest.fixture
def misbehaviour(tmp_path: Path) -> Path:
    """The directory in which the module is told what to do."""
    directory = tmp_path / "hostile"
    directory.mkdir()
    return directory


@pytest.fixture
def service(softhsm: Any, start: Any, hostile_module: Path, misbehaviour: Path) -> Any:
    env = {**softhsm.env, "HOSTILE_DIR": str(misbehaviour), "HOSTILE_MODULE": str(softhsm.module)}
    token = {
        "kind": "pkcs11",
        "module": str(hostile_module),
        "token": "hsmsign",
        "pin": {"file": str(softhsm.pin_file)},
    }
    common = {"signer": "swupdate", "role": "rsa", "provider": "token"}
    grants = [
        {"name": "first", "object": "swupdate-rsa", "distro": "first", **common},
        {"name": "second", "object": "digest-p256", "distro": "second", "digest": True, **common},
        {**common, "name": "lent", "object": "generic-rsa", "machine": "lent", "signer": "generic", "role": "key"},
    ]
    return start({"providers.token": {**token, "env": env}, "grants": grants})


def sign(service: Any, distro: str) -> httpx.Response:
    files = {"sw-description": ("sw-description", b'software = { version = "1"; };')}
    return httpx.post(service.url + "/sign/swupdate", data={"distro": distro}, files=files, timeout=60)


def unlock(service: Any, *names: str) -> subprocess.CompletedProcess[str]:
    config = service.spool.parent / "hsmsign.toml"
    options = [part for name in names for part in ("--unlock", name)]
    command = [Path(sys.executable).with_name("hsmsign"), "doctor", "--config", config, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_until_doctor_unlocks_it(service: Any, misbehaviour: Path) -> None:
    assert sign(service, "first").status_code == 200
    (misbehaviour / "C_Sign").write_text("garbage")
    answer = sign(service, "first")
    assert (answer.status_code, answer.json()["type"]) == (500, "/problems/signature-mismatch")
    assert "Locked: first" in answer.json()["detail"]
    (misbehaviour / "C_Sign").unlink()  # the client tries again, and the token is as good as before
    for _ in range(2):
        answer = sign(service, "first")
        assert (answer.status_code, answer.json()["type"]) == (423, "/problems/key-locked")
    assert sign(service, "second").status_code == 200

    told = [httpx.get(f"{service.url}/keys/{name}", timeout=60).json()["usable"] for name in ("first", "second")]
    assert told == [False, True]
    said = unlock(service)
    assert said.returncode == 1
    assert "hsmsign doctor --unlock first" in said.stdout
    assert "is not locked" in unlock(service, "second").stderr

    said = unlock(service, "first")
    assert said.returncode == 0, said.stdout + said.stderr
    assert sign(service, "first").status_code == 200


def test_a_bare_digest_too(service: Any, misbehaviour: Path) -> None:
    asked = {"digest": "11" * 32, "hash": "sha256", "scheme": "ecdsa"}
    url = service.url + "/keys/second/sign"
    assert httpx.post(url, json=asked, timeout=60).status_code == 200
    (misbehaviour / "C_Sign").write_text("garbage")
    assert httpx.post(url, json=asked, timeout=60).status_code == 500
    (misbehaviour / "C_Sign").unlink()
    assert httpx.post(url, json=asked, timeout=60).status_code == 423
    assert sign(service, "first").status_code == 200


def test_a_key_that_a_tool_has_on_loan_too(service: Any, misbehaviour: Path) -> None:
    def sign_by_a_tool() -> httpx.Response:
        files = {"artifact": ("x.bin", b"content")}
        return httpx.post(service.url + "/sign/generic", data={"machine": "lent"}, files=files, timeout=60)

    assert sign_by_a_tool().status_code == 200
    (misbehaviour / "C_Sign").write_text("garbage")
    answer = sign_by_a_tool()
    assert (answer.status_code, answer.json()["type"]) == (500, "/problems/signature-mismatch")
    (misbehaviour / "C_Sign").unlink()
    assert sign_by_a_tool().status_code == 423
