"""Rockchip's boot chain, of RK3566, RK3568 and RK3588: idblocks, USB loaders, and the FITs of its U-Boot.

Idblocks and loaders are signed here (`formats/idblock.py`, `formats/rkloader.py`), FITs as U-Boot's are, with what
Rockchip's verifier wants besides. One thing is Rockchip's closed rk_sign_tool alone to do: an idblock or loader that
has a device burn the key's hash into its fuses.
"""

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from signers import rockchip_fit, rockchip_tools
from signers.fitimage import GAP_MAX_BYTES
from signers.formats import idblock, rkloader
from signers.formats.idblock import Header, IdblockError
from signers.formats.reading import ReadAt, chunks
from signers.formats.rkloader import Loader, LoaderError
from signers.signer import FileRange, Form, Job, Name, Role, Signed, Upload, unsound
from tokens.errors import ArtifactRejected, KeyUnsuited, KeyUnusable, SignatureMismatch, ToolFailed, ToolUnavailable
from tokens.provider import PublicKey

FILENAME = "artifact.signed"

BURN_KEY_HASH = "0x20"
"""The flag by which rk_sign_tool is told so."""

_SOCS = {"rk3566": ("3566", "3568"), "rk3568": ("3566", "3568"), "rk3588": ("3588",)}
"""What a USB loader for the SoC says that it is for: Rockchip makes one for RK3566 and RK3568."""


class RkSettings(BaseModel):
    """`[signers.rk]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    tools: Path = Path("/opt/rockchip")
    """Where Rockchip's programs are: change_puk, and rkbin-tools/ with rk_sign_tool, boot_merger and setting.ini."""


def _soctype(text: Any) -> Any:
    return f"rk{text}" if isinstance(text, str) and text.isdecimal() else text


def _lower(text: Any) -> Any:
    return text.lower() if isinstance(text, str) else text


