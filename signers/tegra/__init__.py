"""Boot files of NVIDIA Jetsons, signed by NVIDIA's scripts: a full set for flashing, update payloads, or single files.

The scripts run the client's text, and they want the keys. So they run in a sandbox, with a public key and placeholders;
what takes a key, they ask of the service, by a program in the place of NVIDIA's. docs/signers/tegra.md says more.
"""

import logging
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from pydantic import Field

from signers.archives import CHUNK_BYTES, ArchiveLimits, Scratch
from signers.sandbox import LOGGED_BYTES, PATH, Sandbox, Workspace
from signers.signer import Form, Job, Name, Role, Signed, Upload
from signers.tegra import bsp as bsps
from signers.tegra import outcome
from signers.tegra.bsp import COPIES, LINKED, STAND_IN, Bsp, SocType
from signers.tegra.bundle import Bundle, unpack
from signers.tegra.service import JobKeys, KeyService, Made, ServiceLimits
from tokens.errors import KeyNotFound, KeyUnsuited, ToolFailed, ToolUnavailable
from tokens.provider import PublicKey, SymmetricKey
from tokens.symmetric import AES_BYTES, SymmetricAlgorithm

_PUBLIC_KEY, _SBK, _USER_KEY = "pkc.pem", "sbk.txt", "user_key.txt"
_HMAC_BYTES = 32
_SOCKET = "service"
_ALTERNATIVES = Path("/etc/alternatives")  # where Debian's awk, which and others lead to
_CLIENT = (resources.files(__name__) / "client.pl").read_bytes()

_log = logging.getLogger(__name__)


