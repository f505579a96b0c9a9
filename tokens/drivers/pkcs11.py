"""The driver of PKCS#11 tokens, over python-pkcs11. Runs in a token worker, in one thread.

python-pkcs11 calls C_Initialize(NULL), "I am single-threaded", and releases the GIL round every call: two threads
would crash the module.
"""

import contextlib
import re
from pathlib import Path
from typing import Any

import pkcs11
from pkcs11 import exceptions
from pkcs11.constants import Attribute, ObjectClass, TokenFlag
from pkcs11.mechanisms import MGF, KeyType, Mechanism

from tokens.drivers.driver import DriverError, ObjectReference
from tokens.drivers.pin_gate import PinGate
from tokens.errors import KeyUnusable
from tokens.frames import Action, Header
from tokens.schemes import Ecdsa, Ed25519, Hash, RsaPkcs1v15, RsaPss, Scheme, digest_info
from tokens.secret import read_secret
from tokens.symmetric import AES_BYTES, HMAC_BYTES, Operation, SymmetricAlgorithm

_HASH_MECHANISMS = {
    Hash.SHA224: (Mechanism.SHA224, MGF.SHA224),
    Hash.SHA256: (Mechanism.SHA256, MGF.SHA256),
    Hash.SHA384: (Mechanism.SHA384, MGF.SHA384),
    Hash.SHA512: (Mechanism.SHA512, MGF.SHA512),
    Hash.SHA3_224: (Mechanism.SHA3_224, MGF.SHA3_224),
    Hash.SHA3_256: (Mechanism.SHA3_256, MGF.SHA3_256),
    Hash.SHA3_384: (Mechanism.SHA3_384, MGF.SHA3_384),
    Hash.SHA3_512: (Mechanism.SHA3_512, MGF.SHA3_512),
}

# The method of a key by which python-pkcs11 does it, which is there where the object's attributes allow it
_OPERATIONS = {
    Operation.ENCRYPT_ECB: ("encrypt", Mechanism.AES_ECB),
    Operation.DECRYPT_ECB: ("decrypt", Mechanism.AES_ECB),
    Operation.ENCRYPT_CBC: ("encrypt", Mechanism.AES_CBC),
    Operation.DECRYPT_CBC: ("decrypt", Mechanism.AES_CBC),
    Operation.HMAC_SHA256: ("sign", Mechanism.SHA256_HMAC),
}

_HMAC_TYPES = (KeyType.GENERIC_SECRET, KeyType.SHA256_HMAC)

_DATA_MAX_BYTES = 1 << 20
"""What is handed to the module at once: less than a frame, and soon done."""

