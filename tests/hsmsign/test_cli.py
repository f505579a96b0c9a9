import email.utils
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import hsmsign
from hsmsign.cli import main
from signers.registry import SIGNERS
from tests.attestations import SERIAL, Chain, der
from tokens.provider import spki_sha256

DESCRIPTION = b"""software = {
  version = "1.0.0";
  images: ( { filename = "rootfs.img"; device = "/dev/null"; type = "raw";
    sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"; } );
}
"""
PROGRAM = Path(sys.executable).with_name("hsmsign")


def command(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """The installed program, with nothing of this process's settings."""
    env = {"PATH": os.defpath, "HOME": "/nonexistent", **environ}
    return subprocess.run([PROGRAM, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def description(tmp_path: Path) -> Path:
    path = tmp_path / "sw-description"
    path.write_bytes(DESCRIPTION)
    return path


@pytest.fixture(scope="module")
def server(softhsm) -> Iterator[str]:
    """The real service on the fixtures; its URL."""
    arguments = [PROGRAM, "serve", "--config", softhsm.config, "--port", "0"]
    env = {"PATH": os.defpath, "HSMSIGN_LOG__FORMAT": "json"}
    with subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        port = next(json.loads(line)["port"] for line in process.stdout if '"serving"' in line)
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


class TestServer:
    """Against the real service."""

    def test_sign(self, server: str, softhsm, description: Path, tmp_path: Path) -> None:
        output = tmp_path / "sw-description.sig"
        done = command(
            *("sign", "swupdate", "--server", server, "--distro", "demo-token", "--method", "RSA"),
            *("--key-uri", "pkcs11:token=hsmsign;object=swupdate-rsa;pin-value=password", "--backend", "pkcs11"),
            *("--sw-description", str(description), "-o", str(output)),
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        verify = ["openssl", "dgst", "-sha256", "-verify", softhsm.public_key("swupdate-rsa"), "-signature", output]
        subprocess.run([*verify, description], check=True, capture_output=True)
        assert [path.name for path in tmp_path.iterdir()] == ["sw-description", "sw-description.sig"]

    def test_what_the_server_refuses(self, server: str, description: Path, tmp_path: Path) -> None:
        output = tmp_path / "kept"
        output.write_text("what was there")
        done = command(
            *("sign", "swupdate", "--distro", "other", "--sw-description", str(description), "-o", str(output)),
            HSMSIGN_SERVER=server,
        )
        assert done.returncode == 3
        assert (
            "There is no such key. No grant gives swupdate a key in the role rsa for the distro other." in done.stderr
        )
        assert "add a grant" in done.stderr
        assert re.search(r"Request id: \w+", done.stderr)
        assert output.read_text() == "what was there"

    def test_fields_at_fault_are_named(self, server: str, tmp_path: Path) -> None:
        done = command("sign", "swupdate", "--server", server, "--distro", "../x", "-o", str(tmp_path / "x"))
        assert done.returncode == 3
        assert "  distro: " in done.stderr

    def test_keys(self, server: str) -> None:
        done = command("keys", "--server", server, COLUMNS="140")
        assert done.returncode == 0
        assert re.search(r"demo-token-rsa +swupdate +rsa +demo-token +softhsm +RSA-2048 +yes", done.stdout)
        listed = json.loads(command("keys", "--server", server, "--json").stdout)
        assert {key["name"] for key in listed["keys"]} >= {"demo-token-rsa", "demo-file-cms"}


class TestServe:
    def test_all_mistakes_are_printed(self, tmp_path: Path) -> None:
        (tmp_path / "x.toml").write_text("[server]\nprot = 1\n")
        done = command("serve", "--config", str(tmp_path / "x.toml"), HSMSIGN_LOG__LEVEL="loud")
        assert done.returncode == 2
        assert 'server.prot: there is no such key - did you mean "port"?' in done.stderr
        assert (
            "log.level: it should be 'debug', 'info', 'warning' or 'error' (set by HSMSIGN_LOG__LEVEL)" in done.stderr
        )
        assert "Traceback" not in done.stderr

    def test_a_port_that_is_taken(self, server: str, softhsm) -> None:
        port = server.rpartition(":")[2]
        done = command("serve", "--config", str(softhsm.config), "--port", port)
        assert done.returncode == 1
        assert f"Cannot listen on 127.0.0.1 port {port}: " in done.stderr
        assert "Traceback" not in done.stderr

    def test_another_address_is_warned_of(self, softhsm) -> None:
        arguments = [PROGRAM, "serve", "--config", softhsm.config, "--port", "0", "--address", "0.0.0.0"]  # noqa: S104 - what is tested
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            lines = [next(process.stdout), next(process.stdout)]
            process.send_signal(signal.SIGTERM)
            process.stdout.read()
        assert "there is no authentication" in "".join(lines)
        assert process.returncode == 0


class Answers(ThreadingHTTPServer):
    """Answers requests with what `script` holds, one after the other, and keeps what it got."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.bodies: list[bytes] = []
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Answers

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.script.pop(0)(self)

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.server.script.pop(0)(self)

    def log_message(self, *_: Any) -> None:
        pass


def answer(
    status: int, body: bytes = b"", declared: int | None = None, **headers: str
) -> Callable[[BaseHTTPRequestHandler], None]:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if declared is None else declared))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return send


def problem(status: int, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    document = {"title": "Too busy", "detail": "It is busy\x1b[31m", "hint": "Wait.", "request_id": "r1"}
    return answer(status, json.dumps(document).encode(), **headers)


@pytest.fixture
def answers() -> Iterator[Answers]:
    with Answers() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def sign(description: Path, tmp_path: Path):
    """Signs in this process; the output is tmp_path/out/signed."""
    (tmp_path / "out").mkdir()

    def sign(url: str, *arguments: str, **environ: str) -> Result:
        given = ["--distro", "d", "--sw-description", str(description), "-o", str(tmp_path / "out/signed")]
        return CliRunner(env=environ).invoke(main, ["sign", "swupdate", "--server", url, *given, *arguments])

    return sign


class TestClient:
    """Against a server that answers what a test tells it to."""

    def test_the_form(self, answers: Answers, sign, tmp_path: Path) -> None:
        answers.script = [answer(200, b"signed")]
        assert sign(answers.url, "--method", "CMS").exit_code == 0
        assert (tmp_path / "out/signed").read_bytes() == b"signed"
        (body,) = answers.bodies
        assert re.findall(rb'name="([^"]+)"', body) == [b"distro", b"method", b"sw-description", b"sw-description"]
        assert DESCRIPTION in body
        assert b"key-uri" not in body

    def test_the_answer_has_the_mode_that_the_umask_says(self, answers: Answers, sign, tmp_path: Path) -> None:
        answers.script = [answer(200, b"signed")]
        before = os.umask(0o027)
        try:
            sign(answers.url)
        finally:
            os.umask(before)
        assert (tmp_path / "out/signed").stat().st_mode & 0o777 == 0o640

    def test_a_busy_server_is_asked_again_when_it_says(self, answers: Answers, sign, tmp_path: Path) -> None:
        soon = email.utils.formatdate(time.time() + 1, usegmt=True)
        answers.script = [problem(503, Retry_After="1"), problem(429, Retry_After=soon), answer(200, b"signed")]
        begun = time.monotonic()
        result = sign(answers.url)
        assert result.exit_code == 0
        assert time.monotonic() - begun >= 1
        assert "503 Too busy. It is busy?[31m. Trying again in 1 s." in result.stderr
        assert (tmp_path / "out/signed").read_bytes() == b"signed"
        assert len({body.replace(body.partition(b"\r\n")[0], b"") for body in answers.bodies}) == 1

    def test_patience_ends(self, answers: Answers, sign) -> None:
        answers.script = [problem(503, Retry_After="0")] * 3
        assert sign(answers.url, "--retries", "2").exit_code == 4
        assert len(answers.bodies) == 3
        answers.script = [problem(429, Retry_After="100")]
        begun = time.monotonic()
        assert sign(answers.url, "--max-wait", "20").exit_code == 3
        assert time.monotonic() - begun < 5

    @pytest.mark.parametrize(("status", "code"), [(400, 3), (403, 3), (413, 3), (500, 4), (502, 4), (504, 4), (302, 4)])
    def test_exit_codes(self, answers: Answers, sign, tmp_path: Path, status: int, code: int) -> None:
        answers.script = [problem(status)]
        result = sign(answers.url)
        assert result.exit_code == code
        assert result.stderr == "Error: Too busy. It is busy?[31m.\nWait.\nRequest id: r1\n"
        assert list((tmp_path / "out").iterdir()) == []

    @pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b'"x"', b"\xff", b"x" * 100_000])
    def test_an_error_that_is_no_problem_document(self, answers: Answers, sign, body: bytes) -> None:
        answers.script = [answer(500, body)]
        result = sign(answers.url)
        assert result.exit_code == 4
        assert "The server answered 500 Internal Server Error." in result.stderr

    def test_an_answer_that_breaks_off_leaves_nothing(self, answers: Answers, sign, tmp_path: Path) -> None:
        (tmp_path / "out/signed").write_text("before")
        answers.script = [answer(200, b"sig", declared=6)]
        result = sign(answers.url)
        assert result.exit_code == 5
        assert "broke off" in result.stderr
        assert [(path.name, path.read_text()) for path in (tmp_path / "out").iterdir()] == [("signed", "before")]

    def test_no_answer_in_time(self, answers: Answers, sign) -> None:
        answers.script = [lambda _: time.sleep(1)]
        result = sign(answers.url, "--timeout", "0.2")
        assert result.exit_code == 5
        assert "No answer in 0.2 s." in result.stderr

    def test_nobody_there(self, sign) -> None:
        result = sign("http://127.0.0.1:1")
        assert result.exit_code == 5
        assert "Cannot connect to http://127.0.0.1:1" in result.stderr

    @pytest.mark.parametrize("url", ["nonsense", "ftp://host", "http://", "http://host:port"])
    def test_a_url_that_is_none(self, sign, url: str) -> None:
        assert sign(url).exit_code in (2, 5)

    def test_no_proxy_of_the_environment_is_asked(self, answers: Answers, sign) -> None:
        answers.script = [answer(200, b"signed")]
        nobody = "http://127.0.0.1:1"
        assert sign(answers.url, HTTP_PROXY=nobody, http_proxy=nobody, ALL_PROXY=nobody).exit_code == 0

    def test_a_large_file_is_streamed(self, answers: Answers, sign, tmp_path: Path) -> None:
        with (tmp_path / "large.swu").open("wb") as file:
            file.truncate(32 * 1024**2)
        answers.script = [answer(200, b"signed")]
        assert sign(answers.url, "--artifact", str(tmp_path / "large.swu")).exit_code == 0
        assert len(answers.bodies[0]) > 32 * 1024**2

    def test_an_output_that_can_be_none(self, answers: Answers, sign, tmp_path: Path) -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        for output in (tmp_path / "missing/signed", fifo, tmp_path):
            result = sign(answers.url, "-o", str(output))
            assert result.exit_code == 2
            assert "--output" in result.stderr
        assert answers.bodies == []

    def test_a_link_stays_a_link(self, answers: Answers, sign, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "out/signed")
        answers.script = [answer(200, b"signed")]
        assert sign(answers.url, "-o", str(tmp_path / "link")).exit_code == 0
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "out/signed").read_bytes() == b"signed"


class TestAttest:
    """`hsmsign keys attest` against a server that says what a test tells it to: it is not believed."""

    KEY = ec.generate_private_key(ec.SECP256R1()).public_key()
    CHAIN = Chain()

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        path = tmp_path / "roots.pem"
        path.write_bytes(b"".join(each.public_bytes(Encoding.PEM) for each in self.CHAIN.roots))
        return path

    @pytest.fixture
    def attest(self, answers: Answers):
        def attest(*arguments: str, verified: bool = True, key: Any = self.KEY, **says: Any) -> Result:
            made = self.CHAIN.attest(self.KEY, **says)
            pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
            error = {"type": "/problems/key-not-attested", "title": "x", "detail": "It is not.", "hint": "Look."}
            document = {
                "name": "a/b",
                "public_key_pem": pem,
                "spki_sha256": "what the server says",
                "certificate_pem": ssl.DER_cert_to_PEM_cert(made.certificate),
                "chain_pem": "".join(map(ssl.DER_cert_to_PEM_cert, made.issuers)),
                "verified": verified,
                "error": None if verified else error,
            }
            answers.script = [answer(200, json.dumps(document).encode())]
            given = ["keys", "--server", answers.url, "attest", "a/b", *arguments]
            return CliRunner(env={"COLUMNS": "200"}).invoke(main, given)

        return attest

    def test_what_the_device_says(self, answers: Answers, attest, root: Path, tmp_path: Path) -> None:
        result = attest("--root", str(root), "--out", str(tmp_path / "new/out"))
        assert (result.exit_code, result.stderr) == (0, "")
        assert answers.paths == ["/keys/a%2Fb/attestation"]
        shown = dict(re.split(r" {2,}", line.rstrip(), maxsplit=1) for line in result.stdout.splitlines())
        assert shown == {
            "device": f"YubiHSM 2, serial {SERIAL}, firmware 2.4.0", "key": "0x0100 Schlüssel",
            "spki_sha256": spki_sha256(self.KEY), "origin": "generated", "exportable": "no", "domains": "1, 3, 16",
            "capabilities": "sign-pkcs, sign-pss", "proven by": "CN=Test Root",
        }  # fmt: skip
        assert sorted(path.name for path in (tmp_path / "new/out").iterdir()) == ["attestation.pem", "chain.pem"]
        verify = ["openssl", "verify", "-CAfile", root, "-untrusted", "chain.pem", "attestation.pem"]
        subprocess.run(verify, cwd=tmp_path / "new/out", check=True, capture_output=True)

    def test_json(self, attest, root: Path) -> None:
        result = attest("--json", "--root", str(root))
        assert result.exit_code == 0
        assert json.loads(result.stdout)["verified"] is True

    @pytest.mark.parametrize(
        ("says", "message"),
        [
            ({"e3": der(3, b"\0\2")}, "The device did not generate the key, which was imported"),
            ({"e5": der(3, b"\0" + (1 << 16).to_bytes(8))}, "may leave its device under a wrap key"),
            ({"e3": b""}, "malformed"),
            ({"key": ec.generate_private_key(ec.SECP256R1()).public_key()}, "is for another key"),
            ({"verified": False}, "It is not."),
        ],
    )
    def test_what_is_not_proven(self, attest, root: Path, says: dict[str, Any], message: str) -> None:
        result = attest("--root", str(root), **says)
        assert result.exit_code == 1
        assert message in result.stderr
        assert "Traceback" not in result.output

    def test_yubico_is_whom_it_must_lead_to(self, attest) -> None:
        result = attest()
        assert result.exit_code == 1
        assert "leads to no pinned certificate" in result.stderr
        assert result.stdout == ""

    def test_files_that_are_none(self, attest, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("text")
        result = attest("--root", str(tmp_path / "text"))
        assert (result.exit_code, "holds no certificate" in result.stderr) == (1, True)
        result = attest("--out", str(tmp_path / "text/x"))
        assert (result.exit_code, "cannot be written" in result.stderr) == (1, True)
        assert attest("--root", str(tmp_path / "missing")).exit_code == 2

    def test_certificates_that_are_none(self, answers: Answers, root: Path) -> None:
        document = {"public_key_pem": "x", "certificate_pem": "", "chain_pem": "", "verified": True}
        answers.script = [answer(200, json.dumps(document).encode())]
        result = CliRunner().invoke(main, ["keys", "attest", "k", "--server", answers.url, "--root", str(root)])
        assert result.exit_code == 5

    def test_a_key_of_a_file(self, server: str) -> None:
        done = command("keys", "attest", "demo-file-cms", "--server", server)
        assert done.returncode == 3
        assert "A provider of kind file cannot attest its keys." in done.stderr
        assert command("keys", "attest", "../keys", HSMSIGN_SERVER=server).returncode == 3


class TestOptions:
    @pytest.mark.parametrize("signer", SIGNERS, ids=lambda signer: signer.name)
    def test_every_field_of_a_form_is_an_option(self, signer) -> None:
        shown = CliRunner().invoke(main, ["sign", signer.name, "--help"]).output
        for name, field in signer.form.model_fields.items():
            assert f"--{(field.alias or name).replace('_', '-')} " in shown

    def test_what_the_form_says_is_held_before_anything_is_sent(self, sign, tmp_path: Path) -> None:
        for wrong in (("--method", "DSA"), ("--artifact", str(tmp_path / "missing")), ("--unknown", "x")):
            assert sign("http://127.0.0.1:1", *wrong).exit_code == 2
        assert CliRunner().invoke(main, ["sign", "swupdate", "-o", str(tmp_path / "x")]).exit_code == 2

    def test_version(self) -> None:
        assert command("--version").stdout == f"hsmsign {hsmsign.__version__}\n"

    def test_signing_loads_no_part_of_a_server(self) -> None:
        script = "import sys, hsmsign.cli; print(*sys.modules)"
        loaded = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout.split()
        assert {"quart", "hypercorn", "boto3", "hsmsign.settings"}.isdisjoint(loaded)


class TestProgress:
    def test_a_terminal_sees_how_far_it_is(self, server: str, description: Path, tmp_path: Path) -> None:
        arguments = ["sign", "swupdate", "--server", server, "--distro", "demo-token"]
        arguments += ["--sw-description", str(description), "-o", str(tmp_path / "signed")]
        ours, theirs = os.openpty()
        with os.fdopen(ours, "rb", buffering=0) as terminal:
            subprocess.run([PROGRAM, *arguments], stderr=theirs, check=True, env={"TERM": "xterm"}, timeout=60)
            os.close(theirs)
            shown = b""
            while chunk := _read(terminal):
                shown += chunk
        assert b"Sending" in shown or b"Signing" in shown or b"Receiving" in shown
        assert (tmp_path / "signed").stat().st_size == 256


def _read(terminal: Any) -> bytes:
    try:
        return bytes(terminal.read(65536))
    except OSError:  # the other end has closed
        return b""
