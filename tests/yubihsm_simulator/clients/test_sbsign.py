"""sbsign on Yubico's PKCS#11 module: an EFI program for Secure Boot."""

from tests.yubihsm_simulator.clients.conftest import Hsm, private_key, put_key

PROGRAM = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"
KEY = ("--engine", "pkcs11", "--key", "pkcs11:token=YubiHSM;object=signer;type=private")


def test_sbsign(hsm: Hsm, engine: tuple[str, ...]) -> None:
    put_key(hsm, 5, "signer", private_key("rsa2048"))
    for _ in range(3):
        hsm.run("sbsign", *KEY, "--cert", "signer.crt", "--output", "signed.efi", PROGRAM)
        assert "Signature verification OK" in hsm.run("sbverify", "--cert", "signer.crt", "signed.efi")
    signed, mark = hsm.read("signed.efi"), b"#### LoaderInfo: systemd-boot "
    assert signed.count(mark) == 1
    hsm.write("tampered.efi", signed.replace(mark, mark.lower()))
    hsm.refuses("sbverify", "--cert", "signer.crt", "tampered.efi")


def test_another_key_is_refused_by_its_verifier(hsm: Hsm, engine: tuple[str, ...]) -> None:
    put_key(hsm, 5, "signer", private_key("rsa2048"))
    put_key(hsm, 6, "other", private_key("rsa3072"))
    hsm.run("sbsign", *KEY, "--cert", "signer.crt", "--output", "signed.efi", PROGRAM)
    hsm.refuses("sbverify", "--cert", "other.crt", "signed.efi")
