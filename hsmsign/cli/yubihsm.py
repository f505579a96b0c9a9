"""`hsmsign yubihsm`: sets a YubiHSM 2 up, and copies keys from one to another."""

import signal
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hsmsign.cli.audit import audit
from hsmsign.cli.failure import Failure, WrongUsage, printable

if TYPE_CHECKING:
    from tokens.provisioning.declaration import Declaration

_file = click.Path(exists=True, dir_okay=False, path_type=Path)
_apply = click.option("--apply", is_flag=True, help="Do it. Without this the plan is shown, and nothing is changed.")
_transcript = click.option(
    "--transcript",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A new file for what was done; else one beside FILE, with the serial number and the time in its name.",
)


@click.group()
def yubihsm() -> None:
    """Set up a YubiHSM 2, and copy keys from one to another."""


@yubihsm.command()
@click.argument("file", type=_file)
@_apply
@_transcript
def setup(file: Path, apply: bool, transcript: Path | None) -> None:
    """Set up a new YubiHSM 2 as FILE declares.

    FILE is explained in docs/yubihsm-setup.toml. Passwords that it names are made where there are none. Either all
    steps are taken, or the device is reset.
    """
    from tokens.provisioning import setup as provisioning
    from tokens.provisioning.plan import plan

    with _failures():
        declaration = _load(file)
        if not apply:
            for number, step in enumerate(plan(declaration), 1):
                _say(textwrap.fill(f"{number:2}. {step}", 100, subsequent_indent="    ", break_on_hyphens=False))
            _say(f"\n{provisioning.look(declaration.device)}\nNothing was changed. To do it, add --apply.")
            return
        _conceal()
        written = transcript or _beside(file, declaration)
        provisioning.set_up(declaration, written, _say)
        _say(f"Done. The transcript is {written}.")


@yubihsm.command()
@click.argument("source", metavar="FROM", type=_file)
@click.argument("target", metavar="TO", type=_file)
@click.option("--leave-bound", is_flag=True, help="Copy what can be copied, though other keys cannot leave FROM.")
@_apply
@_transcript
def clone(source: Path, target: Path, leave_bound: bool, apply: bool, transcript: Path | None) -> None:
    """Copy the exportable keys of one YubiHSM 2 to another.

    FROM and TO are the files by which they were set up, with the same wrap key: TO's came from shares of FROM's. What
    has been copied before is compared, and not copied again.
    """
    from tokens.provisioning.clone import clone as opened
    from tokens.provisioning.clone import named
    from tokens.provisioning.transcript import Transcript

    with _failures():
        declarations = _load(source), _load(target)
        _conceal()
        with opened(*declarations) as cloning:
            found = cloning.compare()
            _list("To be copied:", map(named, found.copies))
            _list("There already, and the same:", map(named, found.there))
            _list("Bound to its device, and not copied:", map(named, found.bound))
            _list("Different on the target:", map(named, found.conflicts))
            if found.conflicts:
                raise Failure("The target holds other objects with these ids.", "Delete them there, or reset it.")
            if found.bound and not leave_bound:
                raise Failure(
                    "Some objects cannot be copied: not exportable, or in domains that the wrap key is not in.",
                    "To copy the others, add --leave-bound.",
                )
            if not apply:
                _say("Nothing was changed. To do it, add --apply.")
                return
            written = transcript or _beside(target, declarations[1])
            with Transcript(written) as file:
                cloning.run(found, file, _say)
            _say(f"Done. The transcript is {written}.")


yubihsm.add_command(audit)


def _load(file: Path) -> "Declaration":
    from tokens.provisioning.declaration import DeclarationError, load

    try:
        return load(file)
    except DeclarationError as error:
        raise WrongUsage(error.message, error.hint) from None


@contextmanager
def _failures() -> Iterator[None]:
    from tokens.errors import Error

    try:
        yield
    except Error as error:
        raise Failure(error.message, error.hint) from None


def _conceal() -> None:
    """Secrets are about to be in memory: no core file, no tracing. What would end the process is an error instead."""
    from tokens.worker import conceal

    conceal()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


def _beside(file: Path, declaration: "Declaration") -> Path:
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    return file.with_name(f"{file.stem}-{declaration.device.serial}-{now}Z.jsonl")


def _list(title: str, items: Iterable[str]) -> None:
    if listed := [f"  {item}" for item in items]:
        _say("\n".join((title, *listed)))


def _say(text: str) -> None:
    click.echo(printable(text))
