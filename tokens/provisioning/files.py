"""What a device is given comes from files: read, and checked against the plan, before the device is touched."""

import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key, load_pem_private_key
from yubihsm.defs import ALGORITHM, OBJECT

from tokens.certificates import check_certifies, load_certificates
from tokens.errors import KeyUnusable
from tokens.provisioning import shares
from tokens.provisioning.algorithms import algorithm_name
from tokens.provisioning.declaration import KeyFile, NewShares
from tokens.provisioning.plan import ImportKey, NewObject, PutAuthKey, PutCertificate, PutWrapKey, Step
from tokens.secret import SecretSource
from tokens.symmetric_file import unhexed

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

FACTORY_PASSWORD = "password"  # noqa: S105  # everybody knows it

PASSWORD_MIN_CHARACTERS = 8
PASSWORD_MAX_CHARACTERS = 64
"""What Yubico's PKCS#11 module takes."""

_PASSWORD_BYTES = 24
_WRAP_KEY_BYTES = 32
_EXPONENT = 65537
"""The only one that the device has."""


@dataclass(slots=True)
class Files:
    """What the files hold, by the id of the object that it is for."""

    passwords: dict[int, str] = field(default_factory=dict, repr=False)
    keys: dict[int, PrivateKey | bytes] = field(default_factory=dict, repr=False)
    certificates: dict[int, x509.Certificate] = field(default_factory=dict)
    wrap_key: bytes = field(default=b"", repr=False)
    new_shares: list[Path] = field(default_factory=list)
    """The shares that were written; they are worth nothing if the set-up fails."""

    def write_shares(self, split: NewShares) -> None:
        """Splits the wrap key. Raises KeyUnusable where a file cannot be written, and leaves none then."""
        try:
            texts = shares.split(self.wrap_key, split.threshold, len(split.files))
            for path, text in zip(split.files, texts, strict=True):
                _write_secret(path, text)
                self.new_shares.append(path)
        except KeyUnusable:
            self.forget_shares()
            raise

    def forget_shares(self) -> None:
        """Deletes the shares of a wrap key that no device holds."""
        for path in self.new_shares:
            path.unlink(missing_ok=True)


def prepare(steps: Iterable[Step]) -> Files:
    """Reads what is there, then makes the passwords and shares that are not.

    Raises KeyUnusable where a file cannot be read or written, or does not fit the plan.
    """
    steps = tuple(steps)
    files = Files()
    for step in steps:
        match step:
            case ImportKey(new, source):
                files.keys[new.id] = _read_key(new, source)
            case PutCertificate(new, path):
                files.certificates[new.id] = _read_certificate(path, files.keys[new.id])
            case PutWrapKey(_, None, paths):
                files.wrap_key = shares.combine([_read(path).decode("ascii", "replace") for path in paths])
            case PutWrapKey(_, split, _) if split is not None and (there := [f for f in split.files if f.exists()]):
                raise KeyUnusable(
                    f"{there[0]} is there already: it may be the share of a wrap key that is in use.",
                    "Name other files, or say `combine` to use that wrap key.",
                )
            case PutAuthKey(new, password) if not _is_new(password):
                files.passwords[new.id] = read_password(password)
    for step in steps:
        match step:
            case PutAuthKey(new, password) if new.id not in files.passwords:
                files.passwords[new.id] = secrets.token_urlsafe(_PASSWORD_BYTES)
                _write_secret(password.path(), files.passwords[new.id])
            case PutWrapKey(_, split, _) if split is not None:
                files.wrap_key = secrets.token_bytes(_WRAP_KEY_BYTES)
                files.write_shares(split)
    return files


def read_password(source: SecretSource) -> str:
    """The password. Raises KeyUnusable where it cannot be read, or is none for a device that is in use."""
    try:
        password = source.read().decode()
    except UnicodeDecodeError:
        raise KeyUnusable(f"The password in {source.path()} is not UTF-8 text.", "Write another one.") from None
    if not PASSWORD_MIN_CHARACTERS <= len(password) <= PASSWORD_MAX_CHARACTERS or password == FACTORY_PASSWORD:
        raise KeyUnusable(
            f"The password in {source.path()} has not {PASSWORD_MIN_CHARACTERS} to {PASSWORD_MAX_CHARACTERS} "
            "characters, or is the factory's.",
            "Delete the file: a good one is made.",
        )
    return password


def _is_new(source: SecretSource) -> bool:
    return source.file is not None and not source.file.exists()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KeyUnusable(f"{path} cannot be read: {error.strerror}.", "Correct the path.") from None


def _read_key(new: NewObject, source: KeyFile) -> PrivateKey | bytes:
    data = _read(source.file)
    if new.type is OBJECT.ASYMMETRIC_KEY:
        passphrase = None if source.passphrase is None else source.passphrase.read()
        return _private_key(new, source.file, data, passphrase)
    data, size = unhexed(data), new.algorithm.to_key_size()
    # an AES key has its size; a longer HMAC key than that would be hashed (RFC 2104, section 2)
    if len(data) != size if new.type is OBJECT.SYMMETRIC_KEY else not 0 < len(data) <= size:
        raise KeyUnusable(
            f"{source.file} has {len(data)} bytes, and a key of {algorithm_name(new.algorithm)} has {size}.",
            "Write the key in hexadecimal, or its bare bytes without a newline.",
        )
    return data


def _private_key(new: NewObject, path: Path, data: bytes, passphrase: bytes | None) -> PrivateKey:
    load = load_pem_private_key if b"-----BEGIN " in data else load_der_private_key
    try:
        try:
            key = load(data, None)
        except TypeError:  # it is encrypted
            if not passphrase:
                raise KeyUnusable(f"{path} is encrypted.", "Say where its `passphrase` is.") from None
            key = load(data, passphrase)
    except (ValueError, UnsupportedAlgorithm):
        raise KeyUnusable(
            f"{path} holds no private key that can be read, or the passphrase is wrong.", "Use PEM or DER."
        ) from None
    if not isinstance(key, PrivateKey) or _algorithm(key) != new.algorithm:
        raise KeyUnusable(
            f"The key in {path} is not one of {algorithm_name(new.algorithm)}.",
            f"Correct `algorithm`; the exponent of an RSA key is {_EXPONENT}.",
        )
    return key


def _algorithm(key: PrivateKey) -> ALGORITHM | None:
    match key:
        case rsa.RSAPrivateKey():
            fits = key.public_key().public_numbers().e == _EXPONENT
            return ALGORITHM.__members__.get(f"RSA_{key.key_size}") if fits else None
        case ec.EllipticCurvePrivateKey():
            try:
                return ALGORITHM.for_curve(key.curve)
            except ValueError:
                return None
        case _:
            return ALGORITHM.EC_ED25519


def _read_certificate(path: Path, key: PrivateKey | bytes) -> x509.Certificate:
    certificates = load_certificates(_read(path))
    if isinstance(key, PrivateKey):
        check_certifies(certificates, key.public_key())
    return certificates[0]


def _write_secret(path: Path, text: str) -> None:
    """Writes a line to a new file of mode 0600, and to the disk. Raises KeyUnusable."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise KeyUnusable(f"{path} cannot be written: {error.strerror}.", "Name another file.") from None
