"""The grants at work: which key a signer gets for a machine or distro, and whether it is the right one.

The client never chooses an object: its machine or distro, backend and key URI only choose among granted keys.
A key is bound to one signer: the same RSA operation signs a kernel module and a SWUpdate image, so a public key
that is seen under two signers is refused under both. A symmetric key has no public half: there it is the place, one
object of a provider.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hsmsign import log
from hsmsign.locks import Locks
from hsmsign.mistakes import KEY_STORES, PLACEHOLDER
from hsmsign.settings import Grant, Settings
from signers.signer import Backend, GrantedFile, Signer, by_name
from tokens import attestation, uri
from tokens.attestation import Attested
from tokens.errors import (
    Error,
    KeyAmbiguous,
    KeyMismatch,
    KeyNotAttested,
    KeyNotFound,
    KeyNotGranted,
    KeyUnsuited,
    SignatureMismatch,
)
from tokens.provider import (
    Attestation,
    Attests,
    KeyFiles,
    KeyProvider,
    KeyReference,
    PublicKey,
    SigningKey,
    SymmetricKey,
    spki_sha256,
)

_CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}


@dataclass(frozen=True, slots=True)
class KeyState:
    """What is known of a granted key.

    `usable` is None, and so is what only the key itself can tell, where its object depends on the machine or distro
    of a request.
    """

    name: str
    signer: str
    role: str
    provider: str
    kind: str
    machine: str
    distro: str
    digest: bool
    algorithm: str | None = None
    public_key_pem: str | None = None
    spki_sha256: str | None = None
    certificate_pem: str | None = None
    bound_as: str | None = None
    """What the key is told from any other by; not shown."""
    usable: bool | None = None
    error: Error | None = None


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether every provider and every granted key can be used now; `notes` are for a reader."""

    ready: bool
    providers: Mapping[str, Error | None]
    keys: tuple[KeyState, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a device says of a granted key.

    Arguments:
        public_key: the granted key, as it was found.
        attestation: as the device made it.
        outcome: what it says where that is proven, else why it is not.
    """

    public_key: PublicKey
    attestation: Attestation
    outcome: Attested | KeyNotAttested


class Keyring:
    """The granted keys.

    Arguments:
        settings: whose grants are meant; they name only providers and signers that there are.
        providers: by their names, started by the caller.
        signers: every signer there is.
    """

    def __init__(self, settings: Settings, providers: Mapping[str, KeyProvider], signers: tuple[Signer, ...]) -> None:
        self.grants: tuple[Grant, ...] = settings.grants
        self._providers = providers
        self._max_age_s = settings.server.readiness_max_age_s
        named = by_name(signers)
        granted = [_Granted(grant, providers[grant.provider], named[grant.signer]) for grant in settings.grants]
        self._by_name = {entry.grant.name: entry for entry in granted}
        self._by_role: dict[tuple[str, str], list[_Granted]] = {}
        for entry in granted:
            self._by_role.setdefault((entry.grant.signer, entry.grant.role), []).append(entry)
        self._locks = Locks(settings.server.state_directory)
        self._bindings = _Bindings()
        self._verdicts = _Verdicts()
        self._probe: asyncio.Task[Readiness] | None = None
        self._probed_at = 0.0

    def keys(self, signer: str) -> "SignerKeys":
        """What a signer may open, for one request."""
        return SignerKeys(self, signer)

    @contextmanager
    def locking(self, keys: "SignerKeys") -> Iterator[None]:
        """Locks the keys of a request where what it signed does not verify: the files, where keys came out of those."""
        try:
            yield
        except SignatureMismatch as error:
            names = keys.opened or keys.files
            if not names:  # what it signed with was no granted key
                raise
            raise self._locked(names, error) from None

    @asynccontextmanager
    async def open_for(
        self,
        keys: "SignerKeys",
        role: str,
        machine: str | None,
        distro: str | None,
        backend: Backend | None,
        key_uri: str | None,
    ) -> AsyncIterator[SigningKey]:
        """See `signers.signer.Keys.open`.

        Raises KeyNotFound where no grant is for this machine or distro, and KeyNotGranted where a key URI matches none
        of those that are.
        """
        entry = self._choose(keys.signer, role, machine, distro, backend, key_uri)
        keys.opened.add(entry.grant.name)
        log.note(key=entry.grant.name)
        await self._probed_once()
        async with self._open(entry, entry.reference(machine, distro)) as key:
            yield key

    @asynccontextmanager
    async def open_symmetric_for(
        self, keys: "SignerKeys", role: str, machine: str | None, distro: str | None
    ) -> AsyncIterator[SymmetricKey]:
        """See `signers.signer.Keys.open_symmetric`. Raises as `open_for` does."""
        entry = self._choose(keys.signer, role, machine, distro, None, None)
        keys.opened.add(entry.grant.name)
        log.note(key=entry.grant.name)
        await self._probed_once()
        async with self._open_symmetric(entry, entry.reference(machine, distro)) as key:
            yield key

    @asynccontextmanager
    async def open_grant(self, name: str) -> AsyncIterator[SigningKey]:
        """The key of a grant, for one signature: it is locked where that does not verify.

        Raises KeyNotFound where there is no such grant, or it names no one object.
        """
        entry, reference = self._one_key(name)
        await self._probed_once()
        try:
            async with self._open(entry, reference) as key:
                yield key
        except SignatureMismatch as error:
            raise self._locked({name}, error) from None

    def _locked(self, names: set[str], error: SignatureMismatch) -> SignatureMismatch:
        """Locks the keys of these grants; the error that says so."""
        for name in names:
            self._locks.lock(name, error.message)
        return SignatureMismatch(
            f"{error.message} Locked: {', '.join(sorted(names))}.",
            "Find out why, then run `hsmsign doctor --unlock NAME` on the server.",
        )

    async def attest(self, name: str) -> Verdict:
        """What its device says of the key of a grant, whether the grant wants that or not.

        Raises as `open_grant` does, and KeyUnsuited where the provider cannot attest.
        """
        entry, reference = self._one_key(name)
        async with self._open_bound(entry, reference) as key:
            return await self._verdicts.of(entry.provider, reference, key.public_key)

    async def read_for(self, keys: "SignerKeys", role: str, machine: str | None, distro: str | None) -> GrantedFile:
        """See `signers.signer.Keys.read`. Raises as `open_for` does."""
        entry = self._choose(keys.signer, role, machine, distro, None, None)
        keys.files.add(entry.grant.name)
        self._locks.check(entry.grant.name)
        content = await _read(entry, entry.reference(machine, distro))
        pinned = entry.grant.srk_hash
        return GrantedFile(content, frozenset(entry.grant.allow), None if pinned is None else bytes.fromhex(pinned))

    async def claim_for(
        self, signer: str, role: str, public_key: PublicKey, machine: str | None, distro: str | None
    ) -> None:
        """See `signers.signer.Keys.claim`."""
        entry = self._choose(signer, role, machine, distro, None, None)
        await self._probed_once()
        spki = spki_sha256(public_key)
        # the file's place holds several keys: each has one of its own
        place = replace(entry.reference(machine, distro), certificate=spki)
        self._bindings.bind(spki, signer, (entry.grant.name, place))

    async def describe(self, grant: Grant) -> KeyState:
        """What is known of the grant's key now; what keeps it from being used is its `error`."""
        entry = self._by_name[grant.name]
        if entry.fixed is None:
            return entry.state
        try:
            if entry.role.is_file:
                await _read(entry, entry.fixed)
                return replace(entry.state, usable=True)
            if entry.role.algorithms:
                async with self._open_symmetric(entry, entry.fixed) as key:
                    bound_as = _bound_as(entry.provider, key)
                    return replace(entry.state, algorithm=key.algorithm, bound_as=bound_as, usable=True)
            async with self._open(entry, entry.fixed) as key:
                return _described(entry.state, key)
        except Error as error:
            return replace(entry.state, usable=False, error=error)

    async def readiness(self) -> Readiness:
        """Asks every provider and looks at every granted key; at most once every `server.readiness_max_age_s`."""
        loop = asyncio.get_running_loop()
        if self._probe is None or (self._probe.done() and loop.time() - self._probed_at >= self._max_age_s):
            self._probe = asyncio.create_task(self._probe_all(), name="readiness")
        # one caller that leaves must not end the probe for the others
        return await asyncio.shield(self._probe)

    async def _probed_once(self) -> None:
        """Before the first key is used every grant has been looked at: a key that two signers share is then known."""
        if self._probed_at == 0.0:
            await self.readiness()

    async def _probe_all(self) -> Readiness:
        probes = await asyncio.gather(*(self._probe_provider(provider) for provider in self._providers.values()))
        providers = {name: error for name, (error, _) in zip(self._providers, probes, strict=True)}
        states = {state.name: self._bindings.applied(state) for _, found in probes for state in found}
        keys = tuple(states[grant.name] for grant in self.grants)
        self._probed_at = asyncio.get_running_loop().time()
        return Readiness(
            ready=not any(providers.values()) and all(key.usable is not False for key in keys),
            providers=providers,
            keys=keys,
            notes=_notes(keys),
        )

    async def _probe_provider(self, provider: KeyProvider) -> tuple[Error | None, list[KeyState]]:
        """Whether the provider works, and its keys, one after the other: a probe must not fill a token's queue."""
        entries = [entry for entry in self._by_name.values() if entry.provider is provider]
        try:
            await provider.check()
        except Error as error:
            return error, [replace(entry.state, usable=False, error=error) for entry in entries]
        return None, [await self.describe(entry.grant) for entry in entries]

    def _one_key(self, name: str) -> tuple["_Granted", KeyReference]:
        entry = self._by_name.get(name)
        if entry is None or not entry.signs or entry.fixed is None:
            raise KeyNotFound(
                f"No granted key that signs is called {name}."
                if entry is None or not entry.signs
                else f"{name} is not one key but one for each request.",
                "`GET /keys` lists the granted keys.",
            )
        return entry, entry.fixed

    def _choose(
        self,
        signer: str,
        role: str,
        machine: str | None,
        distro: str | None,
        backend: Backend | None,
        key_uri: str | None,
    ) -> "_Granted":
        matching = [e for e in self._by_role.get((signer, role), ()) if e.grant.covers(machine, distro)]
        if not matching:
            raise KeyNotFound(
                f"No grant gives {signer} a key in the role {role} for {_whom(machine, distro)}.",
                "Check the name, or add a grant to the server's settings.",
            )
        if key_uri is not None:
            wanted = uri.parse(key_uri)
            matching = [e for e in matching if e.matches(wanted, machine, distro)]
            if not matching:
                raise KeyNotGranted(
                    f"The key URI names no key that {signer} may use in the role {role} for {_whom(machine, distro)}.",
                    "Name the granted key, or leave the key URI out.",
                )
        if len(matching) > 1 and backend is not None:
            matching = [e for e in matching if e.on_token == (backend == "pkcs11")] or matching
        if len(matching) > 1:
            names = ", ".join(entry.grant.name for entry in matching)
            raise KeyAmbiguous(
                f"{len(matching)} grants match for {signer}, role {role} and {_whom(machine, distro)}: {names}.",
                "Choose one by `backend` or `key-uri`, or make the grants' machines or distros narrower.",
            )
        return matching[0]

    @asynccontextmanager
    async def _open(self, entry: "_Granted", reference: KeyReference) -> AsyncIterator[SigningKey]:
        """The key, if it is not locked, the pinned one, no other signer's and, where the grant wants that, attested."""
        self._locks.check(entry.grant.name)
        async with self._open_bound(entry, reference) as key:
            if entry.grant.attested:
                await self._verdicts.require(entry.provider, reference, key.public_key)
            yield key

    @asynccontextmanager
    async def _open_bound(self, entry: "_Granted", reference: KeyReference) -> AsyncIterator[SigningKey]:
        """The key, if it is the pinned one and no other signer's."""
        async with entry.provider.open(reference) as key:
            spki = spki_sha256(key.public_key)
            pinned = entry.grant.spki_sha256
            if pinned is not None and pinned.lower() != spki:
                raise KeyMismatch(
                    f"The key of the grant {entry.grant.name} is not the one that the grant pins by spki_sha256.",
                    "Find out why the key has changed before you change the grant.",
                )
            self._bindings.bind(spki, entry.grant.signer, (entry.grant.name, reference))
            yield key

    @asynccontextmanager
    async def _open_symmetric(self, entry: "_Granted", reference: KeyReference) -> AsyncIterator[SymmetricKey]:
        """The symmetric key, if it is not locked, and no other signer's."""
        self._locks.check(entry.grant.name)
        async with entry.provider.open_symmetric(reference, entry.role.algorithms) as key:
            self._bindings.bind(_bound_as(entry.provider, key), entry.grant.signer, (entry.grant.name, reference))
            yield key


class SignerKeys:
    """Implements `signers.signer.Keys`: the keyring as one signer sees it in one request.

    Attributes:
        opened: the names of the grants of the keys that it opened.
        files: likewise of the files that it read.
    """

    def __init__(self, keyring: Keyring, signer: str) -> None:
        self.signer = signer
        self.opened: set[str] = set()
        self.files: set[str] = set()
        self._keyring = keyring

    def open(
        self,
        role: str,
        *,
        machine: str | None = None,
        distro: str | None = None,
        backend: Backend | None = None,
        key_uri: str | None = None,
    ) -> AbstractAsyncContextManager[SigningKey]:
        """See `signers.signer.Keys.open`."""
        return self._keyring.open_for(self, role, machine, distro, backend, key_uri)

    def open_symmetric(
        self, role: str, *, machine: str | None = None, distro: str | None = None
    ) -> AbstractAsyncContextManager[SymmetricKey]:
        """See `signers.signer.Keys.open_symmetric`."""
        return self._keyring.open_symmetric_for(self, role, machine, distro)

    async def read(self, role: str, *, machine: str | None = None, distro: str | None = None) -> GrantedFile:
        """See `signers.signer.Keys.read`."""
        return await self._keyring.read_for(self, role, machine, distro)

    async def claim(
        self, role: str, public_key: PublicKey, *, machine: str | None = None, distro: str | None = None
    ) -> None:
        """See `signers.signer.Keys.claim`."""
        await self._keyring.claim_for(self.signer, role, public_key, machine, distro)


async def _read(entry: "_Granted", reference: KeyReference) -> bytes:
    if not isinstance(entry.provider, KeyFiles):  # the settings refuse such a grant: this is the second lock
        raise KeyNotFound("A token holds no files.", "Grant the file of a key store.")
    return await entry.provider.read(reference)


class _Granted:
    """A grant with what can be worked out of it once.

    Attributes:
        fixed: which object it names, where that does not depend on the request.
        state: what is known without the key.
    """

    def __init__(self, grant: Grant, provider: KeyProvider, signer: Signer) -> None:
        self.grant = grant
        self.role = by_name(signer.roles)[grant.role]
        self.signs = not self.role.is_file and not self.role.algorithms
        self.provider = provider
        self.on_token = provider.kind not in KEY_STORES
        self.state = KeyState(
            name=grant.name, signer=grant.signer, role=grant.role, provider=provider.name, kind=provider.kind,
            machine=grant.machine, distro=grant.distro, digest=grant.digest,
        )  # fmt: skip
        self._id = None if grant.id is None else bytes.fromhex(grant.id)
        self._template = bool(PLACEHOLDER.search(f"{grant.object} {grant.certificate}"))
        glob = grant.machine if signer.scope == "machine" else grant.distro
        # a glob without wildcards is the only name that can ever be put in
        named = not any(character in glob for character in "*?[")
        self.fixed = self._reference(grant.machine, grant.distro) if named or not self._template else None

    def reference(self, machine: str | None, distro: str | None) -> KeyReference:
        """The object that is meant for this machine and distro."""
        return self.fixed or self._reference(machine, distro)

    def matches(self, wanted: uri.Pkcs11Uri, machine: str | None, distro: str | None) -> bool:
        """Whether a key URI names this grant's object."""
        reference = self.reference(machine, distro)
        labels = {*self.grant.aliases, *([reference.object] if reference.object else ())}
        return wanted.matches(self.provider.uri_attributes, labels=labels, id=reference.id)

    def _reference(self, machine: str | None, distro: str | None) -> KeyReference:
        def filled(text: str | None) -> str | None:
            return text and text.replace("{machine}", machine or "").replace("{distro}", distro or "")

        if self._template and "/" in f"{machine}{distro}":  # signers' forms refuse such names: this is the second lock
            raise KeyNotFound("The name of a machine or distro holds no slash.", "Correct the name.")
        return KeyReference(filled(self.grant.object), self._id, filled(self.grant.certificate))


class _Bindings:
    """Which signer uses which key: by what each place, a grant's object, held when it was last opened.

    A key is known by its `spki_sha256`, or by `_bound_as` where it is symmetric.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, KeyReference], str] = {}
        self._places: dict[str, dict[tuple[str, KeyReference], str]] = {}

    def bind(self, spki: str, signer: str, place: tuple[str, KeyReference]) -> None:
        """Notes that the place holds this key. Raises KeyMismatch where another signer has it too."""
        before = self._held.get(place)
        if before != spki:
            if before is not None:
                del self._places[before][place]
            self._held[place] = spki
            self._places.setdefault(spki, {})[place] = signer
        if error := self._shared(spki):
            raise error

    def applied(self, state: KeyState) -> KeyState:
        """The state, refused where a place that was looked at later holds the same key for another signer."""
        error = self._shared(state.bound_as) if state.usable and state.bound_as else None
        return replace(state, usable=False, error=error) if error else state

    def _shared(self, spki: str) -> KeyMismatch | None:
        places = self._places.get(spki, {})
        signers = sorted(set(places.values()))
        if len(signers) <= 1:
            return None
        grants = ", ".join(sorted({grant for grant, _ in places}))
        return KeyMismatch(
            f"One key is granted to the signers {' and '.join(signers)}, by {grants}: neither may use it.",
            "Give each signer a key of its own: what one signs could pass for what the other signs.",
        )


class _Verdicts:
    """What devices said of keys: each is asked once for a public key, and again when its place holds another.

    That is enough: who has the private key of one that was generated on a device and cannot leave it can only be that
    device, whatever it calls the key later.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, KeyReference], tuple[str, Verdict]] = {}
        self._asking: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def of(self, provider: KeyProvider, reference: KeyReference, public_key: PublicKey) -> Verdict:
        """The verdict on the key that the place holds. Raises KeyUnsuited where the provider cannot attest."""
        place, spki = (provider.name, reference), spki_sha256(public_key)
        async with self._asking[provider.name]:  # jobs that begin at once ask once
            known = self._known.get(place)
            if known is None or known[0] != spki:
                known = self._known[place] = spki, await _asked(provider, reference, public_key)
        return known[1]

    async def require(self, provider: KeyProvider, reference: KeyReference, public_key: PublicKey) -> None:
        """Raises KeyNotAttested unless the key was generated on its device and cannot leave it."""
        outcome = (await self.of(provider, reference, public_key)).outcome
        if isinstance(outcome, KeyNotAttested):
            raise outcome.with_traceback(None)  # which would grow each time
        attestation.check_never_extractable(outcome)


