"""Makes a BSP that stands in for NVIDIA's, whose files are not free: its scripts are our own, its layout is NVIDIA's.

    make_bsp(Path("/tmp/nvidia"), "35.4.1", "tegra234")

What of NVIDIA's scripts is known, and played here, is in ../shared/tegra.md, sections 1.1 and 1.5.
"""

import io
import shutil
import tarfile
from pathlib import Path

FILES = Path(__file__).parent / "files"

PLACEHOLDERS = (
    "tegraflash_internal.py", "tegrasign_v3_internal.py", "tegrasign_v3_util.py", "BUP_generator.py", "dtbcheck.py",
    "l4t_bup_gen.func", "odmsign.func", "nvflashxmlparse", "tegrasign_v3_oemkey.yaml", "t194.py", "t234.py",
    "rollback/rollback_parser.py", "pyfdt/pyfdt.py", "mb1_t234_prod.bin",
)  # fmt: skip
PROGRAMS = ("tegraparser_v2", "tegrahost_v2", "tegrabct_v2")


def make_bsp(base: Path, version: str, soctype: str, mode: str = "", **beside: str) -> Path:
    """Makes a BSP.

    Arguments:
        base: the directory below which BSPs stand.
        version: of L4T.
        soctype: the chip.
        mode: what its tegraflash.py does besides; the functions there have the names.
        beside: more files for it, by name.

    Returns its Linux_for_Tegra.
    """
    chip = "tegra186" if soctype == "tegra194" else soctype
    root = base / f"L4T-{version}-{chip}" / "Linux_for_Tegra"
    bootloader = root / "bootloader"
    for directory in (bootloader / "rollback", bootloader / "pyfdt"):
        directory.mkdir(parents=True, exist_ok=True)
    for name in PLACEHOLDERS:
        (bootloader / name).write_text(f"# {name}\n")
    (bootloader / "BUP_generator.py").write_text("#!/usr/bin/env python3\n# BUP_generator.py\n")
    for name in PROGRAMS:
        shutil.copy("/usr/bin/true", bootloader / name)
    for name in ("tegraflash.py", "tegrasign_v3.py", "images.py", "sign_image.py", "tegraopenssl"):
        shutil.copy(FILES / name, bootloader / name)
    shutil.copy(FILES / "flash-helper", bootloader / f"{soctype}-flash-helper")
    shutil.copy(FILES / "l4t_sign_image.sh", root)
    for path in (bootloader / f"{soctype}-flash-helper", bootloader / "tegraopenssl", root / "l4t_sign_image.sh"):
        path.chmod(0o755)
    for name, text in {"mode": mode, **beside}.items():
        (root / name).write_text(text)
    for directory in (base, root.parent):
        directory.chmod(0o755)
    return root


FLASHVARS = """\
# as meta-tegra makes it
FLASHVARS="BPFDTB_FILE DEV_PARAMS EMMC_BCT"
BPFDTB_FILE="tegra234-bpmp-3701-@BPFDTBREV@-3737-0000.dtb"
DEV_PARAMS=tegra234-br-bct-p3701-0000.dts
EMMC_BCT='tegra234-p3701-0000-p3737-0000-TE990M-sdram.dts'
OVERLAY_DTB_FILE=""
"""


def request_files(soctype: str, images: int = 3, **manifest: str) -> dict[str, bytes]:
    """What the Yocto class sends for a machine: its files, by name."""
    values = {
        "DTBFILE": "board.dtb", "ODMDATA": "gbe-uphy-config-22,hsstp-lane-map-3", "LNXFILE": "boot.img",
        "BOARDID": "3701", "FAB": "", "fuselevel": "fuselevel_production", "localbootfile": "boot.img",
        "CHIPREV": "1", "BOARDSKU": "0000", "BOARDREV": "", "EMMC_BCTS": "sdram.dts", **manifest,
    }  # fmt: skip
    files = {
        "MANIFEST": "".join(f"{name}={value}\n" for name, value in values.items()).encode(),
        "flashvars": FLASHVARS.encode(),
        "bsp_version": b"BSP_BRANCH=35\nBSP_MAJOR=4\nBSP_MINOR=1\n",
        "flash.xml.in": b"<partition_layout/>\n",
        "sdram.dts": b"/dts-v1/;\n",
        "board.dtb": b"\xd0\x0d\xfe\xed" + bytes(range(256)) * 4,
        "boot.img": b"ANDROID!" + soctype.encode() * 5000,
    }
    return files | {f"image-{number}.bin": f"image {number} ".encode() * (100 + number) for number in range(images)}


def pack(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    """As `tar -c -h -z -f tegrasign-in.tar.gz *` packs them."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()
