import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from hsmsign.settings import Grant, LimitSettings, LogSettings, ServerSettings, Settings, SettingsError, load
from signers.registry import SIGNERS
from tokens.audit import AuditSettings
from tokens.file import FileSettings
from tokens.pkcs11 import Pkcs11Settings
from tokens.s3 import S3Settings
from tokens.yubihsm import YubihsmSettings

REFERENCE = Path(__file__).parent.parent.parent / "docs/hsmsign.toml"

FILES = """
[providers.files]
kind = "file"
root = "/srv/keys"
"""
TOKEN = """
[providers.token]
kind = "pkcs11"
module = "/usr/lib/softhsm/libsofthsm2.so"
token = "hsmsign"
pin = { file = "/etc/pin" }
"""


def grant(**keys: str) -> str:
    keys = {"name": "g", "signer": "swupdate", "role": "rsa", "provider": "files", "object": "rsa.key"} | keys
    return "[[grants]]\n" + "".join(f'{key} = "{value}"\n' for key, value in keys.items() if value)


IMX_FILES = """
[[grants]]
provider = "files"
name = "table"
signer = "imx"
role = "files"
object = "table.bin"
"""


FUSE = """
[[grants]]
provider = "files"
name = "fuse"
signer = "ekb"
role = "fuse"
object = "oem_k1.key"
"""


@pytest.fixture(autouse=True)
def _no_settings_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "settings.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def mistakes(write):
    """The mistakes of a file, as `key path: message`."""

    def mistakes(text: str, **environ: str) -> list[str]:
        with pytest.raises(SettingsError) as refused:
            load(write(text), environ)
        assert all(f"{path}: {message}" in refused.value.message for path, message in refused.value.mistakes)
        return [f"{path}: {message}" for path, message in refused.value.mistakes]

    return mistakes


class TestSources:
    def test_nothing_is_needed(self) -> None:
        settings = load(environ={})
        assert (settings.server.address, settings.server.port, settings.grants) == ("127.0.0.1", 9999, ())

    def test_the_file_is_the_given_one_then_the_variables_then_the_usual_places(self, tmp_path: Path) -> None:
        for name, port in (("given", 1), ("named", 2), ("hsmsign", 3)):
            (tmp_path / f"{name}.toml").write_text(f"[server]\nport = {port}\n")
        environ = {"HSMSIGN_CONFIG": str(tmp_path / "named.toml")}
        assert load(tmp_path / "given.toml", environ).server.port == 1
        assert load(None, environ).server.port == 2
        assert load(None, {}).server.port == 3

    def test_precedence(self, write) -> None:
        path = write("[log]\nlevel = 'warning'\n[limits]\nupload_max_bytes = 5\n")
        replaced = {"DIGSIGSERVER_LOG_LEVEL": "DEBUG", "DIGSIGSERVER_REQUEST_MAX_SIZE": "7"}
        assert load(None, replaced).log.level == "debug"
        assert load(path, replaced).log.level == "warning"
        assert load(path, replaced | {"HSMSIGN_LOG__LEVEL": "error"}).log.level == "error"
        assert load(path, replaced | {"HSMSIGN_LOG__LEVEL": "error"}, log={"level": "info"}).log.level == "info"
        assert load(path, replaced, limits={"upload_max_bytes": None}).limits.upload_max_bytes == 5

    def test_variables_reach_every_level(self, write) -> None:
        settings = load(
            write(TOKEN),
            {
                "HSMSIGN_SERVER__HOSTS": '["signer.example.com"]',
                "HSMSIGN_PROVIDERS__TOKEN__SESSIONS": "3",
                "HSMSIGN_PROVIDERS__TOKEN__PIN__FILE": "/run/pin",
                "HSMSIGN_PROVIDERS__TOKEN__ENV__SOFTHSM2_CONF": "/etc/softhsm2.conf",
                "HSMSIGN_GRANTS": json.dumps(
                    [{"name": "g", "signer": "swupdate", "role": "rsa", "provider": "token", "id": "01"}]
                ),
                "HSMSIGN_SERVER": "http://localhost:9999",  # is for `hsmsign sign`
            },
        )
        token = settings.providers["token"]
        assert isinstance(token, Pkcs11Settings)
        assert (settings.server.hosts, token.sessions, token.pin.file) == (("signer.example.com",), 3, Path("/run/pin"))
        assert token.env == {"SOFTHSM2_CONF": "/etc/softhsm2.conf"}
        assert settings.grants[0].id == "01"

    def test_a_variable_that_means_nothing_is_a_mistake(self, mistakes) -> None:
        assert mistakes("", HSMSIGN_SERVER__PROT="1", HSMSIGN_SEVER__PORT="1") == [
            'server.prot: there is no such key - did you mean "port"? (set by HSMSIGN_SERVER__PROT)',
            'sever: there is no such key - did you mean "server"? (set by HSMSIGN_SEVER__PORT)',
        ]

    def test_what_a_variable_sets_wrong_is_said_of_the_variable(self, mistakes) -> None:
        assert mistakes("", HSMSIGN_SERVER__HOSTS="a,b", DIGSIGSERVER_RESPONSE_TIMEOUT="soon") == [
            "server.hosts: it should be a list (in a variable: as JSON) (set by HSMSIGN_SERVER__HOSTS)",
            "server.response_timeout_s: it should be a valid number, unable to parse string as a number"
            " (set by DIGSIGSERVER_RESPONSE_TIMEOUT)",
            "limits.job_timeout_s: it should be a valid number, unable to parse string as a number"
            " (set by DIGSIGSERVER_RESPONSE_TIMEOUT)",
        ]

    def test_a_file_that_is_not_there_or_no_toml(self, tmp_path: Path, mistakes) -> None:
        with pytest.raises(SettingsError, match="cannot be read: No such file"):
            load(tmp_path / "missing.toml", {})
        assert "is not TOML" in mistakes("[server\n")[0]
        (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
        with pytest.raises(SettingsError, match="not UTF-8"):
            load(tmp_path / "latin.toml", {})

    def test_directories_follow_the_environment(self, tmp_path: Path) -> None:
        systemd = load(None, {"STATE_DIRECTORY": "/var/lib/private/hsmsign:/other"})
        assert systemd.server.state_directory == Path("/var/lib/private/hsmsign")
        assert load(None, {"HSMSIGN_SERVER__STATE_DIRECTORY": "/x"}).server.state_directory == Path("/x")

    @pytest.mark.parametrize(
        ("uid", "spool", "state"),
        [(0, "/var/spool/hsmsign", "/var/lib/hsmsign"), (1234, "/fast/hsmsign-1234", "/home/me/state/hsmsign")],
    )
    def test_default_directories(self, monkeypatch: pytest.MonkeyPatch, uid: int, spool: str, state: str) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: uid)
        server = load(None, {"TMPDIR": "/fast", "XDG_STATE_HOME": "/home/me/state"}).server
        assert (str(server.spool_directory), str(server.state_directory)) == (spool, state)


