"""The audit of a simulated device, whose log python-yubihsm reads, and with which real signatures are made."""

import asyncio
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from yubihsm import YubiHsm
from yubihsm.core import AuthSession
from yubihsm.defs import ALGORITHM, AUDIT, CAPABILITY, COMMAND
from yubihsm.exceptions import YubiHsmDeviceError
from yubihsm.objects import AsymmetricKey, AuthenticationKey

from tokens.audit import LogPage, Operation
from tokens.audit.alarms import Alarms
from tokens.audit.store import verify
from tokens.errors import ProviderUnavailable
from yubihsm_simulator import Device
from yubihsm_simulator.backend import DirectBackend

SERIAL = 12345678
SIGNER, AUDITOR, OTHER = 2, 3, 9
KEY = 0x0100
ECDSA = Operation(COMMAND.SIGN_ECDSA, KEY, SIGNER)
AUDITED = {COMMAND.SIGN_PKCS1, COMMAND.SIGN_PSS, COMMAND.SIGN_ECDSA, COMMAND.SIGN_EDDSA, COMMAND.SET_OPTION,
           COMMAND.SET_LOG_INDEX, COMMAND.DELETE_OBJECT, COMMAND.GENERATE_ASYMMETRIC_KEY}  # fmt: skip


@dataclass
class Simulated:
    """A device with a key, sessions of each who uses it, and the auditor's view of its log."""

    device: Device
    admin: AuthSession
    signer: AuthSession
    auditor: AuthSession
    other: AuthSession

    async def read(self) -> LogPage:
        # not by get_log_entries(), which gives nothing of a log whose chain is broken
        answer = await asyncio.to_thread(self.auditor.send_secure_cmd, COMMAND.GET_LOG_ENTRIES)
        boots, authentications, _ = struct.unpack_from(">HHB", answer)
        return LogPage(boots, authentications, answer[5:])

    async def advance(self, number: int) -> None:
        await asyncio.to_thread(self.auditor.set_log_index, number)

    def sign(self, session: AuthSession | None = None) -> None:
        AsymmetricKey(session or self.signer, KEY).sign_ecdsa(b"what is signed")

    @property
    def commands(self) -> list[int]:
        """What the device's log holds."""
        return [entry[2] for entry in self.device.log.entries]


@pytest.fixture
def simulated() -> Iterator[Simulated]:
    device = Device(SERIAL)
    hsm = YubiHsm(DirectBackend(device))
    admin = hsm.create_session_derived(1, "password")
    capabilities = {SIGNER: CAPABILITY.SIGN_ECDSA, OTHER: CAPABILITY.SIGN_ECDSA, AUDITOR: CAPABILITY.GET_LOG_ENTRIES}
    for key_id, capability in capabilities.items():
        password = f"password of {key_id}"
        AuthenticationKey.put_derived(admin, key_id, "", 0xFFFF, capability, CAPABILITY.NONE, password)
    AsymmetricKey.generate(admin, KEY, "", 0xFFFF, CAPABILITY.SIGN_ECDSA, ALGORITHM.EC_P256)
    admin.set_command_audit(dict.fromkeys(AUDITED, AUDIT.ON))
    sessions = {key_id: hsm.create_session_derived(key_id, f"password of {key_id}") for key_id in capabilities}
    yield Simulated(device, admin, sessions[SIGNER], sessions[AUDITOR], sessions[OTHER])
    hsm.close()


async def sign(auditor, simulated: Simulated, count: int = 1) -> None:
    """As a provider does it."""
    for _ in range(count):
        async with auditor.gate():
            auditor.ledger.asked(ECDSA)
            try:
                await asyncio.to_thread(simulated.sign)
            except YubiHsmDeviceError:
                auditor.ledger.refused(ECDSA)
                raise
            auditor.ledger.answered(ECDSA)


def kinds(tmp_path: Path) -> list[str]:
    alarms = Alarms(tmp_path / "state/audit" / f"{SERIAL}.alarms.jsonl", SERIAL)
    return [alarm.kind for alarm in alarms.standing()]


def stored(tmp_path: Path) -> Path:
    return tmp_path / "state/audit" / f"{SERIAL}.jsonl"


async def test_all_is_well(make, simulated: Simulated, tmp_path) -> None:
    auditor = make(simulated)
    auditor.start()
    await sign(auditor, simulated, 150)
    await auditor.stop()
    assert kinds(tmp_path) == []
    assert simulated.commands == [COMMAND.SET_LOG_INDEX]
    verified = verify(stored(tmp_path))
    assert verified.breaks == ()
    assert verified.entries == simulated.device.log.last_number - 1
    assert auditor.ledger.answers() == {ECDSA: (150, 150)}


async def test_an_idle_device_gets_no_entries_of_drains(make, simulated: Simulated) -> None:
    auditor = make(simulated)
    await sign(auditor, simulated)
    for _ in range(5):
        await auditor.drain()
    assert simulated.commands == [COMMAND.SET_LOG_INDEX]
    assert simulated.device.commands[COMMAND.SET_LOG_INDEX] == 2  # at the first look, and after the signature


@pytest.mark.parametrize(("who", "kind"), [("signer", "surplus-signature"), ("other", "foreign-signature")])
async def test_a_signature_by_somebody_else(make, simulated: Simulated, tmp_path, who: str, kind: str) -> None:
    auditor = make(simulated)
    await sign(auditor, simulated, 3)
    simulated.sign(getattr(simulated, who))
    await auditor.drain()
    assert kinds(tmp_path) == [kind]
    with pytest.raises(ProviderUnavailable, match=kind):
        await sign(auditor, simulated)


