"""S3: keys in a bucket, fetched when a job opens them, gone after it, never on disk; and artifacts that stay there.

    [providers.keys]
    kind = "s3"
    bucket = "firmware-keys"
    prefix = "production"

Credentials come from boto3's usual chain: AWS_* variables, a profile, the role of the container or instance.
"""

import asyncio
import contextlib
import os
import re
import socket
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, TypeVar
from urllib.parse import urlencode

from pydantic import BaseModel, ConfigDict, Field

from tokens.errors import (
    ArtifactChanged,
    ArtifactNotFound,
    ArtifactRejected,
    Error,
    KeyNotFound,
    ProviderProblem,
    ProviderRefused,
    ProviderTimeout,
    ProviderUnavailable,
    StoreFailed,
    StoreProblem,
)
from tokens.keyfile import KEY_FILE_MAX_BYTES, MemoryKey, check_size, open_key, read_file
from tokens.provider import KeyReference
from tokens.secret import SecretSource
from tokens.symmetric import SymmetricAlgorithm
from tokens.symmetric_file import MemorySymmetricKey, open_symmetric_key
from tokens.threads import Threads

if TYPE_CHECKING:
    from botocore.exceptions import ClientError
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")
Seconds = Annotated[float, Field(gt=0)]

_CALLS = 4
"""Calls at once: a job makes one or two, of some milliseconds each."""

_PROBE = ".hsmsign-check"
"""The object that `check` asks for. It need not exist."""


class BucketSettings(BaseModel):
    """A bucket, and how it is reached."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bucket: Annotated[str, Field(min_length=1)]
    """The bucket's name."""
    prefix: str = ""
    """The "directory" of the bucket that all objects are below."""
    endpoint_url: (
        Annotated[str, Field(pattern=r"\Ahttps?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(:[0-9]+)?(/\S*)?\z")] | None
    ) = None
    """Another S3 server than Amazon's; the bucket then stands in the path of the URL, not in the host's name."""
    region: str | None = None
    """The bucket's region, where the environment or profile does not say it."""
    connect_timeout_s: Seconds = 5.0
    """How long making the connection may take, each time."""
    read_timeout_s: Seconds = 20.0
    """How long the server may be silent."""
    attempts: Annotated[int, Field(ge=1, le=10)] = 2
    """How often a call is tried in all."""


class S3Settings(BucketSettings):
    """`[providers.NAME]` with `kind = "s3"`."""

    kind: Literal["s3"]
    passphrase: SecretSource | None = None
    """Where the passphrase of the keys that are encrypted comes from."""
    aliases: tuple[str, ...] = ()
    """Names of a token that a client's pkcs11: URI may use for this provider."""
    call_timeout_s: Seconds = 30.0
    """How long a call may take with all its attempts."""


