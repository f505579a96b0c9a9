"""Keys on a YubiHSM 2, on the simulator behind its real connector protocol: what is particular to this token."""

import asyncio
import contextlib
import datetime
import hashlib
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from pydantic import ValidationError
from yubihsm.defs import ALGORITHM, CAPABILITY, COMMAND
from yubihsm.objects import AsymmetricKey, AuthenticationKey, Opaque

from tokens.errors import (
    KeyAmbiguous,
    KeyNotFound,
    KeyUnsuited,
    KeyUnusable,
    ProviderRefused,
    ProviderUnavailable,
)
from tokens.lending import LentKey, Loan, LoanLimits, Via, configuration
from tokens.provider import Attests, KeyReference
from tokens.schemes import Ecdsa, Ed25519, Hash, RsaPkcs1v15, RsaPss, Scheme
from tokens.yubihsm import YubihsmProvider

DIGEST = hashlib.sha256(b"what is signed").digest()
RSA, ECDSA = RsaPkcs1v15(Hash.SHA256), Ecdsa(Hash.SHA256)
DOMAINS = 0xFFFF


async def sign(provider: YubihsmProvider, label: str = "p256", scheme: Scheme = ECDSA, data: bytes = DIGEST) -> bytes:
    async with provider.open(KeyReference(object=label)) as key:
        return await key.sign(scheme, data)


class TestSessions:
    async def test_one_command_a_signature(self, key_yubihsm: Any) -> None:
        schemes = {
            "rsa2048": (RSA, COMMAND.SIGN_PKCS1),
            "p256": (ECDSA, COMMAND.SIGN_ECDSA),
            "ed25519": (Ed25519(), COMMAND.SIGN_EDDSA),
        }
        async with key_yubihsm.provider() as provider:
            for label, (scheme, command) in schemes.items():
                async with provider.open(KeyReference(object=label)) as key:
                    await key.sign(scheme, DIGEST)
                    before = key_yubihsm.device.commands.copy()
                    await asyncio.gather(*(key.sign(scheme, DIGEST) for _ in range(10)))
                    spent = key_yubihsm.device.commands - before
                    spent.pop(COMMAND.SESSION_MESSAGE, None)
                    assert spent == {command: 10}

    @pytest.mark.parametrize("sessions", [1, 3])
    async def test_no_session_is_left_behind(self, yubihsm: Any, sessions: int) -> None:
        async with yubihsm.provider(sessions=sessions) as provider:
            await provider.check()
            await asyncio.gather(*(sign(provider) for _ in range(20)))
            assert yubihsm.device.sessions == sessions
        assert yubihsm.device.sessions == 0

    async def test_it_is_kept_alive(self, yubihsm: Any, eventually: Any) -> None:
        async with yubihsm.provider(keep_alive_s=0.05) as provider:
            await sign(provider)
            before = yubihsm.device.commands.copy()
            for _ in range(4):  # 60 s in all
                echoes = yubihsm.device.commands[COMMAND.ECHO]
                yubihsm.device.skip(15)
                await eventually(lambda echoes=echoes: yubihsm.device.commands[COMMAND.ECHO] > echoes + 1)
            await sign(provider)
        assert (yubihsm.device.commands - before)[COMMAND.CREATE_SESSION] == 0

    async def test_proxies_of_the_environment_are_ignored(
        self, yubihsm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        provider = YubihsmProvider("yubihsm", yubihsm.settings(), tmp_path)
        supervisor = provider.supervise()
        for worker in supervisor._workers:  # the service passes none on: here they reach the worker
            worker._env |= os.environ
        provider.supervisor = supervisor
        supervisor.start()
        try:
            await sign(provider)
        finally:
            await provider.stop()

    async def test_the_password_is_nowhere(self, yubihsm: Any, workers: Any, caplog: Any) -> None:
        secrets = (yubihsm.password.encode(), yubihsm.password.encode().hex().encode())
        with caplog.at_level("DEBUG"):
            async with yubihsm.provider() as provider:
                assert provider.supervisor is not None
                frames: list[bytes] = []
                for worker in provider.supervisor._workers:
                    send = worker.send
                    worker.send = lambda call, send=send: (
                        frames.append(repr(call.header).encode() + call.body),
                        send(call),
                    )  # type: ignore[method-assign]
                await sign(provider)
                seen = [
                    Path(f"/proc/{pid}/{name}").read_bytes() for pid in workers() for name in ("cmdline", "environ")
                ]
        assert seen
        assert frames
        seen += [*frames, caplog.text.encode()]
        seen += [path.read_bytes() for path in (yubihsm.directory / "state").rglob("*") if path.is_file()]
        assert not [text for text in seen for secret in secrets if secret in text]


class TestTls:
    """The connector behind TLS that asks for a certificate, as yubihsm-connector does."""

    @pytest.fixture
    async def url(self, yubihsm: Any, tmp_path: Path) -> AsyncIterator[str]:
        """Ends TLS and passes on what comes, with certificates of an authority in tmp_path."""
        authority = ec.generate_private_key(ec.SECP256R1())
        write_certificate(tmp_path / "ca", authority, authority, ca=True)
        for name in ("localhost", "client"):
            write_certificate(tmp_path / name, ec.generate_private_key(ec.SECP256R1()), authority, ca=False)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tmp_path / "ca.pem")
        context.load_cert_chain(tmp_path / "localhost.pem", tmp_path / "localhost.key")
        context.verify_mode = ssl.CERT_REQUIRED
        tasks: set[asyncio.Task[None]] = set()

        async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
            writer.close()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            upstream, downstream = await asyncio.open_connection("127.0.0.1", yubihsm.connector.port)
            tasks.add(asyncio.create_task(copy(upstream, writer)))
            await copy(reader, downstream)

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        async with server:
            yield f"https://localhost:{server.sockets[0].getsockname()[1]}"
        await asyncio.gather(*tasks)

    async def test_with_certificates(self, yubihsm: Any, url: str, tmp_path: Path) -> None:
        tls = {"cacert": tmp_path / "ca.pem", "certificate": tmp_path / "client.pem", "key": tmp_path / "client.key"}
        async with yubihsm.provider(connector=url, **tls) as provider:
            await sign(provider)

    @pytest.mark.parametrize("missing", ["cacert", "certificate", "file"])
    async def test_without(self, *, yubihsm: Any, url: str, tmp_path: Path, missing: str) -> None:
        tls = {"cacert": tmp_path / "ca.pem", "certificate": tmp_path / "client.pem", "key": tmp_path / "client.key"}
        if missing == "cacert":
            del tls["cacert"]
        elif missing == "certificate":
            del tls["certificate"], tls["key"]
        else:
            tls["cacert"] = tmp_path / "absent.pem"
        async with yubihsm.provider(connector=url, **tls) as provider:
            with pytest.raises(ProviderUnavailable, match="cannot be reached") as raised:
                await sign(provider)
        assert str(tmp_path) not in raised.value.message + raised.value.hint


