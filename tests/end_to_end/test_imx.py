"""i.MX boot images, through HTTP, signed by NXP's cst with keys of every kind, verified by OpenSSL."""

import hashlib
import re
import struct
import subprocess
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import imx_images
import pytest

from tests.conftest import ROOT
from tests.end_to_end.conftest import accepts, assert_problem

IMAGE = ROOT / ".cache/u-boot/nitrogen6q/u-boot-dtb.imx"
HAB = {"rsa2048": "sha256_2048_65537", "rsa4096": "sha256_4096_65537", "p256": "sha256_secp256r1"}
AHAB = {"ahab-p384": "sha384_secp384r1", "ahab-p256": "sha256_secp256r1"}
ANY_KEY = [("token", "pkcs11"), ("yubihsm", "pkcs11"), ("file", "pkcs11"), ("file", "ssl")]
VERSIONS = ["3.4.1", pytest.param("4.0.1", marks=pytest.mark.skipif(
    not (ROOT / ".cache/cst/cst-4.0.1").exists(), reason="Debian sid's cst could not be unpacked"))]  # fmt: skip


def name_of(kind: str, pki: str, backend: str, number: int = 1) -> str:
    suffix = {"CSF": "_1_{}_v3_usr", "IMG": "_1_{}_v3_usr", "SRK": "_{}_v3_usr"}[kind]
    label = f"{kind}{number}" + suffix.format(pki)
    if backend == "ssl":
        return f"../crts/{label}_crt.pem"
    # what users of a YubiHSM have in their texts today
    return f"pkcs11:token=YubiHSM;object={label};type=cert;pin-value=password"


def hab_text(key: str, backend: str, number: int = 1, image: Path = IMAGE) -> str:
    blocks = imx_images.ivt_blocks(image.read_bytes())
    csf, img = (name_of(kind, HAB[key], backend, number) for kind in ("CSF", "IMG"))
    return str(imx_images.hab_csf(blocks, image.name, csf, img, srk=number))


def post(service: Any, machine: str, text: str | bytes, content: bytes, **fields: str) -> httpx.Response:
    form = {"machine": machine, "soctype": "mx6", "cstversion": "3.4.1", "backend": "pkcs11", **fields}
    name = form.pop("name", IMAGE.name)
    csf = text if isinstance(text, bytes) else text.encode()
    files = {"csf": ("csf.txt", csf, "text/plain"), "artifact": (name, content)}
    return httpx.post(service.url + "/sign/imx", data=form, files=files, timeout=120)


def sign_hab(service: Any, key: str = "rsa2048", text: str | None = None, **fields: str) -> httpx.Response:
    return post(service, f"demo-token-{key}", text or hab_text(key, "pkcs11"), IMAGE.read_bytes(), **fields)


def problem(answer: httpx.Response, status: int, slug: str) -> str:
    detail = assert_problem(answer, status, slug)["detail"]
    for secret in ("/work", "/tmp", "/input", "pin-value", "pkcs11:token=hsmsign"):  # noqa: S108
        assert secret not in answer.text
    return str(detail)


def openssl_accepts(directory: Path, signature: bytes, content: bytes, certificate: Path) -> bool:
    (directory / "signature").write_bytes(signature)
    (directory / "content").write_bytes(content)
    verify = ("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", "signature", "-content", "content")
    return accepts(directory, *verify, "-certfile", certificate, "-noverify", "-nointern", "-out", "verified")


