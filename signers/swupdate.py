"""SWUpdate: signs a sw-description, or a whole .swu in place.

A device verifies sw-description.sig over the bytes of sw-description, and each file by the `sha256` that its entry
there carries. Facts about the device side are from SWUpdate's source at 8164b9b2 (2026.05); file names are its own.
"""

import hashlib
import json
import logging
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self, cast

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from pydantic import Field, model_validator

from signers.certified import message_by, scheme_of
from signers.formats import cms, cpio, libconfig
from signers.formats.reading import CHUNK_BYTES, ReadAt
from signers.signer import Backend, FileRange, Form, Job, Name, Role, Signed, Upload, read_through, unsound
from tokens.errors import ArtifactRejected
from tokens.provider import SigningKey
from tokens.schemes import Hash, RsaPss
from tokens.verify import check_suited, ecdsa_der, ecdsa_raw, verify

DESCRIPTION = "sw-description"
SIGNATURE = "sw-description.sig"

DESCRIPTION_MAX_BYTES = 1024 * 1024
"""It is parsed in memory, on the server and on the device; a hundred images and a Lua script take about 64 KiB."""

AT_ONCE_MAX_BYTES = 16 * 1024
"""A description of this size is parsed in 2 ms; the way to a thread and back would cost most of them more."""

PADDING_MAX_BYTES = 64 * 1024
"""What may follow an archive's trailer, all zeros: cpio fills a block, of 512 bytes unless it is told otherwise."""

PSS_SALT_BYTES = 32

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")

# What swupdate reads without installing a file from the archive (parser/parser.c)
_NOT_FILES = frozenset({"bootenv", "hardware-compatibility", "partitions", "properties", "uboot", "vars"})

_log = logging.getLogger(__name__)


class SwupdateForm(Form):
    """The fields of `/sign/swupdate`: exactly one of `sw-description` and `artifact`."""

    distro: Annotated[Name, Field(description="The distro whose key signs.")]
    sw_description: Annotated[
        Upload | None, Field(alias="sw-description", description="A description; answered with its signature.")
    ] = None
    artifact: Annotated[Upload | None, Field(description="A whole .swu; answered with the signed .swu.")] = None
    method: Annotated[
        Literal["RSA", "RSA-PSS", "CMS"],
        Field(description="RSA: PKCS #1 v1.5, or ECDSA with an EC key. CMS needs a certificate."),
    ] = "RSA"
    backend: Annotated[Backend | None, Field(description="Prefer a key from a store (ssl) or on a token (pkcs11).")] = (
        None
    )
    key_uri: Annotated[
        str | None, Field(alias="key-uri", max_length=1024, description="RFC 7512 URI that the granted key must match.")
    ] = None

    @model_validator(mode="after")
    def _one_file(self) -> Self:
        if (self.sw_description is None) == (self.artifact is None):
            raise ValueError("send one file: sw-description, or a whole .swu as artifact")
        return self


class Swupdate:
    """Signs for SWUpdate. Implements `signers.signer.Signer`."""

    name = "swupdate"
    path = "/sign/swupdate"
    summary = "Sign a SWUpdate sw-description, or a whole .swu in place."
    scope: Literal["machine", "distro"] = "distro"
    form = SwupdateForm
    roles = (
        Role("rsa", "Signs with method RSA (an EC key too) and RSA-PSS.", "swupdate/rsa-private.key"),
        Role("cms", "Signs with method CMS.", "swupdate/cms-private.key", "swupdate/cms.cert"),
    )

    async def sign(self, form: SwupdateForm, job: Job) -> Signed:
        """See `Signer.sign`."""
        bulk = form.artifact is not None or cast(Upload, form.sw_description).size > AT_ONCE_MAX_BYTES
        source = await job.run(_read_source, form) if bulk else _read_source(form)
        role = "cms" if form.method == "CMS" else "rsa"
        async with job.keys.open(role, distro=form.distro, backend=form.backend, key_uri=form.key_uri) as key:
            signing = _Cms(key) if form.method == "CMS" else _Raw(key, form.method)
            signed = source.with_signature(await signing.sign(source.description))
        if bulk:
            await job.run(source.verify, signed, signing)
        else:
            source.verify(signed, signing)
        return signed


