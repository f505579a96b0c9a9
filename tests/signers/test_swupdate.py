import asyncio
import hashlib
import json
import os
import subprocess
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from signers.formats import cpio
from signers.signer import Job, Signed, Upload
from signers.swupdate import DESCRIPTION_MAX_BYTES, Swupdate, SwupdateForm, described_files
from tests.signers.conftest import LyingPair
from tokens.errors import ArtifactRejected, KeyMismatch, KeyUnsuited, KeyUnusable, SigningFailed

IMAGES = {"rootfs.ext4": b"\x00\xffroot" * 50_000, "kernel": b"k" * 4097}
SHA = "ab" * 32


@pytest.fixture
def sign(tmp_path, keys_of):
    """Signs what is given as the form's file; returns the answer and the keys that were asked for."""

    async def run(pair, *, filename: str = "update.swu", **fields):
        for name in ("sw-description", "artifact"):
            if isinstance(fields.get(name), bytes):
                path = tmp_path / f"upload-{name}"
                path.write_bytes(fields[name])
                fields[name] = Upload(path, filename, len(fields[name]))
            elif isinstance(fields.get(name), Path):
                fields[name] = Upload(fields[name], filename, fields[name].stat().st_size)
        keys = keys_of(pair)
        job = Job(tmp_path, keys, asyncio.to_thread)
        signed = await Swupdate().sign(SwupdateForm.model_validate({"distro": "demo", **fields}), job)
        return signed, keys.asked

    return run


def content(signed: Signed) -> bytes:
    answer = b"".join(signed.chunks(65536))
    assert len(answer) == signed.size
    return answer


@pytest.fixture
def description(swu) -> bytes:
    return swu.description(IMAGES)


@pytest.fixture
def archive(swu, description) -> Path:
    return swu({"sw-description": description, **IMAGES})


async def test_a_description_alone_rsa(sign, pairs, openssl, tmp_path, description):
    signed, asked = await sign(pairs["rsa2048"], **{"sw-description": description}, backend="ssl")
    assert signed.filename == "sw-description.sig"
    assert asked == [("rsa", {"distro": "demo", "backend": "ssl", "key_uri": None})]
    verify_with_openssl(openssl, tmp_path, pairs["rsa2048"], description, content(signed))


async def test_a_description_alone_pss(sign, pairs, openssl, tmp_path, description):
    signed, asked = await sign(pairs["rsa3072"], **{"sw-description": description}, method="RSA-PSS")
    assert asked[0][0] == "rsa"
    options = "-sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:32"
    verify_with_openssl(openssl, tmp_path, pairs["rsa3072"], description, content(signed), options)


@pytest.mark.parametrize("kind", ["p256", "p384"])
async def test_method_rsa_with_an_ec_key(sign, pairs, openssl, tmp_path, description, kind):
    signed, _ = await sign(pairs[kind], **{"sw-description": description, "key-uri": "pkcs11:object=x"})
    verify_with_openssl(openssl, tmp_path, pairs[kind], description, content(signed))


def verify_with_openssl(openssl, tmp_path, pair, description, signature, options=""):
    (tmp_path / "public.pem").write_bytes(pair.public_pem)
    (tmp_path / "signature").write_bytes(signature)
    line = f"dgst -sha256 -verify public.pem -signature signature {options} description"
    (tmp_path / "description").write_bytes(description)
    openssl(line)
    (tmp_path / "description").write_bytes(description + b" ")
    assert openssl(line, check=False).returncode != 0


@pytest.mark.parametrize("kind", ["rsa2048", "p256", "p384"])
async def test_a_description_alone_cms(sign, pairs, openssl, tmp_path, description, kind):
    signed, asked = await sign(pairs[kind], **{"sw-description": description}, method="CMS")
    assert asked[0][0] == "cms"
    (tmp_path / "signature").write_bytes(content(signed))
    (tmp_path / "trusted.pem").write_bytes(pairs[kind].certificate_pem)
    line = "cms -verify -binary -inform DER -in signature -content description -CAfile trusted.pem -out out"
    (tmp_path / "description").write_bytes(description)
    openssl(line)
    (tmp_path / "description").write_bytes(description + b" ")
    assert openssl(line, check=False).returncode != 0


