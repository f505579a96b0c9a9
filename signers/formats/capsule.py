"""FMP capsules with one signed payload, as edk2's GenerateCapsule makes them.

    EFI_CAPSULE_HEADER                              28 bytes, padded to 32 (UEFI specification 2.10, section 8.5.3)
    EFI_FIRMWARE_MANAGEMENT_CAPSULE_HEADER          16 bytes with one offset (section 23.3.3)
    EFI_FIRMWARE_MANAGEMENT_CAPSULE_IMAGE_HEADER    48 bytes, version 3 (section 23.3.3)
    EFI_FIRMWARE_IMAGE_AUTHENTICATION               MonotonicCount, then WIN_CERTIFICATE_UEFI_GUID (section 23.1.6)
    FMP_PAYLOAD_HEADER                              16 bytes (edk2, FmpDevicePkg/.../FmpPayloadHeaderLib.c)
    payload

The signature covers the payload header, the payload and the count; it is a detached PKCS #7 message.
"""

import struct
import uuid
from dataclasses import dataclass

from signers.formats.efi import WIN_CERTIFICATE_UEFI_GUID, EfiError, pkcs7_certificate, pkcs7_message_size
from signers.formats.reading import ReadAt

CAPSULE_MAX_BYTES = 0xFFFF_FFFF
"""Sizes in a capsule have 32 bits."""

MESSAGE_MAX_BYTES = 1024 * 1024
"""A PKCS #7 message with its certificates has a few KiB."""

_CAPSULE_GUID = uuid.UUID("6dcbd5ed-e82d-4c44-bda1-7194199ad92a")  # EFI_FIRMWARE_MANAGEMENT_CAPSULE_ID_GUID
_CAPSULE_HEADER = struct.Struct("<16sIIII")  # CapsuleGuid, HeaderSize, Flags, CapsuleImageSize, padding
_FMP_HEADER = struct.Struct("<IHHQ")  # Version, EmbeddedDriverCount, PayloadItemCount, ItemOffsetList[0]
# Version, UpdateImageTypeId, UpdateImageIndex and 3 reserved bytes, UpdateImageSize, UpdateVendorCodeSize,
# UpdateHardwareInstance, ImageCapsuleSupport
_IMAGE_HEADER = struct.Struct("<I16sB3xIIQQ")
_PAYLOAD_HEADER = struct.Struct("<4sIII")  # Signature, HeaderSize, FwVersion, LowestSupportedVersion
_COUNT = struct.Struct("<Q")
_FIXED_BYTES = sum(
    each.size
    for each in (_CAPSULE_HEADER, _FMP_HEADER, _IMAGE_HEADER, _COUNT, WIN_CERTIFICATE_UEFI_GUID, _PAYLOAD_HEADER)
)

_IMAGE_INDEX = 1
_AUTHENTICATED = 1  # CAPSULE_SUPPORT_AUTHENTICATION
_MONOTONIC_COUNT = 1


@dataclass(frozen=True, slots=True)
class Capsule:
    """What a capsule says of its payload.

    Arguments:
        guid: the firmware that it is for (UpdateImageTypeId).
        fw_version: the payload's version, 32 bits.
        lowest_supported_version: no older one may be installed after it, 32 bits.
        payload_size: in bytes.
    """

    guid: uuid.UUID
    fw_version: int
    lowest_supported_version: int
    payload_size: int

    @property
    def size_max(self) -> int:
        """The most bytes that the whole capsule can have."""
        return _FIXED_BYTES + MESSAGE_MAX_BYTES + self.payload_size

    def payload_header(self) -> bytes:
        """FMP_PAYLOAD_HEADER: it stands before the payload, and is signed with it."""
        return _PAYLOAD_HEADER.pack(b"MSS1", _PAYLOAD_HEADER.size, self.fw_version, self.lowest_supported_version)

    def headers(self, message: bytes) -> bytes:
        """All that comes before the payload; `message` is the PKCS #7 message in DER."""
        authentication = _COUNT.pack(_MONOTONIC_COUNT) + pkcs7_certificate(message)
        image_size = len(authentication) + _PAYLOAD_HEADER.size + self.payload_size
        image = _IMAGE_HEADER.pack(3, self.guid.bytes_le, _IMAGE_INDEX, image_size, 0, 0, _AUTHENTICATED)
        fmp = _FMP_HEADER.pack(1, 0, 1, _FMP_HEADER.size)
        size = _CAPSULE_HEADER.size + len(fmp) + len(image) + image_size
        capsule = _CAPSULE_HEADER.pack(_CAPSULE_GUID.bytes_le, _CAPSULE_HEADER.size, 0, size, 0)
        return capsule + fmp + image + authentication + self.payload_header()


MONOTONIC_COUNT = _COUNT.pack(_MONOTONIC_COUNT)
"""What is signed behind the payload."""


def parse(read_at: ReadAt, size: int) -> tuple[Capsule, bytes]:
    """What a capsule of this form holds, and the PKCS #7 message in it; the payload is its last `payload_size` bytes.

    Raises EfiError.
    """
    before = _CAPSULE_HEADER.size + _FMP_HEADER.size
    image = read_at(before, _IMAGE_HEADER.size)
    certificate_at = before + _IMAGE_HEADER.size + _COUNT.size
    message_at = certificate_at + WIN_CERTIFICATE_UEFI_GUID.size
    message_size = pkcs7_message_size(read_at(certificate_at, WIN_CERTIFICATE_UEFI_GUID.size))
    payload_size = size - _FIXED_BYTES - message_size
    if message_size > MESSAGE_MAX_BYTES or payload_size < 0:
        raise EfiError("it is cut off")
    message = read_at(message_at, message_size)
    _, _, fw_version, lowest = _PAYLOAD_HEADER.unpack(read_at(message_at + message_size, _PAYLOAD_HEADER.size))
    guid = uuid.UUID(bytes_le=_IMAGE_HEADER.unpack(image)[1])
    capsule = Capsule(guid, fw_version, lowest, payload_size)
    # every other field has one value
    headers = capsule.headers(message)
    if read_at(0, len(headers)) != headers:
        raise EfiError("its headers are not those of one signed payload")
    return capsule, message
