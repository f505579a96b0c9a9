import asyncio
import hashlib
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product

import pytest
from asn1crypto import cms as asn1_cms
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from hypothesis import given, settings
from hypothesis import strategies as st

from signers.formats import cms, der
from signers.formats.cms import Attributes, Message
from tokens.errors import KeyUnsuited, SigningFailed
from tokens.schemes import Ecdsa, Ed25519, Hash, RsaPkcs1v15, RsaPss

CONTENT = b'software = { version = "1.0"; };\r\n\x00\xff' * 40
NOW = datetime(2026, 7, 1, 12, 30, 15, tzinfo=UTC)
SPC_INDIRECT_DATA = "1.3.6.1.4.1.311.2.1.4"
TST_INFO = "1.2.840.113549.1.9.16.1.4"

SCHEMES = [
    ("rsa2048", RsaPkcs1v15(Hash.SHA224)),
    ("rsa2048", RsaPkcs1v15(Hash.SHA256)),
    ("rsa3072", RsaPkcs1v15(Hash.SHA384)),
    ("rsa2048", RsaPkcs1v15(Hash.SHA512)),
    ("rsa2048", RsaPss(Hash.SHA256, 0)),
    ("rsa2048", RsaPss(Hash.SHA256, 20)),
    ("rsa2048", RsaPss(Hash.SHA256, 32)),
    ("rsa2048", RsaPss(Hash.SHA256, 222)),
    ("rsa3072", RsaPss(Hash.SHA512, 64)),
    ("p256", Ecdsa(Hash.SHA256)),
    ("p384", Ecdsa(Hash.SHA384)),
    ("p521", Ecdsa(Hash.SHA512)),
    ("p256", Ecdsa(Hash.SHA512)),
]
# OpenSSL 3.0's CMS can neither SHA-3 nor Ed25519
BEYOND_OPENSSL = [
    ("rsa2048", RsaPkcs1v15(Hash.SHA3_256)),
    ("p256", Ecdsa(Hash.SHA3_384)),
    ("ed25519", Ed25519()),
]


def data_of(message: Message, content: bytes) -> bytes:
    if isinstance(message.scheme, Ed25519) and message.attributes is None:
        return content
    return hashlib.new(message.hash.hashlib_name, content).digest()


def make(key, message: Message, content: bytes = CONTENT) -> bytes:
    data = data_of(message, content)
    encoded = message.assemble(data, asyncio.run(key.key.sign(message.scheme, message.to_sign(data))))
    cms.verify(encoded, message, data)
    return encoded


def verifying(tmp_path, key, encoded: bytes, *, content: bytes | None = None, certfile: bool = False) -> str:
    """Writes what is needed; returns the command line that verifies it into the file `out`."""
    (tmp_path / "message.der").write_bytes(encoded)
    (tmp_path / "certificate.pem").write_bytes(key.certificate_pem)
    line = "cms -verify -binary -inform DER -in message.der -out out -CAfile certificate.pem -purpose any"
    if content is not None:
        (tmp_path / "content").write_bytes(content)
        line += " -content content"
    return f"{line} -certfile certificate.pem" if certfile else line


FORMS = product([Attributes(NOW), Attributes(), None], [None, CONTENT], [True, False], [True, False])


@pytest.mark.parametrize(("kind", "scheme"), SCHEMES)
@pytest.mark.parametrize("form", list(FORMS))
def test_openssl_verifies(pairs, openssl, tmp_path, kind, scheme, form):
    key = pairs[kind]
    attributes, content, embedded, by_key_id = form
    embed = key.certificates if embedded else ()
    message = Message(key.certificate, scheme, attributes, embed=embed, content=content, by_key_id=by_key_id)
    encoded = make(key, message)
    detached = CONTENT if content is None else None
    openssl(verifying(tmp_path, key, encoded, content=detached, certfile=not embedded))
    assert (tmp_path / "out").read_bytes() == CONTENT


@pytest.mark.parametrize(("kind", "scheme"), SCHEMES)
@pytest.mark.parametrize("attributes", [Attributes(NOW), None])
def test_openssl_refuses_other_content(pairs, openssl, tmp_path, kind, scheme, attributes):
    key = pairs[kind]
    encoded = make(key, Message(key.certificate, scheme, attributes, embed=key.certificates))
    openssl(verifying(tmp_path, key, encoded, content=CONTENT))
    assert openssl(verifying(tmp_path, key, encoded, content=CONTENT + b"x"), check=False).returncode != 0


def test_openssl_refuses_another_signer(pairs, openssl, tmp_path):
    key = pairs["rsa2048"]
    encoded = make(key, Message(key.certificate, RsaPkcs1v15(Hash.SHA256), Attributes(NOW), embed=key.certificates))
    assert openssl(verifying(tmp_path, pairs["rsa3072"], encoded, content=CONTENT), check=False).returncode != 0


