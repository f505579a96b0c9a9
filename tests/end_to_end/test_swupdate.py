"""SWUpdate, through HTTP, by keys of every kind, verified by the tools of others."""

import base64
import hashlib
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.conftest import accepts, assert_problem

IMAGE = b"an image\n" * 1000
DESCRIPTION = f"""\
software =
{{
  version = "1.0.0";
  hardware-compatibility: [ "1.0" ];
  images: ( {{
    filename = "rootfs.img"; device = "/dev/null"; type = "raw"; sha256 = "{hashlib.sha256(IMAGE).hexdigest()}";
  }} );
}}
""".encode()

PUBLIC_KEYS = {"token": "swupdate-rsa", "file": "file-rsa", "s3": "file-rsa"}
TRUSTED = {"token": "demo-ca", "token-rsa": "demo-ca", "file": "file-cms", "s3": "file-cms"}
TAMPERED = DESCRIPTION.replace(b"1.0.0", b"6.6.6")


@pytest.mark.parametrize("provider", PUBLIC_KEYS)
@pytest.mark.parametrize(("method", "options"), [("RSA", ()), ("RSA-PSS", ("-sigopt", "rsa_padding_mode:pss"))])
def test_openssl_accepts_a_signed_description(
    service: Any, softhsm: Any, tmp_path: Path, provider: str, method: str, options: tuple[str, ...]
) -> None:
    answer = service.sign(provider, DESCRIPTION, method=method)
    assert answer.status_code == 200, answer.text
    (tmp_path / "sig").write_bytes(answer.content)
    verify = ("openssl", "dgst", "-sha256", "-verify", softhsm.public_key(PUBLIC_KEYS[provider]), *options)
    for description, good in ((DESCRIPTION, True), (TAMPERED, False)):
        (tmp_path / "sw-description").write_bytes(description)
        assert accepts(tmp_path, *verify, "-signature", "sig", "sw-description") is good


@pytest.mark.parametrize("provider", PUBLIC_KEYS)
def test_the_contract_s_lines_verbatim(service: Any, softhsm: Any, tmp_path: Path, provider: str) -> None:
    """Each method, with all that clients send along."""
    (tmp_path / "sw-description").write_bytes(DESCRIPTION)
    key_uri = "pkcs11:token=hsmsign;object=swupdate-rsa;pin-value=password"
    on_token = f"""-F backend=pkcs11 -F 'key-uri="{key_uri}"'""" if provider == "token" else "-F backend=ssl"
    for fields in ("", "-F method=RSA", f"-F method=RSA {on_token}", "-F method=CMS"):
        line = (
            f"curl --connect-timeout 30 --max-time 1800 --retry 3 --silent --fail -X POST -F distro={provider} {fields}"
            f' -F "sw-description=@sw-description" --output sw-description.sig {service.url}/sign/swupdate'
        )
        subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True, timeout=60)
        if "CMS" in fields:
            verify = ("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", "sw-description.sig", "-content")
            trusted = ("-CAfile", softhsm.certificate(TRUSTED[provider]), "-out", "verified")
            assert accepts(tmp_path, *verify, "sw-description", *trusted)
        else:
            verify = ("openssl", "dgst", "-sha256", "-verify", softhsm.public_key(PUBLIC_KEYS[provider]))
            assert accepts(tmp_path, *verify, "-signature", "sw-description.sig", "sw-description")


@pytest.mark.parametrize("distro", TRUSTED)
def test_openssl_accepts_a_cms_signature(service: Any, softhsm: Any, tmp_path: Path, distro: str) -> None:
    answer = service.sign(distro, DESCRIPTION, method="CMS")
    assert answer.status_code == 200, answer.text
    (tmp_path / "sig").write_bytes(answer.content)
    trust = ("-CAfile", softhsm.certificate(TRUSTED[distro]), "-purpose", "smimesign")
    verify = ("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", "sig", *trust, "-content")
    for description, good in ((DESCRIPTION, True), (TAMPERED, False)):
        (tmp_path / "sw-description").write_bytes(description)
        assert accepts(tmp_path, *verify, "sw-description") is good


