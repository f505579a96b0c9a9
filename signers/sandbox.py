"""Runs a vendor's tool where it can do no harm: it parses hostile input, and is taken to be hostile itself.

    async with sandbox.open(job.directory()) as workspace:
        commands = workspace.put("commands.csf", text)
        done = await workspace.run("/usr/bin/cst", "-i", commands, "-o", "csf.bin")
        signature = workspace.result("csf.bin")

The tool has an empty working directory, what it was given, the system's programs, and nothing else: see
docs/sandbox.md.
"""

import asyncio
import contextlib
import errno
import itertools
import logging
import math
import os
import re
import resource
import secrets
import shutil
import signal
import stat
import struct
import sysconfig
import tempfile
from abc import ABC, abstractmethod
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal
from urllib.parse import quote, unquote

from pydantic import BaseModel, ConfigDict, Field

from tokens.errors import ToolFailed, ToolTimeout, ToolUnavailable
from tokens.lending import Loan, Via, configuration

log = logging.getLogger(__name__)

BUBBLEWRAP = Path("/usr/bin/bwrap")
PRLIMIT = Path("/usr/bin/prlimit")
SETPRIV = Path("/usr/bin/setpriv")

_LIBRARIES = Path("/usr/lib", sysconfig.get_config_var("MULTIARCH") or "")
_SYSTEM = tuple(map(Path, ("/bin", "/sbin", "/lib", "/lib32", "/lib64")))
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where tools find programs."""
LOGGED_BYTES = 2000
"""How much of what a tool says goes to the log where it fails."""
_OPEN_FILES_MAX = 256
# Users that no distribution or directory service gives out. Each workspace of a service that runs as root has one:
# by chance where it begins, since another service on this host may do the same.
_FIRST_USER, _USERS = 0x7000_0000, 0x0FFF_FFFF
_users = itertools.count(secrets.randbelow(_USERS))

_CHUNK = 65536
_PIPE_CHUNKS_MAX = 16  # a pipe holds at most 1 MiB (pipe(7), /proc/sys/fs/pipe-max-size)
_END_TIMEOUT_S = 5.0
_NOT_STARTED = (126, 127)  # what prlimit exits with where it cannot start a program

Size = Annotated[int, Field(gt=0)]


class ToolSettings(BaseModel):
    """`[tools]`: how vendors' tools are run."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    sandbox: Literal["bubblewrap", "none"] = "bubblewrap"
    """What keeps a tool from the rest of the host; `none` leaves only the limits."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """How long one run may take, in seconds; then it is killed, with all that it started."""
    memory_max_bytes: Size = 1 << 30
    """How much address space each process may have."""
    processes_max: Size = 16
    """How many processes and threads a tool may have at once; not limited where `sandbox` is `none`."""
    file_max_bytes: Size = 8 << 30
    """How large each file may become."""
    tmp_max_bytes: Size = 64 << 20
    """How much the tool's own /tmp, which is memory, may hold."""
    output_max_bytes: Size = 64 << 10
    """How much is kept of what a tool prints; the rest is read and dropped."""
    pkcs11_engine: Path = _LIBRARIES / "engines-3/pkcs11.so"
    """OpenSSL's pkcs11 engine (package libengine-pkcs11-openssl)."""
    pkcs11_provider: Path = _LIBRARIES / "ossl-modules/pkcs11.so"
    """OpenSSL's pkcs11 provider (package pkcs11-provider)."""
    p11_kit_client: Path = _LIBRARIES / "pkcs11/p11-kit-client.so"
    """The module by which tools reach keys on loan (package p11-kit-modules)."""


@dataclass(frozen=True, slots=True)
class Completed:
    """How a tool ended.

    Arguments:
        status: its exit status; 128 + N where signal N killed it.
        output: the beginning of what it printed, stdout and stderr together. For logs: it holds what the tool likes.
    """

    status: int
    output: bytes

    @property
    def said(self) -> str:
        """How its output begins, for the log: ASCII, on one line."""
        return ascii(self.output[:LOGGED_BYTES].decode("latin-1"))


