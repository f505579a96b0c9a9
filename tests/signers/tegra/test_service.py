"""What scripts in a job are answered, and what not."""

import asyncio
import contextlib
import hashlib
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from signers.formats import tegra_requests as requests
from signers.signer import Job
from signers.tegra.service import JobKeys, KeyService, ServiceLimits
from tests.signers.formats.test_tegra_requests import KDF_LABELS, kdf_request, number, request
from tests.stand_in_bsp.checks import derived
from tokens.errors import ProviderUnavailable, ToolUnavailable
from tokens.symmetric import SymmetricAlgorithm
from tokens.symmetric_file import MemorySymmetricKey

SBK, AES_SBK = bytes(range(100, 132)), bytes(range(50, 66))
PLACEHOLDER, AES_PLACEHOLDER = b"P" * 32, b"p" * 16
MESSAGE = b"message" * 100
CONTENT = b"content" * 9
PROGRAM = "/bsp/bootloader/tegraopenssl"


async def in_thread(function: Any, *args: Any, **kwargs: Any) -> Any:
    return await asyncio.to_thread(function, *args, **kwargs)


@pytest.fixture
def serve(tmp_path: Path, threads: Any):
    """The service with a key, and with both kinds of SBK."""

    @asynccontextmanager
    async def serve(key: Any, **limits: int) -> AsyncIterator[KeyService]:
        placeholders = {
            PLACEHOLDER: MemorySymmetricKey(SymmetricAlgorithm.HMAC_SHA256, SBK, "sbk", threads),
            AES_PLACEHOLDER: MemorySymmetricKey(SymmetricAlgorithm.AES_128, AES_SBK, "sbk", threads),
        }
        keys = JobKeys(key, b"the public key", placeholders)
        most = ServiceLimits(**{"requests_max": 50, "request_max_bytes": 100_000} | limits)
        job = Job(lambda: tmp_path, None, in_thread)  # type: ignore[arg-type]
        async with KeyService(tmp_path / "service", keys, most, job, PROGRAM) as service:
            service.path = tmp_path / "service"  # type: ignore[attr-defined]
            yield service

    return serve


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def ask(
    service: Any, *arguments: bytes, content: bytes = b""
) -> tuple[int, bytes, dict[bytes, tuple[int, bytes]]]:
    """Status, text, and files by their paths: offset and bytes. (-1, b"", {}): no answer."""
    reader, writer = await asyncio.open_unix_connection(service.path)
    texts = b"".join(struct.pack(">I", len(each)) + each for each in arguments)
    writer.write(struct.pack(">II", len(arguments), len(content)) + content + texts)
    try:
        answer = await reader.read(-1)
    except ConnectionError:
        answer = b""
    await close(writer)
    if not answer:
        return -1, b"", {}
    status, size = struct.unpack_from(">BI", answer)
    at, files = 5 + size, {}
    while at < len(answer):
        (length,) = struct.unpack_from(">I", answer, at)
        path = answer[at + 4 : at + 4 + length]
        offset, size_ = struct.unpack_from(">II", answer, at + 4 + length)
        at += 12 + length
        files[path] = (offset, answer[at : at + size_])
        at += size_
    return status, answer[5 : 5 + size], files


