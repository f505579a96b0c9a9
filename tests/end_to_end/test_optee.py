"""Trusted Applications, through HTTP, by keys of every provider, loaded by OP-TEE's rules (optee_rules.py)."""

import io
import subprocess
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import optee_rules
import pytest
from optee_rules import Refused

# any position-independent program will do: what it is for, only OP-TEE's loader would see
ELF = Path("/bin/true").read_bytes()
TAS = {"8aaaf200-2450-11e4-abe2-0002a5d5c51b": 0, "b6c53aba-9669-4668-a7f2-205629d00f86": 17}
TA = next(iter(TAS))
SUBKEY = "f04fa996-148a-453c-b037-1dcfbad120a6"
BELOW = "1a5948c5-1aa0-518c-86f4-be6f6a057b16"  # mid_level_subkey below it, in OP-TEE's documentation
MACHINES = {"demo-token": "", "demo-file": "file-", "demo-yubihsm": "file-"}


def post(service: Any, machine: str, artifact: bytes, filename: str = "tas.tar.gz", **fields: Any) -> httpx.Response:
    files = {"artifact": (filename, artifact)}
    if "subkey" in fields:
        files["subkey"] = ("subkey.bin", fields.pop("subkey"))
    form = {"machine": machine, **{name.replace("_", "-"): value for name, value in fields.items()}}
    return httpx.post(service.url + "/sign/optee", data=form, files=files, timeout=60)


@pytest.fixture
def archive(tmp_path: Path) -> bytes:
    """A tree as build layers send it."""
    for number, (uuid, version) in enumerate(TAS.items()):
        directory = tmp_path / f"tree/ta/{number}"
        directory.mkdir(parents=True)
        (directory / f"{uuid}.stripped.elf").write_bytes(ELF)
        if version:
            (directory / f"{uuid}.ta-version").write_text(f"{version}\n")
    return tar(tmp_path / "tree", "./ta")


def tar(directory: Path, *names: str) -> bytes:
    return subprocess.run(["tar", "-c", "-z", *names], cwd=directory, capture_output=True, check=True).stdout


