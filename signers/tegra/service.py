"""Answers, at a socket of the job, what NVIDIA's scripts ask of the program that uses keys.

    async with KeyService(directory / "service", keys, limits, job, program) as service:
        ...run the scripts, with client.pl in the program's place...

The scripts have a public key and placeholders, which stand for keys that never get there. All that leaves is
signatures, ciphertexts, their tags and MACs.
"""

import asyncio
import hashlib
import logging
import os
import secrets
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography.hazmat.primitives import hmac
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256

from signers.formats import tegra_requests as requests
from signers.formats.tegra_requests import KdfRequest, RequestError, SignRequest
from signers.signer import Job
from tokens.cmac import cmac
from tokens.errors import Error, ToolUnavailable
from tokens.lending.server import PATH_MAX_BYTES
from tokens.provider import SigningKey, SymmetricKey
from tokens.schemes import Ecdsa, Ed25519, Hash, RsaPss, Scheme
from tokens.symmetric import BLOCK_BYTES, SymmetricAlgorithm

SALT_BYTES = 32
"""The salt of RSA-PSS, with every hash function (../shared/tegra.md, section 1.4)."""

ARGUMENTS_MAX = 16
ARGUMENT_MAX_BYTES = 4096

CONNECTIONS_MAX = 16
"""How many programs may ask at once; one after the other is answered."""

_RUN_PROGRAM = 255
_WITHOUT_KEYS = frozenset((b"--sha", b"--chip"))

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JobKeys:
    """The keys of a job.

    Arguments:
        signing: the machine's key.
        public_pem: its public half, as the scripts have it.
        placeholders: symmetric keys, by the bytes that stand for them in the job.
    """

    signing: SigningKey
    public_pem: bytes
    placeholders: Mapping[bytes, SymmetricKey]


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What one job may ask: how many requests, and the bytes of the largest."""

    requests_max: int
    request_max_bytes: int


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the program in the job does: prints a text, writes files (path, offset, bytes), and ends with a status."""

    text: bytes = b""
    files: tuple[tuple[bytes, int, bytes], ...] = ()
    status: int = 0

    def __bytes__(self) -> bytes:
        parts = [struct.pack(">BI", self.status, len(self.text)), self.text]
        for path, offset, data in self.files:
            parts += [struct.pack(">I", len(path)), path, struct.pack(">II", offset, len(data)), data]
        return b"".join(parts)


@dataclass(slots=True)
class Made:
    """What was made for a job.

    Arguments:
        requests: how many were answered.
        signatures: as they are stored, by the SHA-256 of the message.
        error: the first error of a key.
    """

    requests: int = 0
    signatures: dict[bytes, set[bytes]] = field(default_factory=dict)
    error: Error | None = None

    def signed(self, message: bytes) -> set[bytes]:
        """The signatures that were made over a message; each was verified."""
        return self.signatures.get(hashlib.sha256(message).digest(), set())


