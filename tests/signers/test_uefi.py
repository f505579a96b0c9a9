"""UEFI: programs, files and variables, by keys of every type, verified by sbsigntool, osslsigncode and OpenSSL."""

import asyncio
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import asn1crypto.cms
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from pydantic import ValidationError

from signers import uefi
from signers.formats import pe
from signers.signer import Job, Signed, Upload
from signers.uefi import Uefi, UefiForm
from tests.signers.conftest import LyingPair
from tokens.errors import ArtifactRejected, KeyMismatch, KeyUnsuited, KeyUnusable, SignatureMismatch

PROGRAM = Path("/usr/lib/systemd/boot/efi/systemd-bootx64.efi")
STUB = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")
TIME = "2026-07-01T12:30:05Z"


@pytest.fixture
def sign(tmp_path, keys_of):
    """Signs; returns the answer's bytes, its name and the keys that were asked for."""

    async def run(pair, artifact: bytes | Path, **fields) -> tuple[bytes, str, list]:
        size = artifact.stat().st_size if isinstance(artifact, Path) else len(artifact)
        form = UefiForm.model_validate({"machine": "demo", "artifact": Upload(artifact, "../a file", size), **fields})
        keys = keys_of(pair)
        signed = await Uefi().sign(form, Job(lambda: tmp_path, keys, asyncio.to_thread))
        content = b"".join(signed.chunks(65536))
        assert len(content) == signed.size
        return content, signed.filename, keys.asked

    return run


@pytest.fixture(scope="module")
def signing(pair, pairs) -> Callable:
    """The same keys, with certificates that osslsigncode takes."""
    return lambda kind: pair(pairs[kind].private_key, f"db {kind}", usage=ExtendedKeyUsageOID.CODE_SIGNING)


@pytest.fixture
def tool(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    def run(*command: str | Path, check: bool = False) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=check, env={"TZ": "UTC"}
        )

    return run


@pytest.fixture
def accepts(tool, tmp_path) -> Callable[..., bool]:
    """Whether sbverify accepts a program that all of these keys have signed.

    osslsigncode must agree; it reads no table with more than one signature, whoever made it (2.5, 2.9).
    """

    def verify(program: bytes, *trusted) -> bool:
        (tmp_path / "program").write_bytes(program)
        verdicts = []
        for each in trusted:
            (tmp_path / "one.pem").write_bytes(each.certificate_pem)
            verdicts.append(tool("sbverify", "--cert", "one.pem", "program").returncode == 0)
        if len(trusted) == 1:
            theirs = tool("osslsigncode", "verify", "-CAfile", "one.pem", "-in", "program")
            assert verdicts == [theirs.returncode == 0 and "MISMATCH" not in theirs.stdout], theirs.stdout
        return all(verdicts)

    return verify


@pytest.mark.parametrize("kind", ["rsa2048", "rsa3072", "p256", "p384"])
async def test_verifiers_accept_a_program_and_refuse_it_tampered_with(sign, signing, accepts, kind):
    key = signing(kind)
    signed, filename, asked = await sign(key, PROGRAM, signing_type="sbsign")
    assert filename == "signed.efi"
    assert asked == [("db", {"machine": "demo"})]
    assert accepts(signed, key)
    at = len(PROGRAM.read_bytes()) // 2
    assert not accepts(signed[:at] + bytes([signed[at] ^ 1]) + signed[at + 1 :], key)
    assert not accepts(signed, signing("rsa2048" if kind != "rsa2048" else "rsa3072"))


async def test_all_but_checksum_directory_and_signature_stays(sign, signing):
    original = PROGRAM.read_bytes()
    signed, *_ = await sign(signing("rsa2048"), PROGRAM, signing_type="sbsign")
    image = pe.parse(lambda offset, length: original[offset : offset + length], len(original))
    kept = bytearray(signed[: len(original)])
    for at, length in ((image.checksum, 4), (image.directory, 8)):
        kept[at : at + length] = original[at : at + length]
    assert kept == original
    assert not any(signed[len(original) : len(original) + -len(original) % 8])


@pytest.mark.parametrize("cut", range(8))
async def test_sizes_that_need_padding(sign, signing, accepts, cut):
    program = STUB.read_bytes()
    key = signing("rsa2048")
    signed, *_ = await sign(key, program[: len(program) - cut], signing_type="sbsign")
    assert accepts(signed, key)


async def test_a_signature_is_appended_or_replaces_the_others(sign, signing, accepts, tool):
    first, second, third = signing("rsa2048"), signing("p256"), signing("rsa3072")
    once, *_ = await sign(first, PROGRAM, signing_type="sbsign")
    twice, *_ = await sign(second, once, signing_type="sbsign")
    thrice, *_ = await sign(third, twice, signing_type="sbsign", signatures="append")
    assert accepts(thrice, first, second, third)
    alone, *_ = await sign(second, thrice, signing_type="sbsign", signatures="replace")
    assert accepts(alone, second)
    assert "db p256" in (listed := tool("sbverify", "--list", "program").stdout)
    assert "signature 2" not in listed


