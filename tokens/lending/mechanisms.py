"""What a tool may ask a lent key for: signatures over digests of SHA-2, by these mechanisms."""

import hashlib
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import rsa

from tokens.lending.wire import Mechanism
from tokens.provider import PublicKey
from tokens.schemes import Ecdsa, Hash, RsaPkcs1v15, RsaPss, Scheme, digest_info

CKR_DATA_INVALID, CKR_DATA_LEN_RANGE = 0x20, 0x21
CKR_MECHANISM_INVALID, CKR_MECHANISM_PARAM_INVALID = 0x70, 0x71

CKM_RSA_PKCS, CKM_RSA_PKCS_PSS, CKM_ECDSA = 0x01, 0x0D, 0x1041
_RSA_HASHED = {0x46: Hash.SHA224, 0x40: Hash.SHA256, 0x41: Hash.SHA384, 0x42: Hash.SHA512}
_PSS_HASHED = {0x47: Hash.SHA224, 0x43: Hash.SHA256, 0x44: Hash.SHA384, 0x45: Hash.SHA512}
_ECDSA_HASHED = {0x1043: Hash.SHA224, 0x1044: Hash.SHA256, 0x1045: Hash.SHA384, 0x1046: Hash.SHA512}
# CK_RSA_PKCS_PSS_PARAMS: (hashAlg, mgf)
_PSS_PARAMETERS = {
    (0x255, 0x05): Hash.SHA224,
    (0x250, 0x02): Hash.SHA256,
    (0x260, 0x03): Hash.SHA384,
    (0x270, 0x04): Hash.SHA512,
}
_SHA2 = (Hash.SHA224, Hash.SHA256, Hash.SHA384, Hash.SHA512)

RSA_MECHANISMS = (CKM_RSA_PKCS, CKM_RSA_PKCS_PSS, *_RSA_HASHED, *_PSS_HASHED)
EC_MECHANISMS = (CKM_ECDSA, *_ECDSA_HASHED)


class Refused(Exception):
    """A tool asked for what it may not have. `rv` is the CKR_ value that it gets."""

    def __init__(self, rv: int) -> None:
        super().__init__(hex(rv))
        self.rv = rv


@dataclass(frozen=True, slots=True)
class Asked:
    """A mechanism, understood.

    Arguments:
        hash: what the tool hashed with, or None where only the data tells.
        hashes: whether the data is a message, to be hashed here.
        pss_salt: bytes of salt; None: no PSS.
    """

    rsa: bool
    hash: Hash | None
    hashes: bool
    pss_salt: int | None = None

    def request(self, data: bytes) -> tuple[Scheme, bytes]:
        """The scheme and the digest. Raises Refused where the data is no digest that may be signed."""
        if self.hashes and self.hash is not None:
            data = hashlib.new(self.hash.hashlib_name, data).digest()
        if self.pss_salt is not None and self.hash is not None:
            return RsaPss(self.hash, self.pss_salt), _checked(self.hash, data)
        if not self.rsa:
            hash_ = self.hash or _by_size(len(data))
            return Ecdsa(hash_), _checked(hash_, data)
        if self.hashes and self.hash is not None:
            return RsaPkcs1v15(self.hash), data
        return _from_digest_info(data)


def understand(mechanism: Mechanism, public_key: PublicKey) -> Asked:
    """What a mechanism asks of a key. Raises Refused."""
    type_, parameters = mechanism.type, mechanism.parameters
    if type_ not in (RSA_MECHANISMS if isinstance(public_key, rsa.RSAPublicKey) else EC_MECHANISMS):
        raise Refused(CKR_MECHANISM_INVALID)
    if isinstance(public_key, rsa.RSAPublicKey) and (type_ == CKM_RSA_PKCS_PSS or type_ in _PSS_HASHED):
        hash_ = None if parameters is None else _PSS_PARAMETERS.get(parameters[:2])
        room = (public_key.key_size + 6) // 8 - (hash_.size if hash_ else 0) - 2  # RFC 8017, section 9.1.1
        if hash_ is None or parameters is None or parameters[2] > room or _PSS_HASHED.get(type_, hash_) != hash_:
            raise Refused(CKR_MECHANISM_PARAM_INVALID)
        return Asked(rsa=True, hash=hash_, hashes=type_ in _PSS_HASHED, pss_salt=parameters[2])
    if parameters is not None:
        raise Refused(CKR_MECHANISM_PARAM_INVALID)
    hashed = _RSA_HASHED.get(type_) or _ECDSA_HASHED.get(type_)
    return Asked(rsa=type_ in RSA_MECHANISMS, hash=hashed, hashes=hashed is not None)


def _checked(hash_: Hash, digest: bytes) -> bytes:
    if len(digest) != hash_.size:
        raise Refused(CKR_DATA_LEN_RANGE)
    return digest


def _by_size(size: int) -> Hash:
    for hash_ in _SHA2:
        if hash_.size == size:
            return hash_
    raise Refused(CKR_DATA_LEN_RANGE)


def _from_digest_info(data: bytes) -> tuple[Scheme, bytes]:
    """CKM_RSA_PKCS pads what it is given: only a DigestInfo of SHA-2, to the byte, is a digest."""
    for hash_ in _SHA2:
        digest = data[-hash_.size :]
        if data == digest_info(hash_, digest):
            return RsaPkcs1v15(hash_), digest
    raise Refused(CKR_DATA_INVALID)