def unpacked(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened:
        return {each.name: opened.extractfile(each).read() for each in opened if each.isreg()}  # type: ignore[union-attr]


@pytest.fixture
def root(softhsm: Any) -> Callable[[str], bytes]:
    """The public key that a machine's devices have built in."""
    return lambda machine: softhsm.public_key(f"{MACHINES[machine]}optee-root").read_bytes()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("method", [None, "RSA"])
def test_a_device_loads_every_ta_of_a_tree(
    fixtures_service: Any, root: Callable[[str], bytes], archive: bytes, machine: str, method: str | None
) -> None:
    answer = post(fixtures_service, machine, archive, **({"method": method} if method else {}))
    assert answer.status_code == 200, answer.text
    signed = unpacked(answer.content)
    assert list(signed) == [f"./ta/{number}/{uuid}.ta" for number, uuid in enumerate(TAS)]
    for (uuid, version), content in zip(TAS.items(), signed.values(), strict=True):
        assert optee_rules.load(content, uuid, root(machine)) == (ELF, version)
        for at in (8, 60, -1):
            tampered = bytearray(content)
            tampered[at] ^= 1
            with pytest.raises(Refused):
                optee_rules.load(bytes(tampered), uuid, root(machine))
    fixtures_service.assert_no_files()


@pytest.mark.parametrize("machine", MACHINES)
def test_a_device_loads_a_ta_below_a_subkey(
    fixtures_service: Any, softhsm: Any, root: Callable[[str], bytes], tmp_path: Path, machine: str
) -> None:
    public_key = softhsm.public_key(f"{MACHINES[machine]}optee-subkey").read_bytes()
    subkey = post(fixtures_service, machine, public_key, "vendor.pem", uuid=SUBKEY, name_size="64")
    assert subkey.status_code == 200, subkey.text
    (tmp_path / f"{BELOW}.stripped.elf").write_bytes(ELF)
    (tmp_path / f"{BELOW}.ta-name").write_text("mid_level_subkey\n")
    built = tar(tmp_path, f"{BELOW}.stripped.elf", f"{BELOW}.ta-name")
    answer = post(fixtures_service, f"{machine}-subkey", built, subkey=subkey.content)
    assert answer.status_code == 200, answer.text
    (content,) = unpacked(answer.content).values()
    assert optee_rules.load(content, BELOW, root(machine)) == (ELF, 0)
    refused = post(fixtures_service, machine, built, subkey=subkey.content)
    assert refused.status_code == 422
    assert "of another key than the granted one" in refused.json()["detail"]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("flag", [0, 1])
def test_a_device_decrypts_what_is_encrypted(
    fixtures_service: Any, softhsm: Any, root: Callable[[str], bytes], archive: bytes, machine: str, flag: int
) -> None:
    encryption = ("device", "class")[flag]
    answer = post(fixtures_service, machine, archive, encryption=encryption)
    assert answer.status_code == 200, answer.text
    owner = "demo-token" if machine == "demo-token" else "demo-file"
    key = bytes.fromhex((softhsm.keys / owner / "opteesign/ta-encryption.key").read_text())
    content = unpacked(answer.content)[f"./ta/0/{TA}.ta"]
    assert optee_rules.load(content, TA, root(machine), {flag: key}) == (ELF, 0)
    again = post(fixtures_service, machine, content, f"{TA}.ta", method="RSA")
    assert again.content[-len(ELF) :] == content[-len(ELF) :]
    assert optee_rules.load(again.content, TA, root(machine), {flag: key}) == (ELF, 0)
    assert key.hex() not in fixtures_service.log


def test_a_ta_signed_again_by_another_key(fixtures_service: Any, root: Callable[[str], bytes], archive: bytes) -> None:
    signed = unpacked(post(fixtures_service, "demo-file", archive, method="RSA").content)
    content = signed[f"./ta/0/{TA}.ta"]
    answer = post(fixtures_service, "demo-token", content, f"{TA}.ta")
    assert answer.content[12:16] == content[12:16]
    assert optee_rules.load(answer.content, TA, root("demo-token")) == (ELF, 0)
    with pytest.raises(Refused, match="right key"):
        optee_rules.load(answer.content, TA, root("demo-file"))


def test_the_contract_s_line_verbatim(
    fixtures_service: Any, root: Callable[[str], bytes], archive: bytes, tmp_path: Path
) -> None:
    (tmp_path / "unsigned.tar.gz").write_bytes(archive)
    line = (
        "curl --connect-timeout 30 --max-time 1800 --retry 3 --silent --fail -X POST -F machine=demo-token"
        f' -F "artifact=@unsigned.tar.gz" --output signed.tar.gz {fixtures_service.url}/sign/optee'
    )
    subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True)
    subprocess.run(["tar", "--extract", "--file", "signed.tar.gz"], cwd=tmp_path, check=True)
    content = (tmp_path / f"ta/0/{TA}.ta").read_bytes()
    assert optee_rules.load(content, TA, root("demo-token")) == (ELF, 0)


def test_eight_requests_at_once(fixtures_service: Any, archive: bytes) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(fixtures_service, "demo-token", archive, method="RSA"), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1


@pytest.mark.parametrize(
    ("machine", "artifact", "fields", "expected"),
    [
        ("unknown", None, {}, (404, "key-not-found")),
        ("demo-token-subkey", None, {"encryption": "class"}, (404, "key-not-found")),
        ("demo-token", b"public key", {"uuid": TA}, (422, "artifact-rejected")),
        ("demo-token", b"no TA", {}, (422, "artifact-rejected")),
        ("demo-token", b"", {}, (422, "artifact-rejected")),
        ("demo-token", b"\x1f\x8b no gzip", {}, (422, "artifact-rejected")),
        ("demo-token", None, {"subkey": b"x"}, (422, "artifact-rejected")),
        ("demo-token", None, {"method": "CMS"}, (400, "invalid-request")),
        ("demo-token", None, {"name": "x"}, (400, "invalid-request")),
        ("../x", None, {}, (400, "invalid-request")),
    ],
)
def test_each_refusal(
    fixtures_service: Any,
    archive: bytes,
    machine: str,
    artifact: bytes | None,
    fields: dict[str, Any],
    expected: tuple[int, str],
) -> None:
    answer = post(fixtures_service, machine, archive if artifact is None else artifact, **fields)
    assert (answer.status_code, answer.json()["type"]) == (expected[0], f"/problems/{expected[1]}"), answer.text
    assert answer.json()["hint"]
    fixtures_service.assert_no_files()


def test_who_may_sign_tas_may_not_sign_subkeys(fixtures_service: Any, softhsm: Any) -> None:
    public_key = softhsm.public_key("optee-root").read_bytes()
    answer = post(fixtures_service, "demo-token-subkey", public_key, uuid=SUBKEY)
    assert (answer.status_code, answer.json()["type"]) == (404, "/problems/key-not-found")
    assert "issuer" in answer.json()["detail"]
