"""The S3 provider over real sockets: against moto's server, and against servers in trouble."""

import asyncio
import contextlib
import hashlib
import json
import logging
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from pydantic import ValidationError

from tokens.errors import (
    Error,
    KeyMismatch,
    KeyNotFound,
    KeyUnusable,
    ProviderRefused,
    ProviderTimeout,
    ProviderUnavailable,
)
from tokens.file import FileProvider, FileSettings
from tokens.keyfile import KEY_FILE_MAX_BYTES
from tokens.provider import KeyFiles, KeyProvider, KeyReference
from tokens.s3 import S3Provider, S3Settings
from tokens.schemes import Ecdsa, Hash
from tokens.secret import SecretSource

DIGEST = hashlib.sha256(b"what is signed").digest()
P256 = Ecdsa(Hash.SHA256)
PASSPHRASE = b"canary of a passphrase"

pytestmark = pytest.mark.usefixtures("aws")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 2
    while left := [thread.name for thread in threading.enumerate() if thread.name.startswith("bucket-")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


@pytest.fixture
def bucket(s3_endpoint: str, keys: Any, request: pytest.FixtureRequest) -> str:
    """A bucket of this test's own, in digsigserver's layout."""
    name = "b" + hashlib.sha256(request.node.name.encode()).hexdigest()[:20]
    with contextlib.closing(boto3.client("s3", endpoint_url=s3_endpoint)) as client:
        client.create_bucket(Bucket=name)
        put = {
            "keys/poky/swupdate/private.key": keys["p256"].pem,
            "keys/poky/swupdate/cms.cert": keys["p256"].certificate_pem,
            "keys/poky/swupdate/other.cert": keys["p384"].certificate_pem,
            "keys/large": keys["p256"].pem + b"#" * (KEY_FILE_MAX_BYTES - len(keys["p256"].pem)),
            "keys/larger": keys["p256"].pem + b"#" * (KEY_FILE_MAX_BYTES - len(keys["p256"].pem) + 1),
            "keys/text": b"no key",
            "keys/encrypted": encrypted(keys["p256"]),
        }
        for key, body in put.items():
            client.put_object(Bucket=name, Key=key, Body=body)
    return name


@contextlib.asynccontextmanager
async def running(endpoint: str, **settings: Any) -> AsyncIterator[S3Provider]:
    provider = S3Provider(
        "bucket", S3Settings(**{"kind": "s3", "bucket": "keys", "endpoint_url": endpoint, "attempts": 1} | settings)
    )
    await provider.start()
    yield provider
    await provider.stop()


async def sign(provider: KeyProvider, path: str, certificate: str | None = None) -> bytes:
    async with provider.open(KeyReference(object=path, certificate=certificate)) as key:
        return await key.sign(P256, DIGEST)


@pytest.mark.parametrize("prefix", ["keys", "keys/", "/keys/"])
async def test_layout(s3_endpoint: str, bucket: str, prefix: str) -> None:
    async with running(s3_endpoint, bucket=bucket, prefix=prefix, aliases=("YubiHSM",)) as provider:
        await provider.check()
        assert await sign(provider, "poky/swupdate/private.key", "poky/swupdate/cms.cert")
        with pytest.raises(KeyMismatch):
            await sign(provider, "poky/swupdate/private.key", "poky/swupdate/other.cert")
        assert provider.kind == "s3"
        assert provider.uri_attributes == {"token": {"bucket", "YubiHSM"}}
    async with running(s3_endpoint, bucket=bucket) as provider:
        assert await sign(provider, f"{prefix.strip('/')}/poky/swupdate/private.key")


async def test_a_file_of_a_key_set(s3_endpoint: str, bucket: str) -> None:
    async with running(s3_endpoint, bucket=bucket, prefix="keys") as provider:
        assert isinstance(provider, KeyFiles)
        assert await provider.read(KeyReference(object="text")) == b"no key"
        for reference in (KeyReference(object="../keys/text"), KeyReference(object="none"), KeyReference(id=b"1")):
            with pytest.raises(KeyNotFound):
                await provider.read(reference)


@pytest.mark.parametrize(
    "path", ["absent", "", "..", "../keys/text", "poky//swupdate/private.key", "/text", "x" * 1025]
)
async def test_missing_key(s3_endpoint: str, bucket: str, path: str) -> None:
    async with running(s3_endpoint, bucket=bucket, prefix="keys") as provider:
        with pytest.raises(KeyNotFound) as caught:
            await sign(provider, path)
        assert caught.value.hint
        with pytest.raises(KeyNotFound):
            await sign(provider, "poky/swupdate/private.key", certificate=path)


async def test_missing_bucket(s3_endpoint: str) -> None:
    async with running(s3_endpoint, bucket="no-such-bucket") as provider:
        for call in (provider.check(), sign(provider, "key")):
            with pytest.raises(ProviderUnavailable, match="NoSuchBucket") as caught:
                await call
            assert "bucket" in caught.value.hint


async def test_unusable_objects(s3_endpoint: str, bucket: str) -> None:
    async with running(s3_endpoint, bucket=bucket, prefix="keys") as provider:
        assert await sign(provider, "large")
        with pytest.raises(KeyUnusable, match="more than 1048576 bytes"):
            await sign(provider, "larger")
        with pytest.raises(KeyUnusable, match="no private key"):
            await sign(provider, "text")
        with pytest.raises(KeyUnusable, match="encrypted"):
            await sign(provider, "encrypted")


@contextlib.contextmanager
def authentication(endpoint: str) -> Iterator[None]:
    """moto checks who asks, and knows nobody."""

    def begin_after(actions: str) -> str:
        plain = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", actions.encode(), plain)  # noqa: S310 http
        with urllib.request.urlopen(request) as response:  # noqa: S310 http
            return str(json.load(response)["PREVIOUS_INITIAL_NO_AUTH_ACTION_COUNT"])

    before = begin_after("0")
    yield
    begin_after(before)


async def test_credentials_that_are_refused(s3_endpoint: str, bucket: str) -> None:
    async with running(s3_endpoint, bucket=bucket, prefix="keys") as provider:
        with authentication(s3_endpoint):
            for call in (provider.check(), sign(provider, "poky/swupdate/private.key")):
                with pytest.raises(ProviderRefused, match="InvalidAccessKeyId") as caught:
                    await call
                assert "credentials" in caught.value.hint
        assert await sign(provider, "poky/swupdate/private.key")


async def test_no_credentials(s3_endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(s3_endpoint, bucket=bucket, prefix="keys") as provider:
        with monkeypatch.context() as patch:
            patch.delenv("AWS_ACCESS_KEY_ID")
            patch.delenv("AWS_SECRET_ACCESS_KEY")
            with pytest.raises(ProviderRefused, match="no AWS credentials"):
                await sign(provider, "poky/swupdate/private.key")
            patch.setenv("AWS_PROFILE", "absent")
            with pytest.raises(ProviderRefused, match="no AWS credentials"):
                await provider.check()
        # they are looked for again, without a restart
        assert await sign(provider, "poky/swupdate/private.key")


async def test_role_that_may_not_be_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token service's AccessDenied is not the bucket's."""
    (tmp_path / "token").write_text("a web identity")
    body = b"<ErrorResponse>" + error_body("AccessDenied").removeprefix(b"<?xml version='1.0'?>") + b"</ErrorResponse>"
    async with serving(answering("403 Forbidden", body)) as server, running(server.url) as provider:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/signing")
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server.url)
        with pytest.raises(ProviderRefused, match="AssumeRoleWithWebIdentity was answered AccessDenied"):
            await provider.check()


Handler = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """A server that reads a request's head and then does what the test says."""

    handler: Handler
    url: str = ""
    requests: int = 0
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n\r\n"):
                self.requests += 1
                self.asked.set()
                await self.handler(writer)


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Server]:
    made = Server(handler)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield made


def answering(status: str, body: bytes = b"", headers: str = "") -> Handler:
    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body)

    return handler


