"""What a client sends to have a Jetson's boot files signed: a tar archive of files, with what to do in MANIFEST.

NVIDIA's scripts run what is in there: they source `flashvars` and `bsp_version`, put values of MANIFEST into their
environment and into command lines that they evaluate. So names and values are accepted by rule, not refused by list.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from signers import archives
from signers.archives import ArchiveLimits, Scratch, compression_of
from signers.formats import tar
from signers.signer import FileRange, Upload
from tokens.errors import ArtifactRejected

TEXT_MAX_BYTES = 64 * 1024
"""The longest MANIFEST, flashvars or bsp_version."""

SPECS_MAX = 32
"""The most payloads in one request."""

SOURCED = ("flashvars", "bsp_version")
"""What the scripts source."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+@=-]*(?:/[A-Za-z0-9_][A-Za-z0-9._+@=-]*)*")
"""The name of a file that is taken, and given back."""

_FILE = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._+@-]*)?")
_FILES = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._+@,-]*)?")
_WORD = re.compile(r"[A-Za-z0-9._-]*")
_SKU = re.compile(r"[A-Za-z0-9.:_-]*")
_FLAG = re.compile(r"[A-Za-z0-9]*")
_SPECS = re.compile(r"[A-Za-z0-9.:_ =;-]*")

_ENVIRONMENT: Mapping[str, re.Pattern[str]] = {
    "BOARDID": _WORD, "FAB": _WORD, "BOARDSKU": _WORD, "BOARDREV": _WORD, "CHIPREV": _WORD, "CHIP_SKU": _SKU,
    "RAMCODE": _WORD, "fuselevel": _WORD, "localbootfile": _FILE, "CHIPID": _WORD,
}  # fmt: skip
_KEYS: Mapping[str, re.Pattern[str]] = {
    **_ENVIRONMENT,
    "DTBFILE": _FILE, "LNXFILE": _FILE, "EMMC_BCTS": _FILES, "ODMDATA": _FILES, "boardcfg": _FILE,
    "BUPGEN": _FLAG, "BUPGENSPECS": _SPECS, "SIGNFILES": _FLAG, "DIGSIG_MACHINE": _WORD,
}  # fmt: skip
_SETTINGS = {"chipsku": "CHIP_SKU", **{name.lower(): name for name in _ENVIRONMENT}}
"""What a spec of BUPGENSPECS sets, by how it calls it."""

# As in all of meta-tegra's, from dunfell to scarthgap. The scripts' own variables are lower-case, but for that one.
_ASSIGNMENT = re.compile(r"""([A-Z][A-Z0-9_]*|boardcfg_file)=(?:"([^"]*)"|'([^']*)'|([^\s;]*));?[ \t]*""")
_VALUE = re.compile(r"[A-Za-z0-9 \t._,:+/@%=-]*")
# what a shell, or a program started by it, obeys
_OBEYED = re.compile(
    r"PATH|CDPATH|IFS|ENV|HOME|SHELL|OPTARG|OPTIND|OPTERR|TMPDIR|POSIXLY_CORRECT|GLOBIGNORE|PROMPT_COMMAND|PS[0-4]"
    r"|(?:BASH|LD|PYTHON|PERL|DTC|GCC|GLIBC|MALLOC|LC|SHELLOPTS|EXECIGNORE|MACHINE).*"
)