class Sandbox:
    """Makes workspaces for tools. One serves all jobs of a service."""

    def __init__(self, settings: ToolSettings) -> None:
        self._settings = settings
        self._checked = False

    @property
    def settings(self) -> ToolSettings:
        """What it was made with."""
        return self._settings

    async def check(self) -> None:
        """Runs `true` as a tool; what has worked once is not tried again. Raises ToolUnavailable."""
        if self._checked:
            return
        with tempfile.TemporaryDirectory(prefix="hsmsign-") as directory:
            async with self.open(Path(directory)) as workspace:
                done = await workspace.run("/usr/bin/true")
        if done.status:
            log.warning("the sandbox's check failed with status %d", done.status)
            raise _cannot_sandbox()
        self._checked = True

    def open(self, directory: Path) -> AbstractAsyncContextManager["Workspace"]:
        """A workspace in `directory`: an empty directory of the job's own, which outlives it.

        Raises ToolUnavailable where the tool cannot be given a user of its own.
        """
        return self._open(directory)

    @asynccontextmanager
    async def _open(self, directory: Path) -> AsyncIterator["Workspace"]:
        kind = _Unconfined if self._settings.sandbox == "none" else _Confined
        workspace = kind(self._settings, directory)
        try:
            yield workspace
        finally:
            workspace.close()


