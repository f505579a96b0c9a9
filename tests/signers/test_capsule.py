"""UEFI capsules, decoded and verified by edk2's GenerateCapsule."""

import asyncio
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from signers import capsule
from signers.capsule import GUIDS, CapsuleForm, UefiCapsule
from signers.formats.capsule import CAPSULE_MAX_BYTES
from signers.signer import GrantedFile, Job, Signed, Upload
from tokens.errors import ArtifactRejected, KeyMismatch, KeyNotFound, KeyUnsuited, KeyUnusable, SignatureMismatch

PAYLOAD = b"\r\n\x00\xffpayload" * 20_000
GUID = "4a1b2c3d-0000-4111-8222-333344445555"
JETSON = {"soctype": "tegra234", "bspversion": "36.4.3"}


@dataclass
class Keys:
    """`signers.signer.Keys`: one key, and a chain where there is one."""

    pair: Any
    chain: bytes | None = None

    def open(self, role: str, *, machine: str) -> Any:
        assert (role, machine) == ("key", "demo")
        return nullcontext(self.pair.key)

    async def read(self, role: str, *, machine: str) -> GrantedFile:
        assert (role, machine) == ("chain", "demo")
        if self.chain is None:
            raise KeyNotFound("none", "grant one")
        return GrantedFile(self.chain)


@pytest.fixture
def sign(tmp_path) -> Callable:
    async def run(pair, payload: bytes | Path = PAYLOAD, chain: bytes | None = None, **fields) -> bytes:
        size = payload.stat().st_size if isinstance(payload, Path) else len(payload)
        form = CapsuleForm.model_validate(
            {"machine": "demo", "artifact": Upload(payload, "x", size), **(fields or JETSON)}
        )
        signed = await UefiCapsule().sign(form, Job(lambda: tmp_path, Keys(pair, chain), asyncio.to_thread))
        assert signed.filename == "capsule.cap"
        return b"".join(signed.chunks(65536))

    return run


@pytest.fixture
def decoded(tmp_path) -> Callable:
    """What GenerateCapsule decodes: the payload and what it says of it; None where it refuses the signature."""

    def run(signed: bytes, trusted, guid: str) -> tuple[bytes, dict] | None:
        (tmp_path / "trusted.pem").write_bytes(trusted.certificate_pem)
        (tmp_path / "signed.cap").write_bytes(signed)
        # by options alone it cannot (args.SignSubjectName): the description has what it takes of them
        roles = ("OpenSslSignerPrivateCertFile", "OpenSslOtherPublicCertFile", "OpenSslTrustedPublicCertFile")
        payloads = [{"Guid": guid, "HardwareInstance": "0", **dict.fromkeys(roles, "trusted.pem")}]
        (tmp_path / "payloads.json").write_text(json.dumps({"Payloads": payloads}))
        command = [sys.executable, "-m", "edk2basetools.Capsule.GenerateCapsule", "--decode", "-j", "payloads.json"]
        done = subprocess.run(
            [*command, "-o", "out", "signed.cap"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if "verification failed" in done.stdout:
            return None
        (told,) = json.loads((tmp_path / "out.json").read_text())["Payloads"]
        return (tmp_path / "out.Payload.1.bin").read_bytes(), told

    return run


@pytest.fixture(scope="module")
def root(pair, pairs):
    return pair(pairs["rsa3072"].private_key, "root", ca=True)


@pytest.mark.parametrize("kind", ["rsa2048", "p256", "p384"])
async def test_generate_capsule_accepts_it_and_refuses_it_tampered_with(sign, decoded, pair, pairs, root, kind):
    key = pair(pairs[kind].private_key, "signer", issuer=root)
    signed = await sign(key)
    payload, told = decoded(signed, root, str(GUIDS["tegra234"]))
    assert payload == PAYLOAD
    assert int(told["FwVersion"], 0) == int(told["LowestSupportedVersion"], 0) == 36 << 16 | 4 << 8 | 3
    assert int(told["MonotonicCount"], 0) == 1
    assert int(told["UpdateImageIndex"], 0) == 1
    assert signed.endswith(PAYLOAD)
    versions = len(signed) - len(PAYLOAD) - 8
    for at in (len(signed) - 1, versions, versions + 4, 96):  # the payload, both versions, the count
        tampered = signed[:at] + bytes([signed[at] ^ 1]) + signed[at:][1:]
        assert decoded(tampered, root, str(GUIDS["tegra234"])) is None
    assert decoded(signed, pairs["rsa2048" if kind != "rsa2048" else "p256"], str(GUIDS["tegra234"])) is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"soctype": "tegra194", "bspversion": "35.4.1"}, (GUIDS["tegra194"], 0x230401, 0x230401)),
        ({"soctype": "tegra234", "bspversion": "36.4"}, (GUIDS["tegra234"], 0x240400, 0x240400)),
        ({"soctype": "tegra234", "bspversion": "36.4.3", "guid": GUID}, (GUID, 0x240403, 0x240403)),
        ({"guid": GUID.upper(), "fwversion": "7"}, (GUID, 7, 7)),
        ({"guid": GUID, "fwversion": "0xFFFFFFFF", "lsv": "0"}, (GUID, 0xFFFF_FFFF, 0)),
        ({**JETSON, "fwversion": "36.5.0", "lsv": "36.0.0"}, (GUIDS["tegra234"], 0x240500, 0x240000)),
        ({**JETSON, "fwversion": "35.1.0"}, (GUIDS["tegra234"], 0x230100, 0x230100)),
    ],
)
async def test_what_a_capsule_is_for(sign, decoded, pairs, fields, expected):
    key = pairs["rsa2048"]
    guid, version, lowest = expected
    payload, told = decoded(await sign(key, b"x", **fields), key, str(guid))
    assert payload == b"x"
    assert told["Guid"].lower() == str(guid)
    assert (int(told["FwVersion"], 0), int(told["LowestSupportedVersion"], 0)) == (version, lowest)


