"""Flattened device trees: read from hostile bytes, changed, and written anew.

    tree = parse(read_at, size)
    node = tree.add(tree.root, "signature")
    tree.set(node, "algo", b"sha256,rsa2048\\0")
    content = tree.encode()

Source: Devicetree Specification 0.4, chapter 5. What is new gets the place that libfdt gives it (fdt_rw.c): a property
stands first in its node, a node first below its parent, and a name last among the strings, unless the end of one that
is there spells it.

A long value stays in the file: what is in memory is bounded by the tree's shape, and not by what images it holds.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from signers.formats.reading import ReadAt

HEADER_BYTES = 40

SIZE_MAX_BYTES = 2**31 - 1
"""The largest tree: libfdt counts in C's int."""

DEPTH_MAX = 32
"""How deep nodes may stand, the root included (FDT_MAX_DEPTH of U-Boot's boot/fdt_region.c)."""

NAME_MAX_BYTES = 255
"""The longest name of a node or property; the specification has 31."""

TOKENS_MAX = 131_072
"""The most nodes (two tokens each) and properties; a FIT with a thousand device trees has a quarter of it."""

STRINGS_MAX_BYTES = 1024 * 1024
"""The most that the names of all properties may take."""

RESERVATIONS_MAX = 256
"""The most entries of the memory reservation block."""

VALUE_MAX_BYTES = 4096
"""The longest value that is read; a longer one is a Span."""

VALUES_MAX_BYTES = 16 * 1024 * 1024
"""The most that all values that are read may take."""

WINDOW_BYTES = 64 * 1024
"""How much is read at a time."""

_MAGIC = 0xD00D_FEED
_VERSION, _COMPATIBLE = 17, 16

# magic, totalsize, off_dt_struct, off_dt_strings, off_mem_rsvmap, version, last_comp_version, boot_cpuid_phys,
# size_dt_strings, size_dt_struct (section 5.2)
_HEADER = struct.Struct(">10I")
_RESERVATION_BYTES = 16
_U32 = struct.Struct(">I")
_PROPERTY = struct.Struct(">II")

# section 5.4.1
_BEGIN_NODE, _END_NODE, _PROP, _NOP, _END = 1, 2, 3, 4, 9
END_NODE, END = _U32.pack(_END_NODE), _U32.pack(_END)


class FdtError(ValueError):
    """The bytes are no device tree, or exceed a limit."""


@dataclass(frozen=True, slots=True)
class Span:
    """`length` bytes of the file that was parsed, from `offset` on."""

    offset: int
    length: int


Value = bytes | Span


@dataclass(frozen=True, slots=True)
class Property:
    """A value, where its name stands among the strings, and what fills up its last 4 bytes.

    libfdt leaves there whatever it finds, and who signs the bytes of a tree signs that too.
    """

    name_offset: int
    value: Value
    padding: bytes = b""

    def parts(self) -> Iterator[Value]:
        """Its bytes in the structure block (section 5.4.1, FDT_PROP)."""
        length = value_size(self.value)
        yield _U32.pack(_PROP) + _PROPERTY.pack(length, self.name_offset)
        yield self.value
        yield self.padding or bytes(-length % 4)


@dataclass(slots=True, eq=False)
class Node:
    """A node: its properties, and the nodes below it, by their names and in their order."""

    name: str
    properties: dict[str, Property] = field(default_factory=dict)
    children: dict[str, "Node"] = field(default_factory=dict)

    def begin(self) -> bytes:
        """The bytes with which it begins in the structure block (FDT_BEGIN_NODE)."""
        name = _encoded(self.name)
        return _U32.pack(_BEGIN_NODE) + name + bytes(-len(name) % 4)

    def value(self, name: str) -> Value | None:
        """The value of a property; None where it has none of that name."""
        found = self.properties.get(name)
        return None if found is None else found.value

    def walk(self, path: str = "") -> Iterator[tuple[str, "Node"]]:
        """The node and all below it, each with its path, which is empty for the root."""
        yield path, self
        for child in self.children.values():
            yield from child.walk(f"{path}/{child.name}")


