"""Rockchip's idblocks, USB loaders and TAs for the tests and the demo, and what a boot ROM makes of what is signed.

Written from the layouts alone, and with nothing of the service: scripts/rkimage.c of barebox, tools/rkcommon.c of
U-Boot (whose mkimage makes the idblocks) and tools/rockchip/boot_merger.c of Rockchip's U-Boot. Run as a program it
tells whether a device whose fuses hold the hash of a key would boot a file:

    .venv/bin/python softhsm-fixtures/rockchip_images.py idblock|usbloader FILE PUBLIC_KEY.pem
"""

import hashlib
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from uuid import UUID

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

HEADER, SIGNED, SECTOR = 2048, 1536, 512
SCRAMBLING_KEY = bytes((124, 78, 3, 4, 85, 5, 9, 7, 45, 44, 123, 56, 23, 13, 23, 17))


def write_idblock(path: Path, first: bytes, second: bytes) -> None:
    """An unsigned idblock of two images, by U-Boot's mkimage."""
    names = []
    for number, content in enumerate((first, second)):
        part = path.with_name(f"{path.name}.{number}")
        part.write_bytes(content)
        names.append(str(part))
    command = ["mkimage", "-T", "rksd", "-n", "rk3568", "-d", ":".join(names), path]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def header(images: list[bytes]) -> bytes:
    """An unsigned header for these images, which follow it without a gap."""
    start = struct.pack("<4s4xHHI", b"RKNS", SIGNED // 4, len(images), 1)
    entries, sector = b"", HEADER // SECTOR
    for number, image in enumerate(images, 1):
        count = len(image) // SECTOR
        entries += struct.pack("<HHIII8x32s32x", sector, count, 0xFFFFFFFF, 0, number, hashlib.sha256(image).digest())
        sector += count
    content = (start.ljust(0x78, b"\0") + entries).ljust(SIGNED, b"\0")
    return (content + hashlib.sha256(content).digest()).ljust(HEADER, b"\0")


def padded(image: bytes) -> bytes:
    """As mkimage and boot_merger pad an image."""
    return image + bytes(-len(image) % 2048)


def loader(images: Mapping[str, bytes], soc: str = "3588", *, plain: bool = True, heads: bool = True) -> bytes:
    """A USB loader with images for 471, 472 and the entries FlashData and FlashBoot; `plain`: 471 and 472 are."""
    images = {name: padded(image) for name, image in images.items()}
    usb, flash = ([images[name] for name in names] for names in (("471", "472"), ("FlashData", "FlashBoot")))
    lists: dict[int, dict[str, bytes]] = {
        1: {"ddr": usb[0] if plain else rc4(usb[0])},
        2: {"usbplug": usb[1] if plain else rc4(usb[1])},
        4: {"FlashData": scrambled(flash[0]), "FlashBoot": scrambled(flash[1])},
    }
    if heads:
        lists[4] = {"UsbHead": scrambled(header(usb)), "FlashHead": scrambled(header(flash)), **lists[4]}
    counts = [len(entries) for entries in lists.values()]
    tables, at = b"", 102
    for count in counts:
        tables += struct.pack("<BIB", count, at, 57)
        at += 57 * count
    merged = struct.pack("<4sHII7sI", b"LDR ", 102, 0x0110, 0x01030000, bytes(7), int.from_bytes(soc.encode(), "big"))
    merged = (merged + tables + struct.pack("<BB", 0, plain)).ljust(102, b"\0")
    for kind, entries in lists.items():
        for name, data in entries.items():
            merged += struct.pack("<BI40sIII", 57, kind, name.encode("utf-16-le"), at, len(data), 0)
            at += len(data)
    merged += b"".join(data for entries in lists.values() for data in entries.values())
    return merged + crc(merged).to_bytes(4, "little")


def trusted_application(private_key: rsa.RSAPrivateKey, image: bytes, *, pss: bool, uuid: UUID | None) -> bytes:
    """A signed TA, as Rockchip ships them; without a UUID, of the older type (OP-TEE's sign_encrypt.py)."""
    sizes = len(image), 0x70414930 if pss else 0x70004830, 32, private_key.key_size // 8
    head = struct.pack("<IIIIHH", 0x4F545348, uuid is not None, *sizes)
    fields = uuid.bytes + struct.pack("<I", 3) if uuid else b""
    signed = head + fields + image
    scheme = padding.PSS(padding.MGF1(hashes.SHA256()), 32) if pss else padding.PKCS1v15()
    signature = private_key.sign(signed, scheme, hashes.SHA256())
    return head + hashlib.sha256(signed).digest() + signature + fields + image


def rc4(data: bytes) -> bytes:
    """RC4 by the key that boot_merger has, of all data in one go."""
    state, j = list(range(256)), 0
    for i in range(256):
        j = (j + state[i] + SCRAMBLING_KEY[i % 16]) % 256
        state[i], state[j] = state[j], state[i]
    output, i, j = bytearray(), 0, 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        output.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(output)


def scrambled(data: bytes) -> bytes:
    """Each sector for itself."""
    return b"".join(rc4(data[at : at + SECTOR]) for at in range(0, len(data), SECTOR))


def crc(data: bytes) -> int:
    """Bit by bit."""
    value = 0
    for byte in data:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1) ^ 0x104C10DB7 if value & 0x80000000 else value << 1
    return value


