"""Attestation through HTTP and the command line, on the simulator; `openssl verify` is who verifies the chains."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from yubihsm import YubiHsm
from yubihsm.core import AuthSession
from yubihsm.defs import ALGORITHM, CAPABILITY
from yubihsm.objects import AsymmetricKey, AuthenticationKey, WrapKey

from tests.end_to_end.conftest import accepts
from yubihsm_simulator import Connector, Device

SERIAL = 20406080
PASSWORD = "the service's password"
SIGNS = CAPABILITY.SIGN_ECDSA
SERVICE = SIGNS | CAPABILITY.SIGN_ATTESTATION_CERTIFICATE | CAPABILITY.GET_OPAQUE
EXPORTABLE = SIGNS | CAPABILITY.EXPORTABLE_UNDER_WRAP
KEYS = {"generated": 0x0100, "imported": 0x0101, "exportable": 0x0102, "wrapped": 0x0103}
PROGRAM = Path(sys.executable).with_name("hsmsign")


@dataclass
class Signer:
    """The service, and the simulator that has its keys."""

    url: str
    device: Device
    roots: Path

    def attestation(self, name: str) -> dict[str, Any]:
        answer = httpx.get(f"{self.url}/keys/{name}/attestation", timeout=60)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def sign(self, machine: str) -> httpx.Response:
        files = {"artifact": ("artifact", b"content")}
        return httpx.post(
            f"{self.url}/sign/generic", data={"machine": machine, "method": "ECDSA"}, files=files, timeout=60
        )

    def attest(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        command = (PROGRAM, "keys", "--server", self.url, "attest", *arguments)
        env = {"PATH": os.defpath, "COLUMNS": "200"}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def fill(session: AuthSession) -> None:
    """Makes the service's credential, and a key of each origin."""
    AuthenticationKey.put_derived(session, 2, "service", 1, SERVICE, CAPABILITY.NONE, PASSWORD)
    for name, capabilities in (("generated", SIGNS), ("exportable", EXPORTABLE), ("wrapped", EXPORTABLE)):
        AsymmetricKey.generate(session, KEYS[name], name, 1, capabilities, ALGORITHM.EC_P256)
    private = ec.generate_private_key(ec.SECP256R1())
    AsymmetricKey.put(session, KEYS["imported"], "imported", 1, SIGNS, private)
    both = CAPABILITY.EXPORT_WRAPPED | CAPABILITY.IMPORT_WRAPPED
    wrap = WrapKey.generate(session, 0, "wrap", 1, both, ALGORITHM.AES256_CCM_WRAP, EXPORTABLE)
    wrapped = AsymmetricKey(session, KEYS["wrapped"])
    blob = wrap.export_wrapped(wrapped)
    wrapped.delete()
    wrap.import_wrapped(blob)


@pytest.fixture(scope="module")
def signer(start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signer]:
    directory = tmp_path_factory.mktemp("attestation")
    (directory / "password").write_text(PASSWORD)
    device = Device(serial=SERIAL)
    roots = directory / "roots.pem"
    sub_ca = device.attestation_issuers[0]
    subprocess.run(
        ["openssl", "x509", "-inform", "DER", "-out", directory / "sub.pem"], input=sub_ca, check=True, timeout=60
    )
    roots.write_bytes(device.attestation_root + (directory / "sub.pem").read_bytes())
    with Connector(device) as connector:
        with YubiHsm.connect(connector.url) as hsm, hsm.create_session_derived(1, "password") as session:
            fill(session)
        provider = {
            "kind": "yubihsm", "connector": connector.url, "serial": SERIAL, "auth_key_id": 2,
            "password": {"file": str(directory / "password")},
        }  # fmt: skip
        grants = [
            {
                "name": name, "signer": "generic", "role": "key", "machine": name, "provider": "simulator",
                "id": f"{id_:04x}", "attested": True,
            }
            for name, id_ in KEYS.items()
        ]  # fmt: skip
        free = [{**grant, "name": f"free-{grant['name']}", "machine": f"free-{grant['name']}"} for grant in grants]
        grants += [{**grant, "attested": False} for grant in free]
        grants += [{**grants[0], "name": "yubico", "machine": "yubico", "provider": "yubico"}]
        service = start(
            {
                "providers.simulator": {**provider, "attestation_roots": str(roots)},
                "providers.yubico": provider,
                "tools": {"sandbox": "none"},
                "grants": grants,
            }
        )
        yield Signer(service.url, device, roots)


