"""Symmetric keys on tokens: what is particular to a PKCS#11 token, and to a YubiHSM 2 with its audit."""

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from yubihsm import YubiHsm
from yubihsm.core import AuthSession
from yubihsm.defs import ALGORITHM, AUDIT, CAPABILITY, COMMAND, OBJECT
from yubihsm.objects import HmacKey, SymmetricKey

from tokens.errors import (
    KeyAmbiguous,
    KeyMismatch,
    KeyNotFound,
    KeyUnsuited,
    KeyUnusable,
    ProviderRefused,
    ProviderUnavailable,
)
from tokens.pkcs11 import Pkcs11Provider, Pkcs11Settings
from tokens.provider import KeyReference
from tokens.secret import SecretSource
from tokens.symmetric import SymmetricAlgorithm
from yubihsm_simulator.backend import DirectBackend

ANY = frozenset(SymmetricAlgorithm)
BLOCK = bytes(range(16))
ECB = CAPABILITY.ENCRYPT_ECB | CAPABILITY.DECRYPT_ECB
KEY = 0x0301

MAKE_SECRETS = """
import sys, softhsm
from pkcs11 import Attribute, KeyType
label, pin = sys.argv[1:]
with softhsm.log_in(label, pin) as session:
    for number, (name, type_, size, changes) in enumerate([
        ("encrypts", KeyType.AES, 16, {Attribute.DECRYPT: False}),
        ("nothing", KeyType.GENERIC_SECRET, 32, {Attribute.SIGN: False}),
        ("aes192", KeyType.AES, 24, {}),
        ("short", KeyType.GENERIC_SECRET, 8, {}),
        ("twins", KeyType.AES, 16, {}),
        ("twins", KeyType.GENERIC_SECRET, 32, {}),
    ], 0x61):
        attributes = {Attribute.LABEL: name, Attribute.ID: bytes([number])} | changes
        softhsm.import_secret(session, bytes(size), type_, attributes)
"""
DELETE_SECRET = """
import sys, softhsm
from pkcs11 import Attribute, KeyType, ObjectClass
label, pin, name, again = sys.argv[1:]
with softhsm.log_in(label, pin) as session:
    for key in session.get_objects({Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.LABEL: name}):
        key.destroy()
    if again:
        softhsm.import_secret(session, bytes(32), KeyType.AES, {Attribute.LABEL: name, Attribute.ID: b"again"})
"""


@pytest.fixture(scope="session")
def token(key_token: Any) -> Any:
    """The fixtures' token with some keys more."""
    pin = key_token.pin_file.read_text().strip()
    key_token.run(sys.executable, "-c", MAKE_SECRETS, key_token.label, pin)
    return key_token


