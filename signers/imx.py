"""NXP i.MX boot images: HABv4 and AHAB, signed by NXP's Code Signing Tool (`cst`) with keys on loan.

The client's CSF is parsed and a new one is written from it, with files and keys of the grants alone; what `cst` makes
is parsed again and verified before it is released. docs/signers/imx.md says why each of that is needed.
"""

import logging
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from pydantic import BaseModel, ConfigDict, Field

from signers import imx_verify
from signers.formats.csf import CsfError, emit, parse
from signers.formats.csf_plan import AhabPlan, CsfUnsupported, HabPlan, Hash, Plan, understand, with_files
from signers.formats.csf_plan import Role as FileRole
from signers.imx_keys import KeySet, load_certificate
from signers.sandbox import Workspace
from signers.signer import Backend, Form, GrantedFile, Job, Name, Role, Signed, Upload
from tokens.errors import ArtifactRejected, KeyNotGranted, KeyUnusable, ToolFailed, ToolUnavailable
from tokens.lending import LentKey, Loan, LoanLimits, Via
from tokens.provider import PublicKey, SigningKey

CSF_MAX_BYTES = 64 * 1024

_log = logging.getLogger(__name__)

_TOKEN = "hsmsign"  # noqa: S105 - the lent token's name
_ALLOWS = frozenset({"unlock", "engine"})
_FAMILIES: Mapping[str, type[HabPlan | AhabPlan]] = {
    "mx6": HabPlan, "mx7": HabPlan, "mx8m": HabPlan, "mx8": AhabPlan, "mx8ulp": AhabPlan, "mx9": AhabPlan,
}  # fmt: skip

SocType = Literal["mx6", "mx7", "mx8m", "mx8", "mx8ulp", "mx9"]

# What cst says where the artifact or the CSF is at fault; its own words hold paths and URIs.
_COMPLAINTS = (
    (rb"together exceed file size", "A block lies outside the image."),
    (
        rb"(?i)container|signature block|offsets are not consistent",
        "The container at the CSF's Offsets is not one that can be signed.",
    ),
    (rb"(?i)SRK table|Invalid SRK", "The SRK table does not suit the CSF."),
)


class ImxSettings(BaseModel):
    """`[signers.imx]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    cst_base: Path = Path("/opt/NXP")
    """Below it stand the versions of NXP's Code Signing Tool, as cst-VERSION/linux64/bin/cst."""


class ImxForm(Form):
    """The fields of `/sign/imx`."""

    machine: Annotated[Name, Field(description="The machine whose keys sign.")]
    soctype: Annotated[SocType, Field(description="HABv4: mx6, mx7, mx8m. AHAB: mx8, mx8ulp, mx9.")]
    cstversion: Annotated[
        str, Field(pattern=r"\A[0-9]+(\.[0-9A-Za-z]+){0,4}\z", description="The version of cst that signs, as 3.4.1.")
    ]
    csf: Annotated[Upload, Field(description="The CSF: what to sign, and by which keys.")]
    artifact: Annotated[Upload, Field(description="The image, under the name that the CSF calls it by.")]
    backend: Annotated[
        Backend, Field(description="ssl: the keys of the key tarball. pkcs11: granted keys, by the URIs in the CSF.")
    ] = "ssl"


class Imx:
    """Signs i.MX boot images. Implements `signers.signer.Signer`."""

    name = "imx"
    path = "/sign/imx"
    summary = "Sign an NXP i.MX boot image (HABv4, AHAB) as its CSF says."
    scope: Literal["machine", "distro"] = "machine"
    form = ImxForm
    roles = (
        Role(
            "files",
            "The key tarball, or the SRK table alone.",
            "imxsign/imx-cst-keys.tar.gz",
            is_file=True,
            allows=_ALLOWS,
        ),
        Role("csf", "HABv4: signs the commands ([Install CSFK])."),
        Role("img", "HABv4: signs the image ([Install Key])."),
        Role("srk", "AHAB: signs the container. HABv4: signs all with [Install NOCAK]."),
    )
    tools_setting = "signers.imx.cst_base"

    async def sign(self, form: ImxForm, job: Job) -> Signed:
        """See `Signer.sign`."""
        settings: ImxSettings = job.settings or ImxSettings()
        cst = _program(settings, form)
        plan = await job.run(_plan, form)
        granted = await job.keys.read("files", machine=form.machine)
        _check_allowed(plan, granted)
        keyset = await job.run(KeySet.parse, granted.content)
        table = keyset.srk_table(plan.files(FileRole.SRK_TABLE)[0].text)
        imx_verify.check_srk_table(plan, table, granted.srk_hash)
        async with AsyncExitStack() as stack:
            workspace = await stack.enter_async_context(job.tools.open(job.directory()))
            if form.backend == "pkcs11":
                keys = await _borrow(plan, form, job, stack, workspace)
            else:
                keys = _copy(plan, keyset, workspace)
                for certificate in keys.certificates.values():
                    await job.keys.claim("files", _public_key(certificate), machine=form.machine)
            expected = imx_verify.Expected(plan, table, keys.certificates, form.artifact)
            imx_verify.check_source(expected)
            names = {role: list(at.values()) for role, at in keys.names.items()}
            names[FileRole.SRK_TABLE] = [workspace.put("SRK_table.bin", table)]
            names[FileRole.DATA] = [workspace.put("artifact", form.artifact.content)]
            text = emit(with_files(plan, names))
            workspace.mount(settings.cst_base / f"cst-{form.cstversion}")
            path = await _run(workspace, cst, form.backend, workspace.put("commands.csf", text.encode()))
        await job.run(imx_verify.verify, expected, path)
        base = form.artifact.basename or "artifact"
        output = Upload(path, base, path.stat().st_size)
        return Signed((output.whole,), f"{base}.signed")

    def look(self, settings: ImxSettings, _roles: Collection[str]) -> Iterator[str | ToolUnavailable]:
        """See `UsesTools.look`."""
        base = settings.cst_base
        if versions := _cst_versions(settings):
            yield f"cst {', '.join(versions)}"
        else:
            yield ToolUnavailable(
                f"there is no cst below {base}: imx cannot sign.",
                f"Install NXP's Code Signing Tool as {base}/cst-VERSION/linux64/bin/cst, or correct cst_base.",
            )


