"""EKB images: which version and keys each L4T gets, and what is refused."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from signers.ekb import Ekb, EkbForm, EkbSettings
from signers.signer import GrantedFile, Job
from tests.signers.formats.test_ekb import IV, KEK2, OEM_K1, VECTOR, opened
from tokens.errors import KeyNotFound, KeyUnsuited, KeyUnusable, SignatureMismatch
from tokens.symmetric import SymmetricAlgorithm
from tokens.symmetric_file import MemorySymmetricKey, load_symmetric_key
from tokens.threads import Threads

KERNEL, DISK, AUTH = (bytes([number]) * 16 for number in range(1, 4))
FILES = {"kernel": KERNEL, "disk": DISK, "auth": AUTH, "fixed-vector": VECTOR}
ROLE = {role.name: role for role in Ekb.roles}


class Fickle(MemorySymmetricKey):
    """A key on a token that goes wrong from its second answer on."""

    answers = 0

    async def encrypt_ecb(self, data: bytes) -> bytes:
        self.answers += 1
        answer = await super().encrypt_ecb(data)
        return answer if self.answers == 1 else answer[::-1]


@dataclass
class Keys:
    """`signers.signer.Keys`: a fuse key, and files in NVIDIA's hexadecimal."""

    fuse: str
    threads: Threads
    kind: type[MemorySymmetricKey] = MemorySymmetricKey
    files: dict[str, bytes] = field(default_factory=dict)

    @asynccontextmanager
    async def open_symmetric(self, role: str, *, machine: str) -> AsyncIterator[MemorySymmetricKey]:
        assert (role, machine) == ("fuse", "demo")
        yield self.kind(*load_symmetric_key(self.fuse.encode(), ROLE[role].algorithms), "fuse", self.threads)

    async def read(self, role: str, *, machine: str) -> GrantedFile:
        assert machine == "demo"
        assert ROLE[role].is_file
        if role not in self.files:
            raise KeyNotFound("none", "grant one")
        return GrantedFile(self.files[role].hex().encode() + b"\n")


@pytest.fixture
def make(tmp_path: Path, threads: Threads) -> Callable[..., Any]:
    async def make(
        bspversion: str = "36.4.3",
        *,
        soctype: str = "tegra234",
        fuse: str = OEM_K1,
        kind: type[MemorySymmetricKey] = MemorySymmetricKey,
        settings: EkbSettings | None = None,
        **files: bytes | None,
    ) -> bytes:
        form = EkbForm.model_validate({"machine": "demo", "soctype": soctype, "bspversion": bspversion})
        changed = FILES | {name.replace("_", "-"): content for name, content in files.items()}
        granted = {name: content for name, content in changed.items() if content is not None}
        job = Job(lambda: tmp_path, Keys(fuse, threads, kind, granted), asyncio.to_thread, settings=settings)
        signed = await Ekb().sign(form, job)
        assert signed.filename == "ekb.img"
        return b"".join(signed.chunks(65536))

    return make


ALL = {1: KERNEL, 2: DISK, 4: AUTH}
V1 = EkbSettings(version_36_2="1.0")


@pytest.mark.parametrize(
    ("bspversion", "settings", "version", "keys"),
    [
        ("35.1", None, (0, 0), {1: KERNEL, 2: DISK}),
        ("35.1.0", None, (0, 0), {1: KERNEL, 2: DISK}),
        ("35.2.1", None, (1, 0), ALL),
        ("35.6.4", None, (1, 0), ALL),
        ("36.2.0", None, (2, 0), ALL),
        ("36.3", None, (2, 0), ALL),
        ("36.2.0", V1, (1, 0), ALL),
        ("36.3", V1, (1, 0), ALL),
        ("36.4.3", V1, (2, 0), ALL),
        ("38.2.1", None, (2, 0), ALL),
    ],
)
@pytest.mark.parametrize(("soctype", "fuse"), [("tegra194", KEK2), ("tegra234", OEM_K1)])
async def test_each_l4t(
    make: Any,
    *,
    soctype: str,
    fuse: str,
    bspversion: str,
    settings: EkbSettings | None,
    version: tuple[int, int],
    keys: dict[int, bytes],
) -> None:
    image = await make(bspversion, soctype=soctype, fuse=fuse, settings=settings)
    assert (image[12], image[14]) == version
    assert opened(image, fuse, VECTOR) == keys
    assert (await make(bspversion, soctype=soctype, fuse=fuse, settings=settings)) != image  # its IV is another one


async def test_the_vector_of_2_0_is_random(make: Any) -> None:
    images = [await make(fixed_vector=None) for _ in range(2)]
    vectors = {image[16:32] for image in images}
    assert len(vectors) == 2
    assert VECTOR not in vectors
    assert IV not in vectors


@pytest.mark.parametrize("bspversion", ["35.4.1", "36.4.3"])
async def test_what_may_be_missing(make: Any, bspversion: str) -> None:
    assert opened(await make(bspversion, kernel=None, disk=None), OEM_K1, VECTOR) == {4: AUTH}
    assert opened(await make(bspversion, kernel=KERNEL * 2), OEM_K1, VECTOR) == ALL | {1: KERNEL * 2}


@pytest.mark.parametrize(
    ("bspversion", "missing"),
    [
        ("35.1", "kernel"),
        ("35.1", "disk"),
        ("35.1", "fixed_vector"),
        ("35.4.1", "fixed_vector"),
        ("35.4.1", "auth"),
        ("36.4.3", "auth"),
    ],
)
async def test_what_may_not(make: Any, bspversion: str, missing: str) -> None:
    with pytest.raises(KeyNotFound):
        await make(bspversion, **{missing: None})


@pytest.mark.parametrize(("soctype", "fuse"), [("tegra194", OEM_K1), ("tegra234", KEK2)])
async def test_the_fuse_key_of_another_jetson(make: Any, soctype: str, fuse: str) -> None:
    with pytest.raises(KeyUnsuited, match=soctype):
        await make(soctype=soctype, fuse=fuse)


@pytest.mark.parametrize(
    ("file", "content"), [("auth", b""), ("disk", bytes(15)), ("kernel", bytes(64)), ("fixed_vector", bytes(32))]
)
async def test_files_of_another_length(make: Any, file: str, content: bytes) -> None:
    with pytest.raises(KeyUnusable, match=file.replace("_", "-")):
        await make("35.4.1", **{file: content})


async def test_a_token_that_goes_wrong(make: Any) -> None:
    with pytest.raises(SignatureMismatch, match="MAC"):
        await make(kind=Fickle)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"soctype": "tegra264"}, "not public"),
        ({"soctype": "tegra186"}, "tegra194"),
        ({"bspversion": "32.7.4"}, "before 35.1"),
        ({"bspversion": "35.0"}, "before 35.1"),
        ({"bspversion": "latest"}, "no version"),
        ({"bspversion": "36"}, "no version"),
        ({"bspversion": "36.4.3.1"}, "no version"),
        ({"bspversion": "3" * 5000 + ".1"}, "no version"),
        ({"machine": "../x"}, "pattern"),
    ],
)
def test_refused(fields: dict[str, str], reason: str) -> None:
    form = {"machine": "demo", "soctype": "tegra234", "bspversion": "36.4.3"}
    with pytest.raises(ValidationError, match=reason):
        EkbForm.model_validate(form | fields)


def test_the_fuse_key_is_for_aes() -> None:
    assert ROLE["fuse"].algorithms == {SymmetricAlgorithm.AES_128, SymmetricAlgorithm.AES_256}
