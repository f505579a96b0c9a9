"""Yubico's yubihsm-shell: actions of its command line, and scripts of its interactive mode."""

import base64
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESCCM
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_public_key

from tests.yubihsm_simulator.clients import ssh_ca
from tests.yubihsm_simulator.clients.conftest import (
    CURVES,
    HASHES,
    PASSWORD,
    SERIAL,
    Hsm,
    certificate,
    private_key,
    private_pem,
    public_pem,
)

PSS = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest")

OTP_DECODED = "OTP decoded, useCtr:1, sessionCtr:1, tstph:1, tstpl:1"

Shell = Callable[..., str]


@pytest.fixture
def shell(hsm: Hsm) -> Shell:
    """Runs one action with the factory's password: `shell("sign-ecdsa", "-i", 5)`. It would append to `--out`."""

    def run(action: str, *options: object, refuses: bool = False) -> str:
        command = ("yubihsm-shell", "-C", hsm.url, "-p", PASSWORD, "-a", action, *map(str, options))
        if "--out" in options:
            (hsm.directory / str(options[options.index("--out") + 1])).unlink(missing_ok=True)
        return hsm.refuses(*command) if refuses else hsm.run(*command)

    return run


@pytest.fixture
def script(hsm: Hsm) -> Shell:
    """Runs the commands in a session, which has number 0, and returns what the shell said."""

    def run(commands: str, refuses: bool = False) -> str:
        text = f"connect\nsession open 1 {PASSWORD}\n{commands}\nsession close 0\ndisconnect\nquit\n"
        output = hsm.run("yubihsm-shell", "-C", hsm.url, text=text)
        assert "Created session 0" in output
        assert "Invalid argument" not in output, output
        assert ("Failed" in output or "Unable" in output) is refuses, output
        return output

    return run


def info_of(shell: Shell, id: int, type: str) -> dict[str, str]:
    """The fields of get-object-info."""
    line = next(line for line in shell("get-object-info", "-i", id, "-t", type).splitlines() if line.startswith("id: "))
    return dict(field.split(": ", 1) for field in line.split(", "))


# One action a run


def test_device_info(shell: Shell) -> None:
    output = shell("get-device-info")
    for line in (r"Version number:\s+2\.4\.0", rf"Serial number:\s+{SERIAL}", r"Log used:\s+2/62"):
        assert re.search(line, output), output
    for name in ("rsa2048", "ecp256", "ed25519", "aes256-ccm-wrap", "ecp224", "aes-cbc", "aes-kwp"):
        assert name in output
    output = shell("get-storage-info")
    assert re.search(r"free records: 255/256, free pages: 10\d\d/1024 page size: 126 bytes", output), output
    assert "BEGIN PUBLIC KEY" in shell("get-device-pubkey")


@pytest.mark.parametrize("curve", CURVES)
def test_ecdsa(hsm: Hsm, shell: Shell, content: bytes, curve: str) -> None:
    hsm.write("private.pem", private_pem(private_key(curve)))
    shell("generate-asymmetric-key", "-i", 1, "-l", "made", "-d", 2, "-c", "sign-ecdsa", "-A", curve)
    shell("put-asymmetric-key", "-i", 2, "-l", "put", "-c", "sign-ecdsa", "--in", "private.pem")
    for id, origin in ((1, "generated"), (2, "imported")):
        info = info_of(shell, id, "asymmetric-key")
        assert (info["algorithm"], info["origin"], info["capabilities"]) == (curve, origin, "sign-ecdsa")
        shell("get-public-key", "-i", id, "--out", f"{id}.pem")
        public: Any = load_pem_public_key(hsm.read(f"{id}.pem"))
        for hash in HASHES.values():
            output = ("--in", "content", "--out", "signature", "--outformat", "binary")
            shell("sign-ecdsa", "-i", id, "-A", f"ecdsa-{hash.name}", *output)
            public.verify(hsm.read("signature"), content, ec.ECDSA(hash))
    assert hsm.read("2.pem") == public_pem(private_key(curve))


