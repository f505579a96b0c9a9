"""The driver of YubiHSM 2 devices. Runs in a token worker, in one thread.

One signature is one command, and so is one use of a symmetric key. A key is known by its ID, sequence, algorithm and
public key: what a session finds under the ID is compared with that before it uses it for the first time.
"""

import contextlib
import gzip
import struct
import zlib
from collections.abc import Sequence
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from yubihsm.defs import ALGORITHM, CAPABILITY, COMMAND, LIST_FILTER, OBJECT
from yubihsm.objects import LABEL_LENGTH

from tokens.drivers.driver import DriverError, ObjectReference
from tokens.drivers.yubihsm_device import Device, DeviceSettings
from tokens.frames import Action, Header
from tokens.schemes import Ecdsa, Ed25519, Hash, RsaPkcs1v15, RsaPss, Scheme, digest_info
from tokens.symmetric import BLOCK_BYTES, Operation, SymmetricAlgorithm

T = TypeVar("T")

# The device tells the hash by the digest's length, and has MGF1 for these only.
_MGF1 = {
    Hash.SHA256: ALGORITHM.RSA_MGF1_SHA256,
    Hash.SHA384: ALGORITHM.RSA_MGF1_SHA384,
    Hash.SHA512: ALGORITHM.RSA_MGF1_SHA512,
}

# Bytes of the order of each curve: so long are what is signed, and each half of the signature.
_ORDER_BYTES = {
    ALGORITHM.EC_P256: 32,
    ALGORITHM.EC_P384: 48,
    ALGORITHM.EC_P521: 66,
    ALGORITHM.EC_K256: 32,
    ALGORITHM.EC_BP256: 32,
    ALGORITHM.EC_BP384: 48,
    ALGORITHM.EC_BP512: 64,
}

_SIGNS = (
    CAPABILITY.SIGN_PKCS | CAPABILITY.SIGN_PSS | CAPABILITY.SIGN_ECDSA | CAPABILITY.SIGN_EDDSA
)  # fmt: skip

_TYPES = {OBJECT.ASYMMETRIC_KEY: "asymmetric", OBJECT.SYMMETRIC_KEY: "symmetric", OBJECT.HMAC_KEY: "HMAC"}
_SYMMETRIC_TYPES = (OBJECT.SYMMETRIC_KEY, OBJECT.HMAC_KEY)

_SYMMETRIC = {
    ALGORITHM.AES128: SymmetricAlgorithm.AES_128,
    ALGORITHM.AES256: SymmetricAlgorithm.AES_256,
    ALGORITHM.HMAC_SHA256: SymmetricAlgorithm.HMAC_SHA256,
}

_COMPUTES = {
    Operation.ENCRYPT_ECB: COMMAND.ENCRYPT_ECB,
    Operation.DECRYPT_ECB: COMMAND.DECRYPT_ECB,
    Operation.ENCRYPT_CBC: COMMAND.ENCRYPT_CBC,
    Operation.DECRYPT_CBC: COMMAND.DECRYPT_CBC,
    Operation.HMAC_SHA256: COMMAND.SIGN_HMAC,
}

_DEVICE_CERTIFICATE = 0
"""The opaque object that holds the certificate of the device's attestation key, and that key's ID."""


