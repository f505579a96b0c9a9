"""OpenSC's pkcs11-tool on Yubico's PKCS#11 module."""

import os
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from yubihsm import YubiHsm
from yubihsm.objects import AsymmetricKey

from tests.yubihsm_simulator.clients.conftest import (
    HASHES,
    MODULE,
    PASSWORD,
    PIN,
    SERIAL,
    Hsm,
    certificate,
    private_key,
    private_pem,
    put_key,
)

CURVES = {
    "secp224r1": "ecp224",
    "secp256r1": "ecp256",
    "secp384r1": "ecp384",
    "secp521r1": "ecp521",
    "secp256k1": "eck256",
    "brainpoolP256r1": "ecbp256",
    "brainpoolP384r1": "ecbp384",
    "brainpoolP512r1": "ecbp512",
}

Tool = Callable[..., str]


@pytest.fixture
def tool(hsm: Hsm) -> Tool:
    """Runs it logged in; a run that is refused leaves its session open on the device."""

    def run(*options: object, refuses: bool = False) -> str:
        command = ("pkcs11-tool", "--module", MODULE, "--login", "--pin", PIN, *map(str, options))
        return hsm.refuses(*command) if refuses else hsm.run(*command)

    return run


def read_public(hsm: Hsm, tool: Tool, id: str) -> Any:
    """But OpenSC 0.23 can read neither a point of 384 bits nor an Ed25519 key, from any token."""
    public = tool("--list-objects", "--type", "pubkey", "--id", id)
    if "384 bits" in public or "EC_EDWARDS" in public:
        with YubiHsm.connect(hsm.url) as yubihsm, yubihsm.create_session_derived(1, PASSWORD) as session:
            return AsymmetricKey(session, int(id, 16)).get_public_key()
    tool("--read-object", "--type", "pubkey", "--id", id, "--output-file", "public.der")
    return load_der_public_key(hsm.read("public.der"))


def test_the_token(hsm: Hsm) -> None:
    listed = hsm.run("pkcs11-tool", "--module", MODULE, "-L")
    for line in ("token label        : YubiHSM", "token manufacturer : Yubico (www.yubico.com)", f"{SERIAL:08}"):
        assert line in listed
    mechanisms = hsm.run("pkcs11-tool", "--module", MODULE, "-M")
    for name in ("RSA-PKCS", "SHA256-RSA-PKCS-PSS", "ECDSA-SHA256", "ECDH1-DERIVE", "EDDSA", "AES-CBC", "SHA512-HMAC"):
        assert name in mechanisms
    assert "keySize={2048,4096}" in next(line for line in mechanisms.splitlines() if "RSA-PKCS-KEY-PAIR-GEN" in line)


