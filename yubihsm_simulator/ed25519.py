"""Ed25519 with the expanded private key, which is all that is left of a key that was wrapped without its seed.

Source: RFC 8032, sections 5.1.3 to 5.1.6.
"""

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha512

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SEED_BYTES = 32
EXPANDED_BYTES = 96
"""Secret scalar (big-endian), prefix, public key: 32 bytes each, as yubihsm-wrap writes them."""

_P = 2**255 - 19
_L = 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, -1, _P) % _P

_Point = tuple[int, int, int, int]  # extended homogeneous coordinates X, Y, Z, T
_B: _Point = (
    0x216936D3CD6E53FEC0A4E231FDD6DC5C692CC7609525A7B2C9562D608F25D51A,
    4 * pow(5, -1, _P) % _P,
    1,
    0x67875F0FD78B766566EA4E8E64ABE37D20F09F80775152F56DDE8AB3A5B7DDA3,
)


def _add(p: _Point, q: _Point) -> _Point:
    a, b = (p[1] - p[0]) * (q[1] - q[0]) % _P, (p[1] + p[0]) * (q[1] + q[0]) % _P
    c, d = 2 * p[3] * q[3] * _D % _P, 2 * p[2] * q[2] % _P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % _P, g * h % _P, f * g % _P, e * h % _P


def _multiply(scalar: int) -> bytes:
    """scalar times the base point, encoded."""
    total: _Point = (0, 1, 1, 0)
    power = _B
    while scalar:
        if scalar & 1:
            total = _add(total, power)
        power = _add(power, power)
        scalar >>= 1
    z_inverse = pow(total[2], -1, _P)
    x, y = total[0] * z_inverse % _P, total[1] * z_inverse % _P
    return (y | (x & 1) << 255).to_bytes(32, "little")


def _expand(seed: bytes) -> bytes:
    digest = bytearray(sha512(seed).digest())
    digest[0] &= 0xF8
    digest[31] = digest[31] & 0x7F | 0x40
    public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    return bytes(digest[31::-1]) + bytes(digest[32:]) + public


@dataclass(frozen=True)
class Ed25519Key:
    """A private key. `value` is the seed (32 bytes) or the expanded key (96 bytes)."""

    value: bytes

    @property
    def seed(self) -> bytes | None:
        """The seed, where it is known."""
        return self.value if len(self.value) == SEED_BYTES else None

    @cached_property
    def expanded(self) -> bytes:
        """The expanded key, 96 bytes."""
        return _expand(self.value) if self.seed else self.value

    @property
    def consistent(self) -> bool:
        """Whether the expanded key's public key belongs to its secret scalar."""
        return _multiply(int.from_bytes(self.expanded[:32], "big")) == self.expanded[64:]

    def public_key(self) -> Ed25519PublicKey:
        """The public key."""
        return Ed25519PublicKey.from_public_bytes(self.expanded[64:])

    def sign(self, message: bytes) -> bytes:
        """64 bytes; RFC 8032 section 5.1.6."""
        if self.seed:
            return self._private_key.sign(message)
        secret, prefix, public = int.from_bytes(self.value[:32], "big"), self.value[32:64], self.value[64:]
        r = int.from_bytes(sha512(prefix + message).digest(), "little") % _L
        encoded = _multiply(r)
        k = int.from_bytes(sha512(encoded + public + message).digest(), "little") % _L
        return encoded + ((r + k * secret) % _L).to_bytes(32, "little")

    @cached_property
    def _private_key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.value)
