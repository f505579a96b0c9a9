import hashlib
import struct
import subprocess
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from signers.formats import ahab
from signers.formats.ahab import AhabError, Expected
from tokens.errors import ArtifactRejected, SigningFailed
from tokens.schemes import Hash

ROOT = Path(__file__).parents[3]
TOOLS = ROOT / ".cache/cst/cst-3.4.1/linux64/bin"
CST4 = ROOT / ".cache/cst/cst-4.0.1/linux64/bin/cst"  # where somebody has it

KINDS = {
    "p256": ("EC -pkeyopt ec_paramgen_curve:P-256", Hash.SHA256),
    "p384": ("EC -pkeyopt ec_paramgen_curve:P-384", Hash.SHA384),
    "p521": ("EC -pkeyopt ec_paramgen_curve:P-521", Hash.SHA512),
    "rsa2048": ("RSA -pkeyopt rsa_keygen_bits:2048", Hash.SHA256),
    "rsa4096": ("RSA -pkeyopt rsa_keygen_bits:4096", Hash.SHA512),
    "pss2048": ("RSA-PSS -pkeyopt rsa_keygen_bits:2048", Hash.SHA256),
}
OFFSET = 0x400
BLOCK = 16 + 2 * 128
IMAGES = (bytes(range(256)) * 9, b"\xa5" * 1000)


