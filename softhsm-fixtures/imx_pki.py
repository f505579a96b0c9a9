"""PKIs for NXP's i.MX as imx.toml declares them: the names and the layout are those of NXP's own scripts.

The keys that sign lie on the token in one set, in files in another; one machine stands for each set. Both have the
same SRKs, but for those of AHAB that sign themselves. All other keys are gone when the fixtures are made.
"""

import io
import secrets
import tarfile
import time
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certificates import PEM, PKCS8, Authority, generate, write_certificate, write_key, write_private
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from signers.formats import ahab, hab
from tokens.schemes import Hash

TOKEN = "hsmsign"
CA = "CA1_sha256_secp256r1_v3_ca"
NAMES = {  # as in NXP's names
    "rsa2048": "sha256_2048_65537",
    "rsa4096": "sha256_4096_65537",
    "p256": "sha256_secp256r1",
    "p384": "sha384_secp384r1",
}
SRKS = range(1, 5)
TABLE = "crts/SRK_1_2_3_4_table.bin"
TARBALL = "imxsign/imx-cst-keys.tar.gz"


@dataclass(frozen=True)
class Pki:
    """One of imx.toml."""

    boot: str
    type: str
    id: str
    token: str
    file: str
    chains: int = 0

    def srk(self, number: int) -> str:
        return f"SRK{number}_{NAMES[self.type]}_v3_{'ca' if self.boot == 'hab' else 'usr'}"

    @property
    def signing(self) -> list[tuple[str, str]]:
        """The names of the keys that sign, and of who issues their certificates."""
        if self.boot == "ahab":
            return [(self.srk(1), CA)]
        roles = [(role, number) for number in SRKS[: self.chains] for role in ("CSF", "IMG")]
        return [(f"{role}{number}_1_{NAMES[self.type]}_v3_usr", self.srk(number)) for role, number in roles]

    @property
    def token_keys(self) -> list[dict[str, Any]]:
        """Those keys as fixtures.toml would declare them."""
        return [
            {
                "label": name,
                "id": f"{int(self.id, 16) + offset:02x}",
                "type": self.type,
                "certificate": {"subject": name, "issuer": issuer},
            }
            for offset, (name, issuer) in enumerate(self.signing)
        ]


class Making:
    """A PKI while it is made: the keys that are not on the token come from the threads of a pool."""

    def __init__(self, pki: Pki, pool: Executor) -> None:
        self.pki = pki
        offline = SRKS if pki.boot == "hab" else SRKS[1:]
        self.offline = {pki.srk(number): pool.submit(generate, pki.type) for number in offline}
        self.in_files = {name: pool.submit(generate, pki.type) for name, _ in pki.signing}
        self.srks: dict[str, x509.Certificate] = {}

    def certify_srks(self, authorities: dict[str, Authority], certificates: Path) -> None:
        """Those that are offline. HABv4's are authorities from now on."""
        for name, key in self.offline.items():
            if self.pki.boot == "hab":
                authorities[name] = Authority(name, key.result(), authorities[CA])
                self.srks[name] = authorities[name].certificate
            else:
                self.srks[name] = authorities[CA].issue(name, key.result().public_key())
            write_certificate(certificates / f"{name}.pem", self.srks[name])

    def write(self, authorities: dict[str, Authority], directory: Path) -> None:
        """What the machines have in files, when the keys and certificates of `token_keys` are made."""
        names = [name for name, _ in self.pki.signing]
        on_token = {name: read_certificate(directory / "certificates" / f"{name}.pem") for name in names}
        self.write_machine(self.pki.token, on_token, {}, directory)

        keys = {name: key.result() for name, key in self.in_files.items()}
        issued = {name: authorities[issuer].issue(name, keys[name].public_key()) for name, issuer in self.pki.signing}
        passphrase = secrets.token_hex(8).encode()
        encryption = serialization.BestAvailableEncryption(passphrase)
        members = {f"keys/{name}_key.pem": key.private_bytes(PEM, PKCS8, encryption) for name, key in keys.items()}
        members["keys/key_pass.txt"] = (passphrase + b"\n") * 2
        for name, certificate in ({CA: authorities[CA].certificate} | self.srks | issued).items():
            members[f"crts/{name}_crt.pem"] = certificate.public_bytes(PEM)
        self.write_machine(self.pki.file, issued, members, directory)

        # the same once more for the provider of key files, which reads no tarball
        home = directory / "keys" / self.pki.file / "imxsign"
        for name in names:
            write_key(home / f"keys/{name}_key.pem", keys[name])
            write_certificate(home / f"crts/{name}_crt.pem", issued[name])

    def write_machine(
        self, machine: str, signing: dict[str, x509.Certificate], members: dict[str, bytes], directory: Path
    ) -> None:
        """The tarball of `members` and the SRK table, and the fuses of a device that trusts this table."""
        certificates = self.srks | signing
        srks = [certificates[self.pki.srk(number)] for number in SRKS]
        if self.pki.boot == "hab":
            table = hab.encode_srk_table(srks)
            fuses = hab.parse_srk_table(table).fuses
        else:
            table = ahab.encode_srk_table(srks, Hash(NAMES[self.pki.type].split("_")[0]))
            fuses = ahab.parse_srk_table(table).fuses(Hash.SHA512)
        write_private(directory / "keys" / machine / TARBALL, tar(members | {TABLE: table}))
        (directory / "fuses" / f"{machine}.bin").write_bytes(fuses)


def tar(members: dict[str, bytes]) -> bytes:
    """A tar.gz with an entry for each directory, as `tar czf` writes it; what is below keys/ is private."""
    buffer = io.BytesIO()
    now = int(time.time())  # tar warns of what is from 1970
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for directory in sorted({name.split("/")[0] for name in members}):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, now
            archive.addfile(entry)
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(data), now
            entry.mode = 0o600 if name.startswith("keys/") else 0o644
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def read_certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())