class TestPkcs11:
    @pytest.fixture
    async def provider(self, token: Any, tmp_path: Path) -> AsyncIterator[Pkcs11Provider]:
        pin = SecretSource(file=token.pin_file)
        settings = Pkcs11Settings(kind="pkcs11", module=token.module, token=token.label, pin=pin, env=token.env)
        provider = Pkcs11Provider("token", settings, tmp_path)
        await provider.start()
        yield provider
        await provider.stop()

    async def test_what_its_attributes_forbid(self, provider: Pkcs11Provider) -> None:
        async with provider.open_symmetric(KeyReference(object="encrypts"), ANY) as key:
            encrypted = await key.encrypt_ecb(BLOCK)
            with pytest.raises(KeyUnsuited, match="CKA_DECRYPT"):
                await key.decrypt_ecb(encrypted)
            assert await key.encrypt_ecb(BLOCK) == encrypted
        async with provider.open_symmetric(KeyReference(object="nothing"), ANY) as key:
            with pytest.raises(KeyUnsuited, match="CKA_SIGN"):
                await key.hmac_sha256(BLOCK)

    @pytest.mark.parametrize("name", ["aes192", "short"])
    async def test_other_lengths(self, provider: Pkcs11Provider, name: str) -> None:
        with pytest.raises(KeyUnusable, match="type or length"):
            async with provider.open_symmetric(KeyReference(object=name), ANY):
                pass

    async def test_twins(self, provider: Pkcs11Provider) -> None:
        with pytest.raises(KeyAmbiguous, match="2 secret keys"):
            async with provider.open_symmetric(KeyReference(object="twins"), ANY):
                pass
        for number, algorithm in ((0x65, SymmetricAlgorithm.AES_128), (0x66, SymmetricAlgorithm.HMAC_SHA256)):
            async with provider.open_symmetric(KeyReference(object="twins", id=bytes([number])), ANY) as key:
                assert key.algorithm is algorithm

    async def test_its_place_is_the_same_by_any_name(self, provider: Pkcs11Provider) -> None:
        places = set()
        for reference in (KeyReference(object="encrypts"), KeyReference(id=b"\x61")):
            async with provider.open_symmetric(reference, ANY) as key:
                places.add(key.place)
        assert len(places) == 1

    @pytest.mark.parametrize(("again", "error"), [("", KeyNotFound), ("again", KeyMismatch)])
    async def test_gone_or_recreated(self, provider: Pkcs11Provider, token: Any, again: str, error: Any) -> None:
        pin = token.pin_file.read_text().strip()
        token.run(sys.executable, "-c", DELETE_SECRET, token.label, pin, "passing", "")
        token.run(sys.executable, "-c", DELETE_SECRET.replace('b"again"', 'b"first"'), token.label, pin, "passing", "x")
        async with provider.open_symmetric(KeyReference(object="passing"), ANY) as key:
            await key.encrypt_ecb(BLOCK)
            token.run(sys.executable, "-c", DELETE_SECRET, token.label, pin, "passing", again)
            with pytest.raises(error):
                await key.encrypt_ecb(BLOCK)


