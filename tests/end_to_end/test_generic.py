"""Any file, through HTTP, signed by OpenSSL with keys on loan, verified by OpenSSL without the loan."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.conftest import accepts, assert_problem

CONTENT = b"any file\n" * 20_000
PSS = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest")
KEYS = {
    "demo-token": "generic-rsa", "demo-token-p256": "generic-p256",
    "demo-file": "file-generic-rsa", "demo-file-p256": "file-generic-p256",
    "demo-yubihsm": "file-generic-rsa", "demo-yubihsm-p256": "file-generic-p256",
}  # fmt: skip
METHODS = [
    *((machine, method, hash_) for machine in ("demo-token", "demo-file", "demo-yubihsm") for method, hash_ in
      (("RSA", "sha256"), ("RSA", "sha512"), ("RSA-PSS", "sha256"), ("RSA-PSS", "sha384"))),
    *((machine, "ECDSA", hash_) for machine in ("demo-token-p256", "demo-file-p256", "demo-yubihsm-p256") for hash_ in
      ("sha256", "sha384", "sha512")),
]  # fmt: skip


def sign(service: Any, machine: str, content: bytes = CONTENT, **fields: str) -> httpx.Response:
    form = {"machine": machine, **{name.replace("_", "-"): value for name, value in fields.items()}}
    return httpx.post(service.url + "/sign/generic", data=form, files={"artifact": ("a file", content)}, timeout=60)


@pytest.mark.parametrize(("machine", "method", "hash_"), METHODS)
def test_openssl_accepts_a_raw_signature(
    fixtures_service: Any, softhsm: Any, tmp_path: Path, machine: str, method: str, hash_: str
) -> None:
    answer = sign(fixtures_service, machine, method=method, hash=hash_)
    assert answer.status_code == 200, answer.text
    (tmp_path / "signature").write_bytes(answer.content)
    key = ("-verify", softhsm.public_key(KEYS[machine]), *(PSS if method == "RSA-PSS" else ()))
    for content, good in ((CONTENT, True), (b"A" + CONTENT[1:], False)):
        (tmp_path / "content").write_bytes(content)
        assert accepts(tmp_path, "openssl", "dgst", f"-{hash_}", *key, "-signature", "signature", "content") is good


@pytest.mark.parametrize("machine", KEYS)
def test_openssl_accepts_a_cms_signature(fixtures_service: Any, softhsm: Any, tmp_path: Path, machine: str) -> None:
    answer = sign(fixtures_service, machine, method="CMS")
    assert answer.status_code == 200, answer.text
    (tmp_path / "signature").write_bytes(answer.content)
    trusted = softhsm.certificate("demo-ca")
    verify = ("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", "signature")
    trust = ("-CAfile", trusted, "-purpose", "any", "-out", "verified")
    for content, good in ((CONTENT, True), (b"A" + CONTENT[1:], False)):
        (tmp_path / "content").write_bytes(content)
        assert accepts(tmp_path, *verify, "-content", "content", *trust) is good


@pytest.mark.parametrize(
    ("machine", "fields", "status", "slug"),
    [
        ("demo-token-rsa2048", {}, 404, "key-not-found"),
        ("demo-token", {"method": "ECDSA"}, 422, "key-unsuited"),
        ("demo-token-p256", {"method": "RSA"}, 422, "key-unsuited"),
        ("demo-token", {"method": "MD5"}, 400, "invalid-request"),
        ("demo-token", {"hash": "sha1"}, 400, "invalid-request"),
        ("demo-token", {"key_uri": "pkcs11:object=swupdate-rsa"}, 403, "key-not-granted"),
    ],
)
def test_each_refusal(fixtures_service: Any, machine: str, fields: dict[str, str], status: int, slug: str) -> None:
    answer = sign(fixtures_service, machine, **fields)
    assert_problem(answer, status, slug)
    fixtures_service.assert_no_files()
