"""`/healthz`, `/readyz` and `/keys`."""

import base64
import hashlib
import json
from typing import Any

import httpx
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

DIGEST = hashlib.sha256(b"hello").digest()


def sign(service: Any, name: str, **asked: Any) -> httpx.Response:
    return httpx.post(f"{service.url}/keys/{name}/sign", json=asked)


def public_key(service: Any, name: str) -> Any:
    return serialization.load_pem_public_key(httpx.get(f"{service.url}/keys/{name}").json()["public_key_pem"].encode())


def test_it_is_alive(service: Any) -> None:
    answer = httpx.get(service.url + "/healthz")
    assert (answer.status_code, answer.json()) == (200, {"alive": True})


def test_it_says_what_is_not_ready_and_why(service: Any) -> None:
    answer = httpx.get(service.url + "/readyz")
    assert answer.status_code == 503
    report = answer.json()
    assert (report["ready"], report["stopping"]) == (False, False)
    assert report["providers"] == {"files": {"ready": True, "error": None}}
    usable = {key["name"]: key["usable"] for key in report["keys"]}
    assert usable == {"tiny": True, "gone": False, "echo": True, "edwards": True}
    (error,) = (key["error"] for key in report["keys"] if key["error"])
    assert error["type"] == "/problems/key-not-found"
    assert error["hint"]
    assert "/tmp" not in answer.text, "no path of the server"  # noqa: S108


def test_it_is_ready(start_service: Any) -> None:
    service = start_service(grants=[]).wait_until_serving()
    answer = httpx.get(service.url + "/readyz")
    assert (answer.status_code, answer.json()["ready"]) == (200, True)
    assert answer.json()["notes"]


def test_keys_are_listed(service: Any) -> None:
    keys = httpx.get(service.url + "/keys").json()["keys"]
    assert [key["name"] for key in keys] == ["tiny", "gone", "echo", "edwards"]
    tiny = keys[0]
    assert (tiny["signer"], tiny["role"], tiny["machine"]) == ("tiny", "key", "abc*")
    assert (tiny["provider"], tiny["kind"], tiny["algorithm"], tiny["digest"]) == ("files", "file", "RSA-2048", True)


def test_a_key_is_described(service: Any) -> None:
    key = httpx.get(service.url + "/keys/tiny").json()
    assert public_key(service, "tiny") == service.key.public_key()
    spki = service.key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert key["spki_sha256"] == hashlib.sha256(spki).hexdigest()
    assert key["certificate_pem"] is None


@pytest.mark.parametrize("name", ["none", "tiny%2F..", "a" * 3000])
def test_an_unknown_key_is_a_problem(service: Any, name: str) -> None:
    answer = httpx.get(f"{service.url}/keys/{name}")
    assert answer.json()["type"] in ("/problems/key-not-found", "/problems/no-such-endpoint")
    assert answer.status_code == 404


@pytest.mark.parametrize(
    ("name", "status", "slug"),
    [("tiny", 422, "key-unsuited"), ("gone", 404, "key-not-found"), ("none", 404, "key-not-found")],
)
def test_an_attestation_that_nobody_can_give(service: Any, name: str, status: int, slug: str) -> None:
    problem = service.assert_problem(httpx.get(f"{service.url}/keys/{name}/attestation"), status, slug)
    if name == "tiny":
        assert problem["detail"] == "A provider of kind file cannot attest its keys."


@pytest.mark.parametrize("hash_", [hashes.SHA224(), hashes.SHA256(), hashes.SHA384(), hashes.SHA512()])
def test_digests_are_signed_with_rsa(service: Any, hash_: hashes.HashAlgorithm) -> None:
    digest = hashlib.new(hash_.name, b"hello").digest()
    answer = sign(service, "tiny", digest=digest.hex(), hash=hash_.name, scheme="rsa-pkcs1v15").json()
    signature = base64.b64decode(answer["signature"])
    service.key.public_key().verify(signature, digest, padding.PKCS1v15(), Prehashed(hash_))
    assert (answer["key"], answer["hash"], answer["scheme"]) == ("tiny", hash_.name, "rsa-pkcs1v15")