class TestDigsigserver:
    def test_the_key_files_alone_are_enough(self) -> None:
        settings = load(
            None,
            {
                "DIGSIGSERVER_KEYFILE_URI": "file:///srv/signing%20keys",
                "DIGSIGSERVER_RESPONSE_TIMEOUT": "60",
                "DIGSIGSERVER_LOG_LEVEL": "CRITICAL",
                "DIGSIGSERVER_IMX_CST_BASE": "/srv/NXP",
                "DIGSIGSERVER_L4T_TOOLS_BASE": "/srv/nvidia",
                "DIGSIGSERVER_RK_TOOLS_PATH": "/srv/rockchip",
            },
        )
        assert settings.providers == {"keyfiles": FileSettings(kind="file", root=Path("/srv/signing keys"))}
        assert {(g.name, g.object, g.certificate) for g in settings.grants} >= {
            ("swupdate-rsa", "{distro}/swupdate/rsa-private.key", None),
            ("swupdate-cms", "{distro}/swupdate/cms-private.key", "{distro}/swupdate/cms.cert"),
        }
        (fit,) = (g for g in settings.grants if g.signer == "fitimage")
        assert (fit.object, fit.aliases) == ("{machine}/fitimagesign/dev.key", ("dev",))
        assert len(settings.grants) == sum(bool(role.key_file) for signer in SIGNERS for role in signer.roles)
        assert settings.signers.imx.cst_base == Path("/srv/NXP")
        assert settings.signers.tegra.l4t_base == Path("/srv/nvidia")
        assert settings.signers.rk.tools == settings.signers.rkoptee_tee.tools == Path("/srv/rockchip")
        assert (settings.limits.job_timeout_s, settings.server.response_timeout_s) == (60, 60)
        assert settings.log.level == "error"

    def test_a_bucket(self) -> None:
        settings = load(None, {"DIGSIGSERVER_KEYFILE_URI": "s3://keys/some/prefix/"})
        assert settings.providers == {"keyfiles": S3Settings(kind="s3", bucket="keys", prefix="some/prefix")}

    def test_own_grants_take_the_place_of_those_for_their_signer_and_role(self, write) -> None:
        path = write(TOKEN + grant(name="on-token", provider="token", object="swupdate-rsa"))
        settings = load(path, {"DIGSIGSERVER_KEYFILE_URI": "file:///srv/keys"})
        assert [g.name for g in settings.grants if g.signer == "swupdate"] == ["on-token", "swupdate-cms"]

    @pytest.mark.parametrize(
        ("uri", "mistake"),
        [
            ("http://keys", 'providers.keyfiles: no kind of provider is called "http"'),
            ("/srv/keys", 'providers.keyfiles: no kind of provider is called ""'),
            ("file://host/srv/keys", "providers.keyfiles.root: it is missing"),
            ("s3:///prefix", "providers.keyfiles.bucket: it is missing"),
        ],
    )
    def test_a_uri_that_names_no_key_store(self, mistakes, uri: str, mistake: str) -> None:
        (said,) = mistakes("", DIGSIGSERVER_KEYFILE_URI=uri)
        assert said.startswith(mistake)
        assert said.endswith("(set by DIGSIGSERVER_KEYFILE_URI)")


