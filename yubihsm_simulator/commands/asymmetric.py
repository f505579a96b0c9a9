"""Commands with asymmetric keys: put, generate, sign, decrypt, agree, attest."""

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, utils

from yubihsm_simulator import keys, rsa_padding
from yubihsm_simulator.commands.call import Call, read_header, require
from yubihsm_simulator.definitions import Algorithm, Capability, DeviceError, ErrorCode, ObjectType, Origin
from yubihsm_simulator.ed25519 import Ed25519Key
from yubihsm_simulator.frames import Fields
from yubihsm_simulator.wrapping import MGF1_HASHES, OAEP_HASHES

_HASHES: dict[int, hashes.HashAlgorithm] = {
    20: hashes.SHA1(),  # noqa: S303
    28: hashes.SHA224(),
    32: hashes.SHA256(),
    48: hashes.SHA384(),
    64: hashes.SHA512(),
}
"""A hash by its length in bytes."""

_PKCS1 = {
    20: Algorithm.RSA_PKCS1_SHA1,
    32: Algorithm.RSA_PKCS1_SHA256,
    48: Algorithm.RSA_PKCS1_SHA384,
    64: Algorithm.RSA_PKCS1_SHA512,
}
_PSS = {
    20: Algorithm.RSA_PSS_SHA1,
    32: Algorithm.RSA_PSS_SHA256,
    48: Algorithm.RSA_PSS_SHA384,
    64: Algorithm.RSA_PSS_SHA512,
}
_ECDSA = {
    20: Algorithm.EC_ECDSA_SHA1,
    32: Algorithm.EC_ECDSA_SHA256,
    48: Algorithm.EC_ECDSA_SHA384,
    64: Algorithm.EC_ECDSA_SHA512,
}
_P521_BYTES = 66
_PKCS1_OVERHEAD_BYTES = 11  # RFC 8017 section 9.2


def put(call: Call, fields: Fields) -> bytes:
    """Header, key (see `keys`) -> id."""
    new = read_header(fields, ObjectType.ASYMMETRIC_KEY, Origin.IMPORTED)
    new.value = fields.rest()
    if new.algorithm is Algorithm.EC_ED25519 and len(new.value) != 32:
        raise DeviceError(ErrorCode.WRONG_LENGTH)
    return call.create(new)


def generate(call: Call, fields: Fields) -> bytes:
    """Header -> id."""
    new = read_header(fields, ObjectType.ASYMMETRIC_KEY, Origin.GENERATED)
    fields.end()
    return call.generate(new)


def sign_pkcs1(call: Call, fields: Fields) -> bytes:
    """Id, data -> signature. Data as long as a hash is a hash; other data is padded as it is."""
    key = call.find(fields.u16(), ObjectType.ASYMMETRIC_KEY, Capability.SIGN_PKCS).rsa_key
    data = fields.rest(least=1)
    if len(data) in _PKCS1:
        call.device.options.require(_PKCS1[len(data)])
        return key.sign(data, padding.PKCS1v15(), utils.Prehashed(_HASHES[len(data)]))
    if len(data) > key.key_size // 8 - _PKCS1_OVERHEAD_BYTES:
        raise DeviceError(ErrorCode.WRONG_LENGTH)
    return key.sign(data, padding.PKCS1v15(), utils.NoDigestInfo())


def sign_pss(call: Call, fields: Fields) -> bytes:
    """Id, MGF1's algorithm u8, bytes of salt u16, hash -> signature."""
    key = call.find(fields.u16(), ObjectType.ASYMMETRIC_KEY, Capability.SIGN_PSS).rsa_key
    mgf, salt, digest = fields.u8(), fields.u16(), fields.rest()
    if len(digest) not in _PSS:
        raise DeviceError(ErrorCode.WRONG_LENGTH)
    if mgf not in MGF1_HASHES or salt > key.key_size // 8 - len(digest) - 2:  # RFC 8017 section 9.1.1
        raise DeviceError(ErrorCode.INVALID_DATA)
    call.device.options.require(_PSS[len(digest)], Algorithm(mgf))
    pss = padding.PSS(padding.MGF1(MGF1_HASHES[mgf]), salt)
    return key.sign(digest, pss, utils.Prehashed(_HASHES[len(digest)]))


