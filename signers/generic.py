"""Signatures of any file, by OpenSSL itself: raw RSA and ECDSA, and detached CMS, with the key on loan.

OpenSSL reads, hashes and pads; the digest goes to the key through its pkcs11 engine. Whoever has the signature has one
over bytes that the client chose: so no key is for this signer until a grant names it, and then it is for no other.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field

from signers.certified import certificate_of, scheme_of
from signers.formats import cms
from signers.formats.reading import chunks
from signers.sandbox import Workspace
from signers.signer import Backend, Form, Job, Name, Role, Signed, Upload
from tokens.errors import ToolFailed
from tokens.lending import LentKey, Loan, LoanLimits, Via
from tokens.provider import SigningKey
from tokens.schemes import Ecdsa, Hash, RsaPkcs1v15, RsaPss, Scheme
from tokens.verify import check_suited, ecdsa_raw, verify

OPENSSL = "/usr/bin/openssl"

_TOKEN, _LABEL = "hsmsign", "key"
_URI = f"pkcs11:token={_TOKEN};object={_LABEL};type=private"

Method = Literal["RSA", "RSA-PSS", "ECDSA", "CMS"]


class GenericForm(Form):
    """The fields of `/sign/generic`."""

    machine: Annotated[Name, Field(description="The machine whose key signs.")]
    artifact: Annotated[Upload, Field(description="Any file; answered with its signature.")]
    method: Annotated[
        Method,
        Field(
            description="RSA: PKCS #1 v1.5. RSA-PSS: with a salt as long as the digest. ECDSA: in DER."
            " CMS: detached, needs a certificate."
        ),
    ] = "RSA"
    hash: Annotated[Literal["sha256", "sha384", "sha512"], Field(description="The hash function.")] = "sha256"
    backend: Annotated[Backend | None, Field(description="Prefer a key from a store (ssl) or on a token (pkcs11).")] = (
        None
    )
    key_uri: Annotated[
        str | None, Field(alias="key-uri", max_length=1024, description="RFC 7512 URI that the granted key must match.")
    ] = None


class Generic:
    """Signs any file by OpenSSL. Implements `signers.signer.Signer`."""

    name = "generic"
    path = "/sign/generic"
    summary = "Sign any file: raw RSA or ECDSA, or detached CMS."
    scope: Literal["machine", "distro"] = "machine"
    form = GenericForm
    roles = (Role("key", "Signs whatever a client sends."),)

    async def sign(self, form: GenericForm, job: Job) -> Signed:
        """See `Signer.sign`."""
        async with job.keys.open("key", machine=form.machine, backend=form.backend, key_uri=form.key_uri) as key:
            asked = _Asked(form.method, Hash(form.hash), key)
            signature = await _signed_by_openssl(form.artifact, asked, job)
            digest = await job.run(_digest, form.artifact, asked.hash)
            asked.verify(signature, digest)
        return Signed((signature,), "signature.p7s" if form.method == "CMS" else "signature.bin")


@dataclass(frozen=True, slots=True)
class _Asked:
    """A signature that is asked for. Raises KeyUnsuited, KeyUnusable or KeyMismatch where the key cannot make it."""

    method: Method
    hash: Hash
    key: SigningKey

    def __post_init__(self) -> None:
        check_suited(self.key.public_key, self.scheme)
        if self.method == "CMS":
            certificate_of(self.key)

    @property
    def scheme(self) -> Scheme:
        match self.method:
            case "RSA-PSS":
                return RsaPss(self.hash, self.hash.size)
            case "RSA":
                return RsaPkcs1v15(self.hash)
            case "ECDSA":
                return Ecdsa(self.hash)
            case "CMS":
                return scheme_of(self.key.public_key, self.hash)

    def arguments(self, workspace: Workspace) -> list[str]:
        """What openssl is told, but for the artifact and the output."""
        engine = ["-engine", "pkcs11", "-keyform", "engine"]
        if self.method == "CMS":
            chain = [each.public_bytes(serialization.Encoding.PEM) for each in self.key.certificates]
            certificates = ["-signer", workspace.put("signer.pem", chain[0])]
            if chain[1:]:
                certificates += ["-certfile", workspace.put("chain.pem", b"".join(chain[1:]))]
            form = ["-binary", "-nosmimecap", "-md", self.hash.value, "-outform", "DER"]
            return ["cms", "-sign", *form, *engine, "-inkey", _URI, *certificates]
        pss = ["-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest"]
        return ["dgst", f"-{self.hash}", *engine, "-sign", _URI, *(pss if self.method == "RSA-PSS" else ())]

    def verify(self, signature: bytes, digest: bytes) -> None:
        """Raises SignatureMismatch, or ToolFailed where it is no signature at all."""
        if self.method == "CMS":
            certificates = self.key.certificates
            message = replace(cms.described(signature, certificates[0]), embed=certificates)
            if message.scheme != self.scheme or message.attributes is None:
                raise _no_signature()
            cms.verify(signature, message, digest)
            return
        public_key = self.key.public_key
        if isinstance(public_key, ec.EllipticCurvePublicKey):
            try:
                signature = ecdsa_raw(signature, public_key)
            except ValueError:
                raise _no_signature() from None
        verify(public_key, self.scheme, digest, signature)


async def _signed_by_openssl(artifact: Upload, asked: _Asked, job: Job) -> bytes:
    lent = [LentKey(_LABEL, b"\x01", asked.key)]
    directory = job.directory()
    async with (
        Loan(directory / "loan", _TOKEN, lent, LoanLimits(signatures=1), job.lent) as loan,
        job.tools.open(directory) as workspace,
    ):
        workspace.lend(loan, Via.ENGINE)
        content = workspace.put("artifact", artifact.content)
        command: Sequence[str] = (OPENSSL, *asked.arguments(workspace))
        source = ("-in", content) if asked.method == "CMS" else (content,)
        done = await workspace.run(*command, "-out", "signature", *source)
        if done.status != 0:
            raise ToolFailed(
                "OpenSSL could not sign the artifact.", "Look for the request's id in the log: the key may have failed."
            )
        return workspace.result("signature").read_bytes()


def _digest(artifact: Upload, hash_: Hash) -> bytes:
    digest = hashlib.new(hash_.hashlib_name)
    for chunk in chunks(artifact.read, 0, artifact.size):
        digest.update(chunk)
    return digest.digest()


def _no_signature() -> ToolFailed:
    return ToolFailed(
        "What OpenSSL made is no such signature.", "Report this with the request id: it was not released."
    )
