"""The command line: `hsmsign serve | doctor | keys | sign | yubihsm`.

A command imports what it needs when it runs: `sign` and `keys` talk to a server and load no part of one.
"""

import asyncio
import json
from dataclasses import asdict
from pathlib import Path

import click

import hsmsign
from hsmsign.cli.failure import Failure, WrongUsage
from hsmsign.cli.keys import keys
from hsmsign.cli.sign import sign
from hsmsign.cli.yubihsm import yubihsm
from tokens.errors import Error

_config = click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The settings; else $HSMSIGN_CONFIG, ./hsmsign.toml or /etc/hsmsign/hsmsign.toml.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(hsmsign.__version__, prog_name="hsmsign", message="%(prog)s %(version)s")
def main() -> None:
    """Sign firmware with keys on PKCS#11 tokens, in files or in S3.

    \b
    Exit codes: 0 done, 1 failed here, 2 wrong usage or settings, 3 refused by the server,
    4 the server failed or is busy, 5 no connection, or no whole answer.
    """


@main.command()
@_config
@click.option("--address", help="The address to listen on. There is no authentication.")
@click.option("--port", type=click.IntRange(0, 65535), help="The port to listen on; 0 chooses one.")
def serve(config: Path | None, address: str | None, port: int | None) -> None:
    """Run the service in the foreground, until SIGTERM or Ctrl-C."""
    from hsmsign import server, settings

    try:
        told = settings.load(config, server={"address": address, "port": port})
        asyncio.run(server.serve(told))
    except Error as error:
        failure = WrongUsage if isinstance(error, settings.SettingsError) else Failure
        raise failure(error.message, error.hint) from None


@main.command()
@_config
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--unlock", metavar="NAME", multiple=True, help="First unlock the key of a grant, which did not verify.")
@click.pass_context
def doctor(context: click.Context, config: Path | None, as_json: bool, unlock: tuple[str, ...]) -> None:
    """Check settings, tokens and keys, and say what is missing. Exits with 1 where there is an error."""
    from hsmsign.cli import tables
    from hsmsign.doctor import Level, examine

    _unlock(config, unlock)
    findings = asyncio.run(examine(config))
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        tables.print_findings(findings)
    context.exit(any(finding.level is Level.ERROR for finding in findings))


def _unlock(config: Path | None, names: tuple[str, ...]) -> None:
    from hsmsign import settings
    from hsmsign.locks import Locks

    if not names:
        return
    try:
        locks = Locks(settings.load(config).server.state_directory)
    except settings.SettingsError as error:
        raise WrongUsage(error.message, error.hint) from None
    for name in names:
        if not locks.unlock(name):
            raise WrongUsage(f"The key {name} is not locked.", "`hsmsign doctor` lists the locked keys.")


main.add_command(keys)
main.add_command(sign)
main.add_command(yubihsm)
