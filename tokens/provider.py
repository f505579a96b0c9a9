"""The vocabulary: what a key and a provider of keys are.

Small Protocols; every provider passes the same conformance suite (`tests/tokens/test_conformance.py`).

    async with provider.open(KeyReference(object="swupdate-rsa")) as key:
        signature = await key.sign(RsaPkcs1v15(Hash.SHA256), digest)
"""

import hashlib
from collections.abc import Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tokens.schemes import Scheme
from tokens.symmetric import SymmetricAlgorithm

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class KeyReference:
    """Which object of a provider is meant.

    Arguments:
        object: the label (CKA_LABEL) on a token, the path below the root in a key store.
        id: CKA_ID on a token; None in a key store.
        certificate: PEM or DER, the key's own certificate first; a file of the server for a token,
            a path below the root in a key store. Without it a token is searched for one by CKA_ID.
    """

    object: str | None = None
    id: bytes | None = None
    certificate: str | None = None


class SigningKey(Protocol):
    """A private key that signs, wherever it lives."""

    @property
    def public_key(self) -> PublicKey:
        """The public half."""

    @property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        """The key's own certificate first, then its chain; empty when it has none."""

    async def sign(self, scheme: Scheme, data: bytes) -> bytes:
        """Signs a digest (RSA, ECDSA) or a message (Ed25519), and verifies the signature before it returns.

        Many calls may be outstanding at once.

        Returns the raw signature: RSA as many bytes as the modulus, ECDSA r || s, Ed25519 64 bytes.

        Raises:
            KeyUnsuited: the key's type or size does not fit the scheme, or the data is no such digest.
            KeyMismatch: the object behind the reference is another key than when it was opened.
            ProviderProblem: the provider could not sign.
        """


class SymmetricKey(Protocol):
    """A secret key for AES or HMAC, wherever it lives; neither it nor anything derived from it is ever shown.

    It has no public half that could prove a result: who needs that compares or decrypts what was made. Its operations
    raise KeyUnsuited where its algorithm or permissions, or the length of the data, do not fit, and ProviderProblem.
    """

    @property
    def algorithm(self) -> SymmetricAlgorithm:
        """What it is for."""

    @property
    def place(self) -> str:
        """Which object of its provider it is: no other one has it."""

    async def encrypt_ecb(self, data: bytes) -> bytes:
        """AES-ECB (NIST SP 800-38A, section 6.1) of whole blocks of 16 bytes, any number of them."""

    async def decrypt_ecb(self, data: bytes) -> bytes:
        """The inverse of `encrypt_ecb`."""

    async def encrypt_cbc(self, iv: bytes, data: bytes) -> bytes:
        """AES-CBC (NIST SP 800-38A, section 6.2) of whole blocks of 16 bytes, without padding; the IV has 16 bytes."""

    async def decrypt_cbc(self, iv: bytes, data: bytes) -> bytes:
        """The inverse of `encrypt_cbc`."""

    async def hmac_sha256(self, data: bytes) -> bytes:
        """HMAC-SHA256 (RFC 2104): 32 bytes. A YubiHSM 2 takes 2 or 3 kB of data."""


class KeyProvider(Protocol):
    """Somewhere that keys live: a token, a directory, a bucket."""

    @property
    def name(self) -> str:
        """The NAME of `[providers.NAME]`."""

    @property
    def kind(self) -> str:
        """The `kind` of the provider's settings: `file`, `s3`, `pkcs11`."""

    @property
    def uri_attributes(self) -> Mapping[str, frozenset[str]]:
        """The values that the token attributes of a `pkcs11:` URI (`token`, `serial`, ...) may have for it."""

    async def start(self) -> None:
        """Gets ready. A token that is absent is a state that `check` reports, never an error here."""

    async def stop(self) -> None:
        """Finishes what runs, refuses what comes, and ends every process and thread."""

    async def check(self) -> None:
        """Raises the ProviderProblem that a signature would meet now."""

    def open(self, reference: KeyReference) -> AbstractAsyncContextManager[SigningKey]:
        """The key, for the length of one job.

        Raises:
            KeyNotFound, KeyAmbiguous, KeyUnusable, KeyMismatch: what is wrong with the object.
            ProviderProblem: the provider could not be asked.
        """

    def open_symmetric(
        self, reference: KeyReference, wanted: Collection[SymmetricAlgorithm]
    ) -> AbstractAsyncContextManager[SymmetricKey]:
        """The symmetric key, for the length of one job; `wanted` says what it may be for.

        Raises as `open` does, and KeyUnsuited where the key is for something else.
        """


@runtime_checkable
class KeyFiles(Protocol):
    """A provider that also holds files that belong to a set of keys: NXP's key tarball, an SRK table."""

    async def read(self, reference: KeyReference) -> bytes:
        """The file at the path `reference.object`: it may hold private keys, and is for one job only.

        Raises KeyNotFound, KeyUnusable, ProviderProblem.
        """


@dataclass(frozen=True, slots=True)
class Attestation:
    """What a device says of one of its keys, signed by the device; `tokens.attestation` verifies it.

    Arguments:
        certificate: DER, for the key, with what the device says of it in extensions.
        issuers: DER, what the device has of the chain above it: its own attestation certificate first.
    """

    certificate: bytes
    issuers: tuple[bytes, ...]


@runtime_checkable
class Attests(Protocol):
    """A provider whose device attests its keys."""

    @property
    def serial(self) -> int:
        """The serial number that the settings pin the device to."""

    @property
    def attestation_roots(self) -> tuple[x509.Certificate, ...] | None:
        """What its attestations must lead to; None: the certificates of the device's maker."""

    async def attest(self, reference: KeyReference) -> Attestation:
        """Has the device attest a key. Raises as `KeyProvider.open` does."""


def spki_sha256(public_key: PublicKey) -> str:
    """SHA-256, in hex, of the DER SubjectPublicKeyInfo (RFC 5280, section 4.1.2.7)."""
    return hashlib.sha256(spki(public_key)).hexdigest()


def spki(public_key: PublicKey) -> bytes:
    """The DER SubjectPublicKeyInfo of a public key."""
    return public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
