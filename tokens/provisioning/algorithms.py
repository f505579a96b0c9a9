"""The kinds of key that a device can be told to hold, by the names that yubihsm-shell has for them."""

from dataclasses import dataclass
from typing import Literal, get_args

from yubihsm.defs import ALGORITHM, CAPABILITY, OBJECT

AlgorithmName = Literal[
    "rsa2048",
    "rsa3072",
    "rsa4096",
    "ecp256",
    "ecp384",
    "ecp521",
    "eck256",
    "ecbp256",
    "ecbp384",
    "ecbp512",
    "ed25519",
    "hmac-sha256",
    "hmac-sha384",
    "hmac-sha512",
    "aes128",
    "aes192",
    "aes256",
]

_ECDSA = CAPABILITY.SIGN_ECDSA | CAPABILITY.DERIVE_ECDH | CAPABILITY.SIGN_ATTESTATION_CERTIFICATE
_HMAC = CAPABILITY.SIGN_HMAC | CAPABILITY.VERIFY_HMAC


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A kind of key: its number, the type of its object, and what it can be used for."""

    number: ALGORITHM
    type: OBJECT
    uses: CAPABILITY


def _algorithm(name: str) -> Algorithm:
    if name.startswith("hmac-"):
        return Algorithm(ALGORITHM[name.upper().replace("-", "_")], OBJECT.HMAC_KEY, _HMAC)
    if name.startswith("aes"):
        uses = CAPABILITY.ENCRYPT_ECB | CAPABILITY.DECRYPT_ECB | CAPABILITY.ENCRYPT_CBC | CAPABILITY.DECRYPT_CBC
        return Algorithm(ALGORITHM[name.upper()], OBJECT.SYMMETRIC_KEY, uses)
    if name == "ed25519":
        return Algorithm(ALGORITHM.EC_ED25519, OBJECT.ASYMMETRIC_KEY, CAPABILITY.SIGN_EDDSA)
    if name.startswith("ec"):
        return Algorithm(ALGORITHM[f"EC_{name.removeprefix('ec').upper()}"], OBJECT.ASYMMETRIC_KEY, _ECDSA)
    uses = (
        CAPABILITY.SIGN_PKCS
        | CAPABILITY.SIGN_PSS
        | CAPABILITY.DECRYPT_PKCS
        | CAPABILITY.DECRYPT_OAEP
        | CAPABILITY.SIGN_ATTESTATION_CERTIFICATE
    )
    return Algorithm(ALGORITHM[f"RSA_{name.removeprefix('rsa')}"], OBJECT.ASYMMETRIC_KEY, uses)


ALGORITHMS: dict[str, Algorithm] = {name: _algorithm(name) for name in get_args(AlgorithmName)}
"""Every algorithm by its name."""

ALGORITHM_NAMES = {algorithm.number: name for name, algorithm in ALGORITHMS.items()} | {
    ALGORITHM.AES128_YUBICO_AUTHENTICATION: "aes128-yubico-authentication",
    ALGORITHM.AES256_CCM_WRAP: "aes256-ccm-wrap",
    ALGORITHM.OPAQUE_DATA: "opaque-data",
    ALGORITHM.OPAQUE_X509_CERTIFICATE: "opaque-x509-certificate",
}


def algorithm_name(number: ALGORITHM) -> str:
    """The name, or the number of what this package never makes."""
    return ALGORITHM_NAMES.get(number, str(int(number)))
