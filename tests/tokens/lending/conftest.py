"""Keys of a provider, on loan to real tools."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tokens.file import FileProvider, FileSettings
from tokens.lending import LentKey, Loan, LoanLimits
from tokens.pkcs11 import Pkcs11Provider, Pkcs11Settings
from tokens.provider import KeyProvider, KeyReference
from tokens.secret import SecretSource

LENT = ("rsa2048", "rsa4096", "p256", "p384")

Lend = Callable[..., AbstractAsyncContextManager[Loan]]


@pytest.fixture
def signed() -> list[tuple[str, str]]:
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
