"""`hsmsign keys`: what is granted, as the running server says, and attestations, which are verified here too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from hsmsign.cli.client import Patience, get
from hsmsign.cli.failure import Failure, NoAnswer, WrongUsage
from hsmsign.cli.sign import server_option

if TYPE_CHECKING:
    from tokens.attestation import Attested


def _list(server: str, as_json: bool) -> None:
    from hsmsign.cli import tables

    if click.get_current_context().invoked_subcommand:
        return
    answer = get(server, "/keys", Patience())
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        tables.print_keys(answer["keys"])


def _attest(name: str, server: str, root: Path | None, out: Path | None, as_json: bool) -> None:
    from hsmsign.cli import tables
    from tokens import attestation
    from tokens.errors import KeyProblem
    from tokens.provider import spki_sha256

    answer = get(server, f"/keys/{quote(name, safe='')}/attestation", Patience())
    if out is not None:
        _write(out, {"attestation.pem": answer["certificate_pem"], "chain.pem": answer["chain_pem"]})
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    if not answer["verified"]:
        raise Failure(answer["error"]["detail"], answer["error"].get("hint") or "")
    try:
        attested = _verified(answer, root)
        if not as_json:
            public_key: Any = attested.chain[0].public_key()
            tables.print_attestation(attested, spki_sha256(public_key))
        attestation.check_never_extractable(attested)
    except KeyProblem as problem:
        raise Failure(problem.message, problem.hint) from None


def _verified(answer: dict[str, Any], root: Path | None) -> "Attested":
    """What the attestation says, by this machine's own judgement. Raises Failure, KeyNotAttested."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    from tokens import attestation
    from tokens.certificates import load_certificates
    from tokens.provider import Attestation

    try:
        roots = None if root is None else load_certificates(root.read_bytes())
    except OSError as error:
        raise WrongUsage(f"{root} cannot be read: {error.strerror}.", "Name a file of PEM by --root.") from None
    try:
        der = serialization.Encoding.DER
        certificate, *issuers = (
            each.public_bytes(der)
            for each in x509.load_pem_x509_certificates(f"{answer['certificate_pem']}{answer['chain_pem']}".encode())
        )
        public_key: Any = serialization.load_pem_public_key(answer["public_key_pem"].encode())
    except ValueError:
        raise NoAnswer("The answer holds no certificates that can be read.", "Look at it with --json.") from None
    return attestation.verify(Attestation(certificate, tuple(issuers)), public_key, roots=roots)


def _write(directory: Path, files: dict[str, str]) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name).write_text(text)
    except OSError as error:
        raise Failure(f"{directory} cannot be written: {error.strerror}.", "Name another directory by --out.") from None


def _of_keys(option: str) -> Callable[[], Any]:
    """The default of a subcommand's option: what `keys` was given, as in `hsmsign keys --server URL attest NAME`."""

    def given() -> Any:
        keys = click.get_current_context().parent
        return keys and keys.params[option]

    return given


keys = click.Group(
    "keys",
    callback=_list,
    invoke_without_command=True,
    params=[server_option(), click.Option(["--json", "as_json"], is_flag=True, help="Print the answer as JSON.")],
    help="List the granted keys of a server, and whether each can be used now.",
)
keys.add_command(
    click.Command(
        "attest",
        callback=_attest,
        params=[
            click.Argument(["name"]),
            click.Option(["--server"], default=_of_keys("server"), show_default="as of keys", help="The server's URL."),
            click.Option(
                ["--root"],
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                help="The certificates that it must lead to, in PEM; Yubico's where this is not given.",
            ),
            click.Option(
                ["--out"],
                type=click.Path(file_okay=False, path_type=Path),
                help="Writes attestation.pem and chain.pem to this directory.",
            ),
            click.Option(
                ["--json", "as_json"],
                is_flag=True,
                default=_of_keys("as_json"),
                help="Print the server's answer as JSON.",
            ),
        ],
        help="Show what its device says of a key, and verify that here. Exits with 1 unless it is proven that the key "
        "was generated on the device and cannot leave it.",
    )
)