class TestYubihsm:
    @pytest.fixture(autouse=True)
    def _keys(self, yubihsm: Any) -> None:
        with yubihsm.session() as session:
            put(session, KEY, "fuse", ECB)

    async def test_one_command_a_use(self, yubihsm: Any) -> None:
        async with opened(yubihsm) as (_, key):
            await key.encrypt_ecb(BLOCK)
            before = yubihsm.device.commands.copy()
            await asyncio.gather(*(key.encrypt_ecb(BLOCK * 10) for _ in range(10)))
            spent = yubihsm.device.commands - before
            spent.pop(COMMAND.SESSION_MESSAGE, None)
            assert spent == {COMMAND.ENCRYPT_ECB: 10}

    async def test_the_key_decides(self, yubihsm: Any) -> None:
        async with opened(yubihsm) as (_, key):
            with pytest.raises(ProviderRefused) as raised:
                await key.encrypt_cbc(BLOCK, BLOCK)
            assert "encrypt-cbc" in raised.value.hint
            assert await key.decrypt_ecb(await key.encrypt_ecb(BLOCK)) == BLOCK

    async def test_twins_and_lengths(self, yubihsm: Any) -> None:
        with yubihsm.session() as session:
            put(session, KEY + 1, "twins", ECB)
            HmacKey.put(session, KEY + 2, "twins", 0xFFFF, CAPABILITY.SIGN_HMAC, bytes(32))
            HmacKey.put(session, KEY, "mac", 0xFFFF, CAPABILITY.SIGN_HMAC, bytes(32))  # the ID of another type's
            SymmetricKey.put(session, KEY + 3, "aes192", 0xFFFF, ECB, ALGORITHM.AES192, bytes(24))
        async with yubihsm.provider() as provider:
            for reference, error in (
                (KeyReference(object="twins"), KeyAmbiguous),
                (KeyReference(id=KEY.to_bytes(2)), KeyAmbiguous),
                (KeyReference(object="aes192"), KeyUnusable),
                (KeyReference(object="p256"), KeyNotFound),
            ):
                with pytest.raises(error):
                    async with provider.open_symmetric(reference, ANY):
                        pass
            for reference, algorithm in (
                (KeyReference(object="twins", id=(KEY + 1).to_bytes(2)), SymmetricAlgorithm.AES_256),
                (KeyReference(object="mac", id=KEY.to_bytes(2)), SymmetricAlgorithm.HMAC_SHA256),
                (KeyReference(object="fuse", id=KEY.to_bytes(2)), SymmetricAlgorithm.AES_256),
            ):
                async with provider.open_symmetric(reference, ANY) as key:
                    assert key.algorithm is algorithm

    @pytest.mark.parametrize("new_session", [False, True])
    async def test_recreated_under_the_same_id(self, yubihsm: Any, *, new_session: bool) -> None:
        async with opened(yubihsm) as (provider, key):
            await key.encrypt_ecb(BLOCK)
            with yubihsm.session() as session:
                session.get_object(KEY, OBJECT.SYMMETRIC_KEY).delete()
                put(session, KEY, "fuse", ECB)
            if new_session:
                yubihsm.device.reboot()
                with pytest.raises(KeyMismatch, match="another one"):
                    await key.encrypt_ecb(BLOCK)
            await provider.check()  # keys are looked up anew
            for _ in range(2):
                with pytest.raises(KeyMismatch):
                    async with provider.open_symmetric(KeyReference(object="fuse"), ANY):
                        pass

    @pytest.fixture
    def audited(self, yubihsm: Any) -> dict[str, Any]:
        """The device logs uses of symmetric keys, and stops where its log is full."""
        with yubihsm.session() as session:
            session.set_command_audit({COMMAND.ENCRYPT_ECB: AUDIT.ON, COMMAND.SIGN_HMAC: AUDIT.ON})
            session.set_force_audit(AUDIT.ON)
        password = yubihsm.directory / "auditor"
        password.write_text("password-of-the-auditor")
        return {"auth_key_id": yubihsm.auditor, "password": {"file": password}, "interval_s": 0.1}

    async def test_the_audit_counts_them(self, yubihsm: Any, audited: dict[str, Any]) -> None:
        async with opened(yubihsm, audit=audited) as (provider, key):
            assert len(await key.encrypt_ecb(BLOCK * 40_000)) == 640_000  # 207 commands, and the log has 62 entries
            await asyncio.sleep(0.3)  # a few drains
            await provider.check()  # no alarm

    async def test_a_use_by_somebody_with_our_credential(self, yubihsm: Any, audited: dict[str, Any]) -> None:
        async with opened(yubihsm, audit=audited) as (provider, key):
            await key.encrypt_ecb(BLOCK)
            hsm = YubiHsm(DirectBackend(yubihsm.device))
            with hsm.create_session_derived(yubihsm.signer, yubihsm.password) as session:
                SymmetricKey(session, KEY).encrypt_ecb(BLOCK)
            with pytest.raises(ProviderUnavailable, match="surplus-signature"):
                await keeps_encrypting(key)
            with pytest.raises(ProviderUnavailable, match="surplus-signature"):
                await provider.check()


async def keeps_encrypting(key: Any) -> None:
    """For two seconds or more."""
    for _ in range(100):
        await key.encrypt_ecb(BLOCK)
        await asyncio.sleep(0.02)


def put(session: AuthSession, number: int, label: str, capabilities: CAPABILITY) -> None:
    SymmetricKey.put(session, number, label, 0xFFFF, capabilities, ALGORITHM.AES256, secrets.token_bytes(32))


@asynccontextmanager
async def opened(yubihsm: Any, **changes: Any) -> AsyncIterator[tuple[Any, Any]]:
    """A provider and the key `fuse` of the device."""
    async with (
        yubihsm.provider(**changes) as provider,
        provider.open_symmetric(KeyReference(object="fuse"), ANY) as key,
    ):
        yield provider, key