class S3Provider:
    """The key files in a bucket. Implements `tokens.provider.KeyProvider`."""

    kind = "s3"

    def __init__(self, name: str, settings: S3Settings) -> None:
        self.name = name
        self._settings = settings
        self._callers = Threads(f"{name}-s3", _CALLS)
        self._signers = Threads(f"{name}-sign", os.cpu_count() or 1)
        self._client: S3Client | None = None
        self._connecting = threading.Lock()

    @property
    def uri_attributes(self) -> Mapping[str, frozenset[str]]:
        """`token` may be the provider's name or an alias."""
        return {"token": frozenset({self.name, *self._settings.aliases})}

    async def start(self) -> None:
        """Nothing to do: the client and the threads are made when they are needed."""

    async def stop(self) -> None:
        """Finishes what runs, ends the threads and closes the connections."""
        await self._callers.stop()
        await self._signers.stop()
        if self._client is not None:
            self._client.close()

    async def check(self) -> None:
        """Asks for an object that need not exist.

        That takes no right but s3:GetObject. AccessDenied is what S3 says of a missing object to who may not list
        the bucket: it shows that the bucket is there and the credentials are good. Whether a key can be read, `open`
        shows.
        """
        with contextlib.suppress(KeyNotFound, _AccessDenied):
            await self._call(lambda client: self._get(client, _PROBE))

    def open(self, reference: KeyReference) -> AbstractAsyncContextManager[MemoryKey]:
        """The key at the path `reference.object` below the prefix; see `KeyProvider.open`."""
        return open_key(reference, self._read, self._settings.passphrase, self._signers)

    def open_symmetric(
        self, reference: KeyReference, wanted: Collection[SymmetricAlgorithm]
    ) -> AbstractAsyncContextManager[MemorySymmetricKey]:
        """The key in the file at the path `reference.object` below the prefix; see `KeyProvider.open_symmetric`."""
        return open_symmetric_key(reference, wanted, self._read, self._signers)

    async def read(self, reference: KeyReference) -> bytes:
        """The file at the path `reference.object` below the prefix; see `KeyFiles.read`."""
        return await read_file(reference, self._read)

    async def _read(self, path: str, _private: bool) -> bytes:
        return await self._call(lambda client: self._get(client, path))

    def _get(self, client: "S3Client", path: str) -> bytes:
        prefix = self._settings.prefix.strip("/")
        key = f"{prefix}/{path}" if prefix else path
        with contextlib.closing(client.get_object(Bucket=self._settings.bucket, Key=key)["Body"]) as body:
            data = b""
            # to the end and one read more: there botocore compares length and checksum
            for chunk in body.iter_chunks(KEY_FILE_MAX_BYTES):
                data = check_size(data + chunk)
        return data

    async def _call(self, function: Callable[["S3Client"], T]) -> T:
        """Runs `function` in a thread, for `call_timeout_s` at most; its thread ends then too, or after a pause."""
        call = _Call()
        try:
            async with asyncio.timeout(self._settings.call_timeout_s):
                return await self._callers.run(self._run, call, function)
        except TimeoutError:
            raise ProviderTimeout(
                f"S3 (provider {self.name}) did not finish within {self._settings.call_timeout_s:g} s.",
                "Check the endpoint and the network, or raise `call_timeout_s`.",
            ) from None
        finally:
            call.abort()

    def _run(self, call: "_Call", function: Callable[["S3Client"], T]) -> T:
        # boto3 and a client take 25 MiB and a quarter of a second: only for those who use them
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        _thread.call = call
        try:
            return function(self._connected())
        except ClientError as error:
            raise self._answered(error) from None
        except (BotoCoreError, ResponseParserError, HTTPError, OSError, CancelledError) as error:
            raise self._failed(error) from None
        finally:
            call.release()

    def _connected(self) -> "S3Client":
        with self._connecting:
            if self._client is None:
                self._client = _connect(self._settings)
            return self._client

    def _answered(self, error: "ClientError") -> Error:
        """The error for what S3 answered (Amazon S3 API Reference, "Error responses")."""
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        said = f"S3 (provider {self.name}) answered {_printable(code)}"
        if error.operation_name != "GetObject":
            # the security token service was asked, for a role's credentials
            return ProviderRefused(
                f"Provider {self.name} got no AWS credentials: {error.operation_name} was answered {_printable(code)}.",
                "Check the service's role and who may assume it.",
            )
        if code == "NoSuchBucket":
            return ProviderUnavailable(f"{said}.", "Check `bucket`, `endpoint_url` and `region`.", retry_after=60)
        if status == 404:
            return KeyNotFound(f"{said}.", "Put the object there, or correct `object` or `certificate` in the grant.")
        if code in ("AccessDenied", "403"):
            return _AccessDenied(
                f"{said}.",
                "Grant s3:GetObject, and check the path: without s3:ListBucket S3 says this of a missing key too.",
            )
        if status >= 500 or code in _SLOW_DOWN:
            return ProviderUnavailable(f"{said}.", "Try again later.")
        at_fault = "credentials, and its clock" if status in (401, 403) or code in _BAD_TOKEN else "endpoint and region"
        return ProviderRefused(f"{said}.", f"Check the service's AWS {at_fault}.")

    def _failed(self, error: Exception) -> ProviderProblem:
        """The error where S3 did not answer, or was not even asked."""
        from botocore.exceptions import (
            ConnectTimeoutError,
            CredentialRetrievalError,
            NoCredentialsError,
            PartialCredentialsError,
            ProfileNotFound,
            ReadTimeoutError,
        )

        match error:
            case NoCredentialsError() | PartialCredentialsError() | CredentialRetrievalError() | ProfileNotFound():
                # a client keeps what it found when it was made: the next call looks again
                self._client = None
                return ProviderRefused(
                    f"There are no AWS credentials for provider {self.name}.",
                    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role for the service.",
                )
            case ConnectTimeoutError() | ReadTimeoutError():
                return ProviderTimeout(
                    f"S3 (provider {self.name}) did not answer in time.",
                    "Check the endpoint and the network, or raise `connect_timeout_s` and `read_timeout_s`.",
                )
            case _:
                return ProviderUnavailable(
                    f"S3 (provider {self.name}) cannot be used: {type(error).__name__}.",
                    "Check `endpoint_url`, the network and the server's certificate.",
                )


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An artifact in a bucket, as it was when it was fetched.

    Arguments:
        size: in bytes.
        etag: what S3 called this version of it.
        kept: what the one that replaces it takes over, by the names of PutObject's parameters.
    """

    settings: BucketSettings
    key: str
    size: int
    etag: str
    kept: Mapping[str, Any]


OBJECT_MAX_BYTES = 5 * 1024**3
"""What one PutObject may hold (Amazon S3 User Guide, "Uploading objects"): only that can replace under a condition."""

FETCH_CHUNK_BYTES = 1024 * 1024
"""How much of an object is in memory while it is fetched."""

_KEPT = (
    "CacheControl",
    "ContentDisposition",
    "ContentEncoding",
    "ContentLanguage",
    "ContentType",
    "Metadata",
    "SSEKMSKeyId",
    "ServerSideEncryption",
    "StorageClass",
)


async def fetch_object(settings: BucketSettings, key: str, path: Path, max_bytes: int) -> StoredObject:
    """Writes an object to a new file.

    Raises ArtifactNotFound, StoreFailed, and ArtifactRejected where it is larger than `max_bytes` or PutObject allows.
    """

    def fetch(client: "S3Client") -> StoredObject:
        answer = client.get_object(Bucket=settings.bucket, Key=key)
        with contextlib.closing(answer["Body"]) as body, path.open("xb") as file:
            largest = min(max_bytes, OBJECT_MAX_BYTES)
            if answer["ContentLength"] > largest:
                raise ArtifactRejected(
                    f"The object has {answer['ContentLength']} bytes; {largest} are allowed.", "Send it as a file."
                )
            for chunk in body.iter_chunks(FETCH_CHUNK_BYTES):
                file.write(chunk)
        kept: dict[str, Any] = {name: answer[name] for name in _KEPT if name in answer}  # type: ignore[literal-required]
        if answer.get("TagCount"):  # said to those who may read them
            tags = client.get_object_tagging(Bucket=settings.bucket, Key=key)["TagSet"]
            kept["Tagging"] = urlencode({tag["Key"]: tag["Value"] for tag in tags})
        return StoredObject(settings, key, answer["ContentLength"], answer["ETag"], kept)

    return await _with_client(settings, fetch)


async def replace_object(stored: StoredObject, content: BinaryIO) -> None:
    """Puts a content in the place of an object, where that is still the one that was fetched.

    The metadata and tags of the object stay. Raises ArtifactChanged, ArtifactNotFound, StoreFailed.
    """

    def replace(client: "S3Client") -> None:
        client.put_object(
            Bucket=stored.settings.bucket, Key=stored.key, IfMatch=stored.etag, Body=content, **stored.kept
        )

    await _with_client(stored.settings, replace)


async def _with_client(settings: BucketSettings, function: Callable[["S3Client"], T]) -> T:
    """Runs `function` in a thread of its own, which is broken off where nobody waits for it any more."""
    call = _Call()
    thread = ThreadPoolExecutor(1, thread_name_prefix="s3-artifact")
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, _ask, settings, call, function)
    finally:
        call.abort()
        thread.shutdown(wait=False)


def _ask(settings: BucketSettings, call: "_Call", function: Callable[["S3Client"], T]) -> T:
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    _thread.call = call
    try:
        with contextlib.closing(_connect(settings)) as client:
            return function(client)
    except ClientError as error:
        raise _refused(error) from None
    except (BotoCoreError, ResponseParserError, HTTPError, OSError, CancelledError) as error:
        raise StoreFailed(
            f"The artifact's bucket cannot be used: {type(error).__name__}.",
            "Check the service's AWS credentials, `endpoint_url`, the network and the server's certificate.",
        ) from None
    finally:
        call.release()


def _refused(error: "ClientError") -> StoreProblem:
    """The error for what S3 answered of an artifact."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in ("PreconditionFailed", "ConditionalRequestConflict"):
        return ArtifactChanged("Another object was put in the artifact's place while it was signed.", "Try again.")
    if status == 404 and code != "NoSuchBucket":
        return ArtifactNotFound("There is no such object.", "Check the artifact's URI.")
    return StoreFailed(
        f"S3 answered {_printable(code)} to {error.operation_name}.",
        "Check the URI (without s3:ListBucket a missing object is AccessDenied too), `bucket` and `region`, and what"
        " the service may do: s3:GetObject and s3:PutObject, for objects with tags s3:GetObjectTagging and"
        " s3:PutObjectTagging too.",
    )


