"""`hsmsign keys`: what is granted, as the running server says."""

import json

import click

from hsmsign.cli.client import Patience, get
from hsmsign.cli.sign import server_option


def _run(server: str, as_json: bool) -> None:
    from hsmsign.cli import tables

    answer = get(server, "/keys", Patience())
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        tables.print_keys(answer["keys"])


keys = click.Command(
    "keys",
    callback=_run,
    params=[server_option(), click.Option(["--json", "as_json"], is_flag=True, help="Print the answer as JSON.")],
    help="List the granted keys of a server, and whether each can be used now.",
)
