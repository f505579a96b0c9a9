"""One suite for every provider: what a signer may rely on, wherever its keys live."""

import asyncio
import hashlib
import secrets
import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tokens.cmac import cmac
from tokens.errors import KeyMismatch, KeyNotFound, KeyProblem, KeyUnsuited, ProviderProblem, SigningFailed
from tokens.file import FileProvider, FileSettings
from tokens.pkcs11 import Pkcs11Provider, Pkcs11Settings
from tokens.provider import KeyProvider, KeyReference, PublicKey, spki_sha256
from tokens.s3 import S3Provider, S3Settings
from tokens.schemes import Ecdsa, Ed25519, Hash, RsaPkcs1v15, RsaPss, Scheme
from tokens.secret import SecretSource
from tokens.symmetric import SymmetricAlgorithm
from tokens.verify import verify
from tokens.yubihsm import YubihsmProvider

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGE = b"what the device will run"
SHA2 = (Hash.SHA224, Hash.SHA256, Hash.SHA384, Hash.SHA512)
ALL = tuple(Hash)

# The hashes that each provider has for each kind of scheme. SoftHSM 2.6.1 does PSS with SHA-2 only, a YubiHSM 2
# with what it has MGF1 for.
HASHES: dict[str, dict[type[Scheme], tuple[Hash, ...]]] = {
    "file": {RsaPkcs1v15: ALL, RsaPss: ALL, Ecdsa: ALL},
    "s3": {RsaPkcs1v15: ALL, RsaPss: ALL, Ecdsa: ALL},
    "pkcs11": {RsaPkcs1v15: ALL, RsaPss: SHA2, Ecdsa: ALL},
    "yubihsm": {RsaPkcs1v15: ALL, RsaPss: (Hash.SHA256, Hash.SHA384, Hash.SHA512), Ecdsa: ALL},
}
PROVIDERS = tuple(HASHES)
RSA = RsaPkcs1v15(Hash.SHA256)
SUITED: dict[str, Scheme] = {
    "rsa2048": RSA,
    "rsa4096": RSA,
    "p256": Ecdsa(Hash.SHA256),
    "p384": Ecdsa(Hash.SHA384),
    "p521": Ecdsa(Hash.SHA512),
    "ed25519": Ed25519(),
}


@dataclass(frozen=True)
class Store:
    """A provider that holds the fixtures' keys, and how it is asked for them."""

    provider: KeyProvider
    reference: Callable[[str], KeyReference]
    certified: Callable[[str], KeyReference]
    certified_as: Callable[[str, str], KeyReference]
    message_max_bytes: int | None = None


async def file_store(request: pytest.FixtureRequest, directory: Path) -> Store:
    for name, key in request.getfixturevalue("keys").items():
        (directory / f"{name}.key").write_bytes(key.pem)
        (directory / f"{name}.key").chmod(0o600)
        (directory / f"{name}.crt").write_bytes(key.certificate_pem)
    for name, content in symmetric_files(request).items():
        (directory / f"{name}.key").write_bytes(content)
        (directory / f"{name}.key").chmod(0o600)
    return key_store(FileProvider("conformance", FileSettings(kind="file", root=directory)))


async def s3_store(request: pytest.FixtureRequest, _directory: Path) -> Store:
    request.getfixturevalue("aws")
    endpoint = request.getfixturevalue("s3_endpoint")
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="conformance")
    for name, key in request.getfixturevalue("keys").items():
        client.put_object(Bucket="conformance", Key=f"production/{name}.key", Body=key.pem)
        client.put_object(Bucket="conformance", Key=f"production/{name}.crt", Body=key.certificate_pem)
    for name, content in symmetric_files(request).items():
        client.put_object(Bucket="conformance", Key=f"production/{name}.key", Body=content)
    client.close()
    settings = S3Settings(kind="s3", bucket="conformance", prefix="production", endpoint_url=endpoint)
    return key_store(S3Provider("conformance", settings))


def symmetric_files(request: pytest.FixtureRequest) -> dict[str, bytes]:
    """The keys in each form that a file may have: hexadecimal, NVIDIA's words, bare bytes."""
    keys = request.getfixturevalue("symmetric_keys")
    words = " ".join(f"0x{keys['aes256'][at : at + 4].hex()}" for at in range(0, 32, 4))
    return {"aes128": keys["aes128"].hex().encode() + b"\n", "aes256": words.encode(), "hmac": keys["hmac"]}