@pytest.mark.parametrize("hash_", [Hash.SHA256, Hash.SHA384, Hash.SHA512])
@pytest.mark.parametrize("options", list(product(["-noattr", ""], ["-nocerts", ""], ["-keyid", ""], ["-nodetach", ""])))
def test_bytes_are_those_of_openssl(pairs, openssl, tmp_path, hash_, options):
    key = pairs["rsa2048"]
    (tmp_path / "content").write_bytes(CONTENT)
    (tmp_path / "key.pem").write_bytes(key.private_pem + key.certificate_pem)
    line = "cms -sign -binary -nosmimecap -outform DER -in content -out theirs.der -signer key.pem -md"
    openssl(f"{line} {hash_} {' '.join(options)}")
    theirs = (tmp_path / "theirs.der").read_bytes()

    signer = asn1_cms.ContentInfo.load(theirs)["content"]["signer_infos"][0]
    times = [each["values"][0].native for each in signer["signed_attrs"] if each["type"].native == "signing_time"]
    message = Message(
        key.certificate,
        RsaPkcs1v15(hash_),
        Attributes(*times) if "-noattr" not in options else None,
        embed=() if "-nocerts" in options else key.certificates,
        content=CONTENT if "-nodetach" in options else None,
        by_key_id="-keyid" in options,
    )
    assert make(key, message) == theirs


@pytest.mark.parametrize("salt", [0, 20, 32, 222])
def test_pss_parameters_are_those_of_openssl(pairs, openssl, tmp_path, salt):
    key = pairs["rsa2048"]
    (tmp_path / "content").write_bytes(CONTENT)
    (tmp_path / "key.pem").write_bytes(key.private_pem + key.certificate_pem)
    line = "cms -sign -binary -noattr -outform DER -in content -out theirs.der -signer key.pem -md sha256"
    openssl(f"{line} -keyopt rsa_padding_mode:pss -keyopt rsa_pss_saltlen:{salt}")
    theirs = (tmp_path / "theirs.der").read_bytes()
    message = Message(key.certificate, RsaPss(Hash.SHA256, salt), embed=key.certificates)
    ours = make(key, message)
    # the salted signature is the last field
    assert ours[:-256] == theirs[:-256]
    cms.verify(theirs, message, hashlib.sha256(CONTENT).digest())


@pytest.mark.parametrize(("kind", "scheme"), BEYOND_OPENSSL)
@pytest.mark.parametrize("attributes", [Attributes(NOW), None])
@pytest.mark.parametrize("content", [None, CONTENT])
def test_beyond_openssl_3_0(pairs, kind, scheme, attributes, content):
    """Our own verification (asn1crypto for the structure, cryptography for the signature) is all there is here."""
    key = pairs[kind]
    encoded = make(key, Message(key.certificate, scheme, attributes, embed=key.certificates, content=content))
    signer = asn1_cms.ContentInfo.load(encoded, strict=True)["content"]["signer_infos"][0]
    assert signer["sid"].chosen["serial_number"].native == key.certificate.serial_number


def test_content_type(pairs, openssl, tmp_path):
    key = pairs["p256"]
    message = Message(
        key.certificate,
        Ecdsa(Hash.SHA256),
        Attributes(NOW),
        embed=key.certificates,
        content_type=TST_INFO,
        content=CONTENT,
    )
    encoded = make(key, message)
    signed = asn1_cms.ContentInfo.load(encoded)["content"]
    assert signed["version"].native == "v3"
    openssl(verifying(tmp_path, key, encoded))
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_pkcs7_content_stands_for_itself(pairs, openssl, tmp_path):
    key = pairs["rsa2048"]
    inner = der.oid("1.3.6.1.4.1.311.2.1.15") + der.octet_string(CONTENT)
    message = Message(
        key.certificate,
        RsaPkcs1v15(Hash.SHA256),
        Attributes(NOW),
        embed=key.certificates,
        content_type=SPC_INDIRECT_DATA,
        content=der.encode(0x30, inner),
        pkcs7=True,
    )
    encoded = make(key, message, inner)
    (tmp_path / "message.der").write_bytes(encoded)
    (tmp_path / "certificate.pem").write_bytes(key.certificate_pem)
    line = "smime -verify -binary -inform DER -in message.der -content inner -CAfile certificate.pem -purpose any"
    (tmp_path / "inner").write_bytes(inner)
    openssl(line)
    (tmp_path / "inner").write_bytes(inner + b"x")
    assert openssl(line, check=False).returncode != 0


def test_certificates_are_a_sorted_set(pairs):
    key = pairs["p256"]
    others = tuple(pairs[kind].certificate for kind in ("rsa2048", "p384", "ed25519"))
    message = Message(key.certificate, Ecdsa(Hash.SHA256), embed=(*others, key.certificate))
    encoded = make(key, message)
    signed = asn1_cms.ContentInfo.load(encoded)["content"]
    embedded = [certificate.dump() for certificate in signed["certificates"]]
    assert len(embedded) == 4
    assert embedded == sorted(embedded)


