"""Copies what is exportable from one device to another, under the wrap key that both hold.

Nothing secret passes through this process: one device encrypts it for the other.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from yubihsm.defs import CAPABILITY, ERROR, OBJECT, ORIGIN
from yubihsm.exceptions import YubiHsmDeviceError
from yubihsm.objects import ObjectInfo, WrapKey

from tokens.errors import KeyMismatch, ProviderRefused
from tokens.provisioning.declaration import Declaration
from tokens.provisioning.device import translated
from tokens.provisioning.proof import prove
from tokens.provisioning.side import Side, opened
from tokens.provisioning.transcript import Transcript, describe

_OWN = (OBJECT.AUTHENTICATION_KEY, OBJECT.WRAP_KEY, OBJECT.PUBLIC_WRAP_KEY)
"""What each device has of its own."""

_COMPARED = ("label", "domains", "algorithm", "capabilities", "delegated_capabilities")
"""What a copy has in common with its original; origin and sequence are the device's own."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the source holds, and how the target stands to it."""

    copies: list[ObjectInfo] = field(default_factory=list)
    """Not on the target, and exportable."""
    there: list[ObjectInfo] = field(default_factory=list)
    """On both, and the same."""
    bound: list[ObjectInfo] = field(default_factory=list)
    """Not on the target, and bound to the source: not exportable, or in a domain that the wrap key is not in."""
    conflicts: list[ObjectInfo] = field(default_factory=list)
    """On both, and different."""


class Clone:
    """Two devices; `clone` makes one."""

    def __init__(self, source: Side, target: Side, wrap_key: int) -> None:
        self._source = source
        self._target = target
        self._wrap_key = wrap_key

    def compare(self) -> Comparison:
        """Looks at both. Raises ProviderRefused where one lacks the wrap key."""
        held = {(info.object_type, info.id): info for info in self._source.objects()}
        there = {(info.object_type, info.id): info for info in self._target.objects()}
        for side, has in ((self._source, held), (self._target, there)):
            if (OBJECT.WRAP_KEY, self._wrap_key) not in has:
                raise ProviderRefused(
                    f"{side.name} has no wrap key 0x{self._wrap_key:04x}.",
                    "A device gets its wrap key when it is set up: reset it, and set it up with a [wrap_key].",
                )
        domains = held[OBJECT.WRAP_KEY, self._wrap_key].domains
        comparison = Comparison()
        for key, info in held.items():
            if info.object_type in _OWN:
                continue
            if key in there:
                (comparison.there if self._same(info, there[key]) else comparison.conflicts).append(info)
            elif info.capabilities & CAPABILITY.EXPORTABLE_UNDER_WRAP and not info.domains & ~domains:
                comparison.copies.append(info)
            else:
                comparison.bound.append(info)
        return comparison

    def run(self, comparison: Comparison, transcript: Transcript, tell: Callable[[str], None]) -> None:
        """Copies what is to be copied, and proves that what both hold is the same.

        What was copied before an error stays, and is found to be there the next time. Raises ProviderRefused,
        ProviderUnavailable or KeyMismatch.
        """
        for info in comparison.copies:
            tell(f"Copy {named(info)}.")
            self._copy(info)
        for info in (*comparison.copies, *comparison.there):
            with translated(self._target.name):
                copy = self._target.session.get_object(info.id, info.object_type).get_info()
            if not self._same(info, copy) or (info in comparison.copies and not copy.origin & ORIGIN.IMPORTED_WRAPPED):
                raise KeyMismatch(f"The {named(info)} is not the same on both devices.", "Do not use the target.")
            proof = prove(self._source, self._target, info)
            tell(f"The {named(info)} is on both: {proof}.")
            transcript.write("copied" if info in comparison.copies else "there", object=describe(copy), proof=proof)

    def _copy(self, info: ObjectInfo) -> None:
        with translated(self._source.name):
            original = self._source.session.get_object(info.id, info.object_type)
            wrapped = WrapKey(self._source.session, self._wrap_key).export_wrapped(original)
        with translated(self._target.name):
            try:
                WrapKey(self._target.session, self._wrap_key).import_wrapped(wrapped)
            except YubiHsmDeviceError as error:
                if error.code is not ERROR.INVALID_DATA:
                    raise
                raise ProviderRefused(
                    f"{self._target.name} cannot unwrap it: its wrap key 0x{self._wrap_key:04x} is another one.",
                    "Reset it, and set it up with the source's shares: combine = [...] in [wrap_key].",
                ) from None

    def _same(self, info: ObjectInfo, other: ObjectInfo) -> bool:
        """Whether two objects are equal in all that the devices tell of them."""
        if any(getattr(info, name) != getattr(other, name) for name in _COMPARED):
            return False
        return self._source.public(info) == self._target.public(info)


@contextmanager
def clone(source: Declaration, target: Declaration) -> Iterator[Clone]:
    """Logs in to both devices.

    Raises:
        ProviderRefused: they are one device or not the declared ones, or the admin may not log in.
        ProviderUnavailable: a device is not there.
        KeyUnusable: an admin's password cannot be read.
    """
    if source.wrap_key is None or target.wrap_key is None or source.wrap_key.id != target.wrap_key.id:
        raise ProviderRefused("The files do not declare the same [wrap_key].", "Both devices need it, by the same id.")
    if source.device.serial == target.device.serial:
        raise ProviderRefused("The files are for the same device.", "Name the source's file, then the target's.")
    with opened("The source", source) as one, opened("The target", target) as other:
        yield Clone(one, other, source.wrap_key.id)


def named(info: ObjectInfo) -> str:
    """An object in words."""
    kind = info.object_type.name.lower().replace("_", " ")
    return f'{kind} 0x{info.id:04x} "{info.label!s}"'
