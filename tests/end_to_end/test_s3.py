"""The native signers with their keys in S3, laid out as digsigserver has them: as with the same keys in files."""

import io
import subprocess
import tarfile
import tomllib
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import fit_images
import httpx
import pytest
import rockchip_images

from tests.conftest import ROOT

JETSON = {"machine": "demo-file", "soctype": "tegra234", "bspversion": "36.4.3"}
SIGNERS = {"kmod", "mender", "optee", "uefi", "capsule", "fitimage", "ekb", "rk"}


@pytest.fixture(scope="module")
def services(softhsm: Any, s3: tuple[str, Any], start: Callable[..., Any]) -> tuple[Any, Any]:
    """A service with the fixtures' key files in a bucket, and one with the files."""
    url, client = s3
    for path in softhsm.keys.glob("demo-file/**/*"):
        if path.is_file():
            client.upload_file(str(path), "keys", f"all/{path.relative_to(softhsm.keys)}")
    grants = [
        grant | {"provider": "keys"} for grant in tomllib.loads(softhsm.config.read_text())["grants"]
        if grant["signer"] in SIGNERS and grant["provider"] == "files"
        and fnmatchcase("demo-file", grant.get("machine", grant.get("distro", "")))
    ]  # fmt: skip
    assert {grant["signer"] for grant in grants} == SIGNERS
    bucket = {"kind": "s3", "bucket": "keys", "prefix": "all", "endpoint_url": url}
    files = {"kind": "file", "root": str(softhsm.keys)}
    return start({"providers.keys": bucket, "grants": grants}), start({"providers.keys": files, "grants": grants})


def module(_: Path) -> bytes:
    return next(ROOT.glob(".cache/modules/**/msdos.ko")).read_bytes()


def mender_artifact(directory: Path) -> bytes:
    (directory / "payload.bin").write_bytes(b"payload")
    command = ["mender-artifact", "write", "module-image", "-T", "module", "-f", "payload.bin", "-o", "a.mender"]
    subprocess.run([*command, "-n", "release-1", "-t", "board"], cwd=directory, capture_output=True, check=True)
    return (directory / "a.mender").read_bytes()


def trusted_applications(_: Path) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tree:
        member = tarfile.TarInfo("8aaaf200-2450-11e4-abe2-0002a5d5c51b.stripped.elf")
        elf = Path("/bin/true").read_bytes()
        member.size = len(elf)
        tree.addfile(member, io.BytesIO(elf))
    return archive.getvalue()


def program(_: Path) -> bytes:
    return Path("/usr/lib/systemd/boot/efi/systemd-bootx64.efi").read_bytes()


def fit(directory: Path) -> bytes:
    return fit_images.make(directory, algo="sha256,rsa2048").read_bytes()


def idblock(directory: Path) -> bytes:
    rockchip_images.write_idblock(directory / "idblock.img", b"ddr" * 1000, b"spl" * 1000)
    return (directory / "idblock.img").read_bytes()


@pytest.mark.parametrize(
    ("path", "fields", "artifact", "same"),
    [
        ("/sign/modules", {"machine": "demo-file"}, module, True),
        ("/sign/mender", {"distro": "demo-file"}, mender_artifact, True),
        ("/sign/optee", {"machine": "demo-file", "method": "RSA"}, trusted_applications, True),
        ("/sign/fitimage", {"machine": "demo-file", "timestamp": "1700000000"}, fit, True),
        # a time or random numbers are in these
        ("/sign/tegra/uefi", {"machine": "demo-file", "signing_type": "sbsign"}, program, False),
        ("/sign/tegra/ueficapsule", JETSON, program, False),
        ("/sign/tegra/ekb", JETSON, None, False),
        ("/sign/rk", {"machine": "demo-file", "soctype": "rk3588", "artifact_type": "idblock"}, idblock, False),
    ],
)
def test_the_answer_is_that_by_files(
    services: tuple[Any, Any], tmp_path: Path, *, path: str, fields: dict[str, str], artifact: Any, same: bool
) -> None:
    parts: dict[str, Any] = {name: (None, value) for name, value in fields.items()}
    if artifact is not None:
        parts["artifact"] = ("artifact", artifact(tmp_path))
    by_s3, by_files = (httpx.post(service.url + path, files=parts, timeout=60) for service in services)
    for answer in (by_s3, by_files):  # each was verified with the key before it left
        assert answer.status_code == 200, answer.text
    assert len(by_s3.content) == len(by_files.content) > 0
    assert not same or by_s3.content == by_files.content
