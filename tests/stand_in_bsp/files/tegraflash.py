"""Plays NVIDIA's tegraflash.py and meta-tegra's helpers: checks what they are called with, and makes what they make.

What else it does, the file `mode` beside the BSP's directories says: all that goes wrong in practice, and what hostile
code would do that runs in its place.
"""

import getopt
import glob
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time

import images
import tegrasign_v3

SOC, VERSION = sys.argv[1:3]
ROOT = next(path for path in os.environ["PATH"].split(":") if path.endswith("/Linux_for_Tegra"))


def beside(name, default=""):
    try:
        with open(f"{ROOT}/{name}") as file:
            return file.read().strip()
    except FileNotFoundError:
        return default


MODE = beside("mode")


def check(condition, what):
    if not condition:
        sys.exit(f"stand-in BSP: {what}")


def main():
    long = ["bup", "no-flash", "sign", "user_key=", "bup-type="]
    pairs, names = getopt.gnu_getopt(sys.argv[3:], "u:v:", long)
    options = dict(pairs)
    check(("--bup" in options) != ("--no-flash" in options), "neither or both of --bup and --no-flash")
    check(len(names) == 5, f"{len(names)} arguments: {names}")
    flash_xml, dtb, bcts, _odmdata, kernel = names
    for name in (flash_xml, dtb, kernel, *bcts.split(",")):
        check(os.path.isfile(name), f"{name} is not there")
    check(os.path.basename(os.path.realpath("tegraflash.py")) == "tegraflash.py", "tegraflash.py is no link")
    check(tegrasign_v3.HERE == os.getcwd() + "/_tools/bootloader/", "the scripts are not in a directory of their own")
    check(shutil.which("tegraopenssl") == tegrasign_v3.PROGRAM, "tegraopenssl is found elsewhere")
    check(not os.path.exists(os.path.basename(options["-u"])), "the key is called as a file here")
    with open(options["-u"]) as file:
        text = file.read()
    check("BEGIN PUBLIC KEY" in text and "PRIVATE" not in text, "-u is no public key")
    report(options)
    if MODE in globals():
        globals()[MODE]()
    signer = images.Signer(SOC, options["-u"], options.get("-v"))
    sources = sorted(name for name in os.listdir() if name.endswith((".bin", ".img", ".dtb")))
    if "--bup" in options:
        make_payload(signer, sources, options.get("--bup-type", "bl"))
    else:
        make_set(signer, sources, kernel)
    if MODE == "fails_silently":
        os.remove("flashcmd.txt")


def report(options):
    """What was seen, for the tests."""
    limits = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in ("AS", "CPU", "FSIZE")}
    seen = {
        "argv": sys.argv, "options": options, "cwd": os.getcwd(), "environment": dict(os.environ), "limits": limits,
        "umask": os.umask(0o022), "descriptors": sorted(map(int, os.listdir("/proc/self/fd")))[:-1],
        "version": VERSION, "secrets": list(secrets_found()),
        "copies": sorted(glob.glob("_tools/**", recursive=True)),
    }  # fmt: skip
    write("report.json", json.dumps(seen).encode())


def secrets_found():
    """Where one of the secrets is, whose hexadecimal bytes are in the file `canaries`: nowhere, that is."""
    canaries = [bytes.fromhex(line) for line in beside("canaries").split()]
    places = [path for top in (".", "/in", "/run", "/tmp", "/etc", "/proc/self") for path in files_below(top)]
    for path in places:
        if path.startswith(ROOT):  # the canaries themselves
            continue
        try:
            with open(path, "rb") as file:
                content = file.read(1 << 22)
        except OSError:
            continue
        if any(canary in content for canary in canaries):
            yield path


def files_below(top):
    if top == "/proc/self":
        return ["/proc/self/environ", "/proc/self/cmdline", "/proc/1/environ", "/proc/1/cmdline"]
    return [os.path.join(directory, name) for directory, _, names in os.walk(top) for name in names]


def write(name, content):
    with open(name, "wb") as file:
        file.write(content)


def signed_image(signer, name):
    with open(name, "rb") as file:
        payload = file.read()
    # what goes into blocks has another form than the tests can check
    return signer.image(payload, blocks=bool(signer.sbk) and "dce" in name)


def make_set(signer, sources, kernel):
    """A full set for flashing, and what else is left lying about."""
    os.mkdir(str(os.getpid()))
    for directory in ("signed", "enc_signed", str(os.getpid())):
        os.makedirs(directory, exist_ok=True)
        write(f"{directory}/working", b"of no use to anybody")
    for name in sources:
        stem, _, suffix = name.rpartition(".")
        encrypted = "_encrypt" if signer.sbk else ""
        image = bytearray(signed_image(signer, name))
        if MODE == "spoils_a_signature" and name == sources[-1]:
            header = 144 if SOC == "tegra234" else 512
            image[header : header + 64] = os.urandom(64)
            if SOC == "tegra234":
                image[4:68] = hashlib.sha512(image[68:8192]).digest()
        if MODE == "spoils_an_image" and name == sources[-1]:
            image[-1] ^= 1
        write(f"{stem}_sigheader{encrypted}.{suffix}.signed", bytes(image))
    stem, _, suffix = kernel.rpartition(".")
    write(f"{stem}_sigheader.{suffix}.encrypt.signed", b"of no use to anybody")
    write("flashcmd.txt", b"#!/bin/sh\npython3 ./tegraflash.py --cmd 'flash; reboot'\n")
    write("secureflash.xml", b"<partition_layout/>\n")
    write("flash.xml", b"<partition_layout/>\n")
    write("flash.xml.in", b"an input, overwritten")
    write("APPFILE", b"")
    os.symlink("/etc/passwd", "passwd.signed")
    os.mkfifo("pipe.signed")