def key_store(provider: KeyProvider) -> Store:
    return Store(
        provider,
        lambda name: KeyReference(object=f"{name}.key"),
        lambda name: KeyReference(object=f"{name}.key", certificate=f"{name}.crt"),
        lambda name, other: KeyReference(object=f"{name}.key", certificate=f"{other}.crt"),
    )


async def pkcs11_store(request: pytest.FixtureRequest, directory: Path) -> Store:
    token = request.getfixturevalue("key_token")
    settings = Pkcs11Settings(
        kind="pkcs11",
        module=token.module,
        token=token.label,
        pin=SecretSource(file=token.pin_file),
        env=token.env,
    )
    return Store(
        Pkcs11Provider("conformance", settings, directory),
        KeyReference,
        KeyReference,
        lambda name, other: KeyReference(object=name, certificate=str(token.directory / f"{other}.der")),
    )


async def yubihsm_store(request: pytest.FixtureRequest, directory: Path) -> Store:
    yubihsm = request.getfixturevalue("key_yubihsm")
    for name, key in request.getfixturevalue("keys").items():
        (directory / f"{name}.der").write_bytes(key.certificate_der)
    return Store(
        YubihsmProvider("conformance", yubihsm.settings(aliases=("conformance",)), directory / "state"),
        KeyReference,
        KeyReference,
        lambda name, other: KeyReference(object=name, certificate=str(directory / f"{other}.der")),
        message_max_bytes=3114,  # of frames of 3136 bytes
    )


STORES = {"file": file_store, "s3": s3_store, "pkcs11": pkcs11_store, "yubihsm": yubihsm_store}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Store]:
    made = await STORES[request.param](request, tmp_path_factory.mktemp(request.param))
    await made.provider.start()
    yield made
    await made.provider.stop()


every_provider = pytest.mark.parametrize("store", PROVIDERS, indirect=True)


def cases() -> list[Any]:
    """Every provider with every key and every scheme that it has for it."""
    found: list[tuple[str, str, Scheme]] = []
    for provider, has in HASHES.items():
        found += [(provider, "rsa2048", RsaPkcs1v15(hash_)) for hash_ in has[RsaPkcs1v15]]
        for hash_ in has[RsaPss]:
            # the longest salt: RFC 8017, section 9.1.1, for 2048 bits
            longest = 256 - hash_.size - 2
            found += [(provider, "rsa2048", RsaPss(hash_, salt)) for salt in (0, hash_.size, longest)]
        found += [(provider, curve, Ecdsa(hash_)) for curve in ("p256", "p384", "p521") for hash_ in has[Ecdsa]]
        found += [(provider, "rsa4096", RSA), (provider, "ed25519", Ed25519())]
    return [pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2]}") for case in found]


def data_for(scheme: Scheme, message: bytes = MESSAGE) -> bytes:
    """What is signed: the message's digest, or the message itself."""
    if isinstance(scheme, Ed25519):
        return message
    return hashlib.new(scheme.hash.hashlib_name, message).digest()


def check_with_openssl(public: PublicKey, scheme: Scheme, signature: bytes, directory: Path) -> None:
    """`openssl pkeyutl`: shares no code with the provider, its padding, or its own check."""
    files = {
        "key": public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "data": data_for(scheme),
        "signature": der(public, signature) if isinstance(public, ec.EllipticCurvePublicKey) else signature,
    }
    for name, content in files.items():
        (directory / name).write_bytes(content)
    options: list[str] = []
    match scheme:
        case Ed25519():
            options = ["-rawin"]
        case RsaPss():
            options += ["-pkeyopt", "rsa_padding_mode:pss", "-pkeyopt", f"rsa_pss_saltlen:{scheme.salt_length}"]
    if not isinstance(scheme, Ed25519):
        options += ["-pkeyopt", f"digest:{scheme.hash}"]
    subprocess.run(
        ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "key", "-in", "data", "-sigfile", "signature", *options],
        cwd=directory,
        check=True,
        capture_output=True,
    )


