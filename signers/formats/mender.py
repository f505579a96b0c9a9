"""Mender artifacts, versions 2 and 3: a tar archive of a manifest, its signature, a header and payloads.

Source: mender-artifact's Documentation/artifact-format-v3.md and -v2.md, and its reader (areader/reader.go,
artifact/checksum.go, artifact/signer.go) at 246c77f. The manifest holds a SHA-256 for every other file: for the header
as it is (compressed), and for each file within the payloads. The signature is over the manifest's bytes. What a reader
makes of the manifest before it verifies (it trims lines, and writes them anew) gives other bytes for what is not spelt
as mender-artifact spells it: that is refused here.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from signers.formats import tar

VERSION, MANIFEST, SIGNATURE, AUGMENT = b"version", b"manifest", b"manifest.sig", b"manifest-augment"

VERSIONS = (2, 3)

VERSION_MAX_BYTES = 1024
"""`version` has 31 bytes."""

MANIFEST_MAX_BYTES = 1024 * 1024
"""The manifest is parsed in memory; about ten thousand files have a place in it."""

SIGNATURE_MAX_BYTES = 16 * 1024
"""That of an RSA-16384 key has 2732 bytes in base64."""

_HEADER = re.compile(rb"header\.tar(\.gz|\.xz|\.zst)?")
_HEADER_AUGMENT = re.compile(rb"header-augment\.tar(\.gz|\.xz|\.zst)?")
_PAYLOAD = re.compile(rb"data/([0-9]{4})\.tar(\.gz|\.xz|\.zst)?")

# a digest, two spaces, a name: without spaces at its ends, and no two of them in a row
_WORD = rb"[^/\x00-\x20\x7f]+"
_LINE = re.compile(
    rb"([0-9a-f]{64})  (version|header(?:-augment)?\.tar(?:\.gz|\.xz|\.zst)?|data/[0-9]{4}/WORD(?: WORD)*)\n".replace(
        b"WORD", _WORD
    )
)


class MenderError(ValueError):
    """The bytes are no such artifact."""


@dataclass(frozen=True, slots=True)
class Compressed:
    """A tar archive in the artifact; `suffix` says how it is compressed: nothing, `.gz`, `.xz` or `.zst`."""

    member: tar.Member
    suffix: bytes


@dataclass(frozen=True, slots=True)
class Payload(Compressed):
    """Files for the device, which the manifest calls `data/NUMBER/NAME`; `number` has four digits."""

    number: bytes

    def entry(self, name: bytes) -> bytes:
        """What the manifest calls a file of the payload."""
        return b"data/" + self.number + b"/" + name


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything is in an artifact; `header_augment` is there where `augment` is."""

    version: tar.Member
    manifest: tar.Member
    signature: tar.Member | None
    augment: tar.Member | None
    header: Compressed
    header_augment: Compressed | None
    payloads: tuple[Payload, ...]


def layout(members: Iterable[tar.Member]) -> Layout:
    """The members of an artifact, in the one order that readers take. Raises MenderError."""
    taking = _Taking(iter(members))
    version = taking.one(VERSION, VERSION_MAX_BYTES)
    manifest = taking.one(MANIFEST, MANIFEST_MAX_BYTES)
    signature = taking.perhaps(SIGNATURE, SIGNATURE_MAX_BYTES)
    augment = taking.perhaps(AUGMENT, MANIFEST_MAX_BYTES)
    header = taking.compressed(_HEADER, "header.tar, .gz, .xz or .zst")
    header_augment = taking.compressed(_HEADER_AUGMENT, "header-augment.tar") if augment else None
    if header_augment is not None and header_augment.suffix != header.suffix:
        raise MenderError("header-augment.tar is compressed otherwise than header.tar")
    return Layout(version, manifest, signature, augment, header, header_augment, tuple(taking.payloads()))


