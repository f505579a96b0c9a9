import datetime
import itertools
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hmac import HMAC
from yubihsm.core import AuthSession
from yubihsm.defs import ALGORITHM, AUDIT, CAPABILITY, COMMAND, ERROR, OBJECT, ORIGIN
from yubihsm.exceptions import YubiHsmDeviceError
from yubihsm.objects import (
    AsymmetricKey,
    AuthenticationKey,
    HmacKey,
    Opaque,
    WrapKey,
)

from tests.tokens.provisioning.conftest import EC_KEY, Bench
from tokens.errors import KeyMismatch, KeyUnusable, ProviderProblem, ProviderRefused, ProviderUnavailable
from tokens.provisioning import setup as provisioning
from tokens.provisioning.capabilities import ADMIN_DELEGATES, CAPABILITIES, ROLES, WRAP_DELEGATES, WRAPS
from tokens.provisioning.declaration import load
from tokens.provisioning.plan import AUDITED, plan
from tokens.provisioning.setup import SetupFailed, look, set_up
from yubihsm_simulator import Device

PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER
AUDIT_TABLE = '[audit]\ncommands = "fixed"\nforce = "on"\n'
WRAP_KEY = """
[wrap_key]
id = 0x0010
label = "wrap"
domains = [1, 2]
split = { threshold = 2, files = ["DIRECTORY/share1", "DIRECTORY/share2", "DIRECTORY/share3"] }
"""
HMAC_KEY = """
[[keys]]
id = 0x0103
label = "hmac"
algorithm = "hmac-sha256"
domains = [2]
capabilities = ["sign-hmac", "verify-hmac"]
import = { file = "DIRECTORY/hmac.key" }
"""
EVERYTHING = f"""{HMAC_KEY}
[[keys]]
id = 0x0101
label = "imported rsa"
algorithm = "rsa2048"
domains = [1]
capabilities = ["sign-pkcs", "sign-pss"]
exportable = true
import = {{ file = "DIRECTORY/rsa.pem", passphrase = {{ file = "DIRECTORY/passphrase" }} }}
certificate = "DIRECTORY/rsa.crt"

[[keys]]
id = 0x0102
label = "ed25519"
algorithm = "ed25519"
domains = [1, 3]
capabilities = ["sign-eddsa"]
generate = true

[[keys]]
id = 0x0104
label = "aes"
algorithm = "aes256"
domains = [2]
capabilities = ["encrypt-cbc", "decrypt-cbc"]
generate = true
"""


@pytest.fixture(scope="session")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def certify(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "imported rsa")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    return builder.sign(key, hashes.SHA256())


@pytest.fixture
def files(bench: Bench, rsa_key: rsa.RSAPrivateKey) -> Path:
    """What EVERYTHING imports."""
    directory = bench.directory
    encrypted = serialization.BestAvailableEncryption(b"a passphrase")
    (directory / "rsa.pem").write_bytes(rsa_key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, encrypted))
    (directory / "passphrase").write_text("a passphrase\n")
    (directory / "rsa.crt").write_bytes(certify(rsa_key).public_bytes(PEM))
    (directory / "hmac.key").write_bytes(bytes(range(32)))
    return directory


def quiet(_: str) -> None:
    """Hears nothing."""


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(session: AuthSession, command: COMMAND, data: bytes = b"") -> ERROR:
    with pytest.raises(YubiHsmDeviceError) as caught:
        session.send_secure_cmd(command, data)
    return caught.value.code


