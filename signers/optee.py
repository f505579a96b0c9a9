"""OP-TEE: signs Trusted Applications (TAs), and the subkeys that others' TAs are signed below.

The layout is in `formats/ta.py`. OP-TEE has the public half of one key, the root key, built in. A TA that is signed by
a subkey carries the chain of subkeys that leads there.
"""

from contextlib import AsyncExitStack
from typing import Annotated, Literal, Self
from uuid import UUID

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from pydantic import Field, model_validator

from signers.formats import ta
from signers.formats.ta import Chain, Header, Kind, Link, SignedHeader, Subkey, TaError, TaScheme
from signers.signer import Form, Job, Name, Role, Signed, Upload, unsound
from signers.trusted_applications import Signing, check_chain, check_name, read, rsa_key
from tokens.errors import ArtifactRejected
from tokens.provider import SigningKey
from tokens.symmetric import SymmetricAlgorithm

CHAIN_MAX_BYTES = ta.SUBKEYS_MAX * 8192
"""The largest chain of subkeys; each takes less than 2 KiB."""

PUBLIC_KEY_MAX_BYTES = 16 * 1024
"""The largest public key that is read."""

_SCHEMES: dict[str, TaScheme] = {"RSA": ta.PKCS1V15, "RSA-PSS": ta.PSS}

_OF_SUBKEYS = {"name_size": "name-size", "max_depth": "max-depth", "subkey_version": "subkey-version"}


class OpteeForm(Form):
    """The fields of `/sign/optee`."""

    machine: Annotated[Name, Field(description="The machine whose key signs.")]
    artifact: Annotated[
        Upload,
        Field(
            description="A tar (plain, .gz, .xz, .zst) of UUID.stripped.elf, NAME.stripped.so or UUID.ta files, or one"
            " .ta; answered in kind. With uuid: the public key of a subkey, PEM; answered with the subkey."
        ),
    ]
    method: Annotated[
        Literal["RSA", "RSA-PSS"] | None,
        Field(description="PKCS #1 v1.5, or PSS; left out: as a .ta has it that was signed before, else RSA-PSS."),
    ] = None
    encryption: Annotated[
        Literal["device", "class"] | None,
        Field(description="Encrypts the TAs: which of its keys a device decrypts with, its own or its class's."),
    ] = None
    subkey: Annotated[
        Upload | None, Field(description="The chain of subkeys that TAs, or a new subkey, are put below.")
    ] = None
    name: Annotated[
        str, Field(max_length=ta.NAME_MAX_BYTES, description="What they are called below it, where no file says it.")
    ] = ""
    uuid: Annotated[UUID | None, Field(description="Signs a subkey, of this UUID.")] = None
    name_size: Annotated[
        int,
        Field(
            alias="name-size",
            ge=0,
            le=ta.NAME_MAX_BYTES,
            description="How long the names below the new subkey may be, in bytes; 0: it is for its own UUID alone.",
        ),
    ] = 0
    max_depth: Annotated[
        int,
        Field(
            alias="max-depth", ge=0, le=ta.DEPTH_MAX, description="How many levels of subkeys may be below the new one."
        ),
    ] = 0
    subkey_version: Annotated[
        int,
        Field(
            alias="subkey-version",
            ge=0,
            le=0xFFFF_FFFF,
            description="The new subkey's version: OP-TEE refuses one that is lower than it has seen.",
        ),
    ] = 0

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.uuid is None and (given := _OF_SUBKEYS.keys() & self.model_fields_set):
            raise ValueError(f"{_OF_SUBKEYS[min(given)]} is of a subkey: send its uuid too")
        if self.subkey is None and self.name:
            raise ValueError("a name is one below a subkey: send the chain as subkey")
        return self


