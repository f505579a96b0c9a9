"""Commands with wrap keys: objects, keys and data under AES-CCM or RSA.

What goes in or out must have no capability that the wrap key cannot delegate; what comes in is in no domain in which
the wrap key is not.
"""

import os

from cryptography.hazmat.primitives import hashes

from yubihsm_simulator import keys, wrapping
from yubihsm_simulator.commands.call import Call, read_header, require, to_algorithm
from yubihsm_simulator.definitions import (
    ALL_CAPABILITIES,
    Algorithm,
    Capability,
    DeviceError,
    ErrorCode,
    ObjectType,
    Origin,
)
from yubihsm_simulator.frames import Fields
from yubihsm_simulator.objects import LABEL_BYTES, StoredObject

_Oaep = tuple[bytes, hashes.HashAlgorithm, hashes.HashAlgorithm]


def put_wrap_key(call: Call, fields: Fields) -> bytes:
    """Header, delegated capabilities u64, AES key or p and q -> id."""
    return _put(call, fields, ObjectType.WRAP_KEY)


def put_public_wrap_key(call: Call, fields: Fields) -> bytes:
    """Header, delegated capabilities u64, n -> id."""
    return _put(call, fields, ObjectType.PUBLIC_WRAP_KEY)


def _put(call: Call, fields: Fields, object_type: ObjectType) -> bytes:
    new = read_header(fields, object_type, Origin.IMPORTED, delegated=True)
    new.value = fields.rest()
    return call.create(new)


def generate_wrap_key(call: Call, fields: Fields) -> bytes:
    """Header, delegated capabilities u64 -> id."""
    new = read_header(fields, ObjectType.WRAP_KEY, Origin.GENERATED, delegated=True)
    fields.end()
    return call.generate(new)


def export_wrapped(call: Call, fields: Fields) -> bytes:
    """Id of the wrap key, type u8, id [, format u8: 1 = with an Ed25519 key's seed] -> nonce 13, object, tag 16."""
    wrap_id, object_type, object_id = fields.u16(), fields.u8(), fields.u16()
    form = fields.u8() if len(fields) else 0
    fields.end()
    if form not in (0, 1):
        raise DeviceError(ErrorCode.INVALID_DATA)
    wrap_key = _aes_wrap_key(call, wrap_id, Capability.EXPORT_WRAPPED)
    stored = _exportable(call, wrap_key, object_id, object_type)
    return wrapping.ccm_encrypt(wrap_key.value, wrapping.serialize(stored, wrap_key.algorithm, with_seed=form == 1))


def import_wrapped(call: Call, fields: Fields) -> bytes:
    """Id of the wrap key, nonce 13, object, tag 16 -> type u8, id."""
    wrap_key = _aes_wrap_key(call, fields.u16(), Capability.IMPORT_WRAPPED)
    plaintext = wrapping.ccm_decrypt(wrap_key.value, fields.rest())
    return _import(call, wrap_key, plaintext)


def wrap_data(call: Call, fields: Fields) -> bytes:
    """Id, data -> nonce 13, the wrap key's algorithm u8 and data, tag 16."""
    key = _data_wrap_key(call, fields.u16(), Capability.WRAP_DATA)
    return wrapping.ccm_encrypt(key.value, bytes([key.algorithm]) + fields.rest(least=1))


def unwrap_data(call: Call, fields: Fields) -> bytes:
    """Id, what `wrap_data` answers -> data."""
    key = _data_wrap_key(call, fields.u16(), Capability.UNWRAP_DATA)
    plaintext = wrapping.ccm_decrypt(key.value, fields.rest())
    if plaintext[:1] != bytes([key.algorithm]):
        raise DeviceError(ErrorCode.INVALID_DATA)
    return plaintext[1:]


def export_wrapped_rsa(call: Call, fields: Fields) -> bytes:
    """Id of the public wrap key, type u8, id, AES algorithm u8, OAEP's u8, MGF1's u8, the label's hash -> object."""
    return _wrap_rsa(call, fields, whole_object=True)


def wrap_key_rsa(call: Call, fields: Fields) -> bytes:
    """The same for the key alone."""
    return _wrap_rsa(call, fields, whole_object=False)


def _wrap_rsa(call: Call, fields: Fields, whole_object: bool) -> bytes:
    wrap_id, object_type, object_id, aes, oaep, mgf = (
        fields.u16(),
        fields.u8(),
        fields.u16(),
        fields.u8(),
        fields.u8(),
        fields.u8(),
    )
    label_hash = fields.rest()
    wrap_key = call.find(wrap_id, ObjectType.PUBLIC_WRAP_KEY, Capability.EXPORT_WRAPPED)
    key = keys.rsa_public_key(wrap_key.value)
    aes_algorithm = to_algorithm(aes, ObjectType.SYMMETRIC_KEY)
    call.device.options.require(aes_algorithm, Algorithm.AES_KWP)
    padding = _oaep(call, oaep, mgf, label_hash)
    stored = _exportable(call, wrap_key, object_id, object_type)
    if whole_object:
        plaintext = wrapping.serialize(stored, wrap_key.algorithm, with_seed=False)
    else:
        plaintext = wrapping.key_to_pkcs8(stored)
    return wrapping.rsa_encrypt(key, os.urandom(keys.AES_BYTES[aes_algorithm]), plaintext, padding)