class TestMistakes:
    def test_all_are_reported_at_once(self, mistakes) -> None:
        text = (
            "[server]\nprot = 1\n"
            + FILES
            + "[providers.token]\nkind = 'pkcs11'\nsesions = 2\npin = { file = '/etc/pin' }\ntoken = 'x'\n"
            + grant(provider="tokne", signer="swupdat")
            + grant(name="h", role="rsaa")
        )
        assert mistakes(text) == [
            'server.prot: there is no such key - did you mean "port"?',
            "providers.token.module: it is missing",
            'providers.token.sesions: there is no such key - did you mean "sessions"?',
            'grants[0].provider: no provider is called "tokne"; there are: files, token - did you mean "token"?',
            f'grants[0].signer: no signer is called "swupdat"; there are: {", ".join(each.name for each in SIGNERS)}'
            ' - did you mean "swupdate"?',
            'grants[1].role: no role of swupdate is called "rsaa"; there are: rsa, cms - did you mean "rsa"?',
        ]

    @pytest.mark.parametrize(
        ("text", "mistake"),
        [
            (FILES + grant() + grant(role="cms"), "grants[1].name: grants[0] has the same name"),
            (FILES + grant(object=""), "grants[0]: name the key by its object or id"),
            (FILES + grant(id="01"), "grants[0].id: a key store has no ids: name the object"),
            (FILES + grant(object="{distr}/rsa.key"), "grants[0].object: there is no placeholder {distr}; there are"),
            (FILES + grant(object="{machine}/rsa.key"), "grants[0].object: swupdate is asked by distro: {machine}"),
            (FILES + grant(certificate="{x}"), "grants[0].certificate: there is no placeholder {x}"),
            (FILES + grant(machine="imx8"), "grants[0].machine: swupdate is asked by distro: this grant would never"),
            (FILES + grant() + grant(name="h", object="b"), "grants[1]: no request can tell it from grants[0]"),
            (TOKEN + 2 * grant(provider="token", id="01"), "grants[1].name: grants[0] has the same name"),
            (
                TOKEN + IMX_FILES.replace("files", "token", 1),
                "grants[0].provider: the role files is a file: only a provider",
            ),
            (
                FILES + IMX_FILES + 'allow = ["unlck"]',
                'grants[0].allow: no permission of imx\'s role files is called "unlck"',
            ),
            (FILES + grant() + 'allow = ["unlock"]', "grants[0].allow: no permission of swupdate's role rsa"),
            (FILES + grant(srk_hash="ab" * 32), "grants[0].srk_hash: only the grant of a file with an SRK table"),
            (FILES + IMX_FILES + 'srk_hash = "ab"', "grants[0].srk_hash: "),
            (FILES + FUSE + "digest = true", "grants[0].digest: the role fuse is a symmetric key"),
            (FILES + FUSE + 'certificate = "c.pem"', "grants[0].certificate: the role fuse is a symmetric key"),
            (FILES + FUSE + f"spki_sha256 = '{64 * 'a'}'", "grants[0].spki_sha256: the role fuse is a symmetric key"),
            (FILES + FUSE + "attested = true", "grants[0].attested: the role fuse is a symmetric key"),
            ("[tools]\nsandbox = 'chroot'\n", "tools.sandbox: "),
            ("[signers.imx]\ncst = '/opt'\n", "signers.imx.cst: there is no such key"),
            (FILES + grant(name="a/b"), "grants[0].name: "),
            (FILES + grant(id="0"), "grants[0].id: "),
            (FILES + grant(spki_sha256="abc"), "grants[0].spki_sha256: "),
            (FILES + grant() + "attested = true", "grants[0].attested: a provider of kind file cannot attest its keys"),
            (
                TOKEN + grant(provider="token") + "attested = true",
                "grants[0].attested: a provider of kind pkcs11 cannot attest its keys; there is: yubihsm",
            ),
            (FILES + grant() + "attested = 'please'", "grants[0].attested: it should be a valid boolean"),
            ("[providers.x]\nroot = '/'\n", "providers.x: kind is missing; there are: file, s3, pkcs11"),
            ("[providers.x]\nkind = 'flie'\n", 'providers.x: no kind of provider is called "flie"'),
            (TOKEN.replace('token = "hsmsign"', ""), "providers.token: "),
            (TOKEN.replace("file =", "fil ="), "providers.token.pin"),
            ("grants = 3\n", "grants: it should be a list"),
            ("grants = [3]\n", "grants[0]: it should be a table"),
            ("providers = [1]\n", "providers: it should be a table"),
        ],
    )
    def test_each(self, mistakes, text: str, mistake: str) -> None:
        assert any(said.startswith(mistake) for said in mistakes(text))

    def test_two_sources_of_one_secret(self, mistakes) -> None:
        both = TOKEN.replace('file = "/etc/pin"', 'file = "/etc/pin", credential = "pin"')
        assert mistakes(both) == ["providers.token.pin: name one of file and credential"]

    def test_grants_that_a_key_uri_or_backend_tells_apart_are_none(self, write) -> None:
        tokens = grant(name="a", provider="token", object="a") + grant(name="b", provider="token", object="b")
        assert len(load(write(FILES + TOKEN + tokens + grant(name="c")), {}).grants) == 3

    @pytest.mark.parametrize("secret", ['"20406080"', "20406080", '{ file = ["20406080"] }', '{ value = "20406080" }'])
    def test_a_pin_that_was_typed_there_is_never_repeated(self, mistakes, secret: str) -> None:
        said = mistakes(re.sub(r"pin = .*", f"pin = {secret}", TOKEN))
        assert said
        assert "20406080" not in "".join(said)
        said = mistakes(TOKEN, HSMSIGN_PROVIDERS__TOKEN__PIN="20406080")
        assert "20406080" not in "".join(said)