class YubihsmDriver:
    """Implements `tokens.drivers.driver.KeyDriver`, `SymmetricDriver`, `AttestingDriver` and `Expiring`.

    Arguments:
        settings: those of `DeviceSettings`.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = DeviceSettings(**settings)
        self._device = Device(self._settings)
        self._compared: dict[tuple[OBJECT, int], Any] = {}

    @property
    def keep_alive_s(self) -> float:
        """Well below the 30 s after which the device ends a session."""
        return self._settings.keep_alive_s

    def keep_alive(self) -> None:
        """Uses the session."""
        self._device.keep_alive()

    def open(self) -> Header:
        """Opens a session, with every key yet to be compared."""
        self._compared.clear()
        return self._device.open()

    def close(self) -> None:
        """Ends the session."""
        self._device.close()

    def check(self) -> None:
        """Uses the session."""
        self._device.send(COMMAND.ECHO, b"\0")

    def find(self, reference: ObjectReference) -> Header:
        """Looks the key up by what the device filters, and reads the certificate of its ID."""
        ids = self._find_ids(reference, OBJECT.ASYMMETRIC_KEY)
        key_id = _only(ids, _TYPES[OBJECT.ASYMMETRIC_KEY])
        public = self._read(key_id)
        self._compared[OBJECT.ASYMMETRIC_KEY, key_id] = public
        return {"public": public, "certificates": self._find_certificate(key_id)}

    def sign(self, reference: ObjectReference, public: Any, scheme: Scheme, data: bytes) -> bytes:
        """Signs by one command, in a session that has compared the key."""
        self._compare(OBJECT.ASYMMETRIC_KEY, public)
        command, values = self._request(public, scheme, data)
        try:
            signature = self._device.send(command, struct.pack(">H", public["id"]) + values)
        except DriverError:
            # it may have been deleted or re-created
            self._compared.pop((OBJECT.ASYMMETRIC_KEY, public["id"]), None)
            raise
        return self._raw(public, signature) if isinstance(scheme, Ecdsa) else signature

    def _raw(self, public: Any, der: bytes) -> bytes:
        """r || s, each as long as the curve's order, of Ecdsa-Sig-Value (RFC 3279, section 2.2.3)."""
        size = _ORDER_BYTES[public["algorithm"]]
        try:
            return b"".join(number.to_bytes(size, "big") for number in decode_dss_signature(der))
        except (ValueError, OverflowError):
            raise DriverError(  # another key may have its ID by now: a new session compares it
                "SigningFailed",
                f"The signature is none of the key 0x{public['id']:04x}.",
                "Find out whether the key has changed.",
                Action.REOPEN,
            ) from None

    def find_symmetric(self, reference: ObjectReference) -> Header:
        """Looks the key up among those for AES and those for HMAC."""
        found = [(type_, key_id) for type_ in _SYMMETRIC_TYPES for key_id in self._find_ids(reference, type_)]
        type_, key_id = _only(found, " or ".join(_TYPES[type_] for type_ in _SYMMETRIC_TYPES))
        secret = self._read_symmetric(type_, key_id)
        self._compared[type_, key_id] = secret
        data_max_bytes = self._message_max_bytes() - BLOCK_BYTES  # the IV is among them
        return {"secret": secret, "algorithm": secret["algorithm"], "data_max_bytes": data_max_bytes}

    def compute(self, reference: ObjectReference, secret: Any, operation: Operation, data: bytes, iv: bytes) -> bytes:
        """Computes by one command, in a session that has compared the key."""
        type_, key_id = OBJECT(secret["type"]), secret["id"]
        self._compare(type_, secret)
        try:
            return self._device.send(_COMPUTES[operation], struct.pack(">H", key_id) + iv + data)
        except DriverError:
            self._compared.pop((type_, key_id), None)
            raise

    def _read_symmetric(self, type_: OBJECT, key_id: int) -> Header:
        """What tells a symmetric key from any other: `type`, `id`, `sequence` and `algorithm`."""
        answer = self._device.send(COMMAND.GET_OBJECT_INFO, struct.pack(">HB", key_id, type_))
        # capabilities u64, id, size, domains u16, type, algorithm, sequence u8, ...
        _, _, _, _, _, number, sequence = struct.unpack_from(">QHHHBBB", answer)
        algorithm = next((name for known, name in _SYMMETRIC.items() if known == number), None)
        if algorithm is None:
            raise DriverError(
                "KeyUnusable",
                f"The key 0x{key_id:04x} is for none of {', '.join(_SYMMETRIC.values())}.",
                "Grant a key for one of these.",
            )
        return {"type": type_, "id": key_id, "sequence": sequence, "algorithm": algorithm}

    def attest(self, public: Any) -> Header:
        """Has the device's own attestation key certify the key, and reads that key's certificate."""
        self._compare(OBJECT.ASYMMETRIC_KEY, public)
        certificate = self._device.send(
            COMMAND.SIGN_ATTESTATION_CERTIFICATE, struct.pack(">HH", public["id"], _DEVICE_CERTIFICATE)
        )
        issuer = self._device.send(COMMAND.GET_OPAQUE, struct.pack(">H", _DEVICE_CERTIFICATE))
        return {"certificate": certificate.hex(), "issuers": [issuer.hex()]}

    def _compare(self, type_: OBJECT, known: Any) -> None:
        """Makes sure, once in a session, that the object of this type and ID is still the key that was looked up."""
        key_id = known["id"]
        if (type_, key_id) not in self._compared:
            is_pair = type_ is OBJECT.ASYMMETRIC_KEY
            self._compared[type_, key_id] = self._read(key_id) if is_pair else self._read_symmetric(type_, key_id)
        if self._compared[type_, key_id] != known:
            del self._compared[type_, key_id]
            raise DriverError(
                "KeyMismatch",
                f"The key 0x{key_id:04x} on the YubiHSM is another one than when the service first looked it up.",
                "Find out why. If it was re-created on purpose, restart the service.",
            )

    def _read(self, key_id: int) -> Header:
        """What tells a key from any other: `id`, `sequence`, `algorithm` and the public key (hex)."""
        answer = self._device.send(COMMAND.GET_OBJECT_INFO, struct.pack(">HB", key_id, OBJECT.ASYMMETRIC_KEY))
        # capabilities u64, id, size, domains u16, type, algorithm, sequence u8, ...
        capabilities, _, _, _, _, _, sequence = struct.unpack_from(">QHHHBBB", answer)
        if not capabilities & _SIGNS:
            raise DriverError(
                "KeyUnusable",
                f"The key 0x{key_id:04x} has none of the capabilities by which a key signs.",
                "Grant a key that has sign-pkcs, sign-pss, sign-ecdsa or sign-eddsa.",
            )
        algorithm, *public_key = self._device.send(COMMAND.GET_PUBLIC_KEY, struct.pack(">H", key_id))
        return {"id": key_id, "sequence": sequence, "algorithm": algorithm, "key": bytes(public_key).hex()}

    def _find_ids(self, reference: ObjectReference, type_: OBJECT) -> list[int]:
        filters = struct.pack(">BB", LIST_FILTER.TYPE, type_)
        if reference.id is not None:
            if len(reference.id) != 2:
                raise _not_found("the ID of an object on a YubiHSM has two bytes, such as 0102", _TYPES[type_])
            filters += struct.pack(">B2s", LIST_FILTER.ID, reference.id)
        if reference.label is not None:
            label = reference.label.encode()
            if len(label) > LABEL_LENGTH:
                raise _not_found(f"a label on a YubiHSM has {LABEL_LENGTH} bytes at most", _TYPES[type_])
            filters += struct.pack(f">B{LABEL_LENGTH}s", LIST_FILTER.LABEL, label)
        # id u16, type u8, sequence u8
        return [entry[0] for entry in struct.iter_unpack(">HBB", self._device.send(COMMAND.LIST_OBJECTS, filters))]

    def _find_certificate(self, key_id: int) -> list[str]:
        """DER, in hex, of the X.509 certificate with the key's ID; none where none can be read."""
        try:
            value = self._device.send(COMMAND.GET_OPAQUE, struct.pack(">H", key_id))
        except DriverError as error:
            if error.error in ("KeyNotFound", "ProviderRefused"):
                return []
            raise
        with contextlib.suppress(OSError, EOFError, zlib.error):  # yubihsm-shell can store it compressed
            value = gzip.decompress(value)
        return [value.hex()]

    def _request(self, public: Any, scheme: Scheme, data: bytes) -> tuple[COMMAND, bytes]:
        """The command, and what follows the key's ID in it."""
        match scheme:
            case RsaPkcs1v15():
                # what is not as long as a SHA-1, SHA-256, SHA-384 or SHA-512 digest is padded as it is
                return COMMAND.SIGN_PKCS1, digest_info(scheme.hash, data)
            case RsaPss():
                if scheme.hash not in _MGF1:
                    raise DriverError(
                        "KeyUnsuited",
                        f"A YubiHSM makes no RSASSA-PSS signatures with {scheme.hash}.",
                        f"Ask for {', '.join(_MGF1)}.",
                    )
                return COMMAND.SIGN_PSS, struct.pack(">BH", _MGF1[scheme.hash], scheme.salt_length) + data
            case Ecdsa():
                # the leftmost bits of a digest that is longer than the order (FIPS 186-5, section 6.4.1)
                size = _ORDER_BYTES[public["algorithm"]]
                return COMMAND.SIGN_ECDSA, data[:size].rjust(size, b"\0")
            case Ed25519():
                longest = self._message_max_bytes()
                if len(data) > longest:
                    raise DriverError(
                        "KeyUnsuited",
                        f"The YubiHSM signs Ed25519 messages of {longest} bytes at most; this one has {len(data)}.",
                        "Grant a key of another type, or another provider's key.",
                    )
                return COMMAND.SIGN_EDDSA, data

    def _message_max_bytes(self) -> int:
        """What fits into a frame: in the clear a header of 3 bytes, the session (1) and a MAC (8); enciphered, in whole
        blocks, another header (3), the key's ID (2), the message and one byte of padding or more.
        """
        return (self._device.frame_max_bytes - 3 - 1 - 8) // 16 * 16 - 3 - 2 - 1


def _only(found: Sequence[T], what: str) -> T:
    """The one key that matches. Raises DriverError where there is none, or more than one."""
    if not found:
        raise _not_found("compare the grant with `yubihsm-shell -a list-objects`", what)
    if len(found) > 1:
        raise DriverError(
            "KeyAmbiguous",
            f"{len(found)} {what} keys on the YubiHSM match the grant.",
            "Name the key by label and id in the grant, or delete what is not needed.",
        )
    return found[0]


def _not_found(hint: str, what: str) -> DriverError:
    return DriverError(
        "KeyNotFound",
        f"The YubiHSM holds no {what} key of the granted label and ID that this authentication key can see.",
        f"{hint[0].upper()}{hint[1:]}.",
        Action.GIVE_UP,
    )