def test_rsa(hsm: Hsm, shell: Shell, script: Shell, content: bytes, verifies: Callable[..., None]) -> None:
    capabilities = "sign-pkcs,sign-pss,decrypt-pkcs,decrypt-oaep"
    hsm.write("private.pem", private_pem(private_key("rsa2048")))
    hsm.write("public.pem", public_pem(private_key("rsa2048")))
    shell("put-asymmetric-key", "-i", 1, "-c", capabilities, "--in", "private.pem")
    output = ("--in", "content", "--out", "signature", "--outformat", "binary")
    for hash in ("sha1", "sha256", "sha384", "sha512"):
        shell("sign-pkcs1v15", "-i", 1, "-A", f"rsa-pkcs1-{hash}", *output)
        verifies(f"-{hash}")
        shell("sign-pss", "-i", 1, "-A", f"rsa-pss-{hash}", *output)
        verifies(f"-{hash}", *PSS)
    encrypt = ("/usr/bin/openssl", "pkeyutl", "-encrypt", "-pubin", "-inkey", "public.pem", "-out", "encrypted")
    hsm.write("secret", b"secret")
    hsm.run(*encrypt, "-in", "secret")
    shell("decrypt-pkcs1v15", "-i", 1, "--in", "encrypted", "--out", "decrypted")
    assert hsm.read("decrypted") == b"secret"
    oaep = ("rsa_padding_mode:oaep", "rsa_oaep_md:sha384", "rsa_mgf1_md:sha384")
    hsm.run(*encrypt, "-in", "secret", *(each for option in oaep for each in ("-pkeyopt", option)))
    assert base64.b64encode(b"secret").decode() in script("decrypt oaep 0 1 rsa-oaep-sha384 encrypted")
    shell("delete-object", "-i", 1, "-t", "asymmetric-key")
    assert "not found" in shell("sign-pkcs1v15", "-i", 1, "-A", "rsa-pkcs1-sha256", "--in", "content", refuses=True)


def test_rsa_is_generated(hsm: Hsm, shell: Shell, content: bytes, verifies: Callable[..., None]) -> None:
    said = shell("generate-asymmetric-key", "-l", "made", "-c", "sign-pkcs", "-A", "rsa2048")
    found = re.search(r"Generated Asymmetric key (0x[0-9a-f]{4})", said)
    assert found, said
    shell("get-public-key", "-i", found[1], "--out", "public.pem")
    output = ("--in", "content", "--out", "signature", "--outformat", "binary")
    shell("sign-pkcs1v15", "-i", found[1], "-A", "rsa-pkcs1-sha256", *output)
    verifies("-sha256")
    assert info_of(shell, int(found[1], 16), "asymmetric-key")["length"] == "896"


def test_ed25519(hsm: Hsm, shell: Shell, content: bytes) -> None:
    hsm.write("private.pem", private_pem(private_key("ed25519")))
    shell("generate-asymmetric-key", "-i", 1, "-c", "sign-eddsa", "-A", "ed25519")
    shell("put-asymmetric-key", "-i", 2, "-c", "sign-eddsa", "--in", "private.pem")
    for id in (1, 2):
        shell("get-public-key", "-i", id, "--out", f"{id}.pem")
        output = ("--in", "content", "--out", "signature", "--outformat", "binary")
        shell("sign-eddsa", "-i", id, "-A", "ed25519", *output)
        command = ("/usr/bin/openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", f"{id}.pem")
        hsm.run(*command, "-in", "content", "-sigfile", "signature")
    assert hsm.read("2.pem") == public_pem(private_key("ed25519"))


def test_ecdh(hsm: Hsm, shell: Shell) -> None:
    for name in ("ours", "theirs"):
        hsm.run("/usr/bin/openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.pem")
        hsm.run("/usr/bin/openssl", "ec", "-in", f"{name}.pem", "-pubout", "-out", f"{name}.pub")
    shell("put-asymmetric-key", "-i", 1, "-c", "derive-ecdh", "--in", "ours.pem")
    shell("derive-ecdh", "-i", 1, "--in", "theirs.pub", "--out", "shared", "--outformat", "binary")
    derive = ("/usr/bin/openssl", "pkeyutl", "-derive", "-inkey", "theirs.pem", "-peerkey", "ours.pub")
    hsm.run(*derive, "-out", "expected")
    assert hsm.read("shared") == hsm.read("expected")


def test_certificates_and_data(hsm: Hsm, shell: Shell) -> None:
    issued = certificate(private_key("ecp256"))
    from_pem = hsm.write("certificate.pem", issued.public_bytes(Encoding.PEM))
    put = ("put-opaque", "-i", 9, "-A", "opaque-x509-certificate", "--in", from_pem, "--informat", "PEM")
    shell(*put)
    shell("get-opaque", "-i", 9, "--out", "back.pem", "--outformat", "PEM")
    assert x509.load_pem_x509_certificate(hsm.read("back.pem")) == issued
    assert info_of(shell, 9, "opaque")["algorithm"] == "opaque-x509-certificate"
    assert "exists" in shell(*put, refuses=True)
    data = hsm.write("data", os.urandom(1000))
    shell("put-opaque", "-i", 10, "-A", "opaque-data", "--in", data)
    shell("get-opaque", "-i", 10, "--out", "back")
    assert hsm.read("back") == hsm.read("data")


