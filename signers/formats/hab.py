"""HABv4 command sequence files (CSF) as NXP's `cst` makes them: parsed and verified before a signature is released.

Sources: NXP, High Assurance Boot Version 4 API Reference Manual ("HAB4 API", docs/HAB4_API.pdf of `cst` 3.4.1);
where it is silent (SRK tables), what `srktool` writes, which the tests compare byte for byte.

    header      D4, length of the commands with this header (2 bytes), version 4x
    commands    tag, length (2 bytes), a parameter, contents; covered by the CSF's signature
    sections    tag, length (2 bytes), version: D7 SRK table or X.509 certificate, D8 CMS signature; each at a multiple
                of 4, at the offset from the start of the CSF that a command names; zeros between them

All numbers are big endian.
"""

import hashlib
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from signers.formats import cms
from signers.formats.reading import ReadAt
from tokens.errors import SignatureMismatch
from tokens.schemes import Ecdsa, Hash, RsaPkcs1v15

# HAB4 API, sections 6.2 (structures), 6.3 (commands), 6.4 (protocols), 6.5 (algorithms)
_CSF = 0xD4
_CERTIFICATE = 0xD7
_SIGNATURE = 0xD8

PROTOCOL_SRK = 0x03
PROTOCOL_X509 = 0x09
PROTOCOL_CMS = 0xC5

ALGORITHM_ANY = 0x00
ALGORITHM_SHA256 = 0x17
_RSA_PKCS1 = 0x21
_ECDSA = 0x27

FLAG_CSF_KEY = 0x02
"""Flag of Install Key: the key is to verify the CSF (HAB4 API, section 4.3.7)."""

# indices of the public key store (HAB4 API, section 4.3.7)
INDEX_SRK = 0
INDEX_CSF = 1

# tags of keys in an SRK table, and the flag that the key may sign certificates
_KEY_PUBLIC = 0xE1
_KEY_HASH = 0xEE
_KEY_CA = 0x80

_CURVES: dict[int, type[ec.EllipticCurve]] = {0x4B: ec.SECP256R1, 0x4D: ec.SECP384R1, 0x4E: ec.SECP521R1}

SRK_MAX = 4
"""Keys in an SRK table: as many as can be revoked one by one."""

_CHUNK_BYTES = 1 << 20
_DIGESTS = (Hash.SHA256, Hash.SHA384, Hash.SHA512)
_NOT_ZERO = re.compile(rb"[^\0]")

Key = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


class HabError(ValueError):
    """The bytes are no CSF or SRK table, or hold what hsmsign does not release."""


@dataclass(frozen=True, slots=True)
class InstallKey:
    """Install Key (HAB4 API, section 4.3.7): flags, protocol, hash, source and target index, offset of the key's data.

    Of an SRK, `source` is the index in the SRK table, else that of the installed key which issued the certificate.
    Where the data lie does not count when commands are compared.
    """

    flags: int
    protocol: int
    hash: int
    source: int
    target: int
    offset: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class AuthenticateData:
    """Authenticate Data (HAB4 API, section 4.3.8), `blocks` as (address, length); of the CSF itself where `key` is 1.

    Where the signature lies does not count when commands are compared.
    """

    key: int
    protocol: int
    engine: int
    configuration: int
    blocks: tuple[tuple[int, int], ...] = ()
    offset: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Unlock:
    """Unlock (HAB4 API, section 4.3.6): an engine, its features as one word, None where there is none, and a UID."""

    engine: int
    features: int | None = None
    uid: bytes = b""


@dataclass(frozen=True, slots=True)
class Init:
    """Initialize (HAB4 API, section 4.3.5): an engine, and its features as one word, None where there is none."""

    engine: int
    features: int | None = None


@dataclass(frozen=True, slots=True)
class SetEngine:
    """Set (HAB4 API, section 4.3.4) of the item ENG: the engine to prefer for an algorithm."""

    algorithm: int
    engine: int
    configuration: int


