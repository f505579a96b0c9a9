import gzip
import io
import tarfile

import pytest

from signers.imx_keys import UNPACKED_MAX_BYTES, KeySet
from tokens.errors import KeyAmbiguous, KeyNotFound, KeyUnusable

TABLE = b"\xd7\x00\x04\x40"


def tarball(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_a_tarball_is_read_by_base_names() -> None:
    keyset = KeySet.parse(
        tarball({"./keys/A_key.pem": b"k", "x/keys/key_pass.txt": b"p", "crts/A_crt.pem": b"c", "crts/T.bin": TABLE})
    )
    assert keyset.certificate("../crts/A_crt.pem") == b"c"
    assert keyset.key_of("../crts/A_crt.pem") == ("A_key.pem", b"k")
    assert keyset.private["key_pass.txt"] == b"p"
    assert keyset.srk_table("any/name.bin") == TABLE
    with pytest.raises(KeyNotFound):
        keyset.certificate("keys/A_key.pem")
    with pytest.raises(KeyNotFound):
        keyset.key_of("A.pem")


def test_the_table_alone() -> None:
    assert KeySet.parse(TABLE).srk_table("whatever") == TABLE


def test_the_csf_chooses_among_tables() -> None:
    keyset = KeySet.parse(tarball({"crts/T1.bin": TABLE, "crts/T2.bin": TABLE + b"2"}))
    assert keyset.srk_table("crts/T2.bin") == TABLE + b"2"
    with pytest.raises(KeyAmbiguous, match="2 SRK tables"):
        keyset.srk_table("T3.bin")
    with pytest.raises(KeyNotFound):
        KeySet.parse(tarball({"crts/A_crt.pem": b"c"})).srk_table("T1.bin")


def test_links_are_no_files() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("crts/A_crt.pem")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    with pytest.raises(KeyNotFound):
        KeySet.parse(buffer.getvalue()).certificate("A_crt.pem")


@pytest.mark.parametrize(
    "content",
    [b"", b"text", b"\x1f\x8b", gzip.compress(b"no tar"), tarball({"a": b"x"})[:-20],
     gzip.compress(bytes(UNPACKED_MAX_BYTES + 1))],
    ids=["empty", "text", "two bytes", "no tar", "cut off", "too long"],
)  # fmt: skip
def test_what_is_no_key_set(content: bytes) -> None:
    with pytest.raises(KeyUnusable):
        KeySet.parse(content)
