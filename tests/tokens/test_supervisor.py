"""Token workers and their supervision, on the real SoftHSM and on a hostile module round it (hostile.c)."""

import asyncio
import hashlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tokens.errors import (
    Error,
    KeyAmbiguous,
    KeyMismatch,
    KeyNotFound,
    KeyUnsuited,
    PinRefused,
    ProviderBusy,
    ProviderTimeout,
    ProviderUnavailable,
    SigningFailed,
)
from tokens.pkcs11 import Pkcs11Provider, Pkcs11Settings
from tokens.provider import KeyReference
from tokens.schemes import Ecdsa, Hash, RsaPkcs1v15

SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")
PIN = "pin-of-the-test-token"
DIGEST = hashlib.sha256(b"what is signed").digest()
RSA = RsaPkcs1v15(Hash.SHA256)
CKR_PIN_CODES = {0xA0, 0xA1, 0xA2, 0xA3, 0xA4}


@dataclass(frozen=True)
class Token:
    """A SoftHSM token with the key `rsa` (and `ec`), reached through the hostile module."""

    directory: Path
    module: Path

    @property
    def conf(self) -> Path:
        return self.directory / "softhsm2.conf"

    @property
    def hostile(self) -> Path:
        return self.directory / "hostile"

    def does(self, function: str, what: str, *, once: bool = False) -> Path:
        told = self.hostile / (f"{function}.once" if once else function)
        told.write_text(what)
        return told

    def calls(self, function: str) -> int:
        log = self.hostile / "log"
        return log.read_text().split("\n").count(function) if log.exists() else 0

    def run(self, *command: str | Path | bytes) -> None:
        subprocess.run(
            [os.fsencode(part) for part in command],
            env={"PATH": os.environ["PATH"], "SOFTHSM2_CONF": str(self.conf)},
            check=True,
            capture_output=True,
        )

    def import_key(self, path: Path, label: str, id_: str) -> None:
        self.run(
            "softhsm2-util", "--import", path, "--token", "demo", "--label", label, "--id", id_, "--pin", PIN
        )  # fmt: skip

    def settings(self, **changes: Any) -> Pkcs11Settings:
        values: dict[str, Any] = {
            "kind": "pkcs11",
            "module": self.module,
            "token": "demo",
            "pin": {"file": self.directory / "pin"},
            "env": {
                "SOFTHSM2_CONF": str(self.conf),
                "HOSTILE_DIR": str(self.hostile),
                "HOSTILE_MODULE": str(SOFTHSM),
            },
            "backoff_min_s": 0.01,
            "backoff_max_s": 0.2,
        }
        return Pkcs11Settings.model_validate(values | changes)

    @asynccontextmanager
    async def provider(self, **changes: Any) -> AsyncIterator[Pkcs11Provider]:
        provider = Pkcs11Provider("token", self.settings(**changes), self.directory / "state")
        await provider.start()
        try:
            yield provider
        finally:
            await provider.stop()
            assert workers(self) == []