@dataclass(frozen=True, slots=True)
class Nop:
    """No operation (HAB4 API, section 4.3.3); its parameter has no meaning."""


Command = InstallKey | AuthenticateData | Unlock | Init | SetEngine | Nop


@dataclass(frozen=True, slots=True)
class SrkEntry:
    """One key of an SRK table; `key` is None where the table holds only its hash. `raw` is the whole entry."""

    key: Key | None
    ca: bool
    raw: bytes

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the entry as a key, which stands for it among the fuses and in its place."""
        return self.raw[4:] if self.key is None else hashlib.sha256(self.raw).digest()


@dataclass(frozen=True, slots=True)
class SrkTable:
    """The super root keys; `raw` is the whole table."""

    entries: tuple[SrkEntry, ...]
    raw: bytes

    @property
    def fuses(self) -> bytes:
        """What is burnt into the SRK fuses: SHA-256 over the SHA-256 of each key (`srktool -d sha256 -f 1`)."""
        return hashlib.sha256(b"".join(entry.digest for entry in self.entries)).digest()


@dataclass(frozen=True, slots=True)
class Csf:
    """A parsed CSF.

    Arguments:
        version: of the header, 0x43 for 4.3.
        commands: in their order.
        signed: what the CSF's signature covers: header and commands.
        sections: contents of the sections that commands name, by offset; an SRK table with its header.
        spare: certificates in sections that no command names; fast authentication (Install NOCAK) leaves one.
    """

    version: int
    commands: tuple[Command, ...]
    signed: bytes
    sections: Mapping[int, bytes]
    spare: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of the artifact: where it is loaded to, where it stands in the artifact, its length."""

    address: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Expected:
    """What a CSF must hold.

    Arguments:
        srk_table: the SRK table, whole.
        source: index of the SRK in it which must have issued the certificates.
        csf_certificate: of the key that must have signed the CSF. With fast authentication (no CSF key and no image
            key is installed), that of the SRK, which then signs the images too.
        keys: by target index, the certificate of each key that may sign images.
        blocks: for each Authenticate Data command, in order, the pieces that its signature must cover.
    """

    srk_table: bytes
    source: int
    csf_certificate: x509.Certificate
    keys: Mapping[int, x509.Certificate]
    blocks: Sequence[Sequence[Block]]


def parse(data: bytes) -> Csf:
    """Parses a whole CSF. Raises HabError where a byte of it is not explained."""
    length, version = _header(data, 0, _CSF)
    if version >> 4 != 4:
        raise HabError("the CSF is not of HAB version 4")
    commands = tuple(_commands(data[:length]))
    sections: dict[int, bytes] = {}
    spare: list[bytes] = []
    named = {each.offset: each for each in commands if isinstance(each, InstallKey | AuthenticateData)}
    if len(named) != sum(isinstance(each, InstallKey | AuthenticateData) for each in commands):
        raise HabError("two commands name the same section")
    at = length
    while found := _NOT_ZERO.search(data, at):
        start = found.start()
        command = named.get(start)
        tag = _SIGNATURE if isinstance(command, AuthenticateData) else _CERTIFICATE
        size, section_version = _header(data, start, tag)
        at = start + size
        if start % 4:
            raise HabError("a section does not begin at a multiple of 4")
        if isinstance(command, InstallKey) and command.protocol == PROTOCOL_SRK:
            sections[start] = data[start:at]
            continue
        if section_version != version:
            raise HabError("a section has another version than the CSF")
        if command is not None:
            sections[start] = data[start + 4 : at]
        elif spare:
            raise HabError("there is more than one section that no command names")
        else:
            spare.append(data[start + 4 : at])
    if sections.keys() != named.keys():
        raise HabError("a command names a section that is not there")
    return Csf(version, commands, data[:length], sections, tuple(spare))


