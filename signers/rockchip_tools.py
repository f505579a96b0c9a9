"""Rockchip's closed programs, run in the sandbox; each works on a file in place, in its working directory."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from signers.sandbox import Workspace
from tokens.errors import ToolFailed, ToolUnavailable

ARTIFACT = "artifact.bin"
"""What the file is called: rk_sign_tool wants a dot in it."""

INSTALL = "/usr/bin/install"

_log = logging.getLogger(__name__)

Tool = Callable[..., Awaitable[None]]
"""Runs the program with these arguments. Raises ToolFailed where it ends with an error."""


@dataclass(frozen=True, slots=True)
class Program:
    """A program, and the files that must lie beside it."""

    directory: Path
    name: str
    beside: tuple[str, ...] = ()

    async def installed(self, workspace: Workspace, artifact: Path | bytes) -> Tool:
        """Puts copies into the working directory, since rk_sign_tool writes beside itself, and the artifact too."""
        workspace.mount(self.directory)
        files = [str(self.directory / name) for name in (self.name, *self.beside)]
        await _run(workspace, INSTALL, "-m", "700", *files, workspace.work)
        await _run(workspace, INSTALL, "-m", "600", workspace.put("artifact", artifact), ARTIFACT)

        async def tool(*arguments: str) -> None:
            await _run(workspace, f"{workspace.work}/{self.name}", *arguments)

        return tool


def sign_tool(tools: Path) -> Program:
    """Rockchip's rk_sign_tool, of its repository rkbin. Raises ToolUnavailable."""
    return _found(Program(tools / "rkbin-tools", "rk_sign_tool", ("boot_merger", "setting.ini")), "rkbin/tools")


def change_puk(tools: Path) -> Program:
    """Rockchip's change_puk, of its repository rk_tee_user. Raises ToolUnavailable."""
    return _found(Program(tools, "change_puk"), "rk_tee_user")


def look(program: Callable[[Path], Program], tools: Path) -> str | ToolUnavailable:
    """Whether a program is installed: see `signers.signer.UsesTools`."""
    try:
        return f"{program(tools).name} is installed."
    except ToolUnavailable as error:
        return error


def _found(program: Program, source: str) -> Program:
    missing = [name for name in (program.name, *program.beside) if not (program.directory / name).is_file()]
    if missing:
        where = "signers.rk.tools" + ("" if len(program.beside) == 0 else "/rkbin-tools")
        raise ToolUnavailable(
            f"Rockchip's {program.name} is not installed: there is no {', '.join(missing)}.",
            f"Put {', '.join((program.name, *program.beside))} of Rockchip's {source} into {where}.",
        )
    return program


async def _run(workspace: Workspace, *argv: str) -> None:
    done = await workspace.run(*argv)
    name = Path(argv[0]).name
    if done.status != 0:
        _log.warning("%s ended with status %d: %s", name, done.status, done.said)
        raise ToolFailed(f"{name} ended with an error.", "Look for the request's id in the log; check the artifact.")
