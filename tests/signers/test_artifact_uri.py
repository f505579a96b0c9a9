"""Artifacts that stay where they are: in files of a real file system, and in moto's S3 server."""

import asyncio
import contextlib
import gc
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from pydantic import ValidationError

from signers import artifact_uri
from signers.artifact_uri import StoreSettings
from signers.mender import MenderForm
from signers.signer import FileRange, Job, Signed
from tests.conftest import ROOT
from tokens import s3
from tokens.errors import (
    ArtifactChanged,
    ArtifactNotFound,
    ArtifactRejected,
    LocationNotAllowed,
    StoreFailed,
    StoreProblem,
)
from tokens.s3 import BucketSettings

CONTENT = b"an artifact\n" * 1000


@pytest.fixture
def job(tmp_path: Path, keys_of: Any, pairs: Any) -> Job:
    directory = tmp_path / "job"
    directory.mkdir()
    return Job(lambda: directory, keys_of(pairs["p256"]), asyncio.to_thread)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory that is open to clients, beside one that is not."""
    place = tmp_path / "artifacts"
    (place / "sub").mkdir(parents=True)
    (place / "sub/a.mender").write_bytes(CONTENT)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/a.mender").write_bytes(b"secret")
    return place


def fetched(job: Job, path: Path | str, *directories: Path, **more: Any) -> artifact_uri.Stored:
    settings = StoreSettings(directories=directories, **more)
    return asyncio.run(artifact_uri.fetch(f"file://{path}", settings, job))


def signed(stored: artifact_uri.Stored) -> Signed:
    """The artifact with something put in its middle."""
    size = stored.upload.size
    return Signed((FileRange(stored.upload, 0, 12), b"signed\n", FileRange(stored.upload, 12, size - 12)), "a")


EXPECTED = CONTENT[:12] + b"signed\n" + CONTENT[12:]


def test_a_file_is_replaced(job: Job, place: Path) -> None:
    path = place / "sub/a.mender"
    path.chmod(0o640)
    before = path.stat()
    with path.open("rb") as reader:
        stored = fetched(job, path, place)
        assert stored.upload.size == len(CONTENT)
        assert stored.upload.read(0, 20_000) == CONTENT
        asyncio.run(stored.replace(signed(stored)))
        assert reader.read() == CONTENT  # who reads the old one is not disturbed
    assert path.read_bytes() == EXPECTED
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.stat().st_uid == before.st_uid
    assert [each.name for each in path.parent.iterdir()] == ["a.mender"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_keeps_its_owner(job: Job, place: Path) -> None:
    path = place / "sub/a.mender"
    os.chown(path, 1234, 2345)
    stored = fetched(job, path, place)
    asyncio.run(stored.replace(signed(stored)))
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)


def test_ways_to_spell_it(job: Job, place: Path) -> None:
    (place / "ä b#.mender").write_bytes(b"x")
    for uri in (f"localhost{place}/sub/a.mender", f"{place}//sub/./a.mender", f"{place}/%73ub/a.mender"):
        assert fetched(job, uri, place).upload.size == len(CONTENT)
    assert fetched(job, f"{place}/%C3%A4%20b%23.mender", place).upload.size == 1


@pytest.mark.parametrize(
    "way",
    [
        "../secret/a.mender", "sub/../../secret/a.mender", "%2e%2e/secret/a.mender", "..%2fsecret/a.mender",
        "sub/..", "", ".", "sub/../sub/a.mender", "%00", "../artifacts-other/a.mender", "../artifactss",
    ],
)  # fmt: skip
def test_no_way_leads_out(job: Job, place: Path, way: str) -> None:
    (place.parent / "artifacts-other").mkdir()
    (place.parent / "artifacts-other/a.mender").write_bytes(b"secret")
    with pytest.raises(LocationNotAllowed):
        fetched(job, f"{place}/{way}", place)


def test_nothing_is_open_unless_it_is_named(job: Job, place: Path) -> None:
    for path in (place / "sub/a.mender", "/etc/passwd", "/proc/self/environ"):
        with pytest.raises(LocationNotAllowed) as caught:
            fetched(job, path)
        assert str(path) not in caught.value.message + caught.value.hint


@pytest.mark.parametrize("way", ["link.mender", "link/a.mender", "sub/up/a.mender", "loop", "sub/self/a.mender"])
def test_no_link_is_followed(job: Job, place: Path, way: str) -> None:
    secret = place.parent / "secret"
    (place / "link.mender").symlink_to(secret / "a.mender")
    (place / "link").symlink_to(secret)
    (place / "sub/up").symlink_to("../../secret")
    (place / "loop").symlink_to("loop")
    (place / "sub/self").symlink_to(".")  # not even one that stays within
    with pytest.raises(ArtifactNotFound):
        fetched(job, place / way, place)


def test_the_way_to_a_directory_of_the_settings_may_have_links(job: Job, place: Path) -> None:
    link = place.parent / "link"
    link.symlink_to(place)
    assert fetched(job, link / "sub/a.mender", link).upload.size == len(CONTENT)
    (place / "inner").symlink_to("sub")
    assert fetched(job, place / "inner/a.mender", place, place / "inner").upload.size == len(CONTENT)


def test_what_is_no_file(job: Job, place: Path) -> None:
    os.mkfifo(place / "fifo")
    for name in ("none", "sub", "sub/a.mender/b", "fifo"):
        with pytest.raises(ArtifactNotFound):
            fetched(job, place / name, place)
    (place / "zero").symlink_to("/dev/zero")
    with pytest.raises(ArtifactNotFound):
        fetched(job, "/dev/null", Path("/dev"))
    with pytest.raises(ArtifactRejected, match="are allowed"):
        fetched(job, place / "sub/a.mender", place, artifact_max_bytes=10)


@pytest.mark.parametrize("name", ["a" * 300, "a" * 5000])
def test_names_that_no_file_has(job: Job, place: Path, name: str) -> None:
    with pytest.raises(StoreFailed, match="File name too long"):
        fetched(job, place / name, place)


def swapped(place: Path) -> None:
    """Puts a link to the secret in the place of the directory."""
    (place / "sub").rename(place.parent / "moved")
    (place / "sub").symlink_to("../secret")


def test_a_directory_that_is_swapped_for_a_link_leads_nowhere(job: Job, place: Path) -> None:
    stored = fetched(job, place / "sub/a.mender", place)
    swapped(place)
    assert stored.upload.read(0, 20_000) == CONTENT
    asyncio.run(stored.replace(signed(stored)))
    # it went where the directory went
    assert (place.parent / "moved/a.mender").read_bytes() == EXPECTED
    assert (place.parent / "secret/a.mender").read_bytes() == b"secret"


def test_a_link_that_is_put_in_a_file_s_place_is_not_followed(job: Job, place: Path) -> None:
    stored = fetched(job, place / "sub/a.mender", place)
    (place / "sub/a.mender").unlink()
    (place / "sub/a.mender").symlink_to("../../secret/a.mender")
    with pytest.raises(ArtifactChanged):
        asyncio.run(stored.replace(signed(stored)))
    assert (place.parent / "secret/a.mender").read_bytes() == b"secret"
    assert [each.name for each in (place / "sub").iterdir()] == ["a.mender"]


def test_a_race_never_reaches_the_secret(job: Job, place: Path) -> None:
    """A component becomes a link and a directory again, as fast as it can, while artifacts are fetched and replaced."""
    stop = threading.Event()
    sub, real, link = place / "sub", place / "real", place / "swapping"

    def swap() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                link.symlink_to("../secret")
                sub.rename(real)
                link.rename(sub)
                sub.unlink()
                real.rename(sub)

    outcomes = set()
    with ThreadPoolExecutor(1) as pool:
        swapping = pool.submit(swap)
        try:
            for _ in range(400):
                try:
                    stored = fetched(job, sub / "a.mender", place)
                    content = stored.upload.read(0, 100_000)
                    outcomes.add(content == b"secret")
                    asyncio.run(stored.replace(Signed((content,), "a")))
                except StoreProblem as error:
                    outcomes.add(type(error))
        finally:
            stop.set()
        swapping.result()
    assert True not in outcomes
    assert outcomes <= {False, ArtifactNotFound}
    assert (place.parent / "secret/a.mender").read_bytes() == b"secret"
    assert [each.name for each in (place.parent / "secret").iterdir()] == ["a.mender"]


def test_what_changed_meanwhile_is_not_replaced(job: Job, place: Path) -> None:
    path = place / "sub/a.mender"
    other = CONTENT[:-1] + b"!"
    for change in (
        lambda: path.write_bytes(other),
        lambda: (path.with_suffix(".new").write_bytes(other), path.with_suffix(".new").rename(path)),
        lambda: path.write_bytes(CONTENT[:100]),
    ):
        path.write_bytes(CONTENT)
        stored = fetched(job, path, place)
        change()
        with pytest.raises(ArtifactChanged) as caught:
            asyncio.run(stored.replace(signed(stored)))
        assert caught.value.hint == "Try again."
        assert path.read_bytes() in (other, CONTENT[:100])
        assert [each.name for each in path.parent.iterdir()] == ["a.mender"]
    stored = fetched(job, path, place)
    path.unlink()
    with pytest.raises(ArtifactNotFound):
        asyncio.run(stored.replace(signed(stored)))
    shutil.rmtree(path.parent)
    with pytest.raises(ArtifactNotFound):
        asyncio.run(stored.replace(signed(stored)))


def test_of_many_at_once_one_replaces(job: Job, place: Path) -> None:
    path = place / "sub/a.mender"
    stored = [fetched(job, path, place) for _ in range(8)]
    outcomes = []

    def replace(each: artifact_uri.Stored) -> None:
        try:
            asyncio.run(each.replace(signed(each)))
            outcomes.append("replaced")
        except ArtifactChanged:
            outcomes.append("changed")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(replace, stored))
    assert "replaced" in outcomes
    assert len(outcomes) == 8
    assert path.read_bytes() == EXPECTED
    assert [each.name for each in path.parent.iterdir()] == ["a.mender"]


def descriptors() -> int:
    gc.collect()  # asyncio.run leaves an error in a cycle with its traceback
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_descriptor_is_left(job: Job, place: Path) -> None:
    before = descriptors()
    for name in ("a.mender", "none"):
        with contextlib.suppress(StoreProblem):
            stored = fetched(job, place / "sub" / name, place)
            assert descriptors() == before + 2
            asyncio.run(stored.replace(signed(stored)))
            del stored
    assert descriptors() == before


@pytest.mark.parametrize(
    "uri",
    [
        "/srv/a",
        "http://x/y",
        "file://host/srv/a",
        "file:///",
        "file:///a?b",
        "file:///a#b",
        "s3://bucket",
        "s3:///a",
        "",
    ],
)
def test_what_is_no_such_uri(uri: str) -> None:
    with pytest.raises(ValidationError, match="artifact-uri"):
        MenderForm.model_validate({"distro": "poky", "artifact-uri": uri})


@pytest.mark.parametrize("directory", ["srv", "/srv/../etc", ""])
def test_directories_are_absolute(directory: str) -> None:
    with pytest.raises(ValidationError, match="absolute"):
        StoreSettings(directories=(directory,))


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """moto's S3 server, and credentials for it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_PROFILE", raising=False)
        for name, value in {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def client(endpoint: str) -> Iterator[Any]:
    """The bucket `artifacts` with an artifact."""
    with contextlib.closing(boto3.client("s3", endpoint_url=endpoint)) as client:
        client.create_bucket(Bucket="artifacts")
        client.put_object(
            Bucket="artifacts", Key="open/a b+.mender", Body=CONTENT, ContentType="application/x-mender",
            CacheControl="no-cache", Metadata={"build": "42"}, Tagging="team=boot&stage=a%2Bb",
        )  # fmt: skip
        client.put_object(Bucket="artifacts", Key="closed/a", Body=CONTENT)
        yield client


@pytest.fixture
def fetch_object(endpoint: str, client: Any, job: Job) -> Callable[..., artifact_uri.Stored]:
    def fetch(uri: str, **more: Any) -> artifact_uri.Stored:
        bucket = {"bucket": "artifacts", "prefix": "open", "endpoint_url": endpoint, "attempts": 1} | more
        settings = StoreSettings(buckets=(BucketSettings(**bucket),))
        return asyncio.run(artifact_uri.fetch(uri, settings, job))

    return fetch


def content_of(client: Any) -> bytes:
    return client.get_object(Bucket="artifacts", Key="open/a b+.mender")["Body"].read()


def test_an_object_is_replaced_and_keeps_what_is_said_of_it(client: Any, fetch_object: Any) -> None:
    stored = fetch_object("s3://artifacts/open/a b+.mender")
    assert stored.upload.size == len(CONTENT)
    assert stored.upload.filename == "a b+.mender"
    asyncio.run(stored.replace(signed(stored)))
    answer = client.get_object(Bucket="artifacts", Key="open/a b+.mender")
    assert answer["Body"].read() == EXPECTED
    assert (answer["ContentType"], answer["CacheControl"], answer["Metadata"]) == (
        "application/x-mender", "no-cache", {"build": "42"},
    )  # fmt: skip
    tags = client.get_object_tagging(Bucket="artifacts", Key="open/a b+.mender")["TagSet"]
    assert {tag["Key"]: tag["Value"] for tag in tags} == {"team": "boot", "stage": "a+b"}


def test_an_object_that_changed_meanwhile_is_not_replaced(client: Any, fetch_object: Any, job: Job) -> None:
    stored = fetch_object("s3://artifacts/open/a b+.mender")
    client.put_object(Bucket="artifacts", Key="open/a b+.mender", Body=b"another")
    with pytest.raises(ArtifactChanged):
        asyncio.run(stored.replace(signed(stored)))
    assert content_of(client) == b"another"
    client.delete_object(Bucket="artifacts", Key="open/a b+.mender")
    with pytest.raises(ArtifactNotFound):
        asyncio.run(stored.replace(signed(stored)))


@pytest.mark.parametrize(
    "uri",
    [
        "s3://artifacts/closed/a", "s3://other/open/a", "s3://artifacts/open/../closed/a", "s3://artifacts/open",
        "s3://artifacts/opener/a", "s3://artifacts/open//a", "s3://artifacts/open/./a", "s3://artifacts/open/",
        "s3://artifacts//open/a",
    ],
)  # fmt: skip
def test_other_objects_are_not_open(fetch_object: Any, uri: str) -> None:
    with pytest.raises(LocationNotAllowed):
        fetch_object(uri)


def test_what_s3_says_is_told(fetch_object: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactNotFound):
        fetch_object("s3://artifacts/open/none")
    with pytest.raises(StoreFailed, match="NoSuchBucket"):
        fetch_object("s3://none/open/a", bucket="none")
    with pytest.raises(StoreFailed, match="cannot be used"):
        fetch_object("s3://artifacts/open/a", endpoint_url="http://127.0.0.1:9", connect_timeout_s=1)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreFailed, match="NoCredentials"):
        fetch_object("s3://artifacts/open/a b+.mender")


