"""What a YubiHSM 2, its connector and their users do wrong: a clear state, nobody disturbed, and back by itself."""

import asyncio
import contextlib
import hashlib
import time
from typing import Any

import pytest
from yubihsm import YubiHsm
from yubihsm.defs import AUDIT, CAPABILITY, COMMAND, ERROR, OBJECT
from yubihsm.exceptions import YubiHsmDeviceError
from yubihsm.objects import AuthenticationKey

from tokens.errors import (
    Error,
    KeyMismatch,
    KeyNotFound,
    LogFull,
    PinRefused,
    ProviderProblem,
    ProviderTimeout,
    ProviderUnavailable,
)
from tokens.frames import Header
from tokens.provider import KeyReference
from tokens.schemes import Ecdsa, Hash, RsaPkcs1v15, Scheme
from tokens.supervisor import Listener, Outcome
from tokens.yubihsm import YubihsmProvider
from yubihsm_simulator import Device
from yubihsm_simulator.backend import DirectBackend

KEY = 0x0201
DIGEST = hashlib.sha256(b"what is signed").digest()
RSA, ECDSA = RsaPkcs1v15(Hash.SHA256), Ecdsa(Hash.SHA256)


async def sign(provider: YubihsmProvider, label: str = "p256", scheme: Scheme = ECDSA) -> bytes:
    async with provider.open(KeyReference(object=label)) as key:
        return await key.sign(scheme, DIGEST)


async def recovers(provider: YubihsmProvider) -> None:
    """It signs and is ready, once the back-off is over."""
    deadline = time.monotonic() + 10
    while True:
        try:
            await sign(provider)
            await provider.check()
        except ProviderUnavailable:
            assert time.monotonic() < deadline, "still unavailable after 10 s"
            await asyncio.sleep(0.02)
        else:
            return


async def keeps_signing(provider: YubihsmProvider) -> None:
    """Signs more than the device's log holds, for two seconds or more."""
    for _ in range(100):
        await sign(provider)
        await asyncio.sleep(0.02)


def assert_helpful(error: Error, *words: str) -> None:
    assert error.hint
    for word in words:
        assert word in error.message + error.hint


class TestDevice:
    async def test_unplugged_and_plugged_in_again(self, yubihsm: Any) -> None:
        async with yubihsm.provider() as provider:
            await sign(provider)
            yubihsm.device.faults.unplugged = True
            for call in (lambda: sign(provider), provider.check, lambda: sign(provider)):
                with pytest.raises(ProviderUnavailable, match="no YubiHSM is plugged in") as raised:
                    await call()
                assert_helpful(raised.value, "Check that")
                assert raised.value.retry_after
            yubihsm.device.reboot()
            yubihsm.device.faults.unplugged = False
            await recovers(provider)

    async def test_absent_at_the_start(self, yubihsm: Any) -> None:
        yubihsm.device.faults.unplugged = True
        async with yubihsm.provider() as provider:
            with pytest.raises(ProviderUnavailable, match="no YubiHSM is plugged in"):
                await provider.check()
            yubihsm.device.faults.unplugged = False
            await recovers(provider)

    @pytest.mark.parametrize("sessions", [1, 2])
    async def test_rebooted(self, yubihsm: Any, sessions: int) -> None:
        async with yubihsm.provider(sessions=sessions) as provider:
            await provider.check()
            await sign(provider)
            yubihsm.device.reboot()
            await asyncio.gather(*(sign(provider) for _ in range(8)))  # nobody notices
            await provider.check()

    @pytest.mark.parametrize("sessions", [1, 2])
    async def test_idle_for_31_seconds(self, yubihsm: Any, sessions: int) -> None:
        async with yubihsm.provider(sessions=sessions) as provider:
            await provider.check()
            await sign(provider)
            yubihsm.device.skip(31)
            await provider.check()
            yubihsm.device.skip(31)
            await sign(provider)
            await provider.check()
            assert yubihsm.device.sessions == sessions

    async def test_another_device(self, yubihsm: Any, keys: Any) -> None:
        other = Device(serial=87654321)
        with YubiHsm(DirectBackend(other)).create_session_derived(1, "password") as session:
            AuthenticationKey.put_derived(
                session, yubihsm.signer, "signer", 0xFFFF, CAPABILITY.SIGN_ECDSA, CAPABILITY.NONE, yubihsm.password
            )
            yubihsm.put(session, KEY, "p256", keys["p256"].private)
        async with yubihsm.provider() as provider:
            await sign(provider)
            yubihsm.connector.device = other
            for _ in range(2):
                with pytest.raises(ProviderUnavailable, match="87654321, not to 12345678") as raised:
                    await sign(provider)
                assert_helpful(raised.value, "`serial`")
            assert other.commands[COMMAND.SIGN_ECDSA] == 0
            assert other.sessions == 0
            yubihsm.connector.device = yubihsm.device
            await recovers(provider)

    @pytest.mark.parametrize("code", [code for code in ERROR if code is not ERROR.OK])
    async def test_each_error_is_told_and_the_next_call_works(self, yubihsm: Any, code: ERROR) -> None:
        async with yubihsm.provider() as provider:
            await sign(provider)
            errors = [(COMMAND.SIGN_ECDSA, code)]
            yubihsm.device.faults.next_errors.extend(errors * 2)
            with pytest.raises(Error) as raised:
                await sign(provider)
            assert_helpful(raised.value)
            yubihsm.device.faults.next_errors.clear()
            await recovers(provider)


