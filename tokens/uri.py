"""pkcs11: URIs (RFC 7512), as clients send them: read strictly, and matched against what is granted.

    uri = parse("pkcs11:token=YubiHSM;object=swupdate-rsa;type=private;pin-value=password")
    uri.matches(provider.uri_attributes, labels={"swupdate-rsa"}, id=None)

A URI only ever narrows the choice among granted keys. Whatever in it cannot be compared with a grant refuses it.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from tokens.errors import KeyNotGranted

_SCHEME = "pkcs11:"

_PIN_PLACEHOLDER = "pin-value=password"
"""Not a PIN: the text that recipes put where digsigserver put the PIN in, as a path or a query attribute."""

_TOKEN_ATTRIBUTES = frozenset({"token", "serial", "manufacturer", "model"})

_TYPES = frozenset({b"private", b"public", b"cert"})

# RFC 7512, section 2.3: pk11-path-res-avail, unreserved and percent-encoded characters
_VALUE = re.compile(r"(?:[A-Za-z0-9._~:\[\]@!$'()*+,=&-]|%[0-9A-Fa-f]{2})*")


@dataclass(frozen=True, slots=True)
class Pkcs11Uri:
    """The path attributes of a URI, percent-decoded; every one is of the kinds that `matches` compares."""

    attributes: Mapping[str, bytes]

    def matches(self, token: Mapping[str, frozenset[str]], *, labels: Collection[str], id: bytes | None) -> bool:
        """Whether every attribute agrees with a granted object.

        Arguments:
            token: the values that the token attributes may have (`KeyProvider.uri_attributes`).
            labels: the grant's object (CKA_LABEL) and its aliases.
            id: the grant's CKA_ID; None where the grant names none.
        """
        return all(self._agrees(name, value, token, labels, id) for name, value in self.attributes.items())

    @staticmethod
    def _agrees(
        name: str, value: bytes, token: Mapping[str, frozenset[str]], labels: Collection[str], id: bytes | None
    ) -> bool:
        match name:
            case "type":
                return value in _TYPES
            case "object":
                return any(value == label.encode() for label in labels)
            case "id":
                return id is not None and value == id
            case _:
                return any(value == known.encode() for known in token.get(name, ()))


def parse(text: str) -> Pkcs11Uri:
    """Reads a URI that a client sent; the placeholder `pin-value=password` is dropped, as `;` or `?` attribute.

    Raises KeyNotGranted where it is no such URI, an attribute stands twice, or there is one that no grant can match.
    """
    if text[: len(_SCHEME)].lower() != _SCHEME:
        raise _refused("It does not begin with pkcs11:.")
    path, _, query = text[len(_SCHEME) :].partition("?")
    if any(part != _PIN_PLACEHOLDER for part in query.split("&") if query):
        raise _refused("It has a query attribute; a PIN, a module or their source is never taken from a request.")
    attributes: dict[str, bytes] = {}
    for name, value in _path_attributes(path):
        if name in attributes:
            raise _refused(f"Its attribute {name} stands twice.")
        attributes[name] = value
    return Pkcs11Uri(attributes)


def _path_attributes(path: str) -> Iterator[tuple[str, bytes]]:
    for part in path.split(";") if path else ():
        if part == _PIN_PLACEHOLDER:
            continue
        name, equals, value = part.partition("=")
        if not equals or name not in _TOKEN_ATTRIBUTES | {"object", "id", "type"}:
            raise _refused("Only token, serial, manufacturer, model, object, id and type may stand in it.")
        if not _VALUE.fullmatch(value):
            raise _refused(f"The value of {name} is not percent-encoded as RFC 7512 says.")
        yield name, unquote_to_bytes(value)


def _refused(reason: str) -> KeyNotGranted:
    # nothing of the URI is repeated: a client may have put a PIN into it
    return KeyNotGranted(f"The key URI is refused. {reason}", "Name the granted key, or leave the key URI out.")
