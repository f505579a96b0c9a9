"""Trusted Applications and subkeys: loaded by OP-TEE's rules, which optee_rules.py has independently of the signer.

OP-TEE's own tool is held against them too, where HSMSIGN_SIGN_ENCRYPT names its scripts/sign_encrypt.py: it is in no
registry.
"""

import asyncio
import gzip
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import optee_rules
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optee_rules import Refused
from pydantic import ValidationError

from signers import trusted_applications
from signers.formats import ta, tar
from signers.optee import Optee, OpteeForm
from signers.signer import Job, Upload
from tokens.errors import ArtifactRejected, KeyUnsuited, SignatureMismatch
from tokens.symmetric import SymmetricAlgorithm
from tokens.symmetric_file import MemorySymmetricKey

TA = "8aaaf200-2450-11e4-abe2-0002a5d5c51b"
OTHER = "b6c53aba-9669-4668-a7f2-205629d00f86"
ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00" + bytes(range(256)) * 40
LIBRARY = ELF + b"a shared library"
ROOT = "f04fa996-148a-453c-b037-1dcfbad120a6"
VENDOR = "1a5948c5-1aa0-518c-86f4-be6f6a057b16"  # mid_level_subkey below ROOT, and
BELOW = "5c206987-16a3-59cc-ab0f-64b9cfc9e758"  # subkey1_ta below VENDOR, as OP-TEE's documentation has them
KEYS = {0: bytes(range(32)), 1: bytes(range(1, 33))}

SHORT = rsa.generate_private_key(65537, 1024)  # noqa: S505 - it is refused

SIGN_ENCRYPT = os.environ.get("HSMSIGN_SIGN_ENCRYPT")
THEIR_TOOL = pytest.mark.skipif(
    SIGN_ENCRYPT is None, reason="HSMSIGN_SIGN_ENCRYPT names no sign_encrypt.py of OP-TEE's"
)


@dataclass
class Keys:
    """`signers.signer.Keys` with a pair and a key to encrypt by."""

    pair: Any
    encryption_key: bytes = KEYS[0]

    @asynccontextmanager
    async def open(self, role: str, **_request: Any) -> AsyncIterator[Any]:
        self.role = role
        yield self.pair.key

    @asynccontextmanager
    async def open_symmetric(self, role: str, **_request: Any) -> AsyncIterator[MemorySymmetricKey]:
        assert role == "encryption"
        yield MemorySymmetricKey(SymmetricAlgorithm.AES_256, self.encryption_key, "place", self.pair.threads)


Sign = Callable[..., bytes]


@pytest.fixture
def sign(tmp_path: Path) -> Sign:
    """Has an artifact signed; `fields` are those of the form, and `subkey` is bytes."""

    def run(pair: Any, content: bytes, filename: str = "tas.tar.gz", **fields: Any) -> bytes:
        keys = Keys(pair, fields.pop("encryption_key", KEYS[0]))
        directory = Path(tempfile.mkdtemp(prefix="job-", dir=tmp_path))
        fields = {name.replace("_", "-"): value for name, value in fields.items()}
        if "subkey" in fields:
            fields["subkey"] = Upload(fields["subkey"], "subkey.bin", len(fields["subkey"]))

        async def signed() -> bytes:
            form = OpteeForm(machine="board", artifact=Upload(content, filename, len(content)), **fields)
            answer = await Optee().sign(form, Job(lambda: directory, keys, asyncio.to_thread))  # type: ignore[arg-type]
            assert answer.filename == (f"{form.uuid}.bin" if form.uuid else filename.rpartition("/")[2])
            assert keys.role == ("issuer" if form.uuid else "key")
            result = b"".join(answer.chunks(100_000))
            assert len(result) == answer.size
            return result

        return asyncio.run(signed())

    return run


@pytest.fixture(scope="session")
def rsa4096(pair: Any) -> Any:
    return pair(rsa.generate_private_key(65537, 4096))