def check_with_cryptography(public: PublicKey, scheme: Scheme, signature: bytes) -> None:
    """From the message on: the hash's name is part of what is checked."""
    match public, scheme:
        case rsa.RSAPublicKey(), RsaPkcs1v15():
            public.verify(signature, MESSAGE, padding.PKCS1v15(), algorithm(scheme.hash))
        case rsa.RSAPublicKey(), RsaPss():
            pss = padding.PSS(padding.MGF1(algorithm(scheme.hash)), scheme.salt_length)
            public.verify(signature, MESSAGE, pss, algorithm(scheme.hash))
        case ec.EllipticCurvePublicKey(), Ecdsa():
            public.verify(der(public, signature), MESSAGE, ec.ECDSA(algorithm(scheme.hash)))
        case ed25519.Ed25519PublicKey(), Ed25519():
            public.verify(signature, MESSAGE)
        case _:
            pytest.fail("a key of another type than the scheme")


def algorithm(hash_: Hash) -> hashes.HashAlgorithm:
    made: hashes.HashAlgorithm = getattr(hashes, hash_.value.upper().replace("-", "_"))()
    return made


def der(public: ec.EllipticCurvePublicKey, signature: bytes) -> bytes:
    half = (public.key_size + 7) // 8
    assert len(signature) == 2 * half
    return encode_dss_signature(int.from_bytes(signature[:half]), int.from_bytes(signature[half:]))


@pytest.mark.parametrize(("store", "name", "scheme"), cases(), indirect=["store"])
async def test_signs(store: Store, name: str, scheme: Scheme, keys: Any, tmp_path: Path) -> None:
    async with store.provider.open(store.reference(name)) as key:
        signature = await key.sign(scheme, data_for(scheme))
        assert spki_sha256(key.public_key) == spki_sha256(keys[name].private.public_key())
    public = keys[name].private.public_key()
    check_with_openssl(public, scheme, signature, tmp_path)
    check_with_cryptography(public, scheme, signature)


@every_provider
@pytest.mark.parametrize("name", SUITED)
async def test_tampered(store: Store, name: str) -> None:
    scheme = SUITED[name]
    async with store.provider.open(store.reference(name)) as key:
        signature = await key.sign(scheme, data_for(scheme))
        verify(key.public_key, scheme, data_for(scheme), signature)
        with pytest.raises(SigningFailed):
            verify(key.public_key, scheme, data_for(scheme, MESSAGE + b"!"), signature)
        with pytest.raises(SigningFailed):
            verify(key.public_key, scheme, data_for(scheme), signature[:-1] + bytes([signature[-1] ^ 1]))


@every_provider
@pytest.mark.parametrize("name", [name for name in SUITED if name != "ed25519"])
@pytest.mark.parametrize("length", [0, 31, 33, 4096])
async def test_digest_of_wrong_length(store: Store, name: str, length: int) -> None:
    async with store.provider.open(store.reference(name)) as key:
        with pytest.raises(KeyUnsuited):
            await key.sign(SUITED[name], b"\1" * length)
        # and the key is as good as before
        assert await key.sign(SUITED[name], data_for(SUITED[name]))


@every_provider
@pytest.mark.parametrize("name", SUITED)
async def test_scheme_of_another_type(store: Store, name: str) -> None:
    others = [scheme for scheme in SUITED.values() if type(scheme) is not type(SUITED[name])]
    async with store.provider.open(store.reference(name)) as key:
        for scheme in others:
            with pytest.raises(KeyUnsuited):
                await key.sign(scheme, data_for(scheme))


@every_provider
async def test_salt_that_does_not_fit(store: Store) -> None:
    scheme = RsaPss(Hash.SHA256, 256 - 32 - 2 + 1)
    async with store.provider.open(store.reference("rsa2048")) as key:
        with pytest.raises(KeyUnsuited, match="222"):
            await key.sign(scheme, data_for(scheme))


@every_provider
@pytest.mark.parametrize(
    "message", [b"", b"\0", bytes(3114), bytes(100_000)], ids=["empty", "one byte", "3 kB", "100 kB"]
)
async def test_ed25519_signs_the_message(store: Store, keys: Any, message: bytes) -> None:
    async with store.provider.open(store.reference("ed25519")) as key:
        if store.message_max_bytes is not None and len(message) > store.message_max_bytes:
            with pytest.raises(KeyUnsuited, match=str(store.message_max_bytes)):
                await key.sign(Ed25519(), message)
            return
        signature = await key.sign(Ed25519(), message)
    keys["ed25519"].private.public_key().verify(signature, message)
    # RFC 8032 is deterministic: the very bytes are known
    assert signature == keys["ed25519"].private.sign(message)


