"""OP-TEE's rules for loading a TA, as its documentation and headers have them: what a device does with a .ta file.

Written from architecture/subkeys.rst and core/include/signed_hdr.h alone, for tests and the demo; nothing of the signer
is used. Signatures are verified by OpenSSL.
"""

import hashlib
import struct
import subprocess
import tempfile
import uuid
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MAGIC = 0x4F545348
TA, BOOTSTRAP_TA, ENCRYPTED_TA, SUBKEY = range(4)
PADDINGS = {0x70414930: ("pss", "-pkeyopt", "rsa_pss_saltlen:32"), 0x70004830: ("pkcs1",)}
TEE_ALG_AES_GCM = 0x40000810


class Refused(Exception):
    """The device does not load it."""


def load(data: bytes, ta: str, root: bytes, keys: dict[int, bytes] | None = None) -> tuple[bytes, int]:
    """The ELF file and the version of the TA with this UUID.

    `root` is the public key that the device has built in, in PEM; `keys` are those it decrypts with, by the flag.
    """
    key, offset, depth, expected = root, 0, 1 << 32, None
    while True:
        kind, size, header, digest, offset = signed_header(data, offset, key)
        if kind != SUBKEY:
            break
        image = cut(data, offset, size)
        require(hashlib.sha256(header + image).digest() == digest, "a subkey has another hash")
        namespace, name_size, _version, max_depth, _algorithm, count = struct.unpack("<16sIIIII", cut(image, 0, 36))
        require(max_depth < depth, "a subkey is too deep")
        require(expected in (None, namespace), "a subkey is in another namespace")
        key, depth = public_key(image, count), max_depth
        name = cut(data, offset + size, name_size).split(b"\0")[0]
        expected = uuid.UUID(bytes=hashlib.sha512(namespace + name).digest()[:16], version=5).bytes
        expected = expected if name_size else namespace
        offset += size + name_size
    wanted = uuid.UUID(ta).bytes
    require(expected in (None, wanted), "the TA is in another namespace than the subkey's")
    require(kind in (TA, BOOTSTRAP_TA, ENCRYPTED_TA), "it is no TA")
    fields, version = b"", 0
    if kind != TA:
        fields = cut(data, offset, 20)
        found, version = struct.unpack("<16sI", fields)
        require(found == wanted, "it is another TA")
    image = data[offset + len(fields) :]
    if kind == ENCRYPTED_TA:
        fields = cut(data, offset, 60)
        algorithm, flags, *sizes, nonce, tag = struct.unpack("<20xIIHH12s16s", fields)
        require(algorithm == TEE_ALG_AES_GCM and sizes == [12, 16], "it is encrypted in another way")
        try:
            image = AESGCM((keys or {})[flags & 1]).decrypt(nonce, data[offset + 60 :] + tag, None)
        except (InvalidTag, KeyError):
            raise Refused("it cannot be decrypted") from None
    require(len(data) == offset + len(fields) + size, "it has another size")
    require(hashlib.sha256(header + fields + image).digest() == digest, "it has another hash")
    return image, version


def signed_header(data: bytes, offset: int, key: bytes) -> tuple[int, int, bytes, bytes, int]:
    """struct shdr: type and size of the image, the header's bytes without hash and signature, the hash, and the end."""
    header = cut(data, offset, 20)
    magic, kind, size, algorithm, hash_size, signature_size = struct.unpack("<IIIIHH", header)
    require(magic == MAGIC and algorithm in PADDINGS and hash_size == 32, "there is no signed header")
    digest = cut(data, offset + 20, 32)
    signature = cut(data, offset + 52, signature_size)
    require(openssl_verifies(PADDINGS[algorithm], digest, signature, key), "a signature is not of the right key")
    return kind, size, header, digest, offset + 52 + signature_size


def public_key(subkey: bytes, count: int) -> bytes:
    """The key in struct shdr_subkey, in PEM."""
    attributes = {}
    for number in range(count):
        kind, offset, size = struct.unpack("<III", cut(subkey, 36 + 12 * number, 12))
        attributes[kind] = int.from_bytes(cut(subkey, offset, size), "big")
    numbers = RSAPublicNumbers(attributes[0xD0000230], attributes[0xD0000130])
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return numbers.public_key().public_bytes(serialization.Encoding.PEM, form)


def openssl_verifies(padding: tuple[str, ...], digest: bytes, signature: bytes, key: bytes) -> bool:
    """What OpenSSL says of an RSA signature over a SHA-256 digest."""
    with tempfile.TemporaryDirectory(prefix="optee-rules-") as name:
        directory = Path(name)
        for file, content in (("digest", digest), ("signature", signature), ("key.pem", key)):
            (directory / file).write_bytes(content)
        command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "key.pem", "-in", "digest"]
        options = ["-sigfile", "signature", "-pkeyopt", "digest:sha256", "-pkeyopt", f"rsa_padding_mode:{padding[0]}"]
        done = subprocess.run([*command, *options, *padding[1:]], cwd=directory, check=False, capture_output=True)
    return done.returncode == 0


def cut(data: bytes, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on."""
    require(len(data) >= offset + size, "it is cut off")
    return data[offset : offset + size]


def require(holds: bool, fault: str) -> None:
    """Raises Refused where it does not hold."""
    if not holds:
        raise Refused(fault)
