"""Mender artifacts, through HTTP, by keys of every provider, held against Debian's mender-artifact."""

import hashlib
import subprocess
import sys
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.conftest import flipped

PAYLOAD = hashlib.shake_256(b"payload").digest(2_000_000)
KEYS = {
    "demo-token": "mender-rsa", "demo-token-p256": "mender-p256",
    "demo-file": "file-mender-rsa", "demo-file-p256": "file-mender-p256",
    "demo-yubihsm": "file-mender-rsa", "demo-yubihsm-p256": "file-mender-p256",
}  # fmt: skip


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that is open to clients."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="session")
def mender_service(make_yubihsm: Callable[[], Any], s3: tuple[str, Any], place: Path, start: Callable[..., Any]) -> Any:
    """The service on the fixtures, with places for artifacts."""
    tables = tomllib.loads(make_yubihsm().config)
    url, client = s3
    client.create_bucket(Bucket="artifacts")
    return start(
        {
            **{f"providers.{name}": table for name, table in tables["providers"].items()},
            "grants": tables["grants"],
            "signers.mender": {"directories": [str(place)]},
            "signers.mender.buckets": [{"bucket": "artifacts", "prefix": "releases", "endpoint_url": url}],
        }
    )


@pytest.fixture(scope="session")
def unsigned(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("unsigned")
    (directory / "payload.bin").write_bytes(PAYLOAD)
    command = ["mender-artifact", "write", "module-image", "-T", "module", "-f", "payload.bin", "-o", "a.mender"]
    subprocess.run([*command, "-n", "release-1", "-t", "board"], cwd=directory, capture_output=True, check=True)
    return (directory / "a.mender").read_bytes()


@pytest.fixture
def accepts(softhsm: Any, tmp_path: Path) -> Callable[[str, bytes], bool]:
    """What `mender-artifact validate` says, by a distro's key."""

    def check(distro: str, artifact: bytes) -> bool:
        (tmp_path / "checked.mender").write_bytes(artifact)
        command = ["mender-artifact", "validate", "-k", softhsm.public_key(KEYS[distro]), "checked.mender"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0

    return check


def post(service: Any, distro: str, artifact: bytes | None = None, **fields: str) -> httpx.Response:
    files = {"artifact": ("a.mender", artifact)} if artifact is not None else None
    form = {"distro": distro, **{name.replace("_", "-"): value for name, value in fields.items()}}
    if files is None:
        files = {name: (None, value) for name, value in form.items()}  # type: ignore[misc]  # multipart all the same
        form = {}
    return httpx.post(service.url + "/sign/mender", data=form, files=files, timeout=60)


@pytest.mark.parametrize("distro", KEYS)
def test_mender_artifact_accepts_an_upload(
    mender_service: Any, accepts: Callable[[str, bytes], bool], unsigned: bytes, distro: str
) -> None:
    answer = post(mender_service, distro, unsigned)
    assert answer.status_code == 200, answer.text
    signed = answer.content
    assert answer.headers["Content-Disposition"] == 'attachment; filename="a.mender"'
    assert accepts(distro, signed)
    # true, and not what was signed: two lines of the manifest change places
    start = signed.index(b"  data/0000/") - 64
    first, second = signed[start:].split(b"\n", 2)[:2]
    assert not accepts(distro, signed.replace(first + b"\n" + second, second + b"\n" + first))
    for at in (start, signed.index(b"manifest.sig") + 520, len(signed) // 2):
        assert not accepts(distro, flipped(signed, at))
    assert post(mender_service, distro, signed).content == signed
    mender_service.assert_no_files()


def test_a_signature_that_is_no_good_does_not_lock_the_key(mender_service: Any, unsigned: bytes) -> None:
    signed = post(mender_service, "demo-token", unsigned).content
    at = signed.index(b"manifest.sig") + 520
    answer = post(mender_service, "demo-token", flipped(signed, at))
    assert answer.status_code == 422
    assert "not by this key" in answer.json()["detail"]
    assert post(mender_service, "demo-token", unsigned).content == signed


def contract_s_line(service: Any, distro: str, uri: str) -> str:
    return (
        "curl --connect-timeout 30 --max-time 1800 --retry 3 --silent --fail -X POST"
        f' -F distro={distro} -F "artifact-uri={uri}" --output OUT {service.url}/sign/mender'
    )


def test_the_contract_s_line_verbatim(
    mender_service: Any, s3: tuple[str, Any], accepts: Callable[[str, bytes], bool], unsigned: bytes,
    place: Path, tmp_path: Path,
) -> None:  # fmt: skip
    (place / "build").mkdir()
    path = place / "build/a.mender"
    path.write_bytes(unsigned)
    _, client = s3
    client.put_object(Bucket="artifacts", Key="releases/a.mender", Body=unsigned)

    def read_object() -> bytes:
        content: bytes = client.get_object(Bucket="artifacts", Key="releases/a.mender")["Body"].read()
        return content

    for uri, read in ((f"file://{path}", path.read_bytes), ("s3://artifacts/releases/a.mender", read_object)):
        line = contract_s_line(mender_service, "demo-token", uri)
        subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True)
        assert (tmp_path / "OUT").read_text() == "The artifact is signed.\n"
        signed = read()
        assert accepts("demo-token", signed)
        # posted again, as clients do
        before = path.stat()
        subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True)
        assert "already" in (tmp_path / "OUT").read_text()
        assert read() == signed
        assert path.stat().st_mtime_ns == before.st_mtime_ns
        # by another key only where that is asked
        answer = post(mender_service, "demo-file-p256", artifact_uri=uri)
        assert answer.status_code == 422
        assert answer.json()["hint"] == "Send `force=1` to replace the signature."
        assert read() == signed
        answer = post(mender_service, "demo-file-p256", artifact_uri=uri, force="1")
        assert answer.status_code == 200, answer.text
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert accepts("demo-file-p256", read())
    assert [each.name for each in path.parent.iterdir()] == ["a.mender"]
    mender_service.assert_no_files()


def test_the_command_line(
    mender_service: Any, accepts: Callable[[str, bytes], bool], unsigned: bytes, tmp_path: Path
) -> None:
    (tmp_path / "in.mender").write_bytes(unsigned)
    hsmsign = Path(sys.executable).with_name("hsmsign")
    command = [hsmsign, "sign", "mender", "--server", mender_service.url, "--distro", "demo-file", "--force", "true"]
    subprocess.run([*command, "--artifact", "in.mender", "-o", "out.mender"], cwd=tmp_path, check=True)
    assert accepts("demo-file", (tmp_path / "out.mender").read_bytes())


def test_many_at_once(mender_service: Any, accepts: Callable[[str, bytes], bool], unsigned: bytes, place: Path) -> None:
    path = place / "wanted.mender"
    path.write_bytes(unsigned)
    with ThreadPoolExecutor(8) as pool:
        uploads = list(pool.map(lambda _: post(mender_service, "demo-token", unsigned), range(8)))
        in_place = list(
            pool.map(lambda _: post(mender_service, "demo-token-p256", artifact_uri=f"file://{path}"), range(8))
        )
    assert {answer.status_code for answer in uploads} == {200}
    assert len({answer.content for answer in uploads}) == 1
    # who comes second, and read it before, is told so
    statuses = {answer.status_code for answer in in_place}
    assert 200 in statuses
    assert statuses <= {200, 409}
    assert accepts("demo-token-p256", path.read_bytes())
    assert not [each for each in place.iterdir() if each.name.startswith(".")]


def test_no_way_leads_out_of_what_is_open(
    mender_service: Any, unsigned: bytes, place: Path, tmp_path: Path, s3: tuple[str, Any]
) -> None:
    secret = tmp_path / "secret.mender"
    secret.write_bytes(unsigned)
    (place / "link.mender").symlink_to(secret)
    (place / "link").symlink_to(tmp_path)
    _, client = s3
    client.put_object(Bucket="artifacts", Key="secret.mender", Body=unsigned)
    for uri, status, slug in (
        (f"file://{secret}", 403, "location-not-allowed"),
        (f"file://{place}/../{tmp_path.name}/secret.mender", 403, "location-not-allowed"),
        (f"file://{place}/%2e%2e/secret.mender", 403, "location-not-allowed"),
        ("file:///etc/passwd", 403, "location-not-allowed"),
        (f"file://{place}/link.mender", 404, "artifact-not-found"),
        (f"file://{place}/link/secret.mender", 404, "artifact-not-found"),
        (f"file://{place}/none.mender", 404, "artifact-not-found"),
        ("s3://artifacts/secret.mender", 403, "location-not-allowed"),
        ("s3://artifacts/releases/../secret.mender", 403, "location-not-allowed"),
        ("s3://keys/swupdate/rsa-private.key", 403, "location-not-allowed"),
        ("s3://artifacts/releases/none", 404, "artifact-not-found"),
        ("http://127.0.0.1/a", 400, "invalid-request"),
        (str(secret), 400, "invalid-request"),
    ):
        answer = post(mender_service, "demo-token", artifact_uri=uri, force="1")
        assert (answer.status_code, answer.json()["type"]) == (status, f"/problems/{slug}"), uri
        assert answer.json()["hint"]
    assert secret.read_bytes() == unsigned
    assert client.get_object(Bucket="artifacts", Key="secret.mender")["Body"].read() == unsigned
    mender_service.assert_no_files()


@pytest.mark.parametrize(
    ("distro", "change", "refusal"),
    [
        ("unknown", bytes, (404, "key-not-found")),
        ("../x", bytes, (400, "invalid-request")),
        ("demo-token", lambda content: flipped(content, len(content) // 2), (422, "artifact-rejected")),
        ("demo-token", lambda content: content[:-100_000], (422, "artifact-rejected")),
        ("demo-token", lambda _content: b"no artifact", (422, "artifact-rejected")),
        ("demo-token", lambda _content: b"", (422, "artifact-rejected")),
    ],
)
def test_each_refusal(
    mender_service: Any, unsigned: bytes, place: Path, distro: str, change: Any, refusal: tuple[int, str]
) -> None:
    path = place / "refused.mender"
    path.write_bytes(change(unsigned))
    for answer in (
        post(mender_service, distro, change(unsigned)),
        post(mender_service, distro, artifact_uri=f"file://{path}"),
    ):
        assert (answer.status_code, answer.json()["type"]) == (refusal[0], f"/problems/{refusal[1]}"), answer.text
        assert str(place) not in answer.text
    assert path.read_bytes() == change(unsigned)
    mender_service.assert_no_files()


def test_one_artifact_a_request(mender_service: Any, unsigned: bytes) -> None:
    for answer in (
        post(mender_service, "demo-token"),
        post(mender_service, "demo-token", unsigned, artifact_uri="file:///srv/a"),
    ):
        assert answer.status_code == 400
        assert "send one" in answer.json()["detail"]
