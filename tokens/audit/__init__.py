"""The audit of a YubiHSM 2: its log is read, verified, kept, and reconciled with what the service asked for."""

from tokens.audit.auditor import Auditor
from tokens.audit.ledger import Ledger, Operation
from tokens.audit.log import LogPage, LogSource
from tokens.audit.settings import AuditSettings

__all__ = ["AuditSettings", "Auditor", "Ledger", "LogPage", "LogSource", "Operation"]
