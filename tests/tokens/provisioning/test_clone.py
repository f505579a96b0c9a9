import json
import secrets
from collections.abc import Callable
from itertools import combinations

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from yubihsm.defs import ALGORITHM, CAPABILITY, COMMAND, ERROR, OBJECT, ORIGIN
from yubihsm.exceptions import YubiHsmDeviceError
from yubihsm.objects import AsymmetricKey, HmacKey, Opaque, SymmetricKey, WrapKey

from tests.tokens.provisioning.conftest import AUTH_KEYS, Bench
from tokens.errors import KeyMismatch, KeyUnusable, ProviderRefused, ProviderUnavailable
from tokens.provisioning import proof
from tokens.provisioning.clone import Comparison, clone, named
from tokens.provisioning.declaration import Declaration, load
from tokens.provisioning.setup import set_up
from tokens.provisioning.transcript import Transcript

KEYS = """
[[keys]]
id = 0x0100
label = "rsa"
algorithm = "rsa2048"
domains = [1]
capabilities = ["sign-pkcs"]
exportable = true
generate = true

[[keys]]
id = 0x0101
label = "ec"
algorithm = "ecp384"
domains = [1]
capabilities = ["sign-ecdsa"]
exportable = true
generate = true

[[keys]]
id = 0x0102
label = "ed"
algorithm = "ed25519"
domains = [1]
capabilities = ["sign-eddsa"]
exportable = true
generate = true

[[keys]]
id = 0x0103
label = "hmac"
algorithm = "hmac-sha512"
domains = [1]
capabilities = ["sign-hmac"]
exportable = true
generate = true

[[keys]]
id = 0x0104
label = "aes"
algorithm = "aes128"
domains = [1]
capabilities = ["encrypt-ecb", "decrypt-ecb"]
exportable = true
generate = true
"""
ONE_KEY = KEYS[KEYS.index("[[keys]]\nid = 0x0101") : KEYS.index("[[keys]]\nid = 0x0102")]
BOUND = ONE_KEY.replace("0101", "0105").replace('"ec"', '"bound"').replace("exportable = true\n", "")
USERS = (
    AUTH_KEYS
    + """
[auth_keys.hasher]
id = 5
capabilities = ["sign-hmac", "encrypt-ecb"]
domains = [1]
password = { file = "DIRECTORY/hasher.password" }
"""
)
SPLIT = """
[wrap_key]
id = 0x0010
label = "wrap"
domains = [1]
split = { threshold = 2, files = ["DIRECTORY/share1", "DIRECTORY/share2", "DIRECTORY/share3"] }
"""


def combine(source: Bench, *numbers: int) -> str:
    files = json.dumps([str(source.directory / f"share{number}") for number in numbers])
    return f'[wrap_key]\nid = 0x0010\nlabel = "wrap"\ndomains = [1]\ncombine = {files}\n'


def quiet(_: str) -> None:
    """Hears nothing."""


def made(bench: Bench, *tables: str, auth_keys: str = AUTH_KEYS) -> Declaration:
    """Sets the bench's device up."""
    declaration = load(bench.file(*tables, auth_keys=auth_keys))
    set_up(declaration, bench.directory / f"{secrets.token_hex(4)}.jsonl", quiet)
    return declaration


@pytest.fixture
def source(make_bench: Callable[[int], Bench]) -> Bench:
    return make_bench(1001)


@pytest.fixture
def target(make_bench: Callable[[int], Bench]) -> Bench:
    return make_bench(1002)


def copy(one: Declaration, other: Declaration, target: Bench, tell: Callable[[str], None] = quiet) -> Comparison:
    with clone(one, other) as cloning, Transcript(target.directory / f"{secrets.token_hex(4)}.jsonl") as transcript:
        comparison = cloning.compare()
        cloning.run(comparison, transcript, tell)
        return comparison


def ids(infos: list[object]) -> list[int]:
    return [info.id for info in infos]  # type: ignore[attr-defined]


