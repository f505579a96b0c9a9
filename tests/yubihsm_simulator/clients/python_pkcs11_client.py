"""What test_python_pkcs11 has a process of its own do: python_pkcs11_client.py MODULE PIN WHAT."""

import datetime
import hashlib
import hmac
import os
import sys
import threading
from typing import Any

import pkcs11
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from pkcs11 import KDF, Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass
from pkcs11.constants import DEFAULT
from pkcs11.util.ec import encode_ec_public_key, encode_ecdsa_signature, encode_named_curve_parameters
from pkcs11.util.rsa import decode_rsa_private_key, encode_rsa_public_key
from pkcs11.util.x509 import decode_x509_certificate

MODULE, PIN, WHAT = sys.argv[1:]
DATA = b"content" * 50
SHA256 = hashes.SHA256()
CURVES = {
    "secp224r1": ec.SECP224R1(),
    "secp256r1": ec.SECP256R1(),
    "secp384r1": ec.SECP384R1(),
    "secp521r1": ec.SECP521R1(),
    "secp256k1": ec.SECP256K1(),
}
# CKA_EC_PARAMS as the module wants them: a PrintableString
EDWARDS25519 = b"\x13\x0cedwards25519"
TOKEN = pkcs11.lib(MODULE).get_token(token_label="YubiHSM")


def session() -> Any:
    return TOKEN.open(rw=True, user_pin=PIN)


def rejects(public: Any, signature: bytes, *how: Any) -> None:
    """Tampering is noticed."""
    try:
        public.verify(signature, DATA[1:], *how)
    except InvalidSignature:
        return
    raise AssertionError("accepted")


def generate_rsa(opened: Any, **options: Any) -> tuple[Any, Any]:
    """Without the attributes that the module takes for a wish for a wrap key, even when they are false."""
    public, private = opened.generate_keypair(
        KeyType.RSA, 2048, store=True, public_template={Attribute.WRAP: DEFAULT},
        private_template={Attribute.UNWRAP: DEFAULT}, **options,
    )  # fmt: skip
    return serialization.load_der_public_key(encode_rsa_public_key(public)), private


def generated_rsa() -> None:
    with session() as opened:
        public, private = generate_rsa(opened, id=b"\0\7", label="made")
        for hash, mechanism in (
            (SHA256, Mechanism.SHA256_RSA_PKCS),
            (hashes.SHA384(), Mechanism.SHA384_RSA_PKCS),
            (hashes.SHA512(), Mechanism.SHA512_RSA_PKCS),
        ):
            public.verify(private.sign(DATA, mechanism=mechanism), DATA, padding.PKCS1v15(), hash)
        signature = private.sign(
            DATA,
            mechanism=Mechanism.SHA256_RSA_PKCS_PSS,
            mechanism_param=(Mechanism.SHA256, pkcs11.MGF.SHA256, 32),
        )
        pss = padding.PSS(padding.MGF1(SHA256), 32)
        public.verify(signature, DATA, pss, SHA256)
        rejects(public, signature, pss, SHA256)
        encrypted = public.encrypt(b"secret", padding.OAEP(padding.MGF1(SHA256), SHA256, None))
        parameters = (Mechanism.SHA256, pkcs11.MGF.SHA256, None)
        plain = private.decrypt(encrypted, mechanism=Mechanism.RSA_PKCS_OAEP, mechanism_param=parameters)
        assert plain == b"secret"
        encrypted = public.encrypt(b"secret", padding.PKCS1v15())
        assert private.decrypt(encrypted, mechanism=Mechanism.RSA_PKCS) == b"secret"
        assert opened.get_key(ObjectClass.PRIVATE_KEY, label="made").id == b"\0\7"
        private.destroy()
        assert list(opened.get_objects({Attribute.LABEL: "made"})) == []


def imported_rsa() -> None:
    key = rsa.generate_private_key(65537, 2048)
    der = key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    with session() as opened:
        template = decode_rsa_private_key(der)
        template |= {Attribute.ID: b"\0\1", Attribute.LABEL: "put", Attribute.TOKEN: True}
        del template[Attribute.UNWRAP]
        private = opened.create_object(template)
        signature = private.sign(DATA, mechanism=Mechanism.SHA256_RSA_PKCS)
        key.public_key().verify(signature, DATA, padding.PKCS1v15(), SHA256)


def ecdsa() -> None:
    with session() as opened:
        for name, curve in CURVES.items():
            parameters = opened.create_domain_parameters(
                KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters(name)}, local=True
            )
            key, private = parameters.generate_keypair(store=True, label=name)
            public = serialization.load_der_public_key(encode_ec_public_key(key))
            assert isinstance(public, ec.EllipticCurvePublicKey)
            for mechanism, data in (
                (Mechanism.ECDSA_SHA256, DATA),
                (Mechanism.ECDSA, hashlib.sha256(DATA).digest()),
            ):
                signature = encode_ecdsa_signature(private.sign(data, mechanism=mechanism))
                public.verify(signature, DATA, ec.ECDSA(SHA256))
                rejects(public, signature, ec.ECDSA(SHA256))
            assert curve.key_size == public.key_size
            private.destroy()


