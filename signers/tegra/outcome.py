"""What NVIDIA's scripts left: looked through, verified, and packed for the client.

Their exit status says nothing: they end with 0 after a traceback, and with signatures of another key.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from signers.archives import CHUNK_BYTES, Part
from signers.formats import nvda, tar
from signers.formats import tegra_requests as requests
from signers.formats.nvda import HeaderError
from signers.signer import FileRange, Signed, Upload
from signers.tegra.service import SALT_BYTES, Made
from tokens.errors import KeyUnsuited, SigningFailed, ToolFailed
from tokens.provider import PublicKey
from tokens.schemes import Ecdsa, Ed25519, Hash, RsaPss
from tokens.verify import verify

FLASH_COMMAND = "flashcmd.txt"
"""The script that flashes: a client runs it as doflash.sh."""

PAYLOADS = "payloads"
"""How the names of update payloads, or of their directories, begin."""

_LEFT_OUT = re.compile(r"(?:signed|encrypted_signed|enc_signed|signed_bootimg_dir|[0-9]+|_tools|rollback)/.*|flash\.xml(?:\.tmp)?")
_P256_PADDED_BYTES, _P521_PADDED_BYTES = 48, 68


@dataclass(frozen=True, slots=True)
class Output:
    """A file that was made."""

    name: str
    content: FileRange
    mode: int
    mtime: int


def outputs(directory: Path, files: Mapping[str, "object"]) -> None:
    """Placeholder."""