class TegraSettings(ArchiveLimits):
    """`[signers.tegra]`."""

    l4t_base: Path = Path("/opt/nvidia")
    """Below it stand NVIDIA's BSPs, as L4T-VERSION-CHIP/Linux_for_Tegra; tegra194 shares tegra186's."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """How long one run of the scripts may take, in seconds: once for a set, once for each payload."""
    requests_max: Annotated[int, Field(gt=0)] = 4096
    """How often the scripts of a request may ask for the keys."""
    request_max_bytes: Annotated[int, Field(gt=0)] = 128 * 1024 * 1024
    """The largest image to encrypt or sign; it is held in memory, several times over."""


class TegraForm(Form):
    """The fields of `/sign/tegra`."""

    machine: Annotated[Name, Field(description="The machine whose keys sign.")]
    soctype: Annotated[SocType, Field(description="The chip.")]
    bspversion: Annotated[
        str, Field(pattern=r"\A[0-9]{1,3}(\.[0-9]{1,3}){1,2}\z", description="The version of L4T, as 35.4.1.")
    ]
    artifact: Annotated[Upload, Field(description="A tar of the files to sign, with what to do in MANIFEST.")]


class Tegra:
    """Signs a Jetson's boot files. Implements `signers.signer.Signer`."""

    name = "tegra"
    path = "/sign/tegra"
    summary = "Sign the boot files of an NVIDIA Jetson: a set for flashing, update payloads, or single files."
    scope: Literal["machine", "distro"] = "machine"
    tools_setting = "signers.tegra.l4t_base"
    form = TegraForm
    roles = (
        Role("pkc", "Signs the boot files; the fuses hold the hash of its public half.", "tegrasign/rsa_priv.pem"),
        Role(
            "sbk",
            "Encrypts them, where the fuses hold it: AES-128 for tegra186 and tegra194, HMAC-SHA256 for tegra234.",
            "tegrasign/sbk.txt",
            algorithms=frozenset((SymmetricAlgorithm.AES_128, SymmetricAlgorithm.HMAC_SHA256)),
        ),
        Role(
            "user",
            "Encrypts the kernel, with L4T 32 on tegra186 and tegra194.",
            "tegrasign/user_key.txt",
            algorithms=frozenset((SymmetricAlgorithm.AES_128,)),
        ),
    )

    def look(self, settings: TegraSettings, _roles: Collection[str]) -> Iterator[str | ToolUnavailable]:
        """See `UsesTools.look`: which of NVIDIA's BSPs are complete, and what the others, or the host, lack."""
        base = settings.l4t_base
        there = bsps.installed(base)
        if not there:
            hint = f"Install it as {base}/L4T-VERSION-CHIP/Linux_for_Tegra, or correct l4t_base."
            yield ToolUnavailable(f"there is no BSP below {base}: tegra cannot sign.", hint)
        for bsp in there:
            named = f"L4T {bsp.version} for {bsp.soctype}"
            if unsupported := bsp.unsupported():
                yield ToolUnavailable(f"{named} cannot be used: {unsupported}.", "Use another version.")
                continue
            faults = bsp.faults()
            if not faults:
                yield f"{named} is complete."
            for fault in faults:
                hint = "docs/signers/tegra.md says where its files and patches come from."
                yield ToolUnavailable(f"{named}: {fault}.", hint)
        for program in bsps.PROGRAMS:
            if not shutil.which(program, path=PATH):
                yield ToolUnavailable(f"{program} is not installed: NVIDIA's scripts need it.", "Install it.")

    async def sign(self, form: TegraForm, job: Job) -> Signed:
        """See `Signer.sign`."""
        settings: TegraSettings = job.settings or TegraSettings()
        bsp = await job.run(bsps.find, settings.l4t_base, form.bspversion, form.soctype)
        sandbox = await _sandbox(job, settings)
        directory = job.directory()
        scratch = Scratch(directory, settings)
        bundle = await job.run(unpack, form.artifact, settings, scratch, await job.run(bsp.tool_names))
        async with AsyncExitStack() as stack:
            keys = await _keys(form, job, bsp, stack)
            limits = ServiceLimits(settings.requests_max, settings.request_max_bytes)
            service = KeyService(directory / _SOCKET, keys.given, limits, job, str(bsp.program))
            await stack.enter_async_context(service)
            workspace = await stack.enter_async_context(sandbox.open(directory))
            await job.run(_furnish, workspace, bsp, bundle)
            workspace.reach(directory / _SOCKET)
            options = [part for option, name, text in keys.options for part in (option, workspace.put(name, text))]
            scripts = _Scripts(workspace, bsp, bundle, form.machine, tuple(options))
            await scripts.run(service.made)
        _log.info("NVIDIA's scripts asked %d times", service.made.requests)
        verifier = outcome.Verifier(form.soctype, keys.given.signing.public_key, service.made)
        files = await job.run(_verified, verifier, workspace, bundle, settings)
        return await job.run(outcome.packed, files, scratch)


async def _sandbox(job: Job, settings: TegraSettings) -> Sandbox:
    """Where the scripts run: never on the bare host. Raises ToolUnavailable."""
    tools = job.tools.settings
    if tools.sandbox == "none":
        raise ToolUnavailable(
            "NVIDIA's scripts run text of the client, and the settings turn the sandbox off.",
            'Set sandbox = "bubblewrap" in [tools].',
        )
    await job.tools.check()
    own = {"timeout_s": settings.timeout_s, "file_max_bytes": min(tools.file_max_bytes, settings.unpacked_max_bytes)}
    return Sandbox(tools.model_copy(update=own))


@dataclass(frozen=True, slots=True)
class _Keys:
    """The keys of a job, and what of them the scripts are given: options, each with a file's name and content."""

    given: JobKeys
    options: tuple[tuple[str, str, bytes], ...]


async def _keys(form: TegraForm, job: Job, bsp: Bsp, stack: AsyncExitStack) -> _Keys:
    """Opens the keys for as long as the stack lasts."""
    signing = await stack.enter_async_context(job.keys.open("pkc", machine=form.machine))
    _check_key(signing.public_key, form.soctype)
    pem = signing.public_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    options = [("-u", _PUBLIC_KEY, pem)]
    placeholders: dict[bytes, SymmetricKey] = {}
    for role, option, name in (("sbk", "-v", _SBK), ("user", "--user_key", _USER_KEY)):
        try:
            key = await stack.enter_async_context(job.keys.open_symmetric(role, machine=form.machine))
        except KeyNotFound:
            continue  # a machine without: its files are signed and not encrypted
        _check_symmetric(role, key, bsp)
        placeholder = secrets.token_bytes(AES_BYTES.get(key.algorithm, _HMAC_BYTES))
        placeholders[placeholder] = key
        options.append((option, name, _text_form(placeholder)))
    return _Keys(JobKeys(signing, pem, placeholders), tuple(options))


