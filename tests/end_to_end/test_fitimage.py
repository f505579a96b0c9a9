"""FITs, through HTTP as digsigserver's clients post them, verified by U-Boot's fit_check_sign and by its rules."""

import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fit_rules
import httpx
import pytest
from fit_images import make, shown, with_nodes, write_dtb

from tests.conftest import ROOT
from tests.end_to_end.conftest import assert_problem

FIT_CHECK_SIGN = ROOT / ".cache/u-boot-tools/fit_check_sign"
MACHINES = {"demo-token": "fit", "demo-file": "file-fit", "demo-yubihsm": "file-fit"}
CURL = """\
curl --connect-timeout 30 --max-time 1800 --retry 1 --fail -X POST \
    -F external_data_offset=2000 -F "artifact=@fitImage" \
    -F mark_required=true {fields} \
    --output {output} http://$DIGSIG_SERVER_IP:$DIGSIG_SERVER_PORT/sign/fitimage
"""


def curl(service: Any, directory: Path, output: str, fields: str) -> bytes:
    """The line of digsigserver's documentation."""
    host, _, port = service.url.removeprefix("http://").rpartition(":")
    environment = {"PATH": "/usr/bin:/bin", "DIGSIG_SERVER_IP": host, "DIGSIG_SERVER_PORT": port}
    line = CURL.format(fields=fields, output=output)
    subprocess.run(["sh", "-c", line], cwd=directory, env=environment, check=True, capture_output=True, timeout=60)
    return (directory / output).read_bytes()


def post(service: Any, artifact: Path, dtb: Path | None = None, **fields: str) -> httpx.Response:
    files = {"artifact": ("fitImage", artifact.read_bytes())}
    if dtb is not None:
        files["dtb"] = (dtb.name, dtb.read_bytes())
    return httpx.post(service.url + "/sign/fitimage", data=fields, files=files, timeout=60)


def unpacked(content: bytes) -> tuple[bytes, bytes]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        fit, dtb = archive.getmembers()
        assert (fit.name, dtb.name) == ("fitImage", "u-boot.dtb")
        contents = [archive.extractfile(member) for member in (fit, dtb)]
        return contents[0].read(), contents[1].read()  # type: ignore[union-attr]


@pytest.fixture
def dtb(tmp_path: Path) -> Path:
    return write_dtb(tmp_path / "u-boot.dtb")


@pytest.fixture
def boots(tmp_path: Path) -> Callable[..., bool]:
    """What U-Boot's tool says, where it can, and its rules: of one mind."""

    def run(image: bytes, dtb: bytes, *, tool: bool) -> bool:
        (tmp_path / "signed").write_bytes(image)
        (tmp_path / "keys.dtb").write_bytes(dtb)
        try:
            fit_rules.verify(image, dtb)
            verdict = True
        except fit_rules.Refused:
            verdict = False
        if tool:
            assert FIT_CHECK_SIGN.exists(), f"{FIT_CHECK_SIGN} is missing: run `make setup`"
            command = [FIT_CHECK_SIGN, "-f", "signed", "-k", "keys.dtb"]
            done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, timeout=60)
            assert (done.returncode == 0) == verdict
        return verdict

    return run


def public_numbers(softhsm: Any, label: str) -> str:
    """A key's public half, as OpenSSL shows it, in hex."""
    command = ["openssl", "pkey", "-pubin", "-in", softhsm.public_key(label), "-outform", "DER"]
    return subprocess.run(command, check=True, capture_output=True).stdout.hex()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("name", "kind"), [("dev", "rsa"), ("ec", "p256")])
@pytest.mark.parametrize("more", ["", 'padding = "pss";'])
def test_devices_accept_it_and_refuse_it_tampered_with(
    fixtures_service: Any, softhsm: Any, boots: Any, dtb: Path, tmp_path: Path, machine: str, *, name: str, kind: str,
    more: str,
) -> None:  # fmt: skip
    algo = "sha256,rsa2048" if kind == "rsa" else "sha256,ecdsa256"
    path = make(tmp_path, algo=algo, key=name, more=more, images=not more)
    answer = post(fixtures_service, path, dtb, machine=machine, mark_required="1")
    assert answer.status_code == 200, answer.text
    assert 'filename="signed-fitImage.tar.gz"' in answer.headers["content-disposition"]
    signed, keys = unpacked(answer.content)
    assert boots(signed, keys, tool=kind == "rsa")
    key = fit_rules.Blob(keys).nodes["/signature/key-dev" if kind == "rsa" else "/signature/ec"]
    number = key["rsa,modulus"] if kind == "rsa" else key["ecdsa,x-point"] + key["ecdsa,y-point"]
    assert number.hex() in public_numbers(softhsm, f"{MACHINES[machine]}-{kind}")
    for part in (b"a kernel", b"device tree\0", b"\0\x08\0\0"):
        place = signed.index(part) + 1
        tampered = signed[:place] + bytes([signed[place] ^ 1]) + signed[place + 1 :]
        assert not boots(tampered, keys, tool=kind == "rsa")
    fixtures_service.assert_no_files()


