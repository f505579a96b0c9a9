"""hsmsign.toml, HSMSIGN_* and DIGSIGSERVER_* variables become one frozen Settings.

Precedence, highest first: arguments of `load`, `HSMSIGN_*` variables (`__` between levels:
`HSMSIGN_SERVER__PORT`), the file, `DIGSIGSERVER_*` variables, defaults. The reference is the commented
`docs/hsmsign.toml`.
"""

import os
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from hsmsign.mistakes import KeyPath, cross_checks, did_you_mean, unknown
from hsmsign.variables import (
    KEY_FILES,
    Setting,
    default_spool_directory,
    default_state_directory,
    from_digsigserver,
    from_hsmsign,
    key_file_grants,
)
from signers.archives import ArchiveLimits
from signers.ekb import EkbSettings
from signers.imx import ImxSettings
from signers.mender import MenderSettings
from signers.rockchip import RkSettings
from signers.sandbox import ToolSettings
from signers.tegra import TegraSettings
from tokens.errors import Error
from tokens.registry import ProviderSettings
from tokens.secret import SecretSource

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Table = dict[str, Any]
Mistake = tuple[str, str]
"""The key path, such as `grants[2].provider`, and what is wrong there."""

_PROVIDERS: dict[str, type[BaseModel]] = {
    get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(get_args(ProviderSettings)[0])
}


class SettingsError(Error):
    """The settings hold mistakes: all of them are in `mistakes`."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        super().__init__(
            "The settings are wrong:\n" + "\n".join(f"  {path}: {message}" for path, message in mistakes),
            "See docs/hsmsign.toml for every key.",
        )
        self.mistakes = mistakes


class Section(BaseModel):
    """A table of the settings; a key that it does not know is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ServerSettings(Section):
    """`[server]`: where it listens and keeps its files."""

    address: str = "127.0.0.1"
    """The address to listen on. There is no authentication: whoever reaches it can have artifacts signed."""
    port: Annotated[int, Field(ge=0, le=65535)] = 9999
    """The port to listen on; 0 lets the system choose one."""
    hosts: tuple[str, ...] = ()
    """Host names, besides the address and localhost, by which clients may call the service."""
    spool_directory: Path = Field(default_factory=default_spool_directory)
    """Where uploads are kept while their job runs; on disk, with room for `jobs_max` uploads."""
    state_directory: Path = Field(default_factory=default_state_directory)
    """What must outlive the process: which PINs a token refused."""
    drain_timeout_s: Seconds = 1800.0
    """How long the service lets running jobs finish when it is told to stop."""
    keep_alive_timeout_s: Seconds = 30.0
    """How long a connection is kept open that is idle, or whose client has stopped reading."""
    response_timeout_s: Seconds = 1800.0
    """How long a client may take to receive an answer."""
    linger_timeout_s: Seconds = 5.0
    """How long the rest of a refused request is read, so that its client gets to see the answer."""
    hash_threads: Positive = 2
    """How many threads hash and parse artifacts."""
    readiness_max_age_s: Annotated[float, Field(ge=0)] = 2.0
    """How long an answer about readiness holds before providers and keys are looked at again."""


class LimitSettings(Section):
    """`[limits]`: what one request may cost."""

    upload_max_bytes: Positive = 8 * 1024**3
    """The largest request."""
    upload_timeout_s: Seconds = 1800.0
    """How long an upload may take in all."""
    upload_min_bytes_per_s: Annotated[int, Field(ge=0)] = 1024
    """The slowest average rate of an upload; 0 allows any."""
    upload_grace_s: Seconds = 10.0
    """How long an upload may be slower than that at its beginning."""
    field_max_bytes: Positive = 64 * 1024
    """The longest text field of a form."""
    fields_max: Positive = 64
    """The most fields of a form."""
    json_max_bytes: Positive = 64 * 1024
    """The largest JSON body."""
    jobs_max: Positive = 64
    """The most jobs at a time; further requests get 503."""
    job_timeout_s: Seconds = 1800.0
    """How long signing one artifact may take, from when its upload is complete."""


class LogSettings(Section):
    """`[log]`."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe events that are logged."""
    format: Literal["json", "console"] | None = None
    """One JSON object a line, or text to read."""


