"""CMS SignedData with one signer (RFC 5652): kernel modules, SWUpdate, HAB, Authenticode, capsules.

No key is needed here. A `Message` says how the message shall look, and the signature is made in three steps:

    message = Message(certificate, RsaPkcs1v15(Hash.SHA256), attributes=Attributes(datetime.now(UTC)))
    data = sha256(content).digest()
    signature = await key.sign(message.scheme, message.to_sign(data))
    der = message.assemble(data, signature)
    verify(der, message, data)

`data` is the digest of the content by `message.hash`. Ed25519 without attributes signs the content itself, so there
`data` is the content.
"""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import asn1crypto.cms
import asn1crypto.parser
from asn1crypto.core import Void
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from signers.formats import der
from tokens.errors import KeyUnsuited, SignatureMismatch
from tokens.provider import PublicKey
from tokens.schemes import Ecdsa, Ed25519, Hash, RsaPkcs1v15, RsaPss, Scheme
from tokens.verify import ecdsa_der, ecdsa_raw
from tokens.verify import verify as verify_signature

ID_DATA = "1.2.840.113549.1.7.1"
ID_SIGNED_DATA = "1.2.840.113549.1.7.2"

# RFC 5652, section 11
_CONTENT_TYPE = "1.2.840.113549.1.9.3"
_MESSAGE_DIGEST = "1.2.840.113549.1.9.4"
_SIGNING_TIME = "1.2.840.113549.1.9.5"

_RSA_ENCRYPTION = "1.2.840.113549.1.1.1"  # RFC 3370, section 3.2
_MGF1 = "1.2.840.113549.1.1.8"  # RFC 4055, section 2.2
_RSASSA_PSS = "1.2.840.113549.1.1.10"  # RFC 4055, section 3.1
_ED25519 = "1.3.101.112"  # RFC 8410, section 3

# RFC 5754, section 2; SHA-3: RFC 8702 has the SHAKEs, NIST's registry of the same arc the rest
_DIGESTS = {
    Hash.SHA224: "2.16.840.1.101.3.4.2.4",
    Hash.SHA256: "2.16.840.1.101.3.4.2.1",
    Hash.SHA384: "2.16.840.1.101.3.4.2.2",
    Hash.SHA512: "2.16.840.1.101.3.4.2.3",
    Hash.SHA3_224: "2.16.840.1.101.3.4.2.7",
    Hash.SHA3_256: "2.16.840.1.101.3.4.2.8",
    Hash.SHA3_384: "2.16.840.1.101.3.4.2.9",
    Hash.SHA3_512: "2.16.840.1.101.3.4.2.10",
}

# RFC 5758, section 3.2; SHA-3: NIST's registry
_ECDSA = {
    Hash.SHA224: "1.2.840.10045.4.3.1",
    Hash.SHA256: "1.2.840.10045.4.3.2",
    Hash.SHA384: "1.2.840.10045.4.3.3",
    Hash.SHA512: "1.2.840.10045.4.3.4",
    Hash.SHA3_224: "2.16.840.1.101.3.4.3.9",
    Hash.SHA3_256: "2.16.840.1.101.3.4.3.10",
    Hash.SHA3_384: "2.16.840.1.101.3.4.3.11",
    Hash.SHA3_512: "2.16.840.1.101.3.4.3.12",
}