@pytest.mark.parametrize("distro", TRUSTED)
def test_swupdate_accepts_a_signed_archive(
    service: Any, softhsm: Any, swupdate: Path, tmp_path: Path, distro: str
) -> None:
    (tmp_path / "rootfs.img").write_bytes(IMAGE)
    (tmp_path / "sw-description").write_bytes(DESCRIPTION)
    archive = subprocess.run(
        ["cpio", "--quiet", "--create", "--format=newc"],
        input=b"sw-description\nrootfs.img", cwd=tmp_path, capture_output=True, check=True,
    ).stdout  # fmt: skip
    answer = service.sign(distro, archive, field="artifact", method="CMS")
    assert answer.status_code == 200, answer.text
    check = (swupdate, "-c", "-k", softhsm.certificate(TRUSTED[distro]), "-H", "demo:1.0", "-i", "signed.swu")
    for signed, good in ((answer.content, True), (answer.content.replace(b"1.0.0", b"6.6.6"), False)):
        (tmp_path / "signed.swu").write_bytes(signed)
        assert accepts(tmp_path, *check) is good


def test_sixteen_clients_at_once(service: Any, softhsm: Any) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: service.sign("token", DESCRIPTION), range(200)))
    assert {answer.status_code for answer in answers} == {200}
    # PKCS #1 v1.5 always makes the same signature
    assert len({answer.content for answer in answers}) == 1


def test_a_digest_is_signed_on_the_token(service: Any, softhsm: Any, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"hello")
    asked = {"digest": hashlib.sha256(b"hello").hexdigest(), "hash": "sha256", "scheme": "ecdsa"}
    answer = httpx.post(service.url + "/keys/p256/sign", json=asked)
    (tmp_path / "sig").write_bytes(base64.b64decode(answer.json()["signature"]))
    verify = ("openssl", "dgst", "-sha256", "-verify", softhsm.public_key("digest-p256"), "-signature", "sig", "data")
    assert accepts(tmp_path, *verify)
    (tmp_path / "data").write_bytes(b"hallo")
    assert not accepts(tmp_path, *verify)


def test_readiness_tells_every_provider_and_key(service: Any) -> None:
    answer = httpx.get(service.url + "/readyz", timeout=60)
    assert answer.status_code == 503
    report = answer.json()
    assert {name: provider["ready"] for name, provider in report["providers"].items()} == {
        "token": True, "absent": False, "file": True, "s3": True, "down": False, "slow": False,
        "locked": True, "opened": True,
    }  # fmt: skip
    unusable = {key["name"]: key["error"]["type"].rpartition("/")[2] for key in report["keys"] if not key["usable"]}
    assert unusable == {
        "absent": "provider-unavailable", "down": "provider-unavailable", "slow": "provider-timeout",
        "gone": "key-not-found",
        "text": "key-unusable", "locked": "key-unusable", "pinned": "key-mismatch",
    }  # fmt: skip
    assert "/tmp" not in answer.text, "no path of the server"  # noqa: S108


@pytest.mark.parametrize(
    ("distro", "fields", "status", "slug"),
    [
        ("unknown", {}, 404, "key-not-found"),
        ("gone", {}, 404, "key-not-found"),
        ("token", {"key_uri": "pkcs11:token=hsmsign;object=swupdate-cms"}, 403, "key-not-granted"),
        ("token", {"key_uri": "pkcs11:token=other;object=swupdate-rsa"}, 403, "key-not-granted"),
        ("token", {"method": "MD5"}, 400, "invalid-request"),
        ("token", {"backend": "yubihsm"}, 400, "invalid-request"),
        ("both", {}, 409, "key-ambiguous"),
        ("file", {"method": "CMS", "key_uri": "pkcs11:object=x"}, 403, "key-not-granted"),
        ("p256", {"method": "RSA-PSS"}, 422, "key-unsuited"),
        ("text", {}, 500, "key-unusable"),
        ("locked", {}, 500, "key-unusable"),
        ("pinned", {}, 500, "key-mismatch"),
        ("absent", {}, 503, "provider-unavailable"),
        ("down", {}, 503, "provider-unavailable"),
        ("slow", {}, 504, "provider-timeout"),
    ],
)
def test_each_refusal(service: Any, distro: str, fields: dict[str, str], status: int, slug: str) -> None:
    before = len(service.processes())
    answer = service.sign(distro, DESCRIPTION, **fields)
    assert_problem(answer, status, slug)
    assert "/tmp" not in answer.text, "no path of the server"  # noqa: S108
    assert service.sign("token", DESCRIPTION).status_code == 200
    assert len(service.processes()) == before
    assert not list(service.spool.glob("*/*"))


