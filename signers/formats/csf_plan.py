"""What a command sequence of NXP's Code Signing Tool asks for: the meaning of `signers.formats.csf`'s commands.

    plan = understand(parse(text))
    text = emit(with_files(plan, {Role.SRK_TABLE: ["/job/table.bin"], ...}))

Rules: NXP's user guide of the tool (UG10106), and what the tool accepts. Whatever it would accept and ignore, or take
for something else, is refused here. Numbers are those of the HAB API reference, as they stand in a binary CSF, so that
it can be compared with the plan.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from typing import TypeAlias, TypeVar

from signers.formats.csf import Argument, Block, Command, CsfError, FileName, Keyword, Pair, Value

CSF_BYTES_MAX = 768
"""Of the commands of a binary CSF: the tool writes them into a buffer of this size, and does not look."""

_HEADER_BYTES = 4

CONTAINER_HEADER_BYTES = 16
"""The least that lies between a container and its signature block."""


class CsfUnsupported(CsfError):
    """The text asks for something that is not done here; the message says why."""


class Engine(IntEnum):
    """What on the chip does the cryptography, or is unlocked."""

    ANY = 0x00
    SCC = 0x03
    RTIC = 0x05
    SAHARA = 0x06
    CSU = 0x0A
    SRTC = 0x0C
    DCP = 0x1B
    CAAM = 0x1D
    SNVS = 0x1E
    OCOTP = 0x21
    DTCP = 0x22
    HDCP = 0x24
    ROM = 0x36
    RTL = 0x77
    SW = 0xFF


class Hash(IntEnum):
    """A hash algorithm."""

    SHA1 = 0x11
    SHA256 = 0x17
    SHA512 = 0x1B


# The engines that authenticate, and what each can be configured to; no name is the default.
_CONFIGURATIONS: Mapping[Engine, Mapping[str, int]] = {
    Engine.ANY: {"": 0},
    Engine.SW: {"": 0},
    Engine.SAHARA: {"": 0, "INSWAP8": 0x01, "INSWAP16": 0x02, "DSCBE816": 0x10, "DSCBE832": 0x20},
    Engine.CAAM: {
        "": 0,
        "INSWAP8": 0x01,
        "INSWAP16": 0x02,
        "OUTSWAP8": 0x08,
        "OUTSWAP16": 0x10,
        "DSCSWAP8": 0x40,
        "DSCSWAP16": 0x80,
    },
    Engine.DCP: {"": 0, "INSWAP8": 0x01, "INSWAP32": 0x04, "OUTSWAP8": 0x08, "OUTSWAP32": 0x20},
    Engine.RTIC: {"": 0, "INSWAP8": 0x01, "INSWAP16": 0x02, "OUTSWAP8": 0x08, "KEEP": 0x80},
}

_UNLOCKS: Mapping[Engine, Mapping[str, int]] = {
    Engine.SRTC: {},
    Engine.CAAM: {"MID": 1, "RNG": 2, "MFG": 4},
    Engine.SNVS: {"LPSWR": 1, "ZMKWRITE": 2},
    Engine.OCOTP: {"FIELDRETURN": 1, "SRKREVOKE": 2, "SCS": 4, "JTAG": 8},
}

_INITS: Mapping[Engine, Mapping[str, int]] = {Engine.SRTC: {}, Engine.CAAM: {"RNG": 2}}

_CAAM_RNG = 2
_OCOTP_SRK_REVOKE = 2
_UID_BYTES = 8


class Role(StrEnum):
    """What a file is for."""

    SRK_TABLE = "SRK table"
    CSF_KEY = "CSF key"
    IMAGE_KEY = "image key"
    SOURCE = "SRK"
    DATA = "data"


_ROLES: Mapping[tuple[str, str], Role] = {
    ("Install SRK", "File"): Role.SRK_TABLE,
    ("Install SRK", "Source"): Role.SOURCE,
    ("Install CSFK", "File"): Role.CSF_KEY,
    ("Install NOCAK", "File"): Role.CSF_KEY,
    ("Install Key", "File"): Role.IMAGE_KEY,
    ("Authenticate Data", "Blocks"): Role.DATA,
    ("Authenticate Data", "File"): Role.DATA,
}


@dataclass(frozen=True, slots=True)
class HabHeader:
    """[Header]: the defaults of what follows. `engine_configuration` is a keyword, empty for 0."""

    version: Pair
    hash: Hash
    engine: Engine
    engine_configuration: str
    certificate_format: str
    signature_format: str


@dataclass(frozen=True, slots=True)
class InstallSrk:
    """[Install SRK]: which key of the table signs."""

    table: FileName
    index: int
    hash: Hash


@dataclass(frozen=True, slots=True)
class InstallCsfKey:
    """[Install CSFK], or, with `fast`, [Install NOCAK]: then the SRK itself signs all, and no command is written."""

    certificate: FileName
    fast: bool


@dataclass(frozen=True, slots=True)
class AuthenticateCsf:
    """[Authenticate CSF]: `configuration` is the engine's byte, also in what follows."""

    engine: Engine
    configuration: int