def _cst_versions(settings: ImxSettings) -> list[str]:
    """The versions of cst that are installed."""
    programs = settings.cst_base.glob("cst-*/linux64/bin/cst")
    return sorted(program.parents[2].name.removeprefix("cst-") for program in programs)


def _program(settings: ImxSettings, form: ImxForm) -> Path:
    program = settings.cst_base / f"cst-{form.cstversion}" / "linux64/bin/cst"
    if not program.is_file():
        versions = ", ".join(_cst_versions(settings)) or "none"
        raise ToolUnavailable(
            f"cst {form.cstversion} is not installed; there are: {versions}.",
            f"Ask for one of those, or install NXP's tool as cst-{form.cstversion} below signers.imx.cst_base.",
        )
    if form.backend == "pkcs11" and _version(form) < (3, 4):
        raise ToolUnavailable(
            f"cst {form.cstversion} cannot use keys of a token.", "Ask for version 3.4.1 or a later one."
        )
    return program


def _version(form: ImxForm) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", form.cstversion)[:2])


def _plan(form: ImxForm) -> Plan:
    """What the CSF asks for. Raises ArtifactRejected."""
    if form.csf.size > CSF_MAX_BYTES:
        raise ArtifactRejected(f"The CSF has more than {CSF_MAX_BYTES} bytes.", "Send the CSF's text.")
    try:
        plan = understand(parse(form.csf.read(0, form.csf.size).decode()))
    except UnicodeDecodeError:
        raise ArtifactRejected("The CSF is not text.", "Send the CSF's text, not the binary.") from None
    except CsfUnsupported as error:
        raise ArtifactRejected(f"The CSF asks for what is not done here: {error}.", "Take it out of the CSF.") from None
    except CsfError as error:
        raise ArtifactRejected(f"The CSF is refused: {error}.", "Correct the CSF.") from None
    if not isinstance(plan, _FAMILIES[form.soctype]):
        family = "AHAB" if _FAMILIES[form.soctype] is AhabPlan else "HABv4"
        raise ArtifactRejected(f"An {form.soctype} boots {family} images; the CSF is not for that.", "Correct either.")
    _check_data(plan, form.artifact)
    if isinstance(plan, HabPlan):
        _check_releasable(plan)
    return plan


def _check_releasable(plan: HabPlan) -> None:
    """What `cst` would make and `imx_verify` does not release is refused before anything is signed."""
    if plan.srk.hash is not Hash.SHA256:
        fault = "[Install SRK] must have the Hash Algorithm sha256, which the fuses are of"
    elif plan.header.hash is Hash.SHA1:
        fault = "signatures of SHA-1 are not made"
    elif any(key.verification_index for key in plan.keys):
        fault = "[Install Key] must have Verification index = 0: image keys are certified by the SRK here"
    else:
        return
    raise ArtifactRejected(f"The CSF asks for what is not done here: {fault}.", "Correct the CSF.")


def _check_data(plan: Plan, artifact: Upload) -> None:
    """Only the upload may be named: `cst` would open any file, and give digests of its pieces away."""
    names = {_base(each.text) for each in plan.files(FileRole.DATA)}
    if len(plan.files(FileRole.DATA)) != 1 or names != {artifact.basename}:
        raise ArtifactRejected(
            "The CSF names data that is not the uploaded artifact.",
            "Name the artifact in the CSF by its file name, the same everywhere.",
        )
    if isinstance(plan, HabPlan):
        outside = [block for data in plan.data for block in data.blocks if block.offset + block.length > artifact.size]
        if outside:
            first = outside[0]
            raise ArtifactRejected(
                f"Block outside the image: {first.length} bytes at {first.offset:#x}; the image has {artifact.size}.",
                "Correct the CSF's Blocks, or send the image that they are for.",
            )