def test_long_content(pairs, openssl, tmp_path):
    key = pairs["rsa2048"]
    content = bytes(range(256)) * 300
    encoded = make(key, Message(key.certificate, RsaPkcs1v15(Hash.SHA256), content=content), content)
    openssl(verifying(tmp_path, key, encoded, certfile=True))
    assert (tmp_path / "out").read_bytes() == content


# each changes one thing in the message that is expected
WRONGS = {
    "content": lambda pairs: {"content": CONTENT + b"x"},
    "detached": lambda pairs: {"content": None},
    "content type": lambda pairs: {"content_type": TST_INFO},
    "no certificate": lambda pairs: {"embed": ()},
    "more certificates": lambda pairs: {"embed": (pairs["rsa2048"].certificate, pairs["p256"].certificate)},
    "no attributes": lambda pairs: {"attributes": None},
    "scheme": lambda pairs: {"scheme": RsaPss(Hash.SHA256, 32)},
    "hash": lambda pairs: {"scheme": RsaPkcs1v15(Hash.SHA512)},
    "signer by key identifier": lambda pairs: {"by_key_id": True},
    "signer": lambda pairs: {"certificate": pairs["rsa3072"].certificate},
}


@pytest.mark.parametrize("changes", WRONGS.values(), ids=WRONGS)
def test_verify_refuses_another_message(pairs, changes):
    key = pairs["rsa2048"]
    good = Message(key.certificate, RsaPkcs1v15(Hash.SHA256), Attributes(NOW), embed=key.certificates, content=CONTENT)
    encoded = make(key, good)
    with pytest.raises(SigningFailed):
        cms.verify(encoded, replace(good, **changes(pairs)), hashlib.sha256(CONTENT).digest())


def test_verify_refuses_attributes_that_were_not_asked_for(pairs):
    key = pairs["rsa2048"]
    bare = Message(key.certificate, RsaPkcs1v15(Hash.SHA256))
    with pytest.raises(SigningFailed):
        cms.verify(make(key, bare), replace(bare, attributes=Attributes()), hashlib.sha256(CONTENT).digest())


@pytest.mark.parametrize("attributes", [Attributes(NOW), None])
def test_verify_refuses_other_data(pairs, attributes):
    key = pairs["p384"]
    message = Message(key.certificate, Ecdsa(Hash.SHA384), attributes)
    with pytest.raises(SigningFailed):
        cms.verify(make(key, message), message, hashlib.sha384(CONTENT + b"x").digest())


def test_verify_refuses_a_pss_salt_that_was_not_asked_for(pairs):
    key = pairs["rsa2048"]
    encoded = make(key, Message(key.certificate, RsaPss(Hash.SHA256, 20)))
    with pytest.raises(SigningFailed):
        cms.verify(encoded, Message(key.certificate, RsaPss(Hash.SHA256, 32)), hashlib.sha256(CONTENT).digest())


@pytest.fixture(scope="module")
def finished(pairs):
    """Some messages, each with what it was made from."""
    schemes = {"rsa2048": RsaPss(Hash.SHA256, 32), "p256": Ecdsa(Hash.SHA256), "ed25519": Ed25519()}
    messages = [
        (pairs[kind], Message(pairs[kind].certificate, scheme, attributes, embed=pairs[kind].certificates))
        for (kind, scheme), attributes in product(schemes.items(), [Attributes(NOW), None])
    ]
    return [(message, make(key, message)) for key, message in messages]


@settings(max_examples=300, deadline=None)
@given(which=st.integers(0, 5), at=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_verify_notices_a_changed_byte(finished, which, at, change):
    message, encoded = finished[which]
    changed = bytearray(encoded)
    changed[int(at * len(changed))] ^= change
    with pytest.raises(SigningFailed):
        cms.verify(bytes(changed), message, data_of(message, CONTENT))


@given(st.binary(max_size=400))
def test_verify_refuses_what_is_no_message(pairs, encoded):
    message = Message(pairs["p256"].certificate, Ecdsa(Hash.SHA256))
    with pytest.raises(SigningFailed):
        cms.verify(encoded, message, bytes(32))


def test_key_identifier_must_be_in_the_certificate(pairs):
    key = pairs["p256"]
    name = key.certificate.subject
    bare = x509.CertificateBuilder(
        name, name, key.key.public_key, 1, NOW.replace(tzinfo=None), NOW.replace(year=2040)
    ).sign(key.private_key, hashes.SHA256())
    with pytest.raises(KeyUnsuited):
        Message(bare, Ecdsa(Hash.SHA256), by_key_id=True).assemble(bytes(32), bytes(64))


def test_certificate_of_another_type_of_key(pairs):
    with pytest.raises(KeyUnsuited):
        Message(pairs["rsa2048"].certificate, Ecdsa(Hash.SHA256)).assemble(bytes(32), bytes(64))
