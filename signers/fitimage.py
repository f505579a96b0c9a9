"""U-Boot FIT images: signs their configurations and images, and puts the keys into U-Boot's own device tree.

What is signed and where it stands is in `formats/fit.py`; the result is what `mkimage -F` makes of the same. Data stays
in the upload, where it is hashed in pieces: only the tree that describes it is in memory.
"""

import asyncio
import hashlib
import re
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Annotated, Any, Literal, cast
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from pydantic import BeforeValidator, Field

from signers import archives
from signers.archives import ArchiveLimits, Part, Pieces, Scratch
from signers.formats import fdt, fit, tar
from signers.formats.fdt import FdtError, Span, Value
from signers.formats.fit import Algorithm, Fit, FitError, Signature, Stamp
from signers.formats.reading import ReadAt
from signers.signer import Backend, Form, Job, Name, Role, Signed, Upload, read_through, size_of, unsound
from tokens.errors import ArtifactRejected, KeyNotFound, KeyNotGranted, KeyUnsuited, SignatureMismatch
from tokens.provider import SigningKey
from tokens.verify import verify

SIGNATURES_AT_ONCE = 32
"""How many signatures are asked for at a time."""

GAP_MAX_BYTES = 16 * 1024 * 1024
"""The most zeros between a tree and the data behind it."""

DTB_MAX_BYTES = 16 * 1024 * 1024
"""The largest device tree that keys are put into."""

BLOCK_BYTES = 512
"""Data that begins at a multiple of this size (`mkimage -B 200`) does so still when the tree before it has grown."""

FIT_NAME, DTB_NAME = "fitImage", "u-boot.dtb"

_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,90}")
_URI = "pkcs11:"
_HEX = re.compile(r"(?:0[xX])?([0-9a-fA-F]{1,8})")


def _offset(text: Any) -> Any:
    """mkimage's option -p is in hex, with or without 0x."""
    if not isinstance(text, str):
        return text
    found = _HEX.fullmatch(text)
    if not found:
        raise ValueError("it is no number in hex, as 2000")
    return int(found[1], 16)


Offset = Annotated[int, BeforeValidator(_offset, json_schema_input_type=str), Field(ge=0, le=GAP_MAX_BYTES)]


class FitimageForm(Form):
    """The fields of `/sign/fitimage`."""

    artifact: Annotated[Upload, Field(description="The FIT; answered with the signed one.")]
    machine: Annotated[Name, Field(description="The machine whose keys sign.")] = "imx"
    keyname: Annotated[
        str | None,
        Field(
            max_length=1024,
            description="The key-name-hint whose signatures are made, or the key's RFC 7512 URI, which makes all; each"
            " signature by the key that it asks for if left out.",
        ),
    ] = None
    backend: Annotated[Backend | None, Field(description="Prefer a key from a store (ssl) or on a token (pkcs11).")] = (
        None
    )
    dtb: Annotated[
        Upload | None,
        Field(description="U-Boot's own device tree, to put the keys into; answered with a tar.gz of both."),
    ] = None
    external_data_offset: Annotated[
        Offset | None, Field(description="Where all data is to stand in the file, in hex as mkimage's -p.")
    ] = None
    mark_required: Annotated[
        str | None, Field(description="Any value: mark the keys in the dtb as required.", max_length=64)
    ] = None
    algo: Annotated[
        str | None,
        Field(
            pattern=r"\Asha(256|384|512),(rsa(2048|3072|4096)|ecdsa(256|384))\z",
            description="The algo of all signatures, as sha256,rsa2048, instead of the FIT's own.",
        ),
    ] = None
    comment: Annotated[
        str | None, Field(pattern=r"\A[^\x00-\x1f\x7f]{1,256}\z", description="A comment beside each signature.")
    ] = None
    timestamp: Annotated[
        int | None,
        Field(ge=0, lt=2**32, description="The time of signing, as SOURCE_DATE_EPOCH has it; now if it is left out."),
    ] = None


