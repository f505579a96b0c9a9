"""BSPs side by side."""

from pathlib import Path

import pytest

from signers.tegra import bsp as bsps
from tests.stand_in_bsp.build import PLACEHOLDERS, make_bsp
from tokens.errors import ToolUnavailable


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_bsp(tmp_path, "35.4.1", "tegra234")


def test_a_complete_one(root: Path, tmp_path: Path) -> None:
    bsp = bsps.find(tmp_path, "35.4.1", "tegra234")
    assert (bsp.root, bsp.numbers, bsp.chip, bsp.faults()) == (root, (35, 4, 1), "0x23", [])


def test_scripts_are_copied_and_programs_are_not(root: Path, tmp_path: Path) -> None:
    bsp = bsps.find(tmp_path, "35.4.1", "tegra234")
    scripts = dict(bsp.scripts())
    for name in PLACEHOLDERS:
        is_script = name.endswith((".py", ".func", ".yaml"))
        assert (scripts.get(f"bootloader/{name}") == (root / "bootloader" / name).read_bytes()) == is_script
    assert {"l4t_sign_image.sh", "bootloader/tegra234-flash-helper"} < scripts.keys()
    assert "bootloader/tegraopenssl" not in scripts
    assert set(bsp.programs()) == {f"bootloader/{name}" for name in ("tegraparser_v2", "tegrahost_v2", "tegrabct_v2")}
    names = bsp.tool_names()
    assert {"tegraopenssl", "tegrahost_v2", "tegraflash.py", "odmsign.func", "_tools"} < names
    # what a BSP and a client's files both have
    assert "mb1_t234_prod.bin" not in names


def test_each_missing_file_is_named(root: Path, tmp_path: Path) -> None:
    bsp = bsps.find(tmp_path, "35.4.1", "tegra234")
    for name in ("bootloader/tegraopenssl", "bootloader/odmsign.func", "bootloader/tegra234-flash-helper"):
        content = (root / name).read_bytes()
        (root / name).unlink()
        assert bsp.faults() == [f"{name} is missing"]
        with pytest.raises(ToolUnavailable, match=f"{name} is missing"):
            bsps.find(tmp_path, "35.4.1", "tegra234")
        (root / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "text", "patch"),
    [
        ("BUP_generator.py", "#!/usr/bin/python\n", "Convert-BUP"),
        ("BUP_generator.py", "#!/usr/bin/env python2.7\n", "Convert-BUP"),
        ("l4t_bup_gen.func", 'source "${LDK_DIR}/nv_tegra/bsp_version"\n', "Fix-location-of-bsp_version"),
        ("tegraflash_impl_t234.py", "for each in tree.getiterator('file'):\n", "Update-tegraflash_impl_t234"),
        ("tegraflash_internal.py", "for each in tree.getiterator('file'):\n", "Update-tegra-python-scripts"),
    ],
)
def test_each_patch_that_is_not_applied(root: Path, tmp_path: Path, name: str, text: str, patch: str) -> None:
    bsp = bsps.find(tmp_path, "35.4.1", "tegra234")
    (root / "bootloader" / name).write_text(text)
    (fault,) = bsp.faults()
    assert fault.startswith(patch)
    assert fault.endswith(".patch is not applied")


def test_several(tmp_path: Path) -> None:
    for version, soctype in (
        ("35.4.1", "tegra234"),
        ("32.7.4", "tegra186"),
        ("32.7.4", "tegra194"),
        ("32.7.4", "tegra210"),
    ):
        make_bsp(tmp_path, version, soctype)
    (tmp_path / "L4T-x-tegra234/Linux_for_Tegra").mkdir(parents=True)
    found = [(bsp.version, bsp.soctype) for bsp in bsps.installed(tmp_path)]
    assert found == [("32.7.4", "tegra186"), ("32.7.4", "tegra194"), ("32.7.4", "tegra210"), ("35.4.1", "tegra234")]
    with pytest.raises(
        ToolUnavailable, match=r"36\.4\.0 for tegra234 is not installed; there are: 32\.7\.4 for tegra186, "
    ):
        bsps.find(tmp_path, "36.4.0", "tegra234")


@pytest.mark.parametrize(
    ("version", "soctype", "why"),
    [
        ("32.7.4", "tegra210", "reads the private key itself"),
        ("32.4.3", "tegra194", "reads the private key itself"),
        ("38.2.1", "tegra234", "called in another way"),
    ],
)
def test_what_cannot_be_used(tmp_path: Path, version: str, soctype: bsps.SocType, why: str) -> None:
    make_bsp(tmp_path, version, soctype)
    with pytest.raises(ToolUnavailable, match=why):
        bsps.find(tmp_path, version, soctype)
