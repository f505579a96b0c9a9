"""The objects on the device, and their store."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from secrets import randbelow

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from yubihsm_simulator import keys
from yubihsm_simulator.definitions import (
    ALL_CAPABILITIES,
    ALL_DOMAINS,
    Algorithm,
    DeviceError,
    ErrorCode,
    ObjectType,
    Origin,
)
from yubihsm_simulator.ed25519 import Ed25519Key

LABEL_BYTES = 40
RECORDS = 256
PAGES = 1024
PAGE_BYTES = 126

DEVICE_CERTIFICATE_ID = 0
"""The opaque object with the certificate of the device's attestation key; it is in no list."""


@dataclass(eq=False)
class StoredObject:
    """One object. `value` is described in `keys`; `label` is 40 bytes, padded with zeros."""

    id: int
    type: ObjectType
    algorithm: Algorithm
    label: bytes
    domains: int
    capabilities: int
    origin: int
    value: bytes
    delegated: int = 0
    sequence: int = 0

    @property
    def size(self) -> int:
        """Bytes in the device's memory."""
        return keys.stored_bytes(self.type, self.algorithm, self.value)

    def info(self) -> bytes:
        """As GET OBJECT INFO answers it: 66 bytes."""
        return struct.pack(
            ">QHHHBBBB40sQ",
            self.capabilities,
            self.id,
            self.size,
            self.domains,
            self.type,
            self.algorithm,
            self.sequence,
            self.origin,
            self.label,
            self.delegated,
        )

    @cached_property
    def private_key(self) -> keys.PrivateKey:
        """The private key. Raises DeviceError (INVALID_DATA) where the algorithm has none."""
        return keys.private_key(self.algorithm, self.value)

    @property
    def rsa_key(self) -> rsa.RSAPrivateKey:
        """The private key of an RSA object. Raises DeviceError (INVALID_DATA)."""
        if isinstance(self.private_key, rsa.RSAPrivateKey):
            return self.private_key
        raise DeviceError(ErrorCode.INVALID_DATA)

    @property
    def ec_key(self) -> ec.EllipticCurvePrivateKey:
        """The private key of an EC object. Raises DeviceError (INVALID_DATA)."""
        if isinstance(self.private_key, ec.EllipticCurvePrivateKey):
            return self.private_key
        raise DeviceError(ErrorCode.INVALID_DATA)

    @property
    def ed25519_key(self) -> Ed25519Key:
        """The private key of an Ed25519 object. Raises DeviceError (INVALID_DATA)."""
        if isinstance(self.private_key, Ed25519Key):
            return self.private_key
        raise DeviceError(ErrorCode.INVALID_DATA)

    @cached_property
    def public_key(self) -> keys.PublicKey:
        """The public key. Raises DeviceError (INVALID_DATA) where there is none."""
        if self.type is ObjectType.PUBLIC_WRAP_KEY:
            return keys.rsa_public_key(self.value)
        return self.private_key.public_key()


def factory_authentication_key(static_keys: bytes) -> StoredObject:
    """The only object of a device that was reset."""
    return StoredObject(
        id=1,
        type=ObjectType.AUTHENTICATION_KEY,
        algorithm=Algorithm.AES128_YUBICO_AUTHENTICATION,
        label=b"DEFAULT AUTHKEY CHANGE THIS ASAP".ljust(LABEL_BYTES, b"\x00"),
        domains=ALL_DOMAINS,
        capabilities=ALL_CAPABILITIES,
        delegated=ALL_CAPABILITIES,
        origin=Origin.IMPORTED,
        value=static_keys,
    )


class ObjectStore:
    """All objects, and the sequence numbers of the deleted ones."""

    def __init__(self) -> None:
        self._objects: dict[tuple[int, int], StoredObject] = {}
        self.sequences: dict[tuple[int, int], int] = {}
        self.revision = 0
        """Counts changes."""

    def __iter__(self) -> Iterator[StoredObject]:
        return iter(self._objects.values())

    def __len__(self) -> int:
        return len(self._objects)

    def get(self, object_id: int, object_type: int) -> StoredObject | None:
        """The object, if there is one."""
        return self._objects.get((object_type, object_id))

    def restore(self, stored: StoredObject) -> None:
        """Puts an object back as it was, sequence number and all."""
        self._objects[stored.type, stored.id] = stored

    def add(self, new: StoredObject) -> int:
        """Stores an object and gives it its sequence number, and an id if it has none (0); returns the id.

        Raises DeviceError: INVALID_ID, OBJECT_EXISTS, STORAGE_FAILED.
        """
        if new.id == 0:
            new.id = self._free_id(new.type)
        if not 0 < new.id < 0xFFFF:
            raise DeviceError(ErrorCode.INVALID_ID)
        key = (new.type, new.id)
        if key in self._objects:
            raise DeviceError(ErrorCode.OBJECT_EXISTS)
        if len(self) >= RECORDS or self.free_pages < _pages(new):
            raise DeviceError(ErrorCode.STORAGE_FAILED)
        new.sequence = (self.sequences.get(key, -1) + 1) % 256
        self.sequences[key] = new.sequence
        self._objects[key] = new
        self.revision += 1
        return new.id

    def delete(self, stored: StoredObject) -> None:
        """Removes an object."""
        del self._objects[stored.type, stored.id]
        self.revision += 1

    def replace_value(self, stored: StoredObject, value: bytes) -> None:
        """Changes the key of an object."""
        stored.value = value
        self.revision += 1

    @property
    def free_pages(self) -> int:
        """Pages of 126 bytes that are not used."""
        return PAGES - sum(_pages(stored) for stored in self)

    @property
    def fresh(self) -> bool:
        """Whether the factory's authentication key is all there is."""
        return len(self) == 1 and self.get(1, ObjectType.AUTHENTICATION_KEY) is not None

    def _free_id(self, object_type: int) -> int:
        while self.get(candidate := 1 + randbelow(0xFFFE), object_type):
            pass
        return candidate


def _pages(stored: StoredObject) -> int:
    return -(-stored.size // PAGE_BYTES)