def workers(token: Token) -> list[int]:
    """The processes that have this token's configuration in their environment or (hardened) its worker's arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if b"tokens.worker" in arguments and parent == os.getpid():
            found.append(int(process.name))
    return found


async def sign(provider: Pkcs11Provider, label: str = "rsa") -> bytes:
    async with provider.open(KeyReference(object=label)) as key:
        return await key.sign(RSA if label == "rsa" else Ecdsa(Hash.SHA256), DIGEST)


async def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited for 10 s"
        await asyncio.sleep(0.01)


async def signs_again(provider: Pkcs11Provider) -> None:
    """The next good call works, once the back-off is over."""
    deadline = time.monotonic() + 10
    while True:
        try:
            await sign(provider)
        except ProviderUnavailable:
            assert time.monotonic() < deadline, "still unavailable after 10 s"
            await asyncio.sleep(0.05)
        else:
            return


async def all_ready(provider: Pkcs11Provider) -> None:
    """Every worker is logged in."""
    while True:
        try:
            await provider.check()
        except ProviderUnavailable:
            await asyncio.sleep(0.05)
        else:
            return


@pytest.fixture(scope="session")
def key_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys")
    for name, arguments in (
        ("rsa", ["RSA", "-pkeyopt", "rsa_keygen_bits:2048"]),
        ("other", ["RSA", "-pkeyopt", "rsa_keygen_bits:2048"]),
        ("ec", ["EC", "-pkeyopt", "ec_paramgen_curve:P-256"]),
    ):
        subprocess.run(
            ["openssl", "genpkey", "-algorithm", *arguments, "-out", directory / name], check=True, capture_output=True
        )
    return directory


@pytest.fixture
def token(tmp_path: Path, hostile_module: Path, key_files: Path) -> Iterator[Token]:
    token = Token(tmp_path, hostile_module)
    (tmp_path / "tokens").mkdir()
    token.hostile.mkdir()
    token.conf.write_text(f"directories.tokendir = {tmp_path}/tokens\nlog.level = ERROR\n")
    token.run("softhsm2-util", "--init-token", "--free", "--label", "demo", "--pin", PIN, "--so-pin", "87654321")
    token.import_key(key_files / "rsa", "rsa", "01")
    token.import_key(key_files / "ec", "ec", "02")
    (tmp_path / "pin").write_text(PIN + "\n")
    (tmp_path / "pin").chmod(0o600)
    yield token
    assert not list(token.hostile.glob("*.once")), "the test asked for misbehaviour that never happened"


class TestGoodToken:
    async def test_signs_with_every_worker(self, token: Token) -> None:
        async with token.provider(sessions=2) as provider:
            await provider.check()
            await asyncio.gather(*(sign(provider, label) for label in ("rsa", "ec") * 20))
            assert len(workers(token)) == 2
        assert token.calls("C_Login") == 2

    async def test_sixteen_clients_two_thousand_signatures_no_error(self, token: Token) -> None:
        async def client(provider: Pkcs11Provider) -> None:
            for _ in range(125):
                await sign(provider)

        async with token.provider(module=SOFTHSM) as provider:
            await asyncio.gather(*(client(provider) for _ in range(16)))

    async def test_pin_is_the_exact_bytes_less_one_newline(self, token: Token) -> None:
        odd = b"  \xff pin\n"
        token.run("softhsm2-util", "--init-token", "--free", "--label", "odd", "--pin", odd, "--so-pin", "87654321")
        (token.directory / "pin").write_bytes(odd + b"\n")
        async with token.provider(token="odd") as provider:
            await provider.check()

    async def test_pin_from_a_systemd_credential(self, token: Token, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(token.directory))
        async with token.provider(pin={"credential": "pin"}) as provider:
            await sign(provider)

    async def test_no_credentials_is_a_state(self, token: Token, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
        async with token.provider(pin={"credential": "pin"}) as provider:
            with pytest.raises(ProviderUnavailable, match="CREDENTIALS_DIRECTORY"):
                await provider.check()

    async def test_token_by_serial(self, token: Token) -> None:
        async with token.provider() as provider:
            await provider.check()
            (serial,) = provider.uri_attributes["serial"]
        async with token.provider(token=None, serial=serial) as provider:
            await sign(provider)
        async with token.provider(serial="0000") as provider:
            with pytest.raises(ProviderUnavailable, match="not there"):
                await provider.check()

    async def test_no_secret_in_arguments_or_environment(self, token: Token) -> None:
        async with token.provider() as provider:
            await sign(provider)
            for pid in workers(token):
                for name in ("cmdline", "environ"):
                    assert PIN.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
                limits = Path(f"/proc/{pid}/limits").read_text()
                assert re.search(r"Max core file size +0 +0", limits)

    async def test_a_worker_outlives_the_signals_that_stop_the_service(self, token: Token) -> None:
        async with token.provider() as provider:
            await sign(provider)
            before = workers(token)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(before[0], number)
            await asyncio.sleep(0.1)
            await sign(provider)
            assert workers(token) == before

    async def test_worker_ends_with_the_service(self, token: Token) -> None:
        program = textwrap.dedent(f"""
            import asyncio, os, signal, pathlib
            from tokens.pkcs11 import Pkcs11Provider, Pkcs11Settings
            async def main():
                settings = Pkcs11Settings.model_validate_json({token.settings().model_dump_json()!r})
                provider = Pkcs11Provider("token", settings, pathlib.Path({str(token.directory / "state")!r}))
                await provider.start()
                await provider.check()
                os.kill(os.getpid(), signal.SIGKILL)
            asyncio.run(main())
        """)
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
        assert await process.wait() == -signal.SIGKILL

        def orphans() -> list[Path]:
            return [
                path.parent
                for path in Path("/proc").glob("[0-9]*/environ")
                if str(token.hostile).encode() in _read(path)
            ]

        await eventually(lambda: not orphans())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


class TestKeys:
    async def test_missing_and_ambiguous(self, token: Token, key_files: Path) -> None:
        token.import_key(key_files / "other", "rsa", "03")
        async with token.provider() as provider:
            with pytest.raises(KeyNotFound):
                await sign(provider, "no-such-key")
            with pytest.raises(KeyAmbiguous, match="2 private keys"):
                await sign(provider)
            async with provider.open(KeyReference(object="rsa", id=b"\x03")) as key:
                await key.sign(RSA, DIGEST)
            async with provider.open(KeyReference(id=b"\x01")) as key:
                await key.sign(RSA, DIGEST)

    async def test_two_tokens_of_one_label(self, token: Token) -> None:
        token.run("softhsm2-util", "--init-token", "--free", "--label", "demo", "--pin", PIN, "--so-pin", "87654321")
        async with token.provider() as provider:
            with pytest.raises(ProviderUnavailable, match="2 tokens match"):
                await provider.check()

    async def test_key_recreated(self, token: Token, key_files: Path) -> None:
        async with token.provider() as provider, provider.open(KeyReference(object="rsa")) as key:
            await key.sign(RSA, DIGEST)
            for kind in ("privkey", "pubkey"):
                token.run(
                    "pkcs11-tool", "--module", SOFTHSM, "--token-label", "demo", "--login", "--pin", PIN,
                    "--delete-object", "--type", kind, "--label", "rsa",
                )  # fmt: skip
            token.import_key(key_files / "other", "rsa", "01")
            with pytest.raises(KeyMismatch):
                await key.sign(RSA, DIGEST)
            signature = await sign(provider)
        new = load_pem_private_key((key_files / "other").read_bytes(), None)
        assert isinstance(new, rsa.RSAPrivateKey)
        new.public_key().verify(signature, DIGEST, PKCS1v15(), Prehashed(SHA256()))

    async def test_unsuited(self, token: Token) -> None:
        async with token.provider() as provider, provider.open(KeyReference(object="ec")) as key:
            assert isinstance(key.public_key, ec.EllipticCurvePublicKey)
            with pytest.raises(KeyUnsuited):
                await key.sign(RSA, DIGEST)
            with pytest.raises(KeyUnsuited):
                await key.sign(Ecdsa(Hash.SHA256), DIGEST[1:])

    async def test_closed_after_the_job(self, token: Token) -> None:
        async with token.provider() as provider:
            async with provider.open(KeyReference(object="rsa")) as key:
                pass
            with pytest.raises(ProviderUnavailable):
                await key.sign(RSA, DIGEST)


class TestCrashes:
    @pytest.mark.parametrize("what", ["abort", "segfault", "exit", "kill"])
    async def test_a_crash_costs_nobody_a_signature(self, token: Token, what: str) -> None:
        async with token.provider() as provider:
            await sign(provider)
            token.does("C_Sign", what, once=True)
            await asyncio.gather(*(sign(provider) for _ in range(8)))
        assert token.calls("C_Login") == 2

    async def test_killed_in_mid_call(self, token: Token) -> None:
        async with token.provider() as provider:
            await sign(provider)
            token.does("C_Sign", "sleep 300", once=True)
            signing = asyncio.create_task(sign(provider))
            calls = token.calls("C_Sign")
            await eventually(lambda: token.calls("C_Sign") > calls)
            (pid,) = workers(token)
            os.kill(pid, signal.SIGKILL)
            await signing

    async def test_a_signature_is_repeated_only_once(self, token: Token) -> None:
        async with token.provider() as provider:
            await sign(provider)
            calls = token.calls("C_Sign")
            told = token.does("C_Sign", "abort")
            with pytest.raises(SigningFailed, match="crashed"):
                await sign(provider)
            assert token.calls("C_Sign") == calls + 2
            told.unlink()
            await signs_again(provider)

    async def test_crash_while_opening(self, token: Token) -> None:
        told = token.does("C_OpenSession", "abort")
        async with token.provider() as provider:
            with pytest.raises(ProviderUnavailable, match="crashed"):
                await sign(provider)
            told.unlink()
            await signs_again(provider)

    async def test_no_module(self, token: Token) -> None:
        async with token.provider(module="/nonexistent.so") as provider:
            with pytest.raises(ProviderUnavailable, match="cannot be loaded") as raised:
                await provider.check()
            assert "nonexistent" not in raised.value.message

    async def test_many_clients_while_workers_are_killed(self, token: Token) -> None:
        async def client(provider: Pkcs11Provider) -> None:
            for _ in range(50):
                await sign(provider)

        async with token.provider(sessions=2, module=SOFTHSM) as provider:
            clients = asyncio.gather(*(client(provider) for _ in range(16)))
            for _ in range(3):
                await all_ready(provider)
                os.kill(workers(token)[0], signal.SIGKILL)
                await asyncio.sleep(0.05)
            await clients


class TestHangs:
    async def test_a_hung_call_times_out_and_the_rest_goes_on(self, token: Token) -> None:
        async with token.provider(call_timeout_s=0.7) as provider:
            await sign(provider)
            token.does("C_Sign", "hang", once=True)
            results = await asyncio.gather(*(sign(provider) for _ in range(8)), return_exceptions=True)
            assert [type(result) for result in results if isinstance(result, Exception)] == [ProviderTimeout]
            await sign(provider)

    async def test_the_deadline_runs_from_when_the_worker_could_begin(self, token: Token) -> None:
        async with token.provider(call_timeout_s=1.0) as provider:
            await sign(provider)
            told = token.does("C_Sign", "sleep 150")
            await asyncio.gather(*(sign(provider) for _ in range(12)))  # 1.8 s in all
            told.unlink()

    async def test_hung_while_opening(self, token: Token) -> None:
        told = token.does("C_OpenSession", "hang")
        async with token.provider(start_timeout_s=0.5) as provider:
            with pytest.raises(ProviderUnavailable, match="did not answer"):
                await sign(provider)
            told.unlink()
            await signs_again(provider)

    async def test_queue_has_a_depth_and_an_age(self, token: Token) -> None:
        async with token.provider(queue_depth=4, queue_timeout_s=0.4) as provider:
            await sign(provider)
            told = token.does("C_Sign", "sleep 300")
            results = await asyncio.gather(*(sign(provider) for _ in range(10)), return_exceptions=True)
            told.unlink()
            busy = [str(result) for result in results if isinstance(result, ProviderBusy)]
            assert len([text for text in busy if "are waiting" in text]) == 4
            assert [text for text in busy if "waited 0.4 s" in text]
            assert [result for result in results if isinstance(result, bytes)]
            await sign(provider)

    async def test_stop_ends_a_hung_worker(self, token: Token) -> None:
        async with token.provider(call_timeout_s=0.5) as provider:
            await sign(provider)
            token.does("C_Sign", "hang", once=True)
            hung = asyncio.create_task(sign(provider))
            await asyncio.sleep(0.1)
        with pytest.raises(Error):
            await hung


def _ckr_codes() -> list[int]:
    """Every CKR that the standard's header defines."""
    flags = subprocess.check_output(["pkg-config", "--cflags-only-I", "p11-kit-1"], text=True).split()
    header = Path(flags[0].removeprefix("-I"), "p11-kit", "pkcs11.h").read_text()
    codes = {
        int(value, 0) for value in re.findall(r"#define CKR_\w+\s+\(?(?:\(CK_RV\) *)?(0x[0-9a-fA-F]+|\d+)", header)
    }
    assert len(codes) > 70
    return sorted(codes - {0})


