"""SIGN SSH CERTIFICATE: a certificate request, signed if the template permits it.

Template: tag u8, length u16, value; 1 algorithm u8 and 2 modulus of the key that signs timestamps, 3 ids u16 of the
CA keys, 4 not before u32, 5 not after u32, 6 principals that get no certificate, each ended by a zero byte.

Source: YubiHSM 2 user guide, "SIGN SSH CERTIFICATE"; Yubico's yubihsm-ssh-tool (template, signature of the
timestamp); OpenSSH, PROTOCOL.certkeys. Which bounds the template's times set is not documented: taken here for the
times between which the request's timestamp must be.
"""

from hashlib import sha256

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, utils

from yubihsm_simulator import keys
from yubihsm_simulator.commands.call import Call
from yubihsm_simulator.definitions import Algorithm, Capability, DeviceError, ErrorCode, ObjectType
from yubihsm_simulator.frames import Fields

_SIGNATURES: dict[int, tuple[hashes.HashAlgorithm, bytes]] = {
    Algorithm.RSA_PKCS1_SHA1: (hashes.SHA1(), b"ssh-rsa"),  # noqa: S303
    Algorithm.RSA_PKCS1_SHA256: (hashes.SHA256(), b"rsa-sha2-256"),
    Algorithm.RSA_PKCS1_SHA512: (hashes.SHA512(), b"rsa-sha2-512"),
}
_TS_ALGORITHM, _TS_KEY, _CA_KEYS, _NOT_BEFORE, _NOT_AFTER, _PRINCIPALS = range(1, 7)


def sign_ssh_certificate(call: Call, fields: Fields) -> bytes:
    """Id, id of the template, algorithm u8, timestamp u32, its signature, request -> the certificate's last field.

    Raises DeviceError: SSH_CA_CONSTRAINT_VIOLATION where the template forbids it, INVALID_DATA for a template or a
    request that is none.
    """
    key_id, template_id, algorithm = fields.u16(), fields.u16(), fields.u8()
    key = call.find(key_id, ObjectType.ASYMMETRIC_KEY, Capability.SIGN_SSH_CERTIFICATE).rsa_key
    template = call.find(template_id, ObjectType.TEMPLATE, second=True)
    if algorithm not in _SIGNATURES:
        raise DeviceError(ErrorCode.INVALID_DATA)
    call.device.options.require(Algorithm(algorithm))
    try:
        constraints = _parse_template(template.value)
        timestamp_key = keys.rsa_public_key(constraints[_TS_KEY])
        timestamp, signature, request = fields.take(4), fields.take(timestamp_key.key_size // 8), fields.rest()
        principals = _principals(request)
    except (DeviceError, KeyError, ValueError):
        raise DeviceError(ErrorCode.INVALID_DATA) from None
    signed = sha256(sha256(request).digest() + timestamp).digest()
    try:
        timestamp_key.verify(signature, signed, padding.PKCS1v15(), utils.Prehashed(hashes.SHA256()))
    except InvalidSignature:
        raise DeviceError(ErrorCode.SSH_CA_CONSTRAINT_VIOLATION) from None
    ca_keys = constraints[_CA_KEYS]
    if (
        key_id.to_bytes(2, "big") not in {ca_keys[at : at + 2] for at in range(0, len(ca_keys), 2)}
        or not constraints[_NOT_BEFORE] <= timestamp <= constraints[_NOT_AFTER]
        or principals & set(constraints[_PRINCIPALS].split(b"\x00"))
    ):
        raise DeviceError(ErrorCode.SSH_CA_CONSTRAINT_VIOLATION)
    digest, name = _SIGNATURES[algorithm]
    return _string(_string(name) + _string(key.sign(request, padding.PKCS1v15(), digest)))


def _parse_template(template: bytes) -> dict[int, bytes]:
    """Raises DeviceError or KeyError for a template that is incomplete."""
    fields = Fields(template)
    values: dict[int, bytes] = {}
    while len(fields):
        tag = fields.u8()
        values[tag] = fields.take(fields.u16())
    return {tag: values[tag] for tag in range(_TS_ALGORITHM, _PRINCIPALS + 1)}


def _principals(request: bytes) -> set[bytes]:
    """The valid principals of a request for an RSA key (PROTOCOL.certkeys). Raises DeviceError."""
    fields = Fields(request)
    for _ in ("type", "nonce", "e", "n"):
        fields.take(fields.u32())
    fields.u64()  # serial
    fields.u32()  # user or host
    fields.take(fields.u32())  # key id
    packed = Fields(fields.take(fields.u32()))
    principals = set()
    while len(packed):
        principals.add(packed.take(packed.u32()))
    return principals


def _string(data: bytes) -> bytes:
    """RFC 4251 section 5."""
    return len(data).to_bytes(4, "big") + data
