"""Every signer there is: a new one is a module and a line."""

from signers.signer import Signer
from signers.swupdate import Swupdate

SIGNERS: tuple[Signer, ...] = (Swupdate(),)