class _Raw:
    """Methods RSA and RSA-PSS: the bare signature, as `openssl dgst -sign` writes it (an EC key's in DER)."""

    def __init__(self, key: SigningKey, method: Literal["RSA", "RSA-PSS"]) -> None:
        self._key = key
        self._scheme = RsaPss(Hash.SHA256, PSS_SALT_BYTES) if method == "RSA-PSS" else scheme_of(key.public_key)
        check_suited(key.public_key, self._scheme)

    async def sign(self, description: bytes) -> bytes:
        signature = await self._key.sign(self._scheme, _sha256(description))
        public_key = self._key.public_key
        return ecdsa_der(signature, public_key) if isinstance(public_key, ec.EllipticCurvePublicKey) else signature

    def verify(self, description: bytes, signature: bytes) -> None:
        public_key = self._key.public_key
        if isinstance(public_key, ec.EllipticCurvePublicKey):
            signature = ecdsa_raw(signature, public_key)
        verify(public_key, self._scheme, _sha256(description), signature)


class _Cms:
    """Method CMS: detached, with attributes and certificates, as `openssl cms -sign -binary -nosmimecap` writes it."""

    def __init__(self, key: SigningKey) -> None:
        self._key = key
        self._message = message_by(key)
        _warn_about(self._message.certificate)

    async def sign(self, description: bytes) -> bytes:
        digest = _sha256(description)
        signature = await self._key.sign(self._message.scheme, self._message.to_sign(digest))
        return self._message.assemble(digest, signature)

    def verify(self, description: bytes, signature: bytes) -> None:
        cms.verify(signature, self._message, _sha256(description))


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _warn_about(certificate: x509.Certificate) -> None:
    """Logs what only some devices refuse, and is signed.

    Whether a device minds an expired certificate or one for another purpose is settled when its swupdate is built
    (CONFIG_CMS_IGNORE_EXPIRED_CERTIFICATE, CONFIG_CMS_IGNORE_CERTIFICATE_PURPOSE;
    crypto/swupdate_cms_verify_openssl.c).
    """
    if not certificate.not_valid_before_utc <= datetime.now(UTC) <= certificate.not_valid_after_utc:
        _log.warning("swupdate: the CMS certificate is not valid now: devices that know the date refuse the update")
    if not _fit_for_updates(certificate):
        _log.warning("swupdate: the CMS certificate is neither for emailProtection nor for codeSigning")


def _fit_for_updates(certificate: x509.Certificate) -> bool:
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True
    return not {ExtendedKeyUsageOID.EMAIL_PROTECTION, ExtendedKeyUsageOID.CODE_SIGNING}.isdisjoint(usage)


def described_files(description: bytes) -> dict[str, str]:
    """The files that a description installs, with their SHA-256 in lower-case hex.

    Found are the entries with a `filename` wherever they stand: below a board, a software set, a mode, or in a list
    that only a `ref` leads to.

    Raises ArtifactRejected where it is not text that swupdate reads, or a file has no SHA-256: a device that verifies
    signatures refuses such an update (check_missing_hash in core/parser.c).
    """
    entries = list(_entries(_parsed(description)))
    unbound = sorted({str(each["filename"]) for each in entries if not _bound(each)})
    if unbound:
        raise ArtifactRejected(
            f"These files have no valid sha256 in the sw-description: {_listed(unbound)}.",
            'Give each entry with a filename its `sha256` (64 hex digits, "$swupdate_get_sha256(...)" replaced): '
            "nothing else binds a file to the signature, and a device would refuse the update.",
        )
    files: dict[str, str] = {}
    for each in entries:
        digest = str(each["sha256"]).lower()
        if files.setdefault(str(each["filename"]), digest) != digest:
            raise ArtifactRejected(
                f"The sw-description gives {_listed([str(each['filename'])])} two different sha256.",
                "Give different files different names.",
            )
    return files


