"""Signs one file: NAME.sig is the header, with --split True."""

import sys

from images import Signer

options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
soc = {"0x19": "tegra194", "0x23": "tegra234", "0x18": "tegra186"}[options["--chip"]]
name = options["--file"]
with open(name, "rb") as file:
    content = file.read()
signed = Signer(soc, options["--key"], None).image(content)
with open(name + ".sig", "wb") as file:
    file.write(signed[: 8192 if soc == "tegra234" else 4096])