# What each return value means for the call and for the session (PKCS#11 v2.40, section 5.1).
# A value that is not here leaves the module in a state that nobody knows: the worker is replaced.
_CKR: dict[type[Exception], tuple[str, Action]] = {
    # this call was unlucky; the session is as it was
    exceptions.FunctionCancelled: ("SigningFailed", Action.RETRY),
    exceptions.FunctionFailed: ("SigningFailed", Action.RETRY),
    # the object's handle is stale: it is looked up again (the driver forgets it)
    exceptions.KeyHandleInvalid: ("SigningFailed", Action.RETRY),
    exceptions.ObjectHandleInvalid: ("SigningFailed", Action.RETRY),
    # the session is gone, or its state is
    exceptions.DeviceMemory: ("ProviderUnavailable", Action.REOPEN),
    exceptions.DeviceRemoved: ("ProviderUnavailable", Action.REOPEN),
    exceptions.OperationActive: ("SigningFailed", Action.REOPEN),
    exceptions.OperationNotInitialized: ("SigningFailed", Action.REOPEN),
    exceptions.SessionClosed: ("ProviderUnavailable", Action.REOPEN),
    exceptions.SessionCount: ("ProviderUnavailable", Action.REOPEN),
    exceptions.SessionHandleInvalid: ("ProviderUnavailable", Action.REOPEN),
    exceptions.SlotIDInvalid: ("ProviderUnavailable", Action.REOPEN),
    exceptions.TokenNotPresent: ("ProviderUnavailable", Action.REOPEN),
    exceptions.TokenNotRecognised: ("ProviderUnavailable", Action.REOPEN),
    exceptions.UserNotLoggedIn: ("ProviderUnavailable", Action.REOPEN),
    # the module itself is in trouble
    exceptions.DeviceError: ("SigningFailed", Action.RESTART),
    exceptions.GeneralError: ("SigningFailed", Action.RESTART),
    exceptions.HostMemory: ("SigningFailed", Action.RESTART),
    # the same call would meet the same answer
    exceptions.ArgumentsBad: ("SigningFailed", Action.GIVE_UP),
    exceptions.DataInvalid: ("KeyUnsuited", Action.GIVE_UP),
    exceptions.DataLenRange: ("KeyUnsuited", Action.GIVE_UP),
    exceptions.FunctionNotSupported: ("KeyUnsuited", Action.GIVE_UP),
    exceptions.FunctionRejected: ("SigningFailed", Action.GIVE_UP),
    exceptions.KeySizeRange: ("KeyUnsuited", Action.GIVE_UP),
    exceptions.KeyTypeInconsistent: ("KeyUnsuited", Action.GIVE_UP),
    exceptions.MechanismInvalid: ("KeyUnsuited", Action.GIVE_UP),
    exceptions.MechanismParamInvalid: ("KeyUnsuited", Action.GIVE_UP),
}
_KEY_FUNCTION_NOT_PERMITTED = "0x68"  # CKR_KEY_FUNCTION_NOT_PERMITTED, which python-pkcs11 has no class for

_PIN_REFUSED = (
    exceptions.PinExpired,
    exceptions.PinIncorrect,
    exceptions.PinInvalid,
    exceptions.PinLenRange,
    exceptions.PinLocked,
)

_HINTS = {
    "KeyUnsuited": "Ask for a method that the token and this key support, or grant another key.",
    "ProviderUnavailable": "Check that the token is plugged in and its module's settings; the service tries again.",
    "SigningFailed": "Try again; if it stays, look at the token with its vendor's tools and `hsmsign doctor`.",
}


class _ExactPin(str):
    """Bytes that python-pkcs11 passes on as they are: it calls `encode` on what it is given."""

    __slots__ = ("_pin",)
    _pin: bytes

    @classmethod
    def of(cls, pin: bytes) -> "_ExactPin":
        self = cls()
        self._pin = pin
        return self

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return self._pin


def _translate(error: Exception) -> DriverError:
    name, action = _CKR.get(type(error), ("SigningFailed", Action.RESTART))
    if str(error).endswith(_KEY_FUNCTION_NOT_PERMITTED):
        name, action = "KeyUnsuited", Action.GIVE_UP
    answer = type(error).__name__
    if unmapped := re.search(r"0x[0-9a-f]+$", str(error)):  # a return value that python-pkcs11 has no class for
        answer = unmapped[0]
    return DriverError(name, f"The token answered {answer}.", _HINTS[name], action)


