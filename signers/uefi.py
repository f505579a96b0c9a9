"""UEFI Secure Boot: signs EFI programs, files that firmware or a boot loader verifies, and updates of its variables.

What is signed, and how it is spliced in, is in `formats/pe.py` (programs) and `formats/efi.py` (variables). A file is
verified by L4T's loader against `FILE.sig`, or against the same message behind the file (docs/signers/uefi.md).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Literal, Protocol, Self, cast

import asn1crypto.parser
from pydantic import AfterValidator, Field, model_validator

from signers.certified import message_by
from signers.formats import cms, efi, pe
from signers.formats.reading import ReadAt, chunks
from signers.signer import FileRange, Form, Job, Name, Role, Signed, Upload, unsound
from tokens.errors import ArtifactRejected
from tokens.schemes import Hash

VARIABLE_MAX_BYTES = 1024 * 1024
"""The largest content of a variable: firmware has room for some 64 KiB."""

SIGNATURE_MAX_BYTES = 64 * 1024
"""What a program must have room for: a signature with its certificates has a few KiB."""

ATTACHED_ALIGNMENT = 2048
"""A signature is attached to a file at a multiple of this size."""

SigningType = Literal["sbsign", "signature", "attach_signature", "variable"]


class UefiForm(Form):
    """The fields of `/sign/tegra/uefi`."""

    machine: Annotated[Name, Field(description="The machine whose key signs.")]
    signing_type: Annotated[
        SigningType,
        Field(
            description="sbsign: an EFI program, answered with the signed one. signature: any file, answered with a"
            " detached CMS signature. attach_signature: any file, answered with the file and that signature behind it."
            " variable: signature lists (.esl), answered with a signed update (.auth)."
        ),
    ]
    artifact: Annotated[Upload, Field(description="What is signed.")]
    signatures: Annotated[
        Literal["append", "replace"],
        Field(description="sbsign: whether the new signature is added to those of the program, or replaces them."),
    ] = "append"
    variable: Annotated[efi.Name | None, Field(description="variable: which one is updated.")] = None
    append: Annotated[bool, Field(description="variable: add to what it has, instead of replacing it.")] = False
    timestamp: Annotated[
        datetime | None,
        AfterValidator(lambda moment: moment and _utc(moment)),
        Field(description="variable: the time of the update, as 2026-07-01T12:00:00Z; now if it is left out."),
    ] = None

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        if (self.signing_type == "variable") != (self.variable is not None):
            raise ValueError("variable goes with signing_type=variable, and must then be there")
        if self.variable == "PK" and self.append:
            raise ValueError("there is one PK: it can be replaced, not appended to")
        return self


def _utc(moment: datetime) -> datetime:
    # the bounds keep the conversion within what datetime and EFI_TIME can say
    if not 1970 <= moment.year <= 9998:
        raise ValueError("it is not between 1970 and 9998")
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


class Uefi:
    """Signs for UEFI Secure Boot. Implements `signers.signer.Signer`."""

    name = "uefi"
    path = "/sign/tegra/uefi"
    summary = "Sign an EFI program, any file by CMS, or an update of an EFI variable."
    scope: Literal["machine", "distro"] = "machine"
    form = UefiForm
    roles = (
        Role("db", "Signs programs and files; its certificate is in db.", "uefisign/db.key", "uefisign/db.crt"),
        Role("kek", "Signs updates of db and dbx; its certificate is in KEK."),
        Role("pk", "Signs updates of PK and KEK; its certificate is PK."),
    )

    async def sign(self, form: UefiForm, job: Job) -> Signed:
        """See `Signer.sign`."""
        artifact = await job.run(_KINDS[form.signing_type], form)
        async with job.keys.open(artifact.role, machine=form.machine) as key:
            message = artifact.message(message_by(key))
            signature = await key.sign(message.scheme, message.to_sign(artifact.digest))
        return await job.run(_finished, artifact, message, signature)


class _Artifact(Protocol):
    """What is signed, read and hashed."""

    @property
    def role(self) -> str:
        """Whose key signs."""

    @property
    def digest(self) -> bytes:
        """What the message is of: see `signers.formats.cms`."""

    def message(self, usual: cms.Message) -> cms.Message:
        """How its message differs from the usual one."""

    def signed(self, message: cms.Message, signature: bytes) -> Signed:
        """The answer."""

    def found(self, signed: Signed) -> tuple[bytes, bytes]:
        """The message in an answer, and the digest that it must be of. Raises ValueError where it is not sound."""


def _finished(artifact: _Artifact, message: cms.Message, signature: bytes) -> Signed:
    """The answer, parsed anew and verified. Raises SignatureMismatch."""
    try:
        signed = artifact.signed(message, signature)
        encoded, digest = artifact.found(signed)
    except ValueError as error:
        raise unsound(error) from None
    cms.verify(encoded, message, digest)
    return signed


@dataclass(frozen=True, slots=True)
class _Program:
    """An EFI program.

    Arguments:
        kept: the table of signatures that stays before the new one.
        indirect_data: what the message has as its content.
    """

    upload: Upload
    image: pe.Image
    kept: bytes
    indirect_data: bytes
    role = "db"

    @classmethod
    def of(cls, form: UefiForm) -> Self:
        """Raises ArtifactRejected where it is no program that firmware loads."""
        upload = form.artifact
        try:
            image = pe.parse(upload.read, upload.size)
            kept = upload.read(image.content_size, image.size - image.content_size)
            pe.messages(kept)
            if form.signatures == "replace":
                kept = b""
            pe.check_room(image.content_size, len(kept), SIGNATURE_MAX_BYTES)
        except pe.PeError as error:
            raise ArtifactRejected(
                f"The artifact is not an EFI program: {error}.",
                "Send a PE image for UEFI (.efi, a kernel with EFI stub); other files take `signature`.",
            ) from None
        return cls(upload, image, kept + pe.padding(len(kept)), _indirect_data(upload.read, image))

    @property
    def digest(self) -> bytes:
        return _content_digest(self.indirect_data)

    def message(self, usual: cms.Message) -> cms.Message:
        return replace(usual, content_type=pe.SPC_INDIRECT_DATA, content=self.indirect_data, pkcs7=True)

    def signed(self, message: cms.Message, signature: bytes) -> Signed:
        table = self.kept + pe.entry(message.assemble(self.digest, signature))
        draft = self._with(table, checksum=bytes(4))
        image = pe.parse(draft.read, draft.size)
        return self._with(table, pe.checksum(draft.read, image))

    def _with(self, table: bytes, checksum: bytes) -> Signed:
        image, padding = self.image, pe.padding(self.image.content_size)
        directory = pe.directory(image.content_size + len(padding), len(table))
        return Signed(
            (
                self._range(0, image.checksum),
                checksum,
                self._range(image.checksum + len(checksum), image.directory),
                directory,
                self._range(image.directory + len(directory), image.content_size),
                padding,
                table,
            ),
            "signed.efi",
        )

    def _range(self, begin: int, end: int) -> FileRange:
        return FileRange(self.upload, begin, end - begin)

    def found(self, signed: Signed) -> tuple[bytes, bytes]:
        image = pe.parse(signed.read, signed.size)
        _require(signed.read(image.checksum, 4) == pe.checksum(signed.read, image), "its checksum is wrong")
        table = signed.read(image.content_size, image.size - image.content_size)
        *_, message = pe.messages(table)
        _require(table == self.kept + pe.entry(message), "its earlier signatures are not those of the upload")
        return message, _content_digest(_indirect_data(signed.read, image))


def _indirect_data(read_at: ReadAt, image: pe.Image) -> bytes:
    return pe.indirect_data(pe.digest(read_at, image, Hash.SHA256), Hash.SHA256)


def _content_digest(indirect_data: bytes) -> bytes:
    # RFC 2315, section 9.3: of the contents, without tag and length
    contents = asn1crypto.parser.parse(indirect_data)[4]
    return hashlib.sha256(contents).digest()


@dataclass(frozen=True, slots=True)
class _Detached:
    """A file whose signature is a file of its own."""

    digest: bytes
    role = "db"

    @classmethod
    def of(cls, form: UefiForm) -> Self:
        return cls(_sha256(form.artifact.read, form.artifact.size))

    def message(self, usual: cms.Message) -> cms.Message:
        return usual

    def signed(self, message: cms.Message, signature: bytes) -> Signed:
        return Signed((message.assemble(self.digest, signature),), "artifact.sig")

    def found(self, signed: Signed) -> tuple[bytes, bytes]:
        return signed.read(0, signed.size), self.digest


@dataclass(frozen=True, slots=True)
class _Attached:
    """A file with its signature behind it. The padding between them is not signed: L4T expects it so."""

    upload: Upload
    digest: bytes
    role = "db"

    @classmethod
    def of(cls, form: UefiForm) -> Self:
        return cls(form.artifact, _sha256(form.artifact.read, form.artifact.size))

    def message(self, usual: cms.Message) -> cms.Message:
        return usual

    def signed(self, message: cms.Message, signature: bytes) -> Signed:
        return Signed((self.upload.whole, self._padding, message.assemble(self.digest, signature)), "artifact.signed")

    def found(self, signed: Signed) -> tuple[bytes, bytes]:
        size = self.upload.size
        at = size + len(self._padding)
        _require(at % ATTACHED_ALIGNMENT == 0 and not any(signed.read(size, at - size)), "its padding is wrong")
        return signed.read(at, signed.size - at), _sha256(signed.read, size)

    @property
    def _padding(self) -> bytes:
        return bytes(-self.upload.size % ATTACHED_ALIGNMENT)


@dataclass(frozen=True, slots=True)
class _Update:
    """An update of a variable."""

    write: efi.Write

    @classmethod
    def of(cls, form: UefiForm) -> Self:
        """Raises ArtifactRejected where the content is none that the variable can have."""
        upload, name = form.artifact, cast(efi.Name, form.variable)
        if upload.size > VARIABLE_MAX_BYTES:
            raise _no_lists(f"it has more than {VARIABLE_MAX_BYTES} bytes")
        payload = upload.read(0, upload.size)
        try:
            lists = list(efi.signature_lists(payload))
        except efi.EfiError as error:
            raise _no_lists(str(error)) from None
        if name == "PK" and [(each.type, len(each.signatures)) for each in lists] != [(efi.CERT_X509, 1)]:
            raise _no_lists("PK is one X.509 certificate, and it holds something else")
        return cls(efi.Write(name, payload, form.append, form.timestamp or datetime.now(UTC)))

    @property
    def role(self) -> str:
        # UEFI, section 32.3.5: PK's key updates PK and KEK, a key of KEK db and dbx
        return "pk" if self.write.name in ("PK", "KEK") else "kek"

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.write.to_sign()).digest()

    def message(self, usual: cms.Message) -> cms.Message:
        return replace(usual, attributes=None)

    def signed(self, message: cms.Message, signature: bytes) -> Signed:
        update = self.write.signed(message.signed_data(self.digest, signature))
        return Signed((update,), f"{self.write.name}.auth")

    def found(self, signed: Signed) -> tuple[bytes, bytes]:
        update = signed.read(0, signed.size)
        signed_data = efi.message_of(update)
        _require(update == self.write.signed(signed_data), "it is another update")
        return cms.content_info(signed_data), self.digest


_KINDS: dict[SigningType, Callable[[UefiForm], _Artifact]] = {
    "sbsign": _Program.of, "signature": _Detached.of, "attach_signature": _Attached.of, "variable": _Update.of,
}  # fmt: skip


def _no_lists(fault: str) -> ArtifactRejected:
    return ArtifactRejected(
        f"The artifact is not the content of an EFI variable: {fault}.",
        "Make signature lists by `cert-to-efi-sig-list` or `hash-to-efi-sig-list`, and send them without a signature.",
    )


def _sha256(read_at: ReadAt, size: int) -> bytes:
    digest = hashlib.sha256()
    for chunk in chunks(read_at, 0, size):
        digest.update(chunk)
    return digest.digest()


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise ValueError(fault)
