"""`[providers.NAME.audit]`: how a device's log is drained, and what an alarm does."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from tokens.audit.log import CAPACITY
from tokens.secret import SecretSource

Seconds = Annotated[float, Field(gt=0)]
ObjectId = Annotated[int, Field(ge=1, le=0xFFFE)]


class AuditSettings(BaseModel):
    """`[providers.NAME.audit]` of a YubiHSM 2."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    auth_key_id: ObjectId
    """The authentication key that reads the log: one with the capability get-log-entries and nothing else."""
    password: SecretSource
    """Where its password comes from."""
    on_alarm: Literal["stop", "warn"] = "stop"
    """Whether signing stops while an alarm stands, or goes on; it is logged either way."""
    other_auth_key_ids: frozenset[ObjectId] = frozenset()
    """Authentication keys of others who sign with this device: their signatures raise no alarm."""
    interval_s: Seconds = 5.0
    """How often the log is read while signatures are made."""
    idle_interval_s: Seconds = 60.0
    """How often it is read while none are."""
    drain_at_entries: Annotated[int, Field(ge=1, le=CAPACITY // 2)] = CAPACITY // 2
    """How many of the device's 62 entries may be in use before it is read at once."""
    uncertain_s: Seconds = 60.0
    """How long a signature whose answer never came (a timeout, a crash) may still turn up in the log."""
