"""What is posted: a sw-description, a digest, and a .swu of a given size."""

import base64
import hashlib
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from tokens.schemes import Ecdsa, Hash, RsaPkcs1v15, Scheme

MIB = 1024 * 1024
BOUNDARY = "hsmsign-bench"
DISTRO = "demo-token"

# two copies of a system, as a device with a fall-back has them
DESCRIPTION = b"""\
software =
{
    version = "2026.11.2";
    description = "Firmware of the demo board";
    hardware-compatibility: [ "1.0", "1.2" ];
    stable = {
        copy1: {
            images: (
                {
                    filename = "rootfs.ext4.gz"; type = "raw"; compressed = "zlib"; device = "/dev/mmcblk0p2";
                    sha256 = "7d865e959b2466918c9863afca942d0fb89d7c9ac0c99bafc3749504ded97730";
                }
            );
            bootenv: ( { name = "rootpart"; value = "2"; } );
        };
        copy2: {
            images: (
                {
                    filename = "rootfs.ext4.gz"; type = "raw"; compressed = "zlib"; device = "/dev/mmcblk0p3";
                    sha256 = "7d865e959b2466918c9863afca942d0fb89d7c9ac0c99bafc3749504ded97730";
                }
            );
            bootenv: ( { name = "rootpart"; value = "3"; } );
        };
    };
}
"""

SWU_DESCRIPTION = """\
software =
{{
    version = "2026.11.2";
    images: ( {{ filename = "rootfs.ext4"; type = "raw"; device = "/dev/mmcblk0p2"; sha256 = "{sha256}"; }} );
}}
"""


@dataclass(frozen=True)
class Request:
    """A request that is posted again and again.

    Arguments:
        case: what the report calls it.
        key: the label of the key on the token.
        scheme, digest: what a bare worker signs for it.
        check: raises InvalidSignature where an answer's body is not the signature.
    """

    case: str
    path: str
    content_type: str
    body: bytes
    key: str
    scheme: Scheme
    digest: bytes
    check: Callable[[bytes], None]


def swupdate_request(public: Path) -> Request:
    """A sw-description for `/sign/swupdate`, as build layers post it."""
    digest = hashlib.sha256(DESCRIPTION).digest()

    def check(answer: bytes) -> None:
        key = serialization.load_pem_public_key((public / "swupdate-rsa.pem").read_bytes())
        assert isinstance(key, rsa.RSAPublicKey)
        key.verify(answer, digest, padding.PKCS1v15(), Prehashed(hashes.SHA256()))

    return Request(
        case="/sign/swupdate RSA-2048",
        path="/sign/swupdate",
        content_type=f"multipart/form-data; boundary={BOUNDARY}",
        body=_multipart({"distro": DISTRO, "method": "RSA"}, "sw-description", DESCRIPTION),
        key="swupdate-rsa",
        scheme=RsaPkcs1v15(Hash.SHA256),
        digest=digest,
        check=check,
    )


def digest_request(public: Path) -> Request:
    """A bare digest for `/keys/digest-p256/sign`."""
    digest = hashlib.sha256(DESCRIPTION).digest()

    def check(answer: bytes) -> None:
        key = serialization.load_pem_public_key((public / "digest-p256.pem").read_bytes())
        assert isinstance(key, ec.EllipticCurvePublicKey)
        signature = base64.b64decode(json.loads(answer)["signature"])
        key.verify(signature, digest, ec.ECDSA(Prehashed(hashes.SHA256())))

    return Request(
        case="/keys/NAME/sign P-256",
        path="/keys/digest-p256/sign",
        content_type="application/json",
        body=json.dumps({"digest": digest.hex(), "hash": "sha256", "scheme": "ecdsa"}).encode(),
        key="digest-p256",
        scheme=Ecdsa(Hash.SHA256),
        digest=digest,
        check=check,
    )


def _multipart(fields: dict[str, str], name: str, content: bytes) -> bytes:
    """multipart/form-data (RFC 7578) with one file, laid out as curl does."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n{value}\r\n'.encode()
        for field, value in fields.items()
    ]
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return b"".join([*parts, head.encode(), content, f"\r\n--{BOUNDARY}--\r\n".encode()])


def write_swu(directory: Path, mib: int) -> Path:
    """Writes an unsigned .swu with one image of `mib` MiB, as build layers do: by cpio, with checksums."""
    block = hashlib.shake_256(b"hsmsign").digest(MIB)
    sha256 = hashlib.sha256()
    image, description, archive = directory / "rootfs.ext4", directory / "sw-description", directory / "unsigned.swu"
    with image.open("wb") as file:
        for _ in range(mib):
            sha256.update(block)
            file.write(block)
    description.write_text(SWU_DESCRIPTION.format(sha256=sha256.hexdigest()))
    with archive.open("wb") as file:
        names = f"{description.name}\n{image.name}\n".encode()
        command = ["cpio", "--quiet", "--create", "--format=crc"]
        subprocess.run(command, cwd=directory, input=names, stdout=file, check=True)
    image.unlink()
    return archive
