"""EKB images through HTTP, as digsigserver's clients post them, opened by OpenSSL as a device would."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.conftest import assert_problem, curl
from tests.signers.formats.test_ekb import opened

PATH = "/sign/tegra/ekb"
FIELDS = {"machine": "demo-token", "soctype": "tegra234", "bspversion": "36.4.3"}
# machine, soctype, and where the fuses' key is that the device has
MACHINES = [
    ("demo-token", "tegra234", "demo-token/ekbsign/oem_k1.key"),
    ("demo-token-t194", "tegra194", "demo-token-t194/ekbsign/kek2.key"),
    ("demo-file", "tegra234", "demo-file/ekbsign/oem_k1.key"),
    ("demo-yubihsm", "tegra234", "demo-file/ekbsign/oem_k1.key"),
]
FILES = {1: "kernel-encryption.key", 2: "disk-encryption.key", 4: "uefi-variable-authentication.key"}


def hexadecimal(path: Path) -> bytes:
    return bytes.fromhex(path.read_text())


@pytest.mark.parametrize(("machine", "soctype", "fuse"), MACHINES)
@pytest.mark.parametrize("bspversion", ["35.4.1", "36.4.3"])
def test_as_clients_post_it(
    fixtures_service: Any, softhsm: Any, tmp_path: Path, *, machine: str, soctype: str, fuse: str, bspversion: str
) -> None:
    fields = (f"machine={machine}", f"soctype={soctype}", f"bspversion={bspversion}")
    image = curl(fixtures_service.url + PATH, tmp_path, *fields)
    files = softhsm.keys / "demo-file/ekbsign"
    key, vector = hexadecimal(softhsm.keys / fuse).hex(), hexadecimal(files / "fixed-vector")
    assert opened(image, key, vector) == {tag: hexadecimal(files / name) for tag, name in FILES.items()}
    tampered = bytearray(image)
    tampered[100] ^= 1
    with pytest.raises(AssertionError):
        opened(bytes(tampered), key, vector)


def test_l4t_35_1(fixtures_service: Any, softhsm: Any, tmp_path: Path) -> None:
    fields = ("machine=demo-file", "soctype=tegra234", "bspversion=35.1.0")
    image = curl(fixtures_service.url + PATH, tmp_path, *fields)
    files = softhsm.keys / "demo-file/ekbsign"
    key, vector = hexadecimal(files / "oem_k1.key").hex(), hexadecimal(files / "fixed-vector")
    assert opened(image, key, vector, (32, 16)) == {tag: hexadecimal(files / FILES[tag]) for tag in (1, 2)}


def test_digsigserver_s_key_files(softhsm: Any, start: Callable[..., Any], tmp_path: Path) -> None:
    home = tmp_path / "keys/jetson/ekbsign"
    home.mkdir(parents=True)
    for name in ("oem_k1.key", "fixed-vector", "uefi-variable-authentication.key"):
        shutil.copy(softhsm.keys / "demo-file/ekbsign" / name, home)
    roles = {"fuse": "oem_k1.key", "fixed-vector": "fixed-vector", "auth": "uefi-variable-authentication.key"}
    roles |= {"kernel": "kernel-encryption.key", "disk": "disk-encryption.key"}
    grant = {"signer": "ekb", "provider": "files"}
    service = start(
        {
            "providers.files": {"kind": "file", "root": str(tmp_path / "keys")},
            "grants": [
                {"name": role, "role": role, "object": f"{{machine}}/ekbsign/{file}", **grant}
                for role, file in roles.items()
            ],
        }
    )
    image = curl(service.url + PATH, tmp_path, "machine=jetson", "soctype=tegra234", "bspversion=35.4.1")
    key, vector = hexadecimal(home / "oem_k1.key").hex(), hexadecimal(home / "fixed-vector")
    assert opened(image, key, vector) == {4: hexadecimal(home / "uefi-variable-authentication.key")}


@pytest.mark.parametrize(
    ("fields", "status", "slug"),
    [
        ({"machine": "demo-nowhere"}, 404, "key-not-found"),
        ({"soctype": "tegra194"}, 422, "key-unsuited"),
        ({"soctype": "tegra264"}, 400, "invalid-request"),
        ({"soctype": ""}, 400, "invalid-request"),
        ({"bspversion": "32.7.4"}, 400, "invalid-request"),
        ({"bspversion": ""}, 400, "invalid-request"),
    ],
)
def test_each_refusal(fixtures_service: Any, fields: dict[str, str], status: int, slug: str) -> None:
    form = {name: (None, value) for name, value in (FIELDS | fields).items()}
    answer = httpx.post(fixtures_service.url + PATH, files=form, timeout=60)
    assert_problem(answer, status, slug)
    fixtures_service.assert_no_files()


def test_what_is_shown_of_symmetric_keys(fixtures_service: Any, softhsm: Any) -> None:
    url = fixtures_service.url
    listed = httpx.get(f"{url}/keys", timeout=60)
    keys = {key["name"]: key for key in listed.json()["keys"] if key["role"] == "fuse" and key["signer"] == "ekb"}
    assert {name: key["algorithm"] for name, key in keys.items()} == {
        "demo-token-ekb": "AES-256", "demo-token-ekb-t194": "AES-128", "demo-file-ekb": "AES-256",
        "demo-yubihsm-ekb": "AES-256",
    }  # fmt: skip
    assert all(key["usable"] and key["spki_sha256"] is None for key in keys.values())
    shown = listed.text + "".join(httpx.get(f"{url}/keys/{name}", timeout=60).text for name in keys)
    for _, _, fuse in MACHINES:
        assert (softhsm.keys / fuse).read_text().strip() not in shown + fixtures_service.log
    for path in ("sign", "attestation"):
        call = httpx.post if path == "sign" else httpx.get
        body = {"digest": "00" * 32, "hash": "sha256", "scheme": "ecdsa"} if path == "sign" else None
        answer = call(f"{url}/keys/demo-token-ekb/{path}", timeout=60, **({"json": body} if body else {}))
        assert answer.status_code in (403, 404), answer.text


def test_by_the_command_line(fixtures_service: Any, softhsm: Any, tmp_path: Path) -> None:
    hsmsign = Path(sys.executable).with_name("hsmsign")
    options = [option for name, value in FIELDS.items() for option in (f"--{name}", value)]
    command = [hsmsign, "sign", "ekb", *options, "--server", fixtures_service.url, "-o", tmp_path / "ekb.img"]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    key = hexadecimal(softhsm.keys / "demo-token/ekbsign/oem_k1.key").hex()
    assert opened((tmp_path / "ekb.img").read_bytes(), key, b"").keys() == FILES.keys()
