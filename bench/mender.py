"""The Mender artifact that is signed by `/sign/mender`, as an upload and in place, and sha256sum over the same file."""

import os
import subprocess
import time
from pathlib import Path

import httpx
from artifacts import write_file
from load import UPLOAD_TIMEOUT_S
from tools import Runs, runs_of

KEYS = {"demo-token": "mender-rsa", "demo-token-p256": "mender-p256"}
"""Two distros, whose keys sign the artifact in place by turns."""


def write_artifact(directory: Path, mib: int) -> Path:
    """Writes an unsigned artifact with one uncompressed file of `mib` MiB, as build layers do."""
    payload, artifact = directory / "rootfs.ext4", directory / "unsigned.mender"
    write_file(payload, mib)
    command = ["mender-artifact", "write", "rootfs-image", "--compression", "none", "-n", "release-1", "-t", "board"]
    env = {"PATH": os.defpath, "TMPDIR": str(directory)}
    subprocess.run([*command, "-f", payload, "-o", artifact], env=env, capture_output=True, check=True)
    payload.unlink()
    return artifact


def check_artifact(artifact: Path, public_key: Path) -> None:
    """By mender-artifact. Raises CalledProcessError."""
    subprocess.run(["mender-artifact", "validate", "-k", public_key, artifact], capture_output=True, check=True)


def sign_in_place(url: str, distro: str, artifact: Path) -> Runs:
    """The service reads the artifact where it is, and replaces it; a signature of the other distro's too."""
    fields = {"distro": distro, "artifact-uri": f"file://{artifact}", "force": "1"}
    form = {name: (None, value) for name, value in fields.items()}
    start = time.perf_counter()
    answer = httpx.post(f"{url}/sign/mender", files=form, timeout=UPLOAD_TIMEOUT_S)
    seconds = time.perf_counter() - start
    return runs_of(seconds, [seconds if answer.status_code == httpx.codes.OK else None])


def sha256sum(artifact: Path) -> Runs:
    """How long coreutils' sha256sum takes."""
    start = time.perf_counter()
    subprocess.run(["sha256sum", artifact], capture_output=True, check=True)
    seconds = time.perf_counter() - start
    return runs_of(seconds, [seconds])
