"""Makes the SoftHSM tokens, key files and certificates that fixtures.toml and imx.toml declare.

    .venv/bin/python softhsm-fixtures/make_fixtures.py DIRECTORY [--without-imx]

    DIRECTORY/
        hsmsign.toml        the service's configuration, ready to use
        softhsm2.conf       SOFTHSM2_CONF for whoever loads the module
        tokens/             SoftHSM's own
        pin                 the user PIN of every token, mode 0600
        keys/               key files in digsigserver's layout, mode 0600
        public/LABEL.pem    the public key of every key on a token
        certificates/       NAME.pem and LABEL.pem: of the authorities and of the keys on a token
        fuses/MACHINE.bin   i.MX: what NXP's srktool writes for the fuses
        nvidia/             Jetson: BSPs that play NVIDIA's (tests/stand_in_bsp)

A directory that is up to date is left as it is; one that this script did not make is refused. The keys for i.MX are
many and large: without them it takes a quarter of the time.
"""

import argparse
import hashlib
import os
import secrets
import shutil
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imx_pki
import pkcs11
from certificates import (
    PEM,
    SPKI,
    Authority,
    PublicKey,
    generate,
    self_sign,
    write_certificate,
    write_key,
    write_private,
)
from pkcs11 import Attribute, KeyType
from softhsm import generate_on_token, import_certificate, import_key, import_secret, initialise, log_in

from signers.formats import ahab, hab
from tests.stand_in_bsp.build import make_bsp

HERE = Path(__file__).absolute().parent
SECRETS = {"aes128": (KeyType.AES, 16), "aes256": (KeyType.AES, 32), "hmac": (KeyType.GENERIC_SECRET, 32)}
# what the results depend on
INPUTS = [*sorted(HERE.glob("*.toml")), *sorted(HERE.glob("*.py")), Path(hab.__file__), Path(ahab.__file__)]
INPUTS += sorted(
    path for path in (HERE.parent / "tests/stand_in_bsp").rglob("*") if path.suffix != ".pyc" and path.is_file()
)
L4T_VERSION = "35.4.1"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--without-imx", action="store_true")
    options = parser.parse_args()
    directory = options.directory.absolute()
    stamp = directory / "fixtures.sha256"
    inputs = [repr(options.without_imx).encode(), bytes(directory), *(path.read_bytes() for path in INPUTS)]
    digest = hashlib.sha256(b"".join(inputs)).hexdigest()
    if stamp.exists():
        if stamp.read_text() == digest:
            return
        shutil.rmtree(directory)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(directory.iterdir()):
        sys.exit(f"{directory} is not empty, and was not made by this script: name another directory.")
    declaration = tomllib.loads((HERE / "fixtures.toml").read_text()) | {"pkis": []}
    configuration = (HERE / "hsmsign.toml").read_text()
    if not options.without_imx:
        imx = tomllib.loads((HERE / "imx.toml").read_text())
        declaration["authorities"] += imx["authorities"]
        declaration["pkis"] = imx["pkis"]
        configuration += "\n" + (HERE / "hsmsign-imx.toml").read_text()
    make(declaration, configuration, directory)
    stamp.write_text(digest)


def make(declaration: dict[str, Any], configuration: str, directory: Path) -> None:
    for name in ("tokens", "public", "certificates", "keys", "fuses"):
        (directory / name).mkdir(mode=0o700)
    softhsm_conf = directory / "softhsm2.conf"
    softhsm_conf.write_text(f"directories.tokendir = {directory / 'tokens'}\nlog.level = ERROR\n")
    os.environ["SOFTHSM2_CONF"] = str(softhsm_conf)
    configuration = configuration.replace("DIRECTORY", str(directory)).replace("TREE", str(HERE.parent))
    (directory / "hsmsign.toml").write_text(configuration)

    for soctype in ("tegra186", "tegra194", "tegra234"):
        make_bsp(directory / "nvidia", L4T_VERSION, soctype)
    pin = secrets.token_hex(8)
    write_private(directory / "pin", pin.encode() + b"\n")
    authorities = {each["name"]: Authority(each["subject"], generate("p256")) for each in declaration["authorities"]}
    for name, authority in authorities.items():
        write_certificate(directory / "certificates" / f"{name}.pem", authority.certificate)
    for file in declaration["files"]:
        write_hex(directory / "keys" / file["file"], secrets.token_bytes(file["bytes"]))
    with ThreadPoolExecutor() as pool:  # its keys are made while the tokens make theirs
        pkis = [imx_pki.Making(imx_pki.Pki(**each), pool) for each in declaration["pkis"]]
        for token in declaration["tokens"]:
            initialise(token["label"], pin)
            with log_in(token["label"], pin) as session:
                for key in token["keys"]:
                    make_key(session, key, authorities, directory)
                for secret in token.get("secrets", ()):
                    make_secret(session, secret, directory)
        with log_in(imx_pki.TOKEN, pin) as session:
            for making in pkis:
                making.certify_srks(authorities, directory / "certificates")
                for key in making.pki.token_keys:
                    make_key(session, key, authorities, directory)
                making.write(authorities, directory)


def make_key(session: pkcs11.Session, key: dict[str, Any], authorities: dict[str, Authority], directory: Path) -> None:
    private = None
    attributes = {Attribute.LABEL: key["label"], Attribute.ID: bytes.fromhex(key["id"])}
    if "file" in key:
        private = generate(key["type"])
        write_key(directory / "keys" / key["file"], private)
        import_key(session, private, attributes)
        public: PublicKey = private.public_key()
    else:
        public = generate_on_token(session, key["type"], attributes)
    (directory / "public" / f"{key['label']}.pem").write_bytes(public.public_bytes(PEM, SPKI))

    if wanted := key.get("certificate"):
        subject, purpose = wanted["subject"], wanted.get("purpose")
        if "issuer" in wanted:
            certificate = authorities[wanted["issuer"]].issue(subject, public, purpose)
        else:
            certificate = self_sign(subject, private, purpose)
        import_certificate(session, certificate, attributes)
        write_certificate(directory / "certificates" / f"{key['label']}.pem", certificate)
        if "file" in wanted:
            write_certificate(directory / "keys" / wanted["file"], certificate)


def make_secret(session: pkcs11.Session, secret: dict[str, str], directory: Path) -> None:
    type_, size = SECRETS[secret["type"]]
    value = secrets.token_bytes(size)
    write_hex(directory / "keys" / secret["file"], value)
    attributes = {Attribute.LABEL: secret["label"], Attribute.ID: bytes.fromhex(secret["id"])}
    import_secret(session, value, type_, attributes)


def write_hex(path: Path, value: bytes) -> None:
    write_private(path, value.hex().encode() + b"\n")


if __name__ == "__main__":
    main()
