"""A key with its certificate, as it signs CMS messages."""

from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric import ec

from signers.formats import cms
from tokens.errors import KeyMismatch, KeyUnusable
from tokens.provider import PublicKey, SigningKey
from tokens.schemes import Ecdsa, Hash, RsaPkcs1v15, Scheme
from tokens.verify import check_suited


def scheme_of(public_key: PublicKey) -> Scheme:
    """How a key of this type signs with SHA-256: PKCS #1 v1.5, or ECDSA. Raises KeyUnsuited where it can neither."""
    scheme = Ecdsa(Hash.SHA256) if isinstance(public_key, ec.EllipticCurvePublicKey) else RsaPkcs1v15(Hash.SHA256)
    check_suited(public_key, scheme)
    return scheme


def message_by(key: SigningKey) -> cms.Message:
    """A detached message of this key, with SHA-256, the time and all of the key's certificates.

    It is what `openssl cms -sign -binary -nosmimecap` writes; `dataclasses.replace` makes others of it.

    Raises KeyUnsuited, KeyUnusable where the key has no certificate, KeyMismatch where that is another key's.
    """
    scheme = scheme_of(key.public_key)
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
    return cms.Message(certificate, scheme, cms.Attributes(datetime.now(UTC)), embed=key.certificates)
