"""The state file: everything that survives a power cycle, as JSON.

It holds private keys in the clear: the simulator protects nothing. The file is replaced as a whole and is for its
owner alone (0600).
"""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from yubihsm_simulator.definitions import Algorithm, ObjectType
from yubihsm_simulator.log import AuditLog
from yubihsm_simulator.objects import ObjectStore, StoredObject
from yubihsm_simulator.options import Options


def save(path: Path, serial: int, objects: ObjectStore, options: Options, log: AuditLog) -> None:
    """Replaces the file."""
    state = {
        "serial": serial,
        "objects": [asdict(stored) | {"label": stored.label.hex(), "value": stored.value.hex()} for stored in objects],
        "sequences": [[*key, sequence] for key, sequence in objects.sequences.items()],
        "options": {
            "force_audit": options.force_audit,
            "command_audit": list(options.command_audit.items()),
            "algorithms": list(options.algorithms.items()),
        },
        "log": {
            "entries": [entry.hex() for entry in log.entries],
            "unlogged_boots": log.unlogged_boots,
            "unlogged_authentications": log.unlogged_authentications,
            "last_number": log.last_number,
            "last_digest": log.last_digest.hex(),
        },
    }
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # made with mode 0600
    with os.fdopen(descriptor, "w") as file:
        json.dump(state, file)
    Path(name).replace(path)


def load(path: Path, serial: int, objects: ObjectStore, options: Options, log: AuditLog) -> None:
    """Fills new parts with what was saved. Raises ValueError where the file is another device's."""
    state: dict[str, Any] = json.loads(path.read_text())
    if state["serial"] != serial:
        raise ValueError(f"{path} is the state of device {state['serial']}, not of {serial}")
    for values in state["objects"]:
        values["type"] = ObjectType(values["type"])
        values["algorithm"] = Algorithm(values["algorithm"])
        values["label"] = bytes.fromhex(values["label"])
        values["value"] = bytes.fromhex(values["value"])
        objects.restore(StoredObject(**values))
    objects.sequences.update({(type_, id_): sequence for type_, id_, sequence in state["sequences"]})
    options.force_audit = state["options"]["force_audit"]
    options.command_audit.update(state["options"]["command_audit"])
    options.algorithms.update(state["options"]["algorithms"])
    log.entries = [bytes.fromhex(entry) for entry in state["log"]["entries"]]
    log.unlogged_boots = state["log"]["unlogged_boots"]
    log.unlogged_authentications = state["log"]["unlogged_authentications"]
    log.last_number = state["log"]["last_number"]
    log.last_digest = bytes.fromhex(state["log"]["last_digest"])
