"""Artifacts made to lock a key: the service must see what is wrong with them before it signs, and blame the client."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import imx_images
import pytest
from fit_images import make

from signers.formats import cpio, fdt, pe

PROGRAM = Path("/usr/lib/systemd/boot/efi/systemd-bootx64.efi")
SOFTWARE = b'software = { version = "1"; files: ( { filename = "f0"; sha256 = "%s"; } ); };'
AHAB = "SRK1_sha384_secp384r1_v3_usr"


def post(service: Any, path: str, name: str, content: bytes, **fields: str) -> httpx.Response:
    return httpx.post(f"{service.url}/sign/{path}", data=fields, files={"artifact": (name, content)}, timeout=120)


def full_program(service: Any, _directory: Path) -> tuple[Callable[[bytes], httpx.Response], bytes, bytes]:
    """An EFI program whose table of signatures has no room for another one."""

    def sign(content: bytes) -> httpx.Response:
        return post(service, "tegra/uefi", "program", content, machine="demo-file", signing_type="sbsign")

    program = PROGRAM.read_bytes()
    signed = sign(program).content
    image = pe.parse(lambda offset, length: signed[offset : offset + length], len(signed))
    entry = signed[image.content_size :]
    table = entry * (pe.CERTIFICATES_MAX_BYTES // len(entry))
    full = bytearray(signed[: image.content_size] + table)
    full[image.directory : image.directory + 8] = pe.directory(image.content_size, len(table))
    return sign, bytes(full), program


def full_archive(service: Any, _directory: Path) -> tuple[Callable[[bytes], httpx.Response], bytes, bytes]:
    """A .swu of as many members as are read, without a signature."""

    def sign(content: bytes) -> httpx.Response:
        return post(service, "swupdate", "a.swu", content, distro="demo-file")

    def archive(files: int) -> bytes:
        description = SOFTWARE % hashlib.sha256(b"x").hexdigest().encode()
        body = cpio.encode(cpio.NEWC, b"sw-description", description)
        body += b"".join(cpio.encode(cpio.NEWC, b"f%d" % number, b"x") for number in range(files))
        return body + cpio.trailer(cpio.NEWC, len(body))

    return sign, archive(cpio.MEMBERS_MAX - 2), archive(1)


def crowded_container(service: Any, directory: Path) -> tuple[Callable[[bytes], httpx.Response], bytes, bytes]:
    """An AHAB container with something where its signature block will stand."""
    return _container(
        service, directory, lambda content, block: content[: block + 0x100] + b"\x87" + content[block + 0x101 :]
    )


def wrong_container(service: Any, directory: Path) -> tuple[Callable[[bytes], httpx.Response], bytes, bytes]:
    """An AHAB container whose image has another hash than it says."""
    return _container(service, directory, lambda content, _: content.replace(b"first", b"First", 1))


def _container(
    service: Any, directory: Path, change: Callable[[bytes, int], bytes]
) -> tuple[Callable[[bytes], httpx.Response], bytes, bytes]:
    path = directory / "flash.bin"
    offsets = imx_images.write_ahab_container(path, [b"first" * 3000])
    key = f"pkcs11:token=hsmsign;object={AHAB};type=cert"
    text = imx_images.ahab_csf(offsets, path.name, key)

    def sign(content: bytes) -> httpx.Response:
        fields = {"machine": "demo-token-ahab-p384", "soctype": "mx9", "cstversion": "3.4.1", "backend": "pkcs11"}
        files = {"csf": ("csf.txt", text.encode()), "artifact": (path.name, content)}
        return httpx.post(f"{service.url}/sign/imx", data=fields, files=files, timeout=120)

    content = path.read_bytes()
    return sign, change(content, offsets[1]), content


@pytest.mark.parametrize("attack", [full_program, full_archive, crowded_container, wrong_container])
def test_none_locks_a_key(fixtures_service: Any, tmp_path: Path, attack: Callable[..., Any]) -> None:
    sign, hostile, good = attack(fixtures_service, tmp_path)
    answer = sign(hostile)
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/artifact-rejected"), answer.text
    assert sign(good).status_code == 200


def test_nor_does_a_fit_of_as_many_nodes_and_properties_as_are_read(fixtures_service: Any, tmp_path: Path) -> None:
    """With its signatures it has more."""
    original = make(tmp_path, algo="sha256,rsa2048").read_bytes()

    def read_at(offset: int, length: int) -> bytes:
        return original[offset : offset + length]

    tree = fdt.parse(read_at, len(original))
    properties = sum(len(node.properties) for _, node in tree.root.walk())
    nodes = sum(1 for _ in tree.root.walk())
    names = [f"p{number}" for number in range(1000)]
    extra = tree.add(tree.root, "extra")
    left = fdt.TOKENS_MAX - properties - 2 * nodes - 2 - 1  # and one for the end
    while left:
        node = tree.add(extra, f"n{left}")
        for name in names[: left - 2]:
            tree.set(node, name, b"")
        left -= 2 + len(node.properties)
    content = b"".join(
        read_at(each.offset, each.length) if isinstance(each, fdt.Span) else each for each in tree.encode()
    )
    assert fdt.parse(lambda offset, length: content[offset : offset + length], len(content)).total_size == len(content)
    answer = post(fixtures_service, "fitimage", "fitImage", content, machine="demo-file")
    assert answer.status_code == 200, answer.text
    assert post(fixtures_service, "fitimage", "fitImage", original, machine="demo-file").status_code == 200