def _hex(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    if text and not re.fullmatch(r"(?:0[xX])?[0-9a-fA-F]{1,8}", text):
        raise ValueError("it is no number in hex, as 0x1000")
    return int(text, 16) if text else None


def _no_if_empty(text: Any) -> Any:
    return text or False


class RkForm(Form):
    """The fields of `/sign/rk`."""

    machine: Annotated[Name, Field(description="The machine whose key signs.")]
    soctype: Annotated[Literal["rk3566", "rk3568", "rk3588"], BeforeValidator(_soctype), Field(description="The SoC.")]
    artifact_type: Annotated[
        Literal["idblock", "usbloader", "fit-image"],
        BeforeValidator(_lower),
        Field(
            description="idblock: what the boot ROM loads from flash. usbloader: what is sent to it by USB. fit-image:"
            " a tar of fitImage or fit.its, and uboot.dtb; answered with a tar.gz of fitImage and uboot.dtb."
        ),
    ]
    artifact: Annotated[Upload, Field(description="What is signed.")]
    burn_key_hash: Annotated[
        bool,
        BeforeValidator(_no_if_empty),
        Field(
            description="idblock, usbloader: the device shall burn the key's hash into its fuses; by rk_sign_tool, with"
            " a key in a file."
        ),
    ] = False
    external_data_offset: Annotated[
        Annotated[int, Field(gt=0, le=GAP_MAX_BYTES)] | None,
        BeforeValidator(_hex, json_schema_input_type=str),
        Field(description="fit-image: where all data is to stand in the file, in hex as mkimage's -p."),
    ] = None


class Rk:
    """Signs Rockchip's boot chain. Implements `signers.signer.Signer`."""

    name = "rk"
    path = "/sign/rk"
    summary = "Sign a Rockchip idblock, USB loader or FIT image."
    scope: Literal["machine", "distro"] = "machine"
    form = RkForm
    roles = (
        Role("key", "Signs idblocks, USB loaders and FITs.", "rksign/dev.key"),
        Role("burn", "The same key as a file, for burn_key_hash.", "rksign/dev.key", is_file=True),
    )
    tools_setting = "signers.rk.tools"

    async def sign(self, form: RkForm, job: Job) -> Signed:
        """See `Signer.sign`."""
        if form.artifact_type == "fit-image":
            return await rockchip_fit.sign(form.machine, form.artifact, form.external_data_offset, job)
        boot = await job.run(_read, form)
        if form.burn_key_hash:
            return await _burning(form, boot, job)
        async with job.keys.open("key", machine=form.machine) as key:
            public_key = _suited(key.public_key)
            headers = [header.for_key(public_key) for header in boot.headers]
            signatures = [await key.sign(idblock.SCHEME, header.digest) for header in headers]
        signed = [header.with_signature(each) for header, each in zip(headers, signatures, strict=True)]
        return await job.run(_finished, boot, Signed(boot.with_headers(signed), FILENAME), public_key)

    def look(self, settings: RkSettings, roles: Collection[str]) -> Iterator[str | ToolUnavailable]:
        """See `UsesTools.look`."""
        if "burn" in roles:
            yield rockchip_tools.look(rockchip_tools.sign_tool, settings.tools)


def _suited(public_key: PublicKey) -> rsa.RSAPublicKey:
    if not isinstance(public_key, rsa.RSAPublicKey) or public_key.key_size not in idblock.KEY_BITS:
        raise KeyUnsuited(
            "Rockchip's boot ROM verifies by RSA keys of 2048 and 4096 bits, and this is another.", "Grant such a key."
        )
    return public_key


class _Boot(Protocol):
    """What the boot ROM verifies."""

    @property
    def headers(self) -> tuple[Header, ...]:
        """Its headers, whose images are what they say."""

    def with_headers(self, headers: Sequence[Header]) -> tuple[bytes | FileRange, ...]:
        """It, with these headers in place of those."""

    def read(self, read_at: ReadAt, size: int) -> "_Boot":
        """What is in another file of its kind. Raises IdblockError or LoaderError."""


@dataclass(frozen=True, slots=True)
class _Idblock:
    """An idblock; what stands behind its images stays as it is."""

    upload: Upload
    headers: tuple[Header, ...] = ()

    def read(self, read_at: ReadAt, size: int) -> "_Idblock":
        header = idblock.parse(read_at(0, idblock.HEAD_BYTES))
        for number, image in enumerate(header.images, 1):
            if image.offset + image.size > size:
                raise IdblockError(f"its image {number} is cut off")
            if _sha256(read_at, image.offset, image.size) != image.digest:
                raise IdblockError(f"its image {number} has another SHA-256 than its header says")
        return _Idblock(self.upload, (header,))

    def with_headers(self, headers: Sequence[Header]) -> tuple[bytes | FileRange, ...]:
        at = idblock.HEADER_BYTES
        return (headers[0].encode(), FileRange(self.upload, at, self.upload.size - at))


@dataclass(frozen=True, slots=True)
class _UsbLoader:
    """A USB loader."""

    socs: tuple[str, ...]
    loader: Loader | None = None
    headers: tuple[Header, ...] = ()

    def read(self, read_at: ReadAt, size: int) -> "_UsbLoader":
        if size > rkloader.LOADER_MAX_BYTES:
            raise LoaderError(f"it has more than {rkloader.LOADER_MAX_BYTES} bytes")
        loader = rkloader.parse(read_at(0, size))
        if loader.soc not in self.socs:
            raise LoaderError(f"it says that it is for {loader.soc!r}, and not for {' or '.join(self.socs)}")
        headers = tuple(idblock.parse(loader.head(entry)) for entry in loader.heads)
        for entry, header in zip(loader.heads, headers, strict=True):
            for number, image in enumerate(header.images, 1):
                if not loader.has(image):
                    raise LoaderError(f"none of its entries is the image {number} of {entry.name}, by its SHA-256")
        return _UsbLoader(self.socs, loader, headers)

    def with_headers(self, headers: Sequence[Header]) -> tuple[bytes | FileRange, ...]:
        assert self.loader is not None  # noqa: S101 - it was read
        encoded = (header.encode() for header in headers)
        return (self.loader.with_heads(dict(zip(self.loader.heads, encoded, strict=True))),)


def _read(form: RkForm) -> _Boot:
    """What is to be signed, checked. Raises ArtifactRejected."""
    idblocks = form.artifact_type == "idblock"
    kind: _Boot = _Idblock(form.artifact) if idblocks else _UsbLoader(_SOCS[form.soctype])
    try:
        return kind.read(form.artifact.read, form.artifact.size)
    except (IdblockError, LoaderError) as error:
        raise ArtifactRejected(
            f"The artifact cannot be signed as {'an idblock' if idblocks else 'a USB loader'}: {error}.",
            "Send what U-Boot's build, boot_merger or mkimage -T rksd makes for RK3566, RK3568 and RK3588, complete.",
        ) from None


def _finished(boot: _Boot, signed: Signed, public_key: rsa.RSAPublicKey) -> Signed:
    """The answer, verified. Raises SignatureMismatch."""
    try:
        _verify(boot, signed, public_key)
    except (IdblockError, LoaderError) as error:
        raise unsound(error) from None
    return signed


def _verify(boot: _Boot, signed: Signed, public_key: rsa.RSAPublicKey) -> None:
    """Parses what was signed anew. Raises IdblockError, LoaderError, SignatureMismatch."""
    found = boot.read(signed.read, signed.size)
    if [header.images for header in found.headers] != [header.images for header in boot.headers]:
        raise IdblockError("its images are others than they were")
    for header in found.headers:
        header.verify(public_key)


async def _burning(form: RkForm, boot: _Boot, job: Job) -> Signed:
    """The answer of rk_sign_tool, which is told to have the key's hash burnt."""
    settings: RkSettings = job.settings or RkSettings()
    tools = rockchip_tools.sign_tool(settings.tools)
    private = (await job.keys.read("burn", machine=form.machine)).content
    public_key = _suited(_public_half(private))
    await job.keys.claim("burn", public_key, machine=form.machine)
    async with job.tools.open(job.directory()) as workspace:
        tool = await tools.installed(workspace, form.artifact.content)
        key = workspace.put("dev.key", private)
        public = workspace.put("dev.pubkey", public_key.public_bytes(_PEM, _SPKI))
        await tool("cc", "--chip", form.soctype.removeprefix("rk"))
        await tool("lk", "--key", key, "--pubkey", public)
        await tool("ss", "--flag", BURN_KEY_HASH)
        idblocks = form.artifact_type == "idblock"
        await tool(*(("sb", "--idb") if idblocks else ("sl", "--loader")), rockchip_tools.ARTIFACT)
        path = workspace.result(rockchip_tools.ARTIFACT)
    output = Upload(path, path.name, path.stat().st_size)
    signed = Signed((output.whole,), FILENAME)
    try:
        await job.run(_verify, boot, signed, public_key)
    except (IdblockError, LoaderError, SignatureMismatch) as error:
        fault = f"{error}".removesuffix(".")
        raise ToolFailed(
            f"What rk_sign_tool made is not sound: {fault}.", "Check that the artifact is one that it knows."
        ) from None
    return signed


_PEM, _SPKI = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo


def _public_half(private: bytes) -> PublicKey:
    try:
        public_key = serialization.load_pem_private_key(private, None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeyUnusable(
            "The file of the role burn holds no private key that rk_sign_tool could use.",
            "Grant the RSA key as PEM, without a passphrase.",
        ) from None
    if not isinstance(public_key, rsa.RSAPublicKey):
        raise KeyUnsuited("rk_sign_tool signs with RSA keys.", "Grant such a key.")
    return public_key


def _sha256(read_at: ReadAt, offset: int, size: int) -> bytes:
    digest = hashlib.sha256()
    for chunk in chunks(read_at, offset, offset + size):
        digest.update(chunk)
    return digest.digest()
