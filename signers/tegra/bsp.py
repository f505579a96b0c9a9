"""NVIDIA's Board Support Packages (BSP) for Jetsons, as they stand side by side below one directory.

    L4T_BASE/L4T-35.4.1-tegra234/Linux_for_Tegra

NVIDIA's scripts look for each other, and write, in their own directory: each job has copies of them. Programs are used
where they are.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokens.errors import ToolUnavailable

SocType = Literal["tegra186", "tegra194", "tegra210", "tegra234"]

STAND_IN = "tegraopenssl"
"""NVIDIA's program that uses keys: a job has another one under its name."""

COPIES = "_tools"
"""Where, in a job's working directory, the scripts' copies are."""

LINKED = ("tegraflash.py", "BUP_generator.py", "dtbcheck.py", "t194.py", "t234.py", "rollback/rollback_parser.py")
"""What the flash helpers want to find in the working directory."""

_COPIED_DIRECTORIES = ("bootloader/pyfdt", "bootloader/rollback")
_SCRIPT_SUFFIXES = frozenset((".py", ".func", ".yaml", ".sh"))
_SCRIPT_MAX_BYTES = 4 * 1024 * 1024
_DIRECTORY = re.compile(r"L4T-([0-9]+(?:\.[0-9]+){1,2})-(tegra186|tegra210|tegra234)")

_NEEDED = (
    "bootloader/tegraflash.py", "bootloader/tegraflash_internal.py", "bootloader/tegrasign_v3.py",
    "bootloader/tegrasign_v3_internal.py", "bootloader/tegrasign_v3_util.py", "bootloader/tegraopenssl",
    "bootloader/tegraparser_v2", "bootloader/tegrahost_v2", "bootloader/tegrabct_v2", "bootloader/BUP_generator.py",
    "bootloader/l4t_bup_gen.func", "bootloader/odmsign.func", "bootloader/nvflashxmlparse",
    "bootloader/rollback/rollback_parser.py", "l4t_sign_image.sh",
)  # fmt: skip

PROGRAMS = ("bash", "cpp", "dtc", "getopt", "perl", "python3")
"""What the scripts, and what stands in for NVIDIA's program, need of the host."""

_PATCHES = (
    (
        "bootloader/BUP_generator.py",
        re.compile(rb"\A#![^\n]*python(?:2[^\n]*)?\n"),
        "Convert-BUP_generator.py-to-Python3.patch",
    ),
    (
        "bootloader/l4t_bup_gen.func",
        re.compile(rb"\$\{LDK_DIR\}/nv_tegra/bsp_version"),
        "Fix-location-of-bsp_version-file-in-l4t_bup_gen.func.patch",
    ),
    (
        "bootloader/tegraflash_impl_t234.py",
        re.compile(rb"\.getiterator\("),
        "Update-tegraflash_impl_t234.py.patch",
    ),
    (
        "bootloader/tegraflash_internal.py",
        re.compile(rb"\.getiterator\("),
        "Update-tegra-python-scripts-for-Python3.patch",
    ),
)
"""What a file still holds where a patch of meta-tegra's recipes-bsp/tegra-binaries/files was not applied.

Its numbers differ from branch to branch.
"""


