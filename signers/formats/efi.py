"""Authenticated EFI variables (UEFI specification 2.10, section 8.2) and the signature lists in them (section 32.4.1).

An update of PK, KEK, db or dbx is `EFI_VARIABLE_AUTHENTICATION_2 || signature lists`: a file NAME.auth, as efitools'
`sign-efi-sig-list` writes it and firmware, `efi-updatevar` and systemd-boot take it.
"""

import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from cryptography import x509

Name = Literal["PK", "KEK", "db", "dbx"]

# EFI_GLOBAL_VARIABLE (section 3.3), EFI_IMAGE_SECURITY_DATABASE_GUID (section 32.6.1)
_GLOBAL = uuid.UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
_IMAGE_SECURITY = uuid.UUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
VENDORS: dict[Name, uuid.UUID] = {"PK": _GLOBAL, "KEK": _GLOBAL, "db": _IMAGE_SECURITY, "dbx": _IMAGE_SECURITY}

# NON_VOLATILE | BOOTSERVICE_ACCESS | RUNTIME_ACCESS | TIME_BASED_AUTHENTICATED_WRITE_ACCESS (section 8.2.1)
_ATTRIBUTES = 0x01 | 0x02 | 0x04 | 0x20
_APPEND_WRITE = 0x40

# EFI_CERT_..._GUID (section 32.4.1)
CERT_X509 = uuid.UUID("a5c059a1-94e4-4aa7-87b5-ab155c2bf072")
CERT_SHA256 = uuid.UUID("c1c41626-504c-4092-aca9-41f936934328")
CERT_PKCS7 = uuid.UUID("4aafd29d-68df-49ee-8aa9-347d375665a7")

_TIME = struct.Struct("<HBBBBBxIhBx")
"""EFI_TIME (section 8.3.1): year, month, day, hour, minute, second, nanosecond, time zone, daylight."""

WIN_CERTIFICATE_UEFI_GUID = struct.Struct("<IHH16s")
"""dwLength, wRevision, wCertificateType, CertType (section 32.2.4)."""
_REVISION, _TYPE_EFI_GUID = 0x0200, 0x0EF1

_LIST_HEADER = struct.Struct("<16sIII")
"""SignatureType, SignatureListSize, SignatureHeaderSize, SignatureSize."""
_OWNER_BYTES = 16


class EfiError(ValueError):
    """The bytes are no such structure; the message says why."""


@dataclass(frozen=True, slots=True)
class Write:
    """One update of a variable, without its signature.

    Arguments:
        name: the variable.
        payload: the signature lists that it gets.
        append: adds them to those that the variable has, instead of replacing these.
        time: must be later than that of the variable's last update, unless it appends; in whole seconds.
    """

    name: Name
    payload: bytes
    append: bool
    time: datetime

    def to_sign(self) -> bytes:
        """What the signature covers: the variable's name, vendor, attributes, time and content (section 8.2.2)."""
        attributes = _ATTRIBUTES | (_APPEND_WRITE if self.append else 0)
        name = self.name.encode("utf-16-le")  # without its terminator
        return name + VENDORS[self.name].bytes_le + struct.pack("<I", attributes) + self._time() + self.payload

    def signed(self, signed_data: bytes) -> bytes:
        """The update: EFI_VARIABLE_AUTHENTICATION_2 (section 8.2.3), and the payload.

        `signed_data` is a DER SignedData without a ContentInfo around it.
        """
        return self._time() + pkcs7_certificate(signed_data) + self.payload

    def _time(self) -> bytes:
        moment = self.time.astimezone(UTC)
        # section 8.2.2: Pad1, Nanosecond, TimeZone, Daylight and Pad2 are zero
        fields = (moment.year, moment.month, moment.day, moment.hour, moment.minute, moment.second)
        return _TIME.pack(*fields, 0, 0, 0)


def pkcs7_certificate(message: bytes) -> bytes:
    """A WIN_CERTIFICATE_UEFI_GUID with a PKCS #7 message; variables and capsules have it."""
    header = WIN_CERTIFICATE_UEFI_GUID
    return header.pack(header.size + len(message), _REVISION, _TYPE_EFI_GUID, CERT_PKCS7.bytes_le) + message


def pkcs7_message_size(header: bytes) -> int:
    """The size in bytes of the message behind the head of a WIN_CERTIFICATE_UEFI_GUID. Raises EfiError."""
    if len(header) != WIN_CERTIFICATE_UEFI_GUID.size:
        raise EfiError("it is cut off")
    length, revision, type_, guid = WIN_CERTIFICATE_UEFI_GUID.unpack(header)
    if (revision, type_, guid) != (_REVISION, _TYPE_EFI_GUID, CERT_PKCS7.bytes_le):
        raise EfiError("its signature is of an unknown type")
    if length <= WIN_CERTIFICATE_UEFI_GUID.size:
        raise EfiError("its signature is empty")
    return int(length) - WIN_CERTIFICATE_UEFI_GUID.size


def message_of(update: bytes) -> bytes:
    """The SignedData in a signed update. Raises EfiError."""
    begin = _TIME.size + WIN_CERTIFICATE_UEFI_GUID.size
    end = begin + pkcs7_message_size(update[_TIME.size : begin])
    if end > len(update):
        raise EfiError("it is cut off")
    return update[begin:end]


@dataclass(frozen=True, slots=True)
class SignatureList:
    """An EFI_SIGNATURE_LIST: `type` says what its `signatures` are; each is without its owner's GUID."""

    type: uuid.UUID
    signatures: tuple[bytes, ...]


def signature_lists(payload: bytes) -> Iterator[SignatureList]:
    """The signature lists of a variable, each looked into. Raises EfiError."""
    at = 0
    while at < len(payload):
        if len(payload) - at < _LIST_HEADER.size:
            raise EfiError("its last list is cut off")
        guid, list_size, header_size, size = _LIST_HEADER.unpack_from(payload, at)
        begin, end = at + _LIST_HEADER.size + header_size, at + list_size
        if not begin < end <= len(payload):
            raise EfiError("a list does not fit into it")
        if size <= _OWNER_BYTES or (end - begin) % size:
            raise EfiError("a list is not a multiple of its signatures' size")
        found = tuple(payload[each + _OWNER_BYTES : each + size] for each in range(begin, end, size))
        _check(SignatureList(uuid.UUID(bytes_le=guid), found))
        yield SignatureList(uuid.UUID(bytes_le=guid), found)
        at = end


def _check(each: SignatureList) -> None:
    if each.type == CERT_SHA256 and len(each.signatures[0]) != 32:
        raise EfiError("a SHA-256 in it has not 32 bytes")
    if each.type == CERT_X509:
        try:
            for certificate in each.signatures:
                x509.load_der_x509_certificate(certificate)
        except (ValueError, x509.InvalidVersion):
            raise EfiError("a certificate in it is not X.509 in DER") from None
