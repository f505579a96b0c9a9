"""Mender: signs artifacts, as they are uploaded, or where they are.

A device verifies `manifest.sig` over the bytes of `manifest`, and by that each file of the artifact. So the content is
held against the manifest before anything is signed: a signature over a manifest that lies about it helps nobody.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from pydantic import Field, model_validator

from signers import archives
from signers.artifact_uri import PATTERN, StoreSettings, fetch
from signers.formats import mender, tar
from signers.signer import FileRange, Form, Job, Name, Role, Signed, Upload, read_through
from tokens.errors import ArtifactChanged, ArtifactRejected, KeyUnsuited, SignatureMismatch, SigningFailed
from tokens.provider import PublicKey, SigningKey
from tokens.schemes import Ecdsa, Hash, RsaPkcs1v15
from tokens.verify import verify

COMPRESSIONS = {b"": None, b".gz": archives.GZIP, b".xz": archives.XZ, b".zst": archives.ZSTD}


class MenderSettings(StoreSettings):
    """`[signers.mender]`."""

    unpacked_max_bytes: Annotated[int, Field(gt=0)] = 64 * 1024**3
    """The most that all payloads of an artifact may hold; they are hashed as they are unpacked, and not kept."""


class MenderForm(Form):
    """The fields of `/sign/mender`: exactly one of `artifact-uri` and `artifact`."""

    distro: Annotated[Name, Field(description="The distro whose key signs.")]
    artifact_uri: Annotated[
        str | None,
        Field(
            alias="artifact-uri",
            pattern=PATTERN,
            max_length=4096,
            description="file:// or s3://; the signed artifact replaces what is there, and the answer is a text.",
        ),
    ] = None
    artifact: Annotated[Upload | None, Field(description="An artifact; answered with the signed artifact.")] = None
    force: Annotated[bool, Field(description="Replace a signature that is there already.")] = False

    @model_validator(mode="after")
    def _one_artifact(self) -> Self:
        if (self.artifact_uri is None) == (self.artifact is None):
            raise ValueError("send one: an artifact, or the artifact-uri of one")
        return self


class Mender:
    """Signs for Mender. Implements `signers.signer.Signer`."""

    name = "mender"
    path = "/sign/mender"
    summary = "Sign a Mender artifact, uploaded or in place."
    scope: Literal["machine", "distro"] = "distro"
    form = MenderForm
    roles = (Role("key", "Signs artifacts.", "mender/private.key"),)

    async def sign(self, form: MenderForm, job: Job) -> Signed:
        """See `Signer.sign`."""
        settings = job.settings or MenderSettings()
        if form.artifact is not None:
            artifact = await job.run(_read, form.artifact, settings)
            return await _signed(artifact, form, job) or artifact.unchanged
        stored = await fetch(form.artifact_uri or "", settings, job)
        artifact = await job.run(_read, stored.upload, settings)
        signed = await _signed(artifact, form, job)
        if signed is None:
            return _told("This key has signed the artifact already; it stays as it is.")
        await stored.replace(signed)
        return _told("The artifact is signed.")


def _told(text: str) -> Signed:
    return Signed((f"{text}\n".encode(),), "answer.txt", "text/plain; charset=utf-8")


async def _signed(artifact: "_Artifact", form: MenderForm, job: Job) -> Signed | None:
    """The signed artifact; None where it bears a good signature of the key already: a request may be repeated."""
    async with job.keys.open("key", distro=form.distro) as key:
        scheme = _scheme(key.public_key)
        if artifact.signature is not None:
            if _is_good(artifact.signature, artifact.manifest, key):
                return None
            if not form.force:
                raise ArtifactRejected(
                    "The artifact is signed already, and not by this key.", "Send `force=1` to replace the signature."
                )
        signature = await key.sign(scheme, hashlib.sha256(artifact.manifest).digest())
        content = mender.encode_signature(signature)
        _verify(content, artifact.manifest, key)
    signed = artifact.with_signature(content)
    await job.run(artifact.check, signed, content)
    return signed


def _scheme(public_key: PublicKey) -> RsaPkcs1v15 | Ecdsa:
    match public_key:
        case rsa.RSAPublicKey():
            return RsaPkcs1v15(Hash.SHA256)
        case ec.EllipticCurvePublicKey(curve=ec.SECP256R1()):
            return Ecdsa(Hash.SHA256)
    raise KeyUnsuited("Mender verifies by RSA and P-256 keys, and this is another.", "Grant such a key.")


def _verify(content: bytes, manifest: bytes, key: SigningKey) -> None:
    """Raises MenderError or SignatureMismatch where a `manifest.sig` is none of this key over this manifest."""
    signature = mender.decode_signature(content)
    verify(key.public_key, _scheme(key.public_key), hashlib.sha256(manifest).digest(), signature)


def _is_good(content: bytes, manifest: bytes, key: SigningKey) -> bool:
    try:
        _verify(content, manifest, key)
    except (mender.MenderError, SignatureMismatch):
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Artifact:
    """An artifact whose content is what its manifest says.

    Arguments:
        signature: the content of the `manifest.sig` that it came with.
    """

    upload: Upload
    layout: mender.Layout
    manifest: bytes
    signature: bytes | None

    @property
    def unchanged(self) -> Signed:
        """The artifact as it came."""
        return Signed((self.upload.whole,), _filename(self.upload))

    def with_signature(self, content: bytes) -> Signed:
        """The artifact with another `manifest.sig`, right behind the manifest."""
        head = self.layout.manifest.end
        rest = self.layout.signature.end if self.layout.signature else head
        parts = (
            FileRange(self.upload, 0, head),
            mender.signature_member(content),
            FileRange(self.upload, rest, self.upload.size - rest),
        )
        return Signed(parts, _filename(self.upload))

    def check(self, signed: Signed, content: bytes) -> None:
        """Parses the finished artifact anew: it has what came, and this `manifest.sig`.

        Raises SigningFailed: a file that others write to meanwhile is not the key's fault, and locks none.
        """
        try:
            members = list(tar.members(signed.read, signed.size))
            layout = mender.layout(members)
            if _files(members) != _files(_members(self.upload)):
                raise _unsound("its files are not those that came")
            if signed.read(layout.manifest.data_offset, layout.manifest.size) != self.manifest:
                raise _unsound("its manifest is not the one that was signed")
            found = layout.signature
            if found is None or signed.read(found.data_offset, found.size) != content:
                raise _unsound("it does not have the signature that was made")
        except (tar.TarError, mender.MenderError) as error:
            raise _unsound(f"{error}") from None


def _read(upload: Upload, settings: MenderSettings) -> _Artifact:
    """The artifact, its content held against its manifests.

    Raises ArtifactRejected, and ArtifactChanged where the file became shorter meanwhile.
    """
    try:
        layout = mender.layout(_members(upload))
        manifest = _content(upload, layout.manifest)
        expected = mender.manifest(manifest)
        version = mender.version(_content(upload, layout.version))
        if layout.augment is not None:
            expected = mender.augmented(expected, _content(upload, layout.augment), version)
        _Check(upload, layout, expected, settings.unpacked_max_bytes).run()
        signature = _content(upload, layout.signature) if layout.signature else None
    except (tar.TarError, mender.MenderError) as error:
        raise _rejected(f"{error}") from None
    except EOFError:
        raise ArtifactChanged("The artifact became shorter while it was read.", "Try again.") from None
    return _Artifact(upload, layout, manifest, signature)


def _members(upload: Upload) -> Iterator[tar.Member]:
    with upload.open() as file:

        def read_at(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        yield from tar.members(read_at, upload.size)


def _files(members: Iterable[tar.Member]) -> list[tuple[bytes, int]]:
    """The names and sizes of all but the signature."""
    return [(member.name, member.size) for member in members if member.name != mender.SIGNATURE]


def _content(upload: Upload, member: tar.Member) -> bytes:
    return upload.read(member.data_offset, member.size)


class _Check:
    """Holds the files of an artifact against its manifests.

    Arguments:
        expected: the SHA-256 of each file that has not been found yet.
    """

    def __init__(self, upload: Upload, layout: mender.Layout, expected: dict[bytes, str], max_bytes: int) -> None:
        self._upload = upload
        self._layout = layout
        self._expected = expected
        self._max_bytes = max_bytes
        self._unpacked_bytes = 0

    def run(self) -> None:
        """Reads each file once, in pieces.

        Raises ArtifactRejected or TarError where a file is missing, another, or in no manifest.
        """
        augment = self._layout.header_augment
        for whole in (self._layout.version, self._layout.header.member, *([augment.member] if augment else ())):
            self._compare(whole.name, self._chunks(whole))
        for payload in self._layout.payloads:
            for member, content in tar.stream(self._unpacked(payload)):
                if member.kind != tar.REGULAR:
                    raise _rejected(f"{mender.shown(member.name)} in a payload is no regular file")
                self._compare(payload.entry(member.name), content)
        if self._expected:
            raise _rejected(f"its manifest names {mender.shown(min(self._expected))}, which is not in it")

    def _compare(self, name: bytes, content: Iterable[bytes | memoryview]) -> None:
        expected = self._expected.pop(name, None)
        if expected is None:
            raise _rejected(f"{mender.shown(name)} is in no manifest, or is there twice")
        sha256 = hashlib.sha256()
        for chunk in content:
            sha256.update(chunk)
        if sha256.hexdigest() != expected:
            raise _rejected(
                f"the SHA-256 of {mender.shown(name)} is {sha256.hexdigest()}; its manifest says {expected}"
            )

    def _chunks(self, member: tar.Member, size: int = archives.CHUNK_BYTES) -> Iterator[bytes]:
        return read_through((FileRange(self._upload, member.data_offset, member.size),), size)

    def _unpacked(self, payload: mender.Payload) -> Iterator[bytes]:
        compression = COMPRESSIONS[payload.suffix]
        if compression is None:
            yield from self._chunks(payload.member)
            return
        for chunk in archives.unpacked(self._chunks(payload.member, archives.PACKED_CHUNK_BYTES), compression):
            self._unpacked_bytes += len(chunk)
            if self._unpacked_bytes > self._max_bytes:
                raise _rejected(f"its payloads hold more than {self._max_bytes} bytes")
            yield chunk


def _rejected(fault: str) -> ArtifactRejected:
    return ArtifactRejected(
        f"The artifact cannot be signed: {fault}.", "Make it with `mender-artifact write`, and send all of it."
    )


def _unsound(fault: str) -> SigningFailed:
    return SigningFailed(
        f"The finished artifact is not sound: {fault}.",
        "Report this with the request id: the artifact was not released.",
    )


def _filename(upload: Upload) -> str:
    """The upload's own base name."""
    return upload.basename or "artifact.mender"