async def test_a_payload_on_disk(sign, decoded, pairs, tmp_path):
    path = tmp_path / "payload"
    path.write_bytes(bytes(3 << 20) + b"end")
    payload, _ = decoded(await sign(pairs["rsa2048"], path), pairs["rsa2048"], str(GUIDS["tegra234"]))
    assert payload == path.read_bytes()


@pytest.fixture(scope="module")
def middle(pair, pairs, root):
    return pair(pairs["p384"].private_key, "middle", issuer=root, ca=True)


@pytest.fixture(scope="module")
def issued(pair, pairs, middle):
    """Issued by one that the root has issued: a device that knows only the root needs the certificate between."""
    return pair(pairs["rsa2048"].private_key, "signer", issuer=middle)


async def test_the_chain_of_the_key(sign, decoded, issued, root):
    assert decoded(await sign(issued), root, str(GUIDS["tegra234"]))


async def test_the_chain_of_the_role(sign, decoded, issued, middle, root):
    alone = replace(issued, certificates=issued.certificates[:1])
    signed = await sign(alone, chain=middle.certificate_pem + issued.certificate_pem)
    assert decoded(signed, root, str(GUIDS["tegra234"]))


async def test_no_chain(sign, decoded, issued, root, caplog):
    signed = await sign(replace(issued, certificates=issued.certificates[:1]))
    assert "lacks the issuer" in caplog.text
    assert decoded(signed, root, str(GUIDS["tegra234"])) is None


async def test_a_broken_chain(sign, issued):
    with pytest.raises(KeyUnusable):
        await sign(replace(issued, certificates=issued.certificates[:1]), chain=b"no certificate")


async def test_a_self_signed_certificate_needs_no_chain(sign, pairs, caplog):
    await sign(pairs["rsa2048"], chain=b"is not read")
    assert not caplog.text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bspversion": "36.4.3"}, "send guid"),
        ({"soctype": "tegra234"}, "send fwversion"),
        ({"guid": "no guid", "bspversion": "36.4.3"}, "valid UUID"),
        ({**JETSON, "soctype": "tegra186"}, "'tegra194' or 'tegra234'"),
        ({**JETSON, "lsv": "36.4.4"}, "lsv is higher"),
        ({**JETSON, "fwversion": "36.256.0"}, "too large"),
        ({**JETSON, "fwversion": "65536.0"}, "too large"),
        ({**JETSON, "fwversion": "0x100000000"}, r"as 36\.4\.3"),
        ({**JETSON, "fwversion": "-1"}, r"as 36\.4\.3"),
        ({**JETSON, "fwversion": "36.4.3.1"}, r"as 36\.4\.3"),
        ({**JETSON, "fwversion": "new"}, r"as 36\.4\.3"),
        ({**JETSON, "fwversion": "9" * 5000}, r"as 36\.4\.3"),
        ({**JETSON, "fwversion": "4294967296"}, "less than or equal"),
        ({**JETSON, "machine": "../x"}, "machine"),
    ],
)
def test_forms_that_are_none(fields, words):
    with pytest.raises(ValidationError, match=words):
        CapsuleForm.model_validate({"machine": "demo", "artifact": Upload(b"x", "x", 1), **fields})


async def test_a_payload_that_no_capsule_holds(tmp_path):
    artifact = Upload(tmp_path, "x", CAPSULE_MAX_BYTES - 1000)
    form = CapsuleForm.model_validate({"machine": "demo", "artifact": artifact, **JETSON})
    with pytest.raises(ArtifactRejected, match="4 GiB"):
        await UefiCapsule().sign(form, Job(lambda: tmp_path, Keys(None), asyncio.to_thread))


async def test_keys_that_cannot(sign, pairs):
    with pytest.raises(KeyUnsuited):
        await sign(pairs["ed25519"])
    with pytest.raises(KeyUnusable, match="certificate"):
        await sign(replace(pairs["rsa2048"], certificates=()))
    with pytest.raises(KeyMismatch):
        await sign(replace(pairs["rsa2048"], certificates=pairs["rsa3072"].certificates))


@pytest.mark.parametrize(
    "damage",
    [
        lambda headers: headers[:-1] + b"\1",  # the lowest version
        lambda headers: headers[:60] + b"\1" + headers[61:],  # the firmware
        lambda headers: headers[:-20] + b"\0" + headers[-19:],  # the signature
        lambda headers: headers[:-1],
        lambda headers: headers[:24] + struct.pack("<I", 5) + headers[28:],  # its size
    ],
)
async def test_a_capsule_put_together_wrongly_is_never_released(sign, pairs, monkeypatch, damage):
    def signed(parts: tuple, filename: str) -> Signed:
        return Signed((damage(parts[0]), *parts[1:]), filename)

    monkeypatch.setattr(capsule, "Signed", signed)
    with pytest.raises(SignatureMismatch):
        await sign(pairs["rsa2048"])


async def test_nor_is_another_payload(sign, pairs, monkeypatch):
    monkeypatch.setattr(capsule, "Signed", lambda parts, filename: Signed((parts[0], bytes(len(PAYLOAD))), filename))
    with pytest.raises(SignatureMismatch):
        await sign(pairs["rsa2048"])