class TestConnector:
    async def test_killed_and_back(self, yubihsm: Any) -> None:
        async with yubihsm.provider() as provider:
            await sign(provider)
            yubihsm.connector.stop()
            for _ in range(2):
                with pytest.raises(ProviderUnavailable, match="cannot be reached") as raised:
                    await sign(provider)
                assert_helpful(raised.value, "connector")
            yubihsm.connector.start()
            await recovers(provider)

    async def test_half_an_answer(self, yubihsm: Any) -> None:
        async with yubihsm.provider() as provider:
            await sign(provider)
            yubihsm.device.faults.half_answers = 1
            await sign(provider)  # repeated in a new session
            yubihsm.device.faults.half_answers = 1000
            with pytest.raises(ProviderUnavailable):
                await sign(provider)
            yubihsm.device.faults.half_answers = 0
            await recovers(provider)

    @pytest.mark.parametrize("when", ["drop_before", "drop_after"])
    async def test_connections_that_drop(self, yubihsm: Any, when: str) -> None:
        async with yubihsm.provider() as provider:
            await sign(provider)
            setattr(yubihsm.device.faults, when, 1)
            await sign(provider)
            setattr(yubihsm.device.faults, when, 1000)
            with pytest.raises(ProviderUnavailable):
                await sign(provider)
            setattr(yubihsm.device.faults, when, 0)
            await recovers(provider)

    async def test_an_answer_that_is_too_late(self, yubihsm: Any, eventually: Any) -> None:
        async with yubihsm.provider(command_timeout_s=0.3) as provider:
            await sign(provider)
            signed = yubihsm.device.commands[COMMAND.SIGN_ECDSA]
            yubihsm.device.faults.delays_s[COMMAND.SIGN_ECDSA] = 0.6
            with pytest.raises((ProviderTimeout, ProviderUnavailable)) as raised:
                await sign(provider)
            assert_helpful(raised.value)
            await eventually(lambda: yubihsm.device.commands[COMMAND.SIGN_ECDSA] > signed)
            await asyncio.sleep(1)  # for more, if there were any
            assert yubihsm.device.commands[COMMAND.SIGN_ECDSA] <= signed + 2
            yubihsm.device.faults.delays_s.clear()
            await recovers(provider)

    async def test_nobody_is_asked_twice_for_good(self, yubihsm: Any) -> None:
        """A signature is repeated once; a look-up and a signature are all that is."""
        async with yubihsm.provider() as provider:
            await sign(provider)
            signed = yubihsm.device.commands[COMMAND.SIGN_ECDSA]
            yubihsm.device.faults.next_errors.extend([(COMMAND.SIGN_ECDSA, ERROR.SESSION_FAILED)] * 5)
            with pytest.raises(ProviderUnavailable):
                await sign(provider)
            assert len(yubihsm.device.faults.next_errors) == 3
            yubihsm.device.faults.next_errors.clear()
            await recovers(provider)
            assert yubihsm.device.commands[COMMAND.SIGN_ECDSA] >= signed


