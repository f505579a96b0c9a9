import subprocess
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from signers.formats import hab
from signers.formats.hab import AuthenticateData, Block, Csf, Expected, HabError, InstallKey
from tokens.errors import SigningFailed

ROOT = Path(__file__).parents[3]
TOOLS = ROOT / ".cache/cst/cst-3.4.1/linux64/bin"
CST4 = ROOT / ".cache/cst/cst-4.0.1/linux64/bin"  # where somebody has it

KINDS = ["rsa2048", "rsa4096", "p256"]
IMAGE = bytes(range(256)) * 40
BLOCKS = (Block(0x877FF400, 0, 0x1000), Block(0x87800400, 0x1800, 0x234))
CSF_KEYS = """
[Install CSFK]
File = "{pki}/crts/CSF1_crt.pem"
[Authenticate CSF]
"""
IMAGE_KEY = """
[Install Key]
Verification index = 0
Target Index = 2
File = "{pki}/crts/IMG1_crt.pem"
"""
DATA = """
[Authenticate Data]
Verification index = {key}
Blocks = 0x877ff400 0 0x1000 "{image}", \\
         0x87800400 0x1800 0x234 "{image}"
"""
NOCAK = """
[Install NOCAK]
File = "{pki}/crts/SRK1_crt.pem"
[Authenticate CSF]
"""
OTHERS = """
[Unlock]
Engine = CAAM
Features = MID, RNG
[Unlock]
Engine = OCOTP
Features = JTAG, SCS
UID = 1,2,3,4,5,6,7,0x80
[Unlock]
Engine = SRTC
[NOP]
[Set Engine]
Engine = DCP
Hash Algorithm = sha256
Engine Configuration = 0
[Init]
Engine = CAAM
Features = RNG
"""