class Fitimage:
    """Signs FITs. Implements `signers.signer.Signer`."""

    name = "fitimage"
    path = "/sign/fitimage"
    summary = "Sign a U-Boot FIT image, and put the keys into U-Boot's device tree."
    scope: Literal["machine", "distro"] = "machine"
    form = FitimageForm
    roles = (
        Role(
            "key",
            "Signs FITs; the grant's aliases are the key names (key-name-hint) that ask for it.",
            "fitimagesign/dev.key",
            aliases=("dev",),
        ),
    )

    async def sign(self, form: FitimageForm, job: Job) -> Signed:
        """See `Signer.sign`."""
        return await sign(form, job, _opened, UBoot())


@dataclass(frozen=True, slots=True)
class UBoot:
    """What is special in the U-Boot that verifies a FIT.

    Arguments:
        algorithms: those that it knows; None: all that are made here.
        longest_salt: it takes only PSS signatures with the longest salt there is room for.
        add_key: writes a key into its device tree.
    """

    algorithms: frozenset[str] | None = None
    longest_salt: bool = False
    add_key: Callable[[fdt.Tree, str, fit.PublicKey, Algorithm, str | None], None] = fit.add_key


KeyOf = Callable[[str, FitimageForm, Job, AsyncExitStack], Awaitable[SigningKey]]
"""Opens the key of a name, for as long as the stack lasts."""


async def sign(form: FitimageForm, job: Job, key_of: KeyOf, uboot: UBoot) -> Signed:
    """The signed FIT; in an archive with the dtb, where that came. Raises as `Signer.sign` does."""
    artifact = await job.run(_read, form.artifact)
    dtb = None if form.dtb is None else await job.run(_read_dtb, form.dtb)
    names = _key_names(form, artifact.fit, dtb)
    async with AsyncExitStack() as stack:
        opened = {name: await key_of(name, form, job, stack) for name in sorted(set(names.values()))}
        asked = [_Asked(signature, name, opened[name], form.algo, uboot) for signature, name in names.items()]
        stamp = Stamp(
            signer="hsmsign",
            version=version("hsmsign"),
            timestamp=int(time.time()) if form.timestamp is None else form.timestamp,
            comment=form.comment,
        )
        digests = await job.run(_stamp, artifact, asked, stamp)
        await _sign(artifact, asked, digests)
    return await job.run(_finish, artifact, asked, dtb, form, job)


class _File:
    """A FIT, as it came or as it is about to leave. Raises FdtError or FitError."""

    def __init__(self, parts: tuple[Part, ...], *, slack: int = 1) -> None:
        self.pieces = Pieces(parts)
        self.fit = Fit(fdt.parse(self.pieces.read_at, self.pieces.size, slack=slack))
        self.fit.check_data(self.pieces.size)
        self._known: dict[fdt.Node, dict[str, bytes]] = {}

    def parts(self, values: Iterable[Value]) -> tuple[Part, ...]:
        """The values, with parts of the file for Spans."""
        return tuple(
            part
            for value in values
            for part in (self.pieces.cut(value.offset, value.length) if isinstance(value, Span) else (value,))
        )

    def _digests(self, values: Iterable[Value], algorithms: Iterable[str]) -> dict[str, bytes]:
        """The digests of the values, one after the other."""
        hashes = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms if name != "crc32"}
        crc = 0
        for chunk in read_through(self.parts(values), archives.CHUNK_BYTES):
            for each in hashes.values():
                each.update(chunk)
            crc = zlib.crc32(chunk, crc)
        return {"crc32": crc.to_bytes(4, "big")} | {name: each.digest() for name, each in hashes.items()}

    def hashes(self) -> Iterator[tuple[fdt.Node, bytes]]:
        """All hash nodes, with the values that their images have."""
        for image in self.fit.images:
            nodes = dict(self.fit.hashes(image))
            digests = self._image_digests(image, nodes.values())
            yield from ((node, digests[algorithm]) for node, algorithm in nodes.items())

    def digest(self, signature: Signature, algorithm: Algorithm) -> bytes:
        """The digest that is signed. Raises FitError."""
        name = algorithm.scheme.hash.value
        if signature.of_image:
            return self._image_digests(signature.owner, (name,))[name]
        return self._digests(self.fit.signed(signature), (name,))[name]

    def _image_digests(self, image: fdt.Node, algorithms: Iterable[str]) -> Mapping[str, bytes]:
        """Those of its data, each made once however many nodes ask for it."""
        known = self._known.setdefault(image, {})
        if missing := set(algorithms) - known.keys():
            known |= self._digests((self.fit.data(image),), missing)
        return known


