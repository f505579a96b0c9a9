"""UEFI capsules, through HTTP as the layers' own lines post them, decoded by edk2's GenerateCapsule."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.conftest import assert_problem, curl

PAYLOAD = b"firmware\r\n\x00" * 20_000
GUIDS = {"tegra194": "be3f5d68-7654-4ed2-838c-2a2faf901a78", "tegra234": "bf0d4599-20d4-414e-b2c5-3595b1cda402"}
ENDPOINTS = ["/sign/tegra/ueficapsule", "/sign/ueficapsule"]
MACHINES = ["demo-token", "demo-file", "demo-yubihsm"]


def post(url: str, directory: Path, *fields: str) -> bytes:
    """As the contract has the line."""
    (directory / "payload").write_bytes(PAYLOAD)
    return curl(url, directory, *fields, "artifact=@payload")


def decoded(directory: Path, capsule: bytes, trusted: Path, guid: str) -> tuple[bytes, dict[str, str]] | None:
    """The payload and what the capsule says of it; None where GenerateCapsule refuses the signature."""
    (directory / "signed.cap").write_bytes(capsule)
    # by options alone it cannot (args.SignSubjectName): the description has what it takes of them
    roles = ("OpenSslSignerPrivateCertFile", "OpenSslOtherPublicCertFile", "OpenSslTrustedPublicCertFile")
    payloads = [{"Guid": guid, "HardwareInstance": "0", **dict.fromkeys(roles, str(trusted))}]
    (directory / "payloads.json").write_text(json.dumps({"Payloads": payloads}))
    command = [sys.executable, "-m", "edk2basetools.Capsule.GenerateCapsule", "--decode", "-j", "payloads.json"]
    output = subprocess.check_output([*command, "-o", "decoded", "signed.cap"], cwd=directory, text=True, timeout=60)
    if "verification failed" in output:
        return None
    (told,) = json.loads((directory / "decoded.json").read_text())["Payloads"]
    return (directory / "decoded.Payload.1.bin").read_bytes(), told


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("soctype", GUIDS)
def test_a_jetson_s(
    fixtures_service: Any, softhsm: Any, tmp_path: Path, *, machine: str, endpoint: str, soctype: str
) -> None:
    trusted, guid = softhsm.certificate("demo-ca"), GUIDS[soctype]
    fields = (f"machine={machine}", f"soctype={soctype}", "bspversion=35.4.1", f"guid={guid}")
    signed = post(fixtures_service.url + endpoint, tmp_path, *fields)
    payload, told = decoded(tmp_path, signed, trusted, guid) or pytest.fail("it is refused")
    assert payload == PAYLOAD
    assert int(told["FwVersion"], 0) == int(told["LowestSupportedVersion"], 0) == 0x00230401
    for at in (-1, -len(PAYLOAD) - 1):
        tampered = bytearray(signed)
        tampered[at] ^= 1
        assert decoded(tmp_path, bytes(tampered), trusted, guid) is None
    assert decoded(tmp_path, signed, softhsm.certificate("file-uefi-pk"), guid) is None


def test_its_guid_and_versions(fixtures_service: Any, softhsm: Any, tmp_path: Path) -> None:
    url, trusted = fixtures_service.url + ENDPOINTS[0], softhsm.certificate("demo-ca")
    fields = ("machine=demo-token", "soctype=tegra234", "bspversion=36.4.3", "guid=")
    _, told = decoded(tmp_path, post(url, tmp_path, *fields), trusted, GUIDS["tegra234"]) or pytest.fail("refused")
    assert int(told["FwVersion"], 0) == 0x00240403
    fields = (*fields, "fwversion=0x00250000", "lsv=36.0")
    _, told = decoded(tmp_path, post(url, tmp_path, *fields), trusted, GUIDS["tegra234"]) or pytest.fail("refused")
    assert (int(told["FwVersion"], 0), int(told["LowestSupportedVersion"], 0)) == (0x00250000, 0x00240000)


def test_digsigserver_s_key_files(softhsm: Any, start: Callable[..., Any], tmp_path: Path) -> None:
    """The key with its certificate in one file, and the chain in another."""
    home = tmp_path / "keys/jetson"
    shutil.copytree(softhsm.keys / "demo-file/ueficapsulesign", home / "ueficapsulesign")
    shutil.copy(softhsm.certificate("demo-ca"), home / "ueficapsulesign/other_public_cert.pem")
    (home / "ueficapsulesign/other_public_cert.pem").chmod(0o600)
    layout = "{machine}/ueficapsulesign"
    grant = {"signer": "capsule", "provider": "files"}
    service = start(
        {
            "providers.files": {"kind": "file", "root": str(tmp_path / "keys")},
            "grants": [
                {"name": "key", "role": "key", "object": f"{layout}/signer_private_cert.pem", **grant},
                {"name": "chain", "role": "chain", "object": f"{layout}/other_public_cert.pem", **grant},
            ],
        }
    )
    fields = ("machine=jetson", "soctype=tegra234", "bspversion=35.4.1", f"guid={GUIDS['tegra234']}")
    signed = post(service.url + ENDPOINTS[0], tmp_path, *fields)
    assert decoded(tmp_path, signed, softhsm.certificate("demo-ca"), GUIDS["tegra234"])
    length = int.from_bytes(signed[104:108], "little")
    printed = subprocess.check_output(
        ["openssl", "pkcs7", "-inform", "DER", "-print_certs", "-noout"], input=signed[128 : 104 + length]
    ).decode()
    assert "subject=CN = hsmsign demo CA" in printed
    assert "subject=CN = hsmsign demo file capsule" in printed


@pytest.mark.parametrize(
    ("fields", "status", "slug"),
    [
        ({"machine": "demo-nowhere"}, 404, "key-not-found"),
        ({"soctype": "tegra186"}, 400, "invalid-request"),
        ({"soctype": ""}, 400, "invalid-request"),
        ({"bspversion": ""}, 400, "invalid-request"),
        ({"bspversion": "latest"}, 400, "invalid-request"),
        ({"guid": "none"}, 400, "invalid-request"),
        ({"lsv": "37.0"}, 400, "invalid-request"),
    ],
)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_each_refusal(fixtures_service: Any, endpoint: str, fields: dict[str, str], status: int, slug: str) -> None:
    form = {"machine": "demo-token", "soctype": "tegra234", "bspversion": "36.4.3", **fields}
    answer = httpx.post(fixtures_service.url + endpoint, data=form, files={"artifact": ("x", PAYLOAD)}, timeout=60)
    assert_problem(answer, status, slug)
    fixtures_service.assert_no_files()