def test_digsigserver_s_lines(fixtures_service: Any, boots: Any, dtb: Path, tmp_path: Path) -> None:
    """A FIT, and one with U-Boot's device tree; machine and key name, and what they are without."""
    shutil.copy(make(tmp_path, algo="sha256,rsa2048"), tmp_path / "fitImage")
    for machine in ("-F machine=demo-file -F keyname=dev", "", "-F machine=imx -F keyname=dev.key -F backend=ssl"):
        alone = curl(fixtures_service, tmp_path, "fitImage.signed", machine)
        signed, keys = unpacked(curl(fixtures_service, tmp_path, "artifacts.tar.gz", f'{machine} -F "dtb=@u-boot.dtb"'))
        assert boots(signed, keys, tool=True)
        assert boots(alone, keys, tool=True)
        assert signed[0x2000:] == alone[0x2000:] == (tmp_path / "kernel").read_bytes() + signed[0x2000 + 45_000 :]
    uri = "pkcs11:token=YubiHSM;object=fit-rsa;type=private;pin-value=password"
    by_uri = f"-F machine=demo-token -F 'keyname=\"{uri}\"' -F backend=pkcs11"
    signed, keys = unpacked(curl(fixtures_service, tmp_path, "uri.tar.gz", f'{by_uri} -F "dtb=@u-boot.dtb"'))
    assert boots(signed, keys, tool=True)


def test_a_real_fit_is_mkimage_s_own(fixtures_service: Any, softhsm: Any, tmp_path: Path) -> None:
    """U-Boot with TF-A, of Debian's, by the key that mkimage reads from a file."""
    board = ROOT / ".cache/u-boot/firefly-rk3399"
    images = ("fdt", "firmware", "loadables")
    path = with_nodes(board / "u-boot.itb", tmp_path / "a.itb", "sha256,rsa2048", *images)
    dtb = shutil.copy(board / "rk3399-firefly.dtb", tmp_path / "u-boot.dtb")
    fields = {"machine": "demo-file", "timestamp": "1700000000", "mark_required": "1", "comment": "a comment"}
    signed, keys = unpacked(post(fixtures_service, path, Path(dtb), **fields).content)
    (tmp_path / "ours").write_bytes(signed)
    (tmp_path / "ours.dtb").write_bytes(keys)

    shutil.copy(softhsm.keys / "demo-file/fitimagesign/dev.key", tmp_path / "dev.key")
    request = ["openssl", "req", "-x509", "-new", "-key", "dev.key", "-subj", "/CN=dev", "-out", "dev.crt"]
    subprocess.run(request, cwd=tmp_path, check=True, capture_output=True)
    command = ["mkimage", "-F", "-E", "-k", ".", "-K", "u-boot.dtb", "-r", "-c", "a comment", "a.itb"]
    environment = {"PATH": "/usr/bin:/bin", "SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    names = {"signer_name": "somebody", "signer_version": "1"}
    assert shown(tmp_path / "ours", **names) == shown(path, **names)
    assert shown(tmp_path / "ours.dtb") == shown(Path(dtb))


def test_digsigserver_s_key_files(
    softhsm: Any, start: Callable[..., Any], boots: Any, dtb: Path, tmp_path: Path
) -> None:
    """A grant of a template serves every machine; the default's is imx."""
    home = tmp_path / "keys"
    for machine in ("imx", "board"):
        shutil.copytree(softhsm.keys / "imx/fitimagesign", home / machine / "fitimagesign")
    grant = {"name": "fit", "signer": "fitimage", "role": "key", "provider": "files", "aliases": ["dev"]}
    service = start(
        {
            "providers.files": {"kind": "file", "root": str(home)},
            "grants": [{**grant, "object": "{machine}/fitimagesign/dev.key"}],
        }
    )
    path = make(tmp_path, algo="sha256,rsa2048")
    for fields in ({}, {"machine": "board"}):
        assert boots(*unpacked(post(service, path, dtb, **fields).content), tool=True)


@pytest.mark.parametrize(
    ("key", "fields", "status", "slug"),
    [
        ("dev", {"machine": "unknown"}, 404, "key-not-found"),
        ("other", {}, 404, "key-not-found"),
        ("../imx/dev", {}, 422, "artifact-rejected"),
        ("dev", {"keyname": "other"}, 422, "artifact-rejected"),
        ("dev", {"keyname": "pkcs11:object=swupdate-rsa"}, 403, "key-not-granted"),
        ("dev", {"keyname": "pkcs11:object=fit-p256"}, 422, "key-unsuited"),
        ("ec", {}, 422, "key-unsuited"),
        ("dev", {"algo": "sha1,rsa2048"}, 400, "invalid-request"),
        ("dev", {"external_data_offset": "x"}, 400, "invalid-request"),
        ("dev", {"external_data_offset": "10"}, 422, "artifact-rejected"),
    ],
)
def test_each_refusal(
    fixtures_service: Any, tmp_path: Path, key: str, fields: dict[str, str], *, status: int, slug: str
) -> None:
    answer = post(
        fixtures_service, make(tmp_path, algo="sha256,rsa2048", key=key), **{"machine": "demo-token", **fields}
    )
    assert_problem(answer, status, slug)
    fixtures_service.assert_no_files()
