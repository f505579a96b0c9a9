"""Jobs: what a request has done for it, and what outlives the request where its client hangs up.

A job is a task of its own. It owns its files and its threads, and ends when the last of them has.
"""

import asyncio
import errno
import fcntl
import itertools
import os
import secrets
import shutil
import stat
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

from hsmsign import log
from hsmsign.problems import JobTimeout, SpoolFull, Stopping, TooManyJobs
from hsmsign.settings import Settings
from tokens.errors import Error

CANCEL_TIMEOUT_S = 5.0
"""How long a cancelled job may take to end when the service stops."""

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Spool:
    """The directory that uploads and jobs have their files in.

    Each instance of the service has a directory of its own below the root, and holds a lock (flock) on it
    for as long as it lives: what nobody holds belongs to a dead instance and is removed by the next.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = -1
        self.directory = self._root

    def open(self) -> None:
        """Makes this instance's directory and removes those of dead ones.

        Raises Error where the root is not ours alone.
        """
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        root = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            status = os.fstat(root)
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
                raise Error(
                    "The spool directory does not belong to the service alone.",
                    "Give it the service's owner and mode 0700, or name another one in server.spool_directory.",
                )
            # nobody may sweep between the making of our directory and its lock
            fcntl.flock(root, fcntl.LOCK_EX)
            for directory in self._root.iterdir():
                _sweep(directory)
            self.directory = self._root / f"{os.getpid()}-{secrets.token_hex(4)}"
            self.directory.mkdir(mode=0o700)
            self._lock = os.open(self.directory, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        finally:
            os.close(root)

    def close(self) -> None:
        """Removes this instance's directory."""
        shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._lock)


def _sweep(directory: Path) -> None:
    """Removes a directory that nobody holds."""
    lock = os.open(directory, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        log.logger.warning("removed the files of an instance that died", instance=directory.name)
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(lock)


class Job(Generic[T]):
    """One job, running.

    Arguments:
        prefix: how the paths of its files begin.
        hashing: the threads for bulk work.
        timeout_s: how long `limited` lets it work.
    """

    def __init__(self, prefix: Path, hashing: Executor, timeout_s: float) -> None:
        self._prefix = prefix
        self._hashing = hashing
        self._timeout_s = timeout_s
        self._files: list[Path] = []
        self._directory: Path | None = None
        self._spooled = False
        self._threads: set[asyncio.Future[Any]] = set()
        self._result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._released = asyncio.Event()

    async def result(self) -> T:
        """What the job makes; its files last until `release`. Who stops waiting does not stop the job."""
        return await asyncio.shield(self._result)

    def release(self) -> None:
        """Says that the result, and the files that it refers to, are needed no longer."""
        self._released.set()

    def directory(self) -> Path:
        """An empty directory of the job's own, made when it is first asked for."""
        if self._directory is None:
            self._directory = self._prefix.with_suffix(".d")
            self._directory.mkdir(mode=0o700)
        return self._directory

    def new_file(self) -> Path:
        """A path for one more file of the job, outside its directory."""
        path = self._prefix.with_suffix(f".{len(self._files)}")
        self._files.append(path)
        return path

    async def limited(self, work: Awaitable[R]) -> R:
        """The result of `work`. Raises JobTimeout where it takes too long."""
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                return await work
        except TimeoutError:
            if not limit.expired():
                raise
            raise JobTimeout(
                f"Signing took more than {self._timeout_s:g} s.",
                "Try again; if it happens again, raise limits.job_timeout_s.",
            ) from None

    async def hash(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs bulk work in the hashing threads. Raises SpoolFull."""
        return await self._thread(self._hashing, partial(function, *args, **kwargs))

    async def spool(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs reading and writing of large files in the event loop's own threads. Raises SpoolFull."""
        self._spooled = True
        return await self._thread(None, partial(function, *args, **kwargs))

    async def _thread(self, executor: Executor | None, call: Callable[[], R]) -> R:
        future = asyncio.get_running_loop().run_in_executor(executor, call)
        self._threads.add(future)
        future.add_done_callback(self._threads.discard)
        try:
            # a thread cannot be cancelled, and the job's files must last until it has ended
            return await asyncio.shield(future)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise SpoolFull("The spool has no room for the job's files.", "Make room on its file system.") from None

    async def live(self, work: Callable[["Job[T]"], Awaitable[T]]) -> None:
        """Does the work, waits until its result is used and every thread has ended, and removes the files."""
        try:
            result = await work(self)
        except asyncio.CancelledError:
            self._fail(Stopping("The service stopped before the job was done.", "Try again later."))
        except Exception as error:
            self._fail(error)
        else:
            self._result.set_result(result)
            await self._released.wait()
        finally:
            while self._threads:
                await asyncio.wait(self._threads)
            await self._remove_files()

    def _fail(self, error: Exception) -> None:
        self._result.set_exception(error)
        if self._released.is_set():
            # nobody waits any more
            self._result.exception()
            log.logger.info("a job failed after its client had left", exc_info=error)

    async def _remove_files(self) -> None:
        if self._spooled:
            await asyncio.to_thread(_remove, self._files, self._directory)
        else:
            _remove(self._files, self._directory)


def _remove(files: list[Path], directory: Path | None) -> None:
    for file in files:
        file.unlink(missing_ok=True)
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)


class Jobs:
    """Every job of the service."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._spool = Spool(settings.server.spool_directory)
        self._hashing = ThreadPoolExecutor(settings.server.hash_threads, thread_name_prefix="hash")
        self._running: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()
        self._stop_at: float | None = None

    def open(self) -> None:
        """Gets ready. Raises Error where the spool cannot be used."""
        self._spool.open()

    def start(self, work: Callable[[Job[T]], Awaitable[T]]) -> Job[T]:
        """Starts a job; the caller must see to its `release`.

        Raises:
            TooManyJobs: limits.jobs_max of them are running.
            Stopping: the service takes no more.
        """
        if self.stopping:
            raise Stopping("The service is stopping.", "Try again later.")
        if len(self._running) >= self._settings.limits.jobs_max:
            raise TooManyJobs(f"{len(self._running)} jobs are running.", "Try again later, or raise limits.jobs_max.")
        prefix = self._spool.directory / f"{next(self._numbers)}"
        job: Job[T] = Job(prefix, self._hashing, self._settings.limits.job_timeout_s)
        task = asyncio.create_task(job.live(work))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return job

    @property
    def stopping(self) -> bool:
        """Whether new jobs are refused."""
        return self._stop_at is not None

    def stop(self) -> None:
        """Refuses new jobs from now on; those that run have server.drain_timeout_s to end."""
        if self._stop_at is None:
            loop = asyncio.get_running_loop()
            self._stop_at = loop.time() + self._settings.server.drain_timeout_s
            loop.call_at(self._stop_at, self.cancel)

    def cancel(self) -> None:
        """Ends the jobs that run: who waits for one gets Stopping."""
        for task in self._running:
            task.cancel()

    async def close(self) -> None:
        """Waits for the jobs that run, until they are cancelled, and removes every file.

        A thread that hangs is left behind.
        """
        self.stop()
        await self._wait((self._stop_at or 0) - asyncio.get_running_loop().time() + CANCEL_TIMEOUT_S)
        self._hashing.shutdown(wait=False, cancel_futures=True)
        self._spool.close()

    async def _wait(self, timeout_s: float) -> None:
        if self._running:
            await asyncio.wait(self._running, timeout=max(timeout_s, 0))