class SignersSettings(Section):
    """`[signers.NAME]`: what a signer has of its own."""

    ekb: EkbSettings = EkbSettings()
    """Jetson EKB images."""
    imx: ImxSettings = ImxSettings()
    """NXP i.MX boot images."""
    kmod: ArchiveLimits = ArchiveLimits()
    """Linux kernel modules."""
    optee: ArchiveLimits = ArchiveLimits()
    """Trusted Applications of OP-TEE's."""
    mender: MenderSettings = MenderSettings()
    """Mender artifacts."""
    rk: RkSettings = RkSettings()
    """Rockchip's boot chain."""
    tegra: TegraSettings = TegraSettings()
    """Boot files of NVIDIA Jetsons."""

    @property
    def rkoptee_tee(self) -> RkSettings:
        """Its tools are in the same place."""
        return self.rk

    def of(self, signer: str) -> Any:
        """What the signer of this name has; None: nothing."""
        return getattr(self, signer.replace("-", "_"), None)


class Grant(Section):
    """`[[grants]]`: which signer may use which key, for which machine or distro, in which role."""

    name: Annotated[str, Field(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,127}\z")]
    """What `/keys` and the log call it."""
    signer: str
    """The signer that may use the key."""
    role: str
    """Which of the signer's keys it is."""
    machine: str = "*"
    """The machines it is for, a glob (`*`, `?`, `[abc]`)."""
    distro: str = "*"
    """The distros it is for, a glob."""
    provider: str
    """Where the key is: the NAME of a `[providers.NAME]`."""
    object: Annotated[str, Field(min_length=1)] | None = None
    """The key's label on a token, its path below the root of a key store. `{machine}` or `{distro}` may stand in it."""
    id: Annotated[str, Field(pattern=r"\A([0-9a-fA-F]{2})+\z")] | None = None
    """The key's CKA_ID on a token, in hex."""
    certificate: Annotated[str, Field(min_length=1)] | None = None
    """The certificate: a file of the server for a token, a path below the root for a key store."""
    aliases: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Other names by which a client's key URI may call the object."""
    allow: tuple[str, ...] = ()
    """What the signer may do beyond the usual; its page has the names."""
    srk_hash: Annotated[str, Field(pattern=r"\A([0-9a-fA-F]{64}|[0-9a-fA-F]{128})\z")] | None = None
    """The hash of the SRK table that the fuses of an i.MX hold, in hex: another table is refused."""
    spki_sha256: Annotated[str, Field(pattern=r"\A[0-9a-fA-F]{64}\z")] | None = None
    """SHA-256 of the DER SubjectPublicKeyInfo, in hex: a key that is another is refused."""
    attested: bool = False
    """Whether the key's device must prove that it generated the key and does not let it out: else it is refused."""
    digest: bool = False
    """Whether `POST /keys/{name}/sign` may sign a bare digest with it."""

    def covers(self, machine: str | None, distro: str | None) -> bool:
        """Whether it is for that machine and distro (None: not part of the request)."""
        return fnmatchcase(machine or "", self.machine) and fnmatchcase(distro or "", self.distro)


class Settings(Section):
    """Everything that hsmsign can be told."""

    server: ServerSettings = Field(default_factory=ServerSettings)
    """Where it listens and keeps its files."""
    limits: LimitSettings = LimitSettings()
    """What one request may cost."""
    log: LogSettings = LogSettings()
    """What it logs."""
    tools: ToolSettings = ToolSettings()
    """How vendors' tools run."""
    signers: SignersSettings = SignersSettings()
    """What single signers are told."""
    providers: dict[Annotated[str, Field(pattern=r"\A[a-z0-9][a-z0-9_-]*\z")], ProviderSettings] = {}
    """Where keys live."""
    grants: tuple[Grant, ...] = ()
    """Who may use them."""


def load(path: Path | None = None, environ: Mapping[str, str] = os.environ, **overrides: Table) -> Settings:
    """The settings of this process.

    Arguments:
        path: the file; None: the one that `find_file` finds.
        environ: the variables.
        overrides: tables that go above everything, as in `load(server={"port": 0})`; a value of None is left out.

    Raises SettingsError with all mistakes.
    """
    replaced, own = list(from_digsigserver(environ)), list(from_hsmsign(environ))
    directories: Table = {
        "spool_directory": default_spool_directory(environ),
        "state_directory": default_state_directory(environ),
    }
    told = {name: {k: v for k, v in table.items() if v is not None} for name, table in overrides.items()}
    data: Table = {"server": directories}
    for layer in (*map(_nested, replaced), _read(find_file(path, environ)), *map(_nested, own), told):
        data = _merged(data, layer)
    grants = data.get("grants", [])
    if environ.get(KEY_FILES) and isinstance(grants, list):
        data["grants"] = [*grants, *key_file_grants(grants)]
    return _validated(data, [*own, *replaced])


def _validated(data: Table, variables: list[Setting]) -> Settings:
    """The settings that the tables describe. Raises SettingsError, which names the variables at fault."""
    mistakes: list[tuple[KeyPath, str]] = []
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)  # what was typed may be a secret
        mistakes += [(_key_path(detail["loc"]), _message(detail)) for detail in details]
    mistakes += cross_checks(data)
    if mistakes:
        raise SettingsError([(_spelt(key), message + _source(key, variables)) for key, message in mistakes])
    return settings