async def test_signatures_of_sbsign_and_osslsigncode_are_kept(sign, signing, accepts, tool, tmp_path):
    """Each leaves its table in its own way: with and without padding behind the last entry."""
    first, second, third = signing("rsa2048"), signing("p256"), signing("rsa3072")
    for name, each in (("first", first), ("third", third)):
        (tmp_path / f"{name}.key").write_bytes(each.private_pem)
        (tmp_path / f"{name}.crt").write_bytes(each.certificate_pem)
    tool("sbsign", "--key", "first.key", "--cert", "first.crt", "--output", "once", PROGRAM, check=True)
    twice, *_ = await sign(second, (tmp_path / "once").read_bytes(), signing_type="sbsign")
    assert accepts(twice, first, second)
    (tmp_path / "twice").write_bytes(twice)
    tool("sbsign", "--key", "third.key", "--cert", "third.crt", "--output", "thrice", "twice", check=True)
    assert accepts((tmp_path / "thrice").read_bytes(), first, second, third)
    options = ("-h", "sha256", "-key", "third.key", "-certs", "third.crt")
    tool("osslsigncode", "sign", *options, "-in", PROGRAM, "-out", "theirs", check=True)
    both, *_ = await sign(second, (tmp_path / "theirs").read_bytes(), signing_type="sbsign")
    assert accepts(both, third, second)


async def test_gaps_between_sections_are_left_out_as_firmware_does(sign, signing, tool, tmp_path):
    """sbverify hashes by sections, as edk2 does; osslsigncode hashes the file."""
    program = PROGRAM.read_bytes()
    image = pe.parse(lambda offset, length: program[offset : offset + length], len(program))
    offset, size = image.sections[-1]
    coff = struct.unpack_from("<I", program, 60)[0]
    sections = coff + 24 + struct.unpack_from("<H", program, coff + 20)[0]
    gapped = bytearray(program[:offset] + bytes(512) + program[offset:])
    for at in range(sections, image.headers_size, 40):
        if struct.unpack_from("<II", gapped, at + 16) == (size, offset):
            struct.pack_into("<I", gapped, at + 20, offset + 512)
    key = signing("rsa2048")
    (tmp_path / "trusted.pem").write_bytes(key.certificate_pem)
    signed, *_ = await sign(key, bytes(gapped), signing_type="sbsign")
    (tmp_path / "program").write_bytes(signed)
    assert tool("sbverify", "--cert", "trusted.pem", "program").returncode == 0
    (tmp_path / "program").write_bytes(signed.replace(b"systemd-boot", b"systemd-root"))
    assert tool("sbverify", "--cert", "trusted.pem", "program").returncode != 0


@pytest.mark.parametrize("artifact", [b"no program", b"MZ" + bytes(100), PROGRAM.read_bytes()[:4096]])
async def test_what_is_no_program(sign, pairs, artifact):
    with pytest.raises(ArtifactRejected, match="not an EFI program"):
        await sign(pairs["rsa2048"], artifact, signing_type="sbsign")


async def test_a_broken_table_of_signatures(sign, pairs):
    signed, *_ = await sign(pairs["rsa2048"], PROGRAM, signing_type="sbsign")
    at = len(PROGRAM.read_bytes()) + -len(PROGRAM.read_bytes()) % 8
    broken = signed[:at] + b"\xff\xff\xff\x7f" + signed[at + 4 :]
    for signatures in ("append", "replace"):
        with pytest.raises(ArtifactRejected, match="does not fit"):
            await sign(pairs["rsa2048"], broken, signing_type="sbsign", signatures=signatures)


