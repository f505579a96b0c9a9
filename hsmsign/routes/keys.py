"""`/keys`: what is granted, and signing a bare digest with a key that is granted for it."""

import base64
import ssl
from typing import Annotated, Literal

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from quart import Blueprint, Response
from quart_schema import document_request, document_response, tag

from hsmsign import log
from hsmsign.asgi import Request, current_request
from hsmsign.jobs import Job, Jobs
from hsmsign.keyring import Keyring, KeyState, Verdict
from hsmsign.openapi import problems
from hsmsign.problems import (
    ErrorDocument,
    UnsupportedMediaType,
    describe,
    invalid_fields,
)
from hsmsign.routes import as_json
from hsmsign.settings import Grant, LimitSettings
from hsmsign.uploads import Limited
from tokens.attestation import Attested, Origin
from tokens.errors import KeyNotAttested, KeyNotFound, KeyNotGranted
from tokens.provider import spki_sha256
from tokens.schemes import Ecdsa, Hash, RsaPkcs1v15, RsaPss, Scheme
from tokens.verify import ecdsa_der


class KeySummary(BaseModel):
    """A granted key."""

    name: str = Field(description="The grant's name.")
    signer: str
    role: str
    machine: str = Field(description="Machines that it is for; `*` and `?` match as in file names.")
    distro: str = Field(description="Distros that it is for; `*` and `?` match as in file names.")
    provider: str
    kind: str = Field(description="Kind of the provider: `file`, `s3`, `pkcs11`, `yubihsm`.")
    digest: bool = Field(description="Whether it may sign bare digests.")
    algorithm: str | None = Field(description="`RSA-2048`, `P-256`, `Ed25519`, `AES-256`, ...")
    spki_sha256: str | None = Field(
        description="SHA-256 of the DER SubjectPublicKeyInfo, in hex; null for a symmetric key."
    )
    usable: bool | None = Field(
        description="Whether it can be used now; null where the object depends on the machine or distro of a request."
    )
    error: ErrorDocument | None = Field(description="Why it cannot be used.")


class KeyDetail(KeySummary):
    """A granted key with its public half."""

    public_key_pem: str | None
    certificate_pem: str | None


class KeyList(BaseModel):
    """Every granted key."""

    keys: list[KeySummary]


class AttestedKey(BaseModel):
    """What the device says of the key."""

    serial: int = Field(description="The device's serial number.")
    firmware: str = Field(description="The device's version.")
    id: str = Field(description="The object's id, in hex.")
    label: str = Field(description="The object's label.")
    origin: Origin = Field(description="`wrapped`: it came from elsewhere, under a wrap key.")
    domains: list[int] = Field(description="1 to 16.")
    capabilities: list[str]
    exportable: bool = Field(description="Whether it may leave the device under a wrap key.")
    never_extractable: bool = Field(
        description="Generated on the device and not exportable: `attested = true` asks it."
    )


class KeyAttestation(BaseModel):
    """The attestation of a granted key by its device."""

    name: str = Field(description="The grant's name.")
    public_key_pem: str = Field(description="The granted key, which the attestation must be for.")
    spki_sha256: str = Field(description="SHA-256 of its DER SubjectPublicKeyInfo, in hex.")
    certificate_pem: str = Field(description="The attestation: a certificate for the key, made by the device.")
    chain_pem: str = Field(
        description="Its issuers, the device's own certificate first. Verified: the pinned one last; else what the "
        "device has."
    )
    verified: bool = Field(description="Whether it leads to a pinned certificate, and is for this key and device.")
    attested: AttestedKey | None = Field(description="What it says; null where it is not verified.")
    error: ErrorDocument | None = Field(description="Why it is not verified.")


class DigestRequest(BaseModel):
    """A digest to be signed."""

    model_config = ConfigDict(extra="forbid")

    digest: Annotated[str, Field(pattern=r"\A([0-9a-fA-F]{2})+\z", description="The digest in hex.")]
    hash: Hash = Field(description="The function that made it.")
    scheme: Literal["rsa-pkcs1v15", "rsa-pss", "ecdsa"]
    salt_length: int | None = Field(
        None, ge=0, description="Of `rsa-pss`, in bytes; as long as the digest where it is not given."
    )

    def to_scheme(self) -> Scheme:
        """The scheme as the keys know it."""
        match self.scheme:
            case "rsa-pkcs1v15":
                return RsaPkcs1v15(self.hash)
            case "rsa-pss":
                return RsaPss(self.hash, self.hash.size if self.salt_length is None else self.salt_length)
            case "ecdsa":
                return Ecdsa(self.hash)


class DigestSignature(BaseModel):
    """The signature of a digest."""

    key: str
    scheme: str
    hash: Hash
    signature: str = Field(description="Base64. RSA: as long as the modulus; ECDSA: DER (RFC 3279, section 2.2.3).")