def _check_key(key: PublicKey, soctype: SocType) -> None:
    """Raises KeyUnsuited where the chip boots nothing that this key signed."""
    match soctype, key:
        case "tegra234", rsa.RSAPublicKey(key_size=3072):
            return
        case "tegra234", ec.EllipticCurvePublicKey() if isinstance(key.curve, ec.SECP256R1 | ec.SECP521R1):
            return
        case (("tegra186" | "tegra194"), rsa.RSAPublicKey(key_size=2048 | 3072)):
            return
        case (("tegra194" | "tegra234"), ed25519.Ed25519PublicKey()):
            return
    kinds = "RSA-3072, P-256, P-521 or Ed25519" if soctype == "tegra234" else "RSA of 2048 or 3072 bits"
    raise KeyUnsuited(
        f"{soctype} boots nothing that this key signs.", f"Grant a key of the type that it wants: {kinds}."
    )


def _check_symmetric(role: str, key: SymmetricKey, bsp: Bsp) -> None:
    """Raises KeyUnsuited where the chip, or the version, has no use for the key."""
    wanted = SymmetricAlgorithm.HMAC_SHA256 if bsp.soctype == "tegra234" else SymmetricAlgorithm.AES_128
    if role == "user" and (bsp.soctype == "tegra234" or bsp.numbers >= (34,)):
        raise KeyUnsuited(
            f"Encrypting the kernel of {bsp.soctype} by a user key is not supported with L4T {bsp.version}.",
            "Take the grant of the role user away, or narrow its `machine`.",
        )
    if key.algorithm is not wanted:
        raise KeyUnsuited(
            f"The {role.upper()} of {bsp.soctype} is a key for {wanted}, and this one is for {key.algorithm}.",
            "Grant the key that the fuses hold: 16 bytes for tegra186 and tegra194, 32 for tegra234.",
        )


def _text_form(key: bytes) -> bytes:
    """As NVIDIA's scripts read a key: words of 32 bits, in hexadecimal."""
    words = (key[at : at + 4].hex() for at in range(0, len(key), 4))
    return " ".join(f"0x{word}" for word in words).encode() + b"\n"


def _furnish(workspace: Workspace, bsp: Bsp, bundle: Bundle) -> None:
    """Lets the workspace have what was sent, the BSP, copies of its scripts, and what stands in for its program."""
    for installed in (bsp.root, _ALTERNATIVES):
        if installed.is_dir():
            workspace.mount(installed)
    for name, content in bsp.scripts():
        workspace.place(f"{COPIES}/{name}", [content], executable=True)
    for name in bsp.programs():
        workspace.link(f"{COPIES}/{name}", str(bsp.root / name))
    workspace.place(f"{COPIES}/bootloader/{STAND_IN}", [_CLIENT], executable=True)
    for name in LINKED:
        if (bsp.root / "bootloader" / name).is_file():
            workspace.link(name, f"{workspace.work}/{COPIES}/bootloader/{name}")
    for name, file in bundle.files.items():
        workspace.place(name, Signed((file,), "").chunks(CHUNK_BYTES))