@pytest.mark.parametrize(
    ("kind", "method"), [("p256", "RSA-PSS"), ("ed25519", "RSA"), ("ed25519", "RSA-PSS"), ("ed25519", "CMS")]
)
async def test_a_key_that_cannot(sign, pairs, description, kind, method):
    with pytest.raises(KeyUnsuited):
        await sign(pairs[kind], **{"sw-description": description}, method=method)


@pytest.fixture(scope="module")
def liars(pairs, pair) -> dict[str, LyingPair]:
    return {
        "rsa2048": LyingPair(pairs["rsa2048"], pair(rsa.generate_private_key(65537, 2048))),
        "p256": LyingPair(pairs["p256"], pair(ec.generate_private_key(ec.SECP256R1()))),
    }


# a raw signature of a description leaves as the key made and verified it: `SigningKey.sign` answers for that
@pytest.mark.parametrize(
    ("kind", "method", "field"),
    [
        ("rsa2048", "RSA", "artifact"),
        ("rsa2048", "RSA-PSS", "artifact"),
        ("rsa2048", "CMS", "artifact"),
        ("rsa2048", "CMS", "sw-description"),
        ("p256", "RSA", "artifact"),
        ("p256", "CMS", "artifact"),
        ("p256", "CMS", "sw-description"),
    ],
)
async def test_a_wrong_signature_is_never_released(sign, liars, archive, kind, method, field):
    upload = {"artifact": archive, "sw-description": PLAIN}[field]
    with pytest.raises(SigningFailed):
        await sign(liars[kind], method=method, **{field: upload})


# a whole .swu


@pytest.mark.parametrize("form", ["crc", "newc"])
@pytest.mark.parametrize("kind", ["rsa2048", "p256"])
async def test_swupdate_accepts_a_signed_swu(sign, pairs, swu, swupdate_check, form, kind):
    unsigned = swu({"sw-description": swu.description(IMAGES), **IMAGES}, form=form)
    signed, _ = await sign(pairs[kind], artifact=unsigned, method="CMS", filename="../up date.swu")
    assert signed.filename == "up_date.swu"
    checked = swupdate_check(content(signed), pairs[kind])
    assert checked.returncode == 0, checked.stdout
    assert swupdate_check(content(signed), pairs["rsa3072"]).returncode != 0
    assert swupdate_check(unsigned.read_bytes(), pairs[kind]).returncode != 0


@pytest.mark.parametrize(
    ("name", "complaint"), [("sw-description", "erification failed"), ("kernel", "Image invalid or corrupted")]
)
async def test_swupdate_refuses_a_changed_member(sign, pairs, swu, swupdate_check, name, complaint):
    unsigned = swu({"sw-description": swu.description(IMAGES), **IMAGES})
    signed, _ = await sign(pairs["rsa2048"], artifact=unsigned, method="CMS")
    members = unpacked(content(signed), swu.directory)
    changed = swu({**members, name: members[name][:-1] + b" "}, name="changed.swu")
    checked = swupdate_check(changed.read_bytes(), pairs["rsa2048"])
    assert checked.returncode != 0
    assert complaint in checked.stdout


def unpacked(archive: bytes, tmp_path: Path) -> dict[str, bytes]:
    """The members in their order, taken apart by cpio."""
    where = tmp_path / "unpacked"
    where.mkdir()
    subprocess.run(["cpio", "-i", "--quiet"], cwd=where, input=archive, check=True, capture_output=True)
    names = subprocess.run(["cpio", "-t", "--quiet"], input=archive, check=True, capture_output=True).stdout
    return {name: (where / name).read_bytes() for name in names.decode().split()}