@pytest.mark.parametrize("backend", ["ssl", "pkcs11"])
def test_the_backend_chooses_among_granted_keys(service: Any, backend: str) -> None:
    chosen = service.sign("both", DESCRIPTION, backend=backend).content
    assert chosen == service.sign("token" if backend == "pkcs11" else "file", DESCRIPTION).content


def test_a_key_uri_with_digsigservers_placeholder_is_good(service: Any) -> None:
    uri = "pkcs11:token=hsmsign;object=swupdate-rsa?pin-value=password"
    assert service.sign("token", DESCRIPTION, backend="pkcs11", key_uri=uri).status_code == 200


def test_a_description_that_devices_refuse_is_refused(service: Any) -> None:
    unhashed = b'software = { version = "1"; images: ( { filename = "rootfs.img"; device = "/dev/null"; } ); }'
    assert "sha256" in assert_problem(service.sign("token", unhashed), 422, "artifact-rejected")["detail"]
    assert_problem(service.sign("token", b"\xff\xfe no description"), 422, "artifact-rejected")
    assert_problem(service.sign("token", b"no archive", field="artifact"), 422, "artifact-rejected")


def test_a_wrong_pin_is_tried_once(own_softhsm: Any, start: Callable[..., Any]) -> None:
    own_softhsm.pin_file.write_text("wrong-pin-canary\n")
    service = start(
        {
            "providers.token": {
                "kind": "pkcs11", "module": str(own_softhsm.module), "token": "hsmsign", "env": own_softhsm.env,
                "pin": {"file": str(own_softhsm.pin_file)},
            },
            "grants": [
                {"name": "key", "signer": "swupdate", "role": "rsa", "provider": "token", "object": "swupdate-rsa"}
            ],
        }
    )  # fmt: skip
    for _ in range(3):
        assert "canary" not in str(assert_problem(service.sign("poky", DESCRIPTION), 503, "pin-refused"))
    report = httpx.get(service.url + "/readyz").json()
    assert report["providers"]["token"]["error"]["type"] == "/problems/pin-refused"
    assert "canary" not in service.log


def test_s3_that_refuses(service: Any, s3: tuple[str, Any]) -> None:
    url, _ = s3
    # moto's own switch: from now on it checks who asks, and knows nobody
    before = httpx.post(url + "/moto-api/reset-auth", content="0", headers={"Content-Type": "text/plain"}).json()
    try:
        assert_problem(service.sign("s3", DESCRIPTION), 502, "provider-refused")
    finally:
        count = str(before["PREVIOUS_INITIAL_NO_AUTH_ACTION_COUNT"])
        httpx.post(url + "/moto-api/reset-auth", content=count, headers={"Content-Type": "text/plain"})
    assert service.sign("s3", DESCRIPTION).status_code == 200


def test_a_token_worker_that_is_killed_is_replaced(service: Any) -> None:
    workers = [process for process in service.processes() if b"tokens.worker" in (process / "cmdline").read_bytes()]
    assert workers
    for worker in workers:
        subprocess.run(["/bin/kill", "-9", worker.name], check=True)
    answers = [service.sign("token", DESCRIPTION).status_code for _ in range(3)]
    assert answers[-1] == 200, answers
