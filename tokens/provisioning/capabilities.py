"""What objects may be used for: the vendor's names, and least privilege for each role.

https://docs.yubico.com/hardware/yubihsm-2/hsm-2-user-guide/hsm2-core-concepts.html
"""

from collections.abc import Iterable
from typing import Literal

from yubihsm.defs import CAPABILITY

Role = Literal["signer", "auditor", "admin"]

_SPELT = {
    CAPABILITY.PUT_ASYMMETRIC: "put-asymmetric-key",
    CAPABILITY.PUT_HMAC_KEY: "put-mac-key",
    CAPABILITY.PUBLIC_WRAP_KEY_WRITE: "put-public-wrap-key",
    CAPABILITY.PUBLIC_WRAP_KEY_DELETE: "delete-public-wrap-key",
}
"""Where yubihsm-shell's name is not that of python-yubihsm."""

CAPABILITIES = {_SPELT.get(each, str(each.name).lower().replace("_", "-")): each for each in CAPABILITY}
"""Every capability by the name that yubihsm-shell has for it."""

SIGNING = CAPABILITY.SIGN_PKCS | CAPABILITY.SIGN_PSS | CAPABILITY.SIGN_ECDSA | CAPABILITY.SIGN_EDDSA

COMPUTING = (
    CAPABILITY.SIGN_HMAC
    | CAPABILITY.ENCRYPT_ECB
    | CAPABILITY.DECRYPT_ECB
    | CAPABILITY.ENCRYPT_CBC
    | CAPABILITY.DECRYPT_CBC
)
"""What the service does with symmetric keys; the capabilities of each key say which of it."""

KEY_USES = (
    SIGNING
    | COMPUTING
    | CAPABILITY.DECRYPT_PKCS
    | CAPABILITY.DECRYPT_OAEP
    | CAPABILITY.DERIVE_ECDH
    | CAPABILITY.SIGN_ATTESTATION_CERTIFICATE
    | CAPABILITY.VERIFY_HMAC
)
"""All that a declared key can be for."""

ROLES: dict[Role, CAPABILITY] = {
    # a certificate and its attestation are no secrets, and the service offers both
    "signer": SIGNING | COMPUTING | CAPABILITY.GET_OPAQUE | CAPABILITY.SIGN_ATTESTATION_CERTIFICATE,
    "auditor": CAPABILITY.GET_LOG_ENTRIES,
    # no wrap keys: who can put one knows it, and could take every exportable key home; no reset: it ends the audit
    "admin": (
        CAPABILITY.PUT_ASYMMETRIC
        | CAPABILITY.GENERATE_ASYMMETRIC_KEY
        | CAPABILITY.DELETE_ASYMMETRIC_KEY
        | CAPABILITY.PUT_HMAC_KEY
        | CAPABILITY.GENERATE_HMAC_KEY
        | CAPABILITY.DELETE_HMAC_KEY
        | CAPABILITY.PUT_SYMMETRIC_KEY
        | CAPABILITY.GENERATE_SYMMETRIC_KEY
        | CAPABILITY.DELETE_SYMMETRIC_KEY
        | CAPABILITY.GET_OPAQUE
        | CAPABILITY.PUT_OPAQUE
        | CAPABILITY.DELETE_OPAQUE
        | CAPABILITY.PUT_AUTHENTICATION_KEY
        | CAPABILITY.DELETE_AUTHENTICATION_KEY
        | CAPABILITY.CHANGE_AUTHENTICATION_KEY
        | CAPABILITY.EXPORT_WRAPPED
        | CAPABILITY.IMPORT_WRAPPED
        | CAPABILITY.SIGN_ATTESTATION_CERTIFICATE
        | CAPABILITY.GET_OPTION
        | CAPABILITY.SET_OPTION
    ),
}

ADMIN_DELEGATES = KEY_USES | CAPABILITY.EXPORTABLE_UNDER_WRAP | ROLES["signer"] | ROLES["auditor"] | ROLES["admin"]
"""What the objects that an admin makes may have: keys of every kind, and authentication keys of every role."""

WRAPS = CAPABILITY.EXPORT_WRAPPED | CAPABILITY.IMPORT_WRAPPED
"""What the wrap key is for."""

WRAP_DELEGATES = KEY_USES | CAPABILITY.GET_OPAQUE | CAPABILITY.EXPORTABLE_UNDER_WRAP
"""What the objects that go under the wrap key may have."""

ALL_DOMAINS = 0xFFFF


def combined(names: Iterable[str]) -> CAPABILITY:
    """The capabilities of these names, which are known."""
    flags = CAPABILITY(0)
    for name in names:
        flags |= CAPABILITIES[name]
    return flags


def names(capabilities: CAPABILITY) -> list[str]:
    """Their names, in the order of the alphabet."""
    return sorted(name for name, each in CAPABILITIES.items() if each & capabilities)


def domain_mask(domains: Iterable[int]) -> int:
    """Domains 1 to 16 as the device has them: bit 0 is domain 1."""
    return sum(1 << (domain - 1) for domain in set(domains))


def domain_numbers(mask: int) -> list[int]:
    """The domains of a mask."""
    return [number for number in range(1, 17) if mask >> (number - 1) & 1]