@dataclass(frozen=True, slots=True)
class InstallKey:
    """[Install Key]: `hash` is None where the text names none."""

    certificate: FileName
    verification_index: int
    target_index: int
    hash: Hash | None


@dataclass(frozen=True, slots=True)
class AuthenticateData:
    """[Authenticate Data]: one signature over all blocks, in their order."""

    verification_index: int
    engine: Engine
    configuration: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class SetEngine:
    """[Set Engine]: the default engine for a hash algorithm from here on."""

    hash: Hash
    engine: Engine
    configuration: int


@dataclass(frozen=True, slots=True)
class Init:
    """[Init]: `features` are bits; 0 is none, and then no word of them is written."""

    engine: Engine
    features: int


@dataclass(frozen=True, slots=True)
class Unlock:
    """[Unlock]: `features` are bits; 0 is none, and then no word of them is written."""

    engine: Engine
    features: int
    uid: bytes


@dataclass(frozen=True, slots=True)
class Nop:
    """[NOP]."""


Step: TypeAlias = (
    InstallSrk | InstallCsfKey | AuthenticateCsf | InstallKey | AuthenticateData | SetEngine | Init | Unlock | Nop
)

_Step = TypeVar("_Step")


@dataclass(frozen=True, slots=True)
class HabPlan:
    """A CSF for HABv4. `steps` are in the order of the text; the binary CSF has them in this order, then `added`."""

    commands: tuple[Command, ...]
    header: HabHeader
    steps: tuple[Step, ...]

    @property
    def srk(self) -> InstallSrk:
        """The one [Install SRK]."""
        return self._all(InstallSrk)[0]

    @property
    def csf_key(self) -> InstallCsfKey:
        """The one [Install CSFK] or [Install NOCAK]."""
        return self._all(InstallCsfKey)[0]

    @property
    def keys(self) -> tuple[InstallKey, ...]:
        """Every [Install Key]: no two of the same target index, none for a fast authentication."""
        return self._all(InstallKey)

    @property
    def data(self) -> tuple[AuthenticateData, ...]:
        """Every [Authenticate Data], one at least."""
        return self._all(AuthenticateData)

    @property
    def added(self) -> tuple[Unlock, ...]:
        """What the tool appends unasked: with CAAM in [Header], the RNG is unlocked unless a step sees to it."""
        seen = any(
            isinstance(step, Init | Unlock) and step.engine == Engine.CAAM and step.features & _CAAM_RNG
            for step in self.steps
        )
        return () if seen or self.header.engine != Engine.CAAM else (Unlock(Engine.CAAM, _CAAM_RNG, b""),)

    @property
    def needs(self) -> frozenset[str]:
        """What must be granted: `unlock` for [Unlock], `engine` for [Set Engine], [Init] and a configuration."""
        configured = self.header.engine_configuration or any(
            isinstance(step, SetEngine | Init)
            or (isinstance(step, AuthenticateCsf | AuthenticateData) and step.configuration)
            for step in self.steps
        )
        return frozenset({"unlock"} if self._all(Unlock) else ()) | frozenset({"engine"} if configured else ())

    def files(self, role: Role) -> tuple[FileName, ...]:
        """The different files of a role, in the order of the text."""
        return _files(self.commands, role)

    def _all(self, kind: type[_Step]) -> tuple[_Step, ...]:
        return tuple(step for step in self.steps if isinstance(step, kind))