@dataclass(frozen=True, slots=True)
class _Asked:
    """A signature that is to be made, and by which key. Raises ArtifactRejected, KeyUnsuited."""

    signature: Signature
    name: str
    key: SigningKey
    algo: str | None
    uboot: UBoot

    def __post_init__(self) -> None:
        try:
            _ = self.algorithm.scheme
        except FitError as error:
            raise _no_fit(f"{error}") from None
        if self.uboot.algorithms is not None and self.algorithm.name not in self.uboot.algorithms:
            known = ", ".join(sorted(self.uboot.algorithms))
            raise _no_fit(f"its algo {self.algorithm.name!r} is none that the device verifies, which are {known}")
        if not self.algorithm.suits(self.key.public_key):
            raise KeyUnsuited(
                f"The key {self.name} is not one for {self.algorithm.name}, which {self.signature.path} asks for.",
                "Correct the FIT's algo, send another one as `algo`, or grant a key of that kind.",
            )

    @property
    def algorithm(self) -> Algorithm:
        """That of the request, else the FIT's own."""
        if self.algo is None:
            found = self.signature.algorithm
        else:
            found = Algorithm(self.algo, fit.text(self.signature.node, "padding"))
        return replace(found, longest_salt=self.uboot.longest_salt)

    @property
    def public_key(self) -> fit.PublicKey:
        public_key = self.key.public_key
        assert isinstance(public_key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey)  # noqa: S101 - it suits
        return public_key


def _read(upload: Upload) -> _File:
    """The FIT, with fresh hashes of its images. Raises ArtifactRejected."""
    try:
        artifact = _File((upload.whole,))
        for node, value in artifact.hashes():
            artifact.fit.tree.set(node, "value", value)
    except (FdtError, FitError) as error:
        raise _no_fit(f"{error}") from None
    return artifact


def _read_dtb(upload: Upload) -> fdt.Tree:
    if upload.size > DTB_MAX_BYTES:
        raise _no_dtb(f"it has more than {DTB_MAX_BYTES} bytes")
    try:
        return fdt.parse(upload.read, upload.size)
    except FdtError as error:
        raise _no_dtb(f"{error}") from None


def _key_names(form: FitimageForm, image: Fit, dtb: fdt.Tree | None) -> dict[Signature, str]:
    """The signatures that are to be made, and the name of the key of each."""
    keyname = None if form.keyname is None else form.keyname.strip().removesuffix(".key")
    wanted = None if keyname is None or keyname.lower().startswith(_URI) else keyname
    held = [] if dtb is None else fit.key_names(dtb)
    usual = wanted or (held[0] if len(held) == 1 else "dev")
    try:
        hints = {signature: signature.key_name or usual for signature in image.signatures}
    except FitError as error:
        raise _no_fit(f"{error}") from None
    if not hints:
        raise _no_fit("it has no signature nodes")
    names = {signature: name for signature, name in hints.items() if wanted in (None, name)}
    if not names:
        found = ", ".join(sorted({ascii(name[:100]) for name in hints.values()})[:20])
        raise ArtifactRejected(
            f"No signature of the FIT asks for the key {wanted!a}; they ask for {found}.",
            "Send that as `keyname`, or none, or correct the FIT's key-name-hint.",
        )
    if bad := [name for name in names.values() if not _KEY_NAME.fullmatch(name)]:
        raise _no_fit(f"{bad[0][:100]!a} is no name for a key")
    return names