class Workspace(ABC):
    """One job's use of tools: what they are given, their working directory, what they make there.

    Several runs, one after the other or at once, share the working directory.
    """

    def __init__(self, settings: ToolSettings, directory: Path) -> None:
        self._settings = settings
        self._directory = directory.resolve() / "work"
        self._directory.mkdir(mode=0o700)
        self._loan: dict[str, str] = {}

    @property
    @abstractmethod
    def work(self) -> str:
        """The working directory, as the tool sees it."""

    @abstractmethod
    def put(self, name: str, content: bytes | Path) -> str:
        """Lets the tool read a file. Returns its absolute path, as the tool sees it.

        Arguments:
            name: a relative path; it may hold `/`.
            content: bytes, which are never written to a disk, or a file, which is not copied.

        Raises:
            ValueError: The name leads elsewhere.
        """

    @abstractmethod
    def mount(self, path: Path) -> None:
        """Lets the tool read an installation, at the same path and, through symbolic links, at its real one.

        Raises ToolUnavailable where it is not there, or would show the tool the files of jobs.
        """

    def place(self, name: str, chunks: Iterable[bytes], *, executable: bool = False) -> None:
        """Puts a file into the working directory, for the tool to use and to change; before the first run only.

        Raises ValueError where the name leads elsewhere.
        """
        path = self._new(name)
        with path.open("xb") as file:
            file.writelines(chunks)
        path.chmod(0o700 if executable else 0o600)
        self._hand_over(path)

    def link(self, name: str, target: str) -> None:
        """Makes a symbolic link in the working directory, to a path as the tool sees it; see `place`."""
        self._new(name).symlink_to(target)

    def _new(self, name: str) -> Path:
        path = self._directory / _inside(name)
        for parent in reversed(path.relative_to(self._directory).parents[:-1]):
            if not (self._directory / parent).is_dir():
                (self._directory / parent).mkdir(mode=0o700)
                self._hand_over(self._directory / parent)
        return path

    def files(self, at_most: int) -> dict[str, Path]:
        """The host's paths of the regular files in the working directory, by their names in it.

        Raises ToolFailed where they are more than that.
        """
        found = {}
        for directory, _, names in os.walk(self._directory):  # which follows no link
            for path in (Path(directory, name) for name in names):
                if stat.S_ISREG(path.lstat().st_mode):
                    found[str(path.relative_to(self._directory))] = path
            if len(found) > at_most:
                raise ToolFailed(
                    f"The tool made more than {at_most} files.", "Look for what the tool says in the service's log."
                )
        return found

    @abstractmethod
    def reach(self, socket: Path) -> str:
        """Lets the tool connect to a socket of the service. Returns its path, as the tool sees it."""

    def lend(self, loan: Loan, via: Via) -> None:
        """Lets OpenSSL in the tool reach keys on loan.

        Raises ToolUnavailable where a module that this takes is not installed.
        """
        settings = self._settings
        plugin = (
            (settings.pkcs11_engine, "libengine-pkcs11-openssl")
            if via is Via.ENGINE
            else (settings.pkcs11_provider, "pkcs11-provider")
        )
        for module, package in ((settings.p11_kit_client, "p11-kit-modules"), plugin):
            if not module.is_file():
                raise ToolUnavailable(
                    f"The module {module.name} of the package {package} is not installed.",
                    f"Install the package {package}, or name the module's file in [tools].",
                )
            self.mount(module)
        text = configuration(
            via,
            client=settings.p11_kit_client,
            engine=settings.pkcs11_engine,
            provider=settings.pkcs11_provider,
        )
        socket = self.reach(Path(unquote(loan.address.removeprefix("unix:path="))))
        self._loan = {
            "P11_KIT_SERVER_ADDRESS": f"unix:path={quote(socket)}",
            "OPENSSL_CONF": self.put("loan/openssl.cnf", text.encode()),
        }

    async def run(self, *argv: str, env: Mapping[str, str] | None = None) -> Completed:
        """Runs a program to its end, whatever its exit status.

        When this returns, raises or is cancelled, nothing that the program started is left.

        Arguments:
            argv: the program's absolute path, as the tool sees it, and its arguments. Anybody can read them.
            env: what it gets besides PATH, LANG, HOME, PWD and what `lend` adds.

        Raises:
            ToolTimeout: It did not end in `timeout_s`.
            ToolUnavailable: The program, or the sandbox, cannot be started.
        """
        program = Path(argv[0]).name
        environment = {
            "PATH": PATH,
            "LANG": "C.UTF-8",
            "HOME": self.work,
            "PWD": self.work,
            **self._loan,
            **(env or {}),
        }
        run = _Run(self._settings)
        task = asyncio.create_task(self._start(run, argv, environment))
        try:
            ended = await asyncio.shield(task)
        except asyncio.CancelledError:
            run.stop()
            while not task.done():
                with contextlib.suppress(asyncio.CancelledError):  # nobody may leave before everything is dead
                    await asyncio.wait({task})
            raise
        if not ended.in_time:
            raise ToolTimeout(
                f"The tool {program} took more than {self._settings.timeout_s:g} s, and was killed.",
                "Try again; if it happens again, raise tools.timeout_s.",
            )
        if not ended.started:
            log.warning("bubblewrap: %s", ended.output.decode(errors="replace"))
            raise _cannot_sandbox()
        if ended.status in _NOT_STARTED and ended.output.startswith(b"prlimit: "):
            raise ToolUnavailable(
                f"The tool {program} cannot be started: it, or its loader, is not there.",
                "Check that it is installed where the settings say, and built for this machine.",
            )
        return Completed(ended.status, ended.output)

    def result(self, name: str) -> Path:
        """The host's path of a file that the tool made in its working directory.

        Raises:
            ToolFailed: It is not there, empty, or something else than a readable, regular file.
            ValueError: The name leads elsewhere.
        """
        path = self._directory / _inside(name)
        hint = "Look for what the tool says in the service's log."
        try:
            # a directory on the way to it may be a symbolic link just as well
            real = path.resolve()
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (OSError, RuntimeError):
            raise ToolFailed("The tool did not make the file that it should have.", hint) from None
        try:
            status = os.fstat(file)
        finally:
            os.close(file)
        if real != path or not stat.S_ISREG(status.st_mode):
            raise ToolFailed("The tool made something else than a file.", hint)
        if not status.st_size:
            raise ToolFailed("The tool made an empty file.", hint)
        return path

    @abstractmethod
    def close(self) -> None:
        """Takes back what the tool was given; the working directory stays."""

    @abstractmethod
    def _hand_over(self, path: Path) -> None:
        """Makes the tool the owner of what is put into its working directory."""

    @abstractmethod
    async def _start(self, run: "_Run", argv: tuple[str, ...], env: Mapping[str, str]) -> "_Ended":
        """Runs the program where this workspace runs them."""

    def _limits(self, *more: str) -> list[str]:
        """The command that limits the program behind it."""
        settings = self._settings
        limits = {
            "as": (resource.RLIMIT_AS, settings.memory_max_bytes),
            "fsize": (resource.RLIMIT_FSIZE, settings.file_max_bytes),
            "cpu": (resource.RLIMIT_CPU, math.ceil(settings.timeout_s)),
            "nofile": (resource.RLIMIT_NOFILE, _OPEN_FILES_MAX),
        }
        options = [f"--{name}={_at_most(limit, value)}" for name, (limit, value) in limits.items()]
        return [str(PRLIMIT), *options, "--core=0", *more]