@dataclass(frozen=True, slots=True)
class AhabPlan:
    """A container to be signed for AHAB.

    `source` names the certificate of the SRK that signs, which is `srk_index` of the table. Both offsets are in the
    artifact.
    """

    commands: tuple[Command, ...]
    version: Pair
    srk_table: FileName
    source: FileName
    srk_index: int
    source_set: str
    revocations: int
    artifact: FileName
    container_offset: int
    signature_block_offset: int

    @property
    def needs(self) -> frozenset[str]:
        """What must be granted: nothing but the key."""
        return frozenset()

    def files(self, role: Role) -> tuple[FileName, ...]:
        """The different files of a role, in the order of the text."""
        return _files(self.commands, role)


Plan: TypeAlias = HabPlan | AhabPlan


def understand(commands: Iterable[Command]) -> Plan:
    """The meaning of parsed commands. Raises CsfError, and CsfUnsupported for what is not done here."""
    commands = tuple(commands)
    if not commands or commands[0].name != "Header":
        raise CsfError("the first command must be [Header]", commands[0].line if commands else 1)
    for command in commands:
        if reason := _UNSUPPORTED.get(command.name):
            raise CsfUnsupported(f"[{command.name}] is not supported: {reason}", command.line)
    header = _Arguments(commands[0])
    if mode := commands[0].get("Mode"):
        raise CsfUnsupported("Mode is not supported: signatures are made here, not asked of others", mode.line)
    if header.keyword("Target", ("HAB", "AHAB"), "HAB") == "AHAB":
        return _ahab(commands)
    return _Hab(commands).plan()


_UNSUPPORTED = {
    "Install Secret Key": "encrypted boot would need a secret key on this service",
    "Decrypt Data": "encrypted boot would need a secret key on this service",
    "Install Certificate": "only the SRK signs a container",
}


def with_files(plan: Plan, names: Mapping[Role, Sequence[str]]) -> tuple[Command, ...]:
    """The plan's commands with other files: `names[role]` are those for `plan.files(role)`, one for each.

    None of the text's own strings is left. Raises ValueError where `names` has too few or too many.
    """
    roles = [role for role in Role if plan.files(role)]
    if set(roles) != set(names):
        raise ValueError(f"files are needed for exactly these roles: {', '.join(roles)}")
    replaced = {
        (role, old): FileName(new) for role in roles for old, new in zip(plan.files(role), names[role], strict=True)
    }
    return tuple(
        replace(
            command,
            arguments=tuple(
                replace(
                    argument, values=tuple(_replaced(command, argument, value, replaced) for value in argument.values)
                )
                for argument in command.arguments
            ),
        )
        for command in plan.commands
    )


def _replaced(
    command: Command, argument: Argument, value: Value, replaced: Mapping[tuple[Role, FileName], FileName]
) -> Value:
    match value:
        case FileName():
            return replaced[_ROLES[command.name, argument.name], value]
        case Block():
            return replace(value, file=replaced[_ROLES[command.name, argument.name], value.file])
        case _:
            return value


def _files(commands: Iterable[Command], role: Role) -> tuple[FileName, ...]:
    values = (
        value
        for command in commands
        for argument in command.arguments
        if _ROLES.get((command.name, argument.name)) == role
        for value in argument.values
    )
    files = (value.file if isinstance(value, Block) else value for value in values)
    return tuple(dict.fromkeys(file for file in files if isinstance(file, FileName)))


_Kind = TypeVar("_Kind", int, Pair, Keyword, FileName)

_KINDS: Mapping[type, str] = {
    int: "a number",
    Pair: "a pair of numbers",
    Keyword: "a keyword",
    FileName: "a file in quotes",
    Block: "a list of blocks",
}


