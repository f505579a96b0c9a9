"""Commands about the device itself: echo, information, options, log, reset."""

import os
import struct

from yubihsm_simulator.commands.call import Call
from yubihsm_simulator.definitions import DeviceError, ErrorCode
from yubihsm_simulator.frames import Fields
from yubihsm_simulator.objects import PAGE_BYTES, PAGES, RECORDS
from yubihsm_simulator.secure_channel import INNER_MAX_BYTES


def reset(call: Call, fields: Fields) -> bytes:
    """-> nothing; the device is as it left the factory."""
    fields.end()
    call.device.factory_reset()
    return b""


def close_session(call: Call, fields: Fields) -> bytes:
    """-> nothing."""
    fields.end()
    call.device.close_session(call.session)
    return b""


def storage_info(call: Call, fields: Fields) -> bytes:
    """-> records, free records, pages, free pages, bytes of a page: u16 each."""
    fields.end()
    objects = call.device.objects
    return struct.pack(">HHHHH", RECORDS, RECORDS - len(objects), PAGES, objects.free_pages, PAGE_BYTES)


def get_log_entries(call: Call, fields: Fields) -> bytes:
    """-> unlogged boots u16, unlogged authentications u16, number u8, entries."""
    fields.end()
    return call.device.log.encoded()


def set_log_index(call: Call, fields: Fields) -> bytes:
    """Number u16 of the last entry that was read -> nothing."""
    number = fields.u16()
    fields.end()
    call.device.log.acknowledge(number)
    return b""


def set_option(call: Call, fields: Fields) -> bytes:
    """Option u8, length u16, value -> nothing."""
    option, value = fields.u8(), fields.take(fields.u16())
    fields.end()
    call.device.options.set(option, value, fresh=call.device.objects.fresh)
    return b""


def get_option(call: Call, fields: Fields) -> bytes:
    """Option u8 -> value."""
    option = fields.u8()
    fields.end()
    return call.device.options.get(option)


def pseudo_random(call: Call, fields: Fields) -> bytes:
    """Length u16 -> so many bytes."""
    length = fields.u16()
    fields.end()
    if not 0 < length <= INNER_MAX_BYTES - 3:
        raise DeviceError(ErrorCode.INVALID_DATA)
    return os.urandom(length)


def blink(call: Call, fields: Fields) -> bytes:
    """Seconds u8 -> nothing."""
    fields.u8()
    fields.end()
    return b""