REFUSED = (-1, b"", {})


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("rsa2048", ("--rsa", 256, (0,))), ("rsa3072", ("--rsa", 384, (1,))), ("p256", ("--ecc", 96, (1,))),
        ("p256", ("--ecc", 64, (0,))), ("p521", ("--ecc", 136, (1,))), ("ed25519", ("--ed25519", 64, ())),
    ],
)  # fmt: skip
async def test_signatures(serve, pairs, openssl, tmp_path, kind, asked) -> None:
    pair, (option, size, flags) = pairs[kind], asked
    middle = [b"pub\0", b"mont\0"] if option == "--rsa" else [b"pub\0"]
    content = request(b"k\0", number(len(MESSAGE)), MESSAGE, bytes(size), *middle, b"out\0", flags=flags)
    async with serve(pair.key) as service:
        status, text, files = await ask(service, option.encode(), b"raw", content=content)
        made = service.made.signed(MESSAGE)
    assert (status, text) == (0, b"")
    stored = files[b"out"][1]
    assert made == {stored}
    assert len(stored) == size
    assert files[b"pub"] == (0, requests.public_key(pair.private_key.public_key()))
    assert (b"mont" in files) == (option == "--rsa")
    (tmp_path / "public.pem").write_bytes(pair.public_pem)
    (tmp_path / "message").write_bytes(MESSAGE)
    hash_ = "sha512" if flags == (1,) else "sha256"
    if option == "--rsa":
        (tmp_path / "signature").write_bytes(stored[::-1])
        pss = "-sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:32"
        openssl(f"dgst -{hash_} -verify public.pem {pss} -signature signature message")
    elif option == "--ed25519":
        (tmp_path / "signature").write_bytes(stored)
        openssl("pkeyutl -verify -pubin -inkey public.pem -rawin -in message -sigfile signature")
    else:
        from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature  # noqa: PLC0415

        r, s = (int.from_bytes(half, "little") for half in (stored[: size // 2], stored[size // 2 :]))
        (tmp_path / "signature").write_bytes(encode_dss_signature(r, s))
        openssl(f"dgst -{hash_} -verify public.pem -signature signature message")


@pytest.mark.parametrize(
    ("kind", "option", "text", "files"),
    [
        ("rsa3072", "--isPkcKey", b"Key size is 384 bytes\n", 2),
        ("rsa2048", "--isPkcPubKey", b"Key size is 256 bytes\n", 2),
        ("rsa3072", "--isEccKey", b"", 0),
        ("p256", "--isPkcKey", b"", 0),
        ("p256", "--isEccKey", b"Valid ECC key\n", 1),
        ("p521", "--isEccKey", b"Valid ECC key. Key size is 521\n", 1),
        ("ed25519", "--isEd25519Key", b"Valid eddsa key\n", 1),
        ("p256", "--isEd25519Key", b"", 0),
    ],
)
async def test_what_the_key_is(serve, pairs, kind, option, text, files) -> None:
    async with serve(pairs[kind].key) as service:
        asked = (option.encode(), b"pkc.pem", b"pub", b"mont")
        status, said, written = await ask(service, *asked, content=b"the public key")
        assert (status, said, len(written)) == (0, text, files)
        assert await ask(service, *asked, content=b"another key") == (255, PROGRAM.encode(), {})
        assert (await ask(service, *asked[:2], content=b"the public key"))[2] == {}


async def test_aes(serve, pairs) -> None:
    """Held against OpenSSL."""

    def openssl(*arguments: str) -> bytes:
        return subprocess.run(["openssl", *arguments], input=MESSAGE[:640], capture_output=True, check=True).stdout

    cbc = request(AES_PLACEHOLDER, b"\x10", number(640), MESSAGE, bytes(640), b"out\0", b"")
    mac = request(AES_PLACEHOLDER, b"\x10", number(640), MESSAGE, bytes(16), b"out\0")
    async with serve(pairs["p256"].key) as service:
        encrypted = (await ask(service, b"--aescbc", b"raw", content=cbc))[2][b"out"][1]
        authenticated = (await ask(service, b"--aescmac", b"raw", content=mac))[2][b"out"][1]
    key = AES_SBK.hex()
    assert encrypted == openssl("enc", "-aes-128-cbc", "-K", key, "-iv", "0" * 32, "-nopad")
    cmac = ("mac", "-cipher", "AES-128-CBC", "-macopt", f"hexkey:{key}", "-binary", "CMAC")
    assert authenticated == openssl(*cmac)


async def test_kdf(serve, pairs) -> None:
    """The key is derived, and used, as the boot ROM does; and the whole file but the content stays as it was."""
    data = kdf_request([b"BL", b"", b"GP", b"KDK", b"DK"], sbk=PLACEHOLDER)
    parsed = requests.parse_kdf(data)
    async with serve(pairs["p256"].key) as service:
        status, _, files = await ask(service, b"--kdfoem", b"v3.raw", content=data)
        again = await ask(service, b"--kdfoem", b"v3.raw", content=data)
        other = kdf_request([b"BL", b"", b"GP", b"KDK", b"DK"], sbk=PLACEHOLDER, content=b"another")
        assert await ask(service, b"--kdfoem", b"v3.raw", content=other) == REFUSED
        # the same bytes, but one of them is authenticated only; and the same in blocks
        moved = kdf_request([b"BL", b"", b"GP", b"KDK", b"DK"], sbk=PLACEHOLDER, aad=b"a" * 79, content=b"a" + CONTENT)
        assert await ask(service, b"--kdfoem", b"v3.raw", content=moved) == REFUSED
        assert await ask(service, b"--kdfoem", b"v3.raw", b"--block", b"16", content=data) == REFUSED
        assert await ask(service, b"--kdfoem", content=data) == REFUSED
    assert (status, again[2]) == (0, files)
    offset, encrypted = files[b"v3.raw"]
    assert offset == parsed.content_offset
    tag = files[b"/x/out.tag"][1]
    assert AESGCM(derived(SBK)).decrypt(parsed.iv, encrypted + tag, parsed.aad) == parsed.content
    everything = b"".join(data for _, data in files.values())
    key = SBK
    for message in parsed.chain:
        key = hashlib.new("sha256", key).digest()
        assert key not in everything
        assert message not in everything


async def test_kdf_in_blocks(serve, pairs) -> None:
    """IVs are never the same, as NVIDIA's are."""
    content = b"0123456789" * 1000
    data = kdf_request([b"BL", b"", b"GP", b"KDK", b"DK"], sbk=PLACEHOLDER, content=content)
    async with serve(pairs["p256"].key) as service:
        asked = (b"--kdfoem", b"v3.raw", b"--block", b"4096", b"--iscompressed")
        _, _, files = await ask(service, *asked, content=data)
        assert await ask(service, b"--kdfoem", b"v3.raw", b"--block", b"1", content=data) == REFUSED
        assert await ask(service, b"--kdfoem", b"v3.raw", b"--other", content=data) == REFUSED
    encrypted, blob = files[b"v3.raw"][1], files[b"/x/out.tag"][1]
    assert (len(blob), int.from_bytes(blob[:4], "little"), len(encrypted)) == (4096, 3, len(content))
    found, ivs = b"", set()
    for number_, at in enumerate(range(0, len(content), 4096), 1):
        entry = blob[92 * number_ : 92 * (number_ + 1)]
        block = encrypted[at : at + 4096]
        assert hashlib.sha512(block).digest() == entry[28:]
        ivs.add(entry[:12])
        found += AESGCM(derived(SBK)).decrypt(entry[:12], block + entry[12:28], b"a" * 80)
    assert (found, len(ivs)) == (content, 3)


@pytest.mark.parametrize(
    ("option", "content"),
    [
        ("--hmacsha256", request(PLACEHOLDER, b"\x20", b"\x10", bytes(16), bytes(32), b"out\0")),
        ("--aesgcm", b""),
        ("--kdf", kdf_request(KDF_LABELS[:5], sbk=PLACEHOLDER)),
        ("--aescmac", request(PLACEHOLDER, b"\x20", b"\x10", bytes(16), bytes(16), b"out\0")),
        ("--aescmac", request(b"x" * 16, b"\x10", b"\x10", bytes(16), bytes(16), b"out\0")),
        ("--aescbc", request(AES_PLACEHOLDER, b"\x10", b"\x11", bytes(17), bytes(17), b"out\0", b"")),
        ("--kdfoem", kdf_request(KDF_LABELS[:5], sbk=b"x" * 32)),
        ("--kdfoem", kdf_request(KDF_LABELS[:5], sbk=AES_PLACEHOLDER)),
        ("--ecc", request(b"k\0", b"\1", b"m", bytes(95), b"", b"out\0", flags=(0,))),
        ("--rsa", request(b"k\0", b"\1", b"m", bytes(256), b"", b"", b"out\0", flags=(0,))),
        ("--list", b""),
    ],
)
async def test_refusals(serve, pairs, option, content) -> None:
    async with serve(pairs["p256"].key) as service:
        assert await ask(service, option.encode(), b"raw", content=content) == REFUSED
        assert service.made.signatures == {}
        assert service.made.error is None


async def test_what_takes_no_key_is_for_nvidia_s_program(serve, pairs) -> None:
    zeros = request(bytes(16), b"\x10", b"\x10", bytes(16), bytes(16), b"out\0")
    async with serve(pairs["p256"].key) as service:
        for arguments, content in (
            ((b"--sha", b"raw"), b"x"),
            ((b"--chip", b"0x23"), b""),
            ((b"--aescmac", b"r"), zeros),
        ):
            assert await ask(service, *arguments, content=content) == (255, PROGRAM.encode(), {})


async def test_limits(serve, pairs) -> None:
    async with serve(pairs["p256"].key, requests_max=2, request_max_bytes=10) as service:
        assert await ask(service, b"--sha", b"raw", content=bytes(11)) == REFUSED
        for _ in range(2):
            assert (await ask(service, b"--sha", b"raw", content=bytes(10)))[0] == 255
        assert await ask(service, b"--sha", b"raw") == REFUSED
    with pytest.raises(OSError, match="No such file"):
        await asyncio.open_unix_connection(service.path)  # type: ignore[attr-defined]


async def test_a_client_that_says_nothing_ends_with_the_job(serve, pairs) -> None:
    async with serve(pairs["p256"].key) as service:
        connections = [await asyncio.open_unix_connection(service.path) for _ in range(20)]
        connections[0][1].write(b"\0")
        assert await connections[19][0].read() == b""  # one too many
    for reader, writer in connections:
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        await close(writer)


async def test_an_error_of_the_key_is_kept(serve, pairs) -> None:
    class Broken:
        public_key = pairs["p256"].key.public_key

        async def sign(self, _scheme: Any, _data: bytes) -> bytes:
            raise ProviderUnavailable("gone", "come back")

    content = request(b"k\0", b"\1", b"m", bytes(96), b"", b"out\0", flags=(0,))
    async with serve(Broken()) as service:
        assert await ask(service, b"--ecc", b"raw", content=content) == REFUSED
        assert isinstance(service.made.error, ProviderUnavailable)


async def test_too_long_a_path(tmp_path, pairs) -> None:
    job = Job(lambda: tmp_path, None, in_thread)  # type: ignore[arg-type]
    keys = JobKeys(pairs["p256"].key, b"", {})
    with pytest.raises(ToolUnavailable, match="too long"):
        async with KeyService(tmp_path / ("x" * 100), keys, ServiceLimits(1, 1), job, ""):
            pass