def _connect(settings: BucketSettings) -> "S3Client":
    import boto3
    from botocore.config import Config

    client = boto3.session.Session().client(
        "s3",
        endpoint_url=settings.endpoint_url,
        region_name=settings.region,
        config=Config(
            connect_timeout=settings.connect_timeout_s,
            read_timeout=settings.read_timeout_s,
            retries={"total_max_attempts": settings.attempts, "mode": "standard"},
            s3={"addressing_style": "path"} if settings.endpoint_url else {},
        ),
    )
    _make_breakable(client)
    return client


class _AccessDenied(ProviderRefused):
    """S3 answered AccessDenied: no right to the object, or it is not there."""


_BAD_TOKEN = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired"})
"""Said with status 400."""

_SLOW_DOWN = frozenset({"RequestTimeout", "SlowDown", "Throttling", "TooManyRequests", "429"})


def _printable(code: str) -> str:
    return code if re.fullmatch(r"[A-Za-z0-9.]{1,64}", code) else "an error"


# botocore has timeouts for each read and none for a call: a server that sends a byte now and then would hold a
# thread for ever. So each connection says which call it works for, and `_Call.abort` shuts its socket down.


class _Call:
    """One call, and how to break it off from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._over = False
        self._connection: Any = None

    def use(self, connection: Any) -> None:
        """This connection works for the call from now on. Raises CancelledError after `abort`."""
        with self._lock:
            if self._over:
                # of all that a connection can raise only this does not make botocore try again
                raise CancelledError
            self._connection = connection

    def release(self) -> None:
        """The call has ended; its connection may be in use for another one."""
        with self._lock:
            self._connection = None

    def abort(self) -> None:
        """Ends whatever the call's thread waits for."""
        with self._lock:
            self._over = True
            sock = getattr(self._connection, "sock", None)
            if sock is not None:
                # a duplicate: the shutdown reaches the connection below TLS, and nothing is changed under the thread
                with contextlib.suppress(OSError, ValueError), socket.socket(fileno=os.dup(sock.fileno())) as twin:
                    twin.shutdown(socket.SHUT_RDWR)


_thread = threading.local()


def _make_breakable(client: Any) -> None:
    """Has the client's connections report to the call that their thread works for."""
    # urllib3 lets a pool manager's pool classes be replaced; botocore offers no public way to its manager
    pools = client._endpoint.http_session._pool_classes_by_scheme
    for scheme, pool in pools.items():
        pools[scheme] = type(pool.__name__, (pool,), {"ConnectionCls": _breakable(pool.ConnectionCls)})


def _breakable(base: Any) -> Any:
    class Connection(base):  # type: ignore[misc]  # the base is known at run time only
        def connect(self) -> None:
            _thread.call.use(self)
            super().connect()
            # an abort that came before there was a socket has not shut it down
            _thread.call.use(self)

        def request(self, *args: Any, **kwargs: Any) -> Any:
            _thread.call.use(self)
            return super().request(*args, **kwargs)

    return Connection
