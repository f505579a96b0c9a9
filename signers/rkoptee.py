"""OP-TEE as Rockchip ships it, in binary form: Trusted Applications (TAs) signed anew, and the key that it trusts.

TAs are signed as OP-TEE's own are (`trusted_applications.py`), each by the algorithm that it was signed by. The key in
OP-TEE is put there by Rockchip's closed change_puk, which is given a public key and nothing secret.
"""

from collections.abc import Collection, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from pydantic import Field

from signers import rockchip_tools
from signers.formats import ta
from signers.rockchip import RkSettings
from signers.signer import Form, Job, Name, Role, Signed, Upload
from signers.trusted_applications import Signing, read
from tokens.errors import ArtifactRejected, KeyUnsuited, KeyUnusable, ToolFailed, ToolUnavailable
from tokens.symmetric import SymmetricAlgorithm

TEE_MAX_BYTES = 64 * 1024 * 1024
"""The largest OP-TEE; Rockchip's have less than 1 MiB."""


class RkopteeTaForm(Form):
    """The fields of `/sign/rkoptee-ta`."""

    machine: Annotated[Name, Field(description="The machine whose key signs.")]
    artifact: Annotated[
        Upload, Field(description="A tar of UUID.ta files (plain, .gz, .xz, .zst), or one; answered in kind.")
    ]


class RkopteeTa:
    """Signs TAs anew. Implements `signers.signer.Signer`."""

    name = "rkoptee-ta"
    path = "/sign/rkoptee-ta"
    summary = "Sign the Trusted Applications of Rockchip's OP-TEE anew."
    scope: Literal["machine", "distro"] = "machine"
    form = RkopteeTaForm
    roles = (
        Role("key", "Signs TAs; its public half is put into OP-TEE.", "rkopteesign/optee-signing-key.pem"),
        Role("encryption", "Decrypts TAs, to verify them.", algorithms=frozenset({SymmetricAlgorithm.AES_256})),
    )

    async def sign(self, form: RkopteeTaForm, job: Job) -> Signed:
        """See `Signer.sign`."""
        tas = await read(form.artifact, job)
        async with AsyncExitStack() as keys:
            key = await keys.enter_async_context(job.keys.open("key", machine=form.machine))
            encryption_key = None
            if tas.encrypted:
                opened = job.keys.open_symmetric("encryption", machine=form.machine)
                encryption_key = await keys.enter_async_context(opened)
            return await tas.sign(Signing(key, encryption_key=encryption_key), job)


class RkopteeTeeForm(Form):
    """The fields of `/sign/rkoptee-tee`."""

    machine: Annotated[Name, Field(description="The machine whose public key OP-TEE shall trust.")]
    artifact: Annotated[Upload, Field(description="Rockchip's OP-TEE, as rk3588_bl32_v1.14.bin; answered in kind.")]


class RkopteeTee:
    """Changes the key that OP-TEE trusts. Implements `signers.signer.Signer`."""

    name = "rkoptee-tee"
    path = "/sign/rkoptee-tee"
    summary = "Put the public key for Trusted Applications into Rockchip's OP-TEE."
    scope: Literal["machine", "distro"] = "machine"
    form = RkopteeTeeForm
    roles = (
        Role(
            "pubkey",
            "The public half of the key that signs TAs, PEM.",
            "rkopteesign/optee-signing-pubkey.pem",
            is_file=True,
        ),
    )
    tools_setting = "signers.rk.tools"

    async def sign(self, form: RkopteeTeeForm, job: Job) -> Signed:
        """See `Signer.sign`."""
        settings: RkSettings = job.settings or RkSettings()
        program = rockchip_tools.change_puk(settings.tools)
        if not 0 < form.artifact.size <= TEE_MAX_BYTES:
            raise ArtifactRejected(
                f"The TEE is empty, or has more than {TEE_MAX_BYTES} bytes.", "Send Rockchip's bl32."
            )
        pem = (await job.keys.read("pubkey", machine=form.machine)).content
        public_key = _public_key(pem)
        async with job.tools.open(job.directory()) as workspace:
            tool = await program.installed(workspace, form.artifact.content)
            key = workspace.put("optee-signing-pubkey.pem", pem)
            await tool("--teebin", rockchip_tools.ARTIFACT, "--key", key)
            path = workspace.result(rockchip_tools.ARTIFACT)
        await job.run(_check, path, form.artifact.size, public_key)
        output = Upload(path, path.name, path.stat().st_size)
        return Signed((output.whole,), "tee.bin.signed")

    def look(self, settings: RkSettings, _roles: Collection[str]) -> Iterator[str | ToolUnavailable]:
        """See `UsesTools.look`."""
        yield rockchip_tools.look(rockchip_tools.change_puk, settings.tools)


def _public_key(pem: bytes) -> rsa.RSAPublicKey:
    try:
        public_key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise KeyUnusable("The file of the role pubkey holds no public key.", "Grant it as PEM.") from None
    if not isinstance(public_key, rsa.RSAPublicKey) or public_key.key_size not in ta.KEY_BITS:
        raise KeyUnsuited("OP-TEE verifies by RSA keys of 2048 to 4096 bits, and this is another.", "Grant such a key.")
    return public_key


def _check(path: Path, size: int, public_key: rsa.RSAPublicKey) -> None:
    """Raises ToolFailed where the TEE has another size than it had, or the key is not in it.

    How change_puk stores it is nowhere written; OP-TEE itself has the modulus as it is, most significant byte first.
    """
    tee = path.read_bytes() if path.stat().st_size == size else b""
    modulus = public_key.public_numbers().n.to_bytes(public_key.key_size // 8, "big")
    if modulus not in tee and modulus[::-1] not in tee:
        raise ToolFailed(
            "change_puk made a TEE without the public key in it.", "Check that the artifact is a TEE that it knows."
        )
