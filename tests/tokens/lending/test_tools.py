"""Real tools sign with keys on loan; every result is verified by another tool, without the loan."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from tokens.lending import Loan, LoanLimits

CLIENT = "/usr/lib/x86_64-linux-gnu/pkcs11/p11-kit-client.so"
RUNS = 20

ENGINE = f"""\
openssl_conf = conf
[conf]
engines = engines
[engines]
pkcs11 = pkcs11
[pkcs11]
engine_id = pkcs11
dynamic_path = /usr/lib/x86_64-linux-gnu/engines-3/pkcs11.so
MODULE_PATH = {CLIENT}
init = 0
"""

# of a newer Debian: another release of the client too, whose wire form differs
NEWER = Path(__file__).parents[3] / ".cache/debian"
LIBRARIES = NEWER / "trixie/root/usr/lib/x86_64-linux-gnu"
PROVIDER = f"""\
openssl_conf = conf
[conf]
providers = providers
[providers]
default = built-in
pkcs11 = pkcs11
[built-in]
activate = 1
[pkcs11]
module = {LIBRARIES}/ossl-modules/pkcs11.so
pkcs11-module-path = {LIBRARIES}/pkcs11/p11-kit-client.so
activate = 1
"""


class Tools:
    """Runs tools with a loan, or without."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "engine.cnf").write_text(ENGINE)
        (directory / "provider.cnf").write_text(PROVIDER)
        (directory / "content").write_bytes(os.urandom(5000))

    async def run(self, *command: str, loan: Loan | None = None, by: str = "engine") -> tuple[int, str]:
        env = {"PATH": "/usr/bin:/bin", "HOME": str(self.directory)}
        if loan is not None:
            env |= {"P11_KIT_SERVER_ADDRESS": loan.address, "OPENSSL_CONF": str(self.directory / f"{by}.cnf")}
        process = await asyncio.create_subprocess_exec(
            *command, cwd=self.directory, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), 30)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise
        return process.returncode or 0, output.decode()

    async def ok(self, *command: str, loan: Loan | None = None, by: str = "engine") -> str:
        status, output = await self.run(*command, loan=loan, by=by)
        assert status == 0, output
        return output


@pytest.fixture
def tools(tmp_path: Path, keys: Any) -> Tools:
    for name, key in keys.items():
        (tmp_path / f"{name}.crt").write_bytes(key.certificate_pem)
    return Tools(tmp_path)


async def public_key(tools: Tools, name: str) -> str:
    (tools.directory / f"{name}.pub").write_text(
        await tools.ok("openssl", "x509", "-in", f"{name}.crt", "-noout", "-pubkey")
    )
    return f"{name}.pub"


PSS = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32")


OPENSSL = {
    "engine": ("openssl", "dgst", "-engine", "pkcs11", "-keyform", "engine"),
    "provider": (str(NEWER / "bin/openssl"), "dgst"),
}


@pytest.mark.parametrize("by", OPENSSL)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rsa2048", ("-sha256",)),
        ("rsa2048", ("-sha256", *PSS)),
        ("rsa4096", ("-sha512",)),
        ("p256", ("-sha256",)),
        ("p384", ("-sha384",)),
    ],
)
async def test_openssl_dgst(
    lend: Any, tools: Tools, by: str, name: str, options: tuple[str, ...], signed: list[Any]
) -> None:
    public = await public_key(tools, name)
    uri = f"pkcs11:token=YubiHSM;object={name};type=private"
    async with lend() as loan:
        for _ in range(RUNS):
            output = ("-sign", uri, "-out", "signature", "content")
            await tools.ok(*OPENSSL[by], *options, *output, loan=loan, by=by)
            await tools.ok("openssl", "dgst", *options, "-verify", public, "-signature", "signature", "content")
    (tools.directory / "content").write_bytes(b"tampered")
    status, _ = await tools.run("openssl", "dgst", *options, "-verify", public, "-signature", "signature", "content")
    assert status != 0
    assert [label for label, _ in signed] == [name] * RUNS


