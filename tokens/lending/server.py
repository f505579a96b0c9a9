"""Lends keys to a tool: a token of our own, at a socket of the job, that holds exactly the lent keys.

The tool loads p11-kit-client.so (Debian: p11-kit-modules) with P11_KIT_SERVER_ADDRESS=unix:path=SOCKET. It finds a
token that needs no PIN; what it can do is to have digests signed, while the loan lasts and a counted number of times.

    async with Loan(directory / "token", "YubiHSM", [LentKey("csf", b"\x01", key)], limits) as loan:
        run(tool, env={"P11_KIT_SERVER_ADDRESS": loan.address})
"""

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric import ec

from tokens.errors import Error, ToolUnavailable
from tokens.lending.mechanisms import EC_MECHANISMS, RSA_MECHANISMS, Asked, Refused, understand
from tokens.lending.objects import SECRET_ATTRIBUTES, LentKey, TokenObject, objects_of
from tokens.lending.wire import (
    FRAME_HEADER,
    SIGNATURES,
    UNAVAILABLE,
    Call,
    Reader,
    WireError,
    Writer,
    frame,
    memory_size,
)
from tokens.provider import SigningKey
from tokens.schemes import Scheme

log = logging.getLogger(__name__)

CKR_SLOT_ID_INVALID, CKR_FUNCTION_FAILED = 0x03, 0x06
CKR_ATTRIBUTE_SENSITIVE, CKR_ATTRIBUTE_TYPE_INVALID = 0x11, 0x12
CKR_FUNCTION_NOT_SUPPORTED, CKR_KEY_HANDLE_INVALID = 0x54, 0x60
CKR_MECHANISM_INVALID, CKR_OBJECT_HANDLE_INVALID = 0x70, 0x82
CKR_OPERATION_ACTIVE, CKR_OPERATION_NOT_INITIALIZED = 0x90, 0x91
CKR_SESSION_COUNT, CKR_SESSION_HANDLE_INVALID, CKR_BUFFER_TOO_SMALL = 0xB1, 0xB3, 0x150

PATH_MAX_BYTES = 107
"""How long a socket's path may be (unix(7))."""

_SLOT = 1
_ANSWERED_VERSION = 0  # every client knows it; later ones add only calls that are not answered here
_HANDSHAKE = b"PRIVATE-GNOME-KEYRING-PKCS11-PROTOCOL-V-1"
_CKF_TOKEN_PRESENT = 0x1
# WRITE_PROTECTED | USER_PIN_INITIALIZED | TOKEN_INITIALIZED; not LOGIN_REQUIRED: nobody asks for a PIN
_TOKEN_FLAGS = 0x2 | 0x8 | 0x400
_CKS_RO_USER_FUNCTIONS = 1
_CKF_SERIAL_SESSION = 0x4
_CKF_SIGN = 0x800


@dataclass(frozen=True, slots=True)
class LoanLimits:
    """What one loan may cost.

    Arguments:
        signatures: how many may be made in all.
        connections: how many may be open at once; more are closed.
        sessions: how many each connection may have open.
        frame_bytes: the longest frame, and the longest message to sign.
    """

    signatures: int = 64
    connections: int = 32
    sessions: int = 64
    frame_bytes: int = 8 * 1024 * 1024


@dataclass(slots=True)
class _Session:
    found: list[int] | None = None
    asked: Asked | None = None
    key: SigningKey | None = None
    data: bytearray = field(default_factory=bytearray)

    def end_signing(self) -> None:
        self.asked = self.key = None
        self.data.clear()