def parts_of(csf: bytes) -> tuple[bytes, bytes, list[bytes]]:
    """Read without hsmsign's parser: the commands, the SRK table, the signatures in the order of the commands."""
    assert csf[0] == 0xD4
    commands = csf[: struct.unpack(">H", csf[1:3])[0]]
    at, table, signatures = 4, b"", []
    while at < len(commands):
        tag, size = commands[at], struct.unpack(">H", commands[at + 1 : at + 3])[0]
        data = struct.unpack(">I", commands[at + 8 : at + 12])[0] if tag in (0xBE, 0xCA) else 0
        length = struct.unpack(">H", csf[data + 1 : data + 3])[0]
        if tag == 0xCA:
            assert csf[data] == 0xD8
            signatures.append(csf[data + 4 : data + length])
        elif tag == 0xBE and commands[at + 4] == 3:
            table = csf[data : data + length]
        at += size
    return commands, table, signatures


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("where", "backend"), ANY_KEY)
@pytest.mark.parametrize("key", HAB)
def test_openssl_accepts_both_signatures_of_a_csf(  # noqa: PLR0917 - fixtures
    fixtures_service: Any, softhsm: Any, tmp_path: Path, key: str, where: str, backend: str, version: str
) -> None:
    image = IMAGE.read_bytes()
    machine = f"demo-{where}-{key}"
    text = hab_text(key, backend)
    answer = post(fixtures_service, machine, text, image, backend=backend, cstversion=version)
    assert answer.status_code == 200, answer.text
    commands, table, (csf_signature, image_signature) = parts_of(answer.content)
    certificates = {kind: certificate_of(softhsm, where, key, kind, tmp_path) for kind in ("CSF", "IMG")}
    block = re.search(r"Blocks = \S+ (\S+) (\S+)", text)
    assert block
    offset, length = int(block[1], 16), int(block[2], 16)
    signed = image[offset : offset + length]
    assert openssl_accepts(tmp_path, csf_signature, commands, certificates["CSF"])
    assert openssl_accepts(tmp_path, image_signature, signed, certificates["IMG"])
    assert not openssl_accepts(tmp_path, csf_signature, commands + b"\0", certificates["CSF"])
    assert not openssl_accepts(tmp_path, image_signature, b"\0" + signed[1:], certificates["IMG"])
    assert not openssl_accepts(tmp_path, image_signature, signed, certificates["CSF"])
    assert table[0] == 0xD7


def certificate_of(softhsm: Any, where: str, key: str, kind: str, directory: Path) -> Path:
    label = f"{kind}1_1_{HAB[key]}_v3_usr"
    if where == "token":
        return Path(softhsm.certificate(label))
    # a simulated YubiHSM holds the files' keys
    return Path(softhsm.keys / f"demo-file-{key}/imxsign/crts/{label}_crt.pem")