@dataclass(frozen=True, slots=True)
class Attributes:
    """The signed attributes contentType and messageDigest, and signingTime where `signing_time` is given."""

    signing_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """How a SignedData message shall look.

    Arguments:
        certificate: the signer's; its issuer and serial number, or its key identifier, name the signer.
        scheme: how it signs.
        attributes: None signs the content itself, without signed attributes.
        embed: the certificates to put into the message.
        content_type: eContentType, dotted.
        content: None for a detached signature, else the content to put into the message.
        by_key_id: name the signer by the certificate's subject key identifier.
        pkcs7: PKCS #7 1.5 (RFC 2315) as Authenticode has it: version 1, and `content` is one DER encoding that
            stands for itself instead of being wrapped in an OCTET STRING. The digest is then that of its contents,
            without tag and length (RFC 2315, section 9.3).
    """

    certificate: x509.Certificate
    scheme: Scheme
    attributes: Attributes | None = None
    embed: tuple[x509.Certificate, ...] = ()
    content_type: str = ID_DATA
    content: bytes | None = None
    by_key_id: bool = False
    pkcs7: bool = False

    @property
    def hash(self) -> Hash:
        """The digest algorithm: the scheme's; SHA-512 for Ed25519 (RFC 8419, section 2.3)."""
        return Hash.SHA512 if isinstance(self.scheme, Ed25519) else self.scheme.hash

    def to_sign(self, data: bytes) -> bytes:
        """What `SigningKey.sign` takes together with the scheme: a digest, or a message for Ed25519."""
        if self.attributes is None:
            return data
        attributes = self._attributes(self.attributes, data)
        return attributes if isinstance(self.scheme, Ed25519) else _digest(self.hash, attributes)

    def assemble(self, data: bytes, signature: bytes) -> bytes:
        """The message: DER ContentInfo (RFC 5652, section 3) around SignedData (section 5.1).

        `signature` is raw, as `SigningKey.sign` returns it; `data` is what `to_sign` got.

        Raises KeyUnsuited where the certificate holds no key of a type that the scheme signs with.
        """
        return content_info(self.signed_data(data, signature))

    def signed_data(self, data: bytes, signature: bytes) -> bytes:
        """The SignedData alone, as EFI variables have it; see `assemble`."""
        digest_algorithm = der.sequence(der.oid(_DIGESTS[self.hash]))
        signer_info = der.sequence(
            der.integer(3 if self.by_key_id else 1),
            self._signer_identifier(),
            digest_algorithm,
            # the attributes are signed as SET OF and sent under [0] IMPLICIT (RFC 5652, section 5.4)
            b"" if self.attributes is None else der.implicit(0, self._attributes(self.attributes, data)),
            signature_algorithm(self.scheme),
            der.octet_string(self._signature_value(signature)),
        )
        certificates = [_certificate_der(certificate) for certificate in self.embed]
        return der.sequence(
            der.integer(self._version()),
            der.set_of(digest_algorithm),
            self._encapsulated(),
            der.implicit(0, der.set_of(*certificates)) if certificates else b"",
            der.set_of(signer_info),
        )

    def _version(self) -> int:
        # RFC 5652, section 5.1: 3 where the signer is named by key identifier or the content is not id-data
        if self.pkcs7:
            return 1
        return 3 if self.by_key_id or self.content_type != ID_DATA else 1

    def _encapsulated(self) -> bytes:
        if self.content is None:
            return der.sequence(der.oid(self.content_type))
        content = self.content if self.pkcs7 else der.octet_string(self.content)
        return der.sequence(der.oid(self.content_type), der.explicit(0, content))

    def _attributes(self, attributes: Attributes, digest: bytes) -> bytes:
        """SignedAttributes as they are signed: DER SET OF Attribute (RFC 5652, section 5.3)."""
        members = [
            _attribute(_CONTENT_TYPE, der.oid(self.content_type)),
            _attribute(_MESSAGE_DIGEST, der.octet_string(digest)),
        ]
        if attributes.signing_time is not None:
            members.append(_attribute(_SIGNING_TIME, der.time(attributes.signing_time)))
        return der.set_of(*members)

    def _signer_identifier(self) -> bytes:
        if self.by_key_id:
            return der.implicit(0, der.octet_string(_key_identifier(self.certificate)))
        # copied, not rebuilt: verifiers compare the issuer byte for byte
        issuer = self.certificate.issuer.public_bytes()
        return der.sequence(issuer, der.integer(self.certificate.serial_number))

    def _signature_value(self, signature: bytes) -> bytes:
        if not isinstance(self.scheme, Ecdsa):
            return signature
        public_key = certified_key(self.certificate)
        if not isinstance(public_key, ec.EllipticCurvePublicKey):
            raise KeyUnsuited("The certificate holds no EC key.", "Grant the certificate that belongs to the key.")
        return ecdsa_der(signature, public_key)


def content_info(signed_data: bytes) -> bytes:
    """DER ContentInfo (RFC 5652, section 3) around SignedData."""
    return der.sequence(der.oid(ID_SIGNED_DATA), der.explicit(0, signed_data))


