"""A `SigningKey` for code that wants a private key of `cryptography`: builders of certificates and CSRs, and the like.

request = await with_private_key(key, lambda private: builder.sign(private, hashes.SHA256()))
"""

import asyncio
from collections.abc import Callable
from typing import Any, NoReturn, Self, TypeVar

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from tokens.errors import KeyUnsuited
from tokens.provider import SigningKey
from tokens.schemes import Ecdsa, Ed25519, Hash, RsaPkcs1v15, RsaPss, Scheme
from tokens.verify import ecdsa_der

T = TypeVar("T")
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


async def with_private_key(key: SigningKey, function: Callable[[PrivateKey], T]) -> T:
    """What the function returns; it runs in a thread, where each signature waits for the key's own `sign`.

    The private key signs messages, and nothing else: whatever else is asked of it raises KeyUnsuited.

    Raises what the function and `SigningKey.sign` raise.
    """
    loop = asyncio.get_running_loop()

    def sign(scheme: Scheme, data: bytes) -> bytes:
        return asyncio.run_coroutine_threadsafe(key.sign(scheme, data), loop).result()

    adapted: dict[type[Any], Callable[[], PrivateKey]] = {
        rsa.RSAPublicKey: lambda: _Rsa(key.public_key, sign),
        ec.EllipticCurvePublicKey: lambda: _Ec(key.public_key, sign),
        ed25519.Ed25519PublicKey: lambda: _Ed25519(key.public_key, sign),
    }
    private = next(make() for type_, make in adapted.items() if isinstance(key.public_key, type_))
    return await asyncio.to_thread(function, private)


class _Adapted:
    """What the three have in common."""

    def __init__(self, public_key: Any, sign: Callable[[Scheme, bytes], bytes]) -> None:
        self._public_key = public_key
        self._sign = sign

    def public_key(self) -> Any:
        return self._public_key

    @property
    def key_size(self) -> int:
        size: int = self._public_key.key_size
        return size

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise KeyUnsuited("The key signs, and cannot be read.", "Use it to sign, or another key.")

    private_numbers = private_bytes = private_bytes_raw = decrypt = exchange = _refuse


# `cryptography` passes arguments by these names


class _Rsa(_Adapted, rsa.RSAPrivateKey):
    def sign(self, data: bytes, padding: Any, algorithm: Any) -> bytes:
        hash_ = _hash(algorithm)
        return self._sign(_rsa_scheme(padding, algorithm, hash_, self._public_key), _digest(algorithm, data))


class _Ec(_Adapted, ec.EllipticCurvePrivateKey):
    @property
    def curve(self) -> ec.EllipticCurve:
        curve: ec.EllipticCurve = self._public_key.curve
        return curve

    def sign(self, data: Any, signature_algorithm: Any) -> bytes:
        algorithm = signature_algorithm.algorithm
        raw = self._sign(Ecdsa(_hash(algorithm)), _digest(algorithm, bytes(data)))
        return ecdsa_der(raw, self._public_key)


class _Ed25519(_Adapted, ed25519.Ed25519PrivateKey):
    def sign(self, data: Any) -> bytes:
        return self._sign(Ed25519(), bytes(data))


def _rsa_scheme(pad: Any, algorithm: hashes.HashAlgorithm, hash_: Hash, public_key: rsa.RSAPublicKey) -> Scheme:
    if isinstance(pad, padding.PKCS1v15):
        return RsaPkcs1v15(hash_)
    # no public attribute has them
    if isinstance(pad, padding.PSS) and pad.mgf._algorithm.name == algorithm.name:
        salt = pad._salt_length
        if salt is padding.PSS.DIGEST_LENGTH:
            salt = hash_.size
        elif salt is padding.PSS.MAX_LENGTH:
            salt = padding.calculate_max_pss_salt_length(public_key, algorithm)
        if isinstance(salt, int):
            return RsaPss(hash_, salt)
    raise KeyUnsuited("No such padding is made.", "Use PKCS #1 v1.5, or PSS with MGF1 of the same hash.")


def _hash(algorithm: Any) -> Hash:
    if isinstance(algorithm, hashes.HashAlgorithm) and algorithm.name in set(Hash):
        return Hash(algorithm.name)
    raise KeyUnsuited("No signature with this hash is made.", f"Use one of {', '.join(Hash)}.")


def _digest(algorithm: hashes.HashAlgorithm, data: bytes) -> bytes:
    digest = hashes.Hash(algorithm)
    digest.update(data)
    return digest.finalize()
