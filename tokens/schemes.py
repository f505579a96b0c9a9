"""What can be asked of a signing key: the signature schemes and their hashes.

Plain data, imported by the token workers too: nothing here may import more than the standard library.
"""

from dataclasses import dataclass
from enum import StrEnum

from tokens.errors import KeyUnsuited


class Hash(StrEnum):
    """A hash function, by the name that `hashlib.new` and OpenSSL know it by."""

    SHA224 = "sha224"
    SHA256 = "sha256"
    SHA384 = "sha384"
    SHA512 = "sha512"
    SHA3_224 = "sha3-224"
    SHA3_256 = "sha3-256"
    SHA3_384 = "sha3-384"
    SHA3_512 = "sha3-512"

    @property
    def size(self) -> int:
        """Length of a digest in bytes."""
        return int(self.value[-3:]) // 8

    @property
    def hashlib_name(self) -> str:
        """The name by which `hashlib.new` knows it."""
        return self.value.replace("-", "_")


@dataclass(frozen=True, slots=True)
class RsaPkcs1v15:
    """RSASSA-PKCS1-v1_5 (RFC 8017, section 8.2) over a digest."""

    hash: Hash


@dataclass(frozen=True, slots=True)
class RsaPss:
    """RSASSA-PSS (RFC 8017, section 8.1) over a digest; MGF1 uses the same hash.

    `salt_length` is in bytes.
    """

    hash: Hash
    salt_length: int


@dataclass(frozen=True, slots=True)
class Ecdsa:
    """ECDSA over a digest; `hash` says which function made it."""

    hash: Hash


@dataclass(frozen=True, slots=True)
class Ed25519:
    """Pure Ed25519 (RFC 8032): signs the message itself, not a digest."""


Scheme = RsaPkcs1v15 | RsaPss | Ecdsa | Ed25519

# DigestInfo without the digest (RFC 8017, section 9.2, note 1; SHA-3: NIST's OIDs of the same arc).
# SEQUENCE { SEQUENCE { OID 2.16.840.1.101.3.4.2.x, NULL }, OCTET STRING }: 17 bytes before the digest.
_HASH_ARC_LAST = {
    Hash.SHA256: 1,
    Hash.SHA384: 2,
    Hash.SHA512: 3,
    Hash.SHA224: 4,
    Hash.SHA3_224: 7,
    Hash.SHA3_256: 8,
    Hash.SHA3_384: 9,
    Hash.SHA3_512: 10,
}


def digest_info(hash_: Hash, digest: bytes) -> bytes:
    """DER DigestInfo: what RSASSA-PKCS1-v1_5 pads (RFC 8017, section 9.2)."""
    oid = bytes.fromhex("06096086480165030402") + bytes([_HASH_ARC_LAST[hash_]])
    algorithm = b"\x30" + bytes([len(oid) + 2]) + oid + b"\x05\x00"
    value = b"\x04" + bytes([len(digest)]) + digest
    return b"\x30" + bytes([len(algorithm) + len(value)]) + algorithm + value


def check_data(scheme: Scheme, data: bytes) -> None:
    """Raises KeyUnsuited where `data` is not as long as a digest of the scheme's hash."""
    if not isinstance(scheme, Ed25519) and len(data) != scheme.hash.size:
        raise KeyUnsuited(
            f"A {scheme.hash} digest has {scheme.hash.size} bytes; this one has {len(data)}.",
            "Send the digest that the named hash function made.",
        )
