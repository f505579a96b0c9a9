"""What is posted: a sw-description, a digest, and files of a given size."""

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
from tokens.verify import HASHES

MIB = 1024 * 1024
BOUNDARY = "hsmsign-bench"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"
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
        check: raises an exception where an answer's body is not the signature.
    """

    case: str
    path: str
    content_type: str
    body: bytes
    check: Callable[[bytes], None]


@dataclass(frozen=True)
class TokenRequest(Request):
    """One that takes a single signature of the token.

    Arguments:
        key: the label of the key on the token.
        scheme, digest: what a bare worker signs for it.
    """

    key: str
    scheme: Scheme
    digest: bytes


def swupdate_request(public: Path) -> TokenRequest:
    """A sw-description for `/sign/swupdate`, as build layers post it."""
    digest = hashlib.sha256(DESCRIPTION).digest()

    def check(answer: bytes) -> None:
        check_rsa(public / "swupdate-rsa.pem", answer, digest)

    return TokenRequest(
        case="/sign/swupdate RSA-2048",
        path="/sign/swupdate",
        content_type=MULTIPART,
        body=multipart({"distro": DISTRO, "method": "RSA"}, {"sw-description": ("sw-description", DESCRIPTION)}),
        key="swupdate-rsa",
        scheme=RsaPkcs1v15(Hash.SHA256),
        digest=digest,
        check=check,
    )


def digest_request(public: Path) -> TokenRequest:
    """A bare digest for `/keys/digest-p256/sign`."""
    digest = hashlib.sha256(DESCRIPTION).digest()

    def check(answer: bytes) -> None:
        key = serialization.load_pem_public_key((public / "digest-p256.pem").read_bytes())
        assert isinstance(key, ec.EllipticCurvePublicKey)
        signature = base64.b64decode(json.loads(answer)["signature"])
        key.verify(signature, digest, ec.ECDSA(Prehashed(hashes.SHA256())))

    return TokenRequest(
        case="/keys/NAME/sign P-256",
        path="/keys/digest-p256/sign",
        content_type="application/json",
        body=json.dumps({"digest": digest.hex(), "hash": "sha256", "scheme": "ecdsa"}).encode(),
        key="digest-p256",
        scheme=Ecdsa(Hash.SHA256),
        digest=digest,
        check=check,
    )


def check_rsa(public_key: Path, signature: bytes, digest: bytes, hash_: Hash = Hash.SHA256) -> None:
    """PKCS #1 v1.5. Raises InvalidSignature."""
    key = serialization.load_pem_public_key(public_key.read_bytes())
    assert isinstance(key, rsa.RSAPublicKey)
    key.verify(signature, digest, padding.PKCS1v15(), Prehashed(HASHES[hash_]))


def multipart(fields: dict[str, str], files: dict[str, tuple[str, bytes]]) -> bytes:
    """multipart/form-data (RFC 7578), laid out as curl does; each file has a name and a content."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n{value}\r\n'.encode()
        for field, value in fields.items()
    ]
    for field, (name, content) in files.items():
        head = (
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        parts += [head.encode(), content, b"\r\n"]
    return b"".join([*parts, f"--{BOUNDARY}--\r\n".encode()])


def write_file(path: Path, mib: int) -> bytes:
    """Writes `mib` MiB, the same one again and again. Returns their SHA-256."""
    block = hashlib.shake_256(b"hsmsign").digest(MIB)
    sha256 = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(mib):
            sha256.update(block)
            file.write(block)
    return sha256.digest()


def write_swu(directory: Path, mib: int) -> Path:
    """Writes an unsigned .swu with one image of `mib` MiB, as build layers do: by cpio, with checksums."""
    image, description, archive = directory / "rootfs.ext4", directory / "sw-description", directory / "unsigned.swu"
    description.write_text(SWU_DESCRIPTION.format(sha256=write_file(image, mib).hex()))
    with archive.open("wb") as file:
        names = f"{description.name}\n{image.name}\n".encode()
        command = ["cpio", "--quiet", "--create", "--format=crc"]
        subprocess.run(command, cwd=directory, input=names, stdout=file, check=True)
    image.unlink()
    return archive
