"""Artifacts that stay where they are: a client names one by `file://` or `s3://`, and the signed one replaces it.

    stored = await fetch("file:///srv/artifacts/release.mender", settings, job)
    await stored.replace(sign(stored.upload))

Only what the settings open to clients is read or replaced. On the way to a file no symbolic link is followed, below the
directory that the settings name: each component is opened within the one before, so nothing that is renamed or linked
meanwhile leads elsewhere. The signed file is written beside the old one, and takes its name in one step.
"""

import contextlib
import io
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol
from urllib.parse import unquote_to_bytes

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from signers.signer import Job, Signed, Upload
from tokens.errors import ArtifactChanged, ArtifactNotFound, ArtifactRejected, LocationNotAllowed, StoreFailed
from tokens.s3 import BucketSettings, StoredObject, fetch_object, replace_object

CHUNK_BYTES = 1024 * 1024
"""How much of a file is in memory while it is written."""

PATTERN = r"\A(file://(localhost)?/[^?#\x00]+|s3://[^/\x00]+/[^\x00]+)\z"
"""What such a URI looks like. Of a file it is percent-decoded (RFC 8089), of an object taken as it is."""


def _absolute(path: Path) -> Path:
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError("it should be an absolute path without ..")
    return path


class StoreSettings(BaseModel):
    """Where artifacts may lie."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    directories: tuple[Annotated[Path, AfterValidator(_absolute)], ...] = ()
    """The directories below which a `file://` URI may name a file."""
    buckets: tuple[BucketSettings, ...] = ()
    """The buckets in which an `s3://` URI may name an object."""
    artifact_max_bytes: Annotated[int, Field(gt=0)] = 8 * 1024**3
    """The largest artifact that a URI may name."""


class Stored(Protocol):
    """An artifact in its store."""

    @property
    def upload(self) -> Upload:
        """What is there."""

    async def replace(self, signed: Signed) -> None:
        """Puts the signed artifact in its place, where that is still the one that was fetched.

        Raises ArtifactChanged, ArtifactNotFound, StoreFailed.
        """


async def fetch(uri: str, settings: StoreSettings, job: Job) -> Stored:
    """The artifact that a URI (see PATTERN) names.

    Raises LocationNotAllowed, ArtifactNotFound, ArtifactRejected, StoreFailed.
    """
    scheme, _, place = uri.partition("://")
    if scheme == "file":
        return await job.run(_open, unquote_to_bytes(place.partition("/")[2]), settings, job)
    return await _fetch_object(place, settings, job)


class _Descriptor:
    """Closed when nobody refers to it any more: the threads of a job that is cancelled go on for a while."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


@dataclass(frozen=True, slots=True)
class _OpenFile(Upload):
    """A file that is open, and read by whatever name it has by now."""

    descriptor: _Descriptor


@dataclass(frozen=True, slots=True)
class _StoredFile:
    """A file, and the directory that it is in. Implements `Stored`."""

    directory: _Descriptor
    name: bytes
    upload: _OpenFile
    status: os.stat_result
    job: Job = field(repr=False)

    async def replace(self, signed: Signed) -> None:
        await self.job.run(self._replace, signed)

    def _replace(self, signed: Signed) -> None:
        directory, temporary = self.directory.number, f".{secrets.token_hex(8)}.hsmsign".encode()
        with _failures("The signed artifact could not be written"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o600, dir_fd=directory)
            try:
                with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor is no path
                    self._write(signed, file)
                self._check_unchanged()
                os.rename(temporary, self.name, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=directory)
                raise
            _sync(directory)

    def _write(self, signed: Signed, file: io.BufferedWriter) -> None:
        try:
            for chunk in signed.chunks(CHUNK_BYTES):
                file.write(chunk)
        except EOFError:
            raise _changed() from None
        file.flush()
        with contextlib.suppress(PermissionError):  # only root gives files away
            os.fchown(file.fileno(), self.status.st_uid, self.status.st_gid)
        os.fchmod(file.fileno(), stat.S_IMODE(self.status.st_mode) & 0o777)
        os.fsync(file.fileno())

    def _check_unchanged(self) -> None:
        now = os.stat(self.name, dir_fd=self.directory.number, follow_symlinks=False)
        if _identity(now) != _identity(self.status):
            raise _changed()


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What changes with a file's content, or when another takes its name."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _changed() -> ArtifactChanged:
    return ArtifactChanged("Another file took the artifact's place while it was signed.", "Try again.")


