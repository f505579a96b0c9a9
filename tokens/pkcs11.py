"""Keys that stay on a PKCS#11 token: any module, any number of sessions, RSA, ECDSA and Ed25519.

This side of it never loads the module: `tokens.drivers.pkcs11` does, in a worker process.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from pydantic import Field, model_validator

from tokens.errors import KeyUnusable
from tokens.provider import PublicKey
from tokens.resident import ResidentProvider, ResidentSettings
from tokens.secret import SecretSource
from tokens.supervisor import Supervisor


class Pkcs11Settings(ResidentSettings):
    """`[providers.NAME]` with `kind = "pkcs11"`."""

    kind: Literal["pkcs11"]
    module: Path
    """The PKCS#11 module, for example /usr/lib/softhsm/libsofthsm2.so."""
    token: str | None = None
    """The token's label."""
    serial: str | None = None
    """The token's serial number; with `token`, both must match."""
    pin: SecretSource
    """Where the user PIN comes from."""
    env: dict[str, str] = Field(default_factory=dict)
    """Variables for the module, such as SOFTHSM2_CONF; only the workers see them."""

    @model_validator(mode="after")
    def _token_is_named(self) -> Self:
        if not self.token and not self.serial:
            raise ValueError("name the token by `token` (its label) or `serial`: there is no default token")
        return self


class Pkcs11Provider(ResidentProvider):
    """Implements `tokens.provider.KeyProvider`.

    Arguments:
        name: the NAME of `[providers.NAME]`.
        settings: that table.
        state_directory: outlives the service; here it is remembered which PIN the token refused.
    """

    kind = "pkcs11"

    def __init__(self, name: str, settings: Pkcs11Settings, state_directory: Path) -> None:
        super().__init__(name)
        self._settings = settings
        self._state_directory = state_directory

    @property
    def uri_attributes(self) -> Mapping[str, frozenset[str]]:
        """What the token attributes of a URI may say: the configured names, and what the token says of itself."""
        told = self.supervisor.token if self.supervisor else {}
        labels = {self._settings.token, told.get("label"), *self._settings.aliases}
        attributes = {
            "token": labels,
            "serial": {self._settings.serial, told.get("serial")},
            "manufacturer": {told.get("manufacturer")},
            "model": {told.get("model")},
        }
        return {name: frozenset(value for value in values if value) for name, values in attributes.items()}

    def supervise(self) -> Supervisor:
        """Workers that load the module and log in."""
        settings = self._settings
        return Supervisor(
            self.name,
            "pkcs11",
            {
                "module": str(settings.module),
                "token": settings.token or "",
                "serial": settings.serial or "",
                "pin_file": str(settings.pin.path()),
                "state_directory": str(self._state_directory),
            },
            env=settings.env,
            workers=settings.sessions,
            limits=settings.limits,
        )

    def public_key(self, public: Any) -> PublicKey:
        """The public key of the values that the driver found. Raises KeyUnusable."""
        try:
            match public:
                case ["rsa", modulus, exponent] if int(modulus, 16).bit_length() >= _RSA_MIN_BITS:
                    return rsa.RSAPublicNumbers(int(exponent, 16), int(modulus, 16)).public_key()
                case ["ec", parameters, point]:
                    curve = _CURVES[bytes.fromhex(parameters)]
                    size = 1 + 2 * ((curve.key_size + 7) // 8)
                    return ec.EllipticCurvePublicKey.from_encoded_point(curve, _point(bytes.fromhex(point), size))
                case ["edwards", _, point]:
                    return ed25519.Ed25519PublicKey.from_public_bytes(_point(bytes.fromhex(point), 32))
        except (KeyError, ValueError):
            pass
        raise KeyUnusable(
            "The key's type, size or curve is not supported.",
            "Grant an RSA key of 2048 bits or more, a P-256, P-384, P-521 or an Ed25519 key.",
        )


# DER OBJECT IDENTIFIERs of the curves (RFC 5480, section 2.1.1.1): CKA_EC_PARAMS
_CURVES: dict[bytes, ec.EllipticCurve] = {
    bytes.fromhex("06082a8648ce3d030107"): ec.SECP256R1(),
    bytes.fromhex("06052b81040022"): ec.SECP384R1(),
    bytes.fromhex("06052b81040023"): ec.SECP521R1(),
}

_RSA_MIN_BITS = 2048


def _point(value: bytes, size: int) -> bytes:
    """The point of CKA_EC_POINT: a DER OCTET STRING (PKCS#11 v2.40 current mechanisms, 2.3.3), bare on some tokens."""
    header = b"\x04" + (b"\x81" if size > 127 else b"") + bytes([size])
    return value.removeprefix(header) if len(value) == len(header) + size else value