@dataclass(frozen=True, slots=True)
class _Scripts:
    """NVIDIA's scripts, ready to run.

    Arguments:
        workspace: where they run.
        bsp: whose they are.
        bundle: what they are to sign.
        machine: the name of the machine, which names files of a default.
        keys: the options that name keys.
    """

    workspace: Workspace
    bsp: Bsp
    bundle: Bundle
    machine: str
    keys: tuple[str, ...]

    async def run(self, made: Made) -> None:
        """Runs them as MANIFEST says. Raises ToolFailed, or the error of a key that they could not use."""
        for command, environment in self._commands():
            done = await self.workspace.run(*command, env=environment)
            if made.error is not None:
                raise made.error
            if done.status != 0:
                text = redacted(done.output[-LOGGED_BYTES:])
                _log.warning("NVIDIA's scripts ended with status %d: %s", done.status, text)
                raise ToolFailed(
                    "NVIDIA's scripts could not sign the files.",
                    "Look for the request's id in the log: the end of what they say is there.",
                )

    def _commands(self) -> Iterator[tuple[tuple[str, ...], dict[str, str]]]:
        manifest = self.bundle.manifest
        environment = self._environment()
        if manifest.signs_files:
            for name in self.bundle.to_sign:
                yield self._sign_file(name), environment
        for payload in manifest.payloads:
            options = ("--bup", *(("--bup-type", payload.kind) if payload.kind else ()))
            # meta-tegra's helpers of L4T 36 make no payload that is signed without it
            options += ("--sign",) if self.bsp.numbers >= (36,) else ()
            yield self._helper(*options), {**environment, **payload.environment}
        if not manifest.signs_files and not manifest.payloads:
            yield self._helper("--no-flash"), environment

    def _environment(self) -> dict[str, str]:
        copies, root = f"{self.workspace.work}/{COPIES}", self.bsp.root
        path = f"{copies}:{copies}/bootloader:{root}:{root}/bootloader:{PATH}"
        return {"PATH": path, "MACHINE": self.machine, "CHIPID": self.bsp.chip, **self.bundle.manifest.environment}

    def _helper(self, *options: str) -> tuple[str, ...]:
        values = self.bundle.manifest.values
        machine = self.machine
        bcts = f"{machine}.cfg,{machine}-override.cfg" if self.bsp.soctype == "tegra194" else f"{machine}.cfg"
        files = ("flash.xml.in", values["DTBFILE"], values.get("EMMC_BCTS", bcts), values.get("ODMDATA", ""))
        program = f"{self.workspace.work}/{COPIES}/{self.bsp.helper}"
        return (program, *options, *self.keys, *files, values["LNXFILE"])

    def _sign_file(self, name: str) -> tuple[str, ...]:
        """l4t_sign_image.sh: meta-tegra's tegra-signimage-helper does not know its own option --chip."""
        kind = "kernel" if "Image" in name else "kernel_dtb" if name.endswith(".dtb") else "data"
        program = f"{self.workspace.work}/{COPIES}/l4t_sign_image.sh"
        # signed and not encrypted, as by digsigserver; the public key is the first of the keys
        options = ("--key", self.keys[1], "--encrypt_key", "", "--chip", self.bsp.chip, "--split", "True")
        return (program, "--file", name, "--type", kind, *options)


def _verified(
    verifier: outcome.Verifier, workspace: Workspace, bundle: Bundle, settings: TegraSettings
) -> dict[str, Path]:
    """Those of the files that a client gets. Raises ToolFailed where they are not what they should be."""
    manifest, files = bundle.manifest, workspace.files(settings.members_max)
    outcome.check_size(files, settings.unpacked_max_bytes)
    if manifest.signs_files:
        verifier.signatures(files, bundle.to_sign)
        return outcome.signature_files(files, bundle.to_sign)
    if manifest.payloads:
        payloads = outcome.payload_files(files, bundle.files)
        verifier.payloads(payloads)
        return payloads
    flash = outcome.flash_files(files, bundle.files, manifest.values["LNXFILE"])
    verifier.flash_set(flash)
    return flash


_SECRET = re.compile(r"[0-9A-Fa-f]{8,}|0x[0-9A-Fa-f]+|[0-9]{4,}|[A-Za-z0-9+/=]{24,}")


def redacted(output: bytes) -> str:
    """What scripts say, without what could be a key or a PIN."""
    return _SECRET.sub("[...]", ascii(output.decode("latin-1")))
