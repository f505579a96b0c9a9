"""OpenSSL signs with keys on loan, by its engine and its provider; every result is verified by another release."""

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest

from tokens.lending import Loan, LoanLimits, Via, configuration, provider_uri_pem
from tokens.schemes import Ecdsa, Hash, RsaPkcs1v15, RsaPss

EVERY_WAY = ("engine", "provider", "trixie", "sid")
PSS = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32")
ENGINE = ("-engine", "pkcs11", "-keyform", "engine")


def uri(name: str) -> str:
    return f"pkcs11:token=YubiHSM;object={name};type=private"


@pytest.mark.parametrize(
    ("way", "name", "options", "scheme"),
    [
        (way, name, options, scheme)
        for way in EVERY_WAY
        for name, options, scheme in (
            ("rsa2048", ("-sha256",), RsaPkcs1v15(Hash.SHA256)),
            ("rsa2048", ("-sha256", *PSS), RsaPss(Hash.SHA256, 32)),
            ("rsa4096", ("-sha512",), RsaPkcs1v15(Hash.SHA512)),
            ("p256", ("-sha256",), Ecdsa(Hash.SHA256)),
            ("p384", ("-sha384",), Ecdsa(Hash.SHA384)),
        )
        # p11-kit 0.24's client withholds CKM_SHA256_RSA_PKCS_PSS, and the provider has no other way for a whole message
        if not (way == "provider" and options[1:])
    ],
)
async def test_dgst(
    *, lend: Any, tools: Any, signed: list[Any], way: str, name: str, options: tuple[str, ...], scheme: Any
) -> None:
    verify = (tools.way.other_openssl, "dgst", *options, "-verify", f"{name}.pub", "-signature")
    engine = ENGINE if way == "engine" else ()

    async def run(number: int) -> None:
        sign = (tools.way.openssl, "dgst", *engine, *options, "-sign", uri(name), "-out", f"{number}", "content")
        await tools.ok(*sign, loan=loan)
        await tools.ok(*verify, f"{number}", "content")

    async with lend() as loan:
        await tools.repeat(run)
    assert signed == [(name, scheme)] * 20
    (tools.directory / "content").write_bytes(b"tampered")
    await tools.refuses(*verify, "0", "content")


@pytest.mark.parametrize(
    ("way", "padding"),
    [("engine", "pkcs1"), *((way, padding) for way in EVERY_WAY[1:] for padding in ("pkcs1", "pss"))],
)
async def test_pkeyutl(lend: Any, tools: Any, signed: list[Any], way: str, padding: str) -> None:
    """It signs a digest that somebody else made."""
    (tools.directory / "digest").write_bytes(hashlib.sha256((tools.directory / "content").read_bytes()).digest())
    salt = ("-pkeyopt", "rsa_pss_saltlen:32") if padding == "pss" else ()
    options = ("-pkeyopt", f"rsa_padding_mode:{padding}", *salt, "-pkeyopt", "digest:sha256")
    verify = ("dgst", "-sha256", *(PSS if padding == "pss" else ()), "-verify", "rsa2048.pub", "-signature")
    engine = ENGINE if way == "engine" else ()

    async def run(number: int) -> None:
        sign = (tools.way.openssl, "pkeyutl", "-sign", *engine, "-inkey", uri("rsa2048"), *options)
        await tools.ok(*sign, "-in", "digest", "-out", f"{number}", loan=loan)
        await tools.ok(tools.way.other_openssl, *verify, f"{number}", "content")

    async with lend() as loan:
        await tools.repeat(run)
    scheme = RsaPss(Hash.SHA256, 32) if padding == "pss" else RsaPkcs1v15(Hash.SHA256)
    assert signed == [("rsa2048", scheme)] * 20
    (tools.directory / "content").write_bytes(b"tampered")
    await tools.refuses(tools.way.other_openssl, *verify, "0", "content")


