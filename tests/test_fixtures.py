"""The fixtures are what fixtures.toml says, by the word of OpenSC and OpenSSL."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, SoftHsm

DECLARATION = tomllib.loads((ROOT / "softhsm-fixtures/fixtures.toml").read_text())
KEYS = [(token["label"], key) for token in DECLARATION["tokens"] for key in token["keys"]]


def run(*command: str | Path, **kwargs: Any) -> bytes:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, **kwargs).stdout


def pkcs11_tool(softhsm: SoftHsm, token: str, *arguments: str) -> bytes:
    command = ["pkcs11-tool", "--module", softhsm.module, "--token-label", token, "--login", "--pin", "env:PIN"]
    return run(*command, *arguments, env=os.environ | softhsm.env | {"PIN": softhsm.pin}, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(("token", "key"), KEYS, ids=[key["label"] for _, key in KEYS])
def test_a_key_is_on_its_token_and_its_public_half_in_a_file(
    softhsm: SoftHsm, token: str, key: dict[str, Any], tmp_path: Path
) -> None:
    public, data, signature = softhsm.public_key(key["label"]), tmp_path / "data", tmp_path / "signature"
    data.write_bytes(bytes(32))
    kind = re.sub(r"\d+$", "", key["type"])
    mechanism = {"rsa": "RSA-PKCS", "p": "ECDSA", "ed": "EDDSA"}[kind]
    arguments = ["--id", key["id"], "--input-file", str(data), "--output-file", str(signature)]
    pkcs11_tool(softhsm, token, "--sign", "--mechanism", mechanism, "--signature-format", "openssl", *arguments)
    raw = ["-rawin"] if kind == "ed" else []
    run("openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-in", data, "-sigfile", signature, *raw)

    if "file" in key:
        assert run("openssl", "pkey", "-in", softhsm.keys / key["file"], "-pubout") == public.read_bytes()
    if "certificate" in key:
        certificate = softhsm.certificate(key["label"])
        assert run("openssl", "x509", "-in", certificate, "-noout", "-pubkey") == public.read_bytes()


@pytest.mark.parametrize("token", [token["label"] for token in DECLARATION["tokens"]])
def test_private_keys_never_leave_their_token(softhsm: SoftHsm, token: str) -> None:
    listing = pkcs11_tool(softhsm, token, "--list-objects", "--type", "privkey").decode()
    access = dict(re.findall(r"label: +(\S+)\n(?:.*\n)*?  Access: +(.*)", listing))
    expected = {
        key["label"]: "sensitive" if "file" in key else "sensitive, always sensitive, never extractable, local"
        for label, key in KEYS
        if label == token
    }
    assert access == expected


@pytest.mark.parametrize("key", [key for _, key in KEYS if "certificate" in key], ids=lambda key: key["label"])
def test_certificates_verify_for_their_purpose(softhsm: SoftHsm, key: dict[str, Any]) -> None:
    certificate = softhsm.certificate(key["label"])
    issuer = softhsm.certificate(key["certificate"].get("issuer", key["label"]))
    purpose = {"emailProtection": "smimesign"}[key["certificate"]["purpose"]]
    run("openssl", "verify", "-check_ss_sig", "-purpose", purpose, "-CAfile", issuer, certificate)


def test_what_is_secret_is_private(softhsm: SoftHsm) -> None:
    secret = [softhsm.pin_file, *softhsm.keys.rglob("*.key"), *softhsm.directory.glob("tokens/**/*.object")]
    assert len(secret) > len(KEYS)
    assert [path for path in secret if path.stat().st_mode & 0o077] == []


def test_a_second_run_changes_nothing(softhsm: SoftHsm) -> None:
    before = {path: path.stat().st_mtime_ns for path in softhsm.directory.rglob("*")}
    run(sys.executable, ROOT / "softhsm-fixtures/make_fixtures.py", softhsm.directory)
    assert {path: path.stat().st_mtime_ns for path in softhsm.directory.rglob("*")} == before


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    command = [sys.executable, ROOT / "softhsm-fixtures/make_fixtures.py", tmp_path]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 1
    assert "name another directory" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
