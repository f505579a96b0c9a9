"""The fixtures are what fixtures.toml and imx.toml say, by the word of OpenSC, OpenSSL and NXP's srktool."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
from imx_pki import CA, SRKS, TABLE, TARBALL, TOKEN, Pki

from tests.conftest import ROOT, SoftHsm

DECLARATION = tomllib.loads((ROOT / "softhsm-fixtures/fixtures.toml").read_text())
IMX = [Pki(**each) for each in tomllib.loads((ROOT / "softhsm-fixtures/imx.toml").read_text())["pkis"]]
KEYS = [(token["label"], key) for token in DECLARATION["tokens"] for key in token["keys"]]
KEYS += [(TOKEN, key) for pki in IMX for key in pki.token_keys]
SECRETS = [
    secret for token in DECLARATION["tokens"] for secret in token.get("secrets", ()) if secret["type"].startswith("aes")
]
EXTENSIONS = {"emailProtection": "E-mail Protection", "codeSigning": "Code Signing"}
SRKTOOL = ROOT / ".cache/cst/cst-3.4.1/linux64/bin/srktool"


def each(machines: list[tuple[Pki, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("pki", "machine"), machines, ids=[machine for _, machine in machines])


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
        on_token = pkcs11_tool(softhsm, token, "--read-object", "--type", "cert", "--id", key["id"])
        assert run("openssl", "x509", "-in", certificate, "-outform", "DER") == on_token


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


@pytest.mark.parametrize("secret", SECRETS, ids=[secret["label"] for secret in SECRETS])
def test_a_symmetric_key_is_on_its_token_and_in_its_file(
    softhsm: SoftHsm, secret: dict[str, Any], tmp_path: Path
) -> None:
    listing = pkcs11_tool(softhsm, TOKEN, "--list-objects", "--type", "secrkey").decode()
    access = dict(re.findall(r"label: +(\S+)\n(?:.*\n)*?  Access: +(.*)", listing))
    assert access[secret["label"]] == "sensitive"
    value = (softhsm.keys / secret["file"]).read_text().strip()
    block, encrypted = tmp_path / "block", tmp_path / "encrypted"
    block.write_bytes(bytes(16))
    arguments = ["--id", secret["id"], "--input-file", str(block), "--output-file", str(encrypted)]
    pkcs11_tool(softhsm, TOKEN, "--encrypt", "--mechanism", "AES-ECB", *arguments)
    cipher = f"-{secret['type'].replace('aes', 'aes-')}-ecb"
    assert run("openssl", "enc", cipher, "-K", value, "-nopad", "-in", block) == encrypted.read_bytes()


@pytest.mark.parametrize("key", [key for _, key in KEYS if "certificate" in key], ids=lambda key: key["label"])
def test_certificates_verify_for_their_purpose(softhsm: SoftHsm, key: dict[str, Any]) -> None:
    certificate = softhsm.certificate(key["label"])
    issuer = softhsm.certificate(key["certificate"].get("issuer", key["label"]))
    purpose = key["certificate"].get("purpose")
    # OpenSSL 3.0 cannot be asked for codeSigning
    purposes = ["-purpose", "smimesign"] if purpose == "emailProtection" else []
    # an SRK is what the fuses of an i.MX trust, whoever issued it
    run("openssl", "verify", "-check_ss_sig", "-partial_chain", *purposes, "-CAfile", issuer, certificate)
    extension = run(
        "openssl", "x509", "-in", certificate, "-noout", "-ext", "extendedKeyUsage", stderr=subprocess.DEVNULL
    )
    assert extension.decode().split("\n")[1:2] == ([f"    {EXTENSIONS[purpose]}"] if purpose else [])


def test_what_is_secret_is_private(softhsm: SoftHsm) -> None:
    patterns = ("*.key", "*.priv", "*_key.pem", "*-key.pem", "*.tar.gz")
    in_files = [path for pattern in patterns for path in softhsm.keys.rglob(pattern)]
    secret = [softhsm.pin_file, *in_files, *softhsm.directory.glob("tokens/**/*.object")]
    assert len(secret) > len(KEYS)
    assert [path for path in secret if path.stat().st_mode & 0o077] == []


@pytest.fixture
def unpacked(softhsm: SoftHsm, machine: str, tmp_path: Path) -> Path:
    """What a machine's tarball for the Code Signing Tool has in it."""
    run("tar", "--extract", "--file", softhsm.keys / machine / TARBALL, "--directory", tmp_path)
    return tmp_path


