"""Serves one simulated device until SIGTERM or SIGINT.

python -m yubihsm_simulator --listen 127.0.0.1:12345 --state FILE [--serial N] [--firmware 2.4|2.5] [--latency hardware]
"""

import argparse
import signal
from pathlib import Path

from yubihsm_simulator.connector import Connector
from yubihsm_simulator.device import FIRMWARES, Device


def main() -> None:
    """Prints one line when it listens."""
    versions = {f"{major}.{minor}": (major, minor, patch) for major, minor, patch in FIRMWARES}
    parser = argparse.ArgumentParser(prog="python -m yubihsm_simulator", description="A YubiHSM 2 in software.")
    parser.add_argument("--listen", default="127.0.0.1:12345", metavar="HOST:PORT", help="port 0: any free one")
    parser.add_argument("--state", type=Path, metavar="FILE", help="where it is kept; without it, nowhere")
    parser.add_argument("--serial", type=int, default=12345678)
    parser.add_argument("--firmware", choices=versions, default="2.4")
    parser.add_argument("--latency", choices=("none", "hardware"), default="none")
    arguments = parser.parse_args()
    host, _, port = arguments.listen.rpartition(":")
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before any thread starts: all of them inherit it
    device = Device(arguments.serial, versions[arguments.firmware], state=arguments.state, latency=arguments.latency)
    with Connector(device, host, int(port)) as connector:
        print(f"YubiHSM 2 simulator, serial {device.serial}, on {connector.url}", flush=True)
        signal.sigwait(signals)


if __name__ == "__main__":
    main()