def tree(files: dict[str, bytes | str]) -> bytes:
    """A tar of these files, and of links where the content is text that begins with `->` or `=>` (a hard one)."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.mode, info.uid, info.uname, info.mtime = 0o755, 7, "me", 1_700_000_000
            if isinstance(content, str) and content[:2] in ("->", "=>"):
                info.type = tarfile.SYMTYPE if content[:2] == "->" else tarfile.LNKTYPE
                info.linkname = content[2:]
                archive.addfile(info)
                continue
            data = content.encode() if isinstance(content, str) else content
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return output.getvalue()


def files(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return {each.name: opened.extractfile(each).read() for each in opened if each.isreg()}  # type: ignore[union-attr]


BUILT = tree({f"{TA}.stripped.elf": ELF, f"{TA}.ta-version": "7\n"})


def one(archive: bytes) -> bytes:
    """The only file in an archive."""
    (content,) = files(archive).values()
    return content


@pytest.fixture(scope="session")
def tree_of_op_tee() -> dict[str, bytes | str]:
    """What build layers collect: the files of two TAs and of a library, and others."""
    return {
        f"./ta/a/{TA}.stripped.elf": ELF,
        f"./ta/a/{TA}.ta-version": "0x10\n",
        f"./ta/a/{TA}.uuid": f"{TA}\n",
        f"./ta/b/{OTHER}.stripped.elf": ELF[:-1],
        "./ta/lib/libfoo.stripped.so": LIBRARY,
        f"./ta/lib/{BELOW}.uuid": f"{BELOW}\n",
        f"./ta/lib/{BELOW}.ta-version": "3",
        "./ta/README": "text",
        "./ta/link": "->README",
    }


class TestTrees:
    @pytest.mark.parametrize(
        ("method", "number"), [({}, 0x70414930), ({"method": "RSA-PSS"}, 0x70414930), ({"method": "RSA"}, 0x70004830)]
    )
    @pytest.mark.parametrize("kind", ["rsa2048", "rsa3072"])
    def test_tas_stand_in_place_of_what_they_were_made_of(self, pairs, sign, tree_of_op_tee, kind, method, number):
        answer = files(sign(pairs[kind], tree(tree_of_op_tee), **method))
        assert list(answer) == [
            f"./ta/a/{TA}.ta", f"./ta/b/{OTHER}.ta", f"./ta/lib/{BELOW}.ta", "./ta/README",
        ]  # fmt: skip
        root = pairs[kind].public_pem
        assert optee_rules.load(answer[f"./ta/a/{TA}.ta"], TA, root) == (ELF, 16)
        assert optee_rules.load(answer[f"./ta/b/{OTHER}.ta"], OTHER, root) == (ELF[:-1], 0)
        assert optee_rules.load(answer[f"./ta/lib/{BELOW}.ta"], BELOW, root) == (LIBRARY, 3)
        assert all(int.from_bytes(data[12:16], "little") == number for name, data in answer.items() if ".ta" in name)

    def test_the_largest_key(self, rsa4096, sign):
        assert optee_rules.load(one(sign(rsa4096, BUILT)), TA, rsa4096.public_pem) == (ELF, 7)

    def test_owner_mode_and_time_stay(self, pairs, sign, tree_of_op_tee):
        long = "d/" * 60
        answer = sign(pairs["rsa2048"], tree(tree_of_op_tee | {f"{long}{TA}.stripped.elf": ELF}))
        with tarfile.open(fileobj=io.BytesIO(answer)) as opened:
            assert [(each.mode, each.uid, each.uname, each.mtime) for each in opened] == [
                (0o755, 7, "me", 1_700_000_000)
            ] * 6
            assert f"{long}{TA}.ta" in opened.getnames()

    @pytest.mark.parametrize("suffix", ["gz", "xz", "zst"])
    def test_every_compression(self, pairs, sign, suffix):
        tool = {"gz": "gzip", "xz": "xz", "zst": "zstd"}[suffix]
        packed = subprocess.run([tool, "-c"], input=BUILT, capture_output=True, check=True).stdout
        answer = sign(pairs["rsa2048"], packed, f"tas.tar.{suffix}")
        plain = subprocess.run([tool, "-dc"], input=answer, capture_output=True, check=True).stdout
        assert optee_rules.load(one(plain), TA, pairs["rsa2048"].public_pem) == (ELF, 7)

    def test_a_request_that_is_repeated_gives_the_same_answer(self, pairs, sign):
        packed = gzip.compress(BUILT)
        assert sign(pairs["rsa2048"], packed, method="RSA") == sign(pairs["rsa2048"], packed, method="RSA")

    def test_an_older_ta_beside_its_elf_file_is_replaced(self, pairs, sign):
        answer = sign(
            pairs["rsa2048"], tree({f"{TA}.ta": b"old", f"{TA}.stripped.elf": ELF, f"{OTHER}.ta-version": "1"})
        )
        assert list(files(answer)) == [f"{TA}.ta", f"{OTHER}.ta-version"]

    @pytest.mark.parametrize(
        ("content", "fault"),
        [
            ({"README": "x"}, "holds no TA"),
            ({"x.stripped.elf": ELF}, "beside it should be one .uuid file in place of 0"),
            ({"x.stripped.so": ELF, "a.uuid": TA, "b.uuid": TA}, "in place of 2"),
            ({"x.stripped.so": ELF, "a.uuid": "{" + TA + "}"}, "holds none"),
            ({f"{TA}.stripped.elf": ELF, f"{TA}.uuid": OTHER}, "another than it is called after"),
            ({f"{TA}.stripped.elf": ELF, f"{TA}.ta-version": "-1"}, "no number of 32 bits"),
            ({f"{TA}.stripped.elf": ELF, f"{TA}.ta-version": "4294967296"}, "no number of 32 bits"),
            ({f"{TA}.stripped.elf": ELF, f"{TA}.ta-version": "010"}, "no number of 32 bits"),
            ({f"{TA}.stripped.elf": ELF, f"{TA}.ta-version": "1\n2"}, "one line of text"),
            ({f"{TA}.stripped.elf": ELF, f"{TA}.ta-version": b"\xff"}, "one line of text"),
            ({f"{TA}.stripped.elf": ELF, f"{TA}.ta-version": "1" * 2000}, "one line of text"),
            ({f"{TA}.stripped.elf": ELF, f"{TA}.ta-version": ""}, "one line of text"),
            ({f"{TA}.stripped.elf": b"#!/bin/sh"}, "no ELF file"),
            ({f"{TA}.stripped.elf": b""}, "no ELF file"),
            ({f"{TA}.stripped.elf": ELF[:16] + b"\x01\x00"}, "another type"),
            ({f"{TA}.stripped.elf": ELF, f"{TA}.ta-name": "x"}, "it is below none"),
            ({f"{TA}.ta": b"x" * 100}, "no signed header"),
            ({f"{TA}.stripped.elf": ELF, "x.ta": f"=>{TA}.stripped.elf"}, "is a hard link"),
            ({f"{TA}.stripped.elf": ELF, "x": f"=>{TA}.stripped.elf"}, "leads to no file"),
            ({f"{TA}.stripped.elf": ELF, f"{TA}.ta": "->x"}, "is there twice"),
            ({f"{TA}.stripped.elf": ELF, f"{TA}.ta/x": "x"}, "in place of, something that is no directory"),
            ({f"{TA}.stripped.elf": ELF, "x.stripped.so": ELF, f"{TA}.uuid": TA}, "is there twice"),
        ],
    )  # fmt: skip
    def test_what_is_refused(self, pairs, sign, content, fault):
        with pytest.raises(ArtifactRejected, match=fault) as raised:
            sign(pairs["rsa2048"], tree(content))
        assert raised.value.hint

    def test_too_many(self, pairs, sign, monkeypatch):
        monkeypatch.setattr(trusted_applications, "TAS_MAX", 1)
        assert sign(pairs["rsa2048"], BUILT)
        with pytest.raises(ArtifactRejected, match="more than 1 TAs"):
            sign(pairs["rsa2048"], tree({f"a/{TA}.stripped.elf": ELF, f"b/{TA}.stripped.elf": ELF}))

    def test_no_key_of_another_type(self, pairs, sign, pair):
        for other in (pairs["p256"], pair(SHORT)):
            with pytest.raises(KeyUnsuited):
                sign(other, BUILT)


class TestAgain:
    """TAs that were signed before."""

    @pytest.mark.parametrize("method", ["RSA", "RSA-PSS"])
    @pytest.mark.parametrize("again", ["rsa2048", "rsa3072"])
    def test_a_ta_keeps_its_algorithm_uuid_and_version(self, pairs, sign, method, again):
        before = one(sign(pairs["rsa2048"], BUILT, method=method))
        after = sign(pairs[again], before, f"{TA}.ta")
        assert before[12:16] == after[12:16]
        assert optee_rules.load(after, TA, pairs[again].public_pem) == (ELF, 7)

    def test_another_algorithm(self, pairs, sign):
        before = one(sign(pairs["rsa2048"], BUILT))
        after = one(sign(pairs["rsa2048"], tree({f"a/{TA}.ta": before}), method="RSA"))
        assert after[12:16].hex() == "30480070"
        assert optee_rules.load(after, TA, pairs["rsa2048"].public_pem) == (ELF, 7)

    @pytest.mark.parametrize("scheme", [ta.PSS, ta.PKCS1V15], ids=["PSS", "RSA"])
    def test_a_ta_without_uuid_and_version(self, pairs, sign, scheme):
        header = ta.Header(ta.Kind.PLAIN, len(ELF), scheme, 256)
        before = ta.SignedHeader(header, ta.digest(header, b"", ELF), b"by someone else".ljust(256)).encode() + ELF
        after = one(sign(pairs["rsa3072"], tree({f"{TA}.ta": before}), "tas.tar"))
        assert after[4:8] == bytes(4)
        assert optee_rules.load(after, TA, pairs["rsa3072"].public_pem) == (ELF, 0)

    def test_what_is_refused(self, pairs, sign):
        before = one(sign(pairs["rsa2048"], BUILT))
        damaged = before[:-1] + bytes([before[-1] ^ 1])
        with pytest.raises(ArtifactRejected, match="it is damaged"):
            sign(pairs["rsa2048"], damaged, f"{TA}.ta")
        with pytest.raises(ArtifactRejected, match=f"it is the TA {TA}"):
            sign(pairs["rsa2048"], tree({f"{OTHER}.ta": before}))
        with pytest.raises(ArtifactRejected, match="no signed header"):
            sign(pairs["rsa2048"], ELF, f"{TA}.stripped.elf")
        with pytest.raises(ArtifactRejected, match="cut off"):
            sign(pairs["rsa2048"], b"", "x")


class TestEncryption:
    @pytest.mark.parametrize("flag", [0, 1])
    def test_a_device_decrypts_what_is_encrypted(self, pairs, sign, flag):
        answer = sign(pairs["rsa2048"], BUILT, encryption=("device", "class")[flag], encryption_key=KEYS[flag])
        root = pairs["rsa2048"].public_pem
        assert ELF[20:] not in one(answer)
        assert optee_rules.load(one(answer), TA, root, {flag: KEYS[flag]}) == (ELF, 7)
        with pytest.raises(Refused, match="decrypted"):
            optee_rules.load(one(answer), TA, root, {flag: KEYS[1 - flag], 1 - flag: KEYS[flag]})

    def test_no_two_are_encrypted_alike(self, pairs, sign):
        once, twice = (one(sign(pairs["rsa2048"], BUILT, encryption="device")) for _ in range(2))
        assert once[-len(ELF) :] != twice[-len(ELF) :]

    @pytest.mark.parametrize("encryption", [{}, {"encryption": "class"}])
    def test_an_encrypted_ta_stays_as_it_is_encrypted(self, pairs, sign, encryption):
        before = one(sign(pairs["rsa2048"], BUILT, encryption="device"))
        after = sign(pairs["rsa3072"], before, f"{TA}.ta", **encryption)
        assert after[-len(ELF) - 60 :] == before[-len(ELF) - 60 :]
        assert optee_rules.load(after, TA, pairs["rsa3072"].public_pem, KEYS) == (ELF, 7)

    def test_a_signed_ta_is_encrypted(self, pairs, sign):
        after = sign(pairs["rsa3072"], one(sign(pairs["rsa2048"], BUILT)), f"{TA}.ta", encryption="device")
        assert optee_rules.load(after, TA, pairs["rsa3072"].public_pem, KEYS) == (ELF, 7)

    def test_what_is_refused(self, pairs, sign, monkeypatch):
        before = one(sign(pairs["rsa2048"], BUILT, encryption="device"))
        with pytest.raises(ArtifactRejected, match="by another key than the granted one, or damaged"):
            sign(pairs["rsa2048"], before, f"{TA}.ta", encryption_key=KEYS[1])
        with pytest.raises(ArtifactRejected, match="by another key than the granted one, or damaged"):
            sign(pairs["rsa2048"], before[:-1] + bytes([before[-1] ^ 1]), f"{TA}.ta")
        monkeypatch.setattr(trusted_applications, "ENCRYPTED_MAX_BYTES", len(ELF) - 1)
        with pytest.raises(ArtifactRejected, match="and is encrypted"):
            sign(pairs["rsa2048"], BUILT, encryption="device")
        monkeypatch.undo()
        monkeypatch.setattr(trusted_applications, "ENCRYPTED_SUM_MAX_BYTES", len(ELF) - 1)
        for artifact in (BUILT, tree({f"{TA}.ta": before})):
            with pytest.raises(ArtifactRejected, match="of encrypted TAs"):
                sign(pairs["rsa2048"], artifact, encryption="device")
        sign(pairs["rsa2048"], BUILT)
        monkeypatch.undo()
        header = ta.Header(ta.Kind.PLAIN, len(ELF), ta.PSS, 256)
        plain = ta.SignedHeader(header, ta.digest(header, b"", ELF), bytes(256)).encode() + ELF
        with pytest.raises(ArtifactRejected, match="no UUID in its header"):
            sign(pairs["rsa2048"], plain, f"{TA}.ta", encryption="device")


@pytest.fixture
def chains(pairs, sign) -> dict[str, bytes]:
    """A subkey by the root key (rsa2048) of the key rsa3072, and one by that."""
    vendor, other = pairs["rsa3072"], pairs["rsa2048"]
    first = sign(other, vendor.public_pem, uuid=ROOT, name_size=64, max_depth=4, subkey_version=1)
    second = sign(
        vendor, other.public_pem, uuid=VENDOR, name="mid_level_subkey", subkey=first, name_size=64, max_depth=3,
    )  # fmt: skip
    return {"first": first, "second": second}


class TestSubkeys:
    """The root key is rsa2048, the first subkey's rsa3072, and the second's rsa2048 again."""

    def test_a_device_loads_a_ta_below_two_subkeys(self, pairs, sign, chains):
        built = tree({f"{BELOW}.stripped.elf": ELF, f"{BELOW}.ta-name": "subkey1_ta\n"})
        answer = sign(pairs["rsa2048"], built, subkey=chains["second"])
        assert list(files(answer)) == [f"{BELOW}.ta"]
        root = pairs["rsa2048"].public_pem
        assert optee_rules.load(one(answer), BELOW, root) == (ELF, 0)
        with pytest.raises(Refused, match="right key"):
            optee_rules.load(one(answer), BELOW, pairs["rsa3072"].public_pem)

    def test_it_stays_there_when_it_is_signed_again(self, pairs, sign, chains):
        below = one(
            sign(pairs["rsa2048"], tree({f"{BELOW}.stripped.elf": ELF}), subkey=chains["second"], name="subkey1_ta")
        )
        again = sign(pairs["rsa2048"], below, f"{BELOW}.ta", method="RSA")
        assert optee_rules.load(again, BELOW, pairs["rsa2048"].public_pem) == (ELF, 0)
        with pytest.raises(ArtifactRejected, match="of another key than the granted one"):
            sign(pairs["rsa3072"], below, f"{BELOW}.ta")

    @pytest.mark.parametrize("method", ["RSA", "RSA-PSS"])
    def test_an_identity_subkey_is_for_one_ta(self, pairs, sign, method):
        subkey = sign(pairs["rsa2048"], pairs["rsa3072"].public_pem, uuid=TA, method=method)
        answer = sign(pairs["rsa3072"], BUILT, subkey=subkey, encryption="device")
        assert optee_rules.load(one(answer), TA, pairs["rsa2048"].public_pem, KEYS) == (ELF, 7)
        with pytest.raises(ArtifactRejected, match=f"it must have {TA}"):
            sign(pairs["rsa3072"], tree({f"{OTHER}.stripped.elf": ELF}), subkey=subkey)

    @pytest.mark.parametrize(
        ("fields", "fault"),
        [
            ({"uuid": VENDOR, "name": "mid_level_subkey", "max_depth": 4}, "must be less than 4"),
            ({"uuid": VENDOR, "name": "mid_level"}, f"has the UUID {VENDOR}"),
            ({"uuid": VENDOR}, f"has the UUID {VENDOR}"),
            ({"uuid": VENDOR, "name": "x" * 65}, "cannot be called so"),
        ],
    )
    def test_subkeys_that_cannot_be_below_another(self, pairs, sign, chains, fields, fault):
        with pytest.raises(ArtifactRejected, match=fault):
            sign(pairs["rsa3072"], pairs["rsa2048"].public_pem, subkey=chains["first"], **fields)

    def test_a_key_signs_below_its_own_subkey_alone(self, pairs, sign, chains):
        with pytest.raises(ArtifactRejected, match="of another key than the granted one"):
            sign(pairs["rsa2048"], pairs["rsa2048"].public_pem, uuid=VENDOR, name="x", subkey=chains["first"])

    @pytest.mark.parametrize("at", [100, 340, 400])
    def test_a_chain_that_was_tampered_with(self, pairs, sign, chains, at):
        second = bytearray(chains["second"])
        second[len(chains["first"]) + 64 + at] ^= 1
        with pytest.raises(ArtifactRejected, match="chain of subkeys"):
            sign(pairs["rsa2048"], tree({f"{BELOW}.stripped.elf": ELF}), subkey=bytes(second), name="subkey1_ta")

    @pytest.mark.parametrize("chain", [b"", b"x" * 50, b"x" * 200_000, BUILT])
    def test_files_that_are_no_chain(self, pairs, sign, chain):
        with pytest.raises(ArtifactRejected, match="`subkey` is no chain of subkeys"):
            sign(pairs["rsa2048"], BUILT, subkey=chain)

    def test_a_chain_that_is_as_long_as_it_can_be(self, pairs, sign):
        pair, chain = pairs["rsa2048"], None
        for depth in reversed(range(ta.SUBKEYS_MAX)):
            below = {} if chain is None else {"subkey": chain}
            chain = sign(pair, pair.public_pem, uuid=TA, max_depth=depth + 1, **below)
        assert optee_rules.load(one(sign(pair, BUILT, subkey=chain)), TA, pair.public_pem) == (ELF, 7)
        with pytest.raises(ArtifactRejected, match="has 16 subkeys already"):
            sign(pair, pair.public_pem, uuid=TA, subkey=chain)

    @pytest.mark.parametrize("kind", ["p256", "ed25519", "private", "short", "text", "empty"])
    def test_keys_that_no_subkey_can_be_of(self, pairs, sign, kind):
        pem, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        content = {
            "private": pairs["rsa3072"].private_pem,
            "short": SHORT.public_key().public_bytes(pem, form),
            "text": b"no key",
            "empty": b"",
        }.get(kind) or pairs.get(kind, pairs["p256"]).public_pem
        with pytest.raises(ArtifactRejected, match="no public key of a subkey"):
            sign(pairs["rsa2048"], b"" if kind == "empty" else content, uuid=TA)

    @pytest.mark.parametrize(
        "fields",
        [
            {"name-size": 64}, {"max-depth": 1}, {"subkey-version": 1}, {"name": "x"}, {"uuid": "x"},
            {"uuid": TA, "name-size": 256}, {"uuid": TA, "max-depth": -1}, {"uuid": TA, "subkey-version": 2**32},
            {"method": "CMS"}, {"encryption": "yes"},
        ],
    )  # fmt: skip
    def test_fields_that_do_not_fit(self, fields):
        with pytest.raises(ValidationError):
            OpteeForm(machine="board", artifact=Upload(BUILT, "x", len(BUILT)), **fields)


class TestRules:
    """What the rules refuse: without that, what they accept would say nothing."""

    @pytest.fixture
    def below(self, pairs, sign, chains) -> bytes:
        built = tree({f"{BELOW}.stripped.elf": ELF})
        return one(sign(pairs["rsa2048"], built, subkey=chains["second"], name="subkey1_ta"))

    def test_every_byte_counts(self, pairs, chains, below):
        """But those behind a name's end: nothing covers them, and nobody reads them."""
        unread = set()
        for before, name in (("first", "mid_level_subkey"), ("second", "subkey1_ta")):
            start = len(chains[before])
            unread |= set(range(start + len(name) + 1, start + 64))
        for at in {*range(0, len(below) - len(ELF), 97), *range(0, 52, 4)} - unread:
            tampered = bytearray(below)
            tampered[at] ^= 1
            with pytest.raises(Refused):
                optee_rules.load(bytes(tampered), BELOW, pairs["rsa2048"].public_pem)

    def test_another_uuid(self, pairs, sign, below):
        with pytest.raises(Refused, match="namespace"):
            optee_rules.load(below, TA, pairs["rsa2048"].public_pem)
        with pytest.raises(Refused, match="another TA"):
            optee_rules.load(one(sign(pairs["rsa2048"], BUILT)), OTHER, pairs["rsa2048"].public_pem)

    def test_a_subkey_s_own_ta_elsewhere(self, pairs, sign, chains):
        """What a subkey signs without its chain is no TA of the root key's."""
        with pytest.raises(Refused, match="right key"):
            optee_rules.load(one(sign(pairs["rsa3072"], BUILT)), TA, pairs["rsa2048"].public_pem)