class Loan:
    """The keys on loan, for as long as the `async with` lasts.

    A key that cannot sign is why a tool fails, and no tool says so: the `async with` ends with the key's error then.

    Arguments:
        path: where the socket is to be: in a directory that only the job can reach, 107 bytes at most (unix(7)).
        label: what the token is called; tools find it by this name.
        keys: what is on it.
        limits: what the tool may cost.
        signed: is told of each signature: the key's label and the scheme.
    """

    def __init__(
        self, path: Path, label: str, keys: Sequence[LentKey], limits: LoanLimits, signed: Callable[[str, Scheme], None]
    ) -> None:
        self._path = path
        self._label = label
        self._limits = limits
        self._signed = signed
        self._left = limits.signatures
        self._objects: dict[int, TokenObject] = dict(
            enumerate(itertools.chain.from_iterable(map(objects_of, keys)), start=1)
        )
        self._labels = {id(lent.key): lent.label for lent in keys}
        self._failure: Error | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """The value of P11_KIT_SERVER_ADDRESS."""
        return f"unix:path={quote(str(self._path))}"

    async def __aenter__(self) -> Self:
        if len(bytes(self._path)) > PATH_MAX_BYTES:
            raise ToolUnavailable(
                "A tool cannot reach keys on loan: the path of their socket would be too long.",
                f"Choose a shorter server.spool_directory: the socket's path may have {PATH_MAX_BYTES} bytes.",
            )
        self._server = await asyncio.start_unix_server(self._connected, self._path)
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._left = 0
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._path.unlink(missing_ok=True)
        if self._failure is not None and (error is None or isinstance(error, Error)):
            raise self._failure from None

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        ended = self._server is None or not self._server.is_serving()  # accepted in the loan's last moment
        if task is None or ended or len(self._connections) >= self._limits.connections:
            writer.close()
            return
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except (WireError, asyncio.IncompleteReadError, ConnectionError) as error:
            log.debug("a loan's connection ended: %r", error)
        finally:
            self._connections.discard(task)
            writer.transport.abort()  # close() would wait for one that does not read its answers

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)  # the highest version that the client knows
        writer.write(bytes([_ANSWERED_VERSION]))
        connection = _Connection(self)
        while True:
            code, options, length = FRAME_HEADER.unpack(await reader.readexactly(FRAME_HEADER.size))
            if options + length > self._limits.frame_bytes:
                raise WireError("a frame that is too long")
            await reader.readexactly(options)
            writer.write(await connection.answer(code, await reader.readexactly(length)))
            await writer.drain()

    # what the connections ask for

    @property
    def label(self) -> str:
        """The token's label."""
        return self._label

    @property
    def limits(self) -> LoanLimits:
        """What the tool may cost."""
        return self._limits

    @property
    def objects(self) -> dict[int, TokenObject]:
        """Every object by its handle."""
        return self._objects

    async def sign(self, key: SigningKey, asked: Asked, data: bytes) -> bytes:
        """One signature. Raises Refused."""
        scheme, digest = asked.request(data)
        if self._left <= 0:
            log.warning("a tool asked for more signatures than its loan has")
            raise Refused(CKR_FUNCTION_FAILED)
        self._left -= 1
        try:
            signature = await key.sign(scheme, digest)
        except Error as error:
            log.warning("a signature for a tool failed: %s", error.message)
            self._failure = self._failure or error
            raise Refused(CKR_FUNCTION_FAILED) from None
        self._signed(self._labels[id(key)], scheme)
        return signature


