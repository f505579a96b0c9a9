"""What survives a power cycle."""

import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from yubihsm.core import AuthSession
from yubihsm.defs import ALGORITHM, AUDIT, CAPABILITY, COMMAND
from yubihsm.objects import AsymmetricKey, Opaque

from tests.yubihsm_simulator.conftest import PASSWORD, connect
from yubihsm_simulator import Device


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "device.json"


def login(device: Device) -> AuthSession:
    return connect(device).create_session_derived(1, PASSWORD)


def test_objects_options_log_and_sequences_survive(file: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    session = login(Device(state=file))
    session.set_enabled_algorithms({ALGORITHM.EC_K256: False})
    session.set_command_audit({COMMAND.SIGN_PKCS1: AUDIT.ON})
    session.set_force_audit(AUDIT.FIXED)
    key = AsymmetricKey.put(session, 5, "key", 3, CAPABILITY.SIGN_PKCS, rsa_key)
    Opaque.put(session, 6, "", 1, CAPABILITY.NONE, ALGORITHM.OPAQUE_DATA, b"data").delete()
    key.sign_pkcs1v1_5(b"data")
    info, log = key.get_info(), session.get_log_entries().entries

    device = Device(state=file)
    assert device.sessions == 0
    anew = login(device)
    assert AsymmetricKey(anew, 5).get_info() == info
    signature = AsymmetricKey(anew, 5).sign_pkcs1v1_5(b"data")
    rsa_key.public_key().verify(signature, b"data", padding.PKCS1v15(), hashes.SHA256())
    assert anew.get_force_audit() == AUDIT.FIXED
    assert not anew.get_enabled_algorithms()[ALGORITHM.EC_K256]
    assert Opaque.put(anew, 6, "", 1, CAPABILITY.NONE, ALGORITHM.OPAQUE_DATA, b"data").get_info().sequence == 1
    later = anew.get_log_entries().entries
    assert [entry.command for entry in later[len(log) :]] == [0, COMMAND.SIGN_PKCS1]  # the boot, the signature
    assert later[: len(log)] == log


def test_reset_is_remembered(file: Path) -> None:
    session = login(Device(state=file))
    Opaque.put(session, 6, "", 1, CAPABILITY.NONE, ALGORITHM.OPAQUE_DATA, b"data")
    session.reset_device()
    assert len(login(Device(state=file)).list_objects()) == 1


def test_the_file_is_for_its_owner_and_whole_at_any_time(file: Path) -> None:
    session = login(Device(state=file))
    first = file.stat().st_ino
    Opaque.put(session, 6, "", 1, CAPABILITY.NONE, ALGORITHM.OPAQUE_DATA, b"data")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.stat().st_ino != first  # replaced, not rewritten
    assert list(file.parent.iterdir()) == [file]
    assert json.loads(file.read_text())["serial"] == 12345678


def test_nothing_is_written_for_what_changes_nothing(file: Path) -> None:
    session = login(Device(state=file))
    first = file.stat().st_ino
    session.list_objects()
    session.close()
    assert file.stat().st_ino == first


def test_another_devices_state(file: Path) -> None:
    Device(serial=1, state=file)
    with pytest.raises(ValueError, match="device 1"):
        Device(serial=2, state=file)