@dataclass(slots=True)
class Tree:
    """A device tree.

    Attributes:
        root: its root node.
        strings: the strings block.
        reservations: the memory reservation block, its end included.
        boot_cpu: boot_cpuid_phys.
        total_size: how many bytes of the file it took.
    """

    root: Node
    strings: bytes
    reservations: bytes
    boot_cpu: int
    total_size: int

    def set(self, node: Node, name: str, value: Value) -> None:
        """Sets a property."""
        found = node.properties.get(name)
        if found is not None:
            node.properties[name] = Property(found.name_offset, value)
        else:
            node.properties = {name: Property(self._offset_of(name), value), **node.properties}

    def add(self, parent: Node, name: str) -> Node:
        """The node of that name below its parent: a new one where there is none."""
        if name not in parent.children:
            parent.children = {name: Node(name), **parent.children}
        return parent.children[name]

    def encode(self, *, size_min: int = 0, align: int = 4) -> list[Value]:
        """The whole tree, zeros behind it up to that size, and to a multiple of `align`, included.

        Raises FdtError where it is too large.
        """
        structure = [*_joined(_structure(self.root)), END]
        structure_at = HEADER_BYTES + len(self.reservations)
        structure_size = sum(map(value_size, structure))
        strings_at = structure_at + structure_size
        used = strings_at + len(self.strings)
        size = max(used, size_min)
        size += -size % align
        if size > SIZE_MAX_BYTES:
            raise FdtError(f"it would have {size} bytes")
        header = _HEADER.pack(
            _MAGIC, size, structure_at, strings_at, HEADER_BYTES, _VERSION, _COMPATIBLE, self.boot_cpu,
            len(self.strings), structure_size,
        )  # fmt: skip
        return list(_joined([header, self.reservations, *structure, self.strings, bytes(size - used)]))

    def _offset_of(self, name: str) -> int:
        encoded = _encoded(name)
        found = self.strings.find(encoded)
        if found < 0:
            found = len(self.strings)
            self.strings += encoded
        return found


def value_size(value: Value) -> int:
    """Length in bytes."""
    return len(value) if isinstance(value, bytes) else value.length


def _encoded(name: str) -> bytes:
    return name.encode("latin-1") + b"\0"


def _structure(node: Node) -> Iterator[Value]:
    yield node.begin()
    for each in node.properties.values():
        yield from each.parts()
    for child in node.children.values():
        yield from _structure(child)
    yield END_NODE


def _joined(parts: Iterable[Value]) -> Iterator[Value]:
    """The same bytes, in as few parts as can be."""
    held: list[bytes] = []
    for part in parts:
        if isinstance(part, bytes):
            held.append(part)
            continue
        if held:
            yield b"".join(held)
            held.clear()
        yield part
    if held:
        yield b"".join(held)


def parse(read_at: ReadAt, size: int, *, slack: int = 1) -> Tree:
    """The tree at the beginning of a file of `size` bytes; FDT_NOPs are left out.

    What was within the limits may be beyond them once it is signed: `slack` is what they are multiplied by then.

    Raises FdtError where it is not sound, or has two nodes or properties of one name in the same place: what readers of
    it make of that differs.
    """
    header = read_at(0, HEADER_BYTES)
    if len(header) < HEADER_BYTES or not header.startswith(_U32.pack(_MAGIC)):
        raise FdtError("it is no flattened device tree")
    _, total, structure_at, strings_at, reservations_at, version, compatible, boot_cpu, strings_size, structure_size = (
        _HEADER.unpack(header)
    )
    if version < _VERSION or compatible > _VERSION:
        raise FdtError(f"it is of version {version}, and not {_VERSION}")
    if not HEADER_BYTES <= total <= min(size, SIZE_MAX_BYTES):
        raise FdtError(f"it is said to have {total} bytes, and there are {size}")
    if strings_size > slack * STRINGS_MAX_BYTES:
        raise FdtError(f"the names of its properties take more than {STRINGS_MAX_BYTES} bytes")
    for what, offset, length, align in (
        ("structure", structure_at, structure_size, 4),
        ("strings", strings_at, strings_size, 1),
        ("memory reservations", reservations_at, _RESERVATION_BYTES, 8),
    ):
        if offset < HEADER_BYTES or offset + length > total or offset % align:
            raise FdtError(f"its {what} stand where they cannot be")
    strings = read_at(strings_at, strings_size)
    root = _Parser(read_at, structure_at, structure_at + structure_size, strings, slack).root()
    return Tree(root, strings, _reservations(read_at, reservations_at, total), boot_cpu, total)


