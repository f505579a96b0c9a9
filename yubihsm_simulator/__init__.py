"""A YubiHSM 2 in software: the device's protocol as the vendor's clients speak it, with faults and latencies.

For tests only: keys are kept in the clear.

    device = Device(serial=12345678)
    with Connector(device) as connector:
        YubiHsm.connect(connector.url)
"""

from yubihsm_simulator.connector import Connector
from yubihsm_simulator.device import Device
from yubihsm_simulator.faults import Faults

__all__ = ["Connector", "Device", "Faults"]
