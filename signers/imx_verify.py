"""Whether what `cst` made is what was asked for: nothing that it makes is released before."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from signers.formats import ahab, csf_plan, hab
from signers.formats.csf_plan import AhabPlan, HabPlan, Plan, Role, Step
from signers.signer import Upload
from tokens.errors import ArtifactRejected, KeyMismatch, KeyUnusable, SignatureMismatch
from tokens.schemes import Hash

CSF_MAX_BYTES = 1024 * 1024
"""A binary CSF of RSA-4096 keys has 7 KiB."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What was asked for.

    Arguments:
        plan: the client's CSF, understood.
        table: the SRK table.
        certificates: of the granted keys, by what each is for and the name that the client's CSF has for it.
        artifact: as it came.
    """

    plan: Plan
    table: bytes
    certificates: Mapping[tuple[Role, str], x509.Certificate]
    artifact: Upload


def check_srk_table(plan: Plan, table: bytes, srk_hash: bytes | None) -> None:
    """Raises KeyUnusable where it is no table of the CSF's family, KeyMismatch where the fuses hold another."""
    try:
        if isinstance(plan, HabPlan):
            fuses = hab.parse_srk_table(table).fuses
        else:
            # SHA-512 on i.MX 8 and 8X, SHA-256 on 8ULP and 93
            hash_ = Hash.SHA512 if srk_hash and len(srk_hash) == Hash.SHA512.size else Hash.SHA256
            fuses = ahab.parse_srk_table(table).fuses(hash_)
    except (hab.HabError, ahab.AhabError):
        raise KeyUnusable(
            "The granted SRK table is not one for this CSF.", "Make it with srktool for the device's family."
        ) from None
    if srk_hash is not None and fuses != srk_hash:
        raise KeyMismatch(
            "The SRK table is not the one whose hash the grant pins.",
            "Find out why the table has changed before you change the grant: devices would not boot.",
        )


def check_source(expected: Expected) -> None:
    """Raises ArtifactRejected where the keys are not of the SRK at the Source index: `cst` does not look."""
    if isinstance(expected.plan, HabPlan):
        fast, table = expected.plan.csf_key.fast, hab.parse_srk_table(expected.table)
        entries, index = table.entries, expected.plan.srk.index
        root = entries[index].key if index < len(entries) else None
        keys = expected.certificates.values()
        suited = root is not None and all(
            each.public_key() == root if fast else hab.issued(each, root) for each in keys
        )
    else:
        record = ahab.parse_srk_table(expected.table).records[expected.plan.srk_index]
        suited = all(each.public_key() == record.key for each in expected.certificates.values())
    if not suited:
        raise ArtifactRejected(
            "The keys do not belong to the SRK at the CSF's Source index in the SRK table.",
            "Correct the Source index, or name the keys of that SRK.",
        )


def verify(expected: Expected, path: Path) -> None:
    """Parses and verifies the finished file. Raises SignatureMismatch."""
    if isinstance(expected.plan, HabPlan):
        _verify_hab(expected, expected.plan, path)
    else:
        _verify_ahab(expected, expected.plan, path)


def _verify_hab(expected: Expected, plan: HabPlan, path: Path) -> None:
    if path.stat().st_size > CSF_MAX_BYTES:
        raise _bad("it is too long")
    try:
        csf = hab.parse(path.read_bytes())
    except hab.HabError as error:
        raise _bad(f"it cannot be parsed ({error})") from None
    asked = [command for step in (*plan.steps, *plan.added) if (command := _command(step)) is not None]
    if plan.header.version.first != 4 or list(csf.commands) != asked:
        raise _bad("its commands are others")
    certificates = expected.certificates
    blocks = [[hab.Block(each.address, each.offset, each.length) for each in data.blocks] for data in plan.data]
    hab.verify(
        csf,
        hab.Expected(
            srk_table=expected.table,
            source=plan.srk.index,
            csf_certificate=certificates[Role.CSF_KEY, plan.csf_key.certificate.text],
            keys={key.target_index: certificates[Role.IMAGE_KEY, key.certificate.text] for key in plan.keys},
            blocks=blocks,
        ),
        expected.artifact.read,
    )


def _command(step: Step) -> hab.Command | None:  # noqa: PLR0911 - one for each command
    """The command of the binary CSF that a step of the text stands for; None where there is none."""
    match step:
        case csf_plan.InstallSrk():
            return hab.InstallKey(0, hab.PROTOCOL_SRK, step.hash, step.index, hab.INDEX_SRK)
        case csf_plan.InstallCsfKey(fast=True):
            return None
        case csf_plan.InstallCsfKey():
            return hab.InstallKey(hab.FLAG_CSF_KEY, hab.PROTOCOL_X509, 0, hab.INDEX_SRK, hab.INDEX_CSF)
        case csf_plan.AuthenticateCsf():
            return hab.AuthenticateData(hab.INDEX_CSF, hab.PROTOCOL_CMS, step.engine, step.configuration)
        case csf_plan.InstallKey():
            return hab.InstallKey(0, hab.PROTOCOL_X509, step.hash or 0, step.verification_index, step.target_index)
        case csf_plan.AuthenticateData():
            blocks = tuple((each.address, each.length) for each in step.blocks)
            key = step.verification_index
            return hab.AuthenticateData(key, hab.PROTOCOL_CMS, step.engine, step.configuration, blocks)
        case csf_plan.SetEngine():
            return hab.SetEngine(step.hash, step.engine, step.configuration)
        case csf_plan.Init():
            return hab.Init(step.engine, step.features or None)
        case csf_plan.Unlock():
            return hab.Unlock(step.engine, step.features or None, step.uid)
        case csf_plan.Nop():
            return hab.Nop()


def _verify_ahab(expected: Expected, plan: AhabPlan, path: Path) -> None:
    public_key = expected.certificates[Role.SOURCE, plan.source.text].public_key()
    if not isinstance(public_key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise _bad("the key is of another type")
    output = Upload(path, "", path.stat().st_size)
    asked = ahab.Expected(
        offset=plan.container_offset,
        signature_block=plan.signature_block_offset - plan.container_offset,
        srk_table=expected.table,
        index=plan.srk_index,
        source_set={"NXP": ahab.NXP, "OEM": ahab.OEM}[plan.source_set],
        revocations=plan.revocations,
        public_key=public_key,
    )
    ahab.verify(asked, expected.artifact.read, expected.artifact.size, output.read, output.size)


def _bad(fault: str) -> SignatureMismatch:
    return SignatureMismatch(
        f"What cst made is not what was asked for: {fault}.", "Report this with the request id: it was not released."
    )
