"""Commands for Yubico OTP: AEADs of a YubiKey's secret, and the OTPs made with it.

    AEAD = nonce 6 | AES-CCM(key 16 | private id 6, tag 8), with nonce id 4 | nonce 6 | 000000 as CCM's nonce

Source: YubiHSM 2 user guide, "CREATE OTP AEAD" and "DECRYPT OTP"; Yubico, "OTPs Explained" (the token and its CRC).
"""

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM

from yubihsm_simulator.commands.call import Call, read_header
from yubihsm_simulator.definitions import Capability, DeviceError, ErrorCode, ObjectType, Origin
from yubihsm_simulator.frames import Fields
from yubihsm_simulator.keys import NONCE_ID_BYTES
from yubihsm_simulator.objects import StoredObject

_KEY_BYTES = 16
_PRIVATE_ID_BYTES = 6
_SECRET_BYTES = _KEY_BYTES + _PRIVATE_ID_BYTES
_NONCE_BYTES = 6
_TAG_BYTES = 8
_AEAD_BYTES = _NONCE_BYTES + _SECRET_BYTES + _TAG_BYTES
_OTP_BYTES = 16
_CRC_RESIDUE = 0xF0B8


def put_key(call: Call, fields: Fields) -> bytes:
    """Header, nonce id 4 bytes, key -> id."""
    new = read_header(fields, ObjectType.OTP_AEAD_KEY, Origin.IMPORTED)
    new.value = fields.rest()
    return call.create(new)


def generate_key(call: Call, fields: Fields) -> bytes:
    """Header, nonce id 4 bytes -> id."""
    new = read_header(fields, ObjectType.OTP_AEAD_KEY, Origin.GENERATED)
    new.value = fields.take(NONCE_ID_BYTES)
    fields.end()
    return call.generate(new)


def create_aead(call: Call, fields: Fields) -> bytes:
    """Id, key 16, private id 6 -> AEAD, 36 bytes."""
    stored = call.find(fields.u16(), ObjectType.OTP_AEAD_KEY, Capability.CREATE_OTP_AEAD)
    secret = fields.take(_SECRET_BYTES)
    fields.end()
    return _seal(stored, secret)


def randomize_aead(call: Call, fields: Fields) -> bytes:
    """Id -> AEAD of a random secret."""
    stored = call.find(fields.u16(), ObjectType.OTP_AEAD_KEY, Capability.RANDOMIZE_OTP_AEAD)
    fields.end()
    return _seal(stored, os.urandom(_SECRET_BYTES))


def rewrap_aead(call: Call, fields: Fields) -> bytes:
    """Id, id of the new key, AEAD -> the same secret under the new key."""
    call.allow(Capability.REWRAP_TO_OTP_AEAD_KEY)
    old = call.find(fields.u16(), ObjectType.OTP_AEAD_KEY, Capability.REWRAP_FROM_OTP_AEAD_KEY)
    new = call.find(fields.u16(), ObjectType.OTP_AEAD_KEY, Capability.REWRAP_TO_OTP_AEAD_KEY, second=True)
    aead = fields.take(_AEAD_BYTES)
    fields.end()
    return _seal(new, _open(old, aead))


def decrypt_otp(call: Call, fields: Fields) -> bytes:
    """Id, AEAD, OTP 16 -> use counter u16, session counter u8, timestamp u8 and u16 (as in the OTP, little-endian)."""
    stored = call.find(fields.u16(), ObjectType.OTP_AEAD_KEY, Capability.DECRYPT_OTP)
    aead, otp = fields.take(_AEAD_BYTES), fields.take(_OTP_BYTES)
    fields.end()
    secret = _open(stored, aead)
    decryptor = Cipher(algorithms.AES(secret[:_KEY_BYTES]), modes.ECB()).decryptor()  # noqa: S305
    token = decryptor.update(otp) + decryptor.finalize()
    # private id 6, use counter 2, timestamp 2 + 1, session counter 1, random 2, CRC 2
    if token[:_PRIVATE_ID_BYTES] != secret[_KEY_BYTES:] or _crc16(token) != _CRC_RESIDUE:
        raise DeviceError(ErrorCode.INVALID_OTP)
    use_counter, timestamp_low, timestamp_high, session_counter = token[6:8], token[8:10], token[10:11], token[11:12]
    return use_counter + session_counter + timestamp_high + timestamp_low


def _aead(stored: StoredObject, nonce: bytes) -> tuple[AESCCM, bytes]:
    nonce_id, key = stored.value[:NONCE_ID_BYTES], stored.value[NONCE_ID_BYTES:]
    return AESCCM(key, _TAG_BYTES), nonce_id + nonce + bytes(3)


def _seal(stored: StoredObject, secret: bytes) -> bytes:
    nonce = os.urandom(_NONCE_BYTES)
    ccm, whole_nonce = _aead(stored, nonce)
    return nonce + ccm.encrypt(whole_nonce, secret, None)


def _open(stored: StoredObject, aead: bytes) -> bytes:
    ccm, whole_nonce = _aead(stored, aead[:_NONCE_BYTES])
    try:
        return ccm.decrypt(whole_nonce, aead[_NONCE_BYTES:], None)
    except InvalidTag:
        raise DeviceError(ErrorCode.INVALID_DATA) from None


def _crc16(data: bytes) -> int:
    """ISO 13239; the residue of data with its own CRC is f0b8."""
    crc = 0xFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x8408 if crc & 1 else 0)
    return crc
