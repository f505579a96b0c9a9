"""The adapter: certificates and CSRs with keys of every provider, by the word of OpenSSL."""

import asyncio
import copy
import datetime
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, pkcs7

from tokens.adapter import with_private_key
from tokens.errors import KeyUnsuited
from tokens.keyfile import MemoryKey
from tokens.pkcs11 import Pkcs11Provider, Pkcs11Settings
from tokens.provider import KeyReference, SigningKey
from tokens.secret import SecretSource
from tokens.threads import Threads

pytestmark = pytest.mark.asyncio
NAME = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hsmsign")])
HASHES = {"rsa2048": hashes.SHA256(), "p256": hashes.SHA256(), "p384": hashes.SHA384(), "p521": hashes.SHA512()}
PSS = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)


@pytest.fixture(params=["file", "pkcs11"])
def signing(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Any]:
    """Runs a function with the private key that stands for one of the fixtures' keys."""

    async def with_file(name: str, function: Callable[[Any], Any]) -> Any:
        threads = Threads("test", 1)
        key = MemoryKey(request.getfixturevalue("keys")[name].private, (), threads)
        try:
            return await with_private_key(key, function)
        finally:
            await threads.stop()

    async def with_token(name: str, function: Callable[[Any], Any]) -> Any:
        token = request.getfixturevalue("key_token")
        pin = SecretSource(file=token.pin_file)
        settings = Pkcs11Settings(kind="pkcs11", module=token.module, token=token.label, pin=pin, env=token.env)
        provider = Pkcs11Provider("test", settings, tmp_path)
        await provider.start()
        try:
            async with provider.open(KeyReference(object=name)) as key:
                return await with_private_key(key, function)
        finally:
            await provider.stop()

    return with_file if request.param == "file" else with_token


def openssl(command: str, directory: Path) -> bool:
    done = subprocess.run(["openssl", *command.split()], cwd=directory, capture_output=True, check=False)
    return done.returncode == 0 and b"fail" not in done.stderr.lower()


def tampered(der: bytes) -> bytes:
    return der[:-1] + bytes([der[-1] ^ 1])


@pytest.mark.parametrize("name", [*HASHES, "ed25519"])
async def test_a_csr(signing: Any, name: str, tmp_path: Path) -> None:
    builder = x509.CertificateSigningRequestBuilder().subject_name(NAME)
    csr = await signing(name, lambda private: builder.sign(private, HASHES.get(name)))
    der = csr.public_bytes(Encoding.DER)
    (tmp_path / "csr").write_bytes(der)
    assert openssl("req -inform DER -in csr -noout -verify", tmp_path)
    (tmp_path / "csr").write_bytes(tampered(der))
    assert not openssl("req -inform DER -in csr -noout -verify", tmp_path)


@pytest.mark.parametrize("name", [*HASHES, "ed25519"])
async def test_a_self_signed_certificate(signing: Any, name: str, tmp_path: Path) -> None:
    def certify(private: Any) -> x509.Certificate:
        builder = x509.CertificateBuilder(NAME, NAME, private.public_key(), x509.random_serial_number())
        now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
        builder = builder.not_valid_before(now - day).not_valid_after(now + day)
        options = {"rsa_padding": PSS} if name == "rsa2048" else {}
        return builder.sign(private, HASHES.get(name), **options)

    certificate = await signing(name, certify)
    (tmp_path / "pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    assert openssl("verify -check_ss_sig -CAfile pem pem", tmp_path)
    broken = x509.load_der_x509_certificate(tampered(certificate.public_bytes(Encoding.DER)))
    (tmp_path / "pem").write_bytes(broken.public_bytes(Encoding.PEM))
    assert not openssl("verify -check_ss_sig -CAfile pem pem", tmp_path)


@pytest.mark.parametrize("name", ["rsa2048", "p256"])
async def test_cms(signing: Any, name: str, keys: Any, tmp_path: Path) -> None:
    builder = pkcs7.PKCS7SignatureBuilder().set_data(b"signed")
    certificate, options = keys[name].certificate, [pkcs7.PKCS7Options.Binary]
    (tmp_path / "pem").write_bytes(keys[name].certificate_pem)
    cms = await signing(
        name, lambda private: builder.add_signer(certificate, private, hashes.SHA256()).sign(Encoding.DER, options)
    )
    (tmp_path / "cms").write_bytes(cms)
    assert openssl("cms -verify -inform DER -in cms -CAfile pem -purpose any -out content", tmp_path)
    assert (tmp_path / "content").read_bytes() == b"signed"


@pytest.mark.parametrize("salt", [0, 20, padding.PSS.DIGEST_LENGTH, padding.PSS.MAX_LENGTH])
async def test_each_salt(signing: Any, salt: Any, keys: Any) -> None:
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), salt)
    signature = await signing("rsa2048", lambda private: private.sign(b"data", pss, hashes.SHA256()))
    keys["rsa2048"].private.public_key().verify(signature, b"data", pss, hashes.SHA256())


