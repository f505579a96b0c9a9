"""Attestations: what is proven, and what is refused; `openssl verify` agrees about the chains."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attestations import ID, SERIAL, Chain, Party, authority, certify, der, openssl_accepts
from tokens.attestation import Attested, Origin, check_never_extractable, verify, yubico_roots
from tokens.errors import KeyNotAttested
from tokens.provider import Attestation

KEY = ec.generate_private_key(ec.SECP256R1()).public_key()
CHAIN = Chain()


def checked(attestation: Attestation, chain: Chain = CHAIN, **expected: Any) -> Attested:
    return verify(attestation, KEY, **({"roots": chain.roots, "serial": SERIAL, "id": ID} | expected))


def refused(attestation: Attestation, match: str, chain: Chain = CHAIN, **expected: Any) -> None:
    with pytest.raises(KeyNotAttested, match=match) as error:
        checked(attestation, chain, **expected)
    assert error.value.hint


class TestGenuine:
    def test_what_the_device_says(self, tmp_path: Path) -> None:
        attestation = CHAIN.attest(KEY)
        attested = checked(attestation)
        assert (attested.serial, attested.id, attested.label) == (SERIAL, ID, "Schlüssel")
        assert (attested.firmware, attested.origin, attested.domains) == ("2.4.0", Origin.GENERATED, (1, 3, 16))
        assert attested.capabilities == ("sign-pkcs", "sign-pss")
        assert (attested.exportable, attested.never_extractable) == (False, True)
        expected = [CHAIN.device.certificate, CHAIN.sub.certificate, CHAIN.root.certificate]
        assert list(attested.chain[1:]) == expected
        check_never_extractable(attested)
        assert openssl_accepts(tmp_path, attestation, CHAIN.roots)

    def test_rsa_as_devices_have_it(self, tmp_path: Path) -> None:
        chain = Chain(authority("Test Root", None, 2, key=rsa.generate_private_key(65537, 2048)))
        chain.device = authority("Device", chain.sub, 0, key=rsa.generate_private_key(65537, 2048))
        attestation = chain.attest(KEY)
        assert checked(attestation, chain).never_extractable
        assert openssl_accepts(tmp_path, attestation, chain.roots)

    def test_what_may_be_pinned(self) -> None:
        with_sub = Attestation(CHAIN.attest(KEY).certificate, (CHAIN.device.der, CHAIN.sub.der, CHAIN.root.der))
        root, sub, device = CHAIN.root.certificate, CHAIN.sub.certificate, CHAIN.device.certificate
        for roots, length in (((root,), 4), ((sub,), 3), ((device,), 2), ((device, root), 2), ((root, sub), 4)):
            attested = checked(with_sub, roots=roots)
            assert attested.chain[-1] in roots
            assert len(attested.chain) == length

    def test_any_device_and_object_where_none_is_meant(self) -> None:
        assert checked(CHAIN.attest(KEY), serial=None, id=None).serial == SERIAL


class TestChain:
    def test_another_key(self) -> None:
        other = ec.generate_private_key(ec.SECP256R1()).public_key()
        refused(CHAIN.attest(other), "is for another key")

    def test_an_issuer_of_the_same_name(self, tmp_path: Path) -> None:
        forger = certify(f"YubiHSM Attestation ({SERIAL})", CHAIN.sub, ca=x509.BasicConstraints(True, 0))
        forged = Attestation(forge(forger), (CHAIN.device.der,))
        refused(forged, "leads to no pinned certificate")
        assert not openssl_accepts(tmp_path, forged, CHAIN.roots)

    @pytest.mark.parametrize("pinned", ["other", "root only", "nothing", "itself"])
    def test_not_pinned(self, tmp_path: Path, pinned: str) -> None:
        attestation = CHAIN.attest(KEY)
        other = Chain()  # has the same names
        roots = {
            "other": other.roots,
            "root only": (CHAIN.root.certificate,),  # nobody has the Sub-CA
            "nothing": (),
            "itself": (x509.load_der_x509_certificate(attestation.certificate),),
        }[pinned]
        refused(attestation, "leads to no pinned certificate", roots=roots)
        if pinned in ("other", "root only"):
            assert not openssl_accepts(tmp_path, attestation, roots)

    def test_pinning_the_attestation_itself_proves_nothing(self) -> None:
        alone = Attestation(CHAIN.attest(KEY).certificate, ())
        pinned = (x509.load_der_x509_certificate(alone.certificate),)
        refused(alone, "leads to no pinned certificate", roots=pinned)

    def test_it_does_not_lead_to_yubico(self) -> None:
        refused(CHAIN.attest(KEY), "leads to no pinned certificate", roots=None)

    @pytest.mark.parametrize("days", [(-2, -1), (1, 2)])
    @pytest.mark.parametrize("who", ["root", "sub", "device", "leaf"])
    def test_not_valid_now(self, tmp_path: Path, who: str, days: tuple[int, int]) -> None:
        chain = Chain(authority("Test Root", None, 2, days=days)) if who == "root" else Chain()
        if who == "sub":
            chain.sub = authority("Test Sub-CA", chain.root, 1, days=days)
            chain.device = authority("Device", chain.sub, 0)
        if who == "device":
            chain.device = authority("Device", chain.sub, 0, days=days)
        attestation = chain.attest(KEY, **({"days": days} if who == "leaf" else {}))
        refused(attestation, "not valid now", chain)
        if who != "root":  # openssl stops at the pinned Sub-CA
            assert not openssl_accepts(tmp_path, attestation, chain.roots)

    def test_an_attested_key_attests_nothing(self, tmp_path: Path) -> None:
        """A key that may sign certificates, on a genuine device, signs one that says what its owner likes."""
        key = ec.generate_private_key(ec.SECP256R1())
        genuine = CHAIN.attest(key.public_key())
        owner = Party(key, x509.load_der_x509_certificate(genuine.certificate))
        forged = Attestation(forge(owner), (genuine.certificate, CHAIN.device.der))
        refused(forged, "no certificate authority")
        assert not openssl_accepts(tmp_path, forged, CHAIN.roots)

    @pytest.mark.parametrize("authority_", [True, False])
    def test_a_chain_that_is_too_long(self, tmp_path: Path, authority_: bool) -> None:
        constraints = x509.BasicConstraints(authority_, None)
        between = certify("Between", CHAIN.device, ca=constraints)
        forged = Attestation(forge(between), (between.der, CHAIN.device.der))
        refused(forged, "no certificate authority, or not for a chain of this length")
        assert not openssl_accepts(tmp_path, forged, CHAIN.roots)

    @pytest.mark.parametrize("wrong", ["no authority", "usage", "critical", "hash"])
    def test_an_issuer_that_may_not(self, wrong: str) -> None:
        usage = x509.KeyUsage(True, *[False] * 8)
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\0")
        changes = {
            "no authority": {"ca": x509.BasicConstraints(False, None)},
            "usage": {"extensions": ((usage, True),)},
            "critical": {"extensions": ((unknown, True),)},
            "hash": {"hash_": hashes.SHA224()},
        }[wrong]
        chain = Chain()
        chain.device = authority("Device", chain.sub, 0, **changes)
        refused(chain.attest(KEY), "pinned" if wrong == "hash" else "no certificate authority", chain)

    def test_an_issuer_that_may(self) -> None:
        usage = x509.KeyUsage(*[False] * 5, True, True, False, False)
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\0")
        chain = Chain()
        chain.device = authority("Device", chain.sub, 0, extensions=((usage, True), (unknown, False)))
        assert checked(chain.attest(KEY), chain).never_extractable


def forge(issuer: Party) -> bytes:
    """A certificate for KEY with everything a good one says."""
    good = x509.load_der_x509_certificate(CHAIN.attest(KEY).certificate)
    extensions = tuple((each.value, each.critical) for each in good.extensions)
    return certify("Forged", issuer, public_key=KEY, extensions=extensions).der


class TestSaid:
    def test_another_device_or_object(self) -> None:
        refused(CHAIN.attest(KEY), "comes from the device 12345678, not from 12345679", serial=SERIAL + 1)
        refused(CHAIN.attest(KEY), "for the object 0x0100, not for 0x0101", id=ID + 1)

    @pytest.mark.parametrize(
        ("value", "origin"),
        [(1, Origin.GENERATED), (2, Origin.IMPORTED), (0x11, Origin.WRAPPED), (0x12, Origin.WRAPPED)],
    )
    def test_where_the_key_is_from(self, value: int, origin: Origin) -> None:
        attested = checked(CHAIN.attest(KEY, e3=der(3, bytes([0, value]))))
        assert attested.origin is origin
        assert attested.never_extractable is (origin is Origin.GENERATED)
        if not attested.never_extractable:
            with pytest.raises(KeyNotAttested, match="did not generate the key"):
                check_never_extractable(attested)

    def test_whether_it_may_leave(self) -> None:
        attested = checked(CHAIN.attest(KEY, e5=der(3, b"\0" + (1 << 7 | 1 << 16).to_bytes(8))))
        assert attested.capabilities == ("sign-ecdsa", "exportable-under-wrap")
        assert attested.exportable
        with pytest.raises(KeyNotAttested, match="may leave its device"):
            check_never_extractable(attested)

    @pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 9])
    def test_nothing_may_be_missing(self, number: int) -> None:
        refused(CHAIN.attest(KEY, **{f"e{number}": None}), "malformed")

    @pytest.mark.parametrize(
        ("number", "value"),
        [
            (1, der(4, b"\2\4")), (1, der(3, b"\2\4\0")), (1, der(4, b"\2\4\0\0")),
            (2, der(2, b"")), (2, der(2, b"\xff")), (2, der(2, b"\0\1")), (2, der(2, b"\1") + b"\0"),
            (2, b"\2\x81\1\1"), (2, b"\2\5\1"), (2, b"\2"), (2, b""),
            (3, der(3, b"\0\0")), (3, der(3, b"\0\3")), (3, der(3, b"\0\x21")), (3, der(3, b"\7\x80")),
            (3, der(3, b"\0")), (3, der(3, b"")), (3, der(3, b"\0\1\0")), (3, der(2, b"\1")),
            (3, der(12, b"generated")),
            (4, der(3, b"\7\0\x80")), (4, der(3, b"\0\1")), (4, der(3, b"\0\0\0\1")),
            (5, der(3, b"\0" + bytes(7))), (5, der(3, b"\0" + bytes(9))), (5, der(3, b"\0\1" + bytes(7))),
            (6, der(2, b"\x80\0")), (6, der(4, b"\1")),
            (9, der(12, b"\xff")), (9, der(19, b"label")),
        ],
    )  # fmt: skip
    def test_malformed(self, number: int, value: bytes) -> None:
        refused(CHAIN.attest(KEY, **{f"e{number}": value}), "malformed")

    def test_an_empty_label_and_a_long_one(self) -> None:
        for label in ("", "L" * 40):
            assert checked(CHAIN.attest(KEY, e9=der(12, label.encode()))).label == label


GOOD = CHAIN.attest(KEY)


class TestHostile:
    @pytest.mark.parametrize("junk", [b"", b"0", b"\x30\x80", bytes(1000), GOOD.certificate[:-1]])
    def test_what_is_no_certificate(self, junk: bytes) -> None:
        refused(Attestation(junk, GOOD.issuers), "malformed")
        refused(Attestation(GOOD.certificate, (junk,)), "malformed")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # cryptography's, of odd values
    @settings(deadline=None, max_examples=400)
    @given(st.booleans(), st.integers(0, 10_000), st.binary(max_size=3), st.integers(0, 3))
    def test_a_change_anywhere(self, leaf: bool, at: int, put: bytes, instead_of: int) -> None:
        whole = GOOD.certificate if leaf else CHAIN.device.der
        at %= len(whole)
        changed = whole[:at] + put + whole[at + instead_of :]
        if changed != whole:
            refused(Attestation(changed if leaf else GOOD.certificate, (CHAIN.device.der if leaf else changed,)), ".")

    @settings(deadline=None, max_examples=200)
    @given(st.sampled_from([1, 2, 3, 4, 5, 6, 9]), st.binary(max_size=12))
    def test_whatever_a_device_may_sign(self, number: int, value: bytes) -> None:
        attestation = CHAIN.attest(KEY, **{f"e{number}": value})
        try:
            attested = checked(attestation)
        except KeyNotAttested:
            return
        assert (attested.serial, attested.id) == (SERIAL, ID)


class TestYubico:
    def test_its_published_certificates_are_pinned(self, tmp_path: Path) -> None:
        root, sub = yubico_roots()
        # as published; the whole certificate counts
        assert root.fingerprint(hashes.SHA256()).hex() == (
            "094a3ac493c2bdcd65a54bdf40190f52bb03f7156397a3fc69d8aa9a392fb724"
        )
        assert sub.fingerprint(hashes.SHA256()).hex() == (
            "d7c6d8f45208e2a53996fb5a8f4d631b33ebabb64956b37b2ac151fbdbaf4ae9"
        )
        for name, certificate in (("root.pem", root), ("sub.pem", sub)):
            (tmp_path / name).write_bytes(certificate.public_bytes(Encoding.PEM))
        subprocess.run(["openssl", "verify", "-CAfile", "root.pem", "sub.pem"], cwd=tmp_path, check=True)
