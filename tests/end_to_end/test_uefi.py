"""UEFI programs, files and variables, through HTTP as the layers' own lines post them, verified by others' tools."""

import subprocess
from pathlib import Path
from typing import Any

import asn1crypto.cms
import httpx
import pytest

from tests.end_to_end.conftest import accepts, assert_problem, curl, flipped

PROGRAM = Path("/usr/lib/systemd/boot/efi/systemd-bootx64.efi")
CONTENT = b"a device tree\r\n" * 20_000
KEYS = {"demo-token": "uefi", "demo-file": "file-uefi", "demo-yubihsm": "file-uefi"}
ENDPOINTS = ["/sign/tegra/uefi", "/sign/uefi"]
TIME = "2026-07-01 12:00:00"


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("machine", KEYS)
def test_a_program(fixtures_service: Any, softhsm: Any, tmp_path: Path, machine: str, endpoint: str) -> None:
    fields = (f"machine={machine}", "signing_type=sbsign", f"artifact=@{PROGRAM}")
    signed = curl(fixtures_service.url + endpoint, tmp_path, *fields)
    db, authority = softhsm.certificate(f"{KEYS[machine]}-db"), softhsm.certificate("demo-ca")
    for content, good in ((signed, True), (flipped(signed, 70_000), False), (flipped(signed, -200), False)):
        (tmp_path / "program").write_bytes(content)
        assert accepts(tmp_path, "sbverify", "--cert", db, "program") is good
        assert accepts(tmp_path, "osslsigncode", "verify", "-CAfile", authority, "-in", "program") is good
    (tmp_path / "program").write_bytes(signed)
    assert not accepts(tmp_path, "sbverify", "--cert", softhsm.certificate(f"{KEYS[machine]}-kek"), "program")


@pytest.mark.parametrize("machine", KEYS)
def test_two_signatures(fixtures_service: Any, softhsm: Any, tmp_path: Path, machine: str) -> None:
    url = fixtures_service.url + ENDPOINTS[0]
    other = "demo-file" if machine == "demo-token" else "demo-token"
    curl(url, tmp_path, f"machine={machine}", "signing_type=sbsign", f"artifact=@{PROGRAM}")
    (tmp_path / "out").rename(tmp_path / "once")
    curl(url, tmp_path, f"machine={other}", "signing_type=sbsign", "artifact=@once")
    for each in KEYS.values():
        assert accepts(tmp_path, "sbverify", "--cert", softhsm.certificate(f"{each}-db"), "out")
    curl(url, tmp_path, f"machine={other}", "signing_type=sbsign", "signatures=replace", "artifact=@once")
    assert accepts(tmp_path, "sbverify", "--cert", softhsm.certificate(f"{KEYS[other]}-db"), "out")
    assert not accepts(tmp_path, "sbverify", "--cert", softhsm.certificate(f"{KEYS[machine]}-db"), "out")


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("machine", KEYS)
@pytest.mark.parametrize("signing_type", ["signature", "attach_signature"])
def test_a_file(
    fixtures_service: Any, softhsm: Any, tmp_path: Path, *, machine: str, endpoint: str, signing_type: str
) -> None:
    (tmp_path / "content").write_bytes(CONTENT)
    # some layers send more than is needed
    more = ("soctype=tegra234", "bspversion=35.4.1") if endpoint == "/sign/uefi" else ()
    fields = (f"machine={machine}", f"signing_type={signing_type}", *more, "artifact=@content")
    signed = curl(fixtures_service.url + endpoint, tmp_path, *fields)
    if signing_type == "attach_signature":
        padded = -(-len(CONTENT) // 2048) * 2048
        assert signed[:padded] == CONTENT.ljust(padded, b"\0")
        signed = signed[padded:]
    (tmp_path / "signature").write_bytes(signed)
    authority = softhsm.certificate("demo-ca")
    verify = ("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", "signature", "-purpose", "any")
    for content, good in ((CONTENT, True), (CONTENT + b"\0", False)):
        (tmp_path / "content").write_bytes(content)
        assert accepts(tmp_path, *verify, "-content", "content", "-CAfile", authority, "-out", "verified") is good


@pytest.mark.parametrize("machine", KEYS)
@pytest.mark.parametrize(("variable", "role"), [("PK", "pk"), ("KEK", "pk"), ("db", "kek"), ("dbx", "kek")])
def test_a_variable(
    fixtures_service: Any, softhsm: Any, tmp_path: Path, *, machine: str, variable: str, role: str
) -> None:
    lists = tmp_path / "lists.esl"
    subprocess.run(["cert-to-efi-sig-list", softhsm.certificate("uefi-db"), lists], check=True, capture_output=True)
    append = ("append=true",) if variable == "dbx" else ()
    fields = (f"machine={machine}", "signing_type=variable", f"variable={variable}", *append)
    update = curl(fixtures_service.url + ENDPOINTS[0], tmp_path, *fields, f"timestamp={TIME}Z", "artifact=@lists.esl")
    end = 16 + int.from_bytes(update[16:20], "little")
    assert update[end:] == lists.read_bytes()
    signed_data = asn1crypto.cms.SignedData.load(update[40:end], strict=True)
    info = asn1crypto.cms.ContentInfo({"content_type": "signed_data", "content": signed_data})
    (tmp_path / "message").write_bytes(info.dump())
    options = ("-t", TIME, *(("-a",) if append else ()))
    trusted = softhsm.certificate(f"{KEYS[machine]}-{role}")
    verify = ("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", "message", "-purpose", "any")
    trust = ("-CAfile", trusted, "-partial_chain", "-out", "verified")
    for content, good in ((update[end:], True), (flipped(update[end:], -1), False)):
        lists.write_bytes(content)
        assert accepts(tmp_path, "sign-efi-sig-list", *options, "-o", variable, "lists.esl", "bundle")
        assert accepts(tmp_path, *verify, "-content", "bundle", *trust) is good
    lists.write_bytes(update[end:])
    another = "KEK" if variable == "PK" else "PK"
    assert accepts(tmp_path, "sign-efi-sig-list", *options, "-o", another, "lists.esl", "bundle")
    assert not accepts(tmp_path, *verify, "-content", "bundle", *trust), "it is for one variable only"


@pytest.mark.parametrize(
    ("fields", "status", "slug"),
    [
        ({"machine": "demo-nowhere"}, 404, "key-not-found"),
        ({"machine": "demo-nowhere", "signing_type": "variable", "variable": "db"}, 422, "artifact-rejected"),
        ({}, 422, "artifact-rejected"),
        ({"signing_type": "pesign"}, 400, "invalid-request"),
        ({"signing_type": ""}, 400, "invalid-request"),
        ({"signing_type": "variable"}, 400, "invalid-request"),
        ({"signing_type": "variable", "variable": "PK"}, 422, "artifact-rejected"),
        ({"signing_type": "variable", "variable": "MokList"}, 400, "invalid-request"),
        ({"machine": "../demo-file"}, 400, "invalid-request"),
    ],
)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_each_refusal(fixtures_service: Any, endpoint: str, fields: dict[str, str], status: int, slug: str) -> None:
    content = PROGRAM.read_bytes() if fields.get("machine") and len(fields) == 1 else CONTENT
    form = {"machine": "demo-token", "signing_type": "sbsign", **fields}
    answer = httpx.post(fixtures_service.url + endpoint, data=form, files={"artifact": ("x", content)}, timeout=60)
    assert_problem(answer, status, slug)
    fixtures_service.assert_no_files()
