"""The sandbox, with the real bubblewrap and tools that do what hostile ones would.

As root, all that concerns bubblewrap is run once more as another user: see the last test.
"""

import asyncio
import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from signers import sandbox
from signers.sandbox import Completed, Sandbox, ToolSettings, Workspace
from tokens.errors import ToolFailed, ToolTimeout, ToolUnavailable
from tokens.lending import LentKey, Loan, LoanLimits, Via

PYTHON = "/usr/bin/python3"
NOBODY = 65534
MIB = 1 << 20

Script = Callable[..., Awaitable[Completed]]


@pytest.fixture(params=["bubblewrap", "none"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def job(tmp_path) -> Path:
    """The directory of the job."""
    directory = tmp_path / "job"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No thread, child or zombie is left by any test here."""
    before = _own()
    yield
    assert _eventually(lambda: _own() == before), (before, _own())


def _own() -> tuple[int, str]:
    children = ""
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # of a thread that ends meanwhile
            children += path.read_text()
    return threading.active_count(), children


def _eventually(condition: Callable[[], bool], timeout_s: float = 3.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _running(marker: str) -> list[bytes]:
    """The command lines on this host that hold the marker."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if marker.encode() in (line := path.read_bytes()):
                found.append(line)
    return found


async def _ready(path: Path) -> None:
    """Waits until a tool has made a file."""
    while not path.exists():  # noqa: ASYNC110 - made by another process
        await asyncio.sleep(0.01)


async def _script(workspace: Workspace, text: str, *arguments: str) -> Completed:
    """Runs a Python script as the tool."""
    return await workspace.run(PYTHON, "-I", "-S", workspace.put("tool.py", text.encode()), *arguments)


async def _answer(workspace: Workspace, text: str, *arguments: str) -> Any:
    """What a script prints, as JSON."""
    done = await _script(workspace, f"import json, os, sys\n{text}", *arguments)
    assert done.status == 0, done.output.decode()
    return json.loads(done.output)


# what tools are for


async def test_runs_a_tool_with_inputs(kind, job, tmp_path):
    upload = tmp_path / "upload"
    upload.write_bytes(b"from a file, ")
    upload.chmod(0o600)
    owner = upload.stat().st_uid
    async with Sandbox(ToolSettings(sandbox=kind)).open(job) as workspace:
        inputs = workspace.put("a/b/upload", upload), workspace.put("text", b"from memory")
        done = await workspace.run("/bin/sh", "-c", 'cat "$@" >signed; pwd; echo oops >&2; exit 3', "sh", *inputs)
        assert done == Completed(3, f"{workspace.work}\noops\n".encode())
        assert workspace.result("signed").read_bytes() == b"from a file, from memory"
    assert upload.stat().st_uid == owner
    assert upload.stat().st_mode & 0o777 == 0o600


async def test_runs_share_the_working_directory_and_nothing_else(kind, job):
    async with Sandbox(ToolSettings(sandbox=kind)).open(job) as workspace:
        await workspace.run("/bin/sh", "-c", "echo one >a; mkdir d; echo two >d/b")
        for content in (b"old", Path(__file__), b"new"):
            name = workspace.put("name", content)
        assert (await workspace.run("/bin/cat", "a", "d/b", name)).output == b"one\ntwo\nnew"
        assert workspace.result("d/b").read_bytes() == b"two\n"


async def test_twenty_at_once(kind, tmp_path):
    async def one(number: int) -> bytes:
        directory = tmp_path / str(number)
        directory.mkdir()
        async with tools.open(directory) as workspace:
            text = workspace.put("text", str(number).encode())
            await workspace.run("/bin/cp", text, "copy")
            return workspace.result("copy").read_bytes()

    tools = Sandbox(ToolSettings(sandbox=kind))
    assert await asyncio.gather(*map(one, range(20))) == [str(number).encode() for number in range(20)]


async def test_files_in_the_working_directory(kind, job):
    async with Sandbox(ToolSettings(sandbox=kind)).open(job) as workspace:
        workspace.place("a/b/text", [b"one ", b"two\n"])
        workspace.place("a/tool", [b"#!/bin/sh\ncat a/b/text\n", b"echo three >>a/b/text; : >empty\n"], executable=True)
        with pytest.raises(FileExistsError):
            workspace.place("a/tool", [b""])
        assert (await workspace.run("/bin/sh", "-c", "a/tool; mv a/b/text a/c; ln -s a/c link")).output == b"one two\n"
        found = {name: path.read_bytes()[:8] for name, path in workspace.files(3).items()}
        assert found == {"a/c": b"one two\n", "a/tool": b"#!/bin/s", "empty": b""}
        with pytest.raises(ToolFailed, match="more than 2 files"):
            workspace.files(2)
        for name in ("../a", "/a", "a/../../b"):
            with pytest.raises(ValueError, match="relative path"):
                workspace.place(name, [b""])


async def test_a_socket_of_the_service(kind, job):
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_unix_server(greet, job / "greeter")
    async with server, Sandbox(ToolSettings(sandbox=kind)).open(job) as workspace:
        text = "import socket\nclient = socket.socket(socket.AF_UNIX)\nclient.connect(sys.argv[1])\n"
        text += "print(json.dumps(client.recv(9).decode()))"
        assert await _answer(workspace, text, workspace.reach(job / "greeter")) == "hello"


async def test_scripts_may_name_their_streams(kind, job):
    async with Sandbox(ToolSettings(sandbox=kind)).open(job) as workspace:
        line = "echo out >/dev/stdout; echo err >/dev/stderr; cat </dev/stdin; cat <(echo pipe)"
        assert (await workspace.run("/bin/bash", "-c", line)) == Completed(0, b"out\nerr\npipe\n")


async def test_a_signal_is_a_status(kind, job):
    async with Sandbox(ToolSettings(sandbox=kind)).open(job) as workspace:
        assert (await workspace.run("/bin/sh", "-c", "kill -SEGV $$")).status == 128 + 11


async def test_an_installation_is_there_at_both_of_its_paths(kind, job, tmp_path):
    real = tmp_path / "elsewhere/cst-3.4.1"
    (real / "bin").mkdir(parents=True)
    (real / "bin/cst").write_text("#!/bin/sh\necho signed\n")
    (real / "bin/cst").chmod(0o755)
    (tmp_path / "elsewhere/secret").write_text("secret")
    (tmp_path / "opt/NXP").mkdir(parents=True)
    link = tmp_path / "opt/NXP/cst"
    link.symlink_to("../../elsewhere/cst-3.4.1")
    async with Sandbox(ToolSettings(sandbox=kind)).open(job) as workspace:
        workspace.mount(link)
        workspace.mount(Path("/usr/bin"))
        for path in (link, real):
            assert (await workspace.run(str(path / "bin/cst"))).output == b"signed\n"
        if kind == "bubblewrap":
            assert await _answer(workspace, f"print(json.dumps(os.listdir({str(real.parent)!r})))") == ["cst-3.4.1"]


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/../../b", "/etc/passwd", "a\0b"])
async def test_names_stay_inside(kind, job, name):
    async with Sandbox(ToolSettings(sandbox=kind)).open(job) as workspace:
        with pytest.raises(ValueError, match="relative path"):
            workspace.put(name, b"")
        with pytest.raises(ValueError, match="relative path"):
            workspace.result(name)


async def test_a_key_on_loan(kind, job, pairs, openssl, tmp_path):
    pair = pairs["p256"]
    (tmp_path / "public.pem").write_bytes(pair.public_pem)
    (tmp_path / "content").write_bytes(b"content")
    signed: list[str] = []
    loan = Loan(
        job / "loan", "token", [LentKey("k", b"\1", pair.key)], LoanLimits(), lambda label, _: signed.append(label)
    )
    async with loan, Sandbox(ToolSettings(sandbox=kind)).open(job) as workspace:
        workspace.lend(loan, Via.ENGINE)
        line = (
            "dgst -sha256 -engine pkcs11 -keyform engine -out signature -sign pkcs11:token=token;object=k;type=private"
        )
        done = await workspace.run("/usr/bin/openssl", *line.split(), workspace.put("content", b"content"))
        assert done.status == 0, done.output.decode()
        openssl(f"dgst -sha256 -verify public.pem -signature {workspace.result('signature')} content")
    assert signed == ["k"]


@pytest.mark.parametrize(
    ("via", "setting", "package"),
    [
        (Via.ENGINE, "pkcs11_engine", "libengine-pkcs11-openssl"),
        (Via.PROVIDER, "pkcs11_provider", "pkcs11-provider"),
        (Via.ENGINE, "p11_kit_client", "p11-kit-modules"),
    ],
)
async def test_a_module_that_is_not_installed(kind, job, via, setting, package):
    settings = ToolSettings(sandbox=kind, **{setting: Path("/nowhere/module.so")})
    async with Sandbox(settings).open(job) as workspace:
        with pytest.raises(ToolUnavailable) as caught:
            workspace.lend(Loan(job / "loan", "token", [], LoanLimits(), print), via)
    assert package in caught.value.hint
    assert "/nowhere" not in caught.value.message + caught.value.hint


# what they may not see or do


async def test_sees_the_system_and_what_it_was_given(job, tmp_path, monkeypatch):
    monkeypatch.setenv("HSMSIGN_CANARY", "canary")
    (tmp_path / "key.pem").write_text("key")
    (tmp_path / "job/other").write_text("of the job, but not given to the tool")
    async with Sandbox(ToolSettings()).open(job) as workspace:
        seen = await _answer(
            workspace,
            """
print(json.dumps({
    "root": sorted(os.listdir("/")), "etc": os.listdir("/etc"), "dev": sorted(os.listdir("/dev")),
    "tmp": os.listdir("/tmp"), "work": os.listdir("/work"), "in": os.listdir("/in"),
    "missing": [not os.path.exists(path) for path in sys.argv[1:]],
    "processes": [int(each) for each in os.listdir("/proc") if each.isdigit()], "self": os.getpid(),
    "descriptors": sorted(int(each) for each in os.listdir("/proc/self/fd"))[:-1],
    "stdin": os.readlink("/proc/self/fd/0"), "user": os.getuid(), "groups": os.getgroups(),
    "rights": [line.split()[1] for line in open("/proc/self/status") if line.startswith(("Cap", "NoNewPrivs"))],
}))
""",
            *map(str, (tmp_path / "key.pem", job, Path(__file__), "/root", "/home", "/etc/passwd", "/sys", "/run")),
        )
        environment = (await workspace.run("/usr/bin/env", env={"ADDED": "yes"})).output.decode().split("\n")
    links = {path.name for path in map(Path, ("/bin", "/sbin", "/lib", "/lib32", "/lib64")) if path.exists()}
    assert set(seen["root"]) == {*links, "dev", "etc", "in", "proc", "tmp", "usr", "work"}
    assert seen["etc"] in ([], ["ld.so.cache"])
    assert seen["dev"] == ["fd", "null", "random", "stderr", "stdin", "stdout", "urandom", "zero"]
    assert (seen["tmp"], seen["work"], seen["in"]) == ([], [], ["tool.py"])
    assert all(seen["missing"])
    assert set(seen["processes"]) == {1, seen["self"]}
    assert (seen["descriptors"], seen["stdin"]) == ([0, 1, 2], "/dev/null")
    assert seen["user"] == os.geteuid() or (os.geteuid() == 0 and seen["user"] >= 0x7000_0000)
    assert seen["groups"] in ([], [os.getgid()])
    assert seen["rights"] == [*["0" * 16] * 5, "1"]
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert set(environment) == {path, "LANG=C.UTF-8", "HOME=/work", "PWD=/work", "ADDED=yes", ""}


async def test_environment_without_sandbox(job, monkeypatch):
    monkeypatch.setenv("HSMSIGN_CANARY", "canary")
    async with Sandbox(ToolSettings(sandbox="none")).open(job) as workspace:
        environment = (await workspace.run("/usr/bin/env")).output.decode().split()
    assert {each.partition("=")[0] for each in environment} == {"PATH", "LANG", "HOME", "PWD"}


async def test_no_network(kind, job):
    with socket.create_server(("127.0.0.1", 0)) as server:
        async with Sandbox(ToolSettings(sandbox=kind)).open(job) as workspace:
            done = await _script(
                workspace,
                "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])), 5)",
                str(server.getsockname()[1]),
            )
    assert (done.status == 0) == (kind == "none"), done.output


async def test_writes_nowhere_else(job, tmp_path):
    upload = tmp_path / "upload"
    upload.write_bytes(b"upload")
    upload.chmod(0o600)
    async with Sandbox(ToolSettings()).open(job) as workspace:
        written = await _answer(
            workspace,
            """
def can(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return False
    return True
print(json.dumps({
    **{path: can(open, path, "ab") for path in ("/usr/bin/env", *sys.argv[1:])},
    **{path + " mode": can(os.chmod, path, 0o777) for path in sys.argv[1:]},
    **{path + "/new": can(open, path + "/new", "wb") for path in ("/", "/usr", "/dev", "/etc", "/in", "/proc")},
    "device": can(os.mknod, "/work/device", 0o600 | 0o020000, 0x103),
    "mount": can(open, "/proc/sys/kernel/core_pattern", "wb"),
}))
""",
            workspace.put("upload", upload),
            workspace.put("bytes", b"bytes"),
        )
    assert not any(written.values()), written
    assert upload.read_bytes() == b"upload"


async def test_system_calls_that_no_tool_needs(job):
    assert platform.machine() in ("x86_64", "aarch64"), "write this machine's numbers into the filter"
    async with Sandbox(ToolSettings()).open(job) as workspace:
        errors = await _answer(
            workspace,
            """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def error(result):
    return ctypes.get_errno() if result == -1 else 0
print(json.dumps([
    error(libc.unshare(0x10000000)), error(libc.syscall(435, 0, 0)), error(libc.memfd_create(b"x", 0)),
    error(libc.shmget(0, 4096, 0o1600)),
]))
""",
        )
        # what it must not break: threads, and processes
        done = await _script(
            workspace, "import threading, os; t = threading.Thread(); t.start(); t.join(); os.system('true')"
        )
    assert errors == [1, 38, 1, 1]
    assert done.status == 0, done.output


def test_the_filter_tells_abis_apart():
    """An i386 tool (NXP's older cst) runs, under rules of its own."""
    rules = sandbox._system_calls("x86_64")
    assert len(rules) % 8 == 0
    assert sandbox._system_calls("riscv64") == b""
    for architecture in (0xC000003E, 0x40000003):
        assert architecture.to_bytes(4, "little") in rules


async def test_secrets_stay_in_memory(kind, job):
    secret = os.urandom(16).hex().encode()
    async with Sandbox(ToolSettings(sandbox=kind)).open(job) as workspace:
        key = workspace.put("keys/key.pem", secret)
        run = asyncio.create_task(workspace.run("/bin/sh", "-c", 'touch ready; cat "$1"; sleep 0.5', "sh", key))
        await _ready(job / "work/ready")
        assert not [path for path in job.rglob("*") if path.is_file() and secret in path.read_bytes()]
        assert not _running(secret.decode())
        if kind == "none":
            assert Path(key).stat().st_mode & 0o777 == 0o600
            assert subprocess.check_output(["stat", "-f", "-c", "%T", key]) == b"tmpfs\n"
        assert (await run).output == secret
    if kind == "none":
        assert not Path(key).parent.parent.exists()


# what they may not take


async def test_processes_are_bounded(job):
    async with Sandbox(ToolSettings(processes_max=8)).open(job) as workspace:
        forked = await _answer(
            workspace,
            """
import time
children = 0
try:
    while children < 1000:
        if not os.fork():
            time.sleep(60)
            os._exit(0)
        children += 1
except BlockingIOError:
    print(children)
""",
        )
    assert 1 <= forked <= 8


async def test_fork_bomb(kind, job):
    # without a sandbox nothing bounds a real one: a small one it is
    bomb = "import os, sys, time\nfor _ in range(4): os.fork()\ntime.sleep(60)"
    if kind == "bubblewrap":
        bomb = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    marker = f"bomb-{os.urandom(8).hex()}"
    async with Sandbox(ToolSettings(sandbox=kind, timeout_s=1)).open(job) as workspace:
        with pytest.raises(ToolTimeout):
            await _script(workspace, bomb, marker)
    assert _eventually(lambda: not _running(marker), 0.5)


async def test_memory_is_bounded(kind, job):
    async with Sandbox(ToolSettings(sandbox=kind, memory_max_bytes=256 * MIB)).open(job) as workspace:
        done = await _script(workspace, "bytearray(512 << 20)")
    assert done.status == 1
    assert b"MemoryError" in done.output


async def test_files_are_bounded(kind, job):
    async with Sandbox(ToolSettings(sandbox=kind, file_max_bytes=MIB)).open(job) as workspace:
        done = await workspace.run("/bin/dd", "if=/dev/zero", "of=huge", "bs=1M", "count=2")
        assert done.status == 128 + 25  # SIGXFSZ
    assert (job / "work/huge").stat().st_size <= MIB


async def test_tmp_is_bounded(job):
    async with Sandbox(ToolSettings(tmp_max_bytes=MIB)).open(job) as workspace:
        done = await workspace.run("/bin/dd", "if=/dev/zero", "of=/tmp/huge", "bs=1M", "count=2")
    assert b"No space left" in done.output


async def test_output_is_bounded(kind, job):
    async with Sandbox(ToolSettings(sandbox=kind, output_max_bytes=1000)).open(job) as workspace:
        done = await workspace.run("/bin/sh", "-c", "head -c 10000000 /dev/zero; echo end >end")
        assert done == Completed(0, bytes(1000))
        assert workspace.result("end").read_bytes() == b"end\n"


async def test_endless_output(kind, job):
    async with Sandbox(ToolSettings(sandbox=kind, timeout_s=0.5)).open(job) as workspace:
        with pytest.raises(ToolTimeout) as caught:
            await workspace.run("/usr/bin/yes")
    assert "0.5 s" in caught.value.message
    assert "timeout_s" in caught.value.hint


async def test_busy_tool_that_ignores_signals_is_killed(kind, job):
    marker = f"busy-{os.urandom(8).hex()}"
    started = time.monotonic()
    async with Sandbox(ToolSettings(sandbox=kind, timeout_s=0.5)).open(job) as workspace:
        with pytest.raises(ToolTimeout):
            await workspace.run("/bin/sh", "-c", "trap '' TERM INT HUP; while :; do :; done", marker)
    assert not _running(marker)
    assert time.monotonic() - started < 3


DAEMON = """
import os, signal, sys, time
if os.fork():
    print("started", flush=True)
    time.sleep(float(sys.argv[2]))
    os._exit(0)
if sys.argv[3] == "bubblewrap":
    os.setsid()
if os.fork():
    os._exit(0)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
open("there", "w").write("yes")
time.sleep(1)
open("later", "w").write("yes")
time.sleep(60)
"""


@pytest.mark.parametrize("parent_s", [60, 0.3])
async def test_a_daemon_dies_with_the_run(kind, job, parent_s):
    """Whether its parent is killed at the deadline or ends in time; without a sandbox, unless it calls setsid."""
    marker = f"daemon-{os.urandom(8).hex()}"
    async with Sandbox(ToolSettings(sandbox=kind, timeout_s=0.7)).open(job) as workspace:
        if parent_s < 1:
            assert (await _script(workspace, DAEMON, marker, str(parent_s), kind)).output == b"started\n"
        else:
            with pytest.raises(ToolTimeout):
                await _script(workspace, DAEMON, marker, str(parent_s), kind)
        assert _eventually(lambda: not _running(marker), 0.5 if kind == "none" else 0.0)
        assert workspace.result("there")
        await asyncio.sleep(1.2)
        assert not (job / "work/later").exists()


async def test_cancelled_in_the_middle(kind, job):
    marker = f"cancelled-{os.urandom(8).hex()}"
    async with Sandbox(ToolSettings(sandbox=kind)).open(job) as workspace:
        run = asyncio.create_task(workspace.run("/bin/sh", "-c", "touch ready; sleep 60; true", marker))
        await _ready(job / "work/ready")
        assert _running(marker)
        run.cancel()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert _eventually(lambda: not _running(marker), 0.5 if kind == "none" else 0.0)


async def test_cancelled_at_any_moment(kind, job):
    marker = f"early-{os.urandom(8).hex()}"
    async with Sandbox(ToolSettings(sandbox=kind)).open(job) as workspace:
        for delay in range(40):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(delay / 4000):
                    await workspace.run("/bin/sh", "-c", "sleep 60; true", marker)
    assert _eventually(lambda: not _running(marker), 0.5)


async def test_descriptors_do_not_leak(kind, job):
    async with Sandbox(ToolSettings(sandbox=kind, timeout_s=0.3)).open(job) as workspace:
        workspace.put("text", b"text")
        before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for _ in range(3):
            await workspace.run("/bin/true")
            with pytest.raises(ToolTimeout):
                await workspace.run("/bin/sleep", "60")
            with pytest.raises(ToolUnavailable):
                await workspace.run("/nowhere/tool")
        assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


# what they may not hand back


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("true", "did not make"),
        ("touch out", "empty"),
        ("mkdir out", "something else"),
        ("mkfifo out", "something else"),
        ("ln -s /etc/passwd out", "something else|did not make"),
        ("echo x >real; ln -s real out", "something else|did not make"),
        ("ln -s out out", "did not make"),
    ],
)
async def test_results_that_are_refused(kind, job, command, message):
    async with Sandbox(ToolSettings(sandbox=kind)).open(job) as workspace:
        await workspace.run("/bin/sh", "-c", command)
        with pytest.raises(ToolFailed, match=message) as caught:
            workspace.result("out")
    assert str(job) not in caught.value.message + caught.value.hint