class _Connection:
    """One connection of a tool: its sessions are nobody else's."""

    def __init__(self, loan: Loan) -> None:
        self._loan = loan
        self._sessions: dict[int, _Session] = {}
        self._handles = itertools.count(1)
        self._calls = {
            Call.INITIALIZE: self._initialize,
            Call.FINALIZE: self._finalize,
            Call.GET_INFO: self._get_info,
            Call.GET_SLOT_LIST: self._get_slot_list,
            Call.GET_SLOT_INFO: self._get_slot_info,
            Call.GET_TOKEN_INFO: self._get_token_info,
            Call.GET_MECHANISM_LIST: self._get_mechanism_list,
            Call.GET_MECHANISM_INFO: self._get_mechanism_info,
            Call.OPEN_SESSION: self._open_session,
            Call.CLOSE_SESSION: self._close_session,
            Call.CLOSE_ALL_SESSIONS: self._close_all_sessions,
            Call.GET_SESSION_INFO: self._get_session_info,
            Call.LOGIN: self._login,
            Call.LOGOUT: self._logout,
            Call.GET_ATTRIBUTE_VALUE: self._get_attribute_value,
            Call.FIND_OBJECTS_INIT: self._find_objects_init,
            Call.FIND_OBJECTS: self._find_objects,
            Call.FIND_OBJECTS_FINAL: self._find_objects_final,
            Call.SIGN_INIT: self._sign_init,
            Call.SIGN_UPDATE: self._sign_update,
            Call.SEED_RANDOM: self._seed_random,
            Call.GENERATE_RANDOM: self._generate_random,
        }

    async def answer(self, code: int, message: bytes) -> bytes:
        """The frame that answers a message. Raises WireError where it is none."""
        reader = Reader(message)
        number, signature = reader.u32(), reader.blob()
        try:
            call = _known(number)
            if signature != SIGNATURES[call][0]:
                raise WireError("a call with other arguments than it has")
            if call in (Call.SIGN, Call.SIGN_FINAL):
                arguments = await (self._sign(reader) if call is Call.SIGN else self._sign_final(reader))
            else:
                arguments = self._calls[call](reader)
            reader.end()
        except Refused as refused:
            return frame(code, Call.ERROR, Writer().ulong(refused.rv))
        return frame(code, call, arguments)

    def _session(self, reader: Reader) -> _Session:
        session = self._sessions.get(reader.ulong())
        if session is None:
            raise Refused(CKR_SESSION_HANDLE_INVALID)
        return session

    def _slot(self, reader: Reader) -> None:
        if reader.ulong() != _SLOT:
            raise Refused(CKR_SLOT_ID_INVALID)

    # in general

    def _initialize(self, reader: Reader) -> Writer:
        if reader.byte_array() != _HANDSHAKE:
            raise WireError("another protocol's handshake")
        reader.byte()
        reader.byte_array()
        return Writer()

    def _finalize(self, _reader: Reader) -> Writer:
        self._sessions.clear()
        return Writer()

    def _get_info(self, _reader: Reader) -> Writer:
        return Writer().version(2, 40).text("hsmsign", 32).ulong(0).text("keys on loan", 32).version(1, 0)

    def _get_slot_list(self, reader: Reader) -> Writer:
        reader.byte()
        return Writer().ulong_array([_SLOT], reader.room())

    def _get_slot_info(self, reader: Reader) -> Writer:
        self._slot(reader)
        return (
            Writer().text("keys on loan", 64).text("hsmsign", 32).ulong(_CKF_TOKEN_PRESENT).version(1, 0).version(1, 0)
        )

    def _get_token_info(self, reader: Reader) -> Writer:
        self._slot(reader)
        names = Writer().text(self._loan.label, 32).text("hsmsign", 32).text("loan", 16).text("1", 16)
        sessions = (self._loan.limits.sessions, len(self._sessions), 0, 0)
        pins = (255, 0)
        return names.ulong(_TOKEN_FLAGS, *sessions, *pins, *(UNAVAILABLE,) * 4).version(1, 0).version(1, 0).text("", 16)

    def _get_mechanism_list(self, reader: Reader) -> Writer:
        self._slot(reader)
        return Writer().ulong_array(self._mechanisms(), reader.room())

    def _get_mechanism_info(self, reader: Reader) -> Writer:
        self._slot(reader)
        mechanism = reader.ulong()
        if mechanism not in self._mechanisms():
            raise Refused(CKR_MECHANISM_INVALID)
        smallest, largest = (2048, 16384) if mechanism in RSA_MECHANISMS else (256, 521)
        return Writer().ulong(smallest, largest, _CKF_SIGN)

    def _mechanisms(self) -> list[int]:
        lent = [each.key.public_key for each in self._loan.objects.values() if each.key is not None]
        elliptic = [isinstance(public_key, ec.EllipticCurvePublicKey) for public_key in lent]
        return [*(() if all(elliptic) else RSA_MECHANISMS), *(EC_MECHANISMS if any(elliptic) else ())]

    # sessions

    def _open_session(self, reader: Reader) -> Writer:
        self._slot(reader)
        reader.ulong()
        if len(self._sessions) >= self._loan.limits.sessions:
            raise Refused(CKR_SESSION_COUNT)
        handle = next(self._handles)
        self._sessions[handle] = _Session()
        return Writer().ulong(handle)

    def _close_session(self, reader: Reader) -> Writer:
        if self._sessions.pop(reader.ulong(), None) is None:
            raise Refused(CKR_SESSION_HANDLE_INVALID)
        return Writer()

    def _close_all_sessions(self, reader: Reader) -> Writer:
        self._slot(reader)
        self._sessions.clear()
        return Writer()

    def _get_session_info(self, reader: Reader) -> Writer:
        self._session(reader)
        return Writer().ulong(_SLOT, _CKS_RO_USER_FUNCTIONS, _CKF_SERIAL_SESSION, 0)

    def _login(self, reader: Reader) -> Writer:
        self._session(reader)
        reader.ulong()
        reader.byte_array()  # any PIN: the right to sign is the socket
        return Writer()

    def _logout(self, reader: Reader) -> Writer:
        self._session(reader)
        return Writer()

    # objects

    def _get_attribute_value(self, reader: Reader) -> Writer:
        self._session(reader)
        found = self._loan.objects.get(reader.ulong())
        if found is None:
            raise Refused(CKR_OBJECT_HANDLE_INVALID)
        asked = reader.attribute_types()
        answer, rv = Writer().u32(len(asked)), 0
        for type_, room in asked:
            value = found.attributes.get(type_)
            if value is None:
                secret = found.key is not None and type_ in SECRET_ATTRIBUTES
                rv = CKR_ATTRIBUTE_SENSITIVE if secret else CKR_ATTRIBUTE_TYPE_INVALID
            elif 0 < room < memory_size(value):
                # the client overwrites its own "too small" with what is said here
                rv = CKR_BUFFER_TOO_SMALL
            answer.attribute(type_, value)
        return answer.ulong(rv)

    def _find_objects_init(self, reader: Reader) -> Writer:
        session = self._session(reader)
        if session.found is not None:
            raise Refused(CKR_OPERATION_ACTIVE)
        template = reader.template()
        session.found = [handle for handle, each in self._loan.objects.items() if each.matches(template)]
        return Writer()

    def _find_objects(self, reader: Reader) -> Writer:
        session = self._session(reader)
        if session.found is None:
            raise Refused(CKR_OPERATION_NOT_INITIALIZED)
        room = reader.room()
        handles, session.found = session.found[:room], session.found[room:]
        return Writer().ulong_array(handles, room)

    def _find_objects_final(self, reader: Reader) -> Writer:
        session = self._session(reader)
        if session.found is None:
            raise Refused(CKR_OPERATION_NOT_INITIALIZED)
        session.found = None
        return Writer()

    # signing

    def _sign_init(self, reader: Reader) -> Writer:
        session = self._session(reader)
        mechanism = reader.mechanism(after=8)
        lent = self._loan.objects.get(reader.ulong())
        if lent is None or lent.key is None:
            raise Refused(CKR_KEY_HANDLE_INVALID)
        if session.asked is not None:
            raise Refused(CKR_OPERATION_ACTIVE)
        session.asked, session.key = understand(mechanism, lent.key.public_key), lent.key
        return Writer()

    def _sign_update(self, reader: Reader) -> Writer:
        session = self._session(reader)
        self._add(session, reader.byte_array())
        return Writer()

    async def _sign(self, reader: Reader) -> Writer:
        session, data, room = self._session(reader), reader.byte_array(), reader.room()
        return await self._signature(session, data, room)

    async def _sign_final(self, reader: Reader) -> Writer:
        session, room = self._session(reader), reader.room()
        return await self._signature(session, b"", room)

    def _add(self, session: _Session, data: bytes) -> None:
        if session.asked is None:
            raise Refused(CKR_OPERATION_NOT_INITIALIZED)
        if len(session.data) + len(data) > self._loan.limits.frame_bytes:
            session.end_signing()
            raise Refused(CKR_FUNCTION_FAILED)
        session.data += data

    async def _signature(self, session: _Session, data: bytes, room: int) -> Writer:
        asked, key = session.asked, session.key
        if asked is None or key is None:
            raise Refused(CKR_OPERATION_NOT_INITIALIZED)
        size = _signature_size(key)
        if room < size:
            return Writer().byte_array_length(size)  # the operation goes on: the tool comes again with room
        self._add(session, data)
        whole = bytes(session.data)
        session.end_signing()
        return Writer().byte_array(await self._loan.sign(key, asked, whole))

    # random numbers: some tools ask the token for them

    def _seed_random(self, reader: Reader) -> Writer:
        self._session(reader)
        reader.byte_array()
        return Writer()

    def _generate_random(self, reader: Reader) -> Writer:
        self._session(reader)
        return Writer().byte_array(secrets.token_bytes(min(reader.room(), 65536)))


def _known(number: int) -> Call:
    with contextlib.suppress(ValueError):
        call = Call(number)
        if call is not Call.ERROR:
            return call
    raise Refused(CKR_FUNCTION_NOT_SUPPORTED)


def _signature_size(key: SigningKey) -> int:
    bits = getattr(key.public_key, "key_size", 0)
    size: int = (bits + 7) // 8
    return 2 * size if isinstance(key.public_key, ec.EllipticCurvePublicKey) else size