def error_body(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()


async def never(_writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


def trickling(data: bytes) -> Handler:
    async def handler(writer: asyncio.StreamWriter) -> None:
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.05)

    return handler


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n"


async def test_down() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        async with running(endpoint, attempts=2) as provider:
            for call in (provider.check(), sign(provider, "key")):
                with pytest.raises(ProviderUnavailable) as caught:
                    await call
                assert caught.value.retry_after > 0
                assert "endpoint_url" in caught.value.hint


async def test_name_that_does_not_resolve() -> None:
    async with running("http://s3.invalid") as provider:
        with pytest.raises(ProviderUnavailable):
            await provider.check()


async def test_silent() -> None:
    async with serving(never) as server, running(server.url, read_timeout_s=0.2, attempts=2) as provider:
        with pytest.raises(ProviderTimeout, match="did not answer"):
            await sign(provider, "key")
        assert server.requests == 2


async def test_silent_for_longer_than_a_call_may_take() -> None:
    began = time.monotonic()
    async with serving(never) as server, running(server.url, call_timeout_s=0.5) as provider:
        with pytest.raises(ProviderTimeout, match=r"within 0\.5 s"):
            await sign(provider, "key")
    assert time.monotonic() - began < 5, "stop() waited for the thread of a call that was over"


@pytest.mark.parametrize("begin", [b"", HEAD], ids=["head", "body"])
async def test_trickling(begin: bytes) -> None:
    trickle = trickling(HEAD + b"x" * 1000)

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(begin)
        await trickle(writer)

    began = time.monotonic()
    async with serving(handler) as server:
        async with running(server.url, call_timeout_s=0.7, attempts=5) as provider:
            # more than there are threads: each comes to its end
            calls = [sign(provider, "key") for _ in range(6)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(result) for result in results] == [ProviderTimeout] * 6
        assert server.requests <= 6, "a call that was broken off is not tried again"
    assert time.monotonic() - began < 5


async def test_connection_that_comes_too_late() -> None:
    """The call is over before it has a socket that could be shut down."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(2):  # its queue is full: whoever comes next is not connected yet
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        listener.setblocking(False)

        async def accept() -> None:
            while True:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
                stack.enter_context(connection)

        async with running(f"http://127.0.0.1:{listener.getsockname()[1]}", call_timeout_s=0.5) as provider:
            with pytest.raises(ProviderTimeout):
                await sign(provider, "key")
            began = time.monotonic()
            accepting = asyncio.create_task(accept())
            await provider.stop()
            accepting.cancel()
            assert 0.1 < time.monotonic() - began < 8, "the thread was still connecting, and gave up when it had"


async def test_client_that_hangs_up() -> None:
    """A job that is cancelled leaves no call behind."""
    async with serving(never) as server:
        async with running(server.url) as provider:
            job = asyncio.create_task(sign(provider, "key"))
            await server.asked.wait()
            job.cancel()
            with pytest.raises(asyncio.CancelledError):
                await job
            began = time.monotonic()
        assert time.monotonic() - began < 5


ANSWERS = {
    "denied": ("403 Forbidden", error_body("AccessDenied"), ProviderRefused, "s3:ListBucket"),
    "denied without a body": ("403 Forbidden", b"", ProviderRefused, "s3:ListBucket"),
    "wrong secret": ("403 Forbidden", error_body("SignatureDoesNotMatch"), ProviderRefused, "credentials"),
    "unknown key id": ("403 Forbidden", error_body("InvalidAccessKeyId"), ProviderRefused, "credentials"),
    "wrong clock": ("403 Forbidden", error_body("RequestTimeTooSkewed"), ProviderRefused, "clock"),
    "old token": ("400 Bad Request", error_body("ExpiredToken"), ProviderRefused, "credentials"),
    "another region": ("400 Bad Request", error_body("AuthorizationHeaderMalformed"), ProviderRefused, "region"),
    "no key": ("404 Not Found", error_body("NoSuchKey"), KeyNotFound, "grant"),
    "nothing there": ("404 Not Found", b"", KeyNotFound, "grant"),
    "no bucket": ("404 Not Found", error_body("NoSuchBucket"), ProviderUnavailable, "bucket"),
    "too fast": ("503 Slow Down", error_body("SlowDown"), ProviderUnavailable, "later"),
    "broken": ("500 Internal Server Error", b"<html>", ProviderUnavailable, ""),
    "no S3": ("200 OK", b"<html>hello</html>", KeyUnusable, ""),
    "hostile code": ("400 Bad Request", error_body("a" * 5000), ProviderRefused, ""),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_answers(name: str) -> None:
    status, body, expected, hint = ANSWERS[name]
    async with serving(answering(status, body)) as server, running(server.url) as provider:
        with pytest.raises(expected) as caught:
            await sign(provider, "key")
        assert hint in caught.value.hint
        assert len(caught.value.message) < 200


async def test_attempts() -> None:
    async with serving(answering("500 Internal Server Error")) as server, running(server.url, attempts=2) as provider:
        with pytest.raises(ProviderUnavailable):
            await sign(provider, "key")
        assert server.requests == 2


async def test_check_of_a_bucket_that_may_not_be_listed() -> None:
    """S3 then says AccessDenied of any object that is not there, so that this cannot be an error."""
    async with (
        serving(answering("403 Forbidden", error_body("AccessDenied"))) as server,
        running(server.url) as provider,
    ):
        await provider.check()
    async with (
        serving(answering("403 Forbidden", error_body("SignatureDoesNotMatch"))) as server,
        running(server.url) as provider,
    ):
        with pytest.raises(ProviderRefused):
            await provider.check()


async def test_cut_off() -> None:
    """A connection that ends before the object does."""

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"-----BEGIN")
        raise ConnectionError

    async with serving(handler) as server, running(server.url) as provider:
        with pytest.raises(ProviderUnavailable):
            await sign(provider, "key")


async def test_endless() -> None:
    """Without a length, and without an end."""

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 4096)
            await writer.drain()

    async with serving(handler) as server, running(server.url) as provider:
        with pytest.raises(KeyUnusable, match="more than 1048576 bytes"):
            await sign(provider, "key")


async def test_good_again(keys: Any) -> None:
    """After trouble of each kind the next good request works."""
    good = answering("200 OK", keys["p256"].pem)
    async with serving(good) as server, running(server.url, read_timeout_s=0.2, call_timeout_s=0.4) as provider:
        for bad in (never, trickling(HEAD), answering("403 Forbidden"), answering("500 Internal Server Error")):
            server.handler = bad
            with pytest.raises(Error):
                await sign(provider, "key")
            server.handler = good
            assert await sign(provider, "key")


async def test_stop(s3_endpoint: str, bucket: str) -> None:
    async with running(s3_endpoint, bucket=bucket, prefix="keys") as provider:
        running_job = asyncio.create_task(sign(provider, "poky/swupdate/private.key"))
        await asyncio.sleep(0.01)
        await provider.stop()
        assert await running_job
        for call in (provider.check(), sign(provider, "poky/swupdate/private.key")):
            with pytest.raises(ProviderUnavailable, match="stopped"):
                await call


def test_boto3_is_imported_when_it_is_needed() -> None:
    program = "import sys, tokens.registry; sys.exit('boto3' in sys.modules or 'botocore' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def files_with(secrets: list[bytes], directories: list[Path]) -> list[Path]:
    files = [file for directory in directories for file in directory.rglob("*") if file.is_file()]
    return [file for file in files if any(secret in file.read_bytes() for secret in secrets)]


def parts(key: Any) -> list[bytes]:
    """The private scalar's bytes, and lines of the key file."""
    scalar = key.private.private_numbers().private_value.to_bytes(32, "big")
    return [scalar, scalar.hex().encode(), *key.pem.splitlines()[1:-1]]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go, and files with a relative path."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return directory


def encrypted(key: Any) -> bytes:
    data: bytes = key.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSPHRASE))
    return data


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, keys: Any, tmp_path: Path) -> KeyProvider:
    """A key store with an encrypted key, whose passphrase is in the file `passphrase`."""
    (tmp_path / "passphrase").write_bytes(PASSPHRASE + b"\n")
    source = SecretSource(file=tmp_path / "passphrase")
    if request.param == "s3":
        bucket, endpoint = request.getfixturevalue("bucket"), request.getfixturevalue("s3_endpoint")
        settings = S3Settings(kind="s3", bucket=bucket, prefix="keys", endpoint_url=endpoint, passphrase=source)
        return S3Provider("bucket", settings)
    root = tmp_path / "root"
    root.mkdir()
    (root / "encrypted").write_bytes(encrypted(keys["p256"]))
    (root / "text").write_bytes(b"no key")
    return FileProvider("bucket", FileSettings(kind="file", root=root, passphrase=source))