async def test_it_is_like_the_key(keys: Any) -> None:
    for name, key in keys.items():
        private: Any = await adapted(key)
        assert private.public_key() == key.private.public_key()
        assert copy.copy(private) is copy.deepcopy(private) is private
        if name != "ed25519":
            assert private.key_size == key.private.key_size
        if isinstance(private, ec.EllipticCurvePrivateKey):
            assert private.curve.name == key.private.curve.name


async def adapted(key: Any) -> Any:
    """What outlives its function: nothing can be signed with it where no loop runs."""
    threads = Threads("test", 1)
    try:
        return await with_private_key(MemoryKey(key.private, (), threads), lambda private: private)
    finally:
        await threads.stop()


async def test_what_it_does_not_do(keys: Any) -> None:
    mixed = padding.PSS(padding.MGF1(hashes.SHA1()), 20)  # noqa: S303 - it is refused
    auto = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.AUTO)
    form = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    rsa2048, p256, ed25519 = [await adapted(keys[name]) for name in ("rsa2048", "p256", "ed25519")]
    for call in (
        rsa2048.private_numbers,
        lambda: rsa2048.private_bytes(*form),
        lambda: rsa2048.decrypt(b"", padding.PKCS1v15()),
        lambda: rsa2048.sign(b"", mixed, hashes.SHA256()),
        lambda: rsa2048.sign(b"", auto, hashes.SHA256()),
        lambda: rsa2048.sign(b"", padding.PKCS1v15(), hashes.SHA1()),  # noqa: S303
        p256.private_numbers,
        lambda: p256.exchange(ec.ECDH(), p256.public_key()),
        lambda: p256.sign(b"", ec.ECDSA(hashes.MD5())),  # noqa: S303
        ed25519.private_bytes_raw,
    ):
        with pytest.raises(KeyUnsuited):
            call()


async def test_the_error_of_the_key() -> None:
    class Locked:
        public_key = ec.generate_private_key(ec.SECP256R1()).public_key()

        async def sign(self, *_: Any) -> bytes:
            raise KeyUnsuited("locked", "unlock it")

    key: SigningKey = Locked()  # type: ignore[assignment]
    with pytest.raises(KeyUnsuited, match="locked"):
        await with_private_key(key, lambda private: private.sign(b"", ec.ECDSA(hashes.SHA256())))


async def test_the_loop_goes_on(keys: Any) -> None:
    class Slow(MemoryKey):
        async def sign(self, *args: Any) -> bytes:
            await asyncio.wait_for(passed.wait(), 10)
            return await super().sign(*args)

    passed, threads = asyncio.Event(), Threads("test", 1)
    key = Slow(keys["p256"].private, (), threads)
    waiting = asyncio.create_task(with_private_key(key, lambda private: private.sign(b"", ec.ECDSA(hashes.SHA256()))))
    await asyncio.sleep(0)
    passed.set()
    keys["p256"].private.public_key().verify(await waiting, b"", ec.ECDSA(hashes.SHA256()))
    await threads.stop()