class TestEverything:
    def test_the_device_holds_what_was_declared(self, bench: Bench, files: Path, rsa_key: rsa.RSAPrivateKey) -> None:
        declaration = bench.declare(AUDIT_TABLE, WRAP_KEY, EC_KEY, EVERYTHING)
        told: list[str] = []
        set_up(declaration, bench.transcript, told.append)
        assert told == [str(step) for step in plan(declaration)]

        with bench.admin() as admin:
            infos = [each.get_info() for each in admin.list_objects()]
            held = {(info.object_type, info.id): info for info in infos}
            assert {(int(type_), id_) for type_, id_ in held} == {
                *((OBJECT.AUTHENTICATION_KEY, id_) for id_ in (2, 3, 4)),
                (OBJECT.WRAP_KEY, 0x10),
                *((OBJECT.ASYMMETRIC_KEY, id_) for id_ in (0x100, 0x101, 0x102)),
                (OBJECT.OPAQUE, 0x101),
                (OBJECT.HMAC_KEY, 0x103),
                (OBJECT.SYMMETRIC_KEY, 0x104),
            }
            assert admin.get_force_audit() is AUDIT.ON
            audits = admin.get_command_audit()
            assert {command for command, value in audits.items() if value is AUDIT.FIXED} == AUDITED
            assert {value for command, value in audits.items() if command not in AUDITED} == {AUDIT.OFF}
            assert Opaque(admin, 0x101).get_certificate().public_key() == rsa_key.public_key()
            assert AsymmetricKey(admin, 0x101).get_public_key() == rsa_key.public_key()

        for id_, role, domains in ((2, "admin", 0xFFFF), (3, "signer", 1), (4, "auditor", 0xFFFF)):
            info = held[OBJECT.AUTHENTICATION_KEY, id_]
            delegated = ADMIN_DELEGATES if role == "admin" else 0
            assert (info.label, info.capabilities, info.domains) == (role, ROLES[role], domains)
            assert info.delegated_capabilities == delegated
        wrap = held[OBJECT.WRAP_KEY, 0x10]
        assert (wrap.capabilities, wrap.delegated_capabilities, wrap.domains) == (WRAPS, WRAP_DELEGATES, 0b11)
        exportable = CAPABILITY.EXPORTABLE_UNDER_WRAP
        imported = held[OBJECT.ASYMMETRIC_KEY, 0x101]
        assert imported.capabilities == CAPABILITY.SIGN_PKCS | CAPABILITY.SIGN_PSS | exportable
        assert (imported.origin, imported.label) == (ORIGIN.IMPORTED, "imported rsa")
        opaque = held[OBJECT.OPAQUE, 0x101]
        assert (opaque.label, opaque.domains, opaque.capabilities) == ("imported rsa", 1, exportable)
        generated = held[OBJECT.ASYMMETRIC_KEY, 0x102]
        assert (generated.origin, generated.capabilities) == (ORIGIN.GENERATED, CAPABILITY.SIGN_EDDSA)
        assert (generated.algorithm, generated.domains) == (ALGORITHM.EC_ED25519, 0b101)
        assert bench.device.sessions == 0

    def test_the_keys_sign(self, bench: Bench, files: Path, rsa_key: rsa.RSAPrivateKey) -> None:
        set_up(bench.declare(AUDIT_TABLE, WRAP_KEY, EC_KEY, EVERYTHING), bench.transcript, quiet)
        data = b"an image"
        with bench.signer() as signer:
            public = AsymmetricKey(signer, 0x100).get_public_key()
            public.verify(AsymmetricKey(signer, 0x100).sign_ecdsa(data), data, ec.ECDSA(hashes.SHA256()))
            signature = AsymmetricKey(signer, 0x101).sign_pkcs1v1_5(data)
            rsa_key.public_key().verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
            public = AsymmetricKey(signer, 0x102).get_public_key()
            public.verify(AsymmetricKey(signer, 0x102).sign_eddsa(data), data)

    def test_the_transcript(self, bench: Bench, files: Path, rsa_key: rsa.RSAPrivateKey) -> None:
        declaration = bench.declare(AUDIT_TABLE, WRAP_KEY, EC_KEY, EVERYTHING)
        set_up(declaration, bench.transcript, quiet)
        begin, *steps = records(bench.transcript)
        assert (begin["event"], begin["serial"], begin["firmware"]) == ("begin", 7550099, "2.4.0")
        assert [each["step"] for each in steps] == [str(step) for step in plan(declaration)]
        assert stat.S_IMODE(bench.transcript.stat().st_mode) == 0o600
        with bench.admin() as admin:
            for each in steps:
                if "public_key" in each:
                    shown = serialization.load_pem_public_key(each["public_key"].encode())
                    assert shown == AsymmetricKey(admin, each["object"]["id"]).get_public_key()
        attested = [x509.load_pem_x509_certificate(each["attestation"].encode()) for each in steps if "issuer" in each]
        root = x509.load_pem_x509_certificate(bench.device.attestation_root)
        chain = [x509.load_der_x509_certificate(der) for der in bench.device.attestation_issuers]
        assert len(attested) == 3
        assert chain[-1] == root
        for certificate, each in zip(attested, [each for each in steps if "issuer" in each], strict=True):
            issuer = x509.load_pem_x509_certificate(each["issuer"].encode())
            for below, above in itertools.pairwise([certificate, issuer, *chain]):
                below.verify_directly_issued_by(above)
        listed = [each["id"] for each in steps[-1]["objects"]]
        assert listed == [2, 3, 4, 0x10, 0x100, 0x101, 0x101, 0x102, 0x103, 0x104]
        assert steps[-4]["entries"][0].startswith("0001" + "ff" * 14)

    def test_no_secret_is_told(self, bench: Bench, files: Path, rsa_key: rsa.RSAPrivateKey) -> None:
        told: list[str] = []
        set_up(bench.declare(AUDIT_TABLE, WRAP_KEY, EC_KEY, EVERYTHING), bench.transcript, told.append)
        said = bench.transcript.read_text() + "".join(told)
        secrets = [bench.password(name) for name in ("admin", "signer", "auditor")]
        secrets += [(files / f"share{number}").read_text().strip() for number in (1, 2, 3)]
        numbers = rsa_key.private_numbers()
        secrets += ["a passphrase", bytes(range(32)).hex(), f"{numbers.p:x}", f"{numbers.d:x}"]
        assert not [secret for secret in secrets if secret in said]
        for name in ("admin.password", "signer.password", "auditor.password", "share1", "share2", "share3"):
            assert stat.S_IMODE((files / name).stat().st_mode) == 0o600

    def test_the_passwords_are_their_own(self, bench: Bench, files: Path) -> None:
        set_up(bench.declare(), bench.transcript, quiet)
        passwords = [bench.password(name) for name in ("admin", "signer", "auditor")]
        assert len(set(passwords)) == 3
        assert min(map(len, passwords)) == 32

    def test_passwords_that_are_there_are_used(self, bench: Bench) -> None:
        (bench.directory / "signer.password").write_text("chosen by the operator\n")
        set_up(bench.declare(EC_KEY), bench.transcript, quiet)
        with bench.session(3, "chosen by the operator") as signer:
            assert AsymmetricKey(signer, 0x100).sign_ecdsa(b"x")


