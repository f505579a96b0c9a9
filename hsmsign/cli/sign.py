"""`hsmsign sign SIGNER`: one command for each signer, its options made from the signer's form."""

import stat
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from hsmsign.cli.client import DEFAULT_SERVER, Patience, post
from signers.registry import SIGNERS
from signers.signer import Signer, Upload

_PATIENCE = Patience()


@click.group()
def sign() -> None:
    """Have a server sign an artifact."""


def _command(signer: Signer) -> click.Command:
    fields = signer.form.model_fields
    options = [_option(name, field) for name, field in fields.items()]

    def run(output: Path, server: str, **given: Any) -> None:
        patience = Patience(**{name: given.pop(name) for name in Patience.__dataclass_fields__})
        sent = {fields[name].alias or name: value for name, value in given.items() if value is not None}
        uploads = {name: value for name, value in sent.items() if isinstance(value, Path)}
        texts = {name: str(value) for name, value in sent.items() if name not in uploads}
        post(server, signer.path, texts, uploads, _writable(output), patience)

    return click.Command(signer.name, callback=run, params=[*options, *_common()], help=signer.summary)


def _option(name: str, field: FieldInfo) -> click.Option:
    """The option for a field of a form: `--key-uri` for `key-uri`; absent ones are not sent."""
    spelt = f"--{(field.alias or name).replace('_', '-')}"
    default = "" if field.is_required() or field.default is None else f"  [default: {field.default}]"
    return click.Option(
        [spelt, name], type=_type(field.annotation), required=field.is_required(), help=f"{field.description}{default}"
    )


def _type(annotation: Any) -> "click.ParamType[Any]":
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(member for member in get_args(annotation) if member is not type(None))
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation))
    simple: dict[Any, click.ParamType[Any]] = {
        Upload: click.Path(exists=True, dir_okay=False, readable=True, path_type=Path),
        int: click.INT,
        bool: click.BOOL,
    }
    return simple.get(annotation, click.STRING)


def _common() -> list[click.Option]:
    seconds = click.FloatRange(min=0, min_open=True)
    return [
        click.Option(
            ["--output", "-o"],
            type=click.Path(dir_okay=False, path_type=Path),
            required=True,
            help="Where the answer goes; it is written whole or not at all.",
        ),
        server_option(),
        click.Option(
            ["--retries"],
            type=click.IntRange(min=0),
            default=_PATIENCE.retries,
            show_default=True,
            help="How often a request is sent again when the server is busy (429, 503).",
        ),
        click.Option(
            ["--max-wait", "max_wait_s"],
            type=click.FloatRange(min=0),
            default=_PATIENCE.max_wait_s,
            show_default=True,
            help="Seconds to wait in all between these; the server says how long (Retry-After).",
        ),
        click.Option(
            ["--connect-timeout", "connect_timeout_s"],
            type=seconds,
            default=_PATIENCE.connect_timeout_s,
            show_default=True,
            help="Seconds to wait for the connection.",
        ),
        click.Option(
            ["--timeout", "timeout_s"],
            type=seconds,
            default=_PATIENCE.timeout_s,
            show_default=True,
            help="Seconds to wait for the answer.",
        ),
    ]


def server_option() -> click.Option:
    """`--server`, for every command that asks one."""
    return click.Option(
        ["--server"],
        envvar="HSMSIGN_SERVER",
        default=DEFAULT_SERVER,
        show_default=True,
        show_envvar=True,
        help="The server's URL.",
    )


def _writable(output: Path) -> Path:
    """The file itself, where `output` is a link to it. Raises click's usage error where it can be no file."""
    output = output.resolve()
    if not output.parent.is_dir():
        raise click.BadParameter(f"{output.parent} is no directory.", param_hint="--output")
    if output.exists() and not stat.S_ISREG(output.stat().st_mode):
        raise click.BadParameter(f"{output} is no regular file: it would be replaced.", param_hint="--output")
    return output


for _signer in SIGNERS:
    sign.add_command(_command(_signer))
