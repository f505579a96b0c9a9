"""Sessions: mutual authentication and the encrypted channel after it.

Source: GlobalPlatform SCP03 (Card Specification v2.3 Amendment D), sections 4.1.5 and 6.2, with one change: a request
and its answer are encrypted with the same IV. Asymmetric authentication follows SCP11 (Amendment F), section 6.5.
"""

import hmac
import struct
from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.cmac import CMAC
from cryptography.hazmat.primitives.kdf.x963kdf import X963KDF

from yubihsm_simulator import frames
from yubihsm_simulator.definitions import Command, DeviceError, ErrorCode

IDLE_S = 30.0
"""A session that is not used for so long is over."""

CHALLENGE_BYTES = 8
POINT_BYTES = 65  # uncompressed, P-256
_MAC_BYTES = 8
_BLOCK = 16

# SCP03 table 4-1: data derivation constants
_CARD_CRYPTOGRAM, _HOST_CRYPTOGRAM, _S_ENC, _S_MAC, _S_RMAC = 0x00, 0x01, 0x04, 0x06, 0x07


def cmac(key: bytes, message: bytes) -> bytes:
    """AES-CMAC, 16 bytes."""
    mac = CMAC(algorithms.AES(key))
    mac.update(message)
    return mac.finalize()


def derive(key: bytes, constant: int, context: bytes, bits: int = 128) -> bytes:
    """SCP03 section 4.1.5: 11 zero bytes, constant, separator, length in bits, counter, context."""
    return cmac(key, bytes(11) + struct.pack(">BBHB", constant, 0, bits, 1) + context)[: bits // 8]


@dataclass
class Session:
    """One session; its rights are those that the authentication key had when the session was created.

    Attributes:
        sid: its number, 0 to 15.
        key_id: the authentication key's.
        chain: the MAC chaining value, 16 bytes.
        counter: of the next message, for the IV.
        used_at: when it was last used, seconds of the device's clock.
    """

    sid: int
    key_id: int
    domains: int
    capabilities: int
    delegated: int
    s_enc: bytes
    s_mac: bytes
    s_rmac: bytes
    used_at: float
    context: bytes = b""
    authenticated: bool = False
    chain: bytes = bytes(_BLOCK)
    counter: int = 1

    def card_cryptogram(self) -> bytes:
        """What proves the device to the host, 8 bytes."""
        return derive(self.s_mac, _CARD_CRYPTOGRAM, self.context, 64)

    def authenticate(self, cryptogram: bytes, mac: bytes) -> None:
        """The host's proof. Raises DeviceError (AUTHENTICATION_FAILED)."""
        signed = struct.pack(">BHB", Command.AUTHENTICATE_SESSION, 17, self.sid) + cryptogram
        chain = cmac(self.s_mac, self.chain + signed)
        expected = derive(self.s_mac, _HOST_CRYPTOGRAM, self.context, 64)
        if not (hmac.compare_digest(expected, cryptogram) and hmac.compare_digest(chain[:_MAC_BYTES], mac)):
            raise DeviceError(ErrorCode.AUTHENTICATION_FAILED)
        self.chain = chain
        self.authenticated = True

    def decrypt(self, message: bytes) -> bytes:
        """The inner frame of a session message (all of the message's data).

        Raises DeviceError: WRONG_LENGTH, AUTHENTICATION_FAILED (nothing has changed), SESSION_FAILED (no padding).
        """
        ciphertext, mac = message[1:-_MAC_BYTES], message[-_MAC_BYTES:]
        if not ciphertext or len(ciphertext) % _BLOCK:
            raise DeviceError(ErrorCode.WRONG_LENGTH)
        chain = cmac(self.s_mac, self.chain + frames.frame(Command.SESSION_MESSAGE, message)[:-_MAC_BYTES])
        if not hmac.compare_digest(chain[:_MAC_BYTES], mac):
            raise DeviceError(ErrorCode.AUTHENTICATION_FAILED)
        self.chain = chain
        decryptor = self._cipher().decryptor()
        inner = (decryptor.update(ciphertext) + decryptor.finalize()).rstrip(b"\x00")
        if not inner.endswith(b"\x80"):
            raise DeviceError(ErrorCode.SESSION_FAILED)
        return inner[:-1]

    def encrypt(self, inner: bytes) -> bytes:
        """The whole frame that answers the message last decrypted; counts on to the next message."""
        padded = inner + b"\x80" + bytes(-(len(inner) + 1) % _BLOCK)
        encryptor = self._cipher().encryptor()
        ciphertext = encryptor.update(padded) + encryptor.finalize()
        self.counter += 1
        outer = frames.answer(Command.SESSION_MESSAGE, bytes([self.sid]) + ciphertext + bytes(_MAC_BYTES))
        signed = outer[:-_MAC_BYTES]
        return signed + cmac(self.s_rmac, self.chain + signed)[:_MAC_BYTES]

    def _cipher(self) -> Cipher[modes.CBC]:
        # SCP03 section 6.2.6
        encryptor = Cipher(algorithms.AES(self.s_enc), modes.ECB()).encryptor()  # noqa: S305
        iv = encryptor.update(self.counter.to_bytes(_BLOCK, "big")) + encryptor.finalize()
        return Cipher(algorithms.AES(self.s_enc), modes.CBC(iv))


INNER_MAX_BYTES = (frames.DATA_MAX_BYTES - 1 - _MAC_BYTES) // _BLOCK * _BLOCK - 1
"""The longest inner frame that fits into a session message, with at least one byte of padding."""


def symmetric_keys(static: bytes, host_challenge: bytes, card_challenge: bytes) -> tuple[bytes, bytes, bytes]:
    """S-ENC, S-MAC and S-RMAC from K-ENC and K-MAC (16 bytes each)."""
    k_enc, k_mac = static[:16], static[16:]
    context = host_challenge + card_challenge
    return derive(k_enc, _S_ENC, context), derive(k_mac, _S_MAC, context), derive(k_mac, _S_RMAC, context)


def point(public_key: ec.EllipticCurvePublicKey) -> bytes:
    """The uncompressed point: 04, x, y."""
    return public_key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)


def p256_public_key(encoded: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of an uncompressed point. Raises DeviceError (INVALID_DATA)."""
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), encoded)
    except ValueError:
        raise DeviceError(ErrorCode.INVALID_DATA) from None


def agree(
    device_key: ec.EllipticCurvePrivateKey, host_key: ec.EllipticCurvePublicKey, host_ephemeral: bytes
) -> tuple[bytes, bytes, list[bytes]]:
    """SCP11 section 6.5.2.3: the device's ephemeral point, the receipt, and S-ENC, S-MAC, S-RMAC."""
    ephemeral = ec.generate_private_key(ec.SECP256R1())
    shared = ephemeral.exchange(ec.ECDH(), p256_public_key(host_ephemeral)) + device_key.exchange(ec.ECDH(), host_key)
    # key usage 3c, key type 88 (AES), 16 bytes
    keys = X963KDF(hashes.SHA256(), 64, b"\x3c\x88\x10").derive(shared)
    receipt_key, *session_keys = (keys[at : at + 16] for at in range(0, 64, 16))
    device_point = point(ephemeral.public_key())
    return device_point, cmac(receipt_key, device_point + host_ephemeral), session_keys
