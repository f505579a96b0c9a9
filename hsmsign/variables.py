"""Settings from the environment: HSMSIGN_*, and the DIGSIGSERVER_* of the server that hsmsign replaces."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from signers.registry import SIGNERS

KEY_FILES = "DIGSIGSERVER_KEYFILE_URI"

_PREFIX = "HSMSIGN_"
_NOT_SETTINGS = frozenset({"HSMSIGN_CONFIG", "HSMSIGN_SERVER"})
"""The settings file, and the server that the command line asks."""


class Setting(NamedTuple):
    """A value from the environment: where it belongs in the settings, and the variable that says so."""

    key: tuple[str, ...]
    variable: str
    value: Any


def from_hsmsign(environ: Mapping[str, str]) -> Iterator[Setting]:
    """The HSMSIGN_* variables: `__` stands between levels."""
    for variable in sorted(environ):
        if not variable.startswith(_PREFIX) or variable in _NOT_SETTINGS:
            continue
        levels = variable.removeprefix(_PREFIX).split("__")
        key = tuple(level.lower() for level in levels)
        if key[0] == "providers" and key[2:3] == ("env",):
            key = (*key[:3], *levels[3:])  # the variables of a token's module keep their case
        yield Setting(key, variable, _value(environ[variable]))


def _value(text: str) -> Any:
    """A list or a table is written as JSON; anything else is text, of which pydantic makes numbers and the like."""
    if text.startswith(("[", "{")):
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return text


def from_digsigserver(environ: Mapping[str, str]) -> Iterator[Setting]:
    """The DIGSIGSERVER_* variables that have a meaning here; the others are for signers that are not asked."""
    if uri := environ.get(KEY_FILES):
        yield Setting(("providers", "keyfiles"), KEY_FILES, _key_store(uri))
    if size := environ.get("DIGSIGSERVER_REQUEST_MAX_SIZE"):
        yield Setting(("limits", "upload_max_bytes"), "DIGSIGSERVER_REQUEST_MAX_SIZE", size)
    if base := environ.get("DIGSIGSERVER_IMX_CST_BASE"):
        yield Setting(("signers", "imx", "cst_base"), "DIGSIGSERVER_IMX_CST_BASE", base)
    if base := environ.get("DIGSIGSERVER_L4T_TOOLS_BASE"):
        yield Setting(("signers", "tegra", "l4t_base"), "DIGSIGSERVER_L4T_TOOLS_BASE", base)
    if tools := environ.get("DIGSIGSERVER_RK_TOOLS_PATH"):
        yield Setting(("signers", "rk", "tools"), "DIGSIGSERVER_RK_TOOLS_PATH", tools)
    if seconds := environ.get("DIGSIGSERVER_RESPONSE_TIMEOUT"):
        yield Setting(("limits", "job_timeout_s"), "DIGSIGSERVER_RESPONSE_TIMEOUT", seconds)
        yield Setting(("server", "response_timeout_s"), "DIGSIGSERVER_RESPONSE_TIMEOUT", seconds)
    if level := environ.get("DIGSIGSERVER_LOG_LEVEL"):
        yield Setting(("log", "level"), "DIGSIGSERVER_LOG_LEVEL", level.lower().replace("critical", "error"))


def _key_store(uri: str) -> dict[str, str]:
    """The provider that file:///directory or s3://bucket/prefix names; lacks what the URI lacks."""
    parts = urlsplit(uri)
    path = unquote(parts.path)
    match parts.scheme, parts.netloc, path:
        case "file", ("" | "localhost"), root if root:
            return {"kind": "file", "root": root}
        case "s3", bucket, prefix if bucket:
            return {"kind": "s3", "bucket": bucket, "prefix": prefix.strip("/")}
    return {"kind": parts.scheme}


def key_file_grants(grants: list[Any]) -> Iterator[dict[str, Any]]:
    """A grant for each key file of digsigserver's layout, where `grants` have none for its signer and role."""
    granted = [(grant.get("signer"), grant.get("role")) for grant in grants if isinstance(grant, dict)]
    for signer in SIGNERS:
        for role in signer.roles:
            if role.key_file is None or (signer.name, role.name) in granted:
                continue
            grant: dict[str, Any] = {"name": f"{signer.name}-{role.name}", "signer": signer.name, "role": role.name}
            grant |= {"provider": "keyfiles", "object": f"{{{signer.scope}}}/{role.key_file}"}
            if role.certificate_file is not None:
                grant["certificate"] = f"{{{signer.scope}}}/{role.certificate_file}"
            if role.aliases:
                grant["aliases"] = role.aliases
            yield grant


def default_spool_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """/var/spool/hsmsign for root; else one for each user below $TMPDIR or /var/tmp (/tmp is often memory)."""
    if os.geteuid() == 0:
        return Path("/var/spool/hsmsign")
    return Path(environ.get("TMPDIR") or "/var/tmp", f"hsmsign-{os.geteuid()}")  # noqa: S108 - whose it is, its user checks


def default_state_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """systemd's $STATE_DIRECTORY, else /var/lib/hsmsign for root, else hsmsign below $XDG_STATE_HOME."""
    if given := environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/hsmsign")
    return Path(environ.get("XDG_STATE_HOME") or Path.home() / ".local/state", "hsmsign")
