import base64
import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signers.formats import mender, tar
from signers.formats.mender import MenderError

SUM = "0123456789abcdef" * 4


def member(name: bytes, size: int = 5, kind: bytes = tar.REGULAR) -> tar.Member:
    return tar.Member(name, kind, b"", size, 0, tar.BLOCK_BYTES)


def laid_out(*names: str) -> mender.Layout:
    return mender.layout(member(name.encode()) for name in names)


@pytest.mark.parametrize(
    ("names", "suffixes", "numbers"),
    [
        (["version", "manifest", "header.tar"], [b""], []),
        (["version", "manifest", "manifest.sig", "header.tar.gz", "data/0000.tar.gz"], [b".gz", b".gz"], [b"0000"]),
        (["version", "manifest", "header.tar.xz", "data/0000.tar", "data/0001.tar.zst"],
         [b".xz", b"", b".zst"], [b"0000", b"0001"]),
        (["version", "manifest", "manifest.sig", "manifest-augment", "header.tar", "header-augment.tar",
          "data/0000.tar"], [b"", b""], [b"0000"]),
    ],
)  # fmt: skip
def test_the_orders_that_readers_take(names: list[str], suffixes: list[bytes], numbers: list[bytes]) -> None:
    layout = laid_out(*names)
    assert [each.suffix for each in (layout.header, *layout.payloads)] == suffixes
    assert [each.number for each in layout.payloads] == numbers
    assert (layout.signature is not None) == ("manifest.sig" in names)
    assert (layout.augment is None) == (layout.header_augment is None) == ("manifest-augment" not in names)


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        ([], "it ends where version was expected"),
        (["manifest", "version", "header.tar"], "'manifest' where version"),
        (["./version", "manifest", "header.tar"], "'./version' where version"),
        (["version", "manifest.sig", "manifest", "header.tar"], "'manifest.sig' where manifest"),
        (["version", "manifest"], "it ends where header.tar"),
        (["version", "manifest", "header.tar.bz2"], "'header.tar.bz2' where"),
        (["version", "manifest", "manifest.sig", "manifest.sig", "header.tar"], "'manifest.sig' where header"),
        (["version", "manifest", "manifest-augment", "header.tar"], "it ends where header-augment"),
        (["version", "manifest", "manifest-augment", "header.tar", "header-augment.tar.gz"], "compressed otherwise"),
        (["version", "manifest", "header.tar", "header-augment.tar"], "'header-augment.tar' where data"),
        (["version", "manifest", "header.tar", "data/0000.tar", "data/0000.tar.gz"], "'data/0000.tar.gz' where"),
        (["version", "manifest", "header.tar", "data/0000.tar", "manifest.sig"], "'manifest.sig' where data"),
        (["version", "manifest", "header.tar", "data/../0000.tar"], "where data"),
    ],
)
def test_other_orders_are_refused(names: list[str], fault: str) -> None:
    with pytest.raises(MenderError) as caught:
        laid_out(*names)
    assert fault in str(caught.value)


def test_what_is_read_in_memory_is_bounded() -> None:
    rest = [member(b"header.tar")]
    for first, second in (
        (member(b"version", mender.VERSION_MAX_BYTES + 1), member(b"manifest")),
        (member(b"version"), member(b"manifest", mender.MANIFEST_MAX_BYTES + 1)),
    ):
        with pytest.raises(MenderError, match="are allowed"):
            mender.layout([first, second, *rest])
    with pytest.raises(MenderError, match="are allowed"):
        mender.layout(
            [member(b"version"), member(b"manifest"), member(b"manifest.sig", mender.SIGNATURE_MAX_BYTES + 1), *rest]
        )
    with pytest.raises(MenderError, match="no regular file"):
        mender.layout([member(b"version"), member(b"manifest", 0, tar.SYMBOLIC_LINK), *rest])


def test_versions() -> None:
    assert [mender.version(b'{"format":"mender","version":%d}' % number) for number in (2, 3)] == [2, 3]
    for content in (
        b'{"format":"mender","version":1}', b'{"format":"mender","version":3.0}', b'{"format":"mender","version":true}',
        b'{"format":"Mender","version":3}', b'{"version":3}', b"[]", b"3", b"", b"\xff", b"[" * 1024,
    ):  # fmt: skip
        with pytest.raises(MenderError):
            mender.version(content)


