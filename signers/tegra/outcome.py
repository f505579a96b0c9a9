"""What NVIDIA's scripts left: looked through, verified, and packed for the client.

Their exit status says nothing: they end with 0 after a traceback, and with signatures of another key.
"""

import hashlib
import mmap
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from signers.archives import CHUNK_BYTES, GZIP, Part, Scratch
from signers.formats import nvda, tar
from signers.formats.nvda import HeaderError
from signers.signer import FileRange, Signed, Upload
from signers.tegra.bsp import COPIES, SocType
from signers.tegra.bundle import NAME
from signers.tegra.service import SALT_BYTES, Made
from tokens.errors import SigningFailed, ToolFailed
from tokens.provider import PublicKey
from tokens.schemes import Ecdsa, Ed25519, Hash, RsaPss, Scheme
from tokens.verify import verify

FLASH_COMMAND = "flashcmd.txt"
"""The script that flashes: a client runs it as doflash.sh."""

PAYLOADS = "payloads"
"""How the names of update payloads, or of their directories, begin."""

FILENAME = "signed-artifact.tar.gz"

OCCURRENCES_MAX = 16_384
"""How often in a payload the magic of headers may stand: four letters, which code may have too."""

_LEFT_OUT = re.compile(
    rf"(?:signed|encrypted_signed|enc_signed|signed_bootimg_dir|[0-9]+|rollback|{COPIES})/.*|flash\.xml(?:\.tmp)?"
)
"""What the scripts leave that is of no use to a client: their working directories, and what flashes without signing."""

_ECDSA_BYTES = {"secp256r1": (48, 32), "secp521r1": (68,)}
"""As how many bytes each of the two numbers of a signature may be stored."""