@pytest.mark.parametrize("kind", ["rsa2048", "p256", "p384"])
@pytest.mark.parametrize("size", [1, 2047, 2048, 2049, 70_000])
async def test_openssl_accepts_a_file_s_signature(sign, pairs, openssl, tmp_path, kind, size):
    content = (b"\r\nfile\n\0" * 10_000)[:size]
    line = "cms -verify -binary -inform DER -in signature -content content -CAfile trusted.pem -out out -purpose any"
    (tmp_path / "trusted.pem").write_bytes(pairs[kind].certificate_pem)

    detached, filename, _ = await sign(pairs[kind], content, signing_type="signature")
    assert filename == "artifact.sig"
    attached, filename, asked = await sign(pairs[kind], content, signing_type="attach_signature")
    assert filename == "artifact.signed"
    assert asked == [("db", {"machine": "demo"})]
    padded = -(-size // 2048) * 2048
    assert attached[:size] == content
    assert attached[size:padded] == bytes(padded - size)

    for signature in (detached, attached[padded:]):
        (tmp_path / "signature").write_bytes(signature)
        (tmp_path / "content").write_bytes(content)
        openssl(line)
        (tmp_path / "content").write_bytes(content + b"\0")  # neither is the padding signed
        assert openssl(line, check=False).returncode != 0


@pytest.fixture
def lists(pairs, tool, tmp_path) -> Callable[..., bytes]:
    """Signature lists of a certificate, by efitools."""

    def make(kind: str = "rsa2048") -> bytes:
        (tmp_path / "entry.pem").write_bytes(pairs[kind].certificate_pem)
        tool("cert-to-efi-sig-list", "entry.pem", "lists.esl", check=True)
        return (tmp_path / "lists.esl").read_bytes()

    return make


@pytest.mark.parametrize("kind", ["rsa2048", "p256"])
@pytest.mark.parametrize(
    ("variable", "append", "role"),
    [("PK", False, "pk"), ("KEK", False, "pk"), ("db", False, "kek"), ("dbx", True, "kek")],
)
async def test_a_variable_is_signed_as_by_sign_efi_sig_list(
    sign, pairs, lists, tool, openssl, *, tmp_path, kind, variable, append, role
):
    key, content = pairs[kind], lists()
    fields = {"variable": variable, "timestamp": TIME, **({"append": "true"} if append else {})}
    update, filename, asked = await sign(key, content, signing_type="variable", **fields)
    assert filename == f"{variable}.auth"
    assert asked == [(role, {"machine": "demo"})]

    (tmp_path / "trusted.pem").write_bytes(key.certificate_pem)
    (tmp_path / "key.pem").write_bytes(key.private_pem)
    options = ["-t", "2026-07-01 12:30:05", *(["-a"] if append else [])]
    tool("sign-efi-sig-list", *options, "-o", variable, "lists.esl", "bundle", check=True)
    signer = ["-c", "trusted.pem", "-k", "key.pem"]
    tool("sign-efi-sig-list", *options, *signer, variable, "lists.esl", "theirs.auth", check=True)

    (ours, our_rest), (theirs, their_rest) = map(taken_apart, (update, (tmp_path / "theirs.auth").read_bytes()))
    assert our_rest == their_rest
    assert ours["version"].native == "v1"
    assert set(ours["signer_infos"][0].native) == set(theirs["signer_infos"][0].native)
    assert [each.dump() for each in ours["certificates"]] == [each.dump() for each in theirs["certificates"]]
    if kind == "rsa2048":
        # always the same signature over the same bytes
        assert ours["signer_infos"][0]["signature"].native == theirs["signer_infos"][0]["signature"].native

    info = asn1crypto.cms.ContentInfo({"content_type": "signed_data", "content": ours})
    (tmp_path / "signature").write_bytes(info.dump())
    line = "cms -verify -binary -inform DER -in signature -content bundle -CAfile trusted.pem -out out -purpose any"
    openssl(line)
    bundle = (tmp_path / "bundle").read_bytes()
    (tmp_path / "bundle").write_bytes(bundle[:-1] + bytes([bundle[-1] ^ 1]))
    assert openssl(line, check=False).returncode != 0


def taken_apart(update: bytes) -> tuple[asn1crypto.cms.SignedData, bytes]:
    """The message, and all else but the length in which it is counted."""
    (length,) = struct.unpack_from("<I", update, 16)
    return asn1crypto.cms.SignedData.load(update[40 : 16 + length], strict=True), (
        update[:16] + update[20:40] + update[16 + length :]
    )


async def test_without_a_timestamp_it_is_now(sign, pairs, lists):
    before = uefi.datetime.now(uefi.UTC).replace(microsecond=0)
    update, *_ = await sign(pairs["rsa2048"], lists(), signing_type="variable", variable="db")
    moment = uefi.datetime(*struct.unpack_from("<HBBBBB", update), tzinfo=uefi.UTC)
    assert before <= moment <= uefi.datetime.now(uefi.UTC)


async def test_what_no_variable_holds(sign, pairs, lists):
    key = pairs["rsa2048"]
    for content, words in (
        (pairs["rsa2048"].certificate_pem, "does not fit|cut off"),
        (bytes(uefi.VARIABLE_MAX_BYTES + 1), "more than"),
    ):
        with pytest.raises(ArtifactRejected, match=words) as rejected:
            await sign(key, content, signing_type="variable", variable="KEK")
        assert "cert-to-efi-sig-list" in rejected.value.hint
    with pytest.raises(ArtifactRejected, match="one X"):
        await sign(key, lists() + lists("p256"), signing_type="variable", variable="PK")
    # signed already
    update, *_ = await sign(key, lists(), signing_type="variable", variable="db")
    with pytest.raises(ArtifactRejected):
        await sign(key, update, signing_type="variable", variable="db")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"signing_type": "sbsign", "variable": "db"}, "variable goes with"),
        ({"signing_type": "variable"}, "variable goes with"),
        ({"signing_type": "variable", "variable": "dbt"}, "'PK', 'KEK', 'db' or 'dbx'"),
        ({"signing_type": "variable", "variable": "PK", "append": "1"}, "one PK"),
        ({"signing_type": "variable", "variable": "db", "timestamp": "noon"}, "valid datetime"),
        ({"signing_type": "variable", "variable": "db", "timestamp": "0001-01-01T00:00:00+05:00"}, "between 1970"),
        ({"signing_type": "variable", "variable": "db", "timestamp": "9999-12-31T23:59:59-05:00"}, "between 1970"),
        ({"signing_type": "pesign"}, "'sbsign'"),
        ({}, "signing_type"),
        ({"signing_type": "sbsign", "machine": "../x"}, "machine"),
    ],
)
def test_forms_that_are_none(fields, words):
    with pytest.raises(ValidationError, match=words):
        UefiForm.model_validate({"machine": "demo", "artifact": Upload(b"x", "x", 1), **fields})