class TestLeastPrivilege:
    @pytest.fixture(autouse=True)
    def _set_up(self, bench: Bench, files: Path) -> None:
        set_up(bench.declare(WRAP_KEY, EC_KEY, EVERYTHING), bench.transcript, quiet)

    @pytest.mark.parametrize("name", ["signer", "auditor", "admin"])
    def test_what_a_role_lacks_is_refused(self, bench: Bench, name: str) -> None:
        """Each command that needs a capability, by the capability's bit (section 3.4 of the vendor's documentation)."""
        needs = {
            COMMAND.RESET_DEVICE: CAPABILITY.RESET_DEVICE,
            COMMAND.PUT_AUTHENTICATION_KEY: CAPABILITY.PUT_AUTHENTICATION_KEY,
            COMMAND.PUT_ASYMMETRIC_KEY: CAPABILITY.PUT_ASYMMETRIC,
            COMMAND.GENERATE_ASYMMETRIC_KEY: CAPABILITY.GENERATE_ASYMMETRIC_KEY,
            COMMAND.SIGN_PKCS1: CAPABILITY.SIGN_PKCS,
            COMMAND.SIGN_PSS: CAPABILITY.SIGN_PSS,
            COMMAND.SIGN_ECDSA: CAPABILITY.SIGN_ECDSA,
            COMMAND.SIGN_EDDSA: CAPABILITY.SIGN_EDDSA,
            COMMAND.DECRYPT_PKCS1: CAPABILITY.DECRYPT_PKCS,
            COMMAND.EXPORT_WRAPPED: CAPABILITY.EXPORT_WRAPPED,
            COMMAND.IMPORT_WRAPPED: CAPABILITY.IMPORT_WRAPPED,
            COMMAND.PUT_WRAP_KEY: CAPABILITY.PUT_WRAP_KEY,
            COMMAND.GENERATE_WRAP_KEY: CAPABILITY.GENERATE_WRAP_KEY,
            COMMAND.GET_LOG_ENTRIES: CAPABILITY.GET_LOG_ENTRIES,
            COMMAND.SET_OPTION: CAPABILITY.SET_OPTION,
            COMMAND.GET_PSEUDO_RANDOM: CAPABILITY.GET_PSEUDO_RANDOM,
            COMMAND.SIGN_HMAC: CAPABILITY.SIGN_HMAC,
            COMMAND.WRAP_DATA: CAPABILITY.WRAP_DATA,
            COMMAND.CHANGE_AUTHENTICATION_KEY: CAPABILITY.CHANGE_AUTHENTICATION_KEY,
            COMMAND.ENCRYPT_CBC: CAPABILITY.ENCRYPT_CBC,
        }
        id_ = {"admin": 2, "signer": 3, "auditor": 4}[name]
        with bench.session(id_, bench.password(name)) as session:
            for command, capability in needs.items():
                if not ROLES[name] & capability:  # type: ignore[index]
                    # long enough for any of these commands to get as far as asking for its capability
                    assert refused(session, command, b"\1\0" + bytes(60)) is ERROR.INSUFFICIENT_PERMISSIONS, command

    def test_the_signer_sees_its_domains_only(self, bench: Bench) -> None:
        with bench.signer() as signer:
            assert {each.id for each in signer.list_objects()} == {2, 3, 4, 0x10, 0x100, 0x101, 0x102}
            with pytest.raises(YubiHsmDeviceError, match="OBJECT_NOT_FOUND"):
                HmacKey(signer, 0x103).get_info()
            with pytest.raises(YubiHsmDeviceError, match="INSUFFICIENT_PERMISSIONS"):
                AuthenticationKey(signer, 2).delete()

    def test_the_auditor_reads_logs(self, bench: Bench) -> None:
        with bench.session(4, bench.password("auditor")) as auditor:
            log = auditor.get_log_entries()
            auditor.set_log_index(log.entries[-1].number)
            assert COMMAND.DELETE_OBJECT in [entry.command for entry in log.entries]

    def test_the_admin_cannot_make_itself_a_wrap_key(self, bench: Bench) -> None:
        """Nor an authentication key that could: the exportable keys would be its own."""
        with bench.admin() as admin:
            capabilities = CAPABILITY.PUT_WRAP_KEY
            with pytest.raises(YubiHsmDeviceError, match="INSUFFICIENT_PERMISSIONS"):
                AuthenticationKey.put_derived(admin, 9, "x", 0xFFFF, capabilities, CAPABILITY.NONE, "a password")
            with pytest.raises(YubiHsmDeviceError, match="INSUFFICIENT_PERMISSIONS"):
                WrapKey.put(admin, 9, "x", 1, WRAPS, ALGORITHM.AES256_CCM_WRAP, CAPABILITY.NONE, bytes(32))

    def test_the_admin_makes_keys_and_authentication_keys(self, bench: Bench) -> None:
        with bench.admin() as admin:
            capabilities = CAPABILITY.SIGN_ECDSA | CAPABILITY.EXPORTABLE_UNDER_WRAP
            AsymmetricKey.generate(admin, 0x200, "later", 1, capabilities, ALGORITHM.EC_P256)
            for id_, role in ((0x20, "signer"), (0x21, "auditor")):
                capabilities = ROLES[role]  # type: ignore[index]
                AuthenticationKey.put_derived(admin, id_, role, 1, capabilities, CAPABILITY.NONE, "a password")
        with bench.session(0x20, "a password") as signer:
            assert AsymmetricKey(signer, 0x200).sign_ecdsa(b"x")