@dataclass(frozen=True, slots=True)
class Bsp:
    """A BSP, for one type of chip."""

    root: Path
    version: str
    soctype: SocType

    @property
    def numbers(self) -> tuple[int, ...]:
        """The version, to be compared."""
        return tuple(map(int, self.version.split(".")))

    @property
    def helper(self) -> str:
        """meta-tegra's script that drives NVIDIA's, below `root`."""
        return f"bootloader/{self.soctype}-flash-helper"

    @property
    def chip(self) -> str:
        """The chip's number, as NVIDIA's scripts want it."""
        return f"0x{self.soctype[5:7]}"

    @property
    def program(self) -> Path:
        """NVIDIA's own `tegraopenssl`."""
        return self.root / "bootloader" / STAND_IN

    def unsupported(self) -> str | None:
        """Why it cannot be used, however complete it is."""
        if self.soctype == "tegra210" or self.numbers < (32, 5):
            return "it signs by a program that reads the private key itself, which the client's text could take there"
        if self.numbers >= (38,):
            return "its helpers are called in another way, and make other files"
        return None

    def faults(self) -> list[str]:
        """What is missing: files, and patches."""
        needed = (self.helper, *_NEEDED)
        missing = [f"{name} is missing" for name in needed if not (self.root / name).is_file()]
        return missing + [
            f"{patch} is not applied" for name, sign, patch in _PATCHES if sign.search(_head(self.root / name))
        ]

    def scripts(self) -> Iterator[tuple[str, bytes]]:
        """What a job gets copies of: names below `root`, and contents."""
        places = [self.root, self.root / "bootloader", *map(self.root.joinpath, _COPIED_DIRECTORIES)]
        for place in places:
            for path in sorted(place.iterdir()) if place.is_dir() else ():
                if path.name != STAND_IN and _is_script(path):
                    yield str(path.relative_to(self.root)), path.read_bytes()

    def programs(self) -> Iterator[str]:
        """The names, below `root`, of the programs that scripts may look for beside themselves."""
        for place in (self.root, self.root / "bootloader"):
            for path in sorted(place.iterdir()):
                if path.name != STAND_IN and _is_program(path):
                    yield str(path.relative_to(self.root))

    def tool_names(self) -> frozenset[str]:
        """What no upload may be called: a script that finds it would take it for the tool."""
        names = {COPIES, "rollback", "pyfdt", STAND_IN, *LINKED}
        for place in (self.root, self.root / "bootloader"):
            names |= {path.name for path in place.iterdir() if _is_script(path) or _is_program(path)}
        return frozenset(names)


def find(base: Path, version: str, soctype: SocType) -> Bsp:
    """The BSP of that version for that chip. Raises ToolUnavailable where it is not there, or cannot be used."""
    bsp = Bsp(base / f"L4T-{version}-{_shared(soctype)}/Linux_for_Tegra", version, soctype)
    if not bsp.root.is_dir():
        there = ", ".join(f"{each.version} for {each.soctype}" for each in installed(base)) or "none"
        raise ToolUnavailable(
            f"L4T {version} for {soctype} is not installed; there are: {there}.",
            "Ask for one of those, or install NVIDIA's BSP below signers.tegra.l4t_base.",
        )
    if unsupported := bsp.unsupported():
        raise ToolUnavailable(
            f"L4T {version} for {soctype} cannot be used: {unsupported}.",
            "Use L4T 32.5 up to 36 on tegra186, tegra194 and tegra234.",
        )
    if faults := bsp.faults():
        raise ToolUnavailable(
            f"The BSP of L4T {version} for {soctype} is not complete: {faults[0]}.",
            "`hsmsign doctor` lists all that is missing.",
        )
    return bsp


def installed(base: Path) -> list[Bsp]:
    """Every BSP below a directory, for each chip that it has a flash helper for, or its name says."""
    found: list[Bsp] = []
    for path in sorted(base.glob("L4T-*/Linux_for_Tegra")):
        if match := _DIRECTORY.fullmatch(path.parent.name):
            version, named = match.groups()
            chips: tuple[SocType, ...] = ("tegra186", "tegra194") if named == "tegra186" else (named,)  # type: ignore[assignment]
            helped = [chip for chip in chips if (path / f"bootloader/{chip}-flash-helper").is_file()]
            found += [Bsp(path, version, chip) for chip in helped or chips[:1]]
    return found


def _shared(soctype: SocType) -> str:
    # one BSP is for both
    return "tegra186" if soctype == "tegra194" else soctype


def _head(path: Path) -> bytes:
    return path.read_bytes()[:_SCRIPT_MAX_BYTES] if path.is_file() else b""


def _is_script(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size > _SCRIPT_MAX_BYTES:
        return False
    with path.open("rb") as file:
        return path.suffix in _SCRIPT_SUFFIXES or file.read(2) == b"#!"


def _is_program(path: Path) -> bool:
    if not path.is_file() or not path.stat().st_mode & 0o111:
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"
