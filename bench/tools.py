"""The tools that the service runs, started directly: on the token or a copy, with its PIN, and nothing in between."""

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tokens.pkcs11 import Pkcs11Settings

CST_BASE = Path(__file__).parents[1] / ".cache/cst"
CST_VERSION = "3.4.1"
CST = CST_BASE / f"cst-{CST_VERSION}/linux64/bin/cst"
OPENSSL = Path("/usr/bin/openssl")

ENGINE = """\
openssl_conf = conf
[conf]
engines = engines
[engines]
pkcs11 = pkcs11
[pkcs11]
engine_id = pkcs11
MODULE_PATH = {module}
PIN = {pin}
init = 0
"""


@dataclass(frozen=True)
class Runs:
    """What came of runs of a tool: how long they lasted together, and each good one; how many failed."""

    seconds: float
    each: list[float]
    errors: int


class BareTool:
    """A tool that reaches a token by OpenSSL's pkcs11 engine, which is configured in its working directory."""

    def __init__(self, settings: Pkcs11Settings, directory: Path) -> None:
        configuration = directory / "openssl.cnf"
        configuration.touch(mode=0o600)
        pin = settings.pin.path().read_text().rstrip("\n")
        configuration.write_text(ENGINE.format(module=settings.module, pin=pin))
        self._directory = directory
        self._env = {"PATH": os.defpath, "LANG": "C.UTF-8", "OPENSSL_CONF": str(configuration), **settings.env}

    def sign_image(self) -> float | None:
        """Signs by the directory's commands.csf. Returns the seconds that it takes, or None where it fails."""
        return self._run([str(CST), "-b", "pkcs11", "-i", "commands.csf", "-o", "signed.bin"])

    def sign_file(self, file: Path, key: str) -> float | None:
        """Signs a file by `openssl dgst`. Returns the seconds that it takes, or None where it fails."""
        command = [str(OPENSSL), "dgst", "-sha256", "-engine", "pkcs11", "-keyform", "engine"]
        return self._run([*command, "-sign", key, "-out", "signature.bin", str(file)])

    def _run(self, command: Sequence[str]) -> float | None:
        start = time.perf_counter()
        status = subprocess.run(
            command,
            cwd=self._directory,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        ).returncode
        return None if status else time.perf_counter() - start


def sign_images(tools: Sequence[BareTool], seconds: float) -> Runs:
    """Each tool signs an image again and again, all of them at once."""
    start = time.perf_counter()

    def again(tool: BareTool) -> list[float | None]:
        done = []
        while time.perf_counter() < start + seconds:
            done.append(tool.sign_image())
        return done

    with ThreadPoolExecutor(len(tools)) as threads:
        runs = [taken for done in threads.map(again, tools) for taken in done]
    return runs_of(time.perf_counter() - start, runs)


def runs_of(seconds: float, runs: Sequence[float | None]) -> Runs:
    """Of runs that lasted so long together, what each took; None where it failed."""
    each = [taken for taken in runs if taken is not None]
    return Runs(seconds, each, len(runs) - len(each))


def copied_token(settings: Pkcs11Settings, directory: Path) -> Pkcs11Settings:
    """The settings of a copy of a SoftHSM token.

    On the same one, processes that start at once fail: at each log-in SoftHSM truncates and rewrites the token's file.
    """
    original = Path(settings.env["SOFTHSM2_CONF"])
    tokens, configuration = directory / "tokens", directory / "softhsm2.conf"
    shutil.copytree(original.parent / "tokens", tokens)
    configuration.write_text(f"directories.tokendir = {tokens}\nlog.level = ERROR\n")
    return settings.model_copy(update={"env": {**settings.env, "SOFTHSM2_CONF": str(configuration)}})
