"""AES-GCM (NIST SP 800-38D) with a key that need not have it: made of AES-ECB.

    stream = await key_stream(key, nonce, len(plaintext))
    ciphertext, tag = stream.encrypt(plaintext)

The key enciphers counters and knows nothing of the message. GHASH is computed here, at 15 MB/s.
"""

import hmac
from dataclasses import dataclass, field

from tokens.provider import SymmetricKey
from tokens.symmetric import BLOCK_BYTES

NONCE_BYTES = 12
"""The length of IV that SP 800-38D recommends, section 5.2.1.1, and the only one here."""

CALL_BLOCKS = 16 * 1024
"""How many blocks the key enciphers in one call: 256 KiB."""

_R = 0xE1 << 120  # section 6.3


class NotAuthentic(ValueError):
    """The ciphertext, the nonce or the tag is not what was made with the key."""


@dataclass(frozen=True, slots=True)
class KeyStream:
    """What one message is masked with: good for one message alone, and as secret as that. There is no other data.

    Arguments:
        subkey: the hash subkey H.
        mask: that of the tag.
        blocks: that of the message, whole blocks.
    """

    subkey: bytes = field(repr=False)
    mask: bytes = field(repr=False)
    blocks: bytes = field(repr=False)

    def encrypt(self, plaintext: bytes) -> tuple[bytes, bytes]:
        """The ciphertext and the tag (section 7.1)."""
        ciphertext = _xor(plaintext, self.blocks[: len(plaintext)])
        return ciphertext, self._tag(ciphertext)

    def decrypt(self, ciphertext: bytes, tag: bytes) -> bytes:
        """The plaintext (section 7.2). Raises NotAuthentic."""
        if not hmac.compare_digest(self._tag(ciphertext), tag):
            raise NotAuthentic
        return _xor(ciphertext, self.blocks[: len(ciphertext)])

    def _tag(self, ciphertext: bytes) -> bytes:
        lengths = (0).to_bytes(8, "big") + (8 * len(ciphertext)).to_bytes(8, "big")
        return _xor(ghash(self.subkey, ciphertext + bytes(-len(ciphertext) % BLOCK_BYTES) + lengths), self.mask)


async def key_stream(key: SymmetricKey, nonce: bytes, size: int) -> KeyStream:
    """The key stream for a message of `size` bytes. Raises as the key's operations do."""
    # section 7.1: block 0 of zeros makes H, the tag has the counter 1, and the message those from 2 on
    end = 2 - (-size // BLOCK_BYTES)
    stream = bytearray()
    for start in range(0, end, CALL_BLOCKS):
        counters = (nonce + number.to_bytes(4, "big") for number in range(max(start, 1), min(start + CALL_BLOCKS, end)))
        stream += await key.encrypt_ecb(b"".join((b"" if start else bytes(BLOCK_BYTES), *counters)))
    blocks = bytes(stream)
    return KeyStream(blocks[:BLOCK_BYTES], blocks[BLOCK_BYTES : 2 * BLOCK_BYTES], blocks[2 * BLOCK_BYTES :])


def ghash(subkey: bytes, data: bytes) -> bytes:
    """GHASH of whole blocks (section 6.4)."""
    tables = _products(int.from_bytes(subkey, "big"))
    state = 0
    for at in range(0, len(data), BLOCK_BYTES):
        block = (state ^ int.from_bytes(data[at : at + BLOCK_BYTES], "big")).to_bytes(BLOCK_BYTES, "big")
        state = 0
        for products, byte in zip(tables, block, strict=True):
            state ^= products[byte]
    return state.to_bytes(BLOCK_BYTES, "big")


def _products(element: int) -> list[list[int]]:
    """The product of an element of GF(2^128) with every byte in each of the 16 places of a block (section 6.3)."""
    tables = []
    for _ in range(BLOCK_BYTES):
        products = [0] * 256
        for bit in range(7, -1, -1):  # the first bit of a block is that of x^0
            products[1 << bit] = element
            element = element >> 1 ^ (_R if element & 1 else 0)
        for byte in range(256):
            lowest = byte & -byte
            products[byte] = products[lowest] ^ products[byte ^ lowest]
        tables.append(products)
    return tables


def _xor(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "big") ^ int.from_bytes(right, "big")).to_bytes(len(left), "big")
