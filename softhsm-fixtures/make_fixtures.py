"""Makes the SoftHSM tokens, key files and certificates that fixtures.toml declares.

    .venv/bin/python softhsm-fixtures/make_fixtures.py DIRECTORY

    DIRECTORY/
        hsmsign.toml        the service's configuration, ready to use
        softhsm2.conf       SOFTHSM2_CONF for whoever loads the module
        tokens/             SoftHSM's own
        pin                 the user PIN of every token, mode 0600
        keys/               key files in digsigserver's layout, mode 0600
        public/LABEL.pem    the public key of every key
        certificates/       NAME.pem and LABEL.pem: of the authorities and of the keys

A directory that is up to date is left as it is; one that this script did not make is refused.
"""

import datetime
import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pkcs11
from asn1crypto.core import OctetString
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pkcs11 import Attribute, KeyType, MechanismFlag, ObjectClass
from pkcs11.util.ec import decode_ec_private_key, decode_ec_public_key, encode_named_curve_parameters
from pkcs11.util.rsa import decode_rsa_private_key, decode_rsa_public_key
from pkcs11.util.x509 import decode_x509_certificate

HERE = Path(__file__).parent
MODULE = "/usr/lib/softhsm/libsofthsm2.so"
PURPOSES = {"emailProtection": ExtendedKeyUsageOID.EMAIL_PROTECTION, "codeSigning": ExtendedKeyUsageOID.CODE_SIGNING}
CURVES = {"p256": ec.SECP256R1(), "p384": ec.SECP384R1(), "p521": ec.SECP521R1()}
RSA_BITS = {"rsa2048": 2048, "rsa3072": 3072, "rsa4096": 4096}
VALIDITY = datetime.timedelta(days=3650)
CLOCK_SKEW = datetime.timedelta(hours=1)

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

PEM = serialization.Encoding.PEM
DER = serialization.Encoding.DER
SPKI = serialization.PublicFormat.SubjectPublicKeyInfo
PKCS1 = serialization.PublicFormat.PKCS1
PKCS8 = serialization.PrivateFormat.PKCS8
TRADITIONAL = serialization.PrivateFormat.TraditionalOpenSSL
UNENCRYPTED = serialization.NoEncryption()

NEVER_LEAVES = {
    Attribute.TOKEN: True,
    Attribute.PRIVATE: True,
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
    Attribute.SIGN: True,
}
# X9.62 / RFC 8410 parameters of edwards25519 as PKCS#11 2.40 and SoftHSM know them: PrintableString "edwards25519"
EDWARDS25519 = b"\x13\x0cedwards25519"


def main() -> None:
    directory = Path(sys.argv[1]).absolute()
    stamp = directory / "fixtures.sha256"
    inputs = [HERE / "fixtures.toml", HERE / "hsmsign.toml", Path(__file__)]
    digest = hashlib.sha256(b"".join([bytes(directory), *(path.read_bytes() for path in inputs)])).hexdigest()
    if stamp.exists():
        if stamp.read_text() == digest:
            return
        shutil.rmtree(directory)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(directory.iterdir()):
        sys.exit(f"{directory} is not empty, and was not made by this script: name another directory.")
    make(tomllib.loads((HERE / "fixtures.toml").read_text()), directory)
    stamp.write_text(digest)


def make(declaration: dict[str, Any], directory: Path) -> None:
    for name in ("tokens", "public", "certificates", "keys"):
        (directory / name).mkdir(mode=0o700)
    softhsm_conf = directory / "softhsm2.conf"
    softhsm_conf.write_text(f"directories.tokendir = {directory / 'tokens'}\nlog.level = ERROR\n")
    os.environ["SOFTHSM2_CONF"] = str(softhsm_conf)
    configuration = (HERE / "hsmsign.toml").read_text().replace("DIRECTORY", str(directory))
    (directory / "hsmsign.toml").write_text(configuration)

    pin = secrets.token_hex(8)
    write_private(directory / "pin", pin.encode() + b"\n")
    authorities = {each["name"]: Authority(each["subject"]) for each in declaration["authorities"]}
    for name, authority in authorities.items():
        write_certificate(directory / "certificates" / f"{name}.pem", authority.certificate)
    for token in declaration["tokens"]:
        passing_pin = initialise(token["label"])
        with pkcs11.lib(MODULE).get_token(token_label=token["label"]).open(rw=True, user_pin=passing_pin) as session:
            session.set_pin(passing_pin, pin)
            for key in token["keys"]:
                make_key(session, key, authorities, directory)