def write_certificate(
    path: Path, private: ec.EllipticCurvePrivateKey, authority: ec.EllipticCurvePrivateKey, *, ca: bool
) -> None:
    subject, issuer = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in (path.name, "ca"))
    day, now = datetime.timedelta(days=1), datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(
            issuer, subject, private.public_key(), x509.random_serial_number(), now - day, now + day
        )
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(path.name)]), critical=False)
        .sign(authority, hashes.SHA256())
    )
    path.with_suffix(".pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    key = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.with_suffix(".key").write_bytes(key)


class TestKeys:
    @pytest.mark.parametrize(
        ("curve", "hash_"),
        [
            (curve, hash_)
            for curve in (ec.SECP256K1(), ec.BrainpoolP256R1(), ec.BrainpoolP384R1(), ec.BrainpoolP512R1())
            for hash_ in (Hash.SHA224, Hash.SHA256, Hash.SHA384, Hash.SHA512)
        ],
        ids=lambda value: getattr(value, "name", str(value)),
    )
    async def test_other_curves(
        self, *, provider_of_curves: tuple[YubihsmProvider, Any], curve: ec.EllipticCurve, hash_: Hash
    ) -> None:
        provider, privates = provider_of_curves
        digest = hashlib.new(hash_.hashlib_name, b"what is signed").digest()
        signature = await sign(provider, curve.name, Ecdsa(hash_), digest)
        half = len(signature) // 2
        assert half == (curve.key_size + 7) // 8
        der = encode_dss_signature(int.from_bytes(signature[:half]), int.from_bytes(signature[half:]))
        algorithm = Prehashed(getattr(hashes, hash_.value.upper())())
        privates[curve.name].public_key().verify(der, digest, ec.ECDSA(algorithm))

    async def test_a_key_on_p224_is_refused(self, yubihsm: Any) -> None:
        with yubihsm.session() as session:
            yubihsm.put(session, 0x0300, "p224", ec.generate_private_key(ec.SECP224R1()))
        async with yubihsm.provider() as provider:
            with pytest.raises(KeyUnusable, match="curve"):
                await sign(provider, "p224", Ecdsa(Hash.SHA224), DIGEST[:28])

    async def test_by_label_and_by_id(self, yubihsm: Any, keys: Any) -> None:
        with yubihsm.session() as session:
            yubihsm.put(session, 0x0202, "twin", keys["p256"].private)
            yubihsm.put(session, 0x0203, "twin", keys["p384"].private)
        async with yubihsm.provider() as provider:
            with pytest.raises(KeyAmbiguous, match="2 asymmetric keys"):
                await sign(provider, "twin")
            for reference, name in (
                (KeyReference(id=b"\x02\x02"), "p256"),
                (KeyReference(object="twin", id=b"\x02\x03"), "p384"),
                (KeyReference(object="p256"), "p256"),
            ):
                async with provider.open(reference) as key:
                    assert key.public_key == keys[name].private.public_key()
                    await key.sign(ECDSA, DIGEST)
            for absent, hint in (
                (KeyReference(object="twin", id=b"\x02\x01"), "list-objects"),
                (KeyReference(id=b"\x02"), "two bytes"),
                (KeyReference(object="x" * 41), "40 bytes"),
            ):
                with pytest.raises(KeyNotFound) as raised:
                    async with provider.open(absent):
                        pass
                assert hint in raised.value.hint

    async def test_a_key_in_another_domain_is_not_seen(self, yubihsm: Any, tmp_path: Path, keys: Any) -> None:
        with yubihsm.session() as session:
            narrow = CAPABILITY.SIGN_ECDSA
            AuthenticationKey.put_derived(session, 9, "narrow", 0x0001, narrow, CAPABILITY.NONE, "password-of-9")
            AsymmetricKey.put(session, 0x0300, "elsewhere", 0x0002, CAPABILITY.SIGN_ECDSA, keys["p256"].private)
        (tmp_path / "nine").write_text("password-of-9")
        async with yubihsm.provider(auth_key_id=9, password={"file": tmp_path / "nine"}) as provider:
            await sign(provider, "p256")
            with pytest.raises(KeyNotFound):
                await sign(provider, "elsewhere")

    async def test_a_missing_capability_is_named(self, yubihsm: Any, keys: Any) -> None:
        with yubihsm.session() as session:
            AsymmetricKey.put(session, 0x0300, "pss", DOMAINS, CAPABILITY.SIGN_PSS, keys["rsa2048"].private)
            AsymmetricKey.put(session, 0x0301, "ecdh", DOMAINS, CAPABILITY.DERIVE_ECDH, keys["p256"].private)
        async with yubihsm.provider() as provider:
            with pytest.raises(ProviderRefused) as raised:
                await sign(provider, "pss", RSA)
            assert "sign-pkcs" in raised.value.hint
            await sign(provider, "pss", RsaPss(Hash.SHA256, 32))
            with pytest.raises(KeyUnusable, match="capabilities"):
                await sign(provider, "ecdh")

    async def test_pss_only_with_hashes_that_the_device_has(self, key_yubihsm: Any) -> None:
        async with key_yubihsm.provider() as provider:
            for hash_ in set(Hash) - {Hash.SHA256, Hash.SHA384, Hash.SHA512}:
                with pytest.raises(KeyUnsuited, match=hash_) as raised:
                    await sign(provider, "rsa2048", RsaPss(hash_, 16), bytes(hash_.size))
                assert "sha256" in raised.value.hint

    @pytest.mark.parametrize("compress", [False, True])
    async def test_certificate(self, *, yubihsm: Any, keys: Any, compress: bool) -> None:
        with yubihsm.session() as session:
            Opaque.put_certificate(
                session, 0x0201, "p256", DOMAINS, CAPABILITY.NONE, keys["p256"].certificate, compress
            )
        async with yubihsm.provider() as provider, provider.open(KeyReference(object="p256")) as key:
            assert key.certificates == (keys["p256"].certificate,)

    @pytest.mark.parametrize("content", [b"no certificate", b"\x1f\x8bno gzip"])
    async def test_an_opaque_object_that_is_no_certificate(self, yubihsm: Any, content: bytes) -> None:
        with yubihsm.session() as session:
            Opaque.put(session, 0x0201, "p256", DOMAINS, CAPABILITY.NONE, ALGORITHM.OPAQUE_DATA, content)
        async with yubihsm.provider() as provider, provider.open(KeyReference(object="p256")) as key:
            assert key.certificates == ()

    async def test_attestation(self, yubihsm: Any, tmp_path: Path) -> None:
        with yubihsm.session() as session:
            AsymmetricKey.generate(session, 0x0300, "made", DOMAINS, CAPABILITY.SIGN_ECDSA, ALGORITHM.EC_P256)
        roots = tmp_path / "roots.pem"
        roots.write_bytes(yubihsm.device.attestation_root)
        async with yubihsm.provider(attestation_roots=roots) as provider:
            assert isinstance(provider, Attests)
            assert provider.serial == yubihsm.serial
            attestation = await provider.attest(KeyReference(object="made"))
            async with provider.open(KeyReference(object="made")) as key:
                certificate = x509.load_der_x509_certificate(attestation.certificate)
                assert certificate.public_key() == key.public_key
            (root,) = provider.attestation_roots or ()
        assert root == x509.load_pem_x509_certificate(yubihsm.device.attestation_root)
        (issuer,) = map(x509.load_der_x509_certificate, attestation.issuers)
        certificate.verify_directly_issued_by(issuer)


@pytest.fixture(scope="module")
def curve_keys() -> dict[str, ec.EllipticCurvePrivateKey]:
    curves = (ec.SECP256K1(), ec.BrainpoolP256R1(), ec.BrainpoolP384R1(), ec.BrainpoolP512R1())
    return {curve.name: ec.generate_private_key(curve) for curve in curves}


@pytest.fixture
async def provider_of_curves(yubihsm: Any, curve_keys: Any) -> AsyncIterator[Any]:
    with yubihsm.session() as session:
        for number, (name, private) in enumerate(curve_keys.items(), 0x0400):
            yubihsm.put(session, number, name, private)
    async with yubihsm.provider() as provider:
        yield provider, curve_keys


class TestLending:
    @pytest.mark.parametrize("name", ["rsa2048", "brainpoolP256r1"])
    async def test_a_tool_signs_by_openssl_s_engine(
        self, *, provider_of_curves: Any, yubihsm: Any, keys: Any, tmp_path: Path, name: str
    ) -> None:
        provider, _ = provider_of_curves
        signed: list[tuple[str, Scheme]] = []
        with yubihsm.session() as session:
            yubihsm.put(session, 0x0500, "rsa2048", keys["rsa2048"].private)
        libraries = Path("/usr/lib/x86_64-linux-gnu")
        (tmp_path / "openssl.cnf").write_text(
            configuration(
                Via.ENGINE,
                client=libraries / "pkcs11/p11-kit-client.so",
                engine=libraries / "engines-3/pkcs11.so",
                provider=libraries / "ossl-modules/pkcs11.so",
            )
        )
        (tmp_path / "content").write_bytes(os.urandom(5000))

        async def openssl(*arguments: str, address: str = "") -> int | None:
            environment = {"PATH": "/usr/bin:/bin"}
            if address:
                environment |= {"P11_KIT_SERVER_ADDRESS": address, "OPENSSL_CONF": str(tmp_path / "openssl.cnf")}
            process = await asyncio.create_subprocess_exec(
                "openssl", "dgst", "-sha256", *arguments, cwd=tmp_path, env=environment,
                stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            return await asyncio.wait_for(process.wait(), 30)

        async with provider.open(KeyReference(object=name)) as key:
            pem = key.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            (tmp_path / "public.pem").write_bytes(pem)
            lent = [LentKey(name, b"\1", key)]
            async with Loan(
                tmp_path / "loan", "YubiHSM", lent, LoanLimits(), lambda *what: signed.append(what)
            ) as loan:
                uri = f"pkcs11:token=YubiHSM;object={name};type=private"
                engine = ("-engine", "pkcs11", "-keyform", "engine", "-sign", uri, "-out", "signature", "content")
                assert await openssl(*engine, address=loan.address) == 0
        assert signed == [(name, RSA if name == "rsa2048" else ECDSA)]
        verify = ("-verify", "public.pem", "-signature", "signature", "content")
        assert await openssl(*verify) == 0
        (tmp_path / "content").write_bytes(b"tampered")
        assert await openssl(*verify) != 0


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"connector": "yhusb://serial=1"}, "yhusb"),
            ({"connector": "ftp://127.0.0.1"}, "http://"),
            ({"connector": "127.0.0.1:12345"}, "http://"),
            ({"certificate": "/c.pem"}, "go together"),
            ({"command_timeout_s": 30}, "call_timeout_s"),
            ({"keep_alive_s": 30}, "keep_alive_s"),
            ({"auth_key_id": 0}, "auth_key_id"),
            ({"auth_key_id": 65535}, "auth_key_id"),
            ({"serial": None}, "serial"),
        ],
    )
    def test_mistakes(self, key_yubihsm: Any, changes: dict[str, Any], match: str) -> None:
        with pytest.raises(ValidationError, match=match):
            key_yubihsm.settings(**changes)

    @pytest.mark.parametrize("connector", ["yhusb://", "yhusb://serial=12345678", "https://hsm.example:12345"])
    def test_connectors(self, key_yubihsm: Any, connector: str) -> None:
        assert key_yubihsm.settings(connector=connector).connector == connector
