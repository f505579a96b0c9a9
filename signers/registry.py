"""Every signer there is: a new one is a module and a line."""

from signers.capsule import UefiCapsule
from signers.ekb import Ekb
from signers.fitimage import Fitimage
from signers.generic import Generic
from signers.imx import Imx
from signers.kmod import Kmod
from signers.mender import Mender
from signers.optee import Optee
from signers.rkoptee import RkopteeTa, RkopteeTee
from signers.rockchip import Rk
from signers.signer import Signer
from signers.swupdate import Swupdate
from signers.tegra import Tegra
from signers.uefi import Uefi

SIGNERS: tuple[Signer, ...] = (
    Swupdate(),
    Imx(),
    Kmod(),
    Mender(),
    Optee(),
    Uefi(),
    UefiCapsule(),
    Tegra(),
    Ekb(),
    Fitimage(),
    Rk(),
    RkopteeTa(),
    RkopteeTee(),
    Generic(),
)
