"""NXP's Code Signing Tool on Yubico's PKCS#11 module, as `cst -b pkcs11`: HABv4 and AHAB."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imx_images
import pytest
from certificates import Authority, self_sign
from cryptography import x509
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from signers.formats import ahab, hab
from tests.conftest import ROOT
from tests.yubihsm_simulator.clients.conftest import PIN, Hsm, private_key, put_key
from tokens.errors import SigningFailed
from tokens.schemes import Hash

IMAGE = ROOT / ".cache/u-boot/nitrogen6q/u-boot-dtb.imx"
TABLE = "table.bin"
VERSIONS = ["3.4.1", pytest.param("4.0.1", marks=pytest.mark.skipif(
    not (ROOT / ".cache/cst/cst-4.0.1").exists(), reason="Debian sid's cst could not be unpacked"))]  # fmt: skip


@pytest.fixture(params=VERSIONS)
def cst(request: pytest.FixtureRequest) -> Path:
    """Up to version 3 it comes to a token by the engine, then by the provider."""
    request.getfixturevalue("engine" if request.param.startswith("3.") else "provider")
    program = ROOT / f".cache/cst/cst-{request.param}/linux64/bin/cst"
    assert program.exists(), f"{program} is missing: run `make setup`"
    return program


def uri(label: str) -> str:
    """As in the texts that users of a YubiHSM have."""
    return f"pkcs11:token=YubiHSM;object={label};type=cert;pin-value={PIN}"


def write_key(hsm: Hsm, label: str, key: Any, issued: x509.Certificate) -> str:
    """The same once more as cst finds it in files; what a CSF calls it by."""
    for directory in ("keys", "crts"):
        (hsm.directory / directory).mkdir(exist_ok=True)
    hsm.write("keys/key_pass.txt", b"secret\nsecret\n")
    encryption = BestAvailableEncryption(b"secret")
    hsm.write(f"keys/{label}_key.pem", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    hsm.write(f"crts/{label}_crt.pem", issued.public_bytes(Encoding.PEM))
    return f"../crts/{label}_crt.pem"


def run(hsm: Hsm, cst: Path, text: str, *options: str) -> bytes:
    """It leaves a session open on the device; keys in files are beside its own directory."""
    work = hsm.directory / "cst"
    work.mkdir(exist_ok=True)
    hsm.write("cst/csf.txt", text.encode())
    command = ("/usr/bin/env", "-C", work, cst, *options, "-i", "csf.txt", "-o", "out.bin")
    hsm.run(*command)
    return hsm.read("cst/out.bin")


def in_one_second() -> Iterator[int]:
    """Tries, until one begins and ends in the same second, which is what a CMS tells."""
    for _ in range(20):
        began = int(time.time())
        yield began
        if int(time.time()) == began:
            return
        time.sleep(1 - time.time() % 1)  # the next one has a whole second
    raise AssertionError("never within a second")


@pytest.mark.parametrize("kind", ["rsa2048", "rsa4096", "ecp256"])
def test_hab(hsm: Hsm, cst: Path, kind: str) -> None:
    (hsm.directory / "cst").mkdir()
    srk = Authority("SRK1", private_key(kind))
    certificates = {role: srk.issue(role, private_key(kind).public_key()) for role in ("CSF", "IMG")}
    files = {}
    for id, (role, issued) in enumerate(certificates.items(), 10):
        put_key(hsm, id, role, private_key(kind), issued)
        files[role] = write_key(hsm, role, private_key(kind), issued)
    table = hab.encode_srk_table([srk.certificate] * 4)
    image = IMAGE.read_bytes()
    hsm.write(f"cst/{TABLE}", table)
    hsm.write(f"cst/{IMAGE.name}", image)
    blocks = imx_images.ivt_blocks(image)

    for _ in in_one_second():
        by_file = run(hsm, cst, imx_images.hab_csf(blocks, IMAGE.name, files["CSF"], files["IMG"], TABLE))
        signed = run(hsm, cst, imx_images.hab_csf(blocks, IMAGE.name, uri("CSF"), uri("IMG"), TABLE), "-b", "pkcs11")
        hsm.device.skip(31)
    if kind.startswith("rsa"):  # ECDSA is not the same twice
        assert signed == by_file

    address, offset, length = (int(number, 0) for number in blocks.split())
    expected = hab.Expected(
        srk_table=table,
        source=0,
        csf_certificate=certificates["CSF"],
        keys={2: certificates["IMG"]},
        blocks=[[hab.Block(address, offset, length)]],
    )
    csf = hab.parse(signed)
    hab.verify(csf, expected, lambda at, size: image[at : at + size])
    with pytest.raises(SigningFailed):
        hab.verify(csf, expected, lambda at, size: bytes(size))
    for index, role, content in ((2, "CSF", csf.signed), (4, "IMG", image[offset : offset + length])):
        hsm.write("cms", csf.sections[csf.commands[index].offset])
        hsm.write("signed", content)
        verify = ("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", "cms", "-content", "signed",
                  "-certfile", f"{role}.crt", "-noverify", "-nointern", "-out", "verified")  # fmt: skip
        hsm.run(*verify)
        hsm.write("signed", b"\0" + content[1:])
        hsm.refuses(*verify)


@pytest.mark.parametrize(("kind", "hash"), [("ecp256", Hash.SHA256), ("ecp384", Hash.SHA384), ("rsa2048", Hash.SHA256)])
def test_ahab(hsm: Hsm, cst: Path, kind: str, hash: Hash) -> None:
    (hsm.directory / "cst").mkdir()
    issued = self_sign("SRK1", private_key(kind), None)
    put_key(hsm, 10, "SRK1", private_key(kind), issued)
    file = write_key(hsm, "SRK1", private_key(kind), issued)
    table = ahab.encode_srk_table([issued] * 4, hash)
    hsm.write(f"cst/{TABLE}", table)
    container = hsm.directory / "cst/flash.bin"
    offsets = imx_images.write_ahab_container(container, [b"first" * 3000, b"second" * 1000])
    unsigned = container.read_bytes()
    by_file = run(hsm, cst, imx_images.ahab_csf(offsets, container.name, file, TABLE))
    signed = run(hsm, cst, imx_images.ahab_csf(offsets, container.name, uri("SRK1"), TABLE), "-b", "pkcs11")
    if kind.startswith("rsa"):
        assert signed == by_file
    expected = ahab.Expected(
        *offsets, table, index=0, source_set=ahab.OEM, revocations=0, public_key=issued.public_key()
    )
    check = (expected, lambda at, size: unsigned[at : at + size], len(unsigned))
    ahab.verify(*check, lambda at, size: signed[at : at + size], len(signed))
    tampered = signed[:-1] + bytes([signed[-1] ^ 1])
    with pytest.raises(SigningFailed):
        ahab.verify(*check, lambda at, size: tampered[at : at + size], len(tampered))


def test_a_key_that_is_not_there(hsm: Hsm, cst: Path) -> None:
    (hsm.directory / "cst").mkdir()
    hsm.write(f"cst/{TABLE}", bytes(8))
    hsm.write("cst/csf.txt", imx_images.ahab_csf((0, 16), "flash.bin", uri("SRK1"), TABLE).encode())
    hsm.refuses("/usr/bin/env", "-C", "cst", cst, "-b", "pkcs11", "-i", "csf.txt", "-o", "out.bin")
