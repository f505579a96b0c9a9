"""Images for i.MX and the texts that have them signed, for the tests, the demo and the bench.

A CSF is the text by which users of NXP's Code Signing Tool say what to sign and with which keys. Its keys are names of
certificates: paths, or PKCS#11 URIs.
"""

import hashlib
import struct
from pathlib import Path

AHAB_IMAGES_AT = 0x2000  # where imx-mkimage puts the first one: the container grows by its signature
AHAB_ALIGNMENT = 0x400
AHAB_HASHES = {"sha256": 0, "sha384": 1, "sha512": 2}
AHAB_EXECUTABLE = 0x3
AHAB_CORE = 0x2
AHAB_LOAD_ADDRESS = 0x80000000


def write_ahab_container(path: Path, images: list[bytes], hash: str = "sha384") -> tuple[int, int]:
    """Writes an unsigned container of i.MX 8 and 9 (version 0), and returns a CSF's Offsets: of it and its signature.

    The latter is the signature block, relative to the container. `hash` is that of the images.
    """
    signature_block = 16 + 128 * len(images)
    entries, data = b"", b""
    for image in images:
        offset, address = AHAB_IMAGES_AT + len(data), AHAB_LOAD_ADDRESS + len(data)
        flags = AHAB_EXECUTABLE | AHAB_CORE << 4 | AHAB_HASHES[hash] << 8
        # offset, size, load address, entry point, flags, metadata; hash; IV of an encrypted one
        entries += struct.pack("<IIQQII", offset, len(image), address, address, flags, 0)
        entries += hashlib.new(hash, image).digest().ljust(64, b"\0") + bytes(32)
        data += image + bytes(-len(image) % AHAB_ALIGNMENT)
    # version, length, tag, flags, software version, fuse version, images, signature block, reserved
    header = struct.pack("<BHBIHBBHH", 0, signature_block + 16, 0x87, 0, 0, 0, len(images), signature_block, 0)
    # version, length, tag, and where the certificate, SRK table, signature and blob will be
    block = struct.pack("<BHBHHHHI", 0, 16, 0x90, 0, 0, 0, 0, 0)
    path.write_bytes((header + entries + block).ljust(AHAB_IMAGES_AT, b"\0") + data)
    return 0, signature_block


def ivt_blocks(image: bytes) -> str:
    """A CSF's Blocks for U-Boot's .imx file, but for the file's name: an address, an offset and a length.

    They reach from the image vector table to the CSF, and where none is foreseen to the end of the boot data.
    """
    tag, length, version, *pointers = struct.unpack_from(">BHB", image) + struct.unpack_from("<7I", image, 4)
    if (tag, length, version & 0xF0) != (0xD1, 32, 0x40):
        raise ValueError("this image does not begin with an image vector table")
    _entry, _reserved, _dcd, boot_data, own_address, csf, _reserved = pointers
    start, size = struct.unpack_from("<2I", image, boot_data - own_address)
    return f"{own_address:#x} 0x0 {(csf or start + size) - own_address:#x}"


def hab_csf(
    blocks: str, artifact: str, csf: str, img: str, table: str = "crts/SRK_1_2_3_4_table.bin", srk: int = 1
) -> str:
    """HABv4: `csf` and `img` are the keys, issued by SRK number `srk`; the artifact's `blocks` are to be signed."""
    return f"""\
[Header]
    Version = 4.3
    Hash Algorithm = sha256
    Engine = ANY
    Engine Configuration = 0
    Certificate Format = X509
    Signature Format = CMS

[Install SRK]
    File = "{table}"
    Source index = {srk - 1}

[Install CSFK]
    File = "{csf}"

[Authenticate CSF]

[Install Key]
    Verification index = 0
    Target Index = 2
    File = "{img}"

[Authenticate Data]
    Verification index = 2
    Blocks = {blocks} "{artifact}"
"""


def ahab_csf(
    offsets: tuple[int, int], artifact: str, key: str, table: str = "crts/SRK_1_2_3_4_table.bin", srk: int = 1
) -> str:
    """AHAB: SRK number `srk` signs the container at `offsets` of the artifact."""
    container, signature_block = offsets
    return f"""\
[Header]
    Target = AHAB
    Version = 1.0

[Install SRK]
    File = "{table}"
    Source = "{key}"
    Source index = {srk - 1}
    Source set = OEM
    Revocations = 0x0

[Authenticate Data]
    File = "{artifact}"
    Offsets = {container:#x} {signature_block:#x}
"""