async def _opened(name: str, form: FitimageForm, job: Job, stack: AsyncExitStack) -> SigningKey:
    """The granted key of that name: an alias of its grant, or its object. Raises KeyNotFound where there is none."""
    by_uri = form.keyname is not None and form.keyname.lower().startswith(_URI)
    key_uri = form.keyname if by_uri else f"{_URI}object={quote(name, safe='')}"
    try:
        opened = job.keys.open("key", machine=form.machine, backend=form.backend, key_uri=key_uri)
        return await stack.enter_async_context(opened)
    except KeyNotGranted:
        if by_uri:
            raise
        raise KeyNotFound(
            f"No key that is granted for the machine {form.machine} is called {name}.",
            f'Add aliases = ["{name}"] to the grant of the key that is meant.',
        ) from None


def _stamp(artifact: _File, asked: Sequence[_Asked], stamp: Stamp) -> list[bytes]:
    """Writes all of the signatures but their values; the digests that are to be signed."""
    digests = []
    try:
        for each in asked:
            artifact.fit.stamp(each.signature, each.algorithm, stamp)
            digests.append(artifact.digest(each.signature, each.algorithm))
    except FitError as error:
        raise _no_fit(f"{error}") from None
    return digests


async def _sign(artifact: _File, asked: Sequence[_Asked], digests: Sequence[bytes]) -> None:
    """Puts the values of the signatures into the tree."""
    turns = asyncio.Semaphore(SIGNATURES_AT_ONCE)

    async def sign(each: _Asked, digest: bytes) -> None:
        async with turns:
            value = await each.key.sign(each.algorithm.scheme, digest)
        artifact.fit.tree.set(each.signature.node, "value", value)

    try:
        async with asyncio.TaskGroup() as group:
            for each, digest in zip(asked, digests, strict=True):
                group.create_task(sign(each, digest))
    except ExceptionGroup as failed:
        # whatever else went wrong at the same time, this is what locks the key
        mismatch, _ = failed.split(SignatureMismatch)
        raise (mismatch or failed).exceptions[0] from None


def _finish(artifact: _File, asked: Sequence[_Asked], dtb: fdt.Tree | None, form: FitimageForm, job: Job) -> Signed:
    """The answer, verified."""
    try:
        signed = _assembled(artifact, form.external_data_offset)
    except (FdtError, FitError) as error:
        raise _no_fit(f"{error}") from None
    _verify(signed, asked)
    if dtb is None or form.dtb is None:
        return Signed(signed, f"{FIT_NAME}.signed")
    tree = _with_keys(dtb, form.dtb, asked, required=bool(form.mark_required))
    return packed({FIT_NAME: signed, _dtb_name(form.dtb): (tree,)}, Scratch(job.directory(), ArchiveLimits()))


def packed(files: Mapping[str, tuple[Part, ...]], scratch: Scratch) -> Signed:
    """A tar.gz of the files. Raises SignatureMismatch where it does not unpack to the same."""
    return scratch.compressed(_archive(files), archives.GZIP)


def _assembled(artifact: _File, position: int | None) -> tuple[Part, ...]:
    """The tree, and behind it the data: where it was, counted as it was, or from `position` on."""
    image, size = artifact.fit, artifact.pieces.size
    if position:
        data = image.move_data(position)
        return artifact.parts((*_filled(image.tree, position, position), *data))
    relative = any(each.value("data-offset") is not None for each in image.images)
    fixed = [cast(Span, image.data(each)).offset for each in image.images if each.value("data-position") is not None]
    if fixed and relative:
        raise FitError("some of its data has a data-position, and some a data-offset: send external_data_offset")
    if fixed:
        tree = _filled(image.tree, image.tree.total_size, min(fixed))
        rest_at = sum(map(fdt.value_size, tree))
    else:
        rest_at = min(image.data_base if relative else image.tree.total_size, size)
        tree = image.tree.encode(align=BLOCK_BYTES if relative and rest_at % BLOCK_BYTES == 0 else 4)
    return artifact.parts((*tree, Span(rest_at, size - rest_at)))


