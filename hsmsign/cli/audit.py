"""`hsmsign yubihsm audit`: what is kept of the devices' logs, and the alarms about them. Needs no device."""

import json
import os
import pwd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hsmsign.cli.failure import Failure, WrongUsage, printable

if TYPE_CHECKING:
    from tokens.audit.alarms import Alarms


def _run(config: Path | None, verify: bool, accept: tuple[str, ...], accept_until: str | None, as_json: bool) -> None:
    from hsmsign import settings
    from tokens.audit.lines import Damaged

    try:
        directory = settings.load(config).server.state_directory / "audit"
        serials = sorted(int(path.stem) for path in directory.glob("*.jsonl") if path.stem.isdecimal())
        if not serials:
            raise Failure("No device has been audited.", f"Logs are kept in {directory}, of providers with `audit`.")
        if accept or accept_until:
            _accept([_alarms(directory, serial) for serial in serials], accept, accept_until)
        found = [_device(directory, serial, verify) for serial in serials]
    except settings.SettingsError as error:
        raise WrongUsage(error.message, error.hint) from None
    except Damaged as error:
        raise Failure(
            f"An audit file cannot be read: {error}.", "Try --verify, which says of each log where."
        ) from None
    except OSError as error:
        raise Failure(f"{error.filename}: {error.strerror}.", "Run it as the service's user.") from None
    click.echo(json.dumps(found, indent=2) if as_json else "\n\n".join(map(_text, found)))
    if any("damage" in device for device in found):
        raise click.exceptions.Exit(1)


def _accept(devices: "list[Alarms]", accept: tuple[str, ...], until: str | None) -> None:
    """Accepts alarms by their ids, and all on a device up to an id; none where one of these does not stand."""
    standing = {alarm.id: (alarms, alarm) for alarms in devices for alarm in alarms.standing()}
    for alarm_id in (*accept, *([until] if until else ())):
        if alarm_id not in standing:
            raise Failure(f"No alarm {alarm_id} stands.", f"There are: {', '.join(standing) or 'none'}.")
    wanted = [*accept]
    if until:
        ids = [alarm.id for alarm in standing[until][0].standing()]
        wanted += ids[: ids.index(until) + 1]
    by = pwd.getpwuid(os.getuid()).pw_name
    for alarm_id in dict.fromkeys(wanted):
        alarms, alarm = standing[alarm_id]
        alarms.accept(alarm, by)


def _alarms(directory: Path, serial: int) -> "Alarms":
    from tokens.audit.alarms import Alarms

    return Alarms(directory / f"{serial}.alarms.jsonl", serial)


def _device(directory: Path, serial: int, verify: bool) -> dict[str, Any]:
    """What is known of one device."""
    from dataclasses import asdict

    from tokens.audit import store
    from tokens.audit.lines import Damaged

    path = directory / f"{serial}.jsonl"
    device: dict[str, Any] = {"serial": serial, "log": str(path)}
    if verify:
        try:
            verified = store.verify(path)
        except Damaged as damage:
            device["damage"] = str(damage)
        else:
            device["verified"] = {
                "entries": verified.entries,
                "breaks": [{"index": stored.index, "kind": stored.broken} for stored in verified.breaks],
            }
    if "damage" not in device:
        log = store.Store(path)
        if log.last:
            entry = log.last.entry
            device["last"] = {"number": entry.number, "command": entry.name, "read": log.last.read}
        device["reconciled"] = log.reconciled
    device["alarms"] = [asdict(alarm) for alarm in _alarms(directory, serial).all()]
    return device


def _text(device: dict[str, Any]) -> str:
    """What is printed of one device."""
    from tokens.audit.alarms import ADVICE

    rows = [f"device {device['serial']}: {device['log']}"]
    if last := device.get("last"):
        rows.append(f"  last entry: {last['number']} {last['command']}, read {last['read']}")
    for account in (device.get("reconciled") or {}).get("accounts", ()):
        rows.append(
            "  {command} with key 0x{key:04x} by authentication key 0x{auth_key:04x}:"
            " {asked} asked for, {answered} answered, {refused} refused, {logged} in the log".format(**account)
        )
    if verified := device.get("verified"):
        rows.append(f"  verified: {verified['entries']} entries, {len(verified['breaks'])} breaks in the chain")
        rows += [f"    before index {found['index']}: {found['kind']}" for found in verified["breaks"]]
    if "damage" in device:
        rows.append(f"  DAMAGED: {device['damage']}")
    for alarm in device["alarms"]:
        accepted = f"accepted by {alarm['accepted_by']} {alarm['accepted']}" if alarm["accepted"] else "STANDS"
        rows.append(f"  alarm {alarm['id']}, {alarm['kind']}, {alarm['at']}, {accepted}\n    {alarm['message']}")
        if not alarm["accepted"]:
            rows.append(f"    {ADVICE[alarm['kind']]}")
    return printable("\n".join(rows))


audit = click.Command(
    "audit",
    callback=_run,
    params=[
        click.Option(
            ["--config"],
            type=click.Path(dir_okay=False, path_type=Path),
            help="The settings; else $HSMSIGN_CONFIG, ./hsmsign.toml or /etc/hsmsign/hsmsign.toml.",
        ),
        click.Option(
            ["--verify"], is_flag=True, help="Verify the whole stored logs; exits with 1 where one is damaged."
        ),
        click.Option(
            ["--accept"],
            multiple=True,
            metavar="ALARM",
            help="Accept an alarm: once none stands, signing goes on. Repeatable.",
        ),
        click.Option(
            ["--accept-until"], metavar="ALARM", help="Accept this alarm, and all before it on the same device."
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print it as JSON."),
    ],
    help="Show what is kept of the logs of audited devices, and the alarms about them.",
)