def sign_ecdsa(call: Call, fields: Fields) -> bytes:
    """Id, hash (20, 28, 32, 48, 64 bytes, or 66: a shorter one with zeros before it) -> signature, DER."""
    key = call.find(fields.u16(), ObjectType.ASYMMETRIC_KEY, Capability.SIGN_ECDSA).ec_key
    digest = fields.rest()
    if len(digest) == _P521_BYTES and key.key_size == 521 and not any(digest[:2]):
        digest = digest[2:]
    if len(digest) not in _HASHES:
        raise DeviceError(ErrorCode.INVALID_DATA)
    if len(digest) in _ECDSA:
        call.device.options.require(_ECDSA[len(digest)])
    return key.sign(digest, ec.ECDSA(utils.Prehashed(_HASHES[len(digest)])))


def sign_eddsa(call: Call, fields: Fields) -> bytes:
    """Id, message -> signature, 64 bytes."""
    key = call.find(fields.u16(), ObjectType.ASYMMETRIC_KEY, Capability.SIGN_EDDSA).ed25519_key
    return key.sign(fields.rest())


def decrypt_pkcs1(call: Call, fields: Fields) -> bytes:
    """Id, ciphertext as long as the modulus -> plaintext."""
    key = call.find(fields.u16(), ObjectType.ASYMMETRIC_KEY, Capability.DECRYPT_PKCS).rsa_key
    call.device.options.require(Algorithm.RSA_PKCS1_DECRYPT)
    ciphertext = fields.take(key.key_size // 8)
    fields.end()
    return rsa_padding.pkcs1_decrypt(key, ciphertext)


def decrypt_oaep(call: Call, fields: Fields) -> bytes:
    """Id, MGF1's algorithm u8, ciphertext, the label's hash -> plaintext; the hash's length says which it is."""
    key = call.find(fields.u16(), ObjectType.ASYMMETRIC_KEY, Capability.DECRYPT_OAEP).rsa_key
    mgf, ciphertext, label_hash = fields.u8(), fields.take(key.key_size // 8), fields.rest()
    by_length = {digest.digest_size: (number, digest) for number, digest in OAEP_HASHES.items()}
    if len(label_hash) not in by_length:
        raise DeviceError(ErrorCode.WRONG_LENGTH)
    if mgf not in MGF1_HASHES:
        raise DeviceError(ErrorCode.INVALID_DATA)
    number, digest = by_length[len(label_hash)]
    call.device.options.require(Algorithm(number), Algorithm(mgf))
    return rsa_padding.oaep_decrypt(key, ciphertext, label_hash, digest, MGF1_HASHES[mgf])


def derive_ecdh(call: Call, fields: Fields) -> bytes:
    """Id, uncompressed point -> x of the shared point."""
    key = call.find(fields.u16(), ObjectType.ASYMMETRIC_KEY, Capability.DERIVE_ECDH).ec_key
    call.device.options.require(Algorithm.EC_ECDH)
    encoded = fields.take(1 + 2 * keys.scalar_bytes(key.curve))
    fields.end()
    try:
        return key.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(key.curve, encoded))
    except ValueError:
        raise DeviceError(ErrorCode.INVALID_DATA) from None


def sign_attestation_certificate(call: Call, fields: Fields) -> bytes:
    """Id, id of the attesting key (0: the device's) -> certificate, DER."""
    object_id, attester_id = fields.u16(), fields.u16()
    fields.end()
    stored = call.find(object_id, ObjectType.ASYMMETRIC_KEY)
    if attester_id == 0:
        call.second = 0
        return call.device.attestation.by_device(stored)
    attester = call.find(attester_id, ObjectType.ASYMMETRIC_KEY, second=True)
    require(attester, Capability.SIGN_ATTESTATION_CERTIFICATE)
    key = attester.private_key
    template = call.find(attester_id, ObjectType.OPAQUE, second=True)
    if template.algorithm is not Algorithm.OPAQUE_X509_CERTIFICATE or isinstance(key, Ed25519Key):
        raise DeviceError(ErrorCode.INVALID_DATA)
    return call.device.attestation.sign(stored, key, template.value)