class TestRefused:
    def test_another_device(self, bench: Bench) -> None:
        other = bench.file(EC_KEY, serial=7550100)
        with pytest.raises(ProviderRefused, match="has the serial number 7550099, not 7550100"):
            set_up(load(other), bench.transcript, quiet)
        with pytest.raises(ProviderRefused, match="has the serial number 7550099, not 7550100"):
            look(load(other).device)
        assert bench.is_new()
        assert [path.name for path in bench.directory.iterdir()] == ["setup.toml"]

    def test_no_device(self, bench: Bench) -> None:
        declaration = bench.declare()
        bench.device.faults.unplugged = True
        with pytest.raises(ProviderUnavailable, match="does not answer"):
            set_up(declaration, bench.transcript, quiet)
        assert "does not answer" in look(declaration.device)
        bench.connector.stop()
        with pytest.raises(ProviderUnavailable, match="does not answer"):
            set_up(declaration, bench.transcript, quiet)

    def test_no_usb_device(self, bench: Bench) -> None:
        path = bench.file()
        path.write_text(path.read_text().replace(bench.connector.url, "yhusb://"))
        with pytest.raises(ProviderUnavailable):
            set_up(load(path), bench.transcript, quiet)

    def test_what_is_no_device(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        declaration = bench.declare()
        for answer in (b"", b"\x86\0\1\0", b"<html>not a connector</html>"):
            monkeypatch.setattr(bench.device, "process", lambda _, answer=answer: answer)
            with pytest.raises(ProviderProblem, match="makes no sense"):
                set_up(declaration, bench.transcript, quiet)

    def test_a_look_changes_nothing(self, bench: Bench) -> None:
        assert look(bench.declare().device) == "The device is there: 7550099, firmware 2.4.0."
        assert bench.device.commands.keys() == {COMMAND.DEVICE_INFO}

    def test_a_device_that_holds_something(self, bench: Bench) -> None:
        with bench.session(1, "password") as session:
            AsymmetricKey.generate(session, 5, "theirs", 1, CAPABILITY.SIGN_ECDSA, ALGORITHM.EC_P256)
        with pytest.raises(ProviderRefused, match=r"is not new: it holds asymmetric key 0x0005\.") as caught:
            set_up(bench.declare(), bench.transcript, quiet)
        assert caught.value.hint.startswith("Reset the device")
        with bench.session(1, "password") as session:
            assert len(session.list_objects()) == 2
        assert not bench.transcript.exists()

    def test_a_device_that_was_set_up_before(self, bench: Bench) -> None:
        set_up(bench.declare(), bench.transcript, quiet)
        with pytest.raises(ProviderRefused, match="is not new: it has no authentication key 0x0001"):
            set_up(bench.declare(), bench.directory / "second", quiet)

    def test_another_password(self, bench: Bench) -> None:
        with bench.session(1, "password") as session:
            AuthenticationKey(session, 1).change_password("something else")
        with pytest.raises(ProviderRefused, match="is not new: it does not take the factory password"):
            set_up(bench.declare(), bench.transcript, quiet)

    def test_force_audit(self, bench: Bench) -> None:
        with bench.session(1, "password") as session:
            session.set_force_audit(AUDIT.ON)
        with pytest.raises(ProviderRefused, match="is not new: its force-audit is set"):
            set_up(bench.declare(), bench.transcript, quiet)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("rsa.pem", None, "rsa.pem cannot be read: No such file"),
            ("rsa.pem", b"no key", "holds no private key that can be read"),
            ("passphrase", b"wrong", "or the passphrase is wrong"),
            ("passphrase", b"", "is encrypted"),
            ("rsa.crt", b"no certificate", "holds no certificate"),
            ("hmac.key", bytes(65), "hmac.key has 65 bytes, and a key of hmac-sha256 has 64"),
            ("share2", b"old", "share2 is there already"),
            ("signer.password", b"short", "has not 8 to 64 characters"),
            ("signer.password", b"password", "is the factory's"),
            ("signer.password", b"\xff" * 10, "is not UTF-8"),
        ],
    )
    def test_files_that_do_not_fit(
        self, bench: Bench, files: Path, name: str, content: bytes | None, message: str
    ) -> None:
        path = files / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with pytest.raises(KeyUnusable, match=message):
            set_up(bench.declare(WRAP_KEY, EVERYTHING), bench.transcript, quiet)
        assert bench.is_new()
        assert not (files / "share1").exists()
        assert not (files / "admin.password").exists()

    def test_keys_that_do_not_fit(self, bench: Bench, files: Path) -> None:
        other = ec.generate_private_key(ec.SECP256R1())
        (files / "rsa.crt").write_bytes(certify(other).public_bytes(DER))
        with pytest.raises(KeyMismatch, match="not for the granted key"):
            set_up(bench.declare(EVERYTHING, WRAP_KEY), bench.transcript, quiet)
        unencrypted = serialization.NoEncryption()
        (files / "rsa.pem").write_bytes(other.private_bytes(DER, serialization.PrivateFormat.PKCS8, unencrypted))
        with pytest.raises(KeyUnusable, match="is not one of rsa2048"):
            set_up(bench.declare(EVERYTHING, WRAP_KEY), bench.directory / "second", quiet)
        assert bench.is_new()

    def test_a_share_that_cannot_be_written(self, bench: Bench) -> None:
        wrap_key = WRAP_KEY.replace("DIRECTORY/share2", "DIRECTORY/unplugged/share2")
        with pytest.raises(KeyUnusable, match="share2 cannot be written"):
            set_up(bench.declare(wrap_key), bench.transcript, quiet)
        assert not (bench.directory / "share1").exists()
        assert bench.is_new()

    def test_a_transcript_that_is_there(self, bench: Bench) -> None:
        bench.transcript.write_text("of another time")
        with pytest.raises(KeyUnusable, match="cannot be made: File exists"):
            set_up(bench.declare(), bench.transcript, quiet)
        assert bench.is_new()
        assert bench.transcript.read_text() == "of another time"