class Optee:
    """Signs for OP-TEE. Implements `signers.signer.Signer`."""

    name = "optee"
    path = "/sign/optee"
    summary = "Sign Trusted Applications of OP-TEE's, or a subkey."
    scope: Literal["machine", "distro"] = "machine"
    form = OpteeForm
    roles = (
        Role("key", "Signs TAs: the root key, or that of a subkey.", "opteesign/optee-signing-key.pem"),
        Role("issuer", "Signs subkeys, whose holders may then sign TAs themselves."),
        Role("encryption", "Encrypts TAs.", algorithms=frozenset({SymmetricAlgorithm.AES_256})),
    )

    async def sign(self, form: OpteeForm, job: Job) -> Signed:
        """See `Signer.sign`."""
        chain = None if form.subkey is None else _chain(form.subkey)
        if form.uuid is not None:
            subkey = _subkey(form, form.uuid)
            async with job.keys.open("issuer", machine=form.machine) as key:
                return await _signed_subkey(subkey, key, chain, form.name.encode())
        tas = await read(form.artifact, job)
        async with AsyncExitStack() as keys:
            key = await keys.enter_async_context(job.keys.open("key", machine=form.machine))
            encryption_key = None
            if tas.encrypted or form.encryption:
                encryption_key = await keys.enter_async_context(
                    job.keys.open_symmetric("encryption", machine=form.machine)
                )
            signing = Signing(
                key,
                scheme=_SCHEMES[form.method] if form.method else None,
                chain=chain,
                name=form.name.encode(),
                encryption_key=encryption_key,
                class_wide=None if form.encryption is None else form.encryption == "class",
            )
            return await tas.sign(signing, job)


def _chain(upload: Upload) -> Chain:
    if upload.size > CHAIN_MAX_BYTES:
        raise _no_chain(f"it has more than {CHAIN_MAX_BYTES} bytes")
    try:
        return ta.parse_chain(upload.read(0, upload.size))
    except TaError as error:
        raise _no_chain(f"{error}") from None


def _subkey(form: OpteeForm, uuid: UUID) -> Subkey:
    """The subkey that is asked for. Raises ArtifactRejected where the artifact is no public key that it can be of."""
    data = form.artifact.read(0, min(form.artifact.size, PUBLIC_KEY_MAX_BYTES))
    if b"PRIVATE KEY" in data:
        raise _no_public_key("it is a private key, which nobody but its owner should have", "Send its public half.")
    try:
        public_key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise _no_public_key("it is none in PEM", "Send what `openssl pkey -in KEY -pubout` writes.") from None
    if not isinstance(public_key, rsa.RSAPublicKey) or public_key.key_size not in ta.KEY_BITS:
        raise _no_public_key("it is none of RSA with 2048 to 4096 bits", "Make such a key: OP-TEE takes no other.")
    scheme = _SCHEMES[form.method or "RSA-PSS"]
    return Subkey(uuid, form.name_size, form.subkey_version, form.max_depth, scheme, public_key)


async def _signed_subkey(subkey: Subkey, key: SigningKey, chain: Chain | None, name: bytes) -> Signed:
    """A subkey's file: the chain that it is put below, and the subkey, signed. It is parsed anew and verified."""
    public_key = rsa_key(key)
    if chain is not None:
        check_chain(chain, public_key)
        check_name(chain, name, subkey.uuid, "The subkey")
        if subkey.max_depth >= chain.last.max_depth:
            raise ArtifactRejected(
                f"max-depth is {subkey.max_depth}, and below the chain it must be less than {chain.last.max_depth}.",
                "Send a smaller max-depth, or sign by a subkey that allows more.",
            )
        if len(chain.links) == ta.SUBKEYS_MAX:
            raise _no_chain(f"it has {ta.SUBKEYS_MAX} subkeys already")
    image = subkey.image()
    header = Header(Kind.SUBKEY, len(image), subkey.scheme, (public_key.key_size + 7) // 8)
    digest = ta.digest(header, b"", image)
    signed = SignedHeader(header, digest, await key.sign(header.scheme, digest))
    links = (*(chain.links if chain else ()), Link(signed, image, subkey, name))
    answer = Chain(links).encode()
    try:
        found = ta.parse_chain(answer)
        found.check()
    except TaError as error:
        raise unsound(error) from None
    if found != Chain(links):
        raise unsound("it is another chain of subkeys")
    signed.verify(public_key)
    return Signed((answer,), f"{subkey.uuid}.bin")


def _no_chain(fault: str) -> ArtifactRejected:
    return ArtifactRejected(
        f"`subkey` is no chain of subkeys: {fault}.", "Send the file that came when the last subkey was signed."
    )


def _no_public_key(fault: str, hint: str) -> ArtifactRejected:
    return ArtifactRejected(f"The artifact is no public key of a subkey: {fault}.", hint)