def eddsa() -> None:
    with session() as opened:
        parameters = opened.create_domain_parameters(
            KeyType.EC_EDWARDS, {Attribute.EC_PARAMS: EDWARDS25519}, local=True
        )
        key, private = parameters.generate_keypair(
            mechanism=Mechanism.EC_EDWARDS_KEY_PAIR_GEN, store=True, label="edwards", id=b"\0\1"
        )
        public = ed25519.Ed25519PublicKey.from_public_bytes(key[Attribute.EC_POINT][-32:])
        signature = private.sign(DATA, mechanism=Mechanism.EDDSA)
        public.verify(signature, DATA)
        rejects(public, signature)


def ecdh() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    point = other.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    with session() as opened:
        parameters = opened.create_domain_parameters(
            KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}, local=True
        )
        key, private = parameters.generate_keypair(store=True, label="ecdh", capabilities=MechanismFlag.DERIVE)
        public = serialization.load_der_public_key(encode_ec_public_key(key))
        assert isinstance(public, ec.EllipticCurvePublicKey)
        shared = private.derive_key(KeyType.GENERIC_SECRET, 256, mechanism_param=(KDF.NULL, None, point))
        assert shared[Attribute.VALUE] == other.exchange(ec.ECDH(), public)


def certificates() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "signer")])
    now = datetime.datetime.now(datetime.UTC)
    issued = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    der = issued.sign(key, SHA256).public_bytes(serialization.Encoding.DER)
    with session() as opened:
        template = decode_x509_certificate(der)
        opened.create_object({**template, Attribute.TOKEN: True, Attribute.ID: b"\0\5", Attribute.LABEL: "signer"})
        (found,) = opened.get_objects({Attribute.CLASS: ObjectClass.CERTIFICATE, Attribute.ID: b"\0\5"})
        assert (found[Attribute.VALUE], found[Attribute.LABEL]) == (der, "signer")
        found.destroy()
        assert list(opened.get_objects({Attribute.CLASS: ObjectClass.CERTIFICATE, Attribute.ID: b"\0\5"})) == []


def secret_keys() -> None:
    secret, iv = os.urandom(32), os.urandom(16)
    with session() as opened:
        key = opened.create_object({
            Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: KeyType.AES, Attribute.VALUE: secret,
            Attribute.TOKEN: True, Attribute.ENCRYPT: True, Attribute.DECRYPT: True, Attribute.LABEL: "aes",
        })  # fmt: skip
        encryptor = Cipher(algorithms.AES(secret), modes.CBC(iv)).encryptor()
        expected = encryptor.update(bytes(64)) + encryptor.finalize()
        assert key.encrypt(bytes(64), mechanism=Mechanism.AES_CBC, mechanism_param=iv) == expected
        assert key.decrypt(expected, mechanism=Mechanism.AES_CBC, mechanism_param=iv) == bytes(64)
        mac = opened.create_object({
            Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: KeyType.SHA256_HMAC, Attribute.VALUE: secret,
            Attribute.TOKEN: True, Attribute.SIGN: True, Attribute.VERIFY: True, Attribute.LABEL: "mac",
        })  # fmt: skip
        signature = mac.sign(DATA, mechanism=Mechanism.SHA256_HMAC)
        assert signature == hmac.digest(secret, DATA, "sha256")
        assert mac.verify(DATA, signature, mechanism=Mechanism.SHA256_HMAC)
        assert opened.generate_random(256) != opened.generate_random(256)


def threads() -> None:
    """One lock round every call: python-pkcs11 initializes the module without locking."""
    lock, failures = threading.Lock(), []
    with session() as opened:
        public, private = generate_rsa(opened, label="shared")

        def sign() -> None:
            try:
                for _ in range(20):
                    with lock:
                        signature = private.sign(DATA, mechanism=Mechanism.SHA256_RSA_PKCS)
                    public.verify(signature, DATA, padding.PKCS1v15(), SHA256)
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=sign) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not failures, failures


def wait() -> None:
    """Until the test has done something to the device."""
    print("ready", flush=True)
    sys.stdin.readline()


def interruptions() -> None:
    """The session goes: idle, then by a reboot. The module makes another. The device goes, and comes back."""
    with session() as opened:
        public, private = generate_rsa(opened, label="lasting")

        def sign() -> None:
            signature = private.sign(DATA, mechanism=Mechanism.SHA256_RSA_PKCS)
            public.verify(signature, DATA, padding.PKCS1v15(), SHA256)

        sign()
        for _ in ("idle", "rebooted"):
            wait()
            sign()
        wait()
        try:
            sign()
        except pkcs11.DeviceRemoved:
            pass
        else:
            raise AssertionError("signed without a device")
        wait()
        sign()


def errors() -> None:
    try:
        TOKEN.open(user_pin=PIN[:-1] + "x")
    except pkcs11.PinIncorrect:
        pass
    else:
        raise AssertionError("logged in")
    with session() as opened:
        try:
            opened.get_key(label="nobody's")
        except pkcs11.NoSuchKey:
            return
    raise AssertionError("found")


globals()[WHAT]()