def tool(name: str | Path, *arguments: object, cwd: Path) -> str:
    path = TOOLS / name
    assert path.exists(), "run `make setup`"
    done = subprocess.run([path, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass(frozen=True)
class Pki:
    """Four SRKs, and the CSF and IMG keys of the first, with the names and the password file that cst wants."""

    path: Path
    certificates: dict[str, x509.Certificate]

    @property
    def srks(self) -> list[x509.Certificate]:
        return [self.certificates[f"SRK{each}"] for each in (1, 2, 3, 4)]


def make_pki(path: Path, kind: str) -> Pki:
    for each in ("keys", "crts", "work"):
        (path / each).mkdir(parents=True)
    (path / "keys/key_pass.txt").write_text("secret\nsecret\n")
    certificates = {}
    now = datetime.now(UTC)
    issuers = {"CSF1": "SRK1", "IMG1": "SRK1", "CSF2": "SRK2"}
    keys = {}
    for serial, name in enumerate(("SRK1", "SRK2", "SRK3", "SRK4", "CSF1", "IMG1", "CSF2"), 1):
        size = int(kind[3:]) if kind.startswith("rsa") else 0
        keys[name] = rsa.generate_private_key(65537, size) if size else ec.generate_private_key(ec.SECP256R1())
        issuer = issuers.get(name, name)
        certificates[name] = (
            x509.CertificateBuilder()
            .subject_name(x509.Name.from_rfc4514_string(f"CN={name}"))
            .issuer_name(x509.Name.from_rfc4514_string(f"CN={issuer}"))
            .public_key(keys[name].public_key())
            .serial_number(serial)
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=365))
            .add_extension(x509.BasicConstraints(ca=issuer == name, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(keys[name].public_key()), critical=False)
            .sign(keys[issuer], hashes.SHA256())
        )
        pem = certificates[name].public_bytes(serialization.Encoding.PEM)
        (path / f"crts/{name}_crt.pem").write_bytes(pem)
        encryption = serialization.BestAvailableEncryption(b"secret")
        private = keys[name].private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        (path / f"keys/{name}_key.pem").write_bytes(private)
    (path / "table.bin").write_bytes(hab.encode_srk_table([certificates[f"SRK{each}"] for each in (1, 2, 3, 4)]))
    (path / "image.bin").write_bytes(IMAGE)
    return Pki(path, certificates)


@pytest.fixture(scope="module")
def pkis(tmp_path_factory):
    return {kind: make_pki(tmp_path_factory.mktemp(kind) / "pki", kind) for kind in KINDS}


def cst(pki: Pki, *sections: str, source: int = 0, key: int = 2, tools: Path = TOOLS) -> bytes:
    header = '[Header]\nVersion = 4.3\n[Install SRK]\nFile = "{pki}/table.bin"\nSource index = {source}\n'
    text = "".join((header, *sections)).format(pki=pki.path, image=pki.path / "image.bin", source=source, key=key)
    (pki.path / "csf.txt").write_text(text)
    tool(tools / "cst", "-i", pki.path / "csf.txt", "-o", pki.path / "csf.bin", cwd=pki.path / "work")
    return (pki.path / "csf.bin").read_bytes()


def expected(pki: Pki) -> Expected:
    table = (pki.path / "table.bin").read_bytes()
    return Expected(table, 0, pki.certificates["CSF1"], {2: pki.certificates["IMG1"]}, (BLOCKS,))


def read(offset: int, length: int) -> bytes:
    return IMAGE[offset : offset + length]


@pytest.fixture(scope="module")
def made(pkis):
    """The usual CSF, by kind of key."""
    return {kind: cst(pkis[kind], CSF_KEYS, IMAGE_KEY, DATA) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_what_cst_makes_is_accepted(pkis, made, kind):
    csf = hab.parse(made[kind])
    hab.verify(csf, expected(pkis[kind]), read)
    blocks = tuple((each.address, each.length) for each in BLOCKS)
    assert csf.version == 0x43
    assert csf.commands == (
        InstallKey(0, hab.PROTOCOL_SRK, hab.ALGORITHM_SHA256, 0, 0),
        InstallKey(hab.FLAG_CSF_KEY, hab.PROTOCOL_X509, hab.ALGORITHM_ANY, 0, 1),
        AuthenticateData(1, hab.PROTOCOL_CMS, 0, 0),
        InstallKey(0, hab.PROTOCOL_X509, hab.ALGORITHM_ANY, 0, 2),
        AuthenticateData(2, hab.PROTOCOL_CMS, 0, 0, blocks),
    )


def test_ecdsa_signatures_of_every_length(pkis):
    """DER makes them differ by a byte or two, and the padding with them."""
    for _ in range(20):
        hab.verify(hab.parse(cst(pkis["p256"], CSF_KEYS, IMAGE_KEY, DATA)), expected(pkis["p256"]), read)


@pytest.mark.parametrize("kind", KINDS)
def test_openssl_verifies_the_signatures(pkis, made, kind, tmp_path):
    csf = hab.parse(made[kind])
    content = b"".join(read(each.offset, each.length) for each in BLOCKS)
    for index, name, signed in ((2, "CSF1", csf.signed), (4, "IMG1", content)):
        (tmp_path / "cms").write_bytes(csf.sections[csf.commands[index].offset])
        (tmp_path / "content").write_bytes(signed)
        line = "openssl cms -verify -binary -inform DER -in cms -content content -noverify -out /dev/null -certfile"
        subprocess.run(
            [*line.split(), pkis[kind].path / f"crts/{name}_crt.pem"], cwd=tmp_path, check=True, capture_output=True
        )


def test_nxps_parser_finds_the_same(made, tmp_path):
    if not (CST4 / "hab_csf_parser").exists():
        pytest.skip("needs cst 4")
    (tmp_path / "csf.bin").write_bytes(made["rsa2048"])
    subprocess.run([CST4 / "hab_csf_parser", "-c", "csf.bin"], cwd=tmp_path, check=True, capture_output=True)
    csf = hab.parse(made["rsa2048"])
    theirs = {each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}
    for index in (1, 2, 3, 4):
        assert any(csf.sections[csf.commands[index].offset] in each for each in theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cst_4_makes_is_accepted(pkis, made, kind):
    if not (CST4 / "cst").exists():
        pytest.skip("needs cst 4")
    for sections in ((CSF_KEYS, OTHERS, IMAGE_KEY, DATA), (CSF_KEYS, IMAGE_KEY, DATA)):
        csf = hab.parse(cst(pkis[kind], *sections, tools=CST4))
        hab.verify(csf, expected(pkis[kind]), read)
    assert csf.commands == hab.parse(made[kind]).commands


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("-md sha256", None),
        ("-md sha384 -noattr", None),
        ("-md sha512", None),
        ("-md sha224", "another digest"),
        ("-md sha1", "unknown signature scheme"),
        ("-md sha256 -keyopt rsa_padding_mode:pss", "a scheme that HAB does not know"),
        ("-md sha256 -keyid", "another signer"),
        ("-md sha256 -certs", "other certificates"),
        ("-md sha256 -nodetach", "another content"),
        ("-md sha256 -smimecap", "encoded otherwise"),
        ("-md sha256 -receipt_request_to x@y -receipt_request_all", "encoded otherwise"),
    ],
)
def test_forms_of_signatures(pkis, made, tmp_path, options, words):
    path = pkis["rsa2048"].path
    csf = hab.parse(made["rsa2048"])
    (tmp_path / "content").write_bytes(csf.signed)
    for option in ("-certs", "-smimecap"):  # OpenSSL has only the opposites
        options = options.replace(option, "") if option in options else f"{options} -no{option[1:]}"
    line = "openssl cms -sign -binary -outform DER -in content -out cms -passin pass:secret"
    key = ["-signer", path / "crts/CSF1_crt.pem", "-inkey", path / "keys/CSF1_key.pem"]
    subprocess.run([*line.split(), *key, *options.split()], cwd=tmp_path, check=True)
    sections = {**csf.sections, csf.commands[2].offset: (tmp_path / "cms").read_bytes()}
    changed = replace(csf, sections=sections)
    if words is None:
        hab.verify(changed, expected(pkis["rsa2048"]), read)
        return
    with pytest.raises(SigningFailed, match=words):
        hab.verify(changed, expected(pkis["rsa2048"]), read)


def test_other_commands(pkis):
    csf = hab.parse(cst(pkis["p256"], CSF_KEYS, OTHERS, IMAGE_KEY, DATA))
    hab.verify(csf, expected(pkis["p256"]), read)
    assert csf.commands[3:9] == (
        hab.Unlock(0x1D, 3),
        hab.Unlock(0x21, 0xC, bytes((1, 2, 3, 4, 5, 6, 7, 0x80))),
        hab.Unlock(0x0C),
        hab.Nop(),
        hab.SetEngine(0x17, 0x1B, 0),
        hab.Init(0x1D, 2),
    )


def test_images_may_be_several(pkis):
    pki = pkis["p256"]
    csf = hab.parse(cst(pki, CSF_KEYS, IMAGE_KEY, DATA, DATA.replace("0x87800400 0x1800", "0x87900400 0x400")))
    second = (BLOCKS[0], Block(0x87900400, 0x400, 0x234))
    hab.verify(csf, replace(expected(pki), blocks=(BLOCKS, second)), read)
    for blocks in ((), (BLOCKS,), (second, BLOCKS), (BLOCKS, second, second)):
        with pytest.raises(SigningFailed, match="blocks"):
            hab.verify(csf, replace(expected(pki), blocks=blocks), read)


@pytest.mark.parametrize("kind", ["rsa2048", "p256"])
def test_fast_authentication(pkis, kind):
    pki = pkis[kind]
    data = cst(pki, NOCAK, DATA, key=0)
    csf = hab.parse(data)
    fast = replace(expected(pki), csf_certificate=pki.certificates["SRK1"], keys={})
    hab.verify(csf, fast, read)
    for other, words in (
        (expected(pki), "another key than the SRK"),
        (replace(fast, csf_certificate=pki.certificates["SRK2"]), "another key than the SRK"),
    ):
        with pytest.raises(SigningFailed, match=words):
            hab.verify(csf, other, read)
    with pytest.raises(SigningFailed, match="not the granted one"):
        hab.verify(replace(csf, spare=(b"x",)), fast, read)
    refuses_flips(data, fast)


def test_srk_table_is_that_of_srktool(pkis, tmp_path):
    for kind in KINDS:
        for count in (1, 2, 4):
            certificates = ",".join(str(pkis[kind].path / f"crts/SRK{each}_crt.pem") for each in range(1, count + 1))
            options = ["-h", "4", "-t", "T", "-e", "F", "-d", "sha256", "-f", "1", "-c"]
            tool("srktool", *options, certificates, cwd=tmp_path)
            encoded = hab.encode_srk_table(pkis[kind].srks[:count])
            assert encoded == (tmp_path / "T").read_bytes()
            table = hab.parse_srk_table(encoded)
            assert table.fuses == (tmp_path / "F").read_bytes()
            assert [(each.key, each.ca) for each in table.entries] == [
                (each.public_key(), True) for each in pkis[kind].srks[:count]
            ]
            # '%' asks for the hash in place of the key
            tool("srktool", *options, certificates.replace(",", ",%"), cwd=tmp_path)
            hashed = hab.parse_srk_table((tmp_path / "T").read_bytes())
            assert [each.key is None for each in hashed.entries] == [False] + [True] * (count - 1)
            assert hashed.fuses == table.fuses == (tmp_path / "F").read_bytes()


@pytest.mark.parametrize(
    ("extensions", "ca"),
    [
        ("", False),
        ("basicConstraints=CA:FALSE", False),
        ("basicConstraints=CA:TRUE", True),
        ("basicConstraints=CA:TRUE keyUsage=keyCertSign,cRLSign", True),
        ("basicConstraints=CA:TRUE keyUsage=digitalSignature", False),
        ("keyUsage=keyCertSign", False),
    ],
)
def test_ca_flag_is_that_of_srktool(tmp_path, extensions, ca):
    (tmp_path / "empty.cnf").write_text("[req]\ndistinguished_name = dn\n[dn]\n")  # no extensions of its own
    line = "openssl req -config empty.cnf -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj /CN=x"
    options = [word for each in extensions.split() for word in ("-addext", each)]
    subprocess.run(
        [*line.split(), "-keyout", "key", "-out", "c.pem", *options], cwd=tmp_path, check=True, capture_output=True
    )
    tool("srktool", *["-h", "4", "-t", "T", "-e", "F", "-d", "sha256", "-f", "1", "-c", "c.pem"], cwd=tmp_path)
    encoded = hab.encode_srk_table([x509.load_pem_x509_certificate((tmp_path / "c.pem").read_bytes())])
    assert encoded == (tmp_path / "T").read_bytes()
    assert [each.ca for each in hab.parse_srk_table(encoded).entries] == [ca]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pki: {"srk_table": hab.encode_srk_table(pki.srks[:3])}, "SRK table in it is another"),
        (lambda pki: {"source": 1}, "another SRK"),
        (lambda pki: {"csf_certificate": pki.certificates["IMG1"]}, "not the granted one"),
        (lambda pki: {"keys": {2: pki.certificates["CSF1"]}}, "not the granted one"),
        (lambda pki: {"keys": {3: pki.certificates["IMG1"]}}, "not the granted one"),
        (lambda pki: {"blocks": (BLOCKS[:1],)}, "other blocks"),
        (lambda pki: {"blocks": (BLOCKS[::-1],)}, "other blocks"),
        (lambda pki: {"blocks": ((replace(BLOCKS[0], offset=4), BLOCKS[1]),)}, "messageDigest"),
        (lambda pki: {"blocks": ((BLOCKS[0], replace(BLOCKS[1], offset=len(IMAGE) - 4)),)}, "ends within"),
    ],
)
def test_anything_else_than_asked_is_refused(pkis, made, change, words):
    pki = pkis["rsa2048"]
    with pytest.raises(SigningFailed, match=words):
        hab.verify(hab.parse(made["rsa2048"]), replace(expected(pki), **change(pki)), read)


