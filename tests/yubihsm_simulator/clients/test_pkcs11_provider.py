"""OpenSSL with pkcs11-provider on Yubico's PKCS#11 module."""

from collections.abc import Callable

import pytest

from tests.yubihsm_simulator.clients.conftest import Hsm, private_key, put_key

OPENSSL = "/usr/bin/openssl"
PSS = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32")


@pytest.fixture
def openssl(hsm: Hsm, provider: None) -> Callable[..., str]:
    """Runs it with the provider; what hangs is killed after a minute."""
    return lambda *arguments: hsm.run(OPENSSL, *arguments)


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
    ],
)
def test_dgst(
    hsm: Hsm,
    openssl: Callable[..., str],
    content: bytes,
    verifies: Callable[..., None],
    kind: str,
    options: tuple[str, ...],
) -> None:
    put_key(hsm, 5, "signer", private_key(kind))
    openssl("dgst", *options, "-sign", uri("signer"), "-out", "signature", "content")
    del hsm.env["OPENSSL_CONF"]  # somebody else verifies
    verifies(*options, public="signer.pub")


@pytest.mark.parametrize("kind", ["rsa2048", "ecp256"])
def test_cms(hsm: Hsm, openssl: Callable[..., str], content: bytes, kind: str) -> None:
    put_key(hsm, 5, "signer", private_key(kind))
    output = ("-outform", "DER", "-out", "signature")
    sign = ("cms", "-sign", "-binary", "-in", "content", "-signer", "signer.crt", *output)
    openssl(*sign, "-inkey", uri("signer"))
    del hsm.env["OPENSSL_CONF"]
    verify = ("cms", "-verify", "-binary", "-inform", "DER", "-in", "signature", "-CAfile", "signer.crt", "-purpose",
              "any", "-out", "verified", "-content")  # fmt: skip
    hsm.run(OPENSSL, *verify, "content")
    hsm.write("tampered", content[1:])
    hsm.refuses(OPENSSL, *verify, "tampered")


def test_many_runs(hsm: Hsm, openssl: Callable[..., str], content: bytes) -> None:
    """None of them hangs or crashes at its end."""
    put_key(hsm, 5, "signer", private_key("ecp256"))
    for number in range(20):
        openssl("dgst", "-sha256", "-sign", uri("signer"), "-out", "signature", "content")
        if number % 8 == 7:
            hsm.device.skip(31)  # each leaves a session behind