def _base(name: str) -> str:
    return posixpath.basename(name.replace("\\", "/"))


def _check_allowed(plan: Plan, granted: GrantedFile) -> None:
    if lacking := sorted(plan.needs - granted.allow):
        what = {"unlock": "[Unlock]", "engine": "settings of an engine"}
        raise KeyNotGranted(
            f"The CSF holds {' and '.join(what[each] for each in lacking)}, which the grant does not allow.",
            f"Take it out of the CSF, or add allow = {lacking} to the grant of the role files.".replace("'", '"'),
        )


@dataclass(slots=True)
class _Keys:
    """The keys of a job: by the role and the name in the CSF, what `cst` calls them and their certificates."""

    names: dict[FileRole, dict[str, str]] = field(default_factory=dict)
    certificates: dict[tuple[FileRole, str], x509.Certificate] = field(default_factory=dict)

    def add(self, role: FileRole, name: str, new: str, certificate: x509.Certificate) -> None:
        self.names.setdefault(role, {})[name] = new
        self.certificates[role, name] = certificate


def _wanted(plan: Plan) -> list[tuple[FileRole, str, str]]:
    """Of each key that the CSF names: for what, the grants' role, and the name."""
    wanted = [(FileRole.SOURCE, "srk", each.text) for each in plan.files(FileRole.SOURCE)]
    if isinstance(plan, HabPlan):
        role = "srk" if plan.csf_key.fast else "csf"
        wanted += [(FileRole.CSF_KEY, role, each.text) for each in plan.files(FileRole.CSF_KEY)]
        wanted += [(FileRole.IMAGE_KEY, "img", each.text) for each in plan.files(FileRole.IMAGE_KEY)]
    return wanted


async def _borrow(plan: Plan, form: ImxForm, job: Job, stack: AsyncExitStack, workspace: Workspace) -> _Keys:
    """Granted keys, on loan for as long as the stack lasts."""
    keys, lent = _Keys(), []
    for number, (file_role, role, uri) in enumerate(_wanted(plan), 1):
        opened = job.keys.open(role, machine=form.machine, backend="pkcs11", key_uri=uri)
        key = await stack.enter_async_context(opened)
        label = f"{role}-{number}"
        lent.append(LentKey(label, bytes([number]), key))
        keys.add(file_role, uri, f"pkcs11:token={_TOKEN};object={label};type=cert", _certificate(key))
    limits = LoanLimits(signatures=len(plan.data) + 1 if isinstance(plan, HabPlan) else 1)
    loan = await stack.enter_async_context(Loan(job.directory() / "loan", _TOKEN, lent, limits, job.lent))
    workspace.lend(loan, Via.PROVIDER if _version(form) >= (4,) else Via.ENGINE)
    return keys


def _certificate(key: SigningKey) -> x509.Certificate:
    if not key.certificates:
        raise KeyUnusable(
            "An i.MX key needs its certificate, and there is none.",
            "Put it on the token under the key's id, or name it as the grant's `certificate`.",
        )
    return key.certificates[0]


def _copy(plan: Plan, keyset: KeySet, workspace: Workspace) -> _Keys:
    """Keys of the tarball, in the memory of the sandbox: this backend of `cst` can only read files."""
    keys = _Keys()
    for file_role, _, name in _wanted(plan):
        certificate = keyset.certificate(name)
        key_name, private = keyset.key_of(name)
        workspace.put(f"keys/{key_name}", private)
        keys.add(file_role, name, workspace.put(f"crts/{_base(name)}", certificate), load_certificate(certificate))
    if passphrase := keyset.private.get("key_pass.txt"):
        workspace.put("keys/key_pass.txt", passphrase)
    return keys


def _public_key(certificate: x509.Certificate) -> PublicKey:
    public_key = certificate.public_key()
    if not isinstance(public_key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise KeyUnusable("A certificate of the key tarball is of an unsupported type.", "Use RSA or ECDSA keys.")
    return public_key


async def _run(workspace: Workspace, cst: Path, backend: Backend, commands: str) -> Path:
    options: Sequence[str] = ("-b", "pkcs11") if backend == "pkcs11" else ()
    done = await workspace.run(str(cst), *options, "-i", commands, "-o", "signed.bin")
    if done.status != 0:
        _log.warning("cst ended with status %d: %s", done.status, done.said)
        for pattern, sentence in _COMPLAINTS:
            if re.search(pattern, done.output):
                raise ArtifactRejected(f"cst refuses it: {sentence}", "Correct the CSF or the image.")
        raise ToolFailed(
            "cst could not sign the image.", "Look for the request's id in the log: a key may have failed."
        )
    return workspace.result("signed.bin")