async def test_a_refused_signature_is_none(make, simulated: Simulated, tmp_path) -> None:
    auditor = make(simulated)
    simulated.device.faults.next_errors.append((COMMAND.SIGN_ECDSA, 0x09))
    with pytest.raises(YubiHsmDeviceError):
        await sign(auditor, simulated)
    await sign(auditor, simulated)
    await auditor.drain()
    assert kinds(tmp_path) == []


async def test_entries_that_were_overwritten(make, simulated: Simulated, tmp_path) -> None:
    auditor = make(simulated)
    await auditor.drain()
    for _ in range(70):
        simulated.sign()
    await auditor.drain()
    assert kinds(tmp_path) == ["gap", "surplus-signature"]
    (broken,) = verify(stored(tmp_path)).breaks
    assert broken.broken == "gap"


async def test_a_device_that_logs_no_signatures(make, simulated: Simulated, tmp_path) -> None:
    auditor = make(simulated)
    simulated.admin.set_command_audit(dict.fromkeys(AUDITED, AUDIT.OFF))
    await sign(auditor, simulated)
    await auditor.drain()
    assert kinds(tmp_path) == ["missing-signature"]


async def test_logging_that_is_turned_off(make, simulated: Simulated, tmp_path) -> None:
    auditor = make(simulated)
    await sign(auditor, simulated)
    simulated.admin.set_command_audit({COMMAND.SIGN_ECDSA: AUDIT.OFF})
    await auditor.drain()
    assert kinds(tmp_path) == ["options-changed"]


@pytest.mark.parametrize("entry", [1, 2, 3])
async def test_an_entry_that_was_changed(make, simulated: Simulated, tmp_path, entry: int) -> None:
    auditor = make(simulated)
    await sign(auditor, simulated, 4)
    raw = bytearray(simulated.device.log.entries[entry])
    raw[7] ^= 1  # the key that was signed with
    simulated.device.log.entries[entry] = bytes(raw)
    await auditor.drain()
    assert "broken-chain" in kinds(tmp_path)
    with pytest.raises(ProviderUnavailable, match="broken-chain"):
        await sign(auditor, simulated)


async def test_a_reset(make, simulated: Simulated, tmp_path) -> None:
    auditor = make(simulated)
    await sign(auditor, simulated, 5)
    await auditor.drain()
    simulated.device.factory_reset()
    hsm = YubiHsm(DirectBackend(simulated.device))
    simulated.auditor = hsm.create_session_derived(1, "password")
    await auditor.drain()
    hsm.close()
    assert kinds(tmp_path) == ["reset"]


class TestForcedAudit:
    @pytest.fixture(autouse=True)
    def _forced(self, simulated: Simulated) -> None:
        simulated.admin.set_force_audit(AUDIT.ON)

    async def test_a_busy_service_goes_on(self, make, simulated: Simulated, tmp_path) -> None:
        auditor = make(simulated)
        auditor.start()
        await sign(auditor, simulated, 150)
        await auditor.stop()
        assert kinds(tmp_path) == []

    async def test_a_log_that_is_full_already(self, make, simulated: Simulated, tmp_path) -> None:
        while len(simulated.device.log.entries) < 62:
            simulated.sign()
        with pytest.raises(YubiHsmDeviceError):
            simulated.sign()
        auditor = make(simulated)
        await sign(auditor, simulated, 3)
        await auditor.drain()
        assert kinds(tmp_path) == []

    async def test_what_is_not_logged(self, make, simulated: Simulated, tmp_path) -> None:
        auditor = make(simulated, other_auth_key_ids=[OTHER])
        await auditor.drain()
        while len(simulated.device.log.entries) < 62:
            simulated.sign(simulated.other)
        simulated.device.reboot()
        hsm = YubiHsm(DirectBackend(simulated.device))
        simulated.auditor = hsm.create_session_derived(AUDITOR, f"password of {AUDITOR}")
        await auditor.drain()
        hsm.close()
        assert kinds(tmp_path) == ["unlogged-boots"]


async def test_a_new_process_goes_on(make, simulated: Simulated, tmp_path) -> None:
    for _ in range(4):
        auditor = make(simulated)
        auditor.start()
        await sign(auditor, simulated, 20)
        await auditor.stop()
    assert kinds(tmp_path) == []
    verified = verify(stored(tmp_path))
    assert (verified.entries, verified.breaks) == (simulated.device.log.last_number - 1, ())


@pytest.mark.parametrize("signed", [True, False])
async def test_a_service_that_dies_in_mid_signature(make, simulated: Simulated, tmp_path, clock, signed: bool) -> None:
    auditor = make(simulated)
    await sign(auditor, simulated, 3)
    auditor.ledger.asked(ECDSA)
    if signed:
        simulated.sign()
    auditor = make(simulated)
    await sign(auditor, simulated, 3)
    await auditor.drain()
    clock.now += 60
    await auditor.drain()
    assert kinds(tmp_path) == []
    simulated.sign()
    await auditor.drain()
    assert kinds(tmp_path) == ["surplus-signature"]


async def test_numbers_begin_anew(make, simulated: Simulated, tmp_path) -> None:
    simulated.device.log.last_number = 65530
    simulated.device.log.entries.clear()
    auditor = make(simulated)
    await sign(auditor, simulated, 80)
    await auditor.drain()
    assert kinds(tmp_path) == []
    assert simulated.device.log.last_number < 100
    assert verify(stored(tmp_path)).breaks == ()
