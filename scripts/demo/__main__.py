"""Signs with every signer, variant and provider over REST, and has another tool verify each.

    .venv/bin/python scripts/demo

Starts the real service, with a SoftHSM token, a simulated YubiHSM 2, key files and an S3 server. A row is verified when
its tool accepts the signed artifact and refuses it once it was tampered with. Writes demo-report.json.
A new signer is a module with `cases` and a line in CASES.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import ekb
import fitimage
import generic
import httpx
import imx
import kmod
import mender
import optee
import rockchip
import swupdate
import tegra
import uefi
from case import ROOT, Case, Fixtures
from rich.console import Console
from rich.table import Table
from services import BUCKET, CREDENTIALS, s3_server, service, yubihsm

CASES = (
    swupdate.cases,
    imx.cases,
    kmod.cases,
    mender.cases,
    optee.cases,
    uefi.cases,
    ekb.cases,
    fitimage.cases,
    rockchip.cases,
    tegra.cases,
    generic.cases,
)

REQUEST_TIMEOUT_S = 60.0
LOG = ".cache/demo/service.log"
S3_CONFIG = """
[providers.s3]
kind = "s3"
bucket = "{bucket}"
endpoint_url = "{url}"

[[grants]]
name = "demo-s3-rsa"
signer = "swupdate"
role = "rsa"
distro = "demo-s3"
provider = "s3"
object = "demo-file/swupdate/rsa-private.key"

[[grants]]
name = "demo-s3-cms"
signer = "swupdate"
role = "cms"
distro = "demo-s3"
provider = "s3"
object = "demo-file/swupdate/cms-private.key"
certificate = "demo-file/swupdate/cms.cert"
"""


def main() -> int:
    console = Console()
    fixtures = Fixtures(ROOT / ".cache/demo/fixtures")
    for script in ("make_fixtures.py", "make_yubihsm.py"):
        subprocess.run([sys.executable, ROOT / "softhsm-fixtures" / script, fixtures.directory], check=True)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hsmsign-demo-")))
        s3_url = stack.enter_context(s3_server(fixtures.directory / "keys"))
        config = scratch / "hsmsign.toml"
        configured = (fixtures.directory / "yubihsm/hsmsign.toml").read_text()
        connector = stack.enter_context(yubihsm(fixtures.directory / "yubihsm", scratch))
        configured = configured.replace("http://127.0.0.1:12345", connector)
        # each run has a device and an audit of its own: one that was broken off would be an alarm in the next
        configured = configured.replace(str(fixtures.directory / "state"), str(scratch / "state"))
        config.write_text(configured + S3_CONFIG.format(bucket=BUCKET, url=s3_url))
        url = stack.enter_context(service(config, ROOT / LOG, CREDENTIALS))
        client = stack.enter_context(httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S))
        rows = [run(case, client, scratch) for cases in CASES for case in cases(fixtures)]
    (ROOT / "demo-report.json").write_text(json.dumps([row.report() for row in rows], indent=2) + "\n")
    console.print(table(rows))
    failed = [row for row in rows if not row.verified]
    for row in failed:
        console.print(
            f"{row.case.signer} {row.case.variant}, {row.case.provider}: {row.problem}", style="red", markup=False
        )
    console.print(f"{len(rows) - len(failed)} of {len(rows)} verified; see demo-report.json and {LOG}.")
    return 1 if failed else 0


@dataclass(frozen=True)
class Row:
    """What became of a case: `seconds` is the time from the request to its answer, `problem` what went wrong."""

    case: Case
    seconds: float
    problem: str = ""

    @property
    def verified(self) -> bool:
        return not self.problem

    def report(self) -> dict[str, str | bool | float]:
        """Its entry in demo-report.json."""
        names = {name: getattr(self.case, name) for name in ("signer", "variant", "provider", "verifier")}
        return names | {"verified": self.verified, "seconds": round(self.seconds, 4)}


def run(case: Case, client: httpx.Client, scratch: Path) -> Row:
    """Signs, verifies, tampers, and sees that it is refused."""
    directory = Path(tempfile.mkdtemp(dir=scratch))
    seconds = 0.0

    def post(path: str, fields: Mapping[str, str], files: Mapping[str, Path]) -> bytes:
        nonlocal seconds
        contents = {name: (file.name, file.read_bytes()) for name, file in files.items()}
        contents |= {name: (None, value.encode()) for name, value in fields.items()}  # multipart without a file too
        start = time.perf_counter()
        response = client.post(path, files=contents)
        seconds += time.perf_counter() - start
        return response.raise_for_status().content

    try:
        signed = case.sign(post, directory)
    except httpx.HTTPStatusError as error:
        return Row(case, seconds, f"the service answered {error.response.status_code}: {error.response.text}")
    except httpx.TransportError as error:
        return Row(case, seconds, f"the service did not answer: {error}")
    if not case.verify(signed):
        return Row(case, seconds, f"{case.verifier} refuses it")
    case.tamper(signed)
    if case.verify(signed):
        return Row(case, seconds, f"{case.verifier} accepts it though it was tampered with")
    return Row(case, seconds)


def table(rows: list[Row]) -> Table:
    """The rows for a terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("signer", "variant", "provider", "verifier", "signed", "tampered"):
        table.add_column(heading, no_wrap=True)
    table.add_column("ms", justify="right")
    for row in rows:
        case = row.case
        verdicts = ("[green]accepted", "[green]refused") if row.verified else ("[red]NO", "")
        table.add_row(case.signer, case.variant, case.provider, case.verifier, *verdicts, f"{row.seconds * 1000:.0f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
