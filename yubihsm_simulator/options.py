"""The device's options: force-audit, command-audit, algorithm toggle.

Source: YubiHSM 2 user guide, "SET OPTION" and "Set Command Audit Option".
"""

from yubihsm_simulator.definitions import Algorithm, Command, DeviceError, ErrorCode, OptionCode

OFF, ON, FIXED = 0, 1, 2
"""FIXED is ON until the device is reset."""

# in the order in which the hardware tells them; 07 and 09 are not documented
_AUDITED = bytes.fromhex(
    "0103040506070908404142434445464755564849574a4b4c4d674e4f505152535458595a5b5c5d5e5f606162636465"
    "6668696a6b6c0a6d6e6f7071727374757677"
)


class Options:
    """The values of all options.

    Attributes:
        force_audit: OFF, ON or FIXED.
        command_audit: the same for each command.
        algorithms: whether each algorithm is enabled.
        revision: counts changes.
    """

    def __init__(self) -> None:
        self.force_audit = OFF
        self.command_audit: dict[int, int] = dict.fromkeys(_AUDITED, OFF)
        self.algorithms: dict[int, bool] = {int(algorithm): True for algorithm in Algorithm}
        self.revision = 0

    def get(self, option: int) -> bytes:
        """The value of an option. Raises DeviceError (INVALID_DATA)."""
        match option:
            case OptionCode.FORCE_AUDIT:
                return bytes([self.force_audit])
            case OptionCode.COMMAND_AUDIT:
                return bytes(byte for pair in self.command_audit.items() for byte in pair)
            case OptionCode.ALGORITHM_TOGGLE:
                return bytes(byte for pair in self.algorithms.items() for byte in pair)
        raise DeviceError(ErrorCode.INVALID_DATA)

    def set(self, option: int, value: bytes, fresh: bool) -> None:
        """Sets an option, or nothing of it. `fresh`: the device holds nothing but the factory's authentication key.

        Raises DeviceError: INVALID_DATA, WRONG_LENGTH.
        """
        match option:
            case OptionCode.FORCE_AUDIT:
                if len(value) != 1:
                    raise DeviceError(ErrorCode.WRONG_LENGTH)
                _check_audit(self.force_audit, value[0])
                self.force_audit = value[0]
            case OptionCode.COMMAND_AUDIT:
                audit = {command: mode for command, mode in _pairs(value) if command in self.command_audit}
                for command, mode in _pairs(value):
                    _check_audit(self.command_audit.get(command, OFF), mode)
                if audit.get(Command.SESSION_MESSAGE, OFF) != OFF:  # a full log could never be read
                    raise DeviceError(ErrorCode.INVALID_DATA)
                self.command_audit.update(audit)
            case OptionCode.ALGORITHM_TOGGLE:
                toggled = dict(_pairs(value))
                if not fresh or not set(toggled) <= set(self.algorithms) or not set(toggled.values()) <= {OFF, ON}:
                    raise DeviceError(ErrorCode.INVALID_DATA)
                self.algorithms.update({algorithm: bool(mode) for algorithm, mode in toggled.items()})
            case _:
                raise DeviceError(ErrorCode.INVALID_DATA)
        self.revision += 1

    def require(self, *algorithms: Algorithm) -> None:
        """Raises DeviceError (ALGORITHM_DISABLED) unless all of them are enabled."""
        if not all(self.algorithms[algorithm] for algorithm in algorithms):
            raise DeviceError(ErrorCode.ALGORITHM_DISABLED)


def _pairs(value: bytes) -> list[tuple[int, int]]:
    if len(value) % 2 or not value:
        raise DeviceError(ErrorCode.WRONG_LENGTH)
    return list(zip(value[::2], value[1::2], strict=True))


def _check_audit(old: int, new: int) -> None:
    if new not in (OFF, ON, FIXED) or (old == FIXED and new != FIXED):
        raise DeviceError(ErrorCode.INVALID_DATA)
