"""A wrap key as shares, M of N of which bring it back: Trezor's library for SLIP-39 does the arithmetic.

https://github.com/satoshilabs/slips/blob/master/slip-0039.md

A share is a line of English words with a checksum of its own, and the shares have a digest of the key between them.
Fewer than M say nothing about it.
"""

from collections.abc import Sequence

from shamir_mnemonic import MnemonicError, combine_mnemonics, decode_mnemonics, generate_mnemonics

from tokens.errors import KeyUnusable

SHARES_MAX = 16
"""SLIP-39, "Format of the share mnemonic": the index of a share has four bits."""


def split(secret: bytes, threshold: int, count: int) -> list[str]:
    """Shares of the secret: any `threshold` of `count` bring it back (2 <= threshold <= count <= SHARES_MAX)."""
    [shares] = generate_mnemonics(1, [(threshold, count)], secret)
    return list(shares)


def combine(shares: Sequence[str]) -> bytes:
    """The secret. Raises KeyUnusable where there are too few, or they do not belong together."""
    different = list(dict.fromkeys(" ".join(share.split()) for share in shares))
    try:
        [(_, group)] = decode_mnemonics(different).items()
        needed = group.member_threshold()
        if len(different) >= needed:
            return bytes(combine_mnemonics(different[:needed]))
    except (MnemonicError, ValueError):
        # the library's own words may quote a share
        raise KeyUnusable(
            "The shares give no wrap key: one has a slip of the pen, or they are of different keys.",
            "Compare each with what its custodian has.",
        ) from None
    raise KeyUnusable(f"{needed} different shares are needed, and {len(different)} are there.", "Ask more custodians.")
