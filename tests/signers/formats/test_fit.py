"""What a FIT's signatures are over, and what of a FIT is refused; hostile ones."""

import re
import struct
from contextlib import suppress

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from fit_images import make, write_dtb
from fit_rules import Blob, covered_nodes, hashed_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from signers.formats import fdt, fit
from signers.formats.fdt import FdtError
from signers.formats.fit import Algorithm, Fit, FitError, Stamp
from tokens.schemes import Ecdsa, Hash, RsaPkcs1v15, RsaPss

WORDS = [b"\0\0\0\1", b"\0\0\0\2", b"\xff" * 4, b"hash"]
STAMP = Stamp("a test", "1", 1_700_000_000)

HASH = 'hash-1 { algo = "sha256"; value = [00]; };'
SIGNATURE = 'signature-1 { algo = "sha256,rsa2048"; };'
LONG = f'x = "{"y" * 70_000}";'
MANY = ", ".join(['"a"'] * 60)
PIECES = " ".join(f"s{number} {{ a; }};" for number in range(90))
SIGNATURES = " ".join(f"signature-{number} {{ }};" for number in range(1100))
IMAGE = f"a {{ data = [01 02]; {HASH} }};"


def source(images=IMAGE, configurations=f'c {{ kernel = "a"; {SIGNATURE} }};', more=""):
    return f"/dts-v1/; / {{ {more} images {{ {images} }}; configurations {{ {configurations} }}; }};"


def fit_of(data):
    return Fit(fdt.parse(lambda offset, length: data[offset : offset + length], len(data)))


def written(found, data):
    parts = found.tree.encode()
    return b"".join(each if isinstance(each, bytes) else data[each.offset :][: each.length] for each in parts)


def signed(found):
    """All that is done to a FIT, without the keys."""
    for signature in found.signatures:
        found.stamp(signature, signature.algorithm, STAMP)
    return [found.signed(each) for each in found.signatures]


@pytest.fixture
def compiled(tmp_path):
    return lambda text: write_dtb(tmp_path / "fit.itb", text).read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make(tmp_path_factory.mktemp("fit"), algo="sha256,rsa2048", images=True, external="-E").read_bytes()


def test_what_is_signed_is_what_the_rules_hash(compiled):
    """Nodes in any order; nodes, hashes and properties besides; images that only odd properties name."""
    images = "".join(
        f"{name} {{ data = [01]; data-size = <1>; load = <1>; {HASH} sub {{ x; y {{ }}; }}; }};" for name in "abcdef"
    )
    other = 'o { description = "b"; compatible = "c"; };'
    configuration = (
        f'c {{ tee = "d"; x = <1>; kernel = "a"; fdt = "b", "f"; loadables = "a"; {SIGNATURE} z {{ w; }}; }};'
    )
    data = compiled(
        source(images, other + configuration, "p = <1>; before { x { }; };").replace(
            "configurations", "zz { }; configurations"
        )
    )
    found = fit_of(data)
    signature = found.signatures[0]
    found.stamp(signature, signature.algorithm, STAMP)
    paths = [path for path, _ in found.signed_nodes(signature)]
    assert paths[:4] == ["/", "/configurations/c", "/images/a", "/images/a/hash-1"]
    blob = Blob(written(found, data))
    assert set(paths) == covered_nodes(blob, "/configurations/c")
    assert {f"/images/{name}" for name in "abdf"} < set(paths)
    *parts, strings = found.signed(signature)
    assert b"".join(parts) == hashed_bytes(blob, set(paths))
    assert strings == blob.data[blob.strings_at :][: len(strings)]
    assert signature.node.value("hashed-strings") == struct.pack(">2I", 0, len(strings))
    hashed = signature.node.value("hashed-nodes")
    assert hashed == "".join(f"{path}\0" for path in paths).encode()


def test_sign_images_sets_the_order_and_leaves_nothing_out(compiled):
    images = "".join(f"{name} {{ data = [01]; {HASH} }};" for name in "abc")
    sign = SIGNATURE.replace("};", 'sign-images = "loadables"; };')
    found = fit_of(compiled(source(images, f'c {{ kernel = "a"; fdt = "b"; loadables = "c"; {sign} }};')))
    paths = [path for path, _ in found.signed_nodes(found.signatures[0])]
    assert paths[2::2] == ["/images/c", "/images/a", "/images/b"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("/dts-v1/; / { };", "no /images"),
        (source("a { }; a@1 { };"), "differ only behind an @"),
        (source("@1 { };"), "differ only behind an @"),
        (source(f"a {{ {'b' * 100} {{ {'c' * 100} {{ }}; }}; }};"), "more than 200 bytes"),
        (source(f"a {{ data; {HASH.replace('sha256', 'sha3')} }};"), "is unknown"),
        (source(f"a {{ data; {HASH.replace('algo', 'other')} }};"), "is unknown"),
        (source("a { data; };"), "no hash binds"),
        (source(f"a {{ data; {HASH.replace('sha256', 'crc32')} }};"), "no hash binds"),
        (source(f"a {{ data; {HASH.replace('};', 'uboot-ignore = <1>; };')} }};"), "no hash binds"),
        (source(f"a {{ data; {HASH} cipher {{ }}; }};"), "is not yet"),
        (source(configurations=f"c {{ {SIGNATURE} }};"), "names no image"),
        (source(configurations=f'c {{ description = "a"; {SIGNATURE} }};'), "names no image"),
        (source(configurations=f'c {{ kernel = "b"; {SIGNATURE} }};'), "names the image 'b', which is not"),
        (source(configurations=f"c {{ kernel = <1>; {SIGNATURE} }};"), "no list of names"),
        (source(configurations=f'c {{ kernel = "a"; {SIGNATURE.replace("algo", "x")} }};'), "no algo"),
        (source(configurations='c { kernel = "a"; signature { algo = <1>; }; };'), "no text"),
        (source(configurations=f'c {{ kernel = "a"; {SIGNATURE.replace("};", "sign-images; };")} }};'), "no list"),
        (source(configurations=f"c {{ kernel = {MANY}; {SIGNATURE} }};"), "names more than U-Boot"),
        (source(configurations=f'c {{ kernel = "a"; {LONG} {SIGNATURE} }};'), "has more than 65536 bytes"),
        (source(more=LONG), "over more than 65536 bytes"),
        (source(f"a {{ data; {HASH} {PIECES} }};"), "more pieces"),
        (source(configurations=f"c {{ {SIGNATURES} }};"), "too many"),
    ],
)  # fmt: skip
def test_each_fault(compiled, text, fault):
    with pytest.raises(FitError, match=re.escape(fault)):
        signed(fit_of(compiled(text)))