def test_a_certificate_of_another_srk_is_refused(pkis):
    pki = pkis["p256"]
    sections = (CSF_KEYS.replace("CSF1", "CSF2"), IMAGE_KEY, DATA)
    csf = hab.parse(cst(pki, *sections))
    with pytest.raises(SigningFailed, match="not issued by the SRK"):
        hab.verify(csf, replace(expected(pki), csf_certificate=pki.certificates["CSF2"]), read)
    csf = hab.parse(cst(pki, *sections, source=1))
    with pytest.raises(SigningFailed, match="not issued by the SRK"):  # now the image's
        hab.verify(csf, replace(expected(pki), source=1, csf_certificate=pki.certificates["CSF2"]), read)


def refused(data: bytes, wanted: Expected, image: bytes = IMAGE) -> bool:
    try:
        hab.verify(hab.parse(data), wanted, lambda offset, length: image[offset : offset + length])
    except (HabError, SigningFailed):
        return True
    return False


def refuses_flips(data: bytes, wanted: Expected) -> None:
    """Every byte of the CSF counts."""
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        assert refused(bytes(damaged), wanted), f"a flipped bit in byte {at:#x} was accepted"


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_refused(pkis, made, kind):
    refuses_flips(made[kind], expected(pkis[kind]))
    for at in (*range(0, 0x1000, 97), 0xFFF, 0x1800, 0x1A33):
        image = bytearray(IMAGE)
        image[at] ^= 1 << at % 8
        assert refused(made[kind], expected(pkis[kind]), bytes(image))


