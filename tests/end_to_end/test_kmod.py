"""Kernel modules, through HTTP, by keys on a token and in files, held against sign-file, OpenSSL and modinfo."""

import io
import subprocess
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT
from tests.end_to_end.conftest import assert_problem

MODULES = ROOT / ".cache/modules"
SIGN_FILE = "/usr/lib/linux-kbuild-6.1/scripts/sign-file"
MARKER = b"~Module signature appended~\n"
CERTIFICATES = {
    "demo-token": "kmod-rsa", "demo-token-p384": "kmod-p384",
    "demo-file": "file-kmod-rsa", "demo-file-p256": "file-kmod-p256",
    "demo-yubihsm": "file-kmod-rsa", "demo-yubihsm-p256": "file-kmod-p256",
}  # fmt: skip
COUNT = 40


def post(
    service: Any, machine: str, artifact: bytes, filename: str = "modules.tar.gz", **fields: str
) -> httpx.Response:
    form = {"machine": machine, **fields}
    return httpx.post(service.url + "/sign/modules", data=form, files={"artifact": (filename, artifact)}, timeout=120)


def split(module: bytes) -> tuple[bytes, bytes]:
    """The module without its signature, and the CMS message."""
    assert module.endswith(MARKER)
    end = len(module) - len(MARKER) - 12
    start = end - int.from_bytes(module[end + 8 : end + 12], "big")
    return module[:start], module[start:end]


@pytest.fixture(scope="session")
def modules() -> list[Path]:
    """Some of Debian's modules, relative to the tree's root."""
    assert MODULES.is_dir(), f"{MODULES} is missing: run `make setup`"
    found = sorted(MODULES.glob("lib/modules/*/kernel/crypto/*.ko"))[:COUNT]
    assert len(found) == COUNT
    return [path.relative_to(MODULES) for path in found]


@pytest.fixture(scope="session")
def archive(modules: list[Path]) -> bytes:
    """A tar.gz as build layers make it."""
    command = ["tar", "--create", "--gzip", *(f"./{path}" for path in modules)]
    return subprocess.run(command, cwd=MODULES, capture_output=True, check=True).stdout


@pytest.fixture
def accepts(softhsm: Any, tmp_path: Path) -> Callable[..., bool]:
    """What OpenSSL says of a module's signature by a machine's certificate."""

    def check(machine: str, content: bytes, message: bytes) -> bool:
        (tmp_path / "content").write_bytes(content)
        (tmp_path / "message").write_bytes(message)
        trusted = ("-certfile", softhsm.certificate(CERTIFICATES[machine]), "-nointern", "-noverify")
        command = ("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", "message", "-content", "content")
        done = subprocess.run([*command, *trusted, "-out", "out"], cwd=tmp_path, capture_output=True, check=False)
        return done.returncode == 0

    return check


@pytest.mark.parametrize("machine", CERTIFICATES)
def test_openssl_accepts_every_module_of_a_tree(
    fixtures_service: Any, accepts: Callable[..., bool], modules: list[Path], archive: bytes, machine: str
) -> None:
    answer = post(fixtures_service, machine, archive, hashalg="sha256")
    assert answer.status_code == 200, answer.text
    with tarfile.open(fileobj=io.BytesIO(answer.content), mode="r:gz") as signed:
        assert [member.name for member in signed] == [f"./{path}" for path in modules]
        for path in modules[:10]:
            content, message = split(signed.extractfile(f"./{path}").read())  # type: ignore[union-attr]
            assert content == split((MODULES / path).read_bytes())[0]
            assert accepts(machine, content, message)
            assert not accepts(machine, content[:-1] + bytes([content[-1] ^ 1]), message)
            assert not accepts(machine, content, message[:-1] + bytes([message[-1] ^ 1]))
    fixtures_service.assert_no_files()


def test_the_key_file_signs_as_sign_file_does(
    fixtures_service: Any, softhsm: Any, modules: list[Path], tmp_path: Path
) -> None:
    keys = softhsm.keys / "demo-file/kmodsign"
    for path, hash_ in zip(modules, ("sha256", "sha384", "sha512"), strict=False):
        came = (MODULES / path).read_bytes()
        (tmp_path / "unsigned.ko").write_bytes(split(came)[0])
        command = [
            SIGN_FILE,
            hash_,
            keys / "kernel-signkey.priv",
            keys / "kernel-signkey.x509",
            "unsigned.ko",
            "signed.ko",
        ]
        subprocess.run(command, cwd=tmp_path, check=True)
        answer = post(fixtures_service, "demo-file", came, path.name, hashalg=hash_)
        assert answer.content == (tmp_path / "signed.ko").read_bytes()


def test_the_contract_s_line_verbatim(
    fixtures_service: Any, softhsm: Any, modules: list[Path], archive: bytes, tmp_path: Path
) -> None:
    (tmp_path / "unsigned.tar.gz").write_bytes(archive)
    line = (
        "curl --connect-timeout 30 --max-time 1800 --retry 3 --silent --fail -X POST -F machine=demo-token"
        f' -F "artifact=@unsigned.tar.gz" --output signed.tar.gz {fixtures_service.url}/sign/modules'
    )
    subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True)
    subprocess.run(["tar", "--extract", "--file", "signed.tar.gz"], cwd=tmp_path, check=True)
    for path in modules[:3]:
        shown = subprocess.run(
            ["/usr/sbin/modinfo", tmp_path / path], capture_output=True, text=True, check=True
        ).stdout
        assert "signer:         hsmsign demo CA\n" in shown  # modinfo shows the issuer
        assert "sig_hashalgo:   sha512\n" in shown


def test_eight_requests_at_once(fixtures_service: Any, archive: bytes) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(fixtures_service, "demo-token", archive), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1


@pytest.mark.parametrize(
    ("machine", "artifact", "fields", "status", "slug"),
    [
        ("unknown", b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x01\x00", {}, 404, "key-not-found"),
        ("demo-token", b"no module", {}, 422, "artifact-rejected"),
        ("demo-token", b"\x1f\x8b no gzip", {}, 422, "artifact-rejected"),
        ("demo-token", b"x", {"hashalg": "sha1"}, 400, "invalid-request"),
        ("../x", b"x", {}, 400, "invalid-request"),
        ("demo-token", b"", {}, 422, "artifact-rejected"),
    ],
)
def test_each_refusal(
    fixtures_service: Any, machine: str, artifact: bytes, fields: dict[str, str], status: int, slug: str
) -> None:
    answer = post(fixtures_service, machine, artifact, **fields)
    assert_problem(answer, status, slug)
    fixtures_service.assert_no_files()
