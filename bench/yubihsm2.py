"""The service on a YubiHSM 2, simulated in this process with the times of the hardware."""

import base64
import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from artifacts import DESCRIPTION, Request
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from load import Load, post
from tools import Runs
from yubihsm import YubiHsm
from yubihsm.defs import CAPABILITY
from yubihsm.objects import AsymmetricKey, AuthenticationKey

from yubihsm_simulator import Connector, Device
from yubihsm_simulator.backend import DirectBackend

SERIAL = 12345678
SIGNER = 2
PASSWORD = "password-of-the-bench"
POLL_S = 0.0005
IDLE_S = 0.5
"""No signature takes longer."""
EDGE_S = 0.3
"""Of a load's beginning and end: not looked at, since not all clients are there yet, or any more."""

SETTINGS = """\
[server]
state_directory = "{directory}/state"
spool_directory = "{directory}/spool"

[providers.yubihsm]
kind = "yubihsm"
connector = "{url}"
serial = {serial}
auth_key_id = {signer}
password = {{ file = "{directory}/password" }}
"""

GRANT = """
[[grants]]
name = "{name}"
signer = "swupdate"
role = "rsa"
distro = "{name}"
provider = "yubihsm"
object = "{name}"
digest = true
"""

Private = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Yubihsm:
    """A simulated device with the keys of `requests`, and settings of a service that uses them."""

    device: Device
    url: str
    config: Path
    requests: tuple[Request, ...]

    def load(self, url: str, request: Request, clients: int, seconds: int) -> tuple[Load, float]:
        """A load on the service, and the share of its time in which the device was busy."""
        self._wait_until_idle()
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(post, url, request, clients, seconds)
            time.sleep(EDGE_S)
            busy, start = self._signed()
            time.sleep(max(0.0, seconds - 2 * EDGE_S))
            still_busy, end = self._signed()
            return running.result(), (still_busy - busy) / (end - start)

    def sign(self, request: Request, seconds: int) -> Runs:
        """The same signatures by python-yubihsm alone, each after the other."""
        self._wait_until_idle()
        name = request.path.split("/")[2]
        digest = hashlib.sha256(DESCRIPTION).digest()
        each = []
        with YubiHsm.connect(self.url) as hsm, hsm.create_session_derived(SIGNER, PASSWORD) as session:
            (key,) = session.list_objects(label=name)
            assert isinstance(key, AsymmetricKey)
            sign = key.sign_pkcs1v1_5 if name.startswith("rsa") else key.sign_ecdsa
            start = time.perf_counter()
            while not each or time.perf_counter() - start < seconds:
                before = time.perf_counter()
                sign(digest, Prehashed(hashes.SHA256()))
                each.append(time.perf_counter() - before)
        return Runs(sum(each), each, 0)

    def _wait_until_idle(self) -> None:
        """A load leaves requests behind that the service has taken and still works on."""
        busy = -1.0
        while self.device.busy_s != busy:
            busy = self.device.busy_s
            time.sleep(IDLE_S)

    def _signed(self) -> tuple[float, float]:
        """How long the device was busy in all, and the time, just after it has finished a signature."""
        busy = self.device.busy_s
        deadline = time.perf_counter() + 5
        while self.device.busy_s == busy and time.perf_counter() < deadline:
            time.sleep(POLL_S)
        return self.device.busy_s, time.perf_counter()


@contextmanager
def simulated_yubihsm(directory: Path) -> Iterator[Yubihsm]:
    """The device, its connector on a free port of 127.0.0.1, and the settings."""
    keys: dict[str, Private] = {
        "rsa2048": rsa.generate_private_key(65537, 2048),
        "p256": ec.generate_private_key(ec.SECP256R1()),
    }
    (directory / "password").write_text(PASSWORD)
    (directory / "password").chmod(0o600)
    device = Device(serial=SERIAL, latency="hardware")
    sign = CAPABILITY.SIGN_PKCS | CAPABILITY.SIGN_ECDSA
    with YubiHsm(DirectBackend(device)).create_session_derived(1, "password") as session:
        AuthenticationKey.put_derived(session, SIGNER, "signer", 0xFFFF, sign, CAPABILITY.NONE, PASSWORD)
        for number, (name, private) in enumerate(keys.items(), 1):
            AsymmetricKey.put(session, number, name, 0xFFFF, sign, private)
    with Connector(device) as connector:
        config = directory / "hsmsign.toml"
        settings = SETTINGS.format(directory=directory, url=connector.url, serial=SERIAL, signer=SIGNER)
        config.write_text(settings + "".join(GRANT.format(name=name) for name in keys))
        requests = tuple(_request(name, private) for name, private in keys.items())
        yield Yubihsm(device, connector.url, config, requests)


def _request(name: str, private: Private) -> Request:
    """A bare digest for `/keys/NAME/sign`."""
    digest = hashlib.sha256(DESCRIPTION).digest()
    public = private.public_key()

    def check(answer: bytes) -> None:
        signature = base64.b64decode(json.loads(answer)["signature"])
        if isinstance(public, rsa.RSAPublicKey):
            public.verify(signature, digest, padding.PKCS1v15(), Prehashed(hashes.SHA256()))
        else:
            public.verify(signature, digest, ec.ECDSA(Prehashed(hashes.SHA256())))

    scheme = "rsa-pkcs1v15" if isinstance(public, rsa.RSAPublicKey) else "ecdsa"
    return Request(
        case=f"YubiHSM 2 {'RSA-2048' if isinstance(public, rsa.RSAPublicKey) else 'P-256'}",
        path=f"/keys/{name}/sign",
        content_type="application/json",
        body=json.dumps({"digest": digest.hex(), "hash": "sha256", "scheme": scheme}).encode(),
        check=check,
    )
