"""Attestation certificates, verified by OpenSSL."""

import datetime
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from yubihsm.core import AuthSession
from yubihsm.defs import ALGORITHM, CAPABILITY, ERROR, ORIGIN
from yubihsm.objects import AsymmetricKey, AttestationExtensions, KeyAttestationExtensions, Opaque

from tests.yubihsm_simulator.conftest import refused
from yubihsm_simulator import Device


def verifies(directory: Path, device: Device, *chain: x509.Certificate) -> bool:
    """Whether OpenSSL accepts the first certificate by the others and the device's root."""
    (directory / "root.pem").write_bytes(device.attestation_root)
    (directory / "leaf.pem").write_bytes(chain[0].public_bytes(Encoding.PEM))
    (directory / "between.pem").write_bytes(b"".join(each.public_bytes(Encoding.PEM) for each in chain[1:]))
    command = ["openssl", "verify", "-CAfile", "root.pem", "-untrusted", "between.pem", "leaf.pem"]
    return subprocess.run(command, cwd=directory, check=False, capture_output=True).returncode == 0


def device_certificate(session: AuthSession) -> x509.Certificate:
    return Opaque(session, 0).get_certificate()


def test_a_key_is_attested_up_to_the_root(device: Device, session: AuthSession, tmp_path: Path) -> None:
    key = AsymmetricKey.generate(session, 0x100, "signing key", 0x0102, CAPABILITY.SIGN_PKCS, ALGORITHM.RSA_2048)
    certificate = key.attest()
    sub_ca, root = (x509.load_der_x509_certificate(der) for der in device.attestation_issuers)
    assert root.public_bytes(Encoding.PEM) == device.attestation_root
    assert verifies(tmp_path, device, certificate, device_certificate(session), sub_ca)
    assert not verifies(tmp_path, Device(serial=9), certificate, sub_ca)
    assert certificate.public_key() == key.get_public_key()
    assert certificate.subject.rfc4514_string() == "CN=YubiHSM Attestation id:0x0100"
    assert certificate.issuer == device_certificate(session).subject
    assert certificate.not_valid_after_utc == device_certificate(session).not_valid_after_utc
    assert certificate.serial_number.bit_length() <= 128
    extensions = AttestationExtensions.parse(certificate)
    assert extensions == KeyAttestationExtensions(
        (2, 4, 0), 12345678, ORIGIN.GENERATED, 0x0102, CAPABILITY.SIGN_PKCS, 0x100, "signing key", None
    )


def test_the_device_certificate_names_the_device(session: AuthSession) -> None:
    extensions = AttestationExtensions.parse(device_certificate(session))
    assert (extensions.firmware_version, extensions.serial) == ((2, 4, 0), 12345678)


def test_the_chain_follows_from_the_serial() -> None:
    one, same, other = Device(serial=1), Device(serial=1), Device(serial=2)
    assert one.attestation.device_certificate == same.attestation.device_certificate
    assert one.attestation_issuers == other.attestation_issuers
    assert one.attestation.device_certificate != other.attestation.device_certificate


def put_attester(session: AuthSession, id_: int, private: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> None:
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "own attester")])
    builder = x509.CertificateBuilder(name, name, private.public_key(), 1, now, now + datetime.timedelta(days=1))
    certificate = builder.sign(private, hashes.SHA256())
    key = AsymmetricKey.put(session, id_, "", 1, CAPABILITY.SIGN_ATTESTATION_CERTIFICATE, private)
    key.put_certificate("", 1, CAPABILITY.NONE, certificate)


@pytest.mark.parametrize("kind", ["rsa", "ec"])
def test_own_attesting_key(session: AuthSession, rsa_key: rsa.RSAPrivateKey, kind: str) -> None:
    put_attester(session, 7, rsa_key if kind == "rsa" else ec.generate_private_key(ec.SECP384R1()))
    key = AsymmetricKey.generate(session, 0, "", 1, CAPABILITY.NONE, ALGORITHM.EC_ED25519)
    certificate, issuer = key.attest(7), Opaque(session, 7).get_certificate()
    certificate.verify_directly_issued_by(issuer)
    assert certificate.not_valid_before_utc == issuer.not_valid_before_utc
    assert certificate.public_key() == key.get_public_key()


def test_origin_after_import(session: AuthSession, rsa_key: rsa.RSAPrivateKey) -> None:
    certificate = AsymmetricKey.put(session, 0, "", 1, CAPABILITY.NONE, rsa_key).attest()
    extensions = AttestationExtensions.parse(certificate)
    assert isinstance(extensions, KeyAttestationExtensions)
    assert extensions.origin == ORIGIN.IMPORTED


def test_what_an_attester_needs(session: AuthSession) -> None:
    key = AsymmetricKey.generate(session, 5, "", 1, CAPABILITY.NONE, ALGORITHM.EC_P256)
    with refused(ERROR.OBJECT_NOT_FOUND):
        key.attest(6)
    with refused(ERROR.INSUFFICIENT_PERMISSIONS):
        key.attest(5)
    AsymmetricKey.generate(session, 6, "", 1, CAPABILITY.SIGN_ATTESTATION_CERTIFICATE, ALGORITHM.EC_P256)
    with refused(ERROR.OBJECT_NOT_FOUND):  # no certificate beside it
        key.attest(6)
    Opaque.put(session, 6, "", 1, CAPABILITY.NONE, ALGORITHM.OPAQUE_X509_CERTIFICATE, b"no certificate")
    with refused(ERROR.INVALID_DATA):
        key.attest(6)
    AsymmetricKey.generate(session, 8, "", 1, CAPABILITY.SIGN_ATTESTATION_CERTIFICATE, ALGORITHM.EC_P256)
    Opaque.put(session, 8, "", 1, CAPABILITY.NONE, ALGORITHM.OPAQUE_DATA, b"data")
    with refused(ERROR.INVALID_DATA):
        key.attest(8)
