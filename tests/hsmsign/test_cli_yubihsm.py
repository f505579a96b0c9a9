"""`hsmsign yubihsm setup` and `clone`, as installed, on simulated devices; details are in tests/tokens/provisioning."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from yubihsm.defs import COMMAND, OBJECT

from tests.conftest import ROOT, SoftHsm
from tests.tokens.provisioning.conftest import EC_KEY, Bench
from yubihsm_simulator import Connector, Device

PROGRAM = Path(sys.executable).with_name("hsmsign")
ENV = {
    "PATH": os.defpath,
    "HOME": "/nonexistent",
    "http_proxy": "http://127.0.0.1:9",
    "HTTP_PROXY": "http://127.0.0.1:9",
}
SPLIT = """
[wrap_key]
id = 0x0010
label = "wrap"
domains = [1]
split = { threshold = 2, files = ["DIRECTORY/share1", "DIRECTORY/share2", "DIRECTORY/share3"] }
"""
EXPORTABLE = EC_KEY + "exportable = true\n"


def command(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [PROGRAM, "yubihsm", *arguments], env=ENV, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def make_bench(tmp_path: Path) -> Iterator[Callable[[Device], Bench]]:
    with ExitStack() as stack:

        def make(device: Device) -> Bench:
            directory = tmp_path / str(device.serial)
            directory.mkdir()
            return Bench(device, stack.enter_context(Connector(device)), directory)

        yield make


@pytest.fixture
def bench(make_bench: Callable[[Device], Bench]) -> Bench:
    return make_bench(Device(serial=7550099))


class TestSetup:
    def test_the_plan_changes_nothing(self, bench: Bench) -> None:
        done = command("setup", bench.file(EC_KEY))
        assert (done.returncode, done.stderr) == (0, "")
        assert ' 5. Generate the key 0x0100 "generated" (ecp256), domain 1, for sign-ecdsa; it can never' in done.stdout
        assert "The device is there: 7550099, firmware 2.4.0.\nNothing was changed." in done.stdout
        assert bench.device.commands.keys() == {COMMAND.DEVICE_INFO}
        assert [path.name for path in bench.directory.iterdir()] == ["setup.toml"]

    def test_the_plan_without_a_device(self, bench: Bench) -> None:
        bench.connector.stop()
        done = command("setup", bench.file(EC_KEY))
        assert done.returncode == 0
        assert "does not answer" in done.stdout

    def test_apply(self, bench: Bench) -> None:
        done = command("setup", bench.file(EC_KEY), "--apply")
        assert (done.returncode, done.stderr) == (0, "")
        [transcript] = bench.directory.glob("setup-7550099-*Z.jsonl")
        assert f"Done. The transcript is {transcript}." in done.stdout
        steps = [json.loads(line)["step"] for line in transcript.read_text().splitlines()[1:]]
        assert done.stdout.splitlines()[:-1] == steps
        with bench.admin() as admin:
            assert {each.id for each in admin.list_objects()} == {2, 3, 4, 0x100}
        assert bench.password("admin") not in done.stdout + transcript.read_text()

    def test_mistakes(self, bench: Bench) -> None:
        done = command("setup", bench.file(EC_KEY.replace("ecp256", "ecp999"), "[colour]\n"))
        assert done.returncode == 2
        assert "keys[0].algorithm: it should be 'rsa2048'" in done.stderr
        assert "colour: there is no such key" in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize("options", [(), ("--apply",)])
    def test_another_device(self, bench: Bench, options: tuple[str, ...]) -> None:
        done = command("setup", bench.file(serial=1), *options)
        assert done.returncode == 1
        assert "has the serial number 7550099, not 1." in done.stderr

    def test_terminated(self, make_bench: Callable[[Device], Bench]) -> None:
        """SIGTERM ends it as Ctrl-C does: the device is reset. Meanwhile it can leave no core file."""
        reached, released = threading.Event(), threading.Event()

        def sleep(_: float) -> None:
            reached.set()
            released.wait(30)

        bench = make_bench(Device(serial=7550099, sleep=sleep))
        bench.device.faults.delays_s[COMMAND.GENERATE_ASYMMETRIC_KEY] = 1.0
        arguments = [PROGRAM, "yubihsm", "setup", bench.file(EC_KEY), "--apply"]
        with subprocess.Popen(arguments, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert reached.wait(30)
                limits = Path(f"/proc/{process.pid}/limits").read_text().splitlines()
                assert next(line for line in limits if line.startswith("Max core file size")).split()[4:6] == ["0", "0"]
                process.send_signal(signal.SIGTERM)
            finally:
                released.set()
            _, said = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "It was interrupted." in said
        assert "The device was reset and is as new" in said
        assert "Traceback" not in said
        assert bench.is_new()


class TestClone:
    @pytest.fixture
    def files(self, make_bench: Callable[[Device], Bench]) -> tuple[Path, Path]:
        """Of two devices that were set up; the source has a key that may be copied, and one that may not."""
        source, target = make_bench(Device(serial=1001)), make_bench(Device(serial=1002))
        bound = EC_KEY.replace("0100", "0101").replace('"generated"', '"bound"')
        one = source.file(SPLIT, EXPORTABLE, bound)
        shares = [str(source.directory / f"share{number}") for number in (1, 3)]
        wrap_key = SPLIT[: SPLIT.index("split")] + f"combine = {json.dumps(shares)}\n"
        other = target.file(wrap_key)
        for file in (one, other):
            assert command("setup", file, "--apply").returncode == 0
        self.target = target
        return one, other

    def ids(self) -> set[int]:
        with self.target.admin() as admin:
            return {each.id for each in admin.list_objects(object_type=OBJECT.ASYMMETRIC_KEY)}

    def test_clone(self, files: tuple[Path, Path]) -> None:
        refused = command("clone", *files, "--apply")
        assert refused.returncode == 1
        assert 'Bound to its device, and not copied:\n  asymmetric key 0x0101 "bound"' in refused.stdout
        assert "Some objects cannot be copied" in refused.stderr
        assert self.ids() == set()

        planned = command("clone", *files, "--leave-bound")
        assert (planned.returncode, planned.stderr) == (0, "")
        assert 'To be copied:\n  asymmetric key 0x0100 "generated"' in planned.stdout
        assert "Nothing was changed." in planned.stdout
        assert self.ids() == set()

        done = command("clone", *files, "--leave-bound", "--apply")
        assert (done.returncode, done.stderr) == (0, "")
        assert "a signature by the copy verifies with the source's public key" in done.stdout
        assert self.ids() == {0x100}
        transcript = Path(done.stdout.split()[-1].rstrip("."))
        [line] = transcript.read_text().splitlines()
        assert json.loads(line)["object"]["origin"] == "generated|imported_wrapped"

        again = command("clone", *files, "--leave-bound")
        assert 'There already, and the same:\n  asymmetric key 0x0100 "generated"' in again.stdout

    def test_conflict(self, files: tuple[Path, Path]) -> None:
        assert command("clone", *files, "--leave-bound", "--apply").returncode == 0
        with self.target.admin() as admin:
            key = admin.get_object(0x100, OBJECT.ASYMMETRIC_KEY)
            info = key.get_info()
            key.delete()
            type(key).generate(admin, 0x100, "other", 1, info.capabilities, info.algorithm)
        done = command("clone", *files, "--leave-bound", "--apply")
        assert done.returncode == 1
        assert 'Different on the target:\n  asymmetric key 0x0100 "generated"' in done.stdout
        assert "The target holds other objects with these ids." in done.stderr


class TestGuide:
    """docs/yubihsm.md, its commands run as they stand there, against the simulator."""

    PAGE = (ROOT / "docs/yubihsm.md").read_text()

    def block(self, after: str, language: str) -> str:
        """The first code block below a line of the page."""
        text = self.PAGE[self.PAGE.index(after) :]
        begin = text.index(f"```{language}\n") + len(f"```{language}\n")
        return text[begin : text.index("```", begin)]

    def run(self, script: str, directory: Path) -> str:
        """Runs it by bash; what it leaves in the background is waited for until it listens, and ended with it."""
        listens = "until (exec 3<>/dev/tcp/127.0.0.1/$1) 2>/dev/null; do sleep 0.05; done"
        script = f"listens() {{ {listens}; }}\ntrap 'jobs -p | xargs -r kill; wait' EXIT\n{script}"
        path = f"{PROGRAM.parent}:{ROOT}/.cache/debian/bin:{os.defpath}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=directory,
            env=ENV | {"PATH": path, "tree": str(ROOT), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def test_ten_commands_and_a_second_device(self, softhsm: SoftHsm, tmp_path: Path) -> None:
        pki = softhsm.keys / "demo-file-rsa2048/imxsign/imx-cst-keys.tar.gz"
        for path in (pki, ROOT / ".cache/u-boot/nitrogen6q/u-boot-dtb.imx"):
            shutil.copy(path, tmp_path)
        connector, other, service = free_ports(3)
        local = {'12345"': f'{connector}"', ":12345 ": f":{connector} ", "/opt/NXP": f"{ROOT}/.cache/cst"}

        def here(text: str) -> str:
            for there, instead in local.items():
                text = text.replace(there, instead)
            return text

        setup = here((ROOT / "docs/yubihsm-setup.toml").read_text())
        (tmp_path / "setup.toml").write_text(setup)
        (tmp_path / "hsmsign.toml").write_text(here(self.block("| `hsmsign.toml` |", "toml")))
        csf = (ROOT / "docs/signers/imx.md").read_text()
        (tmp_path / "csf.txt").write_text(csf[csf.index("[Header]") : csf.index("```\n\nAHAB")])
        simulator = here(self.block("Without a device,", "sh"))
        script = self.block("## Ten commands", "sh")
        script = script.replace("yubihsm-connector &\n", f"{simulator}listens {connector}\n")
        script = script.replace("serve &\n", f"serve --port {service} &\nlistens {service}\n")
        script = script.replace("sign imx ", f"sign imx --server http://127.0.0.1:{service} ")
        # the log is read every five seconds
        script = script.replace("yubihsm audit", "yubihsm audit | grep '1 in the log'; do sleep 1; done")
        script = script.replace("hsmsign yubihsm audit", "until hsmsign yubihsm audit")
        said = self.run(script, tmp_path)
        assert "sign-pkcs1 with key 0x0100 by authentication key 0x0002: 1 asked for, 1 answered" in said
        verify = """
        csf_parser -c u-boot-dtb.csf > parsed
        openssl x509 -inform DER -in output/cert1.der -out img.pem
        openssl cms -verify -binary -inform DER -in output/sig0.bin -content u-boot-dtb.imx -certfile img.pem \
                -CAfile crts/SRK1_sha256_2048_65537_v3_ca_crt.pem -partial_chain -out signed
        cmp signed u-boot-dtb.imx
        """
        self.run(verify, tmp_path)

        second = setup[: setup.index("# The keys. Algorithms")].replace(str(connector), str(other))
        second = second.replace("serial = 12345678", "serial = 12345679")
        second = re.sub(r'"(\w+)\.password"', r'"second-\1.password"', second)
        second = re.sub(
            r"^split = .*$", self.block("passwords of their own, no keys", "toml"), second, flags=re.MULTILINE
        )
        (tmp_path / "second.toml").write_text(second)
        script = simulator + f"listens {connector}\n"
        script += simulator.replace(str(connector), str(other)).replace("device.json", "other.json --serial 12345679")
        script += f"listens {other}\n"
        commands = self.block("combine =", "sh").splitlines()
        # the second of them says what would not be copied, and fails
        said = self.run(script + "\n".join((commands[0], f"! {commands[1]}", commands[2])), tmp_path)
        assert said.count("a signature by the copy verifies with the source's public key") == 2
        assert 'Bound to its device, and not copied:\n  asymmetric key 0x0110 "swupdate"' in said


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]
