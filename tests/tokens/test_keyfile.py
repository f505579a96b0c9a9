"""Key files as OpenSSL writes them, and what is refused."""

import asyncio
import hashlib
import subprocess
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tokens.errors import Error, KeyAmbiguous, KeyMismatch, KeyUnusable, ProviderUnavailable, SigningFailed
from tokens.keyfile import load_key
from tokens.provider import spki_sha256
from tokens.schemes import Ecdsa, Ed25519, Hash, RsaPkcs1v15, Scheme
from tokens.threads import Threads

PASSPHRASE = b"canary passphrase"
DIGEST = hashlib.sha256(b"what is signed").digest()
SUITED: dict[str, tuple[Scheme, bytes]] = {
    "rsa2048": (RsaPkcs1v15(Hash.SHA256), DIGEST),
    "p384": (Ecdsa(Hash.SHA256), DIGEST),
    "ed25519": (Ed25519(), b"a message"),
}
ENCRYPT = f"-passout 'pass:{PASSPHRASE.decode()}'"

# name -> (key, how OpenSSL writes it from the file `key`)
PLAIN = {
    "pkcs8": ("rsa2048", "pkcs8 -topk8 -nocrypt"),
    "pkcs8-der": ("rsa2048", "pkcs8 -topk8 -nocrypt -outform DER"),
    "pkcs1": ("rsa2048", "rsa -traditional"),
    "pkcs1-der": ("rsa2048", "rsa -traditional -outform DER"),
    "sec1": ("p384", "ec"),
    "sec1-der": ("p384", "ec -outform DER"),
    "sec1-explicit": ("p384", "ec -param_enc explicit"),
    "ec-pkcs8-der": ("p384", "pkcs8 -topk8 -nocrypt -outform DER"),
    "ed25519": ("ed25519", "pkey"),
    "ed25519-der": ("ed25519", "pkey -outform DER"),
}
ENCRYPTED = {
    "pkcs8": ("rsa2048", f"pkcs8 -topk8 {ENCRYPT}"),
    "pkcs8-der": ("rsa2048", f"pkcs8 -topk8 -outform DER {ENCRYPT}"),
    "pkcs8-scrypt": ("p384", f"pkcs8 -topk8 -scrypt {ENCRYPT}"),
    "pkcs8-3des": ("p384", f"pkcs8 -topk8 -v1 PBE-SHA1-3DES {ENCRYPT}"),
    "pkcs1": ("rsa2048", f"rsa -traditional -aes256 {ENCRYPT}"),
    "sec1": ("p384", f"ec -aes128 {ENCRYPT}"),
    "ed25519": ("ed25519", f"pkcs8 -topk8 {ENCRYPT}"),
}


@pytest.fixture
async def threads() -> AsyncIterator[Threads]:
    made = Threads("test", 1)
    yield made
    await made.stop()


def openssl(command: str, directory: Path) -> bytes:
    return subprocess.run(f"openssl {command}", shell=True, cwd=directory, check=True, capture_output=True).stdout  # noqa: S602 the commands stand above


def written(key: Any, command: str, directory: Path) -> bytes:
    (directory / "key").write_bytes(key.pem)
    return openssl(f"{command} -in key", directory)


@pytest.mark.parametrize("form", PLAIN)
async def test_plain(form: str, keys: Any, threads: Threads, tmp_path: Path) -> None:
    name, command = PLAIN[form]
    data = written(keys[name], command, tmp_path)
    # a passphrase is for the keys that are encrypted, and does not disturb the others
    for passphrase in (None, PASSPHRASE):
        key = load_key(data, passphrase, None, threads)
        assert spki_sha256(key.public_key) == spki_sha256(keys[name].private.public_key())
        assert key.certificates == ()
        assert await key.sign(*SUITED[name])


@pytest.mark.parametrize("form", ENCRYPTED)
async def test_encrypted(form: str, keys: Any, threads: Threads, tmp_path: Path) -> None:
    name, command = ENCRYPTED[form]
    data = written(keys[name], command, tmp_path)
    key = load_key(data, PASSPHRASE, None, threads)
    assert await key.sign(*SUITED[name])
    for passphrase in (None, b""):
        with pytest.raises(KeyUnusable, match="encrypted"):
            load_key(data, passphrase, None, threads)
    with pytest.raises(KeyUnusable, match="cannot be decrypted") as caught:
        load_key(data, b"not the " + PASSPHRASE, None, threads)
    assert "canary" not in told(caught.value)


def told(error: Error) -> str:
    """Everything that a log or a client could be told of it."""
    return "".join(traceback.format_exception(error)) + error.message + error.hint + repr(error.args)


