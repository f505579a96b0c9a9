"""A file becomes a symmetric key in this process: for one job, in memory only.

The file holds hexadecimal text, as `2d4a61...` or in NVIDIA's words `0x11223344 0x55667788 ...`, or the key's bare
bytes.
"""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hmac import HMAC

from tokens.errors import KeyUnusable, ProviderUnavailable
from tokens.keyfile import read_file
from tokens.provider import KeyReference
from tokens.symmetric import AES_BYTES, HMAC_BYTES, Computing, Operation, SymmetricAlgorithm
from tokens.threads import Threads

_HEX = re.compile(rb"\s*(?:(?:0[xX])?(?:[0-9a-fA-F]{2})+\s+)+")


class MemorySymmetricKey(Computing):
    """A symmetric key in this process's memory. Implements `tokens.provider.SymmetricKey`."""

    def __init__(self, algorithm: SymmetricAlgorithm, key: bytes, place: str, threads: Threads) -> None:
        super().__init__(algorithm, place)
        self._key: bytes | None = key
        self._threads = threads

    async def compute(self, operation: Operation, data: bytes, iv: bytes) -> bytes:
        """See `Computing.compute`. Raises ProviderUnavailable when the job has ended."""
        if self._key is None:
            raise ProviderUnavailable("The job that opened this key has ended.", "Open the key again.")
        return await self._threads.run(_compute, self._key, operation, data, iv)

    def close(self) -> None:
        """Forgets the key: it is of no use any more."""
        self._key = None


@asynccontextmanager
async def open_symmetric_key(
    reference: KeyReference,
    wanted: Collection[SymmetricAlgorithm],
    read: Callable[[str, bool], Awaitable[bytes]],
    threads: Threads,
) -> AsyncIterator[MemorySymmetricKey]:
    """The symmetric key of a key store, for the length of one job.

    Arguments:
        wanted: what it may be for; the file's length says which of them it is.
        read: the bytes of the object at a path.
        threads: compute with the key.

    Raises what `read` and `load_symmetric_key` raise, and KeyNotFound where the reference can be none of a key store.
    """
    algorithm, value = load_symmetric_key(await read_file(reference, read), wanted)
    key = MemorySymmetricKey(algorithm, value, reference.object or "", threads)
    try:
        yield key
    finally:
        key.close()


def load_symmetric_key(data: bytes, wanted: Collection[SymmetricAlgorithm]) -> tuple[SymmetricAlgorithm, bytes]:
    """What a file's key is for, and its bytes: AES where one of the wanted algorithms has its length, else HMAC.

    Raises KeyUnusable where it is no key for a wanted algorithm.
    """
    key = unhexed(data)
    for algorithm, size in AES_BYTES.items():
        if algorithm in wanted and len(key) == size:
            return algorithm, key
    if SymmetricAlgorithm.HMAC_SHA256 in wanted and len(key) in HMAC_BYTES:
        return SymmetricAlgorithm.HMAC_SHA256, key
    raise KeyUnusable(
        f"The file holds no key for {' or '.join(sorted(wanted))}.",
        "Write the key in hexadecimal, or its bare bytes without a newline.",
    )


def unhexed(data: bytes) -> bytes:
    """The bytes that hexadecimal text stands for; other data as it is."""
    if not _HEX.fullmatch(data + b"\n"):
        return data
    return bytes.fromhex(re.sub(rb"0[xX]|\s", b"", data).decode("ascii"))


def _compute(key: bytes, operation: Operation, data: bytes, iv: bytes) -> bytes:
    if operation is Operation.HMAC_SHA256:
        mac = HMAC(key, hashes.SHA256())
        mac.update(data)
        return mac.finalize()
    is_cbc = operation in (Operation.ENCRYPT_CBC, Operation.DECRYPT_CBC)
    cipher = Cipher(algorithms.AES(key), modes.CBC(iv) if is_cbc else modes.ECB())  # noqa: S305 - formats compose on it
    encrypts = operation in (Operation.ENCRYPT_ECB, Operation.ENCRYPT_CBC)
    context = cipher.encryptor() if encrypts else cipher.decryptor()
    return context.update(data) + context.finalize()
