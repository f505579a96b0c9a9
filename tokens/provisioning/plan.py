"""The steps that set a device up, in their order: pure data, made from a declaration and nothing else.

The order keeps two promises wherever it is broken off: there is never a key on a device that takes the factory
password, and from the first step on an admin can log in.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from yubihsm.defs import ALGORITHM, CAPABILITY, COMMAND, OBJECT

from tokens.provisioning.algorithms import ALGORITHMS, algorithm_name
from tokens.provisioning.capabilities import (
    ADMIN_DELEGATES,
    ALL_DOMAINS,
    ROLES,
    WRAP_DELEGATES,
    WRAPS,
    combined,
    domain_mask,
    domain_numbers,
    names,
)
from tokens.provisioning.declaration import (
    FACTORY_AUTH_KEY,
    Audit,
    AuthKey,
    Declaration,
    Key,
    KeyFile,
    NewShares,
    WrapKey,
)
from tokens.secret import SecretSource

AUDITED = frozenset(
    {
        COMMAND.RESET_DEVICE,
        COMMAND.PUT_OPAQUE,
        COMMAND.PUT_AUTHENTICATION_KEY,
        COMMAND.PUT_ASYMMETRIC_KEY,
        COMMAND.GENERATE_ASYMMETRIC_KEY,
        COMMAND.SIGN_PKCS1,
        COMMAND.DECRYPT_PKCS1,
        COMMAND.EXPORT_WRAPPED,
        COMMAND.IMPORT_WRAPPED,
        COMMAND.PUT_WRAP_KEY,
        COMMAND.SET_OPTION,
        COMMAND.PUT_HMAC_KEY,
        COMMAND.SIGN_HMAC,
        COMMAND.SIGN_PSS,
        COMMAND.SIGN_ECDSA,
        COMMAND.DERIVE_ECDH,
        COMMAND.DELETE_OBJECT,
        COMMAND.DECRYPT_OAEP,
        COMMAND.GENERATE_HMAC_KEY,
        COMMAND.GENERATE_WRAP_KEY,
        COMMAND.SIGN_ATTESTATION_CERTIFICATE,
        COMMAND.SET_LOG_INDEX,
        COMMAND.WRAP_DATA,
        COMMAND.UNWRAP_DATA,
        COMMAND.SIGN_EDDSA,
        COMMAND.CHANGE_AUTHENTICATION_KEY,
        COMMAND.PUT_SYMMETRIC_KEY,
        COMMAND.GENERATE_SYMMETRIC_KEY,
        COMMAND.DECRYPT_ECB,
        COMMAND.ENCRYPT_ECB,
        COMMAND.DECRYPT_CBC,
        COMMAND.ENCRYPT_CBC,
        COMMAND.PUT_PUBLIC_WRAP_KEY,
        COMMAND.WRAP_KEY_RSA,
        COMMAND.UNWRAP_KEY_RSA,
        COMMAND.EXPORT_WRAPPED_RSA,
        COMMAND.IMPORT_WRAPPED_RSA,
    }
)
"""What uses a key or changes the device. Looking (LIST, INFO, GET PUBLIC KEY, GET OPAQUE) would fill the log."""

_WORDS = {
    OBJECT.OPAQUE: "certificate",
    OBJECT.AUTHENTICATION_KEY: "authentication key",
    OBJECT.WRAP_KEY: "wrap key",
}


@dataclass(frozen=True, slots=True)
class NewObject:
    """What an object is to be, in the words of GET OBJECT INFO."""

    type: OBJECT
    id: int
    label: str
    domains: int
    algorithm: ALGORITHM
    capabilities: CAPABILITY
    delegated: CAPABILITY = CAPABILITY(0)  # noqa: RUF009  # a number

    def __str__(self) -> str:
        numbers = domain_numbers(self.domains)
        domains = f"domain{'s' * (len(numbers) > 1)} {_listed(numbers)}"
        domains = "all domains" if self.domains == ALL_DOMAINS else domains
        text = f'{_WORDS.get(self.type, "key")} 0x{self.id:04x} "{self.label}"'
        text += f" ({algorithm_name(self.algorithm)}), {domains}"
        if self.capabilities:
            text += f", for {_listed(names(self.capabilities))}"
        if self.delegated:
            text += f"; what it makes may have {_listed(names(self.delegated))}"
        return text


@dataclass(frozen=True, slots=True)
class PutAuthKey:
    """Makes an authentication key, and logs in with it."""

    object: NewObject
    password: SecretSource

    def __str__(self) -> str:
        where = self.password.file or f"the credential {self.password.credential}"
        return f"Put the {self.object}; its password is in {where}, and is made if there is none. Log in with it."


@dataclass(frozen=True, slots=True)
class ReplaceFactoryPassword:
    """Gives the authentication key that a new device comes with a password that only this process knows."""

    def __str__(self) -> str:
        return f"Replace the factory password of authentication key 0x{FACTORY_AUTH_KEY:04x} by a random one."


@dataclass(frozen=True, slots=True)
class PutWrapKey:
    """Makes a wrap key and its shares, or puts one back from shares."""

    object: NewObject
    split: NewShares | None
    combine: tuple[Path, ...]

    def __str__(self) -> str:
        if self.split is None:
            return f"Put the {self.object}; it comes from the shares {_listed(self.combine)}."
        files = self.split.files
        return (
            f"Make the {self.object}; any {self.split.threshold} of {len(files)} shares bring it back, and they go to "
            f"{_listed(files)}."
        )


@dataclass(frozen=True, slots=True)
class GenerateKey:
    """Has the device make a key."""

    object: NewObject

    def __str__(self) -> str:
        return f"Generate the {self.object}; {_exportable(self.object)}."


@dataclass(frozen=True, slots=True)
class ImportKey:
    """Puts a key that comes from a file."""

    object: NewObject
    source: KeyFile

    def __str__(self) -> str:
        return f"Import the {self.object}, from {self.source.file}; {_exportable(self.object)}."


@dataclass(frozen=True, slots=True)
class PutCertificate:
    """Stores the certificate of a key."""

    object: NewObject
    file: Path

    def __str__(self) -> str:
        return f"Put the {self.object}, from {self.file}."


@dataclass(frozen=True, slots=True)
class Attest:
    """Has the device certify what it holds."""

    id: int

    def __str__(self) -> str:
        return f"Have the device attest key 0x{self.id:04x}."


@dataclass(frozen=True, slots=True)
class StoreLog:
    """Reads what the device has logged since it was new, and frees its log."""

    def __str__(self) -> str:
        return "Store the device's log in the transcript, and free it."


@dataclass(frozen=True, slots=True)
class AuditCommands:
    """Says which commands are logged."""

    value: Audit

    def __str__(self) -> str:
        listed = _listed(sorted(command.name.lower().replace("_", "-") for command in AUDITED))
        return f"Set the audit of these commands to {self.value}: {listed}."


@dataclass(frozen=True, slots=True)
class ForceAudit:
    """Says whether the device works on when its log is full."""

    value: Audit

    def __str__(self) -> str:
        return f"Set force-audit to {self.value}."


@dataclass(frozen=True, slots=True)
class DeleteFactoryAuthKey:
    """Deletes, as admin, the authentication key that a new device comes with, and lists what is left."""

    admin: int

    def __str__(self) -> str:
        return f"Log in as 0x{self.admin:04x}, and delete authentication key 0x{FACTORY_AUTH_KEY:04x}."


Step = (
    PutAuthKey
    | ReplaceFactoryPassword
    | PutWrapKey
    | GenerateKey
    | ImportKey
    | PutCertificate
    | Attest
    | StoreLog
    | AuditCommands
    | ForceAudit
    | DeleteFactoryAuthKey
)


def plan(declaration: Declaration) -> tuple[Step, ...]:
    """The steps that the declaration takes on a new device."""
    return tuple(_steps(declaration))


def _steps(declaration: Declaration) -> Iterator[Step]:
    admin = declaration.admin
    auth_keys = {name: _put_auth_key(name, key) for name, key in declaration.auth_keys.items()}
    yield from (put for name, put in auth_keys.items() if declaration.auth_keys[name] is admin)
    yield ReplaceFactoryPassword()
    yield from (put for name, put in auth_keys.items() if declaration.auth_keys[name] is not admin)
    if declaration.wrap_key is not None:
        yield _put_wrap_key(declaration.wrap_key)
    for key in declaration.keys:
        yield from _key_steps(key)
    yield StoreLog()
    yield AuditCommands(declaration.audit.commands)
    yield ForceAudit(declaration.audit.force)
    yield DeleteFactoryAuthKey(admin.id)


def _put_auth_key(name: str, key: AuthKey) -> PutAuthKey:
    new = NewObject(
        OBJECT.AUTHENTICATION_KEY,
        key.id,
        key.label or name,
        ALL_DOMAINS if key.domains is None else domain_mask(key.domains),
        ALGORITHM.AES128_YUBICO_AUTHENTICATION,
        ROLES[key.role] if key.role else combined(key.capabilities or ()),
        ADMIN_DELEGATES if key.role == "admin" else CAPABILITY(0),
    )
    return PutAuthKey(new, key.password)


def _put_wrap_key(key: WrapKey) -> PutWrapKey:
    domains = domain_mask(key.domains)
    new = NewObject(OBJECT.WRAP_KEY, key.id, key.label, domains, ALGORITHM.AES256_CCM_WRAP, WRAPS, WRAP_DELEGATES)
    return PutWrapKey(new, key.split, key.combine or ())


def _key_steps(key: Key) -> Iterator[Step]:
    algorithm = ALGORITHMS[key.algorithm]
    domains = domain_mask(key.domains)
    exportable = CAPABILITY.EXPORTABLE_UNDER_WRAP if key.exportable else CAPABILITY(0)
    capabilities = combined(key.capabilities) | exportable
    new = NewObject(algorithm.type, key.id, key.label, domains, algorithm.number, capabilities)
    yield GenerateKey(new) if key.import_ is None else ImportKey(new, key.import_)
    if key.certificate is not None:
        # Yubico's PKCS#11 module finds a certificate by the id and label of its key
        yield PutCertificate(
            NewObject(OBJECT.OPAQUE, key.id, key.label, domains, ALGORITHM.OPAQUE_X509_CERTIFICATE, exportable),
            key.certificate,
        )
    if algorithm.type is OBJECT.ASYMMETRIC_KEY:
        yield Attest(key.id)


def _exportable(new: NewObject) -> str:
    can = new.capabilities & CAPABILITY.EXPORTABLE_UNDER_WRAP
    return "it can be copied under the wrap key" if can else "it can never leave the device"


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))