def _filled(tree: fdt.Tree, size_min: int, size_max: int) -> list[Value]:
    """The tree as it is, and behind it zeros up to `size_min`."""
    encoded = tree.encode()
    size = sum(map(fdt.value_size, encoded))
    if size > size_max:
        raise FitError(
            f"with its signatures the tree has {size} bytes, and its data would stand at {size_max}: leave more room,"
            " or send another external_data_offset"
        )
    if size_min - size > GAP_MAX_BYTES:
        raise FitError(f"there are more than {GAP_MAX_BYTES} bytes between the tree and its data")
    return [*encoded, bytes(max(0, size_min - size))]


def _verify(signed: tuple[Part, ...], asked: Sequence[_Asked]) -> None:
    """Parses the finished FIT anew: its hashes are those of its images, and the signatures verify.

    Raises SignatureMismatch.
    """
    try:
        finished = _File(signed, slack=2)
        found = {each.path: each for each in finished.fit.signatures}
        for node, digest in finished.hashes():
            if node.value("value") != digest:
                raise unsound("a hash is not that of its image", "FIT")
        for each in asked:
            signature = found[each.signature.path]
            if replace(signature.algorithm, longest_salt=each.algorithm.longest_salt) != each.algorithm:
                raise unsound("a signature is by another algorithm", "FIT")
            value = signature.node.value("value")
            digest = finished.digest(signature, each.algorithm)
            verify(each.key.public_key, each.algorithm.scheme, digest, value if isinstance(value, bytes) else b"")
    except (FdtError, FitError, KeyError) as error:
        raise unsound(error, "FIT") from None


def _with_keys(tree: fdt.Tree, upload: Upload, asked: Sequence[_Asked], *, required: bool) -> bytes:
    """The dtb with the keys; it does not shrink. Raises SignatureMismatch where it does not hold them, parsed anew."""
    try:
        encoded = _keyed(tree, upload.read, asked, required=required)
        finished = Upload(encoded, upload.filename, len(encoded))
        if _keyed(fdt.parse(finished.read, finished.size), finished.read, asked, required=required) != encoded:
            raise unsound("the dtb does not hold its keys", "FIT")
    except FdtError as error:
        raise _no_dtb(f"{error}") from None
    return encoded


def _keyed(tree: fdt.Tree, read_at: ReadAt, asked: Sequence[_Asked], *, required: bool) -> bytes:
    """Writes the keys, those of images first, as mkimage does; what is there already stays as it is."""
    for each in asked:
        kind = "image" if each.signature.of_image else "conf"
        each.uboot.add_key(tree, each.name, each.public_key, each.algorithm, kind if required else None)
    encoded = tree.encode(size_min=tree.total_size)
    return b"".join(read_at(each.offset, each.length) if isinstance(each, Span) else each for each in encoded)


def _archive(files: Mapping[str, tuple[Part, ...]]) -> Signed:
    parts: list[Part] = []
    for name, content in files.items():
        size = sum(map(size_of, content))
        parts += (tar.header(name.encode(), size), *content, bytes(tar.padding(size)))
    parts.append(tar.trailer(sum(map(size_of, parts))))
    return Signed(tuple(parts), f"signed-{FIT_NAME}.tar.gz")


def _dtb_name(upload: Upload) -> str:
    """The upload's own base name, of harmless characters only."""
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", upload.basename)[:99].lstrip(".")
    return name if name and name != FIT_NAME else DTB_NAME


def _no_fit(fault: str) -> ArtifactRejected:
    return ArtifactRejected(
        f"The FIT cannot be signed: {fault}.",
        "Make it with mkimage, with hash nodes below its images and signature nodes below its configurations.",
    )


def _no_dtb(fault: str) -> ArtifactRejected:
    return ArtifactRejected(
        f"No key can be put into the dtb: {fault}.", "Send U-Boot's own device tree, such as u-boot.dtb."
    )
