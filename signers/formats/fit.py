"""U-Boot's FIT images: what of them is hashed and signed, and where hashes, signatures and keys stand.

A FIT is a device tree with nodes for images, whose hashes stand below them, and for configurations, which name images.
The signature of a configuration is over parts of the tree, hashes included; that of an image is over its data.

Sources, of U-Boot 2026.10-rc2: doc/usage/fit/signature.rst, tools/image-host.c (mkimage, which writes), and
boot/image-fit-sig.c and boot/fdt_region.c (the verifier). Up to 2025 the verifier took the list of nodes from
`hashed-nodes`; since then it works it out itself, from all that the configuration names: that is what is signed here,
whatever `sign-images` says, and `hashed-nodes` is the same list.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from signers.formats.fdt import END, END_NODE, Node, Span, Tree, Value, value_size
from tokens.schemes import Ecdsa, Hash, RsaPkcs1v15, RsaPss

NODES_MAX = 100
"""The most nodes that U-Boot hashes for a signature (IMAGE_MAX_HASHED_NODES)."""

NODE_LIST_MAX_BYTES = 4096
"""The most that their paths may take (FIT_MAX_HASH_PATH_BUF)."""

PATH_MAX_BYTES = 200
"""The buffer for the path of any node (fit_config_check_sig)."""

SIGNATURES_MAX = 1024
"""The most signature nodes; a FIT with so many configurations has one for each."""

WORK_MAX = 8_000_000
"""The most signature nodes times nodes: for each signature all nodes are looked at."""

SIGNED_MAX_BYTES = 64 * 1024
"""The most that the signature of a configuration may be over: 100 nodes, as they are usual, take 20 KiB."""

HASHES = ("sha512", "sha384", "sha256", "sha1", "md5", "crc32")
"""The `algo` of a hash node."""

BINDING = frozenset({"sha512", "sha384", "sha256", "sha1"})
"""The hashes that bind an image to the signature of a configuration."""

# What the verifier leaves out of the hash: exc_prop in fit_config_check_sig
_UNHASHED = frozenset({"data", "data-size", "data-position", "data-offset"})

# What a configuration has that names no image, to the verifier (fit_config_get_signed_nodes)
_NOT_IMAGES = frozenset({"description", "compatible", "default"})

# What must name images wherever it stands: fit_import_data in tools/fit_image.c
_IMAGES = frozenset({"kernel", "ramdisk", "fdt", "loadables", "fpga", "firmware", "script"})

# The order without `sign-images`: fit_config_get_image_list
_USUAL = ("kernel", "fdt", "script")

_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")

_RSA = {"rsa2048": 2048, "rsa3072": 3072, "rsa4096": 4096}
_CURVES = {"ecdsa256": ec.SECP256R1(), "ecdsa384": ec.SECP384R1()}
_OPENSSL_CURVES = {"secp256r1": "prime256v1", "secp384r1": "secp384r1"}

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


class FitError(ValueError):
    """The tree is no FIT that can be signed."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """How a signature is made: the `algo` of its node, as in "sha256,rsa2048", and its `padding`.

    The salt of PSS is as long as the digest, or the longest that there is room for.
    """

    name: str
    padding: str | None = None
    longest_salt: bool = False

    @property
    def scheme(self) -> RsaPkcs1v15 | RsaPss | Ecdsa:
        """Raises FitError where it is none that is made here."""
        hash_name, _, crypto = self.name.partition(",")
        if hash_name not in ("sha256", "sha384", "sha512") or crypto not in {**_RSA, **_CURVES}:
            raise FitError(f"its algo {self.name!r} is none that is made here")
        hash_ = Hash(hash_name)
        if crypto in _CURVES:
            return Ecdsa(hash_)
        if self.padding not in (None, "pkcs-1.5", "pss"):
            raise FitError(f"its padding {self.padding!r} is unknown")
        if self.padding != "pss":
            return RsaPkcs1v15(hash_)
        return RsaPss(hash_, _RSA[crypto] // 8 - hash_.size - 2 if self.longest_salt else hash_.size)

    def suits(self, public_key: object) -> bool:
        """Whether it is for keys of this type and size."""
        crypto = self.name.partition(",")[2]
        if isinstance(public_key, rsa.RSAPublicKey):
            return public_key.key_size == _RSA.get(crypto)
        curve = _CURVES.get(crypto)
        return isinstance(public_key, ec.EllipticCurvePublicKey) and curve is not None and (
            public_key.curve.name == curve.name
        )  # fmt: skip

    @property
    def signature_size(self) -> int:
        """Length of a signature in bytes; ECDSA's is r || s. Raises FitError as `scheme` does."""
        crypto = self.name.partition(",")[2]
        return 2 * _CURVES[crypto].key_size // 8 if isinstance(self.scheme, Ecdsa) else _RSA[crypto] // 8


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature node, and the image or configuration that it is below."""

    node: Node
    owner: Node
    of_image: bool

    @property
    def path(self) -> str:
        """Where it stands in the tree."""
        return f"/{'images' if self.of_image else 'configurations'}/{self.owner.name}/{self.node.name}"

    @property
    def algorithm(self) -> Algorithm:
        """Raises FitError where it has no `algo`."""
        name = text(self.node, "algo")
        if name is None:
            raise FitError(f"{self.path} has no algo")
        return Algorithm(name, text(self.node, "padding"))

    @property
    def key_name(self) -> str | None:
        """The name of the key that it asks for, its `key-name-hint`."""
        return text(self.node, "key-name-hint")


@dataclass(frozen=True, slots=True)
class Stamp:
    """What is written beside a signature: who made it, when (in seconds since 1970), and a comment."""

    signer: str
    version: str
    timestamp: int
    comment: str | None = None


class Fit:
    """A FIT.

    Raises FitError where it is none, or libfdt could take one node for another.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        _check_names(tree.root)
        images = tree.root.children.get("images")
        if images is None:
            raise FitError("it has no /images")
        configurations = tree.root.children.get("configurations", Node("configurations"))
        self.images = tuple(images.children.values())
        # libfdt finds "kernel@1" by "kernel", too (fdt_nodename_eq_)
        self._by_name = {name: each for each in self.images for name in (each.name, _base(each.name))}
        self.signatures = tuple(
            Signature(node, owner, parent is images)
            for parent in (images, configurations)
            for owner in parent.children.values()
            for node in owner.children.values()
            if node.name.startswith("signature")
        )
        if len(self.signatures) > SIGNATURES_MAX or len(self.signatures) * sum(1 for _ in tree.root.walk()) > WORK_MAX:
            raise FitError(f"it has {len(self.signatures)} signatures, which is too many")

    def data(self, image: Node) -> Value:
        """An image's data: in the tree, or a Span behind it. Raises FitError where it has none, or more than one."""
        inline, offset, position = (image.value(name) for name in ("data", "data-offset", "data-position"))
        if (inline, offset, position).count(None) != 2:
            raise FitError(f"the image {image.name!r} has none of data, data-offset and data-position, or several")
        if inline is not None:
            return inline
        size = _number(image, "data-size")
        if offset is None:
            return Span(_number(image, "data-position"), size)
        return Span(self.data_base + _number(image, "data-offset"), size)

    def check_data(self, size: int) -> None:
        """Raises FitError where data is not in the file of `size` bytes, in the tree's own place, or shared."""
        total = 0
        for image in self.images:
            data = self.data(image)
            total += value_size(data)
            if isinstance(data, Span) and image.value("data") is None:
                if data.offset + data.length > size:
                    raise FitError(f"the data of the image {image.name!r} is cut off")
                if data.offset < self.tree.total_size:
                    raise FitError(f"the data of the image {image.name!r} stands in the tree's own place")
        if total > size:
            raise FitError("images share their data")

    @property
    def data_base(self) -> int:
        """What a `data-offset` is counted from: the tree's end, at a multiple of 4 (fit_image_get_data)."""
        return self.tree.total_size + -self.tree.total_size % 4

    def hashes(self, image: Node) -> Iterator[tuple[Node, str]]:
        """The hash nodes of an image, with their algorithms."""
        for node in image.children.values():
            if node.name.startswith("hash"):
                algorithm = text(node, "algo")
                if algorithm not in HASHES:
                    raise FitError(f"/images/{image.name}/{node.name} has the algo {algorithm!r}, which is unknown")
                yield node, algorithm

    def signed_nodes(self, signature: Signature) -> list[tuple[str, Node]]:
        """The nodes that a configuration's signature covers, with their paths, in mkimage's order.

        Raises FitError where what the configuration names cannot be covered.
        """
        configuration = signature.owner
        if sum(value_size(each.value) for each in configuration.properties.values()) > SIGNED_MAX_BYTES:
            raise FitError(f"the configuration {configuration.name!r} has more than {SIGNED_MAX_BYTES} bytes")
        nodes = [("/", self.tree.root), (f"/configurations/{configuration.name}", configuration)]
        for name in _image_properties(signature):
            for image in self._named(configuration, name):
                nodes += self._image_nodes(image)
                if len(nodes) > NODES_MAX or len(_paths(nodes)) > NODE_LIST_MAX_BYTES:
                    raise FitError(f"the configuration {configuration.name!r} names more than U-Boot can verify")
        if len(nodes) == 2:
            raise FitError(f"the configuration {configuration.name!r} names no image")
        return nodes

    def _named(self, configuration: Node, property_name: str) -> Iterator[Node]:
        value = configuration.value(property_name)
        if isinstance(value, bytes) and value.endswith(b"\0"):
            for name in value[:-1].decode("latin-1").split("\0"):
                image = self._by_name.get(name)
                if image is not None:
                    yield image
                elif property_name in _IMAGES and name:
                    raise FitError(f"the configuration {configuration.name!r} names the image {name!r}, which is not")
        elif property_name in _IMAGES and value is not None:
            raise FitError(f"{property_name} of the configuration {configuration.name!r} is no list of names")

    def _image_nodes(self, image: Node) -> Iterator[tuple[str, Node]]:
        path = f"/images/{image.name}"
        yield path, image
        hashes = dict(self.hashes(image))
        if not any(algorithm in BINDING and node.value("uboot-ignore") is None for node, algorithm in hashes.items()):
            raise FitError(f"no hash binds the image {image.name!r} to a signature: it needs one of sha256 or longer")
        others = [node for name in ("cipher", "dm-verity") for node in _found(image, name)]
        for node in (*hashes, *others):
            yield f"{path}/{node.name}", node
        if image.value("data-size-unciphered") is None and any(_found(image, "cipher")):
            raise FitError(f"the image {image.name!r} is to be encrypted, and is not yet")

    def signed(self, signature: Signature) -> tuple[Value, ...]:
        """What a signature is over, by the verifier's rules. Raises FitError where it could not verify it."""
        if signature.of_image:
            return (self.data(signature.owner),)
        nodes = self.signed_nodes(signature)
        strings = signature.node.value("hashed-strings")
        if signature.node.value("hashed-nodes") != _paths(nodes) or not isinstance(strings, bytes) or len(strings) != 8:
            raise FitError(f"{signature.path} does not say what it is over")
        parts = (*_regions(self.tree.root, nodes), self.tree.strings[: _U32.unpack_from(strings, 4)[0]])
        if sum(map(value_size, parts)) > SIGNED_MAX_BYTES:
            raise FitError(f"{signature.path} would be over more than {SIGNED_MAX_BYTES} bytes")
        return parts

    def stamp(self, signature: Signature, algorithm: Algorithm, stamp: Stamp) -> None:
        """Writes all of a signature but its value, for which it makes room.

        The order of the properties is mkimage's, and so is that of their names among the strings
        (fit_image_write_sig).
        """
        node = signature.node
        strings_size = len(self.tree.strings)
        values: dict[str, bytes] = {
            "value": bytes(algorithm.signature_size),
            "signer-name": string(stamp.signer),
            "signer-version": string(stamp.version),
        }
        if stamp.comment is not None:
            values["comment"] = string(stamp.comment)
        values["timestamp"] = _U32.pack(stamp.timestamp)
        if not signature.of_image:
            values["hashed-nodes"] = _paths(self.signed_nodes(signature))
            values["hashed-strings"] = bytes(4) + _U32.pack(strings_size)
        if algorithm.name != text(node, "algo"):
            values["algo"] = string(algorithm.name)
        for name, value in values.items():
            self.tree.set(node, name, value)

    def move_data(self, position: int) -> list[Value]:
        """Moves the data of all images out of the tree, to stand from `position` in the file on; returns it.

        Each stands at a multiple of 4, a device tree of 8; what is between are zeros (fit_extract_data).
        """
        parts: list[Value] = []
        at = position
        for image in self.images:
            data = self.data(image)
            gap = -at % (8 if text(image, "type") == "flat_dt" else 4)
            for name in _UNHASHED:
                image.properties.pop(name, None)
            self.tree.set(image, "data-position", _U32.pack(at + gap))
            self.tree.set(image, "data-size", _U32.pack(value_size(data)))
            parts += (bytes(gap), data)
            at += gap + value_size(data)
            if at >= 2**31:
                raise FitError("its data would stand behind the first 2 GiB")
        parts.append(bytes(-at % 4))
        return parts