def fuses(public_key: bytes) -> bytes:
    """What the fuses of a device that boots what this key (PEM) signs hold: SHA-256 of the key, as headers have it."""
    n = load_pem_public_key(public_key).public_numbers().n
    factor = 2 ** (n.bit_length() + 132) // n
    numbers = ((n, 512), (65537, 16), (factor, 32))
    return hashlib.sha256(b"".join(number.to_bytes(size, "little") for number, size in numbers)).digest()


def accepts(head: bytes, fused: bytes) -> list[tuple[int, int, bytes]]:
    """The images of a signed header: offset, size and SHA-256. Raises ValueError where the ROM would not boot it."""
    magic, words, count, flags = struct.unpack_from("<4s4xHHI", head)
    _require(magic == b"RKSS" and words == 384 and flags & 0x2000, "not signed")
    bits = {0x11: 2048, 0x21: 4096}.get(flags & 0xFF)
    _require(bits is not None, "another algorithm")
    _require(hashlib.sha256(head[0x200:0x430]).digest() == fused, "another key")
    n, e, factor = (int.from_bytes(head[at : at + size], "little") for at, size in ((512, 512), (1024, 16), (1040, 32)))
    _require(n.bit_length() == bits and factor == 2 ** (bits + 132) // n, "a key that is none")
    signature = int.from_bytes(head[SIGNED : SIGNED + bits // 8], "little")
    _require(signature < n and not any(head[SIGNED + bits // 8 : HEADER]), "no signature")
    encoded = pow(signature, e, n).to_bytes(bits // 8, "big")
    _require(_is_pss(encoded, hashlib.sha256(head[:SIGNED]).digest()), "a wrong signature")
    images = []
    for number in range(count):
        sector, sectors, digest = struct.unpack_from("<HH20x32s", head, 0x78 + 88 * number)
        images.append((sector * SECTOR, sectors * SECTOR, digest))
    return images


def _is_pss(encoded: bytes, digest: bytes) -> bool:
    """EMSA-PSS-VERIFY of RFC 8017, section 9.1.2, with SHA-256 and a salt of 32 bytes."""
    masked, seed, last = encoded[:-33], encoded[-33:-1], encoded[-1]
    counters = range(-(-len(masked) // 32))
    mask = b"".join(hashlib.sha256(seed + counter.to_bytes(4, "big")).digest() for counter in counters)
    block = bytearray(a ^ b for a, b in zip(masked, mask, strict=False))
    block[0] &= 0x7F
    zeros, salt = block[:-33], block[-32:]
    whole = last == 0xBC and not masked[0] & 0x80 and not any(zeros) and block[-33] == 1
    return whole and hashlib.sha256(bytes(8) + digest + salt).digest() == seed


def boot_idblock(data: bytes, fused: bytes) -> None:
    """Raises ValueError where a device with these fuses would not boot the idblock."""
    for offset, size, digest in accepts(data[:HEADER], fused):
        _require(hashlib.sha256(data[offset : offset + size]).digest() == digest, "another image")


def entries_of(data: bytes) -> Iterator[tuple[int, str, bytes]]:
    """What boot_merger would unpack of a loader: the list, the name and the data of each entry."""
    _require(crc(data[:-4]) == int.from_bytes(data[-4:], "little"), "a wrong CRC")
    _signed, plain = data[43:45]
    for at in (25, 31, 37):
        count, offset, size = struct.unpack_from("<BIB", data, at)
        for number in range(count):
            _, kind, name, start, length = struct.unpack_from("<BI40sII", data, offset + size * number)
            content = data[start : start + length]
            if kind == 4:
                content = scrambled(content)
            elif not plain:
                content = rc4(content)
            yield kind, name.decode("utf-16-le").rstrip("\0"), content


def boot_loader(data: bytes, fused: bytes) -> None:
    """Raises ValueError where a device with these fuses would take neither what is sent nor what is flashed."""
    entries = list(entries_of(data))
    named = {name: content for kind, name, content in entries if kind == 4}
    sent = [content for kind, _, content in entries if kind in (1, 2)]
    for head, contents in (("UsbHead", sent), ("FlashHead", [named["FlashData"], named["FlashBoot"]])):
        images = accepts(named[head], fused)
        _require(len(images) == len(contents), "another number of images")
        for (_, _, digest), content in zip(images, contents, strict=True):
            _require(hashlib.sha256(content).digest() == digest, "another image")


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise ValueError(fault)


if __name__ == "__main__":
    kind, file, key = sys.argv[1:]
    {"idblock": boot_idblock, "usbloader": boot_loader}[kind](Path(file).read_bytes(), fuses(Path(key).read_bytes()))