@pytest.mark.parametrize("what", ["signature", "tree", "header"])
def test_nothing_leaves_that_does_not_verify(pairs, sign, monkeypatch, what):
    if what == "signature":

        async def wrong(_key: Any, _scheme: Any, _digest: bytes) -> bytes:
            return bytes(256)

        monkeypatch.setattr("tokens.keyfile.MemoryKey.sign", wrong)
    elif what == "tree":
        monkeypatch.setattr(tar, "renamed", lambda headers, _name, size: tar.resized(headers, size))
    else:
        monkeypatch.setattr(ta.Ta, "fields", b"x" * 20)
    with pytest.raises(SignatureMismatch):
        sign(pairs["rsa2048"], BUILT)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_hostile_trees_are_refused_or_signed(pairs, sign, tree_of_op_tee, data):
    hostile = bytearray(tree(tree_of_op_tee))
    for _ in range(data.draw(st.integers(1, 4))):
        hostile[data.draw(st.integers(0, len(hostile) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ArtifactRejected):
        answer = sign(pairs["rsa2048"], bytes(hostile[: data.draw(st.integers(0, len(hostile)))]))
        assert any(name.endswith(".ta") for name in files(answer))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_hostile_tas_are_refused_or_signed(pairs, sign, chains, data):
    """The root key's signature on the first subkey is left alone: the signer cannot know what that key is."""
    pair, built = pairs["rsa2048"], tree({f"{BELOW}.stripped.elf": ELF})
    hostile = bytearray(one(sign(pair, built, subkey=chains["second"], name="subkey1_ta")))
    places = st.integers(0, 51) | st.integers(308, len(hostile) - len(ELF) + 20)
    for _ in range(data.draw(st.integers(1, 3))):
        hostile[data.draw(places)] = data.draw(st.integers(0, 255))
    with suppress(ArtifactRejected):
        again = sign(pair, bytes(hostile), f"{BELOW}.ta", method="RSA")
        assert optee_rules.load(again, BELOW, pair.public_pem) == (ELF, 0)


@THEIR_TOOL
class TestTheirTool:
    """OP-TEE's own sign_encrypt.py."""

    @staticmethod
    def run(directory: Path, *arguments: str) -> int:
        return subprocess.run([sys.executable, str(SIGN_ENCRYPT), *arguments], cwd=directory, check=False).returncode

    @pytest.mark.parametrize("method", ["RSA", "RSA-PSS"])
    @pytest.mark.parametrize("encryption", [None, "device"])
    def test_it_verifies(self, pairs, sign, tmp_path, method, encryption):
        for kind in ("rsa2048", "rsa3072"):
            (tmp_path / f"{kind}.pem").write_bytes(pairs[kind].public_pem)
        (tmp_path / "x.ta").write_bytes(one(sign(pairs["rsa2048"], BUILT, method=method, encryption=encryption)))
        verify = ("verify", "--uuid", TA, "--in", "x.ta", *(("--enc-key", KEYS[0].hex()) if encryption else ()))
        assert self.run(tmp_path, *verify, "--key", "rsa2048.pem") == 0
        assert self.run(tmp_path, *verify, "--key", "rsa3072.pem") != 0

    def test_the_same_subkey(self, pairs, sign, tmp_path):
        (tmp_path / "root.pem").write_bytes(pairs["rsa2048"].private_pem)
        (tmp_path / "vendor.pem").write_bytes(pairs["rsa3072"].public_pem)
        command = ("sign-subkey", "--uuid", ROOT, "--key", "root.pem", "--in", "vendor.pem", "--out", "theirs.bin")
        options = ("--max-depth", "4", "--name-size", "64", "--subkey-version", "1")
        assert self.run(tmp_path, *command, *options, "--algo", "TEE_ALG_RSASSA_PKCS1_V1_5_SHA256") == 0
        fields = {"uuid": UUID(ROOT), "name_size": 64, "max_depth": 4, "subkey_version": 1, "method": "RSA"}
        assert sign(pairs["rsa2048"], pairs["rsa3072"].public_pem, **fields) == (tmp_path / "theirs.bin").read_bytes()

    def test_a_ta_below_two_subkeys(self, pairs, sign, chains, tmp_path):
        (tmp_path / "root.pem").write_bytes(pairs["rsa2048"].public_pem)
        built = tree({f"{BELOW}.stripped.elf": ELF, f"{BELOW}.ta-name": "subkey1_ta"})
        (tmp_path / "x.ta").write_bytes(one(sign(pairs["rsa2048"], built, subkey=chains["second"])))
        assert self.run(tmp_path, "verify", "--uuid", BELOW, "--in", "x.ta", "--key", "root.pem") == 0
