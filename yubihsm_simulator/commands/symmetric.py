"""Commands with secret keys: AES in ECB and CBC, HMAC."""

import hmac

from cryptography.hazmat.primitives import hmac as hmac_primitive
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from yubihsm_simulator import keys
from yubihsm_simulator.commands.call import Call, read_header
from yubihsm_simulator.definitions import Algorithm, Capability, DeviceError, ErrorCode, ObjectType, Origin
from yubihsm_simulator.frames import Fields
from yubihsm_simulator.objects import StoredObject

_BLOCK = 16


def put_symmetric(call: Call, fields: Fields) -> bytes:
    """Header, key -> id."""
    return _put(call, fields, ObjectType.SYMMETRIC_KEY)


def put_hmac(call: Call, fields: Fields) -> bytes:
    """Header, key not longer than a block of the hash -> id."""
    return _put(call, fields, ObjectType.HMAC_KEY)


def generate_symmetric(call: Call, fields: Fields) -> bytes:
    """Header -> id."""
    return _generate(call, fields, ObjectType.SYMMETRIC_KEY)


def generate_hmac(call: Call, fields: Fields) -> bytes:
    """Header -> id."""
    return _generate(call, fields, ObjectType.HMAC_KEY)


def _put(call: Call, fields: Fields, object_type: ObjectType) -> bytes:
    new = read_header(fields, object_type, Origin.IMPORTED)
    new.value = fields.rest()
    return call.create(new)


def _generate(call: Call, fields: Fields, object_type: ObjectType) -> bytes:
    new = read_header(fields, object_type, Origin.GENERATED)
    fields.end()
    return call.generate(new)


def encrypt_ecb(call: Call, fields: Fields) -> bytes:
    """Id, whole blocks -> whole blocks."""
    return _ecb(call, fields, Capability.ENCRYPT_ECB)


def decrypt_ecb(call: Call, fields: Fields) -> bytes:
    """Id, whole blocks -> whole blocks."""
    return _ecb(call, fields, Capability.DECRYPT_ECB)


def encrypt_cbc(call: Call, fields: Fields) -> bytes:
    """Id, IV 16 bytes, whole blocks -> whole blocks."""
    return _cbc(call, fields, Capability.ENCRYPT_CBC)


def decrypt_cbc(call: Call, fields: Fields) -> bytes:
    """Id, IV 16 bytes, whole blocks -> whole blocks."""
    return _cbc(call, fields, Capability.DECRYPT_CBC)


def _ecb(call: Call, fields: Fields, capability: Capability) -> bytes:
    stored = call.find(fields.u16(), ObjectType.SYMMETRIC_KEY, capability)
    call.device.options.require(Algorithm.AES_ECB)
    mode = modes.ECB()  # noqa: S305
    return _blocks(Cipher(algorithms.AES(stored.value), mode), fields, capability is Capability.ENCRYPT_ECB)


def _cbc(call: Call, fields: Fields, capability: Capability) -> bytes:
    stored = call.find(fields.u16(), ObjectType.SYMMETRIC_KEY, capability)
    call.device.options.require(Algorithm.AES_CBC)
    mode = modes.CBC(fields.take(_BLOCK))
    return _blocks(Cipher(algorithms.AES(stored.value), mode), fields, capability is Capability.ENCRYPT_CBC)


def _blocks(cipher: Cipher[modes.ECB] | Cipher[modes.CBC], fields: Fields, encrypt: bool) -> bytes:
    data = fields.rest(least=_BLOCK)
    if len(data) % _BLOCK:
        raise DeviceError(ErrorCode.WRONG_LENGTH)
    context = cipher.encryptor() if encrypt else cipher.decryptor()
    return context.update(data) + context.finalize()


def sign_hmac(call: Call, fields: Fields) -> bytes:
    """Id, data -> MAC."""
    stored = call.find(fields.u16(), ObjectType.HMAC_KEY, Capability.SIGN_HMAC)
    return _mac(stored, fields.rest())


def verify_hmac(call: Call, fields: Fields) -> bytes:
    """Id, MAC, data -> 01 if it is right, else 00."""
    stored = call.find(fields.u16(), ObjectType.HMAC_KEY, Capability.VERIFY_HMAC)
    mac = fields.take(keys.HMAC_HASHES[stored.algorithm].digest_size)
    return bytes([hmac.compare_digest(mac, _mac(stored, fields.rest()))])


def _mac(stored: StoredObject, data: bytes) -> bytes:
    mac = hmac_primitive.HMAC(stored.value, keys.HMAC_HASHES[stored.algorithm])
    mac.update(data)
    return mac.finalize()