class _Arguments:
    """Reads a command's arguments; what is read must be there once, of its kind, and within its bounds."""

    def __init__(self, command: Command) -> None:
        self._command = command
        names = [argument.name for argument in command.arguments]
        if len(set(names)) != len(names):
            raise self.error("an argument is set twice")

    def line(self, name: str) -> int:
        argument = self._command.get(name)
        return argument.line if argument else self._command.line

    def error(self, message: str, name: str = "") -> CsfError:
        return CsfError(f"{message} in [{self._command.name}]", self.line(name))

    def only(self, *names: str) -> None:
        for argument in self._command.arguments:
            if argument.name not in names:
                raise self.error(f"{argument.name} does not belong", argument.name)

    def has(self, name: str) -> bool:
        return self._command.get(name) is not None

    def all(self, name: str) -> tuple[Value, ...]:
        argument = self._command.get(name)
        return argument.values if argument else ()

    def one(self, name: str, kind: type[_Kind]) -> _Kind:
        values = self.all(name)
        if not values:
            raise self.error(f"{name} is missing", name)
        if len(values) != 1 or not isinstance(values[0], kind):
            raise self.error(f"{name} must be {_KINDS[kind]}", name)
        return values[0]

    def number(self, name: str, allowed: Sequence[int]) -> int:
        number = self.one(name, int)
        if number not in allowed:
            raise self.error(f"{name} is out of range", name)
        return number

    def file(self, name: str) -> FileName:
        return self.one(name, FileName)

    def keyword(self, name: str, allowed: Iterable[str], default: str = "") -> str:
        if default and not self.has(name):
            return default
        keyword = self.one(name, Keyword).name
        if keyword not in allowed:
            raise self.error(f"{name} cannot be this keyword", name)
        return keyword

    def hash(self, default: Hash | None = None) -> Hash:
        name = self.keyword("Hash Algorithm", Hash.__members__, default.name if default is not None else "")
        return Hash[name]

    def engine(self, default: Engine | None = None) -> Engine:
        return Engine[self.keyword("Engine", Engine.__members__, default.name if default is not None else "")]

    def configuration(self, default: str = "") -> str:
        """The keyword of an Engine Configuration, empty for 0."""
        values = self.all("Engine Configuration")
        if not values:
            return default
        if values == (0,):
            return ""
        if len(values) == 1 and isinstance(values[0], Keyword):
            return values[0].name
        raise self.error("Engine Configuration must be 0 or one keyword", "Engine Configuration")

    def features(self, known: Mapping[str, int]) -> int:
        """The bits of Features, given as keywords or numbers; where there are any, one must be named."""
        bits = 0
        for value in self.all("Features"):
            bit = known.get(value.name, 0) if isinstance(value, Keyword) else value
            if not isinstance(bit, int) or not bit or bit & bits or bit & ~sum(known.values()):
                raise self.error("Features has one that is doubled, or that the engine does not have", "Features")
            bits |= bit
        if known and not bits:
            raise self.error("Features is missing")
        return bits