class KeyService:
    """Answers for as long as the `async with` lasts.

    Arguments:
        path: where the socket is to be, in a directory that only the job can reach.
        keys: what it answers with.
        limits: what the job may ask.
        job: hashes and encrypts in its threads, and is told of each signature.
        program: NVIDIA's own, as the job sees it: it gets what takes no key.
    """

    def __init__(self, path: Path, keys: JobKeys, limits: ServiceLimits, job: Job, program: str) -> None:
        self.made = Made()
        self._path = path
        self._keys = keys
        self._limits = limits
        self._job = job
        self._program = _Answer(program.encode(), status=_RUN_PROGRAM)
        self._encrypted: dict[tuple[tuple[bytes, ...], bytes], bytes] = {}
        self._one = asyncio.Lock()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._kinds: Mapping[bytes, Callable[[list[bytes], bytes], Awaitable[_Answer]]] = {
            b"--rsa": self._sign, b"--ecc": self._sign, b"--ed25519": self._sign,
            b"--aescbc": self._encrypt, b"--aescmac": self._authenticate, b"--kdfoem": self._derive,
            b"--isPkcKey": self._describe, b"--isPkcPubKey": self._describe,
            b"--isEccKey": self._describe, b"--isEd25519Key": self._describe,
        }  # fmt: skip

    async def __aenter__(self) -> Self:
        if len(os.fsencode(self._path)) > PATH_MAX_BYTES:
            raise ToolUnavailable(
                "NVIDIA's scripts cannot reach the key: the path of their socket would be too long.",
                f"Choose a shorter server.spool_directory: the socket's path may have {PATH_MAX_BYTES} bytes.",
            )
        self._server = await asyncio.start_unix_server(self._connected, self._path)
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        ended = self._server is None or not self._server.is_serving()
        if task is None or ended or len(self._connections) >= CONNECTIONS_MAX:
            writer.close()
            return
        self._connections.add(task)
        try:
            async with self._one:  # there is memory for one request at a time
                arguments, content = await self._read(reader)
                writer.write(bytes(await self._answer(arguments, content)))
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        except RequestError as error:
            _log.warning("a request of NVIDIA's scripts was refused: %s", error)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            _log.debug("a connection of NVIDIA's scripts ended: %r", error)
        except Error as error:
            self.made.error = self.made.error or error
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader) -> tuple[list[bytes], bytes]:
        """The program's arguments, and the file that they name. Raises RequestError."""
        count, size = struct.unpack(">II", await reader.readexactly(8))
        if not 0 < count <= ARGUMENTS_MAX or size > self._limits.request_max_bytes:
            raise RequestError("it is longer than signers.tegra.request_max_bytes, or has too many arguments")
        if self.made.requests >= self._limits.requests_max:
            raise RequestError("the job has asked signers.tegra.requests_max times")
        self.made.requests += 1
        content = await reader.readexactly(size)
        arguments = []
        for _ in range(count):
            (length,) = struct.unpack(">I", await reader.readexactly(4))
            if length > ARGUMENT_MAX_BYTES:
                raise RequestError("an argument that is too long")
            arguments.append(await reader.readexactly(length))
        return arguments, content

    async def _answer(self, arguments: list[bytes], content: bytes) -> _Answer:
        """Raises RequestError, and what a key raises."""
        if arguments[0] in _WITHOUT_KEYS:
            return self._program
        answer = self._kinds.get(arguments[0])
        if answer is None or len(arguments) < 2:
            raise RequestError("it asks for what is not done here")
        return await answer(arguments, content)

    # public keys

    async def _describe(self, arguments: list[bytes], content: bytes) -> _Answer:
        """What the key in a file is; its public half is written where that is wanted."""
        if content != self._keys.public_pem:
            return self._program
        key, paths = self._keys.signing.public_key, arguments[2:]
        match arguments[0], key:
            case ((b"--isPkcKey" | b"--isPkcPubKey"), rsa.RSAPublicKey()):
                text = f"Key size is {key.key_size // 8} bytes"
                contents = [requests.public_key(key), requests.montgomery(key)]
            case b"--isEccKey", ec.EllipticCurvePublicKey():
                text = "Valid ECC key" + (". Key size is 521" if key.key_size == 521 else "")
                contents = [requests.public_key(key)]
            case b"--isEd25519Key", ed25519.Ed25519PublicKey():
                text, contents = "Valid eddsa key", [requests.public_key(key)]
            case _:
                return _Answer()  # what it says of a key of another type: nothing
        return _Answer(
            f"{text}\n".encode(), tuple((path, 0, data) for path, data in zip(paths, contents, strict=False))
        )

    # signatures

    async def _sign(self, arguments: list[bytes], content: bytes) -> _Answer:
        parse = {b"--rsa": requests.parse_rsa, b"--ecc": requests.parse_ecc, b"--ed25519": requests.parse_ed25519}
        request, key = parse[arguments[0]](content), self._keys.signing
        scheme = _scheme(arguments[0], request, key)
        data = request.message
        if not isinstance(scheme, Ed25519):
            data = await self._job.run(_hashed, scheme.hash, data)
        signature = await key.sign(scheme, data)  # which verifies it
        if isinstance(scheme, RsaPss):
            signature = requests.rsa_signature(signature)
        elif isinstance(scheme, Ecdsa):
            signature = requests.ecdsa_signature(signature, request.signature_bytes)
        if len(signature) != request.signature_bytes:
            raise RequestError("a signature of another size than there is room for")
        digest = await self._job.run(_hashed, Hash.SHA256, request.message)
        self.made.signatures.setdefault(digest, set()).add(signature)
        self._job.lent("pkc", scheme)
        _log.info("the message of %d bytes that was signed has the SHA-256 %s", len(request.message), digest.hex())
        files = [(request.output_path, 0, signature)]
        if request.public_key_path is not None:
            files.append((request.public_key_path, 0, requests.public_key(key.public_key)))
        if request.montgomery_path is not None and isinstance(key.public_key, rsa.RSAPublicKey):
            files.append((request.montgomery_path, 0, requests.montgomery(key.public_key)))
        return _Answer(files=tuple(files))

    # encryption

    async def _encrypt(self, _arguments: list[bytes], content: bytes) -> _Answer:
        request = requests.parse_cbc(content)
        key = self._symmetric(request.key, SymmetricAlgorithm.AES_128)
        if key is None:
            return self._program
        if len(request.message) % BLOCK_BYTES:
            raise RequestError("a message that is not of whole blocks")
        encrypted = await key.encrypt_cbc(request.iv or bytes(BLOCK_BYTES), request.message)
        self._note("AES-CBC", request.message)
        return _Answer(files=((request.output_path, 0, encrypted),))

    async def _authenticate(self, _arguments: list[bytes], content: bytes) -> _Answer:
        request = requests.parse_mac(content)
        key = self._symmetric(request.key, SymmetricAlgorithm.AES_128)
        if key is None:
            return self._program
        mac = await cmac(key, request.message)
        self._note("AES-CMAC", request.message)
        return _Answer(files=((request.output_path, 0, mac),))

    async def _derive(self, arguments: list[bytes], content: bytes) -> _Answer:
        """The whole derivation: no derived key may leave, since with one the job could decrypt without being asked."""
        request = requests.parse_kdf(content)
        block_bytes = _block_bytes(arguments[2:])
        key = self._symmetric(request.sbk, SymmetricAlgorithm.HMAC_SHA256)
        if key is None:
            return self._program
        sizes = struct.pack(">QQ", len(request.aad), block_bytes)
        what = await self._job.run(_hashed, Hash.SHA256, sizes + request.aad + request.content)
        if self._encrypted.setdefault((request.chain, request.iv), what) != what:
            # two ciphertexts of one key and IV give away both contents, and the key of the tags
            raise RequestError("another content by a key and an IV that were used before")
        derived = await key.hmac_sha256(request.chain[0])
        encrypted, tag = await self._job.run(_encrypted, derived, request, block_bytes)
        self._note("HMAC-SHA256, AES-256-GCM", request.content)
        path = arguments[1]
        return _Answer(files=((path, request.content_offset, encrypted), (request.output_path, 0, tag)))

    def _symmetric(self, value: bytes, algorithm: SymmetricAlgorithm) -> SymmetricKey | None:
        """The key that a placeholder stands for; None: it is all zeros, which is no key."""
        if not any(value):
            return None
        key = self._keys.placeholders.get(value)
        if key is None or key.algorithm is not algorithm:
            raise RequestError("a key that is none of the job's")
        return key

    def _note(self, what: str, content: bytes) -> None:
        _log.info("encrypted for NVIDIA's scripts: %s of %d bytes", what, len(content))


