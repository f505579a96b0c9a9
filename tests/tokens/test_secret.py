"""Secrets: the exact bytes of a file or a credential, less one newline."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from tokens.errors import KeyUnusable
from tokens.secret import SecretSource, read_secret


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        (b"1234", b"1234"),
        (b"1234\n", b"1234"),
        (b"1234\r\n", b"1234"),
        (b"1234\n\n", b"1234\n"),
        (b"1234\r", b"1234\r"),
        (b" 1234 \n", b" 1234 "),
        (b"\n1234", b"\n1234"),
        (b"", b""),
        (b"\n", b""),
        (b"\0\xff\n", b"\0\xff"),
    ],
)
def test_exact_bytes(content: bytes, secret: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pin").write_bytes(content)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_secret(tmp_path / "pin") == secret
    assert SecretSource(file=tmp_path / "pin").read() == secret
    assert SecretSource(credential="pin").read() == secret


def test_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(KeyUnusable) as caught:
            SecretSource(file=path).read()
        assert caught.value.hint
        assert str(tmp_path) not in caught.value.message + caught.value.hint
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    with pytest.raises(KeyUnusable):
        SecretSource(credential="absent").read()
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(KeyUnusable, match="CREDENTIALS_DIRECTORY") as caught:
        SecretSource(credential="pin").read()
    assert "LoadCredential=" in caught.value.hint


def test_settings() -> None:
    adapter = TypeAdapter(SecretSource)
    assert adapter.validate_python({"file": "/run/pin"}) == SecretSource(file=Path("/run/pin"))
    assert adapter.validate_python({"credential": "pin"}) == SecretSource(credential="pin")


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"file": "/run/pin", "credential": "pin"},
        {"file": "/run/pin", "value": "1234"},
        {"fil": "/run/pin"},
        {"credential": ""},
        {"credential": ".."},
        {"credential": "../pin"},
        {"credential": "/pin"},
        "1234",
        1234,
    ],
)
def test_settings_that_are_none(wrong: Any) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(SecretSource).validate_python(wrong)
