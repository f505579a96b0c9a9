"""What a signer is: its form, the roles of the keys it needs, and how it signs.

A signer is one module and one line in `signers/registry.py`. It knows keys by the Protocols of
`tokens.provider` only, and HTTP not at all: it gets a validated form and a `Job`, and returns the
parts of the signed artifact.
"""

import logging
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, ParamSpec, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from signers.sandbox import Sandbox, ToolSettings
from tokens.errors import SignatureMismatch, ToolUnavailable
from tokens.provider import PublicKey, SigningKey, SymmetricKey
from tokens.schemes import Scheme
from tokens.symmetric import SymmetricAlgorithm

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)

Name = Annotated[str, Field(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._+-]{0,127}\z")]
"""The name of a machine or distro: it may become part of a path, so it holds no `/` and does not begin with a dot."""

Backend = Literal["ssl", "pkcs11"]
"""The contract's `backend`: a preference between a key in a store (`ssl`) and one on a token (`pkcs11`)."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that came with the request.

    Arguments:
        content: where it is: on disk, for the length of the job, or in memory where it is small: a file costs more
            than the signature of a small artifact.
        filename: as the client calls it; never a path to use.
        size: in bytes.
    """

    content: Path | bytes
    filename: str
    size: int

    @property
    def basename(self) -> str:
        """The filename without the directories that some clients send."""
        return re.split(r"[/\\]", self.filename)[-1]

    @property
    def whole(self) -> "FileRange":
        """All of it."""
        return FileRange(self, 0, self.size)

    def open(self) -> BinaryIO:
        """The file, for reading."""
        return BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on, fewer only at the end."""
        with self.open() as file:
            file.seek(offset)
            return file.read(length)

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        # an instance only: a text part must never become a path of the server
        return core_schema.is_instance_schema(cls)

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "format": "binary"}


class Form(BaseModel):
    """The fields of a signer's request: validation, OpenAPI and the CLI's options all come from it."""

    model_config = ConfigDict(extra="ignore", frozen=True)


@dataclass(frozen=True, slots=True)
class Role:
    """One key, or one file of a key set, that a signer needs: a signing key, where nothing else is said.

    Arguments:
        name: what a grant's `role` says.
        about: one sentence for the documentation.
        key_file: where digsigserver's layout keeps it, below the directory of the machine or distro; None: nowhere.
        certificate_file: likewise, where the role needs a certificate.
        algorithms: it is a symmetric key, for one of these: AES where a file has its length, else HMAC.
        is_file: it is not a key but a file that belongs to the key set; only a key store can hold it.
        allows: what a grant's `allow` may name.
        aliases: what digsigserver's clients call the key in `key_file`.
    """

    name: str
    about: str
    key_file: str | None = None
    certificate_file: str | None = None
    algorithms: frozenset[SymmetricAlgorithm] = frozenset()
    is_file: bool = False
    allows: frozenset[str] = frozenset()
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GrantedFile:
    """A file of a key set, and what its grant says of it.

    Arguments:
        content: its bytes; it may hold private keys.
        allow: what the grant allows beyond the usual; the signer's page has the names.
        srk_hash: the hash of the SRK table that the fuses hold, where the grant pins it.
    """

    content: bytes = field(repr=False)
    allow: frozenset[str] = frozenset()
    srk_hash: bytes | None = None


@dataclass(frozen=True, slots=True)
class FileRange:
    """`length` bytes of an upload from `offset` on: a part of the answer that need not be copied."""

    file: Upload
    offset: int
    length: int

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` within the range on; both must lie in it."""
        return self.file.read(self.offset + offset, length)


def size_of(part: bytes | FileRange) -> int:
    """Length in bytes."""
    return len(part) if isinstance(part, bytes) else part.length


def read_through(parts: Iterable[bytes | FileRange], size: int) -> Iterator[bytes]:
    """The bytes of the parts, `size` at a time: the last chunk alone is shorter."""
    held = bytearray()
    for piece in _pieces(parts, size):
        if not held and len(piece) == size:
            yield piece
            continue
        held += piece  # thousands of small parts are not sent one by one
        if len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)


def _pieces(parts: Iterable[bytes | FileRange], size: int) -> Iterator[bytes]:
    for part in parts:
        if isinstance(part, bytes):
            yield from (part[at : at + size] for at in range(0, len(part), size))
            continue
        with part.file.open() as file:
            file.seek(part.offset)
            left = part.length
            while left:
                piece = file.read(min(size, left))
                if not piece:
                    raise EOFError(f"the upload is {left} bytes shorter than it was")
                left -= len(piece)
                yield piece


