"""EKB images: NVIDIA's own by their digests, opened by OpenSSL, and what is refused."""

import hashlib
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signers.formats import ekb
from signers.formats.ekb import Tag, Version

# NVIDIA's published examples (gen_ekb's example.sh), and the IV that the digests below were made with
OEM_K1 = "2d4a614e645267556b58703273357638792f423f4428472b4b6250655368566d"
KEK2 = "432646294a404e635266556a586e3272"
VECTOR = bytes.fromhex("bad66eb4484983684b992fe54a648bb8")
IV = bytes(range(16, 32))
KEYS = {
    Tag.KERNEL: bytes.fromhex("010203040506070809a0b0c0d0e0f001" * 2),
    Tag.DISK: bytes.fromhex("f0e0d0c0b0a001020304050607080900"),
    Tag.AUTH: bytes.fromhex("00112233445566778899aabbccddeeff"),
}
AUTH = {Tag.AUTH: KEYS[Tag.AUTH]}
TWO = {Tag.KERNEL: KEYS[Tag.KERNEL][:16], Tag.DISK: KEYS[Tag.DISK]}
CASES = [
    (Version.UNVERSIONED, TWO),
    (Version.V1_0, KEYS),
    (Version.V1_0, AUTH),
    (Version.V2_0, KEYS),
    (Version.V2_0, AUTH),
]


def openssl(command: str, data: bytes) -> bytes:
    return subprocess.run(["openssl", *command.split()], input=data, check=True, capture_output=True).stdout


def cmac(key: bytes, data: bytes) -> bytes:
    return openssl(f"mac -cipher AES-128-CBC -macopt hexkey:{key.hex()} -binary CMAC", data)


def root(fuse: str, vector: bytes = VECTOR) -> bytes:
    return openssl(f"enc -aes-{4 * len(fuse)}-ecb -K {fuse} -nopad", vector)


ROOT = root(OEM_K1)


def opened(image: bytes, fuse: str, vector: bytes, sizes: tuple[int, int] = (16, 16)) -> dict[int, bytes]:
    """What a device finds in an image, by OpenSSL; `sizes` are those of the two keys of L4T 35.1."""
    size, magic, major, minor = struct.unpack_from("<I8sHH", image)
    assert (size, magic) == (len(image) - 4, b"NVEKBP\0\0")
    assert len(image) == 1028
    at = 16
    if major == 2:
        vector, at = image[16:32], 32
    mac, start = image[at : at + 16], at + 16
    at, length = start, sum(sizes)
    if major:
        length, magic, zeros = struct.unpack_from("<I4s8s", image, at)
        assert (magic, zeros) == (b"EEKB", bytes(8))
        at += 16
    assert minor == 0
    end = at + 16 + length
    rk = root(fuse, vector)
    ek, ak = (cmac(rk, b"\x01" + label + b"\0ekb\0\0\0\x80") for label in (b"encryption", b"authentication"))
    assert mac == cmac(ak, image[start:end])
    iv = image[at : at + 16]
    plain = openssl(f"enc -d -aes-128-cbc -K {ek.hex()} -iv {iv.hex()} -nopad", image[at + 16 : end])
    assert set(image[end:]) == {(1024 - (end - 4)) % 256}
    if not major:
        return {1: plain[: sizes[0]], 2: plain[sizes[0] :]}
    found, at = {}, 0
    while (tag := struct.unpack_from("<I", plain, at)[0]) != 0:
        (length,) = struct.unpack_from("<I", plain, at + 4)
        found[tag] = plain[at + 8 : at + 8 + length]
        at += 8 + length
    return found


@pytest.mark.parametrize(("version", "keys"), CASES)
def test_a_device_opens_it(version: Version, keys: ekb.Keys) -> None:
    image = ekb.pack(version, keys, ROOT, VECTOR, IV)
    assert opened(image, OEM_K1, VECTOR) == keys
    ekb.verify(image, version, keys, ROOT, VECTOR)
    if version is Version.V2_0:
        assert ekb.vector_of(image) == VECTOR


# SHA-256 of what NVIDIA's gen_ekb.py makes of the same with this IV (1.5 for 1.0; 2.0 with its vector set to VECTOR)
@pytest.mark.parametrize(
    ("version", "fuse", "keys", "digest"),
    [
        (Version.V1_0, OEM_K1, KEYS, "ce5894a1e0e7c8c8285e4c70d93a3f3c92816c4da70723167cdcf9d331577abb"),
        (Version.V1_0, KEK2, AUTH, "2dc56e92fbc02dbcdfadb4210e488f682fa5508630a517f4b12480f6f1f69684"),
        (Version.V2_0, OEM_K1, KEYS, "d3790853b21ad2db1156f018d71c361948e7062d94954bda86ca0b8e5cc99b97"),
    ],
)
def test_is_what_nvidia_makes(version: Version, fuse: str, keys: ekb.Keys, digest: str) -> None:
    image = ekb.pack(version, keys, root(fuse), VECTOR, IV)
    assert hashlib.sha256(image).hexdigest() == digest


@pytest.mark.parametrize(("version", "keys"), CASES)
def test_each_byte_counts(version: Version, keys: ekb.Keys) -> None:
    image = ekb.pack(version, keys, ROOT, VECTOR, IV)
    for at in range(len(image)):
        tampered = bytearray(image)
        tampered[at] ^= 1
        with pytest.raises(ValueError, match="its "):
            ekb.verify(bytes(tampered), version, keys, ROOT, VECTOR)


@pytest.mark.parametrize(
    ("version", "packed", "keys"),
    [
        (Version.V1_0, KEYS, AUTH),
        (Version.V2_0, KEYS, {**KEYS, Tag.AUTH: bytes(16)}),
        (Version.UNVERSIONED, TWO, {Tag.KERNEL: TWO[Tag.DISK], Tag.DISK: TWO[Tag.KERNEL]}),
    ],
)
def test_other_keys(version: Version, packed: ekb.Keys, keys: ekb.Keys) -> None:
    image = ekb.pack(version, packed, ROOT, VECTOR, IV)
    with pytest.raises(ValueError, match="other keys"):
        ekb.verify(image, version, keys, ROOT, VECTOR)


def test_another_fuse_key() -> None:
    image = ekb.pack(Version.V1_0, KEYS, ROOT, VECTOR, IV)
    with pytest.raises(ValueError, match="MAC"):
        ekb.verify(image, Version.V1_0, KEYS, root(KEK2), VECTOR)


@given(st.binary(max_size=64), st.integers(0, 1100), st.sampled_from(CASES))
def test_anything(junk: bytes, at: int, case: tuple[Version, ekb.Keys]) -> None:
    version, keys = case
    image = ekb.pack(version, keys, ROOT, VECTOR, IV)
    for hostile in (junk, image[:at], image[:at] + junk + image[at + len(junk) :]):
        try:
            ekb.verify(hostile, version, keys, ROOT, VECTOR)
        except ValueError:
            continue
        assert hostile == image
