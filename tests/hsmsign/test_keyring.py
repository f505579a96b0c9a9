import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hsmsign.keyring import Keyring
from hsmsign.settings import Grant, Settings
from signers.ekb import Ekb
from signers.registry import SIGNERS
from signers.swupdate import Swupdate
from tests.attestations import SERIAL, Chain, der
from tokens.attestation import Attested
from tokens.errors import (
    Error,
    KeyAmbiguous,
    KeyMismatch,
    KeyNotAttested,
    KeyNotFound,
    KeyNotGranted,
    KeyUnsuited,
    KeyUnusable,
    PinRefused,
    ProviderUnavailable,
)
from tokens.file import FileProvider, FileSettings
from tokens.pkcs11 import Pkcs11Provider, Pkcs11Settings
from tokens.provider import Attestation, KeyProvider, KeyReference, spki_sha256
from tokens.registry import create
from tokens.schemes import Ecdsa, Hash
from tokens.secret import SecretSource

DIGEST = bytes(range(32))


class Firmware(Swupdate):
    """A second signer, so that two can be granted one key."""

    name = "firmware"


class CountingProvider(FileProvider):
    """Key files, counting how often it is asked."""

    checks = 0

    async def check(self) -> None:
        self.checks += 1
        await asyncio.sleep(0.01)
        await super().check()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Key files a.key, b.key, c.key, and one for each of two distros."""
    for name in ("a.key", "b.key", "c.key", "one/swupdate/rsa.key", "two/swupdate/rsa.key"):
        write_key(tmp_path / name)
    return tmp_path


def write_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding, format_ = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    key = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(key.private_bytes(encoding, format_, serialization.NoEncryption()))
    path.chmod(0o600)


def spki_of(path: Path) -> str:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return spki_sha256(key.public_key())


def grant(name: str, object: str, **keys: Any) -> Grant:
    return Grant(**({"name": name, "signer": "swupdate", "role": "rsa", "provider": "files", "object": object} | keys))


@asynccontextmanager
async def running(settings: Settings, providers: dict[str, KeyProvider]) -> AsyncIterator[Keyring]:
    for provider in providers.values():
        await provider.start()
    try:
        yield Keyring(settings, providers, (*SIGNERS, Firmware(), OtherEkb()))
    finally:
        for provider in providers.values():
            await provider.stop()


@pytest.fixture
def keyring(root: Path) -> Callable[..., Any]:
    def keyring(*grants: Grant, **server: Any) -> Any:
        files = FileSettings(kind="file", root=root, aliases=("YubiHSM",))
        settings = Settings.model_validate({"server": server, "providers": {"files": files}, "grants": grants})
        return running(settings, {"files": CountingProvider("files", files)})

    return keyring


async def name_of(keyring: Keyring, root: Path, signer: str = "swupdate", role: str = "rsa", **asked: Any) -> str:
    """Which key file is opened, below the root."""
    async with keyring.keys(signer).open(role, **asked) as key:
        signature = await key.sign(Ecdsa(Hash.SHA256), DIGEST)
        assert len(signature) == 64
        opened = spki_sha256(key.public_key)
    return next(str(path.relative_to(root)) for path in root.rglob("*.key") if spki_of(path) == opened)


class TestChoice:
    async def test_by_signer_role_and_globs(self, keyring, root: Path) -> None:
        grants = (
            grant("a", "a.key", distro="poky*"),
            grant("b", "b.key", distro="acme"),
            grant("c", "c.key", role="cms"),
        )
        async with keyring(*grants) as keys:
            assert await name_of(keys, root, distro="poky-lts") == "a.key"
            assert await name_of(keys, root, distro="acme") == "b.key"
            assert await name_of(keys, root, role="cms", distro="anything") == "c.key"

    async def test_a_key_that_signs_no_more_after_its_job(self, keyring) -> None:
        async with keyring(grant("a", "a.key")) as keys:
            async with keys.keys("swupdate").open("rsa", distro="x") as key:
                await key.sign(Ecdsa(Hash.SHA256), DIGEST)
            with pytest.raises(Error):
                await key.sign(Ecdsa(Hash.SHA256), DIGEST)

    @pytest.mark.parametrize("asked", [{"distro": "other"}, {"distro": "POKY"}, {"machine": "poky"}, {}])
    async def test_no_grant_is_no_such_key(self, keyring, root: Path, asked: dict[str, str]) -> None:
        async with keyring(grant("a", "a.key", distro="poky")) as keys:
            with pytest.raises(KeyNotFound, match="No grant gives swupdate"):
                await name_of(keys, root, **asked)
            with pytest.raises(KeyNotFound, match="No grant gives firmware"):
                await name_of(keys, root, signer="firmware", distro="poky")

    async def test_a_template_is_filled_with_the_name_of_the_request(self, keyring, root: Path) -> None:
        async with keyring(
            grant("each", "{distro}/swupdate/rsa.key"), grant("c", "{distro}/rsa.key", role="cms")
        ) as keys:
            with pytest.raises(KeyNotFound):
                await name_of(keys, root, role="cms", distro="one/swupdate")
            assert await name_of(keys, root, distro="one") == "one/swupdate/rsa.key"
            assert await name_of(keys, root, distro="two") == "two/swupdate/rsa.key"
            for name in ("three", "..", "one/../two", "../" + root.name + "/one", "/etc", "", "a\0b"):
                with pytest.raises(KeyNotFound):
                    await name_of(keys, root, distro=name)

    async def test_two_that_match_are_refused_with_their_number(self, keyring, root: Path) -> None:
        async with keyring(grant("a", "a.key"), grant("b", "b.key", distro="poky")) as keys:
            assert await name_of(keys, root, distro="acme") == "a.key"
            with pytest.raises(KeyAmbiguous, match=r"2 grants match .*: a, b"):
                await name_of(keys, root, distro="poky")

    async def test_a_key_uri_narrows_and_never_widens(self, keyring, root: Path) -> None:
        async with keyring(grant("a", "a.key"), grant("b", "b.key")) as keys:
            assert await name_of(keys, root, distro="x", key_uri="pkcs11:object=b.key;pin-value=password") == "b.key"
            assert await name_of(keys, root, distro="x", key_uri="pkcs11:token=YubiHSM;object=a.key") == "a.key"
            for refused in ("pkcs11:object=c.key", "pkcs11:token=other;object=a.key", "nonsense"):
                with pytest.raises(KeyNotGranted):
                    await name_of(keys, root, distro="x", key_uri=refused)
            with pytest.raises(KeyAmbiguous):
                await name_of(keys, root, distro="x", key_uri="pkcs11:token=YubiHSM")

    async def test_a_grant_by_name(self, keyring, root: Path) -> None:
        async with keyring(grant("a", "a.key"), grant("each", "{distro}/swupdate/rsa.key", role="cms")) as keys:
            async with keys.open_grant("a") as key:
                assert spki_sha256(key.public_key) == spki_of(root / "a.key")
            for name in ("b", "each"):
                with pytest.raises(KeyNotFound, match=name):
                    async with keys.open_grant(name):
                        pass


class TestRightKey:
    async def test_a_pin_holds(self, keyring, root: Path) -> None:
        pinned = grant("a", "a.key", spki_sha256=spki_of(root / "a.key").upper())
        async with keyring(pinned, readiness_max_age_s=0) as keys:
            assert await name_of(keys, root, distro="x") == "a.key"
            write_key(root / "a.key")
            with pytest.raises(KeyMismatch, match="pins"):
                await name_of(keys, root, distro="x")
            assert [key.usable for key in (await keys.readiness()).keys] == [False]

    async def test_one_key_under_two_signers_is_refused_under_both_from_the_first_use(
        self, keyring, root: Path
    ) -> None:
        (root / "copy.key").write_bytes((root / "a.key").read_bytes())
        async with keyring(grant("ours", "a.key"), grant("theirs", "copy.key", signer="firmware")) as keys:
            for signer in ("swupdate", "firmware"):
                with pytest.raises(KeyMismatch, match=r"firmware and swupdate.*ours, theirs"):
                    await name_of(keys, root, signer=signer, distro="x")
            readiness = await keys.readiness()
            assert not readiness.ready
            assert [type(key.error) for key in readiness.keys] == [KeyMismatch, KeyMismatch]

    async def test_templates_are_bound_when_they_are_used_and_a_new_key_frees_the_old_one(
        self, keyring, root: Path
    ) -> None:
        shared = (root / "one/swupdate/rsa.key").read_bytes()
        (root / "b.key").write_bytes(shared)
        grants = grant("each", "{distro}/swupdate/rsa.key"), grant("theirs", "b.key", signer="firmware")
        async with keyring(*grants, readiness_max_age_s=0) as keys:
            assert await name_of(keys, root, signer="firmware", distro="x") in ("b.key", "one/swupdate/rsa.key")
            with pytest.raises(KeyMismatch):
                await name_of(keys, root, distro="one")
            with pytest.raises(KeyMismatch):
                await name_of(keys, root, signer="firmware", distro="x")
            write_key(root / "b.key")
            assert await name_of(keys, root, signer="firmware", distro="x") == "b.key"
            assert await name_of(keys, root, distro="one") == "one/swupdate/rsa.key"

    async def test_one_signer_may_use_one_key_twice(self, keyring, root: Path) -> None:
        async with keyring(grant("a", "a.key"), grant("b", "a.key", role="cms")) as keys:
            assert (await keys.readiness()).ready
            assert await name_of(keys, root, distro="x") == "a.key"


class OtherEkb(Ekb):
    """A second signer with a symmetric key."""

    name = "other-ekb"


class TestSymmetric:
    """Symmetric keys: bound to their signers by their place."""

    @pytest.fixture
    def fuses(self, root: Path) -> Path:
        """Two keys of fuses, and one that is a copy of the first."""
        for name, byte in (("a.fuse", "a1"), ("b.fuse", "b2"), ("copy.fuse", "a1")):
            (root / name).write_text(byte * 32)
            (root / name).chmod(0o600)
        return root

    @staticmethod
    def fuse(name: str, object: str, **keys: Any) -> Grant:
        return grant(name, object, **{"signer": "ekb", "role": "fuse", **keys})

    @staticmethod
    async def used(keyring: Keyring, signer: str = "ekb", machine: str = "x") -> bytes:
        async with keyring.keys(signer).open_symmetric("fuse", machine=machine) as key:
            return await key.encrypt_ecb(bytes(16))

    async def test_by_machine(self, keyring, fuses: Path) -> None:
        grants = self.fuse("a", "a.fuse", machine="one"), self.fuse("b", "{machine}.fuse", machine="b*")
        async with keyring(*grants) as keys:
            assert await self.used(keys, machine="one") != await self.used(keys, machine="b")
            with pytest.raises(KeyNotFound):
                await self.used(keys, machine="two")
            with pytest.raises(KeyNotFound):
                await self.used(keys, machine="bb")
            async with keys.keys("ekb").open_symmetric("fuse", machine="b") as key:
                pass
            with pytest.raises(ProviderUnavailable, match="ended"):
                await key.encrypt_ecb(bytes(16))

    async def test_one_place_under_two_signers_is_refused_under_both(self, keyring, fuses: Path) -> None:
        grants = self.fuse("ours", "a.fuse"), self.fuse("theirs", "a.fuse", signer="other-ekb")
        async with keyring(*grants, self.fuse("b", "b.fuse", machine="b")) as keys:
            for signer in ("ekb", "other-ekb"):
                with pytest.raises(KeyMismatch, match=r"ekb and other-ekb.*ours, theirs"):
                    await self.used(keys, signer, machine="x")
            ours, theirs, free = (await keys.readiness()).keys
            assert [type(state.error) for state in (ours, theirs)] == [KeyMismatch, KeyMismatch]
            assert free.usable

    async def test_a_copy_is_another_key(self, keyring, fuses: Path) -> None:
        grants = self.fuse("ours", "a.fuse"), self.fuse("theirs", "copy.fuse", signer="other-ekb")
        async with keyring(*grants) as keys:
            assert await self.used(keys) == await self.used(keys, "other-ekb")

    async def test_what_is_known_of_it(self, keyring, fuses: Path) -> None:
        (fuses / "short.fuse").write_text("00" * 15)
        grants = [self.fuse(name, f"{name}.fuse", machine=name) for name in ("a", "short")]
        async with keyring(*grants, self.fuse("each", "{machine}.fuse", machine="e*")) as keys:
            good, bad, each = (await keys.readiness()).keys
            assert (good.usable, good.algorithm, good.spki_sha256, good.public_key_pem) == (True, "AES-256", None, None)
            assert (bad.usable, type(bad.error)) == (False, KeyUnusable)
            assert (each.usable, each.algorithm) == (None, None)

    async def test_it_signs_nothing(self, keyring, fuses: Path) -> None:
        async with keyring(self.fuse("a", "a.fuse")) as keys:
            with pytest.raises(KeyNotFound, match="that signs is called a"):
                async with keys.open_grant("a"):
                    pass
            with pytest.raises(KeyNotFound, match="that signs is called a"):
                await keys.attest("a")


class AttestingProvider(FileProvider):
    """Key files on what calls itself a device: it attests them, with a root of the tests."""

    serial = SERIAL

    def __init__(self, name: str, settings: FileSettings) -> None:
        super().__init__(name, settings)
        self.chain = Chain()
        self.attestation_roots = self.chain.roots
        self.says: dict[str, bytes] = {}
        self.asked = 0

    def open(self, reference: KeyReference) -> Any:
        return super().open(replace(reference, id=None))

    async def attest(self, reference: KeyReference) -> Attestation:
        self.asked += 1
        async with self.open(reference) as key:
            return self.chain.attest(key.public_key, **self.says)


class TestAttested:
    """What `attested = true` in a grant asks for."""

    @pytest.fixture
    def device(self, root: Path) -> AttestingProvider:
        return AttestingProvider("files", FileSettings(kind="file", root=root))

    @staticmethod
    def attesting(device: AttestingProvider, *grants: Grant) -> Any:
        settings = Settings.model_validate(
            {
                "providers": {"files": {"kind": "file", "root": "/"}},
                "grants": grants or [grant("a", "a.key", attested=True)],
                "server": {"readiness_max_age_s": 0},
            }
        )
        return running(settings, {"files": device})

    async def test_a_key_that_is_attested_is_asked_for_once(self, device: AttestingProvider, root: Path) -> None:
        async with self.attesting(device) as keys:
            assert await asyncio.gather(*(name_of(keys, root, distro="x") for _ in range(20))) == 20 * ["a.key"]
            assert (await keys.readiness()).ready
            verdict = await keys.attest("a")
            assert isinstance(verdict.outcome, Attested)
            assert device.asked == 1
            write_key(root / "a.key")  # another key under the same name is asked for anew
            assert await name_of(keys, root, distro="x") == "a.key"
            assert device.asked == 2

    async def test_a_key_of_each_distro(self, device: AttestingProvider, root: Path) -> None:
        async with self.attesting(device, grant("each", "{distro}/swupdate/rsa.key", attested=True)) as keys:
            for distro in ("one", "two", "one"):
                assert await name_of(keys, root, distro=distro) == f"{distro}/swupdate/rsa.key"
            assert device.asked == 2
            with pytest.raises(KeyNotFound, match="one for each request"):
                await keys.attest("each")

    @pytest.mark.parametrize(
        ("says", "match"),
        [
            ({"e3": der(3, b"\0\2")}, "did not generate"),
            ({"e3": der(3, b"\0\x11")}, "came to it wrapped"),
            ({"e5": der(3, b"\0" + (1 << 16).to_bytes(8))}, "may leave"),
            ({"e2": der(2, b"\1")}, "comes from the device 1"),
            ({"e3": b""}, "malformed"),
        ],
    )
    async def test_a_key_of_which_it_is_not_proven_is_refused(
        self, device: AttestingProvider, root: Path, says: dict[str, bytes], match: str
    ) -> None:
        device.says = says
        free = grant("free", "a.key", role="cms")
        async with self.attesting(device, grant("a", "a.key", attested=True), free) as keys:
            for _ in range(2):
                with pytest.raises(KeyNotAttested, match=match):
                    await name_of(keys, root, distro="x")
            with pytest.raises(KeyNotAttested, match=match):
                async with keys.open_grant("a"):
                    pass
            state, other = (await keys.readiness()).keys
            assert (state.usable, type(state.error)) == (False, KeyNotAttested)
            assert (other.usable, device.asked) == (True, 1)

    @pytest.mark.parametrize("roots", [Chain().roots, (), None], ids=["others", "none", "Yubico's"])
    async def test_other_roots(self, device: AttestingProvider, root: Path, roots: Any) -> None:
        device.attestation_roots = roots
        async with self.attesting(device) as keys:
            with pytest.raises(KeyNotAttested, match="leads to no pinned certificate"):
                await name_of(keys, root, distro="x")

    async def test_the_object_that_the_grant_names(self, device: AttestingProvider) -> None:
        grants = [grant(name, "a.key", id=name) for name in ("0100", "0101")]
        async with self.attesting(device, *grants) as keys:
            assert isinstance((await keys.attest("0100")).outcome, Attested)
            assert isinstance((await keys.attest("0101")).outcome, KeyNotAttested)

    async def test_a_device_that_fails_is_asked_again(
        self, device: AttestingProvider, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def absent(reference: KeyReference) -> Attestation:
            raise ProviderUnavailable("Not there.")

        async with self.attesting(device) as keys:
            with monkeypatch.context() as patch:
                patch.setattr(device, "attest", absent)
                with pytest.raises(ProviderUnavailable):
                    await name_of(keys, root, distro="x")
            assert await name_of(keys, root, distro="x") == "a.key"

    async def test_a_provider_that_cannot(self, keyring, root: Path) -> None:
        async with keyring(grant("a", "a.key", attested=True)) as keys:
            with pytest.raises(KeyUnsuited, match="kind file cannot attest"):
                await name_of(keys, root, distro="x")
            with pytest.raises(KeyUnsuited):
                await keys.attest("a")


class TestReadiness:
    async def test_all_is_well(self, keyring, root: Path) -> None:
        async with keyring(grant("a", "a.key"), grant("each", "{distro}/x.key", role="cms")) as keys:
            readiness = await keys.readiness()
            assert readiness.ready
            assert readiness.providers == {"files": None}
            state, each = readiness.keys
            assert (state.name, state.kind, state.algorithm, state.usable) == ("a", "file", "P-256", True)
            assert state.spki_sha256 == spki_of(root / "a.key")
            assert state.public_key_pem is not None
            assert state.public_key_pem.startswith("-----BEGIN PUBLIC KEY")
            assert (each.usable, each.algorithm) == (None, None)
            assert any("each" in note for note in readiness.notes)

    async def test_a_template_with_one_possible_name_is_looked_at(self, keyring, root: Path) -> None:
        async with keyring(grant("one", "{distro}/swupdate/rsa.key", distro="one")) as keys:
            assert (await keys.describe(keys.grants[0])).spki_sha256 == spki_of(root / "one/swupdate/rsa.key")

    async def test_a_key_that_is_missing(self, keyring) -> None:
        async with keyring(grant("a", "a.key"), grant("gone", "gone.key", role="cms")) as keys:
            readiness = await keys.readiness()
            assert not readiness.ready
            assert [key.usable for key in readiness.keys] == [True, False]
            assert isinstance(readiness.keys[1].error, KeyNotFound)

    async def test_a_provider_that_is_down_is_asked_once_for_all_its_keys(self, keyring, root: Path) -> None:
        root.rename(root.with_name("moved"))
        async with keyring(grant("a", "a.key"), grant("b", "b.key", role="cms")) as keys:
            readiness = await keys.readiness()
            assert not readiness.ready
            assert isinstance(readiness.providers["files"], ProviderUnavailable)
            assert [key.error for key in readiness.keys] == 2 * [readiness.providers["files"]]
            root.with_name("moved").rename(root)

    async def test_nothing_is_granted(self, keyring) -> None:
        async with keyring() as keys:
            assert "Nothing is granted" in (await keys.readiness()).notes[0]

    async def test_concurrent_callers_share_one_probe_and_its_answer_holds(self, keyring) -> None:
        async with keyring(grant("a", "a.key"), readiness_max_age_s=0.2) as keys:
            provider = keys._providers["files"]
            first, *_ = await asyncio.gather(*(keys.readiness() for _ in range(20)))
            assert await keys.readiness() is first
            assert provider.checks == 1
            await asyncio.sleep(0.25)
            assert await keys.readiness() is not first
            assert provider.checks == 2

    async def test_a_caller_that_leaves_does_not_end_the_probe(self, keyring) -> None:
        async with keyring(grant("a", "a.key")) as keys:
            leaving = asyncio.create_task(keys.readiness())
            await asyncio.sleep(0)
            staying = asyncio.create_task(keys.readiness())
            await asyncio.sleep(0)
            leaving.cancel()
            assert (await staying).ready


class TestToken:
    @staticmethod
    def token(softhsm, pin: Path) -> Pkcs11Settings:
        return Pkcs11Settings(
            kind="pkcs11", module=softhsm.module, token="hsmsign", pin=SecretSource(file=pin), env=softhsm.env,
            aliases=("YubiHSM",),
        )  # fmt: skip

    async def test_backend_prefers_a_kind_of_provider(self, root: Path, softhsm, tmp_path: Path) -> None:
        token = self.token(softhsm, softhsm.pin_file)
        on_token = grant("on-token", "swupdate-rsa", provider="token")
        in_file = grant("in-file", "a.key")
        files = FileSettings(kind="file", root=root)
        settings = Settings(providers={"token": token, "files": files}, grants=(on_token, in_file))
        providers: dict[str, KeyProvider] = {
            "token": Pkcs11Provider("token", token, tmp_path / "state"), "files": FileProvider("files", files),
        }  # fmt: skip

        async with running(settings, providers) as keys:

            async def algorithm(**asked: Any) -> str:
                async with keys.keys("swupdate").open("rsa", distro="x", **asked) as key:
                    return type(key.public_key).__name__

            assert "RSA" in await algorithm(backend="pkcs11")
            assert "EC" in await algorithm(backend="ssl")
            assert "RSA" in await algorithm(key_uri="pkcs11:token=YubiHSM;object=swupdate-rsa;type=private")
            with pytest.raises(KeyAmbiguous, match="2 grants"):
                await algorithm()
            assert [(key.kind, key.algorithm) for key in (await keys.readiness()).keys] == [
                ("pkcs11", "RSA-2048"),
                ("file", "P-256"),
            ]

    async def test_a_wrong_pin_is_what_readiness_reports(self, own_softhsm, tmp_path: Path) -> None:
        (tmp_path / "pin").write_text("wrong-pin")
        token = self.token(own_softhsm, tmp_path / "pin")
        settings = Settings(providers={"token": token}, grants=(grant("k", "swupdate-rsa", provider="token"),))
        async with running(settings, {"token": create("token", token, tmp_path / "state")}) as keys:
            readiness = await keys.readiness()
            assert isinstance(readiness.providers["token"], PinRefused)
            assert not readiness.ready
            with pytest.raises(PinRefused):
                async with keys.keys("swupdate").open("rsa", distro="x"):
                    pass


class TestFiles:
    """Files that belong to a key set, and names that a client has for a key."""

    async def test_a_file_with_what_its_grant_says(self, keyring, root: Path) -> None:
        (root / "one/table.bin").write_bytes(b"\xd7 a table")
        files = Grant(
            name="files", signer="imx", role="files", provider="files", object="{machine}/table.bin",
            allow=("unlock",), srk_hash="ab" * 32,
        )  # fmt: skip
        async with keyring(files) as keys:
            granted = await keys.keys("imx").read("files", machine="one")
            assert (granted.content, granted.allow) == (b"\xd7 a table", {"unlock"})
            assert granted.srk_hash == bytes.fromhex("ab" * 32)
            with pytest.raises(KeyNotFound):
                await keys.keys("imx").read("files", machine="two")
            with pytest.raises(KeyNotFound):
                await keys.keys("swupdate").read("files", machine="one")

    async def test_its_state(self, keyring, root: Path) -> None:
        (root / "table.bin").write_bytes(b"\xd7")
        grants = [
            Grant(name=name, signer="imx", role="files", provider="files", machine=name, object=f"{name}.bin")
            for name in ("table", "gone")
        ]
        async with keyring(*grants) as keys:
            there, gone = (await keys.readiness()).keys
            assert (there.usable, there.algorithm, there.spki_sha256) == (True, None, None)
            assert isinstance(gone.error, KeyNotFound)
            with pytest.raises(KeyNotFound):
                async with keys.open_grant("table"):
                    pass

    async def test_an_alias_chooses_among_files(self, keyring, root: Path) -> None:
        grants = [grant(name, f"{name}.key", aliases=(f"KEY_{name}",)) for name in ("a", "b")]
        async with keyring(*grants) as keys:
            for name in ("a", "b"):
                uri = f"pkcs11:token=YubiHSM;object=KEY_{name}"
                assert await name_of(keys, root, distro="x", key_uri=uri) == f"{name}.key"
            with pytest.raises(KeyNotGranted):
                await name_of(keys, root, distro="x", key_uri="pkcs11:token=YubiHSM;object=KEY_c")

    async def test_a_key_out_of_a_file_is_one_signers(self, keyring, root: Path) -> None:
        (root / "keys.tar.gz").write_bytes(b"\x1f\x8b")
        files = Grant(name="files", signer="imx", role="files", provider="files", object="keys.tar.gz")
        async with keyring(files, grant("a", "a.key")) as keys:
            for name, shared in (("b.key", False), ("c.key", False), ("a.key", True)):
                key = serialization.load_pem_private_key((root / name).read_bytes(), None)
                assert isinstance(key, ec.EllipticCurvePrivateKey)
                claim = keys.keys("imx").claim("files", key.public_key(), machine="x")
                if not shared:
                    await claim
                    continue
                with pytest.raises(KeyMismatch, match="imx and swupdate"):
                    await claim