class _Taking:
    """Takes the members one by one."""

    def __init__(self, members: Iterator[tar.Member]) -> None:
        self._members = members
        self._next = next(members, None)

    def one(self, name: bytes, max_bytes: int) -> tar.Member:
        if self._next is None or self._next.name != name:
            raise MenderError(f"{_found(self._next)} where {name.decode()} was expected")
        return self._take(self._next, max_bytes)

    def perhaps(self, name: bytes, max_bytes: int) -> tar.Member | None:
        return self._take(self._next, max_bytes) if self._next is not None and self._next.name == name else None

    def compressed(self, name: re.Pattern[bytes], expected: str) -> Compressed:
        member = self._next
        if member is None or (found := name.fullmatch(member.name)) is None:
            raise MenderError(f"{_found(member)} where {expected} was expected")
        return Compressed(self._take(member), found[1] or b"")

    def payloads(self) -> Iterator[Payload]:
        numbers = set()
        while (member := self._next) is not None:
            found = _PAYLOAD.fullmatch(member.name)
            if found is None or found[1] in numbers:
                raise MenderError(f"{_found(member)} where data/NNNN.tar, .gz, .xz or .zst was expected")
            numbers.add(found[1])
            yield Payload(self._take(member), found[2] or b"", found[1])

    def _take(self, taken: tar.Member, max_bytes: int = tar.SIZE_MAX_BYTES) -> tar.Member:
        if taken.kind != tar.REGULAR:
            raise MenderError(f"{_found(taken)} is no regular file")
        if taken.size > max_bytes:
            raise MenderError(f"{_found(taken)} has {taken.size} bytes; {max_bytes} are allowed")
        self._next = next(self._members, None)
        return taken


def _found(member: tar.Member | None) -> str:
    return "it ends" if member is None else shown(member.name)


def version(content: bytes) -> int:
    """The version of the format. Raises MenderError where it is none of VERSIONS."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        raise MenderError("its version is no JSON") from None
    number = told.get("version") if isinstance(told, dict) and told.get("format") == "mender" else None
    if type(number) is not int or number not in VERSIONS:
        raise MenderError("it is not of version 2 or 3 of Mender's format")
    return number


def manifest(content: bytes) -> dict[bytes, str]:
    """The SHA-256, in hex, of each file. Raises MenderError."""
    sums: dict[bytes, str] = {}
    at = 0
    while at < len(content):
        line = _LINE.match(content, at)
        if line is None:
            raise MenderError(f"a line of its manifest is not as sha256sum writes it (at byte {at})")
        if line[2] in sums:
            raise MenderError(f"its manifest has {shown(line[2])} twice")
        sums[line[2]] = line[1].decode()
        at = line.end()
    return sums


def augmented(sums: dict[bytes, str], content: bytes, version: int) -> dict[bytes, str]:
    """What a manifest says, and what `manifest-augment` adds to it.

    The latter is not signed: only the augmented header and files of payloads may stand there. Raises MenderError.
    """
    added = manifest(content)
    if version < 3:
        raise MenderError("only version 3 of the format has a manifest-augment")
    for name in added:
        if name in sums or not (name.startswith(b"data/") or _HEADER_AUGMENT.fullmatch(name)):
            raise MenderError(f"its manifest-augment names {shown(name)}, which the signature would not cover")
    return sums | added


def encode_signature(signature: bytes) -> bytes:
    """The content of `manifest.sig`: base64 (RFC 4648, section 4) of the raw signature, of ECDSA r || s."""
    return base64.b64encode(signature)


def decode_signature(content: bytes) -> bytes:
    """The raw signature in a `manifest.sig`. Raises MenderError."""
    try:
        return base64.b64decode(content.translate(None, b"\r\n"), validate=True)  # Go's decoder ignores these two
    except binascii.Error:
        raise MenderError("its signature is no base64") from None


def signature_member(content: bytes) -> bytes:
    """`manifest.sig` as a member of the archive (awriter/signer.go: mode 0644, no time)."""
    return tar.header(SIGNATURE, len(content)) + content + bytes(tar.padding(len(content)))


def shown(name: bytes) -> str:
    """A name from an artifact, fit for a message."""
    return repr(name[:100].decode(errors="replace"))
