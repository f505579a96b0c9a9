"""Commands about objects whatever their type, and those that hold data: opaque objects and templates."""

from yubihsm_simulator import keys
from yubihsm_simulator.commands.call import Call, read_header
from yubihsm_simulator.definitions import Capability, DeviceError, ErrorCode, ObjectType, Origin
from yubihsm_simulator.frames import Fields
from yubihsm_simulator.objects import DEVICE_CERTIFICATE_ID, LABEL_BYTES

_WITH_PUBLIC_KEY = (ObjectType.ASYMMETRIC_KEY, ObjectType.WRAP_KEY, ObjectType.PUBLIC_WRAP_KEY)
_DELETE: dict[ObjectType, Capability] = {
    ObjectType.OPAQUE: Capability.DELETE_OPAQUE,
    ObjectType.AUTHENTICATION_KEY: Capability.DELETE_AUTHENTICATION_KEY,
    ObjectType.ASYMMETRIC_KEY: Capability.DELETE_ASYMMETRIC_KEY,
    ObjectType.WRAP_KEY: Capability.DELETE_WRAP_KEY,
    ObjectType.HMAC_KEY: Capability.DELETE_HMAC_KEY,
    ObjectType.TEMPLATE: Capability.DELETE_TEMPLATE,
    ObjectType.OTP_AEAD_KEY: Capability.DELETE_OTP_AEAD_KEY,
    ObjectType.SYMMETRIC_KEY: Capability.DELETE_SYMMETRIC_KEY,
    ObjectType.PUBLIC_WRAP_KEY: Capability.DELETE_PUBLIC_WRAP_KEY,
}


def put_opaque(call: Call, fields: Fields) -> bytes:
    """Header, data -> id."""
    return _put(call, fields, ObjectType.OPAQUE)


def put_template(call: Call, fields: Fields) -> bytes:
    """Header, data -> id."""
    return _put(call, fields, ObjectType.TEMPLATE)


def _put(call: Call, fields: Fields, object_type: ObjectType) -> bytes:
    new = read_header(fields, object_type, Origin.IMPORTED)
    new.value = fields.rest(least=1)
    return call.create(new)


def get_opaque(call: Call, fields: Fields) -> bytes:
    """Id -> data; id 0 is the device's attestation certificate."""
    object_id = fields.u16()
    fields.end()
    if object_id == DEVICE_CERTIFICATE_ID:
        call.target = object_id
        return call.device.attestation.device_certificate
    return call.find(object_id, ObjectType.OPAQUE).value


def get_template(call: Call, fields: Fields) -> bytes:
    """Id -> data."""
    object_id = fields.u16()
    fields.end()
    return call.find(object_id, ObjectType.TEMPLATE).value


def list_objects(call: Call, fields: Fields) -> bytes:
    """Filters, each a tag u8 and a value -> id u16, type u8, sequence u8 of each object that all of them match."""
    found = [stored for stored in call.device.objects if stored.domains & call.session.domains]
    while len(fields):
        match fields.u8():
            case 1:
                object_id = fields.u16()
                found = [stored for stored in found if stored.id == object_id]
            case 2:
                object_type = fields.u8()
                found = [stored for stored in found if stored.type == object_type]
            case 3:
                domains = fields.u16()
                found = [stored for stored in found if stored.domains & domains]
            case 4:
                capabilities = fields.u64()
                found = [stored for stored in found if stored.capabilities & capabilities]
            case 5:
                algorithm = fields.u8()
                found = [stored for stored in found if stored.algorithm == algorithm]
            case 6:
                label = fields.take(LABEL_BYTES)
                found = [stored for stored in found if stored.label == label]
            case _:
                raise DeviceError(ErrorCode.INVALID_DATA)
    return b"".join(stored.id.to_bytes(2, "big") + bytes([stored.type, stored.sequence]) for stored in found)


def get_object_info(call: Call, fields: Fields) -> bytes:
    """Id, type u8 -> 66 bytes, see `StoredObject.info`."""
    return call.find(*_read_name(call, fields)).info()


def delete_object(call: Call, fields: Fields) -> bytes:
    """Id, type u8 -> nothing; the session's capability depends on the type, the object's own do not matter."""
    object_id, object_type = _read_name(call, fields)
    call.allow(_DELETE[object_type])
    call.device.objects.delete(call.find(object_id, object_type))
    return b""


def _read_name(call: Call, fields: Fields) -> tuple[int, ObjectType]:
    """Raises DeviceError: WRONG_LENGTH, INVALID_DATA (no such type)."""
    object_id, number = fields.u16(), fields.u8()
    fields.end()
    call.target = object_id
    if number not in _DELETE:
        raise DeviceError(ErrorCode.INVALID_DATA)
    return object_id, ObjectType(number)


def get_public_key(call: Call, fields: Fields) -> bytes:
    """Id [, type u8] -> algorithm u8, the key as `keys.public_bytes` lays it out."""
    object_id = fields.u16()
    object_type = fields.u8() if len(fields) else ObjectType.ASYMMETRIC_KEY
    fields.end()
    if object_type not in _WITH_PUBLIC_KEY:
        raise DeviceError(ErrorCode.INVALID_DATA)
    stored = call.find(object_id, object_type)
    return bytes([stored.algorithm]) + keys.public_bytes(stored.public_key)


def put_authentication_key(call: Call, fields: Fields) -> bytes:
    """Header, delegated capabilities u64, K-ENC and K-MAC (32 bytes) or x and y (64 bytes) -> id."""
    new = read_header(fields, ObjectType.AUTHENTICATION_KEY, Origin.IMPORTED, delegated=True)
    new.value = fields.rest()
    return call.create(new)


def change_authentication_key(call: Call, fields: Fields) -> bytes:
    """Id of the session's own key, algorithm u8, key -> id."""
    object_id, algorithm, value = fields.u16(), fields.u8(), fields.rest()
    call.target = object_id
    if object_id != call.session.key_id:
        raise DeviceError(ErrorCode.INVALID_ID)
    stored = call.find(object_id, ObjectType.AUTHENTICATION_KEY)
    if algorithm != stored.algorithm:
        raise DeviceError(ErrorCode.INVALID_DATA)
    keys.check(stored.type, stored.algorithm, value)
    call.device.objects.replace_value(stored, value)
    return object_id.to_bytes(2, "big")