@every_provider
async def test_missing(store: Store) -> None:
    with pytest.raises(KeyNotFound) as caught:
        async with store.provider.open(store.reference("absent")):
            pass
    assert caught.value.hint


@every_provider
async def test_many_at_once(store: Store) -> None:
    digests = [hashlib.sha256(bytes([number])).digest() for number in range(100)]
    async with (
        store.provider.open(store.reference("rsa2048")) as first,
        store.provider.open(store.reference("p256")) as second,
    ):
        calls = [first.sign(RSA, digest) for digest in digests]
        calls += [second.sign(Ecdsa(Hash.SHA256), digest) for digest in digests]
        signatures = await asyncio.gather(*calls)
        for digest, signature in zip(digests, signatures[:100], strict=True):
            verify(first.public_key, RSA, digest, signature)
        for digest, signature in zip(digests, signatures[100:], strict=True):
            verify(second.public_key, Ecdsa(Hash.SHA256), digest, signature)
    assert len(set(signatures)) == 200


@every_provider
async def test_many_jobs_at_once(store: Store) -> None:
    async def job(name: str) -> None:
        async with store.provider.open(store.reference(name)) as key:
            await key.sign(SUITED[name], data_for(SUITED[name]))

    await asyncio.gather(*(job(name) for name in SUITED for _ in range(5)))


@every_provider
@pytest.mark.parametrize("name", SUITED)
async def test_certificate(store: Store, name: str, keys: Any) -> None:
    async with store.provider.open(store.certified(name)) as key:
        assert key.certificates == (keys[name].certificate,)


@every_provider
async def test_certificate_of_another_key(store: Store) -> None:
    for name, other in [("rsa2048", "rsa4096"), ("p256", "p384"), ("p256", "rsa2048"), ("ed25519", "p256")]:
        with pytest.raises(KeyMismatch):
            async with store.provider.open(store.certified_as(name, other)):
                pass


@every_provider
@pytest.mark.parametrize("name", ["rsa2048", "p256", "ed25519"])
async def test_after_the_job(store: Store, name: str) -> None:
    async with store.provider.open(store.reference(name)) as key:
        pass
    with pytest.raises(ProviderProblem, match="ended"):
        await key.sign(SUITED[name], data_for(SUITED[name]))


@every_provider
async def test_after_a_job_that_failed(store: Store) -> None:
    with pytest.raises(ZeroDivisionError):
        async with store.provider.open(store.reference("p256")) as key:
            raise ZeroDivisionError
    with pytest.raises(ProviderProblem, match="ended"):
        await key.sign(SUITED["p256"], data_for(SUITED["p256"]))


@every_provider
async def test_check(store: Store) -> None:
    await store.provider.check()


@every_provider
async def test_names_of_a_uri(store: Store) -> None:
    assert "conformance" in store.provider.uri_attributes["token"]


ALGORITHMS = {
    "aes128": SymmetricAlgorithm.AES_128,
    "aes256": SymmetricAlgorithm.AES_256,
    "hmac": SymmetricAlgorithm.HMAC_SHA256,
}
AES = ("aes128", "aes256")
AES_OR_HMAC = frozenset(SymmetricAlgorithm) - {SymmetricAlgorithm.AES_256}
"""What a 32-byte file holds with these is a key for HMAC."""

every_symmetric_key = pytest.mark.parametrize("name", ALGORITHMS)
every_aes_key = pytest.mark.parametrize("name", AES)


def opened(store: Store, name: str) -> Any:
    return store.provider.open_symmetric(store.reference(name), AES_OR_HMAC if name == "hmac" else {ALGORITHMS[name]})


def openssl(command: str, data: bytes) -> bytes:
    return subprocess.run(["openssl", *command.split()], input=data, check=True, capture_output=True).stdout


@every_provider
@every_aes_key
@pytest.mark.parametrize("blocks", [1, 3, 500])  # 8,000 bytes: more than a YubiHSM takes at once
async def test_aes(store: Store, name: str, blocks: int, symmetric_keys: Any) -> None:
    data, iv, key = secrets.token_bytes(16 * blocks), secrets.token_bytes(16), symmetric_keys[name].hex()
    cipher = f"-aes-{name.removeprefix('aes')}"
    async with opened(store, name) as found:
        assert found.algorithm is ALGORITHMS[name]
        ecb, cbc = await found.encrypt_ecb(data), await found.encrypt_cbc(iv, data)
        assert await found.decrypt_ecb(ecb) == await found.decrypt_cbc(iv, cbc) == data
    assert ecb == openssl(f"enc {cipher}-ecb -K {key} -nopad", data)
    assert cbc == openssl(f"enc {cipher}-cbc -K {key} -iv {iv.hex()} -nopad", data)