class _Confined(Workspace):
    """A workspace in bubblewrap.

    As root, bubblewrap makes the namespaces with root's rights, and the tool has a user of its own. As another user,
    it needs a user namespace, and the tool is the service's user without any of its files.
    """

    def __init__(self, settings: ToolSettings, directory: Path) -> None:
        super().__init__(settings, directory)
        self._contents: dict[str, bytes] = {}
        self._mounts: dict[str, Path] = {}
        self._parents: dict[str, None] = {}
        self._given: list[Path] = []
        self._user: int | None = None
        if os.geteuid() == 0:
            self._user = _FIRST_USER + next(_users) % _USERS
            self._give(self._directory)
            self._directory.chmod(0o710)  # bubblewrap, of root's group, enters it with hardly any of root's rights

    @property
    def work(self) -> str:
        return "/work"

    def put(self, name: str, content: bytes | Path) -> str:
        path = f"/in/{_inside(name)}"
        if isinstance(content, bytes):
            self._contents[path] = content
            self._mounts.pop(path, None)
        else:
            real = content.resolve()
            if not self._give(real):
                return self.put(name, real.read_bytes())
            self._contents.pop(path, None)
            self._bind(real, path)
        return path

    def mount(self, path: Path) -> None:
        path = Path(os.path.abspath(path))  # noqa: PTH100 - a link stays one
        real = path.resolve()
        if not real.exists():
            raise ToolUnavailable(
                f"The installation {path.name} is not there.",
                "Install the tool, or name its directory in the settings.",
            )
        if self._directory.is_relative_to(real):
            raise ToolUnavailable(
                f"The installation {path.name} holds the service's spool directory.",
                "Name the tool's own directory in the settings.",
            )
        for place in {path, real}:
            if not place.is_relative_to("/usr"):
                self._bind(real, str(place))

    def close(self) -> None:
        for path in self._given:
            if path != self._directory:
                with contextlib.suppress(FileNotFoundError):  # a loan's socket may have ended before
                    os.chown(path, os.geteuid(), -1)
        self._given.clear()
        self._contents.clear()

    def reach(self, socket: Path) -> str:
        self._give(socket)
        self._bind(socket, f"/run/{socket.name}")
        return f"/run/{socket.name}"

    def _hand_over(self, path: Path) -> None:
        if self._user is not None:
            os.chown(path, self._user, self._user)

    def _bind(self, source: Path, destination: str) -> None:
        self._parents_of(destination)
        self._mounts[destination] = source

    def _parents_of(self, path: str) -> None:
        # those that bubblewrap makes by itself are closed to other users
        for parent in reversed(PurePosixPath(path).parents[:-1]):
            self._parents[str(parent)] = None

    def _give(self, path: Path) -> bool:
        """Makes the tool's user the owner of what is root's and not everybody's, until `close`.

        False where it is somebody else's: of another user, or of a tool that runs now.
        """
        status = path.stat()
        readable = stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IROTH
        if self._user is None or readable or path in self._given:
            return True
        if status.st_uid:
            return False
        try:
            os.chown(path, self._user, -1)
        except OSError:
            raise ToolUnavailable(
                "The tool cannot be given a user of its own.", "Run the service as another user than root."
            ) from None
        self._given.append(path)
        return True

    async def _start(self, run: "_Run", argv: tuple[str, ...], env: Mapping[str, str]) -> "_Ended":
        files: list[int] = []
        try:
            for content in self._contents.values():
                files.append(_memory_file(content))
            outside = [str(BUBBLEWRAP), *self._privileges(), *self._view(files)]
            if _SYSTEM_CALLS:
                files.append(_memory_file(_SYSTEM_CALLS))
                outside += ["--seccomp", str(files[-1])]
            processes = _at_most(resource.RLIMIT_NPROC, self._settings.processes_max)
            inside = [*self._become(), *self._limits(f"--nproc={processes}"), *argv]
            return await run([*outside, "--", *inside], env, files=files)
        finally:
            for file in files:
                os.close(file)

    def _privileges(self) -> list[str]:
        options = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup"]
        options += ["--die-with-parent", "--new-session", "--hostname", "tool", "--cap-drop", "ALL"]
        if self._user is None:
            return [*options, "--unshare-user", "--disable-userns"]
        return [*options, "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]

    def _become(self) -> list[str]:
        """The command that gives up root's rights for good."""
        if self._user is None:
            return []
        user = ["--reuid", str(self._user), "--regid", str(self._user), "--clear-groups"]
        return [str(SETPRIV), *user, "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]

    def _view(self, files: list[int]) -> list[str]:
        """The file system that the tool sees."""
        view = ["--ro-bind", "/usr", "/usr"]
        for system in _SYSTEM:
            if system.is_symlink():
                view += ["--symlink", str(system.readlink()), str(system)]
            else:
                view += ["--ro-bind-try", str(system), str(system)]
        view += ["--dir", "/etc", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--proc", "/proc"]
        view += ["--dir", "/dev"]
        for device in _DEVICES:
            view += ["--dev-bind", device, device]
        for name, number in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
            view += ["--symlink", f"/proc/self/fd{number}", f"/dev/{name}"]
        view += ["--perms", "1777", "--size", str(self._settings.tmp_max_bytes), "--tmpfs", "/tmp"]  # noqa: S108
        view += ["--bind", str(self._directory), self.work]
        for path in self._contents:
            self._parents_of(path)
        for parent in self._parents:
            view += ["--dir", parent]
        mode = "0400" if self._user is None else "0444"  # the files are root's; nobody else is in there to read them
        for path, file in zip(self._contents, files, strict=True):
            view += ["--perms", mode, "--file", str(file), path]
        for path, source in self._mounts.items():
            view += ["--ro-bind", str(source), path]
        # last: from here on nothing but /work and /tmp can be written to
        return [*view, "--remount-ro", "/", "--chdir", self.work]


class _Unconfined(Workspace):
    """A workspace without a sandbox: the tool is a process like the service's own, with limits."""

    def __init__(self, settings: ToolSettings, directory: Path) -> None:
        super().__init__(settings, directory)
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None  # noqa: S108
        self._inputs = Path(tempfile.mkdtemp(prefix="hsmsign-", dir=memory))

    @property
    def work(self) -> str:
        return str(self._directory)

    def put(self, name: str, content: bytes | Path) -> str:
        path = self._inputs / _inside(name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.touch(mode=0o600, exist_ok=False)
            path.write_bytes(content)
        else:
            path.symlink_to(content.resolve())
        return str(path)

    def mount(self, path: Path) -> None:
        if not path.exists():
            raise ToolUnavailable(
                f"The installation {path.name} is not there.",
                "Install the tool, or name its directory in the settings.",
            )

    def close(self) -> None:
        shutil.rmtree(self._inputs, ignore_errors=True)

    def reach(self, socket: Path) -> str:
        return str(socket)

    def _hand_over(self, path: Path) -> None:
        pass  # it has the same user

    async def _start(self, run: "_Run", argv: tuple[str, ...], env: Mapping[str, str]) -> "_Ended":
        # RLIMIT_NPROC counts all processes of the service's user here: no number would fit
        return await run([*self._limits(), *argv], env, directory=self._directory)


@dataclass(frozen=True, slots=True)
class _Ended:
    status: int
    output: bytes
    started: bool = True
    in_time: bool = True


class _Pipe:
    """A pipe that is read as it fills, so that its writers never wait; the first `keep` bytes are kept."""

    def __init__(self, keep: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._keep = keep
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        self.kept = bytearray()
        self.line = asyncio.Event()
        """Set when a line, or the end, was read."""
        self._loop.add_reader(self._reader, self._read)

    def _read(self) -> bool:
        try:
            data = os.read(self._reader, _CHUNK)
        except BlockingIOError:
            return False
        self.kept += data[: self._keep - len(self.kept)]
        if not data:
            self._loop.remove_reader(self._reader)
        if not data or b"\n" in data:
            self.line.set()
        return bool(data)

    def close_writer(self) -> None:
        """Leaves the pipe to the process that has inherited it."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def close(self) -> bytes:
        """What was kept, with what is still in the pipe."""
        self.close_writer()
        for _ in range(_PIPE_CHUNKS_MAX):
            if not self._read():
                break
        self._loop.remove_reader(self._reader)
        os.close(self._reader)
        return bytes(self.kept)


@dataclass
class _Run:
    """One process, from its start until all that it started is dead."""

    settings: ToolSettings
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    def stop(self) -> None:
        """Has everything killed."""
        self._stop.set()

    async def __call__(
        self,
        command: list[str],
        env: Mapping[str, str],
        *,
        directory: Path | None = None,
        files: Sequence[int] | None = None,
    ) -> _Ended:
        """Runs a command; with `files`, which it inherits, bubblewrap."""
        deadline = asyncio.get_running_loop().time() + self.settings.timeout_s
        output = _Pipe(self.settings.output_max_bytes)
        os.fchmod(output.writer, 0o622)  # a tool of another user opens it anew: as /dev/stderr, which scripts do
        status = _Pipe(_CHUNK)
        ended = True
        try:
            if files is not None:
                command = [command[0], "--json-status-fd", str(status.writer), *command[1:]]
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output.writer,
                    stderr=output.writer,
                    cwd=directory,
                    env=env,
                    pass_fds=() if files is None else (status.writer, *files),
                    start_new_session=True,  # no signal of the service's terminal, and a group to kill
                )
            except (FileNotFoundError, PermissionError):
                raise _not_installed(Path(command[0])) from None
            first = None
            try:
                output.close_writer()
                status.close_writer()
                if files is not None:
                    first = await _first_process(status)
                ended = await self._ended(process, deadline)
            finally:
                await _kill(process, first, group=files is None)
        finally:
            printed, told = output.close(), status.close()
        code = process.returncode or 0
        return _Ended(
            status=code if code >= 0 else 128 - code,
            output=printed,
            started=files is None or b'"exit-code"' in told,
            in_time=ended,
        )

    async def _ended(self, process: Process, deadline: float) -> bool:
        """Waits until the process ends, or has to. Whether it did so in time."""
        exited, stopped = asyncio.ensure_future(process.wait()), asyncio.ensure_future(self._stop.wait())
        left = max(deadline - asyncio.get_running_loop().time(), 0)
        try:
            done, _ = await asyncio.wait({exited, stopped}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            exited.cancel()
            stopped.cancel()
        return bool(done)


async def _first_process(status: _Pipe) -> int | None:
    """A descriptor (pidfd) of the process whose death ends all others of a sandbox; None where there is none yet.

    It must be known before bubblewrap may be killed: in between, that process would wait for its parent forever.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_END_TIMEOUT_S):
            await status.line.wait()
    found = re.search(rb'"child-pid": (\d+)', status.kept)
    if found is None:
        return None
    with contextlib.suppress(ProcessLookupError):
        return os.pidfd_open(int(found[1]))
    return None


async def _kill(process: Process, first: int | None, *, group: bool) -> None:
    """Kills a process and all that it started, if there are any left, and waits for their end."""
    try:
        with contextlib.suppress(ProcessLookupError):
            if group:
                os.killpg(process.pid, signal.SIGKILL)
            elif first is not None:
                signal.pidfd_send_signal(first, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if first is not None:
            await _gone(first)
    finally:
        if first is not None:
            os.close(first)


async def _gone(first: int) -> None:
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(first, gone.set)
    try:
        async with asyncio.timeout(_END_TIMEOUT_S):
            await gone.wait()
    except TimeoutError:
        log.warning("a tool that was killed has not ended")  # the kernel waits for a device
    finally:
        loop.remove_reader(first)
    # bubblewrap may have died before it: where the service is a container's first process, the orphan is ours
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, first, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222 - does not wait


def _memory_file(content: bytes) -> int:
    """A descriptor of a file that is in memory only, to be read from its beginning."""
    file = os.memfd_create("hsmsign")
    with open(file, "wb", closefd=False) as writer:
        writer.write(content)
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _inside(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
        raise ValueError(f"no relative path within a directory: {name!r}")
    return path


def _at_most(limit: int, value: int) -> int:
    """The value, or the service's own limit where that is lower: it cannot be raised."""
    hard = resource.getrlimit(limit)[1]
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def _not_installed(program: Path) -> ToolUnavailable:
    package = {"bwrap": "bubblewrap"}.get(program.name, "util-linux")
    hint = f"Install the package {package}."
    if package == "bubblewrap":
        hint = 'Install the package bubblewrap, or set sandbox = "none" in [tools].'
    return ToolUnavailable(f"The program {program.name}, which tools are run by, cannot be started.", hint)


def _cannot_sandbox() -> ToolUnavailable:
    return ToolUnavailable(
        "The sandbox that tools must run in cannot be made on this host.",
        "Allow user namespaces to the service's user (or CAP_SYS_ADMIN to a service that runs as root), "
        'or set sandbox = "none" in [tools].',
    )


# What no tool needs (seccomp(2)): a user namespace would give it all of the kernel's privileged code to attack, and
# files and segments in memory would count against none of its limits.


@dataclass(frozen=True, slots=True)
class _Abi:
    """The numbers of system calls: AUDIT_ARCH_..., clone, unshare, memfd_create and what makes System V segments."""

    arch: int
    clone: int
    unshare: int
    memory: tuple[int, ...]

    def rules(self) -> list[tuple[int, int, int, int]]:
        """The part of the filter for programs of this kind: instructions as (code, jump if, jump if not, operand)."""
        rules = [_LOAD_NUMBER]
        if self.arch == _X86_64.arch:
            rules += [(_AT_LEAST, 0, 1, 0x4000_0000), _refuse(errno.ENOSYS)]  # x32 has numbers of its own
        rules += [(_EQUAL, 0, 1, 435), _refuse(errno.ENOSYS)]  # clone3: its flags cannot be seen, clone is used instead
        for number in (*self.memory, 447):  # memfd_secret
            rules += [(_EQUAL, 0, 1, number), _refuse(errno.EPERM)]
        for number in (self.clone, self.unshare):
            rules += [
                (_EQUAL, 0, 4, number),
                _LOAD_FLAGS,
                (_ANY_OF, 0, 1, 0x1000_0000),  # CLONE_NEWUSER
                _refuse(errno.EPERM),
                _ALLOW,
            ]
        rules.append(_ALLOW)
        return [_LOAD_ARCH, (_EQUAL, 0, len(rules), self.arch), *rules]


def _refuse(error: int) -> tuple[int, int, int, int]:
    return (_RETURN, 0, 0, 0x0005_0000 | error)  # SECCOMP_RET_ERRNO


# struct sock_filter (linux/bpf_common.h) over struct seccomp_data (linux/seccomp.h), little-endian
_EQUAL, _AT_LEAST, _ANY_OF, _RETURN = 0x15, 0x35, 0x45, 0x06
_LOAD_NUMBER, _LOAD_ARCH, _LOAD_FLAGS = (0x20, 0, 0, 0), (0x20, 0, 0, 4), (0x20, 0, 0, 16)
_ALLOW = (_RETURN, 0, 0, 0x7FFF_0000)
_X86_64 = _Abi(0xC000_003E, clone=56, unshare=272, memory=(319, 29))
_I386 = _Abi(0x4000_0003, clone=120, unshare=310, memory=(356, 395, 117))
_AARCH64 = _Abi(0xC000_00B7, clone=220, unshare=97, memory=(279, 194))
_ARM = _Abi(0x4000_0028, clone=120, unshare=337, memory=(385, 307))
_ABIS = {"x86_64": (_X86_64, _I386), "aarch64": (_AARCH64, _ARM)}


def _system_calls(machine: str) -> bytes:
    """The filter for a machine; empty where its numbers are not known here."""
    abis = _ABIS.get(machine, ())
    rules = [*itertools.chain.from_iterable(abi.rules() for abi in abis), _refuse(errno.ENOSYS)]
    return b"".join(struct.pack("<HBBI", *rule) for rule in rules) if abis else b""


_SYSTEM_CALLS = _system_calls(os.uname().machine)
