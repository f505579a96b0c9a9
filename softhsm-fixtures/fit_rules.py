"""How U-Boot verifies a FIT, written from its rules and not from the signer's code: for the tests and the demo.

    python softhsm-fixtures/fit_rules.py FIT DTB

Sources, of U-Boot 2026.10-rc2: boot/image-fit-sig.c (which nodes a signature covers: worked out from what the
configuration names, not taken from `hashed-nodes`), boot/fdt_region.c (which bytes those are), boot/image-fit.c (where
data is, and that every hash of a loaded image must hold), lib/rsa/rsa-verify.c and lib/ecdsa/ecdsa-libcrypto.c.
"""

import binascii
import hashlib
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

HASHES = {"sha256": hashes.SHA256(), "sha384": hashes.SHA384(), "sha512": hashes.SHA512()}
CURVES = {"prime256v1": ec.SECP256R1(), "secp384r1": ec.SECP384R1()}
NOT_HASHED = ("data", "data-size", "data-position", "data-offset")
NOT_IMAGES = ("description", "compatible", "default")


class Refused(Exception):
    """The device would not boot it."""


@dataclass
class Token:
    """A piece of the structure block: `at` and `end` are offsets in the file."""

    kind: str
    at: int
    end: int
    path: str
    name: str = ""


@dataclass
class Blob:
    """A device tree in its bytes, by the paths of its nodes."""

    data: bytes
    tokens: list[Token] = field(default_factory=list)
    nodes: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        words = struct.unpack_from(">10I", self.data)
        _, self.total_size, structure_at, self.strings_at, _, _, _, _, self.strings_size, size = words
        if words[0] != 0xD00DFEED or self.total_size > len(self.data) or self.data[structure_at + size - 4 :][3] != 9:
            raise Refused("no device tree")
        self.tokens = list(self._read(structure_at, structure_at + size))

    def _read(self, at: int, stop: int) -> Iterator[Token]:
        path: list[str] = []
        while at < stop:
            start, kind = at, struct.unpack_from(">I", self.data, at)[0]
            at += 4
            if kind == 1:
                end = self.data.index(b"\0", at)
                name = self.data[at:end].decode()
                at = end + 4 - end % 4
                path.append(name)
                where = "/".join(path) or "/"
                if where in self.nodes or len(where) > 200:
                    raise Refused(f"a node that cannot be told apart: {where}")
                self.nodes[where] = {}
                yield Token("begin", start, at, where, name)
            elif kind == 2:
                yield Token("end", start, at, "/".join(path) or "/")
                path.pop()
            elif kind == 3:
                length, name_at = struct.unpack_from(">2I", self.data, at)
                name_at += self.strings_at
                name = self.data[name_at : self.data.index(b"\0", name_at)].decode()
                self.nodes["/".join(path) or "/"].setdefault(name, self.data[at + 8 : at + 8 + length])
                at += 8 + length + -length % 4
                yield Token("property", start, at, "/".join(path) or "/", name)
            elif kind == 9:
                yield Token("stop", start, at, "")
                if at != stop:
                    raise Refused("something follows the end of the tree")
            elif kind != 4:
                raise Refused("a broken tree")

    def below(self, path: str) -> list[str]:
        """The paths of the nodes right below."""
        return [each for each in self.nodes if each.startswith(path + "/") and "/" not in each[len(path) + 1 :]]

    def text(self, path: str, name: str) -> str:
        return self.nodes[path].get(name, b"").split(b"\0")[0].decode()

    def number(self, path: str, name: str) -> int:
        return int.from_bytes(self.nodes[path][name], "big")


def verify(fit: bytes, dtb: bytes) -> int:
    """Verifies every configuration as if the device booted it; returns how many there are.

    Each needs a signature of every key that the dtb marks as required, and where it marks none, of every key there is.
    """
    image, control = Blob(fit), Blob(dtb)
    keys = control.below("/signature")
    required = [key for key in keys if "required" in control.nodes[key]] or keys
    configurations = image.below("/configurations")
    if not keys or not configurations or any("@" in path for path in image.nodes):
        raise Refused("no key, no configuration, or nodes that libfdt may mistake for others")
    for configuration in configurations:
        covered = covered_nodes(image, configuration)
        for key in required:
            if control.text(key, "required") != "image":
                check_any(image, configuration, control, key, covered)
        for node in (each for each in covered if each.count("/") == 2 and each.startswith("/images/")):
            check_image(image, node)
            for key in (each for each in required if control.text(each, "required") == "image"):
                check_any(image, node, control, key, None)
    return len(configurations)


