"""The objects of a lent token: of each key a private key, a public key and its certificates, and nothing else.

Attributes are those of PKCS#11 v2.40, section 4; constants have its names.
"""

from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tokens.errors import KeyUnsuited
from tokens.lending.wire import Value
from tokens.provider import PublicKey, SigningKey

CKO_CERTIFICATE, CKO_PUBLIC_KEY, CKO_PRIVATE_KEY = 1, 2, 3
CKK_RSA, CKK_EC = 0x00, 0x03
CKC_X_509 = 0

CKA_CLASS, CKA_TOKEN, CKA_PRIVATE, CKA_LABEL = 0x00, 0x01, 0x02, 0x03
CKA_VALUE, CKA_CERTIFICATE_TYPE, CKA_ISSUER, CKA_SERIAL_NUMBER = 0x11, 0x80, 0x81, 0x82
CKA_TRUSTED, CKA_KEY_TYPE, CKA_SUBJECT, CKA_ID = 0x86, 0x100, 0x101, 0x102
CKA_SENSITIVE, CKA_ENCRYPT, CKA_DECRYPT, CKA_WRAP, CKA_UNWRAP, CKA_SIGN = 0x103, 0x104, 0x105, 0x106, 0x107, 0x108
CKA_SIGN_RECOVER, CKA_VERIFY, CKA_VERIFY_RECOVER, CKA_DERIVE = 0x109, 0x10A, 0x10B, 0x10C
CKA_MODULUS, CKA_MODULUS_BITS, CKA_PUBLIC_EXPONENT = 0x120, 0x121, 0x122
CKA_PRIVATE_EXPONENT, CKA_PRIME_1, CKA_COEFFICIENT = 0x123, 0x124, 0x128
CKA_PUBLIC_KEY_INFO, CKA_EXTRACTABLE, CKA_LOCAL, CKA_NEVER_EXTRACTABLE, CKA_ALWAYS_SENSITIVE = (
    0x129, 0x162, 0x163, 0x164, 0x165,
)  # fmt: skip
CKA_MODIFIABLE, CKA_EC_PARAMS, CKA_EC_POINT, CKA_ALWAYS_AUTHENTICATE = 0x170, 0x180, 0x181, 0x202

SECRET_ATTRIBUTES = frozenset({CKA_VALUE, *range(CKA_PRIVATE_EXPONENT, CKA_COEFFICIENT + 1)})
"""What a private key keeps to itself: CKR_ATTRIBUTE_SENSITIVE."""

_PRIVATE_MAY_NOT = (
    CKA_DECRYPT, CKA_UNWRAP, CKA_SIGN_RECOVER, CKA_DERIVE, CKA_EXTRACTABLE, CKA_LOCAL, CKA_ALWAYS_AUTHENTICATE,
)  # fmt: skip
_PUBLIC_MAY_NOT = (CKA_ENCRYPT, CKA_WRAP, CKA_VERIFY_RECOVER, CKA_DERIVE, CKA_LOCAL, CKA_TRUSTED)

# DER OBJECT IDENTIFIERs of the curves (RFC 5480, section 2.1.1.1; SEC 2, appendix A.2; RFC 5639, section 4.1)
_CURVES = {
    "secp256r1": bytes.fromhex("06082a8648ce3d030107"),
    "secp384r1": bytes.fromhex("06052b81040022"),
    "secp521r1": bytes.fromhex("06052b81040023"),
    "secp256k1": bytes.fromhex("06052b8104000a"),
    "brainpoolP256r1": bytes.fromhex("06092b2403030208010107"),
    "brainpoolP384r1": bytes.fromhex("06092b240303020801010b"),
    "brainpoolP512r1": bytes.fromhex("06092b240303020801010d"),
}


@dataclass(frozen=True, slots=True)
class LentKey:
    """A key that a tool may sign with.

    Arguments:
        label: CKA_LABEL of its objects.
        id: CKA_ID of its objects; no other lent key may have it, since tools pick keys by it.
        key: signs.
    """

    label: str
    id: bytes
    key: SigningKey


