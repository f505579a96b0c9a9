import contextlib
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from signers.formats import module
from signers.formats.module import MARKER, ModuleError

ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x01\x00" + b"content"


def unsigned(data: bytes) -> bytes:
    return data[: module.unsigned_size(lambda offset, length: data[offset : offset + length], len(data))]


def info(signer: int = 0, key_id: int = 0, signature: int = 0, id_type: int = 2) -> bytes:
    return struct.pack(">5B3xI", 0, 0, id_type, signer, key_id, signature) + MARKER


@given(st.binary(max_size=100))
def test_what_is_appended_is_found_again(message):
    assert module.message(module.appended(message)) == message
    assert unsigned(ELF + module.appended(message)) == ELF


def test_every_signature_is_taken_off():
    assert unsigned(ELF) == ELF
    assert unsigned(b"") == b""
    assert unsigned(ELF + module.appended(b"first") + module.appended(b"second")) == ELF
    # Linux 3.7 to 4.2: the signer's name and key identifier, then the signature
    assert unsigned(ELF + b"name" + b"keyid" + b"sig" + info(4, 5, 3, id_type=1)) == ELF


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (MARKER, "nothing but a signature"),
        (b"x" + MARKER, "nothing but a signature"),
        (ELF + info(signature=len(ELF) + 1), "longer than it can be"),
        (ELF + info(signature=0xFFFFFFFF), "longer than it can be"),
        (bytes(module.SIGNATURE_MAX_BYTES + 1) + info(signature=module.SIGNATURE_MAX_BYTES + 1), "longer than it can"),
        (ELF + info() * module.SIGNATURES_MAX + info(), "more than 8 signatures"),
    ],
)
def test_impossible_signatures(data, words):
    with pytest.raises(ModuleError, match=words):
        unsigned(data)


@pytest.mark.parametrize(
    "appended",
    [b"", MARKER, b"m" + info(), b"m" + info(signature=2), b"m" + info(1, 0, 1), b"m" + info(signature=1, id_type=1)],
)
def test_a_message_that_is_described_wrongly(appended):
    with pytest.raises(ModuleError):
        module.message(appended)


@given(st.binary(max_size=200))
@example(b"")
def test_any_bytes_end_in_a_size_or_the_own_error(data):
    for each in (data, data + MARKER, data + info(signature=len(data))):
        with contextlib.suppress(ModuleError):
            assert len(unsigned(each)) <= len(each)
        with contextlib.suppress(ModuleError):
            module.message(each)


def test_relocatable_elf_files_only():
    module.check_elf(ELF)
    module.check_elf(b"\x7fELF\x01\x02\x01" + bytes(9) + b"\x00\x01")  # 32 bits, big endian
    for head, words in (
        (b"", "no ELF file"),
        (ELF[:17], "no ELF file"),
        (b"\x7fELG" + ELF[4:], "no ELF file"),
        (b"\x7fELF\x02\x03" + ELF[6:], "no ELF file"),
        (ELF[:16] + b"\x02\x00", "no relocatable one"),
    ):
        with pytest.raises(ModuleError, match=words):
            module.check_elf(head)
