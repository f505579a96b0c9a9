"""Attestations of a YubiHSM 2: what the device says of one of its keys, and whether that is proven.

The device makes a certificate for the key and signs it with a key of its own, number 0, whose certificate it holds as
opaque object 0. That one comes from a Sub-CA of Yubico, and the Sub-CA from Yubico's root:

    attestation certificate <- opaque object 0 <- Yubico YubiHSM 6742036 Sub-CA <- Yubico YubiHSM Root CA

The last two are in `yubico_attestation.pem`; other roots can be pinned instead. What the device says stands in
extensions (YubiHSM 2 User Guide, Core Concepts, Attestation).
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes

from tokens.certificates import certifies
from tokens.errors import KeyNotAttested
from tokens.provider import Attestation, PublicKey


class Origin(StrEnum):
    """How a key came to be on the device."""

    GENERATED = "generated"
    IMPORTED = "imported"
    WRAPPED = "wrapped"
    """It came encrypted under a wrap key: another device, or whoever has the wrap key, had it before."""


@dataclass(frozen=True, slots=True)
class Attested:
    """What a device says of a key.

    Arguments:
        serial: the device's serial number.
        id: the key's object id.
        label: the key's label.
        firmware: the device's version, as in 2.4.0.
        origin: how the key came to be there.
        domains: 1 to 16.
        capabilities: by the names that Yubico's tools have for them.
        chain: the attestation certificate first, a pinned certificate last.
    """

    serial: int
    id: int
    label: str
    firmware: str
    origin: Origin
    domains: tuple[int, ...]
    capabilities: tuple[str, ...]
    chain: tuple[x509.Certificate, ...]

    @property
    def exportable(self) -> bool:
        """Whether the key may leave the device, encrypted under a wrap key."""
        return "exportable-under-wrap" in self.capabilities

    @property
    def never_extractable(self) -> bool:
        """Whether the key was generated on the device and cannot leave it (as PKCS#11's CKA_NEVER_EXTRACTABLE)."""
        return self.origin is Origin.GENERATED and not self.exportable


def verify(
    attestation: Attestation,
    public_key: PublicKey,
    *,
    roots: tuple[x509.Certificate, ...] | None = None,
    serial: int | None = None,
    id: int | None = None,
) -> Attested:
    """What the attestation says, once it is proven.

    Arguments:
        attestation: from the device.
        public_key: the key that it must be for.
        roots: the pinned certificates; the chain ends in one of them. None: Yubico's.
        serial: the device that it must come from; None: any.
        id: the object that it must be for; None: any.

    Raises KeyNotAttested where a signature, a validity period, a certificate's right to issue, or any of these is
    wrong. All certificates must be valid now, as `openssl verify` wants it; a device copies the period of its own
    certificate, which is 2017 to 2071.
    """
    try:
        certificate = x509.load_der_x509_certificate(attestation.certificate)
        issuers = tuple(x509.load_der_x509_certificate(der) for der in attestation.issuers)
        if not certifies(certificate, public_key):
            raise _not_proven("is for another key", "Find out why the device has another key under this id.")
        attested = _said(_chain(certificate, issuers, yubico_roots() if roots is None else roots))
    except _MALFORMED:
        raise _not_proven("or a certificate in its chain is malformed", "Check what the connector leads to.") from None
    if serial is not None and attested.serial != serial:
        raise _not_proven(
            f"comes from the device {attested.serial}, not from {serial}", "Connect the device that is meant."
        )
    if id is not None and attested.id != id:
        raise _not_proven(f"is for the object 0x{attested.id:04x}, not for 0x{id:04x}", "Check the key's id.")
    return attested


def check_never_extractable(attested: Attested) -> None:
    """Raises KeyNotAttested unless the key was generated on the device and cannot leave it."""
    hint = "Generate a key on the device that is not exportable under wrap, and grant that."
    if attested.origin is not Origin.GENERATED:
        came = "was imported" if attested.origin is Origin.IMPORTED else "came to it wrapped"
        raise KeyNotAttested(f"The device did not generate the key, which {came}: others may have it.", hint)
    if attested.exportable:
        raise KeyNotAttested("The key may leave its device under a wrap key.", hint)


@functools.cache
def yubico_roots() -> tuple[x509.Certificate, ...]:
    """Yubico's root and Sub-CA, to which every YubiHSM 2 leads."""
    return tuple(x509.load_pem_x509_certificates(Path(__file__).with_name("yubico_attestation.pem").read_bytes()))


# what cryptography raises of a certificate that it cannot read, besides what it says in words
_MALFORMED = (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.InvalidVersion)

_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)


def _not_proven(what: str, hint: str) -> KeyNotAttested:
    return KeyNotAttested(f"The attestation {what}.", hint)


def _chain(
    certificate: x509.Certificate, issuers: tuple[x509.Certificate, ...], roots: tuple[x509.Certificate, ...]
) -> tuple[x509.Certificate, ...]:
    """The certificate, then each issuer, up to the last one that is pinned. Raises KeyNotAttested."""
    chain = [certificate]
    candidates = [*roots, *issuers]
    while issuer := next((each for each in candidates if _issued(chain[-1], each) and each not in chain), None):
        chain.append(issuer)
        if issuer in roots:
            candidates = list(roots)  # only pinned certificates stand above a pinned one
    if len(chain) == 1 or chain[-1] not in roots:
        raise _not_proven(
            "leads to no pinned certificate",
            "If you trust the device, pin what completes the chain: `attestation_roots`, or --root of the command.",
        )
    now = datetime.now(UTC)
    for each in chain:
        if not each.not_valid_before_utc <= now <= each.not_valid_after_utc:
            raise _not_proven("has a certificate in its chain that is not valid now", "Check the clock, and the chain.")
    for below, issuer in enumerate(chain[1:]):
        if not _may_issue(issuer, below):
            raise _not_proven(
                "has an issuer in its chain that is no certificate authority, or not for a chain of this length",
                "Find out who made the attestation: an attested key that signs certificates proves nothing.",
            )
    return tuple(chain)


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether the issuer's name is the issuer's, and its signature good and by a hash that is."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, TypeError, *_MALFORMED):
        return False
    return isinstance(certificate.signature_hash_algorithm, _HASHES)


