"""Starts, watches and replaces the workers of one token, and hands them the calls.

A call waits in one queue for the first worker that is free. A worker is given two calls at a time, so that it never
waits for the service between them; it answers in order, so the oldest outstanding call is the one it works on, and
that call's deadline runs from when the worker could begin. A worker that exceeds it is killed; one that dies is
replaced; the calls that it had not begun go back to the head of the queue. Only what changes nothing on the token
(a signature, a look-up) is repeated, once.

The service never reads a PIN: a worker logs in by itself, and `tokens.drivers.pin_gate` keeps it from trying a PIN
that was refused. What keeps the workers from opening a session is `trouble`, which every call gets until a
worker has one again.
"""

import asyncio
import contextlib
import copy
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tokens import errors
from tokens.errors import (
    Error,
    ProviderBusy,
    ProviderTimeout,
    ProviderUnavailable,
    SigningFailed,
)
from tokens.frames import Action, Decoder, FrameError, Header, encode

log = logging.getLogger(__name__)

_IN_FLIGHT_MAX = 2  # one being worked on, and the next one already there
_ATTEMPTS_MAX = 2  # signing and looking a key up change nothing: they are repeated once, nothing else ever is
_CLOSE_TIMEOUT_S = 2.0  # for a worker with nothing to do to end its session; a token may have few of them


@dataclass(frozen=True, slots=True)
class Limits:
    """The supervisor's settings; what they mean stands in `tokens.resident.ResidentSettings`."""

    call_timeout_s: float
    start_timeout_s: float
    queue_depth: int
    queue_timeout_s: float
    backoff_min_s: float
    backoff_max_s: float


class Outcome(StrEnum):
    """How an attempt ended."""

    DONE = "done"
    """The token did what it was asked."""
    REFUSED = "refused"
    """The token or its driver answered with an error: it was not done."""
    UNKNOWN = "unknown"
    """No answer came, or none that says so: it may have been done."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Who is told of every attempt, such as an audit that counts what the token was asked for.

    Arguments:
        sent: called with the request's header before it goes to a worker, the second time too when it is repeated.
        ended: called once for each `sent`, before the caller gets the answer.
    """

    sent: Callable[[Header], None]
    ended: Callable[[Header, Outcome], None]


