"""Jetson EKB images: keys for OP-TEE, encrypted under a key out of the fuses. NVIDIA's BSP is not needed.

The fuse key encrypts one block, wherever it lives; the layout is in `formats/ekb.py`.
"""

import logging
import os
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from signers.formats import ekb
from signers.formats.ekb import Tag, Version
from signers.signer import Form, Job, Name, Role, Signed, unsound
from tokens.errors import KeyNotFound, KeyUnsuited, KeyUnusable
from tokens.provider import SymmetricKey
from tokens.symmetric import SymmetricAlgorithm
from tokens.symmetric_file import unhexed

_log = logging.getLogger(__name__)

_VERSION = re.compile(r"([0-9]{1,3})\.([0-9]{1,3})(?:\.[0-9]{1,3})?")

_FUSE_ALGORITHMS = {"tegra194": SymmetricAlgorithm.AES_128, "tegra234": SymmetricAlgorithm.AES_256}

_KEY_SIZES = (16, 32)

_KEY_FILES = {Tag.KERNEL: "kernel", Tag.DISK: "disk", Tag.AUTH: "auth"}
"""The role of each key in the image."""

_REQUIRED = {
    Version.UNVERSIONED: {Tag.KERNEL, Tag.DISK},
    Version.V1_0: {Tag.AUTH},
    Version.V2_0: {Tag.AUTH},
}
"""The keys that an image must have: without UEFI's variable authentication key a fused board does not start."""

_OPTIONAL = {Version.UNVERSIONED: set(), Version.V1_0: {Tag.KERNEL, Tag.DISK}, Version.V2_0: {Tag.KERNEL, Tag.DISK}}


class EkbSettings(BaseModel):
    """`[signers.ekb]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    version_36_2: Literal["1.0", "2.0"] = "2.0"
    """The EKB version for L4T 36.2 and 36.3: NVIDIA's stock image is 1.0, digsigserver's clients get 2.0."""


def _soctype(text: Any) -> Any:
    if text == "tegra264":
        raise ValueError("no EKB is made for it: how its keys are derived from the fuses is not public")
    return text


def _l4t(text: Any) -> Any:
    """35.4.1 is (35, 4): the rest does not count."""
    found = _VERSION.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError("it is no version as 35.4.1")
    version = int(found[1]), int(found[2])
    if version < (35, 1):
        raise ValueError("no EKB is made for L4T before 35.1: its keys are derived in another way")
    return version


class EkbForm(Form):
    """The fields of `/sign/tegra/ekb`."""

    machine: Annotated[Name, Field(description="The machine whose keys are used.")]
    soctype: Annotated[Literal["tegra194", "tegra234"], BeforeValidator(_soctype), Field(description="The Jetson.")]
    bspversion: Annotated[
        tuple[int, int],
        BeforeValidator(_l4t, json_schema_input_type=str),
        Field(description="The version of L4T that opens the image, as 35.4.1."),
    ]


class Ekb:
    """Makes EKB images. Implements `signers.signer.Signer`."""

    name = "ekb"
    path = "/sign/tegra/ekb"
    summary = "Make an encrypted key blob (EKB) for a Jetson's OP-TEE."
    scope: Literal["machine", "distro"] = "machine"
    form = EkbForm
    roles = (
        Role(
            "fuse",
            "The key in the fuses: KEK2 (AES-128) of a tegra194, OEM_K1 or OEM_K2 (AES-256) of a tegra234.",
            "ekbsign/oem_k1.key",
            algorithms=frozenset(_FUSE_ALGORITHMS.values()),
        ),
        Role("fixed-vector", "L4T 35: 16 bytes that OP-TEE has too.", "ekbsign/fixed-vector", is_file=True),
        Role("auth", "UEFI's variable authentication key.", "ekbsign/uefi-variable-authentication.key", is_file=True),
        Role("kernel", "The key of encrypted kernels.", "ekbsign/kernel-encryption.key", is_file=True),
        Role("disk", "The key of encrypted disks.", "ekbsign/disk-encryption.key", is_file=True),
    )

    async def sign(self, form: EkbForm, job: Job) -> Signed:
        """See `Signer.sign`."""
        version = _version(form.bspversion, job.settings or EkbSettings())
        keys = await _keys(version, form.machine, job)
        if version is Version.V2_0:
            vector = os.urandom(ekb.VECTOR_BYTES)
        else:
            vector = await _secret("fixed-vector", form.machine, job, (ekb.VECTOR_BYTES,))
        async with job.keys.open_symmetric("fuse", machine=form.machine) as fuse:
            _check_fuse(fuse, form.soctype)
            image = ekb.pack(version, keys, await fuse.encrypt_ecb(vector), vector, os.urandom(ekb.BLOCK_BYTES))
            await _verify(image, version, keys, fuse, vector)
        return Signed((image,), "ekb.img")


def _version(l4t: tuple[int, int], settings: EkbSettings) -> Version:
    """The version that this L4T opens."""
    if l4t == (35, 1):
        return Version.UNVERSIONED
    if l4t < (36, 0) or (l4t < (36, 4) and settings.version_36_2 == "1.0"):
        return Version.V1_0
    return Version.V2_0


async def _keys(version: Version, machine: str, job: Job) -> dict[Tag, bytes]:
    """The keys that go into the image. Raises KeyNotFound where one lacks that must be there."""
    found = {}
    for tag in sorted(_REQUIRED[version] | _OPTIONAL[version]):
        try:
            found[tag] = await _secret(_KEY_FILES[tag], machine, job, _KEY_SIZES)
        except KeyNotFound:
            if tag in _REQUIRED[version]:
                raise
            _log.info("ekb: the image has no key for the role %s", _KEY_FILES[tag])
    return found


async def _secret(role: str, machine: str, job: Job, sizes: tuple[int, ...]) -> bytes:
    """The bytes that a file of the key set has, in hexadecimal or bare."""
    value = unhexed((await job.keys.read(role, machine=machine)).content)
    if len(value) not in sizes:
        raise KeyUnusable(
            f"The file of the role {role} holds {len(value)} bytes, not {' or '.join(map(str, sizes))}.",
            "Write them in hexadecimal, as NVIDIA's tools take them.",
        )
    return value


def _check_fuse(fuse: SymmetricKey, soctype: str) -> None:
    wanted = _FUSE_ALGORITHMS[soctype]
    if fuse.algorithm is not wanted:
        raise KeyUnsuited(
            f"The fuse key of a {soctype} is for {wanted}; this one is for {fuse.algorithm}.",
            "Grant the key that is in the fuses of this machine.",
        )


async def _verify(image: bytes, version: Version, keys: dict[Tag, bytes], fuse: SymmetricKey, vector: bytes) -> None:
    """Opens the finished image as a device would, with a root key made anew. Raises SignatureMismatch."""
    if version is Version.V2_0:
        vector = ekb.vector_of(image)
    try:
        ekb.verify(image, version, keys, await fuse.encrypt_ecb(vector), vector)
    except ValueError as error:
        raise unsound(error, "EKB image") from None
