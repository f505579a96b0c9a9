"""Whatever comes in, one well-formed frame comes out."""

import contextlib
import os
import struct
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers.aead import AESCCM
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from yubihsm import YubiHsm
from yubihsm.core import AuthSession
from yubihsm.defs import ALGORITHM, CAPABILITY, COMMAND, ERROR
from yubihsm.exceptions import YubiHsmDeviceError
from yubihsm.objects import (
    AsymmetricKey,
    HmacKey,
    Opaque,
    OtpAeadKey,
    PublicWrapKey,
    SymmetricKey,
    Template,
    WrapKey,
)

from tests.yubihsm_simulator.conftest import PASSWORD, connect
from yubihsm_simulator import Device
from yubihsm_simulator.backend import DirectBackend
from yubihsm_simulator.commands.table import TABLE
from yubihsm_simulator.keys import ALGORITHMS
from yubihsm_simulator.log import ENTRY_BYTES
from yubihsm_simulator.wrapping import serialize

RUN = settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
ALL = CAPABILITY.ALL


@pytest.fixture
def stocked(rsa_key: rsa.RSAPrivateKey) -> Device:
    """A device with an object of every type under the ids 1 to 3."""
    device = Device()
    session = connect(device).create_session_derived(1, PASSWORD)
    AsymmetricKey.put(session, 1, "", 1, ALL, rsa_key)
    AsymmetricKey.generate(session, 2, "", 1, ALL, ALGORITHM.EC_P256)
    AsymmetricKey.generate(session, 3, "", 1, ALL, ALGORITHM.EC_ED25519)
    for id_, algorithm in ((1, ALGORITHM.OPAQUE_DATA), (2, ALGORITHM.OPAQUE_X509_CERTIFICATE)):
        Opaque.put(session, id_, "", 1, ALL, algorithm, b"data")
    WrapKey.generate(session, 1, "", 1, ALL, ALGORITHM.AES128_CCM_WRAP, ALL)
    WrapKey.put(session, 2, "", 1, ALL, ALGORITHM.RSA_2048, ALL, rsa_key)
    PublicWrapKey.put(session, 1, "", 1, ALL, ALL, rsa_key.public_key())
    HmacKey.generate(session, 1, "", 1, ALL)
    SymmetricKey.generate(session, 1, "", 1, ALL, ALGORITHM.AES128)
    OtpAeadKey.generate(session, 1, "", 1, ALL, ALGORITHM.AES128_YUBICO_OTP, 1)
    Template.put(session, 1, "", 1, ALL, ALGORITHM.TEMPLATE_SSH, b"template")
    session.close()
    return device


def well_formed(answer: bytes) -> bool:
    known = {int(error) for error in ERROR}
    is_error = answer[0] == 0x7F and len(answer) == 4 and answer[3] in known
    return len(answer) == 3 + int.from_bytes(answer[1:3], "big") and (is_error or answer[0] >= 0x80)


@RUN
@given(st.binary(max_size=200))
def test_any_bytes(device: Device, request_: bytes) -> None:
    assert well_formed(device.process(request_))


@RUN
@given(st.sampled_from([1, 3, 4, 5, 6, 10]), st.binary(max_size=100))
def test_any_data_of_commands_in_the_clear(device: Device, command: int, data: bytes) -> None:
    assert well_formed(device.process(bytes([command]) + len(data).to_bytes(2, "big") + data))


def ids() -> st.SearchStrategy[bytes]:
    """Two bytes that often are an object's id."""
    return st.one_of(st.integers(0, 3), st.integers(0, 0xFFFF)).map(lambda id_: id_.to_bytes(2, "big"))


def requests() -> st.SearchStrategy[tuple[int, bytes]]:
    """A command, and data that has a chance to be taken."""
    small = st.binary(max_size=8)
    exact = st.sampled_from([16, 20, 32, 36, 48, 52, 64, 65, 66, 128, 256, 288]).flatmap(
        lambda length: st.binary(min_size=length, max_size=length)
    )
    header = st.tuples(ids(), st.just(bytes(40)), st.sampled_from([b"\x00\x01", b"\xff\xff"]), st.just(bytes(8)))
    creation = st.tuples(header.map(b"".join), st.integers(0, 60).map(lambda number: bytes([number])), small, exact)
    data: st.SearchStrategy[bytes] = st.one_of(
        st.binary(max_size=40),
        st.tuples(ids(), small, exact).map(b"".join),
        st.tuples(ids(), ids(), small, st.one_of(exact, small)).map(b"".join),
        creation.map(b"".join),
    )
    # key generation is what takes long; it has tests of its own
    slow = {COMMAND.GENERATE_ASYMMETRIC_KEY, COMMAND.GENERATE_WRAP_KEY, COMMAND.RESET_DEVICE, COMMAND.CLOSE_SESSION}
    commands = st.one_of(
        st.sampled_from(sorted(set(TABLE) - slow)), st.integers(0, 0x7F).filter(lambda c: c not in slow)
    )
    return st.tuples(commands, data)