@dataclass(slots=True, eq=False)
class _Call:
    header: Header
    body: bytes
    repeatable: bool
    future: "asyncio.Future[Answer]"
    queued_at: float
    timeout_s: float
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker answered; `worker` says which, for `Supervisor.distrust`."""

    header: Header
    body: bytes
    worker: "_Worker"


class Supervisor:
    """The workers of one token.

    Arguments:
        name: the provider's, for the log.
        driver: what `tokens.worker` is to load.
        settings: the driver's arguments, sent to the worker by the socket.
        env: variables that the driver needs (SOFTHSM2_CONF); they reach the workers only.
        workers: how many processes, each with a session and a login of its own.
        limits: deadlines, the queue, and the back-off.

    Attributes:
        listener: is told of every attempt; set before `start`.
    """

    def __init__(
        self, name: str, driver: str, settings: Header, *, env: Mapping[str, str], workers: int, limits: Limits
    ) -> None:
        self.name = name
        self.limits = limits
        self.listener: Listener | None = None
        self.trouble: Error | None = None
        self.token: Header = {}
        self._queue: deque[_Call] = deque()
        self._queue_timer: asyncio.TimerHandle | None = None
        self._workers = [_Worker(self, number, driver, settings, env) for number in range(workers)]
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    def start(self) -> None:
        """Starts the workers; calls wait until one has a session or is in trouble."""
        self._tasks = [
            asyncio.create_task(worker.run(), name=f"token worker {self.name}/{worker.number}")
            for worker in self._workers
        ]

    async def stop(self) -> None:
        """Finishes what is queued, within the deadlines that hold anyway, and ends the workers."""
        self._stopping = True
        pending = [call.future for call in self._queue]
        pending += [call.future for worker in self._workers for call in worker.in_flight]
        if pending and any(worker.ready for worker in self._workers):
            await asyncio.wait(pending, timeout=self.limits.call_timeout_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self._workers:
            await worker.gone()
        self.fail_queued(ProviderUnavailable("The service is stopping.", "Send the request again."))
        if self._queue_timer is not None:
            self._queue_timer.cancel()

    async def call(self, header: Header, body: bytes = b"", *, repeatable: bool = False) -> Answer:
        """Has a worker perform one operation.

        Raises the error that the worker names, `trouble`, ProviderBusy, ProviderUnavailable or ProviderTimeout.
        """
        if self._stopping:
            raise ProviderUnavailable("The service is stopping.", "Send the request again.")
        if self.trouble is not None:
            raise copy.copy(self.trouble)  # raised as it is, its traceback would grow with each call
        if len(self._queue) >= self.limits.queue_depth:
            raise ProviderBusy(
                f"{len(self._queue)} calls are waiting for the token already.", "Send fewer requests at once."
            )
        loop = asyncio.get_running_loop()
        call = _Call(header, body, repeatable, loop.create_future(), loop.time(), self.limits.call_timeout_s)
        self._queue.append(call)
        self.pump()
        if self._queue_timer is None and self._queue:
            self._watch_queue()
        return await call.future

    async def check(self) -> None:
        """Raises what keeps the token from being used, or any of its workers from being logged in."""
        await self._settled()
        await self.call({"op": "check"}, repeatable=True)
        await self._settled()
        idle = sum(not worker.ready for worker in self._workers)
        if idle:
            raise ProviderUnavailable(
                f"{idle} of the token's {len(self._workers)} workers are not logged in.",
                "Wait; if it stays, the service's log says what happened to them.",
            )

    async def _settled(self) -> None:
        """Waits until it is known of each worker whether it has a session."""
        for worker in self._workers:
            await worker.settled.wait()

    def distrust(self, answer: Answer) -> None:
        """Replaces the worker that gave this answer: what it returned as a signature was none."""
        answer.worker.lost()

    def pump(self) -> None:
        """Gives waiting calls to workers that have room, the least occupied first."""
        while self._queue:
            ready = [worker for worker in self._workers if worker.has_room()]
            if not ready:
                return
            call = self._queue.popleft()
            if not call.future.done():  # else: the caller has gone
                min(ready, key=lambda worker: len(worker.in_flight)).send(call)

    def requeue(self, calls: list[_Call]) -> None:
        """Puts calls back to the head of the queue, in order."""
        self._queue.extendleft(reversed(calls))
        if self._queue and self._queue_timer is None:
            self._watch_queue()

    def sent(self, call: _Call) -> None:
        """A call is about to go to a worker."""
        if self.listener is not None:
            self.listener.sent(call.header)

    def ended(self, call: _Call, outcome: Outcome) -> None:
        """An attempt is over."""
        if self.listener is not None:
            self.listener.ended(call.header, outcome)

    def reopen(self) -> None:
        """Has every worker open a new session: what ended one has most likely ended the others too.

        Else a call that is repeated would only go to the next worker, and fail again.
        """
        for worker in self._workers:
            worker.reopen()

    def opened(self, token: Header) -> None:
        """A worker has a session; `token` is what the token says of itself."""
        self.token = token
        self.trouble = None

    def in_trouble(self, error: Error) -> None:
        """A worker could not open a session; where no other has one, no call can be served."""
        if any(worker.ready for worker in self._workers):
            return
        self.trouble = error
        self.fail_queued(error)

    def fail_queued(self, error: Error) -> None:
        """Every waiting call gets this error."""
        while self._queue:
            _fail(self._queue.popleft(), copy.copy(error))

    def _watch_queue(self) -> None:
        """Fails calls that waited for too long. The head is always the oldest."""
        loop = asyncio.get_running_loop()
        self._queue_timer = None
        while self._queue:
            due = self._queue[0].queued_at + self.limits.queue_timeout_s
            if due > loop.time():
                self._queue_timer = loop.call_at(due, self._watch_queue)
                return
            _fail(self._queue.popleft(), self._waited_too_long())

    def _waited_too_long(self) -> Error:
        waited = f"The call waited {self.limits.queue_timeout_s:g} s for the token"
        if any(worker.ready for worker in self._workers):
            return ProviderBusy(f"{waited}, which is busy.", "Send fewer requests at once.")
        return ProviderUnavailable(f"{waited}, whose worker is being replaced.", "Send the request again later.")


class _Worker:
    """One worker process after another: `run` starts it, opens a session, waits until it is of no more use."""

    def __init__(
        self, supervisor: Supervisor, number: int, driver: str, settings: Header, env: Mapping[str, str]
    ) -> None:
        self.number = number
        self.ready = False
        self.in_flight: deque[_Call] = deque()
        self.settled = asyncio.Event()
        self._supervisor = supervisor
        self._driver = driver
        self._settings = settings
        self._env = {"PATH": os.defpath, "LANG": "C.UTF-8", **env}
        self._failures = 0
        self._process: asyncio.subprocess.Process | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._outcome: Action | None = None
        self._ended = asyncio.Event()
        self._drained = asyncio.Event()
        self._head_since = 0.0
        self._head_timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Keeps a worker process with an open session, until cancelled."""
        try:
            while True:
                await self._run_once()
                await self._back_off()
        finally:
            self.settled.set()  # who waits for it need not any more

    async def _run_once(self) -> None:
        try:
            await self._one_process()
        except OSError as error:
            log.error("worker %s/%d cannot be started: %s", self._supervisor.name, self.number, error)  # noqa: TRY400
            self._failures += 1
            self._supervisor.in_trouble(
                ProviderUnavailable("The token's worker cannot be started.", "Look for the reason in the log.")
            )
            self.settled.set()

    async def gone(self) -> None:
        """Waits for the end of a process that `run` killed when it was cancelled."""
        if self._process is not None:
            await self._process.wait()

    async def _one_process(self) -> None:
        """From the start of one process to its end."""
        process, connection = await self._spawn()
        self._process = process
        try:
            self._transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: _Protocol(self), sock=connection
            )
            while await self._one_session() is Action.REOPEN:
                await self._back_off()
        finally:
            idle = self.ready and not self.in_flight
            self.lost()
            self._cancel_timer()
            if self._transport is not None:
                self._transport.abort()
                self._transport = None
            if idle:  # it ends its session, and then itself
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), _CLOSE_TIMEOUT_S)
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):  # it may be dead and not yet reaped, or just reaped
                    os.killpg(process.pid, signal.SIGKILL)
            if await process.wait() != -signal.SIGKILL and not idle:
                log.warning("worker %s/%d ended: %s", self._supervisor.name, self.number, _how(process.returncode))

    async def _spawn(self) -> tuple[asyncio.subprocess.Process, socket.socket]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                # -I: neither the working directory nor the environment decides what is imported
                sys.executable, "-I", "-m", "tokens.worker", self._driver,
                stdin=theirs.fileno(),
                env=self._env,
                start_new_session=True,  # else Ctrl-C kills it in mid-signature
            )  # fmt: skip
        return process, ours

    async def _one_session(self) -> Action:
        """Opens a session, serves calls, and returns what is to be done next."""
        self._outcome = None
        self._ended.clear()
        try:
            token = await self._open()
        except Error as error:
            log.warning("worker %s/%d has no session: %s", self._supervisor.name, self.number, error.message)
            self._failures += 1
            self._supervisor.in_trouble(error)
            return self._outcome or Action.REOPEN
        finally:
            self.settled.set()
        self.ready = True
        self._supervisor.opened(token)
        self._supervisor.pump()
        await self._ended.wait()
        while self._outcome is Action.REOPEN and self.in_flight:
            self._drained.clear()
            await self._drained.wait()  # what it has begun is answered first
        self._failures += 1
        return self._outcome or Action.RESTART

    async def _open(self) -> Header:
        """Has the worker log in; returns what the token says of itself. Raises ProviderUnavailable."""
        loop = asyncio.get_running_loop()
        timeout = self._supervisor.limits.start_timeout_s
        header = {"op": "open", "settings": self._settings}
        call = _Call(header, b"", False, loop.create_future(), loop.time(), timeout)
        try:
            self.send(call)  # on a socket that is closing already, `lost` fails it
            answer = await call.future
        except ProviderUnavailable:
            raise
        except Error as error:  # hung, crashed
            raise ProviderUnavailable(f"The token cannot be opened. {error.message}", error.hint) from None
        finally:
            self._cancel_timer()
        return {key: value for key, value in answer.header.items() if key != "id"}

    async def _back_off(self) -> None:
        """The first replacement comes at once, each further failure waits twice as long."""
        limits = self._supervisor.limits
        if self._failures > 1:
            await asyncio.sleep(min(limits.backoff_max_s, limits.backoff_min_s * 2 ** min(self._failures - 2, 30)))

    def has_room(self) -> bool:
        """Whether it may be given a call. Its socket closes a moment before `lost` hears of it."""
        open_ = self._transport is not None and not self._transport.is_closing()
        return self.ready and open_ and len(self.in_flight) < _IN_FLIGHT_MAX

    def send(self, call: _Call) -> None:
        """Writes a request; its deadline runs once it is the oldest."""
        if self._transport is None:
            raise RuntimeError("a worker that is not running was given a call")
        call.attempts += 1
        self._supervisor.sent(call)
        self.in_flight.append(call)
        self._transport.write(encode({"id": id(call), **call.header}, call.body))
        if len(self.in_flight) == 1:
            self._head_since = asyncio.get_running_loop().time()
        if self._head_timer is None:
            self._watch_head()

    def _watch_head(self) -> None:
        """Kills the worker when the oldest call's time is up; else looks again when it will be."""
        loop = asyncio.get_running_loop()
        self._head_timer = None
        if not self.in_flight:
            return
        timeout = self.in_flight[0].timeout_s
        if self._head_since + timeout > loop.time():
            self._head_timer = loop.call_at(self._head_since + timeout, self._watch_head)
            return
        log.error("worker %s/%d did not answer in %g s: killed", self._supervisor.name, self.number, timeout)
        hung = self.in_flight.popleft()
        self._supervisor.ended(hung, Outcome.UNKNOWN)
        _fail(hung, ProviderTimeout(f"The token did not answer in {timeout:g} s.", "Check the token, then try again."))
        self.lost(begun=False)

    def _cancel_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def answered(self, header: Header, body: bytes) -> None:
        """A frame came: it answers the oldest call."""
        if not self.in_flight or header.get("id") != id(self.in_flight[0]):
            log.error("worker %s/%d answered what it was not asked", self._supervisor.name, self.number)
            self.lost()
            return
        call = self.in_flight.popleft()
        self._head_since = asyncio.get_running_loop().time()
        if "error" in header:
            self._failed(call, header)
        else:
            if call.header["op"] in ("sign", "compute"):  # what crashes a module is signing, not looking a key up
                self._failures = 0
            self._supervisor.ended(call, Outcome.DONE)
            if not call.future.done():
                call.future.set_result(Answer(header, body, self))
        if not self.in_flight:
            self._drained.set()
        self._supervisor.pump()

    def _failed(self, call: _Call, header: Header) -> None:
        action = Action(header["action"])
        certain = action in (Action.GIVE_UP, Action.RETRY)  # else the session or the worker failed, not only the call
        self._supervisor.ended(call, Outcome.REFUSED if certain else Outcome.UNKNOWN)
        if action is not Action.GIVE_UP and call.repeatable and call.attempts < _ATTEMPTS_MAX:
            log.warning("a call of %s is repeated: %s", self._supervisor.name, header["message"])
            self._supervisor.requeue([call])
        else:
            _fail(call, _error(header))
        if action is Action.REOPEN and self.ready:
            self._supervisor.reopen()
        elif action is Action.RESTART:
            self.lost()

    def reopen(self) -> None:
        """Has a new session opened, once it has answered what it was given."""
        if self.ready:
            self._leave()
            self._outcome = Action.REOPEN
            self._ended.set()

    def _leave(self) -> None:
        """No session any more; there may be one again soon, or none."""
        if self.ready:
            self.ready = False
            self.settled.clear()

    def lost(self, *, begun: bool = True) -> None:
        """The process died, hung, or cannot be trusted: it is replaced, and its calls go back to the queue.

        `begun` says whether it may have begun the oldest of them; that one goes back only if it may be repeated.
        """
        self._leave()
        calls = list(self.in_flight)
        self.in_flight.clear()
        for call in calls:
            self._supervisor.ended(call, Outcome.UNKNOWN)
        if begun and calls and not (calls[0].repeatable and calls[0].attempts < _ATTEMPTS_MAX):
            _fail(calls.pop(0), _died())
        for call in calls[1:] if begun else calls:
            call.attempts -= 1
        self._supervisor.requeue(calls)
        self._outcome = Action.RESTART
        self._ended.set()
        self._drained.set()
        self._supervisor.pump()


class _Protocol(asyncio.Protocol):
    """The service's end of a worker's socket."""

    def __init__(self, worker: _Worker) -> None:
        self._worker = worker
        self._decoder = Decoder()

    def data_received(self, data: bytes) -> None:
        try:
            for header, body in self._decoder.feed(data):
                self._worker.answered(header, body)
        except FrameError:
            self._worker.lost()

    def connection_lost(self, exc: Exception | None) -> None:
        self._worker.lost()


def _fail(call: _Call, error: Error) -> None:
    if not call.future.done():
        call.future.set_exception(error)


def _error(header: Header) -> Error:
    """The error that a worker's answer names."""
    kind: Any = getattr(errors, str(header["error"]), SigningFailed)
    error: Error = kind(header["message"], header["hint"])
    return error


def _died() -> Error:
    return SigningFailed(
        "The token's module crashed while it worked on this call; it has been restarted.",
        "Try again; if it stays, look at the module with its vendor's tools.",
    )


def _how(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        return signal.Signals(-returncode).name
    return f"exit code {returncode}"