async def test_a_link_on_the_way_to_a_result(kind, job):
    async with Sandbox(ToolSettings(sandbox=kind)).open(job) as workspace:
        await workspace.run("/bin/ln", "-s", "/etc", "out")
        with pytest.raises(ToolFailed):
            workspace.result("out/passwd")


# what is not there


async def test_a_program_that_is_not_there(kind, job):
    async with Sandbox(ToolSettings(sandbox=kind)).open(job) as workspace:
        with pytest.raises(ToolUnavailable, match="The tool cst cannot be started") as caught:
            await workspace.run("/opt/NXP/cst/bin/cst")
        # a tool's own exit status is its own
        assert (await workspace.run("/bin/sh", "-c", "exit 127")).status == 127
    assert "/opt" not in caught.value.message + caught.value.hint


async def test_an_installation_that_is_not_there_or_too_much(kind, job, tmp_path):
    async with Sandbox(ToolSettings(sandbox=kind)).open(job) as workspace:
        with pytest.raises(ToolUnavailable, match="is not there"):
            workspace.mount(tmp_path / "nowhere")
        if kind == "bubblewrap":
            with pytest.raises(ToolUnavailable, match="spool"):
                workspace.mount(tmp_path)


async def test_check(kind):
    await Sandbox(ToolSettings(sandbox=kind)).check()