class TestSessions:
    async def test_all_taken_by_others(self, yubihsm: Any) -> None:
        hsm = YubiHsm(DirectBackend(yubihsm.device))
        others = [hsm.create_session_derived(1, "password") for _ in range(16)]
        async with yubihsm.provider() as provider:
            with pytest.raises(ProviderUnavailable, match="SESSIONS_FULL") as raised:
                await sign(provider)
            assert_helpful(raised.value, "16 sessions")
            others.pop().close()
            await recovers(provider)
            for other in others:
                assert other.send_secure_cmd(COMMAND.ECHO, b"undisturbed") == b"undisturbed"
                other.close()

    async def test_taken_by_those_that_forget_them(self, yubihsm: Any) -> None:
        hsm = YubiHsm(DirectBackend(yubihsm.device))
        for _ in range(16):
            hsm.create_session_derived(1, "password")
        async with yubihsm.provider() as provider:
            with pytest.raises(ProviderUnavailable):
                await provider.check()
            yubihsm.device.skip(31)
            await recovers(provider)


class TestPassword:
    async def test_a_wrong_one_is_tried_once(self, yubihsm: Any) -> None:
        yubihsm.password_file.write_text("wrong-canary")
        for _ in range(2):  # the service is restarted
            async with yubihsm.provider(sessions=2) as provider:
                for _ in range(3):
                    with pytest.raises(PinRefused) as raised:
                        await sign(provider)
                await asyncio.sleep(0.3)  # several back-offs
                assert_helpful(raised.value, "password")
        assert yubihsm.device.commands[COMMAND.AUTHENTICATE_SESSION] == 1 + 2  # those of the fixtures
        assert yubihsm.device.sessions == 0
        for path in (yubihsm.directory / "state").iterdir():
            assert path.stat().st_mode & 0o077 == 0
            assert b"canary" not in path.read_bytes()

    async def test_the_right_one_is_tried_when_it_comes(self, yubihsm: Any) -> None:
        yubihsm.password_file.write_text("wrong")
        async with yubihsm.provider() as provider:
            with pytest.raises(PinRefused):
                await sign(provider)
            yubihsm.password_file.write_text(yubihsm.password)
            await recovers(provider)

    async def test_forty_wrong_ones_leave_the_device_usable(self, yubihsm: Any) -> None:
        async with yubihsm.provider() as provider:
            tried = yubihsm.device.commands[COMMAND.AUTHENTICATE_SESSION]
            for number in range(40):
                yubihsm.password_file.write_text(f"wrong {number}")
                yubihsm.device.reboot()  # a new session is needed
                wanted = tried + number + 1
                while yubihsm.device.commands[COMMAND.AUTHENTICATE_SESSION] < wanted:
                    with contextlib.suppress(ProviderUnavailable):
                        await provider.check()
                    await asyncio.sleep(0.01)
            assert yubihsm.device.sessions == 0
            with yubihsm.session():
                pass
            yubihsm.password_file.write_text(yubihsm.password)
            await recovers(provider)

    @pytest.mark.parametrize(("content", "match"), [(b"\n", "empty"), (b"\xff", "UTF-8")])
    async def test_no_password(self, *, yubihsm: Any, content: bytes, match: str) -> None:
        tried = yubihsm.device.commands[COMMAND.CREATE_SESSION]
        yubihsm.password_file.write_bytes(content)
        async with yubihsm.provider() as provider:
            with pytest.raises(ProviderUnavailable, match=match):
                await provider.check()
        assert yubihsm.device.commands[COMMAND.CREATE_SESSION] == tried

    async def test_the_authentication_key_is_gone(self, yubihsm: Any) -> None:
        async with yubihsm.provider() as provider:
            await sign(provider)
            with yubihsm.session() as session:
                session.get_object(yubihsm.signer, OBJECT.AUTHENTICATION_KEY).delete()
            yubihsm.device.reboot()
            with pytest.raises(ProviderUnavailable, match="no authentication key 0x0002") as raised:
                await sign(provider)
            assert_helpful(raised.value, "auth_key_id")
            with yubihsm.session() as session:
                AuthenticationKey.put_derived(
                    session, yubihsm.signer, "signer", 0xFFFF, CAPABILITY.SIGN_ECDSA, CAPABILITY.NONE, yubihsm.password
                )
            await recovers(provider)


