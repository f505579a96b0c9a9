"""What OpenSSL in a tool is told about keys on loan: its configuration, and PEM that stands for a key."""

import base64
import re
from enum import StrEnum
from pathlib import Path
from textwrap import wrap

# what ends a line or means something in it to OpenSSL (config(5)): quotes, escapes, variables, comments
_SPECIAL = re.compile(r"[\x00-\x1f\x7f\"'`\\$#]")

_ENGINE = """\
openssl_conf = conf
[conf]
engines = engines
[engines]
pkcs11 = pkcs11
[pkcs11]
engine_id = pkcs11
dynamic_path = {engine}
MODULE_PATH = {client}
init = 0
"""

# a section [default] would be one of OpenSSL's own: thus [built-in]
_PROVIDER = """\
openssl_conf = conf
[conf]
providers = providers
[providers]
default = built-in
pkcs11 = pkcs11
[built-in]
activate = 1
[pkcs11]
module = {provider}
pkcs11-module-path = {client}
activate = 1
"""

_SEQUENCE, _VISIBLE_STRING, _UTF8_STRING = 0x30, 0x1A, 0x0C


class Via(StrEnum):
    """By which plug-in of OpenSSL a tool comes to a key on loan."""

    ENGINE = "engine"
    PROVIDER = "provider"


def configuration(via: Via, *, client: Path, engine: Path, provider: Path) -> str:
    """The text of a file that OPENSSL_CONF may name.

    Arguments:
        via: the plug-in; the other one is not loaded.
        client: p11-kit-client.so, for the C library of the tool.
        engine: pkcs11.so of libengine-pkcs11-openssl.
        provider: pkcs11.so of pkcs11-provider.

    Raises:
        ValueError: A path holds what means something to OpenSSL.
    """
    for path in (client, engine, provider):
        if _SPECIAL.search(str(path)):
            raise ValueError(f"OpenSSL's configuration cannot hold the path {str(path)!r}")
    template = _ENGINE if via is Via.ENGINE else _PROVIDER
    return template.format(client=client, engine=engine, provider=provider)


def provider_uri_pem(uri: str) -> bytes:
    """PEM that OpenSSL's pkcs11 provider takes for the key at a PKCS#11 URI, where a tool only reads PEM."""
    strings = _der(_VISIBLE_STRING, b"PKCS#11 Provider URI v1.0") + _der(_UTF8_STRING, uri.encode())
    lines = wrap(base64.b64encode(_der(_SEQUENCE, strings)).decode(), 64)
    name = "PKCS#11 PROVIDER URI"
    return "\n".join([f"-----BEGIN {name}-----", *lines, f"-----END {name}-----", ""]).encode()


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    length = bytes([size]) if size < 0x80 else b"\x82" + size.to_bytes(2, "big") if size > 0xFF else bytes([0x81, size])
    return bytes([tag]) + length + content
