"""What Rockchip's U-Boot has in its device tree of a key that signs FITs, besides what U-Boot has.

Its hardware is given numbers that spare it divisions, and SPL burns the hash of the key into the fuses where its device
tree says so (`burn-key-hash`): it compares what it has worked out with `hash@np` first.

Source: lib/rsa/rsa-sign.c (rsa_get_params, rsa_set_key_hash) and configs/rk3588_defconfig (CONFIG_RSA_N_SIZE 0x200,
CONFIG_RSA_E_SIZE 0x10, CONFIG_RSA_C_SIZE 0x20) of Rockchip's U-Boot.
"""

import hashlib

from cryptography.hazmat.primitives.asymmetric import rsa

from signers.formats import fit
from signers.formats.fdt import Tree
from signers.formats.fit import Algorithm
from signers.formats.idblock import encode_key

ALGORITHMS = frozenset({"sha256,rsa2048", "sha256,rsa4096"})
"""What it verifies, of what is made here (common/image-sig.c)."""

_C_BITS = 4100  # the hardware before that of RK356x and RK3588 reduces by 2^4100 mod n
_N_BYTES, _E_BYTES, _C_BYTES = 0x200, 0x10, 0x20


def add_key(tree: Tree, name: str, public_key: fit.PublicKey, algorithm: Algorithm, required: str | None) -> None:
    """Writes a public key, one of ALGORITHMS, into the device tree; see `signers.formats.fit.add_key`."""
    fit.add_key(tree, name, public_key, algorithm, required)
    assert isinstance(public_key, rsa.RSAPublicKey)  # noqa: S101 - the algorithms are RSA's
    numbers, size = public_key.public_numbers(), public_key.key_size // 8
    node = tree.add(tree.add(tree.root, "signature"), f"key-{name}")
    c = pow(2, _C_BITS, numbers.n)
    np = (1 << (public_key.key_size + 132)) // numbers.n
    for each, number in (("rsa,exponent-BN", numbers.e), ("rsa,c", c), ("rsa,np", np)):
        tree.set(node, each, number.to_bytes(size, "big"))
    with_np = encode_key(public_key)
    with_c = with_np[: _N_BYTES + _E_BYTES] + c.to_bytes(size, "little")[:_C_BYTES]
    # the one is over a buffer of three times the key's size, the other over what is in it
    for each, hashed in (("hash@c", with_c.ljust(3 * size, b"\0")), ("hash@np", with_np)):
        hash_node = tree.add(node, each)
        tree.set(hash_node, "value", hashlib.sha256(hashed).digest())
        tree.set(hash_node, "algo", fit.string("sha256"))
