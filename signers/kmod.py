"""Linux kernel modules: signs a tree of them in a tar archive, or a single one.

The kernel verifies a CMS message behind each module, over the module's bytes, by a certificate that it was built with.
So the signature is the bare one of the file's digest; what makes it one of a module is that only ELF files are signed.
"""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from pydantic import Field

from signers import archives
from signers.archives import Archive, ArchiveLimits, Compression, Part, Pieces, Scratch
from signers.formats import cms, module, tar
from signers.signer import FileRange, Form, Job, Name, Role, Signed, Upload, read_through, unsound
from tokens.errors import ArtifactRejected, KeyUnsuited, KeyUnusable, SignatureMismatch
from tokens.provider import SigningKey
from tokens.schemes import Ecdsa, Hash, RsaPkcs1v15

BATCH_MODULES = 16
"""How many modules a thread hashes in one go; their signatures are asked for together."""

BATCHES_AT_ONCE = 3
"""How many batches are worked on at a time: while some wait for the key, the next is hashed."""

CURVES = (ec.SECP256R1, ec.SECP384R1)
"""What Linux verifies modules by, since 5.13."""

_SUFFIX = re.compile(rb"\.ko(\.(?:gz|xz|zst))?\Z")
_COMPRESSIONS = {None: None, b".gz": archives.GZIP, b".xz": archives.XZ, b".zst": archives.ZSTD}

T = TypeVar("T")
R = TypeVar("R")


class KmodForm(Form):
    """The fields of `/sign/modules`."""

    machine: Annotated[Name, Field(description="The machine whose key signs.")]
    artifact: Annotated[
        Upload, Field(description="A tar of modules (plain, .gz, .xz, .zst), or one module; answered in kind.")
    ]
    hashalg: Annotated[
        Literal["sha256", "sha384", "sha512", "sha3-256", "sha3-384", "sha3-512"],
        Field(description="The hash function; the kernel must have it, and SHA-3 since Linux 6.7."),
    ] = "sha512"


class Kmod:
    """Signs kernel modules. Implements `signers.signer.Signer`."""

    name = "kmod"
    path = "/sign/modules"
    summary = "Sign Linux kernel modules: a tree of them, or a single one."
    scope: Literal["machine", "distro"] = "machine"
    form = KmodForm
    roles = (
        Role(
            "key",
            "Signs modules; the kernel knows its certificate.",
            "kmodsign/kernel-signkey.priv",
            "kmodsign/kernel-signkey.x509",
        ),
    )

    async def sign(self, form: KmodForm, job: Job) -> Signed:
        """See `Signer.sign`."""
        scratch = Scratch(job.directory(), job.settings or ArchiveLimits())
        artifact, compression = await job.run(_read, form.artifact, scratch)
        async with job.keys.open("key", machine=form.machine) as key:
            signing = _Signing(key, Hash(form.hashalg), scratch)

            async def sign(modules: Sequence[_Module]) -> Sequence[_SignedModule]:
                prepared = await job.run(_each, signing.prepare, modules)
                async with asyncio.TaskGroup() as group:
                    signatures = [group.create_task(signing.sign(each)) for each in prepared]
                appended = [each.result() for each in signatures]
                return await job.run(_each, signing.finish, list(zip(prepared, appended, strict=True)))

            modules = await _in_batches(sign, artifact.modules)
        signed = await job.run(artifact.signed, modules)
        return signed if compression is None else await job.run(scratch.compressed, signed, compression)