KINDS = {
    "sbsign": {"artifact": PROGRAM.read_bytes()},
    "signature": {"artifact": b"file"},
    "attach_signature": {"artifact": b"file"},
    "variable": {"variable": "db"},
}


@pytest.mark.parametrize("signing_type", KINDS)
async def test_keys_that_cannot(sign, pairs, lists, signing_type):
    fields = {"artifact": lists(), "signing_type": signing_type, **KINDS[signing_type]}
    with pytest.raises(KeyUnsuited):
        await sign(pairs["ed25519"], **fields)
    with pytest.raises(KeyUnusable, match="certificate"):
        await sign(replace(pairs["rsa2048"], certificates=()), **fields)
    with pytest.raises(KeyMismatch):
        await sign(replace(pairs["rsa2048"], certificates=pairs["rsa3072"].certificates), **fields)


@pytest.mark.parametrize("signing_type", KINDS)
async def test_a_wrong_signature_is_never_released(sign, pairs, lists, signing_type):
    fields = {"artifact": lists(), "signing_type": signing_type, **KINDS[signing_type]}
    with pytest.raises(SignatureMismatch):
        await sign(LyingPair(pairs["rsa2048"], pairs["rsa3072"]), **fields)


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda signed: signed[:at] + bytes([signed[at] ^ 1]) + signed[at:][1:]


SIZE = len(PROGRAM.read_bytes())
IMAGE = pe.parse(lambda offset, length: PROGRAM.read_bytes()[offset : offset + length], SIZE)


@pytest.mark.parametrize(
    "damage",
    [
        flipped(SIZE // 2),
        flipped(IMAGE.checksum),
        flipped(IMAGE.directory),
        flipped(SIZE),  # in the padding
        flipped(SIZE + 200),  # in the signature that was there before
        flipped(-40),  # in the new signature
        lambda signed: signed[:-8],
        lambda signed: signed + bytes(8),
        lambda _signed: PROGRAM.read_bytes(),
    ],
)
async def test_a_program_put_together_wrongly_is_never_released(sign, pairs, monkeypatch, damage):
    once, *_ = await sign(pairs["p256"], PROGRAM, signing_type="sbsign")
    put_together = uefi._Program.signed

    def signed(self, message, signature):
        good = put_together(self, message, signature)
        return Signed((damage(good.read(0, good.size)),), good.filename)

    monkeypatch.setattr(uefi._Program, "signed", signed)
    with pytest.raises(SignatureMismatch):
        await sign(pairs["rsa2048"], once, signing_type="sbsign")


@pytest.mark.parametrize("signing_type", ["attach_signature", "variable"])
@pytest.mark.parametrize("at", [0, 1000, -1])
async def test_nor_is_anything_else(sign, pairs, monkeypatch, lists, signing_type, at):
    kind = {"attach_signature": uefi._Attached, "variable": uefi._Update}[signing_type]
    put_together = kind.signed

    def signed(self, message, signature):
        good = put_together(self, message, signature)
        return Signed((flipped(at)(good.read(0, good.size)),), good.filename)

    monkeypatch.setattr(kind, "signed", signed)
    with pytest.raises(SignatureMismatch):
        await sign(pairs["rsa2048"], **{"artifact": lists(), "signing_type": signing_type, **KINDS[signing_type]})