@pytest.mark.parametrize(("where", "backend"), [*ANY_KEY, ("file", "")])
def test_the_contract_s_line_verbatim(
    fixtures_service: Any, softhsm: Any, tmp_path: Path, *, where: str, backend: str
) -> None:
    """With the texts that users of a YubiHSM have today, and those of key files."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / IMAGE.name).write_bytes(IMAGE.read_bytes())
    (tmp_path / "command_sequence.csf").write_text(hab_text("rsa2048", backend or "ssl"))
    line = (
        "curl --connect-timeout 30 --max-time 1800 --retry 3 --silent --fail -X POST"
        f" -F machine=demo-{where}-rsa2048 -F soctype=mx8m -F cstversion=3.4.1"
        f' -F "csf=@command_sequence.csf;type=text/plain" -F "artifact=@build/{IMAGE.name}"'
        f"{f' -F backend={backend}' if backend else ''} --output OUT {fixtures_service.url}/sign/imx"
    )
    subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True, timeout=60)
    commands, _, (csf_signature, _) = parts_of((tmp_path / "OUT").read_bytes())
    certificate = certificate_of(softhsm, where, "rsa2048", "CSF", tmp_path)
    assert openssl_accepts(tmp_path, csf_signature, commands, certificate)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("where", "backend"), ANY_KEY)
@pytest.mark.parametrize("key", AHAB)
def test_openssl_accepts_the_signature_of_a_container(  # noqa: PLR0917 - fixtures
    fixtures_service: Any, softhsm: Any, tmp_path: Path, key: str, where: str, backend: str, version: str
) -> None:
    container = tmp_path / "flash.bin"
    offsets = imx_images.write_ahab_container(container, [b"first" * 3000, b"second" * 1000])
    text = imx_images.ahab_csf(offsets, container.name, name_of("SRK", AHAB[key], backend))
    answer = post(
        fixtures_service, f"demo-{where}-{key}", text, container.read_bytes(),
        soctype="mx9", backend=backend, cstversion=version, name=container.name,
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    signed, block = answer.content, offsets[1]
    assert signed[0x2000:] == container.read_bytes()[0x2000:]
    signature_at = block + struct.unpack_from("<H", signed, block + 8)[0]
    size = struct.unpack_from("<H", signed, signature_at + 1)[0]
    raw = signed[signature_at + 8 : signature_at + size]
    label = f"SRK1_{AHAB[key]}_v3_usr"
    certificate = (
        softhsm.certificate(label)
        if where == "token"
        else softhsm.keys / f"demo-file-{key}/imxsign/crts/{label}_crt.pem"
    )
    half = len(raw) // 2
    integers = [int.from_bytes(raw[at : at + half], "big") for at in (0, half)]
    numbers = [number.to_bytes(number.bit_length() // 8 + 1, "big") for number in integers]
    body = b"".join(b"\x02" + bytes([len(number)]) + number for number in numbers)
    (tmp_path / "signature").write_bytes(b"\x30" + bytes([len(body)]) + body)
    public = subprocess.run(
        ["openssl", "x509", "-in", certificate, "-noout", "-pubkey"], capture_output=True, check=True
    ).stdout
    (tmp_path / "public.pem").write_bytes(public)
    for content, good in ((signed[:signature_at], True), (b"\1" + signed[1:signature_at], False)):
        (tmp_path / "content").write_bytes(content)
        verify = ["openssl", "dgst", "-sha384" if "384" in key else "-sha256", "-verify", "public.pem"]
        assert accepts(tmp_path, *verify, "-signature", "signature", "content") is good


def test_offsets_of_no_container(fixtures_service: Any, tmp_path: Path) -> None:
    container = tmp_path / "flash.bin"
    imx_images.write_ahab_container(container, [b"first" * 3000])
    text = imx_images.ahab_csf((0x400, 0x490), container.name, name_of("SRK", AHAB["ahab-p384"], "pkcs11"))
    content = container.read_bytes()
    fields = {"soctype": "mx9", "name": container.name}
    answer = post(fixtures_service, "demo-token-ahab-p384", text, content, **fields)
    problem(answer, 422, "artifact-rejected")


def test_the_second_srk(fixtures_service: Any) -> None:
    answer = sign_hab(fixtures_service, text=hab_text("rsa2048", "pkcs11", 2))
    assert answer.status_code == 200, answer.text


def test_one_uri_for_the_commands_and_for_the_image(fixtures_service: Any) -> None:
    """Where a machine has one key of each role, a URI need not name the object."""
    name = re.compile(r"object=(CSF|IMG)1_1_\w+;")
    answer = sign_hab(fixtures_service, "rsa4096", name.sub("", hab_text("rsa4096", "pkcs11")))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("backend", ["ssl", "pkcs11"])
def test_a_key_that_another_srk_issued_is_refused(fixtures_service: Any, backend: str) -> None:
    text = hab_text("rsa2048", backend, 2).replace("Source index = 1", "Source index = 0")
    machine = "demo-file-rsa2048" if backend == "ssl" else "demo-token-rsa2048"
    answer = post(fixtures_service, machine, text, IMAGE.read_bytes(), backend=backend)
    problem(answer, 422, "artifact-rejected")
    assert "Source index" in answer.json()["detail"]


@pytest.mark.parametrize("where", ["token", "file"])
def test_twenty_runs_eight_at_once(fixtures_service: Any, softhsm: Any, tmp_path: Path, where: str) -> None:
    image, text = IMAGE.read_bytes(), hab_text("rsa2048", "pkcs11")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(fixtures_service, f"demo-{where}-rsa2048", text, image), range(20)))
    assert {answer.status_code for answer in answers} == {200}
    certificate = certificate_of(softhsm, where, "rsa2048", "CSF", tmp_path)
    for answer in answers:
        commands, _, (signature, _) = parts_of(answer.content)
        assert openssl_accepts(tmp_path, signature, commands, certificate)
    fixtures_service.assert_no_files()


@pytest.mark.parametrize("backend", ["ssl", "pkcs11"])
def test_without_a_sandbox(softhsm: Any, start: Any, backend: str) -> None:
    tables = tomllib.loads(softhsm.config.read_text())
    providers = {f"providers.{name}": table for name, table in tables["providers"].items()}
    tools = {**tables["tools"], "sandbox": "none"}
    imx = tables["signers"]["imx"]
    service = start({**providers, "grants": tables["grants"], "tools": tools, "signers.imx": imx})
    answer = post(service, "demo-file-rsa2048", hab_text("rsa2048", backend), IMAGE.read_bytes(), backend=backend)
    assert answer.status_code == 200, answer.text
    assert httpx.get(service.url + "/readyz", timeout=60).json()["sandbox"]["kind"] == "none"
    assert "tools run without a sandbox" in service.log
    service.assert_no_files()


SECRET = "/etc/shadow"


@pytest.mark.parametrize(
    ("old", "new", "status", "slug"),
    [
        # data that is not the upload
        ('"u-boot-dtb.imx"', f'"{SECRET}"', 422, "artifact-rejected"),
        ('"u-boot-dtb.imx"', '"u-boot-dtb.imx", \\\n 0x1 0x0 0x2 "/etc/passwd"', 422, "artifact-rejected"),
        ("0x0 0x", "0x0 0xff", 422, "artifact-rejected"),
        # keys that are not granted
        ("object=CSF1_1", "object=CSF3_1", 403, "key-not-granted"),
        ("object=CSF1_1_sha256_2048_65537_v3_usr", "object=swupdate-rsa", 403, "key-not-granted"),
        ("object=CSF1_1_sha256_2048_65537_v3_usr", "object=IMG1_1_sha256_2048_65537_v3_usr", 403, "key-not-granted"),
        ("token=YubiHSM;object=CSF", "token=other;object=CSF", 403, "key-not-granted"),
        ("pin-value=password", "pin-value=1234", 403, "key-not-granted"),
        ("pin-value=password", "module-path=/tmp/evil.so", 403, "key-not-granted"),
        ('"pkcs11:token=YubiHSM;object=CSF1_1_sha256_2048_65537_v3_usr;type=cert;pin-value=password"', '"1003"',
         403, "key-not-granted"),
        ('"pkcs11:token=YubiHSM;object=CSF1_1_sha256_2048_65537_v3_usr;type=cert;pin-value=password"', "1003",
         422, "artifact-rejected"),
        ('"pkcs11:token=YubiHSM;object=CSF1_1_sha256_2048_65537_v3_usr;type=cert;pin-value=password"',
         '"label_CSF1"', 403, "key-not-granted"),
        ('"pkcs11:token=YubiHSM;object=CSF1_1_sha256_2048_65537_v3_usr;type=cert;pin-value=password"',
         '"slot_1-id_2"', 403, "key-not-granted"),
        ('File = "pkcs11:token=YubiHSM;object=CSF', 'fILe = \\\n "PKCS11:token=other;object=CSF', 403,
         "key-not-granted"),
        # commands that are not allowed
        ("[Authenticate CSF]", "[Authenticate CSF]\n[Unlock]\nEngine = CAAM\nFeatures = MID", 403, "key-not-granted"),
        ("[Authenticate CSF]", "[Authenticate CSF]\n[Set Engine]\nEngine = CAAM\nHash Algorithm = sha256", 403,
         "key-not-granted"),
        ("[Authenticate Data]", '[Install Secret Key]\nVerification index = 0\nTarget index = 0\nKey = "/tmp/dek"\n'
         "Key Length = 128\nBlob address = 0x1\n[Authenticate Data]", 422, "artifact-rejected"),
        ("[Header]", "[Header]\nMode = HSM", 422, "artifact-rejected"),
        ("[Header]", "[Header]\nTarget = AHAB", 422, "artifact-rejected"),
        ("[Header]", "[Write Data]", 422, "artifact-rejected"),
        # what cst would make, and nobody releases: it must not lock the keys
        ("[Install SRK]", "[Install SRK]\nHash Algorithm = sha1", 422, "artifact-rejected"),
        ("Hash Algorithm = sha256", "Hash Algorithm = sha512", 422, "artifact-rejected"),
        ("[Install SRK]", "[Install SRK]\nHash Algorithm = sha512", 422, "artifact-rejected"),
        ("[Authenticate Data]", '[Install Key]\nVerification index = 2\nTarget index = 3\nFile = "pkcs11:token=hsmsign;'
         'object=IMG1_1_sha256_2048_65537_v3_usr;type=cert"\n[Authenticate Data]', 422, "artifact-rejected"),
    ],
)  # fmt: skip
def test_each_attack_gets_nothing(fixtures_service: Any, old: str, new: str, status: int, slug: str) -> None:
    text = hab_text("rsa2048", "pkcs11")
    assert old in text
    problem(sign_hab(fixtures_service, text=text.replace(old, new, 1)), status, slug)
    fixtures_service.assert_no_files()


def test_a_block_outside_the_image_is_told_in_words(fixtures_service: Any) -> None:
    text = re.sub(r"Blocks = (\S+) (\S+) (\S+)", r"Blocks = \1 0x10 0x800000", hab_text("rsa2048", "pkcs11"))
    assert "Block outside the image" in problem(sign_hab(fixtures_service, text=text), 422, "artifact-rejected")


@pytest.mark.parametrize(
    ("fields", "status", "slug"),
    [
        ({"soctype": "mx9"}, 422, "artifact-rejected"),
        ({"soctype": "mx99"}, 400, "invalid-request"),
        ({"cstversion": "2.3.1"}, 501, "tool-unavailable"),
        ({"cstversion": "../../x"}, 400, "invalid-request"),
        ({"cstversion": ".."}, 400, "invalid-request"),
        ({"backend": "hsm"}, 400, "invalid-request"),
        ({"name": "other.imx"}, 422, "artifact-rejected"),
    ],
)
def test_each_refusal(fixtures_service: Any, fields: dict[str, str], status: int, slug: str) -> None:
    problem(sign_hab(fixtures_service, **fields), status, slug)


def test_a_machine_without_a_grant(fixtures_service: Any) -> None:
    answer = post(fixtures_service, "unknown", hab_text("rsa2048", "pkcs11"), IMAGE.read_bytes())
    problem(answer, 404, "key-not-found")


def test_the_clients_own_file_name_is_no_path(fixtures_service: Any) -> None:
    text = hab_text("rsa2048", "pkcs11").replace('"u-boot-dtb.imx"', '"../../u-boot-dtb.imx"')
    answer = sign_hab(fixtures_service, text=text, name="../../../tmp/u-boot-dtb.imx")
    assert answer.status_code == 200, answer.text


def test_a_pinned_srk_table(softhsm: Any, start: Any) -> None:
    """The fuses of the fixtures are the hash that a grant may pin; another hash is refused."""
    fuses = next(path for path in (softhsm.directory / "fuses").iterdir() if "token-rsa2048" in path.name).read_bytes()
    for pinned, status in ((fuses, 200), (hashlib.sha256(b"other").digest(), 500)):
        service = start(pinned_settings(softhsm, pinned.hex()))
        answer = sign_hab(service)
        assert answer.status_code == status, answer.text


def pinned_settings(softhsm: Any, srk_hash: str) -> dict[str, Any]:
    tables = tomllib.loads(softhsm.config.read_text())
    grants = [grant for grant in tables["grants"] if grant["machine" if "machine" in grant else "name"] ==
              "demo-token-rsa2048"]  # fmt: skip
    for grant in grants:
        if grant["role"] == "files":
            grant |= {"srk_hash": srk_hash, "allow": ["unlock"]}
    providers = {f"providers.{name}": table for name, table in tables["providers"].items()}
    return {**providers, "grants": grants, "signers.imx": tables["signers"]["imx"]}


def test_unlock_where_the_grant_allows_it(softhsm: Any, start: Any) -> None:
    fuses = next(path for path in (softhsm.directory / "fuses").iterdir() if "token-rsa2048" in path.name).read_bytes()
    service = start(pinned_settings(softhsm, fuses.hex()))
    text = hab_text("rsa2048", "pkcs11").replace(
        "[Authenticate CSF]", "[Authenticate CSF]\n[Unlock]\nEngine = CAAM\nFeatures = MID"
    )
    answer = sign_hab(service, text=text)
    assert answer.status_code == 200, answer.text
    assert b"\xb2\x00\x08\x1d\x00\x00\x00\x01" in answer.content


def test_keys_in_s3(softhsm: Any, start: Any, s3: tuple[str, Any], tmp_path: Path) -> None:
    """The tarball and the keys to lend come from a bucket."""
    url, client = s3
    directory = softhsm.keys / "demo-file-rsa2048/imxsign"
    for path in directory.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "keys", f"imx/{path.relative_to(directory)}")
    labels = {role: f"{role.upper()}1_1_{HAB['rsa2048']}_v3_usr" for role in ("csf", "img")}
    common = {"signer": "imx", "provider": "s3"}
    grants = [{"name": "files", "role": "files", "object": "imx-cst-keys.tar.gz", **common}] + [
        {
            "name": role, "role": role, "object": f"keys/{label}_key.pem", "certificate": f"crts/{label}_crt.pem",
            "aliases": [label], **common,
        } for role, label in labels.items()
    ]  # fmt: skip
    provider = {"kind": "s3", "bucket": "keys", "prefix": "imx", "endpoint_url": url, "aliases": ["YubiHSM"]}
    imx = tomllib.loads(softhsm.config.read_text())["signers"]["imx"]
    service = start({"providers.s3": provider, "grants": grants, "signers.imx": imx})
    for backend in ("ssl", "pkcs11"):
        answer = post(service, "any", hab_text("rsa2048", backend), IMAGE.read_bytes(), backend=backend)
        assert answer.status_code == 200, answer.text
        commands, _, (signature, _) = parts_of(answer.content)
        certificate = certificate_of(softhsm, "file", "rsa2048", "CSF", tmp_path)
        assert openssl_accepts(tmp_path, signature, commands, certificate)