def test_objects_are_bounded(fetch_object: Any, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "OBJECT_MAX_BYTES", len(CONTENT) - 1)
    with pytest.raises(ArtifactRejected, match="are allowed"):
        fetch_object("s3://artifacts/open/a b+.mender")


async def test_a_fetch_that_nobody_waits_for_is_broken_off(endpoint: str, job: Job) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        bucket = BucketSettings(bucket="artifacts", endpoint_url=url, read_timeout_s=600)
        fetching = asyncio.create_task(artifact_uri.fetch("s3://artifacts/a", StoreSettings(buckets=(bucket,)), job))
        connection, _ = await asyncio.to_thread(silent.accept)
        with connection:
            await asyncio.to_thread(connection.recv, 1)
            fetching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetching
            for thread in threading.enumerate():
                if thread.name.startswith("s3-artifact"):
                    await asyncio.to_thread(thread.join, 30)
                    assert not thread.is_alive()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another")
def test_a_process_that_nobody_may_look_into_reads_what_it_opened(place: Path) -> None:
    """The service is not dumpable: /proc then belongs to root, and its own files must be open to it all the same."""
    program = """
import asyncio, ctypes, os, sys
from pathlib import Path
from signers import artifact_uri
from signers.signer import Job
os.setgid(65534), os.setuid(65534)
assert ctypes.CDLL(None).prctl(4, 0, 0, 0, 0) == 0 and not os.access("/proc/self/mem", os.R_OK)
settings = artifact_uri.StoreSettings(directories=(Path(sys.argv[1]),))
job = Job(Path, None, asyncio.to_thread)
stored = asyncio.run(artifact_uri.fetch(f"file://{sys.argv[1]}/sub/a.mender", settings, job))
sys.stdout.buffer.write(stored.upload.read(0, 100_000))
"""
    opened = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        opened.chmod(0o755)
        shutil.copytree(place, opened / "artifacts")
        done = subprocess.run(
            [sys.executable, "-c", program, opened / "artifacts"], cwd=ROOT, capture_output=True, check=True
        )
    finally:
        shutil.rmtree(opened)
    assert done.stdout == CONTENT
