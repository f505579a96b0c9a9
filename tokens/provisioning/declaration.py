"""The file that says what a device is to hold; docs/yubihsm-setup.toml is the commented example."""

import difflib
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from yubihsm.defs import CAPABILITY, OBJECT

from tokens.errors import Error
from tokens.provisioning.algorithms import ALGORITHMS, AlgorithmName
from tokens.provisioning.capabilities import CAPABILITIES, Role, combined, names
from tokens.provisioning.shares import SHARES_MAX
from tokens.secret import SecretSource

FACTORY_AUTH_KEY = 1
"""The id of the authentication key that a new device comes with."""

LABEL_MAX_BYTES = 40


class DeclarationError(Error):
    """The file holds mistakes: all of them are in `mistakes`, each a key path and a sentence."""

    def __init__(self, path: Path, mistakes: list[tuple[str, str]]) -> None:
        super().__init__(
            f"{path} is wrong:\n"
            + "\n".join(f"  {where}: {what}" if where else f"  {what}" for where, what in mistakes),
            "See docs/yubihsm-setup.toml for every key.",
        )
        self.mistakes = mistakes


def _label(text: str) -> str:
    if "\0" in text or len(text.encode()) > LABEL_MAX_BYTES:
        raise ValueError(f"a label has {LABEL_MAX_BYTES} bytes at most, and no NUL")
    return text


def _capability(name: str) -> str:
    if name not in CAPABILITIES:
        close = difflib.get_close_matches(name, CAPABILITIES, n=1)
        raise ValueError(f'no capability is called "{name}"' + (f' - did you mean "{close[0]}"?' if close else ""))
    return name


Id = Annotated[int, Field(ge=1, le=0xFFFE)]
Label = Annotated[str, Field(min_length=1), AfterValidator(_label)]
Domains = Annotated[tuple[Annotated[int, Field(ge=1, le=16)], ...], Field(min_length=1)]
Capabilities = Annotated[tuple[Annotated[str, AfterValidator(_capability)], ...], Field(min_length=1)]
Audit = Literal["off", "on", "fixed"]


class Table(BaseModel):
    """A table of the file; a key that it does not know is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DeviceTable(Table):
    """`[device]`: which one."""

    connector: Annotated[str, Field(pattern=r"\A(https?://\S+|yhusb://)\z")]
    """The connector's URL, or `yhusb://` for a device at this machine's own USB."""
    serial: Annotated[int, Field(ge=0, le=0xFFFFFFFF)]
    """Its serial number: another device is refused."""


class AuthKey(Table):
    """`[auth_keys.NAME]`: who may log in, and what they may do."""

    id: Annotated[Id, Field(gt=FACTORY_AUTH_KEY)]
    """Its id; 1 is the one that a new device comes with, which is deleted."""
    label: Label | None = None
    """Its label; NAME, if there is none."""
    domains: Domains | None = None
    """The domains that it may see; all, if there are none."""
    role: Role | None = None
    """What it is for; it may do that and nothing else."""
    capabilities: Capabilities | None = None
    """What it may do, one by one, in place of a role."""
    password: SecretSource
    """Where its password is; one is made, and the file, where there is none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.role is None) == (self.capabilities is None):
            raise ValueError("name one of role and capabilities")
        if self.role == "admin" and self.domains is not None:
            raise ValueError("an admin has all domains: name none")
        return self


class AuditTable(Table):
    """`[audit]`: what the device logs. `fixed` holds until the device is reset."""

    commands: Audit = "on"
    """Whether commands that use or change a key are logged."""
    force: Audit = "off"
    """Whether the device refuses to work when its log (62 entries) is full and nobody has read it."""


class KeyFile(Table):
    """`import = { file = ... }`: where a key comes from."""

    file: Path
    """PEM or DER; an AES or HMAC key in hexadecimal, or its bare bytes."""
    passphrase: SecretSource | None = None
    """Where the passphrase is, if the file is encrypted."""


class Key(Table):
    """`[[keys]]`: a key, and the certificate that goes with it."""

    id: Id
    """Its id."""
    label: Label
    """Its label: the name by which grants and key URIs call it."""
    algorithm: AlgorithmName
    """What kind of key it is."""
    domains: Domains
    """The domains that it belongs to."""
    capabilities: Capabilities
    """What it may be used for."""
    exportable: bool = False
    """Whether it may be copied to another device under a wrap key."""
    generate: Literal[True] | None = None
    """The device makes it, and no copy was ever outside."""
    import_: Annotated[KeyFile | None, Field(alias="import")] = None
    """It comes from a file."""
    certificate: Path | None = None
    """The certificate to store with it: PEM or DER."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.generate is None) == (self.import_ is None):
            raise ValueError("say one of generate = true and import = { file = ... }")
        algorithm = ALGORITHMS[self.algorithm]
        unsuited = combined(self.capabilities) & ~algorithm.uses
        if unsuited & CAPABILITY.EXPORTABLE_UNDER_WRAP:
            raise ValueError("say exportable = true in place of exportable-under-wrap")
        if unsuited:
            raise ValueError(f"a key of {self.algorithm} is of no use for {', '.join(names(unsuited))}")
        if self.certificate is not None and (self.generate or algorithm.type is not OBJECT.ASYMMETRIC_KEY):
            raise ValueError("only a key pair that is imported has a certificate already")
        return self


class NewShares(Table):
    """`split = { threshold = M, files = [...] }`: a new wrap key, in shares."""

    threshold: Annotated[int, Field(ge=2, le=SHARES_MAX)]
    """How many of them bring it back."""
    files: Annotated[tuple[Path, ...], Field(max_length=SHARES_MAX)]
    """A file for each custodian; none of them is there yet."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.files)) != len(self.files) or len(self.files) < self.threshold:
            raise ValueError("files names a different file for each share, and at least `threshold` of them")
        return self