def _parsed(description: bytes) -> Any:
    """The settings in a description: libconfig's format, or JSON, which libconfig's never resembles."""
    if not description:
        raise ArtifactRejected("The sw-description is empty.", "Check how the build makes it.")
    try:
        text = description.decode()
    except UnicodeDecodeError:
        raise ArtifactRejected(
            "The sw-description is not UTF-8 text.",
            "If it is encrypted: sign it first and encrypt it then, since a device decrypts before it verifies.",
        ) from None
    try:
        # swupdate tries libconfig first, then JSON (core/parser.c)
        settings = json.loads(text) if text.lstrip().startswith("{") else libconfig.parse(description)
    except (ValueError, RecursionError) as error:
        raise ArtifactRejected(
            f"The sw-description cannot be parsed: {error}.", "A device could not either: correct the description."
        ) from None
    if not settings:
        raise ArtifactRejected("The sw-description holds no settings.", "Check how the build makes it.")
    return settings


def _entries(settings: Any) -> Iterator[dict[str, Any]]:
    # a stack, since JSON may be nested deeper than Python calls
    waiting = [settings]
    while waiting:
        match waiting.pop():
            case dict() as group:
                if isinstance(group.get("filename"), str):
                    yield group
                waiting.extend(value for name, value in group.items() if name not in _NOT_FILES)
            case list() as elements:
                waiting.extend(elements)


def _bound(entry: dict[str, Any]) -> bool:
    digest = entry.get("sha256")
    # all zeros are "no hash" to swupdate (IsValidHash in core/util.c)
    return isinstance(digest, str) and _SHA256.fullmatch(digest) is not None and int(digest, 16) != 0


def _text(name: bytes) -> str:
    return name.decode(errors="replace")


def _listed(names: list[str]) -> str:
    """Names from the artifact, fit for a message."""
    shown = ", ".join(repr(name[:100]) for name in names[:20])
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


def _read_source(form: SwupdateForm) -> "_Description | _Archive":
    """What is to be signed, checked."""
    if form.artifact is not None:
        archive = _read_archive(form.artifact)
        archive.check_files()
        return archive
    # the form has exactly one of the two
    upload = cast(Upload, form.sw_description)
    if upload.size > DESCRIPTION_MAX_BYTES:
        raise _too_long(upload.size)
    description = upload.read(0, upload.size)
    described_files(description)
    return _Description(description)


def _too_long(size: int) -> ArtifactRejected:
    return ArtifactRejected(
        f"The sw-description has {size} bytes; {DESCRIPTION_MAX_BYTES} are allowed.",
        "Send a sw-description here, and a whole .swu as `artifact`.",
    )


@dataclass(frozen=True, slots=True)
class _Description:
    """A sw-description alone: answered with its signature."""

    description: bytes

    def with_signature(self, signature: bytes) -> Signed:
        return Signed((signature,), SIGNATURE)

    def verify(self, signed: Signed, signing: _Raw | _Cms) -> None:
        # a raw signature leaves as the key made and verified it
        if isinstance(signing, _Cms):
            signing.verify(self.description, signed.read(0, signed.size))


