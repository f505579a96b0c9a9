"""NXP's Command Sequence File: the text that the Code Signing Tool `cst` is told by what to sign (HABv4 and AHAB).

    [Install Key]
        Verification index = 0
        Target Index = 2
        File = "IMG1_1_sha256_2048_65537_v3_usr_crt.pem"

Language: NXP's user guide of the tool (UG10106), and what its scanner and parser make of a text. A text of a client
never reaches `cst`: it is parsed into `Command`s, and `emit` writes a new one from them. What the commands mean is
`signers.formats.csf_plan`.

The tool's scanner is lenient where this one is strict: it skips characters that it does not know, takes a string up to
the last quote of the line, wraps numbers at their word size, and drops what follows a backslash. A text that a person
and the tool could read differently is refused.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

TEXT_MAX = 64 * 1024
COMMANDS_MAX = 64
ARGUMENTS_MAX = 32
"""Of one command."""
VALUES_MAX = 256
"""Of one argument: blocks, features, bytes of a UID."""

NUMBER_MAX = 0xFFFF_FFFF

COMMANDS = (
    "Header",
    "Install SRK",
    "Install CSFK",
    "Install NOCAK",
    "Authenticate CSF",
    "Install Key",
    "Authenticate Data",
    "Install Secret Key",
    "Decrypt Data",
    "NOP",
    "Set Engine",
    "Init",
    "Unlock",
    "Install Certificate",
)

ARGUMENTS = (
    "Version",
    "UID",
    "Hash Algorithm",
    "Engine",
    "Engine Configuration",
    "Certificate Format",
    "Signature Format",
    "File",
    "Source index",
    "Verification index",
    "Target index",
    "Blocks",
    "Features",
    "Blob address",
    "Key",
    "Key Length",
    "MAC Bytes",
    "Target",
    "Source",
    "Permissions",
    "Offsets",
    "Mode",
    "Signature",
    "Source set",
    "Revocations",
    "Key Identifier",
    "Image Indexes",
)

# Without blanks, which never matter: the tool compares features in capitals and without them.
KEYWORDS = (
    *("SHA1", "SHA256", "SHA512", "X509", "CMS", "HAB", "AHAB", "HSM", "OEM", "NXP"),
    *(
        "ANY",
        "SCC",
        "RTIC",
        "CAAM",
        "SAHARA",
        "CSU",
        "SRTC",
        "DCP",
        "RTL",
        "SW",
        "OCOTP",
        "SNVS",
        "DTCP",
        "HDCP",
        "ROM",
    ),
    *("JTAG", "SRKREVOKE", "SCS", "FIELDRETURN", "MID", "RNG", "MFG", "LPSWR", "ZMKWRITE"),
    *("INSWAP8", "INSWAP16", "INSWAP32", "OUTSWAP8", "OUTSWAP16", "OUTSWAP32"),
    *("DSCSWAP8", "DSCSWAP16", "DSCBE816", "DSCBE832", "KEEP"),
)


def _squeezed(names: Iterable[str]) -> dict[str, str]:
    return {name.replace(" ", "").lower(): name for name in names}


_COMMANDS, _ARGUMENTS, _KEYWORDS = _squeezed(COMMANDS), _squeezed(ARGUMENTS), _squeezed(KEYWORDS)

# One token each, after blanks. Possessive quantifiers: no backtracking.
_TOKEN = re.compile(
    r"""
    [ \t]*+ (?:
      (?P<word>    [A-Za-z][A-Za-z0-9]*+ )
    | (?P<number>  (?: 0[xX][0-9A-Fa-f]++ | [0-9]++ ) (?![A-Za-z0-9]) )
    | (?P<string>  "[^"]*+" )
    | (?P<mark>    [\[\]=,.] )
    | (?P<comment> \#.*+ )
    | (?P<more>    \\[ \t]*+\Z )
    | (?P<end>     \Z )
    | (?P<unknown> . )
    )
    """,
    re.VERBOSE | re.DOTALL,
)

_CONTROL = re.compile(r"[\0-\x08\x0b-\x1f\x7f]")
_FILE_NAME = re.compile(r"""[ !#-\[\]-~]++""")  # printable ASCII but for " and \


class CsfError(ValueError):
    """The text is no command sequence that can be signed by; `line` counts from 1.

    The message holds nothing of the text but names of the language: strings may hold a PIN.
    """

    def __init__(self, message: str, line: int) -> None:
        super().__init__(f"line {line}: {message}")
        self.line = line


@dataclass(frozen=True, slots=True)
class Pair:
    """Two numbers: a version, `4.3`, or offsets, `0x0 0x90`."""

    first: int
    second: int


@dataclass(frozen=True, slots=True)
class Keyword:
    """One of KEYWORDS, as it stands there."""

    name: str


@dataclass(frozen=True, slots=True)
class FileName:
    """A quoted string: the name of a file, or a URI. No part of `repr`, since it may hold a PIN."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Block:
    """`length` bytes at `offset` of a file, which the boot ROM finds at `address`."""

    address: int
    offset: int
    length: int
    file: FileName


Value: TypeAlias = int | Pair | Keyword | FileName | Block


@dataclass(frozen=True, slots=True)
class Argument:
    """One of ARGUMENTS with its values: one at least, all of the same type. Where it stood is no part of equality."""

    name: str
    values: tuple[Value, ...]
    line: int = field(default=1, compare=False)


@dataclass(frozen=True, slots=True)
class Command:
    """One of COMMANDS with its arguments, each at most once, in the order of the text."""

    name: str
    arguments: tuple[Argument, ...] = ()
    line: int = field(default=1, compare=False)

    def get(self, name: str) -> Argument | None:
        """The argument of this name."""
        return next((argument for argument in self.arguments if argument.name == name), None)


class _Token(NamedTuple):
    """`kind` is a group of _TOKEN, or the mark itself."""

    kind: str
    text: str
    line: int


def parse(text: str) -> tuple[Command, ...]:
    """The commands of a text. Raises CsfError."""
    if len(text) > TEXT_MAX:
        raise CsfError(f"the text is longer than {TEXT_MAX} characters", 1)
    text = text.replace("\r\n", "\n")
    if control := _CONTROL.search(text):
        raise CsfError("a control character does not belong here", text.count("\n", 0, control.start()) + 1)
    headings: list[_Token] = []
    bodies: list[list[Argument]] = []
    for tokens in _lines(text):
        if tokens[0].kind == "[":
            headings.append(_heading(tokens))
            bodies.append([])
            if len(headings) > COMMANDS_MAX:
                raise CsfError(f"there are more than {COMMANDS_MAX} commands", tokens[0].line)
        elif not headings:
            raise CsfError("a command in brackets was expected", tokens[0].line)
        else:
            bodies[-1].append(_argument(tokens, bodies[-1]))
    return tuple(
        Command(heading.text, tuple(body), heading.line) for heading, body in zip(headings, bodies, strict=True)
    )


def _lines(text: str) -> Iterator[list[_Token]]:
    """The tokens of each line that has any; lines that a backslash continues are one."""
    pending: list[_Token] = []
    physical = text.split("\n")
    for number, content in enumerate(physical, 1):
        tokens = list(_scan(content, number))
        last = tokens[-1].kind if tokens else ""
        if last in ("comment", "more") and number == len(physical):
            # the tool takes neither for what it is without a line end
            raise CsfError("a comment or continuation must end with a line end", number)
        if last == "comment" and len(tokens) == 1:
            continue  # as if the whole line were not there, also between continued ones
        pending += tokens[:-1] if last in ("comment", "more") else tokens
        if last != "more" and pending:
            yield pending
            pending = []


def _scan(content: str, line: int) -> Iterator[_Token]:
    for match in _TOKEN.finditer(content):
        kind = match.lastgroup or ""
        text = match[kind]
        if kind == "unknown":
            raise CsfError(_MISPLACED.get(text, "this character does not belong here, or a number is malformed"), line)
        if kind == "string" and '"' in content[match.end() :]:
            raise CsfError("a line can hold one string only; end it with , \\ and continue on the next", line)
        if kind != "end":
            yield _Token(text if kind == "mark" else kind, text, line)


_MISPLACED = {
    '"': "the string does not end",
    "\\": "only blanks may follow a backslash, which continues the line",
}


def _heading(tokens: list[_Token]) -> _Token:
    line = tokens[0].line
    if len(tokens) < 3 or tokens[-1].kind != "]":
        raise CsfError("a command stands in brackets on a line of its own", line)
    return _Token("command", _name(tokens[1:-1], _COMMANDS, "command", line), line)


def _argument(tokens: list[_Token], before: list[Argument]) -> Argument:
    line = tokens[0].line
    equals = next((at for at, token in enumerate(tokens) if token.kind == "="), 0)
    if not equals:
        raise CsfError("an argument is written as name = value", line)
    name = _name(tokens[:equals], _ARGUMENTS, "argument", line)
    if len(before) >= ARGUMENTS_MAX:
        raise CsfError(f"the command has more than {ARGUMENTS_MAX} arguments", line)
    if any(name == argument.name for argument in before):
        raise CsfError(f"{name} is set twice", line)
    values = tuple(_values(tokens[equals + 1 :], line))
    if len({type(value) for value in values}) > 1:
        raise CsfError(f"the values of {name} are of different kinds", line)
    return Argument(name, values, line)


def _name(tokens: list[_Token], known: dict[str, str], what: str, line: int) -> str:
    name = known.get("".join(token.text for token in tokens if token.kind == "word").lower())
    if not name or any(token.kind != "word" for token in tokens):
        raise CsfError(f"this {what} is not known", line)
    return name


def _values(tokens: list[_Token], line: int) -> Iterator[Value]:
    value: list[_Token] = []
    count = 0
    for token in (*tokens, _Token(",", ",", tokens[-1].line if tokens else line)):
        if token.kind != ",":
            value.append(token)
            continue
        count += 1
        if count > VALUES_MAX:
            raise CsfError(f"the argument has more than {VALUES_MAX} values", token.line)
        yield _value(value, token.line)
        value = []


def _value(tokens: list[_Token], line: int) -> Value:
    match [token.kind for token in tokens]:
        case ["number"]:
            return _number(tokens[0])
        case ["number", "number"] | ["number", ".", "number"]:
            return Pair(_number(tokens[0]), _number(tokens[-1]))
        case ["number", "number", "number", "string"]:
            address, offset, length = (_number(token) for token in tokens[:3])
            return Block(address, offset, length, _file_name(tokens[3].text[1:-1], tokens[3].line))
        case ["string"]:
            return _file_name(tokens[0].text[1:-1], tokens[0].line)
        case ["word", *rest] if all(kind in ("word", "number") for kind in rest):
            # DSC BE8 16: a number within a keyword is one of its words
            squeezed = "".join(token.text if token.kind == "word" else str(_number(token)) for token in tokens)
            if keyword := _KEYWORDS.get(squeezed.lower()):
                return Keyword(keyword)
            raise CsfError("this keyword is not known; the name of a file is written in quotes", line)
    raise CsfError("a value was expected: a number, a pair, a keyword, a file in quotes, or a block", line)


def _number(token: _Token) -> int:
    text = token.text.lower()
    hexadecimal = text.startswith("0x")
    if not hexadecimal and text[0] == "0" and text != "0":
        raise CsfError("a decimal number begins with 0, which the tool would read as octal", token.line)
    # int() of very many digits is slow, and refused by Python
    number = int(text, 16 if hexadecimal else 10) if len(text) <= 32 else NUMBER_MAX + 1
    if number > NUMBER_MAX:
        raise CsfError("the number does not fit into 32 bits", token.line)
    return number


def _file_name(text: str, line: int) -> FileName:
    if not _FILE_NAME.fullmatch(text):
        raise CsfError('a string is of printable ASCII characters, not empty, and without " and \\', line)
    return FileName(text)


def emit(commands: Iterable[Command]) -> str:
    """A text of these commands, to be read by `cst`; `parse` makes the same commands of it.

    Raises CsfError where there is no such text, as for a file name with a quote in it.
    """
    return "".join(f"[{_checked(command.name, COMMANDS, command.line)}]\n{_body(command)}" for command in commands)


def _body(command: Command) -> str:
    lines = []
    for argument in command.arguments:
        name = _checked(argument.name, ARGUMENTS, argument.line)
        if not argument.values:
            raise CsfError(f"{name} has no value", argument.line)
        # one on a line: the tool would take two strings of a line for one
        values = ", \\\n        ".join(_written(value, name, argument.line) for value in argument.values)
        lines.append(f"    {name} = {values}\n")
    return "".join(lines)


def _written(value: Value, argument: str, line: int) -> str:
    match value:
        case Pair(first, second) if argument == "Version":
            return f"{_decimal(first, line)}.{_decimal(second, line)}"
        case Pair(first, second):
            return f"{_hex(first, line)} {_hex(second, line)}"
        case Keyword(name):
            return _checked(name, KEYWORDS, line)
        case FileName(text):
            return f'"{_file_name(text, line).text}"'
        case Block(address, offset, length, file):
            return " ".join((*(_hex(number, line) for number in (address, offset, length)), _written(file, "", line)))
        case _:
            return _decimal(value, line)


def _checked(name: str, known: tuple[str, ...], line: int) -> str:
    if name not in known:
        raise CsfError("this name is not one of the language", line)
    return name


def _decimal(number: int, line: int) -> str:
    if not 0 <= number <= NUMBER_MAX:
        raise CsfError("the number does not fit into 32 bits", line)
    return str(number)


def _hex(number: int, line: int) -> str:
    return f"{int(_decimal(number, line)):#x}"
