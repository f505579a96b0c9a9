"""SoftHSM tokens, and keys on them."""

import secrets
import subprocess
from typing import Any

import pkcs11
from asn1crypto.core import OctetString
from certificates import CURVES, DER, RSA_BITS, SPKI, UNENCRYPTED, PrivateKey, PublicKey
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from pkcs11 import Attribute, KeyType, MechanismFlag, ObjectClass
from pkcs11.util.ec import decode_ec_private_key, decode_ec_public_key, encode_named_curve_parameters
from pkcs11.util.rsa import decode_rsa_private_key, decode_rsa_public_key
from pkcs11.util.x509 import decode_x509_certificate

MODULE = "/usr/lib/softhsm/libsofthsm2.so"
PKCS1 = serialization.PublicFormat.PKCS1
TRADITIONAL = serialization.PrivateFormat.TraditionalOpenSSL

NEVER_LEAVES = {
    Attribute.TOKEN: True,
    Attribute.PRIVATE: True,
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
    Attribute.SIGN: True,
}
# X9.62 / RFC 8410 parameters of edwards25519 as PKCS#11 2.40 and SoftHSM know them: PrintableString "edwards25519"
EDWARDS25519 = b"\x13\x0cedwards25519"


def initialise(label: str, pin: str) -> None:
    """Makes a token. Its first user PIN is a passing one: softhsm2-util takes PINs only as arguments."""
    passing_pin, so_pin = secrets.token_hex(8), secrets.token_hex(8)
    options = ["--free", "--label", label, "--so-pin", so_pin, "--pin", passing_pin]
    subprocess.run(["softhsm2-util", "--init-token", *options], check=True, stdout=subprocess.DEVNULL)
    pkcs11.lib(MODULE).reinitialize()
    with log_in(label, passing_pin) as session:
        session.set_pin(passing_pin, pin)


def log_in(label: str, pin: str) -> pkcs11.Session:
    return pkcs11.lib(MODULE).get_token(token_label=label).open(rw=True, user_pin=pin)


def generate_on_token(session: pkcs11.Session, type_: str, attributes: dict[Attribute, Any]) -> PublicKey:
    templates: dict[str, Any] = {
        "store": True,
        "public_template": attributes,
        "private_template": NEVER_LEAVES | attributes,
        "capabilities": MechanismFlag.SIGN | MechanismFlag.VERIFY,
    }
    if type_ in RSA_BITS:
        public, _ = session.generate_keypair(KeyType.RSA, RSA_BITS[type_], **templates)
        modulus, exponent = (int.from_bytes(public[each]) for each in (Attribute.MODULUS, Attribute.PUBLIC_EXPONENT))
        return rsa.RSAPublicNumbers(exponent, modulus).public_key()
    if type_ in CURVES:
        parameters = {Attribute.EC_PARAMS: encode_named_curve_parameters(CURVES[type_].name)}
        public, _ = session.create_domain_parameters(KeyType.EC, parameters, local=True).generate_keypair(**templates)
        return ec.EllipticCurvePublicKey.from_encoded_point(CURVES[type_], octets(public[Attribute.EC_POINT]))
    domain = session.create_domain_parameters(KeyType.EC_EDWARDS, {Attribute.EC_PARAMS: EDWARDS25519}, local=True)
    public, _ = domain.generate_keypair(**templates)
    return ed25519.Ed25519PublicKey.from_public_bytes(octets(public[Attribute.EC_POINT]))


def import_key(session: pkcs11.Session, key: PrivateKey, attributes: dict[Attribute, Any]) -> None:
    match key:
        case rsa.RSAPrivateKey():
            private = decode_rsa_private_key(key.private_bytes(DER, TRADITIONAL, UNENCRYPTED), MechanismFlag.SIGN)
            public = decode_rsa_public_key(key.public_key().public_bytes(DER, PKCS1), MechanismFlag.VERIFY)
        case ec.EllipticCurvePrivateKey():
            private = decode_ec_private_key(key.private_bytes(DER, TRADITIONAL, UNENCRYPTED))
            public = decode_ec_public_key(key.public_key().public_bytes(DER, SPKI))
        case ed25519.Ed25519PrivateKey():
            edwards = {Attribute.KEY_TYPE: KeyType.EC_EDWARDS, Attribute.EC_PARAMS: EDWARDS25519}
            private = edwards | {Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.VALUE: key.private_bytes_raw()}
            point = OctetString(key.public_key().public_bytes_raw()).dump()
            public = edwards | {Attribute.CLASS: ObjectClass.PUBLIC_KEY, Attribute.EC_POINT: point}
    session.create_object(private | NEVER_LEAVES | attributes)
    session.create_object(public | {Attribute.TOKEN: True, Attribute.VERIFY: True} | attributes)


def import_secret(session: pkcs11.Session, value: bytes, type_: KeyType, attributes: dict[Attribute, Any]) -> None:
    """A symmetric key, for AES or (GENERIC_SECRET) HMAC."""
    uses = [Attribute.ENCRYPT, Attribute.DECRYPT] if type_ is KeyType.AES else [Attribute.SIGN]
    secret = NEVER_LEAVES | {Attribute.SIGN: False} | dict.fromkeys(uses, True) | attributes
    secret |= {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: type_, Attribute.VALUE: value}
    session.create_object(secret)


def import_certificate(
    session: pkcs11.Session, certificate: x509.Certificate, attributes: dict[Attribute, Any]
) -> None:
    session.create_object(decode_x509_certificate(certificate.public_bytes(DER)) | attributes | {Attribute.TOKEN: True})


def octets(der: bytes) -> bytes:
    """The content of a DER OCTET STRING."""
    return bytes(OctetString.load(der))