@each([(pki, machine) for pki in IMX for machine in (pki.token, pki.file)])
def test_srk_tables_and_fuses_are_those_of_nxp_s_srktool(
    softhsm: SoftHsm, unpacked: Path, pki: Pki, machine: str
) -> None:
    certificates = [softhsm.certificate(pki.srk(number)) for number in SRKS]
    if machine == pki.file:
        certificates = [unpacked / f"crts/{pki.srk(number)}_crt.pem" for number in SRKS]
    table, fuses = unpacked / "table", unpacked / "fuses"
    names = ",".join(map(str, certificates))
    hash_ = pki.srk(1).split("_")[1]
    options = ["--hab_ver", "4", "--digest", hash_] if pki.boot == "hab" else ["--ahab_ver", "--sign_digest", hash_]
    run(SRKTOOL, *options, "--table", table, "--efuses", fuses, "--certs", names)
    assert (unpacked / TABLE).read_bytes() == table.read_bytes()
    assert (softhsm.directory / f"fuses/{machine}.bin").read_bytes() == fuses.read_bytes()


@each([(pki, machine) for pki in IMX for machine in (pki.token, pki.file)])
def test_tarballs_have_digsigserver_s_layout(softhsm: SoftHsm, pki: Pki, machine: str) -> None:
    expected = {"crts": 0o755, TABLE: 0o644}
    if machine == pki.file:
        signing = [name for name, _ in pki.signing]
        certificates = {CA, *signing, *(pki.srk(number) for number in SRKS)}
        expected |= {"keys": 0o755, "keys/key_pass.txt": 0o600}
        expected |= {f"keys/{name}_key.pem": 0o600 for name in signing}
        expected |= {f"crts/{name}_crt.pem": 0o644 for name in certificates}
    with tarfile.open(softhsm.keys / machine / TARBALL) as archive:
        assert {member.name: member.mode for member in archive} == expected


@each([(pki, pki.file) for pki in IMX])
def test_keys_in_files_are_those_of_the_certificates(softhsm: SoftHsm, unpacked: Path, pki: Pki) -> None:
    """In the tarball encrypted, beside it as they are; and they are not the ones on the token."""
    passphrase, again = (unpacked / "keys/key_pass.txt").read_text().splitlines()
    assert passphrase == again
    home = softhsm.keys / pki.file / "imxsign"
    for name, issuer in pki.signing:
        key, certificate = f"keys/{name}_key.pem", f"crts/{name}_crt.pem"
        assert "BEGIN ENCRYPTED PRIVATE KEY" in (unpacked / key).read_text()
        public = run(
            "openssl", "pkey", "-in", unpacked / key, "-pubout", "-passin", f"file:{unpacked / 'keys/key_pass.txt'}"
        )
        assert run("openssl", "pkey", "-in", home / key, "-pubout") == public
        assert run("openssl", "x509", "-in", home / certificate, "-noout", "-pubkey") == public
        assert softhsm.public_key(name).read_bytes() != public
        assert (home / certificate).read_bytes() == (unpacked / certificate).read_bytes()
        run("openssl", "verify", "-partial_chain", "-CAfile", unpacked / f"crts/{issuer}_crt.pem", home / certificate)


@pytest.mark.parametrize("pki", IMX, ids=[pki.token for pki in IMX])
def test_srks_may_certify_where_others_sign(softhsm: SoftHsm, pki: Pki) -> None:
    for number in SRKS:
        certificate = softhsm.certificate(pki.srk(number))
        run("openssl", "verify", "-CAfile", softhsm.certificate(CA), certificate)
        constraints = run("openssl", "x509", "-in", certificate, "-noout", "-ext", "basicConstraints").decode()
        assert ("CA:TRUE" in constraints) == (pki.boot == "hab")


def test_they_can_do_without_imx(own_softhsm: SoftHsm) -> None:
    assert not list(own_softhsm.keys.rglob("imxsign"))
    assert not list(own_softhsm.directory.glob("certificates/*_v3_*"))
    assert 'signer = "imx"' not in own_softhsm.config.read_text()


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
