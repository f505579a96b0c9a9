"""One of the two devices between which keys are copied, with its admin's session."""

from collections.abc import Iterator
from contextlib import contextmanager

from yubihsm.core import AuthSession, YubiHsm
from yubihsm.defs import CAPABILITY, OBJECT
from yubihsm.objects import AsymmetricKey, ObjectInfo, Opaque

from tokens.provider import PublicKey
from tokens.provisioning.declaration import Declaration
from tokens.provisioning.device import connect, logged_in, objects, public_key, translated
from tokens.provisioning.files import read_password
from tokens.provisioning.plan import PutAuthKey, plan


class Side:
    """A device that was set up from a declaration; `opened` makes one."""

    def __init__(self, name: str, declaration: Declaration, hsm: YubiHsm, admin: AuthSession) -> None:
        self.name = name
        self.session = admin
        self._hsm = hsm
        self._auth_keys = [step for step in plan(declaration) if isinstance(step, PutAuthKey)]

    def objects(self) -> list[ObjectInfo]:
        """All that it holds."""
        with translated(self.name):
            return objects(self.session)

    def public(self, info: ObjectInfo) -> PublicKey | bytes | None:
        """What an object shows of its contents: a key pair its public key, an opaque object its data."""
        with translated(self.name):
            match info.object_type:
                case OBJECT.ASYMMETRIC_KEY:
                    return public_key(AsymmetricKey(self.session, info.id))
                case OBJECT.OPAQUE:
                    return Opaque(self.session, info.id).get()
                case _:
                    return None

    @contextmanager
    def user(self, info: ObjectInfo, capability: CAPABILITY) -> Iterator[AuthSession | None]:
        """A session that may use the object so; None where no declared authentication key may."""
        able = (
            step
            for step in self._auth_keys
            if step.object.capabilities & capability and step.object.domains & info.domains
        )
        step = next(able, None)
        if step is None:
            yield None
            return
        password = read_password(step.password)
        with translated(self.name), logged_in(self._hsm, step.object.id, password) as session:
            yield session


@contextmanager
def opened(name: str, declaration: Declaration) -> Iterator[Side]:
    """The device, its admin logged in; `name` begins sentences about it. Raises as `connect` does."""
    admin = declaration.admin
    password = read_password(admin.password)
    with connect(declaration.device) as hsm, logged_in(hsm, admin.id, password) as session:
        yield Side(f"{name} ({declaration.device.serial})", declaration, hsm, session)
