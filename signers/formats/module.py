"""The signature of a Linux kernel module, which is appended to it.

Source: include/linux/module_signature.h and scripts/sign-file.c of Linux 6.12. A signed module is its ELF file, a CMS
message, `struct module_signature`, and a marker. The signature is over all that stands before the CMS message.
"""

import struct

from signers.formats.reading import ReadAt

MARKER = b"~Module signature appended~\n"

HEAD_BYTES = 18
"""How many bytes `check_elf` needs."""

SIGNATURE_MAX_BYTES = 64 * 1024
"""The most that may be appended; RSA-4096 takes about 700 bytes."""

SIGNATURES_MAX = 8
"""How many signatures on top of each other are taken off: some builds sign a module twice."""

# algo, hash, id_type, signer_len, key_id_len, 3 bytes of padding, sig_len in big endian
_INFO = struct.Struct(">5B3xI")
_PKCS7 = 2  # PKEY_ID_PKCS7: the only type since Linux 4.3


class ModuleError(ValueError):
    """The bytes are no such module."""


def appended(message: bytes) -> bytes:
    """What is put behind a module: its CMS message in DER, and what leads to it."""
    return message + _INFO.pack(0, 0, _PKCS7, 0, 0, len(message)) + MARKER


def message(appended: bytes) -> bytes:
    """The CMS message: the inverse of `appended`. Raises ModuleError."""
    end = len(appended) - len(MARKER) - _INFO.size
    if end < 0 or not appended.endswith(MARKER):
        raise ModuleError("it ends with no signature")
    if _INFO.unpack_from(appended, end) != (0, 0, _PKCS7, 0, 0, end):
        raise ModuleError("what describes its signature is wrong")
    return appended[:end]


def unsigned_size(read_at: ReadAt, size: int) -> int:
    """How many bytes of a module of `size` bytes stand before its signature, or its signatures.

    Raises ModuleError where a signature is marked that cannot be there.
    """
    tail_bytes = _INFO.size + len(MARKER)
    for _ in range(SIGNATURES_MAX):
        tail = read_at(max(0, size - tail_bytes), min(size, tail_bytes))
        if not tail.endswith(MARKER):
            return size
        if len(tail) < tail_bytes:
            raise ModuleError("it is nothing but a signature")
        # before Linux 4.3 the signer's name and key stood in lengths of their own
        _, _, _, signer_length, key_id_length, signature_length = _INFO.unpack_from(tail)
        length = signer_length + key_id_length + signature_length
        if length > min(SIGNATURE_MAX_BYTES, size - tail_bytes):
            raise ModuleError("its signature is said to be longer than it can be")
        size -= tail_bytes + length
    raise ModuleError(f"it has more than {SIGNATURES_MAX} signatures")


def check_elf(head: bytes) -> None:
    """Raises ModuleError where these first HEAD_BYTES are not those of a relocatable ELF file.

    System V ABI, "ELF Header": e_ident with the class and byte order, then e_type, which is ET_REL (1).
    """
    if len(head) < HEAD_BYTES or head[:4] != b"\x7fELF" or head[5] not in (1, 2):
        raise ModuleError("it is no ELF file")
    if int.from_bytes(head[16:18], "little" if head[5] == 1 else "big") != 1:
        raise ModuleError("it is an ELF file, but no relocatable one as modules are")