async def test_canary(
    store: KeyProvider, scratch: Path, keys: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No key byte reaches the disk, a log or an error; neither does the passphrase."""
    caplog.set_level(logging.DEBUG)
    watched = [scratch, Path("/dev/shm")]  # noqa: S108 it is looked at only
    secrets = [PASSPHRASE, *parts(keys["p256"])]
    (scratch / "proof").write_bytes(secrets[-1])
    assert files_with(secrets, watched) == [scratch / "proof"], "what the test looks for, it finds"
    (scratch / "proof").unlink()

    async with store.open(KeyReference(object="encrypted")) as key:
        await key.sign(P256, DIGEST)
        assert not files_with(secrets, watched)
    assert not files_with(secrets, watched)
    told = repr(key) + repr(store) + repr(vars(store))
    (tmp_path / "passphrase").write_bytes(b"another " + PASSPHRASE)
    for path in ("encrypted", "text", "absent"):
        with pytest.raises(Error) as caught:
            await sign(store, path)
        told += "".join(traceback.format_exception(caught.value)) + caught.value.hint
    await store.stop()
    told += caplog.text
    assert "KeyNotFound" in told
    for secret in secrets:
        assert secret not in told.encode()
        assert repr(secret) not in told


@pytest.mark.parametrize(
    "wrong",
    [
        {"bucket": ""},
        {"endpoint_url": "127.0.0.1:9000"},
        {"endpoint_url": "file:///keys"},
        {"endpoint_url": "http://a b"},
        {"endpoint_url": "http://host\n"},
        {"attempts": 0},
        {"call_timeout_s": 0},
        {"secret_access_key": "text"},
    ],
)
def test_settings_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        S3Settings.model_validate({"kind": "s3", "bucket": "keys"} | wrong)
