"""FITs for tests and the demo: small ones by mkimage, and Debian's real ones with nodes for hashes and signatures."""

import subprocess
from pathlib import Path

KERNEL = b"a kernel\n" * 5000
TREE = '/dts-v1/; / { model = "demo"; };'
SOURCE = """\
/dts-v1/;
/ {{
    description = "demo";
    #address-cells = <1>;
    images {{
        kernel-1 {{
            description = "kernel";
            data = /incbin/("kernel");
            type = "kernel"; arch = "arm64"; os = "linux"; compression = "none"; load = <0x80000>; entry = <0x80000>;
            hash-1 {{ algo = "sha256"; }};
        }};
        fdt-1 {{
            description = "device tree";
            data = /incbin/("tree.dtb");
            type = "flat_dt"; arch = "arm64"; compression = "none";
            hash-1 {{ algo = "crc32"; }};
            hash-2 {{ algo = "sha512"; }};
            {image_signature}
        }};
    }};
    configurations {{
        default = "conf-1";
        conf-1 {{ kernel = "kernel-1"; fdt = "fdt-1"; {signature} }};
        conf-2 {{ kernel = "kernel-1"; fdt = "fdt-1"; {signature} }};
    }};
}};
"""


def make(
    directory: Path, *, algo: str, key: str | None = "dev", more: str = "", images: bool = False, external: str = ""
) -> Path:
    """A FIT of mkimage's, unsigned.itb: two configurations, of a kernel and a device tree.

    Arguments:
        algo: of the signatures, as "sha256,rsa2048".
        key: their key-name-hint.
        more: further properties of the configurations' signatures.
        images: whether an image has a signature of its own, too.
        external: mkimage's options for where the data stands, as "-E".
    """
    hint = f'key-name-hint = "{key}";' if key else ""
    signature = f'signature-1 {{ algo = "{algo}"; {hint} {more} }};'
    source = SOURCE.format(signature=signature, image_signature=signature if images else "")
    (directory / "kernel").write_bytes(KERNEL)
    (directory / "fit.its").write_text(source)
    write_dtb(directory / "tree.dtb", TREE)
    command = ["mkimage", "-q", "-D", "-q -I dts -O dtb", *external.split(), "-f", "fit.its", "unsigned.itb"]
    subprocess.run(command, cwd=directory, check=True, capture_output=True, env={"PATH": "/usr/bin:/bin"})
    return directory / "unsigned.itb"


def write_dtb(path: Path, source: str = TREE) -> Path:
    """Compiles a device tree."""
    command = ["dtc", "-q", "-I", "dts", "-O", "dtb", "-o", path]
    subprocess.run(command, input=source.encode(), check=True, capture_output=True)
    return path


def with_nodes(original: Path, path: Path, algo: str, *sign_images: str) -> Path:
    """A copy of a FIT whose data stands behind its tree, with a hash for each image, and signatures, by fdtput."""
    data = original.read_bytes()
    size = int.from_bytes(data[4:8], "big")
    path.write_bytes(data[:size])

    def below(node: str) -> list[str]:
        found = subprocess.run(["fdtget", "-l", path, node], check=True, capture_output=True, text=True).stdout
        return [f"{node}/{name}" for name in found.split()]

    def add(node: str, **properties: tuple[str, ...]) -> None:
        subprocess.run(["fdtput", "-c", path, node], check=True)
        for name, values in properties.items():
            subprocess.run(["fdtput", "-t", "s", path, node, name.replace("_", "-"), *values], check=True)

    for image in below("/images"):
        add(f"{image}/hash-1", algo=("sha256",))
    for configuration in below("/configurations"):
        signed = {"sign_images": sign_images} if sign_images else {}
        add(f"{configuration}/signature-1", algo=(algo,), key_name_hint=("dev",), **signed)
    tree = path.read_bytes()
    path.write_bytes(tree + bytes(-len(tree) % 4) + data[size + -size % 4 :])
    return path


def shown(path: Path, **replaced: str) -> str:
    """A device tree as dtc writes it, with other values for some of its text properties, to be compared."""
    command = ["dtc", "-q", "-I", "dtb", "-O", "dts", path]
    source = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = {name.replace("_", "-"): value for name, value in replaced.items()}
    lines = source.splitlines()
    for number, line in enumerate(lines):
        name, equals, _ = line.partition(" = ")
        if equals and name.strip() in names:
            lines[number] = f'{name} = "{names[name.strip()]}";'
    return "\n".join(lines)
