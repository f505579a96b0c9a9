"""AES-CMAC (NIST SP 800-38B, RFC 4493) with a key that need not have it: made of AES-ECB and AES-CBC."""

from tokens.provider import SymmetricKey
from tokens.symmetric import BLOCK_BYTES

_R128 = 0x87  # SP 800-38B, section 5.3


async def cmac(key: SymmetricKey, message: bytes) -> bytes:
    """The 16 bytes of the MAC. Raises as the key's operations do."""
    at = (max(len(message), 1) - 1) // BLOCK_BYTES * BLOCK_BYTES
    whole, last = message[:at], message[at:]
    # section 6.1: the subkeys; 6.2: the message's last block is masked with the one that says whether it was padded
    subkey = _doubled(await key.encrypt_ecb(bytes(BLOCK_BYTES)))
    if len(last) < BLOCK_BYTES:
        subkey = _doubled(subkey)
        last = (last + b"\x80").ljust(BLOCK_BYTES, b"\0")
    masked = bytes(a ^ b for a, b in zip(last, subkey, strict=True))
    return (await key.encrypt_cbc(bytes(BLOCK_BYTES), whole + masked))[-BLOCK_BYTES:]


def _doubled(block: bytes) -> bytes:
    """The block times x in GF(2^128), section 6.1."""
    number = int.from_bytes(block, "big") << 1
    if number >> 128:
        number = number & (1 << 128) - 1 ^ _R128
    return number.to_bytes(BLOCK_BYTES, "big")
