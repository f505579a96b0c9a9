"""A device without a connector: what python-yubihsm's `YubiHsm(backend)` takes, in this process."""

from yubihsm_simulator.device import Device


class DirectBackend:
    """Hands frames to a device."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def transceive(self, msg: bytes) -> bytes:
        """One frame in, one out. Raises ConnectionError where the device is unplugged."""
        if self.device.faults.unplugged:
            raise ConnectionError("The device is unplugged.")
        return self.device.process(msg)

    def close(self) -> None:
        """Nothing to do."""
