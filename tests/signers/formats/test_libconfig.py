import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signers.formats.libconfig import DEPTH_MAX, LibconfigError, parse

EXAMPLE = b"""
# a description, as in SWUpdate's documentation
software =
{
    version = "0.1.0";      // one kind of comment
    description: "Firmware" " update"
                 " for \\"board\\"\\n\\x41\\q";
    hardware-compatibility: [ "1.0", "1.2", ];
    /* and a third, of
       two lines */
    board = {
        images: (
            { filename = "rootfs.ext4"; compressed = "zlib"; size = 0x1Fl, }
            ,
            { filename = "uboot"; offset = -3L; installed-directly = TRUE; ratio = .5 }
        );
    };
    empty = ();
    big = 9223372036854775807LL;
    small = 1.5e-3
};
""".replace(b"0x1Fl", b"0x1FL")


def test_example():
    assert parse(EXAMPLE) == {
        "software": {
            "version": "0.1.0",
            "description": 'Firmware update for "board"\nA\\q',
            "hardware-compatibility": ["1.0", "1.2"],
            "board": {
                "images": [
                    {"filename": "rootfs.ext4", "compressed": "zlib", "size": 31},
                    {"filename": "uboot", "offset": -3, "installed-directly": True, "ratio": 0.5},
                ]
            },
            "empty": [],
            "big": 2**63 - 1,
            "small": 0.0015,
        }
    }


@pytest.mark.parametrize(
    ("text", "settings_"),
    [
        (b"", {}),
        (b"# nothing", {}),
        (b"a=1 b=2", {"a": 1, "b": 2}),
        (b"a=1;b:2,", {"a": 1, "b": 2}),
        (b'a="two\nlines"', {"a": "two\nlines"}),
        (b'a="\xc3\xa9\\xc3\\xa9"', {"a": "\u00e9\u00e9"}),
        (b'a="# no // comment /* here"', {"a": "# no // comment /* here"}),
        (b"a=007", {"a": 7}),
        (b"a=(true,(1,[2]),{b=3})", {"a": [True, [1, [2]], {"b": 3}]}),
        (b"*a-b_c=0xFFFFFFFFFFFFFFFF", {"*a-b_c": 2**64 - 1}),
    ],
)
def test_accepted(text, settings_):
    assert parse(text) == settings_


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (b'a=1\n@include "/etc/passwd"', 2, "@include"),
        (b'a="x', 1, "string does not end"),
        (b"a=1;\na=2", 2, "set twice"),
        (b"a", 1, "expected"),
        (b"a=\n\n", 3, "a value"),
        (b"a=;", 1, "a value"),
        (b"a={\nb=1", 1, "not closed"),
        (b"a=(1 2)", 1, "not closed"),
        (b"a=(1]", 1, "not closed"),
        (b"a=[(1)]", 1, "array"),
        (b"a=1}", 1, "name"),
        (b'{"a": 1}', 1, "name"),
        (b"a=.", 1, "number"),
        (b"a=9223372036854775808", 1, "64 bits"),
        (b"a=" + b"9" * 5000, 1, "64 bits"),
        (b'a="\\x00"', 1, "NUL"),
        (b'a="\xff"', 1, "UTF-8"),
        (b"\xef\xbb\xbfa=1", 1, "does not belong"),
        (b"a=1 /* b", 1, "does not belong"),
        (b"a=\x001", 1, "does not belong"),
    ],
)
def test_refused(text, line, words):
    with pytest.raises(LibconfigError, match=words) as caught:
        parse(text)
    assert caught.value.line == line


@pytest.mark.parametrize(("opening", "closing"), [(b"(", b")"), (b"{a=", b"}")])
def test_depth(opening, closing):
    parse(b"a=" + opening * DEPTH_MAX + b"1" + closing * DEPTH_MAX)
    with pytest.raises(LibconfigError, match="deep"):
        parse(b"a=" + opening * (DEPTH_MAX + 1) + b"1" + closing * (DEPTH_MAX + 1))
    with pytest.raises(LibconfigError, match="deep"):
        parse(b"a=" + opening * 300_000)


names = st.from_regex(rb"\A[A-Za-z*][-A-Za-z0-9_*]{0,8}\Z").filter(lambda name: name.lower() not in (b"true", b"false"))
scalars = (
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(st.characters(codec="utf-8", exclude_characters="\0"))
)


def groups(values):
    return st.dictionaries(names.map(bytes.decode), values, max_size=4)


values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | groups(inner), max_leaves=20)


def written(value) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case str():
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        case list():
            return "(" + ", ".join(map(written, value)) + ")"
        case dict():
            return "{" + settings_of(value) + "}"


def settings_of(group) -> str:
    return "".join(f"{name} = {written(value)};\n" for name, value in group.items())


@given(groups(values))
def test_what_is_written_comes_back(settings_):
    assert parse(settings_of(settings_).encode()) == settings_


marks = rb"""a b = : ; , { } ( ) [ ] 1 0x - . e3 L " "x" \ /* */ // # @include true""".split()
fragments = st.sampled_from([*marks, b"\n", b" ", b"\0", b"\xff"])


@settings(max_examples=500)
@given(st.lists(fragments | st.binary(max_size=4), max_size=60).map(b"".join))
def test_any_bytes_end_in_settings_or_the_own_error(text):
    try:
        assert isinstance(parse(text), dict)
    except LibconfigError as error:
        line = error.line
    else:
        return
    assert 1 <= line <= text.count(b"\n") + 1


@settings(max_examples=300)
@given(st.integers(0, len(EXAMPLE)), st.integers(0, 40), fragments | st.binary(max_size=8))
def test_a_damaged_description_ends_in_settings_or_the_own_error(at, cut, insertion):
    try:
        parse(EXAMPLE[:at] + insertion + EXAMPLE[at + cut :])
    except LibconfigError:
        return
