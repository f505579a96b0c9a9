"""Every signer there is: a new one is a module and a line."""

from signers.generic import Generic
from signers.imx import Imx
from signers.signer import Signer
from signers.swupdate import Swupdate

SIGNERS: tuple[Signer, ...] = (Swupdate(), Imx(), Generic())