def tool(name: str, *arguments: object, cwd: Path) -> None:
    path = TOOLS / name
    assert path.exists(), "run `make setup`"
    done = subprocess.run([path, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def openssl(line: str, cwd: Path) -> None:
    subprocess.run(["openssl", *line.split()], cwd=cwd, check=True, capture_output=True)


def artifact(image_hash: Hash = Hash.SHA384) -> bytes:
    """What mkimage makes: a container at 0x400, behind something else, with two images and room for its signature."""
    number = [Hash.SHA256, Hash.SHA384, Hash.SHA512].index(image_hash)
    data = bytearray(b"before" + bytes(0x2000 - 6))
    header = struct.pack("<BHBIHBBHH", 0, BLOCK + 16, 0x87, 0, 3, 1, 2, BLOCK, 0)
    for image in IMAGES:
        at = len(data) - OFFSET
        data += image + bytes(-len(image) % 64)
        digest = hashlib.new(image_hash, image).digest().ljust(64, b"\0")
        header += struct.pack("<IIQQII", at, len(image), 0x80000000, 0x80000000, 0x23 | number << 8, 0)
        header += digest + bytes(32)
    data[OFFSET : OFFSET + len(header) + 4] = header + struct.pack("<BHB", 0, 16, 0x90)
    return bytes(data) + b"behind"


@dataclass(frozen=True)
class Pki:
    """Four SRKs with the names and the password file that cst wants, and what srktool makes of them."""

    path: Path
    certificates: list[x509.Certificate]
    hash: Hash

    @property
    def table(self) -> bytes:
        return (self.path / "T").read_bytes()


def make_pki(path: Path, kind: str) -> Pki:
    for each in ("keys", "crts", "work"):
        (path / each).mkdir(parents=True)
    (path / "keys/key_pass.txt").write_text("secret\nsecret\n")
    options, hash_ = KINDS[kind]
    for name in ("SRK1", "SRK2", "SRK3", "SRK4"):
        if name < "SRK3" or not kind.startswith("rsa"):  # RSA keys take their time; two are enough
            openssl(f"genpkey -algorithm {options} -out plain.pem", path)
        openssl(f"pkcs8 -topk8 -in plain.pem -passout pass:secret -out keys/{name}_key.pem", path)
        request = "req -x509 -new -key plain.pem -days 365 -addext basicConstraints=CA:FALSE"
        openssl(f"{request} -subj /CN={name} -{hash_} -out crts/{name}_crt.pem", path)
    names = [path / f"crts/SRK{each}_crt.pem" for each in (1, 2, 3, 4)]
    pki = Pki(path, [x509.load_pem_x509_certificate(each.read_bytes()) for each in names], hash_)
    srktool(pki, Hash.SHA512)
    (path / "artifact.bin").write_bytes(artifact())
    return pki


def srktool(pki: Pki, fuses: Hash) -> None:
    names = ",".join(f"crts/SRK{each}_crt.pem" for each in (1, 2, 3, 4))
    tool("srktool", "-a", "-t", "T", "-e", "F", "-f", "1", "-s", pki.hash, "-d", fuses, "-c", names, cwd=pki.path)


@pytest.fixture(scope="module")
def pkis(tmp_path_factory):
    return {kind: make_pki(tmp_path_factory.mktemp(kind) / "pki", kind) for kind in KINDS}


def sign(pki: Pki, index: int = 0, revocations: int = 0, source_set: str = "OEM", cst: Path = TOOLS / "cst") -> bytes:
    (pki.path / "csf.txt").write_text(f"""\
[Header]
Target = AHAB
Version = 1.0
[Install SRK]
File = "{pki.path}/T"
Source = "{pki.path}/crts/SRK{index + 1}_crt.pem"
Source index = {index}
Source set = {source_set}
Revocations = {revocations:#x}
[Authenticate Data]
File = "{pki.path}/artifact.bin"
Offsets = {OFFSET:#x} {OFFSET + BLOCK:#x}
""")
    tool(str(cst), "-i", pki.path / "csf.txt", "-o", pki.path / "out.bin", cwd=pki.path / "work")
    return (pki.path / "out.bin").read_bytes()


@pytest.fixture(scope="module")
def made(pkis):
    """The artifact as cst signs it, by kind of key."""
    return {kind: sign(pkis[kind]) for kind in KINDS}


def expected(pki: Pki, index: int = 0, revocations: int = 0) -> Expected:
    key = pki.certificates[index].public_key()
    return Expected(OFFSET, BLOCK, pki.table, index, ahab.OEM, revocations, key)


def reader(data: bytes):
    return lambda offset, length: data[offset : offset + length]


def verify(data: bytes, wanted: Expected, unsigned: bytes | None = None) -> ahab.Container:
    unsigned = artifact() if unsigned is None else unsigned
    return ahab.verify(wanted, reader(unsigned), len(unsigned), reader(data), len(data))


@pytest.mark.parametrize("kind", KINDS)
def test_what_cst_makes_is_accepted(pkis, made, kind):
    container = verify(made[kind], expected(pkis[kind]))
    assert container == ahab.parse(made[kind][OFFSET : OFFSET + container.header.length])
    assert container.header.flags == 2
    assert (container.header.software_version, container.header.fuse_version) == (3, 1)
    assert [each.size for each in container.header.images] == [len(each) for each in IMAGES]
    assert ahab.parse_header(artifact()[OFFSET:]).images == container.header.images


@pytest.mark.parametrize("kind", KINDS)
def test_cst_4_makes_the_same(pkis, made, kind):
    if not CST4.exists():
        pytest.skip("needs cst 4")
    container = verify(sign(pkis[kind], cst=CST4), expected(pkis[kind]))
    assert container.signed == verify(made[kind], expected(pkis[kind])).signed


@pytest.mark.parametrize("kind", ["rsa2048", "rsa4096", "pss2048"])
def test_openssl_verifies_rsa_as_the_record_says(pkis, made, kind, tmp_path):
    """PKCS #1 v1.5 where the certificate says rsaEncryption; PSS, with the longest salt, where it says so."""
    container = verify(made[kind], expected(pkis[kind]))
    record = ahab.parse_srk_table(container.srk_table).records[0]
    (tmp_path / "signed").write_bytes(container.signed)
    (tmp_path / "signature").write_bytes(container.signature)
    openssl(f"x509 -in {pkis[kind].path}/crts/SRK1_crt.pem -pubkey -noout -out key.pem", tmp_path)
    assert record.algorithm == (ahab.RSA_PSS if kind == "pss2048" else ahab.RSA_PKCS1)
    pss = "-sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:222" if kind == "pss2048" else ""
    openssl(f"dgst -{record.hash} -verify key.pem {pss} -signature signature signed", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_srk_table_is_that_of_srktool(pkis, kind):
    pki = pkis[kind]
    for hash_ in (Hash.SHA256, Hash.SHA384, Hash.SHA512):
        for fuses in (Hash.SHA256, Hash.SHA512):
            other = replace(pki, hash=hash_)
            srktool(other, fuses)
            encoded = ahab.encode_srk_table(pki.certificates, hash_)
            assert encoded == other.table
            table = ahab.parse_srk_table(encoded)
            assert table.fuses(fuses) == (pki.path / "F").read_bytes()
            assert [(each.key, each.hash, each.ca) for each in table.records] == [
                (each.public_key(), hash_, False) for each in pki.certificates
            ]
    srktool(pki, Hash.SHA512)


def test_srk_tables_that_cannot_be(pkis):
    with pytest.raises(AhabError, match="4 keys"):
        ahab.encode_srk_table(pkis["p256"].certificates[:3], Hash.SHA256)
    with pytest.raises(AhabError, match="sha224"):
        ahab.encode_srk_table(pkis["p256"].certificates, Hash.SHA224)


@pytest.mark.parametrize(("index", "revocations"), [(1, 0), (3, 0b0101), (0, 0xE)])
def test_index_and_revocations(pkis, index, revocations):
    pki = pkis["p256"]
    data = sign(pki, index, revocations)
    wanted = expected(pki, index, revocations)
    verify(data, wanted)
    for other in (replace(wanted, index=index ^ 1), replace(wanted, revocations=revocations ^ 2)):
        with pytest.raises(SigningFailed, match="flags"):
            verify(data, other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pkis: {"srk_table": pkis["p384"].table}, "SRK table in it is another"),
        (lambda pkis: {"srk_table": b""}, "cannot be parsed"),
        (lambda pkis: {"source_set": ahab.NXP}, "flags"),
        (lambda pkis: {"public_key": pkis["p256"].certificates[1].public_key()}, "not the granted key"),
        (lambda pkis: {"public_key": pkis["p384"].certificates[0].public_key()}, "not the granted key"),
    ],
)
def test_anything_else_than_asked_is_refused(pkis, made, change, words):
    with pytest.raises(SigningFailed, match=words):
        verify(made["p256"], replace(expected(pkis["p256"]), **change(pkis)))


@pytest.mark.parametrize(
    ("change", "words"), [({"signature_block": BLOCK + 8}, "elsewhere"), ({"offset": 0}, "no container of version 0")]
)
def test_an_artifact_that_is_at_fault_is_not_the_key_s(pkis, made, change, words):
    with pytest.raises(ArtifactRejected, match=words):
        verify(made["p256"], replace(expected(pkis["p256"]), **change))


def test_a_signature_of_another_srk_is_refused(pkis, made):
    """cst does not look whether the Source is the SRK at the Source index."""
    pki = pkis["p256"]
    other = verify(sign(pki, 1), expected(pki, 1))
    own = verify(made["p256"], expected(pki))
    with pytest.raises(SigningFailed, match="not one of the granted key"):
        verify(made["p256"].replace(own.signature, other.signature), expected(pki))


def test_an_image_with_another_hash_is_refused(pkis):
    pki = replace(pkis["p256"])
    broken = artifact().replace(b"\xa5" * 1000, b"\xa5" * 999 + b"\0")
    (pki.path / "artifact.bin").write_bytes(broken)
    data = sign(pki)
    (pki.path / "artifact.bin").write_bytes(artifact())
    with pytest.raises(ArtifactRejected, match="another hash"):
        verify(data, expected(pki), broken)


@pytest.mark.parametrize("image_hash", [Hash.SHA256, Hash.SHA512])
def test_hashes_of_images(pkis, image_hash):
    pki = pkis["p256"]
    (pki.path / "artifact.bin").write_bytes(artifact(image_hash))
    data = sign(pki)
    (pki.path / "artifact.bin").write_bytes(artifact())
    verify(data, expected(pki), artifact(image_hash))


def test_a_signature_block_must_not_overwrite(pkis):
    """cst writes it over whatever is there: here, over a second container."""
    pki = pkis["p256"]
    crowded = bytearray(artifact())
    crowded[OFFSET + BLOCK + 0x100] = 0x87
    (pki.path / "artifact.bin").write_bytes(crowded)
    data = sign(pki)
    (pki.path / "artifact.bin").write_bytes(artifact())
    with pytest.raises(ArtifactRejected, match="overwrites"):
        verify(data, expected(pki), bytes(crowded))


def refused(data: bytes, wanted: Expected) -> bool:
    try:
        verify(data, wanted)
    except (SigningFailed, ArtifactRejected):
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_refused(pkis, made, kind):
    data, wanted = made[kind], expected(pkis[kind])
    assert not refused(data, wanted)
    end = OFFSET + ahab.parse_header(data[OFFSET:]).length
    for at in (0, 3, OFFSET - 1, *range(OFFSET, end), end, *range(0x2000, len(data), 71), len(data) - 1):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        assert refused(bytes(damaged), wanted), f"a flipped bit in byte {at:#x} was accepted"


def test_other_sizes_are_refused(pkis, made):
    data, wanted = made["p256"], expected(pkis["p256"])
    assert refused(data + b"\0", wanted)
    for length in (*range(0, len(data), 19), len(data) - 1):
        assert refused(data[:length], wanted)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damage_ends_in_the_own_errors(pkis, made, data):
    length = ahab.parse_header(made["p256"][OFFSET:]).length
    container = bytearray(made["p256"][OFFSET : OFFSET + length])
    for _ in range(data.draw(st.integers(1, 4))):
        places = st.integers(0, 40) | st.integers(BLOCK, BLOCK + 40) | st.integers(0, length - 1)
        at = data.draw(places)
        patch = data.draw(st.binary(max_size=8) | st.sampled_from([b"\xff\xff", bytes(4)]))
        container[at : at + len(patch)] = patch
    whole = made["p256"][:OFFSET] + bytes(container) + made["p256"][OFFSET + length :]
    assert refused(whole, expected(pkis["p256"])) or whole == made["p256"]
    del container[data.draw(st.integers(0, len(container))) :]
    with suppress(AhabError):
        ahab.parse(bytes(container))
    with suppress(AhabError):
        ahab.parse_header(bytes(container))


@given(st.binary(max_size=300))
def test_any_bytes_end_in_the_own_error(data):
    for parse in (ahab.parse, ahab.parse_header, ahab.parse_srk_table):
        with suppress(AhabError):
            parse(data)
        with suppress(AhabError):
            parse(b"\0\x30\0\x87" + data)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_damaged_srk_table_ends_in_the_own_error(pkis, data):
    table = bytearray(pkis[data.draw(st.sampled_from(["rsa2048", "p521"]))].table)
    for _ in range(data.draw(st.integers(0, 3))):
        table[data.draw(st.integers(0, 40) | st.integers(0, len(table) - 1))] = data.draw(st.integers(0, 255))
    del table[data.draw(st.integers(0, len(table))) :]
    with suppress(AhabError):
        assert ahab.parse_srk_table(bytes(table)).raw == table