def certified_key(certificate: x509.Certificate) -> PublicKey:
    """The public key in a certificate. Raises KeyUnsuited where it is of a type that hsmsign does not sign with."""
    public_key = certificate.public_key()
    if not isinstance(public_key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey):
        raise KeyUnsuited(
            "The certificate's key is neither RSA nor EC nor Ed25519.",
            "Grant a certificate for a key of one of these types.",
        )
    return public_key


def signature_algorithm(scheme: Scheme) -> bytes:
    """The AlgorithmIdentifier of a scheme as CMS has it, equal to what OpenSSL 3 writes."""
    match scheme:
        case RsaPkcs1v15():
            return der.sequence(der.oid(_RSA_ENCRYPTION), der.NULL)  # RFC 3370, section 3.2
        case RsaPss():
            return der.sequence(der.oid(_RSASSA_PSS), _pss_parameters(scheme))
        case Ecdsa():
            return der.sequence(der.oid(_ECDSA[scheme.hash]))  # RFC 5754, section 3.3
        case Ed25519():
            return der.sequence(der.oid(_ED25519))  # RFC 8419, section 2.1


def digest_algorithm(hash_: Hash) -> bytes:
    """The AlgorithmIdentifier of a hash with NULL parameters: in CMS itself it stands without (RFC 5754, section 2)."""
    return der.sequence(der.oid(_DIGESTS[hash_]), der.NULL)


def _pss_parameters(scheme: RsaPss) -> bytes:
    # RSASSA-PSS-params (RFC 4055, section 3.1): digests with NULL parameters (section 2.1); a field with its default
    # value (salt 20) is left out
    digest = digest_algorithm(scheme.hash)
    return der.sequence(
        der.explicit(0, digest),
        der.explicit(1, der.sequence(der.oid(_MGF1), digest)),
        b"" if scheme.salt_length == 20 else der.explicit(2, der.integer(scheme.salt_length)),
    )


def _attribute(type_: str, value: bytes) -> bytes:
    return der.sequence(der.oid(type_), der.set_of(value))


def _key_identifier(certificate: x509.Certificate) -> bytes:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:
        raise KeyUnsuited(
            "The certificate has no subject key identifier.",
            "Issue it with the extension, or name the signer by issuer and serial number.",
        ) from None
    return extension.value.digest


def _certificate_der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _digest(hash_: Hash, data: bytes) -> bytes:
    return hashlib.new(hash_.hashlib_name, data).digest()


def verify(encoded: bytes, message: Message, data: bytes) -> None:
    """Checks a finished message, parsed anew, before it is released.

    It must be what `message` says (content, signer, algorithms, attributes, certificates), and its signature must be
    one of the certificate's key over `data`. Trust in the certificate is the affair of who receives the message.

    Raises SignatureMismatch.
    """
    try:
        info = asn1crypto.cms.ContentInfo.load(encoded, strict=True)
        _require(info["content_type"].dotted == ID_SIGNED_DATA, "it is no SignedData")
        signed = info["content"]
        _check_content(signed["encap_content_info"], message)
        embedded = {certificate.dump() for certificate in signed["certificates"]}
        _require(embedded == {_certificate_der(each) for each in message.embed}, "it has other certificates")
        _require(len(signed["signer_infos"]) == 1, "it has not exactly one signer")
        signature = _check_signer(signed["signer_infos"][0], message, data)
        # versions, unsigned attributes, the encoding itself: nothing may stand there that was not looked at
        _require(encoded == message.assemble(data, signature), "it is encoded otherwise")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _bad(f"it cannot be parsed ({error})") from None