class Pkcs11Driver:
    """Implements `tokens.drivers.driver.KeyDriver` and `SymmetricDriver`.

    Arguments:
        module: path of the PKCS#11 module.
        token, serial: the token's label and serial number; an empty one is not looked at.
        pin_file: the file that holds the PIN.
        state_directory: where `PinGate` remembers.
    """

    def __init__(self, module: str, token: str, serial: str, pin_file: str, state_directory: str) -> None:
        self._module = module
        self._token_label = token
        self._serial = serial
        self._pin_file = Path(pin_file)
        self._state_directory = Path(state_directory)
        self._library: Any = None
        self._session: Any = None
        self._keys: dict[ObjectReference, tuple[Any, Any]] = {}
        self._symmetric: dict[ObjectReference, tuple[Any, Header]] = {}

    def open(self) -> Header:
        """Opens a session and logs in, once."""
        self._keys.clear()
        self._symmetric.clear()
        self.close()
        try:
            self._library = self._library or self._load()
            token = self._find_token()
            self._session = self._login(token)
        except pkcs11.PKCS11Error as error:
            raise _translate_open(error) from None
        return {
            "label": token.label,
            "serial": token.serial.decode("ascii", "replace"),
            "model": token.model,
            "manufacturer": token.manufacturer_id,
        }

    def _load(self) -> Any:
        try:
            return pkcs11.lib(self._module)
        except exceptions.PKCS11Error as error:
            if "OS exception" not in str(error):  # C_Initialize failed
                raise
            raise DriverError(  # the text has the module's path, which is nobody's business
                "ProviderUnavailable",
                "The PKCS#11 module cannot be loaded.",
                "Check `module` in the provider's settings; `hsmsign doctor` names the package that brings it.",
                Action.RESTART,
            ) from None

    def close(self) -> None:
        """Closes the session, which logs out."""
        if self._session is not None:
            with contextlib.suppress(pkcs11.PKCS11Error):  # it may have gone with the token
                self._session.close()
        self._session = None

    def _find_token(self) -> Any:
        tokens = [
            token
            for token in (slot.get_token() for slot in self._library.get_slots(token_present=True))
            if (not self._token_label or token.label == self._token_label)
            and (not self._serial or token.serial.decode("ascii", "replace") == self._serial)
            and TokenFlag.TOKEN_INITIALIZED in token.flags
        ]
        if not tokens:
            raise DriverError(
                "ProviderUnavailable",
                "The token is not there: no slot holds one with the configured label and serial number.",
                _HINTS["ProviderUnavailable"],
                Action.REOPEN,
            )
        if len(tokens) > 1:
            raise DriverError(
                "ProviderUnavailable",
                f"{len(tokens)} tokens match the configured label and serial number.",
                "Name the token by its serial number in the provider's settings.",
                Action.REOPEN,
            )
        return tokens[0]

    def _login(self, token: Any) -> Any:
        try:
            pin = read_secret(self._pin_file)
        except KeyUnusable as error:
            raise DriverError("ProviderUnavailable", f"No PIN: {error.message}", error.hint, Action.REOPEN) from None
        if not pin:  # a file that is being rewritten: an empty PIN would cost an attempt
            raise DriverError(
                "ProviderUnavailable", "The PIN's source is empty.", "Put the PIN into it.", Action.REOPEN
            )
        identity = f"{token.serial!r} {token.label} {token.model} {token.manufacturer_id}"
        gate = PinGate(self._state_directory, identity)
        with gate.locked():
            flags = token.slot.get_token().flags  # those of now: another login may have come between
            if TokenFlag.USER_PIN_LOCKED in flags:
                raise _pin_refused("The token says that its PIN is locked.")
            if gate.refused(pin):
                raise _pin_refused("The token refused this PIN before.")
            if TokenFlag.USER_PIN_FINAL_TRY in flags:
                raise _pin_refused("The token says that one more wrong PIN would lock it.")
            if TokenFlag.USER_PIN_COUNT_LOW in flags and gate.interrupted(pin):
                gate.end(pin, refused=True)
                raise _pin_refused("A login with this PIN was cut off, and the token has counted a wrong PIN since.")
            gate.begin(pin)
            try:
                session = token.open(user_pin=_ExactPin.of(pin))
            except _PIN_REFUSED as error:
                gate.end(pin, refused=True)
                raise _pin_refused(f"The token refused the PIN ({type(error).__name__}).") from None
            except pkcs11.PKCS11Error:
                gate.end(pin, refused=False)
                raise
            gate.end(pin, refused=False)
        return session

    def find(self, reference: ObjectReference) -> Header:
        """Looks the key up anew, and its certificates by CKA_ID."""
        self._keys.pop(reference, None)
        try:
            key, public, key_id = self._find_key(reference)
            certificates = self._find_certificates(key_id)
        except pkcs11.PKCS11Error as error:
            raise _translate(error) from None
        self._keys[reference] = key, public
        return {"public": public, "certificates": certificates}

    def sign(self, reference: ObjectReference, public: Any, scheme: Scheme, data: bytes) -> bytes:
        """Signs in the resident session."""
        try:
            if reference not in self._keys:
                key, found, _ = self._find_key(reference)
                self._keys[reference] = key, found
            key, found = self._keys[reference]
            if found != public:
                raise DriverError(
                    "KeyMismatch",
                    "The key on the token is another one than when it was looked up.",
                    "If it was re-created on purpose, send the request again.",
                )
            mechanism, parameter, value = _mechanism(scheme, data)
            signature: bytes = key.sign(value, mechanism=mechanism, mechanism_param=parameter)
        except pkcs11.PKCS11Error as error:
            self._keys.pop(reference, None)
            raise _translate(error) from None
        return signature

    def find_symmetric(self, reference: ObjectReference) -> Header:
        """Looks the key up anew."""
        self._symmetric.pop(reference, None)
        try:
            key, secret = self._find_symmetric(reference)
        except pkcs11.PKCS11Error as error:
            raise _translate(error) from None
        self._symmetric[reference] = key, secret
        return {"secret": secret, "algorithm": secret["algorithm"], "data_max_bytes": _DATA_MAX_BYTES}

    def compute(self, reference: ObjectReference, secret: Any, operation: Operation, data: bytes, iv: bytes) -> bytes:
        """Computes in the resident session."""
        try:
            if reference not in self._symmetric:
                self._symmetric[reference] = self._find_symmetric(reference)
            key, found = self._symmetric[reference]
            if found != secret:
                raise DriverError(
                    "KeyMismatch",
                    "The key on the token is another one than when it was looked up.",
                    "If it was re-created on purpose, send the request again.",
                )
            name, mechanism = _OPERATIONS[operation]
            method = getattr(key, name, None)
            if method is None:
                raise DriverError(
                    "KeyUnsuited", f"The key may not {name} (CKA_{name.upper()} is false).", "Grant a key that may."
                )
            result: bytes = method(data, mechanism=mechanism, mechanism_param=iv or None)
        except pkcs11.PKCS11Error as error:
            self._symmetric.pop(reference, None)
            raise _translate(error) from None
        return result

    def check(self) -> None:
        """Asks the token who it is, and the session for an object that need not be there."""
        try:
            self._find_token()
            next(iter(self._session.get_objects({Attribute.LABEL: "hsmsign-check"})), None)
        except pkcs11.PKCS11Error as error:
            raise _translate(error) from None

    def _find_key(self, reference: ObjectReference) -> tuple[Any, Any, bytes]:
        """The private key object, its public key's values, and its CKA_ID."""
        key = self._find_object(ObjectClass.PRIVATE_KEY, "private key", reference)
        if not hasattr(key, "sign"):
            raise DriverError("KeyUnusable", "The key may not sign (CKA_SIGN is false).", "Grant a signing key.")
        return key, self._public_values(key), bytes(key[Attribute.ID])

    def _find_symmetric(self, reference: ObjectReference) -> tuple[Any, Header]:
        """The secret key object, and what it is known by."""
        key = self._find_object(ObjectClass.SECRET_KEY, "secret key", reference)
        return key, {"label": key.label, "id": bytes(key[Attribute.ID]).hex(), "algorithm": _symmetric_algorithm(key)}

    def _find_object(self, class_: ObjectClass, what: str, reference: ObjectReference) -> Any:
        template: dict[Attribute, Any] = {Attribute.CLASS: class_}
        if reference.label is not None:
            template[Attribute.LABEL] = reference.label
        if reference.id is not None:
            template[Attribute.ID] = reference.id
        keys = list(self._session.get_objects(template))
        if not keys:
            raise DriverError(
                "KeyNotFound",
                f"The token holds no {what} of the granted label and ID.",
                "Compare the grant with what is on the token, for example by `pkcs11-tool --list-objects --login`.",
            )
        if len(keys) > 1:
            raise DriverError(
                "KeyAmbiguous",
                f"{len(keys)} {what}s on the token match the grant.",
                "Name the key by label and id in the grant, or delete what is not needed.",
            )
        return keys[0]

    def _public_values(self, key: Any) -> Any:
        """The public key as JSON values: what identifies the key from then on."""
        if key.key_type == KeyType.RSA:
            # a private RSA key object carries them itself (PKCS#11 v2.40, section 2.1.3)
            return ["rsa", key[Attribute.MODULUS].hex(), key[Attribute.PUBLIC_EXPONENT].hex()]
        if key.key_type not in (KeyType.EC, KeyType.EC_EDWARDS):
            raise DriverError(
                "KeyUnusable", "The key is neither RSA nor EC nor Ed25519.", "Grant a key of those types."
            )
        template: dict[Attribute, Any] = {Attribute.CLASS: ObjectClass.PUBLIC_KEY, Attribute.KEY_TYPE: key.key_type}
        template |= {Attribute.ID: key[Attribute.ID]} if key[Attribute.ID] else {Attribute.LABEL: key.label}
        points = {
            (bytes(public[Attribute.EC_PARAMS]), bytes(public[Attribute.EC_POINT]))
            for public in self._session.get_objects(template)
        }
        if len(points) != 1:
            raise DriverError(
                "KeyUnusable",
                f"The token holds {len(points)} public keys that could belong to the private key; one is needed.",
                "Give the key pair an ID of its own and store its public key object on the token.",
            )
        parameters, point = points.pop()
        return ["ec" if key.key_type == KeyType.EC else "edwards", parameters.hex(), point.hex()]

    def _find_certificates(self, key_id: bytes) -> list[str]:
        """DER, in hex, of the certificates with this CKA_ID."""
        if not key_id:
            return []
        template = {Attribute.CLASS: ObjectClass.CERTIFICATE, Attribute.ID: key_id}
        return [bytes(found[Attribute.VALUE]).hex() for found in self._session.get_objects(template)]


