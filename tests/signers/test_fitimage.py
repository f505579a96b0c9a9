"""FITs, held against mkimage, verified by U-Boot's fit_check_sign and by its rules (fit_rules.py)."""

import asyncio
import io
import os
import re
import struct
import subprocess
import tarfile
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import unquote

import fit_rules
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from fit_images import make, shown, with_nodes, write_dtb
from pydantic import ValidationError

from signers import fitimage
from signers.fitimage import Fitimage, FitimageForm
from signers.formats import fit
from signers.signer import Job, Upload
from tests.conftest import ROOT
from tokens.errors import ArtifactRejected, KeyNotFound, KeyNotGranted, KeyUnsuited, ProviderBusy, SignatureMismatch

FIT_CHECK_SIGN = ROOT / ".cache/u-boot-tools/fit_check_sign"
BOARDS = ROOT / ".cache/u-boot"
EPOCH = 1_700_000_000
ALGOS = {"rsa2048": "rsa2048", "rsa3072": "rsa3072", "rsa4096": "rsa4096", "p256": "ecdsa256", "p384": "ecdsa384"}


@dataclass
class Keys:
    """`signers.signer.Keys`: keys by the names that a client may call them by."""

    pairs: dict

    @asynccontextmanager
    async def open(self, role, *, machine, backend, key_uri):
        assert (role, machine) == ("key", "demo")
        name = re.fullmatch("pkcs11:object=([^;]*)", key_uri)
        if not name or unquote(name[1]) not in self.pairs:
            raise KeyNotGranted("none", "grant one")
        yield self.pairs[unquote(name[1])].key


@pytest.fixture(scope="module")
def kinds(pairs, pair):
    return {**pairs, "rsa4096": pair(rsa.generate_private_key(65537, 4096))}


def upload(content, name="u-boot.dtb"):
    return Upload(content, name, len(content))


def data_behind(image):
    return image[int.from_bytes(image[4:8], "big") :]


@pytest.fixture
def sign(tmp_path):
    async def run(artifact, keys, dtb=None, **fields):
        if dtb is not None:
            fields["dtb"] = upload(dtb)
        fields |= {"artifact": upload(artifact, "fitImage"), "machine": "demo", "timestamp": str(EPOCH)}
        (tmp_path / "job").mkdir(exist_ok=True)
        keys = keys if isinstance(keys, dict) else {"dev": keys}
        job = Job(lambda: tmp_path / "job", Keys(keys), asyncio.to_thread)
        signed = await Fitimage().sign(FitimageForm.model_validate(fields), job)
        content = b"".join(signed.chunks(65536))
        for path in (tmp_path / "job").iterdir():
            path.unlink()
        if dtb is None:
            assert signed.filename == "fitImage.signed"
            return content
        assert signed.filename == "signed-fitImage.tar.gz"
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            assert archive.getnames() == ["fitImage", "u-boot.dtb"]
            return tuple(archive.extractfile(member).read() for member in archive)

    return run


@pytest.fixture
def mkimage(tmp_path):
    """Signs a FIT in place, as digsigserver has it done; writes the key to theirs.dtb where that is there."""

    def run(path, pair, *options):
        encoding, no_encryption = serialization.Encoding.PEM, serialization.NoEncryption()
        private = pair.private_key.private_bytes(
            encoding, serialization.PrivateFormat.TraditionalOpenSSL, no_encryption
        )
        (tmp_path / "dev.key").write_bytes(private)
        (tmp_path / "dev.crt").write_bytes(pair.certificate_pem)
        environment = {"PATH": os.environ["PATH"], "SOURCE_DATE_EPOCH": str(EPOCH)}
        keys = ["-k", tmp_path, *(("-K", "theirs.dtb") if (tmp_path / "theirs.dtb").exists() else ())]
        command = ["mkimage", "-F", *keys, *options, path]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=60)

    return run


@pytest.fixture
def same(tmp_path):
    """Whether ours is the device tree that is in theirs, but for who signed it."""

    def run(ours, theirs):
        (tmp_path / "ours").write_bytes(ours)
        names = {"signer_name": "somebody", "signer_version": "1"}
        return shown(tmp_path / "ours", **names) == shown(theirs, **names)

    return run


