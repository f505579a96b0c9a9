"""FITs for Rockchip's U-Boot: as they are, or built of their source by U-Boot's mkimage in the sandbox.

A FIT is signed as U-Boot's are (`fitimage.py`), but for what `formats/rkfit.py` tells of Rockchip's verifier.
"""

import hashlib
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from signers import archives, fitimage
from signers.archives import Archive, ArchiveLimits, Scratch
from signers.fitimage import BLOCK_BYTES, FitimageForm, UBoot
from signers.formats import fdt, rkfit, tar
from signers.formats.fdt import FdtError, Node, Span
from signers.formats.fit import BINDING, Fit, FitError
from signers.signer import FileRange, Job, Signed, Upload, read_through
from tokens.errors import ArtifactRejected, ToolUnavailable
from tokens.provider import SigningKey

FIT, SOURCE, DTB = "fitImage", "fit.its", "uboot.dtb"

SOURCE_FILES_MAX = 256
"""The most files that a FIT may be built of."""

MKIMAGE, DTC = Path("/usr/bin/mkimage"), Path("/usr/bin/dtc")

_UBOOT = UBoot(rkfit.ALGORITHMS, longest_salt=True, add_key=rkfit.add_key)

_log = logging.getLogger(__name__)


async def sign(machine: str, artifact: Upload, position: int | None, job: Job) -> Signed:
    """A tar.gz of the signed FIT, and of U-Boot's device tree with the key in it where that came.

    Arguments:
        artifact: a tar, plain or compressed, of fitImage or fit.its and its files, and uboot.dtb.
        position: where all data is to stand in the file, in bytes; None: where it stands.

    Raises as `Signer.sign` does.
    """
    directory = job.directory() / "source"
    directory.mkdir()
    scratch = Scratch(directory, ArchiveLimits())
    source = await job.run(_read, artifact, scratch)
    if source.image is None:
        image = await _built(source, position, job)
    else:
        image = source.image
        await job.run(_align, image)
    fields = {"artifact": image, "machine": machine, "dtb": source.dtb, "mark_required": "yes"}
    placed = {} if position is None else {"external_data_offset": position}
    form = FitimageForm.model_validate(fields | placed)
    signed = await fitimage.sign(form, job, _key, _UBOOT)
    if source.dtb is not None:
        return signed
    return await job.run(fitimage.packed, {FIT: signed.parts}, scratch)


async def _key(_name: str, form: FitimageForm, job: Job, stack: AsyncExitStack) -> SigningKey:
    """There is one key, whatever a FIT calls it."""
    return await stack.enter_async_context(job.keys.open("key", machine=form.machine))


@dataclass(frozen=True, slots=True)
class _Source:
    """What came: a FIT, or the files that it is to be built of, and U-Boot's device tree."""

    image: Upload | None
    files: dict[str, Upload]
    dtb: Upload | None


def _read(artifact: Upload, scratch: Scratch) -> _Source:
    """Raises ArtifactRejected."""
    artifact, _ = scratch.plain(artifact)
    archive = archives.read(artifact, scratch.limits)
    members = {_name(member): member for member in archive.members if member.kind == tar.REGULAR}
    dtb = _file(archive, members[DTB], scratch, DTB) if DTB in members else None
    if SOURCE in members:
        if len(members) > SOURCE_FILES_MAX:
            raise archives.rejected(f"it has more than {SOURCE_FILES_MAX} files")
        return _Source(None, {name: _file(archive, each, scratch, name) for name, each in members.items()}, dtb)
    if FIT not in members:
        raise ArtifactRejected(
            f"The archive holds neither {FIT} nor {SOURCE}.",
            f"Send a tar of {FIT}, or of {SOURCE} and its files, and of {DTB}.",
        )
    return _Source(_file(archive, members[FIT], scratch, FIT), {}, dtb)


def _name(member: tar.Member) -> str:
    return "/".join(part for part in member.name.decode("utf-8", "replace").split("/") if part not in ("", "."))


def _file(archive: Archive, member: tar.Member, scratch: Scratch, name: str) -> Upload:
    upload = scratch.write(read_through((archive.content(member),), archives.CHUNK_BYTES))
    return Upload(upload.content, name, upload.size)


def _align(upload: Upload) -> None:
    """Counts the padding behind the tree to the tree, where data is counted from the tree's end.

    Rockchip's U-Boot counts from a multiple of BLOCK_BYTES on (FIT_ALIGN in include/image.h), and U-Boot from one of 4:
    so both find it.

    Raises ArtifactRejected where the data that is found so is not what the FIT's hashes say.
    """
    try:
        fit = Fit(fdt.parse(upload.read, upload.size))
    except (FdtError, FitError):
        return  # what is wrong with it, the signer says
    if all(each.value("data-offset") is None for each in fit.images):
        return
    fit.tree.total_size += -fit.tree.total_size % BLOCK_BYTES
    try:
        fit.check_data(upload.size)
        for image in fit.images:
            _check_hashes(upload, fit, image)
    except FitError as error:
        raise ArtifactRejected(
            f"The FIT's data is not where Rockchip's U-Boot looks for it: {error}.",
            "Make it with Rockchip's mkimage, with `mkimage -E -B 200`, or with a fixed position (-p).",
        ) from None
    with cast(Path, upload.content).open("r+b") as file:  # its own copy
        file.seek(4)  # totalsize (Devicetree Specification, section 5.2)
        file.write(fit.tree.total_size.to_bytes(4, "big"))


def _check_hashes(upload: Upload, fit: Fit, image: Node) -> None:
    data = fit.data(image)
    for node, algorithm in fit.hashes(image):
        value = node.value("value")
        if value is not None and isinstance(data, Span) and algorithm in BINDING:
            digest = hashlib.new(algorithm, usedforsecurity=False)
            for chunk in read_through((FileRange(upload, data.offset, data.length),), archives.CHUNK_BYTES):
                digest.update(chunk)
            if value != digest.digest():
                raise FitError(f"the image {image.name!r} has another hash")


async def _built(source: _Source, position: int | None, job: Job) -> Upload:
    """The FIT that mkimage makes, unsigned, with its data behind it.

    A source names files, and those of the whole machine too (/incbin/): so never without the sandbox.
    """
    for program, package in ((MKIMAGE, "u-boot-tools"), (DTC, "device-tree-compiler")):
        if not program.is_file():
            raise ToolUnavailable(f"{program.name} is not installed.", f"Install the package {package}, or send {FIT}.")
    if job.tools.settings.sandbox == "none":
        raise ToolUnavailable(
            f"{SOURCE} may name any file, and tools run without a sandbox.",
            f'Set sandbox = "bubblewrap" in [tools], or send {FIT}.',
        )
    async with job.tools.open(job.directory()) as workspace:
        places = {name: workspace.put(f"source/{name}", upload.content) for name, upload in source.files.items()}
        at = () if position is None else ("-p", f"{position:x}")
        done = await workspace.run(str(MKIMAGE), "-f", places[SOURCE], "-E", "-B", f"{BLOCK_BYTES:x}", *at, FIT)
        if done.status != 0:
            _log.warning("mkimage ended with status %d: %s", done.status, done.said)
            raise ArtifactRejected(
                f"mkimage cannot build a FIT of {SOURCE}.", f"Try `mkimage -f {SOURCE} -E {FIT}` on the same files."
            )
        path = workspace.result(FIT)
    return Upload(path, FIT, path.stat().st_size)
