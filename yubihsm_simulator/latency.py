"""How long the hardware takes.

Signing: Yubico's data sheet, as remembered. Key generation and the rest: estimates between.
"""

from yubihsm_simulator.definitions import Algorithm, Command

_PRIVATE_OPERATION_S: dict[Algorithm, float] = {
    Algorithm.RSA_2048: 0.140,
    Algorithm.RSA_3072: 0.500,
    Algorithm.RSA_4096: 0.850,
    Algorithm.EC_P224: 0.065,
    Algorithm.EC_P256: 0.075,
    Algorithm.EC_K256: 0.075,
    Algorithm.EC_P384: 0.120,
    Algorithm.EC_P521: 0.210,
    Algorithm.EC_BP256: 0.100,
    Algorithm.EC_BP384: 0.150,
    Algorithm.EC_BP512: 0.230,
    Algorithm.EC_ED25519: 0.105,
}
_GENERATE_S: dict[Algorithm, float] = {
    Algorithm.RSA_2048: 8.0,
    Algorithm.RSA_3072: 20.0,
    Algorithm.RSA_4096: 60.0,
}
_WITH_PRIVATE_KEY = {
    Command.SIGN_PKCS1,
    Command.SIGN_PSS,
    Command.SIGN_ECDSA,
    Command.SIGN_EDDSA,
    Command.DECRYPT_PKCS1,
    Command.DECRYPT_OAEP,
    Command.DERIVE_ECDH,
    Command.SIGN_ATTESTATION_CERTIFICATE,
    Command.SIGN_SSH_CERTIFICATE,
    Command.UNWRAP_KEY_RSA,
    Command.IMPORT_WRAPPED_RSA,
}
_GENERATING = {Command.GENERATE_ASYMMETRIC_KEY, Command.GENERATE_WRAP_KEY}
_STORING_S = 0.050
_STORING = {
    Command.PUT_OPAQUE,
    Command.PUT_AUTHENTICATION_KEY,
    Command.PUT_ASYMMETRIC_KEY,
    Command.PUT_WRAP_KEY,
    Command.PUT_HMAC_KEY,
    Command.PUT_TEMPLATE,
    Command.PUT_OTP_AEAD_KEY,
    Command.PUT_SYMMETRIC_KEY,
    Command.PUT_PUBLIC_WRAP_KEY,
    Command.IMPORT_WRAPPED,
    Command.DELETE_OBJECT,
    Command.SET_OPTION,
}
_ANY_COMMAND_S = 0.002


def hardware_s(command: int, algorithm: Algorithm | None) -> float:
    """Seconds that a command takes; `algorithm` is that of the key that it used."""
    if command in _WITH_PRIVATE_KEY and algorithm is not None:
        return _PRIVATE_OPERATION_S.get(algorithm, _ANY_COMMAND_S)
    if command in _GENERATING and algorithm is not None:
        return _GENERATE_S.get(algorithm, _PRIVATE_OPERATION_S.get(algorithm, _STORING_S))
    return _STORING_S if command in _STORING else _ANY_COMMAND_S
