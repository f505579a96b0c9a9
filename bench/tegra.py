"""A Jetson's boot files for `/sign/tegra`, by a BSP that plays NVIDIA's, with the key on the token and in a file."""

import tarfile
from pathlib import Path

from load import upload
from tools import Runs, runs_of

from tests.stand_in_bsp.build import pack, request_files
from tests.stand_in_bsp.checks import openssl_accepts

SOCTYPE, VERSION = "tegra234", "35.4.1"
KEYS = {"demo-token-t234-rsa": "tegra-t234-rsa", "demo-file-t234-rsa": "file-tegra-t234-rsa"}
"""The machines, by the names of whose keys the answers are verified."""


def write_request(directory: Path, images: int) -> Path:
    """Writes what a build posts for that many images."""
    artifact = directory / "tegrasign-in.tar.gz"
    artifact.write_bytes(pack(request_files(SOCTYPE, images - 2)))  # the kernel and the device tree are images too
    return artifact


def sign_set(url: str, machine: str, artifact: Path, answer: Path) -> Runs:
    """One set for flashing."""
    fields = {"machine": machine, "soctype": SOCTYPE, "bspversion": VERSION}
    done = upload(url, "/sign/tegra", fields, artifact, answer)
    return runs_of(done.seconds, [done.seconds if done.status == 200 else None])


def check_set(answer: Path, images: int, public_key: Path) -> None:
    """Every image is signed, says OpenSSL. Raises AssertionError."""
    with tarfile.open(answer) as archive:
        signed = [archive.extractfile(member) for member in archive if member.name.endswith(".signed")]
        assert len(signed) == images
        assert all(file and openssl_accepts(file.read(), SOCTYPE, "rsa", public_key) for file in signed)