def test_a_manifest() -> None:
    names = ["data/0000/a file.ext4", "data/0001/update", "header.tar.gz", "version", "data/0000/é"]
    content = "".join(f"{SUM}  {name}\n" for name in names).encode()
    assert mender.manifest(content) == {name.encode(): SUM for name in names}
    assert mender.manifest(b"") == {}


@pytest.mark.parametrize(
    "line",
    [
        f"{SUM}  version", f"{SUM} version\n", f"{SUM}   version\n", f"{SUM}  version \n", f"{SUM}  version\r\n",
        f" {SUM}  version\n", f"{SUM.upper()}  version\n", f"{SUM[1:]}  version\n", "\n", f"{SUM}  \n",
        f"{SUM}  data/0000/a  b\n", f"{SUM}  data/0000/ a\n", f"{SUM}  data/0000/a/b\n", f"{SUM}  data/0000/\n",
        f"{SUM}  data/00/a\n", f"{SUM}  data/0000/a\tb\n", f"{SUM}  data/0000/a\0b\n", f"{SUM}  ../version\n",
        f"{SUM}  manifest\n", f"{SUM}  version\n{SUM}  version\n",
    ],
)  # fmt: skip
def test_what_a_reader_would_spell_otherwise_is_refused(line: str) -> None:
    with pytest.raises(MenderError):
        mender.manifest(f"{SUM}  header.tar\n{line}".encode())


def test_what_is_not_signed_covers_payloads_only() -> None:
    sums = {b"version": SUM, b"header.tar": SUM, b"data/0000/a": SUM}
    added = f"{SUM}  header-augment.tar\n{SUM}  data/0000/b\n".encode()
    assert mender.augmented(sums, added, 3) == {**sums, b"header-augment.tar": SUM, b"data/0000/b": SUM}
    for content, version in (
        (added, 2), (f"{SUM}  header.tar.gz\n".encode(), 3), (f"{SUM}  version\n".encode(), 3),
        (f"{SUM}  data/0000/a\n".encode(), 3),
    ):  # fmt: skip
        with pytest.raises(MenderError):
            mender.augmented(sums, content, version)


def test_signatures() -> None:
    signature = bytes(range(256))
    encoded = mender.encode_signature(signature)
    assert encoded == base64.b64encode(signature)
    assert mender.decode_signature(encoded) == signature
    assert mender.decode_signature(encoded[:76] + b"\r\n" + encoded[76:] + b"\n") == signature
    for content in (encoded[:-1], b" " + encoded, encoded + b"=", b"\xff"):
        with pytest.raises(MenderError):
            mender.decode_signature(content)


@given(content=st.binary(max_size=300))
@settings(max_examples=200)
def test_anything_at_all_ends_in_an_error_of_ours(content: bytes) -> None:
    for read in (mender.version, mender.manifest, mender.decode_signature):
        with contextlib.suppress(MenderError):
            read(content)


@given(at=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 400))
@settings(max_examples=300)
def test_a_mutated_manifest_is_refused_or_says_what_it_spells(at: int, byte: int, cut: int) -> None:
    content = bytearray("".join(f"{SUM}  {name}\n" for name in ("data/0000/a b", "header.tar", "version")).encode())
    content[at % len(content)] = byte
    del content[len(content) - cut % 3 :]
    try:
        sums = mender.manifest(bytes(content))
    except MenderError:
        return
    assert b"".join(f"{value}  ".encode() + name + b"\n" for name, value in sums.items()) == content


@given(names=st.lists(st.sampled_from(
    ["version", "manifest", "manifest.sig", "manifest-augment", "header.tar", "header.tar.gz", "header-augment.tar",
     "data/0000.tar", "data/0001.tar.gz", "data/0000.tar.xz", "x", ""]), max_size=8))  # fmt: skip
def test_any_order_is_read_or_refused(names: list[str]) -> None:
    try:
        layout = laid_out(*names)
    except MenderError:
        return
    assert names[:2] == ["version", "manifest"]
    assert len(names) == sum(
        each is not None
        for each in (layout.version, layout.manifest, layout.signature, layout.augment, layout.header,
                     layout.header_augment, *layout.payloads)
    )  # fmt: skip


@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_a_version_of_any_type(value: object) -> None:
    content = json.dumps({"format": "mender", "version": value}).encode()
    if type(value) is int and value in (2, 3):
        assert mender.version(content) == value
    else:
        with pytest.raises(MenderError):
            mender.version(content)
