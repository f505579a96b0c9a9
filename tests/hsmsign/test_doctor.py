import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hsmsign.cli import main
from hsmsign.doctor import Finding, Level, examine
from signers import sandbox
from tests.stand_in_bsp.build import make_bsp
from yubihsm_simulator import Connector, Device

FILES = """
[server]
spool_directory = "{here}/spool"
state_directory = "{here}/state"
[providers.files]
kind = "file"
root = "{here}/keys"
"""
EACH = """
[[grants]]
name = "each"
signer = "swupdate"
role = "rsa"
provider = "files"
object = "{distro}/swupdate/rsa-private.key"
"""
YUBIHSM = """
[server]
spool_directory = "{here}/spool"
state_directory = "{here}/state"
[providers.yubihsm]
kind = "yubihsm"
connector = "{url}"
serial = 12345678
auth_key_id = 1
password = {{ file = "{here}/password" }}
audit = {{ auth_key_id = 2, password = {{ file = "{here}/absent" }} }}
[[grants]]
name = "absent"
signer = "swupdate"
role = "rsa"
provider = "yubihsm"
object = "absent"
"""


@pytest.fixture
def config(tmp_path: Path, softhsm) -> Path:
    """Key files of the fixtures, copied: a test may spoil them."""
    shutil.copytree(softhsm.keys, tmp_path / "keys")
    path = tmp_path / "hsmsign.toml"
    path.write_text(FILES.replace("{here}", str(tmp_path)))
    return path


async def found(config: Path, level: Level, **environ: str) -> list[Finding]:
    return [finding for finding in await examine(config, environ) if finding.level is level]


def texts(findings: list[Finding]) -> str:
    return "\n".join(f"{finding.subject}: {finding.message} {finding.hint}" for finding in findings)


async def test_all_is_well(softhsm) -> None:
    findings = await examine(softhsm.config, {})
    assert {finding.level for finding in findings} == {Level.OK}
    assert any(finding.subject == "providers.softhsm" for finding in findings)
    assert any("RSA-2048 for swupdate" in finding.message for finding in findings)
    said = {finding.subject: finding.message for finding in findings}
    assert said["grants: demo-token-ekb"] == "AES-256 for ekb"
    assert said["grants: demo-ekb-disk"] == "a file for ekb"