@dataclass(frozen=True, slots=True)
class TokenObject:
    """One object: its attributes, and the key where it is a private key."""

    attributes: dict[int, Value]
    key: SigningKey | None = None

    def matches(self, template: list[tuple[int, Value | None]]) -> bool:
        """Whether it has each of these attributes, and with that value."""
        return all(
            type_ in self.attributes and type(self.attributes[type_]) is type(value) and self.attributes[type_] == value
            for type_, value in template
        )


def objects_of(lent: LentKey) -> list[TokenObject]:
    """The objects of one key. Raises KeyUnsuited where the protocol has no way for keys of its type (Ed25519)."""
    public_key = lent.key.public_key
    common: dict[int, Value] = {
        CKA_TOKEN: True, CKA_LABEL: lent.label.encode(), CKA_ID: lent.id, CKA_MODIFIABLE: False,
    }  # fmt: skip
    numbers = _numbers(public_key)
    subject = lent.key.certificates[0].subject.public_bytes() if lent.key.certificates else b""
    private: dict[int, Value] = {
        **common, **numbers,
        CKA_CLASS: CKO_PRIVATE_KEY, CKA_PRIVATE: True, CKA_SUBJECT: subject, CKA_SIGN: True, CKA_SENSITIVE: True,
        CKA_ALWAYS_SENSITIVE: True, CKA_NEVER_EXTRACTABLE: True,
        **dict.fromkeys(_PRIVATE_MAY_NOT, False),
    }  # fmt: skip
    private.pop(CKA_EC_POINT, None)  # a private key does not have it (PKCS#11 v2.40 current mechanisms, 2.3.4)
    private.pop(CKA_MODULUS_BITS, None)
    public: dict[int, Value] = {
        **common, **numbers,
        CKA_CLASS: CKO_PUBLIC_KEY, CKA_PRIVATE: False, CKA_SUBJECT: subject, CKA_VERIFY: True,
        CKA_PUBLIC_KEY_INFO: _spki(public_key),
        **dict.fromkeys(_PUBLIC_MAY_NOT, False),
    }  # fmt: skip
    certificates = [TokenObject({**common, **_certificate(each)}) for each in lent.key.certificates[:1]]
    return [TokenObject(private, lent.key), TokenObject(public), *certificates]


def _numbers(public_key: PublicKey) -> dict[int, Value]:
    match public_key:
        case rsa.RSAPublicKey():
            numbers = public_key.public_numbers()
            return {
                CKA_KEY_TYPE: CKK_RSA,
                CKA_MODULUS: _unsigned(numbers.n),
                CKA_MODULUS_BITS: public_key.key_size,
                CKA_PUBLIC_EXPONENT: _unsigned(numbers.e),
            }
        case ec.EllipticCurvePublicKey() if public_key.curve.name in _CURVES:
            encoding, form = serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
            point = public_key.public_bytes(encoding, form)
            length = bytes([len(point)]) if len(point) < 0x80 else bytes([0x81, len(point)])
            # CKA_EC_POINT is a DER OCTET STRING (PKCS#11 v2.40 current mechanisms, section 2.3.3)
            octets = b"\x04" + length + point
            return {CKA_KEY_TYPE: CKK_EC, CKA_EC_PARAMS: _CURVES[public_key.curve.name], CKA_EC_POINT: octets}
        case _:
            raise KeyUnsuited(
                "Only RSA and ECDSA keys can be lent to a tool.",
                "Grant a key of those types, or use a signer that needs no tool.",
            )


def _certificate(certificate: x509.Certificate) -> dict[int, Value]:
    serial = certificate.serial_number
    octets = serial.to_bytes(serial.bit_length() // 8 + 1, "big")
    return {
        CKA_CLASS: CKO_CERTIFICATE,
        CKA_PRIVATE: False,
        CKA_TRUSTED: False,
        CKA_CERTIFICATE_TYPE: CKC_X_509,
        CKA_SUBJECT: certificate.subject.public_bytes(),
        CKA_ISSUER: certificate.issuer.public_bytes(),
        # the DER INTEGER (PKCS#11 v2.40, section 4.6.3); a serial number has 20 octets at most (RFC 5280, 4.1.2.2)
        CKA_SERIAL_NUMBER: b"\x02" + bytes([len(octets)]) + octets,
        CKA_VALUE: certificate.public_bytes(serialization.Encoding.DER),
    }


def _spki(public_key: PublicKey) -> bytes:
    return public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _unsigned(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 7) // 8, "big")