@dataclass(frozen=True, slots=True)
class _Archive:
    """A .swu on disk.

    Arguments:
        members: sw-description first, then the files; without sw-description.sig and the trailer.
        files_range: where in the file the members after the description and its signature stand.
    """

    upload: Upload
    description: bytes
    members: tuple[cpio.Member, ...]
    files_range: FileRange

    def check_files(self) -> None:
        """Raises ArtifactRejected where a described file is missing or another, or a member's checksum is wrong.

        Reads each file once, in pieces.
        """
        # JSON can spell what is no Unicode text; no file has such a name
        expected = {
            name.encode(errors="surrogatepass"): digest for name, digest in described_files(self.description).items()
        }
        missing = expected.keys() - {member.name for member in self.members}
        if missing:
            raise ArtifactRejected(
                f"The archive lacks files that its sw-description names: {_listed(sorted(map(_text, missing)))}.",
                "Add them to the archive, or drop their entries.",
            )
        for member in self.members:
            self._check_file(member, expected.get(member.name))

    def _check_file(self, member: cpio.Member, expected: str | None) -> None:
        if expected is None and member.magic != cpio.CRC:
            return
        sha256, checksum = hashlib.sha256(), 0
        content = FileRange(self.upload, member.data_offset, member.size)
        for chunk in read_through((content,), CHUNK_BYTES):
            sha256.update(chunk)
            if member.magic == cpio.CRC:
                checksum = cpio.checksum(chunk, checksum)
        name = _listed([_text(member.name)])
        if expected is not None and sha256.hexdigest() != expected:
            raise ArtifactRejected(
                f"The SHA-256 of {name} is {sha256.hexdigest()}; the sw-description says {expected}.",
                "Make the description anew from the files that go into the archive.",
            )
        if member.magic == cpio.CRC and checksum != member.checksum:
            raise ArtifactRejected(
                f"The checksum of {name} in the archive is wrong.", "Make the archive anew: a device would refuse it."
            )

    def with_signature(self, signature: bytes) -> Signed:
        """The archive with the signature as its second member (core/stream_interface.c reads it there)."""
        first = self.members[0]
        member = cpio.encode(first.magic, SIGNATURE.encode(), signature, mtime=first.mtime)
        head = FileRange(self.upload, 0, first.end)
        length = head.length + len(member) + self.files_range.length
        return Signed((head, member, self.files_range, cpio.trailer(first.magic, length)), _filename(self.upload))

    def verify(self, signed: Signed, signing: _Raw | _Cms) -> None:
        """Parses the finished archive anew: it holds what came, and a signature of the description.

        Raises SignatureMismatch.
        """
        try:
            description, signature, *files, _trailer = cpio.members(signed.read, signed.size)
        except ValueError as error:
            raise unsound(error, "archive") from None
        came = [(each.magic, each.name, each.size, each.checksum) for each in self.members]
        if [(each.magic, each.name, each.size, each.checksum) for each in (description, *files)] != came:
            raise unsound("its files are not those of the upload", "archive")
        if signature.name != SIGNATURE.encode():
            raise unsound("the signature is not its second member", "archive")
        signing.verify(
            signed.read(description.data_offset, description.size), signed.read(signature.data_offset, signature.size)
        )


def _read_archive(upload: Upload) -> _Archive:
    """Raises ArtifactRejected where the upload is no .swu that swupdate reads."""
    with upload.open() as file:

        def read_at(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        try:
            members = list(cpio.members(read_at, upload.size))
        except cpio.CpioError as error:
            raise _no_swu(f"{error}") from None
        trailer = members.pop()
        _check_members(members)
        _check_padding(read_at, trailer.end, upload.size)
        description = members.pop(0)
        if description.size > DESCRIPTION_MAX_BYTES:
            raise _too_long(description.size)
        # an old signature is dropped
        old = members.pop(0) if members and members[0].name == SIGNATURE.encode() else description
        if len(members) + 3 > cpio.MEMBERS_MAX:  # description, signature and trailer
            raise _no_swu(f"with its signature it would have more than {cpio.MEMBERS_MAX} members")
        files_range = FileRange(upload, old.end, trailer.offset - old.end)
        content = read_at(description.data_offset, description.size)
        return _Archive(upload, content, (description, *members), files_range)


def _check_members(members: list[cpio.Member]) -> None:
    names = [member.name for member in members]
    if not names or names[0] != DESCRIPTION.encode():
        raise _no_swu("its first member is not sw-description")
    if SIGNATURE.encode() in names[2:]:
        raise _no_swu("sw-description.sig is not its second member, where a device looks for it")
    if len(set(names)) != len(names):
        raise _no_swu("two of its members have the same name")
    # no file type at all: some tools write the permissions only
    if any(stat.S_IFMT(member.mode) not in (0, stat.S_IFREG) for member in members):
        raise _no_swu("it holds a link, directory or device: only plain files have a place in it")


def _check_padding(read_at: ReadAt, end: int, size: int) -> None:
    if size - end > PADDING_MAX_BYTES or any(read_at(end, PADDING_MAX_BYTES)):
        raise _no_swu("something other than padding follows its trailer")


def _no_swu(fault: str) -> ArtifactRejected:
    return ArtifactRejected(
        f"The artifact is not a .swu: {fault}.",
        "Make it with `cpio -o -H crc` (or newc) from plain files, sw-description first.",
    )


def _filename(upload: Upload) -> str:
    """The upload's own base name, of harmless characters only."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", upload.basename)[:128].lstrip(".") or "artifact.swu"
