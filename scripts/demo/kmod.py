"""Kernel modules: a tree of Debian's in archives of every kind, and a single one."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from case import PLACES, ROOT, Case, Fixtures, Post, accepts, flip

MODULES = ROOT / ".cache/modules"
MARKER = b"~Module signature appended~\n"
COUNT = 12
OPTIONS = {"tar": (), "tar.gz": ("--gzip",), "tar.xz": ("--xz",), "tar.zst": ("--zstd",)}


def cases(fixtures: Fixtures) -> Iterator[Case]:
    """Every kind of archive and of key."""
    for provider, machine, prefix in PLACES:
        for archive in OPTIONS:
            yield Tree(f"RSA-2048, {archive}", provider, machine, fixtures.certificate(f"{prefix}kmod-rsa"), archive)
    yield Tree("P-384, tar.gz", "softhsm", "demo-token-p384", fixtures.certificate("kmod-p384"), "tar.gz")
    yield Tree("P-256, tar.gz", "file", "demo-file-p256", fixtures.certificate("file-kmod-p256"), "tar.gz")
    yield Single("RSA-2048, one .ko.xz", "softhsm", "demo-token", fixtures.certificate("kmod-rsa"))


class Modules:
    """Signed modules, unpacked: OpenSSL verifies the signature behind each."""

    signer = "kmod"
    verifier = "openssl cms"
    certificate: Path

    def verify(self, signed: Path) -> bool:
        """By the certificate that the kernel would know."""
        found = sorted(signed.rglob("*.ko"))
        return bool(found) and all(self.verify_module(module) for module in found)

    def verify_module(self, module: Path) -> bool:
        """Takes a module apart as the kernel does (include/linux/module_signature.h)."""
        data = module.read_bytes()
        end = len(data) - len(MARKER) - 12
        start = end - int.from_bytes(data[end + 8 : end + 12], "big")
        content, message = module.with_suffix(".content"), module.with_suffix(".p7")
        content.write_bytes(data[:start])
        message.write_bytes(data[start:end])
        trusted = ("-certfile", self.certificate, "-nointern", "-noverify")
        verify = ("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", message, "-content", content)
        return data.endswith(MARKER) and accepts(*verify, *trusted, "-out", "/dev/null", directory=module.parent)

    def tamper(self, signed: Path) -> None:
        """Another byte in one of the modules."""
        flip(max(signed.rglob("*.ko")), 100)


@dataclass(frozen=True)
class Tree(Modules):
    """A tree as `make modules_install` leaves it."""

    variant: str
    provider: str
    machine: str
    certificate: Path
    archive: str

    def sign(self, post: Post, directory: Path) -> Path:
        """Returns the directory with the tree that came back."""
        unsigned, signed, root = directory / f"unsigned.{self.archive}", directory / "signed", directory / "root"
        modules = [f"./{path.relative_to(MODULES)}" for path in sorted(MODULES.rglob("*.ko"))[:COUNT]]
        options = OPTIONS[self.archive]
        subprocess.run(["tar", *options, "-c", "-f", unsigned, *modules], cwd=MODULES, check=True)
        signed.write_bytes(post("/sign/modules", {"machine": self.machine}, {"artifact": unsigned}))
        root.mkdir()
        subprocess.run(["tar", *options, "-x", "-f", signed], cwd=root, check=True)
        return root


@dataclass(frozen=True)
class Single(Modules):
    """A compressed module."""

    variant: str
    provider: str
    machine: str
    certificate: Path

    def sign(self, post: Post, directory: Path) -> Path:
        """Returns the directory with the module that came back, unpacked."""
        unsigned, root = directory / "one.ko.xz", directory / "root"
        module = min(MODULES.rglob("*.ko"))
        with unsigned.open("wb") as output:
            subprocess.run(["xz", "--stdout", module], stdout=output, check=True)
        root.mkdir()
        signed = post("/sign/modules", {"machine": self.machine}, {"artifact": unsigned})
        content = subprocess.run(["xz", "--decompress"], input=signed, stdout=subprocess.PIPE, check=True).stdout
        (root / "one.ko").write_bytes(content)
        return root
