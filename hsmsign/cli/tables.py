"""What `doctor`, `keys` and `keys attest` print."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hsmsign.cli.failure import printable

if TYPE_CHECKING:
    from hsmsign.doctor import Finding
    from tokens.attestation import Attested

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}
_USABLE = {True: "yes", False: "no", None: "on request"}


def print_findings(findings: Iterable["Finding"]) -> None:
    """One row a finding, with what to do beneath it."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for _ in ("level", "subject", "message"):
        table.add_column(overflow="fold")
    for finding in findings:
        said = Text(printable(finding.message))
        if finding.hint:
            said.append(f"\n{printable(finding.hint)}", style="dim")
        table.add_row(Text(finding.level, style=_STYLES[finding.level]), Text(finding.subject), said)
    Console().print(table)


def print_keys(keys: Iterable[Mapping[str, Any]]) -> None:
    """One row a grant, as `GET /keys` describes it."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("NAME", "SIGNER", "ROLE", "FOR", "PROVIDER", "ALGORITHM", "USABLE"):
        table.add_column(title, overflow="fold")
    for key in keys:
        scope = key["distro"] if key["machine"] == "*" else key["machine"]
        usable = _USABLE[key["usable"]]
        if key.get("error"):
            usable += f": {key['error'].get('detail')}"
        cells = (key["name"], key["signer"], key["role"], scope, key["provider"], key["algorithm"] or "-", usable)
        table.add_row(*(Text(printable(str(cell))) for cell in cells))
    Console().print(table)


def print_attestation(attested: "Attested", spki_sha256: str) -> None:
    """One row for each thing that the device says of the key."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for _ in ("name", "value"):
        table.add_column(overflow="fold")
    for name, value in (
        ("device", f"YubiHSM 2, serial {attested.serial}, firmware {attested.firmware}"),
        ("key", f"0x{attested.id:04x} {attested.label}"),
        ("spki_sha256", spki_sha256),
        ("origin", attested.origin),
        ("exportable", "under wrap" if attested.exportable else "no"),
        ("domains", ", ".join(map(str, attested.domains))),
        ("capabilities", ", ".join(attested.capabilities)),
        ("proven by", attested.chain[-1].subject.rfc4514_string()),
    ):
        table.add_row(name, Text(printable(value)))
    Console().print(table)
