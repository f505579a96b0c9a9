"""OP-TEE: trees of Trusted Applications, new and signed before, and below a subkey; loaded by OP-TEE's rules."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from case import PLACES, ROOT, Case, Fixtures, Post, flip

sys.path.insert(0, str(ROOT / "softhsm-fixtures"))
import optee_rules

# any position-independent program will do: what it is for, only OP-TEE's loader would see
ELF = Path("/bin/true")
TA = "8aaaf200-2450-11e4-abe2-0002a5d5c51b"
SUBKEY = "f04fa996-148a-453c-b037-1dcfbad120a6"


def cases(fixtures: Fixtures) -> Iterator[Case]:
    """Every way of each provider."""
    for provider, machine, prefix in PLACES:
        root, vendor = (fixtures.public_key(f"{prefix}optee-{name}") for name in ("root", "subkey"))
        owner = "demo-file" if prefix else "demo-token"
        key = bytes.fromhex((fixtures.directory / f"keys/{owner}/opteesign/ta-encryption.key").read_text())
        yield Tree("RSA-PSS", provider, machine, root)
        yield Tree("RSA", provider, machine, root, "RSA")
        yield Tree("RSA-PSS, encrypted", provider, machine, root, encryption_key=key)
        yield Again("RSA-PSS, signed again", provider, machine, root)
        yield Below("RSA-PSS, below a subkey", provider, machine, root, vendor)


class Signs:
    """A TA that a device with the root key loads."""

    signer = "optee"
    verifier = "optee_rules, openssl"
    root: Path
    encryption_key: bytes | None = None

    def verify(self, signed: Path) -> bool:
        """By the rules for loading a TA, as OP-TEE's documentation has them."""
        keys = {} if self.encryption_key is None else {0: self.encryption_key}
        try:
            optee_rules.load(signed.read_bytes(), TA, self.root.read_bytes(), keys)
        except optee_rules.Refused:
            return False
        return True

    def tamper(self, signed: Path) -> None:
        """Another byte in the middle of the image."""
        flip(signed, -ELF.stat().st_size // 2)


@dataclass(frozen=True)
class Tree(Signs):
    """A tree as OP-TEE's build leaves it."""

    variant: str
    provider: str
    machine: str
    root: Path
    method: str = "RSA-PSS"
    encryption_key: bytes | None = None

    def sign(self, post: Post, directory: Path) -> Path:
        """Returns the TA out of the tree that came back."""
        encryption = {} if self.encryption_key is None else {"encryption": "device"}
        return signed_tree(post, directory, {"machine": self.machine, "method": self.method, **encryption}, {})


@dataclass(frozen=True)
class Again(Signs):
    """A TA that somebody else's key signed before."""

    variant: str
    provider: str
    machine: str
    root: Path

    def sign(self, post: Post, directory: Path) -> Path:
        """Returns the TA that came back."""
        before = signed_tree(post, directory, {"machine": f"{self.machine}-subkey"}, {})
        signed = directory / "again.ta"
        signed.write_bytes(post("/sign/optee", {"machine": self.machine}, {"artifact": before}))
        return signed


@dataclass(frozen=True)
class Below(Signs):
    """A TA that the holder of a subkey signs."""

    variant: str
    provider: str
    machine: str
    root: Path
    vendor: Path

    def sign(self, post: Post, directory: Path) -> Path:
        """The subkey is made for this one TA. Returns the TA."""
        subkey = directory / "subkey.bin"
        subkey.write_bytes(post("/sign/optee", {"machine": self.machine, "uuid": TA}, {"artifact": self.vendor}))
        return signed_tree(post, directory, {"machine": f"{self.machine}-subkey"}, {"subkey": subkey})


def signed_tree(post: Post, directory: Path, fields: dict[str, str], files: dict[str, Path]) -> Path:
    """The TA out of a tree that was signed."""
    tree, unsigned, signed = directory / "tree/ta", directory / "unsigned.tar.gz", directory / "signed.tar.gz"
    tree.mkdir(parents=True)
    (tree / f"{TA}.stripped.elf").write_bytes(ELF.read_bytes())
    (tree / f"{TA}.ta-version").write_text("1\n")
    subprocess.run(["tar", "-c", "-z", "-f", unsigned, "./ta"], cwd=directory / "tree", check=True)
    signed.write_bytes(post("/sign/optee", fields, {"artifact": unsigned, **files}))
    subprocess.run(["tar", "-x", "-f", signed], cwd=directory, check=True)
    return directory / f"ta/{TA}.ta"