def described(encoded: bytes, certificate: x509.Certificate) -> Message:
    """How a detached message that another program made says it looks; made for `verify`, which is still to be called.

    Hash, scheme and signing time are the message's own, and whether it has signed attributes at all. What `verify`
    holds against it beyond these: that `certificate` is named by issuer and serial number, and no more is in it.

    Raises SignatureMismatch.
    """
    try:
        info = asn1crypto.cms.ContentInfo.load(encoded, strict=True)
        _require(info["content_type"].dotted == ID_SIGNED_DATA, "it is no SignedData")
        (signer,) = info["content"]["signer_infos"]
        digest = _dotted(signer["digest_algorithm"])
        scheme = next(
            (_scheme(signer["signature_algorithm"], each) for each, oid in _DIGESTS.items() if oid == digest), None
        )
        if scheme is None:
            raise _bad("it has an unknown signature scheme")
        attributes = signer["signed_attrs"]
        if isinstance(attributes, Void):
            return Message(certificate, scheme)
        times = [each["values"][0].native for each in attributes if each["type"].dotted == _SIGNING_TIME]
        return Message(certificate, scheme, Attributes(times[0].astimezone(UTC) if times else None))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise _bad(f"it cannot be parsed ({error})") from None


def _check_content(info: Any, message: Message) -> None:
    _require(info["content_type"].dotted == message.content_type, "it has another content type")
    content = info["content"]
    if isinstance(content, Void):
        found = None
    elif message.pkcs7:
        # the [0] EXPLICIT tag's contents are the encoding
        found = asn1crypto.parser.parse(content.dump(), strict=True)[4]
    else:
        found = bytes(content)
    _require(found == message.content, "it has another content")


def _check_signer(signer: Any, message: Message, data: bytes) -> bytes:
    """Returns the raw signature, verified."""
    key = certified_key(message.certificate)
    _require(_names(signer["sid"], message), "it names another signer")
    _require(_dotted(signer["digest_algorithm"]) == _DIGESTS[message.hash], "it has another digest algorithm")
    _require(_scheme(signer["signature_algorithm"], message.hash) == message.scheme, "it has another signature scheme")
    attributes = signer["signed_attrs"]
    signed = data
    if message.attributes is None:
        _require(isinstance(attributes, Void), "it has signed attributes")
    else:
        _require(_values(attributes, _CONTENT_TYPE) == [der.oid(message.content_type)], "it has another contentType")
        _require(_values(attributes, _MESSAGE_DIGEST) == [der.octet_string(data)], "it has another messageDigest")
        signed = attributes.untag().dump()
        if not isinstance(message.scheme, Ed25519):
            signed = _digest(message.hash, signed)
    signature = signer["signature"].native
    if isinstance(key, ec.EllipticCurvePublicKey):
        signature = ecdsa_raw(signature, key)
    verify_signature(key, message.scheme, signed, signature)
    return bytes(signature)


def _names(identifier: Any, message: Message) -> bool:
    if message.by_key_id:
        return bool(identifier.name == "subject_key_identifier") and identifier.native == _key_identifier(
            message.certificate
        )
    named = identifier.chosen
    return (
        bool(identifier.name == "issuer_and_serial_number")
        and named["issuer"].dump() == message.certificate.issuer.public_bytes()
        and named["serial_number"].native == message.certificate.serial_number
    )


def _scheme(algorithm: Any, digest: Hash) -> Scheme | None:
    """The scheme that an AlgorithmIdentifier names; None where it is none of ours."""
    match _dotted(algorithm):
        case oid if oid == _RSA_ENCRYPTION:
            return RsaPkcs1v15(digest)
        case oid if oid == _ED25519:
            return Ed25519()
        case oid if oid == _RSASSA_PSS:
            parameters = algorithm["parameters"]
            mask = parameters["mask_gen_algorithm"]
            hashes = {_dotted(parameters["hash_algorithm"]), _dotted(mask["parameters"])}
            if hashes == {_DIGESTS[digest]} and _dotted(mask) == _MGF1:
                return RsaPss(digest, parameters["salt_length"].native)
        case oid if oid == _ECDSA[digest]:
            return Ecdsa(digest)
    return None


def _values(attributes: Any, type_: str) -> list[bytes]:
    """The encoded values of all signed attributes of a type."""
    return [value.dump() for each in attributes if each["type"].dotted == type_ for value in each["values"]]


def _dotted(algorithm: Any) -> str:
    return str(algorithm["algorithm"].dotted)


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise _bad(fault)


def _bad(fault: str) -> SignatureMismatch:
    return SignatureMismatch(
        f"The finished CMS message is not what was asked for: {fault}.",
        "Report this with the request id: the message was not released.",
    )
