"""Images with headers as Jetsons read them: signed, and encrypted where there is an SBK."""

import hashlib
import os
import struct

import tegrasign_v3

CHAIN = (b"BL", b"", b"GP", b"KDK", b"DK")
BLOCK = 262144


class Signer:
    def __init__(self, soc, key, sbk):
        self.soc = soc
        self.key = tegrasign_v3.Pkc(key)
        self.sbk = tegrasign_v3.read_key(sbk) if sbk else None

    def image(self, payload, iv=None, blocks=False):
        return self.t234(payload, iv, blocks) if self.soc == "tegra234" else self.t194(payload)

    def t234(self, payload, iv=None, blocks=False):
        header = bytearray(8192)
        header[:4] = b"NVDA"
        header[5120:5124] = b"STND"
        struct.pack_into("<I", header, 5124, len(payload))
        behind = b""
        if self.sbk:
            header[5188:5200] = iv or os.urandom(12)
            options = ("--block", str(BLOCK), "--iscompressed") if blocks else ()
            aad = bytes(header[5120:5200])
            payload, tag = tegrasign_v3.kdf(self.sbk, CHAIN, bytes(header[5188:5200]), aad, payload, options)
            if blocks:
                behind = tag
            else:
                header[5200:5216] = tag
        header[5216:5280] = hashlib.sha512(payload).digest()
        signature = self.key.sign(bytes(header[4032:]), sha512=True)
        header[144 : 144 + len(signature)] = signature
        header[2976 : 2976 + len(self.key.public)] = self.key.public
        header[4:68] = hashlib.sha512(header[68:]).digest()
        return bytes(header) + payload + behind

    def t194(self, payload):
        header = bytearray(4096)
        header[:4] = b"NVDA"
        key = self.sbk or bytes(16)
        payload += bytes(-len(payload) % 16)
        if self.sbk:
            payload = tegrasign_v3.cbc(key, payload)
        header[2992:3024] = hashlib.sha256(payload).digest()
        header[3024:3040] = tegrasign_v3.cmac(key, payload)
        signature = self.key.sign(bytes(header[2960:]), sha512=False)
        header[512 : 512 + len(signature)] = signature
        header[1024 : 1024 + len(self.key.public)] = self.key.public
        return bytes(header) + payload