@dataclass(frozen=True, slots=True)
class Signed:
    """The answer: its parts in order, and the name and media type it is sent by."""

    parts: tuple[bytes | FileRange, ...]
    filename: str
    media_type: str = "application/octet-stream"

    @property
    def size(self) -> int:
        """Length in bytes."""
        return sum(map(size_of, self.parts))

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes of the answer from `offset` on, fewer only at its end."""
        found = []
        for part in self.parts:
            size = size_of(part)
            wanted = min(length, size - offset)
            if wanted > 0:
                piece = part[offset : offset + wanted] if isinstance(part, bytes) else part.read(offset, wanted)
                found.append(piece)
                length -= wanted
            offset = max(0, offset - size)
        return b"".join(found)

    def chunks(self, size: int) -> Iterator[bytes]:
        """The bytes of the answer: see `read_through`."""
        return read_through(self.parts, size)


def unsound(fault: object, what: str = "artifact") -> SignatureMismatch:
    """The error for a finished artifact that has this fault: it must not leave."""
    return SignatureMismatch(
        f"The finished {what} is not sound: {fault}.", "Report this with the request id: it was not released."
    )


class Keys(Protocol):
    """The keys that the grants give to one signer."""

    def open(
        self,
        role: str,
        *,
        machine: str | None = None,
        distro: str | None = None,
        backend: Backend | None = None,
        key_uri: str | None = None,
    ) -> AbstractAsyncContextManager[SigningKey]:
        """The one granted key for this role and machine or distro.

        `backend` is a preference, used where more than one grant matches. A `key_uri` (RFC 7512) must match the
        granted object in every attribute.

        Raises KeyNotGranted, KeyAmbiguous, and what `KeyProvider.open` raises.
        """

    def open_symmetric(
        self, role: str, *, machine: str | None = None, distro: str | None = None
    ) -> AbstractAsyncContextManager[SymmetricKey]:
        """The one granted symmetric key for this role (`Role.algorithms`) and machine or distro. Raises as `open`."""

    async def read(self, role: str, *, machine: str | None = None, distro: str | None = None) -> GrantedFile:
        """The one granted file for this role (`Role.is_file`) and machine or distro. Raises as `open` does."""

    async def claim(
        self, role: str, public_key: PublicKey, *, machine: str | None = None, distro: str | None = None
    ) -> None:
        """Says that the signer uses a key out of that file. Raises KeyMismatch where another signer has it too."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a signer gets besides its form.

    Arguments:
        directory: makes, once, an empty directory that is private to this job and deleted after it.
        keys: the keys granted to this signer.
        executor: see `run`.
        tools: where a vendor's tool runs.
        settings: the signer's own, `[signers.NAME]`, where it has any.
    """

    directory: Callable[[], Path]
    keys: Keys
    executor: Callable[..., Awaitable[Any]]
    tools: Sandbox = field(default_factory=lambda: Sandbox(ToolSettings()))
    settings: Any = None

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs bulk work (hashing, parsing an artifact) in the hashing threads."""
        result: T = await self.executor(function, *args, **kwargs)
        return result

    def lent(self, label: str, scheme: Scheme) -> None:
        """Logs a signature that a tool had made with a key on loan."""
        _log.info("a tool signed with the lent key %s: %s", label, scheme)


class Signer(Protocol):
    """Signs one kind of artifact."""

    @property
    def name(self) -> str:
        """What grants and the CLI call it."""

    @property
    def path(self) -> str:
        """The endpoint, `/sign/...`."""

    @property
    def summary(self) -> str:
        """One sentence for OpenAPI and the CLI."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """The keys it needs."""

    @property
    def scope(self) -> Literal["machine", "distro"]:
        """Which form field the grants match."""

    @property
    def form(self) -> type[Form]:
        """The fields of its request."""

    async def sign(self, form: Any, job: Job) -> Signed:
        """Signs. Raises `tokens.errors.Error`; ArtifactRejected where the artifact is at fault."""


@runtime_checkable
class UsesTools(Protocol):
    """A signer that runs programs which are installed apart."""

    @property
    def tools_setting(self) -> str:
        """The setting that says where they are."""

    def look(self, settings: Any, roles: Collection[str]) -> Iterator[str | ToolUnavailable]:
        """What is installed, in words; and as errors what is not, of that which the granted roles need."""


class Named(Protocol):
    """A signer, or a role."""

    @property
    def name(self) -> str:
        """What settings call it."""


N = TypeVar("N", bound=Named)


def by_name(named: Iterable[N]) -> Mapping[str, N]:
    """Signers, or the roles of one, by their names."""
    return {each.name: each for each in named}
