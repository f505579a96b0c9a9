"""Every kind of provider there is: a new one is a module and a line in each of the two lists below."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from tokens.file import FileProvider, FileSettings
from tokens.pkcs11 import Pkcs11Provider, Pkcs11Settings
from tokens.provider import KeyProvider
from tokens.s3 import S3Provider, S3Settings
from tokens.yubihsm import YubihsmProvider, YubihsmSettings

AnySettings = FileSettings | S3Settings | Pkcs11Settings | YubihsmSettings

ProviderSettings = Annotated[AnySettings, Field(discriminator="kind")]


def create(name: str, settings: AnySettings, state_directory: Path) -> KeyProvider:
    """The provider that `[providers.NAME]` describes; `state_directory` outlives the process."""
    match settings:
        case FileSettings():
            return FileProvider(name, settings)
        case S3Settings():
            return S3Provider(name, settings)
        case Pkcs11Settings():
            return Pkcs11Provider(name, settings, state_directory)
        case YubihsmSettings():
            return YubihsmProvider(name, settings, state_directory)