@dataclass(frozen=True, slots=True)
class _Module:
    """A module as it came, by its name in the archive."""

    name: bytes
    file: FileRange
    compression: Compression | None = None


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A module without compression and without the signature that it came with; and the digest to sign."""

    module: _Module
    content: FileRange
    digest: bytes


@dataclass(frozen=True, slots=True)
class _SignedModule:
    """A module with its signature, verified, and compressed as it came."""

    name: bytes
    parts: tuple[Part, ...]


class _Signing:
    """How modules are signed with one key.

    Raises KeyUnsuited or KeyUnusable where the kernel could verify no signature of it.
    """

    def __init__(self, key: SigningKey, hash_: Hash, scratch: Scratch) -> None:
        if not key.certificates:
            raise KeyUnusable(
                "Signing modules needs the key's certificate, and there is none.",
                "Name the certificate that the kernel was built with as the grant's `certificate`.",
            )
        self._key = key
        self._hash = hash_
        self._scratch = scratch
        # as sign-file writes it: no attributes, no certificates (scripts/sign-file.c)
        self._message = cms.Message(key.certificates[0], _scheme(key, hash_))

    def prepare(self, module_: _Module) -> _Prepared:
        """Raises ArtifactRejected where it is no module."""
        content = module_.file
        if module_.compression is not None:
            content = self._scratch.unpack(content, module_.compression).whole
        try:
            size = module.unsigned_size(content.read, content.length)
            content = FileRange(content.file, content.offset, size)
            module.check_elf(content.read(0, min(size, module.HEAD_BYTES)))
        except module.ModuleError as error:
            raise ArtifactRejected(
                f"{archives.shown(module_.name)} cannot be signed: {error}.",
                "Send modules as the kernel's build makes them, each named after what it is: .ko, .ko.xz and so on.",
            ) from None
        digest = hashlib.new(self._hash.hashlib_name)
        for chunk in read_through((content,), archives.CHUNK_BYTES):
            digest.update(chunk)
        return _Prepared(module_, content, digest.digest())

    async def sign(self, prepared: _Prepared) -> bytes:
        """What is put behind the module: read again and verified. Raises what `SigningKey.sign` raises."""
        signature = await self._key.sign(self._message.scheme, self._message.to_sign(prepared.digest))
        appended = module.appended(self._message.assemble(prepared.digest, signature))
        # here and not in a thread: that would keep Python's lock from the event loop, and so the token from its work
        cms.verify(module.message(appended), self._message, prepared.digest)
        return appended

    def finish(self, each: tuple[_Prepared, bytes]) -> _SignedModule:
        """Puts a signature behind its module, and compresses it as it came. Raises SignatureMismatch."""
        prepared, appended = each
        signed = Signed((prepared.content, appended), "")
        if prepared.module.compression is not None:
            signed = self._scratch.compressed(signed, prepared.module.compression)
            self._scratch.remove(prepared.content.file)
        return _SignedModule(prepared.module.name, signed.parts)


def _scheme(key: SigningKey, hash_: Hash) -> RsaPkcs1v15 | Ecdsa:
    match key.public_key:
        case rsa.RSAPublicKey():
            return RsaPkcs1v15(hash_)
        case ec.EllipticCurvePublicKey(curve=curve) if isinstance(curve, CURVES):
            return Ecdsa(hash_)
    raise KeyUnsuited(
        "The kernel verifies modules by RSA, P-256 and P-384 keys, and this is another.", "Grant such a key."
    )


@dataclass(frozen=True, slots=True)
class _Tree:
    """A tar archive with modules in it."""

    archive: Archive
    modules: tuple[_Module, ...]
    filename: str

    def signed(self, modules: Sequence[_SignedModule]) -> Signed:
        """The archive with signed modules in place of those that came.

        It is parsed anew: its members are those that came, and the modules the very bytes that were hashed with the
        signatures that were verified.

        Raises SignatureMismatch.
        """
        parts = {each.name: each.parts for each in modules}
        signed = self.archive.replaced(parts, self.filename)
        pieces = Pieces(signed.parts)
        try:
            found = list(tar.members(pieces.read_at, pieces.size))
        except tar.TarError as error:
            raise unsound(error) from None
        if [(each.name, each.kind, each.link) for each in found] != [
            (each.name, each.kind, each.link) for each in self.archive.members
        ]:
            raise unsound("its members are not those of the upload")
        for member, came in zip(found, self.archive.members, strict=True):
            expected = parts.get(member.name, (self.archive.content(came),) if came.size else ())
            if pieces.cut(member.data_offset, member.size) != expected:
                raise unsound(f"{archives.shown(member.name)} is not what it should be")
        return signed


@dataclass(frozen=True, slots=True)
class _Single:
    """One module."""

    module: _Module
    filename: str

    @property
    def modules(self) -> tuple[_Module, ...]:
        return (self.module,)

    def signed(self, modules: Sequence[_SignedModule]) -> Signed:
        """The one that was verified."""
        return Signed(modules[0].parts, self.filename)


def _read(upload: Upload, scratch: Scratch) -> tuple[_Tree | _Single, Compression | None]:
    """What is to be signed, and how it was compressed. Raises ArtifactRejected."""
    filename = upload.basename
    upload, compression = scratch.plain(upload)
    if not tar.is_tar(upload.read(0, tar.BLOCK_BYTES)):
        single = _Module(filename.encode(errors="replace"), upload.whole)
        return _Single(single, filename), compression
    archive = archives.read(upload, scratch.limits)
    modules = tuple(_modules(archive))
    if not modules:
        raise ArtifactRejected(
            "The archive holds no kernel module.",
            "Send the tree that `make modules_install` makes: .ko files, or .ko.xz.",
        )
    return _Tree(archive, modules, filename), compression


def _modules(archive: Archive) -> Iterator[_Module]:
    for member in archive.members:
        suffix = _SUFFIX.search(member.name)
        if member.kind == tar.REGULAR and suffix:
            yield _Module(member.name, archive.content(member), _COMPRESSIONS[suffix[1]])
        elif member.kind == tar.HARD_LINK and _suffix(member.name) != _suffix(member.link):
            # whether it is signed would depend on which of its names one looks at
            raise archives.rejected(f"the hard link {archives.shown(member.name)} has another suffix than its file")


def _suffix(name: bytes) -> bytes:
    found = _SUFFIX.search(name)
    return found[0] if found else b""


def _each(function: Callable[[T], R], values: Iterable[T]) -> list[R]:
    return [function(each) for each in values]


async def _in_batches(work: Callable[[Sequence[T]], Awaitable[Sequence[R]]], values: Sequence[T]) -> list[R]:
    """What the work gives for all values, in their order; a bounded number of them is worked on at a time."""
    starts = iter(range(0, len(values), BATCH_MODULES))
    results: dict[int, Sequence[R]] = {}

    async def take() -> None:
        for start in starts:
            results[start] = await work(values[start : start + BATCH_MODULES])

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(BATCHES_AT_ONCE):
                group.create_task(take())
    except ExceptionGroup as failed:
        # whatever else went wrong at the same time, this is what locks the key
        mismatch, _ = failed.split(SignatureMismatch)
        error: Exception = mismatch or failed
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    return [each for start in sorted(results) for each in results[start]]