def test_a_generated_key_is_attested(signer: Signer, tmp_path: Path) -> None:
    answer = signer.attestation("generated")
    assert (answer["verified"], answer["error"]) == (True, None)
    assert answer["attested"] == {
        "serial": SERIAL, "firmware": "2.4.0", "id": "0100", "label": "generated", "origin": "generated",
        "domains": [1], "capabilities": ["sign-ecdsa"], "exportable": False, "never_extractable": True,
    }  # fmt: skip
    (tmp_path / "attestation.pem").write_text(answer["certificate_pem"])
    (tmp_path / "chain.pem").write_text(answer["chain_pem"])
    (tmp_path / "root.pem").write_bytes(signer.device.attestation_root)
    verify = ("verify", "-CAfile", "root.pem", "-untrusted", "chain.pem", "attestation.pem")
    assert accepts(tmp_path, "openssl", *verify)
    key = httpx.get(f"{signer.url}/keys/generated").json()
    assert (answer["public_key_pem"], answer["spki_sha256"]) == (key["public_key_pem"], key["spki_sha256"])
    shown = subprocess.run(
        ["openssl", "x509", "-in", "attestation.pem", "-noout", "-pubkey"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    assert shown.stdout.decode() == key["public_key_pem"]


def test_it_signs(signer: Signer, tmp_path: Path) -> None:
    answer = signer.sign("generated")
    assert answer.status_code == 200, answer.text
    (tmp_path / "signature").write_bytes(answer.content)
    (tmp_path / "content").write_bytes(b"content")
    (tmp_path / "key.pem").write_text(httpx.get(f"{signer.url}/keys/generated").json()["public_key_pem"])
    assert accepts(tmp_path, "openssl", "dgst", "-sha256", "-verify", "key.pem", "-signature", "signature", "content")


@pytest.mark.parametrize(
    ("name", "origin", "why"),
    [
        ("imported", "imported", "which was imported"),
        ("exportable", "generated", "may leave its device"),
        ("wrapped", "wrapped", "which came to it wrapped"),
    ],
)
def test_another_is_refused(signer: Signer, name: str, origin: str, why: str) -> None:
    answer = signer.sign(name)
    assert (answer.status_code, answer.json()["type"]) == (403, "/problems/key-not-attested"), answer.text
    assert why in answer.json()["detail"]
    told = signer.attestation(name)
    assert (told["verified"], told["attested"]["origin"]) == (True, origin)
    assert told["attested"]["never_extractable"] is False
    assert signer.sign(f"free-{name}").status_code == 200, "a grant need not ask for it"


def test_a_simulator_is_not_yubicos(signer: Signer) -> None:
    answer = signer.sign("yubico")
    assert (answer.status_code, answer.json()["type"]) == (403, "/problems/key-not-attested")
    told = signer.attestation("yubico")
    assert (told["verified"], told["attested"]) == (False, None)
    assert told["error"]["type"] == "/problems/key-not-attested"
    assert "leads to no pinned certificate" in told["error"]["detail"]


def test_what_is_ready(signer: Signer) -> None:
    report = httpx.get(f"{signer.url}/readyz", timeout=60)
    assert report.status_code == 503
    usable = {key["name"]: key["usable"] for key in report.json()["keys"]}
    refused = {"imported", "exportable", "wrapped", "yubico"}
    assert {name for name, can in usable.items() if not can} == refused


def test_a_device_is_asked_once_for_each_key(signer: Signer) -> None:
    signer.attestation("generated")
    before = signer.device.commands[0x64]  # SIGN ATTESTATION CERTIFICATE
    for _ in range(3):
        assert signer.sign("generated").status_code == 200
        signer.attestation("generated")
    assert signer.device.commands[0x64] == before


class TestCommand:
    def test_what_is_proven(self, signer: Signer, tmp_path: Path) -> None:
        done = signer.attest("generated", "--root", signer.roots, "--out", tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"YubiHSM 2, serial {SERIAL}, firmware 2.4.0" in done.stdout
        assert accepts(
            tmp_path, "openssl", "verify", "-CAfile", signer.roots, "-untrusted", "chain.pem", "attestation.pem"
        )

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("imported", "was imported"),
            ("exportable", "may leave its device"),
            ("free-wrapped", "came to it wrapped"),
            ("yubico", "leads to no pinned certificate"),
        ],
    )
    def test_what_is_not(self, signer: Signer, name: str, why: str) -> None:
        done = signer.attest(name, "--root", signer.roots)
        assert done.returncode == 1
        assert done.stderr.startswith("Error: ")
        assert why in done.stderr

    def test_the_server_is_not_believed(self, signer: Signer) -> None:
        done = signer.attest("generated", "--json")
        assert done.returncode == 1
        assert json.loads(done.stdout)["verified"] is True
        assert "leads to no pinned certificate" in done.stderr