def import_wrapped_rsa(call: Call, fields: Fields) -> bytes:
    """Id of the wrap key, OAEP's algorithm u8, MGF1's u8, wrapped object, the label's hash -> type u8, id."""
    wrap_key = call.find(fields.u16(), ObjectType.WRAP_KEY, Capability.IMPORT_WRAPPED)
    return _import(call, wrap_key, _unwrap_rsa(call, wrap_key, fields))


def unwrap_key_rsa(call: Call, fields: Fields) -> bytes:
    """Id of the wrap key, type u8, id, label 40, domains, capabilities, algorithm u8, then as above -> type u8, id."""
    wrap_id, number, object_id, label, domains, capabilities, algorithm = (
        fields.u16(),
        fields.u8(),
        fields.u16(),
        fields.take(LABEL_BYTES),
        fields.u16(),
        fields.u64(),
        fields.u8(),
    )
    if number not in (ObjectType.ASYMMETRIC_KEY, ObjectType.SYMMETRIC_KEY):
        raise DeviceError(ErrorCode.INVALID_DATA)
    object_type = ObjectType(number)
    new = StoredObject(
        id=object_id,
        type=object_type,
        algorithm=to_algorithm(algorithm, object_type),
        label=label,
        domains=domains,
        capabilities=capabilities & ALL_CAPABILITIES,
        origin=Origin.IMPORTED | Origin.WRAPPED,
        value=b"",
    )
    wrap_key = call.find(wrap_id, ObjectType.WRAP_KEY, Capability.IMPORT_WRAPPED)
    new.value = wrapping.key_from_pkcs8(object_type, new.algorithm, _unwrap_rsa(call, wrap_key, fields))
    keys.check(new.type, new.algorithm, new.value)
    return _store(call, wrap_key, new)


def _unwrap_rsa(call: Call, wrap_key: StoredObject, fields: Fields) -> bytes:
    key = wrap_key.rsa_key
    call.device.options.require(Algorithm.AES_KWP)
    oaep, mgf = fields.u8(), fields.u8()
    if oaep not in wrapping.OAEP_HASHES:
        raise DeviceError(ErrorCode.INVALID_DATA)
    wrapped = fields.take(len(fields) - wrapping.OAEP_HASHES[oaep].digest_size)
    return wrapping.rsa_decrypt(key, wrapped, _oaep(call, oaep, mgf, fields.rest()))


def _oaep(call: Call, oaep: int, mgf: int, label_hash: bytes) -> _Oaep:
    """Raises DeviceError: INVALID_DATA, WRONG_LENGTH, ALGORITHM_DISABLED."""
    if oaep not in wrapping.OAEP_HASHES or mgf not in wrapping.MGF1_HASHES:
        raise DeviceError(ErrorCode.INVALID_DATA)
    if len(label_hash) != wrapping.OAEP_HASHES[oaep].digest_size:
        raise DeviceError(ErrorCode.WRONG_LENGTH)
    call.device.options.require(Algorithm(oaep), Algorithm(mgf))
    return label_hash, wrapping.OAEP_HASHES[oaep], wrapping.MGF1_HASHES[mgf]


def _aes_wrap_key(call: Call, object_id: int, capability: Capability) -> StoredObject:
    """Raises DeviceError (INVALID_DATA) for an RSA key, before its capabilities are looked at."""
    stored = call.find(object_id, ObjectType.WRAP_KEY)
    if stored.algorithm not in keys.AES_CCM_WRAP_BYTES:
        raise DeviceError(ErrorCode.INVALID_DATA)
    call.use(stored, capability)
    return stored


def _data_wrap_key(call: Call, object_id: int, capability: Capability) -> StoredObject:
    try:
        return _aes_wrap_key(call, object_id, capability)
    except DeviceError as error:
        if error.code == ErrorCode.INSUFFICIENT_PERMISSIONS and call.device.firmware < (2, 5, 0):
            raise DeviceError(ErrorCode.INVALID_DATA) from None
        raise


def _exportable(call: Call, wrap_key: StoredObject, object_id: int, object_type: int) -> StoredObject:
    stored = call.find(object_id, object_type, second=True)
    require(stored, Capability.EXPORTABLE_UNDER_WRAP)
    _check_delegated(wrap_key, stored)
    return stored


def _check_delegated(wrap_key: StoredObject, stored: StoredObject) -> None:
    if (stored.capabilities | stored.delegated) & ~wrap_key.delegated:
        raise DeviceError(ErrorCode.INSUFFICIENT_PERMISSIONS)


def _import(call: Call, wrap_key: StoredObject, plaintext: bytes) -> bytes:
    new = wrapping.deserialize(plaintext, wrap_key.algorithm)
    new.origin |= Origin.WRAPPED
    return _store(call, wrap_key, new)


def _store(call: Call, wrap_key: StoredObject, new: StoredObject) -> bytes:
    call.device.options.require(new.algorithm)
    _check_delegated(wrap_key, new)
    used = call.target
    new.domains &= wrap_key.domains
    call.second = call.store(new)
    call.target = used
    return bytes([new.type]) + new.id.to_bytes(2, "big")