@pytest.mark.parametrize(("given", "length"), [({}, 32), ({"salt_length": 20}, 20), ({"salt_length": 0}, 0)])
def test_digests_are_signed_with_pss(service: Any, given: dict[str, int], length: int) -> None:
    answer = sign(service, "tiny", digest=DIGEST.hex(), hash="sha256", scheme="rsa-pss", **given).json()
    signature = base64.b64decode(answer["signature"])
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), length)
    service.key.public_key().verify(signature, DIGEST, pss, Prehashed(hashes.SHA256()))
    with pytest.raises(InvalidSignature):
        service.key.public_key().verify(signature, bytes(32), pss, Prehashed(hashes.SHA256()))


def test_digests_are_signed_with_ecdsa(service: Any) -> None:
    answer = sign(service, "echo", digest=DIGEST.hex().upper(), hash="sha256", scheme="ecdsa").json()
    signature = base64.b64decode(answer["signature"])
    public_key(service, "echo").verify(signature, DIGEST, ec.ECDSA(Prehashed(hashes.SHA256())))


GOOD = {"digest": DIGEST.hex(), "hash": "sha256", "scheme": "rsa-pkcs1v15"}


@pytest.mark.parametrize(
    ("name", "asked", "status", "slug"),
    [
        ("none", GOOD, 404, "key-not-found"),
        ("gone", GOOD, 403, "key-not-granted"),
        ("tiny", {**GOOD, "scheme": "ecdsa"}, 422, "key-unsuited"),
        ("echo", GOOD, 422, "key-unsuited"),
        ("edwards", GOOD, 422, "key-unsuited"),
        ("edwards", {**GOOD, "scheme": "ecdsa"}, 422, "key-unsuited"),
        ("tiny", {**GOOD, "digest": "00" * 31}, 422, "key-unsuited"),
        ("tiny", {**GOOD, "scheme": "rsa-pss", "salt_length": 10_000}, 422, "key-unsuited"),
        ("tiny", {**GOOD, "digest": "canary"}, 400, "invalid-request"),
        ("tiny", {**GOOD, "digest": "000"}, 400, "invalid-request"),
        ("tiny", {**GOOD, "hash": "md5"}, 400, "invalid-request"),
        ("tiny", {**GOOD, "scheme": "ed25519"}, 400, "invalid-request"),
        ("tiny", {**GOOD, "salt_length": -1}, 400, "invalid-request"),
        ("tiny", {**GOOD, "odd": 1}, 400, "invalid-request"),
        ("tiny", {}, 400, "invalid-request"),
        ("tiny", {**GOOD, "digest": "00" * 2000}, 413, "too-large"),
    ],
)
def test_a_bad_digest_is_a_problem(service: Any, name: str, asked: Any, status: int, slug: str) -> None:
    answer = sign(service, name, **asked)
    service.assert_problem(answer, status, slug)
    assert "canary" not in answer.text
    service.assert_clean()


@pytest.mark.parametrize("body", [b"", b"no json", b"[]", b'{"digest": 1', b"\xff\xff", b"[" * 900])
def test_a_body_that_is_no_object_is_a_problem(service: Any, body: bytes) -> None:
    answer = httpx.post(service.url + "/keys/tiny/sign", content=body, headers={"Content-Type": "application/json"})
    service.assert_problem(answer, 400, "invalid-request")


def test_a_body_that_is_no_json_is_a_problem(service: Any) -> None:
    # what a page of another site could send without asking first
    answer = httpx.post(
        service.url + "/keys/tiny/sign", content=json.dumps(GOOD), headers={"Content-Type": "text/plain"}
    )
    service.assert_problem(answer, 415, "unsupported-media-type")


def test_no_key_for_the_machine(service: Any) -> None:
    service.assert_problem(service.post(machine="unknown", artifact=b"x"), 404, "key-not-found")
    service.assert_problem(service.post(machine="gone", artifact=b"x"), 404, "key-not-found")
    service.assert_clean()
