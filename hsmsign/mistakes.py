"""What is wrong between the parts of the settings: grants that name what there is not, or that cannot be told apart.

The checks look at what was typed, not at validated settings, so that no mistake hides another.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from signers.registry import SIGNERS
from signers.signer import Signer, by_name

KeyPath = tuple[str | int, ...]

KEY_STORES = frozenset({"file", "s3"})
"""The kinds of provider whose objects are paths."""

TOKENS = frozenset({"pkcs11", "yubihsm"})
"""The kinds of provider that hold keys only."""

ATTESTING = frozenset({"yubihsm"})
"""The kinds of provider whose devices attest their keys."""

PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
"""`{machine}` or `{distro}` in a grant's object or certificate."""

_SIGNERS = by_name(SIGNERS)
_SCOPES = ("machine", "distro")
_OTHER_THAN_TEXT = ("aliases", "allow", "attested", "digest")
_OF_A_PUBLIC_HALF = ("certificate", "spki_sha256", "attested", "digest")


def cross_checks(data: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """The key path and a sentence for each mistake in `data`, the settings as they were typed."""
    providers = data.get("providers")
    kinds = {name: _kind(table) for name, table in providers.items()} if isinstance(providers, dict) else {}
    grants = [
        (index, {key: value for key, value in grant.items() if isinstance(value, str) or key in _OTHER_THAN_TEXT})
        for index, grant in enumerate(_sequence(data.get("grants")))
        if isinstance(grant, dict)
    ]
    for index, grant in grants:
        for key, message in (*_place_mistakes(grant, kinds), *_signer_mistakes(grant, kinds)):
            yield ("grants", index, *key), message
    for (index, grant), (other, earlier) in ((b, a) for a, b in combinations(grants, 2)):
        if "name" in grant and grant["name"] == earlier.get("name"):
            yield ("grants", index, "name"), f"grants[{other}] has the same name"
        elif _indistinguishable(grant, earlier, kinds):
            yield ("grants", index), f"no request can tell it from grants[{other}]: both match, and neither is taken"


def _kind(table: Any) -> str:
    return str(table.get("kind")) if isinstance(table, dict) else ""


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _place_mistakes(grant: Mapping[str, Any], kinds: Mapping[str, str]) -> Iterator[tuple[KeyPath, str]]:
    """Where the key is, and who proves that: `provider`, `object`, `id`, `attested`."""
    provider = grant.get("provider")
    if provider is not None and provider not in kinds:
        yield ("provider",), unknown("provider", provider, kinds)
    if "id" in grant and kinds.get(provider or "") in KEY_STORES:
        yield ("id",), "a key store has no ids: name the object"
    elif "object" not in grant and "id" not in grant:
        yield (), "name the key by its object or id"
    kind = kinds.get(provider or "")
    if grant.get("attested") and kind and kind not in ATTESTING:
        yield ("attested",), f"a provider of kind {kind} cannot attest its keys; there is: {', '.join(ATTESTING)}"


def _signer_mistakes(grant: Mapping[str, Any], kinds: Mapping[str, str]) -> Iterator[tuple[KeyPath, str]]:
    """Who it is for: `signer`, `role`, `machine`, `distro` and the placeholders."""
    signer = _SIGNERS.get(grant.get("signer", ""))
    if signer is None and "signer" in grant:
        yield ("signer",), unknown("signer", grant["signer"], _SIGNERS)
    for key in ("object", "certificate"):
        for name in PLACEHOLDER.findall(grant.get(key, "")):
            if name not in _SCOPES:
                yield (key,), f"there is no placeholder {{{name}}}; there are {{machine}} and {{distro}}"
            elif signer is not None and name != signer.scope:
                yield (key,), f"{signer.name} is asked by {signer.scope}: {{{name}}} stands for nothing"
    if signer is None:
        return
    roles = by_name(signer.roles)
    if "role" in grant and grant["role"] not in roles:
        yield ("role",), unknown(f"role of {signer.name}", grant["role"], roles)
    yield from _role_mistakes(grant, signer, kinds)
    for scope in _SCOPES:
        if scope != signer.scope and grant.get(scope, "*") != "*":
            yield (scope,), f"{signer.name} is asked by {signer.scope}: this grant would never match"


def _role_mistakes(grant: Mapping[str, Any], signer: Signer, kinds: Mapping[str, str]) -> Iterator[tuple[KeyPath, str]]:
    """What does not go with the role: a file of a token, an `allow` or `srk_hash` without meaning."""
    role = by_name(signer.roles).get(grant.get("role", ""))
    if role is None:
        return
    if role.is_file and kinds.get(grant.get("provider", "")) in TOKENS:
        yield ("provider",), f"the role {role.name} is a file: only a provider of kind file or s3 can hold it"
    for name in _sequence(grant.get("allow")):
        if name not in role.allows:
            yield ("allow",), unknown(f"permission of {signer.name}'s role {role.name}", str(name), sorted(role.allows))
    for key in _OF_A_PUBLIC_HALF if role.algorithms else ():
        if grant.get(key):
            yield (key,), f"the role {role.name} is a symmetric key: it has no public half"
    if "srk_hash" in grant and not role.is_file:
        yield ("srk_hash",), "only the grant of a file with an SRK table has it"


def _indistinguishable(one: Mapping[str, Any], other: Mapping[str, Any], kinds: Mapping[str, str]) -> bool:
    """Whether two grants match the same requests, with no `backend` or key URI that could choose between them."""
    if any(one.get(key) != other.get(key) for key in ("signer", "role")):
        return False
    if any(one.get(key, "*") != other.get(key, "*") for key in _SCOPES):
        return False
    # an alias is what makes a key URI choose among files
    stores = all(kinds.get(grant.get("provider", "")) in KEY_STORES for grant in (one, other))
    stores = stores and not (one.get("aliases") and other.get("aliases"))
    return stores or all(one.get(key) == other.get(key) for key in ("provider", "object", "id"))


def unknown(what: str, name: str, known: Collection[str]) -> str:
    """Says that there is no such thing, and which there are."""
    there_are = f"there are: {', '.join(known)}" if known else "there is none"
    return f'no {what} is called "{name}"; {there_are}{did_you_mean(name, known)}'


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A question that goes at the end of a sentence; empty where nothing comes close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f' - did you mean "{close[0]}"?' if close else ""
