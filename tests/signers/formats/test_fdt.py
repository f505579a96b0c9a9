"""Device trees: dtc's and Debian's, changed as fdtput changes them, and hostile ones."""

import struct
import subprocess
from contextlib import suppress

import pytest
from fit_images import shown, write_dtb
from hypothesis import given, settings
from hypothesis import strategies as st

from signers.formats import fdt
from signers.formats.fdt import FdtError, Span
from tests.conftest import ROOT

SOURCE = """/dts-v1/; /memreserve/ 0x1000 0x2000; / {
    compatible = "demo"; #address-cells = <1>; empty;
    a { b = <1 2>; long-name = "x"; c { d = [01 02 03]; }; };
    e@1 { };
};"""
REAL = ("firefly-rk3399/rk3399-firefly.dtb", "rock64-rk3328/rk3328-rock64.dtb")


def parse(data):
    return fdt.parse(lambda offset, length: data[offset : offset + length], len(data))


def written(tree, data, **options):
    parts = tree.encode(**options)
    return b"".join(each if isinstance(each, bytes) else data[each.offset :][: each.length] for each in parts)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_dtb(tmp_path_factory.mktemp("fdt") / "small.dtb", SOURCE).read_bytes()


@pytest.mark.parametrize("name", REAL)
def test_a_real_tree_is_written_as_it_was(name):
    data = (ROOT / ".cache/u-boot" / name).read_bytes()
    tree = parse(data)
    assert tree.total_size == len(data)
    assert written(tree, data, size_min=len(data)) == data


def test_a_tree_in_its_parts(small):
    tree = parse(small)
    assert written(tree, small, align=1) == small
    assert [path for path, _ in tree.root.walk()] == ["", "/a", "/a/c", "/e@1"]
    assert tree.root.value("compatible") == b"demo\0"
    assert tree.root.value("empty") == b""
    assert tree.root.value("none") is None
    assert tree.root.children["a"].children["c"].value("d") == b"\1\2\3"
    assert tree.reservations == struct.pack(">4Q", 0x1000, 0x2000, 0, 0)


def test_changes_are_where_fdtput_makes_them(small, tmp_path):
    theirs, ours = tmp_path / "theirs.dtb", tmp_path / "ours.dtb"
    theirs.write_bytes(small)
    tree = parse(small)
    for path, name, value in (
        ("/a", "new", "1"), ("/a", "b", "a longer value"), ("/", "g-name", "2"), ("/added", "b", "3"),
        ("/a", "zz", "4"), ("/a/below", "new", "5"), ("/a/c", "d", "6"),
    ):  # fmt: skip
        subprocess.run(["fdtput", "-p", "-t", "s", theirs, path, name, value], check=True)
        node = tree.root
        for each in path.strip("/").split("/") if path != "/" else ():
            node = tree.add(node, each)
        tree.set(node, name, value.encode() + b"\0")
    ours.write_bytes(written(tree, small))
    assert shown(ours) == shown(theirs)
    assert parse(theirs.read_bytes()).strings == tree.strings  # "g-name" is the end of "long-name"


def test_a_long_value_stays_in_the_file(tmp_path):
    content = bytes(range(256)) * 32
    (tmp_path / "content").write_bytes(content)
    source = f'/dts-v1/; / {{ a = <1>; data = /incbin/("{tmp_path}/content"); b {{ c; }}; }};'
    data = write_dtb(tmp_path / "long.dtb", source).read_bytes()
    tree = parse(data)
    value = tree.root.value("data")
    assert value == Span(data.index(content), len(content))
    tree.set(tree.root, "before", bytes(100))
    again = written(tree, data, size_min=20_000)
    assert len(again) == 20_000
    found = parse(again).root.value("data")
    assert again[found.offset :][: found.length] == content


def words(*values):
    return b"".join(value if isinstance(value, bytes) else struct.pack(">I", value) for value in values)


def tree_of(block, names=b"a\0", **header):
    """A tree with this structure block, whatever it is."""
    values = {"magic": 0xD00DFEED, "structure": 56, "strings": 56 + len(block), "reservations": 40}
    values |= {"version": 17, "compatible": 16, "boot": 0, "strings_size": len(names), "size": len(block)}
    values = {"total": 56 + len(block) + len(names), **values} | header
    order = ("magic", "total", "structure", "strings", "reservations", "version", "compatible", "boot")
    head = struct.pack(">10I", *(values[name] for name in (*order, "strings_size", "size")))
    return head + bytes(16) + block + names


