"""Verifies a signature with the public key, before anybody uses it."""

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, decode_dss_signature, encode_dss_signature

from tokens.errors import KeyUnsuited, SignatureMismatch
from tokens.provider import PublicKey
from tokens.schemes import Ecdsa, Ed25519, Hash, RsaPkcs1v15, RsaPss, Scheme

HASHES: dict[Hash, hashes.HashAlgorithm] = {
    Hash.SHA224: hashes.SHA224(),
    Hash.SHA256: hashes.SHA256(),
    Hash.SHA384: hashes.SHA384(),
    Hash.SHA512: hashes.SHA512(),
    Hash.SHA3_224: hashes.SHA3_224(),
    Hash.SHA3_256: hashes.SHA3_256(),
    Hash.SHA3_384: hashes.SHA3_384(),
    Hash.SHA3_512: hashes.SHA3_512(),
}


def check_suited(public_key: PublicKey, scheme: Scheme) -> None:
    """Raises KeyUnsuited where a key of this type cannot make a signature of this scheme."""
    suited = {
        RsaPkcs1v15: rsa.RSAPublicKey,
        RsaPss: rsa.RSAPublicKey,
        Ecdsa: ec.EllipticCurvePublicKey,
        Ed25519: ed25519.Ed25519PublicKey,
    }[type(scheme)]
    if not isinstance(public_key, suited):
        raise KeyUnsuited(
            f"{type(scheme).__name__} needs another type of key than {type(public_key).__name__.strip('_')}.",
            "Ask for a method that the granted key can do, or grant another key.",
        )
    if isinstance(scheme, RsaPss) and isinstance(public_key, rsa.RSAPublicKey):
        # RFC 8017, section 9.1.1: emLen >= hLen + sLen + 2, emBits = modBits - 1
        room = (public_key.key_size + 6) // 8 - scheme.hash.size - 2
        if scheme.salt_length > room:
            raise KeyUnsuited(
                f"A salt of {scheme.salt_length} bytes does not fit this key; it has room for {room}.",
                "Ask for a shorter salt.",
            )


def pad_pss(scheme: RsaPss) -> padding.PSS:
    """The scheme's padding in the terms of `cryptography`."""
    return padding.PSS(padding.MGF1(HASHES[scheme.hash]), scheme.salt_length)


def verify(public_key: PublicKey, scheme: Scheme, data: bytes, signature: bytes) -> None:
    """Verifies a raw signature (ECDSA: r || s, each as long as the curve's order).

    Raises:
        KeyUnsuited: the key is of another type than the scheme.
        SignatureMismatch: the signature is not one of this key over this data.
    """
    check_suited(public_key, scheme)
    try:
        match public_key, scheme:
            case rsa.RSAPublicKey(), RsaPkcs1v15():
                public_key.verify(signature, data, padding.PKCS1v15(), Prehashed(HASHES[scheme.hash]))
            case rsa.RSAPublicKey(), RsaPss():
                public_key.verify(signature, data, pad_pss(scheme), Prehashed(HASHES[scheme.hash]))
            case ec.EllipticCurvePublicKey(), Ecdsa():
                der = ecdsa_der(signature, public_key)
                public_key.verify(der, data, ec.ECDSA(Prehashed(HASHES[scheme.hash])))
            case ed25519.Ed25519PublicKey(), Ed25519():
                public_key.verify(signature, data)
    except (InvalidSignature, ValueError):
        raise SignatureMismatch(
            "The provider returned a signature that does not verify with the key's public key.",
            "Check that the private and public objects of the key belong together.",
        ) from None


def ecdsa_der(signature: bytes, public_key: ec.EllipticCurvePublicKey) -> bytes:
    """Turns r || s into DER Ecdsa-Sig-Value (RFC 3279, section 2.2.3).

    Raises ValueError where the length is not twice that of the curve's order.
    """
    size = (public_key.curve.key_size + 7) // 8
    if len(signature) != 2 * size:
        raise ValueError(f"an ECDSA signature of {len(signature)} bytes; {2 * size} expected")
    return encode_dss_signature(int.from_bytes(signature[:size], "big"), int.from_bytes(signature[size:], "big"))


def ecdsa_raw(der: bytes, public_key: ec.EllipticCurvePublicKey) -> bytes:
    """Turns DER Ecdsa-Sig-Value into r || s, each as long as the curve's order: the inverse of `ecdsa_der`.

    Raises ValueError where it is no such value.
    """
    size = (public_key.curve.key_size + 7) // 8
    try:
        return b"".join(number.to_bytes(size, "big") for number in decode_dss_signature(der))
    except OverflowError:
        raise ValueError("an ECDSA signature of numbers that are no residues of the curve's order") from None