@dataclass(frozen=True, slots=True)
class Payload:
    """One bootloader update payload: what its spec sets in the environment, and its type (`bl`, `kernel`)."""

    environment: Mapping[str, str]
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is to be done with the files.

    Arguments:
        values: by key, those that are not empty.
        payloads: the update payloads to make; empty: a full set for flashing, or signatures of each file.
        signs_files: whether each file gets a signature of its own.
    """

    values: Mapping[str, str]
    payloads: tuple[Payload, ...]
    signs_files: bool

    @property
    def environment(self) -> dict[str, str]:
        """What the scripts are to find in theirs."""
        return {name: value for name, value in self.values.items() if name in _ENVIRONMENT}


@dataclass(frozen=True, slots=True)
class Bundle:
    """The files by their names, and what is to be done with them."""

    files: Mapping[str, FileRange]
    manifest: Manifest

    @property
    def to_sign(self) -> list[str]:
        """The names of the files that get a signature of their own, where that is what is to be done."""
        return [name for name in self.files if name != "MANIFEST"]


def unpack(artifact: Upload, limits: ArchiveLimits, scratch: Scratch, tools: Collection[str]) -> Bundle:
    """Reads the archive; nothing is extracted.

    Arguments:
        artifact: a tar archive, plain or compressed.
        limits: what it may hold.
        scratch: where it is unpacked.
        tools: names of files and directories that are not a client's to send.

    Raises ArtifactRejected.
    """
    content = FileRange(artifact, 0, artifact.size)
    compression = compression_of(artifact.read(0, archives.HEAD_BYTES))
    archive = archives.read(scratch.unpack(content, compression) if compression else artifact, limits)
    files = {}
    for member in archive.members:
        name = member.name.decode("latin-1").removeprefix("./").rstrip("/")
        if member.kind not in (tar.REGULAR, tar.DIRECTORY):
            raise archives.rejected(f"it holds the link {archives.shown(member.name)}; pack it with tar --dereference")
        if member.kind == tar.DIRECTORY and name in ("", "."):
            continue
        if not NAME.fullmatch(name):
            raise archives.rejected(f"the name {archives.shown(member.name)} holds other characters than are usual")
        if name in tools or name.partition("/")[0] in tools:
            raise archives.rejected(f"{archives.shown(member.name)} is called as one of the signing tools")
        if member.kind == tar.REGULAR:
            files[name] = archive.content(member)
    for name in SOURCED:
        if name in files:
            _check_assignments(name, _text(name, files[name]))
    manifest = _text("MANIFEST", files["MANIFEST"]) if "MANIFEST" in files else ""
    return Bundle(files, parse_manifest(manifest))


def parse_manifest(text: str) -> Manifest:
    """Reads MANIFEST: a KEY=VALUE a line. Raises ArtifactRejected."""
    values: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        name, equals, value = line.partition("=")
        if not line.strip():
            continue
        pattern = _KEYS.get(name)
        if not equals or pattern is None:
            raise _manifest(f"line {number} sets none of the known keys")
        if not pattern.fullmatch(value):
            raise _manifest(f"the value of {name} holds characters that have no place in it")
        if name in values and values[name] != value:
            raise _manifest(f"{name} has two values")
        values[name] = value
    payloads = tuple(map(_payload, values.get("BUPGENSPECS", "").split()))
    if len(payloads) > SPECS_MAX:
        raise _manifest(f"BUPGENSPECS asks for more than {SPECS_MAX} payloads")
    if values.keys() & {"BUPGEN", "BUPGENSPECS"} and not payloads:
        payloads = (Payload({}),)
    values = {name: value for name, value in values.items() if value}
    manifest = Manifest(values, payloads, "SIGNFILES" in values and not payloads)
    if not manifest.signs_files and (lacking := [name for name in ("DTBFILE", "LNXFILE") if name not in values]):
        raise _manifest(f"{' and '.join(lacking)} must be set")
    return manifest


def _payload(spec: str) -> Payload:
    environment, kind = {}, None
    for setting in spec.strip(";").split(";"):
        name, equals, value = setting.partition("=")
        if name.lower() == "bup_type" and value in ("bl", "kernel"):
            kind = value
            continue
        variable = _SETTINGS.get(name.lower())
        if not equals or variable is None or not _ENVIRONMENT[variable].fullmatch(value):
            raise _manifest("BUPGENSPECS has a setting that is not known, or a value that has no place in it")
        environment[variable] = value
    return Payload(environment, kind)


def _check_assignments(name: str, text: str) -> None:
    """Raises ArtifactRejected where a file that will be sourced has anything but plain assignments in it."""
    for number, line in _lines(text):
        found = _ASSIGNMENT.fullmatch(line)
        if not found:
            raise _sourced(name, f'line {number} is no assignment as NAME="text"')
        if not _VALUE.fullmatch(found[2] or found[3] or found[4] or ""):
            raise _sourced(name, f"line {number} has a value with characters that a shell understands")
        if _OBEYED.fullmatch(found[1]):
            raise _sourced(name, f"line {number} sets {found[1]}, which the signing tools obey")


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip(" \t")
        if stripped and not stripped.startswith("#"):
            yield number, stripped


def _text(name: str, content: FileRange) -> str:
    if content.length > TEXT_MAX_BYTES:
        raise ArtifactRejected(f"{name} has more than {TEXT_MAX_BYTES} bytes.", "Send the text that the build made.")
    try:
        return content.read(0, content.length).decode("ascii")
    except UnicodeDecodeError:
        raise ArtifactRejected(f"{name} is no ASCII text.", "Send the text that the build made.") from None


def _manifest(fault: str) -> ArtifactRejected:
    return ArtifactRejected(f"The MANIFEST is refused: {fault}.", "docs/signers/tegra.md lists what it may hold.")


def _sourced(name: str, fault: str) -> ArtifactRejected:
    return ArtifactRejected(f"{name} is refused: {fault}.", "Send the file as meta-tegra makes it.")