ROOT_NODE = words(1, 0)
END = words(2, 9)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "no flattened device tree"),
        (bytes(100), "no flattened device tree"),
        (tree_of(words(ROOT_NODE, END), version=16), "version 16"),
        (tree_of(words(ROOT_NODE, END), total=10**9), "said to have"),
        (tree_of(words(ROOT_NODE, END), total=39), "said to have"),
        (tree_of(words(ROOT_NODE, END), strings_size=2**31), "names of its properties"),
        (tree_of(words(ROOT_NODE, END), structure=2**32 - 4), "structure stand"),
        (tree_of(words(ROOT_NODE, END), structure=58), "structure stand"),
        (tree_of(words(ROOT_NODE, END), strings=1000), "strings stand"),
        (tree_of(words(ROOT_NODE, END), reservations=44), "memory reservations stand"),
        (tree_of(words(ROOT_NODE, END), reservations=56), "memory reservations have no end"),
        (tree_of(words(9)), "broken"),
        (tree_of(words(2)), "broken"),
        (tree_of(words(3, 0, 0)), "broken"),
        (tree_of(words(7)), "broken"),
        (tree_of(words(ROOT_NODE, 9)), "broken"),
        (tree_of(words(ROOT_NODE, 2)), "cut off"),
        (tree_of(words(ROOT_NODE, END, 9)), "follows"),
        (tree_of(words(ROOT_NODE, 2, ROOT_NODE, END)), "two nodes"),
        (tree_of(words(1, b"r\0\0\0", END)), "cannot have"),
        (tree_of(words(ROOT_NODE, 1, 0, 2, END)), "cannot have"),
        (tree_of(words(ROOT_NODE, 1, b"a/b\0", 2, END)), "cannot have"),
        (tree_of(words(ROOT_NODE, 1, b"abcd" * 80)), "too long"),
        (tree_of(words(ROOT_NODE, *(1, b"n\0\0\0", 2) * 2, END)), "two nodes are called 'n'"),
        (tree_of(words(ROOT_NODE, *(3, 0, 0) * 2, END)), "two properties"),
        (tree_of(words(ROOT_NODE, 1, b"n\0\0\0", 2, 3, 0, 0, END)), "behind a node"),
        (tree_of(words(ROOT_NODE, 3, 0, 1, END)), "no name"),
        (tree_of(words(ROOT_NODE, 3, 0, 99, END)), "no name"),
        (tree_of(words(ROOT_NODE, 3, 0, 0, END), strings=56 + 24, strings_size=1), "no name"),
        (tree_of(words(ROOT_NODE, 3, 0xFFFF_FFFF, 0, END)), "cut off"),
        (tree_of(words(ROOT_NODE, 3, 100, 0, END)), "cut off"),
        (tree_of(words(ROOT_NODE, *(1, b"n\0\0\0") * 40)), "deep"),
        (tree_of(words(ROOT_NODE, 4) * 1 + words(4) * 200_000), "nodes and properties"),
    ],
)  # fmt: skip
def test_each_fault(data, fault):
    with pytest.raises(FdtError, match=fault):
        parse(data)


def test_values_are_bounded_in_sum():
    names = b"".join(b"%06d\0" % number for number in range(5000))
    properties = b"".join(words(3, 4096, 7 * number, bytes(4096)) for number in range(5000))
    with pytest.raises(FdtError, match="short values"):
        parse(tree_of(words(ROOT_NODE, properties, END), names))


def test_a_tree_that_grows_beyond_what_libfdt_can_count(small):
    tree = parse(small)
    tree.set(tree.root, "x", Span(0, 2**31))
    with pytest.raises(FdtError, match="would have"):
        tree.encode()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_tree_ends_in_a_tree_or_the_own_error(small, data):
    damaged = bytearray(small)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(damaged)))
        damaged[at : at + 4] = data.draw(st.binary(max_size=8) | st.sampled_from([words(n) for n in (1, 2, 3, 4, 9)]))
    del damaged[data.draw(st.integers(0, len(damaged)) | st.just(len(damaged))) :]
    damaged = bytes(damaged)
    with suppress(FdtError):
        again = written(parse(damaged), damaged)
        assert written(parse(again), again) == again


@given(st.binary(max_size=300))
def test_any_structure_ends_in_a_tree_or_the_own_error(data):
    for each in (data, tree_of(data), tree_of(ROOT_NODE + data)):
        with suppress(FdtError):
            parse(each)