class TestInterrupted:
    """Whatever fails, and wherever: the device is new again, or has no key that the factory password opens."""

    TABLES = (AUDIT_TABLE, WRAP_KEY, EC_KEY, EVERYTHING)
    QUICK = (AUDIT_TABLE, WRAP_KEY, EC_KEY, HMAC_KEY)

    @pytest.mark.parametrize(
        "command",
        [
            COMMAND.PUT_AUTHENTICATION_KEY,
            COMMAND.CHANGE_AUTHENTICATION_KEY,
            COMMAND.PUT_WRAP_KEY,
            COMMAND.GENERATE_ASYMMETRIC_KEY,
            COMMAND.PUT_ASYMMETRIC_KEY,
            COMMAND.PUT_OPAQUE,
            COMMAND.SIGN_ATTESTATION_CERTIFICATE,
            COMMAND.GET_PUBLIC_KEY,
            COMMAND.PUT_HMAC_KEY,
            COMMAND.GENERATE_SYMMETRIC_KEY,
            COMMAND.SET_LOG_INDEX,
            COMMAND.SET_OPTION,
            COMMAND.DELETE_OBJECT,
        ],
    )
    def test_the_device_refuses(self, bench: Bench, files: Path, command: COMMAND) -> None:
        bench.device.faults.next_errors.append((command, ERROR.STORAGE_FAILED))
        with pytest.raises(SetupFailed, match=r"This step failed: .*\n.* answers STORAGE_FAILED") as caught:
            set_up(bench.declare(*self.TABLES), bench.transcript, quiet)
        assert "The device was reset and is as new" in caught.value.hint
        assert bench.is_new()
        assert records(bench.transcript)[-1]["event"] == "failed"
        assert not list(files.glob("share*"))
        # and the same file then sets it up
        set_up(bench.declare(*self.TABLES), bench.directory / "second", quiet)
        assert bench.device.sessions == 0

    @pytest.mark.parametrize("answered", [True, False])
    def test_the_connection_breaks(self, bench: Bench, files: Path, answered: bool) -> None:
        """At the first request of every step, before or after the device has done it."""
        declaration = bench.declare(*self.QUICK)
        steps = [str(step) for step in plan(declaration)]
        for at, step in enumerate(steps):

            def tell(text: str, step: str = step) -> None:
                if text == step:
                    if answered:
                        bench.device.faults.drop_after = 1
                    else:
                        bench.device.faults.drop_before = 1

            with pytest.raises(SetupFailed, match="does not answer") as caught:
                set_up(declaration, bench.directory / f"transcript-{at}", tell)
            assert "The device was reset and is as new" in caught.value.hint, step
            assert bench.is_new(), step

    def test_the_answer_to_the_last_step_is_lost(self, bench: Bench) -> None:
        declaration = bench.declare(EC_KEY)
        [*_, last] = plan(declaration)

        def tell(text: str) -> None:
            if text == str(last):
                original = bench.device.process

                def process(request: bytes) -> bytes:
                    answer = original(request)
                    if bench.device.commands[COMMAND.DELETE_OBJECT]:
                        bench.device.process = original  # type: ignore[method-assign]
                        bench.device.faults.half_answers = 1
                    return answer

                bench.device.process = process  # type: ignore[method-assign]

        set_up(declaration, bench.transcript, tell)
        assert bench.device.faults.half_answers == 0
        assert bench.device.commands[COMMAND.DELETE_OBJECT] == 1
        with bench.admin() as admin:
            assert {each.id for each in admin.list_objects()} == {2, 3, 4, 0x100}

    def test_the_device_is_gone_for_good(self, bench: Bench, files: Path) -> None:
        """At every step: nothing is promised, and what is left obeys no factory password once it holds a key."""
        declaration = bench.declare(*self.QUICK)
        steps = [str(step) for step in plan(declaration)]
        for at, step in enumerate(steps):

            def tell(text: str, step: str = step) -> None:
                bench.device.faults.unplugged = text == step

            with pytest.raises(SetupFailed) as caught:
                set_up(declaration, bench.directory / f"transcript-{at}", tell)
            assert "could not be reset" in caught.value.hint
            assert "hold its metal rim" in caught.value.hint
            bench.device.faults.unplugged = False
            if at >= 1:
                with bench.admin() as admin:
                    held = {each.object_type for each in admin.list_objects()}
                with_factory = _takes_factory_password(bench)
                assert not (with_factory and held - {OBJECT.AUTHENTICATION_KEY}), step
                assert with_factory == (at == 1), step
            for path in files.glob("share*"):
                path.unlink()
            _reset_by_hand(bench)

    def test_the_operator_interrupts(self, bench: Bench) -> None:
        declaration = bench.declare(EC_KEY)

        def tell(text: str) -> None:
            if text.startswith("Generate"):
                raise KeyboardInterrupt

        with pytest.raises(SetupFailed, match="It was interrupted") as caught:
            set_up(declaration, bench.transcript, tell)
        assert "The device was reset and is as new" in caught.value.hint
        assert bench.is_new()

    def test_the_device_refuses_to_be_reset(self, bench: Bench) -> None:
        for command in (COMMAND.GENERATE_ASYMMETRIC_KEY, COMMAND.RESET_DEVICE):
            bench.device.faults.next_errors.append((command, ERROR.STORAGE_FAILED))
        with pytest.raises(SetupFailed) as caught:
            set_up(bench.declare(EC_KEY), bench.transcript, quiet)
        assert "could not be reset, and is half set up" in caught.value.hint
        with bench.admin() as admin:
            assert {each.id for each in admin.list_objects()} == {1, 2, 3, 4}
        assert not _takes_factory_password(bench)

    def test_the_reset_is_lost(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """A request that never came is no reset: the device is asked."""
        monkeypatch.setattr(AuthSession, "reset_device", AuthSession.close)
        bench.device.faults.next_errors.append((COMMAND.GENERATE_ASYMMETRIC_KEY, ERROR.STORAGE_FAILED))
        with pytest.raises(SetupFailed) as caught:
            set_up(bench.declare(EC_KEY), bench.transcript, quiet)
        assert "could not be reset, and is half set up" in caught.value.hint

    def test_a_device_that_makes_something_else(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(provisioning, "_header", lambda new: (new.id, new.label, new.domains & 2, new.capabilities))
        with pytest.raises(SetupFailed, match="has made something else of it"):
            set_up(bench.declare(EC_KEY), bench.transcript, quiet)
        assert bench.is_new()


def _takes_factory_password(bench: Bench) -> bool:
    try:
        with bench.session(1, "password"):
            return True
    except Exception:
        return False


def _reset_by_hand(bench: Bench) -> None:
    """As by holding the device's rim: a new one with the same serial number."""
    bench.device = bench.connector.device = Device(serial=bench.device.serial)


def test_firmware_2_5(bench: Bench, files: Path) -> None:
    bench.device = bench.connector.device = Device(serial=bench.device.serial, firmware=(2, 5, 0))
    set_up(bench.declare(AUDIT_TABLE, WRAP_KEY, EC_KEY, EVERYTHING), bench.transcript, quiet)
    assert records(bench.transcript)[0]["firmware"] == "2.5.0"


def test_capability_names_are_the_vendors() -> None:
    assert CAPABILITIES["put-mac-key"] is CAPABILITY.PUT_HMAC_KEY
    assert CAPABILITIES["delete-public-wrap-key"] is CAPABILITY.PUBLIC_WRAP_KEY_DELETE
    assert len(CAPABILITIES) == 56


def test_custom_capabilities(bench: Bench) -> None:
    table = '\n[auth_keys.hasher]\nid = 9\ncapabilities = ["sign-hmac"]\npassword = { file = "DIRECTORY/h.password" }\n'
    (bench.directory / "hmac.key").write_bytes(bytes(range(32)))
    set_up(bench.declare(table, HMAC_KEY), bench.transcript, quiet)
    with bench.session(9, bench.password("h")) as session:
        expected = HMAC(bytes(range(32)), hashes.SHA256())
        expected.update(b"data")
        assert HmacKey(session, 0x103).sign_hmac(b"data") == expected.finalize()
