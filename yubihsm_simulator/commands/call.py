"""One execution of a command: who calls, what it touches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from yubihsm_simulator import keys
from yubihsm_simulator.definitions import (
    ALL_CAPABILITIES,
    Algorithm,
    Capability,
    DeviceError,
    ErrorCode,
    ObjectType,
)
from yubihsm_simulator.frames import Fields
from yubihsm_simulator.log import NO_KEY
from yubihsm_simulator.objects import LABEL_BYTES, StoredObject

if TYPE_CHECKING:
    from yubihsm_simulator.device import Device
    from yubihsm_simulator.secure_channel import Session

Handler = Callable[["Call", Fields], bytes]
"""Reads its request's fields, answers with data or raises DeviceError."""


class Call:
    """What a handler sees of the device.

    Attributes:
        device: the device.
        session: the caller's.
        target, second: ids of the objects used, for the log.
        algorithm: of the first key used, for the latency.
    """

    def __init__(self, device: Device, session: Session) -> None:
        self.device = device
        self.session = session
        self.target = NO_KEY
        self.second = NO_KEY
        self.algorithm: Algorithm | None = None

    def allow(self, capability: Capability) -> None:
        """Raises DeviceError (INSUFFICIENT_PERMISSIONS) unless the session has the capability."""
        if not self.session.capabilities & capability:
            raise DeviceError(ErrorCode.INSUFFICIENT_PERMISSIONS)

    def find(
        self, object_id: int, object_type: int, capability: Capability = Capability.NONE, second: bool = False
    ) -> StoredObject:
        """The object that the command uses.

        Raises DeviceError: OBJECT_NOT_FOUND (also for one without a domain of the session's),
        INSUFFICIENT_PERMISSIONS where the object lacks `capability`, ALGORITHM_DISABLED.
        """
        if second:
            self.second = object_id
        else:
            self.target = object_id
        stored = self.device.objects.get(object_id, object_type)
        if stored is None or not stored.domains & self.session.domains:
            raise DeviceError(ErrorCode.OBJECT_NOT_FOUND)
        if not second:
            self.algorithm = stored.algorithm
        if capability:
            self.use(stored, capability)
        return stored

    def use(self, stored: StoredObject, capability: Capability) -> None:
        """Raises DeviceError: INSUFFICIENT_PERMISSIONS where the object lacks `capability`, ALGORITHM_DISABLED."""
        require(stored, capability)
        self.device.options.require(stored.algorithm)

    def create(self, new: StoredObject) -> bytes:
        """Stores a new object after all checks; answers its id.

        Raises DeviceError: WRONG_LENGTH, INVALID_DATA, what `_authorise` and `store` raise.
        """
        self._authorise(new)
        keys.check(new.type, new.algorithm, new.value)
        return self.store(new).to_bytes(2, "big")

    def generate(self, new: StoredObject) -> bytes:
        """The same with a new key, which is appended to what `new.value` has."""
        self._authorise(new)
        if self.device.objects.get(new.id, new.type):
            raise DeviceError(ErrorCode.OBJECT_EXISTS)
        new.value += keys.generate(new.algorithm)
        return self.store(new).to_bytes(2, "big")

    def _authorise(self, new: StoredObject) -> None:
        """Raises DeviceError: ALGORITHM_DISABLED, INSUFFICIENT_PERMISSIONS (beyond what the session may delegate)."""
        self.target, self.algorithm = new.id or NO_KEY, new.algorithm
        self.device.options.require(new.algorithm)
        if (new.capabilities | new.delegated) & ~self.session.delegated:
            raise DeviceError(ErrorCode.INSUFFICIENT_PERMISSIONS)

    def store(self, new: StoredObject) -> int:
        """Stores an object in those of its domains that the session has; returns its id.

        Raises DeviceError: INSUFFICIENT_PERMISSIONS where there is none, INVALID_ID, OBJECT_EXISTS, STORAGE_FAILED.
        """
        new.domains &= self.session.domains
        if not new.domains:
            raise DeviceError(ErrorCode.INSUFFICIENT_PERMISSIONS)
        self.target = self.device.objects.add(new)
        return self.target


def require(stored: StoredObject, capability: Capability) -> None:
    """Raises DeviceError (INSUFFICIENT_PERMISSIONS) unless the object has the capability."""
    if not stored.capabilities & capability:
        raise DeviceError(ErrorCode.INSUFFICIENT_PERMISSIONS)


def read_header(fields: Fields, object_type: ObjectType, origin: int, delegated: bool = False) -> StoredObject:
    """An object without its value: id, label 40, domains, capabilities, algorithm [, delegated capabilities].

    Raises DeviceError: WRONG_LENGTH, INVALID_DATA (no algorithm of that type), INVALID_ID (0xffff).
    """
    object_id, label, domains, capabilities = fields.u16(), fields.take(LABEL_BYTES), fields.u16(), fields.u64()
    algorithm = to_algorithm(fields.u8(), object_type)
    if object_id == 0xFFFF:
        raise DeviceError(ErrorCode.INVALID_ID)
    return StoredObject(
        id=object_id,
        type=object_type,
        algorithm=algorithm,
        label=label,
        domains=domains,
        capabilities=capabilities & ALL_CAPABILITIES,  # "all" of the vendor's tools sets all 64 bits
        delegated=fields.u64() & ALL_CAPABILITIES if delegated else 0,
        origin=origin,
        value=b"",
    )


def to_algorithm(number: int, object_type: ObjectType) -> Algorithm:
    """Raises DeviceError (INVALID_DATA) for an algorithm that objects of this type cannot have."""
    if number not in keys.ALGORITHMS[object_type]:
        raise DeviceError(ErrorCode.INVALID_DATA)
    return Algorithm(number)