@pytest.fixture
def boots(tmp_path):
    """What fit_check_sign says, and the rules."""

    def run(image, dtb, *, tool=True):
        for name, content in (("signed", image), ("keys.dtb", dtb)):
            (tmp_path / name).write_bytes(content)
        try:
            fit_rules.verify(image, dtb)
            verdicts = {True}
        except fit_rules.Refused:
            verdicts = {False}
        for configuration in ("conf-1", "conf-2") if tool else ():
            assert FIT_CHECK_SIGN.exists(), "run `make setup`"
            command = [FIT_CHECK_SIGN, "-f", "signed", "-k", "keys.dtb", "-c", configuration]
            done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, timeout=60)
            verdicts.add(done.returncode == 0)
        assert len(verdicts) == 1
        return verdicts.pop()

    return run


@pytest.fixture
def dtb(tmp_path):
    return write_dtb(tmp_path / "u-boot.dtb", '/dts-v1/; / { model = "u-boot"; before { a; }; };').read_bytes()


@pytest.mark.parametrize("external", ["", "-E", "-E -B 200"])
@pytest.mark.parametrize("kind", ["rsa2048", "rsa3072", "rsa4096"])
async def test_the_tree_is_mkimage_s(  # noqa: PLR0917 - fixtures
    sign, mkimage, same, boots, kinds, dtb, tmp_path, *, kind, external
):
    path = make(tmp_path, algo=f"sha256,{kind}", images=True, external=external)
    ours, key = await sign(path.read_bytes(), kinds[kind], dtb, mark_required="1", comment="by nobody")
    (tmp_path / "theirs.dtb").write_bytes(dtb)
    mkimage(path, kinds[kind], "-r", "-c", "by nobody", *external.split())
    assert same(ours, path)
    assert same(key, tmp_path / "theirs.dtb")
    assert boots(ours, key)
    if external:  # the data too, and in its place
        assert data_behind(ours) == data_behind(path.read_bytes())
        assert len(ours) == len(path.read_bytes())


async def test_the_tree_is_mkimage_s_with_data_moved(sign, mkimage, same, kinds, tmp_path):
    path = make(tmp_path, algo="sha256,rsa2048")
    ours = await sign(path.read_bytes(), kinds["rsa2048"], external_data_offset="0x3000")
    mkimage(path, kinds["rsa2048"], "-E", "-p", "3000")
    assert same(ours, path)
    assert len(ours) == len(path.read_bytes())
    assert ours[0x3000:] == path.read_bytes()[0x3000:]
    assert not any(data_behind(ours)[: 0x3000 - int.from_bytes(ours[4:8], "big")])


@pytest.mark.parametrize("external", ["-E", "-E -p 4000"])
async def test_data_is_moved_from_place_to_place(sign, boots, kinds, dtb, tmp_path, external):
    """Debian's mkimage cannot do that: it leaves data-offset there, and cannot take in data-position."""
    path = make(tmp_path, algo="sha256,rsa2048", external=external)
    moved, key = await sign(path.read_bytes(), kinds["rsa2048"], dtb, external_data_offset="3000")
    assert boots(moved, key)
    data = (tmp_path / "kernel").read_bytes() + (tmp_path / "tree.dtb").read_bytes()
    assert moved[0x3000:][: len(data)] == data
    nodes = fit_rules.Blob(moved).nodes
    assert [each for each in nodes["/images/kernel-1"] if each.startswith("data-")] == ["data-size", "data-position"]


@pytest.mark.parametrize("algo", ["sha512,rsa2048", "sha384,rsa4096"])
async def test_another_algo_than_the_fit_s(sign, mkimage, same, kinds, tmp_path, algo):
    path = make(tmp_path, algo="sha1,rsa1024", images=True)
    ours = await sign(path.read_bytes(), kinds[algo[-7:]], algo=algo)
    mkimage(path, kinds[algo[-7:]], "-o", algo)
    assert same(ours, path)