UNSUPPORTED = {
    "rsa1024": ("genrsa 1024", "1024 bits"),
    "secp256k1": ("ecparam -name secp256k1 -genkey", "secp256k1"),
    "ed448": ("genpkey -algorithm ed448", "type"),
    "x25519": ("genpkey -algorithm x25519", "type"),
    "three primes": ("genrsa -primes 3 3072", "read"),
    "public key": ("genpkey -algorithm ed25519 | openssl pkey -pubout", "no private key"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported(name: str, threads: Threads, tmp_path: Path) -> None:
    command, reason = UNSUPPORTED[name]
    with pytest.raises(KeyUnusable, match=reason) as caught:
        load_key(openssl(command, tmp_path), None, None, threads)
    assert "Use an RSA (2048 bits or more)" in caught.value.hint


NO_KEYS = {
    "empty": b"",
    "text": b"this is not a key\n",
    "zeros": bytes(2000),
    "cut PEM": b"-----BEGIN PRIVATE KEY-----\nMIIEvQ",
    "garbage in PEM": b"-----BEGIN PRIVATE KEY-----\n!!!!\n-----END PRIVATE KEY-----\n",
    "wrong base64": b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
    "many begins": b"-----BEGIN PRIVATE KEY-----" * 2400,
    "SSH": b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n",
}


@pytest.mark.parametrize("name", NO_KEYS)
def test_no_key(name: str, threads: Threads) -> None:
    for passphrase in (None, PASSPHRASE):
        with pytest.raises(KeyUnusable):
            load_key(NO_KEYS[name], passphrase, None, threads)


def test_cut_der(keys: Any, threads: Threads) -> None:
    der = keys["rsa2048"].der
    for length in range(0, len(der), 37):
        with pytest.raises(KeyUnusable):
            load_key(der[:length], None, None, threads)


async def test_damaged(keys: Any, threads: Threads) -> None:
    """A key whose parts do not belong together signs nothing: what it made would give the key away."""
    numbers = keys["rsa2048"].private.private_numbers()
    damaged = rsa.RSAPrivateNumbers(
        p=numbers.p,
        q=numbers.q,
        d=numbers.d ^ 4,
        dmp1=numbers.dmp1 ^ 4,
        dmq1=numbers.dmq1,
        iqmp=numbers.iqmp,
        public_numbers=numbers.public_numbers,
    ).private_key(unsafe_skip_rsa_key_validation=True)
    data = damaged.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    key = load_key(data, None, None, threads)
    with pytest.raises(SigningFailed):
        await key.sign(*SUITED["rsa2048"])


async def test_key_with_chain(keys: Any, threads: Threads) -> None:
    own, issuer = keys["p384"], keys["rsa2048"]
    for parts in ([own.pem, own.certificate_pem], [own.certificate_pem, b"a comment\n", own.pem]):
        key = load_key(b"".join([*parts, issuer.certificate_pem]), None, None, threads)
        assert key.certificates == (own.certificate, issuer.certificate)
        assert await key.sign(*SUITED["p384"])


def test_certificate_file(keys: Any, threads: Threads) -> None:
    own, issuer = keys["p384"], keys["rsa2048"]
    chain = own.certificate_pem + issuer.certificate_pem
    assert load_key(own.der, None, chain, threads).certificates == (own.certificate, issuer.certificate)
    assert load_key(own.der, None, own.certificate_der, threads).certificates == (own.certificate,)
    # it counts, and not the certificate that stands with the key
    combined = issuer.certificate_pem + own.pem
    assert load_key(combined, None, chain, threads).certificates[0] == own.certificate
    with pytest.raises(KeyMismatch):
        load_key(combined, None, None, threads)
    with pytest.raises(KeyMismatch):
        load_key(own.pem, None, issuer.certificate_pem + own.certificate_pem, threads)


@pytest.mark.parametrize("data", [b"", b"nothing", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_certificate_file_without_certificate(data: bytes, keys: Any, threads: Threads) -> None:
    with pytest.raises(KeyUnusable, match="certificate"):
        load_key(keys["p384"].pem, None, data, threads)
    with pytest.raises(KeyUnusable, match="certificate"):
        load_key(keys["p384"].pem, None, keys["p384"].pem, threads)


def test_two_keys(keys: Any, threads: Threads) -> None:
    with pytest.raises(KeyAmbiguous, match="2 private keys"):
        load_key(keys["p384"].pem + keys["p256"].pem, None, None, threads)


async def test_threads_end() -> None:
    threads = Threads("ends", 2)
    running = asyncio.create_task(threads.run(sum, range(1_000_000)))
    await asyncio.sleep(0)
    await threads.stop()
    assert await running == 499999500000
    with pytest.raises(ProviderUnavailable, match="stopped"):
        await threads.run(sum, ())
    await threads.stop()
