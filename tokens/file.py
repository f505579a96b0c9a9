"""Keys in files below a directory: read when a job opens them, gone after it.

[providers.keys]
kind = "file"
root = "/etc/hsmsign/keys"
"""

import logging
import os
import stat
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel, ConfigDict

from tokens.errors import KeyNotFound, KeyUnusable, ProviderUnavailable
from tokens.keyfile import KEY_FILE_MAX_BYTES, MemoryKey, check_size, open_key
from tokens.provider import KeyReference
from tokens.secret import SecretSource
from tokens.threads import Threads

_log = logging.getLogger("tokens.file")

_READERS = 4
"""Reads at once: on a network file system one that hangs must not hold up the others."""


class FileSettings(BaseModel):
    """`[providers.NAME]` with `kind = "file"`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["file"]
    root: Path
    """The directory that objects and certificates are below."""
    passphrase: SecretSource | None = None
    """Where the passphrase of the keys that are encrypted comes from."""
    aliases: tuple[str, ...] = ()
    """Names of a token that a client's pkcs11: URI may use for this provider."""


class FileProvider:
    """The key files below a directory. Implements `tokens.provider.KeyProvider`."""

    kind = "file"

    def __init__(self, name: str, settings: FileSettings) -> None:
        self.name = name
        self._settings = settings
        self._readers = Threads(f"{name}-read", _READERS)
        self._signers = Threads(f"{name}-sign", os.cpu_count() or 1)
        self._warned: set[str] = set()

    @property
    def uri_attributes(self) -> Mapping[str, frozenset[str]]:
        """`token` may be the provider's name or an alias."""
        return {"token": frozenset({self.name, *self._settings.aliases})}

    async def start(self) -> None:
        """Nothing to do: threads start when they are needed."""

    async def stop(self) -> None:
        """Finishes what runs and ends the threads."""
        await self._readers.stop()
        await self._signers.stop()

    async def check(self) -> None:
        """Raises ProviderUnavailable where the root is no directory that can be read."""
        await self._readers.run(self._check)

    def open(self, reference: KeyReference) -> AbstractAsyncContextManager[MemoryKey]:
        """The key at the path `reference.object` below the root; see `KeyProvider.open`."""
        return open_key(reference, self._read, self._settings.passphrase, self._signers)

    def _check(self) -> None:
        try:
            os.scandir(self._settings.root).close()
        except OSError as error:
            raise ProviderUnavailable(
                f"The key directory of provider {self.name} cannot be read: {error.strerror}.",
                "Check `root` in the provider's settings, and that the service's user may read it.",
            ) from None

    async def _read(self, path: str, private: bool) -> bytes:
        return await self._readers.run(self._read_file, path, private)

    def _read_file(self, path: str, private: bool) -> bytes:
        try:
            with _open_below(self._settings.root, path) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise KeyUnusable(f"{path} is not a regular file.", "Put the file itself there.")
                if private:
                    self._warn_of_readers(path, status.st_mode)
                data = file.read(KEY_FILE_MAX_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise KeyNotFound(
                f"Provider {self.name} has no file {path}.", "Put the key there, or correct `object` in the grant."
            ) from None
        except OSError as error:
            raise KeyUnusable(
                f"{path} of provider {self.name} cannot be read: {error.strerror}.",
                "Check that the service's user may read the file and enter its directory.",
            ) from None
        return check_size(path, data)

    def _warn_of_readers(self, path: str, mode: int) -> None:
        if mode & (stat.S_IRGRP | stat.S_IROTH) and path not in self._warned:
            self._warned.add(path)
            _log.warning("provider %s: others can read the key file %s; chmod 600 it", self.name, path)


def _open_below(root: Path, path: str) -> BinaryIO:
    # A symbolic link may stay below the root (Kubernetes mounts secrets so) and not lead out of it. Whoever can swap
    # a directory between this look and the opening can as well replace the key.
    below = os.path.realpath(root, strict=True)
    target = os.path.realpath(Path(below, path), strict=True)
    if os.path.commonpath([below, target]) != below:
        raise KeyUnusable(f"{path} is a symbolic link that leads out of the root.", "Put the file below the root.")
    # O_NONBLOCK: opening a FIFO must not wait for its writer
    descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
    return os.fdopen(descriptor, "rb", buffering=0)