@every_provider
@pytest.mark.parametrize("size", [1, 16, 100, 3000])
async def test_hmac(store: Store, size: int, symmetric_keys: Any) -> None:
    data = secrets.token_bytes(size)
    async with opened(store, "hmac") as key:
        mac = await key.hmac_sha256(data)
    options = f"-mac HMAC -macopt hexkey:{symmetric_keys['hmac'].hex()}"
    assert mac == openssl(f"dgst -sha256 -binary {options}", data)


@every_provider
@every_aes_key
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 32, 5000])
async def test_cmac(store: Store, name: str, size: int, symmetric_keys: Any) -> None:
    data = secrets.token_bytes(size)
    async with opened(store, name) as key:
        mac = await cmac(key, data)
    options = f"-cipher AES-{name.removeprefix('aes')}-CBC -macopt hexkey:{symmetric_keys[name].hex()}"
    assert mac == openssl(f"mac {options} -binary CMAC", data)


@every_provider
async def test_what_a_symmetric_key_is_not_for(store: Store) -> None:
    block = bytes(16)
    async with opened(store, "aes128") as aes, opened(store, "hmac") as mac:
        for call in (
            aes.hmac_sha256(block), mac.encrypt_ecb(block), mac.decrypt_cbc(block, block),
            aes.encrypt_ecb(b""), aes.encrypt_ecb(bytes(15)), aes.decrypt_ecb(bytes(17)), aes.encrypt_cbc(block, b""),
            aes.encrypt_cbc(bytes(15), block), aes.decrypt_cbc(b"", block), mac.hmac_sha256(b""),
        ):  # fmt: skip
            with pytest.raises(KeyUnsuited):
                await call
        # and the keys are as good as before
        assert len(await aes.encrypt_ecb(block)) == 16
        assert len(await mac.hmac_sha256(block)) == 32


@every_provider
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("aes128", {SymmetricAlgorithm.AES_256}),
        ("aes256", {SymmetricAlgorithm.AES_128}),
        ("hmac", {SymmetricAlgorithm.AES_128}),
    ],
)
async def test_symmetric_key_of_another_type(store: Store, name: str, wanted: set[SymmetricAlgorithm]) -> None:
    with pytest.raises(KeyProblem, match="for AES-"):
        async with store.provider.open_symmetric(store.reference(name), wanted):
            pass


@every_provider
async def test_neither_is_the_other(store: Store) -> None:
    with pytest.raises(KeyProblem):
        async with store.provider.open(store.reference("aes256")):
            pass
    with pytest.raises(KeyProblem):
        async with store.provider.open_symmetric(store.reference("rsa2048"), frozenset(SymmetricAlgorithm)):
            pass


@every_provider
async def test_missing_symmetric_key(store: Store) -> None:
    with pytest.raises(KeyNotFound) as caught:
        async with store.provider.open_symmetric(store.reference("absent"), frozenset(SymmetricAlgorithm)):
            pass
    assert caught.value.hint


@every_provider
async def test_place(store: Store) -> None:
    places = []
    for name in (*ALGORITHMS, *ALGORITHMS):
        async with opened(store, name) as key:
            places.append(key.place)
    assert len(set(places)) == len(ALGORITHMS)


@every_provider
async def test_many_symmetric_operations_at_once(store: Store, symmetric_keys: Any) -> None:
    blocks = [bytes([number]) * 16 for number in range(50)]
    async with opened(store, "aes256") as key:
        made = await asyncio.gather(*(key.encrypt_ecb(block) for block in blocks))
    assert b"".join(made) == openssl(f"enc -aes-256-ecb -K {symmetric_keys['aes256'].hex()} -nopad", b"".join(blocks))


@every_provider
@every_symmetric_key
async def test_symmetric_key_after_the_job(store: Store, name: str) -> None:
    async with opened(store, name) as key:
        pass
    with pytest.raises(ProviderProblem, match="ended"):
        await (key.hmac_sha256(bytes(16)) if name == "hmac" else key.encrypt_ecb(bytes(16)))
