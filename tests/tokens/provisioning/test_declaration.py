from pathlib import Path

import pytest

from tests.conftest import ROOT
from tokens.provisioning import declaration
from tokens.provisioning.algorithms import ALGORITHMS
from tokens.provisioning.declaration import DeclarationError, Table, load

ADMIN = '[auth_keys.admin]\nid = 2\nrole = "admin"\npassword = { file = "admin" }\n'
DEVICE = '[device]\nconnector = "http://127.0.0.1:12345"\nserial = 1\n'
KEY = """
[[keys]]
id = 0x0100
label = "rsa"
algorithm = "rsa2048"
domains = [1]
capabilities = ["sign-pkcs"]
generate = true
"""


def mistakes(tmp_path: Path, text: str) -> list[tuple[str, str]]:
    path = tmp_path / "setup.toml"
    path.write_text(text)
    with pytest.raises(DeclarationError) as caught:
        load(path)
    return caught.value.mistakes


def one_mistake(tmp_path: Path, text: str) -> str:
    [(where, what)] = mistakes(tmp_path, text)
    return f"{where}: {what}"


def test_the_least(tmp_path: Path) -> None:
    path = tmp_path / "setup.toml"
    path.write_text(DEVICE + ADMIN)
    declared = load(path)
    assert (declared.admin.id, declared.keys, declared.wrap_key, declared.audit.commands) == (2, (), None, "on")


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = """
    [device]
    connector = "ftp://host"
    serial = -1
    colour = "red"
    [auth_keys.one]
    id = 1
    role = "admin"
    domains = [1]
    password = "hunter2 in clear"
    [auth_keys.two]
    id = 3
    capabilities = ["sign-pkc"]
    password = { file = "x" }
    [[keys]]
    id = 0x0100
    label = "rsa"
    algorithm = "rsa2049"
    domains = [17]
    capabilities = ["sign-pkcs"]
    generate = true
    exportable = true
    [[keys]]
    id = 0x0100
    label = "rsa"
    algorithm = "ecp256"
    domains = []
    capabilities = ["sign-ecdsa"]
    generate = true
    """
    found = dict(mistakes(tmp_path, text))
    assert found.keys() == {
        *("device.connector", "device.serial", "device.colour"),
        *("auth_keys.one.id", "auth_keys.one.password", "auth_keys.two.capabilities[0]"),
        *("keys[0].algorithm", "keys[0].domains[0]", "keys[1].domains", "keys", "wrap_key"),
    }
    assert found["auth_keys.two.capabilities[0]"].endswith('did you mean "sign-pkcs"?')
    assert found["auth_keys.one.password"] == 'a secret never stands in this file: write { file = "/path" }'
    assert "hunter2" not in str(found)


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        (DEVICE, "auth_keys: it is missing"),
        (DEVICE + "[auth_keys]\n", 'auth_keys: one of them, and only one, has role = "admin"'),
        (
            DEVICE + ADMIN + ADMIN.replace("admin]", "other]").replace("2", "3").replace('"admin" }', '"b" }'),
            'auth_keys: one of them, and only one, has role = "admin"',
        ),
        (
            DEVICE + ADMIN + '[auth_keys.b]\nid = 2\nrole = "auditor"\npassword = { file = "b" }\n',
            "auth_keys: more than one has the id 0x0002",
        ),
        (
            DEVICE + ADMIN + '[auth_keys.b]\nid = 3\nrole = "auditor"\npassword = { file = "admin" }\n',
            "auth_keys: more than one has the password file admin",
        ),
        (
            DEVICE + ADMIN.replace('role = "admin"', 'role = "admin"\ncapabilities = ["sign-pss"]'),
            "auth_keys.admin: name one of role and capabilities",
        ),
        (
            DEVICE + ADMIN.replace('role = "admin"', 'role = "admin"\ndomains = [1]'),
            "auth_keys.admin: an admin has all domains: name none",
        ),
        (
            DEVICE + ADMIN + KEY.replace("generate = true", ""),
            "keys[0]: say one of generate = true and import = { file = ... }",
        ),
        (
            DEVICE + ADMIN + KEY.replace("sign-pkcs", "sign-ecdsa"),
            "keys[0]: a key of rsa2048 is of no use for sign-ecdsa",
        ),
        (
            DEVICE + ADMIN + KEY.replace("sign-pkcs", "exportable-under-wrap"),
            "keys[0]: say exportable = true in place of exportable-under-wrap",
        ),
        (
            DEVICE + ADMIN + KEY + 'certificate = "x.pem"',
            "keys[0]: only a key pair that is imported has a certificate already",
        ),
        (
            DEVICE + ADMIN + KEY.replace('"rsa"', f'"{"ü" * 21}"'),
            "keys[0].label: a label has 40 bytes at most, and no NUL",
        ),
        (DEVICE + ADMIN + KEY + "exportable = true", "wrap_key: it is missing, and a key is exportable"),
        (
            DEVICE + ADMIN + KEY + 'exportable = true\n[wrap_key]\nid = 5\nlabel = "w"\ndomains = [2]\n',
            "wrap_key.domains: exportable keys are in domain 1 too",
        ),
        (
            DEVICE + ADMIN + '[wrap_key]\nid = 5\nlabel = "w"\ndomains = [1]\n',
            "wrap_key: say one of split and combine",
        ),
        (
            DEVICE
            + ADMIN
            + '[wrap_key]\nid = 5\nlabel = "w"\ndomains = [1]\nsplit = { threshold = 3, files = ["a", "b", "a"] }\n',
            "wrap_key.split: files names a different file for each share, and at least `threshold` of them",
        ),
        (
            DEVICE
            + ADMIN
            + '[wrap_key]\nid = 5\nlabel = "w"\ndomains = [1]\nsplit = { threshold = 1, files = ["a", "b"] }\n',
            "wrap_key.split.threshold: it should be greater than or equal to 2",
        ),
    ],
)
def test_mistakes(tmp_path: Path, text: str, mistake: str) -> None:
    found = mistakes(tmp_path, text)
    assert mistake in [f"{where}: {what}" for where, what in found]


def test_no_file_and_no_toml(tmp_path: Path) -> None:
    assert "it is not TOML" in one_mistake(tmp_path, "[device")
    with pytest.raises(DeclarationError, match="it cannot be read: No such file"):
        load(tmp_path / "none.toml")


def test_the_example_shows_every_key_and_algorithm() -> None:
    """tests/hsmsign/test_cli_yubihsm.py sets a device up with it."""
    example = ROOT / "docs/yubihsm-setup.toml"
    load(example)
    text = example.read_text()
    tables = [each for each in vars(declaration).values() if isinstance(each, type) and issubclass(each, Table)]
    fields = {field.alias or name for table in tables for name, field in table.model_fields.items()}
    assert len(fields) > 20
    assert not [name for name in {*fields, *ALGORITHMS} if name not in text]
