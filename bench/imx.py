"""The boot image that is posted to `/sign/imx`, and the same for `cst` itself."""

import io
import sys
import tarfile
from pathlib import Path

from artifacts import MULTIPART, Request, multipart
from cryptography import x509
from tools import CST_VERSION

from signers.formats import hab

sys.path.insert(0, str(Path(__file__).parents[1] / "softhsm-fixtures"))
from imx_images import hab_csf, ivt_blocks

ROOT = Path(__file__).parents[1]
IMAGE = ROOT / ".cache/u-boot/nitrogen6q/u-boot-dtb.imx"
MACHINE = "demo-token-rsa2048"
CERTIFICATES = tuple(f"{name}1_1_sha256_2048_65537_v3_usr" for name in ("CSF", "IMG"))
TABLE = "crts/SRK_1_2_3_4_table.bin"


def imx_request(fixtures: Path) -> Request:
    """The image with a CSF of HABv4, as build layers post it."""
    image, csf = IMAGE.read_bytes(), _csf("YubiHSM").encode()
    fields = {"machine": MACHINE, "soctype": "mx6", "cstversion": CST_VERSION, "backend": "pkcs11"}
    address, offset, length = (int(number, 0) for number in ivt_blocks(image).split())
    csf_key, image_key = (
        x509.load_pem_x509_certificate((fixtures / f"certificates/{name}.pem").read_bytes()) for name in CERTIFICATES
    )
    expected = hab.Expected(
        srk_table=_table(fixtures),
        source=0,
        csf_certificate=csf_key,
        keys={2: image_key},
        blocks=[[hab.Block(address, offset, length)]],
    )

    def check(answer: bytes) -> None:
        hab.verify(hab.parse(answer), expected, lambda at, size: image[at : at + size])

    return Request(
        case="/sign/imx HABv4 RSA-2048",
        path="/sign/imx",
        content_type=MULTIPART,
        body=multipart(fields, {"csf": ("commands.csf", csf), "artifact": (IMAGE.name, image)}),
        check=check,
    )


def write_cst_input(fixtures: Path, directory: Path) -> None:
    """Makes a directory with what `cst` reads to sign the image by commands.csf."""
    (directory / TABLE).parent.mkdir(parents=True)
    (directory / IMAGE.name).write_bytes(IMAGE.read_bytes())
    (directory / TABLE).write_bytes(_table(fixtures))
    (directory / "commands.csf").write_text(_csf("hsmsign"))


def _csf(token: str) -> str:
    csf, img = (f"pkcs11:token={token};object={name};type=cert" for name in CERTIFICATES)
    return hab_csf(ivt_blocks(IMAGE.read_bytes()), IMAGE.name, csf, img, TABLE)


def _table(fixtures: Path) -> bytes:
    tarball = (fixtures / "keys" / MACHINE / "imxsign/imx-cst-keys.tar.gz").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(tarball)) as archive:
        member = archive.extractfile(TABLE)
        assert member is not None
        return member.read()
