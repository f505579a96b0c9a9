"""Asks the program `tegraopenssl` beside it to sign and to encrypt, by files, as NVIDIA's module of this name does."""

import os
import re
import struct
import subprocess

HERE = os.path.dirname(os.path.realpath(__file__)) + os.sep
PROGRAM = HERE + "tegraopenssl"


def call(*arguments):
    """What the program prints. NVIDIA's scripts, too, take any other status than 0 for the end."""
    done = subprocess.run([PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]}: {done.stdout.decode()}")
    return done.stdout.decode()


def number(value):
    return value.to_bytes((value.bit_length() + 7) // 8, "little")


def request(kind, fields, flags=(), options=()):
    """Writes the file of a request. Returns what is in the file that the last field names, and the request's."""
    raw, output = HERE + f"v3_{kind}_{os.getpid()}.raw", HERE + f"v3_{kind}_{os.getpid()}.out"
    fields = [output.encode() + b"\0" if field is None else field for field in fields]
    with open(raw, "wb") as file:
        file.write(struct.pack(f"<{len(fields) + len(flags)}I", *map(len, fields), *flags) + b"".join(fields))
    call("--" + kind, raw, *options)
    with open(raw, "rb") as file:
        written = file.read()
    with open(output, "rb") as file:
        result = file.read()
    os.remove(raw)
    os.remove(output)
    return result, written


class Pkc:
    """The key in a file, of which only the program knows what it is."""

    def __init__(self, path):
        self.path = path
        self.public = self.montgomery = b""
        text = call("--isPkcKey", path, "pub_key.key", "pub_key.mont")
        if found := re.search(r"Key size is (\d+)", text):
            self.kind, self.signature_bytes = "rsa", int(found[1])
            with open("pub_key.mont", "rb") as file:
                self.montgomery = file.read()
            os.remove("pub_key.mont")
        elif "Valid" in (text := call("--isEccKey", path, "pub_key.key")):
            self.kind, self.signature_bytes = "ecc", 136 if "521" in text else 96
        elif "Valid" in call("--isEd25519Key", path, "pub_key.key"):
            self.kind, self.signature_bytes = "ed25519", 64
        else:
            raise RuntimeError("no key")
        with open("pub_key.key", "rb") as file:
            self.public = file.read()
        os.remove("pub_key.key")

    def sign(self, message, sha512):
        place = bytes(self.signature_bytes)
        fields = [self.path.encode() + b"\0", number(len(message)), message, place]
        if self.kind == "rsa":
            fields += [b"", b""]
        else:
            fields += [b""]
        return request(self.kind, [*fields, None], () if self.kind == "ed25519" else (int(sha512),))[0]


def read_key(path):
    with open(path) as file:
        return bytes.fromhex(file.read().replace("0x", ""))


def cbc(key, message):
    fields = [key, number(len(key)), number(len(message)), message, bytes(len(message)), None, b""]
    return request("aescbc", fields)[0]


def cmac(key, message):
    return request("aescmac", [key, number(len(key)), number(len(message)), message, bytes(16), None])[0]


def derivation(label, context=b"\0"):
    return b"\0\0\0\1" + label + b"\0" + context + b"\0\0\1\0"


def kdf(sbk, chain, iv, aad, content, options=()):
    """The ciphertext, and its tag or meta blob."""
    messages = [derivation(label) if label else b"" for label in chain]
    fields = [bytes(32), bytes(12), bytes(16), sbk, b"decrypts NVIDIA's", *messages, iv, aad, bytes(16), content, b"5"]
    tag, written = request("kdfoem", [*fields, None], options=options)
    behind = len(HERE + f"v3_kdfoem_{os.getpid()}.out") + 1 + 1
    return written[len(written) - behind - len(content) : len(written) - behind], tag