def find_file(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """`path`, else $HSMSIGN_CONFIG, else ./hsmsign.toml or /etc/hsmsign/hsmsign.toml where there is one."""
    if path is not None:
        return path
    if named := environ.get("HSMSIGN_CONFIG"):
        return Path(named)
    usual = (Path("hsmsign.toml"), Path("/etc/hsmsign/hsmsign.toml"))
    return next((candidate for candidate in usual if candidate.exists()), None)


def _read(path: Path | None) -> Table:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError([(str(path), f"the file cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError:
        raise SettingsError([(str(path), "the file is not UTF-8 text")]) from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError([(str(path), f"the file is not TOML: {error}")]) from None


def _nested(setting: Setting) -> Table:
    """The setting as it would stand in the file: `("a", "b"), 1` becomes `{"a": {"b": 1}}`."""
    nested = setting.value
    for level in reversed(setting.key):
        nested = {level: nested}
    return dict(nested)


def _merged(below: Any, above: Any) -> Any:
    """Tables are merged key by key; of anything else the upper one stays."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}


def _message(detail: ErrorDetails) -> str:
    """One mistake in words; never with what was typed as a value."""
    message = detail["msg"].removeprefix("Value error, ").replace("Input", "it", 1)
    match detail["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            message = f"there is no such key{did_you_mean(str(detail['loc'][-1]), _known_keys(detail['loc']))}"
        case "missing":
            message = "it is missing"
        case "union_tag_not_found":
            message = f"kind is missing; there are: {', '.join(_PROVIDERS)}"
        case "union_tag_invalid":
            message = unknown("kind of provider", str(detail["ctx"]["tag"]), _PROVIDERS)
        case "dataclass_type":
            message = 'a secret never stands in the settings: write { file = "/path" } or { credential = "name" }'
        case "tuple_type":
            message = "it should be a list (in a variable: as JSON)"
        case "dict_type" | "model_type" | "model_attributes_type":
            message = "it should be a table (in a variable: as JSON)"
    return message


def _known_keys(loc: KeyPath) -> Collection[str]:
    """The keys of the table in which `loc` stands."""
    match loc:
        case ("providers", _, str(kind), _):
            return _PROVIDERS[kind].model_fields
        case ("providers", *_):
            return [field.name for field in fields(SecretSource)]
        case ("grants", *_):
            return Grant.model_fields
        case (str(section), _):
            return getattr(Settings.model_fields[section].annotation, "model_fields", ())
    return Settings.model_fields


def _key_path(loc: KeyPath) -> KeyPath:
    """Where it stands in the file: pydantic also names the union's member and a table's key."""
    if loc[0] == "providers":
        loc = (*loc[:2], *loc[3:]) if loc[2:3] and loc[2] in _PROVIDERS else loc
    return tuple(level for level in loc if level != "[key]")


def _spelt(key: KeyPath) -> str:
    return "".join(f"[{level}]" if isinstance(level, int) else f".{level}" for level in key).removeprefix(".")


def _source(key: KeyPath, variables: list[Setting]) -> str:
    """Names the variable that the value came from, where it came from one."""
    for at, variable, _ in variables:
        if key[: len(at)] == at or at[: len(key)] == key:
            return f" (set by {variable})"
    return ""