@pytest.mark.parametrize(
    ("way", "name", "options"),
    [
        *((way, name, ()) for way in EVERY_WAY for name in ("rsa2048", "p256")),
        # not the provider of Debian 12, as above
        *((way, "rsa2048", ("-keyopt", "rsa_padding_mode:pss")) for way in ("engine", "trixie", "sid")),
    ],
)
async def test_cms(lend: Any, tools: Any, way: str, name: str, options: tuple[str, ...]) -> None:
    verify = ("cms", "-verify", "-binary", "-inform", "DER", "-content", "content", "-CAfile", f"{name}.crt",
              "-purpose", "any", "-out", "/dev/null", "-in")  # fmt: skip
    # a PIN in the URI is what users' files have: it is accepted, and means nothing
    key = (*(ENGINE if way == "engine" else ()), "-inkey", uri(name) + ";pin-value=password")

    async def run(number: int) -> None:
        sign = (tools.way.openssl, "cms", "-sign", "-binary", "-in", "content", "-signer", f"{name}.crt", *key)
        await tools.ok(*sign, *options, "-outform", "DER", "-out", f"{number}", loan=loan)
        await tools.ok(tools.way.other_openssl, *verify, f"{number}")

    async with lend() as loan:
        await tools.repeat(run)
    (tools.directory / "content").write_bytes(b"tampered")
    await tools.refuses(tools.way.other_openssl, *verify, "0")


@pytest.mark.parametrize("way", EVERY_WAY[1:])
async def test_pem_stands_for_the_key(lend: Any, tools: Any, way: str) -> None:
    (tools.directory / "key.pem").write_bytes(provider_uri_pem(uri("rsa2048")))
    verify = ("dgst", "-sha256", "-verify", "rsa2048.pub", "-signature")

    async def run(number: int) -> None:
        sign = (tools.way.openssl, "dgst", "-sha256", "-sign", "key.pem", "-out", f"{number}", "content")
        await tools.ok(*sign, loan=loan)
        await tools.ok(tools.way.other_openssl, *verify, f"{number}", "content")

    async with lend() as loan:
        await tools.repeat(run)


async def test_many_at_once(lend: Any, tools: Any) -> None:
    async def sign(loan: Loan, number: int) -> None:
        options = ("dgst", "-sha256", *ENGINE, "-sign", uri("rsa2048"), "-out", f"{number}", "content")
        await tools.ok(tools.way.openssl, *options, loan=loan)
        verify = ("dgst", "-sha256", "-verify", "rsa2048.pub", "-signature", f"{number}", "content")
        await tools.ok(tools.way.openssl, *verify)

    async with lend() as loan:
        for batch in range(3):
            await asyncio.gather(*(sign(loan, 8 * batch + number) for number in range(8)))


@pytest.mark.parametrize("ended", [True, False])
async def test_no_signature_after_the_job_or_beyond_its_number(lend: Any, tools: Any, ended: bool) -> None:
    command = (tools.way.openssl, "dgst", "-sha256", *ENGINE, "-sign", uri("p256"), "-out", "signature", "content")
    async with lend(LoanLimits(signatures=1)) as loan:
        await tools.ok(*command, loan=loan)
        if not ended:
            await tools.refuses(*command, loan=loan)
    if ended:
        await tools.refuses(*command, loan=loan)
    assert not (tools.directory / "loan").exists()


@pytest.mark.parametrize("via", Via)
@pytest.mark.parametrize("path", ["/a\nengine_id = evil", '/a"b', "/a'b", "/a\\b", "/$ENV::HOME", "/a#b"])
def test_a_path_that_means_something_to_openssl_is_refused(via: Via, path: str) -> None:
    for client, plugin in ((Path(path), Path("/plugin.so")), (Path("/client.so"), Path(path))):
        with pytest.raises(ValueError, match="cannot hold the path"):
            configuration(via, client=client, engine=plugin, provider=plugin)
