"""What can be asked of a symmetric key: its algorithms and the operations.

Plain data and rules, imported by the token workers too: nothing here may import more than the standard library.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from enum import StrEnum

from tokens.errors import KeyUnsuited

BLOCK_BYTES = 16
"""An AES block (FIPS 197)."""

MAC_BYTES = 32
"""What HMAC-SHA256 makes (RFC 4868, section 2.3, before truncation)."""


class SymmetricAlgorithm(StrEnum):
    """What a symmetric key is for: AES with keys of one size, or HMAC."""

    AES_128 = "AES-128"
    AES_256 = "AES-256"
    HMAC_SHA256 = "HMAC-SHA256"


AES_BYTES = {SymmetricAlgorithm.AES_128: 16, SymmetricAlgorithm.AES_256: 32}
"""The length of a key of each AES algorithm."""

HMAC_BYTES = range(16, 64 + 1)
"""The lengths of an HMAC key: 128 bits of strength, and no more than a block of SHA-256 (RFC 2104, section 3)."""


class Operation(StrEnum):
    """One use of a key, by the name that frames have for it."""

    ENCRYPT_ECB = "encrypt-ecb"
    DECRYPT_ECB = "decrypt-ecb"
    ENCRYPT_CBC = "encrypt-cbc"
    DECRYPT_CBC = "decrypt-cbc"
    HMAC_SHA256 = "hmac-sha256"


_CBC = (Operation.ENCRYPT_CBC, Operation.DECRYPT_CBC)


class Computing(ABC):
    """The operations of a `tokens.provider.SymmetricKey`, each made of `compute`.

    Arguments:
        algorithm: what the key is for.
        place: which object of its provider the key is.
    """

    def __init__(self, algorithm: SymmetricAlgorithm, place: str) -> None:
        self._algorithm = algorithm
        self._place = place

    @property
    def algorithm(self) -> SymmetricAlgorithm:
        """What the key is for."""
        return self._algorithm

    @property
    def place(self) -> str:
        """Which object of its provider the key is."""
        return self._place

    @abstractmethod
    async def compute(self, operation: Operation, data: bytes, iv: bytes) -> bytes:
        """Does it; the arguments suit the key. `iv` is empty but for CBC."""

    async def encrypt_ecb(self, data: bytes) -> bytes:
        """See `SymmetricKey.encrypt_ecb`."""
        return await self._checked(Operation.ENCRYPT_ECB, data)

    async def decrypt_ecb(self, data: bytes) -> bytes:
        """See `SymmetricKey.decrypt_ecb`."""
        return await self._checked(Operation.DECRYPT_ECB, data)

    async def encrypt_cbc(self, iv: bytes, data: bytes) -> bytes:
        """See `SymmetricKey.encrypt_cbc`."""
        return await self._checked(Operation.ENCRYPT_CBC, data, iv)

    async def decrypt_cbc(self, iv: bytes, data: bytes) -> bytes:
        """See `SymmetricKey.decrypt_cbc`."""
        return await self._checked(Operation.DECRYPT_CBC, data, iv)

    async def hmac_sha256(self, data: bytes) -> bytes:
        """See `SymmetricKey.hmac_sha256`."""
        return await self._checked(Operation.HMAC_SHA256, data)

    async def _checked(self, operation: Operation, data: bytes, iv: bytes = b"") -> bytes:
        is_mac = operation is Operation.HMAC_SHA256
        if is_mac is not (self._algorithm is SymmetricAlgorithm.HMAC_SHA256):
            raise KeyUnsuited(
                f"A key for {self._algorithm} is of no use for {operation}.", "Grant a key of the right type."
            )
        if not data or (not is_mac and len(data) % BLOCK_BYTES):
            wanted = "some bytes" if is_mac else f"blocks of {BLOCK_BYTES} bytes"
            raise KeyUnsuited(f"{operation} takes {wanted}; these are {len(data)}.", "Pad the data.")
        if len(iv) != (BLOCK_BYTES if operation in _CBC else 0):
            raise KeyUnsuited(f"An IV has {BLOCK_BYTES} bytes; this one has {len(iv)}.", "Send a whole one.")
        return await self.compute(operation, data, iv)


def check_algorithm(found: SymmetricAlgorithm, wanted: Collection[SymmetricAlgorithm]) -> None:
    """Raises KeyUnsuited where the key is for none of the wanted algorithms."""
    if found not in wanted:
        raise KeyUnsuited(
            f"The key is for {found}, and one for {' or '.join(sorted(wanted))} is needed.",
            "Grant a key of the right type and length.",
        )
