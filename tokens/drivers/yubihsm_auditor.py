"""The driver that reads the audit log of a YubiHSM 2, by an authentication key that can do nothing else."""

import struct
from typing import Any

from yubihsm.defs import COMMAND

from tokens.drivers.yubihsm_device import Device, DeviceSettings
from tokens.frames import Header


class YubihsmAuditorDriver:
    """Implements `tokens.drivers.driver.LogDriver` and `Expiring`.

    Arguments:
        settings: those of `DeviceSettings`.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = DeviceSettings(**settings)
        self._device = Device(self._settings)

    @property
    def keep_alive_s(self) -> float:
        """Well below the 30 s after which the device ends a session."""
        return self._settings.keep_alive_s

    def keep_alive(self) -> None:
        """Uses the session."""
        self._device.keep_alive()

    def open(self) -> Header:
        """Opens a session."""
        return self._device.open()

    def close(self) -> None:
        """Ends the session."""
        self._device.close()

    def check(self) -> None:
        """Reads the log: unlike anything else the device answers to that when the log is full."""
        self.read_log()

    def read_log(self) -> tuple[Header, bytes]:
        """GET LOG ENTRIES: the two counters, and 32 bytes an entry."""
        answer = self._device.send(COMMAND.GET_LOG_ENTRIES)
        # unlogged boots u16, unlogged authentications u16, number of entries u8
        boots, authentications, _ = struct.unpack_from(">HHB", answer)
        return {"unlogged_boots": boots, "unlogged_authentications": authentications}, answer[5:]

    def advance_log(self, number: int) -> None:
        """SET LOG INDEX."""
        self._device.send(COMMAND.SET_LOG_INDEX, struct.pack(">H", number))