@pytest.mark.parametrize("form", ["crc", "newc"])
async def test_the_archive_is_otherwise_as_it_was(sign, pairs, swu, tmp_path, description, form):
    unsigned = swu({"sw-description": description, **IMAGES}, form=form)
    signed, _ = await sign(pairs["rsa2048"], artifact=unsigned)
    answer = content(signed)
    members = unpacked(answer, tmp_path)
    assert list(members) == ["sw-description", "sw-description.sig", *IMAGES]
    signature = members.pop("sw-description.sig")
    assert members == {"sw-description": description, **IMAGES}
    assert answer[:6] == {"crc": b"070702", "newc": b"070701"}[form]
    assert len(answer) % 512 == 0
    # deterministic: a repeated request has the same answer
    assert content((await sign(pairs["rsa2048"], artifact=unsigned))[0]) == answer
    pairs["rsa2048"].private_key.public_key().verify(signature, description, padding.PKCS1v15(), hashes.SHA256())
    only_verify = subprocess.run(
        ["cpio", "-i", "--only-verify-crc", "--quiet"], input=answer, capture_output=True, check=True
    )
    assert only_verify.stderr == b""


async def test_an_old_signature_is_replaced(sign, pairs, swu, archive, swupdate_check, tmp_path):
    first, _ = await sign(pairs["rsa3072"], artifact=archive, method="CMS")
    second, _ = await sign(pairs["p256"], artifact=content(first), method="CMS")
    assert list(unpacked(content(second), tmp_path)) == ["sw-description", "sw-description.sig", *IMAGES]
    assert swupdate_check(content(second), pairs["p256"]).returncode == 0
    assert swupdate_check(content(second), pairs["rsa3072"]).returncode != 0


async def test_parts_refer_to_the_upload(sign, pairs, archive):
    signed, _ = await sign(pairs["rsa2048"], artifact=archive)
    assert sum(len(part) for part in signed.parts if isinstance(part, bytes)) < 2048


