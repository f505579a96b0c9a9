"""Jetson boot files through HTTP, by a BSP that plays NVIDIA's; OpenSSL, and the rules of the boot ROM, verify them."""

import json
import os
import re
import subprocess
import tarfile
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import serialization

from tests.stand_in_bsp.build import make_bsp, pack, request_files
from tests.stand_in_bsp.checks import content, derived, openssl_accepts

VERSION = "35.4.1"
SOCTYPES = {"t234": "tegra234", "t194": "tegra194"}
PROVIDERS = ("token", "file", "yubihsm")
# chip, type of key, and whether there is an SBK
VARIANTS = [("t234", "rsa", ""), ("t234", "ec", ""), ("t194", "rsa", "")]
VARIANTS += [(chip, kind, "-sbk") for chip, kind, _ in VARIANTS]

REAL_BASE = os.environ.get("HSMSIGN_TEST_L4T_BASE")


def post(service: Any, machine: str, soctype: str, artifact: bytes, version: str = VERSION) -> httpx.Response:
    fields = {"machine": machine, "soctype": soctype, "bspversion": version}
    files = {"artifact": ("tegrasign-in.tar.gz", artifact)}
    return httpx.post(f"{service.url}/sign/tegra", data=fields, files=files, timeout=120)


def unpacked(answer: httpx.Response) -> dict[str, bytes]:
    assert answer.status_code == 200, answer.text
    with tarfile.open(fileobj=BytesIO(answer.content), mode="r:gz") as archive:
        assert all(member.isreg() and member.name.startswith("./") for member in archive)
        return {member.name[2:]: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


class Machine:
    """What a test knows of one of the fixtures' machines."""

    def __init__(self, softhsm: Any, provider: str, chip: str, kind: str, sbk: str) -> None:
        self.name = f"demo-{provider}-{chip}-{kind}{sbk}"
        self.soctype, self.kind = SOCTYPES[chip], kind
        own = "token" if provider == "token" else "file"  # the device has the files' keys
        self.public_key = softhsm.public_key(f"{'' if own == 'token' else 'file-'}tegra-{chip}-{kind}")
        secret = (softhsm.keys / f"demo-{own}-{chip}/tegrasign/sbk.txt").read_text()
        self.sbk = bytes.fromhex(secret) if sbk else None

    def check(self, image: bytes, source: bytes) -> None:
        """The image is signed, and encrypted; the salt, and each of its parts, matter."""
        assert openssl_accepts(image, self.soctype, self.kind, self.public_key)
        assert not openssl_accepts(flipped(image, 4090), self.soctype, self.kind, self.public_key)
        if self.kind == "rsa" and self.soctype == "tegra234":
            assert not openssl_accepts(image, self.soctype, self.kind, self.public_key, salt_bytes=64)
        found = content(image, self.soctype, self.sbk)
        assert found.startswith(source)
        assert len(found) - len(source) < 16
        with pytest.raises((AssertionError, InvalidTag, InvalidSignature)):
            content(flipped(image, len(image) - 1), self.soctype, self.sbk)
        if self.sbk:
            assert source[:64] not in image


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.fixture
def machine(softhsm: Any, request: pytest.FixtureRequest) -> Machine:
    return Machine(softhsm, *request.param)


def machines(*providers: str) -> pytest.MarkDecorator:
    each = [(provider, *variant) for provider in providers for variant in VARIANTS]
    return pytest.mark.parametrize(
        "machine", each, ids=["-".join(one).replace("--", "-") for one in each], indirect=True
    )


# what builds post


@machines(*PROVIDERS)
def test_a_set_for_flashing(fixtures_service: Any, machine: Machine) -> None:
    sent = request_files(machine.soctype)
    made = unpacked(post(fixtures_service, machine.name, machine.soctype, pack(sent)))
    encrypted = "_encrypt" if machine.sbk else ""
    images = {name: name.replace(".", f"_sigheader{encrypted}.", 1) + ".signed" for name in sent}
    sources = [name for name in sent if name.endswith((".bin", ".img", ".dtb"))]
    assert made.keys() == {
        *(images[name] for name in sources), "flashcmd.txt", "secureflash.xml", "report.json", "APPFILE",
    }  # fmt: skip
    for name in sources:
        machine.check(made[images[name]], sent[name])
    report = json.loads(made["report.json"])
    assert report["secrets"] == []
    assert ("-v" in report["options"]) == bool(machine.sbk)
    fixtures_service.assert_no_files()


@machines("token", "file")
def test_update_payloads(fixtures_service: Any, machine: Machine) -> None:
    specs = "fab=100;boardsku=0001 fab=200;chipsku=00:00:00:D0;bup_type=kernel"
    sent = request_files(machine.soctype, BUPGENSPECS=specs)
    made = unpacked(post(fixtures_service, machine.name, machine.soctype, pack(sent)))
    assert made.keys() == {"payloads_t23x/bl_only_payload.100", "payloads_t23x/kernel_only_payload.200"}
    for name, payload in made.items():
        set_ = json.loads(payload[32:1056])
        assert set_["FAB"] == name[-3:]
        assert set_["BOARDSKU"] == ("0001" if name.endswith("100") else "0000")
        assert set_["CHIP_SKU"] == ("" if name.endswith("100") else "00:00:00:D0")
        at = 1056
        for source in sorted(each for each in sent if each.endswith((".bin", ".img", ".dtb"))):
            header = 8192 if machine.soctype == "tegra234" else 4096
            size = len(sent[source]) if machine.soctype == "tegra234" else -(-len(sent[source]) // 16) * 16
            machine.check(payload[at : at + header + size], sent[source])
            at += header + size
        assert at == len(payload)


@pytest.mark.parametrize("chip", SOCTYPES)
def test_one_update_payload(fixtures_service: Any, chip: str) -> None:
    artifact = pack(request_files(SOCTYPES[chip], BUPGEN="1"))
    made = unpacked(post(fixtures_service, f"demo-token-{chip}-rsa", SOCTYPES[chip], artifact))
    assert made.keys() == {"payloads_t23x/bl_only_payload"}


@pytest.mark.parametrize("chip", SOCTYPES)
def test_signatures_of_files(fixtures_service: Any, softhsm: Any, chip: str) -> None:
    sent = {"Image": b"a kernel" * 999, "board.dtb": b"\xd0\x0d\xfe\xed", "MANIFEST": b"SIGNFILES=1\n"}
    made = unpacked(post(fixtures_service, f"demo-token-{chip}-rsa", SOCTYPES[chip], pack(sent)))
    assert made.keys() == {"Image.sig", "board.dtb.sig"}
    for header in made.values():
        assert openssl_accepts(header, SOCTYPES[chip], "rsa", softhsm.public_key(f"tegra-{chip}-rsa"))


def test_tegra186_shares_the_bsp(fixtures_service: Any) -> None:
    made = unpacked(post(fixtures_service, "demo-file-t194-rsa-sbk", "tegra186", pack(request_files("tegra186"))))
    assert "boot_sigheader_encrypt.img.signed" in made


CONTRACT = """\
tar -c -h -z -f ../tegrasign-in.tar.gz --exclude=image.img --exclude=image.ext4 *
curl --connect-timeout 30 --max-time 1800 --retry 4 --silent --fail -X POST -F "machine=demo-token-t234-rsa" \
 -F "soctype=tegra234" -F "bspversion=35.4.1" -F "artifact=@../tegrasign-in.tar.gz" \
 --output ../tegrasign-out.tar.gz "URL/sign/tegra"
tar -x -z -f ../tegrasign-out.tar.gz
rm doflash.sh
mv flashcmd.txt doflash.sh
chmod +x doflash.sh
rm -f secureflash.sh
"""


def test_the_contract_s_lines_verbatim(fixtures_service: Any, softhsm: Any, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    files = request_files("tegra234") | {"doflash.sh": b"#!/bin/sh\n", "image.img": b"too large to send"}
    for name, data in files.items():
        (work / name).write_bytes(data)
    done = subprocess.run(
        ["sh", "-e", "-c", CONTRACT.replace("URL", fixtures_service.url)],
        cwd=work, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "tegraflash.py" in (work / "doflash.sh").read_text()
    assert (work / "secureflash.xml").exists()
    assert (work / "flash.xml.in").read_bytes() == files["flash.xml.in"]
    image = (work / "boot_sigheader.img.signed").read_bytes()
    assert openssl_accepts(image, "tegra234", "rsa", softhsm.public_key("tegra-t234-rsa"))


def test_eight_requests_at_once(fixtures_service: Any) -> None:
    artifact = pack(request_files("tegra234"))
    with ThreadPoolExecutor(8) as pool:
        names = [f"demo-{provider}-t234-rsa-sbk" for provider in ("token", "file") for _ in range(4)]
        answers = list(pool.map(lambda name: post(fixtures_service, name, "tegra234", artifact), names))
    assert [answer.status_code for answer in answers] == [200] * 8


@pytest.mark.parametrize(
    ("change", "fields", "status", "text"),
    [
        ({"flashvars": b'FLASHVARS="A"\ncp "$keyfile" stolen.bct\n'}, {}, 422, "line 2 is no assignment"),
        ({"flashvars": b'FLASHVARS="$(cat /etc/passwd)"\n'}, {}, 422, "characters that a shell understands"),
        ({"flashvars": b"FLASHVARS=`id`\n"}, {}, 422, "characters that a shell understands"),
        ({"flashvars": b'FLASHVARS="a;b"\n'}, {}, 422, "characters that a shell understands"),
        ({"flashvars": b"PATH=/work\n"}, {}, 422, "sets PATH"),
        ({"flashvars": b"LD_PRELOAD=./x.so\n"}, {}, 422, "sets LD_PRELOAD"),
        ({"flashvars": b"BASH_ENV=./x\n"}, {}, 422, "sets BASH_ENV"),
        ({"flashvars": b"here=/work\n"}, {}, 422, "line 1 is no assignment"),
        ({"flashvars": b"A='b'c\n"}, {}, 422, "characters that a shell understands"),
        ({"flashvars": b"A=b\\\n"}, {}, 422, "characters that a shell understands"),
        ({"flashvars": b"A=b\r\nid\r\n"}, {}, 422, "line 1 is no assignment"),
        ({"bsp_version": b"BSP_BRANCH=35\nid\n"}, {}, 422, "bsp_version is refused"),
        ({"MANIFEST": b"LD_PRELOAD=x\n"}, {}, 422, "line 1 sets none of the known keys"),
        ({"MANIFEST": b"BASH_ENV=x\nDTBFILE=a\n"}, {}, 422, "line 1 sets none of the known keys"),
        ({"MANIFEST": b"DTBFILE=../../etc/passwd\n"}, {}, 422, "value of DTBFILE"),
        ({"MANIFEST": b"DTBFILE=a;id\n"}, {}, 422, "value of DTBFILE"),
        ({"MANIFEST": b"DTBFILE=-rf\n"}, {}, 422, "value of DTBFILE"),
        ({"MANIFEST": b"DTBFILE=a\nLNXFILE=b\nODMDATA=$(id)\n"}, {}, 422, "value of ODMDATA"),
        ({"MANIFEST": b"DTBFILE=a\nLNXFILE=b\nBUPGENSPECS=fab=1;path=/x\n"}, {}, 422, "BUPGENSPECS"),
        ({"MANIFEST": b"no line\n"}, {}, 422, "line 1 sets none"),
        ({"MANIFEST": b"DTBFILE=\xff\n"}, {}, 422, "no ASCII text"),
        ({"MANIFEST": b""}, {}, 422, "DTBFILE and LNXFILE must be set"),
        ({"tegraopenssl": b"x"}, {}, 422, "is called as one of the signing tools"),
        ({"tegraflash.py": b"x"}, {}, 422, "is called as one of the signing tools"),
        ({"tegraparser_v2": b"x"}, {}, 422, "is called as one of the signing tools"),
        ({"tegrasign_v3_oemkey.yaml": b"x"}, {}, 422, "is called as one of the signing tools"),
        ({"_tools/bootloader/x": b"x"}, {}, 422, "is called as one of the signing tools"),
        ({"rollback/rollback_parser.py": b"x"}, {}, 422, "is called as one of the signing tools"),
        ({"../x": b"x"}, {}, 422, "leads out of it"),
        ({"/etc/x": b"x"}, {}, 422, "leads out of it"),
        ({"a b": b"x"}, {}, 422, "other characters than are usual"),
        ({"-rf": b"x"}, {}, 422, "other characters than are usual"),
        ({".bashrc": b"x"}, {}, 422, "other characters than are usual"),
        ({}, {"machine": "demo-token"}, 404, "No grant"),
        ({}, {"soctype": "tegra264"}, 400, ""),
        ({}, {"bspversion": "../../35.4.1"}, 400, ""),
        ({}, {"bspversion": "36.3.0"}, 501, "L4T 36.3.0 for tegra234 is not installed; there are: 35.4.1 for tegra186"),
        ({}, {"soctype": "tegra210"}, 501, "not installed"),
        ({}, {"machine": "demo-token-t194-rsa"}, 422, "tegra234 boots nothing that this key signs"),
    ],
)  # fmt: skip
def test_each_refusal(
    fixtures_service: Any, change: dict[str, bytes], fields: dict[str, str], status: int, text: str
) -> None:
    files = {name: data for name, data in (request_files("tegra234") | change).items() if data or name != "MANIFEST"}
    asked = {"machine": "demo-token-t234-rsa", "soctype": "tegra234", "version": VERSION}
    asked |= {name.replace("bspversion", "version"): value for name, value in fields.items()}
    answer = post(fixtures_service, artifact=pack(files), **asked)
    assert (answer.status_code, text in answer.text) == (status, True), answer.text
    fixtures_service.assert_no_files()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(fixtures_service: Any, kind: bytes) -> None:
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("board.dtb"))
        member = tarfile.TarInfo("boot.img")
        member.type, member.linkname = kind, "board.dtb"
        archive.addfile(member)
    answer = post(fixtures_service, "demo-token-t234-rsa", "tegra234", packed.getvalue())
    assert answer.status_code == 422, answer.text


# what goes wrong, and hostile code


@pytest.fixture(scope="module")
def canaries(softhsm: Any) -> list[bytes]:
    """The PIN, numbers of the key file, and the SBKs: as they are, and in hexadecimal."""
    keys = softhsm.keys
    pem = (keys / "demo-file-t234-rsa/tegrasign/rsa_priv.pem").read_bytes()
    numbers = serialization.load_pem_private_key(pem, None).private_numbers()  # type: ignore[union-attr]
    sbks = [(keys / f"demo-{own}-t234/tegrasign/sbk.txt").read_text() for own in ("token", "file")]
    found = [softhsm.pin.encode(), pem.splitlines()[4], numbers.p.to_bytes(192, "big"), *map(bytes.fromhex, sbks)]
    # what the boot ROM derives of it is as good as the SBK
    found += [derived(bytes.fromhex(sbk)) for sbk in sbks]
    return [*found, *(each.hex().encode() for each in found)]


@pytest.fixture(scope="module")
def modes(tmp_path_factory: pytest.TempPathFactory, canaries: list[bytes]) -> Callable[..., str]:
    """Makes a BSP that does something else; returns its version. They are below `modes.base`."""
    base = tmp_path_factory.mktemp("modes")

    def make(mode: str, **beside: str) -> str:
        version = f"35.90.{len(list(base.iterdir()))}"
        lines = "\n".join(canary.hex() for canary in canaries)
        make_bsp(base, version, "tegra234", mode, canaries=lines, **beside)
        return version

    make.base = base  # type: ignore[attr-defined]
    return make


@pytest.fixture(scope="module")
def strict(softhsm: Any, modes: Any, start: Callable[..., Any]) -> Any:
    """The service with low limits."""
    tables = tomllib.loads(softhsm.config.read_text())
    providers = {f"providers.{name}": table for name, table in tables["providers"].items()}
    grants = [grant for grant in tables["grants"] if grant["signer"] == "tegra"]
    tegra = {
        "l4t_base": str(modes.base), "timeout_s": 3.0, "unpacked_max_bytes": 8 << 20, "request_max_bytes": 1 << 20,
        "requests_max": 60,
    }  # fmt: skip
    return start({**providers, "grants": grants, "signers.tegra": tegra})


@pytest.fixture
def sign(strict: Any, modes: Any) -> Callable[..., httpx.Response]:
    """Has a request signed by a BSP that does something else."""

    def sign(mode: str, machine: str = "demo-file-t234-rsa-sbk", **beside: str) -> httpx.Response:
        answer = post(strict, machine, "tegra234", pack(request_files("tegra234")), modes(mode, **beside))
        strict.assert_no_files()
        return answer

    return sign


@pytest.mark.parametrize(
    ("mode", "status", "text"),
    [
        ("fails", 500, "NVIDIA's scripts could not sign the files."),
        ("makes_nothing", 500, "flashcmd.txt was not made"),
        ("fails_silently", 500, "flashcmd.txt was not made"),
        ("spoils_a_signature", 500, "the signature of image-2_sigheader_encrypt.bin.signed does not verify"),
        ("spoils_an_image", 500, "image-2_sigheader_encrypt.bin.signed is not what its header was signed for"),
        ("sleeps", 504, "took more than 3 s"),
        ("takes_memory_without_end", 500, "could not sign"),
        ("starts_processes_without_end", 500, "could not sign"),
        ("writes_without_end", 500, "could not sign"),
        ("prints_without_end", 504, "took more than 3 s"),
        ("repeats_an_iv", 500, "could not sign"),
        ("asks_without_end", 500, "could not sign"),
    ],
)
def test_what_goes_wrong(sign: Callable[..., httpx.Response], mode: str, status: int, text: str) -> None:
    answer = sign(mode)
    assert (answer.status_code, text in answer.text) == (status, True), answer.text


def test_a_wrong_output_does_not_lock_the_key(sign: Callable[..., httpx.Response]) -> None:
    """It is the scripts' fault, and so may be the client's."""
    assert sign("spoils_a_signature").status_code == 500
    assert sign("").status_code == 200


def test_what_the_scripts_say_is_redacted(sign: Callable[..., httpx.Response], strict: Any, softhsm: Any) -> None:
    secret = (softhsm.keys / "demo-file-t234/tegrasign/sbk.txt").read_text().strip()
    words = " ".join(f"0x{secret[at : at + 8]}" for at in range(0, 64, 8))
    answer = sign("fails", says=f"{softhsm.pin} {secret} {words} --key {secret.upper()}")
    said = strict.log + answer.text
    for leaked in (softhsm.pin, secret, secret.upper(), words, "123456", "ab" * 16, "0x11223344"):
        assert leaked not in said
    assert "Traceback (most recent call last)" in strict.log


def test_hostile_code_finds_nothing(
    sign: Callable[..., httpx.Response], strict: Any, modes: Any, softhsm: Any, tmp_path: Path
) -> None:
    wanted = [
        softhsm.keys, softhsm.pin_file, softhsm.config, softhsm.directory / "tokens", strict.spool, tmp_path,
        "/etc/passwd", "/etc/shadow", "/root", "/home", "/var", "/proc/1/root", f"/proc/{strict.process.pid}/environ",
        "/dev/mqueue", "/sys", "/run/systemd", "/dev/mem", modes.base,
    ]  # fmt: skip
    made = unpacked(sign("looks_around", wanted="\n".join(map(str, wanted)), port=strict.url.rpartition(":")[2]))
    found = json.loads(made["found.json"])
    # of the directory with all BSPs, its own; of the first process, nothing that is not its own
    assert {path: names for path, names in found["read"] if path != "/proc/1/root"}.keys() <= {str(modes.base)}
    assert found["network"] == []
    assert found["written"] == []
    assert len(found["processes"]) < 6
    report = json.loads(made["report.json"])
    assert report["secrets"] == []
    assert report["descriptors"] == [0, 1, 2]
    environment = report["environment"]
    assert environment.keys() <= {
        "PATH", "HOME", "PWD", "LANG", "MACHINE", "CHIPID", "BOARDID", "BOARDSKU", "BOARDREV", "FAB", "CHIPREV",
        "fuselevel", "localbootfile", "SHLVL", "_", "OLDPWD",
    }  # fmt: skip


def test_the_socket_gives_nothing_away(sign: Callable[..., httpx.Response], canaries: list[bytes], strict: Any) -> None:
    answers = json.loads(unpacked(sign("abuses_the_socket"))["answers.json"])
    assert len(answers) == 12
    assert set(answers.values()) == {""}
    assert "a request of NVIDIA's scripts was refused" in strict.log


def test_a_program_that_stays_is_killed(sign: Callable[..., httpx.Response], strict: Any) -> None:
    assert sign("leaves_a_program").status_code == 200
    before = strict.log.count("was refused")
    end = time.monotonic() + 5
    while any(b"daemon.py" in _command(process) for process in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert strict.log.count("was refused") == before


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_no_secret_is_in_the_log_or_the_process_list(
    sign: Callable[..., httpx.Response], strict: Any, canaries: list[bytes]
) -> None:
    seen: list[bytes] = []
    with ThreadPoolExecutor(1) as pool:
        answers = [pool.submit(sign, "", machine) for machine in ("demo-token-t234-rsa-sbk", "demo-file-t234-rsa-sbk")]
        while not all(answer.done() for answer in answers):
            for process in strict.processes():
                seen.append(_command(process))
    assert [answer.result().status_code for answer in answers] == [200, 200]
    assert any(b"tegraflash.py" in command for command in seen)
    for canary in canaries:
        assert not any(canary in command for command in seen)
        assert canary not in strict.log.encode()
        assert not any(canary in answer.result().content for answer in answers)


def test_each_signature_is_logged(sign: Callable[..., httpx.Response], strict: Any) -> None:
    answer = sign("")
    lines = [json.loads(line) for line in strict.log.splitlines() if line.startswith("{")]
    own = [line["event"] for line in lines if line.get("request_id") == answer.headers["X-Request-Id"]]
    assert sum("a tool signed with the lent key pkc" in event for event in own) == 5
    assert sum(bool(re.search("has the SHA-256 [0-9a-f]{64}", event)) for event in own) == 5
    assert sum("AES-256-GCM" in event for event in own) == 5


def test_without_a_sandbox_nothing_runs(softhsm: Any, modes: Any, start: Callable[..., Any]) -> None:
    tables = tomllib.loads(softhsm.config.read_text())
    grants = [grant for grant in tables["grants"] if grant["name"] == "demo-file-tegra-t234-rsa"]
    settings = {"grants": grants, "tools": {"sandbox": "none"}, "signers.tegra": {"l4t_base": str(modes.base)}}
    service = start({"providers.files": tables["providers"]["files"], **settings})
    answer = post(service, "demo-file-t234-rsa", "tegra234", pack(request_files("tegra234")), modes(""))
    assert (answer.status_code, "turn the sandbox off" in answer.text) == (501, True), answer.text


@pytest.mark.skipif(REAL_BASE is None, reason="HSMSIGN_TEST_L4T_BASE names no BSP of NVIDIA's")
def test_a_bsp_of_nvidia_s(softhsm: Any, start: Callable[..., Any]) -> None:
    """Posts BASE/L4T-VERSION-CHIP/tegrasign-in.tar.gz, which a build posted; the service verifies what is made."""
    base = Path(REAL_BASE or "")
    tables = tomllib.loads(softhsm.config.read_text())
    providers = {f"providers.{name}": table for name, table in tables["providers"].items()}
    grants = [grant for grant in tables["grants"] if grant["signer"] == "tegra"]
    service = start({**providers, "grants": grants, "signers.tegra": {"l4t_base": str(base)}})
    requests = sorted(base.glob("L4T-*/tegrasign-in.tar.gz"))
    assert requests, f"there is no L4T-VERSION-CHIP/tegrasign-in.tar.gz below {base}"
    for path in requests:
        _, version, chip = path.parent.name.split("-")
        short = {"tegra186": "t194"}.get(chip, chip.replace("tegra", "t"))
        for provider in ("token", "file"):
            for suffix in ("", "-sbk"):
                machine = f"demo-{provider}-{short}-rsa{suffix}"
                made = unpacked(post(service, machine, SOCTYPES[short], path.read_bytes(), version))
                assert "flashcmd.txt" in made or any(name.startswith("payloads") for name in made)