def _header(data: bytes, at: int, tag: int) -> tuple[int, int]:
    """Length, with the header, and last byte of a header (HAB4 API, section 6.1) that lies within the data."""
    if at + 4 > len(data):
        raise HabError("the data are cut off in a header")
    found, length, parameter = struct.unpack_from(">BHB", data, at)
    if found != tag:
        raise HabError(f"the tag {tag:02X} was expected, not {found:02X}")
    if not 4 <= length <= len(data) - at:
        raise HabError("a length does not lie within the data")
    return length, parameter


def _commands(signed: bytes) -> Iterator[Command]:
    at = 4
    while at < len(signed):
        tag = signed[at]
        length, parameter = _header(signed, at, tag)
        if length % 4:
            raise HabError("a command's length is no multiple of 4")
        yield _command(tag, parameter, signed[at + 4 : at + length])
        at += length


def _command(tag: int, parameter: int, contents: bytes) -> Command:
    words = struct.unpack(f">{len(contents) // 4}I", contents)
    command: Command | None = None
    match tag, words:
        case 0xBE, (_, offset) if parameter in (0, FLAG_CSF_KEY) and contents[0] in (PROTOCOL_SRK, PROTOCOL_X509):
            protocol, hash_, source, target = contents[:4]
            command = InstallKey(parameter, protocol, hash_, source, target, offset)
        case 0xCA, (_, offset, *pairs) if not parameter and contents[1] == PROTOCOL_CMS and len(pairs) % 2 == 0:
            key, protocol, engine, configuration = contents[:4]
            blocks = tuple(zip(pairs[::2], pairs[1::2], strict=True))
            command = AuthenticateData(key, protocol, engine, configuration, blocks, offset)
        case 0xB2, ():
            command = Unlock(parameter)
        case 0xB2, (features, *_):
            command = Unlock(parameter, features, contents[4:])
        case 0xB4, ():
            command = Init(parameter)
        case 0xB4, (features,):
            command = Init(parameter, features)
        case 0xB1, (_,) if parameter == 0x03 and not contents[0]:  # the item ENG
            command = SetEngine(*contents[1:])
        case 0xC0, ():
            command = Nop()
    if command is None:
        raise HabError(f"there is a command {tag:02X} of a form that hsmsign does not know")
    return command


def parse_srk_table(data: bytes) -> SrkTable:
    """Parses an SRK table, as `srktool -h 4` writes it. Raises HabError."""
    length, version = _header(data, 0, _CERTIFICATE)
    if version >> 4 != 4 or length != len(data):
        raise HabError("this is no SRK table of HAB version 4, or something follows it")
    entries: list[SrkEntry] = []
    at = 4
    while at < len(data):
        if len(entries) == SRK_MAX:
            raise HabError(f"the SRK table has more than {SRK_MAX} keys")
        size, algorithm = _header(data, at, _KEY_HASH if data[at] == _KEY_HASH else _KEY_PUBLIC)
        entries.append(_srk_entry(data[at : at + size], algorithm))
        at += size
    if not entries:
        raise HabError("the SRK table is empty")
    return SrkTable(tuple(entries), data)


def _srk_entry(raw: bytes, algorithm: int) -> SrkEntry:
    if raw[0] == _KEY_HASH:
        if algorithm != ALGORITHM_SHA256 or len(raw) != 4 + 32:
            raise HabError("a key of the SRK table is given by another hash than SHA-256")
        return SrkEntry(None, False, raw)
    if len(raw) < 12 or algorithm not in (_RSA_PKCS1, _ECDSA):
        raise HabError("a key of the SRK table is neither RSA nor EC")
    try:
        ca = raw[7] == _KEY_CA
        first = int.from_bytes(raw[8:10], "big")
        if algorithm == _RSA_PKCS1:
            modulus, exponent = (int.from_bytes(each, "big") for each in (raw[12 : 12 + first], raw[12 + first :]))
            key: Key = rsa.RSAPublicNumbers(exponent, modulus).public_key()
        else:
            key = ec.EllipticCurvePublicKey.from_encoded_point(_CURVES[raw[8]](), b"\x04" + raw[12:])
    except (ValueError, KeyError, UnsupportedAlgorithm):
        raise HabError("a key of the SRK table is none") from None
    if raw != _encode_key(key, ca):
        raise HabError("a key of the SRK table is encoded otherwise")
    return SrkEntry(key, ca, raw)


