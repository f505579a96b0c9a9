"""What clients send: accepted by rule."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signers.archives import ArchiveLimits, Scratch
from signers.signer import Upload
from signers.tegra.bundle import Bundle, parse_manifest, unpack
from tests.stand_in_bsp.build import pack, request_files
from tokens.errors import ArtifactRejected

# as tegrasign.bbclass of dunfell and of kirkstone writes it
MANIFEST = """\
DTBFILE=tegra194-p2888-0001-p2822-0000.dtb
ODMDATA=0x9190000
LNXFILE=boot.img
BOARDID=2888
FAB=400
fuselevel=fuselevel_production
localbootfile=boot.img
CHIPREV=2
BOARDSKU=0004
BOARDREV=
EMMC_BCTS=tegra194-mb1-bct-memcfg-p2888.cfg,tegra194-memcfg-sw-override.cfg
"""


def read(files: dict[str, bytes], tmp_path: Path, mode: str = "w:gz") -> Bundle:
    data = pack(files, mode)
    limits = ArchiveLimits()
    return unpack(Upload(data, "x", len(data)), limits, Scratch(tmp_path, limits), {"tegraflash.py"})


def test_a_manifest() -> None:
    manifest = parse_manifest(MANIFEST)
    assert manifest.environment == {
        "BOARDID": "2888", "FAB": "400", "BOARDSKU": "0004", "CHIPREV": "2", "fuselevel": "fuselevel_production",
        "localbootfile": "boot.img",
    }  # fmt: skip
    assert (manifest.payloads, manifest.signs_files) == ((), False)
    assert manifest.values["ODMDATA"] == "0x9190000"


def test_payloads() -> None:
    specs = "BUPGENSPECS=fab=100;boardsku=0001;boardrev= chipsku=00:00:00:D0;bup_type=bl;\n"
    first, second = parse_manifest(MANIFEST + specs).payloads
    assert (first.environment, first.kind) == ({"FAB": "100", "BOARDSKU": "0001", "BOARDREV": ""}, None)
    assert (second.environment, second.kind) == ({"CHIP_SKU": "00:00:00:D0"}, "bl")
    assert len(parse_manifest(MANIFEST + "BUPGEN=1\n").payloads) == 1
    with pytest.raises(ArtifactRejected, match="more than 32 payloads"):
        parse_manifest(MANIFEST + "BUPGENSPECS=" + "fab=1 " * 33)


def test_a_key_twice() -> None:
    parse_manifest(MANIFEST + "FAB=400\n")
    with pytest.raises(ArtifactRejected, match="two values"):
        parse_manifest(MANIFEST + "FAB=500\n")


@given(st.text())
def test_any_manifest(text: str) -> None:
    with contextlib.suppress(ArtifactRejected):
        for value in parse_manifest(text).values.values():
            assert not set(value) & set("$`\\\"'&|<>()!*?[]{}~#\n")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_files_are_where_they_were(tmp_path: Path, mode: str) -> None:
    sent = request_files("tegra234") | {"a/b": b"x", "./c": b"y"}
    bundle = read(sent, tmp_path, mode)
    assert {name: content.read(0, content.length) for name, content in bundle.files.items()} == {
        name.removeprefix("./"): data for name, data in sent.items()
    }
    assert "MANIFEST" not in bundle.to_sign


@pytest.mark.parametrize(
    "line",
    [
        "",
        "# a comment with $(id)",
        "A=b",
        'A="b c"',
        "A='b c'",
        'A=""',
        "  A_1=b  ",
        'A="b";',
        "A=b; ",
        "boardcfg_file=board_config_x.xml",
        'A="@B@,c-d.e:f/g"',
        "A=",
    ],
)
def test_plain_assignments(tmp_path: Path, line: str) -> None:
    read(request_files("tegra234") | {"flashvars": f"{line}\n".encode()}, tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "a=b", "A =b", "A=b c", "A=b;c", 'A="b" c', 'A="b"c', "A=$B", 'A="${B}"', "A=`b`", "A=$(b)", "A+=b", "A[0]=b",
        "export A=b", "A=b&", "A=b|c", "A=<b", "A=(b)", "A=b\\", "A=~root", "A=*", "A=b # c", "A=b\x00", "A=b\x0bc",
        "IFS=x", "PATH=x", "ENV=x", "LD_LIBRARY_PATH=x", "BASH_ENV=x", "PYTHONPATH=x", "PERL5OPT=x", "PS4=x",
        "MACHINE=x", "eval x", "id",
    ],
)  # fmt: skip
def test_what_is_no_plain_assignment(tmp_path: Path, line: str) -> None:
    for name in ("flashvars", "bsp_version"):
        (directory := tmp_path / name).mkdir()
        with pytest.raises(ArtifactRejected, match="refused"):
            read(request_files("tegra234") | {name: f"A=b\n{line}\n".encode()}, directory)


@given(st.text(alphabet="AB=\"'$`;\\ \n#x", max_size=30))
def test_what_is_accepted_is_nothing_that_a_shell_runs(tmp_path_factory, text: str) -> None:
    """What bash makes of an accepted text is variables and nothing else."""
    directory = tmp_path_factory.mktemp("scratch")
    with contextlib.suppress(ArtifactRejected):
        read(request_files("tegra234") | {"flashvars": text.encode()}, directory)
        import subprocess  # noqa: PLC0415 - seldom

        command = ["bash", "-c", f"set -eu; PATH=/nowhere; command_not_found_handle() {{ echo RAN; }}\n{text}"]
        done = subprocess.run(command, capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_too_long_a_text(tmp_path: Path) -> None:
    with pytest.raises(ArtifactRejected, match="more than 65536 bytes"):
        read(request_files("tegra234") | {"flashvars": b"#" * 70_000}, tmp_path)
