"""AES-CMAC on an AES key: the examples of NIST SP 800-38B."""

import asyncio

import pytest
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.cmac import CMAC
from hypothesis import given
from hypothesis import strategies as st

from tokens.cmac import cmac
from tokens.symmetric import SymmetricAlgorithm
from tokens.symmetric_file import MemorySymmetricKey
from tokens.threads import Threads

MESSAGE = bytes.fromhex(
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
)
# the key of examples D.1 and D.3, and the MACs of the message's first 0, 16, 40 and 64 bytes
EXAMPLES = {
    "2b7e151628aed2a6abf7158809cf4f3c": {
        0: "bb1d6929e95937287fa37d129b756746",
        16: "070a16b46b4d4144f79bdd9dd04a287c",
        40: "dfa66747de9ae63030ca32611497c827",
        64: "51f0bebf7e3b9d92fc49741779363cfe",
    },
    "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4": {
        0: "028962f61b7bf89efc6b551f4667d983",
        16: "28a7023f452e8f82bd4bf28d8c37c35c",
        40: "aaf3d8f1de5640c232f5b169b9c911e6",
        64: "e1992190549f6ed5696a2c056c315410",
    },
}


def made(key: bytes, message: bytes) -> bytes:
    async def run() -> bytes:
        threads = Threads("test", 1)
        algorithm = SymmetricAlgorithm.AES_128 if len(key) == 16 else SymmetricAlgorithm.AES_256
        mac = await cmac(MemorySymmetricKey(algorithm, key, "test", threads), message)
        await threads.stop()
        return mac

    return asyncio.run(run())


@pytest.mark.parametrize(("key", "size"), [(key, size) for key, macs in EXAMPLES.items() for size in macs])
def test_published(key: str, size: int) -> None:
    assert made(bytes.fromhex(key), MESSAGE[:size]).hex() == EXAMPLES[key][size]


@given(st.binary(min_size=16, max_size=16), st.binary(max_size=70))
def test_is_that_of_openssl(key: bytes, message: bytes) -> None:
    mac = CMAC(AES(key))
    mac.update(message)
    assert made(key, message) == mac.finalize()