def blueprint(jobs: Jobs, keyring: Keyring, limits: LimitSettings) -> Blueprint:
    """The endpoints below `/keys`."""
    blueprint = Blueprint("keys", __name__)
    grants = {grant.name: grant for grant in keyring.grants}

    @blueprint.get("/keys")
    @document_response(KeyList)
    @tag(["keys"])
    async def list_keys() -> Response:
        """Lists the granted keys and whether each can be used now."""
        readiness = await keyring.readiness()
        return as_json(KeyList(keys=[summarise(key) for key in readiness.keys]))

    @blueprint.get("/keys/<name>")
    @document_response(KeyDetail)
    @problems(404)
    @tag(["keys"])
    async def get_key(name: str) -> Response:
        """Describes a granted key, with its public key and certificate."""
        state = await keyring.describe(_find(grants, name))
        return as_json(
            KeyDetail(
                **dict(summarise(state)), public_key_pem=state.public_key_pem, certificate_pem=state.certificate_pem
            )
        )

    @blueprint.get("/keys/<name>/attestation")
    @document_response(KeyAttestation)
    @problems(404, 409, 422, 500, 502, 503, 504)
    @tag(["keys"])
    async def get_attestation(name: str) -> Response:
        """Has the device of a granted key attest it, and says whether that is proven."""
        return as_json(_told(name, await keyring.attest(name)))

    @blueprint.post("/keys/<name>/sign")
    @document_request(DigestRequest)
    @document_response(DigestSignature)
    @problems(400, 403, 404, 408, 409, 413, 415, 422, 423, 500, 502, 503, 504)
    @tag(["keys"])
    async def sign_digest(name: str) -> Response:
        """Signs a digest with a key that is granted for it (`digest = true`)."""
        grant = _find(grants, name)
        log.note(signer="digest", key=name)
        if not grant.digest:
            raise KeyNotGranted(
                f"The key {name} is not granted for bare digests.", "Set digest = true in the key's grant."
            )
        asked = await _read(current_request(), limits)

        async def work(job: Job[DigestSignature]) -> DigestSignature:
            return await job.limited(_sign(keyring, name, asked))

        job = jobs.start(work)
        current_request().at_end(job.release)
        return as_json(await job.result())

    return blueprint


def summarise(state: KeyState) -> KeySummary:
    """What is shown of a key."""
    return KeySummary(
        name=state.name,
        signer=state.signer,
        role=state.role,
        machine=state.machine,
        distro=state.distro,
        provider=state.provider,
        kind=state.kind,
        digest=state.digest,
        algorithm=state.algorithm,
        spki_sha256=state.spki_sha256,
        usable=state.usable,
        error=describe(state.error) if state.error else None,
    )


def _told(name: str, verdict: Verdict) -> KeyAttestation:
    given, outcome = verdict.attestation, verdict.outcome
    if isinstance(outcome, KeyNotAttested):
        issuers, attested, error = given.issuers, None, describe(outcome)
    else:
        issuers, attested, error = tuple(map(_der, outcome.chain[1:])), _said(outcome), None
    return KeyAttestation(
        name=name,
        public_key_pem=verdict.public_key.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ).decode(),
        spki_sha256=spki_sha256(verdict.public_key),
        certificate_pem=ssl.DER_cert_to_PEM_cert(given.certificate),
        chain_pem="".join(map(ssl.DER_cert_to_PEM_cert, issuers)),
        verified=error is None,
        attested=attested,
        error=error,
    )


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _said(attested: Attested) -> AttestedKey:
    return AttestedKey(
        serial=attested.serial,
        firmware=attested.firmware,
        id=f"{attested.id:04x}",
        label=attested.label,
        origin=attested.origin,
        domains=list(attested.domains),
        capabilities=list(attested.capabilities),
        exportable=attested.exportable,
        never_extractable=attested.never_extractable,
    )


def _find(grants: dict[str, Grant], name: str) -> Grant:
    if name not in grants:
        raise KeyNotFound("No granted key has this name.", "GET /keys lists the keys.")
    return grants[name]


async def _read(request: Request, limits: LimitSettings) -> DigestRequest:
    if request.mimetype != "application/json":
        raise UnsupportedMediaType("The body is not application/json.", "Send JSON, and say so in Content-Type.")
    body = bytearray()
    async for chunk in Limited(request.body, limits.json_max_bytes, limits):
        body += chunk
    try:
        return DigestRequest.model_validate_json(bytes(body))
    except ValidationError as error:
        raise invalid_fields(error) from None


async def _sign(keyring: Keyring, name: str, asked: DigestRequest) -> DigestSignature:
    async with keyring.open_grant(name) as key:
        signature = await key.sign(asked.to_scheme(), bytes.fromhex(asked.digest))
        if isinstance(key.public_key, ec.EllipticCurvePublicKey):
            signature = ecdsa_der(signature, key.public_key)
    return DigestSignature(
        key=name, scheme=asked.scheme, hash=asked.hash, signature=base64.b64encode(signature).decode()
    )