@pytest.mark.parametrize("bits", [128, 192, 256])
def test_wrap(hsm: Hsm, shell: Shell, bits: int) -> None:
    capabilities = "export-wrapped,import-wrapped"
    delegated = ("--delegated", "sign-ecdsa,exportable-under-wrap")
    hsm.write("wrap.key", os.urandom(bits // 8))
    put = ("put-wrap-key", "-i", 1, "-c", capabilities, *delegated, "--in", "wrap.key", "--informat", "binary")
    shell(*put)
    info = info_of(shell, 1, "wrap-key")
    assert (info["algorithm"], info["length"]) == (f"aes{bits}-ccm-wrap", str(bits // 8 + 8))
    assert info["delegated_capabilities"] == "exportable-under-wrap:sign-ecdsa"
    shell("generate-asymmetric-key", "-i", 2, "-c", "sign-ecdsa,exportable-under-wrap", "-A", "ecp224")
    shell("get-public-key", "-i", 2, "--out", "before.pem")
    shell("get-wrapped", "--wrap-id", 1, "-i", 2, "-t", "asymmetric-key", "--out", "wrapped")
    shell("delete-object", "-i", 2, "-t", "asymmetric-key")
    assert "0x0002 of type asymmetric-key" in shell("put-wrapped", "--wrap-id", 1, "--in", "wrapped")
    info = info_of(shell, 2, "asymmetric-key")
    assert (info["origin"], info["sequence"]) == ("generated:imported_wrapped", "1")
    shell("get-public-key", "-i", 2, "--out", "after.pem")
    assert hsm.read("before.pem") == hsm.read("after.pem")
    # what has a capability that the wrap key may not hand on
    shell("generate-asymmetric-key", "-i", 3, "-c", "derive-ecdh,exportable-under-wrap", "-A", "ecp224")
    refused = shell("get-wrapped", "--wrap-id", 1, "-i", 3, "-t", "asymmetric-key", refuses=True)
    assert "permission" in refused.lower()


def test_rsa_wrap(hsm: Hsm, shell: Shell) -> None:
    every = ("--delegated", "all", "-c")
    hsm.write("wrap.pem", private_pem(private_key("rsa2048")))
    shell("put-rsa-wrapkey", "-i", 1, *every, "import-wrapped", "--in", "wrap.pem")
    shell("get-public-key", "-i", 1, "-t", "wrap-key", "--out", "public.pem")
    shell("put-public-wrapkey", "-i", 1, *every, "export-wrapped", "--in", "public.pem")
    shell("generate-symmetric-key", "-i", 5, "-c", "encrypt-cbc,exportable-under-wrap", "-A", "aes256")
    hsm.write("plain", bytes(range(32)))
    encrypt = ("encrypt-aescbc", "--iv", "00" * 16, "--in", "plain", "--outformat", "binary")
    shell(*encrypt, "-i", 5, "--out", "before")
    out = ("--wrap-id", 1, "-i", 5, "-t", "symmetric-key", "--out")
    shell("get-rsa-wrapped", *out, "wrapped.object")
    shell("get-rsa-wrapped-key", *out, "wrapped.key")
    shell("delete-object", "-i", 5, "-t", "symmetric-key")
    shell("put-rsa-wrapped", "--wrap-id", 1, "--in", "wrapped.object")
    assert info_of(shell, 5, "symmetric-key")["origin"] == "generated:imported_wrapped"
    again = ("-i", 6, "-t", "symmetric-key", "-A", "aes256", "-c", "encrypt-cbc")
    shell("put-rsa-wrapped-key", "--wrap-id", 1, *again, "--in", "wrapped.key")
    for id in (5, 6):
        shell(*encrypt, "-i", id, "--out", "after")
        assert hsm.read("before") == hsm.read("after")


def test_hmac_and_aes(hsm: Hsm, shell: Shell, script: Shell) -> None:
    script(f"put hmackey 0 1 mac all sign-hmac hmac-sha256 {'0b' * 20}\nhmac 0 1 {b'Hi There'.hex()} mac")
    # RFC 4231, 4.2
    assert hsm.read("mac").decode().strip() == "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"
    key, iv, plain, encrypted = (
        "2b7e151628aed2a6abf7158809cf4f3c",
        "000102030405060708090a0b0c0d0e0f",
        "6bc1bee22e409f96e93d7e117393172a",
        "7649abac8119b246cee98e9b12e9197d",
    )  # NIST SP 800-38A, F.2.1
    capabilities = "encrypt-cbc,decrypt-cbc,encrypt-ecb,decrypt-ecb"
    shell("put-symmetric-key", "-i", 2, "-c", capabilities, "-A", "aes128", "--in", key)
    hsm.write("plain", bytes.fromhex(plain))
    shell("encrypt-aescbc", "-i", 2, "--iv", iv, "--in", "plain", "--out", "encrypted", "--outformat", "binary")
    assert hsm.read("encrypted") == bytes.fromhex(encrypted)
    decrypt = ("decrypt-aescbc", "-i", 2, "--iv", iv, "--in", "encrypted", "--informat", "binary")
    shell(*decrypt, "--out", "back", "--outformat", "binary")
    assert hsm.read("back") == bytes.fromhex(plain)


def test_otp(hsm: Hsm, shell: Shell, script: Shell) -> None:
    capabilities = ("-c", "randomize-otp-aead,create-otp-aead,decrypt-otp,rewrap-from-otp-aead-key")
    shell("generate-otp-aead-key", "-i", 1, *capabilities, "-A", "aes128-yubico-otp", "--nonce", 0x01020304)
    shell("randomize-otp-aead", "-i", 1, "--out", "aead", "--outformat", "binary")
    assert len(hsm.read("aead")) == 36
    assert info_of(shell, 1, "otp-aead-key")["length"] == "20"
    # the first of Yubico's test vectors, without its modhex
    otp = "2f5d71a4915dec304aa13ccf97bb0dbb"
    output = script(f"""
otp aead_create 0 1 000102030405060708090a0b0c0d0e0f 010203040506 created
otp decrypt 0 1 {otp} created
put otpaeadkey 0 2 other all decrypt-otp,rewrap-to-otp-aead-key 7 {"00" * 32}
otp rewrap 0 1 2 created moved
otp decrypt 0 2 {otp} moved
""")
    assert output.count(OTP_DECODED) == 2, output
    assert hsm.read("created") != hsm.read("moved")
    assert "OTP" in script(f"otp decrypt 0 2 {'00' * 16} moved", refuses=True)


def test_attestation(hsm: Hsm, shell: Shell) -> None:
    shell("generate-asymmetric-key", "-i", 0x100, "-l", "attested", "-c", "sign-ecdsa", "-A", "ecp256")
    shell("sign-attestation-certificate", "-i", 0x100, "--attestation-id", 0, "--out", "attested.pem")
    shell("get-opaque", "-i", 0, "--out", "device.pem", "--outformat", "PEM")
    for name, issuers in (
        ("root", [hsm.device.attestation_root]),
        ("issuers", [x509.load_der_x509_certificate(each).public_bytes(Encoding.PEM)
                     for each in hsm.device.attestation_issuers] + [hsm.read("device.pem")]),
    ):  # fmt: skip
        hsm.write(f"{name}.pem", b"".join(issuers))
    verify = ("/usr/bin/openssl", "verify", "-CAfile", "root.pem", "-untrusted", "issuers.pem", "attested.pem")
    assert "attested.pem: OK" in hsm.run(*verify)
    assert "YubiHSM Attestation id:0x0100" in hsm.run("/usr/bin/openssl", "x509", "-in", "attested.pem", "-subject")


def test_log_and_options(shell: Shell) -> None:
    assert "Option value is: 00" in shell("get-option", "--opt-name", "force-audit")
    shell("put-option", "--opt-name", "command-audit", "--opt-value", "0a014101")
    shell("get-storage-info")
    output = shell("get-logs")
    assert "0 unlogged boots found" in output
    last = output.strip().splitlines()[-1]
    assert re.search(r"item:\s+3 -- cmd: 0x41 -- length:\s+0 -- session key: 0x0001", last), output
    shell("set-log-index", "--log-index", 2)
    assert "Found 1 item" in shell("get-logs")


def test_reset_and_blink(shell: Shell) -> None:
    shell("blink-device", "--duration", 1)
    shell("generate-hmac-key", "-i", 3, "-A", "hmac-sha1")
    assert "Found 2 object(s)" in shell("list-objects")
    shell("reset")
    assert "Found 1 object(s)" in shell("list-objects")


def test_wrong_password_and_connector(hsm: Hsm) -> None:
    for _ in range(20):  # it lets the device decide, and no half-open session stays
        output = hsm.refuses("yubihsm-shell", "-C", hsm.url, "-p", "wrong", "-a", "get-storage-info")
        assert "Failed to create session: Message encryption / verification failed" in output
    assert hsm.device.sessions == 0
    hsm.device.faults.unplugged = True
    hsm.refuses("yubihsm-shell", "-C", hsm.url, "-p", PASSWORD, "-a", "get-storage-info")


# Scripts


def test_a_script_of_every_other_command(hsm: Hsm, script: Shell) -> None:
    hsm.write("content", b"content")
    template = ssh_ca.template(private_key("rsa2048").public_key(), [20])
    hsm.write("template", base64.b64encode(template))
    output = script(f"""
echo 0 0x41 8
plain echo 0x42 8
get random 0 16
get devicepubkey
list objects 0
put authkey 0 2 second all all all another
session open 2 another
list sessions
change authkey 1 2 changed
session close 1
session open 2 changed
session close 1
put wrapkey 0 3 wrapping all wrap-data,unwrap-data none {bytes(range(32)).hex()}
encrypt aesccm 0 3 content
generate hmackey 0 4 mac all sign-hmac,verify-hmac hmac-sha512
hmac 0 4 00010203 mac
generate symmetric 0 5 aes all encrypt-ecb,decrypt-ecb aes192
put option 0 command-audit 6b01
get option 0 command-audit
blink 0 1
audit get 0
audit set 0 2
put template 0 10 ssh all none template-ssh template
get template 0 10 back
delete 0 4 hmac-key
""")
    assert "41" * 8 in output
    assert "42" * 8 in output
    assert re.search(r"Option value is: 0100.*6a006b016c00", output)
    assert re.search(r"item:\s+3 -- cmd: 0x6b -- length:\s+1 -- session key: 0x0001 .* result: 0xeb", output)
    (line,) = re.findall(r"^[A-Za-z0-9+/=]{52}$", output, re.MULTILINE)  # 13 + 1 + 7 + 16 bytes
    sealed = base64.b64decode(line)
    assert AESCCM(bytes(range(32))).decrypt(sealed[:13], sealed[13:], None)[1:] == b"content"
    assert base64.b64decode(hsm.read("back")) == template


def test_asymmetric_authentication(hsm: Hsm, script: Shell) -> None:
    hsm.write("private.pem", private_pem(private_key("ecp256")))
    hsm.write("public.pem", public_pem(private_key("ecp256")))
    hsm.write("other.pem", private_pem(ec.generate_private_key(ec.SECP256R1())))
    script("put authkey_asym 0 7 asymmetric all all none public.pem")
    opened = "connect\nsession open_asym 7 private.pem\nget random 0 8\nsession close 0\nquit\n"
    output = hsm.run("yubihsm-shell", "-C", hsm.url, text=opened)
    assert "Created session 0" in output
    output = hsm.run("yubihsm-shell", "-C", hsm.url, text=opened.replace("private", "other"))
    assert "Failed to create session" in output
    hsm.device.skip(31)  # the device had opened it
    script("delete 0 7 authentication-key")


def test_refusals_are_told_apart(hsm: Hsm, script: Shell) -> None:
    hsm.write("content", b"content")
    output = script(
        """
get objectinfo 0 99 asymmetric-key
generate asymmetric 0 5 first all sign-ecdsa ecp256
generate asymmetric 0 5 second all sign-ecdsa ecp256
decrypt pkcs1v1_5 0 5 content
put option 0 command-audit 07
put option 0 force-audit 09
delete 0 5 hmac-key
generate asymmetric 0 65535 last all sign-ecdsa ecp256
""",
        refuses=True,
    )
    assert [line for line in output.splitlines() if line.startswith("Failed")] == [
        "Failed to get object info: Object not found",
        "Failed to generate asymmetric key: An Object with that ID already exists",
        "Failed to decrypt data: Wrong permissions for operation",
        "Failed to store option: Wrong length",
        "Failed to store option: Malformed command / invalid data",
        "Failed to delete object: Object not found",
        "Failed to generate asymmetric key: Invalid ID used",
    ]
