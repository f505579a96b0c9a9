"""The files of an i.MX key set: NXP's key tarball (keys/, crts/), or an SRK table alone."""

import io
import posixpath
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography import x509

from tokens.errors import KeyAmbiguous, KeyNotFound, KeyUnusable

UNPACKED_MAX_BYTES = 16 * 1024 * 1024
"""A tarball of four SRKs with all their keys has about 100 KiB."""

_GZIP = b"\x1f\x8b"
_SRK_TABLE = b"\xd7"  # its tag, in HABv4 and AHAB alike
_GZIP_WINDOW = 31  # zlib: the largest window, with gzip's header
_HINT = "Pack keys/ and crts/ with the SRK table as imx-cst-keys.tar.gz, or grant the SRK table itself."


@dataclass(frozen=True, slots=True)
class KeySet:
    """What is in it: bytes by base name, of the keys and of everything else."""

    private: Mapping[str, bytes]
    public: Mapping[str, bytes]
    table: bytes | None = None

    @classmethod
    def parse(cls, content: bytes) -> "KeySet":
        """Reads a granted file. Raises KeyUnusable where it is neither a tarball nor a table."""
        if content.startswith(_SRK_TABLE):
            return cls({}, {}, content)
        if not content.startswith(_GZIP):
            raise KeyUnusable("The granted file is neither a tar.gz nor an SRK table.", _HINT)
        private: dict[str, bytes] = {}
        public: dict[str, bytes] = {}
        try:
            # bounded before anything is parsed
            inflater = zlib.decompressobj(_GZIP_WINDOW)
            unpacked = inflater.decompress(content, UNPACKED_MAX_BYTES)
            if not inflater.eof:
                raise KeyUnusable(f"The key tarball unpacks to more than {UNPACKED_MAX_BYTES} bytes.", _HINT)
            with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
                for member in archive:
                    directory, name = posixpath.split(posixpath.normpath(member.name))
                    file = archive.extractfile(member) if member.isreg() else None
                    if file is not None:
                        files = private if posixpath.basename(directory) == "keys" else public
                        files[name] = file.read()
        except (tarfile.TarError, zlib.error, EOFError, ValueError, OverflowError):
            raise KeyUnusable("The key tarball cannot be unpacked.", _HINT) from None
        return cls(private, public)

    def srk_table(self, name: str) -> bytes:
        """The SRK table that a CSF calls `name`: the one that was granted, or the tarball's of that base name."""
        if self.table is not None:
            return self.table
        tables = {each: data for each, data in self.public.items() if data.startswith(_SRK_TABLE)}
        if found := tables.get(posixpath.basename(name)):
            return found
        if len(tables) == 1:
            return next(iter(tables.values()))
        if tables:
            raise KeyAmbiguous(
                f"The key tarball holds {len(tables)} SRK tables, and none is called as the CSF says.",
                "Name the table in the CSF as it is called in crts/.",
            )
        raise KeyNotFound("The key tarball holds no SRK table.", "Add it as crts/SRK_1_2_3_4_table.bin.")

    def certificate(self, name: str) -> bytes:
        """The certificate that a CSF calls `name`, by its base name. Raises KeyNotFound."""
        if found := self.public.get(posixpath.basename(name)):
            return found
        raise KeyNotFound(
            "The key tarball holds no certificate of the name that the CSF says.",
            "Name the certificates in the CSF as they are called in crts/.",
        )

    def key_of(self, certificate: str) -> tuple[str, bytes]:
        """Name and bytes of the private key that NXP's layout gives a certificate: `_crt` becomes `_key`."""
        stem, _, suffix = posixpath.basename(certificate).rpartition("_crt")
        name = f"{stem}_key{suffix}"
        if stem and (found := self.private.get(name)):
            return name, found
        raise KeyNotFound(
            "The key tarball holds no private key for a certificate of the CSF.",
            "For a certificate crts/NAME_crt.pem it must hold keys/NAME_key.pem.",
        )


def load_certificate(data: bytes) -> x509.Certificate:
    """PEM or DER. Raises KeyUnusable."""
    try:
        if b"-----BEGIN" in data:
            return x509.load_pem_x509_certificate(data)
        return x509.load_der_x509_certificate(data)
    except ValueError:
        raise KeyUnusable("A certificate of the key tarball cannot be read.", "Store it as PEM or DER.") from None