@RUN
@given(st.lists(requests(), min_size=1, max_size=20))
def test_any_data_of_commands_in_a_session(stocked: Device, sequence: list[tuple[int, bytes]]) -> None:
    device = Device()
    for stored in stocked.objects:
        device.objects.restore(replace(stored))
    answers: list[bytes] = []

    class Recorder(DirectBackend):
        def transceive(self, msg: bytes) -> bytes:
            answers.append(super().transceive(msg))
            return answers[-1]

    session = YubiHsm(Recorder(device)).create_session_derived(1, PASSWORD)
    for command, data in sequence:
        with contextlib.suppress(YubiHsmDeviceError):
            session.send_secure_cmd(command, data)  # type: ignore[arg-type]
        assert answers[-1][0] == 0x85
    assert all(len(entry) == ENTRY_BYTES for entry in device.log.entries)
    session.close()


@RUN
@given(st.data())
def test_a_changed_message_never_reaches_a_command(device: Device, data: Any) -> None:
    """The session lives, and goes on with the message as it was sent."""

    class Garbler:
        def transceive(self, msg: bytes) -> bytes:
            if msg[0] == COMMAND.SESSION_MESSAGE:
                at = data.draw(st.integers(0, len(msg) - 1))
                changed = bytearray(msg)
                changed[at] ^= data.draw(st.integers(1, 255))
                before = device.commands[COMMAND.GET_PSEUDO_RANDOM]
                answer = device.process(bytes(changed))
                assert answer[0] == 0x7F or at == 0
                assert device.commands[COMMAND.GET_PSEUDO_RANDOM] == before
            return device.process(msg)

        def close(self) -> None:
            pass

    session = YubiHsm(Garbler()).create_session_derived(1, PASSWORD)
    assert len(session.get_pseudo_random(data.draw(st.integers(1, 64)))) > 0
    session.close()


@RUN
@given(st.binary(max_size=3113))
@example(b"")
@example(bytes(3113))
def test_echo_gives_back_what_it_got(device: Device, message: bytes) -> None:
    with connect(device).create_session_derived(1, PASSWORD) as session:
        assert session.send_secure_cmd(COMMAND.ECHO, message) == message


@RUN
@given(st.binary(max_size=3084))
def test_wrapped_data_comes_back(stocked: Device, message: bytes) -> None:
    with connect(stocked).create_session_derived(1, PASSWORD) as session:
        key = WrapKey(session, 1)
        if message:
            assert key.unwrap_data(key.wrap_data(message)) == message


def seal(key: bytes, plaintext: bytes) -> bytes:
    nonce = os.urandom(13)
    return nonce + AESCCM(key, 16).encrypt(nonce, plaintext, None)


@RUN
@given(st.binary(min_size=1, max_size=200))
def test_wrapped_garbage_is_refused(stocked: Device, garbage: bytes) -> None:
    """Random plaintext under the right wrap key: the device must look at every field."""
    wrapper = stocked.objects.get(1, 4)
    assert wrapper is not None
    session: AuthSession = connect(stocked).create_session_derived(1, PASSWORD)
    with pytest.raises(YubiHsmDeviceError):
        WrapKey(session, 1).import_wrapped(seal(wrapper.value, garbage))
    session.close()


def kinds() -> st.SearchStrategy[bytes]:
    """An object as it goes under wrap, with a value that has the right length now and then."""
    lengths = st.sampled_from([4, 16, 20, 32, 40, 72, 84, 96, 128, 144, 198, 256, 264, 896])
    longer = st.one_of(lengths, st.integers(1, 9)).map(lambda length: length - 1)
    rest = longer.flatmap(lambda length: st.binary(min_size=length, max_size=length))
    value = rest.map(lambda drawn: b"\x00" + drawn)  # delegated capabilities have no meaning in their first byte
    known = st.sampled_from([(type_, int(algorithm)) for type_ in ALGORITHMS for algorithm in ALGORITHMS[type_]])
    numbers = st.one_of(known, st.tuples(st.integers(0, 10), st.integers(0, 60)))
    return st.tuples(numbers, value).map(
        lambda drawn: (
            struct.pack(">BQHHHBBBB40s", ALGORITHM.AES128_CCM_WRAP, 0, 9, len(drawn[1]), 1, *drawn[0], 0, 2, b"label")
            + drawn[1]
        )
    )


@RUN
@given(kinds())
def test_wrapped_objects_of_any_kind(stocked: Device, plaintext: bytes) -> None:
    """What is taken must come out again as it went in."""
    wrapper = stocked.objects.get(1, 4)
    assert wrapper is not None
    with connect(stocked).create_session_derived(1, PASSWORD) as session, contextlib.suppress(YubiHsmDeviceError):
        WrapKey(session, 1).import_wrapped(seal(wrapper.value, plaintext))
        stored = next(stored for stored in stocked.objects if stored.id == 9)
        stocked.objects.delete(stored)
        assert serialize(stored, wrapper.algorithm, with_seed=False)[59:] == plaintext[59:]