def _sync(directory: int) -> None:
    """The new name survives a power failure; a directory that may not be read cannot be told so."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _open(path: bytes, settings: StoreSettings, job: Job) -> _StoredFile:
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    roots = [root for root in map(_parts, settings.directories) if parts[: len(root)] == root and parts != root]
    if not roots or b".." in parts or b"\0" in path:
        raise LocationNotAllowed(
            "The artifact's file is below no directory that is open to clients.",
            "Name one in `directories` of [signers.mender], or send the artifact as a file.",
        )
    # the innermost: the way to it may have links, since the settings name it
    root = max(roots, key=len)
    *way, name = parts[len(root) :]
    with _failures("The artifact could not be opened"):
        directory = _Descriptor(os.open(b"/" + b"/".join(root), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        for part in way:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            directory = _Descriptor(os.open(part, flags, dir_fd=directory.number))
        # by O_PATH: to open a device or FIFO in earnest may have effects, or last
        file = _Descriptor(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.number))
        status = os.fstat(file.number)
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactNotFound("The artifact's URI names no regular file.", "Links are not followed.")
        # the same file again, for reading: no path is walked (proc_pid_fd(5))
        content = Path(f"/proc/self/fd/{file.number}")
        os.close(os.open(content, os.O_RDONLY | os.O_CLOEXEC))
    if status.st_size > settings.artifact_max_bytes:
        raise ArtifactRejected(
            f"The artifact has {status.st_size} bytes; {settings.artifact_max_bytes} are allowed.",
            "Raise `artifact_max_bytes` of [signers.mender].",
        )
    return _StoredFile(directory, name, _OpenFile(content, os.fsdecode(name), status.st_size, file), status, job)


def _parts(directory: Path) -> list[bytes]:
    return [os.fsencode(part) for part in directory.parts[1:]]


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """Turns what the operating system says into StoreProblem."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactNotFound(
            "There is no such file, or a symbolic link is on the way to it.", "Links are not followed."
        ) from None
    except OSError as error:
        raise StoreFailed(
            f"{what}: {error.strerror}.", "The service must be able to read the file and to write its directory."
        ) from None


@dataclass(frozen=True, slots=True)
class _StoredObject:
    """An object, and a copy of it. Implements `Stored`."""

    object: StoredObject
    upload: Upload

    async def replace(self, signed: Signed) -> None:
        await replace_object(self.object, io.BufferedReader(_Content(signed), CHUNK_BYTES))


class _Content(io.RawIOBase):
    """A signed artifact as the file that boto3 wants."""

    def __init__(self, signed: Signed) -> None:
        self._signed = signed
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._signed.size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._signed.read(self._at, len(buffer))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


async def _fetch_object(place: str, settings: StoreSettings, job: Job) -> _StoredObject:
    bucket, _, key = place.partition("/")
    # some servers, and HTTP clients on the way, would walk such a path
    walks = any(part in ("", ".", "..") for part in key.split("/"))
    found = [each for each in settings.buckets if each.bucket == bucket and key.startswith(_prefix(each))]
    if not found or walks:
        raise LocationNotAllowed(
            "The artifact's object is in no bucket that is open to clients.",
            "Name its bucket in `buckets` of [signers.mender], or send the artifact as a file.",
        )
    innermost = max(found, key=lambda each: len(_prefix(each)))
    path = job.directory() / "artifact"
    fetched = await fetch_object(innermost, key, path, settings.artifact_max_bytes)
    return _StoredObject(fetched, Upload(path, key.rpartition("/")[2], fetched.size))


def _prefix(bucket: BucketSettings) -> str:
    prefix = bucket.prefix.strip("/")
    return f"{prefix}/" if prefix else ""
