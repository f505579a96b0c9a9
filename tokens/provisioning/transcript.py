"""What was done to a device, for whoever asks later: one JSON object a line, on the disk before the next step.

There is no secret in it: objects as the device describes them, public keys, certificates, the device's log.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from yubihsm.defs import OBJECT
from yubihsm.objects import ObjectInfo

from tokens.errors import KeyUnusable
from tokens.provider import PublicKey
from tokens.provisioning.algorithms import algorithm_name
from tokens.provisioning.capabilities import domain_numbers, names

_DELEGATING = (OBJECT.AUTHENTICATION_KEY, OBJECT.WRAP_KEY)


class Transcript:
    """A new file, of mode 0600. Raises KeyUnusable where it cannot be made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8")
        except OSError as error:
            raise KeyUnusable(f"{path} cannot be made: {error.strerror}.", "Name another file.") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, event: str, **values: Any) -> None:
        """One line: the time (UTC), what was done, and what came of it."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._file.write(json.dumps({"time": now, "event": event, **values}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def describe(info: ObjectInfo) -> dict[str, Any]:
    """An object as the device describes it (GET OBJECT INFO)."""
    described: dict[str, Any] = {
        "type": info.object_type.name.lower().replace("_", "-"),
        "id": info.id,
        "label": info.label if isinstance(info.label, str) else info.label.hex(),
        "algorithm": algorithm_name(info.algorithm),
        "domains": domain_numbers(info.domains),
        "capabilities": names(info.capabilities),
        "origin": str(info.origin.name).lower(),
        "sequence": info.sequence,
    }
    if info.object_type in _DELEGATING:
        described["delegated_capabilities"] = names(info.delegated_capabilities)
    return described


def pem(public: PublicKey) -> str:
    """A public key as SubjectPublicKeyInfo, in PEM."""
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def certificate_pem(certificate: x509.Certificate) -> str:
    """A certificate in PEM."""
    return certificate.public_bytes(Encoding.PEM).decode()