class _Hab:
    """Reads the commands for HABv4 one after the other."""

    def __init__(self, commands: tuple[Command, ...]) -> None:
        self._commands = commands
        self._header = self._read_header(_Arguments(commands[0]))
        self._steps: list[Step] = []
        self._fast = False
        self._installed: set[int] = set()

    def plan(self) -> HabPlan:
        for command in self._commands[1:]:
            self._in_order(command)
            self._steps.append(self._step(command.name, _Arguments(command)))
        last = self._commands[-1].line
        if not any(isinstance(step, AuthenticateData) for step in self._steps):
            missing = next((name for name in _ONCE if not self._done(name)), "Authenticate Data")
            raise CsfError(f"[{missing}] is missing", last)
        plan = HabPlan(self._commands, self._header, tuple(self._steps))
        if _HEADER_BYTES + sum(map(_size, plan.steps + plan.added)) > CSF_BYTES_MAX:
            raise CsfError(f"the commands need more than the {CSF_BYTES_MAX} bytes that the tool has for them", last)
        return plan

    @staticmethod
    def _read_header(header: _Arguments) -> HabHeader:
        header.only(
            *("Target", "Version", "Hash Algorithm", "Engine", "Engine Configuration"),
            *("Certificate Format", "Signature Format"),
        )
        version = header.one("Version", Pair)
        if version.first != 4 or version.second > 15:
            raise header.error("Version must be 4.x", "Version")
        engine, configuration = header.engine(Engine.ANY), header.configuration()
        if configuration not in _CONFIGURATIONS.get(engine, {"": 0}):
            raise header.error("Engine Configuration is none of the engine's", "Engine Configuration")
        return HabHeader(
            version,
            header.hash(Hash.SHA256),
            engine,
            configuration,
            header.keyword("Certificate Format", ("X509",), "X509"),
            header.keyword("Signature Format", ("CMS",), "CMS"),
        )

    def _done(self, name: str) -> bool:
        return any(isinstance(step, _ONCE[name]) for step in self._steps)

    def _in_order(self, command: Command) -> None:
        name = "Install CSFK" if command.name == "Install NOCAK" else command.name
        if name == "Header" or (name in _ONCE and self._done(name)):
            raise CsfError(f"there is a second [{command.name}], or what replaces it", command.line)
        if name in ("NOP", "Set Engine"):
            return
        for before in _ONCE:
            if before == name:
                return
            if not self._done(before):
                raise CsfError(f"[{before}] must come before [{command.name}]", command.line)

    def _step(self, name: str, arguments: _Arguments) -> Step:  # noqa: PLR0911 - one for each command
        match name:
            case "Install SRK":
                return self._install_srk(arguments)
            case "Install CSFK" | "Install NOCAK":
                arguments.only("File", "Certificate Format")
                arguments.keyword("Certificate Format", ("X509",), "X509")
                self._fast = name == "Install NOCAK"
                return InstallCsfKey(arguments.file("File"), self._fast)
            case "Authenticate CSF":
                arguments.only("Engine", "Engine Configuration", "Signature Format")
                arguments.keyword("Signature Format", ("CMS",), "CMS")
                return AuthenticateCsf(*self._engine(arguments))
            case "Install Key":
                return self._install_key(arguments)
            case "Authenticate Data":
                return self._authenticate_data(arguments)
            case "Set Engine":
                arguments.only("Hash Algorithm", "Engine", "Engine Configuration")
                return SetEngine(arguments.hash(), *self._engine(arguments, explicit=True))
            case "Init":
                arguments.only("Engine", "Features")
                engine = self._of(arguments, _INITS)
                return Init(engine, arguments.features(_INITS[engine]))
            case "Unlock":
                return self._unlock(arguments)
            case "NOP":
                arguments.only()
                return Nop()
            case _:
                raise arguments.error("the command is not known")

    def _install_srk(self, arguments: _Arguments) -> InstallSrk:
        arguments.only("File", "Source index", "Source set", "Hash Algorithm")
        if arguments.keyword("Source set", ("OEM", "NXP"), "OEM") == "NXP":
            raise CsfUnsupported("Source set NXP is not supported: only OEM keys sign", arguments.line("Source set"))
        return InstallSrk(
            arguments.file("File"), arguments.number("Source index", range(4)), arguments.hash(self._header.hash)
        )

    def _install_key(self, arguments: _Arguments) -> InstallKey:
        arguments.only("File", "Verification index", "Target index", "Hash Algorithm", "Certificate Format")
        arguments.keyword("Certificate Format", ("X509",), "X509")
        if self._fast:
            raise arguments.error("with [Install NOCAK] there is no key to install")
        verification = arguments.number("Verification index", (0, 2, 3, 4))
        target = arguments.number("Target index", (2, 3, 4))
        if verification and verification not in self._installed:
            raise arguments.error("Verification index has no key installed before", "Verification index")
        if target in self._installed:
            raise arguments.error("Target index has a key already", "Target index")
        self._installed.add(target)
        hashed = arguments.hash() if arguments.has("Hash Algorithm") else None
        return InstallKey(arguments.file("File"), verification, target, hashed)

    def _authenticate_data(self, arguments: _Arguments) -> AuthenticateData:
        arguments.only(
            *("Verification index", "Blocks", "Engine", "Engine Configuration", "Signature Format", "Hash Algorithm")
        )
        arguments.keyword("Signature Format", ("CMS",), "CMS")
        if arguments.hash(self._header.hash) != self._header.hash:
            raise arguments.error("the tool takes the Hash Algorithm of [Header] only", "Hash Algorithm")
        index = arguments.number("Verification index", (0,) if self._fast else (2, 3, 4))
        if index and index not in self._installed:
            raise arguments.error("Verification index has no key installed before", "Verification index")
        return AuthenticateData(index, *self._engine(arguments), tuple(_blocks(arguments)))

    def _engine(self, arguments: _Arguments, *, explicit: bool = False) -> tuple[Engine, int]:
        """The engine and its configuration's byte; both have defaults in [Header]."""
        engine = arguments.engine(None if explicit else self._header.engine)
        if engine not in _CONFIGURATIONS:
            raise arguments.error("the Engine cannot authenticate", "Engine")
        configuration = arguments.configuration(self._header.engine_configuration)
        if engine == Engine.ANY and not explicit and arguments.has("Engine") and not arguments.has(_CONFIGURATION):
            raise arguments.error("Engine = ANY needs Engine Configuration = 0 beside it", "Engine")
        if configuration not in _CONFIGURATIONS[engine]:
            raise arguments.error("Engine Configuration is none of the engine's", _CONFIGURATION)
        return engine, _CONFIGURATIONS[engine][configuration]

    def _unlock(self, arguments: _Arguments) -> Unlock:
        arguments.only("Engine", "Features", "UID")
        engine = self._of(arguments, _UNLOCKS)
        features = arguments.features(_UNLOCKS[engine])
        uid = arguments.all("UID")
        wanted = _UID_BYTES if engine == Engine.OCOTP and features != _OCOTP_SRK_REVOKE else 0
        if len(uid) != wanted:
            raise arguments.error(f"UID must have {wanted} bytes for these features", "UID")
        octets = [byte for byte in uid if isinstance(byte, int) and byte <= 0xFF]
        if len(octets) != len(uid):
            raise arguments.error("UID must be a list of bytes", "UID")
        return Unlock(engine, features, bytes(octets))

    @staticmethod
    def _of(arguments: _Arguments, engines: Mapping[Engine, object]) -> Engine:
        engine = arguments.engine()
        if engine not in engines:
            raise arguments.error("the Engine cannot do this", "Engine")
        return engine