class WrapKey(Table):
    """`[wrap_key]`: what keys travel under, from device to device. It never leaves one but as shares."""

    id: Id
    """Its id, the same on every device."""
    label: Label
    """Its label."""
    domains: Domains
    """The domains whose keys it may carry."""
    split: NewShares | None = None
    """A new one."""
    combine: Annotated[tuple[Path, ...], Field(min_length=2, max_length=SHARES_MAX)] | None = None
    """That of another device: the files of enough shares."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.split is None) == (self.combine is None):
            raise ValueError("say one of split and combine")
        return self


class Declaration(Table):
    """Everything that a device is to hold."""

    device: DeviceTable
    """Which device."""
    auth_keys: dict[str, AuthKey]
    """Who may log in."""
    audit: AuditTable = AuditTable()
    """What it logs."""
    wrap_key: WrapKey | None = None
    """What keys travel under."""
    keys: tuple[Key, ...] = ()
    """What it signs with."""

    @property
    def admin(self) -> AuthKey:
        """The admin: there is one."""
        return next(key for key in self.auth_keys.values() if key.role == "admin")


def load(path: Path) -> Declaration:
    """What the file declares. Raises DeclarationError with all mistakes."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeclarationError(path, [("", f"it cannot be read: {error.strerror}")]) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DeclarationError(path, [("", f"it is not TOML: {error}")]) from None
    mistakes = []
    try:
        declaration = Declaration.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)  # what was typed may be a secret
        mistakes += [(_spelt(detail["loc"]), _message(detail)) for detail in details if not _follows(detail, details)]
    mistakes += _cross_checks(data)
    if mistakes:
        raise DeclarationError(path, mistakes)
    return declaration


def _cross_checks(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong between the tables, as they were typed: no mistake hides another."""
    tables = data.get("auth_keys")
    auth_keys = list(tables.values()) if isinstance(tables, dict) else []
    keys = listed if isinstance(listed := data.get("keys"), list) else []
    if [_get(each, "role") for each in auth_keys].count("admin") != 1:
        yield "auth_keys", 'one of them, and only one, has role = "admin"'
    passwords = [_get(each, "password") for each in auth_keys]
    yield from (("auth_keys", f"more than one has the password file {file}") for file in _repeated(passwords, "file"))
    yield from (("auth_keys", f"more than one has the id {id_:#06x}") for id_ in _repeated(auth_keys, "id"))
    # a certificate is found by the id of its key: keys of different types have different ids too
    yield from (("keys", f"more than one has the id {id_:#06x}") for id_ in _repeated(keys, "id"))
    yield from (("keys", f"more than one has the label {label}") for label in _repeated(keys, "label"))
    exportable = [each for each in keys if _get(each, "exportable") is True]
    if exportable and "wrap_key" not in data:
        yield "wrap_key", "it is missing, and a key is exportable"
    elif missing := _numbers(exportable) - _numbers([data.get("wrap_key")]):
        yield "wrap_key.domains", f"exportable keys are in domain {', '.join(map(str, sorted(missing)))} too"


def _get(table: Any, key: str) -> Any:
    return table.get(key) if isinstance(table, dict) else None


def _numbers(tables: Collection[Any]) -> set[int]:
    """The domains that the tables name."""
    lists = [domains for each in tables if isinstance(domains := _get(each, "domains"), list)]
    return {domain for domains in lists for domain in domains if isinstance(domain, int)}


def _repeated(tables: Collection[Any], key: str) -> list[Any]:
    kind = int if key == "id" else str
    counted = Counter(value for each in tables if isinstance(value := _get(each, key), kind))
    return [value for value, count in counted.items() if count > 1]


def _follows(detail: ErrorDetails, details: list[ErrorDetails]) -> bool:
    """Whether a list is too short only because an item of it is wrong, which is said already."""
    size = len(detail["loc"])
    return detail["type"] == "too_short" and any(
        other["loc"][:size] == detail["loc"] != other["loc"] for other in details
    )


def _message(detail: ErrorDetails) -> str:
    """One mistake in words; never with what was typed as a value."""
    message = detail["msg"].removeprefix("Value error, ").replace("Input", "it", 1)
    match detail["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            message = "there is no such key"
        case "missing":
            message = "it is missing"
        case "too_short":
            message = f"it should have {detail['ctx']['min_length']} items at least"
        case "dataclass_type":
            message = 'a secret never stands in this file: write { file = "/path" }'
    return message


def _spelt(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{level}]" if isinstance(level, int) else f".{level}" for level in location).removeprefix(".")
