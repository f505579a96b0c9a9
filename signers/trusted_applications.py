"""Trusted Applications (TAs) of OP-TEE's, in a tree of files or a single one: found, signed and put back.

    tas = await read(form.artifact, job)
    async with job.keys.open("key", machine=form.machine) as key:
        return await tas.sign(Signing(key), job)

What their files hold is in `formats/ta.py`. Images stay where they are, and are read three times: to be hashed, to be
verified, and to be sent.
"""

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric import rsa

from signers import archives
from signers.archives import Archive, ArchiveLimits, Compression, Part, Pieces, Scratch
from signers.formats import ta, tar
from signers.formats.ta import Chain, Encryption, Header, SignedHeader, Ta, TaError, TaScheme
from signers.signer import FileRange, Job, Signed, Upload, read_through, unsound
from tokens import gcm
from tokens.errors import ArtifactRejected, KeyUnsuited
from tokens.provider import SigningKey, SymmetricKey
from tokens.verify import check_suited

TAS_MAX = 1024
"""The most TAs in an archive: what stands before their images is in memory."""

TEXT_MAX_BYTES = 1024
"""The most that a file beside a TA may hold, which says its UUID, version or name."""

ENCRYPTED_MAX_BYTES = 16 * 1024 * 1024
"""The largest TA that is encrypted or decrypted: it is in memory then, here as in OP-TEE."""

ENCRYPTED_SUM_MAX_BYTES = 64 * 1024 * 1024
"""The most that all of a request's TAs may have that are encrypted or decrypted: that is done at a few MB/s."""

_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_VERSION = re.compile(r"0[xX][0-9a-fA-F]{1,8}|0|[1-9][0-9]{0,9}")
_IMAGE = re.compile(r"(.+)\.stripped\.(?:elf|so)", re.DOTALL)
_BESIDE = (".uuid", ".ta-version", ".ta-name")


@dataclass(frozen=True, slots=True)
class Unsigned:
    """A TA as it came.

    Arguments:
        source, output: what its file is called, and what the signed one is to be called; paths in a tree.
        ta: what its file says of it.
        image: its ELF file, encrypted where `ta` says so.
        name: what it is called below the last subkey; None: nothing says it.
        chain: the subkeys that it was below.
        signed: the header that it had, if it was signed already.
    """

    source: bytes
    output: bytes
    ta: Ta
    image: FileRange
    name: bytes | None = None
    chain: Chain | None = None
    signed: SignedHeader | None = None


@dataclass(frozen=True, slots=True)
class _Planned:
    """A TA as it is to be.

    Arguments:
        ta: what its file will say of it.
        chain, name: the subkeys that will stand before it, and what it is called below them.
        header, digest: what is signed.
        image: its ELF file, encrypted where `ta` says so.
    """

    ta: Ta
    chain: Chain | None
    name: bytes
    header: Header
    digest: bytes
    image: FileRange

    def parts(self, signature: bytes) -> tuple[Part, ...]:
        """The signed TA's file."""
        before = self.chain.before(self.name) if self.chain else b""
        return (before + SignedHeader(self.header, self.digest, signature).encode() + self.ta.fields, self.image)