def _encode_key(key: Key, ca: bool) -> bytes:
    """An entry: header, 3 bytes 0, flags; RSA: length of modulus and exponent; EC: curve, 0, bits; the numbers."""
    match key:
        case rsa.RSAPublicKey():
            algorithm = _RSA_PKCS1
            public = key.public_numbers()
            modulus, exponent = (each.to_bytes((each.bit_length() + 7) // 8, "big") for each in (public.n, public.e))
            contents = struct.pack(">HH", len(modulus), len(exponent)) + modulus + exponent
        case ec.EllipticCurvePublicKey():
            algorithm = _ECDSA
            curve = next((number for number, curve in _CURVES.items() if isinstance(key.curve, curve)), None)
            if curve is None:
                raise HabError("HAB knows no such elliptic curve")
            point = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
            contents = struct.pack(">BxH", curve, key.curve.key_size) + point[1:]
    header = struct.pack(">BHB3xB", _KEY_PUBLIC, 8 + len(contents), algorithm, _KEY_CA if ca else 0)
    return header + contents


def encode_srk_table(certificates: Sequence[x509.Certificate]) -> bytes:
    """The SRK table of certificates: what `srktool -h 4` writes. Raises HabError where a key is of no fitting type."""
    entries = b"".join(_encode_key(_public_key(each), is_ca(each)) for each in certificates)
    return struct.pack(">BHB", _CERTIFICATE, 4 + len(entries), 0x40) + entries


def _public_key(certificate: x509.Certificate) -> Key:
    key = certificate.public_key()
    pss = certificate.public_key_algorithm_oid == x509.PublicKeyAlgorithmOID.RSASSA_PSS
    if pss or not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise HabError("a certificate's key is neither RSA nor EC")
    return key


def is_ca(certificate: x509.Certificate) -> bool:
    """Whether a certificate may issue others, as OpenSSL's `X509_check_ca` sees it, which sets an SRK's CA flag."""
    extensions = certificate.extensions
    try:
        if not extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            return False
        return extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound as error:
        return error.oid == x509.KeyUsage.oid


def verify(csf: Csf, expected: Expected, read: ReadAt) -> None:
    """Checks that a CSF, parsed anew from what the tool made, is signed by the granted keys and covers the artifact.

    `read` reads the artifact. The commands as such are for the caller to compare with what was asked for.

    Raises SignatureMismatch.
    """
    installed: dict[int, x509.Certificate] = {}
    root: Key | None = None
    wanted = iter(expected.blocks)
    csf_signed = False
    for command in csf.commands:
        match command:
            case InstallKey(protocol=protocol) if protocol == PROTOCOL_SRK:
                _require(root is None, "it installs a second SRK table")
                root = _root(csf, command, expected)
            case InstallKey(target=target):
                certificate = expected.csf_certificate if target == INDEX_CSF else expected.keys.get(target)
                _require(root is not None, "it installs a key before the SRK")
                _require(target not in installed, "it installs two keys at one index")
                _require((command.flags == FLAG_CSF_KEY) == (target == INDEX_CSF), "a key is installed for another use")
                _require(command.source == INDEX_SRK, "a key is installed that the SRK did not certify")
                if certificate is None or csf.sections[command.offset] != _der(certificate):
                    raise _bad("a certificate in it is not the granted one")
                if root is None or not issued(certificate, root):
                    raise _bad("a granted certificate was not issued by the SRK at that index")
                installed[target] = certificate
            case AuthenticateData(key=key) if key == INDEX_CSF:
                _require(not csf_signed and not command.blocks, "it does not authenticate itself once")
                if INDEX_CSF not in installed:
                    _check_fast(csf, expected.csf_certificate, root)
                    installed[INDEX_SRK] = expected.csf_certificate
                csf_signed = True
                _check_signature(csf.sections[command.offset], expected.csf_certificate, [csf.signed])
            case AuthenticateData(key=key):
                _require(csf_signed, "it authenticates data before itself")
                pieces = next(wanted, ())
                asked = tuple((each.address, each.length) for each in pieces)
                _require(bool(asked) and command.blocks == asked, "it covers other blocks")
                if key not in installed:
                    raise _bad("data are authenticated by a key that is not installed")
                content = (chunk for each in pieces for chunk in _chunks(read, each))
                _check_signature(csf.sections[command.offset], installed[key], content)
    _require(csf_signed, "it does not authenticate itself")
    _require(next(wanted, None) is None, "it does not cover all blocks")
    _require(not csf.spare or INDEX_SRK in installed, "it holds a certificate that nothing uses")


def _root(csf: Csf, command: InstallKey, expected: Expected) -> Key:
    srk_table, source = expected.srk_table, expected.source
    _require(csf.sections[command.offset] == srk_table, "the SRK table in it is another one")
    asked = InstallKey(0, PROTOCOL_SRK, ALGORITHM_SHA256, source, INDEX_SRK)
    _require(command == asked, "it installs another SRK than was asked for")
    try:
        entries = parse_srk_table(srk_table).entries
    except HabError as error:
        raise _bad(f"its SRK table cannot be parsed ({error})") from None
    key = entries[source].key if 0 <= source < len(entries) else None
    if key is None:
        raise _bad("its SRK table has no key at that index")
    return key


def _check_fast(csf: Csf, certificate: x509.Certificate, root: Key | None) -> None:
    """Fast authentication: the SRK signs, and its certificate stands in a section that no command names."""
    _require(root is not None and certificate.public_key() == root, "it is signed by another key than the SRK")
    _require(set(csf.spare) <= {_der(certificate)}, "a certificate in it is not the granted one")


def _check_signature(encoded: bytes, certificate: x509.Certificate, content: Iterator[bytes] | list[bytes]) -> None:
    message = cms.described(encoded, certificate)
    # HAB4 API, section 6.5, knows neither PSS nor Edwards curves
    _require(isinstance(message.scheme, RsaPkcs1v15 | Ecdsa), "a signature has a scheme that HAB does not know")
    _require(message.hash in _DIGESTS, "a signature has another digest than SHA-256, SHA-384 or SHA-512")
    digest = hashlib.new(message.hash.hashlib_name)
    for chunk in content:
        digest.update(chunk)
    cms.verify(encoded, message, digest.digest())


def _chunks(read: ReadAt, block: Block) -> Iterator[bytes]:
    for at in range(0, block.length, _CHUNK_BYTES):
        length = min(_CHUNK_BYTES, block.length - at)
        chunk = read(block.offset + at, length)
        _require(len(chunk) == length, "the artifact ends within a block")
        yield chunk


def issued(certificate: x509.Certificate, issuer: Key) -> bool:
    """Whether the issuer's key signed a certificate: the signature only, since HAB looks at no name and no date."""
    signature, signed = certificate.signature, certificate.tbs_certificate_bytes
    try:
        parameters, hash_ = certificate.signature_algorithm_parameters, certificate.signature_hash_algorithm
        match issuer, parameters:
            case rsa.RSAPublicKey(), padding.PKCS1v15() | padding.PSS() if hash_ is not None:
                issuer.verify(signature, signed, parameters, hash_)
            case ec.EllipticCurvePublicKey(), ec.ECDSA():
                issuer.verify(signature, signed, parameters)
            case _:
                return False
    except (InvalidSignature, ValueError, UnsupportedAlgorithm):
        return False
    return True


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise _bad(fault)


def _bad(fault: str) -> SignatureMismatch:
    return SignatureMismatch(
        f"The CSF that was made is not what was asked for: {fault}.",
        "Report this with the request id: it was not released.",
    )