def make_payload(signer, sources, kind):
    environment = {name: os.environ.get(name, "") for name in ("BOARDID", "FAB", "BOARDSKU", "BOARDREV", "CHIP_SKU")}
    os.makedirs("payloads_t23x", exist_ok=True)
    payload = b"NVDA is also a word in payloads\n" + json.dumps(environment).encode().ljust(1024)
    for name in sources:
        payload += signed_image(signer, name)
    write(f"payloads_t23x/{kind}_only_payload" + (f".{environment['FAB']}" if environment["FAB"] else ""), payload)


# What goes wrong


def fails():
    print("Traceback (most recent call last): PIN 123456, 0x11223344 0x55667788 sbk used " + "ab" * 32, flush=True)
    print(beside("says"), flush=True)
    sys.exit(3)


def makes_nothing():
    sys.exit(0)


def sleeps():
    subprocess.Popen(["setsid", "sleep", beside("sleep", "1000")])
    time.sleep(1000)


def writes_without_end():
    with open("huge.bin.signed", "wb") as file:
        while True:
            file.write(bytes(1 << 20))


def starts_processes_without_end():
    for _ in range(1000):
        subprocess.Popen(["sleep", "1000"])


def takes_memory_without_end():
    taken = []
    while True:
        taken.append(bytearray(1 << 24))


def prints_without_end():
    while True:
        print("x" * 65536)


def repeats_an_iv():
    sbk = tegrasign_v3.read_key(sys.argv[sys.argv.index("-v") + 1])
    iv = os.urandom(12)
    for content in (b"one", b"one", b"another"):
        tegrasign_v3.kdf(sbk, images.CHAIN, iv, b"", content)


# What hostile code does


def looks_around():
    """Tells what it could read, reach and change."""
    import socket

    found = {"read": [], "network": [], "written": [], "processes": os.listdir("/proc")}
    for path in beside("wanted").split("\n"):
        try:
            found["read"].append([path, os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(64).hex()])
        except OSError:
            pass
    for address in (("127.0.0.1", int(beside("port", "9"))), ("1.1.1.1", 53)):
        try:
            socket.create_connection(address, timeout=1).close()
            found["network"].append(address)
        except OSError:
            pass
    for path in (ROOT + "/bootloader/tegraopenssl", ROOT + "/new", "/run/new", "/etc/new", "/usr/new"):
        try:
            open(path, "ab").close()
            found["written"].append(path)
        except OSError:
            pass
    found["processes"] = [name for name in found["processes"] if name.isdigit()]
    write("found.json", json.dumps(found).encode())


def abuses_the_socket():
    """Sends what is no request, and keeps what is answered."""
    import socket
    import struct

    def frame(arguments, content=b""):
        texts = b"".join(struct.pack(">I", len(each)) + each for each in arguments)
        return struct.pack(">II", len(arguments), len(content)) + content + texts

    sbk = tegrasign_v3.read_key(sys.argv[sys.argv.index("-v") + 1]) if "-v" in sys.argv else bytes(range(32))
    message = tegrasign_v3.derivation(b"label")
    mac = [sbk, b"\x20", b"\x10", message[:16].ljust(16), bytes(32), b"out\0"]
    hmac_of_sbk = struct.pack("<6I", *map(len, mac)) + b"".join(mac)
    other = [bytes(range(1, 17)), b"\x10", b"\x10", bytes(16), bytes(16), b"out\0"]
    requests = {
        "nothing": b"",
        "no arguments": struct.pack(">II", 0, 0),
        "too many arguments": frame([b"--rsa"] * 100),
        "a long argument": frame([b"--rsa", b"x" * 100_000]),
        "a huge request": struct.pack(">II", 2, 0xFFFFFFFF),
        "rubbish": os.urandom(10_000),
        "an unknown kind": frame([b"--exportKey", b"raw"], b"x"),
        "an empty request": frame([b"--rsa", b"raw"]),
        "sizes that overflow": frame([b"--rsa", b"raw"], struct.pack("<8I", *[0xFFFFFFFF] * 8)),
        "the SBK's HMAC": frame([b"--hmacsha256", b"raw"], hmac_of_sbk),
        "the SBK as another type of key": frame([b"--aescmac", b"raw"], hmac_of_sbk),
        "a key of its own": frame([b"--aescmac", b"raw"], struct.pack("<6I", *map(len, other)) + b"".join(other)),
    }
    answers = {}
    for name, data in requests.items():
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("/run/service")
            try:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                answers[name] = client.recv(1 << 16).hex()
            except OSError:
                answers[name] = ""
    write("answers.json", json.dumps(answers).encode())


def asks_without_end():
    for _ in range(100_000):
        tegrasign_v3.call("--sha", __file__)


def leaves_a_program():
    """Leaves a program that goes on asking when the job has ended."""
    program = "/work/_tools/bootloader/tegraopenssl"
    code = f"import os, subprocess\nos.setsid()\nwhile True:\n    subprocess.run(['{program}', '--rsa', __file__])\n"
    write("daemon.py", code.encode())
    subprocess.Popen([sys.executable, "daemon.py"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    check(re.fullmatch(r"tegra\d+", SOC), "no chip")
    main()