async def test_mistakes_in_the_settings_are_findings(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[server]\nprot = 1\n[limits]\njobs_max = 0\n")
    findings = await examine(tmp_path / "x.toml", {})
    assert [(finding.level, finding.subject) for finding in findings] == [
        (Level.ERROR, "server.prot"),
        (Level.ERROR, "limits.jobs_max"),
    ]


async def test_a_yubihsm(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("password")
    (tmp_path / "password").chmod(0o600)
    config = tmp_path / "hsmsign.toml"
    device = Device()
    with Connector(device) as connector:
        config.write_text(YUBIHSM.format(here=tmp_path, url=connector.url))
        findings = await examine(config, {})
        assert "providers.yubihsm: it answers." in texts(findings)
        assert [finding.subject for finding in findings if finding.level is Level.ERROR] == [
            "providers.yubihsm.audit.password",
            "grants: absent",
        ]
        device.faults.unplugged = True
        assert "no YubiHSM is plugged in" in texts(await found(config, Level.ERROR))
    assert "cannot be reached" in texts(await found(config, Level.ERROR))
    assert device.sessions == 0
    assert not (tmp_path / "state/audit").exists()  # a look is no audit


@pytest.mark.parametrize(
    ("module", "hint"),
    [
        ("/nowhere/libsofthsm2.so", "(Debian: softhsm2)"),
        ("/nowhere/opensc-pkcs11.so", "(Debian: opensc-pkcs11)"),
        ("/nowhere/libtpm2_pkcs11.so.1", "(Debian: libtpm2-pkcs11-1)"),
        ("/nowhere/vendor.so", "correct the path"),
    ],
)
async def test_a_module_that_is_not_there(softhsm, tmp_path: Path, module: str, hint: str) -> None:
    (tmp_path / "x.toml").write_text(softhsm.config.read_text().replace("/usr/lib/softhsm/libsofthsm2.so", module))
    (error,) = await found(tmp_path / "x.toml", Level.ERROR)
    assert error.subject == "providers.softhsm.module"
    assert hint in error.hint


async def test_a_wrong_pin_is_tried_once_however_often_the_doctor_comes(own_softhsm) -> None:
    own_softhsm.pin_file.write_text("not-the-pin")
    for _ in range(4):
        (error,) = await found(own_softhsm.config, Level.ERROR)
        assert error.subject == "providers.softhsm"
        assert "PIN" in error.message
        assert "not-the-pin" not in texts(await examine(own_softhsm.config, {}))
    records = list((own_softhsm.directory / "state").glob("pin-*.json"))
    assert [len(json.loads(record.read_text())["refused"]) for record in records] == [1]


async def test_a_pin_file_that_is_missing_or_open_to_others(own_softhsm) -> None:
    own_softhsm.pin_file.chmod(0o640)
    (warning,) = await found(own_softhsm.config, Level.WARNING)
    assert (warning.subject, warning.hint) == ("providers.softhsm.pin", f"chmod 600 {own_softhsm.pin_file}")
    own_softhsm.pin_file.unlink()
    errors = await found(own_softhsm.config, Level.ERROR)
    assert {error.subject for error in errors} == {"providers.softhsm.pin", "providers.softhsm"}


async def test_a_credential_that_systemd_did_not_pass(softhsm, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    text = softhsm.config.read_text().replace(f'file = "{softhsm.pin_file}"', 'credential = "pin"')
    (tmp_path / "x.toml").write_text(text)
    errors = await found(tmp_path / "x.toml", Level.ERROR)
    assert "LoadCredential=" in texts(errors)


async def test_a_key_that_is_not_on_the_token(softhsm, tmp_path: Path) -> None:
    text = softhsm.config.read_text().replace('object = "swupdate-rsa"', 'object = "swupdate-rsb"')
    (tmp_path / "x.toml").write_text(text)
    (error,) = await found(tmp_path / "x.toml", Level.ERROR)
    assert error.subject == "grants: demo-token-rsa"


async def test_key_files_of_each_distro_are_looked_at(config: Path, tmp_path: Path) -> None:
    config.write_text(config.read_text() + EACH)
    (tmp_path / "keys/demo-large/swupdate/rsa-private.key").write_text("no key")
    (tmp_path / "keys/demo-file/swupdate/rsa-private.key").chmod(0o644)
    findings = await examine(config, {})
    assert any(f.subject == "grants: each, distro demo-file" and f.level is Level.OK for f in findings)
    (error,) = await found(config, Level.ERROR)
    assert error.subject == "grants: each, distro demo-large"
    (warning,) = await found(config, Level.WARNING)
    assert "demo-file/swupdate/rsa-private.key" in warning.message


async def test_key_files_alone(softhsm, tmp_path: Path) -> None:
    environ = {"DIGSIGSERVER_KEYFILE_URI": f"file://{softhsm.keys}", "STATE_DIRECTORY": str(tmp_path)}
    findings = await examine(None, environ)
    assert any(finding.subject == "grants: swupdate-cms, distro demo-file" for finding in findings)
    assert any(finding.subject == "grants: imx-files, machine demo-file-p256" for finding in findings)
    assert any(finding.subject == "grants: ekb-fuse, machine demo-file" for finding in findings)
    found = {(finding.subject, finding.message) for finding in findings if finding.level is not Level.OK}
    assert found == {
        ("signers.imx.cst_base", "there is no cst below /opt/NXP: imx cannot sign."),
        (
            "signers.rk.tools",
            "Rockchip's rk_sign_tool is not installed: there is no rk_sign_tool, boot_merger, setting.ini.",
        ),
        ("signers.rk.tools", "Rockchip's change_puk is not installed: there is no change_puk."),
        ("signers.tegra.l4t_base", "there is no BSP below /opt/nvidia: tegra cannot sign."),
    }


async def test_the_sandbox(softhsm, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = await examine(softhsm.config, {"HSMSIGN_TOOLS__SANDBOX": "none"})
    (warning,) = [finding for finding in findings if finding.level is not Level.OK]
    assert (warning.level, warning.subject) == (Level.WARNING, "tools.sandbox")
    monkeypatch.setattr(sandbox, "BUBBLEWRAP", Path("/nowhere/bwrap"))
    (error,) = [finding for finding in await examine(softhsm.config, {}) if finding.level is not Level.OK]
    assert (error.level, error.subject) == (Level.ERROR, "tools.sandbox")


async def test_what_is_of_no_use_is_said(config: Path) -> None:
    assert {warning.subject for warning in await found(config, Level.WARNING)} == {"grants", "providers.files"}


async def test_addresses(config: Path) -> None:
    text = config.read_text() + EACH
    config.write_text(text.replace("[server]", '[server]\naddress = "0.0.0.0"'))
    (warning,) = await found(config, Level.WARNING)
    assert "no authentication" in warning.message
    for loopback in ("127.0.0.1", "::1", "localhost"):
        config.write_text(text.replace("[server]", f'[server]\naddress = "{loopback}"'))
        assert await found(config, Level.WARNING) == []
    config.write_text(text.replace("[server]", '[server]\naddress = "no such host"'))
    assert [error.subject for error in await found(config, Level.ERROR)] == ["server.address"]


async def test_a_directory_that_cannot_be_made(config: Path, tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file")
    config.write_text(config.read_text() + EACH)
    (error,) = await found(config, Level.ERROR)
    assert error.subject == "server.spool_directory"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments])


def test_the_command(softhsm, tmp_path: Path) -> None:
    result = run("--config", str(softhsm.config))
    assert result.exit_code == 0
    assert "demo-token-rsa" in result.output
    result = run("--config", str(tmp_path / "missing.toml"), "--json")
    assert result.exit_code == 1
    (finding,) = json.loads(result.output)
    assert (finding["level"], finding["subject"]) == ("error", str(tmp_path / "missing.toml"))


async def test_bsps(softhsm, tmp_path: Path) -> None:
    make_bsp(tmp_path, "35.4.1", "tegra234")
    make_bsp(tmp_path, "32.4.3", "tegra194")
    broken = make_bsp(tmp_path, "36.3.0", "tegra234")
    (broken / "bootloader/odmsign.func").unlink()
    (broken / "bootloader/BUP_generator.py").write_text("#!/usr/bin/python\n")
    findings = await examine(softhsm.config, {"HSMSIGN_SIGNERS__TEGRA__L4T_BASE": str(tmp_path)})
    found = {(finding.level, finding.message) for finding in findings if "l4t_base" in finding.subject}
    assert found == {
        (Level.OK, "L4T 35.4.1 for tegra234 is complete."),
        (Level.WARNING, "L4T 36.3.0 for tegra234: bootloader/odmsign.func is missing."),
        (
            Level.WARNING,
            "L4T 36.3.0 for tegra234: Convert-BUP_generator.py-to-Python3.patch is not applied.",
        ),
        (
            Level.WARNING,
            "L4T 32.4.3 for tegra194 cannot be used: it signs by a program that reads the private key itself, "
            "which the client's text could take there.",
        ),
    }