def peak_bytes() -> int:
    """The most memory that this process ever had, since it was last reset (proc(5): VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


async def test_a_gibibyte_is_never_in_memory(sign, pairs, swu, tmp_path):
    size = 1 << 30
    zeros = hashlib.sha256()
    for _ in range(64):
        zeros.update(bytes(size // 64))
    body = stored("sw-description", swu.description({"big": b""}, big=zeros.hexdigest()), cpio.CRC)
    # the header of a member of that size; the checksum of zeros is 0
    header = stored("big", b"", cpio.CRC)
    header = header[:54] + b"%08X" % size + header[62:]
    path = tmp_path / "big.swu"
    with path.open("wb") as file:
        file.write(body + header)
        file.truncate(len(body) + len(header) + size)
        file.seek(0, os.SEEK_END)
        file.write(cpio.trailer(cpio.CRC, file.tell()))

    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    signed, _ = await sign(pairs["rsa2048"], artifact=path)
    length = sum(len(chunk) for chunk in signed.chunks(1 << 20))
    assert length == signed.size > size
    assert peak_bytes() - before < 16 << 20


async def test_a_json_description(sign, pairs, swu, swupdate_check):
    images = [
        {"filename": name, "sha256": hashlib.sha256(data).hexdigest(), "device": "/dev/null", "type": "raw"}
        for name, data in IMAGES.items()
    ]
    description = json.dumps(
        {"software": {"version": "1.0", "hardware-compatibility": ["rev1"], "images": images}}, indent=1
    ).encode()
    signed, _ = await sign(pairs["rsa2048"], artifact=swu({"sw-description": description, **IMAGES}), method="CMS")
    assert swupdate_check(content(signed), pairs["rsa2048"]).returncode == 0


@pytest.mark.parametrize(
    ("name", "filename"),
    [
        ("update.swu", "update.swu"),
        ("/x/y/a.swu", "a.swu"),
        ("C:\\a\\b.swu", "b.swu"),
        ("..", "artifact.swu"),
        ("", "artifact.swu"),
        ("a\r\nSet-Cookie: b.swu", "a__Set-Cookie__b.swu"),
        ("x" * 300, "x" * 128),
        (".hidden", "hidden"),
    ],
)
async def test_the_name_of_the_answer(sign, pairs, archive, name, filename):
    assert (await sign(pairs["rsa2048"], artifact=archive, filename=name))[0].filename == filename


# what is refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is empty"),
        (b"# nothing\n", "no settings"),
        (b"{}", "no settings"),
        (b"\x80\x81binary", "not UTF-8"),
        (b"software = {", "line 1"),
        (b'software = {\n@include "x"\n}', "line 2: @include"),
        (b'{"software": ', "cannot be parsed"),
        (b'{"software": 1} x', "cannot be parsed"),
        (b'{"a":' * 100_000, "cannot be parsed"),
        (b"(" * 10, "cannot be parsed"),
        (b'software = { images: ( { filename = "a"; } ); }', r"no valid sha256.*'a'"),
        (b'software = { files: ( { filename = "a"; sha256 = ""; } ); }', "'a'"),
        (b'software = { scripts: ( { filename = "a"; sha256 = "abc"; } ); }', "'a'"),
        (b'software = { images: ( { filename = "a"; sha256 = "%s"; } ); }' % (b"0" * 64), "'a'"),
        (b'software = { images: ( { filename = "a"; sha256 = "%sg"; } ); }' % (b"1" * 63), "'a'"),
        (b'software = { images: ( { filename = "a"; sha256 = "%s"; } ); }' % (b"1" * 65), "'a'"),
        (b'software = { images: ( { filename = "a"; sha256 = 1; } ); }', "'a'"),
        (b'software = { images: ( { filename = "b"; }, { filename = "a"; } ); }', "'a', 'b'"),
        (b'software = { images: ( { filename = "a"; sha256 = "@a"; } ); }', "'a'"),
        (b'software = { board: { stable: { copy1: { images: ( { filename = "a"; } ); } } } }', "'a'"),
        (b'software = { x: ( { filename = "a"; } ); images: ( { ref = "#./x"; } ); }', "'a'"),
        (b'software = { images: { filename = "a"; }; }', "'a'"),
        (b'{"software": {"images": [{"filename": "a"}]}}', "'a'"),
        (b'{"software": {"images": {"filename": "a", "sha256": null}}}', "'a'"),
    ],
)
async def test_a_description_that_is_refused(sign, pairs, text, words):
    with pytest.raises(ArtifactRejected, match=words) as caught:
        await sign(pairs["rsa2048"], **{"sw-description": text})
    assert caught.value.hint
    assert len(caught.value.message) < 3000


@pytest.mark.parametrize(
    "group",
    [
        'bootenv: ( { name = "a"; filename = "b"; } )',
        'images: ( { volume = "a"; } )',
        'scripts: ( { type = "ubiswap"; properties: { filename = "b"; }; } )',
        'partitions: ( { filename = "b"; } )',
    ],
)
def test_what_needs_no_sha256(group):
    assert described_files(f"software = {{ {group}; }}".encode()) == {}


def test_the_files_of_a_description():
    text = f'''software = {{
      a: {{ images: ( {{ filename = "one"; sha256 = "{SHA}"; }}, {{ ref = "#./common"; }} ); }};
      b: {{ files: ( {{ filename = "one"; sha256 = "{SHA.upper()}"; }} ); }};
      common: ( {{ filename = "two"; sha256 = "{"1" * 64}"; }} );
    }};'''
    assert described_files(text.encode()) == {"one": SHA, "two": "1" * 64}


def test_one_name_with_two_sums():
    entries = ", ".join(f'{{ filename = "one"; sha256 = "{digit * 64}"; }}' for digit in "12")
    with pytest.raises(ArtifactRejected, match="two different"):
        described_files(f"software = {{ images: ( {entries} ); }}".encode())


async def test_a_description_that_is_too_long(sign, pairs):
    with pytest.raises(ArtifactRejected, match="1048576 are allowed"):
        await sign(pairs["rsa2048"], **{"sw-description": b" " * (DESCRIPTION_MAX_BYTES + 1)})


async def test_a_very_long_list_of_files_is_named_in_part(sign, pairs):
    entries = b",".join(b'{ filename = "%d"; }' % number for number in range(5000))
    with pytest.raises(ArtifactRejected, match="and 4980 more") as caught:
        await sign(pairs["rsa2048"], **{"sw-description": b"software = { images: ( %s ); }" % entries})
    assert len(caught.value.message) < 3000


def stored(name: str, data: bytes, magic: bytes = cpio.NEWC, mode: int = 0o100644) -> bytes:
    return cpio.encode(magic, name.encode(), data, mode=mode)


def closed(body: bytes, magic: bytes = cpio.NEWC) -> bytes:
    return body + cpio.trailer(magic, len(body))


PLAIN = b'software = { version = "1.0"; };\n'
ONE = b'software = { images: ( { filename = "a"; sha256 = "%s"; } ); };\n' % hashlib.sha256(b"a").hexdigest().encode()

BAD_ARCHIVES = {
    "empty": (b"", "no|cut off"),
    "tar": (b"sw-description".ljust(1024, b"\0"), "no header"),
    "cut off": (closed(stored("sw-description", PLAIN))[:200], "cut off"),
    "trailer only": (closed(b""), "first member"),
    "description second": (closed(stored("a", b"a") + stored("sw-description", ONE)), "first member"),
    "signature third": (
        closed(stored("sw-description", ONE) + stored("a", b"a") + stored("sw-description.sig", b"")),
        "second member",
    ),
    "same name twice": (closed(stored("sw-description", ONE) + stored("a", b"a") * 2), "same name"),
    "two descriptions": (closed(stored("sw-description", PLAIN) * 2), "same name"),
    "symbolic link": (closed(stored("sw-description", PLAIN) + stored("l", b"/etc", mode=0o120777)), "link"),
    "directory": (closed(stored("sw-description", PLAIN) + stored(".", b"", mode=0o040755)), "directory"),
    "something behind": (closed(stored("sw-description", PLAIN)) + b"more", "follows its trailer"),
    "too much padding": (closed(stored("sw-description", PLAIN)) + bytes(65536), "follows its trailer"),
    "image missing": (closed(stored("sw-description", ONE)), "lacks files.*'a'"),
    "another image": (closed(stored("sw-description", ONE) + stored("a", b"b")), "SHA-256 of 'a'"),
    "a name that is no text": (
        closed(stored("sw-description", b'{"files": [{"filename": "\\ud800", "sha256": "%s"}]}' % SHA.encode())),
        "lacks files",
    ),
    "empty description": (closed(stored("sw-description", b"")), "is empty"),
    "description too long": (closed(stored("sw-description", b" " * (DESCRIPTION_MAX_BYTES + 1))), "are allowed"),
    "wrong checksum": (
        closed(stored("sw-description", PLAIN) + stored("b", b"b", cpio.CRC).replace(b"00000062", b"00000063")),
        "checksum of 'b'",
    ),
    "wrong checksum of the description": (
        closed(stored("sw-description", PLAIN, cpio.CRC).replace(b"version", b"Version")),
        "checksum of 'sw-description'",
    ),
}


@pytest.mark.parametrize(("archive", "words"), BAD_ARCHIVES.values(), ids=BAD_ARCHIVES)
async def test_an_archive_that_is_refused(sign, pairs, archive, words):
    with pytest.raises(ArtifactRejected, match=words) as caught:
        await sign(pairs["rsa2048"], artifact=archive)
    assert caught.value.hint


async def test_permissions_without_a_file_type_are_accepted(sign, pairs):
    await sign(pairs["rsa2048"], artifact=closed(stored("sw-description", PLAIN, mode=0o644)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_archive_is_signed_soundly_or_refused(sign, pairs, data):
    archive = bytearray(closed(stored("sw-description", ONE, cpio.CRC) + stored("a", b"a", cpio.CRC), cpio.CRC))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(archive) - 1))
        patch = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"FFFFFFFF", b"00000000"]))
        archive[at : at + len(patch)] = patch
    del archive[data.draw(st.integers(0, len(archive)) | st.just(len(archive))) :]
    try:
        asyncio.run(sign(pairs["p256"], artifact=bytes(archive)))
    except ArtifactRejected:
        return


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sw-description": "text", "distro": "demo"},
        {"sw-description": "/etc/passwd", "distro": "demo"},
        {"distro": "demo"},
        {"distro": "../demo", "artifact": ...},
        {"artifact": ...},
        {"distro": "demo", "artifact": ..., "sw-description": ...},
        {"distro": "demo", "artifact": ..., "method": "rsa"},
        {"distro": "demo", "artifact": ..., "backend": "hsm"},
        {"distro": "demo", "artifact": ..., "key-uri": "pkcs11:" + "x" * 1020},
    ],
)
def test_a_form_that_is_refused(tmp_path, fields):
    upload = Upload(tmp_path / "x", "x", 1)
    filled = {name: upload if value is ... else value for name, value in fields.items()}
    with pytest.raises(ValidationError):
        SwupdateForm.model_validate(filled)


# the certificate


async def test_cms_without_a_certificate(sign, pairs, description):
    bare = replace(pairs["rsa2048"], certificates=())
    with pytest.raises(KeyUnusable, match="certificate"):
        await sign(bare, **{"sw-description": description}, method="CMS")
    await sign(bare, **{"sw-description": description}, method="RSA")


async def test_cms_with_the_certificate_of_another_key(sign, pairs, description):
    other = replace(pairs["rsa2048"], certificates=pairs["rsa3072"].certificates)
    with pytest.raises(KeyMismatch):
        await sign(other, **{"sw-description": description}, method="CMS")


@pytest.mark.parametrize(
    "case",
    [
        ({}, None, True),
        ({"usage": None}, None, True),
        ({"usage": ExtendedKeyUsageOID.CODE_SIGNING}, None, True),
        # Debian's swupdate is built with wolfSSL, where the purpose is not looked at
        ({"usage": ExtendedKeyUsageOID.SERVER_AUTH}, "neither for emailProtection nor for codeSigning", True),
        ({"valid_to": timedelta(days=-1)}, "not valid now", False),
    ],
)
async def test_certificates(sign, pair, archive, swupdate_check, caplog, case):
    options, warning, accepted = case
    own = pair(ec.generate_private_key(ec.SECP256R1()), **options)
    signed, _ = await sign(own, artifact=archive, method="CMS")
    assert [warning in record.getMessage() for record in caplog.records] == ([True] if warning else [])
    assert (swupdate_check(content(signed), own).returncode == 0) == accepted


async def test_the_chain_is_embedded(sign, pair, archive, swupdate_check, tmp_path, openssl):
    root = pair(ec.generate_private_key(ec.SECP256R1()), "root", ca=True, usage=None)
    middle = pair(ec.generate_private_key(ec.SECP256R1()), "middle", ca=True, usage=None, issuer=root)
    leaf = pair(ec.generate_private_key(ec.SECP256R1()), "leaf", issuer=middle)
    signed, _ = await sign(leaf, artifact=archive, method="CMS")
    members = unpacked(content(signed), tmp_path)
    for name in ("sw-description", "sw-description.sig"):
        (tmp_path / name).write_bytes(members[name])
    (tmp_path / "root.pem").write_bytes(root.certificate_pem)
    openssl("cms -verify -binary -inform DER -in sw-description.sig -content sw-description -CAfile root.pem -out out")
    assert swupdate_check(content(signed), root).returncode == 0
    assert swupdate_check(content(signed), pair(root.private_key, "another root", ca=True)).returncode != 0