def initialise(label: str) -> str:
    """Makes a token and returns its user PIN, which is to be changed: softhsm2-util takes PINs only as arguments."""
    pin = secrets.token_hex(8)
    command = [
        "softhsm2-util",
        "--init-token",
        "--free",
        "--label",
        label,
        "--so-pin",
        secrets.token_hex(8),
        "--pin",
        pin,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    pkcs11.lib(MODULE).reinitialize()
    return pin


def make_key(
    session: pkcs11.Session, key: dict[str, Any], authorities: dict[str, "Authority"], directory: Path
) -> None:
    private = None
    attributes = {Attribute.LABEL: key["label"], Attribute.ID: bytes.fromhex(key["id"])}
    if "file" in key:
        private = generate_file(key["type"], directory / "keys" / key["file"])
        import_key(session, private, attributes)
        public: PublicKey = private.public_key()
    else:
        public = generate_on_token(session, key["type"], attributes)
    (directory / "public" / f"{key['label']}.pem").write_bytes(public.public_bytes(PEM, SPKI))

    if wanted := key.get("certificate"):
        if "issuer" in wanted:
            certificate = authorities[wanted["issuer"]].issue(wanted["subject"], public, wanted["purpose"])
        else:
            assert isinstance(private, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey), key["label"]
            builder = describe_signer(wanted["subject"], wanted["subject"], public, wanted["purpose"])
            certificate = builder.sign(private, hashes.SHA256())
        session.create_object(
            decode_x509_certificate(certificate.public_bytes(DER)) | attributes | {Attribute.TOKEN: True}
        )
        write_certificate(directory / "certificates" / f"{key['label']}.pem", certificate)
        if "file" in wanted:
            write_certificate(directory / "keys" / wanted["file"], certificate)


def generate_file(type_: str, path: Path) -> PrivateKey:
    private: PrivateKey
    if type_ in RSA_BITS:
        private = rsa.generate_private_key(65537, RSA_BITS[type_])
    elif type_ in CURVES:
        private = ec.generate_private_key(CURVES[type_])
    else:
        private = ed25519.Ed25519PrivateKey.generate()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(path, private.private_bytes(PEM, PKCS8, UNENCRYPTED))
    return private


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


def octets(der: bytes) -> bytes:
    """The content of a DER OCTET STRING."""
    return bytes(OctetString.load(der))


class Authority:
    """A certificate authority whose key is gone when the fixtures are made."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.key = ec.generate_private_key(ec.SECP256R1())
        builder = describe(subject, subject, self.key.public_key())
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # keyCertSign, cRLSign
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.certificate = builder.add_extension(usage, critical=True).sign(self.key, hashes.SHA256())

    def issue(self, subject: str, public: PublicKey, purpose: str) -> x509.Certificate:
        return describe_signer(subject, self.subject, public, purpose).sign(self.key, hashes.SHA256())


def describe_signer(subject: str, issuer: str, public: PublicKey, purpose: str) -> x509.CertificateBuilder:
    """A certificate that may sign for one purpose and may certify nothing."""
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)  # digitalSignature
    return (
        describe(subject, issuer, public)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([PURPOSES[purpose]]), critical=False)
    )


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


def write_certificate(path: Path, certificate: x509.Certificate) -> None:
    path.write_bytes(certificate.public_bytes(PEM))


def write_private(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


if __name__ == "__main__":
    main()
