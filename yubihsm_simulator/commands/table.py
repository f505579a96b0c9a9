"""Every command that a session can carry: what executes it, and the capability that the session needs."""

from dataclasses import dataclass

from yubihsm_simulator.commands import asymmetric, device, objects, otp, ssh, symmetric, wrap
from yubihsm_simulator.commands.call import Call, Handler
from yubihsm_simulator.definitions import Capability, Command
from yubihsm_simulator.frames import Fields


@dataclass(frozen=True, slots=True)
class Entry:
    """One command. `with_full_log`: it works though the log is full and force-audit is on."""

    handler: Handler
    capability: Capability = Capability.NONE
    with_full_log: bool = False


def _echo(call: Call, fields: Fields) -> bytes:
    return call.device.echo(fields)


def _device_info(call: Call, fields: Fields) -> bytes:
    return call.device.device_info(fields)


TABLE: dict[int, Entry] = {
    Command.ECHO: Entry(_echo),
    Command.DEVICE_INFO: Entry(_device_info, with_full_log=True),
    Command.RESET_DEVICE: Entry(device.reset, Capability.RESET_DEVICE),
    Command.CLOSE_SESSION: Entry(device.close_session, with_full_log=True),
    Command.GET_STORAGE_INFO: Entry(device.storage_info),
    Command.PUT_OPAQUE: Entry(objects.put_opaque, Capability.PUT_OPAQUE),
    Command.GET_OPAQUE: Entry(objects.get_opaque, Capability.GET_OPAQUE),
    Command.PUT_AUTHENTICATION_KEY: Entry(objects.put_authentication_key, Capability.PUT_AUTHENTICATION_KEY),
    Command.PUT_ASYMMETRIC_KEY: Entry(asymmetric.put, Capability.PUT_ASYMMETRIC_KEY),
    Command.GENERATE_ASYMMETRIC_KEY: Entry(asymmetric.generate, Capability.GENERATE_ASYMMETRIC_KEY),
    Command.SIGN_PKCS1: Entry(asymmetric.sign_pkcs1, Capability.SIGN_PKCS),
    Command.LIST_OBJECTS: Entry(objects.list_objects),
    Command.DECRYPT_PKCS1: Entry(asymmetric.decrypt_pkcs1, Capability.DECRYPT_PKCS),
    Command.EXPORT_WRAPPED: Entry(wrap.export_wrapped, Capability.EXPORT_WRAPPED),
    Command.IMPORT_WRAPPED: Entry(wrap.import_wrapped, Capability.IMPORT_WRAPPED),
    Command.PUT_WRAP_KEY: Entry(wrap.put_wrap_key, Capability.PUT_WRAP_KEY),
    Command.GET_LOG_ENTRIES: Entry(device.get_log_entries, Capability.GET_LOG_ENTRIES, with_full_log=True),
    Command.GET_OBJECT_INFO: Entry(objects.get_object_info),
    Command.SET_OPTION: Entry(device.set_option, Capability.SET_OPTION),
    Command.GET_OPTION: Entry(device.get_option, Capability.GET_OPTION),
    Command.GET_PSEUDO_RANDOM: Entry(device.pseudo_random, Capability.GET_PSEUDO_RANDOM),
    Command.PUT_HMAC_KEY: Entry(symmetric.put_hmac, Capability.PUT_HMAC_KEY),
    Command.SIGN_HMAC: Entry(symmetric.sign_hmac, Capability.SIGN_HMAC),
    Command.GET_PUBLIC_KEY: Entry(objects.get_public_key),
    Command.SIGN_PSS: Entry(asymmetric.sign_pss, Capability.SIGN_PSS),
    Command.SIGN_ECDSA: Entry(asymmetric.sign_ecdsa, Capability.SIGN_ECDSA),
    Command.DERIVE_ECDH: Entry(asymmetric.derive_ecdh, Capability.DERIVE_ECDH),
    Command.DELETE_OBJECT: Entry(objects.delete_object),  # the capability depends on the object's type
    Command.DECRYPT_OAEP: Entry(asymmetric.decrypt_oaep, Capability.DECRYPT_OAEP),
    Command.GENERATE_HMAC_KEY: Entry(symmetric.generate_hmac, Capability.GENERATE_HMAC_KEY),
    Command.GENERATE_WRAP_KEY: Entry(wrap.generate_wrap_key, Capability.GENERATE_WRAP_KEY),
    Command.VERIFY_HMAC: Entry(symmetric.verify_hmac, Capability.VERIFY_HMAC),
    Command.SIGN_SSH_CERTIFICATE: Entry(ssh.sign_ssh_certificate, Capability.SIGN_SSH_CERTIFICATE),
    Command.PUT_TEMPLATE: Entry(objects.put_template, Capability.PUT_TEMPLATE),
    Command.GET_TEMPLATE: Entry(objects.get_template, Capability.GET_TEMPLATE),
    Command.DECRYPT_OTP: Entry(otp.decrypt_otp, Capability.DECRYPT_OTP),
    Command.CREATE_OTP_AEAD: Entry(otp.create_aead, Capability.CREATE_OTP_AEAD),
    Command.RANDOMIZE_OTP_AEAD: Entry(otp.randomize_aead, Capability.RANDOMIZE_OTP_AEAD),
    Command.REWRAP_OTP_AEAD: Entry(otp.rewrap_aead, Capability.REWRAP_FROM_OTP_AEAD_KEY),
    Command.SIGN_ATTESTATION_CERTIFICATE: Entry(
        asymmetric.sign_attestation_certificate, Capability.SIGN_ATTESTATION_CERTIFICATE
    ),
    Command.PUT_OTP_AEAD_KEY: Entry(otp.put_key, Capability.PUT_OTP_AEAD_KEY),
    Command.GENERATE_OTP_AEAD_KEY: Entry(otp.generate_key, Capability.GENERATE_OTP_AEAD_KEY),
    Command.SET_LOG_INDEX: Entry(device.set_log_index, Capability.GET_LOG_ENTRIES, with_full_log=True),
    Command.WRAP_DATA: Entry(wrap.wrap_data, Capability.WRAP_DATA),
    Command.UNWRAP_DATA: Entry(wrap.unwrap_data, Capability.UNWRAP_DATA),
    Command.SIGN_EDDSA: Entry(asymmetric.sign_eddsa, Capability.SIGN_EDDSA),
    Command.BLINK_DEVICE: Entry(device.blink),
    Command.CHANGE_AUTHENTICATION_KEY: Entry(objects.change_authentication_key, Capability.CHANGE_AUTHENTICATION_KEY),
    Command.PUT_SYMMETRIC_KEY: Entry(symmetric.put_symmetric, Capability.PUT_SYMMETRIC_KEY),
    Command.GENERATE_SYMMETRIC_KEY: Entry(symmetric.generate_symmetric, Capability.GENERATE_SYMMETRIC_KEY),
    Command.DECRYPT_ECB: Entry(symmetric.decrypt_ecb, Capability.DECRYPT_ECB),
    Command.ENCRYPT_ECB: Entry(symmetric.encrypt_ecb, Capability.ENCRYPT_ECB),
    Command.DECRYPT_CBC: Entry(symmetric.decrypt_cbc, Capability.DECRYPT_CBC),
    Command.ENCRYPT_CBC: Entry(symmetric.encrypt_cbc, Capability.ENCRYPT_CBC),
    Command.PUT_PUBLIC_WRAP_KEY: Entry(wrap.put_public_wrap_key, Capability.PUT_PUBLIC_WRAP_KEY),
    Command.WRAP_KEY_RSA: Entry(wrap.wrap_key_rsa, Capability.EXPORT_WRAPPED),
    Command.UNWRAP_KEY_RSA: Entry(wrap.unwrap_key_rsa, Capability.IMPORT_WRAPPED),
    Command.EXPORT_WRAPPED_RSA: Entry(wrap.export_wrapped_rsa, Capability.EXPORT_WRAPPED),
    Command.IMPORT_WRAPPED_RSA: Entry(wrap.import_wrapped_rsa, Capability.IMPORT_WRAPPED),
}