class TestKeys:
    async def test_deleted(self, yubihsm: Any, keys: Any) -> None:
        with yubihsm.session() as session:
            yubihsm.put(session, 0x0202, "other", keys["rsa2048"].private)
        async with yubihsm.provider() as provider:
            await sign(provider)
            with yubihsm.session() as session:
                session.get_object(KEY, OBJECT.ASYMMETRIC_KEY).delete()
            for _ in range(2):
                with pytest.raises(KeyNotFound) as raised:
                    await sign(provider)
                assert_helpful(raised.value, "list-objects")
            await sign(provider, "other", RSA)

    @pytest.mark.parametrize("name", ["p256", "p384", "rsa2048"])
    @pytest.mark.parametrize("new_session", [False, True])
    async def test_recreated_under_the_same_id(self, *, yubihsm: Any, keys: Any, name: str, new_session: bool) -> None:
        """Refused even where it is the very same key: its sequence says that it was put there anew."""
        async with yubihsm.provider() as provider, provider.open(KeyReference(object="p256")) as key:
            await key.sign(ECDSA, DIGEST)
            with yubihsm.session() as session:
                session.get_object(KEY, OBJECT.ASYMMETRIC_KEY).delete()
                yubihsm.put(session, KEY, "p256", keys[name].private)
            if new_session:
                yubihsm.device.reboot()
                with pytest.raises(KeyMismatch, match="another one") as raised:
                    await key.sign(ECDSA, DIGEST)
                assert_helpful(raised.value, "restart the service")
            elif name != "p256":
                with pytest.raises(Error):  # by the old name in the old session: nothing that verifies
                    await key.sign(ECDSA, DIGEST)
            await provider.check()  # keys are looked up anew
            for _ in range(2):
                with pytest.raises(KeyMismatch) as raised:
                    await sign(provider)
                assert_helpful(raised.value, "restart the service")

    async def test_found_under_another_id(self, yubihsm: Any, keys: Any) -> None:
        async with yubihsm.provider() as provider:
            await sign(provider)
            with yubihsm.session() as session:
                session.get_object(KEY, OBJECT.ASYMMETRIC_KEY).delete()
                yubihsm.put(session, KEY + 1, "p256", keys["p256"].private)
            await provider.check()
            with pytest.raises(KeyMismatch):
                await sign(provider)


