"""A key with its certificate, as it signs CMS messages."""

from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from signers.formats import cms
from tokens.errors import KeyMismatch, KeyUnusable
from tokens.provider import PublicKey, SigningKey
from tokens.schemes import Ecdsa, Hash, RsaPkcs1v15, Scheme
from tokens.verify import check_suited


def scheme_of(public_key: PublicKey, hash_: Hash = Hash.SHA256) -> Scheme:
    """How a key of this type signs: PKCS #1 v1.5, or ECDSA. Raises KeyUnsuited where it can neither."""
    scheme = Ecdsa(hash_) if isinstance(public_key, ec.EllipticCurvePublicKey) else RsaPkcs1v15(hash_)
    check_suited(public_key, scheme)
    return scheme


def certificate_of(key: SigningKey) -> x509.Certificate:
    """The key's own certificate.

    Raises KeyUnusable where it has none, KeyMismatch where that is another key's.
    """
    if not key.certificates:
        raise KeyUnusable(
            "A CMS message needs the key's certificate, and there is none.",
            "Name it as the grant's `certificate`, or store it on the token under the key's CKA_ID.",
        )
    certificate = key.certificates[0]
    if cms.certified_key(certificate) != key.public_key:
        raise KeyMismatch(
            "The certificate is for another key.", "Put the key's own certificate first in the grant's `certificate`."
        )
    return certificate


def message_by(key: SigningKey) -> cms.Message:
    """A detached message of this key, with SHA-256, the time and all of the key's certificates.

    It is what `openssl cms -sign -binary -nosmimecap` writes; `dataclasses.replace` makes others of it.

    Raises KeyUnsuited, and what `certificate_of` raises.
    """
    scheme = scheme_of(key.public_key)
    return cms.Message(certificate_of(key), scheme, cms.Attributes(datetime.now(UTC)), embed=key.certificates)
