"""Looks at everything that signing needs, and says what is missing and how to come by it.

It asks tokens the way the service does, through their workers: a PIN that was refused is not tried again by it either.
"""

import asyncio
import ipaddress
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from hsmsign.keyring import Keyring, KeyState
from hsmsign.mistakes import PLACEHOLDER
from hsmsign.settings import Grant, ServerSettings, Settings, SettingsError, find_file, load
from signers.registry import SIGNERS
from signers.sandbox import Sandbox
from signers.signer import UsesTools, by_name
from tokens.errors import Error, ToolUnavailable
from tokens.file import FileSettings
from tokens.pkcs11 import Pkcs11Settings
from tokens.provider import KeyProvider
from tokens.registry import AnySettings, create
from tokens.secret import SecretSource
from tokens.yubihsm import YubihsmSettings

_PACKAGES = {
    "libsofthsm2.so": "softhsm2",
    "opensc-pkcs11.so": "opensc-pkcs11",
    "onepin-opensc-pkcs11.so": "opensc-pkcs11",
    "p11-kit-client.so": "p11-kit-modules",
    "libtpm2_pkcs11.so": "libtpm2-pkcs11-1",
    "libykcs11.so": "ykcs11",
    "yubihsm_pkcs11.so": "yubihsm-pkcs11, of Yubico's SDK for Debian",
}
"""Which Debian package brings a PKCS#11 module."""


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, what was found, and what to do about it."""

    level: Level
    subject: str
    message: str
    hint: str = ""


async def examine(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Everything that is found about the settings that `hsmsign.settings.load` reads, and about what they name."""
    try:
        settings = load(path, environ)
    except SettingsError as error:
        return [Finding(Level.ERROR, where, message, error.hint) for where, message in error.mistakes]
    file = find_file(path, environ)
    return [
        Finding(Level.OK, "settings", f"read from {file}" if file else "no file: variables and defaults"),
        *_address(settings.server),
        *_directories(settings),
        *_grants(settings),
        *(finding for name, provider in settings.providers.items() for finding in _provider(name, provider)),
        *await _tools(settings),
        *await _keys(settings),
    ]