def test_every_truncation_is_refused(pkis, made):
    data = made["p256"].rstrip(b"\0")
    for length in range(len(data)):
        assert refused(data[:length], expected(pkis["p256"]))
    assert not refused(data + bytes(1000), expected(pkis["p256"]))
    assert refused(data + bytes(1000) + b"x", expected(pkis["p256"]))


def command(tag: int, contents: bytes, parameter: int = 0) -> bytes:
    return bytes((tag, 0, 4 + len(contents), parameter)) + contents


@pytest.mark.parametrize(
    ("commands", "words"),
    [
        (command(0xCC, bytes(8)), "CC of a form"),
        (command(0xCF, bytes(8)), "CF of a form"),
        (command(0xBE, bytes((0xBB, 0, 0, 0, 0, 0, 0, 0)), 1), "BE of a form"),
        (command(0xBE, bytes((3, 0, 0, 0, 0, 0, 0, 0)), 1), "BE of a form"),
        (command(0xBE, bytes((9, 0x17, 0, 2, 0, 0, 0, 0)) + bytes(32), 0x80), "BE of a form"),
        (command(0xBE, bytes((3, 0x17, 0, 0, 0, 0, 2, 0))), "not there"),
        (command(0xBE, bytes((3, 0x17, 0, 0, 0, 0, 2, 0))) * 2, "same section"),
        (command(0xCA, bytes((2, 0xA3, 0, 0, 0, 0, 0, 0))), "CA of a form"),
        (command(0xCA, bytes((2, 0xC5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))), "CA of a form"),
        (command(0xB1, bytes(4), 1), "B1 of a form"),
        (command(0xB4, bytes(8)), "B4 of a form"),
        (command(0xC0, b"x"), "multiple of 4"),
        (bytes((0xC0, 0, 0, 0)), "within the data"),
        (bytes((0xC0, 0, 8, 0)), "within the data"),
        (b"\xc0\0", "cut off"),
    ],
)
def test_refused_commands(commands, words):
    with pytest.raises(HabError, match=words):
        hab.parse(bytes((0xD4, 0, 4 + len(commands), 0x43)) + commands)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xd4", bytes((0xD4, 0, 3, 0x43)), bytes((0xD4, 0, 4, 0x33)), bytes((0xD4, 0, 4, 0x43, 1)), bytes(100)],
)
def test_no_csf(data):
    with pytest.raises(HabError):
        hab.parse(data)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_ends_in_the_own_errors(pkis, made, data):
    damaged = bytearray(made["p256"])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        patch = data.draw(
            st.binary(max_size=8) | st.sampled_from([b"\xff\xff", bytes(8), b"\xd7\0\4\x43", b"\x30\x80"])
        )
        damaged[at : at + len(patch)] = patch
    del damaged[data.draw(st.integers(len(damaged) // 2, len(damaged))) :]
    assert refused(bytes(damaged), expected(pkis["p256"])) or bytes(damaged).rstrip(b"\0") == made["p256"].rstrip(b"\0")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_end_in_a_csf_or_the_own_error(data):
    for each in (data, b"\xd4\0\x20\x43" + data, b"\xd4\0\x04\x43" + data):
        with suppress(HabError):
            assert isinstance(hab.parse(each), Csf)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_srk_table_ends_in_the_own_error(pkis, data):
    table = bytearray(hab.encode_srk_table(pkis[data.draw(st.sampled_from(["rsa2048", "p256"]))].srks))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, 40) | st.integers(0, len(table) - 1))
        table[at] = data.draw(st.integers(0, 255))
    del table[data.draw(st.integers(0, len(table))) :]
    with suppress(HabError):
        assert hab.parse_srk_table(bytes(table)).raw == table