def _symmetric_algorithm(key: Any) -> SymmetricAlgorithm:
    """What a secret key object is for."""
    size = key[Attribute.VALUE_LEN]
    if key.key_type == KeyType.AES:
        found = next((algorithm for algorithm, bytes_ in AES_BYTES.items() if bytes_ == size), None)
    else:
        is_mac = key.key_type in _HMAC_TYPES and size in HMAC_BYTES
        found = SymmetricAlgorithm.HMAC_SHA256 if is_mac else None
    if found is None:
        raise DriverError(
            "KeyUnusable",
            "The secret key's type or length is not supported.",
            f"Grant an AES key of 16 or 32 bytes, or a generic secret of {HMAC_BYTES[0]} to {HMAC_BYTES[-1]}.",
        )
    return found


def _mechanism(scheme: Scheme, data: bytes) -> tuple[Mechanism, Any, bytes]:
    """The mechanism, its parameter, and what is handed to C_Sign."""
    match scheme:
        case RsaPkcs1v15():
            return Mechanism.RSA_PKCS, None, digest_info(scheme.hash, data)
        case RsaPss():
            return Mechanism.RSA_PKCS_PSS, (*_HASH_MECHANISMS[scheme.hash], scheme.salt_length), data
        case Ecdsa():
            return Mechanism.ECDSA, None, data
        case Ed25519():
            return Mechanism.EDDSA, None, data


def _translate_open(error: Exception) -> DriverError:
    """No answer to opening a session is worth more than waiting and trying again."""
    translated = _translate(error)
    action = Action.RESTART if translated.action is Action.RESTART else Action.REOPEN
    return DriverError("ProviderUnavailable", translated.message, _HINTS["ProviderUnavailable"], action)


def _pin_refused(message: str) -> DriverError:
    return DriverError(
        "PinRefused",
        message,
        "Put the right PIN into the provider's PIN source; no login is tried before that PIN has changed.",
        Action.REOPEN,
    )