async def test_check_without_bubblewrap(monkeypatch):
    tools = Sandbox(ToolSettings())
    monkeypatch.setattr(sandbox, "BUBBLEWRAP", Path("/nowhere/bwrap"))
    with pytest.raises(ToolUnavailable, match="bwrap") as caught:
        await tools.check()
    assert "package bubblewrap" in caught.value.hint
    assert 'sandbox = "none"' in caught.value.hint
    monkeypatch.undo()
    await tools.check()
    monkeypatch.setattr(sandbox, "BUBBLEWRAP", Path("/nowhere/bwrap"))
    await tools.check()  # is not tried again


@pytest.mark.parametrize("words", ["exit 1", "echo 'bwrap: No permissions to create new namespace' >&2; exit 1"])
async def test_check_where_the_kernel_refuses(monkeypatch, tmp_path, words):
    program = tmp_path / "bwrap"
    program.write_text(f"#!/bin/sh\n{words}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sandbox, "BUBBLEWRAP", program)
    with pytest.raises(ToolUnavailable, match="cannot be made") as caught:
        await Sandbox(ToolSettings()).check()
    assert "user namespaces" in caught.value.hint


async def test_check_in_vain(monkeypatch):
    """Bubblewrap runs, and what it is to run fails."""
    monkeypatch.setattr(Workspace, "run", lambda *_: asyncio.sleep(0, Completed(1, b"")))
    with pytest.raises(ToolUnavailable):
        await Sandbox(ToolSettings()).check()


def test_settings():
    with pytest.raises(ValueError, match="timeout_s"):
        ToolSettings(timeout_s=0)
    with pytest.raises(ValueError, match="extra"):
        ToolSettings(unknown=1)
    assert ToolSettings().p11_kit_client.is_absolute()


if os.geteuid() == 0:

    def test_all_of_this_as_another_user():
        """Where the service is not root, bubblewrap needs a user namespace."""
        if not all(parent.stat().st_mode & 0o001 for parent in Path(__file__).parents):
            pytest.skip("another user cannot reach this tree: clone it elsewhere than below /root")
        directory = tempfile.mkdtemp(prefix="hsmsign-test-")
        try:
            os.chown(directory, NOBODY, NOBODY)
            pytest_ = [
                sys.executable,
                "-B",
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "--basetemp",
                f"{directory}/t",
            ]
            done = subprocess.run(
                [*pytest_, "-k", "not none", __file__],
                user=NOBODY,
                group=NOBODY,
                extra_groups=[],
                env={"PATH": os.environ["PATH"], "HOME": directory, "TMPDIR": directory},
                cwd=Path(__file__).parents[2],
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
        finally:
            shutil.rmtree(directory)
        assert done.returncode == 0, done.stdout + done.stderr

    async def test_two_tools_may_have_the_same_private_file(tmp_path):
        shared = tmp_path / "shared"
        shared.write_bytes(b"shared")
        shared.chmod(0o600)
        (tmp_path / "1").mkdir()
        (tmp_path / "2").mkdir()
        tools = Sandbox(ToolSettings())
        async with tools.open(tmp_path / "1") as one, tools.open(tmp_path / "2") as two:
            for workspace in (one, two):
                name = workspace.put("shared", shared)
                assert (await workspace.run("/bin/cat", name)).output == b"shared"
            users = {(await workspace.run("/usr/bin/id", "-u")).output for workspace in (one, two)}
            assert len(users) == 2
            assert b"0\n" not in users
        assert shared.stat().st_uid == 0