@pytest.mark.parametrize(
    ("kind", "more"),
    [("rsa2048", 'padding = "pss";'), ("rsa4096", 'padding = "pss";'), ("p256", ""), ("p384", ""), ("rsa2048", "")],
)
@pytest.mark.parametrize("external", ["", "-E -p 2000"])
async def test_devices_accept_it_and_refuse_it_tampered_with(
    sign, boots, kinds, dtb, tmp_path, *, kind, more, external
):
    # fit_check_sign of 2025 takes ECDSA keys from files only
    tool = kind.startswith("rsa")
    path = make(tmp_path, algo=f"sha384,{ALGOS[kind]}", more=more, external=external)
    signed, key = await sign(path.read_bytes(), kinds[kind], dtb, mark_required="1")
    assert boots(signed, key, tool=tool)
    text = signed.index(b"a kernel\n")
    places = {"data": text, "hash": signed.index(fit_rules.hash_of("sha256", signed[text : text + 45_000]))}
    places["load address"] = signed.index(struct.pack(">I", 0x80000))
    places["description"] = signed.index(b"device tree\0")
    for each in fit_rules.Blob(signed).tokens:
        if each.name == "value" and "signature" in each.path:
            places[each.path] = each.at + 20
    assert len(places) == 6
    for place in places.values():
        tampered = signed[:place] + bytes([signed[place] ^ 1]) + signed[place + 1 :]
        with pytest.raises(fit_rules.Refused):
            fit_rules.verify(tampered, key)
        if tool and place == places["data"]:
            assert not boots(tampered, key)
    other = kinds["rsa3072" if kind != "rsa3072" else "rsa2048"]
    _, wrong = await sign(path.read_bytes(), other, dtb, mark_required="1", algo="sha384,rsa3072")
    assert not boots(signed, wrong, tool=tool)
    assert not boots(path.read_bytes(), key, tool=tool)


@pytest.mark.parametrize("board", ["firefly-rk3399", "rock64-rk3328"])
async def test_real_fits(sign, mkimage, same, kinds, tmp_path, board):
    """U-Boot with TF-A for a Rockchip board, and U-Boot's device tree for it."""
    (control,) = (BOARDS / board).glob("*.dtb")
    path = with_nodes(
        BOARDS / board / "u-boot.itb", tmp_path / "a.itb", "sha256,rsa2048", "fdt", "firmware", "loadables"
    )
    ours, key = await sign(path.read_bytes(), kinds["rsa2048"], control.read_bytes(), mark_required="yes")
    (tmp_path / "theirs.dtb").write_bytes(control.read_bytes())
    mkimage(path, kinds["rsa2048"], "-r", "-E")
    assert same(ours, path)
    assert same(key, tmp_path / "theirs.dtb")
    assert len(key) >= control.stat().st_size
    assert fit_rules.verify(ours, key) == 1


async def test_every_image_that_the_configuration_names_is_covered(sign, mkimage, kinds, tmp_path):
    """Which mkimage leaves out where sign-images does, and no verifier of 2026 accepts."""
    board = BOARDS / "firefly-rk3399"
    path = with_nodes(board / "u-boot.itb", tmp_path / "a.itb", "sha256,rsa2048")
    ours, key = await sign(path.read_bytes(), kinds["rsa2048"], (board / "rk3399-firefly.dtb").read_bytes())
    assert fit_rules.verify(ours, key) == 1
    nodes = fit_rules.Blob(ours).nodes["/configurations/config_1/signature-1"]["hashed-nodes"]
    assert [f"/images/{name}\0".encode() in nodes for name in ("uboot", "atf_1", "atf_2", "atf_3", "fdt_1")] == [
        True
    ] * 5
    mkimage(path, kinds["rsa2048"], "-E")
    with pytest.raises(fit_rules.Refused, match="no signature"):
        fit_rules.verify(path.read_bytes(), key)


async def test_a_signature_replaces_its_own_and_leaves_others(sign, boots, kinds, dtb, tmp_path):
    second = 'algo2; }; signature-2 { algo = "sha256,rsa3072"; key-name-hint = "other";'
    path = make(tmp_path, algo="sha256,rsa2048", more=second)
    keys = {"dev": kinds["rsa2048"], "other": kinds["rsa3072"], "new": kinds["p256"]}
    both, key = await sign(path.read_bytes(), keys, dtb, mark_required="1")
    assert boots(both, key)
    first, one = await sign(path.read_bytes(), keys, dtb, keyname="dev", mark_required="1")
    assert boots(first, one)
    assert not boots(first, key)
    later = await sign(first, keys, keyname="other.key")
    assert boots(later, key)
    assert await sign(later, keys, keyname="dev", comment="again") != later
    assert boots(await sign(both, keys), key)