class TestClone:
    def test_the_copies_are_the_keys(self, source: Bench, target: Bench) -> None:
        one = made(source, SPLIT, KEYS, auth_keys=USERS)
        other = made(target, combine(source, 1, 3), auth_keys=USERS)
        told: list[str] = []
        assert ids(copy(one, other, target, told.append).copies) == [0x100, 0x101, 0x102, 0x103, 0x104]
        proofs = "\n".join(told)
        assert proofs.count("a signature by the copy verifies with the source's public key") == 3
        assert proofs.count("both devices make the same of random data") == 2

        with source.admin() as admin, target.admin() as copied:
            for id_, type_ in (
                *((0x100 + number, OBJECT.ASYMMETRIC_KEY) for number in range(3)),
                (0x103, OBJECT.HMAC_KEY),
                (0x104, OBJECT.SYMMETRIC_KEY),
            ):
                original, new = (each.get_object(id_, type_).get_info() for each in (admin, copied))
                assert new.origin == original.origin | ORIGIN.IMPORTED_WRAPPED
                for name in ("label", "domains", "algorithm", "capabilities"):
                    assert getattr(new, name) == getattr(original, name)
            rsa, curve, edwards = (AsymmetricKey(admin, 0x100 + number).get_public_key() for number in range(3))
        with target.signer() as signer:
            data = b"an image"
            rsa.verify(AsymmetricKey(signer, 0x100).sign_pkcs1v1_5(data), data, padding.PKCS1v15(), hashes.SHA256())
            curve.verify(AsymmetricKey(signer, 0x101).sign_ecdsa(data), data, ec.ECDSA(hashes.SHA256()))
            edwards.verify(AsymmetricKey(signer, 0x102).sign_eddsa(data), data)
        password = source.password("hasher"), target.password("hasher")
        with source.session(5, password[0]) as a, target.session(5, password[1]) as b:
            assert HmacKey(a, 0x103).sign_hmac(data) == HmacKey(b, 0x103).sign_hmac(data)
            assert SymmetricKey(a, 0x104).encrypt_ecb(bytes(16)) == SymmetricKey(b, 0x104).encrypt_ecb(bytes(16))
        assert (source.device.sessions, target.device.sessions) == (0, 0)

    def test_certificates_go_along(self, source: Bench, target: Bench) -> None:
        one, other = made(source, SPLIT, ONE_KEY), made(target, combine(source, 1, 2))
        with source.admin() as admin:
            capabilities = CAPABILITY.EXPORTABLE_UNDER_WRAP
            Opaque.put(admin, 0x101, "ec", 1, capabilities, ALGORITHM.OPAQUE_X509_CERTIFICATE, b"a certificate")
        copy(one, other, target)
        with target.admin() as admin:
            assert Opaque(admin, 0x101).get() == b"a certificate"

    def test_a_second_run_copies_nothing(self, source: Bench, target: Bench) -> None:
        one, other = made(source, SPLIT, ONE_KEY), made(target, combine(source, 1, 2))
        assert ids(copy(one, other, target).copies) == [0x101]
        done = target.device.commands[COMMAND.IMPORT_WRAPPED]
        again = copy(one, other, target)
        assert (ids(again.copies), ids(again.there)) == ([], [0x101])
        assert target.device.commands[COMMAND.IMPORT_WRAPPED] == done

    def test_a_run_that_was_broken_off_is_taken_up(self, source: Bench, target: Bench) -> None:
        one, other = made(source, SPLIT, KEYS, auth_keys=USERS), made(target, combine(source, 1, 2), auth_keys=USERS)
        said: list[str] = []

        def tell(text: str) -> None:
            said.append(text)
            if len(said) == 3:
                source.device.faults.drop_before = 1

        with pytest.raises(ProviderUnavailable, match=r"The source \(1001\) does not answer"):
            copy(one, other, target, tell)
        rest = copy(one, other, target)
        assert (ids(rest.there), ids(rest.copies)) == ([0x100, 0x101], [0x102, 0x103, 0x104])
        with target.admin() as admin:
            assert len(admin.list_objects()) == 4 + 1 + 5

    def test_what_cannot_be_copied(self, source: Bench, target: Bench) -> None:
        one, other = made(source, SPLIT, ONE_KEY, BOUND), made(target, combine(source, 1, 2))
        with source.admin() as admin:
            capabilities = CAPABILITY.SIGN_ECDSA | CAPABILITY.EXPORTABLE_UNDER_WRAP
            AsymmetricKey.generate(admin, 0x106, "elsewhere", 0b11, capabilities, ALGORITHM.EC_P256)
        found = copy(one, other, target)
        assert (ids(found.copies), ids(found.bound)) == ([0x101], [0x105, 0x106])
        assert named(found.bound[0]) == 'asymmetric key 0x0105 "bound"'
        with source.admin() as admin, pytest.raises(YubiHsmDeviceError, match="INSUFFICIENT_PERMISSIONS"):
            WrapKey(admin, 0x10).export_wrapped(AsymmetricKey(admin, 0x105))

    def test_another_key_by_the_same_id(self, source: Bench, target: Bench) -> None:
        one, other = made(source, SPLIT, ONE_KEY), made(target, combine(source, 1, 2), ONE_KEY)
        found = copy(one, other, target)
        assert (ids(found.copies), ids(found.conflicts)) == ([], [0x101])

    def test_secret_keys_that_look_the_same_are_compared(self, source: Bench, target: Bench) -> None:
        hmac = KEYS[KEYS.index("[[keys]]\nid = 0x0103") :]
        one = made(source, SPLIT, hmac, auth_keys=USERS)
        other = made(target, combine(source, 1, 2), hmac, auth_keys=USERS)
        with pytest.raises(KeyMismatch, match="hold different keys 0x0103"):
            copy(one, other, target)

    def test_nobody_may_use_it(self, source: Bench, target: Bench) -> None:
        hmac = KEYS[KEYS.index("[[keys]]\nid = 0x0103") : KEYS.index("[[keys]]\nid = 0x0104")]
        elsewhere = AUTH_KEYS.replace("domains = [1]", "domains = [2]")
        one = made(source, SPLIT, hmac, auth_keys=elsewhere)
        other = made(target, combine(source, 1, 2), auth_keys=elsewhere)
        told: list[str] = []
        copy(one, other, target, told.append)
        assert told[-1] == 'The hmac key 0x0103 "hmac" is on both: not used: no declared authentication key may.'

    def test_a_key_that_signs_otherwise(self, source: Bench, target: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        one, other = made(source, SPLIT, ONE_KEY), made(target, combine(source, 1, 2))
        sign = proof._sign
        monkeypatch.setattr(proof, "_sign", lambda key, capability, _: sign(key, capability, b"other data"))
        with pytest.raises(KeyMismatch, match="signs with another key 0x0101"):
            copy(one, other, target)


class TestShares:
    @pytest.mark.parametrize("numbers", [*combinations((1, 2, 3), 2), (1, 2, 3)])
    def test_enough_of_them(self, source: Bench, target: Bench, numbers: tuple[int, ...]) -> None:
        one, other = made(source, SPLIT, ONE_KEY), made(target, combine(source, *numbers))
        assert ids(copy(one, other, target).copies) == [0x101]

    def test_too_few(self, source: Bench, target: Bench) -> None:
        made(source, SPLIT, ONE_KEY)
        with pytest.raises(KeyUnusable, match="2 different shares are needed, and 1 are there"):
            made(target, combine(source, 2, 2))
        assert target.is_new()

    def test_tampered(self, source: Bench, target: Bench) -> None:
        made(source, SPLIT, ONE_KEY)
        share = source.directory / "share1"
        words = share.read_text().split()
        words[9], words[10] = words[10], words[9] if words[9] != words[10] else "academic"
        share.write_text(" ".join(words))
        with pytest.raises(KeyUnusable, match="The shares give no wrap key"):
            made(target, combine(source, 1, 2))
        assert target.is_new()

    def test_of_another_wrap_key(self, source: Bench, target: Bench, make_bench: Callable[[int], Bench]) -> None:
        stranger = make_bench(1003)
        made(stranger, SPLIT)
        one, other = made(source, SPLIT, ONE_KEY), made(target, combine(stranger, 1, 2))
        with pytest.raises(ProviderRefused, match=r"The target \(1002\) cannot unwrap it: its wrap key 0x0010"):
            copy(one, other, target)
        with target.admin() as admin:
            assert not admin.list_objects(object_type=OBJECT.ASYMMETRIC_KEY)

    def test_the_wrap_key_itself_cannot_leave(self, source: Bench) -> None:
        made(source, SPLIT)
        with source.admin() as admin, pytest.raises(YubiHsmDeviceError, match="INSUFFICIENT_PERMISSIONS"):
            WrapKey(admin, 0x10).export_wrapped(WrapKey(admin, 0x10))


class TestRefused:
    def test_without_a_wrap_key(self, source: Bench, target: Bench) -> None:
        one, other = made(source, SPLIT), made(target)
        with pytest.raises(ProviderRefused, match=r"do not declare the same \[wrap_key\]"), clone(one, other):
            pass

    def test_a_device_without_it(self, source: Bench, target: Bench) -> None:
        one = made(source, SPLIT)
        made(target)
        other = load(target.file(combine(source, 1, 2)))
        with clone(one, other) as cloning, pytest.raises(ProviderRefused, match=r"\(1002\) has no wrap key 0x0010"):
            cloning.compare()

    def test_one_device_twice(self, source: Bench) -> None:
        one = made(source, SPLIT)
        with pytest.raises(ProviderRefused, match="for the same device"), clone(one, one):
            pass

    def test_the_admins_password(self, source: Bench, target: Bench) -> None:
        one, other = made(source, SPLIT), made(target, combine(source, 1, 2))
        (target.directory / "admin.password").write_text("another one")
        with pytest.raises(ProviderRefused, match="does not take the password"), clone(one, other):
            pass
        (target.directory / "admin.password").unlink()
        with pytest.raises(KeyUnusable, match="cannot be read"), clone(one, other):
            pass

    @pytest.mark.parametrize("error", [ERROR.LOG_FULL, ERROR.STORAGE_FAILED])
    def test_the_target_refuses(self, source: Bench, target: Bench, error: ERROR) -> None:
        one, other = made(source, SPLIT, ONE_KEY), made(target, combine(source, 1, 2))
        target.device.faults.next_errors.append((COMMAND.IMPORT_WRAPPED, error))
        with pytest.raises(ProviderRefused, match=rf"The target \(1002\) answers {error.name}") as caught:
            copy(one, other, target)
        assert caught.value.hint
        assert ids(copy(one, other, target).copies) == [0x101]