@pytest.mark.parametrize("name", ["rsa2048", "p256"])
async def test_openssl_cms_by_the_engine(lend: Any, tools: Tools, name: str) -> None:
    async with lend() as loan:
        for _ in range(RUNS):
            await tools.ok(
                "openssl", "cms", "-sign", "-binary", "-in", "content", "-engine", "pkcs11", "-keyform", "engine",
                # a PIN in the URI is what users' files have: it is accepted, and means nothing
                "-inkey", f"pkcs11:token=YubiHSM;object={name};type=private;pin-value=password",
                "-signer", f"{name}.crt", "-outform", "DER", "-out", "cms", loan=loan,
            )  # fmt: skip
            verify = ("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", "cms", "-content", "content")
            await tools.ok(*verify, "-CAfile", f"{name}.crt", "-purpose", "any", "-out", "verified")


@pytest.mark.parametrize(
    ("id_", "name", "mechanism", "options"),
    [
        ("01", "rsa2048", "SHA256-RSA-PKCS", ("-sha256",)),
        ("02", "rsa4096", "SHA512-RSA-PKCS", ("-sha512",)),
    ],
)
async def test_pkcs11_tool(
    lend: Any, tools: Tools, id_: str, name: str, mechanism: str, options: tuple[str, ...]
) -> None:
    public = await public_key(tools, name)
    async with lend() as loan:
        for _ in range(RUNS):
            await tools.ok(
                "pkcs11-tool", "--module", CLIENT, "--sign", "--id", id_, "-m", mechanism,
                "-i", "content", "-o", "signature", loan=loan,
            )  # fmt: skip
            await tools.ok("openssl", "dgst", *options, "-verify", public, "-signature", "signature", "content")


async def test_the_token_holds_the_lent_keys_and_nothing_else(lend: Any, tools: Tools) -> None:
    async with lend() as loan:
        listed = await tools.ok("pkcs11-tool", "--module", CLIENT, "-O", loan=loan)
        certificate = ("pkcs11-tool", "--module", CLIENT, "--read-object", "--type", "cert", "--id", "03")
        await tools.ok(*certificate, "-o", "read.der", loan=loan)
    assert listed.count("Private Key Object") == 4
    assert listed.count("Certificate Object") == 4
    assert "ed25519" not in listed
    read = await tools.ok("openssl", "x509", "-inform", "DER", "-in", "read.der")
    assert read == (tools.directory / "p256.crt").read_text()


async def test_many_tools_at_once(lend: Any, tools: Tools) -> None:
    public = await public_key(tools, "rsa2048")

    async def sign(loan: Loan, number: int) -> None:
        await tools.ok(
            "openssl", "dgst", "-sha256", "-engine", "pkcs11", "-keyform", "engine",
            "-sign", "pkcs11:token=YubiHSM;object=rsa2048;type=private", "-out", f"signature{number}", "content",
            loan=loan,
        )  # fmt: skip
        await tools.ok("openssl", "dgst", "-sha256", "-verify", public, "-signature", f"signature{number}", "content")

    async with lend() as loan:
        for batch in range(3):
            await asyncio.gather(*(sign(loan, 8 * batch + number) for number in range(8)))


@pytest.mark.parametrize("ended", [True, False])
async def test_no_signature_after_the_job_or_beyond_its_number(lend: Any, tools: Tools, ended: bool) -> None:
    command = (
        "openssl", "dgst", "-sha256", "-engine", "pkcs11", "-keyform", "engine",
        "-sign", "pkcs11:token=YubiHSM;object=p256;type=private", "-out", "signature", "content",
    )  # fmt: skip
    async with lend(LoanLimits(signatures=1)) as loan:
        await tools.ok(*command, loan=loan)
        if not ended:
            status, _ = await tools.run(*command, loan=loan)
            assert status != 0
    if ended:
        status, _ = await tools.run(*command, loan=loan)
        assert status != 0
    assert not (tools.directory / "loan").exists()