class TestReturnValues:
    @pytest.mark.parametrize(("function", "step"), [("C_Sign", 1), ("C_SignInit", 6)])
    async def test_each_ckr_is_an_error_and_the_next_call_works(self, token: Token, function: str, step: int) -> None:
        async with token.provider() as provider:
            await sign(provider)
            for code in _ckr_codes()[::step]:
                told = token.does(function, f"ckr {code:#x}")
                with pytest.raises(Error) as raised:
                    await sign(provider)
                assert raised.value.hint, f"{code:#x} says nothing of what to do"
                told.unlink()
                await signs_again(provider)

    @pytest.mark.parametrize("code", [0x30, 0x32, 0x50, 0x54 - 0x4E, 0x60, 0x82, 0xB3, 0xE0, 0x101, 0x80000001])
    async def test_a_passing_trouble_is_not_noticed(self, token: Token, code: int) -> None:
        async with token.provider() as provider:
            await sign(provider)
            token.does("C_Sign", f"ckr {code:#x}", once=True)
            await sign(provider)

    @pytest.mark.parametrize(
        "function", ["C_Initialize", "C_GetSlotList", "C_OpenSession", "C_Login", "C_GetTokenInfo"]
    )
    async def test_each_ckr_while_opening_is_a_state(self, token: Token, function: str) -> None:
        codes = [code for code in _ckr_codes() if code not in CKR_PIN_CODES]
        for code in codes[:: max(1, len(codes) // 12)]:
            told = token.does(function, f"ckr {code:#x}")
            async with token.provider() as provider:
                with pytest.raises(ProviderUnavailable):
                    await provider.check()
                told.unlink()
                await signs_again(provider)

    async def test_garbage_is_no_signature(self, token: Token) -> None:
        async with token.provider() as provider:
            await sign(provider)
            (before,) = workers(token)
            token.does("C_Sign", "garbage", once=True)
            with pytest.raises(SigningFailed, match="does not verify"):
                await sign(provider)
            await sign(provider)
            assert workers(token) != [before]

    async def test_token_removed_and_back(self, token: Token) -> None:
        async with token.provider() as provider:
            await sign(provider)
            absent = token.does("C_GetSlotList", "absent")
            removed = token.does("C_Sign", "ckr 0x32")  # CKR_DEVICE_REMOVED
            with pytest.raises(ProviderUnavailable):
                await sign(provider)
            with pytest.raises(ProviderUnavailable):
                await provider.check()
            removed.unlink()
            with pytest.raises(ProviderUnavailable, match="not there"):
                await sign(provider)
            absent.unlink()
            await signs_again(provider)


class TestPin:
    async def test_a_wrong_pin_reaches_the_token_once(self, token: Token) -> None:
        (token.directory / "pin").write_text("wrong")
        for _ in range(2):  # the service is restarted
            async with token.provider(sessions=2) as provider:
                with pytest.raises(PinRefused):
                    await provider.check()
                for pid in workers(token):
                    os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.5)  # several back-offs
                with pytest.raises(PinRefused):
                    await sign(provider)
        assert token.calls("C_Login") == 1

    async def test_another_pin_is_tried(self, token: Token) -> None:
        (token.directory / "pin").write_text("wrong")
        async with token.provider(sessions=2) as provider:
            with pytest.raises(PinRefused):
                await sign(provider)
            (token.directory / "pin").write_text(PIN)
            await signs_again(provider)
            await all_ready(provider)
            assert token.calls("C_Login") == 3

    async def test_an_empty_pin_is_not_tried(self, token: Token) -> None:
        (token.directory / "pin").write_text("\n")
        async with token.provider() as provider:
            with pytest.raises(ProviderUnavailable, match="empty"):
                await provider.check()
        assert token.calls("C_Login") == 0

    async def test_two_services_at_once_share_the_attempt(self, token: Token) -> None:
        (token.directory / "pin").write_text("wrong")
        async with token.provider() as one, token.provider() as other:
            for provider in (one, other):
                with pytest.raises(PinRefused):
                    await provider.check()
            await one.stop()
        assert token.calls("C_Login") == 1

    @pytest.mark.parametrize("flag", [0x20000, 0x40000])  # final try, locked
    async def test_nothing_is_tried_when_it_could_lock(self, token: Token, flag: int) -> None:
        token.does("C_GetTokenInfo", f"flags {flag:#x}")
        async with token.provider() as provider:
            with pytest.raises(PinRefused):
                await provider.check()
            await asyncio.sleep(0.3)
        assert token.calls("C_Login") == 0

    async def test_a_login_cut_off_is_not_repeated_when_the_token_counted_it(self, token: Token) -> None:
        token.does("C_Login", "hang")
        token.does("C_GetTokenInfo", "flags 0x10000")  # CKF_USER_PIN_COUNT_LOW
        async with token.provider(start_timeout_s=0.5) as provider:
            with pytest.raises(ProviderUnavailable):
                await provider.check()
            await asyncio.sleep(1.0)
            with pytest.raises(PinRefused):
                await provider.check()
        assert token.calls("C_Login") == 1

    async def test_the_pin_is_not_in_the_state(self, token: Token) -> None:
        (token.directory / "pin").write_text("wrong-canary")
        async with token.provider() as provider:
            with pytest.raises(PinRefused) as raised:
                await provider.check()
        assert "canary" not in raised.value.message + raised.value.hint
        files = list((token.directory / "state").iterdir())
        assert files
        for path in files:
            assert path.stat().st_mode & 0o077 == 0
            assert b"canary" not in path.read_bytes()