class TestLog:
    """The device logs signatures, and does nothing more when its 62 entries are full."""

    @pytest.fixture(autouse=True)
    def _forces_audit(self, yubihsm: Any) -> None:
        with yubihsm.session() as session:
            session.set_command_audit({COMMAND.SIGN_ECDSA: AUDIT.ON})
            session.set_force_audit(AUDIT.ON)

    def audit(self, yubihsm: Any, **changes: Any) -> dict[str, Any]:
        password = yubihsm.directory / "auditor"
        password.write_text("password-of-the-auditor")
        return {"auth_key_id": yubihsm.auditor, "password": {"file": password}} | changes

    async def test_full_without_an_audit(self, yubihsm: Any) -> None:
        async with yubihsm.provider() as provider:
            with pytest.raises(LogFull) as raised:
                await keeps_signing(provider)
            assert_helpful(raised.value, "`audit`")
            assert raised.value.retry_after
            with yubihsm.session() as session:
                session.set_log_index(session.get_log_entries().entries[-1].number)
            await recovers(provider)

    async def test_with_an_audit_it_never_fills(self, yubihsm: Any) -> None:
        async with yubihsm.provider(audit=self.audit(yubihsm), sessions=2) as provider:
            await asyncio.gather(*(sign(provider) for _ in range(200)))
            await provider.check()  # no alarm either
        with yubihsm.session() as session:
            assert len(session.get_log_entries().entries) < 5
        assert yubihsm.device.sessions == 0

    async def test_filled_by_others_it_is_read_and_the_call_repeated(self, yubihsm: Any) -> None:
        audit = self.audit(yubihsm, interval_s=600, on_alarm="warn")
        async with yubihsm.provider(audit=audit) as provider, provider.open(KeyReference(object="p256")) as key:
            await key.sign(ECDSA, DIGEST)
            with yubihsm.session() as session, contextlib.suppress(YubiHsmDeviceError):
                for _ in range(63):
                    session.get_object(KEY, OBJECT.ASYMMETRIC_KEY).sign_ecdsa(b"by somebody else")
            assert yubihsm.device.commands[COMMAND.SET_LOG_INDEX] == 1
            await key.sign(ECDSA, DIGEST)
            assert yubihsm.device.commands[COMMAND.SET_LOG_INDEX] == 2

    async def test_a_signature_by_somebody_with_our_credential_stops_signing(self, yubihsm: Any) -> None:
        async with yubihsm.provider(audit=self.audit(yubihsm, interval_s=0.1)) as provider:
            await sign(provider)
            hsm = YubiHsm(DirectBackend(yubihsm.device))
            with hsm.create_session_derived(yubihsm.signer, yubihsm.password) as session:
                session.get_object(KEY, OBJECT.ASYMMETRIC_KEY).sign_ecdsa(b"not by the service")
            with pytest.raises(ProviderUnavailable, match="surplus-signature") as raised:
                await keeps_signing(provider)
            assert_helpful(raised.value, "hsmsign yubihsm audit")
            with pytest.raises(ProviderUnavailable, match="surplus-signature"):
                await provider.check()

    async def test_failures_raise_no_alarm(self, yubihsm: Any) -> None:
        """What was tried twice, what was refused and what got lost adds up with the log."""
        async with yubihsm.provider(audit=self.audit(yubihsm, interval_s=0.1)) as provider:
            await sign(provider)
            for fault in ("drop_before", "drop_after", "half_answers"):
                setattr(yubihsm.device.faults, fault, 1)
                for _ in range(3):
                    await sign(provider)
                await recovers(provider)
            yubihsm.device.faults.next_errors.append((COMMAND.SIGN_ECDSA, ERROR.INVALID_DATA))
            with pytest.raises(Error):
                await sign(provider)
            await asyncio.sleep(0.5)  # a few drains
            await recovers(provider)


class TestAttempts:
    async def test_each_is_told_to_the_listener(self, yubihsm: Any) -> None:
        told: list[tuple[str, str]] = []

        def sent(header: Header) -> None:
            if header["op"] == "sign":
                told.append(("sent", ""))

        def ended(header: Header, outcome: Outcome) -> None:
            if header["op"] == "sign":
                told.append(("ended", outcome))

        def take() -> list[tuple[str, str]]:
            taken = told.copy()
            told.clear()
            return taken

        provider = YubihsmProvider("yubihsm", yubihsm.settings(command_timeout_s=0.5), yubihsm.directory / "state")
        provider.supervisor = provider.supervise()
        provider.supervisor.listener = Listener(sent, ended)
        provider.supervisor.start()
        once = [("sent", ""), ("ended", "done")]
        try:
            await sign(provider)
            assert take() == once
            yubihsm.device.reboot()
            await sign(provider)
            assert take() == [("sent", ""), ("ended", "unknown"), *once]
            yubihsm.device.faults.next_errors.append((COMMAND.SIGN_ECDSA, ERROR.INSUFFICIENT_PERMISSIONS))
            with pytest.raises(ProviderProblem):
                await sign(provider)
            assert take() == [("sent", ""), ("ended", "refused")]
            yubihsm.device.faults.drop_after = 1
            await sign(provider)
            assert take() in ([("sent", ""), ("ended", "unknown"), *once], once)  # it may have hit the look-up
            await asyncio.gather(*(sign(provider) for _ in range(10)))
            assert len(take()) == 20
        finally:
            await provider.stop()
        assert take() == []