def covered_nodes(image: Blob, configuration: str) -> set[str]:
    """What the signature of a configuration must cover."""
    covered = {"/", configuration}
    for name, value in image.nodes[configuration].items():
        if name in NOT_IMAGES or not value.endswith(b"\0"):
            continue
        for named in value[:-1].split(b"\0"):
            node = f"/images/{named.decode('latin-1')}"
            if node not in image.nodes:
                continue
            below = image.below(node)
            hash_nodes = [each for each in below if each.removeprefix(f"{node}/").startswith("hash")]
            if not hash_nodes:
                raise Refused(f"{node} has no hash")
            covered |= {node, *hash_nodes}
            covered |= {each for each in (f"{node}/cipher", f"{node}/dm-verity") if each in below}
    if not any(node.startswith("/images/") for node in covered):
        raise Refused(f"{configuration} names no image")
    return covered


def hashed_bytes(image: Blob, covered: set[str]) -> bytes:
    """Of covered nodes the properties; of those and the nodes right below them what begins and ends them."""
    found = []
    for token in image.tokens:
        parent = token.path.rpartition("/")[0] or "/"
        whole = token.path in covered
        if token.kind == "property":
            taken = whole and token.name not in NOT_HASHED
        else:
            taken = token.kind == "stop" or whole or parent in covered
        if taken:
            found.append(image.data[token.at : token.end])
    return b"".join(found)


def check_any(image: Blob, owner: str, control: Blob, key: str, covered: set[str] | None) -> None:
    """One of the owner's signatures must be the key's."""
    signatures = [each for each in image.below(owner) if each.removeprefix(f"{owner}/").startswith("signature")]
    for signature in signatures:
        if covered is None:
            content = image_data(image, owner)
        else:
            size = int.from_bytes(image.nodes[signature].get("hashed-strings", bytes(8))[4:], "big")
            content = hashed_bytes(image, covered) + image.data[image.strings_at :][:size]
        if "value" in image.nodes[signature] and is_signed(image, signature, control, key, content):
            return
    raise Refused(f"{owner} has no signature of {key}")


def is_signed(image: Blob, signature: str, control: Blob, key: str, content: bytes) -> bool:
    """By the key's numbers as they stand in the dtb."""
    algorithm, value = image.text(signature, "algo"), image.nodes[signature]["value"]
    hash_ = HASHES[algorithm.partition(",")[0]]
    try:
        if algorithm.partition(",")[2].startswith("rsa"):
            if control.text(key, "algo") != algorithm:
                return False
            modulus = control.number(key, "rsa,modulus")
            check_help(control, key, modulus)
            public = rsa.RSAPublicNumbers(control.number(key, "rsa,exponent"), modulus).public_key()
            pss = padding.PSS(padding.MGF1(hash_), padding.PSS.AUTO)
            public.verify(
                value, content, pss if image.text(signature, "padding") == "pss" else padding.PKCS1v15(), hash_
            )
        else:
            curve = CURVES[control.text(key, "ecdsa,curve")]
            point = control.number(key, "ecdsa,x-point"), control.number(key, "ecdsa,y-point")
            half = curve.key_size // 8
            if len(value) != 2 * half:
                return False
            der = encode_dss_signature(int.from_bytes(value[:half], "big"), int.from_bytes(value[half:], "big"))
            ec.EllipticCurvePublicNumbers(*point, curve).public_key().verify(der, content, ec.ECDSA(hash_))
    except (InvalidSignature, KeyError):
        return False
    return True


def check_help(control: Blob, key: str, modulus: int) -> None:
    """What the dtb holds so that the device need not divide (lib/rsa/rsa-mod-exp.c)."""
    bits = control.number(key, "rsa,num-bits")
    inverse, square = control.number(key, "rsa,n0-inverse"), control.number(key, "rsa,r-squared")
    if modulus.bit_length() != bits or (inverse * modulus + 1) % 2**32 or square != pow(2, 2 * bits, modulus):
        raise Refused(f"{key} is wrong")


def image_data(image: Blob, node: str) -> bytes:
    """In the tree, at a place in the file, or counted from the tree's end."""
    values = image.nodes[node]
    if "data-position" in values:
        start = image.number(node, "data-position")
    elif "data-offset" in values:
        start = (image.total_size + 3) // 4 * 4 + image.number(node, "data-offset")
    else:
        return values["data"]
    end = start + image.number(node, "data-size")
    if end > len(image.data):
        raise Refused(f"the data of {node} is cut off")
    return image.data[start:end]


def check_image(image: Blob, node: str) -> None:
    """All hashes of an image must hold."""
    data = image_data(image, node)
    for each in image.below(node):
        if each.removeprefix(f"{node}/").startswith("hash") and "uboot-ignore" not in image.nodes[each]:
            algorithm = image.text(each, "algo")
            value = binascii.crc32(data).to_bytes(4, "big") if algorithm == "crc32" else hash_of(algorithm, data)
            if image.nodes[each].get("value") != value:
                raise Refused(f"{each} is wrong")


def hash_of(algorithm: str, data: bytes) -> bytes:
    return hashlib.new(algorithm, data, usedforsecurity=False).digest()


if __name__ == "__main__":
    try:
        verify(Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]).read_bytes())
    except Refused as refused:
        sys.exit(f"refused: {refused}")
