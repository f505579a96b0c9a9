"""Attestation: certificates that say what the device knows about a key.

The chain is as the vendor's: a root, a sub-CA, the certificate of the device's attestation key (opaque object 0), and
what that key signs. All keys here follow from a fixed text and the serial number, so two simulators with one serial
have one chain. The names say "Simulator": nobody shall take it for the vendor's.

Source: Yubico, "YubiHSM 2: Attestation" (extensions 1.3.6.1.4.1.41482.4.N).
"""

import datetime
import secrets
from functools import cached_property
from hashlib import sha256

from asn1crypto import core
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from yubihsm_simulator.definitions import DeviceError, ErrorCode
from yubihsm_simulator.objects import StoredObject

Firmware = tuple[int, int, int]

_NOT_BEFORE = datetime.datetime(2017, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER = datetime.datetime(2071, 10, 5, tzinfo=datetime.UTC)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def derived_key(seed: str) -> ec.EllipticCurvePrivateKey:
    """A P-256 key that always follows from `seed`."""
    secret = int.from_bytes(sha256(f"yubihsm_simulator {seed}".encode()).digest(), "big")
    return ec.derive_private_key(secret % (ec.SECP256R1().group_order - 1) + 1, ec.SECP256R1())


def _extension(number: int, value: core.Asn1Value) -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(f"1.3.6.1.4.1.41482.4.{number}"), value.dump())


def _bits(value: int, length: int) -> core.Asn1Value:
    """A BIT STRING of `length` bytes without unused bits."""
    encoded = core.BitString()
    encoded.contents = b"\x00" + value.to_bytes(length, "big")
    return encoded


class Attestation:
    """The device's attestation key, its certificate and their issuers."""

    def __init__(self, serial: int, firmware: Firmware) -> None:
        self._serial = serial
        self._firmware = firmware

    @cached_property
    def root(self) -> x509.Certificate:
        """The self-signed root."""
        return self._authority("YubiHSM Simulator Root CA", "YubiHSM Simulator Root CA", "root", "root", 2)

    @cached_property
    def sub_ca(self) -> x509.Certificate:
        """The sub-CA, issued by the root."""
        return self._authority("YubiHSM Simulator Sub-CA", "YubiHSM Simulator Root CA", "sub-CA", "root", 1)

    @cached_property
    def device_certificate(self) -> bytes:
        """The certificate of the device's attestation key, DER, issued by the sub-CA."""
        name = f"YubiHSM Simulator Attestation ({self._serial})"
        builder = self._builder(name, "YubiHSM Simulator Sub-CA", f"attestation {self._serial}", 0)
        for extension in self._device_extensions():
            builder = builder.add_extension(extension, critical=False)
        signed = builder.sign(derived_key("sub-CA"), hashes.SHA256(), ecdsa_deterministic=True)
        return signed.public_bytes(Encoding.DER)

    def by_device(self, stored: StoredObject) -> bytes:
        """The attestation certificate of a key, DER, signed by the device's key."""
        return self.sign(stored, derived_key(f"attestation {self._serial}"), self.device_certificate)

    def sign(self, stored: StoredObject, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, template: bytes) -> bytes:
        """The attestation certificate of a key, DER: issuer and dates are those of the certificate `template` (DER).

        Raises DeviceError (INVALID_DATA) where the template is no certificate.
        """
        try:
            issuer = x509.load_der_x509_certificate(template)
            builder = (
                x509.CertificateBuilder()
                .subject_name(_name(f"YubiHSM Attestation id:0x{stored.id:04x}"))
                .issuer_name(issuer.subject)
                .not_valid_before(issuer.not_valid_before_utc)
                .not_valid_after(issuer.not_valid_after_utc)
                .serial_number(int.from_bytes(secrets.token_bytes(16), "big") >> 1 | 1)
                .public_key(stored.public_key)
            )
            for extension in (*self._device_extensions(), *_object_extensions(stored)):
                builder = builder.add_extension(extension, critical=False)
            return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
        except ValueError:
            raise DeviceError(ErrorCode.INVALID_DATA) from None

    def _device_extensions(self) -> list[x509.UnrecognizedExtension]:
        return [
            _extension(1, core.OctetString(bytes(self._firmware))),
            _extension(2, core.Integer(self._serial)),
        ]

    @staticmethod
    def _builder(subject: str, issuer: str, seed: str, path_length: int) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(_name(subject))
            .issuer_name(_name(issuer))
            .not_valid_before(_NOT_BEFORE)
            .not_valid_after(_NOT_AFTER)
            .serial_number(int.from_bytes(sha256(seed.encode()).digest()[:16], "big") >> 1 | 1)
            .public_key(derived_key(seed).public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        )

    def _authority(self, subject: str, issuer: str, seed: str, issuer_seed: str, path_length: int) -> x509.Certificate:
        builder = self._builder(subject, issuer, seed, path_length)
        return builder.sign(derived_key(issuer_seed), hashes.SHA256(), ecdsa_deterministic=True)


def _object_extensions(stored: StoredObject) -> list[x509.UnrecognizedExtension]:
    label = core.UTF8String()
    label.contents = stored.label.rstrip(b"\x00")
    return [
        _extension(3, _bits(stored.origin, 1)),
        _extension(4, _bits(stored.domains, 2)),
        _extension(5, _bits(stored.capabilities, 8)),
        _extension(6, core.Integer(stored.id)),
        _extension(9, label),
    ]
