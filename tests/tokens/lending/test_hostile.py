"""A tool that wants more than it was lent: a client of the protocol written from its wire form."""

import asyncio
import contextlib
import gc
import hashlib
import random
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from tokens.errors import SignatureMismatch, ToolFailed, ToolUnavailable
from tokens.lending import Loan, LoanLimits
from tokens.schemes import Hash, RsaPkcs1v15, Scheme, digest_info

INITIALIZE, GET_TOKEN_INFO, OPEN_SESSION, GET_ATTRIBUTES, SIGN_INIT, SIGN = 1, 6, 10, 24, 42, 43
FIND_INIT, FIND, FIND_FINAL = 26, 27, 28
LABEL = 0x03  # CKA_
DIGEST = hashlib.sha256(b"content").digest()
# the requests that a tool without permission might try: (call, signature of its arguments)
OTHERS = [
    (9, b"uayz"),
    (15, b"uayay"),
    (20, b"uaA"),
    (22, b"uu"),
    (25, b"uuaA"),
    (58, b"uMaA"),
    (60, b"uMuu"),
    (61, b"uMuayaA"),
]
OTHERS += [(62, b"uMuaA"), (999, b"u"), (0, b"u")]


def blob(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def ulong(*values: int) -> bytes:
    return struct.pack(f">{len(values)}Q", *values)


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, loan: Loan) -> "Client":
        client = cls(*await asyncio.open_unix_connection(loan.address.removeprefix("unix:path=")))
        connected.append(client)
        client.writer.write(b"\x02")
        assert await client.reader.readexactly(1) == b"\0"
        return client

    async def raw(self, data: bytes) -> bytes:
        """What comes back before the connection closes, or the next frame."""
        self.writer.write(data)
        try:
            header = await asyncio.wait_for(self.reader.readexactly(12), 5)
            _, options, length = struct.unpack(">III", header)
            return await self.reader.readexactly(options + length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return b""

    async def call(self, number: int, signature: bytes, arguments: bytes) -> tuple[int, bytes]:
        """(CKR value, values of the answer)"""
        message = struct.pack(">I", number) + blob(signature) + arguments
        answer = await self.raw(struct.pack(">III", 16, 0, len(message)) + message)
        assert answer, "the connection was closed"
        answered = struct.unpack(">I", answer[:4])[0]
        length = struct.unpack(">I", answer[4:8])[0]
        values = answer[8 + length :]
        return (struct.unpack(">Q", values)[0], b"") if answered == 0 else (0, values)

    async def session(self) -> int:
        rv, values = await self.call(OPEN_SESSION, b"uu", ulong(1, 4))
        assert rv == 0
        return int(struct.unpack(">Q", values)[0])

    async def sign(self, session: int, key: int, mechanism: bytes, data: bytes) -> tuple[int, bytes]:
        rv, _ = await self.call(SIGN_INIT, b"uMu", ulong(session) + mechanism + ulong(key))
        if rv:
            return rv, b""
        rv, values = await self.call(SIGN, b"uayfy", ulong(session) + b"\1" + blob(data) + struct.pack(">I", 8192))
        return rv, values[5:]


connected: list[Client] = []


@pytest.fixture(autouse=True)
async def _close_connections() -> AsyncIterator[None]:
    yield
    for client in connected:
        client.writer.close()
        with contextlib.suppress(ConnectionError):
            await client.writer.wait_closed()
    connected.clear()


def mechanism(type_: int, *parameters: int, form: str = "old") -> bytes:
    """As clients up to 0.25.5 write it, and as later ones do."""
    head = struct.pack(">I", type_)
    if form == "old":
        return head + (ulong(*parameters) if parameters else b"\xff\xff\xff\xff")
    return head + (b"\1" + ulong(*parameters) if parameters else b"")


@pytest.mark.parametrize("form", ["old", "new"])
async def test_both_wire_forms_sign(lend: Any, keys: Any, form: str) -> None:
    async with lend() as loan:
        client = await Client.connect(loan)
        session = await client.session()
        rv, signature = await client.sign(session, 1, mechanism(1, form=form), digest_info(Hash.SHA256, DIGEST))
        assert rv == 0
        keys["rsa2048"].private.public_key().verify(signature, DIGEST, PKCS1v15(), Prehashed(SHA256()))
        rv, signature = await client.sign(session, 1, mechanism(0x0D, 0x250, 2, 32, form=form), DIGEST)
        assert (rv, len(signature)) == (0, 256)
        rv, signature = await client.sign(session, 7, mechanism(0x1041, form=form), DIGEST)
        assert rv == 0
        r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
        keys["p256"].private.public_key().verify(encode_dss_signature(r, s), DIGEST, ec.ECDSA(Prehashed(SHA256())))


@pytest.mark.parametrize(
    ("key", "wanted", "data", "rv"),
    [
        (1, mechanism(3), b"\0" * 256, 0x70),  # CKM_RSA_X_509: raw RSA
        (1, mechanism(1), b"\0" * 245, 0x20),  # padding round anything
        (1, mechanism(1), DIGEST, 0x20),  # a bare digest
        (1, mechanism(1), digest_info(Hash.SHA256, DIGEST) + b"\0", 0x20),
        (1, mechanism(1), bytes.fromhex("3021300906052b0e03021a05000414") + b"\0" * 20, 0x20),  # SHA-1
        (1, mechanism(6), b"content", 0x70),  # CKM_SHA1_RSA_PKCS
        (1, mechanism(0x0D, 0x250, 2, 4000), DIGEST, 0x71),  # a salt that does not fit
        (1, mechanism(0x0D, 0x220, 1, 20), b"\0" * 20, 0x71),  # PSS with SHA-1
        (1, mechanism(0x0D), DIGEST, 0x71),  # PSS without parameters
        (1, mechanism(0x0D, 0x250, 2, 32), DIGEST[1:], 0x21),
        (1, mechanism(0x1041), DIGEST, 0x70),  # ECDSA with an RSA key
        (7, mechanism(0x1041), b"\0" * 20, 0x21),
        (2, mechanism(1), digest_info(Hash.SHA256, DIGEST), 0x60),  # a public key's handle
        (99, mechanism(1), digest_info(Hash.SHA256, DIGEST), 0x60),
    ],
)
async def test_refused(lend: Any, signed: list[Any], key: int, wanted: bytes, data: bytes, rv: int) -> None:
    async with lend() as loan:
        client = await Client.connect(loan)
        assert await client.sign(await client.session(), key, wanted, data) == (rv, b"")
    assert signed == []


async def test_only_what_is_lent_is_found(lend: Any) -> None:
    """The provider has more keys than these."""
    async with lend() as loan:
        client = await Client.connect(loan)
        session = await client.session()

        async def find(template: bytes) -> int:
            assert await client.call(FIND_INIT, b"uaA", ulong(session) + template) == (0, b"")
            rv, values = await client.call(FIND, b"ufu", ulong(session) + struct.pack(">I", 100))
            assert rv == 0
            assert await client.call(FIND_FINAL, b"u", ulong(session)) == (0, b"")
            return int(struct.unpack(">BI", values[:5])[1])

        def called(label: bytes) -> bytes:
            return struct.pack(">IIBI", 1, LABEL, 1, len(label)) + blob(label)

        assert await find(struct.pack(">I", 0)) == 4 * 3  # private key, public key, certificate
        assert await find(called(b"p256")) == 3
        for other in (b"p521", b"ed25519", b"p256.pem", b"../p256", b""):
            assert await find(called(other)) == 0


async def test_private_values_stay(lend: Any, keys: Any) -> None:
    async with lend() as loan:
        client = await Client.connect(loan)
        session = await client.session()
        for type_ in (0x11, *range(0x123, 0x129)):
            asked = ulong(session, 1) + struct.pack(">III", 1, type_, 4096)
            rv, values = await client.call(GET_ATTRIBUTES, b"uufA", asked)
            assert (rv, values) == (0, struct.pack(">IIBQ", 1, type_, 0, 0x11))  # CKR_ATTRIBUTE_SENSITIVE


async def test_nothing_else_can_be_asked(lend: Any) -> None:
    async with lend() as loan:
        client = await Client.connect(loan)
        for number, signature in OTHERS:
            assert await client.call(number, signature, b"\0" * 64) == (0x54, b"")


async def test_sessions_are_a_connections_own(lend: Any) -> None:
    async with lend(LoanLimits(sessions=3)) as loan:
        one, other = await Client.connect(loan), await Client.connect(loan)
        for _ in range(3):
            session = await one.session()
        assert (await one.call(OPEN_SESSION, b"uu", ulong(1, 4)))[0] == 0xB1
        assert (await other.sign(session, 1, mechanism(1), DIGEST))[0] == 0xB3


def frame(message: bytes) -> bytes:
    return struct.pack(">III", 1, 0, len(message)) + message


GARBAGE = [
    struct.pack(">III", 1, 0, 0xFFFFFFFF),
    struct.pack(">III", 1, 0xFFFFFFFF, 4),
    frame(b""),
    frame(b"\0\0"),
    frame(struct.pack(">I", OPEN_SESSION) + blob(b"uuu") + ulong(1, 4, 0)),
    frame(struct.pack(">I", OPEN_SESSION) + blob(b"uu") + ulong(1)),
    frame(struct.pack(">I", OPEN_SESSION) + blob(b"uu") + ulong(1, 4, 0)),
    frame(struct.pack(">II", OPEN_SESSION, 0x7FFFFFFF)),
    frame(struct.pack(">I", INITIALIZE) + blob(b"ayyay") + b"\1" + blob(b"HELLO") + b"\0\1" + blob(b"")),
    frame(struct.pack(">I", INITIALIZE) + blob(b"ayyay") + b"\1" + struct.pack(">I", 0x7FFFFFFF)),
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
]


@pytest.mark.parametrize("garbage", GARBAGE)
async def test_garbage_ends_its_connection_only(lend: Any, garbage: bytes) -> None:
    async with lend() as loan:
        good, bad = await Client.connect(loan), await Client.connect(loan)
        assert await bad.raw(garbage) == b""
        session = await good.session()
        for template in (struct.pack(">I", 4_000_000_000), struct.pack(">IIBI", 1, 0x40000211, 1, 8) + b"\0" * 8):
            worse = await Client.connect(loan)
            inner = await worse.session()
            find = struct.pack(">I", FIND_INIT) + blob(b"uaA") + ulong(inner) + template
            assert await worse.raw(frame(find)) == b""
        assert (await good.sign(session, 1, mechanism(1), digest_info(Hash.SHA256, DIGEST)))[0] == 0


async def test_fuzzed(lend: Any) -> None:
    """Changed requests end in an answer or a closed connection; the loan goes on, and leaves nothing behind."""
    dice = random.Random(1)  # noqa: S311 - a test's
    seeds = [
        frame(struct.pack(">I", number) + blob(signature) + arguments)
        for number, signature, arguments in (
            (GET_TOKEN_INFO, b"u", ulong(1)),
            (OPEN_SESSION, b"uu", ulong(1, 4)),
            (GET_ATTRIBUTES, b"uufA", ulong(1, 1) + struct.pack(">III", 1, 0x102, 64)),
            (FIND_INIT, b"uaA", ulong(1) + struct.pack(">IIBIQ", 1, 0, 1, 8, 3)),
            (SIGN_INIT, b"uMu", ulong(1) + mechanism(0x0D, 0x250, 2, 32) + ulong(1)),
            (SIGN, b"uayfy", ulong(1) + b"\1" + blob(DIGEST) + struct.pack(">I", 8192)),
        )
    ]
    async with lend() as loan, asyncio.timeout(10):
        for _ in range(300):
            client = await Client.connect(loan)
            for seed in seeds:
                changed = bytearray(seed)
                for _ in range(dice.randrange(3)):
                    changed[dice.randrange(12, len(changed))] = dice.randrange(256)
                if not await client.raw(bytes(changed)):
                    break
            client.writer.close()
            await client.writer.wait_closed()
        client = await Client.connect(loan)
        session = await client.session()
        assert (await client.sign(session, 1, mechanism(1), digest_info(Hash.SHA256, DIGEST)))[0] == 0
    gc.collect()
    assert not [task for task in asyncio.all_tasks() if "_connected" in repr(task.get_coro())]


HALVES = {
    "nothing": b"",
    "header": b"\0" * 5,
    "message": struct.pack(">III", 1, 0, 100) + b"\0" * 50,
    "options": struct.pack(">III", 1, 100, 0) + b"\0" * 50,
}


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
async def test_stalled_and_many_connections(lend: Any, half: bytes) -> None:
    """Whoever waits in the middle of a frame holds up nobody, and is cut off with the loan."""
    async with lend(LoanLimits(connections=8)) as loan:
        stalled = [await Client.connect(loan) for _ in range(7)]
        for client in stalled:
            client.writer.write(half)
        good = await Client.connect(loan)
        session = await good.session()
        assert (await good.sign(session, 1, mechanism(1), digest_info(Hash.SHA256, DIGEST)))[0] == 0
        reader, writer = await asyncio.open_unix_connection(loan.address.removeprefix("unix:path="))
        assert await reader.read() == b""  # one more than there may be
        writer.close()
    for client in (*stalled, good):
        assert await client.raw(b"") == b""


async def test_one_that_does_not_read_is_cut_off(lend: Any) -> None:
    """Requests whose answers nobody takes hold up nobody, and do not keep the connection beyond the loan."""
    requests = frame(struct.pack(">I", GET_TOKEN_INFO) + blob(b"u") + ulong(1)) * 100
    with socket.socket(socket.AF_UNIX) as deaf:
        async with lend() as loan:
            deaf.connect(loan.address.removeprefix("unix:path="))
            deaf.setblocking(False)
            sent = deaf.send(b"\x02")
            for _ in range(100):  # until both ways are full
                with contextlib.suppress(BlockingIOError):
                    sent += deaf.send(requests)
                await asyncio.sleep(0.005)
            assert sent < 100 * len(requests)
            good = await Client.connect(loan)
            session = await good.session()
            assert (await good.sign(session, 1, mechanism(1), digest_info(Hash.SHA256, DIGEST)))[0] == 0
        await asyncio.sleep(0.01)
        with pytest.raises(BrokenPipeError):
            deaf.send(b"x")


async def test_nothing_after_the_job(lend: Any, signed: list[Any]) -> None:
    """Not even for a session that was asked to sign while the job ran."""
    async with lend() as loan:
        client = await Client.connect(loan)
        session = await client.session()
        begun = ulong(session) + mechanism(1) + ulong(1)
        assert await client.call(SIGN_INIT, b"uMu", begun) == (0, b"")
    sign = struct.pack(">I", SIGN) + blob(b"uayfy") + ulong(session) + b"\1"
    assert await client.raw(frame(sign + blob(digest_info(Hash.SHA256, DIGEST)) + struct.pack(">I", 8192))) == b""
    with pytest.raises(FileNotFoundError):
        await Client.connect(loan)
    assert signed == []


async def test_no_more_signatures_than_granted(lend: Any, signed: list[Any]) -> None:
    """However many connections ask for them in the same moment."""
    async with lend(LoanLimits(signatures=5)) as loan:
        clients = [await Client.connect(loan) for _ in range(10)]
        sessions = [await client.session() for client in clients]
        digest = digest_info(Hash.SHA256, DIGEST)
        answers = await asyncio.gather(
            *(client.sign(session, 1, mechanism(1), digest) for client, session in zip(clients, sessions, strict=True))
        )
    assert sorted(rv for rv, _ in answers) == [0] * 5 + [0x06] * 5
    assert signed == [("rsa2048", RsaPkcs1v15(Hash.SHA256))] * 5


@pytest.mark.parametrize(
    ("outcome", "raised"),
    [
        (None, SignatureMismatch),  # the tool went on without the signature
        (ToolFailed("the tool failed", "look into the log"), SignatureMismatch),
        (ZeroDivisionError(), ZeroDivisionError),
    ],
)
async def test_a_key_that_fails_is_an_error_of_the_tool_and_then_of_the_loan(
    lend: Any, outcome: Exception | None, raised: type[Exception]
) -> None:
    async def sign(_scheme: Scheme, _digest: bytes) -> bytes:
        raise SignatureMismatch("it does not verify", "find out why")

    async def use() -> None:
        async with lend() as loan:
            client = await Client.connect(loan)
            session = await client.session()
            loan.objects[1].key.sign = sign
            assert (await client.sign(session, 1, mechanism(1), digest_info(Hash.SHA256, DIGEST)))[0] == 0x06
            if outcome is not None:
                raise outcome

    with pytest.raises(raised):
        await use()


async def test_a_path_that_no_socket_can_have(tmp_path: Path) -> None:
    loan = Loan(tmp_path / ("x" * 100), "YubiHSM", [], LoanLimits(), lambda *_: None)
    with pytest.raises(ToolUnavailable, match="too long"):
        await loan.__aenter__()
