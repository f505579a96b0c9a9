import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokens.errors import KeyNotGranted
from tokens.uri import parse

TOKEN = {
    "token": frozenset({"hsmsign", "YubiHSM"}),
    "serial": frozenset({"00c0ffee"}),
    "manufacturer": frozenset({"SoftHSM project"}),
    "model": frozenset(),
}


def matches(text: str, label: str | None = "swupdate-rsa", id: bytes | None = b"\x01\xfe") -> bool:
    return parse(text).matches(TOKEN, labels=[] if label is None else [label], id=id)


@pytest.mark.parametrize(
    "text",
    [
        "pkcs11:",
        "PKCS11:object=swupdate-rsa",
        "pkcs11:token=YubiHSM;object=swupdate-rsa;type=private",
        "pkcs11:token=hsmsign;serial=00c0ffee;manufacturer=SoftHSM%20project",
        "pkcs11:object=%73wupdate%2Drsa",
        "pkcs11:id=%01%fe",
        "pkcs11:id=%01%FE;type=cert",
        "pkcs11:object=swupdate-rsa;pin-value=password",
        "pkcs11:object=swupdate-rsa?pin-value=password",
        "pkcs11:pin-value=password;object=swupdate-rsa?pin-value=password",
    ],
)
def test_a_uri_that_agrees_in_every_attribute_matches(text: str) -> None:
    assert matches(text)


@pytest.mark.parametrize(
    "text",
    [
        "pkcs11:object=swupdate-cms",
        "pkcs11:object=",
        "pkcs11:object=SWUPDATE-RSA",
        "pkcs11:token=hsmsig",
        "pkcs11:token=other;object=swupdate-rsa",
        "pkcs11:serial=00C0FFEE",
        "pkcs11:model=SoftHSM%20v2",  # the provider does not say its model
        "pkcs11:id=%01",
        "pkcs11:type=secret-key",
    ],
)
def test_one_attribute_that_differs_refuses(text: str) -> None:
    assert not matches(text)


def test_what_the_grant_does_not_name_cannot_match() -> None:
    assert not matches("pkcs11:object=swupdate-rsa", label=None)
    assert not matches("pkcs11:id=%01%FE", id=None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "swupdate-rsa",
        "file:///etc/passwd",
        "pkcs11:object=swupdate-rsa;object=swupdate-rsa",
        "pkcs11:object=a;",
        "pkcs11:object",
        "pkcs11:slot-id=0",
        "pkcs11:library-version=2",
        "pkcs11:x-vendor=1",
        "pkcs11:object=swupdate-rsa?module-path=/tmp/evil.so",
        "pkcs11:object=swupdate-rsa?pin-source=/etc/passwd",
        "pkcs11:object=swupdate-rsa?pin-value=1234",
        "pkcs11:object=swupdate-rsa;pin-value=1234",
        "pkcs11:object=swupdate-rsa?pin-value=password&module-name=x",
        "pkcs11:object=%zz",
        "pkcs11:object=a b",
        "pkcs11:object=a\n",
        "pkcs11:object=a/b",
        "pkcs11:object=caf\u00e9",
        " pkcs11:object=swupdate-rsa",
    ],
)
def test_anything_else_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(KeyNotGranted) as refused:
        parse(text)
    assert "1234" not in refused.value.message + refused.value.hint


@given(st.text(max_size=60))
def test_a_label_matches_its_own_percent_encoding_only(label: str) -> None:
    encoded = "".join(f"%{byte:02X}" for byte in label.encode(errors="replace"))
    label = label.encode(errors="replace").decode()
    assert parse(f"pkcs11:object={encoded}").matches({}, labels=["other", label], id=None)
    assert not parse(f"pkcs11:object={encoded}").matches({}, labels=[label + "x"], id=None)


@given(st.text(max_size=80))
def test_nonsense_is_refused_or_read_never_a_crash(text: str) -> None:
    with contextlib.suppress(KeyNotGranted):
        assert parse(f"pkcs11:{text}").attributes.keys() <= {*TOKEN, "object", "id", "type"}
