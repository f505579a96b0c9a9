"""Keys of a provider, on loan to real tools."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tokens.file import FileProvider, FileSettings
from tokens.lending import LentKey, Loan, LoanLimits, Via, configuration
from tokens.pkcs11 import Pkcs11Provider, Pkcs11Settings
from tokens.provider import KeyProvider, KeyReference
from tokens.schemes import Scheme
from tokens.secret import SecretSource

LENT = ("rsa2048", "rsa4096", "p256", "p384")

Lend = Callable[..., AbstractAsyncContextManager[Loan]]

RUNS = 20
UNPACKED = Path(__file__).parents[3] / ".cache/debian"


def libraries(suite: str) -> Path:
    """Of a Debian suite; the system's are those of ""."""
    return (UNPACKED / suite / "root" if suite else Path("/")) / "usr/lib/x86_64-linux-gnu"


@dataclass(frozen=True)
class Way:
    """How a tool comes to a key on loan.

    Arguments:
        openssl: what signs.
        other_openssl: another release, which verifies.
        client: p11-kit-client.so.
        plugin: the engine or the provider.
    """

    via: Via
    openssl: Path
    other_openssl: Path
    client: Path
    plugin: Path

    @property
    def configuration(self) -> str:
        return configuration(self.via, client=self.client, engine=self.plugin, provider=self.plugin)


CLIENT = libraries("") / "pkcs11/p11-kit-client.so"
OPENSSL = Path("/usr/bin/openssl")


def newer(suite: str) -> Way:
    """By a newer Debian's OpenSSL, provider and client, whose wire form differs."""
    client, provider = libraries(suite) / "pkcs11/p11-kit-client.so", libraries(suite) / "ossl-modules/pkcs11.so"
    return Way(Via.PROVIDER, UNPACKED / suite / "bin/openssl", OPENSSL, client, provider)


TRIXIE, SID = newer("trixie"), newer("sid")
WAYS = {
    "engine": Way(Via.ENGINE, OPENSSL, TRIXIE.openssl, CLIENT, libraries("") / "engines-3/pkcs11.so"),
    "provider": Way(
        Via.PROVIDER, OPENSSL, TRIXIE.openssl, CLIENT, libraries("bookworm-backports") / "ossl-modules/pkcs11.so"
    ),
    "trixie": TRIXIE,
    "sid": SID,
}


class Tools:
    """Runs tools in a directory of theirs, with a loan or without."""

    client = CLIENT

    def __init__(self, directory: Path, way: Way) -> None:
        self.directory = directory
        self.way = way

    async def run(self, *command: str | Path, loan: Loan | None = None) -> tuple[int, str]:
        """Its exit status and what it said."""
        env = {"PATH": "/usr/bin:/bin", "HOME": str(self.directory)}
        if loan is not None:
            env |= {"P11_KIT_SERVER_ADDRESS": loan.address, "OPENSSL_CONF": str(self.directory / "openssl.cnf")}
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=self.directory,
            env=env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), 30)
        finally:  # too slow, or no longer wanted
            if process.returncode is None:
                process.kill()
                await process.wait()
        return process.returncode or 0, output.decode(errors="replace")

    async def ok(self, *command: str | Path, loan: Loan | None = None) -> str:
        """What a tool said that succeeded."""
        status, output = await self.run(*command, loan=loan)
        assert status == 0, output
        return output

    async def refuses(self, *command: str | Path, loan: Loan | None = None) -> None:
        """Runs a tool that has to fail."""
        status, output = await self.run(*command, loan=loan)
        assert status != 0, output

    async def repeat(self, run: Callable[[int], Awaitable[None]]) -> None:
        """RUNS runs, each told its number, four at once."""
        slots = asyncio.Semaphore(4)

        async def one(number: int) -> None:
            async with slots:
                await run(number)

        async with asyncio.TaskGroup() as group:
            for number in range(RUNS):
                group.create_task(one(number))


@pytest.fixture
def way() -> str:
    """One of WAYS; tests are parametrized over it."""
    return "engine"


@pytest.fixture
def tools(tmp_path: Path, keys: Any, way: str) -> Tools:
    """A directory with a certificate and a public key for each key, and `content` to sign."""
    if way == "sid" and not SID.openssl.exists():
        pytest.skip("scripts/setup could not unpack tools of Debian's sid")
    for name, key in keys.items():
        (tmp_path / f"{name}.crt").write_bytes(key.certificate_pem)
        (tmp_path / f"{name}.pub").write_bytes(
            key.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        )
    (tmp_path / "openssl.cnf").write_text(WAYS[way].configuration)
    (tmp_path / "content").write_bytes(os.urandom(5000))
    return Tools(tmp_path, WAYS[way])


@pytest.fixture
def signed() -> list[tuple[str, Scheme]]:
    """Of each signature that a loan told of: the key's label and the scheme."""
    return []


@pytest.fixture(params=["file", "pkcs11"])
def lend(request: pytest.FixtureRequest, tmp_path: Path, keys: Any, key_token: Any, signed: list[Any]) -> Lend:
    """Lends the keys of a file provider and of a PKCS#11 token alike."""

    @asynccontextmanager
    async def loan(limits: LoanLimits = LoanLimits()) -> AsyncIterator[Loan]:  # noqa: B008 - frozen
        provider: KeyProvider
        if request.param == "file":
            for name in LENT:
                path = tmp_path / f"{name}.pem"
                path.write_bytes(keys[name].pem + keys[name].certificate_pem)
                path.chmod(0o600)
            provider = FileProvider("files", FileSettings(kind="file", root=tmp_path))
        else:
            settings = Pkcs11Settings(
                kind="pkcs11",
                module=key_token.module,
                token=key_token.label,
                pin=SecretSource(file=key_token.pin_file),
                env=key_token.env,
            )
            provider = Pkcs11Provider("token", settings, tmp_path / "state")
        await provider.start()
        try:
            async with AsyncExitStack() as jobs:
                lent = []
                for number, name in enumerate(LENT, 1):
                    reference = KeyReference(object=f"{name}.pem" if request.param == "file" else name)
                    key = await jobs.enter_async_context(provider.open(reference))
                    lent.append(LentKey(name, bytes([number]), key))
                loan = Loan(tmp_path / "loan", "YubiHSM", lent, limits, lambda *what: signed.append(what))
                yield await jobs.enter_async_context(loan)
        finally:
            await provider.stop()

    return loan