async def test_names_of_keys(sign, kinds, dtb, tmp_path):
    """From the request, the FIT, the dtb, or none; by a URI for all."""
    keys = dict.fromkeys(("dev", "prod", "held"), kinds["rsa2048"])
    named = make(tmp_path, algo="sha256,rsa2048", key="prod").read_bytes()
    unnamed = make(tmp_path, algo="sha256,rsa2048", key=None).read_bytes()
    holding = write_dtb(tmp_path / "h.dtb", "/dts-v1/; / { signature { key-held { }; }; };").read_bytes()

    async def written(artifact, tree=dtb, **fields):
        return fit.key_names(fitimage.fdt.parse(upload((await sign(artifact, keys, tree, **fields))[1]).read, 10**6))

    assert await written(named) == ["prod"]
    assert await written(named, keyname="prod") == ["prod"]
    assert await written(named, holding) == ["prod", "held"]
    assert await written(named, keyname="pkcs11:object=dev") == ["prod"]
    assert await written(unnamed) == ["dev"]
    assert await written(unnamed, holding) == ["held"]
    assert await written(unnamed, holding, keyname="dev") == ["dev", "held"]
    with pytest.raises(ArtifactRejected, match="they ask for 'prod'"):
        await sign(named, keys, keyname="dev")
    with pytest.raises(KeyNotFound, match="called prod"):
        await sign(named, {"dev": kinds["rsa2048"]})
    with pytest.raises(KeyNotGranted):
        await sign(named, keys, keyname="pkcs11:object=none")
    bad = make(tmp_path, algo="sha256,rsa2048", key="a;object=dev").read_bytes()
    with pytest.raises(ArtifactRejected, match="no name for a key"):
        await sign(bad, keys)


async def test_the_dtb_keeps_its_size_where_it_has_room(sign, kinds, dtb, tmp_path):
    path = make(tmp_path, algo="sha256,rsa2048")
    roomy = dtb[:4] + struct.pack(">I", 4096) + dtb[8:] + bytes(4096 - len(dtb))
    _, key = await sign(path.read_bytes(), kinds["rsa2048"], roomy)
    assert len(key) == 4096
    assert b"required" not in key
    assert (await sign(path.read_bytes(), kinds["rsa2048"], key))[1] == key
    with pytest.raises(ArtifactRejected, match="dtb"):
        await sign(path.read_bytes(), kinds["rsa2048"], b"no tree")
    with pytest.raises(ArtifactRejected, match="more than"):
        await sign(path.read_bytes(), kinds["rsa2048"], dtb + bytes(fitimage.DTB_MAX_BYTES))


async def test_what_follows_is_kept(sign, kinds, tmp_path):
    inside = make(tmp_path, algo="sha256,rsa2048").read_bytes()
    assert (await sign(inside + b"behind", kinds["rsa2048"])).endswith(b"behind")
    behind = make(tmp_path, algo="sha256,rsa2048", external="-E").read_bytes()
    assert (await sign(behind + b"behind", kinds["rsa2048"])).endswith(b"behind")


async def test_an_old_fit_with_unit_addresses(sign, kinds, dtb, tmp_path):
    """mkimage signs them still; U-Boot since 2021.04 refuses them."""
    path = make(tmp_path, algo="sha256,rsa2048")
    text = shown(path).replace("-1", "@1").replace('kernel = "kernel@1"', 'kernel = "kernel"')
    old = write_dtb(tmp_path / "old.itb", text).read_bytes()
    signed, _ = await sign(old, kinds["rsa2048"], dtb)
    assert b"/images/kernel@1\0/images/kernel@1/hash@1\0" in signed


async def test_a_key_that_does_not_suit(sign, kinds, tmp_path):
    artifact = make(tmp_path, algo="sha256,rsa2048").read_bytes()
    for kind in ("rsa3072", "p256", "ed25519"):
        with pytest.raises(KeyUnsuited, match="sha256,rsa2048"):
            await sign(artifact, kinds[kind])
    with pytest.raises(ArtifactRejected, match="none that is made here"):
        await sign(make(tmp_path, algo="sha1,rsa2048").read_bytes(), kinds["rsa2048"])


@pytest.mark.parametrize(
    ("change", "fields", "fault"),
    [
        (lambda data: b"", {}, "no flattened device tree"),
        (lambda data: data.replace(b"signature-1", b"other-node1"), {}, "no signature nodes"),
        (lambda data: data, {"external_data_offset": "100"}, "leave more room"),
        (lambda data: data[:-100], {}, "cut off"),
    ],
)
async def test_what_cannot_be_signed(sign, kinds, tmp_path, change, fields, fault):
    artifact = change(make(tmp_path, algo="sha256,rsa2048", external="-E").read_bytes())
    with pytest.raises(ArtifactRejected, match=fault):
        await sign(artifact, kinds["rsa2048"], **fields)


