"""Keys in files below a directory: read when a job opens them, gone after it.

[providers.keys]
kind = "file"
root = "/etc/hsmsign/keys"
"""

import errno
import logging
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from tokens.errors import KeyNotFound, KeyUnusable, ProviderUnavailable
from tokens.keyfile import KEY_FILE_MAX_BYTES, MemoryKey, check_size, open_key, read_file
from tokens.provider import KeyReference
from tokens.secret import SecretSource
from tokens.symmetric import SymmetricAlgorithm
from tokens.symmetric_file import MemorySymmetricKey, open_symmetric_key
from tokens.threads import Threads

_log = logging.getLogger("tokens.file")

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)

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

    def open_symmetric(
        self, reference: KeyReference, wanted: Collection[SymmetricAlgorithm]
    ) -> AbstractAsyncContextManager[MemorySymmetricKey]:
        """The key in the file at the path `reference.object` below the root; see `KeyProvider.open_symmetric`."""
        return open_symmetric_key(reference, wanted, self._read, self._signers)

    async def read(self, reference: KeyReference) -> bytes:
        """The file at the path `reference.object` below the root; see `KeyFiles.read`."""
        return await read_file(reference, self._read)

    def _check(self) -> None:
        with self._root_trouble():
            os.scandir(self._settings.root).close()

    @contextmanager
    def _root_trouble(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ProviderUnavailable(
                f"The key directory of provider {self.name} cannot be read: {error.strerror}.",
                "Check `root` in the provider's settings, and that the service's user may read it.",
            ) from None

    async def _read(self, path: str, private: bool) -> bytes:
        return await self._readers.run(self._read_file, path, private)

    def _read_file(self, path: str, private: bool) -> bytes:
        what = "key file" if private else "certificate file"
        with self._root_trouble():
            root = os.path.realpath(self._settings.root, strict=True)
        try:
            descriptor = _open_below(root, path)
            try:
                mode = os.fstat(descriptor).st_mode
                if not stat.S_ISREG(mode):
                    raise KeyUnusable(f"The {what} is not a regular file.", "Put the file itself there.")
                if private:
                    self._warn_of_readers(path, mode)
                data = os.read(descriptor, KEY_FILE_MAX_BYTES + 1)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in _NOT_THERE:
                raise KeyNotFound(
                    f"Provider {self.name} has no such {what}.",
                    "Put the file below the root, or correct `object` or `certificate` in the grant.",
                ) from None
            raise KeyUnusable(
                f"The {what} cannot be read from provider {self.name}: {error.strerror}.",
                "Check that the service's user may read the file and enter its directory.",
            ) from None
        return check_size(data)

    def _warn_of_readers(self, path: str, mode: int) -> None:
        if mode & (stat.S_IRGRP | stat.S_IROTH) and path not in self._warned:
            self._warned.add(path)
            _log.warning("provider %s: others can read the key file %s; chmod 600 it", self.name, path)


def _open_below(root: str, path: str) -> int:
    # A symbolic link may stay below the root (Kubernetes mounts secrets so) and not lead out of it. Whoever can swap
    # a directory between this look and the opening can as well replace the key.
    target = os.path.realpath(Path(root, path), strict=True)
    if os.path.commonpath([root, target]) != root:
        raise KeyUnusable("The path leads out of the root by a symbolic link.", "Put the file itself below the root.")
    # O_NONBLOCK: opening a FIFO must not wait for its writer
    return os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
