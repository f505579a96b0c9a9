"""Frames, and the fields within them. Integers are big-endian.

    command u8 | length u16 | data          answer: command | 0x80; error: 7f 0001 code

Source: YubiHSM 2 user guide, "Command Reference".
"""

import struct

from yubihsm_simulator.definitions import DeviceError, ErrorCode

DATA_MAX_BYTES = 3136
"""Of one frame, from firmware 2.4.0 on."""

_ANSWER = 0x80
ERROR = 0x7F


def frame(command: int, data: bytes) -> bytes:
    """One frame of a request."""
    return struct.pack(">BH", command, len(data)) + data


def answer(command: int, data: bytes) -> bytes:
    """The frame that answers `command`."""
    return frame(command | _ANSWER, data)


def error(code: int) -> bytes:
    """The frame that answers any command with an error."""
    return frame(ERROR, bytes([code]))


def split(request: bytes) -> tuple[int, bytes]:
    """The command and the data of one frame. Raises DeviceError (WRONG_LENGTH) for anything else."""
    if not 3 <= len(request) <= 3 + DATA_MAX_BYTES:
        raise DeviceError(ErrorCode.WRONG_LENGTH)
    command, length = struct.unpack_from(">BH", request)
    if len(request) != 3 + length:
        raise DeviceError(ErrorCode.WRONG_LENGTH)
    return command, request[3:]


class Fields:
    """Reads the data of a request from left to right; what is missing or left over raises WRONG_LENGTH."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __len__(self) -> int:
        return len(self._data) - self._at

    def take(self, length: int) -> bytes:
        """The next bytes."""
        if not 0 <= length <= len(self):
            raise DeviceError(ErrorCode.WRONG_LENGTH)
        taken = self._data[self._at : self._at + length]
        self._at += length
        return taken

    def rest(self, least: int = 0) -> bytes:
        """All that is left, `least` bytes or more."""
        if len(self) < least:
            raise DeviceError(ErrorCode.WRONG_LENGTH)
        return self.take(len(self))

    def end(self) -> None:
        """Nothing may be left."""
        if len(self):
            raise DeviceError(ErrorCode.WRONG_LENGTH)

    def u8(self) -> int:
        """One byte."""
        return self.take(1)[0]

    def u16(self) -> int:
        """Two bytes."""
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        """Four bytes."""
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        """Eight bytes."""
        return int.from_bytes(self.take(8), "big")
