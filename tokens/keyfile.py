"""A key file becomes a key that signs in this process: for one job, in memory only.

A key file is PEM or DER, PKCS#8 (RFC 5958, RFC 8351), PKCS#1 (RFC 8017, appendix A.1) or SEC 1 (RFC 5915), and
may be encrypted. A PEM file may hold the key's certificate and its chain too.
"""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, decode_dss_signature

from tokens.certificates import check_certifies, load_certificates
from tokens.errors import KeyAmbiguous, KeyNotFound, KeyUnusable, ProviderUnavailable, SigningFailed
from tokens.provider import KeyReference, PublicKey
from tokens.schemes import Ecdsa, Ed25519, RsaPkcs1v15, RsaPss, Scheme, check_data
from tokens.secret import SecretSource
from tokens.threads import Threads
from tokens.verify import HASHES, check_suited, pad_pss, verify

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

KEY_FILE_MAX_BYTES = 1024 * 1024
"""An RSA-16384 key in PEM has 13 KiB, a certificate about 2 KiB: more than this is not a key with its chain."""

PATH_MAX_BYTES = 1024
"""The longest key of an S3 object (Amazon S3 User Guide, "Naming Amazon S3 objects")."""

RSA_MIN_BITS = 2048
"""NIST SP 800-131A revision 2, table 2: shorter keys may not sign."""

_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)

# RFC 7468, section 2; the older files of OpenSSL have headers (RFC 1421) inside, which `cryptography` reads
_PEM_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.+?-----END \1-----", re.DOTALL)
_PEM_CERTIFICATE = re.compile(rb"-----BEGIN (X509 )?CERTIFICATE-----")

_READABLE = "Use an RSA (2048 bits or more), P-256, P-384, P-521 or Ed25519 key as PEM or DER."


class MemoryKey:
    """A private key in this process's memory. Implements `tokens.provider.SigningKey`."""

    def __init__(self, private: PrivateKey, certificates: tuple[x509.Certificate, ...], threads: Threads) -> None:
        self._private: PrivateKey | None = private
        self._public = private.public_key()
        self._certificates = certificates
        self._threads = threads

    @property
    def public_key(self) -> PublicKey:
        """The public half."""
        return self._public

    @property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        """The key's own certificate first, then its chain."""
        return self._certificates

    async def sign(self, scheme: Scheme, data: bytes) -> bytes:
        """See `SigningKey.sign`. Raises ProviderUnavailable when the job has ended."""
        private = self._private
        if private is None:
            raise ProviderUnavailable("The job that opened this key has ended.", "Open the key again.")
        check_data(scheme, data)
        check_suited(self._public, scheme)
        # Measured on two cores: RSA-4096 takes 1.3 ms, RSA-2048 0.2 ms, and OpenSSL runs without the GIL, so that
        # threads keep the loop free and use both cores (1.8 times as many signatures). ECDSA takes 0.04 ms (P-521:
        # 0.16 ms), less than the 0.2 ms of the way to a thread and back. An Ed25519 message may be long.
        if isinstance(scheme, Ecdsa):
            return _sign(private, scheme, data)
        return await self._threads.run(_sign, private, scheme, data)

    def close(self) -> None:
        """Forgets the key: it signs no more."""
        self._private = None


@asynccontextmanager
async def open_key(
    reference: KeyReference,
    read: Callable[[str, bool], Awaitable[bytes]],
    passphrase: SecretSource | None,
    threads: Threads,
) -> AsyncIterator[MemoryKey]:
    """The key of a key store, for the length of one job.

    Arguments:
        read: the bytes of the object at a path; true for a private key, false for a certificate.
        threads: load the key and sign with it.

    Raises what `read` and `load_key` raise, and KeyNotFound where the reference can be none of a key store.
    """
    if reference.object is None or reference.id is not None:
        raise KeyNotFound("A key store knows its keys by path only.", "Name `object`, and no `id`, in the grant.")
    key = await _load(reference.object, reference.certificate, read, passphrase, threads)
    try:
        yield key
    finally:
        key.close()


async def _load(
    path: str,
    certificate: str | None,
    read: Callable[[str, bool], Awaitable[bytes]],
    passphrase: SecretSource | None,
    threads: Threads,
) -> MemoryKey:
    data = await read(_checked(path), True)
    certificates = None if certificate is None else await read(_checked(certificate), False)
    secret = None if passphrase is None else await threads.run(passphrase.read)
    return await threads.run(load_key, data, secret, certificates, threads)


def _checked(path: str) -> str:
    """A path below the root of a key store. Raises KeyNotFound where it could lead out of it."""
    if len(path.encode()) > PATH_MAX_BYTES or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise KeyNotFound(
            "The path of the key or certificate cannot be one below the key store's root.",
            f"Write it relative to the root in the grant: no `.`, `..` or empty part, {PATH_MAX_BYTES} bytes at most.",
        )
    return path


async def read_file(reference: KeyReference, read: Callable[[str, bool], Awaitable[bytes]]) -> bytes:
    """The bytes of the file that belongs to a key set. Raises as `open_key` does."""
    if reference.object is None or reference.id is not None:
        raise KeyNotFound("A key store knows its files by path only.", "Name `object`, and no `id`, in the grant.")
    return await read(_checked(reference.object), True)


