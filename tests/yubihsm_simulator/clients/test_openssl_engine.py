"""OpenSSL with libp11's engine on Yubico's PKCS#11 module."""

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.yubihsm_simulator.clients.conftest import Hsm, private_key, put_key

OPENSSL = "/usr/bin/openssl"
PSS = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32")

Options = tuple[str, ...]


def uri(label: str) -> str:
    return f"pkcs11:token=YubiHSM;object={label};type=private"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("rsa2048", ("-sha256",)),
        ("rsa2048", ("-sha256", *PSS)),
        ("rsa4096", ("-sha512",)),
        ("ecp256", ("-sha256",)),
        ("ecp384", ("-sha384",)),
        ("ecp521", ("-sha512",)),
    ],
)
def test_dgst(
    hsm: Hsm, engine: Options, content: bytes, verifies: Callable[..., None], kind: str, options: Options
) -> None:
    put_key(hsm, 5, "signer", private_key(kind))
    hsm.run(OPENSSL, "dgst", *engine, *options, "-sign", uri("signer"), "-out", "signature", "content")
    verifies(*options, public="signer.pub")


@pytest.mark.parametrize("kind", ["rsa2048", "ecp256"])
def test_cms(hsm: Hsm, engine: Options, content: bytes, kind: str) -> None:
    put_key(hsm, 5, "signer", private_key(kind))
    output = ("-outform", "DER", "-out", "signature")
    sign = ("cms", "-sign", "-binary", "-in", "content", "-signer", "signer.crt", *output)
    hsm.run(OPENSSL, *sign, *engine, "-inkey", uri("signer"))
    verify = ("cms", "-verify", "-binary", "-inform", "DER", "-in", "signature", "-CAfile", "signer.crt", "-purpose",
              "any", "-out", "verified", "-content")  # fmt: skip
    hsm.run(OPENSSL, *verify, "content")
    hsm.write("tampered", content[1:])
    hsm.refuses(OPENSSL, *verify, "tampered")


def test_a_request_for_a_certificate(hsm: Hsm, engine: Options) -> None:
    put_key(hsm, 5, "signer", private_key("ecp256"))
    hsm.write("req.cnf", b"[req]\ndistinguished_name = name\n[name]\n")
    request = ("req", "-new", "-config", "req.cnf", "-subj", "/CN=signer", "-out", "request.pem")
    hsm.run(OPENSSL, *request, *engine, "-key", uri("signer"))
    assert "verify OK" in hsm.run(OPENSSL, "req", "-in", "request.pem", "-verify", "-noout")


def test_ecdh(hsm: Hsm, engine: Options) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    put_key(hsm, 5, "ours", private_key("ecp256"))
    put_key(hsm, 6, "theirs", other)
    derive = ("pkeyutl", "-derive", "-inkey", uri("ours"), "-peerkey", "theirs.pub", "-out", "shared")
    hsm.run(OPENSSL, *derive, *engine)
    assert hsm.read("shared") == other.exchange(ec.ECDH(), private_key("ecp256").public_key())


def test_the_seventeenth_run(hsm: Hsm, engine: Options, content: bytes) -> None:
    """Each leaves a session behind, so there is none for it until the first one ends."""
    put_key(hsm, 5, "signer", private_key("ecp256"))
    sign = (OPENSSL, "dgst", *engine, "-sha256", "-sign", uri("signer"), "-out", "signature", "content")
    for number in range(16):
        assert hsm.device.sessions == number
        hsm.run(*sign)
    hsm.refuses(*sign)
    hsm.device.skip(31)
    hsm.run(*sign)


def test_a_key_that_is_not_there(hsm: Hsm, engine: Options, content: bytes) -> None:
    hsm.refuses(OPENSSL, "dgst", *engine, "-sha256", "-sign", uri("nobody"), "-out", "signature", "content")