def uncommented(text: str) -> dict[str, Any]:
    """The reference with its `#key = value` lines in force, where nothing else sets that key of the table."""
    lines: list[str] = []
    for line in text.splitlines():
        key = re.match(r"#?(\w+) = ", line)
        table = "\n".join(lines).rpartition("\n[")[2]
        if line.startswith("#") and key and not re.search(rf"^{key[1]} = ", table, re.MULTILINE):
            lines.append(line[1:])
        else:
            lines.append(line)
    return tomllib.loads("\n".join(lines))


class TestReference:
    def test_it_loads(self) -> None:
        settings = load(REFERENCE, {})
        assert {provider.kind for provider in settings.providers.values()} == {"file", "s3", "pkcs11", "yubihsm"}

    def test_it_loads_with_its_comments_taken_away(self) -> None:
        Settings.model_validate(uncommented(REFERENCE.read_text()))

    @pytest.mark.parametrize("section", ["server", "limits", "log"])
    def test_what_it_shows_are_the_defaults(self, section: str) -> None:
        shown = tomllib.loads(REFERENCE.read_text())[section]
        assert getattr(Settings(), section).model_dump(mode="json", include=set(shown)) == shown

    @pytest.mark.parametrize(
        ("model", "where"),
        [
            (ServerSettings, ("server",)),
            (LimitSettings, ("limits",)),
            (LogSettings, ("log",)),
            (Pkcs11Settings, ("providers", "token")),
            (FileSettings, ("providers", "files")),
            (S3Settings, ("providers", "bucket")),
            (YubihsmSettings, ("providers", "yubihsm")),
            (AuditSettings, ("providers", "yubihsm", "audit")),
        ],
    )
    def test_it_mentions_every_key(self, model: type[BaseModel], where: tuple[str, ...]) -> None:
        table = uncommented(REFERENCE.read_text())
        for level in where:
            table = table[level]
        assert set(table) == set(model.model_fields)

    def test_it_mentions_every_key_of_a_grant(self) -> None:
        grants = uncommented(REFERENCE.read_text())["grants"]
        assert {key for grant in grants for key in grant} == set(Grant.model_fields)

    @pytest.mark.parametrize("model", [ServerSettings, LimitSettings, LogSettings, Grant, Settings])
    def test_every_key_is_described(self, model: type[BaseModel]) -> None:
        assert [name for name, field in model.model_fields.items() if not field.description] == []
