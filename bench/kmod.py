"""The kernel modules that are posted to `/sign/modules`, and the same for the kernel's own sign-file."""

import hashlib
import os
import subprocess
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from artifacts import TokenRequest, check_rsa
from tools import Runs, runs_of

from tokens.pkcs11 import Pkcs11Settings
from tokens.schemes import Hash, RsaPkcs1v15

ROOT = Path(__file__).parents[1]
TREE = ROOT / ".cache/modules"
SIGN_FILE = Path("/usr/lib/linux-kbuild-6.1/scripts/sign-file")
KEY = "kmod-rsa"
HASH = Hash.SHA512
"""What `/sign/modules` takes where it is not told otherwise."""

SIGN_FILE_RUNS = 20
"""How many modules sign-file signs in a round; the time for all is reckoned from them."""

_MARKER = b"~Module signature appended~\n"

PROVIDER = """\
openssl_conf = conf
[conf]
providers = providers
[providers]
default = built-in
pkcs11 = pkcs11
[built-in]
activate = 1
[pkcs11]
module = {provider}
pkcs11-module-path = {module}
pkcs11-module-token-pin = file:{pin}
pkcs11-module-quirks = no-deinit
activate = 1
"""


def modules(count: int) -> list[Path]:
    """Real modules, relative to the tree's root."""
    found = [path.relative_to(TREE) for path in sorted(TREE.rglob("*.ko"))[:count]]
    assert len(found) == count, f"{TREE} has but {len(found)} modules"
    return found


def write_tree(archive: Path, paths: Sequence[Path], *options: str) -> None:
    """Makes a tar archive of modules, as build layers do."""
    names = [f"./{path}" for path in paths]
    subprocess.run(["tar", "--create", *options, "--file", archive, *names], cwd=TREE, check=True)


def signature_request(path: Path) -> TokenRequest:
    """What a bare worker signs for a module."""
    return TokenRequest(
        case="", path="", content_type="", body=b"", check=lambda _: None,
        key=KEY, scheme=RsaPkcs1v15(HASH), digest=hashlib.new(HASH.value, (TREE / path).read_bytes()).digest(),
    )  # fmt: skip


def check_tree(archive: Path, paths: Sequence[Path], public_key: Path) -> None:
    """Every module of an answer has a signature of the key behind it. Raises InvalidSignature."""
    with tarfile.open(archive) as reader:
        assert reader.getnames() == [f"./{path}" for path in paths]
        for member in reader.getmembers():
            file = reader.extractfile(member)
            assert file is not None
            check_module(file.read(), public_key)


def check_module(signed: bytes, public_key: Path) -> None:
    """An RSA-2048 signature is the last 256 bytes of the CMS message."""
    assert signed.endswith(_MARKER)
    end = len(signed) - len(_MARKER) - 12
    start = end - int.from_bytes(signed[end + 8 : end + 12], "big")
    check_rsa(public_key, signed[end - 256 : end], hashlib.new(HASH.value, signed[:start]).digest(), HASH)


class SignFile:
    """sign-file, which reaches the token by OpenSSL's pkcs11 provider: the only way that Debian's knows."""

    def __init__(self, settings: Pkcs11Settings, certificate: Path, directory: Path) -> None:
        provider = next((ROOT / ".cache/debian/bookworm-backports/root/usr/lib").glob("*/ossl-modules/pkcs11.so"))
        configuration = directory / "openssl.cnf"
        text = PROVIDER.format(provider=provider, module=settings.module, pin=settings.pin.path())
        configuration.write_text(text)
        self._env = {"PATH": os.defpath, "LANG": "C.UTF-8", "OPENSSL_CONF": str(configuration), **settings.env}
        self._command = [SIGN_FILE, HASH.value, f"pkcs11:token={settings.token};object={KEY};type=private", certificate]
        self._signed = directory / "signed.ko"

    def sign(self, paths: Sequence[Path]) -> Runs:
        """Signs some of the modules one after the other; the runs are told as if they had been all."""
        some = paths[:: max(1, len(paths) // SIGN_FILE_RUNS)]
        start = time.perf_counter()
        errors = sum(self._run(TREE / path) for path in some)
        seconds = (time.perf_counter() - start) / len(some) * len(paths)
        return runs_of(seconds, [None if errors else seconds])

    def _run(self, path: Path) -> int:
        command = [*self._command, path, self._signed]
        done = subprocess.run(command, env=self._env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        return done.returncode