@pytest.mark.parametrize(
    ("properties", "fault"),
    [
        ("", "none of data"),
        ("data; data-offset = <0>; data-size = <1>;", "or several"),
        ("data-offset = <0>; data-position = <0>; data-size = <1>;", "or several"),
        ("data-offset = <0>;", "missing, or no number"),
        ("data-offset = [00]; data-size = <1>;", "missing, or no number"),
        ("data-offset = <90>; data-size = <20>;", "cut off"),
        ("data-offset = <0xffffffff>; data-size = <1>;", "cut off"),
        ("data-position = <0xffffffff>; data-size = <0xffffffff>;", "cut off"),
        ("data-position = <0>; data-size = <1>;", "own place"),
    ],
)
def test_each_fault_of_data(compiled, properties, fault):
    data = compiled(source(f"a {{ {properties} {HASH} }};"))
    data += bytes(-len(data) % 4 + 100)
    found = fit_of(data)
    with pytest.raises(FitError, match=fault):
        found.check_data(len(data))


def test_shared_data_is_not_hashed_again_and_again(compiled):
    images = "".join(f"a{n} {{ data-offset = <0>; data-size = <900>; {HASH} }};" for n in range(20))
    data = compiled(source(images))
    data += bytes(-len(data) % 4 + 900)
    found = fit_of(data)
    with pytest.raises(FitError, match="share"):
        found.check_data(len(data))


def test_data_that_would_be_moved_too_far(compiled):
    found = fit_of(compiled(source(f"a {{ data-position = <0x1000>; data-size = <0x7fffffff>; {HASH} }};")))
    with pytest.raises(FitError, match="2 GiB"):
        found.move_data(0x2000)


def test_algorithms(pairs):
    assert Algorithm("sha512,rsa4096").scheme == RsaPkcs1v15(Hash.SHA512)
    assert Algorithm("sha256,rsa2048", "pkcs-1.5").scheme == RsaPkcs1v15(Hash.SHA256)
    assert Algorithm("sha384,rsa3072", "pss").scheme == RsaPss(Hash.SHA384, 48)
    assert Algorithm("sha384,ecdsa384").scheme == Ecdsa(Hash.SHA384)
    assert [Algorithm(f"sha256,{name}").signature_size for name in ("rsa3072", "ecdsa256", "ecdsa384")] == [384, 64, 96]
    for name, padding in (
        ("sha1,rsa2048", None),
        ("sha256,rsa1024", None),
        ("sha256", None),
        ("sha256,rsa2048", "oaep"),
    ):
        with pytest.raises(FitError):
            _ = Algorithm(name, padding).scheme
    suits = {name: [kind for kind, pair in pairs.items() if Algorithm(f"sha256,{name}").suits(pair.key.public_key)]
             for name in ("rsa2048", "rsa3072", "rsa4096", "ecdsa256", "ecdsa384")}  # fmt: skip
    assert suits == {
        "rsa2048": ["rsa2048"],
        "rsa3072": ["rsa3072"],
        "rsa4096": [],
        "ecdsa256": ["p256"],
        "ecdsa384": ["p384"],
    }


def test_keys_of_a_tree(tmp_path):
    data = write_dtb(
        tmp_path / "a.dtb", "/dts-v1/; / { signature { key-a { }; other { }; key-b { }; }; };"
    ).read_bytes()
    tree = fdt.parse(lambda offset, length: data[offset : offset + length], len(data))
    assert fit.key_names(tree) == ["a", "b"]
    # a coordinate with a leading zero keeps its length
    numbers = ec.derive_private_key(379, ec.SECP256R1()).public_key()
    fit.add_key(tree, "c", numbers, Algorithm("sha256,ecdsa256"), None)
    assert len(tree.root.children["signature"].children["c"].value("ecdsa,x-point")) == 32


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=4, max_size=4) | st.sampled_from(WORDS)), max_size=4))
def test_a_damaged_fit_ends_in_a_signed_one_or_the_own_error(small, damages):
    damaged = bytearray(small)
    for place, damage in damages:
        at = int(place * int.from_bytes(small[4:8], "big"))
        damaged[at : at + 4] = damage
    damaged = bytes(damaged)
    with suppress(FdtError, FitError):
        found = fit_of(damaged)
        found.check_data(len(damaged))
        for image in found.images:
            for node, _ in found.hashes(image):
                found.tree.set(node, "value", bytes(32))
        before = signed(found)
        again = fit_of(written(found, damaged))
        assert [len(parts) for parts in before] == [len(again.signed(each)) for each in again.signatures]