@dataclass(frozen=True, slots=True)
class Verifier:
    """Says whether what was made is signed by the machine's key.

    Arguments:
        soctype: the chip, which says what headers look like.
        public_key: the machine's.
        made: the signatures that were made, all of them with that key.
    """

    soctype: SocType
    public_key: PublicKey
    made: Made

    def flash_set(self, files: Mapping[str, Path]) -> None:
        """Raises ToolFailed where the command is missing, or not each image with a header is signed.

        Of a header alone only the signature is verified: which file it is for, its scripts know.
        """
        if not files.get(FLASH_COMMAND) or not files[FLASH_COMMAND].stat().st_size:
            raise _failed(f"{FLASH_COMMAND} was not made")
        headers = 0
        for name, path in files.items():
            with _mapped(path) as data:
                if data[:4] == nvda.MAGIC:
                    self._check(name, data, 0)
                    headers += 1
        if not headers:
            raise _failed("no signed image was made")

    def payloads(self, files: Mapping[str, Path]) -> None:
        """Raises ToolFailed where there are none, or an image with a header in them is not signed."""
        headers = 0
        for name, path in files.items():
            with _mapped(path) as data:
                headers += self._check_payload(name, data)
        if not headers:
            raise _failed("no update payload with signed images was made")

    def _check_payload(self, name: str, data: bytes) -> int:
        """How many images it has. Each byte is looked at but a few times, whatever stands there."""
        headers, at = 0, -1
        for _ in range(OCCURRENCES_MAX):
            at = data.find(nvda.MAGIC, at + 1)
            if at < 0:
                return headers
            if self._is_header(data, at):
                at = self._check(name, data, at) - 1
                headers += 1
        raise _failed(f"{name} has more than {OCCURRENCES_MAX} times what headers begin with")

    def signatures(self, files: Mapping[str, Path], signed: Collection[str]) -> None:
        """Raises ToolFailed where one of the files has no header of its own that is signed for it."""
        for name in signed:
            if f"{name}.sig" not in files or name not in files:
                raise _failed(f"{name}.sig was not made")
            with _mapped(files[f"{name}.sig"]) as header, _mapped(files[name]) as image:
                self._check(f"{name}.sig", header, 0, image)

    def _is_header(self, data: bytes, at: int) -> bool:
        """Whether there is more than the magic, which may stand in any code: in a payload, images are anywhere."""
        if self.soctype == "tegra234":
            return nvda.is_t234(data[at : at + nvda.T234_HEADER_BYTES])
        try:
            header = nvda.parse_t194(data[at : at + nvda.T194_HEADER_BYTES])
        except HeaderError:
            return False
        return bool(self.made.signed(header.signed))

    def _check(self, name: str, data: bytes, at: int, image: bytes | None = None) -> int:
        """Where the image ends, or its header where that cannot be known.

        Where the header stands alone, it is for `image`, which may have been filled up to whole blocks. Raises
        ToolFailed where the image is not signed, or not the one that was.
        """
        wanted: tuple[int, int] | None
        try:
            if self.soctype == "tegra234":
                signed, wanted = self._check_t234(name, data, at)
            else:
                signed, wanted = self._check_t194(name, data, at)
        except HeaderError as error:
            raise _failed(f"{name} is no signed image: {error}") from None
        hash_ = "sha512" if self.soctype == "tegra234" else "sha256"
        if image is not None:
            digests = [_digest(hash_, image, 0, len(image), zeros) for zeros in (0, -len(image) % 16)]
        elif wanted is None or self._is_alone(data):
            return at + nvda.T194_HEADER_BYTES
        elif wanted[1] > len(data):
            raise _failed(f"{name} is shorter than its header says")
        else:
            digests = [_digest(hash_, data, *wanted)]
        if not any(digest in signed for digest in digests):
            raise _failed(f"{name} is not what its header was signed for")
        return wanted[1] if wanted else len(data)

    def _is_alone(self, data: bytes) -> bool:
        """Whether there is a header and nothing else, as helpers of L4T 32 keep those of some images."""
        return len(data) == (nvda.T234_HEADER_BYTES if self.soctype == "tegra234" else nvda.T194_HEADER_BYTES)

    def _check_t234(self, name: str, data: bytes, at: int) -> tuple[bytes, tuple[int, int]]:
        """What holds the image's digest, and where the image is."""
        header = nvda.parse_t234(data[at : at + nvda.T234_HEADER_BYTES])
        if not any(self._verifies(*attempt, header.signed) for attempt in self._attempts(header)):
            raise _failed(f"the signature of {name} does not verify with the machine's public key")
        start = at + nvda.T234_HEADER_BYTES
        return header.payload_sha512, (start, start + header.payload_bytes)

    def _attempts(self, header: nvda.T234Header) -> Iterator[tuple[Scheme, bytes]]:
        """What the signature may be in its stored form: the scheme, and its usual form."""
        match self.public_key:
            case rsa.RSAPublicKey() as key:
                yield RsaPss(Hash.SHA512, SALT_BYTES), header.signature(key.key_size // 8)[::-1]
            case ec.EllipticCurvePublicKey() as key:
                size = (key.key_size + 7) // 8
                for stored in _ECDSA_BYTES.get(key.curve.name, ()):
                    both = header.signature(2 * stored)
                    yield Ecdsa(Hash.SHA512), both[:size][::-1] + both[stored : stored + size][::-1]
            case _:
                yield Ed25519(), header.signature(64)

    def _verifies(self, scheme: Scheme, signature: bytes, message: bytes) -> bool:
        data = message if isinstance(scheme, Ed25519) else hashlib.sha512(message).digest()
        try:
            verify(self.public_key, scheme, data, signature)
        except SigningFailed:  # the scripts' fault, not the key's
            return False
        return True

    def _check_t194(self, name: str, data: bytes, at: int) -> tuple[bytes, tuple[int, int] | None]:
        """What holds the image's digest, and where the image is: within a payload that is not known."""
        header = nvda.parse_t194(data[at : at + nvda.T194_HEADER_BYTES])
        if not any(signature in header.unsigned for signature in self.made.signed(header.signed)):
            raise _failed(f"the signature of {name} is not the one that was made for it")
        return header.signed, None if at else (nvda.T194_HEADER_BYTES, len(data))


def flash_files(files: Mapping[str, Path], sent: Collection[str], kernel: str) -> dict[str, Path]:
    """Of what is there, the full set for flashing: what is new and of use to a client."""
    stem, dot, suffix = kernel.rpartition(".")
    encrypted_kernel = f"{stem}_sigheader.{suffix}.encrypt.signed" if dot else f"{kernel}_sigheader.encrypt.signed"
    return {
        name: path
        for name, path in files.items()
        if NAME.fullmatch(name) and name not in sent and name != encrypted_kernel and not _LEFT_OUT.fullmatch(name)
    }


def payload_files(files: Mapping[str, Path], sent: Collection[str]) -> dict[str, Path]:
    """Of what is there, the update payloads."""
    mine = (name for name in files if NAME.fullmatch(name) and name.startswith(PAYLOADS) and name not in sent)
    return {name: files[name] for name in mine}


def signature_files(files: Mapping[str, Path], signed: Collection[str]) -> dict[str, Path]:
    """Of what is there, the signatures of these files."""
    return {name: path for name in (f"{each}.sig" for each in signed) if (path := files.get(name))}


def check_size(files: Mapping[str, Path], largest: int) -> None:
    """Raises ToolFailed where the files have more than `largest` bytes in all."""
    if sum(path.lstat().st_size for path in files.values()) > largest:
        raise _failed(f"what they made has more than {largest} bytes")


def packed(files: Mapping[str, Path], scratch: Scratch) -> Signed:
    """The files in a tar.gz."""
    parts: list[Part] = []
    for name, path in sorted(files.items()):
        status = path.lstat()
        mode = 0o755 if status.st_mode & 0o100 else 0o644
        parts.append(tar.header(f"./{name}".encode(), status.st_size, mode=mode, mtime=int(status.st_mtime)))
        content = Upload(path, name, status.st_size)
        parts += (FileRange(content, 0, status.st_size), bytes(tar.padding(status.st_size)))
    size = sum(len(part) if isinstance(part, bytes) else part.length for part in parts)
    archive = scratch.pack(Signed((*parts, tar.trailer(size)), FILENAME), GZIP)
    return Signed((FileRange(archive, 0, archive.size),), FILENAME)


@contextmanager
def _mapped(path: Path) -> Iterator[bytes]:
    """A file's bytes, which are not read before they are looked at."""
    path.chmod(path.lstat().st_mode & 0o777 | 0o400)  # its mode is the tool's choice
    with path.open("rb") as file:
        if not path.stat().st_size:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data  # type: ignore[misc]


def _digest(name: str, data: bytes, start: int, end: int, zeros: int = 0) -> bytes:
    """The digest of a part, and of zeros behind it."""
    digest = hashlib.new(name)
    for at in range(start, end, CHUNK_BYTES):
        digest.update(data[at : min(at + CHUNK_BYTES, end)])
    digest.update(bytes(zeros))
    return digest.digest()


def _failed(fault: str) -> ToolFailed:
    return ToolFailed(
        f"NVIDIA's scripts did not sign: {fault}.", "Look for the request's id in the log: what they say is there."
    )
