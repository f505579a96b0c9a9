"""UEFI capsules: wraps a firmware payload into a signed FMP capsule, as edk2's GenerateCapsule does.

The layout is in `formats/capsule.py`. What NVIDIA's BSP chooses for a Jetson is known here; the BSP is not needed.
"""

import hashlib
import logging
import re
import uuid
from dataclasses import replace
from typing import Annotated, Any, Literal, Self, cast

from cryptography import x509
from pydantic import BeforeValidator, Field, model_validator

from signers.certified import message_by
from signers.formats import cms
from signers.formats.capsule import CAPSULE_MAX_BYTES, MONOTONIC_COUNT, Capsule, parse
from signers.formats.reading import ReadAt, chunks
from signers.signer import Form, Job, Name, Role, Signed, Upload, unsound
from tokens.certificates import load_certificates
from tokens.errors import ArtifactRejected, KeyNotFound
from tokens.provider import SigningKey

_DOTTED = re.compile(r"([0-9]{1,5})\.([0-9]{1,3})(?:\.([0-9]{1,3}))?")
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,8}|[0-9]{1,10}")

_FORMS = "as 36.4.3, 0x00240403 or 2360323"

_log = logging.getLogger(__name__)


def _version(text: Any) -> Any:
    """The 32 bits of a version: 36.4.3 is 36 << 16 | 4 << 8 | 3, as NVIDIA's BSP has it."""
    if not isinstance(text, str):
        return text
    if dotted := _DOTTED.fullmatch(text):
        major, minor, maintenance = (int(part or 0) for part in dotted.groups())
        if major > 0xFFFF or minor > 0xFF or maintenance > 0xFF:
            raise ValueError("a part of it is too large")
        return major << 16 | minor << 8 | maintenance
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"it is no version {_FORMS}")
    return int(text, 16 if text[:2] in ("0x", "0X") else 10)


Version = Annotated[int, BeforeValidator(_version, json_schema_input_type=str), Field(ge=0, le=0xFFFF_FFFF)]

SocType = Literal["tegra194", "tegra234"]
GUIDS: dict[SocType, uuid.UUID] = {
    "tegra194": uuid.UUID("be3f5d68-7654-4ed2-838c-2a2faf901a78"),
    "tegra234": uuid.UUID("bf0d4599-20d4-414e-b2c5-3595b1cda402"),
}
"""The firmware's GUID in the ESRT of NVIDIA's own boards."""


class CapsuleForm(Form):
    """The fields of `/sign/tegra/ueficapsule`."""

    machine: Annotated[Name, Field(description="The machine whose key signs.")]
    artifact: Annotated[Upload, Field(description="The payload; answered with the capsule.")]
    guid: Annotated[
        uuid.UUID | None,
        Field(description="The firmware's GUID in the ESRT of the device; that of soctype if left out."),
    ] = None
    soctype: Annotated[SocType | None, Field(description="The Jetson, for the GUID of NVIDIA's own boards.")] = None
    bspversion: Annotated[Version | None, Field(description="The version of NVIDIA's BSP, as 36.4.3.")] = None
    fwversion: Annotated[
        Version | None, Field(description=f"The payload's version, {_FORMS}; bspversion if left out.")
    ] = None
    lsv: Annotated[
        Version | None, Field(description=f"The lowest version that may follow, {_FORMS}; fwversion if left out.")
    ] = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.guid is None and self.soctype is None:
            raise ValueError("send guid, or soctype for NVIDIA's own")
        if self.fwversion is None and self.bspversion is None:
            raise ValueError("send fwversion, or bspversion for the BSP's")
        if self.lowest_supported > self.version:
            raise ValueError("lsv is higher than the payload's own version: no device would install it")
        return self

    @property
    def firmware(self) -> uuid.UUID:
        """The firmware that the capsule is for."""
        return self.guid or GUIDS[cast(SocType, self.soctype)]

    @property
    def version(self) -> int:
        """The payload's version."""
        return cast(int, self.bspversion if self.fwversion is None else self.fwversion)

    @property
    def lowest_supported(self) -> int:
        """The lowest version that may be installed after it."""
        return self.version if self.lsv is None else self.lsv


class UefiCapsule:
    """Makes UEFI capsules. Implements `signers.signer.Signer`."""

    name = "capsule"
    path = "/sign/tegra/ueficapsule"
    summary = "Wrap a firmware payload into a signed UEFI capsule (FMP)."
    scope: Literal["machine", "distro"] = "machine"
    form = CapsuleForm
    roles = (
        Role("key", "Signs the payload; its certificate may stand with it.", "ueficapsulesign/signer_private_cert.pem"),
        Role(
            "chain",
            "The certificates between the key's own and the one that devices trust.",
            "ueficapsulesign/other_public_cert.pem",
            is_file=True,
        ),
    )

    async def sign(self, form: CapsuleForm, job: Job) -> Signed:
        """See `Signer.sign`."""
        capsule = Capsule(form.firmware, form.version, form.lowest_supported, form.artifact.size)
        if capsule.size_max > CAPSULE_MAX_BYTES:
            raise ArtifactRejected(
                f"The payload has {capsule.payload_size} bytes: a capsule has at most 4 GiB.", "Send a smaller payload."
            )
        digest = await job.run(_digest, form.artifact.read, capsule)
        async with job.keys.open("key", machine=form.machine) as key:
            message = message_by(key)
            chain = await _chain(key, form.machine, job)
            message = replace(message, embed=tuple(dict.fromkeys((*message.embed, *chain))))
            signature = await key.sign(message.scheme, message.to_sign(digest))
        headers = capsule.headers(message.assemble(digest, signature))
        signed = Signed((headers, form.artifact.whole), "capsule.cap")
        await job.run(_verify, signed, capsule, message)
        return signed


async def _chain(key: SigningKey, machine: str, job: Job) -> tuple[x509.Certificate, ...]:
    """The certificates of the role `chain`, where the key's own alone do not say who issued it."""
    own, *others = key.certificates
    if others or own.issuer == own.subject:
        return ()
    try:
        granted = await job.keys.read("chain", machine=machine)
    except KeyNotFound:
        _log.warning("capsule: it lacks the issuer of the key's certificate: a device must have it")
        return ()
    return load_certificates(granted.content)


def _digest(read_at: ReadAt, capsule: Capsule, payload_at: int = 0) -> bytes:
    """What the message is of."""
    digest = hashlib.sha256(capsule.payload_header())
    for chunk in chunks(read_at, payload_at, payload_at + capsule.payload_size):
        digest.update(chunk)
    digest.update(MONOTONIC_COUNT)
    return digest.digest()


def _verify(signed: Signed, capsule: Capsule, message: cms.Message) -> None:
    """Parses the finished capsule anew. Raises SignatureMismatch where it is not what was asked for."""
    try:
        found, encoded = parse(signed.read, signed.size)
    except ValueError as error:
        raise unsound(error, "capsule") from None
    if found != capsule:
        raise unsound("it is for another firmware or version", "capsule")
    cms.verify(encoded, message, _digest(signed.read, found, signed.size - found.payload_size))