@pytest.mark.parametrize("curve", CURVES)
def test_ecdsa_and_ecdh(hsm: Hsm, tool: Tool, content: bytes, curve: str) -> None:
    key = private_key(CURVES[curve])
    hsm.write("private.pem", private_pem(key))
    tool("--keypairgen", "--id", "0001", "--label", "made", "--key-type", f"EC:{curve}", "--usage-sign")
    tool("--write-object", "private.pem", "--type", "privkey", "--id", "0002", "--label", "put", "--usage-sign")
    for id in ("0001", "0002"):
        public = read_public(hsm, tool, id)
        for name, hash in HASHES.items():
            options = ("-m", f"ECDSA-{name}", "--signature-format", "openssl", "-i", "content", "-o", "signature")
            tool("--sign", "--id", id, *options)
            public.verify(hsm.read("signature"), content, ec.ECDSA(hash))
    assert public.public_numbers() == key.public_key().public_numbers()
    for id in ("0001", "0002"):
        tool("--delete-object", "--type", "privkey", "--id", id)
    tool("--sign", "--id", "0001", "-m", "ECDSA-SHA256", "-i", "content", refuses=True)

    tool("--keypairgen", "--id", "0003", "--key-type", f"EC:{curve}", "--usage-derive")
    public = read_public(hsm, tool, "0003")
    hsm.write("other.der", key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    tool("--derive", "-m", "ECDH1-DERIVE", "--id", "0003", "--input-file", "other.der", "--output-file", "shared")
    assert hsm.read("shared") == key.exchange(ec.ECDH(), public)


def test_rsa(hsm: Hsm, tool: Tool, content: bytes) -> None:
    key = private_key("rsa2048")
    hsm.write("private.pem", private_pem(key))
    usage = ("--usage-sign", "--usage-decrypt")
    tool("--keypairgen", "--id", "0001", "--label", "made", "--key-type", "rsa:2048", *usage)
    tool("--write-object", "private.pem", "--type", "privkey", "--id", "0002", "--label", "put", *usage)
    for id in ("0001", "0002"):
        public = read_public(hsm, tool, id)
        for name, hash in HASHES.items():
            sign = ("--sign", "--id", id, "-i", "content", "-o", "signature", "-m")
            tool(*sign, f"{name}-RSA-PKCS")
            public.verify(hsm.read("signature"), content, padding.PKCS1v15(), hash)
            tool(*sign, f"{name}-RSA-PKCS-PSS")
            pss = padding.PSS(padding.MGF1(hash), hash.digest_size)
            public.verify(hsm.read("signature"), content, pss, hash)
    decrypt = ("--decrypt", "--id", "0002", "-i", "encrypted", "-o", "decrypted", "-m")
    hsm.write("encrypted", key.public_key().encrypt(b"secret", padding.PKCS1v15()))
    tool(*decrypt, "RSA-PKCS")
    assert hsm.read("decrypted") == b"secret"
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
    hsm.write("encrypted", key.public_key().encrypt(b"secret", oaep))
    tool(*decrypt, "RSA-PKCS-OAEP", "--hash-algorithm", "SHA256")
    assert hsm.read("decrypted") == b"secret"


def test_ed25519(hsm: Hsm, tool: Tool, content: bytes) -> None:
    tool("--keypairgen", "--id", "0001", "--key-type", "EC:edwards25519", "--usage-sign")
    tool("--sign", "--id", "0001", "-m", "EDDSA", "-i", "content", "-o", "signature")
    read_public(hsm, tool, "0001").verify(hsm.read("signature"), content)


def test_certificates_and_data(hsm: Hsm, tool: Tool) -> None:
    issued = certificate(private_key("ecp256"))
    hsm.write("certificate.der", issued.public_bytes(Encoding.DER))
    hsm.write("data", os.urandom(100))
    tool("--write-object", "certificate.der", "--type", "cert", "--id", "0005", "--label", "certificate")
    tool("--write-object", "data", "--type", "data", "--id", "0006", "--label", "data")
    tool("--read-object", "--type", "cert", "--id", "0005", "--output-file", "back.der")
    assert x509.load_der_x509_certificate(hsm.read("back.der")) == issued
    tool("--read-object", "--type", "data", "--label", "data", "--output-file", "back")
    assert hsm.read("back") == hsm.read("data")


def test_secret_keys(hsm: Hsm, tool: Tool) -> None:
    secret = bytes(range(32))
    hsm.write("secret", secret)
    options = ("--key-type", "AES:32", "--private", "--sensitive", "--usage-decrypt")
    tool("--write-object", "secret", "--type", "secrkey", "--id", "0001", *options)
    encrypt = ("--encrypt", "--id", "0001", "-m", "AES-CBC", "--iv", "00" * 16, "-i", "plain", "-o", "encrypted")
    hsm.write("plain", bytes(range(48)))
    tool(*encrypt)
    encryptor = Cipher(algorithms.AES(secret), modes.CBC(bytes(16))).encryptor()
    assert hsm.read("encrypted") == encryptor.update(bytes(range(48))) + encryptor.finalize()
    tool("--keygen", "--id", "0002", *options)
    assert tool("--list-objects", "--type", "secrkey").count("AES length 32") == 2


def test_objects_under_ids_and_labels_of_any_length(hsm: Hsm, tool: Tool) -> None:
    """The module keeps what the device has no room for in objects of its own."""
    label = "a label that is longer than the forty bytes that a device has room for"
    tool("--keypairgen", "--id", "0102030405", "--label", label, "--key-type", "EC:secp256r1", "--usage-sign")
    listed = tool("--list-objects")
    assert label in listed
    assert "0102030405" in listed
    tool("--delete-object", "--type", "privkey", "--id", "0102030405")
    assert label not in tool("--list-objects")


def test_its_own_tests(hsm: Hsm, tool: Tool) -> None:
    put_key(hsm, 5, "signer", private_key("rsa2048"))
    assert tool("--test").endswith("No errors\n")


def test_random(tool: Tool) -> None:
    assert tool("--generate-random", "32") != tool("--generate-random", "32")


def test_a_wrong_pin_and_no_device(hsm: Hsm) -> None:
    for _ in range(20):
        command = ("pkcs11-tool", "--module", MODULE, "--login", "--list-objects", "--pin")
        assert "CKR_PIN_INCORRECT" in hsm.refuses(*command, PIN[:-1] + "x")
    hsm.run(*command, PIN)
    hsm.device.faults.unplugged = True
    hsm.refuses(*command, PIN)


def test_a_proxy_hides_the_token(hsm: Hsm) -> None:
    """Why NO_PROXY is set."""
    hsm.env.pop("NO_PROXY")
    hsm.env["http_proxy"] = "http://127.0.0.1:9"
    assert "(empty)" in hsm.run("pkcs11-tool", "--module", MODULE, "-L")