def _reservations(read_at: ReadAt, offset: int, end: int) -> bytes:
    block = read_at(offset, min(end - offset, RESERVATIONS_MAX * _RESERVATION_BYTES))
    for at in range(0, len(block) - _RESERVATION_BYTES + 1, _RESERVATION_BYTES):
        if not any(block[at : at + _RESERVATION_BYTES]):
            return block[: at + _RESERVATION_BYTES]
    raise FdtError(f"its memory reservations have no end, or are more than {RESERVATIONS_MAX}")


class _Parser:
    """Reads a structure block, forwards and once."""

    def __init__(self, read_at: ReadAt, start: int, end: int, strings: bytes, slack: int) -> None:
        self._read_at = read_at
        self._offset = start
        self._end = end
        self._strings = strings
        self._names: dict[int, str] = {}
        self._window, self._window_at = b"", start
        self._held = 0
        self._slack = slack

    def root(self) -> Node:
        """The root node, with all that is in the block."""
        above = Node("")  # what the root stands below
        stack = [above]
        for _ in range(self._slack * TOKENS_MAX):
            token = _U32.unpack(self._take(4))[0]
            if token == _BEGIN_NODE:
                node = self._node(stack)
                stack[-1].children[node.name] = node
                stack.append(node)
            elif token == _PROP and len(stack) > 1:
                self._add_property(stack[-1])
            elif token == _END_NODE and len(stack) > 1:
                stack.pop()
            elif token == _END and len(stack) == 1 and above.children:
                if self._offset != self._end:
                    raise FdtError("something follows its end")
                return above.children[""]
            elif token != _NOP:
                raise FdtError("its structure is broken")
        raise FdtError(f"it has more than {TOKENS_MAX} nodes and properties")

    def _node(self, stack: list[Node]) -> Node:
        name = self._text()
        if (not name) != (len(stack) == 1) or "/" in name:
            raise FdtError("a node has a name that it cannot have")
        if name in stack[-1].children:
            raise FdtError(f"two nodes are called {name!r}")
        if len(stack) > DEPTH_MAX:
            raise FdtError(f"nodes stand more than {DEPTH_MAX} deep")
        return Node(name)

    def _add_property(self, node: Node) -> None:
        length, name_offset = _PROPERTY.unpack(self._take(_PROPERTY.size))
        name = self._names.get(name_offset) or self._name(name_offset)
        if node.children:
            raise FdtError(f"the property {name!r} stands behind a node")
        if name in node.properties:
            raise FdtError(f"two properties of a node are called {name!r}")
        value: Value = Span(self._offset, length)
        if length <= VALUE_MAX_BYTES:
            value = self._take(length)
            self._held += length
            if self._held > self._slack * VALUES_MAX_BYTES:
                raise FdtError(f"its short values take more than {VALUES_MAX_BYTES} bytes")
        else:
            self._skip(length)
        node.properties[name] = Property(name_offset, value, self._take(-length % 4))

    def _name(self, offset: int) -> str:
        name, end, _ = self._strings[offset : offset + NAME_MAX_BYTES + 1].partition(b"\0")
        if not name or not end:
            raise FdtError("a property has no name, or one that is too long")
        return self._names.setdefault(offset, name.decode("latin-1"))

    def _text(self) -> str:
        text, end, _ = self._peek(NAME_MAX_BYTES + 1).partition(b"\0")
        if not end:
            raise FdtError("the name of a node is too long, or cut off")
        self._skip(len(text) + 1 + -(len(text) + 1) % 4)
        return text.decode("latin-1")

    def _take(self, length: int) -> bytes:
        data = self._peek(length) if length else b""
        self._skip(length)
        return data

    def _skip(self, length: int) -> None:
        if length > self._end - self._offset:
            raise FdtError("its structure is cut off")
        self._offset += length

    def _peek(self, length: int) -> bytes:
        length = min(length, self._end - self._offset)
        start = self._offset - self._window_at
        if start + length > len(self._window):
            self._window_at, start = self._offset, 0
            self._window = self._read_at(self._offset, min(WINDOW_BYTES, self._end - self._offset))
        return self._window[start : start + length]