async def test_no_room_before_data_at_a_fixed_place(sign, kinds, tmp_path):
    artifact = make(tmp_path, algo="sha256,rsa2048", external="-E -p 600").read_bytes()
    with pytest.raises(ArtifactRejected, match="leave more room"):
        await sign(artifact, kinds["rsa2048"])
    assert len(await sign(artifact, kinds["rsa2048"], external_data_offset="1000")) > len(artifact)


async def test_a_large_gap_is_not_filled(sign, kinds, tmp_path):
    data = make(tmp_path, algo="sha256,rsa2048", external="-E -p 2000000").read_bytes()
    large = data[:4] + struct.pack(">I", 0x2000000) + data[8:]
    with pytest.raises(ArtifactRejected, match="between the tree and its data"):
        await sign(large, kinds["rsa2048"])


@pytest.mark.parametrize(
    "fields",
    [
        {"algo": "sha1,rsa2048"},
        {"algo": "sha256,rsa2048 "},
        {"comment": "two\nlines"},
        {"external_data_offset": "nothing"},
        {"external_data_offset": "-1"},
        {"external_data_offset": "10000001"},
        {"timestamp": "-1"},
        {"timestamp": str(2**32)},
        {"machine": "../x"},
        {"keyname": "x" * 1025},
        {"dtb": "/etc/passwd"},
    ],
)
def test_fields_that_are_refused(fields):
    with pytest.raises(ValidationError):
        FitimageForm.model_validate({"artifact": upload(b"x"), **fields})


def test_fields_of_digsigserver():
    form = FitimageForm.model_validate(
        {"artifact": upload(b"x"), "external_data_offset": "2000", "mark_required": "true"}
    )
    assert (form.machine, form.external_data_offset, bool(form.mark_required)) == ("imx", 0x2000, True)


@pytest.mark.parametrize("part", ["hash", "algo", "value", "gone", "cut"])
async def test_what_is_not_sound_is_not_released(sign, kinds, tmp_path, monkeypatch, part):
    artifact = make(tmp_path, algo="sha256,rsa2048", external="-E").read_bytes()
    assembled = fitimage._assembled

    def spoilt(image, position):
        signature = image.fit.signatures[0]
        match part:
            case "hash":
                image.fit.tree.set(image.fit.images[0].children["hash-1"], "value", bytes(32))
            case "algo":
                image.fit.tree.set(signature.node, "algo", b"sha512,rsa2048\0")
            case "value":
                image.fit.tree.set(signature.node, "value", bytes(256))
            case "gone":
                del signature.owner.children["signature-1"]
        parts = assembled(image, position)
        return parts[:-1] if part == "cut" else parts

    monkeypatch.setattr(fitimage, "_assembled", spoilt)
    with pytest.raises(SignatureMismatch):
        await sign(artifact, kinds["rsa2048"])


async def test_a_dtb_that_is_not_sound_is_not_released(sign, kinds, dtb, tmp_path, monkeypatch):
    path = make(tmp_path, algo="sha256,rsa2048")
    keyed = fitimage._keyed
    monkeypatch.setattr(
        fitimage, "_keyed", lambda *options, **more: keyed(*options, **more).replace(b"key-dev", b"key-bad")
    )
    with pytest.raises(SignatureMismatch, match="dtb"):
        await sign(path.read_bytes(), kinds["rsa2048"], dtb)


async def test_what_a_key_raises(sign, kinds, tmp_path, monkeypatch):
    """The error of one of many signatures is the answer, and not a group of them."""
    artifact = make(tmp_path, algo="sha256,rsa2048").read_bytes()

    async def refuse(self, scheme, data):
        raise SignatureMismatch("no", "no")

    monkeypatch.setattr(type(kinds["rsa2048"].key), "sign", refuse)
    with pytest.raises(SignatureMismatch):
        await sign(artifact, kinds["rsa2048"])


async def test_a_mismatch_is_not_hidden_by_another_failure(sign, kinds, tmp_path, monkeypatch):
    artifact = make(tmp_path, algo="sha256,rsa2048").read_bytes()
    errors = iter((ProviderBusy("no", "no"), SignatureMismatch("no", "no")))

    async def refuse(self, scheme, data):
        raise next(errors)

    monkeypatch.setattr(type(kinds["rsa2048"].key), "sign", refuse)
    with pytest.raises(SignatureMismatch):
        await sign(artifact, kinds["rsa2048"])
