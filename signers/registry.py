"""Every signer there is: a new one is a module and a line."""

from signers.capsule import UefiCapsule
from signers.fitimage import Fitimage
from signers.generic import Generic
from signers.imx import Imx
from signers.kmod import Kmod
from signers.mender import Mender
from signers.optee import Optee
from signers.signer import Signer
from signers.swupdate import Swupdate
from signers.uefi import Uefi

SIGNERS: tuple[Signer, ...] = (Swupdate(), Imx(), Kmod(), Mender(), Optee(), Uefi(), UefiCapsule(), Fitimage(), Generic())