def _may_issue(certificate: x509.Certificate, below: int) -> bool:
    """Whether it is an authority's, and may have so many of others' between it and the end (RFC 5280, 6.1.4 k to o)."""
    extensions = {type(extension.value): extension for extension in certificate.extensions}
    constraints, usage = extensions.pop(x509.BasicConstraints, None), extensions.pop(x509.KeyUsage, None)
    if constraints is None or not constraints.value.ca or any(each.critical for each in extensions.values()):
        return False
    if constraints.value.path_length is not None and constraints.value.path_length < below:
        return False
    return usage is None or bool(usage.value.key_cert_sign)


# DER tags (X.690, 8.1.2)
_INTEGER, _BIT_STRING, _OCTET_STRING, _UTF8_STRING = 0x02, 0x03, 0x04, 0x0C

_ARC = "1.3.6.1.4.1.41482.4"

# YubiHSM 2 User Guide, Core Concepts, Origin: 0x10 goes with one of the others
_ORIGINS = {0x01: Origin.GENERATED, 0x02: Origin.IMPORTED, 0x11: Origin.WRAPPED, 0x12: Origin.WRAPPED}


def _said(chain: tuple[x509.Certificate, ...]) -> Attested:
    """What the extensions of the first certificate say. Raises ValueError where one is missing or not DER."""
    said = {
        extension.oid.dotted_string: extension.value.value
        for extension in chain[0].extensions
        if isinstance(extension.value, x509.UnrecognizedExtension)
    }
    origin, domains, capabilities = _bits(said, 3, 1), _bits(said, 4, 2), _bits(said, 5, 8)
    if origin not in _ORIGINS or capabilities >> len(_CAPABILITIES):
        raise ValueError("an origin or a capability that is not known could mean anything")
    firmware = _content(said, 1, _OCTET_STRING)
    if len(firmware) != 3:
        raise ValueError("a version is major, minor, patch")
    return Attested(
        serial=_integer(said, 2),
        id=_integer(said, 6),
        label=_content(said, 9, _UTF8_STRING).decode(),
        firmware=".".join(map(str, firmware)),
        origin=_ORIGINS[origin],
        domains=tuple(bit + 1 for bit in range(16) if domains >> bit & 1),
        capabilities=tuple(name for bit, name in enumerate(_CAPABILITIES) if capabilities >> bit & 1),
        chain=chain,
    )


def _content(said: Mapping[str, bytes], number: int, tag: int) -> bytes:
    """The content of an extension's value, which is shorter than 128 bytes (X.690, 8.1.3.4)."""
    der = said.get(f"{_ARC}.{number}", b"")
    if len(der) not in range(2, 130) or der[0] != tag or der[1] != len(der) - 2:
        raise ValueError("an extension is missing, or not of its type")
    return der[2:]


def _integer(said: Mapping[str, bytes], number: int) -> int:
    content = _content(said, number, _INTEGER)
    # X.690, 8.3.2: no more bytes than needed; the device has no negative ones
    if not content or content[0] > 0x7F or (content[0] == 0 and len(content) > 1 and content[1] <= 0x7F):
        raise ValueError("not the shortest form, or negative")
    return int.from_bytes(content)


def _bits(said: Mapping[str, bytes], number: int, size: int) -> int:
    """The bit string of so many bytes as the device's own big-endian number, whose bit 0 is the last bit."""
    content = _content(said, number, _BIT_STRING)
    if len(content) != 1 + size or content[0] != 0:  # X.690, 8.6.2: how many bits of the last byte are not used
        raise ValueError("not as many bits as there are")
    return int.from_bytes(content[1:])


# bit 0 first (YubiHSM 2 User Guide, Core Concepts, Capability)
_CAPABILITIES = (
    "get-opaque", "put-opaque", "put-authentication-key", "put-asymmetric-key", "generate-asymmetric-key",
    "sign-pkcs", "sign-pss", "sign-ecdsa", "sign-eddsa", "decrypt-pkcs", "decrypt-oaep", "derive-ecdh",
    "export-wrapped", "import-wrapped", "put-wrap-key", "generate-wrap-key", "exportable-under-wrap",
    "set-option", "get-option", "get-pseudo-random", "put-mac-key", "generate-hmac-key", "sign-hmac", "verify-hmac",
    "get-log-entries", "sign-ssh-certificate", "get-template", "put-template", "reset-device", "decrypt-otp",
    "create-otp-aead", "randomize-otp-aead", "rewrap-from-otp-aead-key", "rewrap-to-otp-aead-key",
    "sign-attestation-certificate", "put-otp-aead-key", "generate-otp-aead-key", "wrap-data", "unwrap-data",
    "delete-opaque", "delete-authentication-key", "delete-asymmetric-key", "delete-wrap-key", "delete-hmac-key",
    "delete-template", "delete-otp-aead-key", "change-authentication-key", "put-symmetric-key",
    "generate-symmetric-key", "delete-symmetric-key", "decrypt-ecb", "encrypt-ecb", "decrypt-cbc", "encrypt-cbc",
    "put-public-wrap-key", "delete-public-wrap-key",
)  # fmt: skip
