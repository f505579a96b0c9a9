"""What a signer answers with."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from signers.signer import FileRange, GrantedFile, Signed, Upload

UPLOAD = bytes(range(200))


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_piece_of_an_answer_can_be_read(tmp_path, data):
    path = tmp_path / "upload"
    path.write_bytes(UPLOAD)
    parts, whole = [], b""
    for _ in range(data.draw(st.integers(0, 4))):
        offset = data.draw(st.integers(0, len(UPLOAD)))
        piece = UPLOAD[offset : offset + data.draw(st.integers(0, 50))]
        content = data.draw(st.sampled_from([path, UPLOAD]))
        parts.append(data.draw(st.sampled_from([piece, FileRange(Upload(content, "x", 200), offset, len(piece))])))
        whole += piece
    signed = Signed(tuple(parts), "x")
    assert signed.size == len(whole)
    assert b"".join(signed.chunks(7)) == whole
    offset, length = data.draw(st.integers(0, 220)), data.draw(st.integers(0, 220))
    assert signed.read(offset, length) == whole[offset : offset + length]


def test_a_granted_file_does_not_show_its_content():
    assert "canary" not in repr(GrantedFile(b"canary"))