async def _asked(provider: KeyProvider, reference: KeyReference, public_key: PublicKey) -> Verdict:
    if not isinstance(provider, Attests):
        raise KeyUnsuited(f"A provider of kind {provider.kind} cannot attest its keys.", "Keep the key on a YubiHSM 2.")
    given = await provider.attest(reference)
    roots, serial = provider.attestation_roots, provider.serial
    object_id = None if reference.id is None else int.from_bytes(reference.id)
    try:
        attested = attestation.verify(given, public_key, roots=roots, serial=serial, id=object_id)
    except KeyNotAttested as error:
        return Verdict(public_key, given, error)
    return Verdict(public_key, given, attested)


def _bound_as(provider: KeyProvider, key: SymmetricKey) -> str:
    """What a symmetric key is bound to its signer by."""
    return f"{provider.name}: {key.place}"


def _described(state: KeyState, key: SigningKey) -> KeyState:
    pem = serialization.Encoding.PEM
    public_key = key.public_key
    return replace(
        state,
        algorithm=_algorithm(public_key),
        public_key_pem=public_key.public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo).decode(),
        spki_sha256=spki_sha256(public_key),
        bound_as=spki_sha256(public_key),
        certificate_pem="".join(c.public_bytes(pem).decode() for c in key.certificates) or None,
        usable=True,
    )


def _algorithm(public_key: PublicKey) -> str:
    match public_key:
        case rsa.RSAPublicKey():
            return f"RSA-{public_key.key_size}"
        case ec.EllipticCurvePublicKey():
            return _CURVES.get(public_key.curve.name, public_key.curve.name)
        case _:
            return "Ed25519"


def _notes(keys: tuple[KeyState, ...]) -> tuple[str, ...]:
    if not keys:
        return ("Nothing is granted: every request is refused. Add [[grants]] to the settings.",)
    return tuple(
        f"The key of {key.name} depends on the request: it is looked at when it is used."
        for key in keys
        if key.usable is None
    )


def _whom(machine: str | None, distro: str | None) -> str:
    named = [f"the {what} {name}" for what, name in (("machine", machine), ("distro", distro)) if name is not None]
    return " and ".join(named) or "a request without machine and distro"
