"""Puts the fixtures' key files on a simulated YubiHSM 2 as well: for whoever has no device.

    .venv/bin/python softhsm-fixtures/make_yubihsm.py DIRECTORY

DIRECTORY is one that make_fixtures.py made. Below DIRECTORY/yubihsm:

    setup.toml          what the device holds, as for `hsmsign yubihsm setup`
    device.json         the device: python -m yubihsm_simulator --listen 127.0.0.1:12345 --state device.json
    *.password          of the authentication keys, mode 0600
    transcript.jsonl    what was done
    roots.pem           what the simulated device's attestations lead to
    hsmsign.toml        the service's configuration: the fixtures', and the device with its keys

For every grant of a key file there is one of the same key on the device, for the machine or distro that has `yubihsm`
in its name for `file`.
"""

import json
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from signers.registry import SIGNERS
from signers.signer import by_name
from tokens.provisioning import declaration, setup
from yubihsm_simulator import Connector, Device

SERIAL = 12345678
ADDRESS = "127.0.0.1", 12345
CURVES = {"secp256r1": "ecp256", "secp384r1": "ecp384", "secp521r1": "ecp521"}
AUTH_KEYS = {"admin": 2, "signer": 3, "auditor": 4}
FIRST_KEY_ID = 0x100


@dataclass(frozen=True)
class DeviceKey:
    """A key file that the device gets."""

    label: str
    id: int
    path: Path
    certificate: Path | None


def main() -> None:
    directory = Path(sys.argv[1]).absolute()
    stamp, ours = directory / "fixtures.sha256", directory / "yubihsm"
    made = ours / "fixtures.sha256"
    if made.exists() and made.read_bytes() == stamp.read_bytes() + Path(__file__).read_bytes():
        return
    shutil.rmtree(ours, ignore_errors=True)
    ours.mkdir(mode=0o700)
    fixtures = (directory / "hsmsign.toml").read_text()
    grants = [grant for grant in tomllib.loads(fixtures)["grants"] if is_for_file(grant)]
    keys = {key.path: key for key in device_keys(directory / "keys", [each for each in grants if not is_file(each)])}
    with Connector(Device(SERIAL, state=ours / "device.json"), *ADDRESS[:1]) as connector:
        (ours / "setup.toml").write_text(setup_file(connector.url, ours, keys.values()))
        setup.set_up(declaration.load(ours / "setup.toml"), ours / "transcript.jsonl", lambda _: None)
        (ours / "roots.pem").write_bytes(connector.device.attestation_root)
    configuration = [fixtures, provider(ours)]
    configuration += [table("[[grants]]", on_device(grant, keys, directory / "keys")) for grant in grants]
    (ours / "hsmsign.toml").write_text("\n".join(configuration))
    made.write_bytes(stamp.read_bytes() + Path(__file__).read_bytes())


def is_for_file(grant: Mapping[str, Any]) -> bool:
    """Whether the grant is for one of the machines or distros whose keys are in files."""
    return grant["provider"] == "files" and "file" in grant.get("machine", grant.get("distro", ""))


def is_file(grant: Mapping[str, Any]) -> bool:
    """Whether what is granted is no key but a file that goes with keys."""
    return by_name(by_name(SIGNERS)[grant["signer"]].roles)[grant["role"]].is_file


def device_keys(root: Path, grants: list[dict[str, Any]]) -> Iterator[DeviceKey]:
    """The granted key files, each once."""
    paths = {grant["object"]: grant.get("certificate") for grant in grants}
    for number, (path, certificate) in enumerate(paths.items()):
        imx = "imxsign" in path  # clients' CSF texts name these labels
        behind_key = b"BEGIN CERTIFICATE" in (root / path).read_bytes()
        named = path if certificate is None and behind_key else certificate
        label = Path(path).stem.removesuffix("_key") if imx else path.removeprefix("demo-file").lstrip("-/")
        yield DeviceKey(label, FIRST_KEY_ID + number, root / path, named and root / named)


def setup_file(url: str, ours: Path, keys: Any) -> str:
    """The declaration for `hsmsign yubihsm setup`."""
    tables = [table("[device]", {"connector": url, "serial": SERIAL})]
    for role, id_ in AUTH_KEYS.items():
        password = {"file": str(ours / f"{role}.password")}
        tables.append(table(f"[auth_keys.{role}]", {"id": id_, "role": role, "password": password}))
    tables.append(table("[audit]", {"commands": "on"}))
    for key in keys:
        algorithm, capabilities = kind(key.path)
        values = {"id": key.id, "label": key.label, "algorithm": algorithm, "domains": [1]}
        values |= {"capabilities": capabilities, "import": {"file": str(key.path)}}
        if key.certificate is not None:
            values["certificate"] = str(key.certificate)
        tables.append(table("[[keys]]", values))
    return "\n".join(tables)


def kind(path: Path) -> tuple[str, list[str]]:
    """The algorithm of a key file, and what it may be used for."""
    data = path.read_bytes()
    if b"-----BEGIN " not in data:  # hexadecimal: the key of a Jetson's fuses
        if path.name == "sbk.txt" and len(data.strip()) == 64:  # of a tegra234, which derives keys from it
            return "hmac-sha256", ["sign-hmac"]
        return f"aes{4 * len(data.strip())}", ["encrypt-ecb", "decrypt-ecb", "encrypt-cbc", "decrypt-cbc"]
    match serialization.load_pem_private_key(data, None):
        case rsa.RSAPrivateKey() as key:
            return f"rsa{key.key_size}", ["sign-pkcs", "sign-pss"]
        case ec.EllipticCurvePrivateKey() as key:
            return CURVES[key.curve.name], ["sign-ecdsa"]
        case ed25519.Ed25519PrivateKey():
            return "ed25519", ["sign-eddsa"]
    raise ValueError(f"{path} is of a type that the device does not know")


def provider(ours: Path) -> str:
    """The device as the service's provider."""
    host, port = ADDRESS
    own = {"kind": "yubihsm", "connector": f"http://{host}:{port}", "serial": SERIAL}
    own |= {"auth_key_id": AUTH_KEYS["signer"], "password": {"file": str(ours / "signer.password")}}
    own |= {"attestation_roots": str(ours / "roots.pem")}
    audit = {"auth_key_id": AUTH_KEYS["auditor"], "password": {"file": str(ours / "auditor.password")}}
    return table("[providers.yubihsm]", own) + "\n" + table("[providers.yubihsm.audit]", audit)


def on_device(grant: Mapping[str, Any], keys: Mapping[Path, DeviceKey], root: Path) -> dict[str, Any]:
    """The grant of the same key on the device; a file stays one."""
    ours = dict(grant)
    for name in ("name", "machine", "distro"):
        if name in ours:
            ours[name] = ours[name].replace("file", "yubihsm", 1)
    if not is_file(grant):
        ours |= {"provider": "yubihsm", "object": keys[root / grant["object"]].label}
        ours.pop("certificate", None)
    return ours


def table(header: str, values: Mapping[str, Any]) -> str:
    """A table of a TOML file: JSON's strings, numbers and lists are TOML's too."""
    lines = [header]
    for key, value in values.items():
        if isinstance(value, dict):
            written = "{ " + ", ".join(f"{name} = {json.dumps(each)}" for name, each in value.items()) + " }"
        else:
            written = json.dumps(value)
        lines.append(f"{key} = {written}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
