"""Reads the certificates that go with a key."""

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from tokens.errors import KeyMismatch, KeyUnusable
from tokens.provider import PublicKey


def load_certificates(data: bytes) -> tuple[x509.Certificate, ...]:
    """The certificates of a file: PEM (any number, in order) or DER (one). Raises KeyUnusable."""
    try:
        if b"-----BEGIN " in data:
            return tuple(x509.load_pem_x509_certificates(data))
        return (x509.load_der_x509_certificate(data),)
    except ValueError:
        raise KeyUnusable("The certificate file holds no certificate.", "Use PEM, or one certificate in DER.") from None


def check_certifies(certificates: tuple[x509.Certificate, ...], public_key: PublicKey) -> None:
    """Raises KeyMismatch where the first certificate is for another key."""
    if certificates and not certifies(certificates[0], public_key):
        raise KeyMismatch(
            "The first certificate is not for the granted key but for another.",
            "Put the key's own certificate first, or grant the key that it belongs to.",
        )


def certifies(certificate: x509.Certificate, public_key: PublicKey) -> bool:
    """Whether the certificate is for this key."""
    try:
        return certificate.public_key() == public_key
    except (ValueError, UnsupportedAlgorithm):  # a key of a type that nobody here signs with
        return False