_CONFIGURATION = "Engine Configuration"

# in this order, before all that is in none
_ONCE: Mapping[str, type] = {
    "Install SRK": InstallSrk,
    "Install CSFK": InstallCsfKey,
    "Authenticate CSF": AuthenticateCsf,
}


def _blocks(arguments: _Arguments) -> Iterator[Block]:
    blocks = arguments.all("Blocks")
    if not blocks:
        raise arguments.error("Blocks is missing")
    for block in blocks:
        if not isinstance(block, Block):
            raise arguments.error("Blocks must be a list of blocks: address offset length file", "Blocks")
        # the tool would wrap at 32 bits
        if not block.length or max(block.address, block.offset) + block.length > 1 << 32:
            raise arguments.error("Blocks has one that is empty or does not fit into 32 bits", "Blocks")
        yield block


def _size(step: Step) -> int:
    """Its bytes in the binary CSF."""
    match step:
        case InstallCsfKey(fast=True):
            return 0
        case AuthenticateData():
            return 12 + 8 * len(step.blocks)
        case SetEngine():
            return 8
        case Init() | Unlock():
            return 4 + (4 if step.features else 0) + (len(step.uid) if isinstance(step, Unlock) else 0)
        case Nop():
            return 4
        case _:
            return 12


def _ahab(commands: tuple[Command, ...]) -> AhabPlan:
    found: dict[str, _Arguments] = {}
    for command in commands:
        if command.name not in _AHAB_COMMANDS:
            raise CsfError(f"[{command.name}] does not belong into a text for AHAB", command.line)
        if command.name in found:
            raise CsfError(f"there is a second [{command.name}]", command.line)
        found[command.name] = arguments = _Arguments(command)
        if command.get("Signature"):
            raise CsfUnsupported("Signature is not supported: signatures are made here", command.line)
        arguments.only(*_AHAB_COMMANDS[command.name])
    for name in _AHAB_COMMANDS:
        if name not in found:
            raise CsfError(f"[{name}] is missing", commands[-1].line)
    header, srk, data = (found[name] for name in _AHAB_COMMANDS)
    version, offsets = header.one("Version", Pair), data.one("Offsets", Pair)
    if version != Pair(1, 0):
        raise header.error("Version must be 1.0", "Version")
    if not CONTAINER_HEADER_BYTES <= offsets.second - offsets.first <= 0xFFFF:
        # a container says in 16 bits where its signature block is
        raise data.error("Offsets must be of a container and, shortly after it, its signature block", "Offsets")
    return AhabPlan(
        commands=commands,
        version=version,
        srk_table=srk.file("File"),
        source=srk.file("Source"),
        srk_index=srk.number("Source index", range(4)),
        source_set=srk.keyword("Source set", ("OEM", "NXP")),
        revocations=srk.number("Revocations", range(16)),
        artifact=data.file("File"),
        container_offset=offsets.first,
        signature_block_offset=offsets.second,
    )


_AHAB_COMMANDS: Mapping[str, tuple[str, ...]] = {
    "Header": ("Target", "Version"),
    "Install SRK": ("File", "Source", "Source index", "Source set", "Revocations"),
    "Authenticate Data": ("File", "Offsets"),
}