def check_size(data: bytes) -> bytes:
    """The data. Raises KeyUnusable where it is more than KEY_FILE_MAX_BYTES."""
    if len(data) > KEY_FILE_MAX_BYTES:
        raise KeyUnusable(
            f"The key or certificate file has more than {KEY_FILE_MAX_BYTES} bytes.",
            "Put the key there, with its certificates at most.",
        )
    return data


def load_key(data: bytes, passphrase: bytes | None, certificates_data: bytes | None, threads: Threads) -> MemoryKey:
    """The key that a key file holds.

    Arguments:
        data: the file's bytes, PEM or DER.
        passphrase: used where the key is encrypted, and only then.
        certificates_data: PEM, the key's own certificate first, or one certificate in DER; None: those that stand in
            `data`.
        threads: sign with the key.

    Raises:
        KeyUnusable: no key, encrypted and no or the wrong passphrase, or an unsupported type or size.
        KeyAmbiguous: more than one private key.
        KeyMismatch: the first certificate is for another key.
    """
    private = _supported(_parse(data, passphrase))
    certificates: tuple[x509.Certificate, ...] = ()
    if certificates_data is not None:
        certificates = load_certificates(certificates_data)
    elif _PEM_CERTIFICATE.search(data):
        certificates = load_certificates(data)
    check_certifies(certificates, private.public_key())
    return MemoryKey(private, certificates, threads)


def _parse(data: bytes, passphrase: bytes | None) -> PrivateKeyTypes:
    try:
        return _decode(data, None)
    except TypeError:
        # `cryptography` says so that the key is encrypted
        if not passphrase:
            raise KeyUnusable(
                "The key file is encrypted and the provider has no passphrase, or an empty one.",
                "Set `passphrase` in the provider's settings, or store the key unencrypted.",
            ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise KeyUnusable("The key file holds no private key that can be read.", _READABLE) from None
    try:
        return _decode(data, passphrase)
    except (ValueError, UnsupportedAlgorithm):
        raise KeyUnusable(
            "The key file cannot be decrypted with the provider's passphrase.",
            "Check the passphrase: its file's exact bytes count, less one trailing newline.",
        ) from None


def _decode(data: bytes, passphrase: bytes | None) -> PrivateKeyTypes:
    # Testing the primes of an RSA key anew would cost each job 27 ms (4096 bits: 194 ms), a hundred signatures. What
    # it guards from, a signature made with damaged parts that gives the key away, `_sign` never lets out.
    if b"-----BEGIN " in data:
        return serialization.load_pem_private_key(_key_block(data), passphrase, unsafe_skip_rsa_key_validation=True)
    return serialization.load_der_private_key(data, passphrase, unsafe_skip_rsa_key_validation=True)


def _key_block(pem: bytes) -> bytes:
    blocks = [match[0] for match in _PEM_BLOCK.finditer(pem) if match[1].endswith(b"PRIVATE KEY")]
    if not blocks:
        raise KeyUnusable("The PEM file holds no private key.", _READABLE)
    if len(blocks) > 1:
        raise KeyAmbiguous(f"The PEM file holds {len(blocks)} private keys.", "Give each key a file of its own.")
    return blocks[0]


def _supported(private: PrivateKeyTypes) -> PrivateKey:
    match private:
        case rsa.RSAPrivateKey():
            if private.key_size < RSA_MIN_BITS:
                raise KeyUnusable(f"An RSA key of {private.key_size} bits is too short.", _READABLE)
            return private
        case ec.EllipticCurvePrivateKey():
            if not isinstance(private.curve, _CURVES):
                raise KeyUnusable(f"Keys on the curve {private.curve.name} are not supported.", _READABLE)
            return private
        case ed25519.Ed25519PrivateKey():
            return private
        case _:
            raise KeyUnusable("Keys of this type are not supported.", _READABLE)


def _sign(private: PrivateKey, scheme: Scheme, data: bytes) -> bytes:
    try:
        signature = _signature(private, scheme, data)
    except (ValueError, UnsupportedAlgorithm):
        raise SigningFailed(
            "OpenSSL cannot make this signature with this key.", "Ask for another hash or salt, or check the key."
        ) from None
    verify(private.public_key(), scheme, data, signature)
    return signature


def _signature(private: PrivateKey, scheme: Scheme, data: bytes) -> bytes:
    match private, scheme:
        case rsa.RSAPrivateKey(), RsaPkcs1v15():
            return private.sign(data, padding.PKCS1v15(), Prehashed(HASHES[scheme.hash]))
        case rsa.RSAPrivateKey(), RsaPss():
            return private.sign(data, pad_pss(scheme), Prehashed(HASHES[scheme.hash]))
        case ec.EllipticCurvePrivateKey(), Ecdsa():
            r, s = decode_dss_signature(private.sign(data, ec.ECDSA(Prehashed(HASHES[scheme.hash]))))
            # r || s, each as long as the curve's order (PKCS#11 3.1, section 6.3.1)
            size = (private.key_size + 7) // 8
            return r.to_bytes(size, "big") + s.to_bytes(size, "big")
        case ed25519.Ed25519PrivateKey(), Ed25519():
            return private.sign(data)
        case _:
            raise ValueError("check_suited let through what no key can sign")
