"""A parser for libconfig's text format, with limits on size and depth.

Grammar: the libconfig manual, section 4 (https://hyperrealm.github.io/libconfig/libconfig_manual.html). A setting
file becomes a dict, a group too, a list and an array a list, a scalar a str, int, float or bool.

`@include` is refused: it would name a file of the server. PyPI's `libconf` follows it and is no longer maintained,
which is why the text is parsed here.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

Value: TypeAlias = "dict[str, Value] | list[Value] | str | int | float | bool"

DEPTH_MAX = 32
"""Groups and lists within each other; SWUpdate follows paths of at most 20 names (MAX_PARSED_NODES)."""

# One token each, after white space; the order settles what two of them could match. Possessive quantifiers: no
# backtracking.
_TOKEN = re.compile(
    rb"""
    [ \t\r\n\f]*+ (?:
      (?P<comment>    \#[^\n]*+ | //[^\n]*+ | /\*(?s:.*?)\*/ )
    | (?P<string>     "(?: [^"\\]++ | \\(?s:.) )*+" )
    | (?P<float>      [-+]?(?: [0-9]*+\.[0-9]*+(?:[eE][-+]?[0-9]++)? | [0-9]++[eE][-+]?[0-9]++ ) )
    | (?P<hex>        0[xX][0-9A-Fa-f]++L{0,2} )
    | (?P<integer>    [-+]?[0-9]++L{0,2} )
    | (?P<name>       [A-Za-z*][-A-Za-z0-9_*]*+ )
    | (?P<include>    @include )
    | (?P<mark>       [=:;,{}()\[\]] )
    | (?P<end>        \Z )
    | (?P<unknown>    . )
    )
    """,
    re.VERBOSE | re.DOTALL,
)

_ESCAPE = re.compile(rb"""\\(?: x([0-9A-Fa-f]{2}) | ([abfnrtv"\\]) )""", re.VERBOSE)
_ESCAPED = dict(zip(b'abfnrtv"\\', b'\a\b\f\n\r\t\v"\\', strict=True))

_CLOSING = {"{": "}", "(": ")", "[": "]"}


class LibconfigError(ValueError):
    """The text is not libconfig's format, or exceeds a limit; `line` counts from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(f"line {line}: {message}")
        self.line = line


class _Token(NamedTuple):
    """`kind` is a group of _TOKEN, or the punctuation mark itself."""

    kind: str
    text: bytes
    at: int


def parse(data: bytes) -> dict[str, Value]:
    """The settings in a text. Raises LibconfigError."""
    return _Parser(data).settings_file()


class _Parser:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._tokens = self._scan()
        self._next = next(self._tokens)

    def settings_file(self) -> dict[str, Value]:
        settings = self._settings(0)
        if self._next.kind != "end":
            raise self._error("a setting's name was expected")
        return settings

    def _scan(self) -> Iterator[_Token]:
        for match in _TOKEN.finditer(self._data):
            kind = match.lastgroup or ""
            text, at = match[kind], match.start(kind)
            if kind == "unknown":
                quoted = text == b'"'
                raise self._error("the string does not end" if quoted else "this character does not belong here", at)
            if kind == "include":
                raise self._error("@include is not allowed: put the settings into one file", at)
            if kind != "comment":
                yield _Token(text.decode() if kind == "mark" else kind, text, at)

    def _take(self) -> _Token:
        taken, self._next = self._next, next(self._tokens, self._next)
        return taken

    def _settings(self, depth: int) -> dict[str, Value]:
        settings: dict[str, Value] = {}
        while self._next.kind == "name":
            name = self._take()
            key = name.text.decode()
            if key in settings:
                raise self._error(f"{key} is set twice", name.at)
            if self._take().kind not in ("=", ":"):
                raise self._error(f"= or : was expected after {key}", name.at)
            settings[key] = self._value(depth)
            if self._next.kind in (";", ","):
                self._take()
        return settings

    def _value(self, depth: int) -> Value:
        token = self._take()
        match token.kind:
            case "string":
                return self._string(token)
            case "integer":
                return self._integer(token, 10)
            case "hex":
                return self._integer(token, 16)
            case "float":
                return self._float(token)
            case "name" if token.text.lower() in (b"true", b"false"):
                return token.text.lower() == b"true"
            case "{" | "(" | "[":
                return self._aggregate(token, depth + 1)
        raise self._error("a value was expected", token.at)

    def _aggregate(self, opening: _Token, depth: int) -> Value:
        if depth > DEPTH_MAX:
            raise self._error(f"groups and lists are more than {DEPTH_MAX} deep", opening.at)
        value = self._settings(depth) if opening.kind == "{" else self._elements(opening, depth)
        if self._take().kind != _CLOSING[opening.kind]:
            raise self._error(f"this {opening.kind} is not closed", opening.at)
        return value

    def _elements(self, opening: _Token, depth: int) -> list[Value]:
        elements: list[Value] = []
        while self._next.kind != _CLOSING[opening.kind]:
            at = self._next.at
            element = self._value(depth)
            if opening.kind == "[" and isinstance(element, dict | list):
                raise self._error("an array holds scalars only; a list is written ( )", at)
            elements.append(element)
            if self._next.kind != ",":
                break
            self._take()
        return elements

    def _string(self, token: _Token) -> str:
        raw = _unescape(token.text)
        # strings that follow each other are one (manual, section 4.6)
        while self._next.kind == "string":
            raw += _unescape(self._take().text)
        if b"\0" in raw:
            raise self._error("the string holds a NUL", token.at)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._error("the string is not UTF-8", token.at) from None

    def _integer(self, token: _Token, base: int) -> int:
        # int() of very many digits is slow, and refused by Python; 64 bits have at most 20 and a sign
        value = int(token.text.rstrip(b"L"), base) if len(token.text) <= 64 else 1 << 64
        if not -(1 << 63) <= value < 1 << (64 if base == 16 else 63):
            raise self._error("the integer does not fit into 64 bits", token.at)
        return value

    def _float(self, token: _Token) -> float:
        try:
            return float(token.text)
        except ValueError:
            raise self._error("this is no number", token.at) from None

    def _error(self, message: str, at: int | None = None) -> LibconfigError:
        before = self._data[: self._next.at if at is None else at]
        return LibconfigError(message, before.count(b"\n") + 1)


def _unescape(quoted: bytes) -> bytes:
    """The bytes of a quoted string; a backslash before anything else stands for itself, as in libconfig's scanner."""
    return _ESCAPE.sub(
        lambda match: bytes.fromhex(match[1].decode()) if match[1] else bytes((_ESCAPED[match[2][0]],)), quoted[1:-1]
    )