def key_names(tree: Tree) -> list[str]:
    """The names of the keys that U-Boot's own device tree holds (`/signature/key-NAME`)."""
    keys = tree.root.children.get("signature", Node("signature")).children
    return [name.removeprefix("key-") for name in keys if name.startswith("key-")]


def add_key(tree: Tree, name: str, public_key: PublicKey, algorithm: Algorithm, required: str | None) -> None:
    """Writes a public key into U-Boot's own device tree, as mkimage does, in place of one of that name.

    Arguments:
        required: "conf" or "image", where every FIT needs a signature of it; None: it may have one.
    """
    numbers = public_key.public_numbers()
    # rsa_add_verify_data, and do_add in lib/ecdsa/ecdsa-libcrypto.c
    rsa_key = isinstance(numbers, rsa.RSAPublicNumbers)
    node = tree.add(tree.add(tree.root, "signature"), f"key-{name}" if rsa_key else name)
    values = _rsa_values(numbers) if isinstance(numbers, rsa.RSAPublicNumbers) else _ecdsa_values(numbers)
    for each, value in {"key-name-hint": string(name), **values, "algo": string(algorithm.name)}.items():
        tree.set(node, each, value)
    if required is not None:
        tree.set(node, "required", string(required))


def _rsa_values(numbers: rsa.RSAPublicNumbers) -> Mapping[str, bytes]:
    """What spares the device divisions: -1/n mod 2^32, and R^2 mod n with R = 2^bits (rsa_get_params)."""
    n, bits = numbers.n, numbers.n.bit_length()
    return {
        "rsa,num-bits": _U32.pack(bits),
        "rsa,n0-inverse": _U32.pack(-pow(n, -1, 2**32) % 2**32),
        "rsa,exponent": _U64.pack(numbers.e),
        "rsa,modulus": n.to_bytes(bits // 8, "big"),
        "rsa,r-squared": pow(2, 2 * bits, n).to_bytes(bits // 8, "big"),
    }


def _ecdsa_values(numbers: ec.EllipticCurvePublicNumbers) -> Mapping[str, bytes]:
    size = numbers.curve.key_size // 8
    return {
        "ecdsa,curve": string(_OPENSSL_CURVES[numbers.curve.name]),
        "ecdsa,x-point": numbers.x.to_bytes(size, "big"),
        "ecdsa,y-point": numbers.y.to_bytes(size, "big"),
    }


def text(node: Node, name: str) -> str | None:
    """The text of a property; None where it has none. Raises FitError where it is no text."""
    value = node.value(name)
    if value is None:
        return None
    if not isinstance(value, bytes) or not value.endswith(b"\0"):
        raise FitError(f"{name} of {node.name!r} is no text")
    return value.partition(b"\0")[0].decode("latin-1")


def string(content: str) -> bytes:
    """Text as the value of a property."""
    return content.encode("utf-8") + b"\0"


def _number(node: Node, name: str) -> int:
    value = node.value(name)
    if not isinstance(value, bytes) or len(value) != _U32.size:
        raise FitError(f"{name} of {node.name!r} is missing, or no number")
    return int(_U32.unpack(value)[0])


def _base(name: str) -> str:
    return name.partition("@")[0]


def _found(node: Node, name: str) -> list[Node]:
    return [child for child in node.children.values() if _base(child.name) == name]


def _check_names(root: Node) -> None:
    """Nodes are told apart without what follows an `@`, and have paths that the verifier's buffer holds."""
    for path, node in root.walk():
        parent = path or "/"
        bases = [_base(name) for name in node.children]
        if len(set(bases)) < len(bases) or "" in bases:
            raise FitError(f"nodes below {parent!r} differ only behind an @")
        if any(len(parent) + 2 + len(name) >= PATH_MAX_BYTES for name in node.children):
            raise FitError(f"the path of a node below {parent!r} has more than {PATH_MAX_BYTES} bytes")


def _image_properties(signature: Signature) -> list[str]:
    """The properties of a configuration that may name images: those of `sign-images` first."""
    value = signature.node.value("sign-images")
    first = list(_USUAL)
    if value is not None:
        if not isinstance(value, bytes) or not value.endswith(b"\0"):
            raise FitError(f"sign-images of {signature.path} is no list of names")
        first = value[:-1].decode("latin-1").split("\0")
    return list(dict.fromkeys((*first, *(name for name in signature.owner.properties if name not in _NOT_IMAGES))))


def _paths(nodes: list[tuple[str, Node]]) -> bytes:
    """The value of `hashed-nodes`."""
    return b"".join(path.encode("latin-1") + b"\0" for path, _ in nodes)


def _regions(root: Node, nodes: list[tuple[str, Node]]) -> list[Value]:
    """The bytes that the verifier hashes for these nodes (fdt_find_regions).

    Of each node its properties and its own tokens; of the nodes right below, what begins and what ends them; and the
    end of the tree. Raises FitError where they are in more pieces than it counts.
    """
    regions = _Regions({node for _, node in nodes})
    regions.add_node(root, whole=True)
    regions.add(END)
    if regions.count >= 19 + 7 * len(nodes):  # max_regions - 1 in fit_config_check_sig
        raise FitError("its signatures would be over more pieces than U-Boot can verify")
    return regions.parts


class _Regions:
    """What is hashed, and of how many pieces of the tree it is."""

    def __init__(self, included: set[Node]) -> None:
        self.parts: list[Value] = []
        self.count = 0
        self._included = included
        self._apart = True

    def add(self, *parts: Value) -> None:
        self.count += self._apart
        self._apart = False
        self.parts += parts

    def add_node(self, node: Node, *, whole: bool) -> None:
        self.add(node.begin())
        if not whole:  # without looking at each: there may be many, and this is done for each signature
            self._apart = self._apart or bool(node.properties)
        for name, each in node.properties.items() if whole else ():
            if name not in _UNHASHED:
                self.add(*each.parts())
            else:
                self._apart = True
        for child in node.children.values():
            if whole or child in self._included:
                self.add_node(child, whole=child in self._included)
            else:
                self._apart = True
        self.add(END_NODE)