def _address(server: ServerSettings) -> Iterator[Finding]:
    try:
        _, _, _, _, (address, *_) = socket.getaddrinfo(server.address, server.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        yield Finding(Level.ERROR, "server.address", f"{server.address}: {error.strerror}", "Correct the address.")
        return
    if not ipaddress.ip_address(str(address)).is_loopback:
        yield Finding(
            Level.WARNING,
            "server.address",
            f"{server.address} can be reached from other machines, and there is no authentication.",
            "Listen on 127.0.0.1, or see to it that only builds reach the port.",
        )


def _directories(settings: Settings) -> Iterator[Finding]:
    for key in ("spool_directory", "state_directory"):
        directory: Path = getattr(settings.server, key)
        nearest = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            yield Finding(
                Level.ERROR,
                f"server.{key}",
                f"{directory} cannot be written by this user.",
                f"Run as the service's user, or make the directory for it: install -d -m 700 -o USER {directory}",
            )


async def _tools(settings: Settings) -> list[Finding]:
    """Whether vendors' tools can run, and are there for those who may use them."""
    found = [Finding(Level.OK, "tools.sandbox", "bubblewrap runs.")]
    if settings.tools.sandbox == "none":
        message = "tools run without a sandbox: a hostile artifact may reach whatever this user can."
        found = [Finding(Level.WARNING, "tools.sandbox", message, 'Set sandbox = "bubblewrap" in [tools].')]
    try:
        await Sandbox(settings.tools).check()
    except ToolUnavailable as error:
        found = [Finding(Level.ERROR, "tools.sandbox", error.message, error.hint)]
    for signer in SIGNERS:
        roles = {grant.role for grant in settings.grants if grant.signer == signer.name}
        if roles and isinstance(signer, UsesTools):
            looked = signer.look(settings.signers.of(signer.name), roles)
            found += [_of_tool(signer.tools_setting, each) for each in looked]
    return found


def _of_tool(subject: str, state: str | ToolUnavailable) -> Finding:
    if isinstance(state, ToolUnavailable):
        return Finding(Level.WARNING, subject, state.message, state.hint)
    return Finding(Level.OK, subject, state)


def _grants(settings: Settings) -> Iterator[Finding]:
    if not settings.grants:
        yield Finding(Level.WARNING, "grants", "nothing is granted: every request is refused.", "Add [[grants]].")
    used = {grant.provider for grant in settings.grants}
    for name in settings.providers.keys() - used:
        yield Finding(Level.WARNING, f"providers.{name}", "no grant uses it.", "Grant a key of it, or take it out.")


def _provider(name: str, provider: Any) -> Iterator[Finding]:
    """What the file system tells of a provider."""
    if isinstance(provider, Pkcs11Settings) and not provider.module.exists():
        package = next((brings for file, brings in _PACKAGES.items() if provider.module.name.startswith(file)), None)
        hint = (
            f"Install it (Debian: {package}), or correct the path." if package else "Install it, or correct the path."
        )
        yield Finding(Level.ERROR, f"providers.{name}.module", f"{provider.module} is not there.", hint)
    for key in ("pin", "passphrase", "password"):
        source = getattr(provider, key, None)
        if source is not None:
            yield from _secret(f"providers.{name}.{key}", source)
    if isinstance(provider, YubihsmSettings) and provider.audit is not None:
        yield from _secret(f"providers.{name}.audit.password", provider.audit.password)


def _secret(subject: str, source: SecretSource) -> Iterator[Finding]:
    try:
        path = source.path()
        source.read()
    except Error as error:
        yield Finding(Level.ERROR, subject, error.message, error.hint)
        return
    if source.file is not None and path.stat().st_mode & 0o077:
        yield Finding(Level.WARNING, subject, "others than its owner can read the file.", f"chmod 600 {path}")


def _without_audit(provider: AnySettings) -> AnySettings:
    """A look at a device is not to take part in the audit, which the service does."""
    return provider.model_copy(update={"audit": None}) if isinstance(provider, YubihsmSettings) else provider


async def _keys(settings: Settings) -> list[Finding]:
    """What providers and keys say of themselves, and what `tokens` warned of meanwhile."""
    providers = {
        name: create(name, _without_audit(provider), settings.server.state_directory)
        for name, provider in settings.providers.items()
        if not (isinstance(provider, Pkcs11Settings) and not provider.module.exists())
    }
    granted = tuple(grant for grant in settings.grants if grant.provider in providers)
    keyring = Keyring(settings.model_copy(update={"grants": granted}), providers, SIGNERS)
    with _warnings() as warned:
        async with _started(providers):
            readiness = await keyring.readiness()
            found = [_of_provider(name, error) for name, error in readiness.providers.items()]
            for grant, state in zip(granted, readiness.keys, strict=True):
                if readiness.providers[state.provider] is None:
                    found += (
                        [_of_key(state)] if state.usable is not None else await _of_template(grant, settings, keyring)
                    )
    said = [finding.message for finding in found]
    new = (text for text in dict.fromkeys(warned) if not any(message in text for message in said))
    return [*found, *(Finding(Level.WARNING, "providers", text) for text in new)]


class _Texts(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collects what `tokens` logs: key files that others can read, workers that die."""
    handler = _Texts()
    logger = logging.getLogger("tokens")
    logger.addHandler(handler)
    try:
        yield handler.texts
    finally:
        logger.removeHandler(handler)


@asynccontextmanager
async def _started(providers: Mapping[str, KeyProvider]) -> AsyncIterator[None]:
    try:
        await asyncio.gather(*(provider.start() for provider in providers.values()))
        yield
    finally:
        await asyncio.gather(*(provider.stop() for provider in providers.values()))


def _of_provider(name: str, error: Error | None) -> Finding:
    if error is None:
        return Finding(Level.OK, f"providers.{name}", "it answers.")
    return Finding(Level.ERROR, f"providers.{name}", error.message, error.hint)


def _of_key(state: KeyState) -> Finding:
    subject = f"grants: {state.name}"
    if state.error is not None:
        return Finding(Level.ERROR, subject, state.error.message, state.error.hint)
    what = f", spki_sha256 {state.spki_sha256}" if state.spki_sha256 else ""
    return Finding(Level.OK, subject, f"{state.algorithm or 'a file'} for {state.signer}{what}")


async def _of_template(grant: Grant, settings: Settings, keyring: Keyring) -> list[Finding]:
    """What a grant of key files gives for each machine or distro that has one."""
    provider = settings.providers[grant.provider]
    signer = by_name(SIGNERS)[grant.signer]
    role = by_name(signer.roles)[grant.role]
    found = []
    for name in _names(grant, provider.root) if isinstance(provider, FileSettings) else ():
        machine, distro = (name, None) if signer.scope == "machine" else (None, name)
        if not grant.covers(machine, distro):
            continue
        subject = f"grants: {grant.name}, {signer.scope} {name}"
        try:
            keys = keyring.keys(grant.signer)
            if role.is_file:
                await keys.read(grant.role, machine=machine, distro=distro)
            else:
                open_ = keys.open_symmetric if role.algorithms else keys.open
                async with open_(grant.role, machine=machine, distro=distro):
                    pass
            what = "file" if role.is_file else "key"
            found.append(Finding(Level.OK, subject, f"a {what} for {grant.signer}, role {grant.role}."))
        except Error as error:
            found.append(Finding(Level.ERROR, subject, error.message, error.hint))
    return found or [Finding(Level.OK, f"grants: {grant.name}", "its key depends on the request: not looked at.")]


def _names(grant: Grant, root: Path) -> list[str]:
    """The machines or distros that have the grant's key file, where `{distro}` in it is a directory of its own."""
    above, _, below = PLACEHOLDER.sub("\0", grant.object or "").partition("\0/")
    directory = Path(root, above)
    if not below or above[-1:] not in ("", "/") or not directory.is_dir():
        return []
    names = [each.name for each in directory.iterdir()]
    return sorted(name for name in names if Path(directory, name, below.replace("\0", name)).exists())