@dataclass(frozen=True, slots=True)
class Signing:
    """How TAs are signed with a key.

    Arguments:
        key: the root key, or that of the last subkey.
        scheme: None keeps that of a TA that was signed already; for others it is PSS.
        chain: the subkeys that stand before each; None keeps those that there are.
        name: what a TA is called below the chain, where nothing else says it.
        encryption_key: AES-256; needed for TAs that are encrypted, or are to be.
        class_wide: TAs that are not encrypted will be, and say this of the key; None: they will not.

    Raises KeyUnsuited where OP-TEE takes no signature of the key, ArtifactRejected where the chain is not sound.
    """

    key: SigningKey
    scheme: TaScheme | None = None
    chain: Chain | None = None
    name: bytes = b""
    encryption_key: SymmetricKey | None = None
    class_wide: bool | None = None

    def __post_init__(self) -> None:
        public_key = rsa_key(self.key)
        if self.chain is not None:
            check_chain(self.chain, public_key)

    @property
    def encrypts(self) -> bool:
        """Whether TAs that are not encrypted will be."""
        return self.class_wide is not None

    async def plan(self, unsigned: Unsigned, scratch: Scratch, job: Job) -> _Planned:
        """Says what is to be signed. Raises ArtifactRejected where OP-TEE would refuse it."""
        chain, name = await job.run(self._place, unsigned)
        ta_, image = unsigned.ta, unsigned.image
        plain: Part = image
        if ta_.encryption is not None:
            plain = await self._decrypted(unsigned, ta_.encryption, job)
        elif self.class_wide is not None:
            ta_, image = await self._encrypted(unsigned, self.class_wide, scratch, job)
        scheme = self.scheme or (unsigned.signed.header.scheme if unsigned.signed else ta.PSS)
        header = Header(ta_.kind, image.length, scheme, (rsa_key(self.key).key_size + 7) // 8)
        starts = [header.encode() + ta_.fields]
        if unsigned.signed is not None:
            starts.append(unsigned.signed.header.encode() + unsigned.ta.fields)
        digest, *before = await job.run(_hashed, (plain,), *starts)
        if unsigned.signed is not None and before != [unsigned.signed.digest]:
            raise _rejected(unsigned.source, "it has another hash than it says: it is damaged")
        return _Planned(ta_, chain, name, header, digest, image)

    async def sign(self, planned: _Planned) -> tuple[Part, ...]:
        """The signed TA's file. Raises what `SigningKey.sign` raises."""
        return planned.parts(await self.key.sign(planned.header.scheme, planned.digest))

    async def verify(self, planned: _Planned, parts: tuple[Part, ...], job: Job) -> None:
        """Parses a signed TA's file anew. Raises SignatureMismatch where it is not the planned one."""
        pieces = Pieces(parts)
        try:
            found = ta.parse(pieces.read_at, pieces.size)
        except TaError as error:
            raise unsound(error) from None
        if (found.chain, found.name, found.ta) != (planned.chain, planned.name, planned.ta):
            raise unsound("a TA is another than it was, or has other subkeys before it")
        size = planned.header.image_size
        image = pieces.cut(pieces.size - size, size)
        if found.ta.encryption is not None and self.encryption_key is not None:
            try:
                image = (await _decrypted(self.encryption_key, found.ta.encryption, image, job),)
            except gcm.NotAuthentic:
                raise unsound("a TA cannot be decrypted") from None
        digest = await job.run(_hashed, image, found.signed.header.encode() + found.ta.fields)
        if found.signed.header != planned.header or digest != [found.signed.digest]:
            raise unsound("a TA has another header or hash than was signed")
        found.signed.verify(rsa_key(self.key))

    def _place(self, unsigned: Unsigned) -> tuple[Chain | None, bytes]:
        """The subkeys that a TA is put below, and its name there. Raises ArtifactRejected where it cannot be."""
        chain = self.chain or unsigned.chain
        if chain is None:
            if unsigned.name is not None:
                raise _rejected(unsigned.source, "a name below a subkey is beside it, and it is below none")
            return None, b""
        if self.chain is None:
            check_chain(chain, rsa_key(self.key))
        if unsigned.ta.uuid is None:
            raise _rejected(unsigned.source, "it has no UUID in its header, and so can be below no subkey")
        name = self.name if unsigned.name is None else unsigned.name
        check_name(chain, name, unsigned.ta.uuid, archives.shown(unsigned.source))
        return chain, name

    async def _encrypted(
        self, unsigned: Unsigned, class_wide: bool, scratch: Scratch, job: Job
    ) -> tuple[Ta, FileRange]:
        """What the TA's file says of it once it is encrypted, and that image."""
        if unsigned.ta.uuid is None:
            raise _rejected(unsigned.source, "it has no UUID in its header, and so cannot be encrypted")
        key, nonce = self._key_for(unsigned), secrets.token_bytes(ta.NONCE_BYTES)
        stream = await gcm.key_stream(key, nonce, unsigned.image.length)
        ciphertext, tag = await job.run(lambda: stream.encrypt(_joined((unsigned.image,))))
        upload = await job.run(scratch.write, (ciphertext,))
        encrypted = replace(unsigned.ta, encryption=Encryption(class_wide, nonce, tag))
        return encrypted, upload.whole

    async def _decrypted(self, unsigned: Unsigned, encryption: Encryption, job: Job) -> bytes:
        """The image of a TA that came encrypted."""
        try:
            plain = await _decrypted(self._key_for(unsigned), encryption, (unsigned.image,), job)
        except gcm.NotAuthentic:
            raise _rejected(
                unsigned.source, "it is encrypted by another key than the granted one, or damaged"
            ) from None
        _check_elf(unsigned.source, plain)
        return plain

    def _key_for(self, unsigned: Unsigned) -> SymmetricKey:
        if self.encryption_key is None:
            raise _rejected(unsigned.source, "it is encrypted, and what is signed is what it was before")
        if unsigned.image.length > ENCRYPTED_MAX_BYTES:
            raise _rejected(unsigned.source, f"it has more than {ENCRYPTED_MAX_BYTES} bytes, and is encrypted")
        return self.encryption_key


@dataclass(frozen=True, slots=True)
class TrustedApplications:
    """TAs as they came: a tree of them, or a single one; compressed, or not."""

    content: "_Tree | _Single"
    compression: Compression | None
    scratch: Scratch

    @property
    def encrypted(self) -> bool:
        """Whether one of them is."""
        return any(each.ta.encryption for each in self.content.tas)

    async def sign(self, signing: Signing, job: Job) -> Signed:
        """All of them, signed, in the form that they came in.

        In a tree a file NAME.stripped.elf or NAME.stripped.so becomes UUID.ta, and the files beside it that say its
        UUID, version and name are left out. A UUID.ta keeps what it says of itself.

        Raises ArtifactRejected, SignatureMismatch, and what the keys raise.
        """
        ciphered = sum(each.image.length for each in self.content.tas if each.ta.encryption or signing.encrypts)
        if ciphered > ENCRYPTED_SUM_MAX_BYTES:
            raise archives.rejected(f"it has more than {ENCRYPTED_SUM_MAX_BYTES} bytes of encrypted TAs")
        planned = {each.source: await signing.plan(each, self.scratch, job) for each in self.content.tas}
        files = {source: await signing.sign(each) for source, each in planned.items()}
        signed, found = await job.run(self.content.signed, files)
        for source, each in planned.items():
            await signing.verify(each, found[source], job)
        return signed if self.compression is None else await job.run(self.scratch.compressed, signed, self.compression)


async def read(artifact: Upload, job: Job) -> TrustedApplications:
    """Finds the TAs in an upload. Raises ArtifactRejected."""
    return await job.run(_read, artifact, Scratch(job.directory(), job.settings or ArchiveLimits()))


def rsa_key(key: SigningKey) -> rsa.RSAPublicKey:
    """The public half of a key that OP-TEE takes signatures of. Raises KeyUnsuited."""
    public_key = key.public_key
    check_suited(public_key, ta.PSS)
    if not isinstance(public_key, rsa.RSAPublicKey) or public_key.key_size not in ta.KEY_BITS:
        raise KeyUnsuited("OP-TEE verifies by RSA keys of 2048 to 4096 bits, and this is another.", "Grant such a key.")
    return public_key


def check_chain(chain: Chain, public_key: rsa.RSAPublicKey) -> None:
    """Raises ArtifactRejected where what this key signs can stand behind no such chain."""
    try:
        chain.check()
    except TaError as error:
        raise ArtifactRejected(
            f"The chain of subkeys is not sound: {error}.", "Send the file that came when the last subkey was signed."
        ) from None
    if chain.last.public_key != public_key:
        raise ArtifactRejected(
            f"The subkey {chain.last.uuid} is of another key than the granted one.",
            "Name the machine whose key the last subkey is of, or send that key's chain as `subkey`.",
        )


def check_name(chain: Chain, name: bytes, uuid: UUID, what: str) -> None:
    """Raises ArtifactRejected where what has this UUID cannot have this name below the chain."""
    try:
        expected = chain.last.uuid_below(name)
    except TaError as error:
        raise ArtifactRejected(f"{what} cannot be called so: {error}.", "Choose a shorter name.") from None
    if expected != uuid:
        raise ArtifactRejected(
            f"{what} has the UUID {uuid}; with its name below the subkey {chain.last.uuid} it must have {expected}.",
            "Build it with that UUID, or give the name that its own UUID was made of.",
        )


def _hashed(image: tuple[Part, ...], *starts: bytes) -> list[bytes]:
    """SHA-256 of an image behind each of the starts; it is read once."""
    digests = [hashlib.sha256(start) for start in starts]
    for chunk in read_through(image, archives.CHUNK_BYTES):
        for digest in digests:
            digest.update(chunk)
    return [digest.digest() for digest in digests]


async def _decrypted(key: SymmetricKey, encryption: Encryption, image: tuple[Part, ...], job: Job) -> bytes:
    """An image as it was before encryption. Raises `gcm.NotAuthentic`."""
    ciphertext = await job.run(_joined, image)
    stream = await gcm.key_stream(key, encryption.nonce, len(ciphertext))
    return await job.run(stream.decrypt, ciphertext, encryption.tag)


def _joined(image: tuple[Part, ...]) -> bytes:
    return b"".join(read_through(image, archives.CHUNK_BYTES))


@dataclass(frozen=True, slots=True)
class _Single:
    """One TA."""

    ta: Unsigned
    filename: str

    @property
    def tas(self) -> Sequence[Unsigned]:
        """The one."""
        return (self.ta,)

    def signed(self, files: Mapping[bytes, tuple[Part, ...]]) -> tuple[Signed, Mapping[bytes, tuple[Part, ...]]]:
        """The answer, and the signed TA in it."""
        return Signed(files[self.ta.source], self.filename), files


@dataclass(frozen=True, slots=True)
class _Tree:
    """A tar archive with TAs in it; `without` are the members that the signed one has no longer."""

    archive: Archive
    tas: Sequence[Unsigned]
    without: frozenset[bytes]
    filename: str
    limits: ArchiveLimits

    def signed(self, files: Mapping[bytes, tuple[Part, ...]]) -> tuple[Signed, Mapping[bytes, tuple[Part, ...]]]:
        """The archive with the signed TAs, and where they are in it when it is parsed anew.

        Raises SignatureMismatch, and ArtifactRejected where other members are in the way of the TAs' names.
        """
        names = {each.source: each.output for each in self.tas}
        signed = self.archive.replaced(files, self.filename, names=names, without=self.without)
        pieces = Pieces(signed.parts)
        members = archives.members(pieces.read_at, pieces.size, self.limits)
        came = [member for member in self.archive.members if member.name not in self.without]
        if [(each.name, each.kind, each.link) for each in members] != [
            (names.get(each.name, each.name), each.kind, each.link) for each in came
        ]:
            raise unsound("its members are not those that it should have")
        found: dict[bytes, tuple[Part, ...]] = {}
        for member, before in zip(members, came, strict=True):
            content = pieces.cut(member.data_offset, member.size)
            if before.name in files:
                found[before.name] = content
            elif content != ((self.archive.content(before),) if before.size else ()):
                raise unsound(f"{archives.shown(member.name)} is not what it should be")
        return signed, found


def _read(upload: Upload, scratch: Scratch) -> TrustedApplications:
    filename = upload.basename
    upload, compression = scratch.plain(upload)
    if not tar.is_tar(upload.read(0, tar.BLOCK_BYTES)):
        single = _signed_before(filename.encode(errors="replace"), upload.whole)
        return TrustedApplications(_Single(single, filename), compression, scratch)
    archive = archives.read(upload, scratch.limits)
    tas, without = _found(archive)
    if not tas:
        raise ArtifactRejected(
            "The archive holds no TA.", "Send the tree that OP-TEE's build makes: UUID.stripped.elf files, or UUID.ta."
        )
    tree = _Tree(archive, tas, frozenset(without), filename, scratch.limits)
    return TrustedApplications(tree, compression, scratch)


def _found(archive: Archive) -> tuple[list[Unsigned], set[bytes]]:
    """The TAs of an archive, and the names of the members that are needless once they are signed."""
    directories: dict[bytes, dict[str, tar.Member]] = {}
    for member in archive.members:
        directory, _, filename = _path(member.name).rpartition(b"/")
        if member.kind == tar.REGULAR:
            directories.setdefault(directory, {})[filename.decode(errors="surrogateescape")] = member
        elif member.kind == tar.HARD_LINK and filename.endswith((b".stripped.elf", b".stripped.so", b".ta")):
            # whether it is signed would depend on which of its names one looks at
            raise archives.rejected(f"the TA {archives.shown(member.name)} is a hard link")
    tas: list[Unsigned] = []
    without: set[bytes] = set()
    for files in directories.values():
        found, needless = _Directory(archive, files).found()
        tas += found
        if len(tas) > TAS_MAX:
            raise archives.rejected(f"it has more than {TAS_MAX} TAs")
        without |= needless
    return tas, without


class _Directory:
    """The files of one directory of an archive, by their names."""

    def __init__(self, archive: Archive, files: Mapping[str, tar.Member]) -> None:
        self._archive = archive
        self._files = files

    def found(self) -> tuple[list[Unsigned], set[bytes]]:
        """The TAs, and the names of the members that are needless once they are signed."""
        tas: list[Unsigned] = []
        needless: set[str] = set()
        for filename, member in self._files.items():
            if image := _IMAGE.fullmatch(filename):
                stem = image[1] if _UUID.fullmatch(image[1]) else self._uuid_stem(member)
                uuid = self._uuid(member, stem)
                tas.append(self._built(member, uuid, stem))
                # where the TA is there too, signed, it is an older one
                needless.update((f"{uuid}.ta", *(f"{stem}{suffix}" for suffix in _BESIDE)))
        for filename, member in self._files.items():
            stem = filename.removesuffix(".ta")
            if stem != filename and filename not in needless:
                tas.append(self._signed(member, stem))
                needless.add(f"{stem}.ta-name")
        return tas, {self._files[filename].name for filename in needless if filename in self._files}

    def _uuid_stem(self, member: tar.Member) -> str:
        """What the directory's one .uuid file is called: that is how a shared library has its UUID."""
        stems = [name.removesuffix(".uuid") for name in self._files if name.endswith(".uuid")]
        if len(stems) != 1:
            raise _rejected(
                member.name,
                f"it is not called after a UUID, and beside it should be one .uuid file in place of {len(stems)}",
            )
        return stems[0]

    def _uuid(self, member: tar.Member, stem: str) -> str:
        """A TA's UUID, as it is spelt there."""
        text = self._text(f"{stem}.uuid") or stem
        if not _UUID.fullmatch(text) or (_UUID.fullmatch(stem) and text.lower() != stem.lower()):
            raise _rejected(member.name, "what says its UUID holds none, or another than it is called after")
        return text

    def _built(self, member: tar.Member, uuid: str, stem: str) -> Unsigned:
        """A TA that comes from the compiler."""
        version = self._text(f"{stem}.ta-version") or "0"
        number = int(version, 0) if _VERSION.fullmatch(version) else -1
        if not 0 <= number <= 0xFFFF_FFFF:
            raise _rejected(member.name, "its version is no number of 32 bits")
        image = self._archive.content(member)
        if image.length > ta.IMAGE_MAX_BYTES:
            raise _rejected(member.name, "it has more than 4 GiB")
        _check_elf(member.name, image.read(0, min(image.length, ta.ELF_HEAD_BYTES)))
        directory, slash, _ = member.name.rpartition(b"/")
        output = directory + slash + f"{uuid}.ta".encode()
        return Unsigned(member.name, output, Ta(UUID(uuid), number), image, self._name(stem))

    def _signed(self, member: tar.Member, stem: str) -> Unsigned:
        """A TA that was signed before."""
        unsigned = _signed_before(member.name, self._archive.content(member), self._name(stem))
        if _UUID.fullmatch(stem) and unsigned.ta.uuid not in (None, UUID(stem)):
            raise _rejected(member.name, f"it is the TA {unsigned.ta.uuid}: OP-TEE looks for it under that name")
        return unsigned

    def _name(self, stem: str) -> bytes | None:
        name = self._text(f"{stem}.ta-name")
        return None if name is None else name.encode()

    def _text(self, filename: str) -> str | None:
        """What a file says in one line; None: it is not there."""
        member = self._files.get(filename)
        if member is None:
            return None
        try:
            text = self._archive.content(member).read(0, min(member.size, TEXT_MAX_BYTES)).decode().strip()
        except UnicodeDecodeError:
            text = ""
        if not text or "\n" in text or member.size > TEXT_MAX_BYTES:
            raise _rejected(member.name, "it should hold one line of text")
        return text


def _signed_before(source: bytes, file: FileRange, name: bytes | None = None) -> Unsigned:
    """A TA that was signed before."""
    try:
        found = ta.parse(file.read, file.length)
    except TaError as error:
        raise _rejected(source, f"{error}") from None
    size = found.signed.header.image_size
    image = FileRange(file.file, file.offset + file.length - size, size)
    if found.ta.encryption is None:
        _check_elf(source, image.read(0, min(size, ta.ELF_HEAD_BYTES)))
    if name is None and found.chain is not None:
        name = found.name
    return Unsigned(source, source, found.ta, image, name, found.chain, found.signed)


def _check_elf(source: bytes, head: bytes) -> None:
    try:
        ta.check_elf(head)
    except TaError as error:
        raise _rejected(source, f"{error}") from None


def _path(name: bytes) -> bytes:
    """A name without what says nothing in it, as `signers.archives` compares them."""
    return b"/".join(part for part in name.split(b"/") if part not in (b"", b"."))


def _rejected(source: bytes, fault: str) -> ArtifactRejected:
    """The error for a TA that has this fault."""
    return ArtifactRejected(
        f"{archives.shown(source)} cannot be signed: {fault}.",
        "Send what OP-TEE's build makes: UUID.stripped.elf with UUID.ta-version beside it, or UUID.ta.",
    )
