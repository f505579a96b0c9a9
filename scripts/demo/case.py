"""What one row of the demo is."""

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

TOOL_TIMEOUT_S = 60
ROOT = Path(__file__).parents[2]

PLACES = (
    ("softhsm", "demo-token", ""),
    ("yubihsm", "demo-yubihsm", "file-"),
    ("file", "demo-file", "file-"),
)
"""Where most keys are: the provider, the machine or distro, and what the names of its keys begin with."""

Post = Callable[[str, Mapping[str, str], Mapping[str, Path]], bytes]
"""Posts to a path of the service: the fields, and the files by the names of theirs. Returns the answer's body."""


class Case(Protocol):
    """One way of signing one artifact with a key of one provider, and the tool that says whether it is right."""

    @property
    def signer(self) -> str:
        """The name of the signer."""

    @property
    def variant(self) -> str:
        """The method, the type of the key, the form of the artifact."""

    @property
    def provider(self) -> str:
        """`softhsm`, `yubihsm`, `file` or `s3`."""

    @property
    def verifier(self) -> str:
        """The tool that verifies."""

    def sign(self, post: Post, directory: Path) -> Path:
        """Makes an artifact in the empty directory, has it signed, and returns the signed one."""

    def verify(self, signed: Path) -> bool:
        """What the verifier says."""

    def tamper(self, signed: Path) -> None:
        """Changes what was signed, such that only its signature can tell."""


@dataclass(frozen=True)
class Fixtures:
    """What softhsm-fixtures/make_fixtures.py made."""

    directory: Path

    def public_key(self, label: str) -> Path:
        """The PEM file of a key's public half."""
        return self.directory / "public" / f"{label}.pem"

    def certificate(self, name: str) -> Path:
        """The PEM file of the certificate of a key or an authority."""
        return self.directory / "certificates" / f"{name}.pem"


def flip(path: Path, at: int) -> None:
    """Changes one bit of a file; from its end where `at` is negative."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def accepts(*command: str | Path, directory: Path) -> bool:
    """Runs a verifier in a directory: whether its exit code is 0."""
    result = subprocess.run(
        command,
        cwd=directory,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": str(directory)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TOOL_TIMEOUT_S,
        check=False,
    )
    return result.returncode == 0
