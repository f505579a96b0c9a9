"""Keys that are made outside of a token, and certificates."""

import datetime
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PURPOSES = {"emailProtection": ExtendedKeyUsageOID.EMAIL_PROTECTION, "codeSigning": ExtendedKeyUsageOID.CODE_SIGNING}
CURVES = {"p256": ec.SECP256R1(), "p384": ec.SECP384R1(), "p521": ec.SECP521R1()}
RSA_BITS = {"rsa2048": 2048, "rsa3072": 3072, "rsa4096": 4096}
VALIDITY = datetime.timedelta(days=3650)
CLOCK_SKEW = datetime.timedelta(hours=1)

CertificateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
PrivateKey = CertificateKey | ed25519.Ed25519PrivateKey
PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

PEM = serialization.Encoding.PEM
DER = serialization.Encoding.DER
SPKI = serialization.PublicFormat.SubjectPublicKeyInfo
PKCS8 = serialization.PrivateFormat.PKCS8
UNENCRYPTED = serialization.NoEncryption()


class Authority:
    """A certificate authority whose key is gone when the fixtures are made."""

    def __init__(self, subject: str, key: CertificateKey, issuer: "Authority | None" = None) -> None:
        self.subject = subject
        self.key = key
        issuer = issuer or self
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # keyCertSign, cRLSign
        self.certificate = (
            describe(subject, issuer.subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .sign(issuer.key, hashes.SHA256())
        )

    def issue(self, subject: str, public: PublicKey, purpose: str | None = None) -> x509.Certificate:
        # NXP's names carry the hash: SRK1_sha384_secp384r1_v3_usr
        p384 = isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name == "secp384r1"
        algorithm = hashes.SHA384() if p384 else hashes.SHA256()
        return describe_signer(subject, self.subject, public, purpose).sign(self.key, algorithm)


def self_sign(subject: str, key: CertificateKey, purpose: str | None) -> x509.Certificate:
    return describe_signer(subject, subject, key.public_key(), purpose).sign(key, hashes.SHA256())


def describe_signer(subject: str, issuer: str, public: PublicKey, purpose: str | None) -> x509.CertificateBuilder:
    """A certificate that may certify nothing, and where it has a purpose signs for that one."""
    builder = describe(subject, issuer, public)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    if purpose is None:
        return builder
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)  # digitalSignature
    extended = x509.ExtendedKeyUsage([PURPOSES[purpose]])
    return builder.add_extension(usage, critical=True).add_extension(extended, critical=False)


def describe(subject: str, issuer: str, public: PublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + VALIDITY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def generate(type_: str) -> PrivateKey:
    if type_ in RSA_BITS:
        return rsa.generate_private_key(65537, RSA_BITS[type_])
    if type_ in CURVES:
        return ec.generate_private_key(CURVES[type_])
    return ed25519.Ed25519PrivateKey.generate()


def write_certificate(path: Path, certificate: x509.Certificate) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("ab") as file:  # behind the key, where that is in the same file
        file.write(certificate.public_bytes(PEM))


def write_key(path: Path, key: PrivateKey) -> None:
    write_private(path, key.private_bytes(PEM, PKCS8, UNENCRYPTED))


def write_private(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