def _scheme(kind: bytes, request: SignRequest, key: SigningKey) -> Scheme:
    hash_ = Hash.SHA512 if request.is_sha512 else Hash.SHA256
    match kind, key.public_key:
        case b"--rsa", rsa.RSAPublicKey():
            return RsaPss(hash_, SALT_BYTES)
        case b"--ecc", ec.EllipticCurvePublicKey():
            return Ecdsa(hash_)
        case b"--ed25519", ed25519.Ed25519PublicKey():
            return Ed25519()
    raise RequestError("a signature of another type than the machine's key")


def _block_bytes(options: list[bytes]) -> int:
    """The size of blocks that are encrypted each by itself; 0: the whole is one."""
    match options:
        case []:
            return 0
        case [b"--block", size] | [b"--block", size, b"--iscompressed"] if size.isdigit() and len(size) < 10:
            return int(size)
    raise RequestError("options that are not known")


def _hashed(hash_: Hash, message: bytes) -> bytes:
    return hashlib.new(hash_.hashlib_name, message).digest()


def _encrypted(derived: bytes, request: KdfRequest, block_bytes: int) -> tuple[bytes, bytes]:
    """The ciphertext, and its tag or meta blob."""
    for message in request.chain[1:]:
        step = hmac.HMAC(derived, SHA256())
        step.update(message)
        derived = step.finalize()
    aes = AESGCM(derived)
    if not block_bytes:
        sealed = aes.encrypt(request.iv, request.content, request.aad)
        return sealed[:-BLOCK_BYTES], sealed[-BLOCK_BYTES:]
    if len(request.content) > block_bytes * (requests.BLOB_BYTES // requests.BLOB_ENTRY_BYTES):
        raise RequestError("an image of too many blocks")
    entries, encrypted = [], []
    for at in range(0, len(request.content), block_bytes):
        iv = secrets.token_bytes(len(request.iv)) if at else request.iv
        sealed = aes.encrypt(iv, request.content[at : at + block_bytes], request.aad)
        encrypted.append(sealed[:-BLOCK_BYTES])
        entries.append((iv, sealed[-BLOCK_BYTES:], hashlib.sha512(encrypted[-1]).digest()))
    return b"".join(encrypted), requests.meta_blob(entries)
